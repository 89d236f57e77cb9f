"""SEAT and WEAT: effect size and p by loops over the definition, vectors by one forward pass a text, intervals by word, bad files."""

import itertools
import json
import math
import re
import statistics

import numpy as np
import pytest
import torch

from peftdebias.batches import Sample, pack
from peftdebias.errors import DataError
from peftdebias.metrics import seat
from peftdebias.metrics.seat import AssociationTest, associations, measures, p_value, read_tests, seat_tally, stems
from peftdebias.metrics.tally import differences, values
from peftdebias.tokens import STYLES, wordpiece
from peftdebias.weights import load

from .outside import one_thread  # noqa: F401
from .small import cli, done, lines, save_bert

WORDS = "this is there amy lisa kate john paul mike office career salary home family parents . a person".split()
TOKENIZER = wordpiece([*STYLES["bert"].values(), *WORDS])
SETS = {"targ1": ["This is John.", "There is John.", "This is Paul.", "There is Paul.", "This is Mike.", "There is Mike."],
        "targ2": ["This is Amy.", "There is Amy.", "This is Lisa.", "There is Lisa.", "This is Kate.", "There is Kate."],
        "attr1": ["This is a office.", "career", "salary"], "attr2": ["home", "This is a family.", "parents", "There is a person."]}


def effect_size(s: np.ndarray, first: int) -> float:
    """d by its definition, of the associations s, of which the first `first` are of X. NaN where all are equal."""
    spread = s.std(ddof=1)
    return float((s[:first].mean() - s[first:].mean()) / spread) if spread > 0 else math.nan


def written(tmp_path, name="sent-weat6.jsonl", **changes):
    sets = {key: {"category": key.upper(), "examples": examples} for key, examples in SETS.items()} | changes
    (tmp_path / name).write_text(json.dumps({key: value for key, value in sets.items() if value is not None}, indent=2), encoding="utf-8")
    return tmp_path / name


def cosine(a, b) -> float:
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def textbook(x, y, a, b) -> tuple[float, float]:
    """(d, p) of lists of vectors by the words of the definition, every partition."""
    def s(w):
        return sum(cosine(w, v) for v in a) / len(a) - sum(cosine(w, v) for v in b) / len(b)

    of_x, of_y = [s(w) for w in x], [s(w) for w in y]
    union = of_x + of_y
    observed = math.fsum(of_x)
    sums = [math.fsum(union[i] for i in part) for part in itertools.combinations(range(len(union)), len(x))]
    return (statistics.mean(of_x) - statistics.mean(of_y)) / statistics.stdev(union), sum(one >= observed for one in sums) / len(sums)


def sizes_of(*sizes) -> AssociationTest:
    return AssociationTest("t", tuple(tuple(f"{name}{i}" for i in range(n)) for name, n in zip("xyab", sizes)), tuple("XYAB"))



# ---------------------------------------------------------------- figures

@pytest.mark.parametrize("sizes", [(5, 5, 3, 4), (4, 6, 2, 2), (1, 2, 1, 1)])
def test_effect_size_and_p_are_their_definition(sizes):
    test = sizes_of(*sizes)
    vectors = np.random.default_rng(sum(sizes)).normal(size=(sum(sizes), 7))
    d, p = textbook(*np.split(vectors, np.cumsum(sizes)[:-1]))
    s = associations(vectors, test)
    assert s == pytest.approx([np.mean([cosine(w, v) for v in vectors[sum(sizes[:2]):sum(sizes[:3])]]) - np.mean([cosine(w, v) for v in vectors[sum(sizes[:3]):]])
                               for w in vectors[:test.targets]], abs=1e-12)
    assert effect_size(s, sizes[0]) == pytest.approx(d, abs=1e-9) and p_value(s, sizes[0]) == pytest.approx(p, abs=1e-12)
    found, permutation = measures(test, s)
    assert (found.name, permutation.name) == ("seat/t/effect-size", "seat/t/p") and found.value == pytest.approx(d, abs=1e-9) and permutation.value == pytest.approx(p)
    assert associations(vectors * 3.5, test) == pytest.approx(s, abs=1e-12)  # cosines


