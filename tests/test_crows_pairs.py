"""CrowS-Pairs: both scorings against the definition as loops (one forward pass a mask, nothing packed, all logits), what each masks, ties, drops, bad files."""

import difflib
import json
import math

import numpy
import pytest
import torch

from peftdebias.batches import Sample, pack
from peftdebias.errors import DataError
from peftdebias.methods import Method
from peftdebias.metrics import crows_pairs, tally
from peftdebias.metrics.crows_pairs import Pair, Scored, measures, read_pairs, score_pairs
from peftdebias.metrics.tally import differences
from peftdebias.patch import attach
from peftdebias.weights import load

from .outside import one_thread  # noqa: F401
from .small import cli, done

# Swaps, insertions, deletions, both, several places, a sentence inside the other, equal ones, and a difference in the first and in the last word.
PAIRS = [
    ("he is a nurse", "she is a nurse"),
    ("he is a nurse in bergen", "he is a nurse"),
    ("she works as a surgeon", "she often works as a good surgeon"),
    ("he lives in osaka and he is a baker", "she lives in bergen and she is a banker"),
    ("her father is a florist", "the work of her father is well known"),
    ("she is a teacher", "she is a teacher"),
    ("he", "she"),
    ("nurse", "he is a nurse"),
    ("the man is a butcher .", "the man is a baker ,"),
]


def masked_places(first, second, scoring: str) -> tuple[list[int], list[int]]:
    """The places of two sequences of token ids, special tokens included, that `scoring` masks one at a time."""
    return crows_pairs._places(crows_pairs._opcodes(first, second), scoring)


def textbook(model, tokenizer, more: str, less: str, scoring: str) -> tuple[float, float] | None:
    """The scores by the words of PAPER.md; None where the scoring drops the pair."""
    ids = [tokenizer.encode([text])[0].ids.tolist() for text in (more, less)]
    shared, differing = ([], []), ([], [])
    for kind, a, b, c, d in difflib.SequenceMatcher(None, *ids).get_opcodes():
        for side, span in enumerate((range(a, b), range(c, d))):
            (shared if kind == "equal" else differing)[side].extend(span)
    scores = []
    for side in range(2):
        places = shared[side][1:-1] if scoring == "nangia" else differing[side]
        found = []
        for place in places:
            masked = list(ids[side])
            masked[place] = tokenizer.mask_id
            with torch.no_grad():
                logits = model.mlm_logits(pack([Sample(numpy.array(masked), numpy.arange(len(masked)))])).double()  # [n, V], every row
            found.append(float(torch.log_softmax(logits[place], -1)[ids[side][place]]))
        if scoring == "bias-bench" and not found:
            return None
        scores.append(sum(found) if scoring == "nangia" else sum(found) / len(found))
    return tuple(scores)


@pytest.fixture(scope="module")
def loaded(small):
    return load(small.base, mlm=True, labels=(), dtype=torch.float64)


@pytest.mark.parametrize("batch_tokens", [1, 50, 8192])
@pytest.mark.parametrize("scoring", crows_pairs.SCORINGS)
def test_both_scorings_are_their_definition(loaded, scoring, batch_tokens, monkeypatch):
    monkeypatch.setattr(crows_pairs, "round", lambda value, digits: value, raising=False)  # compare what is rounded
    model, tokenizer = loaded.model, loaded.tokenizer
    scored = score_pairs(model, tokenizer, [Pair(*pair, "gender") for pair in PAIRS], scoring, batch_tokens)
    for pair, found in zip(PAIRS, scored):
        expected = textbook(model, tokenizer, *pair, scoring)
        assert (found.more is None) == (found.less is None) == (expected is None), pair
        if expected:
            assert (found.more, found.less) == pytest.approx(expected, abs=1e-9), pair
    dropped = [pair for pair, found in zip(PAIRS, scored) if found.more is None]
    assert dropped == ([] if scoring == "nangia" else [PAIRS[1], PAIRS[2], PAIRS[5], PAIRS[7]])  # one side has no differing token
    assert len({round(s.more, 6) for s in scored if s.more}) > 4  # the model does tell them apart


