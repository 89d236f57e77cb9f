"""Tables as records: csv, tsv and jsonl, the values of the columns that are asked for.

What it adds over lines.py: what a line, or several of them, means as fields. It leaves out what a value means (corpus.py).

    csv      commas, double quotes; a quoted field may hold line breaks
    tsv      tabs; a record is one line and a field lies between two tabs, whatever quotes are in it. A field that is one whole
             csv-quoted string ("..." with every quote inside doubled, as pandas writes it) is unquoted. So GHC and Stormfront
             (quoted by pandas) and GLUE's MNLI (no quoting, stray quotes in the text) are both read right; the price is that
             a literal "Yes." in an unquoted file loses its outer quotes.
    jsonl    one object a line

Tables start with a header. A file without one is addressed by column numbers from 0: when a column asked for is not in the
first line and all columns asked for are numbers, the file has no header (`text="1", text_pair="2", label="0"`).
"""

import contextlib
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from peftdebias import lines
from peftdebias.errors import DataError
from peftdebias.lines import Lines, Place, Report
from peftdebias.lines import place as _place


class Record(NamedTuple):
    """values: of the columns asked for. first: number of its first line. begin, end: (bytes, lines) before it and up to its end."""

    values: list
    first: int
    begin: tuple[int, int]
    end: tuple[int, int]


def read(path: str | Path, kind: str, wanted: list[str], report: Report = lines.stop, begin: Place = Place(), blank: bool = True) -> Iterator[Record]:
    """The records of one file from `begin` on. kind: csv, tsv or jsonl. A corrupt record goes to `report`; a missing column raises DataError.

    blank: whether a row of as many fields as the header, none of which says anything, is a row; one of another number, or above the header, is none.
    """
    with contextlib.closing(Lines(path, report, quoted=kind == "csv")) as source:
        if kind == "jsonl":
            source.seek(begin.offset, begin.lines)
            yield from _json_records(source, wanted)
            return
        rows = _csv_rows if kind == "csv" else _tsv_rows
        positions = None
        for record in rows(source):
            if positions is None:
                if _is_blank(record) and not all(name.isdecimal() for name in wanted):
                    continue
                width, place = len(record.values), _place(path, record.first)
                positions, has_header = _positions(record.values, wanted, place)
                if begin.offset:
                    break
                if has_header:
                    continue
            yield from _row(path, record, width, positions, report, blank)
        if positions is not None and begin.offset:
            source.seek(begin.offset, begin.lines)
            for record in rows(source):
                yield from _row(path, record, width, positions, report, blank)


def _row(path, record: Record, width: int, positions: list[int], report: Report, blank: bool) -> Iterator[Record]:
    if _is_blank(record) and (len(record.values) != width or not blank):  # what spreadsheets put behind the last row
        return
    if len(record.values) != width:
        report(f"{_place(path, record.first)}: expected {width} fields, got {len(record.values)}{_until(record.first, record.end[1])}")
    else:
        yield record._replace(values=[record.values[position] for position in positions])


def _until(first: int, last: int) -> str:
    """How far a record of several lines goes: a quote that nothing closes takes in all up to the next one, or the end of the file."""
    return f" (lines {first} to {last}: a quote opens there)" if last > first else ""


def _is_blank(record: Record) -> bool:
    return not any(value.strip() for value in record.values)


def _positions(first_row: list[str], wanted: list[str], place: str) -> tuple[list[int], bool]:
    """Where the wanted columns are, and whether the first row is a header."""
    header = [name.strip() for name in first_row]
    missing = [name for name in wanted if name not in header]
    if not missing:
        for name in wanted:
            if header.count(name) > 1:
                raise DataError(f"{place}: expected one column '{name}', got {header.count(name)}")
        return [header.index(name) for name in wanted], True
    if all(name.isdecimal() for name in wanted):
        for name in wanted:
            if int(name) >= len(header):
                raise DataError(f"{place}: no column {name}; a line has {len(header)} fields, the first is number 0")
        return [int(name) for name in wanted], False
    parted = next((mark for mark in ";|,\t" if len(header) == 1 and missing[0] in [name.strip(' "') for name in header[0].split(mark)]), None)
    hint = f" (one, parted by {parted!r}: expected commas in a csv, tabs in a tsv)" if parted else ""
    raise DataError(f"{place}: no column '{missing[0]}'; columns: {_listing(header)}{hint}")


def _listing(names) -> str:
    """Column names for a message: one short line, also when the first row is text and no header."""
    names = [name if name and len(name) <= 40 else f"'{name[:40]}'" for name in names]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _csv_rows(source: Lines) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader((line + "\n" for line in source), strict=True)
    while True:
        begin = (source.offset, source.count)
        source.begin()
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if not source.torn:
                source.report(f"{_place(source.path, source.first)}: not csv: {error}{_until(source.first, source.count)}")
            continue
        if not source.torn and row and (len(row) > 1 or not row[0] or row[0].strip()):  # a line of "" is a row, as csv writers put an empty text; a blank one is none
            yield Record(row, source.first, begin, (source.offset, source.count))


def _tsv_rows(source: Lines) -> Iterator[Record]:
    begin = (source.offset, source.count)
    for line in source:
        end = (source.offset, source.count)
        if "\t" in line or line.strip():
            yield Record([_unquote(field) for field in line.split("\t")], source.count, begin, end)
        begin = end


def _unquote(field: str) -> str:
    if len(field) > 1 and field[0] == field[-1] == '"' and '"' not in field[1:-1].replace('""', ""):
        return field[1:-1].replace('""', '"')
    return field


def _json_records(source: Lines, wanted: list[str]) -> Iterator[Record]:
    begin = (source.offset, source.count)
    for line in source:
        before, begin = begin, (source.offset, source.count)
        if line.strip():
            try:
                yield Record(_json_values(line, wanted), source.count, before, begin)
            except DataError as error:
                source.report(f"{_place(source.path, source.count)}: {error}")


def _json_values(line: str, wanted: list[str]) -> list:
    """Raises DataError with what is wrong, the place left out."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"expected a JSON object, got {json_type(record)}")
    for name in wanted:
        if name not in record:
            raise DataError(f"no column '{name}'; columns: {_listing(record)}")
        if isinstance(record[name], str) and not record[name].isascii():
            try:
                record[name].encode()
            except UnicodeEncodeError as error:  # "\ud800" alone is legal JSON and no text
                raise DataError(f"column '{name}' holds half a surrogate pair at character {error.start}") from None
    return [record[name] for name in wanted]


def json_type(value) -> str:
    """What a value read from JSON is, for a message."""
    kinds = {bool: "true or false", int: "a number", float: "a number", dict: "an object", list: "a list", str: "a string"}
    return kinds.get(type(value), "null")
