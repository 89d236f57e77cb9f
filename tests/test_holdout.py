"""Which texts are held out: by hash, both sides with words of the axis, no further read than needed."""

import dataclasses
import functools
import hashlib
import re

import pytest

from peftdebias.axes import load_axis
from peftdebias.cda import PAPER, Family, Intervention, counterfactuals, families
from peftdebias.cda_engine import engine
from peftdebias.errors import DataError
from peftdebias.holdout import HeldOut, beside, choose, first_families, place_of
from peftdebias.prepare import in_dev

GENDER = load_axis("gender")


def reading(texts, size=3):
    """(a reader of the texts in lists of `size`, how many lists were taken)."""
    taken = []

    def read():
        for i in range(0, len(texts), size):
            taken.append(i)
            yield texts[i : i + size]

    return read, taken


def many(count: int) -> list[str]:
    return [f"{('he', 'it')[i % 3 == 0]} was {i}" for i in range(count)]


def is_held_out(text: str, share: float) -> bool:
    """The specification, word by word: the words of these texts are "he" and "she"."""
    cut = re.sub(r"\b(?:s?he)\b", "\0", text.strip())
    return int.from_bytes(hashlib.blake2b(cut.encode(), digest_size=4).digest(), "big") / 2 ** 32 < share


@functools.cache
def keeping(axis):
    return dataclasses.replace(axis, keep_untouched=True)


def family_of(text: str, axis=GENDER):
    (family,) = families([text], keeping(axis))
    return family


def test_the_first_families_of_the_held_out_texts():
    texts = many(400)
    read, taken = reading(texts)
    rule, held = choose(read, GENDER, PAPER, 0.2, 7, "f")
    expected = [f.text for f in families([t for t in texts if is_held_out(t, 0.2)], GENDER)]
    assert rule == HeldOut(0.2) and held == expected[:7] and len(expected) > 30
    assert taken[-1] < 200  # no further than that
    assert choose(read, GENDER, PAPER, 0.2, 1000, "f")[1] == expected
    assert [rule(family_of(t)) for t in texts] == [is_held_out(t, 0.2) for t in texts]


@pytest.mark.parametrize("text,axis,how", [
    ("He gave his sister her book.", "gender", {}), ("He gave his sister her book.", "gender", {"occurrences": "one"}), ("  she is HERS ", "gender", {}),
    ("The black doctor met asian lawyers.", "race", {}), ("a muslim and a christian", "religion", {"max_variants": 1}), ("The black doctor met asian lawyers.", "race", {"max_variants": 2}),
])  # fmt: skip
def test_a_text_and_its_counterfactuals_are_on_one_side(text, axis, how):
    axis, how = load_axis(axis), Intervention(**how)
    (family,) = families([text], axis, how)
    members = [next(families([member], axis, how)) for member in family.members]
    assert len(members) > 1 and {place_of(member) for member in members} == {place_of(family)}
    other = next(families([text.replace("book", "pen").replace("doctor", "nurse").replace(" is ", " was ").replace(" and ", " or ")], axis, how))
    assert place_of(other) != place_of(family) == place_of(next(families([f" {text}\t"], axis, how)))


@pytest.mark.parametrize("axis,how", [("race", {"only_from": 0}), ("race", {"only_from": 1}), ("gender", {"only_from": 0}), ("gender", {"occurrences": "one", "max_variants": 1}),
                                      ("race", {"max_variants": 1})])
def test_a_text_whose_words_are_replaced_in_part_is_with_its_counterfactuals_too(axis, how):
    """Each of the two stands in the corpus, and their families replace other words."""
    axis, how = dataclasses.replace(load_axis(axis), keep_untouched=True), Intervention(**how)
    first, second = ("black", "white") if axis.name == "race" else ("he", "she")
    corpus = [f"the {word} person number {i} met {'him' if word == 'he' else 'her'}" for i in range(600) for word in (first, second)]
    sides = {}
    rules = [choose(reading(corpus)[0], axis, how, 0.1, 5000, "f")[0], beside(reading(corpus)[0], corpus[:40], axis, how, "f", "v")]
    for rule in rules:
        sides = {True: set(), False: set()}
        for family in families(corpus, axis, how):
            sides[rule(family)] |= set(family.members)
        assert sides[True] and sides[False] and not sides[True] & sides[False]


@pytest.mark.parametrize("text", ["The gentlemen's car is new.", "the ladies' house", "he's at the king's", "'his' was hers", "the waitress' and the waiter's coat", "the women's day", "his wife's sons' rooms"])
def test_a_possessive_goes_with_its_word(text):
    """Where all words of a text are cut out, whichever its variants replace: gentlemen's and ladies' leave the same."""
    found = {place_of(Family(one, (), 0), GENDER) for one in (text, *(variant.text for variant in counterfactuals(text, GENDER)))}
    assert len(found) == 1 and counterfactuals(text, GENDER)


def test_the_share_is_that_of_families_and_not_that_of_development_examples():
    """A corpus that lost a tenth of its texts to dev has its own share to validate on."""
    left = [text for i in range(5000) if not in_dev(text := f"{('he', 'she')[i % 2]} was number {i}", 0.1)]
    rule = HeldOut(0.1)
    held = sum(rule(f) for f in families(left, GENDER))
    assert abs(held / len(left) - 0.1) < 4 * (0.1 * 0.9 / len(left)) ** 0.5