def test_by_hand():
    s = np.array([3.0, 1.0, 1.0, -1.0])  # means 2 and 0, variance 8 / 3; of 6 partitions only the observed sums to 4
    assert effect_size(s, 2) == pytest.approx(2 / math.sqrt(8 / 3)) and p_value(s, 2) == pytest.approx(2 / 6)  # {3, 1} and the equal {3, 1'}
    assert p_value(-s, 2) == 1 and p_value(np.array([1.0, 0.0]), 1) == 0.5


def test_equal_sums_count_although_they_round_apart():
    s = np.array([0.1, 0.2, 0.3, 0.3, 0.2, 0.1])  # the same three numbers on both sides
    assert p_value(s, 3) == np.mean([sum(part) >= 0.6 - 1e-9 for part in itertools.combinations(s, 3)]) == p_value(1e9 * s, 3) == p_value(1e-13 * s, 3)
    assert p_value(np.full(8, 0.1), 4) == p_value(np.zeros(8), 4) == 1 and math.isnan(effect_size(np.zeros(8), 4))


def test_sampled_partitions_agree_with_all_of_them(monkeypatch):
    s = np.random.default_rng(0).normal(size=14) + np.repeat([0.5, 0], 7)
    exact = p_value(s, 7)
    monkeypatch.setattr(seat, "PERMUTATIONS", 3000)  # fewer than the 3432 partitions
    sampled = p_value(s, 7, seed=1)
    assert sampled != exact and abs(sampled - exact) < 4 * math.sqrt(exact * (1 - exact) / 3000) and sampled == p_value(s, 7, seed=1) != p_value(s, 7, seed=2)
    monkeypatch.setattr(seat, "BLOCK", 100)
    assert abs(p_value(s, 7, seed=1) - exact) < 4 * math.sqrt(exact * (1 - exact) / 3000)


def test_the_observed_partition_counts_among_the_sampled(monkeypatch):
    monkeypatch.setattr(seat, "PERMUTATIONS", 500)
    assert p_value(np.concatenate([np.ones(40), np.zeros(40)]), 40) == 1 / 500  # no other is as extreme; p is never 0
    for block in (seat.BLOCK, 800):
        monkeypatch.setattr(seat, "BLOCK", block)
        assert p_value(np.zeros(80), 40) == 1  # all of them are
    assert [len(sums) for sums in seat._permuted(np.zeros(80), 40, 0)] == [10] * 49 + [9]  # 800 numbers at once are ten of 80


# ---------------------------------------------------------------- intervals

def test_sentences_are_of_the_words_that_the_other_set_lacks():
    assert stems(SETS["targ1"], SETS["targ2"]) == ["john", "john", "paul", "paul", "mike", "mike", "amy", "amy", "lisa", "lisa", "kate", "kate"]
    assert stems(["a b", "b"], ["b"]) == ["a", "b", "b"]  # nothing of its own: itself


