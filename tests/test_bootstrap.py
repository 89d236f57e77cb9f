"""Bootstrap intervals: repeatable, the three ways agree, they cover the truth, and resampled counts are what drawing gives."""

import json

import numpy as np
import pytest

from peftdebias.errors import DataError
from peftdebias.metrics import Measure, bare_name, bootstrap, causal, classification, counterfactual, crows_pairs, fairness, fprd, nli, seat, stereoset, tpr_gap


def test_seeds_repeat_and_differ():
    values = np.random.default_rng(0).normal(size=37)
    for call in (
        lambda seed: bootstrap.interval(lambda i: values[i].max(), 37, seed=seed, samples=50),
        lambda seed: bootstrap.mean_interval(values, seed=seed, samples=50),
        lambda seed: bootstrap.mean_interval(np.arange(100) ** 0.5, seed=seed, samples=50),  # too many values for a table of counts
        lambda seed: bootstrap.counts([3, 7, 13], seed=seed, samples=5).tolist(),
    ):
        assert call(1) == call(1) != call(2)


def test_the_generic_interval_of_a_mean_is_the_normal_one():
    """sd / sqrt(n) is known: the ends lie at 1.96 of it, within the noise of 4000 resamples."""
    values = np.random.default_rng(0).normal(3, 2, 400)
    width = 1.96 * values.std() / 20
    for low, high in (
        bootstrap.interval(lambda i: values[i].mean(), 400, samples=4000),
        bootstrap.mean_interval(values, samples=4000),
    ):
        assert abs(low - (values.mean() - width)) < 0.08 * width
        assert abs(high - (values.mean() + width)) < 0.08 * width


def test_means_of_few_values_go_through_counts_and_agree():
    values = np.random.default_rng(0).integers(0, 3, 1000)
    fast, slow = bootstrap.mean_interval(values, samples=4000), bootstrap.interval(lambda i: values[i].mean(), 1000, samples=4000)
    assert np.allclose(fast, slow, atol=0.008)  # standard error of a mean here is 0.026


def test_means_in_blocks_are_means_one_by_one():
    values = np.random.default_rng(0).normal(size=10_007)  # 419 resamples a block
    assert bootstrap.mean_interval(values) == pytest.approx(bootstrap.interval(lambda i: values[i].mean(), 10_007), abs=1e-12)


def test_intervals_cover_the_truth():
    """95 % intervals of a mean of 200 over 400 data sets: between 91 and 98 % of them hold the true mean."""
    random = np.random.default_rng(0)
    covered = 0
    for seed in range(400):
        low, high = bootstrap.mean_interval(random.random(200) < 0.3, seed=seed, samples=200)
        covered += low <= 0.3 <= high
    assert 0.91 * 400 <= covered <= 0.98 * 400


def test_resampled_counts_keep_their_total_and_have_multinomial_moments():
    cells = np.array([[13, 7], [37, 0]])
    drawn = bootstrap.counts(cells, samples=20_000)
    assert drawn.shape == (20_000, 2, 2) and (drawn.sum((1, 2)) == 57).all()
    p = cells / 57
    assert np.allclose(drawn.mean(0), cells, atol=4 * np.sqrt(57 * p * (1 - p) / 20_000).max())
    assert np.allclose(drawn.var(0), 57 * p * (1 - p), rtol=0.05)
    assert (drawn[:, 1, 1] == 0).all()


def test_undefined_resamples_are_left_out():
    assert bootstrap.percentile(np.array([np.nan, 1.0, 2.0, 3.0]), 0.5) == (1.5, 2.5)
    assert np.isnan(bootstrap.percentile(np.array([np.nan]))).all()


def test_one_example_has_no_interval():
    assert np.isnan([*bootstrap.interval(np.mean, 1), *bootstrap.mean_interval([3.0])]).all()


def test_a_shifted_interval_stays_in_the_range_and_around_its_value():
    drawn = np.array([90.0, 100.0, 110.0])
    assert bootstrap.shifted(drawn, 80.0) == (70.5, 89.5)  # 90.5 to 109.5, 20 lower
    assert bootstrap.shifted(drawn, 80.0, least=75.0, most=85.0) == (75.0, 85.0)
    assert bootstrap.shifted(np.array([0.0, 0.0, np.nan]), 100.0, most=100.0) == (100.0, 100.0)
    assert bootstrap.shifted(np.r_[np.zeros(99), 100.0], 40.0) == (39.0, 40.0)
    assert np.isnan(bootstrap.shifted(np.array([np.nan]), 1.0)).all()


