"""Axes of bias: which words tell the identity groups of one axis apart, and what a word is.

One TOML file an axis. A *row* holds one word per group (``man, woman``; ``torah, bible, quran``); cda.py replaces a word by the others of its
row. This file reads and checks the rows; how a text is swapped is cda.py's business alone. docs/axes.md documents the schema for a user's own axis.
Left out: multi-word entries ("hair salon"), word senses, inflection: a plural is a row of its own.
"""

import functools
import tomllib
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from peftdebias.errors import ConfigError, DataError

_HERE = Path(__file__).parent
_NOT_AXES = {"pronouns"}  # tables of the engine that lie in the same folder
_KEYS = {"name", "description", "keep_untouched", "pronouns", "groups", "like", "only"}
_PRONOUN_ROWS = (("him", "her"), ("his", "hers"))
LONGEST_WORD = 100  # characters; the longest English dictionary word has 45
SHAPES = ("lower", "Capital", "UPPER")


@dataclass(frozen=True)
class Axis:
    """One axis of bias.

    name            as on the command line
    groups          rows of 2 or more words in lower case; a word stands in one row only, so that a swap can be swapped back
    keep_untouched  True: a text without an attribute word stays in the corpus, as it is; False: it is dropped
    pronouns        True: her, his, him and hers follow the table axes/pronouns.toml (gender)
    like            (word, model): word is replaced as model, a word of a row, would be, but never put in anyone's place (ms like mrs)
    only            (word, shapes): the word's whole row counts in these letter cases alone ("lower", "Capital", "UPPER")
    """

    name: str
    groups: tuple[tuple[str, ...], ...]
    keep_untouched: bool
    pronouns: bool = False
    description: str = ""
    source: str = ""
    like: tuple[tuple[str, str], ...] = ()
    only: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def __hash__(self):  # by name and file: an axis is a cache key for every text, and its rows are long
        return hash((self.name, self.source))

    @property
    def words(self) -> frozenset[str]:
        """Every word that is recognised in a text, in lower case."""
        return frozenset(word for row in self.groups for word in row) | {word for word, _ in self.like}


def names() -> list[str]:
    """The axes that come with the package, in alphabetical order."""
    return sorted(path.stem for path in _HERE.glob("*.toml") if path.stem not in _NOT_AXES)


def load_axis(name_or_path) -> Axis:
    """The axis of a shipped name ("gender"), or of a user's TOML file (anything with a folder or ending in .toml)."""
    name = str(name_or_path)
    path = Path(name)
    if name in names():
        return _load(_HERE / f"{name}.toml")
    if path.suffix != ".toml" and path.name == name:
        raise ConfigError(f"unknown axis {name!r}: expected one of {', '.join(names())}, or the path of a .toml file")
    return _load(path)


@functools.cache
def word_class() -> str:
    r"""The inside of a regular-expression class that matches one word character.

    A word character is what Python's ``\w`` matches (letters and digits of every script, and the underscore) or a combining mark
    (Unicode category M: accents written apart, vowel signs), so that "he" is not found inside "he" + U+0301. Everything else, apostrophes and
    hyphens included, parts words. An engine in another language takes its table from here, character by character.
    """
    marks = [code for code in (*range(0x300, 0x20000), *range(0xE0100, 0xE01F0)) if unicodedata.category(chr(code))[0] == "M"]
    ranges = []
    for code in marks:
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return r"\w" + "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)


def is_word_character(character: str) -> bool:
    return character.isalnum() or character == "_" or unicodedata.category(character)[0] == "M"


def _load(path: Path) -> Axis:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"axis file {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"axis file {path}: expected readable UTF-8 text, got {error}") from None
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"axis file {path}: expected TOML, got {error}") from None
    return _Check(path, text).axis(table)


