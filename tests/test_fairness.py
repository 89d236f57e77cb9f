"""Equalised odds and demographic parity against their definitions as loops; groups without a rate; floors; intervals."""

import math

import numpy as np
import pytest

from peftdebias.errors import DataError
from peftdebias.metrics.fairness import fairness


def share(flags):
    return sum(flags) / len(flags) if flags else None


def by_hand(predicted, labels, groups, y):
    """(equalised odds, demographic parity) differences of class y in points; None where fewer than two groups have a rate."""
    def spread(rates):
        rates = [rate for rate in rates if rate is not None]
        return 100 * (max(rates) - min(rates)) if len(rates) > 1 else None

    rows, names = list(zip(predicted, labels, groups)), sorted(set(groups))
    tpr = spread([share([p == y for p, t, g in rows if g == name and t == y]) for name in names])
    fpr = spread([share([p == y for p, t, g in rows if g == name and t != y]) for name in names])
    return None if tpr is None or fpr is None else max(tpr, fpr), spread([share([p == y for p, _, g in rows if g == name]) for name in names])


def world(n=531, classes=4, groups=3, gap=0.0, seed=0):
    random = np.random.default_rng(seed)
    labels, group = random.integers(0, classes, n), random.integers(0, groups, n)
    right = random.random(n) < 0.5 + gap * (group == 0)
    return np.where(right, labels, random.integers(0, classes, n)).astype(str).tolist(), labels.astype(str).tolist(), np.array(list("abcdef"))[group].tolist()


@pytest.mark.parametrize("groups", [2, 3])
def test_each_class_is_its_definition(groups):
    data = world(groups=groups)
    result = fairness(*data)
    found = {m.name: m.value for m in result.measures}
    for place, definition in enumerate(("equalized-odds", "demographic-parity")):
        expected = {y: by_hand(*data, y)[place] for y in "0123"}
        assert result.per_class[definition] == pytest.approx(expected, abs=1e-9)
        assert found[f"{definition}/max"] == pytest.approx(max(expected.values()), abs=1e-9)
        assert found[f"{definition}/mean"] == pytest.approx(np.mean(list(expected.values())), abs=1e-9)


