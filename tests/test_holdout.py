"""Which texts are held out: by hash, both sides with words of the axis, no further read than needed."""

import pytest

from peftdebias.axes import load_axis
from peftdebias.cda import PAPER, families
from peftdebias.errors import DataError
from peftdebias.holdout import HeldOut, choose, first_families, is_held_out

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


def test_the_first_families_of_the_held_out_texts():
    texts = many(400)
    read, taken = reading(texts)
    rule, held = choose(read, GENDER, PAPER, 0.2, 7, "f")
    expected = [f.text for f in families([t for t in texts if is_held_out(t, 0.2)], GENDER)]
    assert rule == HeldOut(0.2) and held == expected[:7] and len(expected) > 30
    assert taken[-1] < 200  # no further than that
    assert choose(read, GENDER, PAPER, 0.2, 1000, "f")[1] == expected
    assert [rule(t) for t in texts] == [is_held_out(t, 0.2) for t in texts]


def test_without_a_held_out_text_that_has_words_the_first_such_text_is_taken():
    texts = ["it is", "he is", "she is", "it was", "he is"]
    rule, held = choose(reading(texts)[0], GENDER, PAPER, 1e-9, 9, "f")
    assert rule == HeldOut(1e-9, "he is") and held == ["he is", "he is"] and [rule(t) for t in texts] == [False, True, False, False, True]
    assert choose(reading(texts)[0], GENDER, PAPER, 1e-9, 1, "f")[1] == ["he is"]


@pytest.mark.parametrize("texts,share,words", [
    (["it is", "it was"], 0.5, "f: expected words of the axis gender, found none in 2 texts"),
    (["it is", "he is", "he is"], 1e-9, "f: expected two different texts with words of the axis gender, one to validate on; found one (or give --valid FILE)"),
    (["he is", "she is"], 1 - 1e-9, "f: expected two different texts with words of the axis gender, one to validate on; found one (or give --valid FILE)"),
])  # fmt: skip
def test_corpora_without_words_on_both_sides(texts, share, words):
    with pytest.raises(DataError) as caught:
        choose(reading(texts)[0], GENDER, PAPER, share, 5, "f")
    assert str(caught.value) == words


def test_a_validation_file_is_read_as_far_as_needed():
    read, taken = reading(many(300))
    assert first_families(read, GENDER, PAPER, 4, "v") == ["he was 1", "he was 2", "he was 4", "he was 5"] and taken == [0, 3]
    with pytest.raises(DataError, match="^v: expected words of the axis gender, found none in 3 texts$"):
        first_families(reading(["it"] * 3)[0], GENDER, PAPER, 4, "v")
