"""Tallies: intervals are those of drawing examples, the paired bootstrap pairs, lifted figures are shifted, no difference without an interval."""

import numpy as np
import pytest

from peftdebias.errors import DataError
from peftdebias.metrics import bootstrap, tally
from peftdebias.metrics.compare import mean_tally
from peftdebias.metrics.tally import Difference, Figure, Tally, differences, measures, of_rows, ratio, values


def some(n=401, seed=0):
    random = np.random.default_rng(seed)
    return random.normal(1, 1, n), random.integers(1, 5, n).astype(float)


def means(x, w, name="mean"):
    return mean_tally(name, x, w, unit="%", ideal=None)


def test_the_number_of_a_mean_is_of_what_has_a_weight():
    kept = means([1.0, 0.0, 5.0], [2.0, 0.0, 1.0])
    assert kept.figures[0].n == 2 and values(kept) == [2.0]  # (1 + 5) / (2 + 1)


def test_equal_rows_are_one_kind():
    rows = np.array([[1, 0.5], [0, 0], [1, 0.5], [-0.0, 0], [2, 1]])
    kept = of_rows(rows, ())
    assert kept.adds[kept.kind].tolist() == rows.tolist() and kept.kinds == 4  # -0 and 0 add the same and may stay apart
    assert len(kept.kind) == 5


def test_values_and_intervals_are_those_of_drawing_examples():
    x, w = some()
    (measure,) = measures(means(x, w), samples=4000)
    low, high = bootstrap.interval(lambda i: x[i].sum() / w[i].sum(), 401, samples=4000, seed=1)
    assert measure.value == pytest.approx(x.sum() / w.sum(), abs=1e-12) and measure.n == 401
    assert abs(measure.low - low) < 0.06 * (high - low) and abs(measure.high - high) < 0.06 * (high - low)


def test_a_table_of_counts_needs_no_rows():
    kind = np.random.default_rng(0).integers(0, 7, 300)
    figures = (Figure("share", "1", None, 300, lambda sums: sums[..., 2] / sums.sum(-1)),)
    one, other = Tally(kind, 9, None, figures), Tally(kind, 9, np.eye(9), figures)
    assert measures(one, seed=5) == measures(other, seed=5) and measures(one)[0].value == (kind == 2).mean()


def test_the_paired_bootstrap_draws_both_systems_together():
    (x, w), noise = some(), np.random.default_rng(9).normal(0.1, 0.2, 401)
    (found,), without = differences(means(x, w), means(x + noise, w), samples=4000)
    change = [noise[i].sum() / w[i].sum() for i in np.random.default_rng(1).integers(0, 401, (4000, 401))]
    low, high = np.quantile(change, [0.025, 0.975])
    assert not without and found.value == pytest.approx(noise.sum() / w.sum(), abs=1e-12) and found.value == found.second - found.first
    assert abs(found.low - low) < 0.06 * (high - low) and abs(found.high - high) < 0.06 * (high - low)
    alone = measures(means(x, w))[0]
    assert found.high - found.low < 0.35 * (alone.high - alone.low)  # what both share does not count
    assert found.p < 0.01 and found.unit == "points"


def test_strata_keep_their_sizes():
    random = np.random.default_rng(0)
    strata = np.array([0] * 20 + [1] * 30)
    x = random.normal(size=50) + 10 * strata
    adds = np.stack([np.ones(50), x, strata], 1)
    figures = (Figure("mean", "1", None, 50, lambda sums: ratio(sums[..., 1], sums[..., 0])), Figure("share", "1", None, 50, lambda sums: sums[..., 2] / sums[..., 0]))
    mean, share = measures(Tally(np.arange(50), 50, adds, figures, strata), samples=4000)
    assert (share.low, share.high) == (0.6, 0.6)
    drawn = [np.concatenate([x[:20][random.integers(0, 20, 20)], x[20:][random.integers(0, 30, 30)]]).mean() for _ in range(4000)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert abs(mean.low - low) < 0.06 * (high - low) and abs(mean.high - high) < 0.06 * (high - low)
    number = (Figure("ones", "1", None, 50, lambda sums: sums[..., 1]),)  # of two kinds, one of which both strata have: 15 of the second stratum's 30
    (ones,) = measures(Tally(np.array([0] * 20 + [0, 1] * 15), 2, None, number, strata), samples=4000)
    assert (ones.low, ones.high) == pytest.approx((15 - 1.96 * 7.5 ** 0.5, 15 + 1.96 * 7.5 ** 0.5), abs=1)
    free, _ = measures(Tally(np.arange(50), 50, adds, figures), samples=4000)
    assert free.high - free.low > 3 * (mean.high - mean.low)
    assert measures(Tally(np.arange(50), 50, adds, figures, np.zeros(50, int))) == measures(Tally(np.arange(50), 50, adds, figures))


def test_systems_that_say_the_same_do_not_differ():
    x, w = some()
    (found,), _ = differences(means(x, w), means(x, w))
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)
    x2 = np.random.default_rng(3).permutation(x)
    (there,), (back,) = differences(means(x, w), means(x2, w), seed=4)[0], differences(means(x2, w), means(x, w), seed=4)[0]
    assert there.value == -back.value and there.first == back.second


