"""The compiled engine equals its Python twin, byte for byte: on real corpora, on every kind of axis and intervention, and on texts made to break it."""

import concurrent.futures
import copy
import importlib.util
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy.linalg._umath_linalg
import pytest

from peftdebias import cda, cda_engine, kernels, native
from peftdebias.axes import LONGEST_WORD, Axis, is_word_character, load_axis, names
from peftdebias.cda import KEEP, OCCURRENCES, PAPER, Intervention
from peftdebias.cda_engine import NativeEngine, PythonEngine
from peftdebias.errors import ConfigError
from peftdebias.pronouns import pronoun_table

GENDER, RACE = load_axis("gender"), load_axis("race")
UNEVEN = Axis("uneven", (("she", "he"), ("ma'am", "sir"), ("ma", "pa"), ("red", "blue", "green", "grün"), ("s", "z"), ("ladies", "gentlemen")), True,
              source="uneven", like=(("crimson", "red"),), only=(("pa", ("Capital",)),), unless_after=(("red", ("the", "ünal", "own")), ("crimson", ("kim",))))
AXES = [*map(load_axis, names()), UNEVEN, GENDER.with_names()]


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """There must be an engine to test: without a compiler on the machine these tests skip, and say so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if native.library() is None:
            pytest.skip(f"no compiled engine: {native.load()[1] or 'PEFTDEBIAS_KERNELS=torch'}")


def engines(axis, intervention=PAPER, threads=1):
    return NativeEngine(axis, intervention, threads, native.library()), PythonEngine(axis, intervention)


def same(axis, texts, intervention=PAPER, threads=1):
    """Asserts that both engines make the same of the texts, in every form of output."""
    fast, plain = engines(axis, intervention, threads)
    for a, b in zip(fast.families(texts), plain.families(texts), strict=True):
        assert a == b
    assert fast.expand(texts) == plain.expand(texts)
    for kind in cda_engine.WRITTEN:
        same_written(fast.write(texts, kind, first=7), plain.write(texts, kind, first=7))


def same_lines(axis, data, intervention=PAPER, threads=1, **bounds):
    fast, plain = engines(axis, intervention, threads)
    for kind in ("json", "lines", "members"):
        same_written(fast.write_lines(data, kind, **bounds), plain.write_lines(data, kind, **bounds))


def same_written(a, b):
    assert b"".join(a.chunks) == b"".join(b.chunks)
    assert (a.counts, a.bad, a.lines) == (b.counts, b.bad, b.lines)


# ---- texts made to break it

PIECES = [*"\u00a0\u2007\u2009\u200a\u2010\u2011\u202f‘ '’`-.,:;!?\né\u0301\0_/()\"\\0ßİſ\u212a😀\x1c\x1f\x7f\u3000\u0085\u2028\ud7ff\ue000\uffff\U0010ffff\t\r", " ", " ", "\n\n", "\n \n", "'s", "’s",
          "' ", "’ x", "the\u00a0", "own\u2011", "the\r\n", "the\u202f\u2010- ", "the",  "own", "of", "and", "to", "was", "told", "Kim", "123", "loving", "really", "Ünal", "himself", "ma'amx", "x" * 40, " " * 63]


def fuzzed(seed, axis, count=300):
    """Texts of attribute words, signs, rule words and any characters."""
    rng = random.Random(seed)
    words = sorted(axis.words)
    rules = sorted(pronoun_table().words)
    for _ in range(count):
        kinds = rng.choices(("piece", "word", "Word", "WORD", "rule", "any"), weights=(6, 4, 1, 1, 3, 1), k=rng.randrange(40))
        yield "".join(piece(rng, kind, words, rules) for kind in kinds)


def piece(rng, kind, words, rules):
    if kind == "piece":
        return rng.choice(PIECES)
    if kind == "any":
        code = rng.choice((rng.randrange(0x80), rng.randrange(0x3000), rng.randrange(0x110000)))
        return chr(code) if not 0xD800 <= code < 0xE000 else ""
    if kind == "rule":
        return rng.choice((" ", "")) + rng.choice(rules) + rng.choice((" ", ""))
    word = rng.choice(words)
    return rng.choice((" ", "")) + {"word": word, "Word": word.capitalize(), "WORD": word.upper()}[kind] + rng.choice((" ", "", " "))


def broken(rng, data: bytes) -> bytes:
    """The bytes with a few of them changed, lost or put in: mostly no UTF-8 any more."""
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(changed) + 1)
        cut = rng.choice((0, 0, 1, 2))
        changed[at : at + cut] = rng.choice((b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x80", b"\x80", b"\xf0\x9f\x98", b"\r", b"\n", b"\r\n", b"\0"))
    return bytes(changed)


@pytest.mark.parametrize("axis", AXES, ids=lambda axis: axis.name)
def test_any_text(axis):
    same(axis, list(fuzzed(1, axis)))


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("occurrences", OCCURRENCES)
@pytest.mark.parametrize("axis, only_from, most", [(GENDER, None, 2), (GENDER, 1, None), (RACE, 0, 1), (UNEVEN, None, 3), (UNEVEN, 1, None)],
                         ids=lambda value: getattr(value, "name", value))
def test_any_intervention(axis, keep, occurrences, only_from, most):
    same(axis, list(fuzzed(2, axis, 120)), Intervention(only_from, occurrences, most, keep))


def test_any_bytes():
    rng = random.Random(3)
    for i in range(60):
        lines = rng.choice((b"\n", b"\r\n", b"\n\r")).join(text.replace("\n", " ").encode() for text in fuzzed(100 + i, GENDER, 12))
        same_lines(GENDER, broken(rng, lines) + rng.choice((b"", b"\n", b"\r\n")), threads=rng.randrange(1, 5))


@pytest.mark.parametrize("data", [b"", b"\n", b"\r", b"\r\n", b"he", b"he\n\nshe", b" \n\t\nhe\x0b\n\xe3\x80\x80\n", b"\xff", b"he\xff\n\xff\nshe \xe9\n", b"h\0e he\0",
                                  b"he\xc1\xbf\nhe\xe0\x9f\xbf\nhe\xf0\x8f\xbf\xbf\nhe\xed\xbf\xbf\nhe\xf4\x90\x80\x80\nhe \xe0\xa0\x80 \xf0\x90\x80\x80 \xf4\x8f\xbf\xbf"])
@pytest.mark.parametrize("threads", [1, 3])
def test_lines_are_those_of_the_reader(data, threads):
    same_lines(GENDER, data, threads=threads)


def test_lines_are_those_that_corpus_reads(tmp_path):
    from peftdebias.corpus import read_texts

    file = tmp_path / "a.txt"
    file.write_bytes(b"he\r\n\n  \nshe\rhe\n\xe3\x80\x80\nA\xc2\x85his \"book\"\x00\n\xe2\x80\xa8\nends")
    rows = [json.loads(line) for line in b"".join(engines(load_axis("group"))[0].write_lines(file.read_bytes()).chunks).splitlines()]
    assert [row["text"] for row in rows] == [text.text for text in read_texts(file)] == ["he", "she\rhe", "A\x85his \"book\"\x00", "ends"]


SHARE = 1 << 16  # bytes that a thread has at least (cda.cpp, divide): what is smaller goes to one


def same_as_alone(threads, texts=None, data=None, **bounds):
    """Asserts that so many threads make of texts, or lines, what one makes, which the tests around compare with the twin."""
    (fast, _), (alone, _) = engines(GENDER, threads=threads), engines(GENDER)
    same_written(*(engine.write(texts, **bounds) if data is None else engine.write_lines(data, **bounds) for engine in (fast, alone)))
    if data is None:
        assert fast.families(texts) == alone.families(texts)


def many_lines(seed, size):
    data = b"\n".join(text.replace("\n", " ").encode() for text in fuzzed(seed, GENDER, 200))
    return data * (size // len(data) + 1)


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_change_nothing(threads):
    """Nor do more of them than there are texts, or one text as long as the shares of several."""
    rng, size = random.Random(threads), threads * SHARE
    data = many_lines(4, size)
    long = "she is long " * (size // 12 + 1)
    for texts in (data.decode().split("\n"), [long], ["", long, "his"], ["he"] * 9 + [long] + ["she"] * 9):
        same_as_alone(threads, texts)
        same_as_alone(threads, data="\n".join(texts).encode())
    for _ in range(3):
        data = broken(rng, data)
        same_as_alone(threads, data=data)
    same(GENDER, ["he"], threads=threads)


@pytest.mark.parametrize("between", [b"\n", b"\r\n", b"\n\n\n", b"\xff\n", "é\n".encode(), b"\n \r\n"])
def test_wherever_the_end_of_a_line_lies_between_two_shares(between):
    for off in range(-4, 3):
        data = (b"a long line about her and her friends\n" * SHARE)[: SHARE + off] + between
        data += (b"another that has his name\n" * SHARE)[: 2 * SHARE - len(data)]
        same_as_alone(2, data=data)
        same_as_alone(2, data.decode("latin-1").split("\n"))


@pytest.mark.parametrize("bounds", [{"first": 100}, {"first": 5, "start": 8, "stop": 20}, {"stop": 3}, {"start": 1000}, {"first": 5, "start": 300, "stop": 900}])
def test_part_of_a_block(bounds):
    data = "\n".join(text.replace("\n", " ") for text in fuzzed(5, GENDER, 40)).encode()
    same_lines(GENDER, data, threads=3, **bounds)
    same_as_alone(3, data=many_lines(5, 4 * SHARE), **bounds)


def test_a_corpus_has_any_number_of_texts():
    for engine in engines(GENDER):
        (chunk,) = engine.write(["he"], "json", first=2**40).chunks
        assert json.loads(bytes(chunk))["source"] == 2**40


@pytest.mark.parametrize(
    "text",
    ["x" * 1_000_000, "he" * 500_000, "é" * 500_000, "her " * 4_000, "her" + " " * 500_000 + "her", "ma'" * 100_000, "\n" * 500_000, "x" * 1_000_000 + " he",
     "\"" * 100_000 + " he", "é " * 50_000 + "his"],
    ids=["one word", "he he he", "not ASCII", "pronouns", "a gap", "apostrophes", "empty lines", "a long word before", "quotes", "after many characters"],
)
def test_long_texts(text):
    same(GENDER, [text, "he", text])


@pytest.mark.parametrize("cut", [40, 49, *range(58, 68), 76, 87])
@pytest.mark.parametrize("filler", ["x", "é", " ", "\u3000", "\n", ". ", "€"])
def test_what_the_window_of_a_pronoun_cuts(filler, cut):
    """64 characters on either side, not bytes; a word at the border counts as the piece inside."""
    fill = (filler * 90)[:cut]
    same(GENDER, [f"met{fill} her{fill} going", f"a friend of{fill}his{fill}came", f"told {fill}her\n{fill}\nKim", f"they \n{fill}\n her", f"word{fill}loving her loving{fill}x",
                  f"a friend of{fill}his came.", f"met her{fill}", f"met her{fill}.", f"met her{fill}atoms", f"told her{fill}Kim", f"told\n{filler}\nher Kim", f"met her{filler}\n{fill}\nof"])


@pytest.mark.parametrize("joint", sorted(cda.JOINTS))
def test_every_joint_leads_to_the_word_before(joint):
    texts = [f"the{joint * n}red" for n in range(5)]
    same(UNEVEN, texts)
    assert [len(family.variants) for family in engines(UNEVEN)[0].families(texts)] == [0, 0, 0, 0, 3]


def test_a_word_and_one_before_may_be_as_long_as_any():
    """In characters, not bytes."""
    axis = Axis("wealth", (("rich", "poor"), ("\u5973" * LONGEST_WORD, "b")), True, unless_after=(("rich", ("\U00010428" * LONGEST_WORD,)),))
    same(axis, ["\U00010428" * n + " rich" for n in (LONGEST_WORD - 1, LONGEST_WORD, LONGEST_WORD + 1)] + ["\u5973" * LONGEST_WORD])


def test_the_rules_see_the_same_words_and_lines():
    """Every example of the table, each word in turn one of every spelling, each space in turn a line break."""
    for rule in pronoun_table().rules:
        words = rule.example.replace("[", "").replace("]", "").split(" ")
        texts = [" ".join([*words[:i], other, *words[i + 1:]]) for i in range(len(words)) for other in ("loving", "being", "fully", "moved", "agreed", "usable", "12th")]
        texts += [" ".join(words[:i]) + gap + " ".join(words[i:]) for i in range(1, len(words)) for gap in ("\n", " \n ", "\n\n")]
        texts += [f"\u00e9 {text}" for text in texts if "\n" in text]  # beyond ASCII other code reads them
        fast, plain = engines(GENDER)
        assert fast.expand(texts) == plain.expand(texts)


def test_the_rules_see_words_of_any_spelling():
    texts = [text for word in pronoun_table().words if word.isalpha() for text in (f"earned her {word.upper()} times", f"let her {word.upper()} to")]
    spelled = [start + ending for start in ("", "9", "z", "zz", "zzz", "é", "zé", "zzé") for ending in ("ing", "ly", "ed", "eed", "able", "ible", "ful", "less", "ous")]
    texts += [f"{verb} her {word} {after}" for word in (*spelled, *map(str.upper, spelled[-9:])) for verb, after in (("heard", "songs"), ("used", "."), ("had", "."), ("made", "."), ("hit", "times"))]
    texts += [f"told her {name} was" for name in ("Eva", "\u00c9va", "E\u00e9a", "EVA", "eva", "Ada", "Ezra", "Zoe", "Zz", "E", "E1")]
    fast, plain = engines(GENDER)
    assert fast.expand(texts) == plain.expand(texts)


def test_words_that_share_their_first_eight_bytes_are_told_apart():
    """By length and by what follows, whichever of them the table holds."""
    words = ["constant" + "a" * n for n in range(0, 90, 2)] + ["constant" + "b" * n for n in range(1, 90, 3)] + [f"constant{i}c" for i in range(200)]
    axis = Axis("alike", tuple((word, f"x{i}") for i, word in enumerate(words)), True)
    same(axis, [*("constant" + letter * n for n in range(95) for letter in "ab"), *(f"constant{i}c constant{i} constant{i}d" for i in range(300)), *(word[:-1] for word in words)])


def test_a_word_inside_another_is_not_found():
    same(Axis("boats", (("fo'c", "bow"), ("fo'c's'le", "stern"), ("fo'c's", "bows"), ("le", "la"), ("c", "d")), True), ["the fo'c's'le", "FO\u2019c's'le le", "fo'c's'les, c's", "fo'c's\u2019le's c"])


def test_quotes_and_possessives_at_the_ends_of_a_text():
    same(GENDER, [f"{before}princess{mark}{after}" for before in ("", "'", "\u2018", "a \u2018") for mark in ("'", "\u2019") for after in ("", "s", "sx", " x", " ", "  x")])


def test_what_follows_an_apostrophe_decides():
    """The end of a word behind its s, and a space of one byte, two or three with a word behind it."""
    same(GENDER, [f"{word}{mark}{after}" for word in ("gentlemen", "Ladies", "ladies") for mark in "'\u2019"
                  for after in ("s", "sx", "s\u00e9", "S", "S1", "s x", " x", "\u00a0x", "\u3000x", "\u3000\u00e9", "\u3000.", "\u00a0")])


def test_the_s_of_a_possessive_has_the_case_of_what_is_put():
    same(Axis("scripts", (("ladies", "\u5973"), ("lords", "1")), True), ["LADIES' room", "Ladies' room", "LORDS' room", "\u5973\u2019s"])
    same(GENDER, ["GENTLEMEN'S room", "THE GENTLEMEN\u2019S"])


@pytest.mark.parametrize("occurrences", OCCURRENCES)
def test_choices_that_are_written_alike_make_one_variant(occurrences):
    same(Axis("alike", (("x", "\u0131", "i"), ("y", "z")), True), ["X", "X X y", "I"], Intervention(occurrences=occurrences))


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("most", [None, 3])
def test_words_that_repeat_what_stands_beside_them(keep, most):
    """One word replaced here and another there may make the same text: ha'ha'ha'ha without the first ha' or without the second."""
    axis = Axis("laughter", (("ha'ha", "ha"), ("oh", "oh'oh'oh"), ("x", "\u0131", "i"), ("p'q", "p"), ("q'r", "r"), ("ladies", "gentlemen"), ("s", "z")), True)
    rng = random.Random(7)
    pieces = ["ha", "ha'ha", "oh", "oh'oh", "X", "i", "p", "p'q", "q", "q'r", "r", "ladies", "gentlemen", "s", "'", "'", "'", "\u2019", " ", "\u00e9", "\n", "."]
    texts = ["ha'ha'ha'ha", "oh'oh", "p'q'q'r", *("".join(rng.choices(pieces, k=rng.randrange(12))) for _ in range(1500))]
    texts += ["'".join(rng.choices(pieces[:14], k=rng.randrange(2, 9))) for _ in range(500)]
    same(axis, texts, Intervention(occurrences="one", max_variants=most, keep=keep))
    assert [len(family.variants) for family in cda.families(texts[:3], axis, Intervention(occurrences="one"))] == [1, 1, 1]
    assert [len(cda.attribute_words(text, axis)) for text in texts[:3]] == [2, 2, 2]


@pytest.mark.skipif(sys.platform != "linux", reason="no limit on memory that holds")
def test_variants_that_are_not_kept_take_no_memory():
    """In a process of 1 GiB; all variants together have 2.6 GB."""
    code = """