def test_the_interval_is_that_of_drawing_words_within_each_set():
    random = np.random.default_rng(0)
    words, each = 12, 5
    s = (np.repeat(random.normal(size=2 * words) + np.repeat([0.6, 0], words), each) + 0.1 * random.normal(size=2 * words * each))
    test = AssociationTest("t", tuple(tuple(f"{side}{i} {j}" for i in range(words) for j in range(each)) for side in "xy") + (("a",), ("b",)), tuple("XYAB"))
    found, _ = measures(test, s, samples=4000)
    of = s.reshape(2, words, each)
    drawn = [effect_size(np.concatenate([of[side][random.integers(0, words, words)].ravel() for side in (0, 1)]), words * each) for _ in range(4000)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert abs(found.low - low) < 0.08 * (high - low) and abs(found.high - high) < 0.08 * (high - low) and found.n == 120
    alone, _ = measures(AssociationTest("t", (tuple(f"x{i}" for i in range(60)), tuple(f"y{i}" for i in range(60)), ("a",), ("b",)), tuple("XYAB")), s)
    assert found.high - found.low > 1.5 * (alone.high - alone.low)  # as if sentences were independent


def test_one_word_says_nothing_of_the_spread():
    found, p = measures(AssociationTest("t", (("x 1", "x 2", "x 3"), ("y 1", "z 2", "y 3"), ("a",), ("b",)), tuple("XYAB")), np.array([1.0, 2, 3, 0, 1, 0.5]))
    assert math.isnan(found.low) and found.value > 0 and p.low is p.high is None and p.n == found.n == 6


def test_two_systems_are_compared_on_the_same_words():
    random, test = np.random.default_rng(0), sizes_of(9, 9, 1, 1)
    a, b = random.normal(size=18), random.normal(size=18)
    tallies = [seat_tally(["t"] * 18 + ["u"] * 18, [0] * 9 + [1] * 9 + [0] * 9 + [1] * 9, test.texts[:18] * 2, np.concatenate([s, -7 * s + 3])) for s in (a, b)]
    found, _ = differences(*tallies)
    assert [(d.name, d.first, d.second) for d in found] == [("seat/t/effect-size", pytest.approx(effect_size(a, 9)), pytest.approx(effect_size(b, 9))),
                                                           ("seat/u/effect-size", pytest.approx(-effect_size(a, 9)), pytest.approx(-effect_size(b, 9)))]
    same, _ = differences(tallies[0], tallies[0])
    assert [(d.value, d.low, d.high) for d in same] == [(0, 0, 0)] * 2


@pytest.mark.parametrize("each", [3, 37, 50])
def test_targets_that_lie_alike_have_no_effect(each):
    """One vector for all of them: their associations may round apart, by the place in the product, and rounding has a standard deviation too."""
    random, test = np.random.default_rng(each), sizes_of(each, each, 5, 6)
    vectors = np.concatenate([np.repeat(random.normal(size=(1, 768)), 2 * each, 0), random.normal(size=(11, 768))])
    s = associations(vectors, test)
    assert np.ptp(s) == 0 and s[0] == pytest.approx(np.mean([cosine(vectors[0], a) for a in vectors[-11:-6]]) - np.mean([cosine(vectors[0], b) for b in vectors[-6:]]))
    for alike in (vectors, np.concatenate([random.normal(size=(2 * each, 768)), np.repeat(vectors[:1], 11, 0)])):  # or one for all attributes
        d, p = measures(test, associations(alike, test), samples=20)
        assert math.isnan(d.value) and math.isnan(d.low) and p.value == 1
    vectors[0] *= 1 + 1e-9 * np.arange(768)  # what float32 can tell apart stays so
    assert np.ptp(associations(vectors, test)) > 0


# ---------------------------------------------------------------- files

def test_what_rounds_apart_is_no_difference():
    """d sees neither scale nor shift of s: such systems differ by rounding alone, on either side of 0."""
    s = np.random.default_rng(0).normal(size=40)
    tallies = (seat_tally(["one"] * 40, [0] * 20 + [1] * 20, [f"word {i // 2}" for i in range(40)], own) for own in (s, 3.7 * s + 0.01))
    (found,), _ = differences(*tallies)
    assert 0 < abs(found.value) < 1e-12 and (found.low, found.high, found.p) == (0, 0, 1)


def test_small_associations_and_one_target_of_many_have_an_effect():
    for s in (np.eye(200)[0], 1e-9 * np.eye(200)[0]):  # variance 1 / 200
        assert values(seat_tally(["t"] * 200, [0] * 100 + [1] * 100, range(200), s)) == pytest.approx(0.01 / math.sqrt(1 / 200))
    s = np.random.default_rng(0).normal(size=20)
    assert values(seat_tally(["t"] * 20, [0] * 10 + [1] * 10, range(20), 0.5 + 1e-7 * s)) == pytest.approx(effect_size(s, 10), abs=1e-6)  # far from 0 beside their spread


def test_a_folder_is_read_in_the_order_of_its_numbers(tmp_path):
    for name in ("weat10.jsonl", "weat2.jsonl", "sent-weat2.jsonl", "notes.txt"):
        written(tmp_path, name)
    assert [t.name for t in read_tests(tmp_path)] == ["sent-weat2", "weat2", "weat10"]
    (one,) = read_tests(written(tmp_path, "weat6.v2.jsonl", attr1={"category": "A", "examples": ["career", "salary", "career"]}, attr2={"examples": ["home"]}))
    assert one.name == "weat6.v2" and one.sets[2] == ("career", "salary") and one.categories == ("TARG1", "TARG2", "A", "attr2") and one.targets == 12  # a text counts once


@pytest.mark.parametrize("changes,words", [
    ({"attr2": None}, "expected a JSON object with targ1, targ2, attr1, attr2, got targ1, targ2, attr1"),
    ({"attr2": ["home"]}, "expected a JSON object with targ1, targ2, attr1, attr2, got "),
    ({"targ1": {"category": "X"}}, "expected a list of texts under targ1.examples, got null"),
    ({"targ1": {"examples": []}}, "expected a list of texts under targ1.examples, got []"),
    ({"attr1": {"examples": ["a", " "]}}, 'expected a list of texts under attr1.examples, got ["a", " "]'),
    ({"attr1": {"examples": ["a", 3]}}, 'expected a list of texts under attr1.examples, got ["a", 3]'),
])  # fmt: skip
def test_bad_files_are_named(changes, words, tmp_path):
    file = written(tmp_path, **changes)
    with pytest.raises(DataError) as error:
        read_tests(file)
    assert str(error.value).startswith(f"{file}: {words}") and "\n" not in str(error.value)


def test_what_is_no_test_at_all(tmp_path):
    for content in (b"", b'{"targ1": {}}\n{"targ1": {}}\n', b"[]", b"\xff\xfe", b"[" * 10**5):
        (tmp_path / "f.jsonl").write_bytes(content)
        with pytest.raises(DataError, match="f.jsonl: expected (a JSON object|JSON), got "):
            read_tests(tmp_path / "f.jsonl")
    with pytest.raises(DataError, match="none.jsonl: no such file"):
        read_tests(tmp_path / "none.jsonl")
    (tmp_path / "f.jsonl").write_text("{}")
    with pytest.raises(DataError, match="f.jsonl: expected a JSON object with targ1, targ2, attr1, attr2, got no keys$"):
        read_tests(tmp_path / "f.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: expected association tests, files \*.jsonl, found none"):
        read_tests(tmp_path / "empty")


# ---------------------------------------------------------------- as evaluate and compare report it

@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("seat") / "base", TOKENIZER, mlm=False)


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_evaluate_reads_a_folder_with_any_encoder(base, tmp_path, pooling):
    """No masked-LM head is needed; the figures are those of vectors from one forward pass a text."""
    (tmp_path / "tests").mkdir()
    for name in ("weat6.jsonl", "sent-weat6.jsonl"):
        written(tmp_path / "tests", name)
    name = "seat" if pooling == "first" else "seat-mean"
    said = done("evaluate", base, "--on", f"seat={tmp_path / 'tests'}", "--sentence-vector", pooling, "--json", tmp_path / "tests" / "m.json", "--examples", tmp_path / "e.jsonl")
    kept = json.loads((tmp_path / "tests" / "m.json").read_text())
    assert list(kept["files"]) == [f"{tmp_path}/tests/{test}.jsonl" for test in ("sent-weat6", "weat6")]  # not what this evaluation writes there
    found = {m["name"]: m for m in kept["measures"]}
    assert list(found) == [f"{name}/{test}/{figure}" for test in ("sent-weat6", "weat6") for figure in ("effect-size", "p")]
    assert re.search(rf"^{name}/weat6/p +[\d.e-]+ +- +- +12$", said.out, re.MULTILINE)  # without an interval and an ideal

    loaded = load(base, mlm=False, labels=())

    def vector(text):
        (e,) = loaded.tokenizer.encode([text])
        with torch.no_grad():
            hidden = loaded.model.encoder(pack([Sample(e.ids, np.arange(len(e.ids)))]), all_rows=True).double()
        return (hidden[0] if pooling == "first" else hidden.mean(0)).tolist()

    d, p = textbook(*([vector(text) for text in SETS[key]] for key in seat.SETS))
    for test in ("weat6", "sent-weat6"):
        assert found[f"{name}/{test}/effect-size"]["value"] == pytest.approx(d, abs=1e-5) and found[f"{name}/{test}/p"]["value"] == pytest.approx(p, abs=1e-12)
        assert (found[f"{name}/{test}/effect-size"]["ideal"], found[f"{name}/{test}/p"]["ideal"]) == (0, None)
    rows = lines(tmp_path / "e.jsonl")
    assert len(rows) == 24 and {(r["measure"], r["set"]) for r in rows} == {(name, "targ1"), (name, "targ2")} and rows[0]["stem"] == "john"

    done("compare", tmp_path / "e.jsonl", tmp_path / "e.jsonl", "--json", tmp_path / "c.json")
    compared = {d["name"]: d for d in json.loads((tmp_path / "c.json").read_text())["differences"]}
    assert set(compared) == {f"{name}/weat6/effect-size", f"{name}/sent-weat6/effect-size"}
    assert compared[f"{name}/weat6/effect-size"]["first"] == pytest.approx(d, abs=1e-5)


