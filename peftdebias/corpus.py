"""Text files in: plain texts for upstream, labelled examples for downstream.

Formats, told by the file name; each may also end in .gz:

    .txt                 one text a line. As labelled examples (`read_examples`): tab-separated, as SICK and MultiNLI publish it
    .csv, .tsv, .jsonl   a table with a header, or with columns by number (records.py)

Text is utf-8, strictly; a BOM is dropped, a line ends at \\n or \\r\\n and nowhere else (GHC has U+2028 inside a text).
Every text carries its place, "file:line", the line where its record starts. What cannot be read as asked raises
DataError with that place. What the words mean (attribute words, tokens) is not known here.

Texts come in chunks, neighbours of one file (`chunks`): a corpus of any size is read in the same memory, and reading can
begin again at any text's `Place`. `on_error="skip"` leaves out every corrupt line or record, counts it and names the first
ones (`Skipped`): no utf-8, another number of fields, no JSON, an object without the column, no text in it, half a surrogate
pair. A file that is missing or ends too early and a column that the header does not have always stop.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from peftdebias import lines, records, sentences
from peftdebias.config import ON_ERROR, UNITS
from peftdebias.errors import ConfigError, DataError
from peftdebias.lines import BLOCK, Lines, Place, Report, Skipped, find
from peftdebias.lines import place as _place
from peftdebias.records import Record, json_type

TRUE = ("1", "1.0", "true", "yes")  # in any case
FALSE = ("0", "0.0", "false", "no")


@dataclass(frozen=True, slots=True)
class Text:
    """One text of a corpus and where it stands, for messages."""

    text: str
    place: str  # "file:line"


@dataclass(frozen=True, slots=True)
class Example:
    """One row of labelled data, as its columns say; None where no column was asked for."""

    text: str
    text_pair: str | None
    label: str | None
    group: str | None
    place: str  # "file:line"


def read_texts(paths: Sequence[str | Path], column: str | None = None, *, on_error: str = "stop", unit: str = "line",
               skipped: Skipped | None = None) -> Iterator[Text]:
    """The texts of all files and patterns (`lines.find`) in order, streaming. `column` names the text in csv, tsv and jsonl (default "text").

    unit: "line" (a line or row is a text), "sentence" (sentences.py parts each) or "document" (txt: the lines up to a blank one, joined by line breaks).
    Blank lines and blank cells are skipped. "-" is the standard input, one text a line. on_error: "stop", or "skip", and `skipped` hears what was left out.
    Names that no reader fits and files that are missing raise at the call; what is inside a file raises when it is reached.
    """
    stream = chunks(find(paths), column, on_error=on_error, unit=unit, skipped=skipped)
    return (Text(text, place) for chunk in stream for text, place in zip(chunk.texts, chunk.places()))


def check_column(paths: Sequence[str], column: str | None, flag: str = "--column") -> None:
    """Raises ConfigError on a column where no file has any."""
    if column is not None and paths and all(lines.kind(path) == "txt" for path in paths):
        raise ConfigError(f"{flag} {column}: expected a csv, tsv or jsonl file to take it from, got txt alone ({', '.join(map(str, paths[:3]))})")


# Chunks: neighbouring texts of one file.


class Chunk(NamedTuple):
    """texts: at least one. numbers: the record that each is from, counted in the chunk; None where every text is one. where(): bytes and lines before each
    record. dropped: texts of the first record that come before texts[0]."""

    path: str
    file: int
    texts: list[str]
    numbers: list[int] | None
    where: Callable[[], tuple[Sequence[int], Sequence[int]]]
    end: Place
    dropped: int = 0

    def start(self, index: int) -> Place:
        """Where text `index` begins; for len(texts) the end of the chunk."""
        if index == len(self.texts):
            return self.end
        record, part = index, 0
        if self.numbers is not None:
            record = self.numbers[index]
            part = index - self.numbers.index(record) + (self.dropped if record == self.numbers[0] else 0)
        offsets, counts = self.where()
        return Place(self.file, offsets[record], counts[record], part)

    def places(self) -> Iterator[str]:
        """"file:line" of every text."""
        counts = self.where()[1]
        return (_place(self.path, counts[record] + 1) for record in (range(len(self.texts)) if self.numbers is None else self.numbers))


def chunks(paths: Sequence[str], column: str | None = None, *, on_error: str = "stop", unit: str = "line", skipped: Skipped | None = None,
           start: Place = Place()) -> Iterator[Chunk]:
    """The texts of read_texts from `start` on, as chunks that end where they like; `paths` as `lines.find` gives them."""
    if unit not in UNITS or on_error not in ON_ERROR:
        raise ConfigError(f"corpus: expected a unit of {', '.join(UNITS)} and on_error {' or '.join(ON_ERROR)}, got {unit} and {on_error}")
    files = [(path, lines.kind(path)) for path in paths]
    for path, kind in files:
        if unit == "document" and kind != "txt":
            raise ConfigError(f"{path}: --unit document: expected txt files, whose documents end at blank lines, got {kind}")
    skipped = Skipped() if skipped is None else skipped
    return _chunks(files, column or "text", unit, skipped.add if on_error == "skip" else lines.stop, skipped, start)


def _chunks(files, column: str, unit: str, report: Report, skipped: Skipped, start: Place) -> Iterator[Chunk]:
    for number, (path, kind) in enumerate(files):
        if number < start.file:
            continue
        begin = start if number == start.file else Place(number)
        found, before = begin != Place(number), skipped.count  # a file that is entered in the middle had texts before
        with contextlib.closing(_file_chunks(path, kind, column, unit, report, begin)) as stream:
            for chunk in stream:
                found = True
                yield chunk
        if not found:
            left_out = skipped.count - before
            raise DataError(f"no text in {lines.called(path)}" + (f" but {left_out} corrupt lines or records, such as {skipped.last}" if left_out else ""))


def _file_chunks(path: str, kind: str, column: str, unit: str, report: Report, begin: Place) -> Iterator[Chunk]:
    if kind != "txt":
        stream = _record_chunks(path, begin.file, _cells(path, kind, column, report, begin))
    elif unit == "document":
        stream = _record_chunks(path, begin.file, _documents(path, report, begin))
    else:
        stream = _line_chunks(path, report, begin)
    drop = begin.part  # texts of the first record that are not wanted
    with contextlib.closing(stream):
        for chunk in stream:
            if unit == "sentence":
                chunk = _in_sentences(chunk)
            if drop:
                chunk, drop = chunk._replace(texts=chunk.texts[drop:], numbers=chunk.numbers[drop:], dropped=drop), 0
            if chunk.texts:
                yield chunk


def _in_sentences(chunk: Chunk) -> Chunk:
    parts = [sentences.split(text) for text in chunk.texts]
    numbers = [number for number, part in enumerate(parts) for _ in part]
    return chunk._replace(texts=list(itertools.chain.from_iterable(parts)), numbers=numbers)


def _line_chunks(path: str, report: Report, begin: Place) -> Iterator[Chunk]:
    """The lines of a txt file, decoded and parted by the block."""
    with contextlib.closing(lines.blocks(path, begin.offset, begin.lines)) as blocks:
        for raw, offset, count in blocks:
            try:
                text = (raw.removeprefix(lines.BOM) if offset == 0 else raw).decode("utf-8")
            except UnicodeDecodeError:  # which line it is, and what comes before it
                yield from _record_chunks(path, begin.file, _decoded(path, raw, report, offset, count))
                continue
            rows = text.removesuffix("\n").split("\n")
            end = Place(begin.file, offset + len(raw), count + len(rows))
            if "\r" in text:
                rows = [row.removesuffix("\r") for row in rows]
            full = [i for i, row in enumerate(rows) if row and not row.isspace()]
            where = functools.cache(functools.partial(_where, raw, offset, count, full))
            yield Chunk(path, begin.file, rows if len(full) == len(rows) else [rows[i] for i in full], None, where, end)


def _where(raw: bytes, offset: int, count: int, full: list[int]) -> tuple[list[int], list[int]]:
    starts = list(itertools.accumulate((len(row) + 1 for row in raw.split(b"\n")), initial=offset))
    return [starts[i] for i in full], [count + i for i in full]


def _decoded(path: str, raw: bytes, report: Report, offset: int, count: int) -> Iterator[Record]:
    for row in raw.removesuffix(b"\n").split(b"\n"):
        line, begin = row.removeprefix(lines.BOM) if offset == 0 else row, (offset, count)
        offset, count = offset + len(row) + 1, count + 1
        try:
            text = line.decode("utf-8").removesuffix("\r")
        except UnicodeDecodeError as error:
            report(lines.not_utf8(path, count, line, error))
            continue
        if text and not text.isspace():
            yield Record([text], count, begin, (offset, count))


def _record_chunks(path: str, file: int, found: Iterator[Record]) -> Iterator[Chunk]:
    """Records with one text each, gathered to about BLOCK characters."""
    gathered: list[Record] = []
    size = 0

    def gather() -> Chunk:
        starts = tuple(zip(*(record.begin for record in gathered)))
        return Chunk(path, file, [record.values[0] for record in gathered], None, lambda: starts, Place(file, *gathered[-1].end))

    try:
        for record in found:
            gathered.append(record)
            size += len(record.values[0])
            if size >= BLOCK:
                yield gather()
                gathered, size = [], 0
    except DataError:  # what came before it counts
        if gathered:
            yield gather()
        raise
    if gathered:
        yield gather()


def _cells(path: str, kind: str, column: str, report: Report, begin: Place) -> Iterator[Record]:
    """The records whose one value is a text that is not blank."""
    for record in records.read(path, kind, [column], report, begin):
        value = record.values[0]
        if not isinstance(value, str):
            report(_no_text(value, column, _place(path, record.first)))
        elif value and not value.isspace():
            yield record


def _documents(path: str, report: Report, begin: Place) -> Iterator[Record]:
    """The lines between blank ones, joined by line breaks."""
    rows: list[str] = []
    with contextlib.closing(Lines(path, report)) as source:
        source.seek(begin.offset, begin.lines)
        start = (source.offset, source.count)
        for line in source:
            if line and not line.isspace():
                if not rows:
                    first = source.count
                rows.append(line)
                continue
            if rows:
                yield Record(["\n".join(rows)], first, start, (source.offset, source.count))
                rows = []
            start = (source.offset, source.count)
        if rows:
            yield Record(["\n".join(rows)], first, start, (source.offset, source.count))


def examples(
    path: str | Path,
    *,
    text: str,
    label: str | Sequence[str] | None = None,
    text_pair: str | None = None,
    group: str | None = None,
) -> Iterator[Example]:
    """The rows of one table in order, streaming. The keyword arguments name its columns; what is not named is None in every Example.

    Labels and groups are strings: JSON integers and integral floats are written without a point, booleans as
    "true"/"false"; spaces around them are dropped and an empty one is an error. Several `label` columns make one label,
    "1" where any of them is true and "0" elsewhere. A row with an empty text is a row, and where neither label nor group is asked for, one in which
    nothing is said at all; a file with no text is an error, at its end.
    """
    kind = lines.kind(path)
    kind = "tsv" if kind == "txt" else kind
    labels = [] if label is None else [label] if isinstance(label, str) else list(label)
    wanted = [text, *labels, *([text_pair] if text_pair else []), *([group] if group else [])]
    said = False
    for record in records.read(path, kind, wanted, blank=not (labels or group)):
        place, values = _place(path, record.first), record.values
        cell = dict(zip(wanted, values))
        example = Example(
            text=_text(cell[text], text, place),
            text_pair=_text(cell[text_pair], text_pair, place) if text_pair else None,
            label=_label({name: cell[name] for name in labels}, place) if labels else None,
            group=_name(cell[group], "group", group, place) if group else None,
            place=place,
        )
        said = said or bool(example.text.strip())
        yield example
    if not said:
        raise DataError(f"no text in {lines.called(path)}")


def read_examples(path: str | Path, *, text: str, label: str | Sequence[str] | None = None, text_pair: str | None = None, group: str | None = None) -> list[Example]:
    """All rows of one table, as `examples` has them."""
    return list(examples(path, text=text, label=label, text_pair=text_pair, group=group))


# Cells: what a value read from a file means.


def _text(value, column: str, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(_no_text(value, column, place))
    return value


def _no_text(value, column: str, place: str) -> str:
    return f"{place}: expected a text in column '{column}', got {json_type(value)}"


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
    if isinstance(value, (dict, list)) or value in (math.inf, -math.inf):  # JSON has no such number, but 1e400 is read as one
        raise DataError(f"{place}: expected a {what} in column '{column}', got {value if isinstance(value, float) else json_type(value)}")
    name = "" if value is None else str(value).strip()
    if not name:
        raise DataError(f"{place}: empty {what} in column '{column}'")
    return name