def test_without_a_difference_the_interval_holds_0_as_often_as_it_says():
    held = small = 0
    for seed in range(200):
        random = np.random.default_rng(seed)
        (found,), _ = differences(*(mean_tally("right", random.random(300) < 0.7, unit="%", ideal=None) for _ in range(2)), seed=seed, samples=300)
        held += found.low <= 0 <= found.high
        small += found.p < 0.05
    assert 180 <= held <= 199 and 1 <= small <= 20


def test_what_noise_lifts_is_shifted_down():
    x = np.random.default_rng(0).normal(0, 1, 200)

    def kept(lifted):
        return of_rows(np.stack([x, np.ones(200)], 1), (Figure("size", "1", 0.0, 200, lambda sums: np.abs(sums[..., 0] / sums[..., 1]), lifted),))

    plain, shifted = (measures(kept(lifted), samples=2000)[0] for lifted in (False, True))
    drawn = [abs(x[i].mean()) for i in np.random.default_rng(7).integers(0, 200, (4000, 200))]
    lift = np.mean(drawn) - abs(x.mean())
    assert lift > 0.01 and plain.high - shifted.high == pytest.approx(lift, abs=0.01) and shifted.low == max(0.0, shifted.low)
    changed = 0.5 + np.abs(x)
    other = of_rows(np.stack([changed, np.ones(200)], 1), kept(True).figures)
    (found,), _ = differences(kept(True), other, samples=3000)
    (unshifted,), _ = differences(kept(False), of_rows(np.stack([changed, np.ones(200)], 1), kept(False).figures), samples=3000)
    assert found.low - unshifted.low == pytest.approx(lift, abs=0.01)  # the other system's figure has next to none


def test_there_is_no_difference_without_an_interval():
    for low, high in ((float("nan"), 3.0), (3.0, float("inf"))):
        with pytest.raises(DataError, match="accuracy: expected an interval for the difference, got none"):
            Difference("accuracy", 1.0, 2.0, "points", None, low, high, 0.5, "none", 10)
    assert differences(means([1.0], [1.0]), means([2.0], [1.0])) == ([], ["mean"])  # one example
    assert differences(means([1.0, 2.0], [0.0, 0.0]), means([1.0, 2.0], [1.0, 1.0])) == ([], ["mean"])  # not defined
    assert differences(means([1.0, 2.0], [1, 1], "a"), means([1.0, 2.0], [1, 1], "b")) == ([], [])  # nothing in common
    one = measures(means([1.0], [1.0]))[0]
    assert one.value == 1 and one.as_json()["low"] is None


def test_figures_are_told_by_their_names():
    """The second system has them in another order, one more, and one of the first's is not among them; each has a number of its own."""
    x = np.random.default_rng(0).normal(size=(9, 3))

    def kept(shift, *columns):
        return of_rows(x + shift, tuple(Figure("xyz"[c], "1", None, 3 + c, lambda sums, c=c: sums[..., c] / 9) for c in columns))

    found, without = differences(kept(0.0, 1, 0, 2), kept([1.0, 2, 3], 0, 2))
    assert [(d.name, d.first, d.second, d.n, d.p) for d in found] == [("x", pytest.approx(x[:, 0].mean()), pytest.approx(x[:, 0].mean() + 1), 3, 0.25),
                                                                      ("z", pytest.approx(x[:, 2].mean()), pytest.approx(x[:, 2].mean() + 3), 5, 2.0 ** -4)]
    assert not without and all(d.low == 0 and d.high == pytest.approx(d.value) for d in found) and [m.n for m in measures(kept(0.0, 1, 0))] == [4, 3]


def test_blocks_of_resamples_are_as_many_as_asked_for(monkeypatch):
    monkeypatch.setattr(tally, "BLOCK", 7 * 401)
    blocks = [block.shape for (block,) in tally._resamples([means(*some())], 0, 40)]
    assert blocks == [(1, 7)] * 5 + [(1, 5)]


