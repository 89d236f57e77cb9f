"""McNemar and Student's t against hand computations and published tables; tallies of a classifier give what classification.py, tpr_gap.py and fairness.py give."""

import json
import math

import numpy as np
import pytest

from peftdebias import cli, comparison
from peftdebias.config import Compare
from peftdebias.errors import ConfigError, DataError
from peftdebias.metrics import tally
from peftdebias.metrics.classification import accuracy, f1, macro_f1
from peftdebias.metrics.compare import classification_tally, mcnemar, mean_tally, over_seeds, seed_difference, t_inside, t_quantile
from peftdebias.metrics.fairness import fairness
from peftdebias.metrics.tpr_gap import tpr_gap

from .test_tpr_gap import world


def right(both, first, second, neither):
    return np.array([1] * both + [1] * first + [0] * second + [0] * neither, bool), np.array([1] * both + [0] * first + [1] * second + [0] * neither, bool)


def test_mcnemar_exact_by_hand():
    found = mcnemar(*right(50, 1, 9, 40))
    assert (found.only_first, found.only_second, found.test) == (1, 9, "McNemar, exact") and found.p == pytest.approx(2 * (1 + 10) / 1024, abs=1e-12)
    assert mcnemar(*right(3, 4, 4, 0)).p == 1 and mcnemar(*right(3, 0, 0, 5)).p == 1
    assert mcnemar(*right(0, 5, 0, 0)).p == pytest.approx(2 / 32)


def test_mcnemar_chi_square_by_hand():
    found = mcnemar(*right(50, 10, 25, 40))  # (15 - 1)^2 / 35 = 5.6
    assert found.test == "McNemar, chi-square" and found.p == pytest.approx(0.017960, abs=1e-6)
    assert mcnemar(*right(0, 13, 13, 0)).p == mcnemar(*right(0, 13, 14, 0)).p == 1
    assert mcnemar(*right(1, 14, 10, 2)).test == "McNemar, exact" and mcnemar(*right(1, 14, 11, 2)).test == "McNemar, chi-square"  # 24 and 25
    assert mcnemar(*right(0, 30, 45, 0)).p == mcnemar(*right(0, 45, 30, 9)).p


def test_other_examples_have_no_test():
    for first, second in (([True], [True, False]), ([True, False], [True])):
        with pytest.raises(DataError, match=f"expected the same examples, got {len(first)} and {len(second)}"):
            mcnemar(first, second)


def test_mcnemar_keeps_its_level():
    random = np.random.default_rng(0)
    for n in (30, 400):
        rejected = sum(mcnemar(random.random(n) < 0.7, random.random(n) < 0.7).p < 0.05 for _ in range(400))
        assert 0 < rejected <= 32  # 20 at most are expected, P(> 32) below 1 %


@pytest.mark.parametrize("freedom, t", [(1, 12.7062047), (2, 4.30265273), (3, 3.18244631), (4, 2.77644511), (5, 2.57058184), (10, 2.22813885), (30, 2.04227246), (101, 1.98373)])
def test_quantiles_of_student_are_the_published_ones(freedom, t):
    assert t_quantile(freedom) == pytest.approx(t, abs=2e-6) and t_inside(t, freedom) == pytest.approx(0.95, abs=1e-6)


def test_student_against_its_density():
    for freedom in (1, 2, 5, 8):
        x = np.linspace(0, 1.7, 20001)
        density = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2) * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
        assert t_inside(1.7, freedom) == pytest.approx(2 * np.trapezoid(density, x), abs=1e-8)


def test_spread_over_seeds_by_hand():
    found = over_seeds([50.0, 53.0, 56.0], name="f1", unit="%", ideal=100.0)
    assert (found.mean, found.sd, found.n) == (53.0, 3.0, 3) and str(found) == "53 ± 3"
    assert (found.low, found.high) == pytest.approx((53 - 4.30265273 * 3 / math.sqrt(3), 53 + 4.30265273 * 3 / math.sqrt(3)))
    alone = over_seeds([1.5])
    assert (alone.mean, alone.sd, alone.low) == (1.5, None, None) and str(alone) == "1.5" and str(over_seeds([54.06])) == "54.06"
    for call in (lambda: over_seeds([1.0, math.nan], name="fprd"), lambda: over_seeds([], name="fprd"), lambda: seed_difference([1.0, 2.0], [1.0, math.nan], name="fprd")):
        with pytest.raises(DataError, match="fprd: expected a number for each seed"):
            call()


