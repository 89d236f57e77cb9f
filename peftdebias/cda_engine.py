"""Counterfactuals of many texts at once: the engine of csrc/cda.cpp, and its plain twin behind the same calls.

What it adds over cda.py, which says what a counterfactual is: blocks of texts, threads, output as it is written to a file, counts. `engine(axis)` is what
others use; it takes the compiled engine where it is there. The tables that the engine works from are made here, out of those of cda.py and pronouns.py.
"""

import contextlib
import ctypes
import functools
import itertools
import json
import os
import re
import threading
import weakref
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from peftdebias import cda, native
from peftdebias.axes import MOST_BARRED, Axis, word_class
from peftdebias.cda import KEEP, PAPER, Counterfactual, Family, Intervention, Swap, counterfactuals
from peftdebias.errors import ConfigError
from peftdebias.options import expect_whole
from peftdebias.pronouns import PRONOUNS, fits, pronoun_table

BLOCK = 8 << 20  # bytes of text that go to the engine together
EVERYTHING = 2**62
WRITTEN = ("json", "lines", "members", "nothing")  # what `write` may make of a text


@dataclass(slots=True)
class Expanded:
    """Families of many texts, flat. texts: all members end to end; sizes[i]: members of family i; sources[i]: index of its text among those given."""

    texts: list[str]
    sizes: list[int]
    sources: list[int]


@dataclass(slots=True)
class Counts:
    """What was seen: texts read; touched, those with a variant; variants made; words replaced in them; found: how often each attribute word stood there."""

    texts: int = 0
    touched: int = 0
    variants: int = 0
    replaced: int = 0
    found: Counter = field(default_factory=Counter)

    def add(self, other: "Counts") -> None:
        self.texts += other.texts
        self.touched += other.touched
        self.variants += other.variants
        self.replaced += other.replaced
        self.found.update(other.found)


@dataclass(slots=True)
class Written:
    """One block's output: chunks of bytes, good until the engine's next call; bad: (line of the block from 0, its bytes) of lines that are no UTF-8;
    lines of the block, blank ones too."""

    chunks: list
    counts: Counts
    bad: list[tuple[int, bytes]]
    lines: int


def engine(axis: Axis, intervention: Intervention = PAPER, threads: int = 1) -> "NativeEngine | PythonEngine":
    """The engine for an axis: compiled where that is there, else its twin (see native.library). The compiled one frees the GIL. Raises ConfigError on what is no Axis, no Intervention, or no
    number of threads."""
    cda.expect_axis("engine", axis, intervention)
    expect_whole("engine: threads", threads, 1)
    library = native.library()
    return PythonEngine(axis, intervention) if library is None else NativeEngine(axis, intervention, int(threads), library)


def expand(texts: Sequence[str], axis: Axis, intervention: Intervention = PAPER, threads: int = 1) -> Expanded:
    """The families of the texts, flat, as `cda.families` and `Family.kept` give them."""
    return engine(axis, intervention, threads).expand(texts)


def _expect(what: str, kind: str, first: int, start: int, stop: int, data: bytes = b"") -> None:
    """Raises ConfigError about `what`, a call to write, on what it cannot be asked for."""
    if kind not in WRITTEN:
        raise ConfigError(f"{what}: kind: expected one of {', '.join(WRITTEN)}, got {kind!r}")
    for name, value in (("first", first), ("start", start), ("stop", stop)):
        expect_whole(f"{what}: {name}", value, 0)
    if not isinstance(data, bytes):
        raise ConfigError(f"{what}: expected bytes, got {type(data).__name__}")


# ---------------------------------------------------------------- the twin

