"""Axes of bias: which words tell the identity groups of one axis apart, and what a word is.

One TOML file an axis. A *row* holds one word per group (``man, woman``; ``torah, bible, quran``); cda.py replaces a word by the others of its
row. This file reads and checks the rows; how a text is swapped is cda.py's business alone. docs/axes.md documents the schema for a user's own axis.
names.toml, first names in rows of the same kind, is a table to add to an axis and no axis itself: `Axis.with_names`.
Left out: multi-word entries ("hair salon"), word senses, inflection: a plural is a row of its own.
"""

import functools
import hashlib
import re
import tomllib
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from peftdebias.errors import ConfigError, DataError
from peftdebias.options import expect_path

_HERE = Path(__file__).parent
_NOT_AXES = {"names", "pronouns"}  # tables that lie in the same folder
_KEYS = {"name", "description", "keep_untouched", "pronouns", "columns", "groups", "like", "only", "unless_after"}
_KINDS = {str: "a text", bool: "true or false", dict: "a table of words"}
_NAMES_KEYS = {"description", "columns", "groups"}
_PRONOUN_ROWS = (("him", "her"), ("his", "hers"))
LONGEST_WORD = 100  # characters; the longest English dictionary word has 45
SHAPES = {
    "lower": lambda word: word,
    "Capital": lambda word: upper(word[0]) + word[1:],
    "UPPER": lambda word: "".join(map(upper, word)),
}
"""A letter case by name -> the word in it."""
MOST_BARRED = 64  # words under unless_after: as many as the engine's sets of bits hold


@dataclass(frozen=True)
class Axis:
    """One axis of bias.

    name            as on the command line
    groups          rows of 2 or more words in lower case; a word stands in one row only, so that a swap can be swapped back
    keep_untouched  True: a text without an attribute word stays in the corpus, as it is; False: it is dropped
    pronouns        True: her, his, him and hers follow the table axes/pronouns.toml (gender)
    like            (word, model): word is replaced as model, a word of a row, would be, but never put in anyone's place (ms like mrs)
    only            (word, shapes): the word's whole row counts in these letter cases alone ("lower", "Capital", "UPPER")
    unless_after    (word, before): the word's whole row does not count behind one of these words ("years" old), spaces or a hyphen between
    columns         names of the identities, one a column of the longest row (a shorter row has the first ones); () where the rows' columns mean
                    different identities
    source          the file, and that of the first names if there are some: two axes of one name and source are the same to a cache
    """

    name: str
    groups: tuple[tuple[str, ...], ...]
    keep_untouched: bool
    pronouns: bool = False
    description: str = ""
    source: str = ""
    like: tuple[tuple[str, str], ...] = ()
    only: tuple[tuple[str, tuple[str, ...]], ...] = ()
    unless_after: tuple[tuple[str, tuple[str, ...]], ...] = ()
    columns: tuple[str, ...] = ()

    def __post_init__(self):
        """Raises DataError on rows, words or names that a file of an axis may not have either; forms that are written alike are found there alone."""
        check, tables = _Check(Path(), "", "axis"), {}
        check.where = f"axis {self.name!r}"
        for key in ("like", "only", "unless_after"):
            try:
                tables[key] = {word: _listed(said) for word, said in getattr(self, key)}
            except (TypeError, ValueError):
                check.fail(f"key {key!r}: expected pairs of a word and what is said of it, got {getattr(self, key)!r}")
        check.kinds(vars(self) | tables)
        check.name(self.name)
        groups = check.groups(_listed(self.groups, _listed))
        words = {word for row in groups for word in row}
        check.like(tables["like"], words)
        words |= set(tables["like"])
        check.only(tables["only"], words, groups)
        check.unless_after(tables["unless_after"], words)
        if self.columns:
            check.columns(_listed(self.columns), self.groups)

    def __hash__(self):  # by name and file: an axis is a cache key for every text, and its rows are long
        return hash((self.name, self.source))

    def digest(self) -> str:
        """sha256 of the words that are swapped, for which and where; not of names, nor of what becomes of texts without them."""
        return hashlib.sha256(repr((self.groups, self.pronouns, self.like, self.only, self.unless_after)).encode()).hexdigest()

    @property
    def words(self) -> frozenset[str]:
        """Every word that is recognised in a text, in lower case."""
        return frozenset(word for row in self.groups for word in row) | {word for word, _ in self.like}

    def column(self, name_or_number) -> int:
        """The column (0 or more: its index in a row) of an identity, given by its name ("female") or by its number, which counts from 1 (2 or "2").

        Raises ConfigError, with the names there are, for any other value.
        """
        wanted, width = str(name_or_number), max(map(len, self.groups))
        if wanted in self.columns:
            return self.columns.index(wanted)
        if wanted.isdecimal() and 1 <= int(wanted) <= width:
            return int(wanted) - 1
        known = f"one of {', '.join(self.columns)}, or" if self.columns else "(its columns have no names)"
        raise ConfigError(f"axis {self.name!r}: unknown column {wanted!r}: expected {known} a number from 1 to {width}")

    def with_names(self, path=None) -> "Axis":
        """This axis with first names added to its groups: of the shipped table (US, male and female), or of a user's file.

        Names count as Capital and UPPER alone. The table names its columns; they are to be those of this axis, so that names go where words of their
        identity go. Raises ConfigError for an axis with other columns or none, DataError for a mistake in the file or a name that is a word of the axis.
        """
        path = _HERE / "names.toml" if path is None else expect_path("names file", path, DataError)
        text, table = _read(path, "names file")
        rows = _Check(path, text, "names file").names(table, self)
        only = tuple((row[0], ("Capital", "UPPER")) for row in rows)
        return replace(self, groups=self.groups + rows, only=self.only + only, source=f"{self.source} + {path}")


