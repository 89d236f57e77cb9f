"""The causal effect of gender against its two ends and its definition as a loop; ranks and Spearman's correlation against theirs."""

import math

import numpy as np
import pytest

from peftdebias.errors import DataError
from peftdebias.metrics.causal import gender_effect
from peftdebias.metrics.rank import ranks, spearman

LABELS = ["baker", "banker", "nurse", "surgeon"]
STEREOTYPES = {"baker": "f", "banker": "m", "nurse": "f", "surgeon": "m"}


def drawn(n, seed=0):
    random = np.random.default_rng(seed)
    return random.dirichlet(np.ones(len(LABELS)), n), random.dirichlet(np.ones(len(LABELS)), n), ["mf"[i] for i in random.integers(0, 2, n)]


def test_a_model_that_ignores_gender_has_none():
    first, _, genders = drawn(37)
    changed, shift = gender_effect(first, first.copy(), genders, LABELS, STEREOTYPES)
    assert (changed.name, changed.value, changed.low, changed.high, changed.n) == ("causal/changed", 0.0, 0.0, 0.0, 37)
    assert (shift.name, shift.value, shift.low, shift.high, shift.ideal) == ("causal/shift", 0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_model_that_knows_nothing_but_gender_has_all(sign):
    """It answers banker for one gender and nurse for the other: with the stereotype, or (sign -1) against it."""
    genders = list("mfmmfmf")
    of = {"m": np.eye(4)[1], "f": np.eye(4)[2]}
    first = np.array([of[g] for g in genders])
    second = np.array([of["fm"["mf".index(g)]] for g in genders])
    pair = (first, second)[::sign]
    changed, shift = gender_effect(*pair, genders, LABELS, STEREOTYPES)
    assert changed.value == 100 and shift.value == 100 * sign


def test_the_definitions_as_a_loop():
    first, second, genders = drawn(53, seed=1)
    changed, shift = gender_effect(first, second, genders, LABELS, STEREOTYPES)
    flips, moved = 0, 0.0
    for a, b, gender in zip(first, second, genders):
        flips += list(a).index(max(a)) != list(b).index(max(b))
        m, f = (a, b) if gender == "m" else (b, a)
        moved += sum(m[i] - f[i] for i, label in enumerate(LABELS) if STEREOTYPES[label] == "m")
    assert changed.value == pytest.approx(100 * flips / 53, abs=1e-12) and shift.value == pytest.approx(100 * moved / 53, abs=1e-12)
    assert changed.low < changed.value < changed.high and shift.low < shift.value < shift.high


def test_which_text_of_a_pair_comes_first_does_not_matter():
    first, second, genders = drawn(41, seed=2)
    turned = [{"m": "f", "f": "m"}[g] for g in genders]
    for a, b in zip(gender_effect(first, second, genders, LABELS, STEREOTYPES), gender_effect(second, first, turned, LABELS, STEREOTYPES)):
        assert a.value == pytest.approx(b.value, abs=1e-12)


@pytest.mark.parametrize("change, message", [
    (lambda a, b, g: (a, b[:-1], g), r"expected probabilities of 3 pairs and 4 labels, got \[3, 4\] and \[2, 4\]"),
    (lambda a, b, g: (a[:, :3], b[:, :3], g), r"expected probabilities of 3 pairs and 4 labels, got \[3, 3\] and \[3, 3\]"),
    (lambda a, b, g: (a[:0], b[:0], []), r"expected probabilities of 0 pairs"),
    (lambda a, b, g: (a, b, ["m", "f", "x"]), "expected the genders m and f, got x"),
])
def test_errors(change, message):
    with pytest.raises(DataError, match=message):
        gender_effect(*change(*drawn(3)), LABELS, STEREOTYPES)


def test_a_label_without_a_stereotype_and_what_the_seed_draws():
    with pytest.raises(DataError, match="expected the genders m and f, got none"):
        gender_effect(*drawn(3), LABELS, {"baker": "f"})
    first, again, other = ([(m.low, m.high) for m in gender_effect(*drawn(37), LABELS, STEREOTYPES, seed=seed)] for seed in (1, 1, 2))
    assert first == again and all(one != two for one, two in zip(first, other))
    once = [(m.low, m.high) for m in gender_effect(*drawn(37), LABELS, STEREOTYPES, seed=1, samples=1)]
    assert all(low == high for low, high in once) and once != first  # as many resamples as asked for


def test_ranks_share_the_mean_of_equal_places():
    assert ranks([30, 10, 20]).tolist() == [3, 1, 2]
    assert ranks([5, 1, 5, 5, 0]).tolist() == [4, 2, 4, 4, 1]


def test_spearman_is_one_for_any_growth_and_the_known_formula_without_ties():
    x = [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert spearman(x, np.exp(x)) == 1 and spearman(x, [-v for v in x]) == -1
    y = [3, 1, 4, 2, 6, 5]
    d = [a - b for a, b in zip([1, 2, 3, 4, 5, 6], y)]
    assert spearman(x, y) == pytest.approx(1 - 6 * sum(v * v for v in d) / (6 * 35), abs=1e-12)
    assert spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(math.sqrt(3) / 2, abs=1e-12)  # ties: Pearson of (1.5, 1.5, 3) and (1, 2, 3)
    assert math.isnan(spearman(x, [1] * 6))
    for x, y in (([1], [1]), ([1, 2], [1, 2, 3])):
        with pytest.raises(DataError, match=f"expected as many values of both, 2 at least, got {len(x)} and {len(y)}"):
            spearman(x, y)
