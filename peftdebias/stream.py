"""A corpus from disk to packed batches, epoch after epoch, in memory that does not grow with it.

    chunks of text -> families (counterfactuals) -> token ids -> windows -> length buckets, masks, packed batches
    corpus            cda                          tokens       here       buckets

Families are read in the order of the corpus into a *window*; a full window (`buffer` families, or WINDOW_TOKENS tokens) is shuffled, cut into batches
and given out while the next one is filled. So the order is random within a window and that of the files between windows; a corpus that fits into one
window is held in memory, shuffled whole, and read once for all epochs. Nothing here depends on the number of threads or on where chunks end.

A *position* is a small dict that JSON holds; it comes with every batch, and `run` started there gives exactly the batches that follow. This runs in the
training process or in a background one (worker.py), without torch either way.
"""

import dataclasses
import os
import queue
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy

from . import corpus, lines, splice
from .axes import Axis
from .buckets import Families, Packed, masked_batches
from .cache import Cache
from .cda import PAPER, Intervention
from .cda_engine import engine
from .config import LEAST, check_weight
from .errors import ConfigError
from .holdout import HeldOut, touched
from .lines import Place, Skipped
from .options import at_least, check_seed, settle
from .tokens import Tokenizer, mask_weights

WINDOW_TOKENS = 1 << 25  # 128 MiB of ids: what a window holds at most, however long the texts


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that decides which batches come.

    files: as lines.find gives them, or one. shard (i, n): of the corpus's texts those whose number leaves i when divided by n; the n shards are the whole, and
    numbers stay those of the whole (rank * workers + worker for who has both). batch: batch_size or batch_tokens. cache: folder for tokenised families.
    attribute_weight: how many times likelier than another a word of the axis is chosen for masking (tokens.mask_weights).
    """

    files: tuple[str, ...]
    axis: Axis
    tokenizer: Tokenizer
    max_length: int
    seed: int
    batch: dict
    column: str | None = None
    unit: str = "line"
    on_error: str = "stop"
    intervention: Intervention = PAPER
    held_out: HeldOut = HeldOut()
    shard: tuple[int, int] = (0, 1)
    buffer: int = 131072
    cache: str | None = None
    threads: int = 1
    attribute_weight: float = 1.0

    def __post_init__(self):
        settle(self, "shard")
        whole = isinstance(self.shard, (tuple, list)) and len(self.shard) == 2 and all(isinstance(one, (int, numpy.integer)) for one in self.shard)
        if not whole or not 0 <= self.shard[0] < self.shard[1]:
            raise ConfigError(f"shard: expected (i, n) with i from 0 to n - 1, got {self.shard!r}")
        if list(self.batch) not in (["batch_size"], ["batch_tokens"]) or type(count := next(iter(self.batch.values()))) is not int or count < 1:
            raise ConfigError(f"batch: expected batch_size or batch_tokens of at least 1, got {self.batch}")
        at_least(LEAST, self, "max_length", called=str)
        at_least(1, self, "buffer", "threads", called=str)
        check_seed(self.seed, "seed")
        check_weight(self, "attribute_weight")


@dataclasses.dataclass
class Counts:
    """What was read so far of one pass. texts, touched (with words of the axis), families, members, cut (members longer than max_length): to train on.
    held_out: families left aside. whole: the pass is over. notes: lines for people."""

    texts: int = 0
    touched: int = 0
    families: int = 0
    members: int = 0
    cut: int = 0
    held_out: int = 0
    skipped: int = 0
    first_skipped: list[str] = dataclasses.field(default_factory=list)
    whole: bool = False
    notes: list[str] = dataclasses.field(default_factory=list)


POSITION = ("epoch", "window", "batch", "family", "text", "place")


def check_position(position: dict, files: tuple[str, ...]) -> dict:
    """Raises ConfigError on what no batch of these files came with."""
    def counts(values) -> bool:
        return all(type(value) is int and value >= 0 for value in values)

    if not isinstance(position, dict) or set(position) != set(POSITION) or not counts(position[key] for key in POSITION[:-1]) or not (
            (place := position["place"]) is None or isinstance(place, (list, tuple)) and len(place) == len(Place()) and counts(place)):
        raise ConfigError(f"resume: expected a position that came with a batch, a dict of {', '.join(POSITION)}, got {position!r}")
    if place is not None:
        if place[0] >= len(files):
            raise ConfigError(f"resume: expected a position in one of the corpus's {len(files)} files, got one in file {place[0] + 1}")
        file = files[place[0]]
        if os.path.isfile(file) and not lines.is_packed(file) and place[1] > (size := os.path.getsize(file)):
            raise ConfigError(f"resume: expected a position in {file}, of {size} bytes, got one behind {place[1]}")
    return position


class Start(NamedTuple):
    """Where a window begins: families and texts before it, and the place of its first text, or None when it came from the cache."""

    family: int = 0
    text: int = 0
    place: Place | None = Place()


class Block(NamedTuple):
    """Families of one chunk; start(f): where family f begins; counts so far."""

    families: Families
    start: object
    counts: Counts


class Window(NamedTuple):
    """Families read at a time, where they begin, and what was counted up to their end."""

    number: int
    start: Start
    families: Families
    counts: Counts
    last: bool  # of its epoch


# Events of a run, in this order: for every window Filled and its batches, and Ended after the last window of an epoch.


class Filled(NamedTuple):
    """A window is full; counts: up to there."""

    epoch: int
    counts: Counts


class Given(NamedTuple):
    """A batch, and the position behind it."""

    packed: Packed
    position: dict


class Ended(NamedTuple):
    """An epoch is over."""

    epoch: int


class Stream:
    """The batches of a recipe, made in this process."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self._kept: Window | None = None  # the one window of a corpus that fits
        self._cache: Cache | None = None
        self._weights = None if recipe.attribute_weight == 1 else mask_weights(recipe.tokenizer, recipe.axis.words, recipe.attribute_weight)

    def run(self, epoch: int = 0, position: dict | None = None) -> Iterator[Filled | Given | Ended]:
        """Epoch after epoch without end, from the beginning of `epoch` or behind the batch of `position`. An epoch without batches is the last.

        Raises DataError on what cannot be read, when it is reached.
        """
        recipe, done = self.recipe, 0
        if position is not None:
            epoch, done = position["epoch"], position["batch"]
        windows = ahead(self._windows(epoch, position))
        try:
            for epoch, window in windows:
                yield Filled(epoch, window.counts)
                start = window.start._asdict() | {"place": window.start.place and list(window.start.place)}
                given = done
                for packed in masked_batches(window.families, recipe.tokenizer, seed=recipe.seed, epoch=epoch, window=window.number, batch=recipe.batch, start=done,
                                             weights=self._weights):
                    given += 1
                    yield Given(packed, {"epoch": epoch, "window": window.number, "batch": given, **start})
                done = 0
                if window.last:
                    yield Ended(epoch)
                del window  # or it would stay until the next one is there
        finally:
            windows.close()

    def _windows(self, epoch: int, position: dict | None) -> Iterator[tuple[int, Window]]:
        """(epoch, window) without end, unless an epoch has none."""
        start, number = Start(), 0
        if position is not None:
            place = position["place"]
            start, number = Start(position["family"], position["text"], place and Place(*place)), position["window"]
        while True:
            if self._kept is not None and number == 0:
                yield epoch, self._kept
            else:
                found = 0
                for window in fill(self._blocks(start), self.recipe.buffer, start, number):
                    found += 1
                    if window.last and window.number == 0:
                        self._kept = window
                    yield epoch, window
                    del window  # or it would stay until the next one is filled
                if not found:
                    return
            epoch, number, start = epoch + 1, 0, Start()

    def _blocks(self, start: Start) -> Iterator[Block]:
        recipe = self.recipe
        if recipe.cache is None:
            yield from tokenised(recipe, start)
            return
        if self._cache is None or not self._cache.stands():
            self._cache = Cache(recipe)
        found, note = self._cache.open()
        if found is None:
            blocks = tokenised(recipe, start, (note,))
            yield from self._cache.writing(blocks) if start == Start() else blocks
            return
        counts = Counts(**found.counts, whole=True, notes=[note])
        for families, first in found.blocks(start.family):
            yield Block(families, lambda f, s=families.sources, n=first: Start(n + f, int(s[f]), None), counts)