def test_a_gap_that_rests_on_single_positives_has_no_difference():
    labels, groups = ["a", "a", "b", "b", "b"], list("fmfmf")
    one, other = (classification_tally(predicted, labels, groups, classes="abc") for predicted in (list("aabbc"), list("abbbb")))
    rms = {m.name: m for m in tally.measures(one)}["tpr-gap/rms"]
    assert rms.as_json()["low"] is None is tpr_gap(list("aabbc"), labels, groups).rms.as_json()["low"]
    assert "tpr-gap/rms" in tally.differences(one, other)[1]


def test_a_gap_rests_on_the_classes_that_both_groups_have():
    """Of b there are men alone: however many, they say nothing of the gap."""
    labels, groups = ["a"] * 4 + ["b"] * 30, list("ffmm") + ["m"] * 30
    one, other = (classification_tally(predicted, labels, groups, classes="ab") for predicted in (labels, ["a", "a"] + ["b"] * 32))
    (found,) = [d for d in tally.differences(one, other)[0] if d.name == "tpr-gap/rms"]
    assert (found.value, found.p, found.n) == (100, 2.0 ** -3, tpr_gap(labels, labels, groups).rms.n) and found.n == 4


def test_a_difference_stays_within_what_is_possible():
    random = np.random.default_rng(0)
    for n in random.integers(6, 30, 40):
        labels, groups = random.choice(list("ab"), n), np.r_[["m", "f"], random.choice(["m", "f"], n - 2)]
        one, other = (classification_tally(random.choice(list("ab"), n), labels, groups, classes="ab") for _ in range(2))
        for found in tally.differences(one, other, samples=100)[0]:
            assert -100 <= found.low <= found.value + 1e-9 and found.value - 1e-9 <= found.high <= 100, found


def test_p_over_seeds_is_never_below_0():
    """Where the differences hardly differ, the series for Student's t may end a rounding above 1: about once in 60 times here."""
    random = np.random.default_rng(0)
    found = [seed_difference(np.zeros(n), 1 + 10.0 ** random.uniform(-9, -1) * random.normal(size=n)).p for n in random.integers(3, 12, 300)]
    assert min(found) == 0 and max(found) < 0.05


def test_files_of_one_system_on_several_test_sets_are_told(tmp_path):
    for name, n in (("a", 20), ("b", 20), ("c", 1)):
        row = {"name": "accuracy", "value": 50.0 + n, "unit": "%", "ideal": 100.0, "low": None, "high": None, "n": n}
        (tmp_path / f"{name}.json").write_text(json.dumps({"measures": [row]}))
    notes = [comparison.compare(Compare(files=tuple(str(tmp_path / f"{name}.json") for name in names), seeds=True)).notes for names in ("ab", "ac")]
    assert notes == [[], ["a.json and others: accuracy is of 20, 1 examples: not of one test set?"]]