def test_names_that_the_vocabulary_lacks_are_read_alike(base, tmp_path):
    """Whatever batch a text is in, where a float32 may round another way: one effect of rounding alone was 0.3."""
    sets = {f"targ{i}": {"category": "", "examples": [f"This is {name}{j}." for j in range(19)]} for i, name in ((1, "Ilia"), (2, "Nino"))}
    for batch_tokens in (20, 8192):
        said = done("evaluate", base, "--on", f"seat={written(tmp_path, 'names.jsonl', **sets)}", "--batch-tokens", batch_tokens, "--json", tmp_path / "m.json",
                    "--examples", tmp_path / "e.jsonl")
        found = {m["name"]: m["value"] for m in json.loads((tmp_path / "m.json").read_text())["measures"]}
        assert found == {"seat/names/effect-size": None, "seat/names/p": 1} and "names: no effect size, all targets lie alike to the attributes" in said.err
        assert "names: 37 of 45 texts have the tokens of another: the vocabulary lacks their words, or does not know case" in said.err
        assert len({row["association"] for row in lines(tmp_path / "e.jsonl")}) == 1 and len(lines(tmp_path / "e.jsonl")) == 38
    found = []
    for first in (SETS["targ1"], ["This is Ilia.", "This is Nana.", *SETS["targ1"]]):  # beside names that it has
        said = done("evaluate", base, "--on", f"seat={written(tmp_path, targ1={'examples': first})}", "--samples", 40, "--examples", tmp_path / "e.jsonl")
        assert ("1 of 21 texts have the tokens of another" in said.err) == (len(first) == 8)
        found.append({row["text"]: row["association"] for row in lines(tmp_path / "e.jsonl")})
        assert [row["set"] for row in lines(tmp_path / "e.jsonl")] == ["targ1"] * len(first) + ["targ2"] * 6
    alike = {text: found[1].pop(text) for text in ("This is Ilia.", "This is Nana.")}
    assert len({*alike.values()}) == 1 and found[1] == pytest.approx(found[0], abs=1e-5) and max(found[0].values()) - min(found[0].values()) > 1e-2