import resource
from peftdebias.axes import load_axis
from peftdebias.cda import Intervention
from peftdebias.cda_engine import engine
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
text = "He met her and said it. " * 7500
for keep, kind in (("originals", "json"), ("originals", "lines"), ("pairs", "nothing")):
    counts = engine(load_axis("gender"), Intervention(occurrences="one", keep=keep)).write([text], kind).counts
    print(counts.variants, counts.replaced)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0 and ran.stdout == "15000 15000\n" * 3, ran.stdout + ran.stderr


def test_no_texts():
    same(GENDER, [])
    same(GENDER, ["", "\n", "no such word"])


# ---- tables


def test_word_characters_and_spaces_are_pythons():
    flags = cda_engine._characters()
    for code in range(0x110000):
        if not 0xD800 <= code < 0xE000:
            assert flags[code] == is_word_character(chr(code)) + 2 * chr(code).isspace(), hex(code)


def test_one_character_after_another():
    """Every character between two attribute words and inside one: does it part them?"""
    rng = random.Random(6)
    codes = [*range(0x3000), *(rng.randrange(0x3000, 0x110000) for _ in range(4000))]
    same(GENDER, [f"he{chr(code)}she {chr(code)}his{chr(code)} her{chr(code)} {chr(code)}x" for code in codes if not 0xD800 <= code < 0xE000])