def test_no_examples_is_an_error():
    for call in (lambda: bootstrap.interval(np.mean, 0), lambda: bootstrap.mean_interval([]), lambda: bootstrap.counts([0, 0])):
        with pytest.raises(DataError, match="no examples to measure on: expected at least 1, got 0"):
            call()


def test_a_measure_as_json_has_no_nan_and_no_numpy():
    row = Measure("a/b", np.float32(0.5), "%", None, float("nan"), float("inf"), np.int64(3)).as_json()
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert row == {"name": "a/b", "value": 0.5, "unit": "%", "ideal": None, "low": None, "high": None, "n": 3}
    assert bare_name("fprd/term/a b (more (1).csv)") == "fprd/term/a b"
    assert json.dumps(Measure("a/b", 1, "%", np.float32(50), None, None, 3).as_json()["ideal"]) == "50.0"


# ---------------------------------------------------------------- the seed and the number of resamples, of every measure

N = 367


def drawn_measures() -> dict:
    """name -> a measure's function of seed and samples, on random answers."""
    random = np.random.default_rng(0)
    labels, groups, said = random.integers(0, 3, N), np.where(random.random(N) < 0.5, "f", "m"), random.random((N, 3))
    predicted = np.where(random.random(N) < 0.6, labels, random.integers(0, 3, N))
    mentioned, occupations, scores = random.random((N, 2)) < 0.4, [f"job {i % 41}" for i in range(N)], random.random((N, 3))
    pairs = [crows_pairs.Scored(crows_pairs.Pair("a", "b", "gender"), *row) for row in scores[:, :2].tolist()]
    words = [[f"{side}{i} is here" for i in range(23)] for side in "xy"]
    test, s = seat.AssociationTest("weat", (*map(tuple, words), ("a",), ("b",)), ("",) * 4), random.normal(size=46)
    first, second = random.random((N, 2)), random.random((N, 2))
    return {
        "accuracy": lambda **drawn: [classification.accuracy(predicted, labels, **drawn)],
        "f1": lambda **drawn: [classification.f1(predicted, labels, 1, **drawn), classification.macro_f1(predicted, labels, **drawn)],
        "tpr-gap": lambda **drawn: tpr_gap.tpr_gap(predicted, labels, groups, shuffles=50, **drawn).as_measures(),
        "fairness": lambda **drawn: fairness.fairness(predicted, labels, groups, shuffles=50, **drawn).measures,
        "fprd": lambda **drawn: fprd.fprd(predicted, labels, 1, mentioned, ["a", "b"], shuffles=50, **drawn).measures,
        "bias-nli": lambda **drawn: nli.measures(said[:, 0], said[:, 0] > 0.4, occupations, **drawn),
        "counterfactual": lambda **drawn: counterfactual.measures(said[:, 0] > 0.5, said[:, 1], occupations, **drawn),
        "stereoset": lambda **drawn: stereoset.measures(occupations, ["gender"] * N, scores, **drawn),
        "crows-pairs": lambda **drawn: crows_pairs.measures(pairs, "nangia", **drawn),
        "seat": lambda **drawn: seat.measures(test, s, **drawn),
        "causal": lambda **drawn: causal.gender_effect(first, second, ["m", "f"] * (N // 2) + ["m"], ["x", "y"], {"x": "m", "y": "f"}, **drawn),
    }


@pytest.mark.parametrize("name", drawn_measures())
def test_every_interval_is_drawn_by_the_seed_with_as_many_resamples_as_asked(name):
    measure = drawn_measures()[name]
    found, again, other, few = ({m.name: (m.low, m.high) for m in measure(**drawn) if m.low is not None}
                                for drawn in (dict(seed=3, samples=99), dict(seed=3, samples=99), dict(seed=4, samples=99), dict(seed=3, samples=30)))
    assert found and found == again and [m for m in found if found[m] == other[m]] == []
    assert [m for m in found if found[m] == few[m] and "shuffled" not in m] == []  # floors have a number of their own