class PythonEngine:
    """cda.py text by text: what the compiled engine has to equal."""

    name = "python"

    def __init__(self, axis: Axis, intervention: Intervention = PAPER):
        self.axis, self.intervention = axis, intervention

    def families(self, texts: Sequence[str]) -> list[Family]:
        """A family a text with a variant (or kept untouched), whatever is kept of it."""
        return list(cda.families(texts, self.axis, self.intervention))

    def expand(self, texts: Sequence[str]) -> Expanded:
        """See `expand`."""
        found = Expanded([], [], [])
        for family in cda.families(texts, self.axis, self.intervention):
            members = family.kept(self.intervention.keep)
            found.texts.extend(members)
            found.sizes.append(len(members))
            found.sources.append(family.source)
        return found

    def write(self, texts: Sequence[str], kind: str = "json", first: int = 0, start: int = 0, stop: int = EVERYTHING) -> Written:
        """The texts' rows ("json"), or members, one a line ("lines") or end to end ("members"), or "nothing". `first` is the number of the first text; those outside
        start .. stop - 1 are counted only. Raises ConfigError on another kind, a number below 0, and what are no texts."""
        _expect("write", kind, first, start, stop)
        cda.expect_texts(texts)
        counts, pieces = Counts(), []
        for number, text in enumerate(texts, first):
            cda.utf8(text)
            counts.texts += 1
            if not start <= number < stop:
                continue
            variants = counterfactuals(text, self.axis, self.intervention)
            counts.found.update(cda.attribute_words(text, self.axis, self.intervention))
            counts.touched += bool(variants)
            counts.variants += len(variants)
            counts.replaced += sum(len(variant.swaps) for variant in variants)
            if variants or self.axis.keep_untouched:
                family = Family(text, tuple(variants), number)
                if kind == "json":
                    pieces += [json.dumps(row, ensure_ascii=False) + "\n" for row in cda.rows(family, self.intervention.keep)]
                elif kind != "nothing":
                    pieces += [member + ("\n" if kind == "lines" else "") for member in family.kept(self.intervention.keep)]
        return Written(["".join(pieces).encode()], counts, [], counts.texts)

    def write_lines(self, data: bytes, kind: str = "json", first: int = 0, start: int = 0, stop: int = EVERYTHING) -> Written:
        """The same for the lines of a block of a .txt: whole lines, read as corpus.read_texts reads them."""
        _expect("write_lines", kind, first, start, stop, data)
        texts, bad = [], []
        lines = data.removesuffix(b"\n").split(b"\n") if data else []
        for number, raw in enumerate(lines):
            try:
                text = raw.decode().removesuffix("\r")
            except UnicodeDecodeError:
                bad.append((number, raw))
                continue
            if text.strip():
                texts.append(text)
        written = self.write(texts, kind, first, start, stop)
        return Written(written.chunks, written.counts, bad, len(lines))


# ---------------------------------------------------------------- the engine

_WRITE = {"nothing": 0, "members": 1, "swaps": 2, "json": 3, "lines": 4}


_all: "weakref.WeakSet[NativeEngine]" = weakref.WeakSet()