def test_counts_name_the_words():
    counts = engines(GENDER)[0].write(["He and HE met her.", "none", "ma'am and Ma’am"], "nothing").counts
    assert counts.found == {"he": 2, "her": 1, "ma'am": 2} and (counts.texts, counts.touched, counts.variants, counts.replaced) == (3, 2, 2, 5)


# ---- real corpora

REAL = 3_000_000  # bytes: the plain twin takes seconds for more; the slow test reads whole files


@pytest.mark.parametrize("file, axis", [("corpus/bug_upstream.txt", "gender"), ("corpus/boolq_passages.txt", "gender"), ("corpus/wikitext2_valid.txt", "gender"),
                                        ("corpus/boolq_passages.txt", "group"), ("corpus/boolq_passages.txt", "age"), ("ghc/ghc_train.tsv", "group"),
                                        ("ghc/ghc_train.tsv", "gender"), ("ghc/ghc_test.tsv", "religion")])
def test_real_text(shared, file, axis):
    data = (shared / "data" / file).read_bytes()[:REAL]
    data = data[:data.rindex(b"\n") + 1]
    fast, plain = engines(load_axis(axis), threads=2)
    same_written(fast.write_lines(data), plain.write_lines(data))


@pytest.mark.slow
def test_a_whole_corpus(shared):
    data = (shared / "data" / "corpus" / "bug_upstream.txt").read_bytes()
    fast, plain = engines(GENDER, threads=2)
    same_written(fast.write_lines(data), plain.write_lines(data))


