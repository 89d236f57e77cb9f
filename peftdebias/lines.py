"""Files as lines and blocks of lines, plain or gzip, with the place of each.

What it adds over corpus.py: finding files, opening, decoding, counting bytes and lines. It leaves out what a line means.

Text is utf-8, strictly; a BOM is dropped, a line ends at \\n or \\r\\n and nowhere else.
"""

import glob
import gzip
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from peftdebias.errors import DataError, PeftDebiasError
from peftdebias.options import expect_path

FORMATS = ("txt", "csv", "tsv", "jsonl")
BLOCK = 1 << 18  # bytes read together: much more than a line, and a block's tokens are made in about a second
SHOWN = 5  # corrupt lines that are named
BOM = b"\xef\xbb\xbf"


class Place(NamedTuple):
    """Where a text begins: the number of its file, bytes (unpacked) and lines before its record, and which of the record's texts it is."""

    file: int = 0
    offset: int = 0
    lines: int = 0
    part: int = 0


@dataclass
class Skipped:
    """What `on_error="skip"` left out: how many lines or records, and the first SHOWN of them and the last as "file:line: reason"."""

    count: int = 0
    first: list[str] = field(default_factory=list)
    last: str = ""

    def add(self, message: str) -> None:
        self.count += 1
        self.last = message
        if len(self.first) < SHOWN:
            self.first.append(message)

    def report(self, what: str) -> list[str]:
        """Lines for people; none where nothing was left out."""
        if not self.count:
            return []
        shown = f"; the first {len(self.first)}:" if self.count > len(self.first) else ":"
        return [f"{what}: {self.count} corrupt lines or records were left out{shown}", *(f"  {line}" for line in self.first)]


Report = Callable[[str], None]
"""Hears of each corrupt line or record: `stop`, or Skipped.add."""


def stop(message: str) -> None:
    raise DataError(message)


def find(paths: Sequence[str | Path]) -> list[str]:
    """The files of all names and patterns (`*`, `?`, `[...]`, `**`), those of a pattern in alphabetical order.

    A name that exists is itself, whatever characters it has. Raises DataError on a pattern that fits nothing, a missing file, a name no reader fits, and what is no name.
    """
    found = []
    for path in [paths] if isinstance(paths, (str, os.PathLike)) or not isinstance(paths, Iterable) else paths:
        if isinstance(path, (str, os.PathLike)) and is_pattern(path):
            matches = sorted(glob.glob(str(path), recursive=True))
            if not matches:
                raise DataError(f"{path}: expected files that fit this pattern, found none")
            found += matches
        else:
            expect_path("files", path, DataError)
            found.append(str(path))
    for path in found:
        kind(path)
    return found


def is_pattern(path: str | Path) -> bool:
    return glob.has_magic(str(path)) and not os.path.lexists(path)


def kind(path) -> str:
    """"txt", "csv", "tsv" or "jsonl"; raises DataError for a file that is not there or has another name."""
    if str(path) == "-":
        return "txt"
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path}: expected a file, got a folder")
    if not path.exists():
        raise DataError(f"{path}: no such file")
    refuse_pickle(path)
    name = path.name.lower().removesuffix(".gz")
    found = name.rpartition(".")[2]
    if found not in FORMATS or "." not in name:
        expected = ", ".join("." + known for known in FORMATS)
        pipe = "; of standard input lines of text are read, by augment and upstream as -, by predict without FILE" if path.is_fifo() else ""
        raise DataError(f"{path}: expected a file named {expected}, or one of these with .gz, got '{Path(name).suffix}'{pipe}")
    return found


def is_packed(path) -> bool:
    """Whether its name says gzip."""
    return str(path).lower().endswith(".gz")


def refuse_pickle(path: Path) -> None:
    """Raises DataError on a file that is one by its name, unread, with a way out."""
    if path.name.lower().removesuffix(".gz").endswith((".pkl", ".pickle")):
        raise DataError(f"{path}: expected csv, tsv or jsonl, got a pickle, which can run any program when it is read; export it once where you trust it: "
                        f"python -c \"import pandas; pandas.DataFrame(pandas.read_pickle('{path.name}')).to_csv('{path.stem}.csv', index=False)\"")


class Copies:
    """Of what can be read once only, standard input and pipes. A context manager: they are deleted at its end, and errors inside name what was copied."""

    def __enter__(self) -> "Copies":
        self._folder, self._names = tempfile.TemporaryDirectory(prefix="peftdebias-"), {}
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._folder.cleanup()
        if isinstance(error, PeftDebiasError) and (words := self.named(str(error))) != str(error):
            raise type(error)(words) from None

    def seekable(self, paths: Sequence[str]) -> list[str]:
        """The same files, with copies in the place of those."""
        found = []
        for path in paths:
            if path == "-" or not Path(path).is_file():
                copy = Path(self._folder.name) / f"{len(self._names)}-{'stdin.txt' if path == '-' else Path(path).name}"
                self._names[str(copy)] = "<stdin>" if path == "-" else path
                with _told(path, 1), open(_stdin() if path == "-" else path, "rb", closefd=path != "-") as source:
                    self._copy(source, copy)
                path = str(copy)
            found.append(path)
        return found

    def _copy(self, source: BinaryIO, copy: Path) -> None:
        """An error of reading is its caller's to tell; one of writing is the temporary folder's."""
        def done(write: Callable):
            try:
                return write()
            except OSError as error:
                raise DataError(f"temporary folder {os.path.dirname(self._folder.name)}: cannot be written: {error.strerror}; TMPDIR names another") from None

        with done(lambda: open(copy, "wb", buffering=0)) as target:
            while got := memoryview(source.read(BLOCK)):
                while got:
                    got = got[done(lambda: target.write(got)):]

    def named(self, line: str) -> str:
        """With the copies' own names in it."""
        for copy, name in self._names.items():
            line = line.replace(copy, name)
        return line


