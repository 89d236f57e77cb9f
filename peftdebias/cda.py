"""Counterfactual data augmentation: a text with the identity words of one axis swapped, and where.

What it adds over axes/: how a word is found in a text, how its letter case is kept, and which pronoun `her` and `his` stand for. This plain Python is
the specification; an engine in another language has to equal it character for character, and reads the same tables (axes/*.toml).
Left out: a part-of-speech tagger, agreement ("an Asian", "a Asian"), first names, coreference: every attribute word is swapped, whoever it means.

A word is a run of word characters (`axes.word_class`); a swap replaces whole words only, in one of three letter cases: lower, Capital, UPPER. A word
in any other case (hE, kINg) is somebody's own spelling and is left alone. Possessives and contractions (king's, she'll, both ' and U+2019, joined or
apart) need no rule, since the apostrophe parts words, but one: where only one of the two words is a plural in s, 's and ' trade places too
(gentlemen's, ladies').
"""

import functools
import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from peftdebias.axes import Axis, is_word_character, lower, upper, word_class

WINDOW = 64  # characters on either side of a pronoun that its rules may look at; a word that the border cuts counts as the piece inside
APOSTROPHES = "'\u2019"


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


@dataclass(frozen=True, slots=True)
class Family:
    """A text and its counterfactuals; they stay together through packing and shuffling. source: 0-based number of the text in its corpus."""

    text: str
    variants: tuple[Counterfactual, ...]
    source: int

    @property
    def members(self) -> tuple[str, ...]:
        return (self.text, *(variant.text for variant in self.variants))


def counterfactuals(text: str, axis: Axis) -> list[Counterfactual]:
    """All variants of a text: none without an attribute word, one on an axis of pairs, up to k - 1 where a row has k words.

    Variant r = 1 .. k - 1 (k: the longest row touched) puts column (c + r) mod k' for a word in column c of its row of k' words. A word whose row
    returns to itself (r mod k' = 0) stays; a variant equal to the text or to an earlier variant is left out.
    """
    lexicon = _lexicon(axis)
    hits = [(*found.span(), lexicon.forms[found[0]]) for found in lexicon.pattern(text).finditer(text)]
    if not hits:
        return []
    others = [_decide(text, start, end, form) if type(form) is _Pronoun else form for start, end, form in hits]
    variants, seen = [], {text}
    for r in range(1, 1 + max(map(len, others))):
        swaps, pieces, done = [], [], 0
        for (start, end, _), row in zip(hits, others):
            if turn := r % (len(row) + 1):
                after = row[turn - 1]
                if text[end : end + 1] in _APOSTROPHE_SET:
                    end, after = _possessive(text, start, end, after)
                swaps.append(Swap(start, end, text[start:end], after))
                pieces += text[done:start], after
                done = end
        variant = "".join(pieces) + text[done:]
        if variant not in seen:
            seen.add(variant)
            variants.append(Counterfactual(variant, tuple(swaps)))
    return variants


def families(texts: Iterable[str], axis: Axis) -> Iterator[Family]:
    """One family a text, in order; texts without an attribute word are dropped or kept alone, as axis.keep_untouched says."""
    for source, text in enumerate(texts):
        variants = counterfactuals(text, axis)
        if variants or axis.keep_untouched:
            yield Family(text, tuple(variants), source)


def rows(family: Family) -> list[dict]:
    """The jsonl rows of `augment`: one a variant; one with counterfactual None for a text that stands alone."""
    if not family.variants:
        return [{"text": family.text, "counterfactual": None, "swaps": [], "source": family.source}]
    return [
        {"text": family.text, "counterfactual": variant.text, "swaps": [swap.as_json() for swap in variant.swaps], "source": family.source}
        for variant in family.variants
    ]


# ---- words

_APOSTROPHE_SET = frozenset(APOSTROPHES)


class _Pronoun(NamedTuple):
    """A form of her or his, whose partner the table of pronouns.toml chooses."""

    word: str  # "her" or "his"
    choices: dict[str, tuple[str, ...]]  # her: {"his": ("His",), "him": ("Him",), "her": ()}