def tokenised(recipe: Recipe, start: Start = Start(), notes: Sequence[str] = ()) -> Iterator[Block]:
    """Read, swap and tokenise: a thread each for the first two, for the tokenizer (without the GIL), and for what becomes of its answer."""
    skipped, family = Skipped(), start.family
    counts = Counts(notes=list(notes))
    put = splice.hole(recipe.tokenizer)
    stream = ahead(_encoded(recipe, start, skipped, put))
    try:
        for encodings, (chunk, numbers, found, texts, with_words, held_out, left_out) in stream:
            ids, lengths, cut = splice.flat(encodings, found, recipe.tokenizer, put, recipe.max_length)
            del encodings
            sizes = numpy.array(found.sizes, numpy.int32)
            where = [numbers[source] for source in found.sources]  # of each family: (number of its text, index in the chunk)
            counts.texts += texts
            counts.touched += with_words
            counts.families += len(sizes)
            counts.members += len(lengths)
            counts.cut += int((cut > 0).sum())
            counts.held_out += held_out
            counts.skipped, counts.first_skipped = left_out.count, left_out.first
            families = Families(ids, lengths, sizes, numpy.array([number for number, _ in where], numpy.int64))
            yield Block(families, lambda f, c=chunk, w=where, n=family: Start(n + f, w[f][0], c.start(w[f][1])), dataclasses.replace(counts))
            family += len(sizes)
        if skipped.count > counts.skipped:  # behind the last text
            yield Block(Families.of([]), None, dataclasses.replace(counts, skipped=skipped.count, first_skipped=skipped.first))
    finally:
        stream.close()