def place(path, number: int) -> str:
    """"file:line"."""
    return f"{called(path)}:{number}"


def called(path) -> str:
    """A file in a message."""
    return "<stdin>" if str(path) == "-" else str(path)


def all_called(paths: Iterable) -> str:
    """Files in a message."""
    return ", ".join(map(called, paths))


class Lines:
    """Lines without their ends, one after another. `offset` and `count`: the bytes and lines that came so far.

    A line that is no utf-8 is reported and left out. For records of several lines, `quoted`: `begin` is called before one, then `first` is the number of its first
    line, and `torn` tells whether a line of it is no utf-8. That line comes all the same, with U+FFFD for what is none: its quotes open and close fields.
    """

    def __init__(self, path, report: Report = stop, quoted: bool = False):
        self.path, self.report, self.quoted = path, report, quoted
        self.offset = self.count = 0
        self.begin()
        with _told(path, 1):
            self._stream = _open(path)

    def begin(self) -> None:
        self.first, self.torn = 0, False

    def seek(self, offset: int, count: int) -> None:
        """Go on behind `offset` bytes that hold `count` lines; gzip reads them again."""
        if offset != self.offset:  # pipes cannot, and need not
            with _told(self.path, count + 1):
                self._stream.seek(offset)
        self.offset, self.count = offset, count

    def close(self) -> None:
        self._stream.close()

    def __iter__(self):
        return self

    def __next__(self) -> str:
        while True:
            try:
                raw = next(self._stream)
            except (OSError, EOFError, zlib.error) as error:
                raise _unreadable(self.path, self.count + 1, error) from None
            line = raw.removeprefix(BOM) if self.count == 0 else raw
            self.offset += len(raw)
            self.count += 1
            try:
                line = line.decode("utf-8")
            except UnicodeDecodeError as error:
                self.torn = True
                self.report(not_utf8(self.path, self.count, line, error))
                if not self.quoted:
                    continue
                line = line.decode("utf-8", "replace")
            self.first = self.first or self.count
            return line.removesuffix("\n").removesuffix("\r")


UTF_16 = "utf-16 (`iconv -f utf-16 -t utf-8` rewrites it)"
BEGINNINGS = {b"\xff\xfe": UTF_16, b"\xfe\xff": UTF_16, b"\x1f\x8b": "gzip (whose names end in .gz)"}  # of files that are no utf-8


def not_utf8(path, number: int, line: bytes, error: UnicodeDecodeError) -> str:
    if number == 1 and (kind := BEGINNINGS.get(line[:2])):
        return f"{place(path, number)}: expected utf-8, got {kind}"
    return f"{place(path, number)}: expected utf-8, got 0x{line[error.start]:02x} at byte {error.start + 1} of the line"


def blocks(path, offset: int = 0, count: int = 0, size: int = BLOCK) -> Iterator[tuple[bytes, int, int]]:
    """(whole lines of about `size` bytes, bytes before them, lines before them), behind `offset` bytes that hold `count` lines."""
    pending: list[bytes] = []
    with _told(path, count + 1):
        stream = _open(path)
        if offset:
            stream.seek(offset)
    with stream:
        read = stream.read1 if str(path) == "-" else stream.read  # whoever types or pipes is answered at once
        while True:
            try:
                got = read(size)
            except (OSError, EOFError, zlib.error) as error:
                raise _unreadable(path, count + 1, error) from None
            cut = got.rfind(b"\n") + 1
            if got and not cut:
                pending.append(got)
                continue
            block = b"".join((*pending, got[:cut]))
            pending = [got[cut:]]
            if block:
                yield block, offset, count
                offset, count = offset + len(block), count + block.count(b"\n")
            if not got:
                return


def _open(path):
    if str(path) == "-":
        return open(_stdin(), "rb", closefd=False)
    return gzip.open(path, "rb") if is_packed(path) else open(path, "rb")


def _stdin() -> int:
    """Standard input's descriptor. Raises DataError where it is closed."""
    if sys.stdin is None:
        raise DataError("<stdin>: expected texts, got none: it is closed")
    return sys.stdin.fileno()


def _unreadable(path, number: int, error: Exception) -> DataError:
    if isinstance(error, (EOFError, zlib.error)):  # where in the file is not known: it is read by the block
        return DataError(f"{path}: cannot be read to its end: {error}")
    return DataError(f"{place(path, number)}: cannot be read: {getattr(error, 'strerror', None) or error}")


class _told:
    """Turns an error of the system into one that names file and line."""

    def __init__(self, path, number: int):
        self.path, self.number = path, number

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, (OSError, EOFError, zlib.error)):
            raise _unreadable(self.path, self.number, error) from None