@pytest.mark.parametrize("change,words", [
    ({"text": "she is"}, r'/b.jsonl:3: expected the example of .*/a.jsonl:2, got another text: "she is" instead of "he is"$'),
    ({"text": 70 * "x"}, f'got another text: "{59 * "x"}... instead of "he is"$'),
    ({"label": "y"}, 'got another label: "y" instead of "x"$'), ({"extra": 1}, "got another extra: 1 instead of null$"),
    (None, "/b.jsonl: expected the 2 examples of classification that .*/a.jsonl has, got 1$"),
])  # fmt: skip
def test_other_examples_are_not_compared(change, words, tmp_path):
    row = {"measure": "classification", "place": "f:1", "text": "he is", "label": "x", "group": None, "predicted": "x", "probabilities": {"x": 0.75, "y": 0.25}, "positive": None}
    files = {"a": [row, row], "b": [row, *([] if change is None else [row | change])], "c": [row, row | {"predicted": "y", "place": "g:2", "probabilities": {"x": 0.25, "y": 0.75}}]}
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("\n" * (name == "b") + "".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(DataError, match=words):
        comparison.compare_examples(str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    found = comparison.compare_examples(str(tmp_path / "a.jsonl"), str(tmp_path / "c.jsonl")).differences  # another answer is no other example
    assert [(d.first, d.second, d.test, d.p) for d in found if d.name == "accuracy"] == [(100.0, 50.0, "McNemar, exact (1 : 0)", 1.0)]


def test_seeds_are_paired():
    found = seed_difference([50, 60, 70], [52, 61, 73], name="f1", unit="%")  # 2, 1, 3: mean 2, sd 1
    assert found.value == pytest.approx(2) and found.unit == "points" and found.n == 3
    assert (found.low, found.high) == pytest.approx((2 - 4.30265273 / math.sqrt(3), 2 + 4.30265273 / math.sqrt(3)))
    assert found.p == pytest.approx(1 - t_inside(2 * math.sqrt(3), 2)) == pytest.approx(0.0741799, abs=1e-6)
    alike = seed_difference([58.2, 61.88], [61.37, 58.71], unit="%")  # of means that differ by their rounding alone
    assert alike.value == 0 == alike.second - alike.first and alike.low < 0 < alike.high and alike.p > 0.99
    assert seed_difference([1, 2], [1, 2]).p == 1 and seed_difference([1, 2], [2, 3]).p == 0.5
    for a, b in (([1], [2]), ([1, 2], [1, 2, 3])):
        with pytest.raises(DataError, match="expected the same two seeds or more of both"):
            seed_difference(a, b)


@pytest.mark.parametrize("classes", [2, 5])
def test_a_tally_gives_what_the_measures_give(classes):
    predicted, labels, groups = world(600, classes=classes, gap=0.3)
    predicted[0] = "9"  # a class that no label has
    known = sorted({*labels, "9"}) if classes > 2 else sorted(set(labels))
    predicted = predicted if classes > 2 else ["0" if p == "9" else p for p in predicted]
    kept = classification_tally(predicted, labels, groups, classes=known, positive="1")
    found = dict(zip([f.name for f in kept.figures], tally.values(kept)))
    expected = [accuracy(predicted, labels), macro_f1(predicted, labels), f1(predicted, labels, "1"), tpr_gap(predicted, labels, groups).rms,
                *fairness(predicted, labels, groups, classes=known).measures[::2]]
    assert found == pytest.approx({m.name: m.value for m in expected}, abs=1e-9)
    intervals = {m.name: m for m in tally.measures(kept, samples=2000)}
    for m in expected[:4]:
        assert abs(intervals[m.name].low - m.low) < 0.15 * (m.high - m.low) and abs(intervals[m.name].high - m.high) < 0.15 * (m.high - m.low)
    assert [f.name for f in classification_tally(predicted, labels, None, classes=known).figures] == ["accuracy", "f1/macro"]


def test_paired_differences_of_a_classifier_are_those_of_drawing_examples():
    predicted, labels, groups = (np.array(c) for c in world(500, classes=3, gap=0.5))
    other = np.where(np.random.default_rng(1).random(500) < 0.3, labels, predicted)
    found, _ = tally.differences(*(classification_tally(p, labels, groups, classes="012") for p in (predicted, other)), samples=3000)
    by_name = {d.name: d for d in found}
    drawn = np.random.default_rng(2).integers(0, 500, (300, 500))
    for name, value in (("accuracy", lambda p, i: accuracy(p[i], labels[i], samples=1).value),
                        ("tpr-gap/rms", lambda p, i: tpr_gap(p[i], labels[i], groups[i], samples=1, shuffles=1).rms.value)):
        change = np.array([value(other, i) - value(predicted, i) for i in drawn])
        everything = np.arange(500)
        exact = value(other, everything) - value(predicted, everything)
        low, high = np.quantile(change, [0.025, 0.975]) - (0 if name == "accuracy" else change.mean() - exact)
        assert by_name[name].value == pytest.approx(exact, abs=1e-9)
        assert abs(by_name[name].low - low) < 0.2 * (high - low) and abs(by_name[name].high - high) < 0.2 * (high - low)


def test_a_label_that_no_example_has_has_no_f1():
    assert [f.name for f in classification_tally(["1", "0"], ["0", "0"], classes="01", positive="1").figures] == ["accuracy", "f1/macro"]


def test_without_a_gap_the_interval_of_the_rms_is_shifted_too():
    predicted, labels, groups = world(400, classes=4)
    (found,) = [m for m in tally.measures(classification_tally(predicted, labels, groups, classes="0123")) if m.name == "tpr-gap/rms"]
    assert (found.low, found.high) == pytest.approx((0, tpr_gap(predicted, labels, groups).rms.high), abs=1.5)  # by about 4 points


def test_three_groups_have_no_gap_of_two():
    names = [f.name for f in classification_tally(list("abab"), list("aabb"), list("fmxf"), classes="ab").figures]
    assert "accuracy" in names and "demographic-parity" in names and not any(name.startswith("tpr-gap") for name in names)


@pytest.mark.parametrize("changed", range(4))
def test_one_changed_example_is_told_from_nothing_by_no_figure(changed):
    """Resamples without it have no difference; a shift that moved them off 0 once made a finding of it."""
    predicted, labels, groups = world(300, classes=5, gap=0.3)
    other = list(predicted)
    other[changed] = next(c for c in "01234" if c != predicted[changed])
    for seed in range(5):
        found, _ = tally.differences(*(classification_tally(p, labels, groups, classes="01234") for p in (predicted, other)), seed=seed)
        assert len(found) > 5
        for one in found:
            assert one.p > 0.3 and one.low <= 0 <= one.high, one


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_seeds_that_all_change_alike(n):
    """One pair of 262 is 0.38 points, in which every seed may change; float rounding apart they are the same."""
    first = [55.73 + 0.1 * i for i in range(n)]
    found = seed_difference(first, [x - 0.39 for x in first], unit="%")
    assert found.p == 2.0 ** (1 - n) and found.test == "signs of seeds" and found.low == pytest.approx(-0.39)
    assert found.high == (0 if n < 6 else pytest.approx(-0.39))
    back = seed_difference([x - 0.39 for x in first], first)
    assert (back.p, back.low, back.high) == (found.p, -found.high, pytest.approx(0.39)) and seed_difference(np.zeros(n), np.full(n, 1e-10)).p == found.p  # however small


def test_measures_by_another_label_are_not_compared(tmp_path):
    """Answers are the same, what is counted of them is not."""
    def files(**rows):
        for name, row in rows.items():
            (tmp_path / name).write_text("".join(json.dumps(row | {"place": f"f:{i}", "text": f"text {i}"}) + "\n" for i in range(6)))
        return Compare(files=tuple(str(tmp_path / name) for name in rows))

    row = {"measure": "fprd", "label": "0", "predicted": "1", "terms": ["x"], "positive": "1"}
    with pytest.raises(DataError, match="two: fprd: expected positive '1', as .*one has it, got '0'"):
        comparison.compare(files(one=row, two=row | {"positive": "0"}))
    row = {"measure": "bias-nli", "premise": "p", "hypothesis": "h", "occupation": "x", "predicted": "a", "probabilities": {"a": 0.6, "b": 0.4}, "neutral": "a"}
    with pytest.raises(DataError, match="two: bias-nli: expected neutral 'a', as .*one has it, got 'b'"):
        comparison.compare(files(one=row, two=row | {"neutral": "b"}))
    other = row | {"predicted": "A", "probabilities": {"A": 0.7, "B": 0.3}, "neutral": "A"}  # a model that calls it otherwise
    assert all("without an interval" in note for note in comparison.compare(files(one=row, two=other)).notes)  # read, of one occupation


def test_figures_of_another_kind_are_not_compared_over_seeds(tmp_path):
    def written(name, n=100, unit="%", **values):
        (tmp_path / name).write_text(json.dumps({"measures": [{"name": m, "value": v, "unit": unit, "ideal": None, "low": None, "high": None, "n": n} for m, v in values.items()]}))
        return str(tmp_path / name)

    own = written("a", x=1.0, y=2.0, z=3.0), written("b", x=1.5, y=2.5, z=3.0)
    found = comparison.compare(Compare(seeds=True, files=own, against=(written("c", x=2.0, w=1.0), written("d", x=2.6, w=1.0))))
    assert [d.name for d in found.differences] == ["x"] and "left out, on one side alone: y, z, w" in found.notes
    with pytest.raises(DataError, match="/e: expected measures that .*/a has, found none"):
        comparison.compare(Compare(seeds=True, files=own, against=(written("e", n=9, x=2.0), written("f", n=9, x=2.6))))
    mean = over_seeds([0.2, 0.2, 0.2])
    assert (mean.mean, mean.sd, mean.low, mean.high) == (0.2, 0.0, 0.2, 0.2)


@pytest.mark.parametrize("own,other", [(("points", 0.0, 9), ("%", 0.0, 9)), (("%", 100.0, 9), ("%", 50.0, 9)), (("%", None, 9), ("%", None, 8))])
def test_figures_of_another_unit_ideal_or_number_are_left_out_whichever_is_first(own, other, tmp_path):
    def written(name, unit, ideal, n):
        rows = [{"name": m, "value": v, "unit": u, "ideal": i, "n": k} for m, v, u, i, k in (("x", 1.0 + len(name), unit, ideal, n), ("y", 2.0, "1", None, 5))]
        (tmp_path / name).write_text(json.dumps({"measures": rows}))
        return str(tmp_path / name)

    one, two = ((written(f"{side}", *kind), written(f"{side}{side}", *kind)) for side, kind in (("a", own), ("b", other)))
    for files, against in ((one, two), (two, one)):
        found = comparison.compare(Compare(seeds=True, files=files, against=against))
        assert [d.name for d in found.differences] == ["y"] and "left out, of another unit, ideal or number of examples on either side: x" in found.notes


def test_neutral_is_the_likeliest_answer_though_less_than_half(tmp_path):
    """Of two occupations, the one's pair is neutral with 0.4 against 0.3 and 0.3, the other's is not: half in the first file, none in the second."""
    sure = {"n": 0.1, "e": 0.8, "c": 0.1}
    for name, narrow in (("a", {"n": 0.4, "e": 0.3, "c": 0.3}), ("b", sure)):
        rows = [{"measure": "bias-nli", "text": o, "occupation": o, "neutral": "n", "predicted": max(p, key=p.get), "probabilities": p} for o, p in (("x", narrow), ("y", sure))]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {d.name: (d.first, d.second) for d in comparison.compare_examples(str(tmp_path / "a"), str(tmp_path / "b")).differences}
    assert found["bias-nli/fraction-neutral"] == (0.5, 0.0) and found["bias-nli/net-neutral"] == pytest.approx((0.25, 0.1)) and found["bias-nli/threshold-0.5"] == (0, 0)


@pytest.mark.parametrize("first", [[0.1, 100.0], [0.1, 3.0, 100.0, 1000.0]])
def test_changes_that_round_apart_are_alike(first):
    second = [x - 0.39 for x in first]
    assert len({b - a for a, b in zip(first, second)}) > 1  # by rounding alone
    found = seed_difference(first, second)
    assert (found.p, found.test) == (2.0 ** (1 - len(first)), "signs of seeds") and found.value == pytest.approx(-0.39)


def test_a_mean_counts_what_has_a_weight():
    assert mean_tally("x", [1.0, 0.0, 3.0], [2, 0, 1], unit="nats", ideal=None).figures[0].n == 2


def test_rows_that_no_figure_can_be_made_of_name_their_files(tmp_path, monkeypatch):
    row = {"measure": "classification", "text": "t", "label": "x", "group": None, "positive": None, "predicted": "x", "probabilities": {"x": 0.6, "y": 0.4}}
    for rows, words in (([row, row | {"predicted": "z"}], "expected every prediction to be one of x, y, got z"),
                        ([row | {"group": "m"}, row], "groups: expected a value for every example, got none for example 1 (counted from 0)")):
        for name in ("a", "b"):
            (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
        with pytest.raises(DataError) as error:
            comparison.compare_examples(str(tmp_path / "a"), str(tmp_path / "b"))
        assert str(error.value) == f"{tmp_path}/a or {tmp_path}/b: classification: {words}"
        monkeypatch.chdir(tmp_path)
        (tmp_path / words[:3]).write_bytes((tmp_path / "a").read_bytes())  # a name that the message begins with is no place
        with pytest.raises(DataError, match=f"^{words[:3]} or b: classification: {words[:20]}"):
            comparison.compare_examples(words[:3], "b")
    (tmp_path / "b").write_text("".join(json.dumps(r | {"predicted": 3, "group": None}) + "\n" for r in rows))
    (tmp_path / "a").write_text((tmp_path / "b").read_text())
    with pytest.raises(DataError, match=f"^{tmp_path}/a:1: predicted: expected a label as text, got 3"):
        comparison.compare_examples(str(tmp_path / "a"), str(tmp_path / "b"))


def test_a_label_that_the_second_system_alone_knows(tmp_path):
    for name, label in (("a", "x"), ("b", "y")):
        row = {"measure": "classification", "label": "x", "group": None, "positive": None, "predicted": label, "probabilities": {"w": 0.4, label: 0.6}}
        (tmp_path / name).write_text("".join(json.dumps(row | {"text": f"text {i}"}) + "\n" for i in range(6)))
    found = comparison.compare_examples(str(tmp_path / "a"), str(tmp_path / "b")).differences
    assert [(d.first, d.second) for d in found if d.name == "accuracy"] == [(100.0, 0.0)]


def test_seeds_that_do_not_match(tmp_path):
    def written(name, **values):
        (tmp_path / name).write_text(json.dumps({"measures": [{"name": m, "value": v, "unit": "%", "ideal": None, "n": 9} for m, v in values.items()]}))
        return str(tmp_path / name)

    a, b, c, d = written("a", x=1.0, y=2.0), written("b", x=1.5, y=None), written("c", x=2.0), written("d", x=2.5)
    with pytest.raises(ConfigError, match="--against: expected the same seeds in the same order, 2 files, got 3"):
        comparison.compare(Compare(seeds=True, files=(a, b), against=(c, d, written("e", x=3.0))))
    with pytest.raises(ConfigError, match="--against: expected the same seeds in the same order, 2 files, got 1"):
        comparison.compare(Compare(seeds=True, files=(a, b), against=(c,)))
    with pytest.raises(ConfigError, match="c: given twice; expected each file once"):
        comparison.compare(Compare(seeds=True, files=(a, b), against=(c, c)))
    found = comparison.compare(Compare(seeds=True, files=(a, b)))
    assert [s.name for s in found.spreads] == ["x"] and found.notes == ["a and others: left out, not in every file: y"]
    for others, named in (((written("f", y=None),), "f"), ((written("g"),), "g"), ((written("h", z=1.0),), "a"), ((written("i", z=1.0), written("j", z=None)), "j")):
        with pytest.raises(DataError, match=f"/{named}: expected measures that all {1 + len(others)} files have, found none$"):
            comparison.compare(Compare(seeds=True, files=(a, *others)))
    (tmp_path / "deep").mkdir()
    again = written("deep/a", x=1.0, y=2.0), written("deep/b", x=1.5)  # the same words about files that are called alike
    assert comparison.compare(Compare(seeds=True, files=(a, b), against=again)).notes == found.notes


def test_a_table_of_differences_alone_and_small_p(tmp_path, capsys):
    files = []
    for i, value in enumerate((1.0, 1.1, 5.0, 5.1001)):
        files.append(str(tmp_path / f"{i}.json"))
        (tmp_path / f"{i}.json").write_text(json.dumps({"measures": [{"name": "x", "value": value, "unit": "1", "ideal": None, "n": 9}]}))
    assert cli.main(["compare", "--seeds", *files[:2], "--against", *files[2:]]) == 0
    said = capsys.readouterr().out
    assert "difference" in said and "sd over seeds" not in said and " < 0.001  paired t over seeds" in said


MLM = {"measure": "mlm-loss", "text": "a", "nll": 1.0, "tokens": 1}
FLIP = {"measure": "counterfactual", "source": 0, "text": "t", "counterfactual": "c", "predicted": "a", "predicted_counterfactual": "a", "probabilities": {"a": 1.0},
        "probabilities_counterfactual": {"a": 1.0}}


@pytest.mark.parametrize("row", [
    MLM | {"nll": "x"}, MLM | {"tokens": "x"}, FLIP | {"probabilities": {"b": 1.0}}, FLIP | {"probabilities": {"a": "x"}},
    {"measure": "stereoset", "target": "t", "domain": "d", "context": "c", "words": {}, "scores": [1, 2, 3]},
    {"measure": "seat", "test": "t", "set": "Q", "text": "a", "stem": "a", "association": 1.0},
    MLM | {"nll": 10**400}, {"measure": "fprd-iptts", "text": None, "predicted": "b", "label": "b", "probabilities": {"a": 0.1, "b": 0.9}, "terms": ["t"], "positive": "a"},
])
def test_rows_of_another_shape_are_one_line(row, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text("".join(json.dumps(row | ({"text": f"text {i}"} if row.get("text") else {})) + "\n" for i in range(2)))
    with pytest.raises(DataError, match=f"^{tmp_path}/a or {tmp_path}/b: {row['measure']}: expected rows as `evaluate --examples` writes them, got others "):
        comparison.compare_examples(str(tmp_path / "a"), str(tmp_path / "b"))


def jsonl(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_what_one_file_alone_has_is_told_of_that_file(tmp_path):
    both = [MLM | {"text": f"text {i}", "nll": float(i)} for i in range(3)]
    a, b = jsonl(tmp_path / "a", *both, FLIP), jsonl(tmp_path / "b", *both, {"measure": "fprd"}, {"measure": "stereoset"})
    assert comparison.compare_examples(a, b).notes == [f"{a}: not compared, only there: counterfactual", f"{b}: not compared, only there: fprd, stereoset"]
    c = jsonl(tmp_path / "c", FLIP)
    with pytest.raises(DataError, match=f"^{c}: expected rows of what {b} has, mlm-loss, fprd, stereoset, got counterfactual$"):
        comparison.compare_examples(b, c)


def test_what_has_no_comparison_is_noted_and_a_positive_label_has_its_f1(tmp_path):
    rows = [{"measure": "classification", "text": str(i), "predicted": "ab"[i % 2], "label": "ab"[i // 2], "probabilities": {"a": 0.5, "b": 0.5}, "group": None, "positive": "b"}
            for i in range(4)]
    a, b = (jsonl(tmp_path / name, *rows, *[{"measure": "new", "text": "x"}][:n]) for name, n in (("a", 1), ("b", 1)))
    (tmp_path / "empty").write_text("\n")
    found = comparison.compare(Compare(files=(a, b), json=str(tmp_path / "out.json")))
    assert [d.name for d in found.differences] == ["accuracy", "f1/macro", "f1/b"] and found.notes == ["not compared, has no comparison by example: new"]
    assert json.loads((tmp_path / "out.json").read_text()) == {"differences": [d.as_json() for d in found.differences], "spreads": []}
    wrong = jsonl(tmp_path / "wrong", rows[0], rows[1] | {"predicted": 3})
    with pytest.raises(DataError, match=f"^{wrong}:2: predicted: expected a label as text, got 3$"):
        comparison.compare_examples(jsonl(tmp_path / "right", *rows[:2]), wrong)
    for name, known in (("fprd", True), ("fprd-iptts", False)):  # templates are drawn by their frame, of which there is one here
        rows = [{"measure": name, "text": "he is t", "predicted": "ab"[i % 2], "label": "b", "probabilities": {"a": 0.5, "b": 0.5}, "terms": ["t"] * (i > 3), "positive": "a"} for i in range(8)]
        assert bool(comparison.compare_examples(jsonl(tmp_path / "one", *rows), jsonl(tmp_path / "other", *rows)).differences) == known
    with pytest.raises(DataError, match=f"^{tmp_path}/empty: expected rows of `evaluate --examples`, found none$"):
        comparison.read_rows(str(tmp_path / "empty"))


ANSWERS = {  # measure -> (what is the same of both systems, the answers of either)
    "counterfactual": (lambda i: {"source": i // 2}, lambda i, s: {"predicted": "a", "predicted_counterfactual": "ab"[(i + s) % 2], "probabilities": {"a": 0.6, "b": 0.4},
                                                                  "probabilities_counterfactual": {"a": 0.5 - 0.1 * s, "b": 0.5 + 0.1 * s}}),
    "crows-pairs/nangia": (lambda i: {"bias_type": "age"}, lambda i, s: {"more": -1.0, "less": -2.0 + 2 * s * i}),
    "stereoset": (lambda i: {"target": f"t{i}", "domain": "gender"}, lambda i, s: {"scores": {"stereotype": 1.0 + s, "anti-stereotype": 2.0, "unrelated": 0.5 * i}}),
    "seat": (lambda i: {"test": "weat", "set": ("targ1", "targ1", "targ2", "targ2")[i], "stem": f"s{i}"}, lambda i, s: {"association": 0.1 * i * (1 - 2 * s)}),
    "bias-nli": (lambda i: {"occupation": "on"[i % 2]}, lambda i, s: {"predicted": "a", "probabilities": {"a": 0.7 - 0.1 * s * i, "b": 0.3 + 0.1 * s * i}, "neutral": "a"}),
    "mlm-loss": (lambda i: {"tokens": 2}, lambda i, s: {"nll": 1.0 + s * i}),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_what_a_system_answers_is_not_the_example(name, tmp_path):
    of, answers = ANSWERS[name]
    one, other = (jsonl(tmp_path / f"{s}", *({"measure": name, "place": f"{s}:{i}", "text": f"t{i}"} | of(i) | answers(i, s) for i in range(4))) for s in (0, 1))
    found = comparison.compare_examples(one, other, samples=40)
    assert found.differences + found.notes and all(d.n for d in found.differences)
    with pytest.raises(DataError, match=f"^{tmp_path}/2:1: expected the example of {one}:1, got another text"):
        comparison.compare_examples(one, jsonl(tmp_path / "2", *({"measure": name, "text": "else"} | of(i) | answers(i, 0) for i in range(4))))


def test_figures_keep_what_stands_around_their_names(tmp_path):
    """Of a module alone, on one file of several; where there is no interval the note has it too. A blank line is no row."""
    rows = [MLM | {"measure": f"base/mlm-loss ({name}.txt)", "text": f"text {i}", "nll": float(i)} for name, n in (("one", 1), ("more", 4)) for i in range(n)]
    rows += [{"measure": "only-race/crows-pairs/nangia (b (1).csv)", "bias_type": "age", "sent_more": "a", "sent_less": "b", "more": -1.0, "less": -2.0}] * 2
    path = tmp_path / "a"
    path.write_text("\n" + "\n \n".join(map(json.dumps, rows)))
    found = comparison.compare_examples(str(path), str(path))
    assert [d.name for d in found.differences] == ["base/mlm-loss (more.txt)", *(f"only-race/crows-pairs/nangia/{kind} (b (1).csv)" for kind in ("all", "age"))]
    assert found.notes == ["no difference without an interval, so none: base/mlm-loss (one.txt)"]
    assert [rows.lines for rows in comparison.read_rows(str(path)).values()] == [[2], [4, 6, 8, 10], [12, 14]]
    path.write_text(path.read_text() + "\n\n" + "x" * 50)
    with pytest.raises(DataError, match="a:16: expected a row of .*, an object with 'measure', got '" + "x" * 40 + "'$"):
        comparison.read_rows(str(path))
    path.write_text("[" * 100_000)  # deeper than Python's JSON reads
    for read, words in ((comparison.read_rows, "a:1: expected a row of"), (comparison.read_measures, "a: expected a file of `evaluate --json`")):
        with pytest.raises(DataError, match=words):
            read(str(path))


def test_terms_one_by_one_are_neither_compared_nor_missed(tmp_path):
    rows = [{"measure": "fprd-iptts (t.csv)", "text": f"text {i}", "label": "0", "predicted": str(i % 2), "terms": ["once"] if i == 0 else ["often"], "positive": "1"} for i in range(6)]
    found = comparison.compare_examples(*(jsonl(tmp_path / name, *rows) for name in "ab"))
    assert [d.name for d in found.differences] == [f"fprd-iptts{figure} (t.csv)" for figure in ("", "/script", "/fpr")] and found.notes == []
    assert {d.test for d in found.differences} == {"paired bootstrap"}
    with pytest.raises(DataError, match="a:3: expected positive to be '1' as above, got '0'"):
        comparison.compare_examples(*(jsonl(tmp_path / name, *rows[:2], rows[2] | {"positive": "0"}, *rows[3:]) for name in "ab"))


def test_samples_and_files_of_compare_are_its_settings(tmp_path):
    random = np.random.default_rng(0)
    a, b = (jsonl(tmp_path / name, *(MLM | {"text": f"text {i}", "nll": random.random()} for i in range(30))) for name in "ab")
    for seed, samples in ((0, 1000), (3, 1000), (0, 50)):
        (found,), (expected,) = (make(a, b, seed=seed, samples=samples) for make in
                                 (lambda *files, **more: comparison.compare(Compare(files=files, **more)).differences, lambda *files, **more: comparison.compare_examples(*files, **more).differences))
        assert found == expected
    assert len({comparison.compare_examples(a, b, seed=seed, samples=samples).differences[0].low for seed, samples in ((0, 1000), (3, 1000), (0, 50))}) == 3
    before = (tmp_path / "b").read_text()
    (tmp_path / "c").symlink_to(tmp_path / "b")
    for settings, error, words in ((dict(files=(a, b), json=b), ConfigError, "--json .*b: is read"), (dict(files=(a, a), seeds=True, against=(b, b), json=b), ConfigError, "a: given twice"),
                                   (dict(files=(a, b), against=(a, b)), ConfigError, "--against: expected --seeds beside it"),
                                   (dict(files=(b, str(tmp_path / "c")), seeds=True), ConfigError, "c: given twice"),
                                   (dict(files=(a,), seeds=True), ConfigError, "--seeds: expected two files of `evaluate --json` or more, one a seed, got 1"),
                                   (dict(files=(a, str(tmp_path / "x")), seeds=True, against=(b, str(tmp_path / "y")), json=b), ConfigError, "--json .*b: is read"),
                                   (dict(files=(a, str(tmp_path)), seeds=True), DataError, "a: expected a file of `evaluate --json`")):
        with pytest.raises(error, match=words):
            comparison.compare(Compare(**settings))
    assert (tmp_path / "b").read_text() == before
    with pytest.raises(DataError, match=f"^{tmp_path}: expected a file of `evaluate --json`"):
        comparison.read_measures(str(tmp_path))
    for read in (comparison.read_measures, comparison.read_rows):
        with pytest.raises(DataError, match=f"^{tmp_path}/none: no such file$"):
            read(str(tmp_path / "none"))


@pytest.mark.parametrize("row,words", [({"nll": 1.0}, "2: expected 'tokens' in a row of mlm-loss, got measure, text, nll"),
                                       (FLIP | {"predicted_counterfactual": 3}, "2: predicted_counterfactual: expected a label as text, got 3"),
                                       (FLIP | {"probabilities_counterfactual": []}, "2: probabilities_counterfactual: expected an object, got []")])
def test_a_row_that_lacks_something_is_named_by_its_line(row, words, tmp_path):
    good = FLIP if "source" in row else MLM
    row = row if "source" in row else {"measure": "mlm-loss", "text": "text 1"} | row
    for name in ("a", "b"):
        (tmp_path / name).write_text("".join(json.dumps(r | {"text": f"text {i}"}) + "\n" for i, r in enumerate((good, row))))
    with pytest.raises(DataError) as error:
        comparison.compare_examples(str(tmp_path / "a"), str(tmp_path / "b"))
    assert str(error.value) == f"{tmp_path}/a:{words}"


@pytest.mark.parametrize("change", [{"value": "1"}, {"value": True}, {"n": [9]}, {"ideal": "50"}, {"unit": 3}, {"name": None}, {"value": 10**400}, {"ideal": math.nan}])
def test_measures_of_another_shape_are_refused(change, tmp_path):
    (tmp_path / "m.json").write_text(json.dumps({"measures": [{"name": "x", "value": 1.0, "unit": "%", "ideal": None, "n": 9} | change]}))
    large = any(isinstance(value, (int, float)) and not abs(value) < 1e150 for value in change.values())
    with pytest.raises(DataError, match=f"m.json: x: {next(iter(change))}: expected a number below 1e\\+150" if large else "m.json: expected a file of"):
        comparison.read_measures(str(tmp_path / "m.json"))
