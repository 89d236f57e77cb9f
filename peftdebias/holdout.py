"""Which texts of a corpus are for validation.

A text is held out by its hash, so that equal texts are never on both sides and every process decides alike without talking. Of the held-out texts the
first families are taken in the order of the corpus: the search ends as soon as there are enough. It leaves out tokens.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Sequence

from .axes import Axis
from .cda import Intervention
from .cda_engine import expand
from .errors import DataError

Read = Callable[[], Iterator[list[str]]]
"""Reads a corpus from its beginning: lists of neighbouring texts."""


def is_held_out(text: str, share: float) -> bool:
    """Whether a text is for validation: by its hash, whatever space stands around it."""
    return zlib.crc32(text.strip().encode("utf-8", "surrogatepass")) < share * 2**32


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The rule: a share of all texts by hash, and the texts equal to `also`."""

    share: float = 0.0
    also: str | None = None

    def __call__(self, text: str) -> bool:
        return (self.share > 0 and is_held_out(text, self.share)) or text == self.also


def choose(read: Read, axis: Axis, intervention: Intervention, share: float, wanted: int, files: str) -> tuple[HeldOut, list[str]]:
    """(the rule, the texts of the first `wanted` held-out families), with words of the axis on both sides.

    Raises DataError where no text has such words, or equal texts alone; `files` names the corpus. Where no held-out text has any (a corpus of a few
    lines), the first text that has is held out too.
    """
    held: list[str] = []
    texts, held_touched, first, second = 0, False, None, None  # the first two different texts to train on that have words
    for chunk in read():
        texts += len(chunk)
        chosen = [text for text in chunk if is_held_out(text, share)]
        held += _kept(chosen, axis, intervention)[: wanted - len(held)]
        held_touched = held_touched or any(touched(chosen, axis, intervention))
        if first is None or (second is None and not held_touched):
            for text in touched([text for text in chunk if not is_held_out(text, share)], axis, intervention):
                if first is None:
                    first = text
                elif second is None and text != first:
                    second = text
        if len(held) >= wanted and held_touched and first is not None:
            break
    if first is None and not held_touched:
        raise DataError(f"{files}: expected words of the axis {axis.name}, found none in {texts} texts")
    if not held_touched:
        rule, held = HeldOut(share, first), []
        for chunk in read():
            held += _kept([text for text in chunk if rule(text)], axis, intervention)[: wanted - len(held)]
            if len(held) >= wanted:
                break
    if first is None or (second is None and not held_touched):
        raise DataError(f"{files}: expected two different texts with words of the axis {axis.name}, one to validate on; found one (or give --valid FILE)")
    return HeldOut(share, None if held_touched else first), held


def first_families(read: Read, axis: Axis, intervention: Intervention, wanted: int, files: str) -> list[str]:
    """The texts of the first `wanted` families. Raises DataError where no text has words of the axis."""
    found: list[str] = []
    texts, any_touched = 0, False
    for chunk in read():
        texts += len(chunk)
        found += _kept(chunk, axis, intervention)[: wanted - len(found)]
        any_touched = any_touched or any(touched(chunk, axis, intervention))
        if any_touched and len(found) >= wanted:
            return found
    if not any_touched:
        raise DataError(f"{files}: expected words of the axis {axis.name}, found none in {texts} texts")
    return found


def _kept(texts: Sequence[str], axis: Axis, intervention: Intervention) -> list[str]:
    """Those that make a family."""
    return [texts[source] for source in expand(texts, axis, intervention).sources]


def touched(texts: Sequence[str], axis: Axis, intervention: Intervention) -> list[str]:
    """Those with words of the axis."""
    return _kept(texts, dataclasses.replace(axis, keep_untouched=False), intervention)
