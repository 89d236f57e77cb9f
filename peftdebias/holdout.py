"""Which families of a corpus are for validation.

A family is held out by a hash of its text without the attribute words, which its counterfactuals share: so equal texts, and a text and its counterfactual where a
corpus has both, are never on two sides (docs/streaming.md names the few that are), and every process decides alike without talking. Of the held-out families the first are taken in the order of the corpus:
the search ends as soon as there are enough. It leaves out tokens.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence

from .axes import Axis
from .cda import Family, Intervention, lexicon, possessive_end
from .cda_engine import engine, expand
from .errors import DataError

Read = Callable[[], Iterator[list[str]]]
"""Reads a corpus from its beginning: lists of neighbouring texts."""

PLACES = 2 ** 32


def place_of(family: Family, axis: Axis | None = None) -> int:
    """Where a family stands among all, 0 to PLACES - 1: by its text with every attribute word cut out, whatever space stands around it; with `axis` by all words of it and the
    possessives behind them, whichever of them the family's variants replace. No CRC-32, by which prepare.py chooses the development examples: a corpus without these shall not be one without validation texts."""
    text, variants = family.text, family.variants
    if axis is not None:
        places = [(found.start(), possessive_end(text, found.end())) for found in lexicon(axis).find(text)]
    else:
        swaps = variants[0].swaps if len(variants) == 1 else sorted({swap for variant in variants for swap in variant.swaps}, key=lambda swap: swap.start)
        places = [(swap.start, swap.end) for swap in swaps]
    pieces, done = [], 0
    for start, end in places:
        if end > done:
            pieces.append(text[done:start])
            done = end
    pieces.append(text[done:])
    return int.from_bytes(hashlib.blake2b("\0".join(pieces).strip().encode("utf-8", "surrogatepass"), digest_size=4).digest(), "big")


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The rule: a share of all families by their places, and those at the places `also`. axis: see `place_of`."""

    share: float = 0.0
    also: frozenset[int] = frozenset()
    axis: Axis | None = None

    def __call__(self, family: Family) -> bool:
        place = place_of(family, self.axis)
        return place < self.share * PLACES or place in self.also


def _whole(axis: Axis, intervention: Intervention) -> Axis | None:
    """The axis, where an intervention leaves some of its words as they are: the families of a text and of its counterfactual then replace other words."""
    return None if intervention.only_from is None and intervention.max_variants is None else axis


def choose(read: Read, axis: Axis, intervention: Intervention, share: float, wanted: int, files: str) -> tuple[HeldOut, list[str]]:
    """(the rule, the texts of the first `wanted` held-out families), with words of the axis on both sides: where none of these has any, the first held-out one
    that has takes the last place.

    Raises DataError where no text has such words, or one family alone; `files` names the corpus. Where no held-out family has any (a corpus of a few
    lines), the first that has is held out too; where none but held-out ones have, the first of them alone is.
    """
    swap, whole = engine(axis, intervention), _whole(axis, intervention)
    rule = HeldOut(share, axis=whole)
    held: list[str] = []
    texts, own, aside = 0, [], []  # the first two different places of families that have words, to train on and held out
    for chunk in read():
        texts += len(chunk)
        for family in swap.families(chunk):
            if out := rule(family):
                _take(held, family, wanted, bool(aside))
            seen = aside if out else own
            if family.variants and len(seen) < 2 and (place := place_of(family, whole)) not in seen:
                seen.append(place)
        if len(held) >= wanted and aside and own:
            break
    if not own and not aside:
        raise DataError(f"{files}: expected {intervention.words_of(axis)}, found none in {texts} texts")
    if len(own) + len(aside) < 2:
        raise DataError(f"{files}: expected two texts with {intervention.words_of(axis)} that differ in more than these, one to validate on; found one (or give --valid FILE)")
    if own and aside:
        return rule, held
    rule = HeldOut(share, frozenset(own[:1]), whole) if own else HeldOut(also=frozenset(aside[:1]), axis=whole)
    held, held_touched = [], False
    for chunk in read():
        for family in filter(rule, swap.families(chunk)):
            _take(held, family, wanted, held_touched)
            held_touched = held_touched or bool(family.variants)
        if len(held) >= wanted and held_touched:
            break
    return rule, held


def _take(held: list[str], family: Family, wanted: int, touched: bool) -> None:
    """Puts the family's text into `held` where there is room, or where it is the first with words of the axis."""
    if len(held) >= wanted and family.variants and not touched:
        del held[-1]
    if len(held) < wanted:
        held.append(family.text)


def beside(read: Read, valid: Sequence[str], axis: Axis, intervention: Intervention, files: str, valid_files: str) -> HeldOut:
    """The rule where files of their own validate, with the texts `valid`: the corpus's families that are among theirs are held out.

    Raises DataError where the corpus has no other text with words of the axis.
    """
    swap, texts, any_touched = engine(axis, intervention), 0, False
    whole = _whole(axis, intervention)
    rule = HeldOut(also=frozenset(place_of(family, whole) for family in swap.families(valid)), axis=whole)
    for chunk in read():
        texts += len(chunk)
        for family in swap.families(chunk):
            if family.variants and not rule(family):
                return rule
            any_touched = any_touched or bool(family.variants)
    if any_touched:
        raise DataError(f"{files}: expected texts with {intervention.words_of(axis)} beside those of {valid_files}, found the same alone")
    raise DataError(f"{files}: expected {intervention.words_of(axis)}, found none in {texts} texts")


def first_families(read: Read, axis: Axis, intervention: Intervention, wanted: int, files: str) -> list[str]:
    """The texts of the first `wanted` families, the first that has words of the axis in the last place where none of these has. Raises DataError where no text has such words."""
    swap, found = engine(axis, intervention), []
    texts, any_touched = 0, False
    for chunk in read():
        texts += len(chunk)
        for family in swap.families(chunk):
            _take(found, family, wanted, any_touched)
            any_touched = any_touched or bool(family.variants)
        if any_touched and len(found) >= wanted:
            return found
    if not any_touched:
        raise DataError(f"{files}: expected {intervention.words_of(axis)}, found none in {texts} texts")
    return found


def touched(texts: Sequence[str], axis: Axis, intervention: Intervention) -> list[str]:
    """Those with words of the axis."""
    return [texts[source] for source in expand(texts, dataclasses.replace(axis, keep_untouched=False), intervention).sources]