class _Check:
    """Turns one parsed file into an Axis, or says what is wrong with which word."""

    def __init__(self, path: Path, text: str):
        self.path, self.lines = path, text.splitlines()

    def fail(self, message: str, word: str = "", nth: int = 1):
        """Raise; `word` finds the line to name: the nth one that quotes it (the last, if there are fewer)."""
        found = [number for number, line in enumerate(self.lines, 1) for _ in range(line.split("#")[0].count(f'"{word}"'))] if word else []
        line = f":{found[min(nth, len(found)) - 1]}" if found else ""
        raise DataError(f"axis file {self.path}{line}: {message}")

    def axis(self, table: dict) -> Axis:
        unknown = sorted(set(table) - _KEYS)
        if unknown:
            raise ConfigError(f"axis file {self.path}: unknown key {unknown[0]!r}: expected one of {', '.join(sorted(_KEYS))}")
        for key, kind in (("name", str), ("description", str), ("keep_untouched", bool), ("pronouns", bool), ("like", dict), ("only", dict)):
            if key in table and not isinstance(table[key], kind):
                self.fail(f"key {key!r}: expected {kind.__name__}, got {table[key]!r}")
        if "keep_untouched" not in table:
            self.fail("key 'keep_untouched' is missing: expected true (texts without an attribute word stay) or false (they are dropped)")
        groups = self.groups(table.get("groups"))
        columns = {word for row in groups for word in row}
        if table.get("pronouns") and any(row not in groups for row in _PRONOUN_ROWS):
            self.fail('pronouns = true: expected the rows ["him", "her"] and ["his", "hers"] among the groups')
        return Axis(
            name=table.get("name", self.path.stem),
            groups=groups,
            keep_untouched=table["keep_untouched"],
            pronouns=table.get("pronouns", False),
            description=table.get("description", ""),
            source=str(self.path),
            like=self.like(table.get("like", {}), columns),
            only=self.only(table.get("only", {}), columns | set(table.get("like", {}))),
        )

    def groups(self, groups) -> tuple[tuple[str, ...], ...]:
        if not isinstance(groups, list) or not groups:
            self.fail(f'key \'groups\': expected a list of rows such as ["man", "woman"], got {groups!r}')
        row_of = {}
        for number, row in enumerate(groups, 1):
            if not isinstance(row, list):
                self.fail(f"group {number}: expected a list of words, got {row!r}")
            if not row:
                self.fail(f"group {number} is empty: expected two or more words")
            if len(row) == 1:
                self.fail(f"group {number} has the one word {row[0]!r}: expected two or more, one for each identity", str(row[0]))
            for word in row:
                self.word(word, f"group {number}")
                if row_of.get(word) == number:
                    self.fail(f"group {number} repeats {word!r}: expected every word of a group once", word, nth=2)
                if word in row_of:
                    self.fail(f"{word!r} stands in groups {row_of[word]} and {number}: expected one, or its swap would be ambiguous", word, nth=2)
                row_of[word] = number
        return tuple(tuple(row) for row in groups)

    def word(self, word, where: str):
        if not isinstance(word, str):
            self.fail(f"{where}: expected a word in quotes, got {word!r}")
        if not word:
            self.fail(f"{where} has an empty word: expected letters")
        for left, character, right in zip(" " + word, word, word[1:] + " "):
            inner = character == "'" and is_word_character(left) and is_word_character(right)
            if not (inner or is_word_character(character)):
                why = f"can never match as a whole word, for {character!r} is no part of a word"
                self.fail(f"{where}: {word!r} {why}: expected letters, digits or an inner '", word)
        if word != "".join(map(lower, word)):
            self.fail(f"{where}: {word!r} has a capital letter: expected lower case (a text's own case is kept)", word)
        if len(word) > LONGEST_WORD:
            self.fail(f"{where}: {word[:20]!r}... has {len(word)} characters: expected at most {LONGEST_WORD}", word)

    def like(self, like: dict, columns: set) -> tuple[tuple[str, str], ...]:
        for word, model in like.items():
            self.word(word, "like")
            if word in columns:
                self.fail(f"like: {word!r} stands in a group too: expected one of the two", word)
            if model not in columns:
                self.fail(f"like: {word!r} is to be treated like {model!r}: expected a word of the groups", word)
        return tuple(like.items())

    def only(self, only: dict, known: set) -> tuple[tuple[str, tuple[str, ...]], ...]:
        for word, shapes in only.items():
            if word not in known:
                self.fail(f"only: {word!r} is in no group and not under like: expected a word of this axis", word)
            if not isinstance(shapes, list) or not shapes or any(shape not in SHAPES for shape in shapes):
                self.fail(f"only: {word!r}: expected a list out of {', '.join(SHAPES)}, got {shapes!r}", word)
        return tuple((word, tuple(shapes)) for word, shapes in only.items())


def lower(character: str) -> str:
    """Simple lower case of one character: itself where the full mapping is longer than one."""
    return low if len(low := character.lower()) == 1 else character


def upper(character: str) -> str:
    """Simple upper case of one character: itself where the full mapping is longer than one (ß)."""
    return up if len(up := character.upper()) == 1 else character
