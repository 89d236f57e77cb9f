"""Token ids of families without tokenising their members: a text is tokenised once, with holes where its members differ, and each word put there once.

What it adds over tokens.py: members of a family differ in a few whole words, so "she is a nurse" and "he is a nurse" are the ids of "[CLS] is a nurse" with
those of "she" and of "he" in place of the added token's. That is half of the work for pairs, a fifth for a row of five. It leaves out what a family is (cda)
and what becomes of the ids (stream). The specification is `tokenizer.encode_flat` of all members, and the ids are the same.

They are the same only where tokens never depend on what lies beyond a word's end: BERT's normalizer and pre-tokenizer before WordPiece, and a word between
text ends, spaces and ASCII punctuation (`Hole.beside`). These part words whatever else stands there: they are starters, so no accent is carried across
them, they are never removed, and no added token has them. A family with another neighbour is tokenised member by member; so is every family
of another tokenizer (`hole` finds none).
"""

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from .buckets import stretches
from .cda import Family
from .cda_engine import NativeEngine, PythonEngine
from .tokens import Tokenizer

SPACES = " \t\n\r"  # what BERT's normalizer makes a space of or leaves as one; it removes other ASCII controls, which part nothing


class Hole(NamedTuple):
    """token, id: of the added token that stands for a word; beside: the characters that may stand beside one."""

    token: str
    id: int
    beside: frozenset[str]


@dataclass(slots=True)
class Prepared:
    """Families on their way to ids. strings: what is tokenised. sizes, sources: as cda_engine.Expanded has them. aside: sources of families left out.

    holes: None where the strings are the members. Else: of each string, how many it has; members: how many texts each becomes; words: for every hole
    of every such text in order, the word that is put there, as an index into the strings behind the last that has an entry in `holes`.
    """

    strings: list[str]
    sizes: list[int]
    sources: list[int]
    holes: list[int] | None = None
    members: list[int] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    aside: list[int] = field(default_factory=list)


def hole(tokenizer: Tokenizer) -> Hole | None:
    """The hole of a tokenizer whose tokens end where words end, or None."""
    backend = tokenizer.backend
    local = (isinstance(backend.normalizer, normalizers.BertNormalizer) and isinstance(backend.pre_tokenizer, pre_tokenizers.BertPreTokenizer)
             and isinstance(backend.model, models.WordPiece) and not backend.encode_special_tokens)
    added = backend.get_added_tokens_decoder()
    # Between [ and ], which part words, so that no piece of a text is spelled like it: its id comes from itself alone.
    if not local or not all(map(_stands_alone, added.values())) or not (token := added.get(tokenizer.cls_id)) or token.content[0] != "[" or len(token.content) < 2:
        return None
    return Hole(token.content, tokenizer.cls_id, frozenset(SPACES + string.punctuation).difference(*(one.content for one in added.values())))


def _stands_alone(token: tokenizers.AddedToken) -> bool:
    """Whether it is found in the text as it stands, whatever surrounds it."""
    return not (token.lstrip or token.rstrip or token.single_word or token.normalized)


def prepare(swap: NativeEngine | PythonEngine, texts: Sequence[str], put: Hole | None, aside: Callable[[Family], bool] | None = None) -> Prepared:
    """What has to be tokenised for the families of the texts. put: `hole` of the tokenizer. aside: which families are left out."""
    if put is None and aside is None:
        found = swap.expand(texts)
        return Prepared(found.texts, found.sizes, found.sources)
    made, numbers = Prepared([], [], [], None if put is None else []), {}
    for family in swap.families(texts):
        if aside is not None and aside(family):
            made.aside.append(family.source)
            continue
        kept = family.kept(swap.intervention.keep)
        made.sizes.append(len(kept))
        made.sources.append(family.source)
        if put is None:
            made.strings += kept
            continue
        fillings = _fillings(family, put) if len(kept) > 1 else None
        if fillings is None:
            made.strings += kept
            made.holes += [0] * len(kept)
            made.members += [1] * len(kept)
            continue
        places, rows = fillings
        pieces, done = [], 0
        for start, end in places:
            pieces += family.text[done:start], put.token
            done = end
        made.strings.append("".join(pieces) + family.text[done:])
        made.holes.append(len(places))
        made.members.append(len(kept))
        made.words += [numbers.setdefault(word, len(numbers)) for row in rows[-len(kept):] for word in row]
    made.strings += numbers
    return made


def _fillings(family: Family, put: Hole) -> tuple[list[tuple[int, int]], list[list[str]]] | None:
    """(places of the text in which its members differ, in order; the words of each member there), or None where that does not say all."""
    text, beside = family.text, put.beside
    swaps = [{(s.start, s.end): s.after for s in variant.swaps} for variant in family.variants]
    places = list(swaps[0]) if len(swaps) == 1 else sorted(set().union(*swaps))
    reached = -1
    for start, end in places:
        if start <= reached or start and text[start - 1] not in beside or end < len(text) and text[end] not in beside:
            return None
        reached = end
    if put.token in text:
        return None
    own = [text[start:end] for start, end in places]
    return places, [own, *([words.get(place, word) for place, word in zip(places, own)] for words in swaps)]


def flat(encodings: Sequence[tokenizers.Encoding], prepared: Prepared, tokenizer: Tokenizer, put: Hole | None, max_length: int) -> tuple[numpy.ndarray, ...]:
    """What tokenizer.encode_flat gives for the members: (ids int32 [T], tokens of each member int32 [B], of them left out int32 [B]).

    encodings: of prepared.strings, without special tokens.
    """
    ids, found = tokenizer.joined(encodings)
    if prepared.holes is None:
        return tokenizer.framed(ids, found, max_length)
    ends = numpy.cumsum(found, dtype=numpy.int64)
    starts, holes, members = ends - found, numpy.array(prepared.holes, numpy.int64), numpy.array(prepared.members, numpy.int64)
    own = len(holes)  # strings that become members; words follow
    at = numpy.flatnonzero(ids == put.id)
    owner = numpy.searchsorted(ends, at, side="right")
    whole = numpy.append(holes, numpy.zeros(len(found) - own, numpy.int64))[owner] == 0  # a text that says [CLS] itself
    at, owner = at[~whole], owner[~whole]
    if not numpy.array_equal(numpy.bincount(owner, minlength=own), holes):
        raise RuntimeError(f"splice: expected {int(holes.sum())} tokens {put.token} and each in its text, got {len(at)}")
    # Pieces, what lies between the holes: holes + 1 of each string, in order, so that both their ends ascend.
    begins, stops = numpy.sort(numpy.concatenate((starts[:own], at + 1))), numpy.sort(numpy.concatenate((ends[:own], at)))
    first = numpy.cumsum(holes + 1) - holes - 1
    # A member is a piece, a word, a piece, ... and a piece.
    many = numpy.repeat(2 * holes + 1, members)
    firsts = numpy.cumsum(many) - many
    place = numpy.arange(int(many.sum())) - numpy.repeat(firsts, many)
    piece = numpy.repeat(numpy.repeat(first, members), many) + place // 2
    begin, stop = begins[piece], stops[piece]
    words = own + numpy.array(prepared.words, numpy.int64)
    begin[place % 2 == 1], stop[place % 2 == 1] = starts[words], ends[words]
    lengths = numpy.add.reduceat(stop - begin, firsts) if len(firsts) else many
    return tokenizer.framed(stretches(ids, begin, stop - begin), lengths.astype(numpy.int32), max_length)