def test_a_corpus_of_few_words_has_one_of_them_on_either_side():
    """An axis that keeps untouched texts: the first `wanted` held-out families may all be without words."""
    race = load_axis("race")
    assert race.keep_untouched
    texts = [f"the house {i} is old" for i in range(300)]
    texts += [f"the black doctor is number {i}" for i in range(60)]
    rule, held = choose(reading(texts)[0], race, PAPER, 0.2, 5, "f")
    aside = [t for t in texts if rule(family_of(t, race))]
    first = next(t for t in aside if "black" in t)
    assert held == [*aside[:4], first] and "black" not in "".join(aside[:5])
    texts = texts[:300] + ["the black doctor is here", "the asian lawyer is there"]
    rule, held = choose(reading(texts)[0], race, PAPER, 0.02, 3, "f")
    assert len(held) == 3 and sum("black" in t or "asian" in t for t in held) == 1 and all(rule(family_of(t, race)) for t in held)


def test_without_a_held_out_text_that_has_words_the_first_such_family_is_taken():
    texts = ["it is", "he is", "she was", "it was", "he is ", "she is"]
    rule, held = choose(reading(texts)[0], GENDER, PAPER, 1e-9, 9, "f")
    assert rule == HeldOut(1e-9, frozenset([place_of(family_of("he is"))])) and held == ["he is", "he is ", "she is"]
    assert [rule(family_of(t)) for t in texts] == [False, True, False, False, True, True]
    assert choose(reading(texts)[0], GENDER, PAPER, 1e-9, 1, "f")[1] == ["he is"]


def test_where_all_that_have_words_are_held_out_the_first_alone_is():
    texts = ["he is", "she is", "it is", "she was", "he will"]
    rule, held = choose(reading(texts)[0], GENDER, PAPER, 1 - 1e-9, 9, "f")
    assert held == ["he is", "she is"] and [rule(family_of(t)) for t in texts] == [True, True, False, False, False]
    for count in range(100):  # whichever way four texts fall
        rule, held = choose(reading([f"he was {i} in {count}" for i in range(4)])[0], GENDER, PAPER, 0.5, 9, "f")
        assert 1 <= len(held) <= 3 and sum(rule(family_of(f"he was {i} in {count}")) for i in range(4)) == len(held)


def test_a_validation_file_has_a_counterfactual_wherever_it_stands():
    texts = [f"it is {i}" for i in range(9)] + ["the black doctor", "the asian nurse"]
    assert first_families(reading(texts)[0], load_axis("race"), PAPER, 4, "v") == ["it is 0", "it is 1", "it is 2", "the black doctor"]


ONE = "f: expected two texts with words of the axis gender that differ in more than these, one to validate on; found one (or give --valid FILE)"


@pytest.mark.parametrize("texts,share,words", [
    (["it is", "it was"], 0.5, "f: expected words of the axis gender, found none in 2 texts"),
    (["it is", "he is", "he is"], 1e-9, ONE), (["he is a nurse", "she is a nurse"], 1e-9, ONE), (["he is", " he is"], 1e-9, ONE), (["he is", "she is"], 1 - 1e-9, ONE),
])  # fmt: skip
def test_corpora_without_words_on_both_sides(texts, share, words):
    with pytest.raises(DataError) as caught:
        choose(reading(texts)[0], GENDER, PAPER, share, 5, "f")
    assert str(caught.value) == words


def test_what_files_of_their_own_validate_with_is_not_trained_on():
    rule = beside(reading(["he is", "it", "she was", "she is"])[0], ["she is", "it is"], GENDER, PAPER, "c", "v")
    assert [rule(family_of(t)) for t in ("he is", "she is", "it is", "he was", "it")] == [True, True, False, False, False]  # "it is" is no family of this axis
    for texts, words in ((["he is", "she is", "it"], "c: expected texts with words of the axis gender beside those of v, found the same alone"),
                         (["it", "it was"], "c: expected words of the axis gender, found none in 2 texts")):
        with pytest.raises(DataError, match=f"^{words}$"):
            beside(reading(texts)[0], ["she is"], GENDER, PAPER, "c", "v")


def test_a_validation_file_is_read_as_far_as_needed():
    read, taken = reading(many(300))
    assert first_families(read, GENDER, PAPER, 4, "v") == ["he was 1", "he was 2", "he was 4", "he was 5"] and taken == [0, 3]
    assert first_families(reading(many(300), size=50)[0], GENDER, PAPER, 4, "v") == ["he was 1", "he was 2", "he was 4", "he was 5"]  # no more than wanted
    with pytest.raises(DataError, match="^v: expected words of the axis gender, found none in 3 texts$"):
        first_families(reading(["it"] * 3)[0], GENDER, PAPER, 4, "v")


def test_the_search_goes_on_until_there_is_a_text_to_train_on():
    texts = sorted((f"he is a w{i}" for i in range(40)), key=lambda text: place_of(engine(GENDER, PAPER).families([text])[0]))  # those with low places are held out
    rule, held = choose(lambda: iter([[text] for text in texts]), GENDER, PAPER, 0.5, 2, "c.txt")
    assert held == texts[:2] and rule.share == 0.5