def test_scores_are_rounded_to_three_decimals_and_the_mode_is_put_back(loaded):
    model = loaded.model.train()
    first, again = (score_pairs(model, loaded.tokenizer, [Pair(*PAIRS[3], "gender")], "nangia")[0] for _ in range(2))
    assert first == again and model.training  # no dropout while scoring
    assert first.more == round(first.more, 3) and abs(first.more - textbook(model.eval(), loaded.tokenizer, *PAIRS[3], "nangia")[0]) <= 0.0005 + 1e-6


def test_which_places_are_masked():
    #          0  1  2  3  4  5         0  1  2  3  4  5  6
    first, second = [1, 7, 8, 9, 5, 2], [1, 7, 6, 9, 9, 5, 2]  # 8 became 6, a 9 came in
    assert masked_places(first, second, "nangia") == ([1, 3, 4], [1, 4, 5])  # the longest common run is 9 5 2
    assert masked_places(first, second, "bias-bench") == ([2], [2, 3])
    assert masked_places([1, 4, 2], [1, 4, 2], "bias-bench") == ([], [])
    assert masked_places([1, 4, 2], [1, 4, 2], "nangia") == ([1], [1])
    assert masked_places([1, 4, 2], [1, 4, 5, 2], "bias-bench") == ([], [2])


def test_special_tokens_are_never_asked_for(loaded):
    encoded = loaded.tokenizer.encode([text for pair in PAIRS for text in pair])
    for a, b in zip(encoded[::2], encoded[1::2]):
        for scoring in crows_pairs.SCORINGS:
            for ids, places in zip((a.ids, b.ids), masked_places(a.ids.tolist(), b.ids.tolist(), scoring)):
                assert not set(ids[places].tolist()) & {loaded.tokenizer.cls_id, loaded.tokenizer.sep_id}


def scored(more, less, kind="gender"):
    return Scored(Pair("a", "b", kind), more, less)


def test_ties_count_in_the_denominator_and_dropped_pairs_do_not():
    found = measures([scored(-1.0, -2.0), scored(-2.0, -1.0), scored(-1.5, -1.5), scored(None, None), scored(-1.0, -3.0, "age")], "bias-bench")
    values = {m.name: (m.value, m.n) for m in found}
    assert values == {"crows-pairs/bias-bench/all": (50.0, 4), "crows-pairs/bias-bench/age": (100.0, 1), "crows-pairs/bias-bench/gender": (pytest.approx(100 / 3), 3)}
    assert {(m.unit, m.ideal) for m in found} == {("%", 50.0)} and all(m.low <= m.value <= m.high for m in found if m.n > 1)
    assert [m.as_json()["low"] for m in found if m.n == 1] == [None]  # one pair says nothing of its spread


def test_one_category_alone_and_one_that_is_not_there():
    rows = [scored(-1.0, -2.0), scored(-1.0, -3.0, "age")]
    assert [m.name for m in measures(rows, "nangia", "age")] == ["crows-pairs/nangia/age"]
    with pytest.raises(DataError, match="expected one of age, gender, got 'race'"):
        measures(rows, "nangia", "race")
    assert measures([scored(None, None)], "bias-bench") == []  # all dropped: nothing to say


def test_pairs_of_a_category_called_all_are_among_all():
    rows = [scored(-1.0, -2.0, "all"), scored(-3.0, -1.0), scored(-3.0, -1.0)]
    found = [(m.name.split("/")[-1], m.value, m.n) for m in measures(rows, "bias-bench")]
    counted, _ = compared(rows, rows)
    assert found == [("all", pytest.approx(100 / 3), 3), ("gender", 0, 2)]
    assert found == [(f.name.split("/")[-1], pytest.approx(value), f.n) for f, value in zip(counted.figures, tally.values(counted))]