def test_what_rests_on_one_cluster_has_neither_interval_nor_difference():
    """Though others are there, which add nothing to it."""
    def kept(values):
        rows = np.stack([values, [1.0, 0, 0, 0]], 1)
        return of_rows(np.concatenate([rows, np.eye(4)], 1), (Figure("one", "%", None, 1, lambda sums: ratio(sums[..., 0], sums[..., 1])),
                                                              Figure("of one term", "%", None, 9, lambda sums: ratio(sums[..., 0], sums[..., 1]), units=1)))

    assert [(m.value, m.as_json()["low"]) for m in measures(kept([5.0, 0, 0, 0]))] == [(5, None), (5, None)]
    assert differences(kept([5.0, 0, 0, 0]), kept([7.0, 0, 0, 0])) == ([], ["one", "of one term"])


@pytest.mark.parametrize("clusters,p", [(2, 0.5), (3, 0.25), (6, 2 ** -5), (400, 2 / 1001)])
def test_few_clusters_that_move_alike_are_no_certainty(clusters, p):
    (found,), _ = differences(means(np.zeros(clusters), np.ones(clusters)), means(np.ones(clusters), np.ones(clusters)))
    assert found.value == 1 and found.p == pytest.approx(p)
    (fallen,), _ = differences(means(np.ones(clusters), np.ones(clusters)), means(np.zeros(clusters), np.ones(clusters)))
    assert fallen.value == -1 and fallen.p == found.p  # whichever way
    assert (found.low, found.high, fallen.low, fallen.high) == ((0, 1, -1, 0) if p > 0.05 else (1, 1, -1, -1))


def test_p_is_of_both_sides():
    """Of ten examples 7 rise and 3 fall by 1: a resample is at most 0 where 5 or more of its ten fall. P = sum over k from 5 of (10 over k) 0.3^k 0.7^(10 - k) = 0.1503;
    p is twice that."""
    change = np.array([1.0] * 7 + [-1] * 3)
    for sign in (1, -1):
        (found,), _ = differences(means(np.zeros(10), np.ones(10)), means(sign * change, np.ones(10)), samples=20_000)
        assert found.value == pytest.approx(sign * 0.4) and found.p == pytest.approx(0.3005, abs=0.015)


def test_errors_say_what_was_expected():
    with pytest.raises(DataError, match="expected the same examples, got 2 and 3"):
        differences(means([1, 2], [1, 1]), means([1, 2, 3], [1, 1, 1]))
    with pytest.raises(DataError, match="no examples to measure on"):
        list(tally._resamples([Tally(np.zeros(0, int), 1, None, ())], 0, 10))


def test_ratio():
    assert ratio([1, 0, 1], [2, 0, 0])[0] == 0.5 and np.isnan(ratio([1, 0, 1], [2, 0, 0])[1:]).all()


def test_what_the_shift_moves_across_0_has_the_larger_p():
    """|mean| of four 1 and three -1 against 0: no resample is 0, the least is 1 / 7; their mean is about 0.31, so moved by 0.17 those of 1 / 7 lie below 0.
    P(|sum| > 1) = 1 - 35 (4^4 3^3 + 4^3 3^4) / 7^7 = 0.486, so p is about 0.972."""
    def kept(x, lifted):
        return of_rows(np.stack([x, np.ones(7)], 1), (Figure("size", "1", 0.0, 7, lambda sums: np.abs(sums[..., 0] / sums[..., 1]), lifted),))

    plain, moved = (differences(kept(np.zeros(7), lifted), kept([1.0, 1, 1, 1, -1, -1, -1], lifted), samples=4000)[0][0] for lifted in (False, True))
    assert plain.p == 2.0 ** -6 and moved.p == pytest.approx(0.972, abs=0.05)


def test_the_number_of_units_is_the_smaller_of_both_systems():
    assert differences(means([1.0, 2.0], [1, 1]), means([1.0, 2.0], [1, 0])) == ([], ["mean"])  # one value of the second: no spread
    (found,), _ = differences(means(np.zeros(4), np.ones(4)), means(np.ones(4), [1, 1, 0, 0]))
    assert found.p == 0.5  # 2^(1 - 2), not 2^(1 - 4)


def test_a_small_difference_is_no_rounding():
    (found,), _ = differences(means(np.ones(9), np.ones(9)), means(np.full(9, 1.0001), np.ones(9)))
    assert (found.value, found.low, found.high) == pytest.approx((1e-4,) * 3) and found.p == 2.0 ** -8
    (rounded,), _ = differences(means(np.ones(9), np.ones(9)), means(np.full(9, 1 + 1e-14), np.ones(9)))
    assert (rounded.low, rounded.high, rounded.p) == (0, 0, 1)


def test_two_examples_have_an_interval():
    """Resamples are 1, 2 and 3 with chances of 1/4, 1/2 and 1/4."""
    (found,) = measures(means([1.0, 3.0], [1, 1]))
    assert (found.value, found.low, found.high) == (2, 1, 3)
