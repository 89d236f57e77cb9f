"""Text files in: plain texts for upstream, labelled examples for downstream.

Formats, told by the file name; each may also end in .gz:

    .txt     one text a line. As labelled examples (`read_examples`): tab-separated, as SICK and MultiNLI publish it
    .csv     commas, double quotes; a quoted field may hold line breaks
    .tsv     tabs; a record is one line and a field lies between two tabs, whatever quotes are in it. A field that is one
             whole csv-quoted string ("..." with every quote inside doubled, as pandas writes it) is unquoted. So GHC and
             Stormfront (quoted by pandas) and GLUE's MNLI (no quoting, stray quotes in the text) are both read right;
             the price is that a literal "Yes." in an unquoted file loses its outer quotes.
    .jsonl   one object a line

Tables start with a header. A file without one is addressed by column numbers from 0: when a column asked for is not in
the first line and all columns asked for are numbers, the file has no header (`text="1", text_pair="2", label="0"`).

Text is utf-8, strictly; a BOM is dropped, a line ends at \\n or \\r\\n and nowhere else (GHC has U+2028 inside a text).
Every text carries its place, "file:line", the line where its record starts. What cannot be read as asked raises
DataError with that place. What the words mean (attribute words, tokens) is not known here.
"""

import contextlib
import csv
import gzip
import json
import math
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from peftdebias.errors import ConfigError, DataError

FORMATS = ("txt", "csv", "tsv", "jsonl")
TRUE = ("1", "1.0", "true", "yes")  # in any case, where a label is "any of these columns"
FALSE = ("0", "0.0", "false", "no")


@dataclass(frozen=True, slots=True)
class Text:
    text: str
    place: str  # "file:line"


@dataclass(frozen=True, slots=True)
class Example:
    text: str
    text_pair: str | None
    label: str | None
    group: str | None
    place: str  # "file:line"


def read_texts(paths: Sequence[str | Path], column: str | None = None) -> Iterator[Text]:
    """The texts of all files in order, streaming. `column` names the text in csv, tsv and jsonl (default "text").

    Blank lines and blank cells are skipped. "-" is the standard input, one text a line. Names that no reader fits and
    files that are missing raise at the call; what is inside a file raises when it is reached.
    """
    if isinstance(paths, (str, Path)):
        paths = [paths]
    kinds = [_kind(path) for path in paths]
    return _texts(list(zip(paths, kinds)), column or "text")


def _texts(files, column: str) -> Iterator[Text]:
    for path, kind in files:
        found = False
        if kind == "txt":
            cells = ((_place(path, number), (line,)) for number, line in _lines(path))
        else:
            cells = _records(path, kind, [column])
        for place, (value,) in cells:
            text = _text(value, column, place)
            if text.strip():
                found = True
                yield Text(text, place)
        if not found:
            raise DataError(f"no text in {path}")


def read_examples(
    path: str | Path,
    *,
    text: str,
    label: str | Sequence[str] | None = None,
    text_pair: str | None = None,
    group: str | None = None,
) -> list[Example]:
    """All rows of one table. The keyword arguments name its columns; what is not named is None in every Example.

    Labels and groups are strings: JSON integers and integral floats are written without a point, booleans as
    "true"/"false"; spaces around them are dropped and an empty one is an error. Several `label` columns make one label,
    "1" where any of them is true and "0" elsewhere. A row with an empty text is a row; a file with no text is an error.
    """
    kind = _kind(path)
    kind = "tsv" if kind == "txt" else kind
    labels = [] if label is None else [label] if isinstance(label, str) else list(label)
    wanted = [text, *labels, *([text_pair] if text_pair else []), *([group] if group else [])]
    examples = []
    for place, values in _records(path, kind, wanted):
        cell = dict(zip(wanted, values))
        examples.append(
            Example(
                text=_text(cell[text], text, place),
                text_pair=_text(cell[text_pair], text_pair, place) if text_pair else None,
                label=_label({name: cell[name] for name in labels}, place) if labels else None,
                group=_name(cell[group], "group", group, place) if group else None,
                place=place,
            )
        )
    if not any(example.text.strip() for example in examples):
        raise DataError(f"no text in {path}")
    return examples


# Cells: what a value read from a file means.