def names() -> list[str]:
    """The axes that come with the package, in alphabetical order."""
    return sorted(path.stem for path in _HERE.glob("*.toml") if path.stem not in _NOT_AXES)


def load_axis(name_or_path) -> Axis:
    """The axis of a shipped name ("gender"), or of a user's TOML file (anything with a folder or ending in .toml). Raises ConfigError on an unknown name, DataError on a file
    that is missing or says what no axis may have, with its line."""
    name = str(name_or_path)
    path = Path(name)
    if name in names():
        return _load(_HERE / f"{name}.toml")
    if path.suffix.lower() != ".toml" and path.name == name:
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


def _listed(value, of: Callable = lambda one: one):
    """A tuple as the list that a file has in its place, of what `of` makes of each; anything else as it is."""
    return [of(one) for one in value] if isinstance(value, tuple) else value


def _load(path: Path) -> Axis:
    text, table = _read(path, "axis file")
    return _Check(path, text, "axis file").axis(table)


def _read(path: Path, kind: str) -> tuple[str, dict]:
    """The text of a TOML file and what it says; kind: what an error calls it."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{kind} {path}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{kind} {path}: expected a file, got a folder") from None
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a name with a zero byte
        raise DataError(f"{kind} {path}: expected readable UTF-8 text, got {error}") from None
    try:
        return text, tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: no TOML, or an integer of thousands of digits
        raise DataError(f"{kind} {path}: expected TOML, got {error}") from None


class _Check:
    """Turns one parsed file into an Axis or rows of names, or says what is wrong with which word."""

    def __init__(self, path: Path, text: str, kind: str):
        self.path, self.lines = path, text.splitlines()
        self.where = f"{kind} {path}"

    def fail(self, message: str, word: str = "", nth: int = 1, inside: str = "groups"):
        """Raise; `word` finds the line to name: under the key or table `inside` the one where it is a key, or the nth one that quotes it (the last, if there are fewer)."""
        quoted, key = re.compile(rf"""["']{re.escape(word)}["']"""), re.compile(rf"""\s*(["']?){re.escape(word)}\1\s*=""")
        found: list[list[int]] = [[], [], []]  # as a key there, quoted there, quoted anywhere
        section, in_table = "", False
        for number, line in enumerate(self.lines if word else [], 1):
            line = line.split("#")[0]
            if head := re.fullmatch(r"\s*\[\s*(\w+)\s*\]\s*", line):
                section, in_table = head[1], True
            elif not in_table and (head := re.match(r"\s*(\w+)\s*=", line)):
                section = head[1]
            times = len(quoted.findall(line))
            found[0] += [number] * (section == inside and in_table and key.match(line) is not None)
            found[1] += [number] * (times * (section == inside))
            found[2] += [number] * times
        places = next(filter(None, found), [])
        line = f":{places[min(nth, len(places)) - 1]}" if places else ""
        raise DataError(f"{self.where}{line}: {message}")

    def keys(self, table: dict, known: set):
        unknown = sorted(set(table) - known)
        if unknown:
            raise ConfigError(f"{self.where}: unknown key {unknown[0]!r}: expected one of {', '.join(sorted(known))}")

    def kinds(self, table: dict):
        for kind, keys in ((str, ("name", "description", "source")), (bool, ("keep_untouched", "pronouns")), (dict, ("like", "only", "unless_after"))):
            for key in keys:
                if key in table and not isinstance(table[key], kind):
                    self.fail(f"key {key!r}: expected {_KINDS[kind]}, got {table[key]!r}")

    def name(self, name: str):
        if not name.strip():
            self.fail(f"key 'name': expected a text to call the axis by, got {name!r}")
        if "/" in name:  # parts the names of measures
            self.fail(f"key 'name': expected a name without /, got {name!r}")
        if not name.isprintable():
            self.fail(f"key 'name': expected printable characters, got {name!r}")

    def axis(self, table: dict) -> Axis:
        self.keys(table, _KEYS)
        self.kinds(table)
        self.name(name := table.get("name", self.path.stem))
        if "keep_untouched" not in table:
            self.fail("key 'keep_untouched' is missing: expected true (texts without an attribute word stay) or false (they are dropped)")
        groups = self.groups(table.get("groups"))
        words = {word for row in groups for word in row}
        if table.get("pronouns") and any(row not in groups for row in _PRONOUN_ROWS):
            self.fail('pronouns = true: expected the rows ["him", "her"] and ["his", "hers"] among the groups')
        axis = Axis(
            name=name,
            groups=groups,
            keep_untouched=table["keep_untouched"],
            pronouns=table.get("pronouns", False),
            description=table.get("description", ""),
            source=str(self.path),
            like=self.like(table.get("like", {}), words),
            only=self.only(table.get("only", {}), words | set(table.get("like", {})), groups),
            unless_after=self.unless_after(table.get("unless_after", {}), words | set(table.get("like", {}))),
            columns=self.columns(table["columns"], groups) if "columns" in table else (),
        )
        self.forms(axis)
        return axis

    def names(self, table: dict, axis: Axis) -> tuple[tuple[str, ...], ...]:
        """The rows of a table of first names that fits the axis."""
        self.keys(table, _NAMES_KEYS)
        groups = self.groups(table.get("groups"))
        if "columns" not in table:
            self.fail("key 'columns' is missing: expected the names of the identities that the columns stand for")
        columns = self.columns(table["columns"], groups)
        if columns != axis.columns:
            has = f"has the columns {', '.join(axis.columns)}" if axis.columns else "has no names for its columns"
            raise ConfigError(f"axis {axis.name!r} {has}: expected first names of those identities, got {', '.join(columns)} in {self.where}")
        for word in (word for row in groups for word in row if word in axis.words):
            self.fail(f"{word!r} is a word of the axis {axis.name!r} already: expected a first name that is none", word)
        return groups

    def columns(self, columns, groups) -> tuple[str, ...]:
        if not isinstance(columns, list) or any(not isinstance(name, str) or not name.strip() for name in columns):
            self.fail(f"key 'columns': expected a list of names, one for each identity, got {columns!r}")
        for name in columns:
            if columns.count(name) > 1:
                self.fail(f"key 'columns' repeats {name!r}: expected every identity once", name, nth=2, inside="columns")
            if not name.isprintable():
                self.fail(f"key 'columns': expected names of printable characters, got {name!r}", name, inside="columns")
            if name.isdecimal():
                self.fail(f"key 'columns': {name!r} is a number: expected a name, for a column may be asked for by its number too", name, inside="columns")
        if len(columns) != (width := max(map(len, groups))):
            self.fail(f"key 'columns': expected {width} names, for the longest group has {width} words, got {len(columns)}: {', '.join(columns)}")
        return tuple(columns)

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

    def word(self, word, where: str, inside: str = "groups"):
        if not isinstance(word, str):
            self.fail(f"{where}: expected a word in quotes, got {word!r}")
        if not word:
            self.fail(f"{where} has an empty word: expected letters")
        for left, character, right in zip(" " + word, word, word[1:] + " "):
            inner = character == "'" and is_word_character(left) and is_word_character(right)
            if not (inner or is_word_character(character)):
                why = f"can never match as a whole word, for {character!r} is no part of a word"
                self.fail(f"{where}: {word!r} {why}: expected letters, digits or an inner '", word, inside=inside)
        if word != "".join(map(lower, word)):
            self.fail(f"{where}: {word!r} has a capital letter: expected lower case (a text's own case is kept)", word, inside=inside)
        if len(word) > LONGEST_WORD:
            self.fail(f"{where}: {word[:20]!r}... has {len(word)} characters: expected at most {LONGEST_WORD}", word, inside=inside)

    def like(self, like: dict, words: set) -> tuple[tuple[str, str], ...]:
        for word, model in like.items():
            self.word(word, "like", "like")
            if word in words:
                self.fail(f"like: {word!r} stands in a group too: expected one of the two", word, inside="like")
            if not isinstance(model, str) or model not in words:
                self.fail(f"like: {word!r} is to be treated like {model!r}: expected a word of the groups", word, inside="like")
        return tuple(like.items())

    def only(self, only: dict, known: set, groups: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Every row is left a letter case in which it counts."""
        for word, shapes in only.items():
            if word not in known:
                self.fail(f"only: {word!r} is in no group and not under like: expected a word of this axis", word, inside="only")
            if not isinstance(shapes, list) or not shapes or any(shape not in [*SHAPES] for shape in shapes):
                self.fail(f"only: {word!r}: expected a list out of {', '.join(SHAPES)}, got {shapes!r}", word, inside="only")
        for row in groups:
            if not set(SHAPES).intersection(*(only[word] for word in row if word in only)):
                self.fail(f"only: {row[0]!r} counts in no letter case, since its row has others: expected one that all have in common", row[0], inside="only")
        return tuple((word, tuple(shapes)) for word, shapes in only.items())

    def forms(self, axis: Axis):
        """No two words have a form in common."""
        word_of: dict[str, str] = {}
        for word, shapes in letter_cases(axis).items():
            for form in {shape: SHAPES[shape](word) for shape in shapes}.values():
                if word_of.setdefault(form, word) != word:
                    self.fail(f"{word!r} and {word_of[form]!r} are both written {form!r}: expected words that can be told apart, or its swap would be ambiguous", word)

    def unless_after(self, unless_after: dict, known: set) -> tuple[tuple[str, tuple[str, ...]], ...]:
        for word, before in unless_after.items():
            if word not in known:
                self.fail(f"unless_after: {word!r} is in no group and not under like: expected a word of this axis", word, inside="unless_after")
            if not isinstance(before, list) or not before:
                self.fail(f"unless_after: {word!r}: expected a list of words, got {before!r}", word, inside="unless_after")
            for one in before:
                self.word(one, f"unless_after: {word!r}", "unless_after")
                if "'" in one:
                    self.fail(f"unless_after: {word!r}: expected words without an apostrophe, got {one!r}", word, inside="unless_after")
        if (many := len(unless_after)) > MOST_BARRED:
            self.fail(f"unless_after: expected at most {MOST_BARRED} words, got {many}", list(unless_after)[MOST_BARRED], inside="unless_after")
        return tuple((word, tuple(before)) for word, before in unless_after.items())


def letter_cases(axis: Axis) -> dict[str, list[str]]:
    """Each word -> the letter cases in which it counts: those that `only` leaves to all words of its row, or to a word under `like`."""
    only, found = dict(axis.only), {}
    for row in axis.groups:
        found |= dict.fromkeys(row, [shape for shape in SHAPES if all(shape in only.get(word, SHAPES) for word in row)])
    return found | {word: list(only.get(word, SHAPES)) for word, _ in axis.like}


def lower(character: str) -> str:
    """Simple lower case of one character: itself where the full mapping is longer than one."""
    return low if len(low := character.lower()) == 1 else character


def upper(character: str) -> str:
    """Simple upper case of one character: itself where the full mapping is longer than one (ß)."""
    return up if len(up := character.upper()) == 1 else character
