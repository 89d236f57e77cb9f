r"""Counterfactual data augmentation: a text with the identity words of one axis swapped, and where.

What it adds over axes/: how a word is found in a text and how its letter case is kept; which pronoun `her` and `his` stand for is pronouns.py's. This
plain Python is the specification; an engine in another language has to equal it character for character, and reads the same tables (axes/*.toml).
Left out: a part-of-speech tagger, agreement ("an Asian", "a Asian"), coreference: every attribute word is swapped, whoever it means.

A word is a run of word characters (`axes.word_class`); a swap replaces whole words only, in one of three letter cases: lower, Capital, UPPER. A word
in any other case (hE, kINg) is somebody's own spelling and is left alone. Possessives and contractions (king's, she'll, both ' and U+2019, joined or
apart) need no rule, since the apostrophe parts words, but one: where only one of the two words takes a bare apostrophe, 's and ' trade places too
(gentlemen's and ladies', actress' and actor's).

What is a word character, a space (Python's ``\s``) and a capital is Python's Unicode table; another engine takes those from here as data
(`axes.word_class`, the forms of `lexicon`), so that the two agree whatever Unicode version Python has. A text holds no lone surrogates.
"""

import functools
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from peftdebias.axes import LONGEST_WORD, SHAPES, Axis, is_word_character, letter_cases, word_class
from peftdebias.config import KEEP, OCCURRENCES
from peftdebias.errors import ConfigError
from peftdebias.options import expect_whole
from peftdebias.pronouns import PRONOUNS, deciding_rule

APOSTROPHES = "'\u2019"
GAP = 3  # spaces and hyphens that may lie between a word and the one that it counts as being behind
JOINTS = frozenset(" \t\n\r-\u00a0\u2007\u2009\u200a\u2010\u2011\u202f")  # these: of one width and another, breaking lines or not


@dataclass(frozen=True, slots=True)
class Swap:
    """One replaced stretch: text[start:end] == before, and after stands in its place. Offsets are characters of the original text."""

    start: int
    end: int
    before: str
    after: str

    def as_json(self) -> dict:
        return {"start": self.start, "end": self.end, "from": self.before, "to": self.after}


@dataclass(frozen=True, slots=True)
class Counterfactual:
    """The text with its swaps done, in the order of the text."""

    text: str
    swaps: tuple[Swap, ...]


