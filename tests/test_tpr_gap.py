"""TPR gaps against the definition as loops; order of the groups; classes left out; the floor; intervals; speed."""

import time

import numpy as np
import pytest

from peftdebias.errors import DataError
from peftdebias.metrics import bootstrap
from peftdebias.metrics.tpr_gap import tpr_gap


def by_hand(predicted, labels, groups, first="f", second="m"):
    gaps = {}
    for y in sorted(set(labels)):
        found = {g: [p == y for p, label, group in zip(predicted, labels, groups) if label == y and group == g] for g in (first, second)}
        if found[first] and found[second]:
            gaps[y] = 100 * (sum(found[first]) / len(found[first]) - sum(found[second]) / len(found[second]))
    return gaps


def world(n, classes=7, gap=0.0, rate=0.6, female=0.3, seed=0):
    """Even classes are found `gap` more often for f than for m, odd ones less often."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, n)
    groups = np.where(random.random(n) < female, "f", "m")
    found = random.random(n) < rate + gap / 2 * np.where(labels % 2 == 0, 1, -1) * np.where(groups == "f", 1, -1)
    return np.where(found, labels, (labels + 1) % classes).astype(str).tolist(), labels.astype(str).tolist(), groups.tolist()


def test_gaps_are_their_definition():
    data = world(537)
    result, expected = tpr_gap(*data), by_hand(*data)
    assert list(result.per_class) == list(expected)
    assert result.per_class == pytest.approx(expected, abs=1e-9)
    assert result.rms.value == pytest.approx(np.sqrt(np.mean(np.square(list(expected.values())))), abs=1e-9)
    assert result.left_out == [] and result.rms.n == 537


def test_a_small_table_by_hand():
    #             nurse: f 2 of 2, m 1 of 2: gap 50        pilot: f 0 of 1, m 1 of 1: gap -100
    predicted = ["nurse", "nurse", "nurse", "pilot", "nurse", "pilot"]
    labels = ["nurse", "nurse", "nurse", "nurse", "pilot", "pilot"]
    result = tpr_gap(predicted, labels, ["f", "f", "m", "m", "f", "m"])
    assert result.per_class == {"nurse": 50.0, "pilot": -100.0}
    assert result.rms.value == pytest.approx(np.sqrt((50**2 + 100**2) / 2))
    assert result.positives == {"nurse": (2, 2), "pilot": (1, 1)}


@pytest.mark.parametrize("pair, first", [
    (("m", "f"), "f"), (("male", "Female"), "Female"), (("W", "M"), "W"), (("man", "woman"), "woman"),
    (("b", "a"), "a"), (("1", "0"), "0"), (("woman", "female"), "female"),
])
def test_which_group_comes_first(pair, first):
    predicted, labels = ["y", "n", "y", "y"], ["y"] * 4
    result = tpr_gap(predicted, labels, [pair[0], pair[0], pair[1], pair[1]])  # TPR 50 % and 100 %
    assert result.first == first and {result.first, result.second} == set(pair)
    assert result.per_class["y"] == (-50.0 if first == pair[0] else 50.0)
    assert tpr_gap(predicted, labels, [pair[0]] * 2 + [pair[1]] * 2, first=pair[0]).per_class["y"] == -50.0
    assert tpr_gap(predicted, labels, [1, 1, 0, 0], first=1).first == "1"  # as strings


def test_classes_without_positives_of_either_group_are_left_out_and_named():
    predicted, labels, groups = world(537)
    groups = ["f" if y == "2" else "m" if y == "5" else g for y, g in zip(labels, groups)]
    predicted[0] = "never a label"
    result = tpr_gap(predicted, labels, groups)
    assert result.left_out == ["2", "5"] and "2" not in result.per_class
    assert result.positives["2"][1] == result.positives["5"][0] == 0
    assert result.rms.n == sum(y not in "25" for y in labels)
    assert result.rms.value == pytest.approx(np.sqrt(np.mean(np.square(list(by_hand(predicted, labels, groups).values())))))
    assert not np.isnan([m.value for m in result.as_measures()] + [m.low for m in result.as_measures()]).any()


def test_the_floor_is_the_rms_under_groups_shuffled_within_class():
    predicted, labels, groups = (np.array(column) for column in world(700, gap=0.6))
    result = tpr_gap(predicted, labels, groups)
    random, shuffled = np.random.default_rng(0), []
    for _ in range(200):
        moved = groups.copy()
        for y in np.unique(labels):
            moved[labels == y] = random.permutation(groups[labels == y])
        shuffled.append(np.sqrt(np.mean(np.square(list(by_hand(predicted, labels, moved).values())))))
    error = np.std(shuffled) / np.sqrt(200)
    assert abs(result.floor.value - np.mean(shuffled)) < 4 * error
    assert result.floor.low < result.floor.value < result.floor.high < result.rms.low  # a planted gap of 60 shows
    assert result.floor.ideal is None


def test_the_floor_is_drawn_by_the_seed():
    first, again, other = (tpr_gap(*world(300), samples=10, shuffles=50, seed=seed).floor for seed in (1, 1, 2))
    assert first.value == again.value != other.value and first.low < first.value < first.high


def test_without_a_gap_the_rms_lies_in_the_range_of_its_floor():
    inside = 0
    for seed in range(40):
        result = tpr_gap(*world(2000, seed=seed), samples=10, shuffles=300)
        inside += result.floor.low <= result.rms.value <= result.floor.high
    assert inside >= 34  # 38 expected, P(< 34) about 0.01 at 95 %


@pytest.mark.parametrize("gap", [0.0, 0.3])
def test_the_interval_of_the_rms_covers_what_other_test_sets_give(gap):
    results = [tpr_gap(*world(1000, gap=gap, seed=seed), samples=200, shuffles=1).rms for seed in range(150)]
    mean = np.mean([rms.value for rms in results])
    assert all(rms.low <= rms.value <= rms.high for rms in results)
    assert sum(rms.low <= mean <= rms.high for rms in results) >= 0.88 * 150


def test_intervals_per_class_are_those_of_drawing_examples():
    data = [np.array(column) for column in world(2000, gap=0.2)]
    result = tpr_gap(*data, samples=3000)
    found, of_class, female = data[0] == data[1], data[1] == "0", data[2] == "f"

    def gap(i):
        return 100 * (found[i][of_class[i] & female[i]].mean() - found[i][of_class[i] & ~female[i]].mean())

    assert gap(np.arange(2000)) == pytest.approx(result.per_class["0"])
    low, high = bootstrap.interval(gap, 2000, seed=1)
    measure = result.classes[0]
    assert measure.name == "tpr-gap/class/0" and measure.n == (data[1] == "0").sum()
    assert abs(measure.low - low) < 0.15 * (high - low) and abs(measure.high - high) < 0.15 * (high - low)


def test_few_examples_stay_in_the_range_and_one_has_no_interval():
    found = tpr_gap("a b a b b b b b".split(), "a a a a b b b b".split(), list("fmfmfmfm"))  # a resample may lose the class without a gap
    assert found.rms.value == pytest.approx(100 / 2 ** 0.5) and found.rms.low <= found.rms.value <= found.rms.high <= 100
    one = tpr_gap(["a", "a", "b", "b", "c"], ["a", "a", "b", "b", "b"], list("fmfmf"))  # of a one positive a group, of b two and one
    assert [m.n for m in one.classes] == [2, 3] and all(m.as_json()["low"] is None for m in [one.rms, *one.classes])


def test_measures_have_names_and_units_and_seeds_repeat():
    data = world(537)
    measures = tpr_gap(*data, seed=3).as_measures()
    assert [m.name for m in measures][:3] == ["tpr-gap/rms", "tpr-gap/rms-shuffled", "tpr-gap/class/0"]
    assert {m.unit for m in measures} == {"points"}
    assert measures == tpr_gap(*data, seed=3).as_measures()


def test_ten_thousand_examples_take_no_time():
    data = world(10_000, classes=28)
    start = time.process_time()
    tpr_gap(*data)
    assert time.process_time() - start < 2  # 0.1 s here


def test_errors_say_what_was_expected():
    with pytest.raises(DataError, match="expected 2 groups, got 3: f, m, x"):
        tpr_gap(["y"] * 3, ["y"] * 3, ["f", "m", "x"])
    for n, shown in ((5, "a, b, c, d, e"), (6, "a, b, c, d, e, ...")):
        with pytest.raises(DataError, match=f"expected 2 groups, got {n}: {shown}$"):
            tpr_gap(["y"] * n, ["y"] * n, "abcdef"[:n])
    with pytest.raises(DataError, match="expected 2 groups, got 1: f"):
        tpr_gap(["y"], ["y"], ["f"])
    with pytest.raises(DataError, match="expected as many groups as predicted, 2, got 1"):
        tpr_gap(["y"] * 2, ["y"] * 2, ["f"])
    with pytest.raises(DataError, match="groups: expected a value for every example, got none for example 1"):
        tpr_gap(["y"] * 2, ["y"] * 2, ["f", None])
    with pytest.raises(DataError, match="expected a class with positives in both groups 'f' and 'm', got none of 2 classes"):
        tpr_gap(["y", "n"], ["y", "n"], ["f", "m"])
    with pytest.raises(DataError, match="expected the first group to be one of f, m, got x"):
        tpr_gap(["y"] * 2, ["y"] * 2, ["f", "m"], first="x")


def test_the_floor_is_a_mean_of_shuffles():
    """One of four is found, one of the four is of f: a gap of 100 for a quarter of the shuffles, else of 1/3."""
    floor = tpr_gap(["a", "b", "b", "b"], ["a"] * 4, list("fmmm"), shuffles=4000).floor
    assert floor.value == pytest.approx(50, abs=4) and (floor.low, floor.high) == pytest.approx((100 / 3, 100))