def test_bad_input_leaves_one_line(base, tmp_path):
    said = cli("evaluate", base, "--on", f"seat={written(tmp_path, attr1=None)}", "--json", tmp_path / "m.json")
    assert said.code == 2 and "sent-weat6.jsonl: expected a JSON object with" in said.err.splitlines()[-1] and not (tmp_path / "m.json").exists()


def test_the_published_files_are_read(shared):
    tests = {t.name: t for t in read_tests(shared / "data" / "seat")}
    assert len(tests) == 50 and [len(s) for s in tests["sent-weat6"].sets] == [64, 64, 101, 112] and tests["weat6"].categories == ("MaleNames", "FemaleNames", "Career", "Family")
    assert len(set(stems(*tests["sent-weat6"].sets[:2]))) == 16  # eight names a side


def test_real_sentences_on_a_real_model(shared):
    """weat6 with bert-tiny-mlm against the definition, one forward pass a text with the library's own special tokens; in float32, as it is used."""
    from peftdebias.config import Evaluate
    from peftdebias.evaluation import evaluate

    model, file = shared / "models" / "bert-tiny-mlm", shared / "data" / "seat" / "weat6.jsonl"
    loaded, (test,) = load(model, mlm=False, labels=()), read_tests(file)

    def vector(text):
        ids = np.array(loaded.tokenizer.backend.encode(text).ids)
        with torch.no_grad():
            return loaded.model.encoder(pack([Sample(ids, np.arange(len(ids)))]), all_rows=True)[0].double().tolist()

    d, p = textbook(*([vector(text) for text in texts] for texts in test.sets))
    found = evaluate(Evaluate(model=str(model), on=(f"seat={file}",))).measures
    assert found[0].value == pytest.approx(d, abs=1e-5) and found[1].value == pytest.approx(p, abs=1e-12) and 0 < p < 1


