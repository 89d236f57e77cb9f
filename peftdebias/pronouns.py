"""Which pronoun `her` and `his` stand for, by what stands around them: the table of axes/pronouns.toml.

What it adds over cda.py, which swaps words: the two that have more than one partner. A token is a word, a sign or a blank line; a rule asks for classes of
the two before the pronoun and the three behind it, and the first rule that fits decides. Plain Python and the specification; another engine takes the same
table as data (`pronoun_table`).
"""

import functools
import re
import tomllib
from pathlib import Path
from typing import NamedTuple

from peftdebias.axes import is_word_character, word_class

WINDOW = 64  # characters on either side of a pronoun that its rules may look at; a word that the border cuts counts as the piece inside
PRONOUNS = {"her": ("his", "him"), "his": ("her", "hers")}  # what each becomes by the table, where it does not stay
_SLOTS = ("before2", "before", "next", "next2", "next3")
_BUILT_IN = ("END", "WORD", "SIGN", "NUMBER", "CAPITAL", "ING", "LY", "ED", "ADJ")
_TOKEN = re.compile(rf"[{word_class()}]+|\n\s*\n|[^\s{word_class()}]")
_TOKEN_ASCII = re.compile(r"\w+|\n\s*\n|[^\s\w]")  # the same on ASCII text, and faster


class Rule(NamedTuple):
    """One row of pronouns.toml."""

    number: int
    conditions: tuple[tuple[int, int, int], ...]  # (slot, any of these classes, none of those): bit sets
    becomes: dict[str, str]  # {"her": "his" | "him" | "her", "his": "her" | "hers" | "his"}
    example: str


class _Table(NamedTuple):
    rules: tuple[Rule, ...]
    bits: dict[str, int]  # class -> its bit
    words: dict[str, int]  # word or sign -> the bits of all its classes


@functools.cache
def pronoun_table() -> _Table:
    """axes/pronouns.toml with its classes turned into bits. The words that a rule writes out are a class of their own."""
    table = tomllib.loads((Path(__file__).parent / "axes" / "pronouns.toml").read_text(encoding="utf-8"))
    classes = table["classes"]
    bits = {name: 1 << number for number, name in enumerate(_BUILT_IN)}
    words: dict[str, int] = {}

    def members(names: str) -> set[str]:
        return {word for name in names.split() for word in (members(classes[name]) if name in classes else (name,))}

    def bit(name: str, listed: str) -> int:
        if name not in bits:
            bits[name] = 1 << len(bits)
            for word in members(listed):
                words[word] = words.get(word, _by_spelling(bits, word)) | bits[name]
        return bits[name]

    def union(names: list[str]) -> int:
        unknown = [name for name in names if name.isupper() and name not in bits and name not in classes]
        if unknown:
            raise ValueError(f"pronouns.toml: expected a class, got {unknown[0]}")
        named = [name for name in names if name.isupper()]
        literal = " ".join(sorted(set(names) - set(named)))
        return sum({bit(name, classes.get(name, "")) for name in named} | ({bit(f"'{literal}'", literal)} if literal else set()))

    def condition(slot: int, names: list[str]) -> tuple[int, int, int]:
        return slot, union([name for name in names if name[0] != "!"]), union([name[1:] for name in names if name[0] == "!"])

    rules = []
    for number, row in enumerate(table["rules"]):
        conditions = tuple(condition(slot, row[name].split()) for slot, name in enumerate(_SLOTS) if name in row)
        rules.append(Rule(number, conditions, {word: row[word] for word in ("her", "his") if word in row}, row["example"]))
    return _Table(tuple(rules), bits, words)


def _by_spelling(bits: dict[str, int], token: str) -> int:
    """The built-in classes of a token in lower case."""
    if token[0] == "\n":
        return bits["END"]
    if not is_word_character(token[0]):
        return bits["SIGN"]
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


@functools.lru_cache(maxsize=1 << 16)
def _classes(token: str) -> int:
    """All classes of a token as it stands in the text. Case matters to CAPITAL alone; a token with a character beyond ASCII is not lowered."""
    table = pronoun_table()
    low = token.lower() if token.isascii() else token
    known = table.words.get(low) or _by_spelling(table.bits, low)
    return known | table.bits["CAPITAL"] if "A" <= token[0] <= "Z" and "a" <= token[1:2] <= "z" else known


def deciding_rule(text: str, start: int, end: int, word: str) -> Rule:
    """The first rule of the table that fits the pronoun `word` ("her" or "his") at text[start:end]."""
    find = (_TOKEN_ASCII if text.isascii() else _TOKEN).findall
    before = find(text, max(0, start - WINDOW), start)[-2:]
    after = find(text, end, end + WINDOW)[:3]
    beyond = pronoun_table().bits["END"] if end + WINDOW >= len(text) else 0
    seen = [0] * (2 - len(before)) + [_classes(token) for token in before + after] + [beyond] * (3 - len(after))
    for rule in _rules_after(word, seen[2]):
        if all(fits(condition, seen[condition[0]]) for condition in rule.conditions):
            return rule
    raise AssertionError("pronouns.toml ends with a rule that always fits")


def fits(condition: tuple[int, int, int], classes: int) -> bool:
    """Whether a token of these classes meets a condition of a rule."""
    _, wanted, barred = condition
    return not classes & barred and (not wanted or classes & wanted != 0)


@functools.lru_cache(maxsize=1 << 14)
def _rules_after(word: str, following: int) -> tuple[Rule, ...]:
    """The rules for `word` that the classes of the token after it do not rule out already, that condition taken off."""
    fitting = []
    for rule in pronoun_table().rules:
        if word in rule.becomes and all(fits(condition, following) for condition in rule.conditions if condition[0] == 2):
            fitting.append(rule._replace(conditions=tuple(condition for condition in rule.conditions if condition[0] != 2)))
    return tuple(fitting)
