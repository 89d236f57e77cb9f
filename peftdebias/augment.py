"""Counterfactuals of files, written to a file: the `augment` command, and the settings of swapping that `upstream` shares with it.

What it adds over cda_engine.py: files in, rows out, shards, statistics and progress. A .txt goes to the engine by the block, as bytes; of other files the
texts do. A shard is the stretch of the corpus from one text to another, so the shards' outputs end to end are the output of the whole.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from . import corpus, lines
from .axes import Axis, load_axis
from .cda import Intervention
from .cda_engine import BLOCK, EVERYTHING, Counts, Written, engine
from .config import Augment
from .errors import ConfigError, DataError
from .lines import Skipped
from .options import expect
from .outputs import SHIPPED, keep_apart, tables, writing

KINDS = {"jsonl": "json", "lines": "lines"}
TOP = 10  # words that the summary names


@dataclass
class Summary:
    """What was done. words: which are replaced, for people. size: bytes read (unpacked). seconds: of all of it."""

    axis: Axis
    words: str
    counts: Counts = field(default_factory=Counts)
    skipped: Skipped = field(default_factory=Skipped)
    size: int = 0
    seconds: float = 0.0
    engine: str = ""

    @property
    def groups(self) -> dict[str, int]:
        """How often words of each column were found, by its name, else its number from 1."""
        column = {word: c for row in self.axis.groups for c, word in enumerate(row)}
        column |= {word: column[model] for word, model in self.axis.like}
        names = self.axis.columns or [str(c + 1) for c in range(max(column.values()) + 1)]
        found = dict.fromkeys(names, 0)
        for word, n in self.counts.found.items():
            found[names[column[word]]] += n
        return found

    def as_json(self) -> dict:
        counts = self.counts
        return {
            "axis": self.axis.name, "texts": counts.texts, "touched": counts.touched, "touched_share": counts.touched / max(1, counts.texts),
            "variants": counts.variants, "swaps": counts.replaced, "skipped": self.skipped.count, "groups": self.groups,
            "words": dict(counts.found.most_common()), "bytes": self.size, "seconds": round(self.seconds, 3), "engine": self.engine,
        }

    def report(self) -> list[str]:
        """Lines for people."""
        counts = self.counts
        share = 100 * counts.touched / max(1, counts.texts)
        found = self.groups if self.axis.columns else dict(counts.found.most_common(TOP))
        return [
            *self.skipped.report("corpus"),
            f"{counts.texts} texts, {counts.touched} ({share:.1f} %) with {self.words}; {counts.variants} counterfactuals, {counts.replaced} swaps",
            f"words of the axis {self.axis.name}: " + ", ".join(f"{word} {n}" for word, n in found.items()),
            f"{self.size / 1e6:.1f} MB in {self.seconds:.1f} s, {self.size / 1e6 / max(self.seconds, 1e-9):.0f} MB/s ({self.engine} engine)",
        ]


def prepared(settings) -> tuple[Axis, Intervention]:
    """The axis and the intervention of an Augment or Upstream. Raises ConfigError or DataError on what does not fit."""
    axis = load_axis(settings.axis)
    if settings.names is not None:
        axis = axis.with_names(None if settings.names == SHIPPED else settings.names)
    only_from = None if settings.from_ is None else axis.column(settings.from_)
    return axis, Intervention(only_from, settings.occurrences, settings.max_variants, settings.keep)


def augment(settings: Augment) -> Summary:
    """Write the counterfactuals that `settings` ask for. Raises PeftDebiasError on bad input, and no file is left behind then."""
    expect(Augment, settings)
    begin = time.perf_counter()
    axis, intervention = prepared(settings)
    files = lines.find(settings.files or ("-",))
    corpus.check_column(files, settings.column)
    keep_apart({"--out": settings.out or "-", "--stats": settings.stats}, [*files, *tables(settings.axis, settings.names)])
    made = engine(axis, intervention, settings.threads)
    summary = Summary(axis, intervention.words_of(axis), engine=made.name)
    start, stop = 0, EVERYTHING
    if settings.shard:
        start, stop = _stretch(settings, files, made)
    with _stopwatch(files) as bar, writing(settings.out) as out:
        put = _writer(out)
        for written, size in _output(settings, files, made, summary.skipped, KINDS[settings.format], start, stop):
            for chunk in written.chunks:
                put(chunk)
            summary.counts.add(written.counts)
            summary.size += size
            bar.update(size)
        if settings.shard:
            summary.counts.texts = stop - start  # those before were read to be numbered
        elif not summary.counts.touched:
            raise DataError(f"{lines.all_called(settings.files or ('-',))}: expected {summary.words}, found none in {summary.counts.texts} texts")
        summary.seconds = time.perf_counter() - begin
        if settings.stats:
            with writing(settings.stats) as file:
                file.write(json.dumps(summary.as_json(), ensure_ascii=False, indent=2) + "\n")
    return summary


def _output(settings: Augment, files: list[str], made, skipped: Skipped, kind: str, start: int, stop: int) -> Iterator[tuple[Written, int]]:
    """(what the engine made of a block, bytes of text in it), from the first text to the last that is wanted."""
    report = skipped.add if settings.on_error == "skip" else lines.stop
    number = 0
    for path in files:
        before, left_out = number, skipped.count
        if lines.kind(path) == "txt" and settings.unit == "line":
            pieces = _blocks(path, made, report, kind, number, start, stop)
        else:
            pieces = _texts(path, settings, made, skipped, kind, number, start, stop)
        for written, size in pieces:
            number += written.counts.texts
            yield written, size
            if number >= stop:
                return
        if number == before:
            corrupt = f" but {skipped.count - left_out} corrupt lines or records, such as {skipped.last}" if skipped.count > left_out else ""
            raise DataError(f"no text in {lines.called(path)}{corrupt}")


def _blocks(path: str, made, report, kind: str, number: int, start: int, stop: int) -> Iterator[tuple[Written, int]]:
    for block, offset, count in lines.blocks(path, size=BLOCK):
        data = block.removeprefix(lines.BOM) if offset == 0 else block
        written = made.write_lines(data, kind, number, start, stop)
        for line, raw in written.bad:
            try:
                raw.decode()
            except UnicodeDecodeError as error:
                report(lines.not_utf8(path, count + line + 1, raw, error))
        if kind == "lines" and (b"\r\r\n" in data or data.endswith(b"\r\r")):  # of two the first stays in the text
            none = {line for line, _ in written.bad}
            for line, raw in enumerate(data.split(b"\n")):
                if raw.endswith(b"\r\r") and line not in none and not raw.decode().isspace():
                    raise _with_breaks(lines.place(path, count + line + 1))
        number += written.counts.texts
        yield written, len(block)


def _with_breaks(place: str) -> DataError:
    """Of a text that a reader of lines would part, or whose end it would take for its line's."""
    return DataError(f"{place}: expected a text without line breaks for --format lines, got one with; use --format jsonl")