def _encoded(recipe: Recipe, start: Start, skipped: Skipped, put: splice.Hole | None):
    """What the tokenizer answers to the strings of all families, and what `_expanded` gives."""
    stream = ahead(_expanded(recipe, start, skipped, put))
    try:
        for made in stream:
            yield recipe.tokenizer.encodings(made[2].strings), made
    finally:
        stream.close()


def _expanded(recipe: Recipe, start: Start, skipped: Skipped, put: splice.Hole | None):
    """Of each chunk: itself, (number, index) of each text, their families to train on, how many texts are not held out and how many of them have words of the
    axis, held-out families, what was left out so far."""
    number = start.text if start.place is not None else 0
    part, parts = recipe.shard
    held, swap = None if recipe.held_out == HeldOut() else recipe.held_out, engine(recipe.axis, recipe.intervention, recipe.threads)
    for chunk in corpus.chunks(recipe.files, recipe.column, on_error=recipe.on_error, unit=recipe.unit, skipped=skipped, start=start.place or Place()):
        mine = [(n, i) for i, n in enumerate(range(number, number + len(chunk.texts))) if n % parts == part and n >= start.text]
        number += len(chunk.texts)
        found = splice.prepare(swap, [chunk.texts[i] for _, i in mine], put, held)
        training = [mine[i] for i in sorted(set(range(len(mine))).difference(found.aside))] if found.aside else mine
        yield chunk, mine, found, len(training), _touched(recipe, chunk, training, found.sizes), len(found.aside), Skipped(skipped.count, list(skipped.first))


def _touched(recipe: Recipe, chunk: corpus.Chunk, training: list[tuple[int, int]], sizes: list[int]) -> int:
    """How many of the texts have words of the axis."""
    if not recipe.axis.keep_untouched:
        return len(sizes)
    if recipe.intervention.keep == "pairs":
        return sum(size > 1 for size in sizes)
    return len(touched([chunk.texts[i] for _, i in training], recipe.axis, recipe.intervention))  # families of one text say nothing


def fill(blocks: Iterable[Block], buffer: int, start: Start = Start(), number: int = 0, tokens: int = WINDOW_TOKENS) -> Iterator[Window]:
    """Windows of `buffer` families or `tokens` tokens, whichever is less, and at least one family; the last one may be smaller."""
    parts: list[Families] = []
    families = used = 0
    begin, counts = start, None
    full = False  # a window is given out once it is known whether it is the last
    for block in blocks:
        counts, done = block.counts, 0
        ends = block.families.bounds()[1][1:]
        while done < len(block.families):
            if full:
                yield Window(number, begin, Families.joined(parts), counts, False)
                parts, families, used, begin, number, full = [], 0, 0, block.start(done), number + 1, False
            before = int(ends[done - 1]) if done else 0
            fits = min(int(numpy.searchsorted(ends, before + tokens - used, side="right")) - done, buffer - families)
            fits = max(fits, 0 if families else 1)
            if fits:
                parts.append(block.families[done:done + fits])
                done, families = done + fits, families + fits
                used += int(ends[done - 1]) - before
            full = families == buffer or done < len(block.families)
    if parts:
        yield Window(number, begin, Families.joined(parts), dataclasses.replace(counts, whole=counts.whole or start == Start()), True)


def ahead(items: Iterable, depth: int = 1) -> Iterator:
    """The items in order, up to `depth` of them made in a thread before they are asked for. Closing it, or dropping it, ends the thread."""
    slots, ready = threading.Semaphore(depth), queue.SimpleQueue()
    closed = threading.Event()

    def make() -> None:
        found = iter(items)
        try:
            while True:
                slots.acquire()
                if closed.is_set():
                    break
                ready.put((next(found), None))
        except StopIteration:
            ready.put((None, StopIteration()))
        except BaseException as error:  # whatever it is, it is raised where the items are used
            ready.put((None, error))
        finally:
            if hasattr(found, "close"):
                found.close()

    thread = threading.Thread(target=make, name="peftdebias-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            slots.release()
            if error is not None:
                if isinstance(error, StopIteration):
                    return
                raise error
            yield item
            del item
    finally:
        closed.set()
        slots.release()
        if not sys.is_finalizing():  # no thread runs then
            thread.join()
