"""Ids put together from one tokenisation of a text equal those of its members tokenised: on real corpora, every kind of axis and intervention, texts made to
break it. Who may not be spliced is not: neighbours that do not part words, other tokenizers."""

import itertools
import random
import unicodedata

import numpy
import pytest
import tokenizers
from tokenizers import AddedToken, normalizers, pre_tokenizers

from peftdebias import corpus, splice
from peftdebias.axes import Axis, load_axis
from peftdebias.cda import KEEP, OCCURRENCES, PAPER, Intervention, families
from peftdebias.cda_engine import PythonEngine, engine
from peftdebias.errors import ConfigError
from peftdebias.tokens import STYLES, Tokenizer, load_tokenizer, wordpiece

from .test_cda_engine import AXES, PIECES, fuzzed

GENDER = load_axis("gender")
SIGNS = ["[MASK]", "[CLS]", "[UNK]", "[", "]", "<", "##", "中", "é", "e\u0301", "\u0301", "\u200b", "\xad", "\0", "\x0b", "\x0c", "\x85", "\xa0", "\u2028", "\u3000", "한", "ﬁ", "İ", "ς"]


def texts(seed: int, axis, count: int = 200) -> list[str]:
    """Half of them of attribute words among signs that may hurt, mostly with spaces between; half as the engines' test has them."""
    chosen, words = random.Random(seed), [one for word in sorted(axis.words) for one in (word, word.capitalize(), word.upper())]
    made = ["".join(chosen.choice(chosen.choice((words, words, SIGNS, PIECES))) + chosen.choice(("", " ", " ", " ", ", ", "'s ")) for _ in range(chosen.randrange(9)))
            for _ in range(count // 2)]
    return made + list(fuzzed(seed, axis, count - count // 2))


def characters(*parts: str, **settings) -> Tokenizer:
    """A tokenizer that lets nothing go unseen: each character of the parts is a token, at the beginning of a word and inside it."""
    seen = sorted({c for part in parts for whole in (part, unicodedata.normalize("NFD", part)) for cased in (whole, whole.lower()) for c in cased})
    return wordpiece([*STYLES["bert"].values(), *seen, *("##" + c for c in seen)], settings)


def spliced(made: list[str], axis, tokenizer: Tokenizer, intervention: Intervention = PAPER, swap=None, put=None, longest: int = 40) -> tuple[int, int]:
    """Asserts that the ids are the plain ones. Returns how many families were put together, and how many more there were."""
    swap, put = swap or engine(axis, intervention), put or splice.hole(tokenizer)
    prepared = splice.prepare(swap, made, put)
    found = splice.flat(tokenizer.encodings(prepared.strings), prepared, tokenizer, put, longest)
    every = [(family.source, family.kept(intervention.keep)) for family in families(made, axis, intervention)]
    expected = tokenizer.encode_flat([member for _, kept in every for member in kept], longest)
    assert (prepared.sources, prepared.sizes) == ([source for source, _ in every], [len(kept) for _, kept in every])
    for name, a, b in zip(("ids", "lengths", "cut"), found, expected, strict=True):
        assert a.dtype == b.dtype == numpy.int32 and numpy.array_equal(a, b), name
    together = sum(members > 1 for members in prepared.members)
    return together, len(every) - together


# ---------------------------------------------------------------- the same ids

@pytest.mark.parametrize("axis", AXES, ids=lambda axis: f"{axis.name}-{len(axis.groups)}")
@pytest.mark.parametrize("occurrences", OCCURRENCES)
def test_every_axis_and_intervention(axis, occurrences):
    """Pairs, rows of several words, names; all words at once and one at a time; both engines."""
    made = texts(1, axis)
    tokenizer = characters(*made, *axis.words, *(word.upper() for word in axis.words))
    counts = numpy.zeros(2, int)
    for keep, most in itertools.product(KEEP, (None, 2)):
        intervention = Intervention(None, occurrences, most, keep)
        counts += spliced(made, axis, tokenizer, intervention)
    assert min(counts) > 50, counts
    spliced(made, axis, tokenizer, intervention, PythonEngine(axis, intervention))


@pytest.mark.parametrize("settings", [{"do_lower_case": False}, {"strip_accents": False}, {"do_lower_case": False, "strip_accents": True}, {"tokenize_chinese_chars": False}], ids=str)
def test_every_way_of_bert_to_read_a_text(settings):
    for seed in range(3):
        made = texts(seed + 10, GENDER, 400)
        assert min(spliced(made, GENDER, characters(*made, *GENDER.words, **settings))) > 30


ALONE = ["he", "He is.", "is he", "he he he", "his, hers", "(she)", "\tshe\n", "he's", "the gentlemen's club", "she/he", '"HE"', "he, \u0301she", "she-\u0301a", "she \0x", "mothers' day, mother's"]
WHOLE = ["he\x0bgoes", "he\x0cgoes", "he\0goes", "he\u200bgoes", "the\xadhe", "he\xa0is", "he\u3000is", "[he]", "he [CLS]", "he \u2019he\u2019", "he\u2028is"]


def test_who_is_spliced():
    """A word among text ends, spaces and ASCII punctuation; not where a neighbour may vanish, is beyond ASCII, or belongs to an added token."""
    tokenizer = characters(*ALONE, *WHOLE, *GENDER.words)
    assert spliced(ALONE, GENDER, tokenizer) == (len(ALONE), 0) and spliced(WHOLE, GENDER, tokenizer) == (0, len(WHOLE))


@pytest.mark.parametrize("neighbour", ["\x0b", "\x0c", "\0", "\u200b", "\xad"])
def test_the_rule_is_needed(neighbour):
    """With a neighbour allowed that BERT's normalizer removes, ids differ: what the other tests compare would show it."""
    made = [f"a {neighbour}he{neighbour}goes"]
    tokenizer = characters(*made, *GENDER.words)
    put = splice.hole(tokenizer)
    assert neighbour not in put.beside and spliced(made, GENDER, tokenizer) == (0, 1)
    with pytest.raises(AssertionError):
        spliced(made, GENDER, tokenizer, put=put._replace(beside=put.beside | {neighbour}))


def test_added_tokens_that_a_swap_touches():
    """Found in a text before words are: [he] and `e is` cross a swap, so their characters part nothing; `he` is one itself, alone and inside a word."""
    made = ["[he] is", "(he is)", "(he)", ".he", "he is", "he, the [he]", "she, he", "the she"]
    for added, together in (("[he]", 6), ("e is", 2), ("he", 6), (".he", 5)):
        tokenizer = characters(*made, *GENDER.words)
        tokenizer.backend.add_tokens([AddedToken(added, normalized=False)])
        tokenizer = Tokenizer(tokenizer.backend)
        assert spliced(made, GENDER, tokenizer) == (together, len(made) - together), added


def test_places_that_overlap_are_tokenised_whole():
    """Where one variant's stretch ends behind another's (gentlemen's: ladies', but chaps's), no holes are both."""
    axis = Axis("three", (("gentlemen", "ladies", "chap"),), False, source="three")
    made = ["the gentlemen's club", "the gentlemen and", "a chap, ladies, a chap and gentlemen, chap by chap"]
    assert spliced(made, axis, characters(*made, *axis.words)) == (2, 1)


def test_nothing_and_a_length_without_room():
    tokenizer = characters("he she")
    put = splice.hole(tokenizer)
    assert spliced([], GENDER, tokenizer) == (0, 0) and spliced(["a", ""], GENDER, tokenizer) == (0, 0) and spliced(["he"], GENDER, tokenizer, longest=2) == (1, 0)
    prepared = splice.prepare(engine(GENDER), ["he"], put)
    with pytest.raises(ConfigError, match="max_length 1: expected at least 2"):
        splice.flat(tokenizer.encodings(prepared.strings), prepared, tokenizer, put, 1)


def test_what_the_tokenizer_answers_is_counted():
    tokenizer = characters("he she")
    put = splice.hole(tokenizer)
    prepared = splice.prepare(engine(GENDER), ["he", "she"], put)
    with pytest.raises(RuntimeError, match=r"splice: expected 2 tokens \[CLS\] and each in its text, got 2"):
        splice.flat(tokenizer.encodings(["[CLS][CLS]", "x", *prepared.strings[2:]]), prepared, tokenizer, put, 9)


# ---------------------------------------------------------------- other tokenizers

def changed(**parts) -> Tokenizer:
    tokenizer = characters("he she")
    for name, part in parts.items():
        setattr(tokenizer.backend, name, part)
    return tokenizer


def with_token(**flags) -> Tokenizer:
    tokenizer = characters("he she")
    tokenizer.backend.add_tokens([AddedToken("new", **{"normalized": False} | flags)])
    return tokenizer


def with_word(word: str) -> Tokenizer:
    tokenizer = wordpiece(["[PAD]", "[UNK]", word, "[SEP]", "[MASK]", "he"], {"cls_token": word})
    tokenizer.backend.add_special_tokens([word])
    return tokenizer


OTHERS = {
    "another normalizer": lambda: changed(normalizer=normalizers.Lowercase()),
    "no normalizer": lambda: changed(normalizer=None),
    "another pre-tokenizer": lambda: changed(pre_tokenizer=pre_tokenizers.WhitespaceSplit()),
    "another model": lambda: changed(model=tokenizers.models.WordLevel({token: i for i, token in enumerate(STYLES["bert"].values())}, "[UNK]")),
    "special tokens read as text": lambda: changed(encode_special_tokens=True),
    "a token found after normalising": lambda: with_token(normalized=True),
    "a token that takes the space before it": lambda: with_token(lstrip=True),
    "a token that takes the space behind it": lambda: with_token(rstrip=True),
    "a token that is a whole word": lambda: with_token(single_word=True),
    "a [CLS] that is a word": lambda: with_word("cls"),  # CLS in a text has its id too
    "a [CLS] that is not found in texts": lambda: Tokenizer(wordpiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[cls]", "he"]).backend, "bert", {"cls_token": "[cls]"}),
}


@pytest.mark.parametrize("which", OTHERS)
def test_other_tokenizers_take_the_plain_way(which):
    tokenizer = OTHERS[which]()
    assert splice.hole(with_token()) is not None and splice.hole(tokenizer) is None
    assert spliced(["he is", "a"], GENDER, tokenizer)[0] == 0


def test_robertas_tokenizer_takes_the_plain_way(shared, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((shared / "data" / "tokenizers" / "roberta-base.json").read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    assert splice.hole(tokenizer) is None and spliced(texts(3, GENDER), GENDER, tokenizer)[0] == 0


# ---------------------------------------------------------------- real text

def blocks(shared, name: str, column: str | None = None):
    return (chunk.texts for chunk in corpus.chunks((str(shared / "data" / name),), column))


def test_the_real_tokenizer(shared):
    tokenizer = load_tokenizer(shared / "models" / "bert-tiny-mlm")
    assert min(spliced(texts(4, GENDER, 600), GENDER, tokenizer)) > 50
    together, whole = spliced(next(blocks(shared, "corpus/bug_upstream.txt")), GENDER, tokenizer)
    assert together > 1000 and whole < 5


@pytest.mark.slow
@pytest.mark.parametrize("axis", AXES, ids=lambda axis: f"{axis.name}-{len(axis.groups)}")
def test_all_real_text(axis, shared):
    """All of BUG and of the Gab Hate Corpus."""
    tokenizer = load_tokenizer(shared / "models" / "bert-tiny-mlm")
    for intervention in (PAPER, Intervention(occurrences="one", max_variants=3)):
        counts = numpy.zeros(2, int)
        for made in itertools.chain(blocks(shared, "corpus/bug_upstream.txt"), blocks(shared, "ghc/ghc_train.tsv", "text"), blocks(shared, "ghc/ghc_test.tsv", "text")):
            counts += spliced(made, axis, tokenizer, intervention)
        print(axis.name, intervention.occurrences, counts)
        assert counts[0] > 100


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_many_texts_made_to_break_it(seed):
    for axis in AXES:
        made = texts(100 + seed, axis, 2000)
        tokenizer = characters(*made, *axis.words, *(word.upper() for word in axis.words), do_lower_case=seed % 2 == 0)
        for occurrences in OCCURRENCES:
            assert min(spliced(made, axis, tokenizer, Intervention(occurrences=occurrences))) > 200