@pytest.mark.slow
def test_a_hundred_thousand_texts():
    for seed in range(100):
        axis = AXES[seed % len(AXES)]
        same(axis, list(fuzzed(1000 + seed, axis, 500)), threads=1 + seed % 3)
        rng = random.Random(seed)
        for i in range(5):
            data = b"\n".join(text.replace("\n", " ").encode() for text in fuzzed(5000 + 10 * seed + i, axis, 100))
            same_lines(axis, broken(rng, data), threads=1 + seed % 3)


# ---- which engine runs


def test_the_compiled_one_by_itself(monkeypatch):
    monkeypatch.delenv("PEFTDEBIAS_KERNELS", raising=False)
    assert cda_engine.engine(GENDER).name == "native"
    monkeypatch.setenv("PEFTDEBIAS_KERNELS", "torch")
    assert cda_engine.engine(GENDER).name == "python"


def test_without_a_library(monkeypatch):
    monkeypatch.setattr(native, "load", lambda: (None, "not built here"))
    native.say_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="not built here"):
        assert cda_engine.engine(GENDER).name == "python"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert cda_engine.expand(["he"], GENDER).texts == ["he", "she"]
    monkeypatch.setenv("PEFTDEBIAS_KERNELS", "native")
    with pytest.raises(ConfigError, match="PEFTDEBIAS_KERNELS=native: not built here"):
        cda_engine.engine(GENDER)
    monkeypatch.setenv("PEFTDEBIAS_KERNELS", "nope")
    with pytest.raises(ConfigError, match="^PEFTDEBIAS_KERNELS: expected one of auto, torch, native, triton, got 'nope'$"):
        cda_engine.engine(GENDER)
    assert native.KINDS == kernels.KINDS
    native.say_once.cache_clear()