def test_resamples_keep_the_size_of_each_set():
    """Two words a side, all alike: every resample within the sets is the sample itself, d = 2 / sqrt(4 / 3). Three of one side and one of the other would give d = 2."""
    found, _ = measures(sizes_of(2, 2, 1, 1), np.array([1.0, 1, -1, -1]))
    assert (found.value, found.low, found.high) == pytest.approx((math.sqrt(3),) * 3)


def test_as_many_partitions_as_are_drawn_are_all_looked_at(monkeypatch):
    monkeypatch.setattr(seat, "PERMUTATIONS", 20)  # 6 over 3
    assert {p_value(np.array([3.0, 2, 1, 0, -1, -2]), 3, seed=seed) for seed in range(10)} == {1 / 20}


def test_a_difference_rests_on_the_words_of_both_sets():
    """Two words a side: no test of signs can say less of four than 2^(1 - 4)."""
    one, other = (seat_tally(["t"] * 4, [0, 0, 1, 1], list("abcd"), s) for s in ([1.0, 1, -1, -1], [-1.0, -1, 1, 1]))
    (found,), _ = differences(one, other)
    assert (found.value, found.low, found.high) == pytest.approx((-2 * math.sqrt(3), -2 * math.sqrt(3), 0)) and found.p == 1 / 8
    twice = (seat_tally(["t"] * 8 + ["u"] * 8, [0, 0, 1, 1] * 4, list("abcd") * 4, s * 4) for s in ([1.0, 1, -1, -1], [-1.0, -1, 1, 1]))  # two tests, two sentences a word
    assert [(d.p, d.n) for d in differences(*twice)[0]] == [(1 / 8, 8)] * 2


def test_evaluate_passes_the_seed_and_the_samples_on(base, tmp_path, monkeypatch):
    monkeypatch.setattr(seat, "PERMUTATIONS", 500)  # fewer than the 924 partitions
    file = written(tmp_path)
    done("evaluate", base, "--on", f"seat={file}", "--seed", 5, "--samples", 47, "--json", tmp_path / "m.json", "--examples", tmp_path / "e.jsonl")
    (test,), s = read_tests(file), np.array([row["association"] for row in lines(tmp_path / "e.jsonl")])
    expected, by_default = ([m.as_json() for m in measures(test, s, **settings)] for settings in (dict(seed=5, samples=47), {}))
    assert json.loads((tmp_path / "m.json").read_text())["measures"] == expected and all(a != b for a, b in zip(expected, by_default))