def _forked() -> None:
    """In a child of os.fork nobody ends what the parent's other threads were about: every engine begins anew, and what it worked with,
    locked and half written perhaps, is left as it is."""
    for one in list(_all):
        one._begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class NativeEngine:
    """csrc/cda.cpp. The calls are PythonEngine's, and so are the results; of what `write` gives, the chunks are its memory until its next call.

    Callers on other threads wait for each other; a forked child waits for none of its parent's. A copy, or what a pickle makes, is an engine of its own.
    """

    name = "native"

    def __init__(self, axis: Axis, intervention: Intervention, threads: int, library: ctypes.CDLL):
        self.axis, self.intervention, self.threads = axis, intervention, threads
        self._library, self._axis = library, ctypes.c_void_p()
        tables, self._words = _tables(axis, intervention.only_from)
        _check(library.peftdebias_cda_axis_new(ctypes.byref(tables), ctypes.byref(self._axis)))
        self._begin()
        _all.add(self)

    def _begin(self) -> None:
        self._alone, self._job = threading.Lock(), ctypes.c_void_p()
        _check(self._library.peftdebias_cda_job_new(ctypes.byref(self._job)))

    def __del__(self):
        if getattr(self, "_job", None):
            self._library.peftdebias_cda_job_free(self._job)
        if getattr(self, "_axis", None):
            self._library.peftdebias_cda_axis_free(self._axis)

    def __reduce__(self):
        return engine, (self.axis, self.intervention, self.threads)

    def families(self, texts: Sequence[str]) -> list[Family]:
        encoded = _encoded(texts)
        with self._alone:
            return self._families(self._run(encoded, "swaps", keep="pairs"))

    def expand(self, texts: Sequence[str]) -> Expanded:
        encoded = _encoded(texts)
        with self._alone:
            found = Expanded([], [], [])
            for part in self._run(encoded, "members"):
                found.texts += _texts(part)
                found.sizes += part.sizes[: part.n_families]
                found.sources += part.sources[: part.n_families]
            return found

    def write(self, texts: Sequence[str], kind: str = "json", first: int = 0, start: int = 0, stop: int = EVERYTHING) -> Written:
        _expect("write", kind, first, start, stop)
        encoded = _encoded(texts)
        with self._alone:
            return self._written(self._run(encoded, kind, first=first, start=start, stop=stop), None)

    def write_lines(self, data: bytes, kind: str = "json", first: int = 0, start: int = 0, stop: int = EVERYTHING) -> Written:
        _expect("write_lines", kind, first, start, stop, data)
        with self._alone:
            return self._written(self._call(data, None, 0, kind, None, first, start, stop), data)

    def _families(self, parts: list["_Part"]) -> list[Family]:
        found = []
        for part in parts:
            members, counts = _texts(part), part.swap_counts[: part.n_members]
            swaps = part.swaps[: 3 * sum(counts)]
            afters = ctypes.string_at(part.afters, swaps[-1]) if swaps else b""
            member = at = begin = 0
            for size, source in zip(part.sizes[: part.n_families], part.sources[: part.n_families]):
                text, variants = members[member], []
                for i in range(member + 1, member + size):
                    done = []
                    for _ in range(counts[i]):
                        start, end, stop = swaps[at : at + 3]
                        done.append(Swap(start, end, text[start:end], afters[begin:stop].decode()))
                        at, begin = at + 3, stop
                    variants.append(Counterfactual(members[i], tuple(done)))
                found.append(Family(text, tuple(variants), source))
                member += size
        return found

    def _written(self, parts: list["_Part"], data: bytes | None) -> Written:
        chunks = [self._chunk(part) for part in parts if part.n_bytes]
        counts, bad, lines = Counts(), [], 0
        for part in parts:
            counts.add(Counts(part.texts, part.touched, part.variants, part.replaced))
            places = part.bad[: 3 * part.n_bad]
            bad += [(lines + places[i], data[places[i + 1] : places[i + 2]]) for i in range(0, len(places), 3)]
            lines += part.lines
        counts.found = Counter({word: n for word, n in zip(self._words, self._found) if n})
        return Written(chunks, counts, bad, lines)

    def _chunk(self, part: "_Part") -> memoryview:
        data = (ctypes.c_char * part.n_bytes).from_address(part.bytes)
        data.owner = self  # the memory is the job's
        return memoryview(data).cast("B")

    def _run(self, encoded: list[bytes], kind: str, keep: str | None = None, first: int = 0, start: int = 0, stop: int = EVERYTHING) -> list["_Part"]:
        ends = array("q", (end - 1 for end in itertools.accumulate(len(text) + 1 for text in encoded)))
        return self._call(b"\n".join(encoded), ends, len(encoded), kind, keep, first, start, stop)

    def _call(self, data: bytes, ends: array | None, texts: int, kind: str, keep: str | None, first: int, start: int, stop: int) -> list["_Part"]:
        how, result = self.intervention, _Result()
        request = _Request(
            data, len(data), None if ends is None else ends.buffer_info()[0], texts, int(first), min(int(start), EVERYTHING), min(int(stop), EVERYTHING),
            min(int(how.max_variants or 0), EVERYTHING), how.occurrences == "one", KEEP.index(keep or how.keep), self.axis.keep_untouched, _WRITE[kind], self.threads,
        )
        _check(self._library.peftdebias_cda_run(self._axis, self._job, ctypes.byref(request), ctypes.byref(result)))
        self._found = result.counts[: len(self._words)]
        return result.parts[: result.n_parts]


def _encoded(texts: Sequence[str]) -> list[bytes]:
    """Each text in UTF-8, for a call that does not hold the engine yet: what gives the texts may ask it too. Raises ConfigError as cda.families;
    what is wrong is looked for where something is, since a question a text would cost as much as to encode it."""
    cda.expect_texts(texts)
    texts = list(texts)
    with contextlib.suppress(TypeError, UnicodeEncodeError):
        return list(map(str.encode, texts))
    return list(map(cda.utf8, texts))


def _texts(part: "_Part") -> list[str]:
    data, start, found = ctypes.string_at(part.bytes, part.n_bytes) if part.n_bytes else b"", 0, []
    for end in part.ends[: part.n_members]:
        found.append(data[start:end].decode())
        start = end
    return found


def _check(code: int) -> None:
    if code:
        raise MemoryError("peftdebias._native: no memory for the texts and their counterfactuals")


