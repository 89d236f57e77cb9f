"""Tokenised families on disk: a second run on the same corpus, axis and tokenizer reads no text.

    DIR/KEY/about.json      format, sizes of the files, counts of the pass
    DIR/KEY/ids.bin         int32, the tokens of all texts end to end
    DIR/KEY/lengths.bin     int32, tokens of each text          sizes.bin int32, texts of each family          sources.bin int64, number of its source text

KEY is the sha256 of all that decides the families: the files' contents and how they are read, axis, intervention, tokenizer, longest text, what is held
out, the shard, and the sources, and the compiled engine, that read and swap. A folder takes its name when it is whole, so two processes may write the same one at once: the first
to finish counts; what a killed one left is removed when the same is written anew. Numbers are little-endian. It leaves out when a window is full and what a batch is.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy

from . import axes, buckets, cda, cda_engine, corpus, holdout, lines, native, pronouns, records, sentences, splice, tokens
from .buckets import Families
from .errors import ConfigError
from .outputs import NotMade, digest, held, partial_of

FORMAT = 1
ARRAYS = {"ids": "<i4", "lengths": "<i4", "sizes": "<i4", "sources": "<i8"}
READ = 1 << 14  # families read together

_unfinished: dict[Path, list[Path]] = {}
"""A folder that is being written -> the folders made for it, the innermost first."""


def sweep() -> None:
    """Removes what this process has begun to write, for a process that ends without unwinding."""
    for partial in list(_unfinished):
        _remove(partial)


def _remove(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    for folder in _unfinished.pop(partial, ()):
        with contextlib.suppress(OSError):  # with tokens in it, it stays
            folder.rmdir()


class Cache:
    """The folder of one recipe (stream.Recipe)."""

    def __init__(self, recipe):
        self.root, self._files = Path(recipe.cache), recipe.files
        for path in self._files:
            lines.kind(path)  # that it is there
        self._begun = self._state()  # before their contents are hashed
        self.folder = self.root / key(recipe)

    def stands(self) -> bool:
        """Whether the corpus is still what the folder is named by, as far as sizes and times tell."""
        with contextlib.suppress(OSError):  # a file is gone
            return self._state() == self._begun
        return False

    def _state(self) -> list[tuple[int, int]]:
        """What tells that a file was written to."""
        return [(found.st_size, found.st_mtime_ns) for found in map(os.stat, self._files)]

    def open(self) -> tuple["Cached | None", str]:
        """(the families, a line that names the folder), or (None, why they have to be made). A damaged folder is removed."""
        if not self.folder.exists():
            return None, f"cache: {self.folder} is written"
        try:
            about = json.loads((self.folder / "about.json").read_text(encoding="utf-8"))
            for name in ARRAYS:
                found = (self.folder / f"{name}.bin").stat().st_size
                if found != about["bytes"][name]:
                    raise ValueError(f"{name}.bin: expected {about['bytes'][name]} bytes, got {found}")
            return Cached(self.folder, about["counts"]), f"cache: {self.folder} is read"
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            return None, f"cache: {self.folder} was damaged and is made again ({' '.join(str(error).split())})"

    def writing(self, blocks: Iterable) -> Iterator:
        """The blocks (stream.Block) as they come, written besides; the folder is there once the last one was taken, where the corpus is still what it is named by. Raises ConfigError
        where it cannot be written."""
        partial = partial_of(self.folder)
        _unfinished[partial] = [folder for folder in (self.root, *self.root.parents) if not os.path.exists(folder)]
        try:
            with held(partial, lambda: partial.mkdir(parents=True)):
                written, counts = dict.fromkeys(ARRAYS, 0), {}
                with contextlib.ExitStack() as stack:
                    files = {name: stack.enter_context(self._opened(partial / f"{name}.bin")) for name in ARRAYS}
                    for block in blocks:
                        for name, kind in ARRAYS.items():
                            written[name] += self._write(files[name], getattr(block.families, name).astype(kind))
                        counts = dataclasses.asdict(block.counts)
                        yield block
                about = {"format": FORMAT, "bytes": written, "counts": {name: counts[name] for name in counts.keys() - {"whole", "notes"}}}
                with self._opened(partial / "about.json") as file:
                    self._write(file, json.dumps(about, indent=1).encode())
                if self.stands():
                    with contextlib.suppress(OSError):  # another process was first
                        os.rename(partial, self.folder)
        except NotMade as error:
            raise ConfigError(f"--cache {self.root}: cannot be written: {error}") from None
        finally:
            _remove(partial)

    @contextlib.contextmanager
    def _opened(self, path: Path) -> Iterator[BinaryIO]:
        """A file to write; its last bytes reach the disk when it is closed."""
        with self._told():
            file = open(path, "wb")
        try:
            yield file
        except BaseException:
            with contextlib.suppress(OSError):  # what is in it is removed
                file.close()
            raise
        with self._told():
            file.close()

    def _write(self, file: BinaryIO, data) -> int:
        with self._told():
            return file.write(memoryview(data).cast("B"))

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(f"--cache {self.root}: cannot be written: {error.strerror}") from None


@dataclasses.dataclass(frozen=True)
class Cached:
    """A whole folder; counts: of stream.Counts."""

    folder: Path
    counts: dict

    def blocks(self, first: int = 0) -> Iterator[tuple[Families, int]]:
        """(some families, the number of their first) from family `first` on, in order."""
        with contextlib.ExitStack() as stack:
            files = {name: stack.enter_context(open(self.folder / f"{name}.bin", "rb")) for name in ARRAYS}

            def read(name: str, count: int) -> numpy.ndarray:
                return numpy.fromfile(files[name], ARRAYS[name], count)

            done = 0
            while True:
                count = READ if done >= first else min(READ, first - done)
                sizes = read("sizes", count)
                if not len(sizes):
                    return
                lengths = read("lengths", int(sizes.sum()))
                tokens, sources = int(lengths.sum(dtype=numpy.int64)), read("sources", len(sizes))
                if done >= first:
                    yield Families(read("ids", tokens), lengths, sizes, sources), done
                else:
                    files["ids"].seek(4 * tokens, os.SEEK_CUR)
                done += len(sizes)


def key(recipe) -> str:
    """sha256 of all that decides the families of a recipe."""
    tokenizer, axis = recipe.tokenizer, recipe.axis
    code = [Path(module.__file__) for module in (axes, buckets, cda, cda_engine, corpus, holdout, lines, pronouns, records, sentences, splice, tokens)]
    code += [Path(axes.__file__).parent / "pronouns.toml", *([library._name] if (library := native.library()) else ())]
    about = [
        FORMAT, [digest(Path(path)) for path in code], [(lines.kind(path), lines.is_packed(path), digest(Path(path))) for path in recipe.files], recipe.column, recipe.unit, recipe.on_error,
        repr(dataclasses.replace(axis, description="", source="")), repr(recipe.intervention), recipe.held_out.share, sorted(recipe.held_out.also), recipe.held_out.axis is None, recipe.shard,
        tokenizer.backend.to_str(), tokenizer.backend.encode_special_tokens, tokenizer.style, tokenizer.cls_id, tokenizer.sep_id, recipe.max_length,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()