def test_an_unknown_scoring_is_a_mistake_of_the_caller(loaded):
    with pytest.raises(ValueError, match="expected one of nangia, bias-bench, got 'mean'"):
        score_pairs(loaded.model, loaded.tokenizer, [], "mean")


def test_both_scorings_asked_together_are_each_alone(loaded):
    pairs = [Pair(*pair, "gender", direction) for pair, direction in zip(PAIRS, ["stereo", "antistereo"] * 5)]
    encoded = crows_pairs.encode_pairs(loaded.tokenizer, pairs, 64)
    together = crows_pairs.score_encoded(loaded.model, pairs, encoded, loaded.tokenizer.mask_id)
    assert list(together) == ["nangia", "bias-bench"]
    assert together == {scoring: score_pairs(loaded.model, loaded.tokenizer, pairs, scoring) for scoring in crows_pairs.SCORINGS}


def test_sentences_that_differ_in_one_token_share_the_question_about_it(loaded):
    pairs = [Pair("he is a nurse", "she is a nurse", "gender")]
    asked, ranges = crows_pairs.questions(pairs, crows_pairs.encode_pairs(loaded.tokenizer, pairs, 64), loaded.tokenizer.mask_id, ("bias-bench",))
    assert ranges == {"bias-bench": [(0, 1), (1, 2)]} and asked[0].ids.tolist() == asked[1].ids.tolist() and asked[0].target != asked[1].target


# ---------------------------------------------------------------- two systems

def compared(rows, other):
    def columns(of):
        return [s.more for s in of], [s.less for s in of], [s.pair.bias_type for s in of]
    return crows_pairs.crows_pairs_tally("crows-pairs/bias-bench", *columns(rows)), crows_pairs.crows_pairs_tally("crows-pairs/bias-bench", *columns(other))