# ---------------------------------------------------------------- tables

def _struct(name: str, *fields: tuple[str, object]) -> type[ctypes.Structure]:
    """A struct of csrc/cda.h: fields in its order; "a b c" of one type are three."""
    return type(name, (ctypes.Structure,), {"_fields_": [(one, kind) for names, kind in fields for one in names.split()]})


_Tables = _struct(
    "_Tables",
    ("characters form_bytes form_ends form_word form_row form_pronoun form_flags row_ends choice_bytes choice_ends choice_flags", ctypes.c_void_p),
    ("form_barred barred_bytes barred_ends barred_sets", ctypes.c_void_p),
    ("token_bytes token_ends token_class capital_class allowed pronoun_rules outcomes", ctypes.c_void_p),
    ("spelled", ctypes.c_int32 * 20),
    ("sign_class end_class none_class forms rows choices words barred tokens classes rules rule_words", ctypes.c_int32),
)
_Request = _struct(
    "_Request",
    ("bytes", ctypes.c_char_p),
    ("size", ctypes.c_int64),
    ("ends", ctypes.c_void_p),
    ("texts first_source from_source to_source max_variants", ctypes.c_int64),
    ("one_at_a_time keep keep_untouched write threads", ctypes.c_int32),
)
_Part = _struct(
    "_Part",
    ("bytes", ctypes.c_void_p),
    ("ends", ctypes.POINTER(ctypes.c_int64)),
    ("sizes", ctypes.POINTER(ctypes.c_int32)),
    ("sources swaps", ctypes.POINTER(ctypes.c_int64)),
    ("swap_counts", ctypes.POINTER(ctypes.c_int32)),
    ("afters", ctypes.c_void_p),
    ("bad", ctypes.POINTER(ctypes.c_int64)),
    ("n_bytes n_members n_families n_bad lines texts touched variants replaced", ctypes.c_int64),
)
_Result = _struct("_Result", ("parts", ctypes.POINTER(_Part)), ("counts", ctypes.POINTER(ctypes.c_int64)), ("n_parts", ctypes.c_int64))

_ENDINGS = ((), ("ING",), ("LY",), ("ED",), ("ADJ",))


@functools.cache
def _characters() -> bytes:
    """[0x110000] bit 0: a word character, bit 1: a space, by this Python's Unicode table."""
    flags = bytearray(0x110000)
    for first, last in ((0, 0x40000), (0xE0000, 0xE1000)):  # elsewhere Unicode has no letter, digit, mark or space
        stretch = "".join(map(chr, range(first, last)))
        for bit, pattern in ((b"\1", rf"[{word_class()}]+"), (b"\2", r"\s+")):
            for found in re.finditer(pattern, stretch):
                flags[first + found.start() : first + found.end()] = bit * (found.end() - found.start())
    return bytes(flags)


@functools.cache
def _pronoun_tables() -> dict:
    """pronouns.toml as bit sets: which rules a token of each class allows at each of the five places."""
    table = pronoun_table()
    bits = table.bits
    spelled = [
        sum(bits[name] for name in ("WORD", *("NUMBER",) * number, *ending, *("CAPITAL",) * capital))
        for number in (False, True) for ending in _ENDINGS for capital in (False, True)
    ]
    known = {0, bits["SIGN"], bits["END"], *spelled, *table.words.values()}
    classes = sorted(known | {one | bits["CAPITAL"] for one in known})
    number = {one: i for i, one in enumerate(classes)}
    width = (len(table.rules) + 63) // 64
    everything = (1 << len(table.rules)) - 1
    allowed = [[everything] * len(classes) for _ in range(5)]
    for rule in table.rules:
        for condition in rule.conditions:
            place = allowed[condition[0]]
            for i, one in enumerate(classes):
                if not fits(condition, one):
                    place[i] &= ~(1 << rule.number)
    pronouns = list(PRONOUNS.items())

    def words(sets) -> array:
        return array("Q", (one >> 64 * w & (1 << 64) - 1 for one in sets for w in range(width)))

    return {
        "tokens": _strings(table.words),
        "token_class": array("i", (number[one] for one in table.words.values())),
        "capital_class": array("i", (number[one | bits["CAPITAL"]] for one in classes)),
        "allowed": words(one for place in allowed for one in place),
        "pronoun_rules": words(sum(1 << rule.number for rule in table.rules if word in rule.becomes) for word, _ in pronouns),
        "outcomes": bytes((*becomes, word).index(rule.becomes.get(word, word)) for word, becomes in pronouns for rule in table.rules),
        "spelled": [number[one] for one in spelled],
        "sign_class": number[bits["SIGN"]], "end_class": number[bits["END"]], "none_class": number[0],
        "classes": len(classes), "rules": len(table.rules), "rule_words": width,
    }