def _text(value, column: str, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: expected a text in column '{column}', got {_json_type(value)}")
    return value


def _label(cells: dict, place: str) -> str:
    names = {column: _name(value, "label", column, place) for column, value in cells.items()}
    if len(names) == 1:
        return next(iter(names.values()))
    for column, name in names.items():
        if name.lower() not in TRUE + FALSE:
            raise DataError(f"{place}: expected 0 or 1 in column '{column}' of a label in several columns, got '{name}'")
    return "1" if any(name.lower() in TRUE for name in names.values()) else "0"


def _name(value, what: str, column: str, place: str) -> str:
    """A label or group as a string."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        value = int(value) if value.is_integer() else None if math.isnan(value) else value
    if isinstance(value, (dict, list)):
        raise DataError(f"{place}: expected a {what} in column '{column}', got {_json_type(value)}")
    name = "" if value is None else str(value).strip()
    if not name:
        raise DataError(f"{place}: empty {what} in column '{column}'")
    return name


def _json_type(value) -> str:
    kinds = {bool: "true or false", int: "a number", float: "a number", dict: "an object", list: "a list", str: "a string"}
    return kinds.get(type(value), "null")


# Records: (place, the values of the wanted columns in the wanted order).


def _records(path, kind: str, wanted: list[str]) -> Iterator[tuple[str, list]]:
    if kind == "jsonl":
        yield from _json_records(path, wanted)
        return
    positions = None
    for place, row in _csv_rows(path) if kind == "csv" else _tsv_rows(path):
        if positions is None:
            width = len(row)
            positions, has_header = _positions(row, wanted, place)
            if has_header:
                continue
        if len(row) != width:
            raise DataError(f"{place}: expected {width} fields, got {len(row)}")
        yield place, [row[position] for position in positions]


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
    raise DataError(f"{place}: no column '{missing[0]}'; columns: {_listing(header)}")


def _listing(names) -> str:
    """Column names for a message: one short line, also when the first row is text and no header."""
    names = [name if name and len(name) <= 40 else f"'{name[:40]}'" for name in names]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _csv_rows(path) -> Iterator[tuple[str, list[str]]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader((line + "\n" for _, line in _lines(path)), strict=True)
    while True:
        place = _place(path, reader.line_num + 1)
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{place}: not csv: {error}") from None
        if len(row) > 1 or (row and row[0].strip()):
            yield place, row


def _tsv_rows(path) -> Iterator[tuple[str, list[str]]]:
    for number, line in _lines(path):
        if line.strip():
            yield _place(path, number), [_unquote(field) for field in line.split("\t")]


def _unquote(field: str) -> str:
    if len(field) > 1 and field[0] == field[-1] == '"' and '"' not in field[1:-1].replace('""', ""):
        return field[1:-1].replace('""', '"')
    return field


def _json_records(path, wanted: list[str]) -> Iterator[tuple[str, list]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        place = _place(path, number)
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: not JSON: {error}") from None
        if not isinstance(record, dict):
            raise DataError(f"{place}: expected a JSON object, got {_json_type(record)}")
        for name in wanted:
            if name not in record:
                raise DataError(f"{place}: no column '{name}'; columns: {_listing(record)}")
            if isinstance(record[name], str) and not record[name].isascii():
                try:
                    record[name].encode()
                except UnicodeEncodeError as error:  # "\ud800" alone is legal JSON and no text
                    raise DataError(f"{place}: column '{name}' holds half a surrogate pair at character {error.start}") from None
        yield place, [record[name] for name in wanted]


# Files and lines.


def _kind(path) -> str:
    """"txt", "csv", "tsv" or "jsonl"; raises for a file that is not there or has another name."""
    if str(path) == "-":
        return "txt"
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path}: expected a file, got a folder")
    if not path.exists():
        raise DataError(f"{path}: no such file")
    name = path.name.lower().removesuffix(".gz")
    kind = name.rpartition(".")[2]
    if kind not in FORMATS or "." not in name:
        expected = ", ".join("." + known for known in FORMATS)
        raise DataError(f"{path}: expected a file named {expected}, or one of these with .gz, got '{Path(name).suffix}'")
    return kind


def _lines(path) -> Iterator[tuple[int, str]]:
    """Line numbers from 1 and lines without their ends."""
    number = 0
    try:
        with _open(path) as stream:
            for number, raw in enumerate(stream, 1):
                if number == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                try:
                    line = raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    byte = f"0x{raw[error.start]:02x} at byte {error.start + 1} of the line"
                    raise DataError(f"{_place(path, number)}: expected utf-8, got {byte}") from None
                yield number, line.removesuffix("\n").removesuffix("\r")
    except (OSError, EOFError, zlib.error) as error:
        message = getattr(error, "strerror", None) or error
        raise DataError(f"{_place(path, number + 1)}: cannot be read: {message}") from None


def _open(path):
    if str(path) == "-":
        return open(sys.stdin.fileno(), "rb", closefd=False)
    return gzip.open(path, "rb") if str(path).lower().endswith(".gz") else open(path, "rb")


def _place(path, number: int) -> str:
    return f"{'<stdin>' if str(path) == '-' else path}:{number}"


# Output: a file whole or not at all.


@contextlib.contextmanager
def writing(path: str | None) -> Iterator:
    """A text file that takes its name only when the block ends well; None or "-" is standard output. Raises ConfigError where it cannot be written."""
    if path in (None, "-"):
        yield sys.stdout
        return
    target = Path(path)
    if os.path.isdir(target):
        raise ConfigError(f"{path}: expected a file to write, got a folder")
    if os.path.exists(target) and not target.is_file():  # a device such as /dev/null
        with open(target, "w", encoding="utf-8") as file:
            yield file
        return
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        file = open(partial, "w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        with file:
            yield file
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