def test_a_stale_library_is_refused(monkeypatch):
    native.load.cache_clear()
    monkeypatch.setattr(native, "ABI", native.ABI + 1)
    found, trouble = native.load()
    assert found is None and re.search(rf"expected version {native.ABI}, got {native.ABI - 1}", trouble)
    native.load.cache_clear()


@pytest.mark.parametrize("origin,words", [
    (None, "peftdebias._native is not built, plain Python does its work, far slower; to have it, install again where a C[+][+]17 compiler is: pip install "),
    ("text", "{file}: cannot be loaded, plain Python does its work, far slower [(].*[)]; to mend it, install again "),
    ("another", "{file}: cannot be loaded, plain Python does its work, far slower [(].*peftdebias_cda_abi.*[)]; to mend it, install again "),
])
def test_a_library_that_is_not_there_or_not_ours_is_told(origin, words, tmp_path, monkeypatch):
    """As a folder of source without the compiled part, a file cut off, and a library of something else."""
    file = Path(numpy.linalg._umath_linalg.__file__) if origin == "another" else tmp_path / "_native.so"
    file.exists() or file.write_text("no library")
    for spec in (SimpleNamespace(origin=str(file)),) if origin else (None, SimpleNamespace(origin=None)):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, spec=spec: spec)
        native.load.cache_clear()
        found, trouble = native.load()
        assert found is None and re.match(words.replace("{file}", re.escape(str(file))), trouble) and "\n" not in trouble
    native.load.cache_clear()