def test_of_two_classes_there_is_one_figure_whichever_is_positive():
    data = world(classes=2)
    result = fairness(*data)
    assert [m.name for m in result.measures] == ["equalized-odds", "equalized-odds/shuffled", "demographic-parity", "demographic-parity/shuffled"]
    for place, name in ((0, "equalized-odds"), (2, "demographic-parity")):
        assert result.measures[place].value == pytest.approx(by_hand(*data, "1")[place // 2], abs=1e-9)
        assert result.per_class[name]["0"] == pytest.approx(result.per_class[name]["1"], abs=1e-9)


def test_a_small_table_by_hand():
    #            f: labels 1 1 0 0, predicted 1 0 1 0: TPR 1/2, FPR 1/2, selected 1/2      m: labels 1 0 0 0, predicted 1 0 0 0: TPR 1, FPR 0, selected 1/4
    predicted, labels = ["1", "0", "1", "0", "1", "0", "0", "0"], ["1", "1", "0", "0", "1", "0", "0", "0"]
    found = {m.name: m for m in fairness(predicted, labels, ["f"] * 4 + ["m"] * 4).measures}
    assert (found["equalized-odds"].value, found["demographic-parity"].value) == (50.0, 25.0)
    assert {m.unit for m in found.values()} == {"points"} and found["equalized-odds"].ideal == 0.0 and found["equalized-odds"].n == 8


def test_a_group_without_a_rate_is_left_out_of_it():
    predicted, labels, groups = world(groups=3)
    labels = ["0" if g == "c" else y for y, g in zip(labels, groups)]  # c: examples of class 0 alone, so no TPR of others and no FPR of 0
    result = fairness(predicted, labels, groups)
    assert result.per_class["equalized-odds"] == pytest.approx({y: by_hand(predicted, labels, groups, y)[0] for y in "0123"}, abs=1e-9)
    labels = ["0" if g != "a" else y for y, g in zip(labels, groups)]  # two groups without: nothing to compare
    result = fairness(predicted, labels, groups)
    assert result.left_out == ["0", "1", "2", "3"] and all(math.isnan(v) for v in result.per_class["equalized-odds"].values())
    assert [m.name for m in result.measures] == [f"demographic-parity/{n}" for n in ("max", "max-shuffled", "mean", "mean-shuffled")]


def test_a_perfect_model_has_equal_odds_but_not_parity():
    labels, groups = ["1"] * 30 + ["0"] * 10 + ["1"] * 10 + ["0"] * 30, ["f"] * 40 + ["m"] * 40
    found = {m.name: m for m in fairness(labels, labels, groups).measures}
    assert found["equalized-odds"].value == found["equalized-odds"].high == 0 and found["demographic-parity"].value == 50


def test_what_labels_and_groups_share_is_no_part_of_paritys_floor():
    """Shuffled among all examples; within the labels, as for equalised odds, a perfect model would keep its whole gap."""
    labels, groups = ["1"] * 90 + ["0"] * 10 + ["1"] * 10 + ["0"] * 90, ["f"] * 100 + ["m"] * 100
    found = {m.name: m for m in fairness(labels, labels, groups).measures}
    assert found["demographic-parity"].value == 80 and found["demographic-parity/shuffled"].high < 25


@pytest.mark.parametrize("order", [range(20), [i + 10 * side for i in range(10) for side in (0, 1)]], ids=["by label", "in turns"])
def test_the_floor_of_equalised_odds_is_shuffled_within_the_labels(order):
    """Of label a, 5 of 10 are right, and one of the ten is of f: whichever it is, the rates are 0 or 1 and 5/9 or 4/9 beside it. All of b are right."""
    columns = ["a"] * 5 + ["b"] * 5 + ["b"] * 10, ["a"] * 10 + ["b"] * 10, ["m"] * 9 + ["f"] + ["m"] + ["f"] * 9
    found = {m.name: m for m in fairness(*([column[i] for i in order] for column in columns)).measures}
    floor = found["equalized-odds/shuffled"]
    assert (floor.value, floor.low, floor.high) == pytest.approx((500 / 9,) * 3)


def test_floors_are_the_figures_under_shuffled_groups():
    predicted, labels, groups = (np.array(column) for column in world(classes=2, groups=2, gap=0.45))
    found = {m.name: m for m in fairness(predicted, labels, groups).measures}
    random, within, among = np.random.default_rng(0), [], []
    for _ in range(150):
        moved = groups.copy()
        for y in "01":
            moved[labels == y] = random.permutation(groups[labels == y])
        within.append(by_hand(predicted, labels, moved, "1")[0])
        among.append(by_hand(predicted, labels, random.permutation(groups), "1")[1])
    for name, shuffled in (("equalized-odds", within), ("demographic-parity", among)):
        assert abs(found[f"{name}/shuffled"].value - np.mean(shuffled)) < 4 * np.std(shuffled) * np.sqrt(1 / 150 + 1 / 200)
    assert found["equalized-odds/shuffled"].high < found["equalized-odds"].low  # a planted gap shows


def test_intervals_cover_what_other_test_sets_give():
    results = [fairness(*world(classes=2, groups=2, gap=0.3, seed=seed), samples=200, shuffles=1).measures[0] for seed in range(100)]
    mean = np.mean([m.value for m in results])
    assert sum(m.low <= mean <= m.high for m in results) >= 88


def test_intervals_of_few_examples_stay_in_the_range_and_around_their_value():
    """Resamples lose cells there, and with them what the figure rests on."""
    random, beyond = np.random.default_rng(3), 0
    for n in random.integers(4, 20, 60):
        predicted, labels, groups = random.choice(list("abc"), n), random.choice(list("abc"), n), np.r_[["m", "f"], random.choice(["m", "f"], n - 2)]
        for m in fairness(predicted, labels, groups, samples=100, shuffles=2).measures[::2]:
            assert np.isnan(m.low) or 0 <= m.low <= m.value <= m.high <= 100
            beyond += m.value == m.high == 100
    assert beyond > 0


def test_floors_are_drawn_by_the_seed_and_are_of_all_examples():
    first, again, other = (fairness(*world(groups=2), samples=2, shuffles=20, seed=seed).measures[1::2] for seed in (1, 1, 2))
    assert first == again and all(one.value != two.value for one, two in zip(first, other)) and {m.n for m in first} == {531}


def test_order_and_names_do_not_matter():
    predicted, labels, groups = (np.array(column) for column in world())
    order = np.random.default_rng(0).permutation(len(labels))
    one, other = (fairness(*data, samples=2).measures for data in ((predicted, labels, groups), (predicted[order], labels[order], np.char.add("x", groups[order]))))
    assert [m.value for m in one[::2]] == pytest.approx([m.value for m in other[::2]], abs=1e-12)


def test_errors_say_what_was_expected():
    with pytest.raises(DataError, match="expected 2 groups or more, got 1: f"):
        fairness(["1"], ["1"], ["f"])
    with pytest.raises(DataError, match="expected every prediction to be one of 0, 1, got 2"):
        fairness(["2", "1"], ["1", "0"], ["f", "m"], classes=("0", "1"))


def test_paritys_shuffles_move_groups_and_draw_none_anew():
    """Half of 20 are predicted a, one of the 20 is of f: whichever it is, f's share is 0 or 1, and that of the others 10/19 or 9/19."""
    found = {m.name: m for m in fairness(["a", "b"] * 10, ["a"] * 10 + ["b"] * 10, ["f"] + ["m"] * 19).measures}
    floor = found["demographic-parity/shuffled"]
    assert (floor.value, floor.low, floor.high) == pytest.approx((1000 / 19,) * 3)


def test_floors_are_means_of_shuffles():
    """One of four is predicted a, one of the four is of f: a difference of 100 for a quarter of the shuffles, else of 1/3."""
    floor = {m.name: m for m in fairness(list("abbb"), list("aaaa"), list("fmmm"), shuffles=4000).measures}["demographic-parity/shuffled"]
    assert floor.value == pytest.approx(50, abs=4) and (floor.low, floor.high) == pytest.approx((100 / 3, 100))