def _texts(path: str, settings: Augment, made, skipped: Skipped, kind: str, number: int, start: int, stop: int) -> Iterator[tuple[Written, int]]:
    for chunk in corpus.chunks([path], settings.column, on_error=settings.on_error, unit=settings.unit, skipped=skipped):
        if kind == "lines":
            for text, place in zip(chunk.texts, chunk.places()):
                if "\n" in text or text.endswith("\r"):
                    raise _with_breaks(place)
        written = made.write(chunk.texts, kind, number, start, stop)
        number += len(chunk.texts)
        yield written, sum(len(text.encode()) for text in chunk.texts)


def _stretch(settings: Augment, files: list[str], made) -> tuple[int, int]:
    """The numbers of the shard's first text and of the one behind its last. Reads everything once to count."""
    for path in files:
        if not Path(path).is_file():
            raise ConfigError(f"--shard: expected files, which are read twice, got {lines.called(path)}")
    shard, shards = settings.shard_of
    texts = sum(written.counts.texts for written, _ in _output(settings, files, made, Skipped(), "nothing", EVERYTHING, EVERYTHING))
    return texts * (shard - 1) // shards, texts * shard // shards


def _writer(out) -> Callable:
    """What takes bytes for a text file."""
    if hasattr(out, "buffer"):
        out.flush()
        return out.buffer.write
    return lambda chunk: out.write(bytes(chunk).decode())


@contextlib.contextmanager
def _stopwatch(files: list[str]) -> Iterator[tqdm]:
    """Bytes read, how fast and how long still, on standard error; quiet when that is no terminal. A packed file's size is not known."""
    sizes = [Path(path).stat().st_size if Path(path).is_file() and not lines.is_packed(path) else None for path in files]
    total = None if None in sizes else sum(sizes)
    with tqdm(total=total, desc="augment", unit="B", unit_scale=True, disable=None, dynamic_ncols=True) as bar:
        yield bar