@dataclass(frozen=True)
class Intervention:
    """What is done with the attribute words that are found, and what is kept. The default is the paper's: every word, both ways, pairs.

    only_from     None: two-sided, the words of every column are replaced; a column's number: one-sided, its words alone
    occurrences   "all": a variant replaces every word; "one": each word gets variants of its own, in which it alone is replaced
    max_variants  at most that many variants a text (1 or more), or None. Of C > max_variants candidates those numbered (h + j) mod C, j = 0 ..
                  max_variants - 1, are made, h = the CRC-32 of the text in UTF-8: an axis of many columns is sampled evenly, repeatably, text by text
    keep          the members of a family: "pairs", a text and its variants; "originals", texts with an attribute word, as they are;
                  "counterfactuals", the variants alone. A text without an attribute word is the axis's business (keep_untouched)
    """

    only_from: int | None = None
    occurrences: str = "all"
    max_variants: int | None = None
    keep: str = "pairs"

    def __post_init__(self):
        for name, known in (("occurrences", OCCURRENCES), ("keep", KEEP)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name, least in (("only_from", 0), ("max_variants", 1)):
            if (value := getattr(self, name)) is not None:
                expect_whole(name, value, least, " (axis.column(name) gives a column's)" if name == "only_from" else "")

    def words_of(self, axis: Axis) -> str:
        """What is replaced, for a message: "words of the axis gender", or those "in the column female" alone."""
        column = "" if self.only_from is None else f" in the column {axis.columns[self.only_from] if axis.columns else self.only_from + 1}"
        return f"words of the axis {axis.name}{column}"


PAPER = Intervention()


@dataclass(frozen=True, slots=True)
class Family:
    """A text and its counterfactuals; they stay together through packing and shuffling. source: 0-based number of the text in its corpus."""

    text: str
    variants: tuple[Counterfactual, ...]
    source: int

    @property
    def members(self) -> tuple[str, ...]:
        return (self.text, *(variant.text for variant in self.variants))

    def kept(self, keep: str = "pairs") -> tuple[str, ...]:
        """The members that `Intervention.keep` names; a text that stands alone is always kept."""
        if not self.variants or keep == "originals":
            return (self.text,)
        return self.members if keep == "pairs" else self.members[1:]


def expect_axis(what: str, axis: Axis, intervention: Intervention) -> None:
    """Raises ConfigError about `what` on what is no Axis or no Intervention."""
    if not isinstance(axis, Axis) or not isinstance(intervention, Intervention):
        raise ConfigError(f"{what}: expected an Axis, as load_axis makes one, and an Intervention, got {type(axis).__name__} and {type(intervention).__name__}")


def expect_texts(texts: Iterable[str]) -> None:
    """Raises ConfigError on one text in place of several, and on what is no list of anything."""
    if (one := isinstance(texts, (str, bytes))) or not isinstance(texts, Iterable):
        raise ConfigError(f"families: expected a list of texts, got {f'one: [{texts[:20]!r}]' if one else type(texts).__name__}")


def utf8(text: str) -> bytes:
    """The text in UTF-8. Raises ConfigError on what is no text, or holds half a surrogate pair."""
    if not isinstance(text, str):
        raise ConfigError(f"counterfactuals: expected a text, got {type(text).__name__}")
    try:
        return str.encode(text)
    except UnicodeEncodeError as error:
        raise ConfigError(f"counterfactuals: expected a text that utf-8 can hold, got half a surrogate pair, {text[error.start]!r}") from None


def counterfactuals(text: str, axis: Axis, intervention: Intervention = PAPER) -> list[Counterfactual]:
    """All variants of a text: none without an attribute word, one on an axis of pairs, up to k - 1 where a row has k words.

    Variant r = 1 .. k - 1 (k: the longest row touched) puts column (c + r) mod k' for a word in column c of its row of k' words. A word whose row
    returns to itself (r mod k' = 0) stays; a variant equal to the text or to an earlier variant is left out. With occurrences = "one" the candidates
    are those of the first word, r = 1 .. k' - 1, then those of the second, and so on. Raises ConfigError on what is no Axis or no Intervention, or a column that it has not,
    and on what is no text (`utf8`).
    """
    encoded = utf8(text)
    expect_axis("counterfactuals", axis, intervention)
    known = lexicon(axis, intervention.only_from)
    hits = [(*found.span(), known.forms[found[0]]) for found in known.find(text)]
    if not hits:
        return []
    others = [form.choice(text, start, end) if type(form) is _Pronoun else form for start, end, form in hits]
    if intervention.occurrences == "all":
        candidates = [(r, hits, others) for r in range(1, 1 + max(map(len, others)))]
    else:
        candidates = [(r, [hit], [row]) for hit, row in zip(hits, others) for r in range(1, 1 + len(row))]
    if intervention.max_variants is not None and (many := len(candidates)) > intervention.max_variants:
        first = zlib.crc32(encoded)
        candidates = [candidates[i] for i in sorted((first + j) % many for j in range(intervention.max_variants))]
    variants, seen = [], {text}
    for r, places, rows in candidates:
        swaps, pieces, done = [], [], 0
        for (start, end, _), row in zip(places, rows):
            if (turn := r % (len(row) + 1)) and start >= done:  # else an s that is a word of the axis, and went with a possessive
                after = row[turn - 1]
                if text[end : end + 1] in _APOSTROPHES:
                    end, after = _possessive(text, start, end, after)
                swaps.append(Swap(start, end, text[start:end], after))
                pieces += text[done:start], after
                done = end
        variant = "".join(pieces) + text[done:]
        if variant not in seen:
            seen.add(variant)
            variants.append(Counterfactual(variant, tuple(swaps)))
    return variants


def families(texts: Iterable[str], axis: Axis, intervention: Intervention = PAPER) -> Iterator[Family]:
    """One family a text, in order; texts without an attribute word are dropped or kept alone, as axis.keep_untouched says. Raises ConfigError on one text in
    place of several, and as counterfactuals."""
    expect_texts(texts)
    for source, text in enumerate(texts):
        variants = counterfactuals(text, axis, intervention)
        if variants or axis.keep_untouched:
            yield Family(text, tuple(variants), source)


def attribute_words(text: str, axis: Axis, intervention: Intervention = PAPER) -> list[str]:
    """The attribute words of a text, as they stand in the axis, in the order of the text."""
    known = lexicon(axis, intervention.only_from)
    return [known.words[found[0]] for found in known.find(text)]


def rows(family: Family, keep: str = "pairs") -> list[dict]:
    """The jsonl rows of `augment`: one a variant; one with counterfactual None for a text that stands alone, or is kept alone."""
    if not family.variants or keep == "originals":
        return [{"text": family.text, "counterfactual": None, "swaps": [], "source": family.source}]
    return [
        {"text": family.text, "counterfactual": variant.text, "swaps": [swap.as_json() for swap in variant.swaps], "source": family.source}
        for variant in family.variants
    ]


# ---- words

_APOSTROPHES = frozenset(APOSTROPHES)
_QUOTES = ("'", "\u2018")  # that open what an apostrophe may close
PLURALS = ("men", "people", "children")  # plurals without an s


class _Pronoun(NamedTuple):
    """A form of her or his, whose partner the table of pronouns.toml chooses."""

    word: str  # "her" or "his"
    choices: dict[str, tuple[str, ...]]  # her: {"his": ("His",), "him": ("Him",), "her": ()}

    def choice(self, text: str, start: int, end: int) -> tuple[str, ...]:
        return self.choices[deciding_rule(text, start, end, self.word).becomes[self.word]]


class Lexicon(NamedTuple):
    """An axis made ready: every form that is replaced -> its replacements, variant by variant; and the pattern that finds them."""

    forms: dict[str, "tuple[str, ...] | _Pronoun"]
    words: dict[str, str]  # each form -> the word that it is a form of
    unless_after: dict[str, frozenset[str]]  # some words -> what may not stand before them, in all letter cases
    ascii: re.Pattern
    unicode: re.Pattern

    def find(self, text: str) -> list[re.Match]:
        """The attribute words of a text, from left to right."""
        found = (self.ascii if text.isascii() else self.unicode).finditer(text)
        if not self.unless_after:
            return list(found)
        return [one for one in found if word_before(text, one.start()) not in self.unless_after.get(self.words[one[0]], ())]


@functools.lru_cache(maxsize=32)
def lexicon(axis: Axis, only_from: int | None = None) -> Lexicon:
    """With `only_from`, the forms of other columns are found too, so that no piece of one is, and replaced by nothing: ()."""
    expect_axis("lexicon", axis, PAPER)
    if only_from is not None and only_from >= (width := max(map(len, axis.groups))):
        raise ConfigError(f"only_from: expected a column of the axis {axis.name!r}, 0 to {width - 1}, got {only_from}")
    others = {}  # word -> what stands in its place, variant by variant
    for row in axis.groups:
        for column, word in enumerate(row):
            others[word] = row[column + 1 :] + row[:column] if only_from in (None, column) else ()
    others |= {word: others[model] for word, model in axis.like}
    cases, forms, words = letter_cases(axis), {}, {}
    for word, row in others.items():
        for put in map(SHAPES.get, cases[word]):
            if put(word) not in forms:  # of two equal forms (a one-letter word: Capital and UPPER) the first counts
                forms[put(word)], words[put(word)] = tuple(map(put, row)), word
    if axis.pronouns:
        for put in SHAPES.values():
            for word, becomes in PRONOUNS.items():
                if forms.get(put(word)):
                    forms[put(word)] = _Pronoun(word, {other: (put(other),) for other in becomes} | {word: ()})
    for form in [form for form in forms if "'" in form]:
        curly = form.replace("'", "\u2019")
        forms[curly], words[curly] = forms[form], words[form]
    barred: dict[str, frozenset[str]] = {}
    for word, before in axis.unless_after:
        row = next((row for row in axis.groups if word in row), (word,))
        every = frozenset(put(one) for one in before for put in SHAPES.values())
        barred |= {one: barred.get(one, frozenset()) | every for one in row}
    first, tree = "".join(sorted({re.escape(form[0]) for form in forms})), _tree(forms)
    word = word_class()
    return Lexicon(
        forms,
        words,
        barred,
        re.compile(rf"\b(?=[{first}]){tree}\b", re.ASCII),
        re.compile(rf"(?=[{first}])(?<![{word}]){tree}(?![{word}])"),
    )


def _tree(words: Iterable[str]) -> str:
    """A regular expression for any of the words that reads each character once: she|shes|he -> (?:he|she(?:s)?)."""
    root: dict = {}
    for word in words:
        node = root
        for character in word:
            node = node.setdefault(character, {})
        node[""] = {}

    def expression(node: dict) -> str:
        branches = [re.escape(character) + expression(child) for character, child in node.items() if character]
        if len(branches) == 1 and "" not in node:
            return branches[0]
        return f"(?:{'|'.join(branches)}){'?' if '' in node else ''}" if branches else ""

    return expression(root)


def word_before(text: str, start: int) -> str:
    """The word that ends before text[start:], one to GAP of JOINTS between; "" where there is none, or a longer one than LONGEST_WORD."""
    end = start
    while end > max(0, start - GAP) and text[end - 1] in JOINTS:
        end -= 1
    begin = end
    while begin > max(0, end - LONGEST_WORD - 1) and _word_at(text, begin - 1):
        begin -= 1
    return text[begin:end] if end < start and end - begin <= LONGEST_WORD else ""


def _possessive(text: str, start: int, end: int, after: str) -> tuple[int, str]:
    """Where the swap of text[start:end] ends and what it puts, an apostrophe standing at `end`: gentlemen's <-> ladies'.

    Only for a joined apostrophe: the 's of a plural without s goes bare before a word in -s, a bare one gets its s before a word in another letter. A
    bare apostrophe (ladies', James') counts as a possessive when a space and a word follow, and none stands before: 'princess' is quoted. Everything else keeps
    what it has: king's, kings', he's.
    """
    before, mark = text[start:end].lower(), text[end]
    if before.endswith(PLURALS) and after.lower().endswith("s"):
        if text[end + 1 : end + 2] in ("s", "S") and not _word_at(text, end + 2):
            return end + 2, after + mark
    elif takes_bare_apostrophe(before) and not after.lower().endswith("s"):
        if text[end + 1 : end + 2].isspace() and _word_at(text, end + 2) and text[max(0, start - 1) : start] not in _QUOTES:
            return end + 1, after + mark + ("S" if after.isupper() else "s")
    return end, after


def possessive_end(text: str, end: int) -> int:
    """Where a word that ends at `end` ends with the 's or the ' that is joined to it, whether a swap changes that or not."""
    if text[end : end + 1] not in _APOSTROPHES:
        return end
    return end + 2 if text[end + 1 : end + 2] in ("s", "S") and not _word_at(text, end + 2) else end + 1


def takes_bare_apostrophe(word: str) -> bool:
    """Whether a word in lower case can be a possessive with ' alone (ladies', james'); 'his' in quotes is none."""
    return word.endswith("s") and word not in PRONOUNS


def _word_at(text: str, offset: int) -> bool:
    return offset < len(text) and is_word_character(text[offset])