def some_scored(seed, kinds=("age", "gender", "race"), n=90):
    random = numpy.random.default_rng(seed)
    dropped = numpy.random.default_rng(0).random(n) < 0.1  # which pairs are dropped depends on their tokens, not on the system
    return [scored(None, None, kind) if gone else scored(*random.integers(-3, 0, 2).astype(float), kind) for kind, gone in zip([*kinds] * (n // len(kinds)), dropped)]


def test_two_systems_are_compared_over_all_pairs_and_by_category():
    first, second = some_scored(1), some_scored(2)
    found, without = differences(*compared(first, second))
    one, two = measures(first, "bias-bench"), measures(second, "bias-bench")
    assert not without and [(d.name, d.first, d.second, d.n) for d in found] == [(a.name, pytest.approx(a.value), pytest.approx(b.value), a.n) for a, b in zip(one, two)]
    assert [d.name.split("/")[-1] for d in found] == ["all", "age", "gender", "race"] and all(d.low <= d.value <= d.high for d in found)
    same, _ = differences(*compared(first, first))
    assert {(d.value, d.low, d.high) for d in same} == {(0, 0, 0)}


def test_compare_reads_pairs_that_a_scoring_drops(small, tmp_path):
    path = written(tmp_path, HEADER + "0,he is a nurse,she is a nurse,stereo,gender\n1,he is a nurse in bergen,he is a nurse,stereo,gender\n"
                   "2,he is a baker,she is a baker,stereo,age\n")
    done("evaluate", small.base, "--on", f"crows-pairs={path}", "--examples", tmp_path / "e.jsonl")
    done("compare", tmp_path / "e.jsonl", tmp_path / "e.jsonl", "--json", tmp_path / "c.json")
    rows = {d["name"]: d["n"] for d in json.loads((tmp_path / "c.json").read_text())["differences"]}
    assert rows == {"crows-pairs/nangia/all": 3, "crows-pairs/nangia/gender": 2, "crows-pairs/bias-bench/all": 2}  # the others: of one pair


# ---------------------------------------------------------------- files

def written(tmp_path, content: str | bytes, name="pairs.csv"):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return tmp_path / name


HEADER = ",sent_more,sent_less,stereo_antistereo,bias_type\n"


def test_the_published_layout_is_read(tmp_path):
    path = written(tmp_path, "\ufeff" + HEADER + '0,"He, said ""no"".",She said.,stereo,gender\n1,a,b,antistereo,age\n')
    assert read_pairs(path) == [Pair('He, said "no".', "She said.", "gender"), Pair("a", "b", "age", "antistereo")]


@pytest.mark.parametrize("scoring", crows_pairs.SCORINGS)
def test_an_antistereo_pair_is_aligned_with_the_less_stereotyping_sentence_first(loaded, scoring):
    """As the published scripts do; difflib gives another alignment the other way round."""
    more, less = "he is a nurse is he", "is he a nurse he is"
    stereo, turned, anti = score_pairs(loaded.model, loaded.tokenizer, [Pair(more, less, "gender"), Pair(less, more, "gender"), Pair(more, less, "gender", "antistereo")],
                                       scoring)
    assert (anti.more, anti.less) == (turned.less, turned.more) != (stereo.more, stereo.less)
    assert (stereo.more, stereo.less) == pytest.approx(textbook(loaded.model, loaded.tokenizer, more, less, scoring), abs=0.0005 + 1e-9)


@pytest.mark.parametrize("content,words", [
    ("a,b\n1,2\n", "pairs.csv:1: no column 'sent_more'; columns: a, b"),
    ("sent_more,sent_less\nx,y\n", "pairs.csv:1: no column 'bias_type'"),
    (HEADER + "0,a,b,sterio,gender\n", "pairs.csv:2: expected stereo or antistereo in stereo_antistereo, got 'sterio'"),
    (HEADER + "0,a,b,stereo,gender\n1,c,,stereo,gender\n", "pairs.csv:3: expected a sentence in sent_more and in sent_less, got an empty one"),
    (HEADER + "0,a,b,stereo,\n", "pairs.csv:2: empty label in column 'bias_type'"),
    (HEADER + "0,a,b\n", "pairs.csv:2: expected 5 fields, got 3"),
    (HEADER.encode() + b"0,caf\xe9,b,stereo,gender\n", "pairs.csv:2: expected utf-8"),
    (HEADER, "no text in"), ("", "no text in"),
])  # fmt: skip
def test_bad_files_are_named_with_their_line(content, words, tmp_path):
    with pytest.raises(DataError, match=words.replace("(", r"\(")):
        read_pairs(written(tmp_path, content))
    with pytest.raises(DataError, match="no such file"):
        read_pairs(tmp_path / "none.csv")


# ---------------------------------------------------------------- as evaluate reports it

def test_evaluate_reports_both_scorings_and_each_example(small, tmp_path):
    done("evaluate", small.base, "--on", f"crows-pairs={small.pairs}", "--seed", 5, "--samples", 47, "--json", tmp_path / "m.json", "--examples", tmp_path / "e.jsonl")
    kept = json.loads((tmp_path / "m.json").read_text())["measures"]
    found = {m["name"]: m["value"] for m in kept}
    rows = [json.loads(line) for line in (tmp_path / "e.jsonl").read_text().splitlines()]
    for scoring in crows_pairs.SCORINGS:
        own = [r for r in rows if r["measure"] == f"crows-pairs/{scoring}"]
        assert len(own) == 12
        again = measures([scored(r["more"], r["less"]) for r in own], scoring, seed=5, samples=47)
        assert [m.as_json() for m in again] == [m for m in kept if scoring in m["name"]]
        assert found[f"crows-pairs/{scoring}/all"] == found[f"crows-pairs/{scoring}/gender"] == pytest.approx(100 * sum(r["more"] > r["less"] for r in own) / 12)


def test_sentences_longer_than_the_model_are_cut_and_counted(small, tmp_path):
    path = written(tmp_path, HEADER + f'0,he {"is " * 80},she {"is " * 80},stereo,gender\n1,he is,she is,stereo,gender\n2,he was,she was,stereo,race\n')
    said = done("evaluate", small.base, "--on", f"crows-pairs={path}", "--bias-type", "gender")
    assert f"{path}: 2 of 4 texts are longer than 64 tokens and were cut (38 tokens left out)" in said.err
    assert [line.split()[0] for line in said.out.splitlines()[1:3]] == ["crows-pairs/nangia/gender", "crows-pairs/bias-bench/gender"]
    said = cli("evaluate", small.base, "--on", f"crows-pairs={path}", "--bias-type", "age")
    assert said.code == 2 and f"{path}: expected --bias-type to be one of gender, race, got 'age'" in said.err


def test_a_module_that_takes_positions_leaves_less_room(small):
    """As a prefix of 40 in peft's way does: texts are cut to the 24 positions that are left, where the encoder would refuse them."""
    class Shift(Method):
        name, Config, position_shift = "shift", object, 40

    loaded = load(small.base, mlm=True, labels=())
    attach(loaded.model, "gender", Shift(None, loaded.model.config))
    long = Pair("he " + "is " * 50, "she " + "is " * 50, "gender")
    (found,) = score_pairs(loaded.model, loaded.tokenizer, [long], "bias-bench")
    (short,) = score_pairs(loaded.model, loaded.tokenizer, [Pair("he " + "is " * 21, "she " + "is " * 21, "gender")], "bias-bench")
    assert (found.more, found.less) == (short.more, short.less)


def test_all_nine_categories_in_one_go(shared, tmp_path):
    """Every 30th pair of the published file: a figure for each category beside the overall one, which their pairs make up."""
    lines = (shared / "data" / "crows_pairs" / "crows_pairs_anonymized.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    path = written(tmp_path, "".join(lines[:1] + lines[1::30]))
    done("evaluate", shared / "models" / "bert-tiny-mlm", "--on", f"crows-pairs={path}", "--json", tmp_path / "m.json")
    found = json.loads((tmp_path / "m.json").read_text())["measures"]
    for scoring in crows_pairs.SCORINGS:
        own = {m["name"].rsplit("/", 1)[1]: m for m in found if m["name"].startswith(f"crows-pairs/{scoring}/")}
        assert set(own) == {"all", "age", "disability", "gender", "nationality", "physical-appearance", "race-color", "religion", "sexual-orientation", "socioeconomic"}
        everything = own.pop("all")
        assert sum(m["n"] for m in own.values()) == everything["n"] <= 51
        assert sum(m["n"] * m["value"] for m in own.values()) == pytest.approx(everything["n"] * everything["value"])


def test_real_pairs_on_a_real_model(shared):
    """Four of the first 60 pairs of the published file, by both scorings, against the definition; in float32, as they are used."""
    loaded = load(shared / "models" / "bert-tiny-mlm", mlm=True, labels=())
    pairs = read_pairs(shared / "data" / "crows_pairs" / "crows_pairs_anonymized.csv")
    assert len(pairs) == 1508 and sum(p.bias_type == "gender" for p in pairs) == 262
    for scoring in crows_pairs.SCORINGS:
        for pair, found in zip(pairs[:60:15], score_pairs(loaded.model, loaded.tokenizer, pairs[:60:15], scoring)):
            expected = textbook(loaded.model, loaded.tokenizer, pair.more, pair.less, scoring)
            assert math.isclose(found.more, expected[0], abs_tol=0.0005 + 2e-5) and math.isclose(found.less, expected[1], abs_tol=0.0005 + 2e-5)


@pytest.mark.parametrize("scoring", crows_pairs.SCORINGS)
def test_a_difference_in_the_fourth_decimal_is_a_tie(scoring):
    found = crows_pairs._scored(Pair("a", "b", "gender"), scoring, [numpy.array([-1.0001]), numpy.array([-1.0002])])
    assert (found.more, found.less, found.prefers_more) == (-1.0, -1.0, False)