class _Lexicon(NamedTuple):
    """An axis made ready: every form that is replaced -> its replacements, variant by variant; and the pattern that finds them."""

    forms: dict[str, "tuple[str, ...] | _Pronoun"]
    ascii: re.Pattern
    unicode: re.Pattern

    def pattern(self, text: str) -> re.Pattern:
        return self.ascii if text.isascii() else self.unicode


@functools.lru_cache(maxsize=32)
def _lexicon(axis: Axis) -> _Lexicon:
    only = dict(axis.only)
    shapes, others = {}, {}
    for row in axis.groups:
        allowed = [only[word] for word in row if word in only]
        for column, word in enumerate(row):
            others[word] = row[column + 1 :] + row[:column]
            shapes[word] = [shape for shape in _SHAPES if all(shape in some for some in allowed)]
    for word, model in axis.like:
        others[word], shapes[word] = others[model], only.get(word, tuple(_SHAPES))
    forms = {}
    for word, row in others.items():
        for shape in _SHAPES:  # in this order: of two equal forms (a one-letter word) the first counts
            if shape in shapes[word]:
                put = _SHAPES[shape]
                forms.setdefault(put(word), tuple(map(put, row)))
    if axis.pronouns:
        for put in _SHAPES.values():
            forms[put("her")] = _Pronoun("her", {"his": (put("his"),), "him": (put("him"),), "her": ()})
            forms[put("his")] = _Pronoun("his", {"her": (put("her"),), "hers": (put("hers"),), "his": ()})
    for form in [form for form in forms if "'" in form]:
        forms[form.replace("'", "\u2019")] = forms[form]
    first, tree = "".join(sorted({re.escape(form[0]) for form in forms})), _tree(forms)
    word = word_class()
    return _Lexicon(
        forms,
        re.compile(rf"\b(?=[{first}]){tree}\b", re.ASCII),
        re.compile(rf"(?=[{first}])(?<![{word}]){tree}(?![{word}])"),
    )


_SHAPES = {
    "lower": lambda word: word,
    "Capital": lambda word: upper(word[0]) + word[1:],
    "UPPER": lambda word: "".join(map(upper, word)),
}


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


def _possessive(text: str, start: int, end: int, after: str) -> tuple[int, str]:
    """Where the swap of text[start:end] ends, and what it puts: 's goes and comes where one word is a plural in s and the other is not."""
    before, mark = text[start:end], text[end]
    if _plural(after) and before[-1] not in "sS" and text[end + 1 : end + 2] in ("s", "S") and not _TOKEN.match(text[end + 2 : end + 3] or " "):
        return end + 2, after + mark
    if _plural(before) and after[-1] not in "sS" and text[end + 1 : end + 2].isspace() and text[end + 2 : end + 3].isalnum():
        return end + 1, after + mark + ("S" if after[-1] != lower(after[-1]) else "s")
    return end, after


def _plural(word: str) -> bool:
    return word[-1:] in ("s", "S") and word[-2:-1] not in ("s", "S")


# ---- pronouns

_TOKEN = re.compile(rf"[{word_class()}]+|[^\s{word_class()}]")
_TOKEN_ASCII = re.compile(r"\w+|[^\s\w]")  # the same on ASCII text, and faster
_SLOTS = ("before2", "before", "next", "next2", "next3")


class Rule(NamedTuple):
    """One row of pronouns.toml: what each slot must be (any of these classes, none of those), as bit sets, and what the pronouns become."""

    number: int
    conditions: tuple[tuple[int, int, int], ...]  # (slot, any, none)
    becomes: dict[str, str]  # {"her": "his" | "him", "his": "her" | "hers"}
    example: str


class _Table(NamedTuple):
    rules: tuple[Rule, ...]
    bits: dict[str, int]  # class -> its bit
    words: dict[str, int]  # word -> the bits of the classes it is in