def _tables(axis: Axis, only_from: int | None) -> tuple["_Tables", list[str]]:
    """(what the engine is made from, the attribute words in the order of its counts)."""
    lexicon = cda.lexicon(axis, only_from)
    words = list(dict.fromkeys(lexicon.words.values()))
    place = {word: i for i, word in enumerate(words)}
    rows, row_of, pronouns = [], [], bytearray()
    for form in lexicon.forms.values():
        row_of.append(len(rows))
        if isinstance(form, tuple) and not hasattr(form, "choices"):
            rows.append(form)
            pronouns.append(0)
        else:
            rows += form.choices.values()
            pronouns.append(1 + list(PRONOUNS).index(form.word))
    choices = [choice for row in rows for choice in row]
    sets = list(dict.fromkeys(lexicon.unless_after.values()))
    if len(sets) > MOST_BARRED:  # an Axis that came from no file
        raise ConfigError(f"axis {axis.name}: unless_after: expected at most {MOST_BARRED} sets of words, got {len(sets)}")
    barred = sorted(set().union(*sets))
    rules = _pronoun_tables() if axis.pronouns else {
        "tokens": _strings(()), "token_class": array("i"), "capital_class": array("i", [0]), "allowed": array("Q", [0] * 5), "pronoun_rules": array("Q", [0] * 2),
        "outcomes": bytes(0), "spelled": [0] * 20, "sign_class": 0, "end_class": 0, "none_class": 0, "classes": 1, "rules": 0, "rule_words": 1}
    form_bytes, form_ends = _strings(lexicon.forms)
    choice_bytes, choice_ends = _strings(choices)
    barred_bytes, barred_ends = _strings(barred)
    token_bytes, token_ends = rules["tokens"]
    arrays = {
        "characters": _characters(),
        "form_bytes": form_bytes, "form_ends": form_ends, "form_word": array("i", (place[word] for word in lexicon.words.values())),
        "form_row": array("i", row_of), "form_pronoun": bytes(pronouns), "form_flags": bytes(map(_flags, lexicon.forms)),
        "row_ends": array("i", itertools.accumulate(map(len, rows))),
        "form_barred": array("Q", (sum(1 << i for i, one in enumerate(sets) if one == lexicon.unless_after.get(word)) for word in lexicon.words.values())),
        "barred_bytes": barred_bytes, "barred_ends": barred_ends, "barred_sets": array("Q", (sum(1 << i for i, one in enumerate(sets) if word in one) for word in barred)),
        "choice_bytes": choice_bytes, "choice_ends": choice_ends, "choice_flags": bytes(map(_flags, choices)),
        "token_bytes": token_bytes, "token_ends": token_ends,
        **{name: rules[name] for name in ("token_class", "capital_class", "allowed", "pronoun_rules", "outcomes")},
    }
    tables = _Tables(
        spelled=(ctypes.c_int32 * 20)(*rules["spelled"]), forms=len(lexicon.forms), rows=len(rows), choices=len(choices), words=len(words), barred=len(barred),
        tokens=len(token_ends), **{name: rules[name] for name in ("sign_class", "end_class", "none_class", "classes", "rules", "rule_words")},
    )
    tables.kept = arrays  # alive as long as the tables are
    for name, data in arrays.items():
        setattr(tables, name, data.buffer_info()[0] if isinstance(data, array) else ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value)
    return tables, words


def _strings(words) -> tuple[bytes, array]:
    encoded = [word.encode() for word in words]
    return b"".join(encoded), array("i", itertools.accumulate(map(len, encoded)))


def _flags(word: str) -> int:
    """PLURAL_NO_S, ENDS_IN_S, BARE and UPPER of csrc/cda.h: what cda's rule for possessives asks."""
    low = word.lower()
    return low.endswith(cda.PLURALS) | low.endswith("s") << 1 | cda.takes_bare_apostrophe(low) << 2 | word.isupper() << 3