@pytest.mark.parametrize("most", [2**63, 2**64 + 1, numpy.int64(2)])
def test_any_number_of_variants_may_be_allowed(most):
    compiled, twin = engines(RACE, Intervention(max_variants=most))
    assert compiled.families(["a black cat"]) == twin.families(["a black cat"])


TEXTS = [f"he met her and {i} women" for i in range(3000)]


def test_copies_and_pickles_are_engines_of_their_own():
    engine = cda_engine.engine(GENDER, Intervention(max_variants=1), threads=2)
    expected = engine.expand(TEXTS)
    for other in (copy.copy(engine), copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        assert (other.axis, other.intervention, other.threads) == (GENDER, engine.intervention, 2) and other is not engine
        assert other.expand(TEXTS) == expected
        del other
    assert engine.expand(TEXTS) == expected


def test_callers_on_other_threads_wait_for_each_other():
    engine = cda_engine.engine(GENDER)
    expected = engine.expand(TEXTS), engine.families(TEXTS)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: engine.families(TEXTS) if i % 2 else engine.expand(TEXTS), range(12)))
    assert all(one == expected[i % 2] for i, one in enumerate(found))


def test_what_gives_the_texts_may_ask_the_same_engine():
    engine, found = cda_engine.engine(GENDER), []
    asked = threading.Thread(target=lambda: found.append(engine.expand(text for text in TEXTS if engine.families([text]) is not None)), daemon=True)
    asked.start()
    asked.join(20)
    assert not asked.is_alive() and found == [engine.expand(TEXTS)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_process_waits_for_no_thread_of_its_parent():
    """It is forked while another thread is inside the engine, which is locked then and its memory half written."""
    engine, data, done = cda_engine.engine(GENDER), b"he met her and said it\n" * 1_000_000, threading.Event()
    expected = cda_engine.engine(GENDER).expand(TEXTS)

    def work():
        while not done.is_set():
            engine.write_lines(data, "nothing")

    other = threading.Thread(target=work)
    other.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads
            for _ in range(3):
                while not engine._alone.locked():
                    assert other.is_alive()
                    time.sleep(0.001)
                job = engine._job.value
                if (child := os.fork()) == 0:
                    signal.alarm(20)
                    code = 1
                    try:
                        code = int(engine._job.value == job or engine.expand(TEXTS) != expected)
                    finally:
                        os._exit(code)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        done.set()
        other.join()
    assert engine.expand(TEXTS) == expected


@pytest.mark.parametrize("arguments,words", [
    ((None,), "engine: expected an Axis, as load_axis makes one, and an Intervention, got NoneType and Intervention"),
    ((GENDER, None), "engine: expected an Axis, as load_axis makes one, and an Intervention, got Axis and NoneType"),
    ((GENDER, PAPER, 1.5), "engine: threads: expected a whole number of at least 1, got 1.5"), ((GENDER, PAPER, 0), "engine: threads: expected a whole number of at least 1, got 0"),
    ((GENDER, PAPER, True), "engine: threads: expected a whole number of at least 1, got True"),
])  # fmt: skip
def test_what_makes_no_engine_is_named(arguments, words):
    with pytest.raises(ConfigError, match=f"^{words}$"):
        cda_engine.engine(*arguments)


ONE = "families: expected a list of texts, got one: ['he is']"


@pytest.mark.parametrize("texts,words", [
    ("he is", ONE), (b"he is", ONE.replace("'he", "b'he")), (None, "families: expected a list of texts, got NoneType"), (7, "families: expected a list of texts, got int"),
    (["he", 1], "counterfactuals: expected a text, got int"), ([None], "counterfactuals: expected a text, got NoneType"), ([b"he"], "counterfactuals: expected a text, got bytes"),
    (["he", "she \ud800 is"], "counterfactuals: expected a text that utf-8 can hold, got half a surrogate pair, '\\ud800'"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["families", "expand", "write"])
def test_what_are_no_texts_is_refused_by_both_alike(texts, words, name):
    for engine in engines(GENDER):
        with pytest.raises(ConfigError, match=f"^{re.escape(words)}$"):
            getattr(engine, name)(texts)
        with pytest.raises(ConfigError, match=f"^{re.escape(words)}$"):  # nor from what gives them one by one
            getattr(engine, name)(iter(texts) if isinstance(texts, list) else texts)
        assert engine.expand(["he"]).texts == ["he", "she"]


@pytest.mark.parametrize("asked,words", [
    (dict(kind="nope"), "kind: expected one of json, lines, members, nothing, got 'nope'"), (dict(kind="swaps"), "kind: expected one of json, lines, members, nothing, got 'swaps'"),
    (dict(kind=[]), "kind: expected one of json, lines, members, nothing, got []"), (dict(first=-5), "first: expected a whole number of at least 0, got -5"),
    (dict(first=1.0), "first: expected a whole number of at least 0, got 1.0"), (dict(start=-1), "start: expected a whole number of at least 0, got -1"),
    (dict(stop="3"), "stop: expected a whole number of at least 0, got '3'"),
])  # fmt: skip
def test_what_can_not_be_written_is_refused_by_both_alike(asked, words):
    for engine in engines(GENDER):
        for name, texts in (("write", ["he"]), ("write_lines", b"he")):
            with pytest.raises(ConfigError, match=f"^{re.escape(f'{name}: {words}')}$"):
                getattr(engine, name)(texts, **asked)
        for data in ("he", bytearray(b"he"), 5):
            with pytest.raises(ConfigError, match=f"^write_lines: expected bytes, got {type(data).__name__}$"):
                engine.write_lines(data)


def test_texts_may_come_one_by_one_and_numbers_from_anywhere():
    for engine in engines(GENDER):
        assert engine.expand(iter(["he", "x", "she"])).sources == [0, 2]
        written = engine.write(iter(["he", "x", "she"]), first=numpy.int64(5), start=numpy.int64(0), stop=2**64 + 3)
        assert (written.counts.texts, written.lines) == (3, 3) and [json.loads(row)["source"] for row in b"".join(written.chunks).splitlines()] == [5, 7]
