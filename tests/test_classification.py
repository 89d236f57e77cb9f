"""Accuracy and F1 against their definitions written out as loops, and the words of their errors."""

import numpy as np
import pytest

from peftdebias.errors import DataError
from peftdebias.metrics import bootstrap
from peftdebias.metrics.classification import accuracy, f1, macro_f1
from peftdebias.metrics.compare import classification_tally
from peftdebias.metrics.tally import measures


def f1_by_hand(predicted, labels, positive):
    true = sum(p == positive and y == positive for p, y in zip(predicted, labels))
    precision = true / max(1, sum(p == positive for p in predicted))
    recall = true / max(1, sum(y == positive for y in labels))
    return 100 * 2 * precision * recall / (precision + recall) if true else 0.0


def some(n=211, classes="abcd", seed=0, right=0.6):
    random = np.random.default_rng(seed)
    labels = random.choice(list(classes), n, p=np.arange(1, len(classes) + 1) / sum(range(len(classes) + 1)))
    return np.where(random.random(n) < right, labels, random.choice(list(classes), n)).tolist(), labels.tolist()


def test_accuracy():
    measure = accuracy(["a", "b", "a", "b"], ["a", "b", "b", "b"])
    assert (measure.name, measure.value, measure.unit, measure.ideal, measure.n) == ("accuracy", 75.0, "%", 100.0, 4)
    predicted, labels = some()
    measure = accuracy(predicted, labels)
    assert measure.low < measure.value < measure.high
    assert accuracy(labels, labels).value == accuracy(labels, labels).low == 100.0


@pytest.mark.parametrize("positive", "abcd")
def test_f1_is_its_definition(positive):
    predicted, labels = some()
    measure = f1(predicted, labels, positive)
    assert measure.value == pytest.approx(f1_by_hand(predicted, labels, positive), abs=1e-9)
    assert measure.name == f"f1/{positive}" and measure.low < measure.value < measure.high and measure.n == 211


def test_f1_knows_positive_from_negative():
    assert f1(["1", "0", "0", "0"], ["1", "1", "0", "0"], "1").value == pytest.approx(200 / 3)
    assert f1(["1", "0", "0", "0"], ["1", "1", "0", "0"], "0").value == pytest.approx(80.0)
    assert f1(["0", "0"], ["1", "0"], "1").value == 0.0
    assert f1([1, 0], [True + 0, 0], 1).value == 100.0  # compared as strings


def test_macro_f1_is_the_mean_over_classes_of_labels_and_predictions():
    predicted, labels = some()
    predicted[0] = "e"  # a class that no label has counts with 0
    expected = np.mean([f1_by_hand(predicted, labels, c) for c in "abcde"])
    measure = macro_f1(predicted, labels)
    assert measure.value == pytest.approx(expected, abs=1e-9)
    assert measure.low < measure.high


@pytest.mark.parametrize("score, by_hand", [
    (lambda p, y: f1(p, y, "a", samples=4000), lambda p, y: f1_by_hand(p, y, "a")),
    (lambda p, y: macro_f1(p, y, samples=4000), lambda p, y: np.mean([f1_by_hand(p, y, c) for c in np.unique(y)])),
])
def test_intervals_by_counts_are_intervals_by_examples(score, by_hand):
    predicted, labels = map(np.array, some())
    measure = score(predicted, labels)
    low, high = bootstrap.interval(lambda i: by_hand(predicted[i], labels[i]), len(labels), samples=600)
    assert abs(measure.low - low) < 0.12 * (high - low) and abs(measure.high - high) < 0.12 * (high - low)


def test_rare_classes_do_not_lift_macro_f1_above_its_own_value():
    rare = [f"rare {i}" for i in range(20)]  # never found, and about every third of them in no resample
    labels = ["a"] * 300 + rare
    predicted = ["a"] * 290 + ["rare 0"] * 10 + ["a"] * 20
    measure = macro_f1(predicted, labels)
    tallied = {m.name: m for m in measures(classification_tally(predicted, labels, classes=sorted(set(labels))))}["f1/macro"]
    assert measure.value < 5 and measure.low <= measure.value <= measure.high
    assert tallied.value == pytest.approx(measure.value) and tallied.low <= tallied.value <= tallied.high


def test_macro_f1s_interval_ends_at_100_and_every_figure_is_drawn_by_the_seed():
    assert macro_f1(list("ccbcaba"), list("ccbccca")).high == 100  # resamples lie lower than it does, so their interval is shifted up, to 107
    for score in (accuracy, macro_f1, lambda *columns, **more: f1(*columns, "a", **more)):
        first, again, other = ((m.low, m.high) for m in (score(*some(), seed=seed, samples=50) for seed in (1, 1, 2)))
        assert first == again != other


def test_one_example_has_no_interval():
    for found in (accuracy(["a"], ["a"]), f1(["a"], ["a"], "a"), macro_f1(["a"], ["a"])):
        assert found.value == 100 and found.as_json()["low"] is None is found.as_json()["high"]


def test_errors_say_what_was_expected():
    with pytest.raises(DataError, match="expected as many labels as predicted, 2, got 1"):
        accuracy(["a", "b"], ["a"])
    with pytest.raises(DataError, match="expected at least 1, got 0"):
        accuracy([], [])
    with pytest.raises(DataError, match="no example with label 'x'; labels: a, b"):
        f1(["a", "x"], ["a", "b"], "x")
    with pytest.raises(DataError, match=r"labels: expected a value for every example, got none for example 1 \(counted from 0\)"):
        accuracy(["a", "b"], ["a", None])


def test_a_class_that_a_resample_lacks_is_left_out_of_its_mean():
    labels = ["a"] * 9 + ["b"]  # a third of the resamples have no b; all are right
    (tallied,) = [m for m in measures(classification_tally(labels, labels, classes="ab")) if m.name == "f1/macro"]
    assert {(m.value, m.low, m.high) for m in (macro_f1(labels, labels), tallied)} == {(100.0, 100.0, 100.0)}


def test_true_negatives_are_drawn_too():
    """3 found, 1 missed, of 100: no positive is found in 3.1 % of the resamples with one, 0.97^100 (1 - (96 / 97)^100) / (1 - 0.96^100); of the four alone in 0.4 %."""
    assert f1(["1"] * 3 + ["0"] * 97, ["1"] * 4 + ["0"] * 96, "1", samples=20_000).low == 0


def test_the_interval_of_one_labels_f1_is_not_shifted():
    """3 of 4 found, no others: F1 is 0 in 0.4 % of the resamples (none found), 40 in 4.7 % (one), 100 in 31.6 % (all)."""
    (tallied,) = [m for m in measures(classification_tally(list("1110"), list("1111"), classes="01", positive="1")) if m.name == "f1/1"]
    for found in (tallied, f1(list("1110"), list("1111"), "1")):
        assert (found.value, found.low, found.high) == pytest.approx((600 / 7, 40, 100))