@functools.cache
def pronoun_table() -> _Table:
    """axes/pronouns.toml, its classes turned into bits. A literal word in a rule is a class of its own."""
    table = tomllib.loads((Path(__file__).parent / "axes" / "pronouns.toml").read_text(encoding="utf-8"))
    bits = {name: 1 << number for number, name in enumerate(("END", "WORD", "NUMBER", "ING", "LY", "ED", "ADJ", "CAPITAL", "SIGN"))}
    words: dict[str, int] = {}

    def members(names: str) -> set[str]:
        found = set()
        for name in names.split():
            found |= members(table["classes"][name]) if name in table["classes"] else {name}
        return found

    def bit(name: str, listed: str) -> int:
        if name not in bits:
            bits[name] = 1 << len(bits)
            for word in members(listed):
                words[word] = words.get(word, 0) | bits[name]
        return bits[name]

    def condition(slot: int, wanted: str) -> tuple[int, int, int]:
        yes, no, literal = 0, 0, []
        for name in wanted.split():
            bare = name.removeprefix("!")
            if bare.isupper() and bare not in bits and bare not in table["classes"]:
                raise ValueError(f"pronouns.toml: unknown class {bare}")
            if bare in bits or bare in table["classes"]:
                mask = bit(bare, table["classes"].get(bare, ""))
                yes, no = (yes, no | mask) if name != bare else (yes | mask, no)
            elif name != bare:
                no |= bit(f"'{bare}'", bare)
            else:
                literal.append(name)
        if literal:
            yes |= bit("'" + " ".join(sorted(literal)) + "'", " ".join(literal))
        return slot, yes, no

    rules = []
    for number, row in enumerate(table["rules"]):
        conditions = tuple(condition(slot, row[name]) for slot, name in enumerate(_SLOTS) if name in row)
        rules.append(Rule(number, conditions, {word: row[word] for word in ("her", "his") if word in row}, row.get("example", "")))
    for word in words:
        words[word] |= _by_spelling(bits, word)
    return _Table(tuple(rules), bits, words)


def _by_spelling(bits: dict[str, int], token: str) -> int:
    if is_word_character(token[0]):
        kind = bits["WORD"]
        if "0" <= token[0] <= "9":
            kind |= bits["NUMBER"]
        if token.endswith("ing") and len(token) > 5:
            kind |= bits["ING"]
        elif token.endswith("ly") and len(token) > 4:
            kind |= bits["LY"]
        elif token.endswith("ed") and not token.endswith("eed") and len(token) > 4:
            kind |= bits["ED"]
        elif token.endswith(("able", "ible", "ful", "less", "ous")) and len(token) > 5:
            kind |= bits["ADJ"]
        return kind
    return bits["SIGN"]


def deciding_rule(text: str, start: int, end: int, word: str) -> Rule:
    """The first rule of the table that fits the pronoun `word` ("her" or "his") at text[start:end]."""
    table = pronoun_table()
    token = _TOKEN_ASCII if text.isascii() else _TOKEN
    before = token.findall(text, max(0, start - WINDOW), start)[-2:]
    after = token.findall(text, end, end + WINDOW)[:3]
    beyond = table.bits["END"] if end + WINDOW >= len(text) else 0

    def classes(piece: str) -> int:
        low = piece.lower() if piece.isascii() else piece
        known = table.words.get(low)
        capital = table.bits["CAPITAL"] if "A" <= piece[0] <= "Z" and "a" <= piece[1:2] <= "z" else 0
        return capital | (_by_spelling(table.bits, low) if known is None else known)

    seen = [0] * (2 - len(before)) + [classes(piece) for piece in before] + [classes(piece) for piece in after] + [beyond] * (3 - len(after))
    for rule in _rules_after(word, seen[2]):
        for slot, wanted, barred in rule.conditions:
            if seen[slot] & barred or (wanted and not seen[slot] & wanted):
                break
        else:
            return rule
    raise AssertionError("pronouns.toml ends with a rule that always fits")


@functools.lru_cache(maxsize=4096)
def _rules_after(word: str, following: int) -> tuple[Rule, ...]:
    """The rules for `word` that the class of the word after it does not already rule out."""
    fits = lambda condition: condition[0] != 2 or not (following & condition[2] or (condition[1] and not following & condition[1]))
    return tuple(rule for rule in pronoun_table().rules if word in rule.becomes and all(map(fits, rule.conditions)))


def _decide(text: str, start: int, end: int, pronoun: _Pronoun) -> tuple[str, ...]:
    return pronoun.choices[deciding_rule(text, start, end, pronoun.word).becomes[pronoun.word]]
