"""The texts of an upstream run as families of token ids: opened, some of them held out, the others as epochs of batches, and what is to be said of them.

What it adds over stream.py and worker.py, which make the batches: the settings of a run, the families it validates on, and notes for people.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable

import numpy

from . import corpus, lines
from .axes import Axis
from .cda import PAPER, Intervention
from .cda_engine import expand
from .config import Upstream
from .holdout import HeldOut, beside, choose, first_families
from .lines import Skipped
from .stream import Counts, Recipe
from .tokens import Tokenizer
from .worker import Epochs, default_workers

CHUNK = 4096  # texts tokenised together
FEW = 20  # held-out families, fewer than which say little


@dataclasses.dataclass
class FamilyIds:
    """Tokenised families, and what their texts were: how many were read, and how many members of families were cut."""

    families: list[list[numpy.ndarray]]
    texts: int = 0
    cut: int = 0

    @property
    def members(self) -> int:
        return sum(len(f) for f in self.families)


def encode_families(texts: Iterable[str], axis: Axis, tokenizer: Tokenizer, longest: int, intervention: Intervention = PAPER) -> FamilyIds:
    """Counterfactual families of the texts as token ids; the axis says whether texts without an attribute word stay, the intervention what of a family."""
    found, texts = FamilyIds([]), iter(texts)
    while chunk := list(itertools.islice(texts, CHUNK)):
        made = expand(chunk, axis, intervention)
        encoded = iter(tokenizer.encode(made.texts, max_length=longest))
        found.texts += len(chunk)
        for size in made.sizes:
            ids = [next(encoded) for _ in range(size)]
            found.cut += sum(e.cut > 0 for e in ids)
            found.families.append([e.ids for e in ids])
    return found


class TrainingCorpus:
    """The texts of an upstream run, opened: `epochs` of batches, the `held_out` families that choose the best step, and what is to be said of both."""

    def __init__(self, settings: Upstream, axis: Axis, intervention: Intervention, tokenizer: Tokenizer, longest: int, stack: contextlib.ExitStack):
        self.axis, self.longest = axis, longest
        self._copies = stack.enter_context(lines.Copies())
        files, valid = (self._copies.seekable(lines.find(paths)) for paths in (settings.corpus, settings.valid))
        corpus.check_column(files + valid, settings.column)
        skipped = Skipped()
        rule, held_out = _held_out(settings, axis, intervention, files, valid, skipped)
        self.held_out = encode_families(held_out, axis, tokenizer, longest, intervention)
        recipe = Recipe(tuple(files), axis, tokenizer, longest, settings.seed, settings.batch, column=settings.column, unit=settings.unit, on_error=settings.on_error,
                        intervention=intervention, held_out=rule, buffer=settings.shuffle_buffer, cache=settings.cache,
                        attribute_weight=settings.attribute_weight)
        self.epochs = stack.enter_context(Epochs(recipe, default_workers(recipe.files) if settings.workers is None else settings.workers))
        self.epochs.ready()
        self._apart = len(self.held_out.families) if valid else None
        self.held_out_notes = []
        if len(self.held_out.families) < FEW:
            self.held_out_notes.append(f"held out: only {len(self.held_out.families)} families to choose the best step by; more come with --valid-share or a --valid file")
        if self.held_out.cut:
            self.held_out_notes.append(f"held out: {_cut(self.held_out.cut, self.held_out.members, longest)}")
        self.held_out_notes += map(self._copies.named, skipped.report("held out"))

    def notes(self) -> list[str]:
        """What is known of the corpus by now: all of it where it was read to its end before the training began."""
        return [self._copies.named(note) for note in _corpus_notes(self.epochs.counts, self._apart, self.axis.name, self.longest)]

    def counts(self) -> dict:
        """What was read, for the run's log."""
        found = {k: v for k, v in dataclasses.asdict(self.epochs.counts).items() if k != "notes"}
        return found | {"first_skipped": [self._copies.named(line) for line in found["first_skipped"]]}


def _held_out(settings: Upstream, axis: Axis, intervention: Intervention, files: list[str], valid: list[str], skipped: Skipped) -> tuple[HeldOut, list[str]]:
    """(which texts of the corpus are held out, texts of the families to validate on). `skipped` hears of the corrupt lines of the validation files.

    Raises DataError where either side has no words of the axis.
    """
    def read(paths: list[str], skipped: Skipped | None = None):
        return lambda: (chunk.texts for chunk in corpus.chunks(paths, settings.column, unit=settings.unit, on_error=settings.on_error, skipped=skipped))

    if valid:
        names = lines.all_called(settings.corpus), lines.all_called(settings.valid)
        texts = first_families(read(valid, skipped), axis, intervention, settings.valid_texts, names[1])
        return beside(read(files), texts, axis, intervention, *names), texts
    return choose(read(files), axis, intervention, settings.valid_share, settings.valid_texts, lines.all_called(settings.corpus))


def _corpus_notes(counts: Counts, held_out: int | None, axis: str, longest: int) -> list[str]:
    """What the corpus is, as far as it was read. held_out: families of a validation file; None: the corpus's own, as counted."""
    aside = f"{counts.held_out if held_out is None else held_out} families held out"
    if held_out is not None and counts.held_out:
        aside += f", {counts.held_out} that are among these left out"
    touched = f"{counts.texts} texts, {counts.touched} with words of the axis {axis}; {counts.families} families of {counts.members} texts"
    notes = list(counts.notes)
    if counts.whole:
        notes.append(f"corpus: {touched} to train on, {aside}")
    else:
        notes.append(f"corpus, as far as it was read: {touched}, {aside}")
    if counts.cut:
        notes.append(f"corpus: {_cut(counts.cut, counts.members, longest)}")
    return notes + Skipped(counts.skipped, counts.first_skipped).report("corpus")


def _cut(cut: int, members: int, longest: int) -> str:
    return f"{cut} of {members} texts (counterfactuals counted) are longer than {longest} tokens and were cut"
