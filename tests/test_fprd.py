"""FPRD against its definition as loops; what a mention is; terms left out; the script's variant; the floor; intervals."""

import csv
import gzip
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tomli_w

from peftdebias import extrinsic
from peftdebias.answers import Answers
from peftdebias.axes import word_class
from peftdebias.config import Evaluate
from peftdebias.corpus import Example
from peftdebias.errors import ConfigError, DataError
from peftdebias.metrics import bootstrap, tally
from peftdebias.metrics.fprd import fprd, fprd_tally, frames, mentions, read_terms

from .small import cli, done, flags_of

TERMS = ["gay", "white", "african american", "american", "deaf"]


def rates(predicted, labels, mentioned, z=None, below=lambda label: label != "1"):
    """(FPR of the texts that mention term z or of all, how many it is of), by loops; below: which texts the share is of."""
    of = [i for i in range(len(labels)) if below(labels[i]) and (z is None or mentioned[i][z])]
    wrong = [i for i in of if predicted[i] == "1" and labels[i] != "1"]
    return (len(wrong) / len(of) if of else None), len(of)


def by_hand(predicted, labels, mentioned, below=lambda label: label != "1"):
    overall, _ = rates(predicted, labels, mentioned, below=below)
    total = 0.0
    for z in range(len(mentioned[0])):
        if rates(predicted, labels, mentioned, z)[0] is not None:
            total += abs(rates(predicted, labels, mentioned, z, below)[0] - overall)
    return total


def world(n=611, terms=5, gap=0.4, seed=0):
    """Texts that mention term 0 are taken for hateful more often by `gap`; term 4 is mentioned by hateful texts alone."""
    random = np.random.default_rng(seed)
    labels = (random.random(n) < 0.3).astype(int)
    mentioned = random.random((n, terms)) < 0.15
    mentioned[:, 4] &= labels == 1
    wrong = random.random(n) < 0.2 + gap * mentioned[:, 0]
    return (labels ^ wrong).astype(str), labels.astype(str), mentioned


def test_fprd_and_the_scripts_variant_are_their_definitions():
    predicted, labels, mentioned = world()
    found = {m.name: m for m in fprd(predicted, labels, "1", mentioned, TERMS).measures}
    assert found["fprd"].value == pytest.approx(by_hand(predicted, labels, mentioned), abs=1e-9)
    assert found["fprd/script"].value == pytest.approx(by_hand(predicted, labels, mentioned, lambda label: True), abs=1e-9)
    assert found["fprd/script"].value < found["fprd"].value and found["fprd/script"].n == 611 and found["fprd/fpr"].n == found["fprd"].n < 611
    assert found["fprd/fpr"].value == pytest.approx(100 * rates(predicted, labels, mentioned)[0], abs=1e-9)
    for z, term in enumerate(TERMS[:4]):
        value, n = rates(predicted, labels, mentioned, z)
        assert found[f"fprd/term/{term}"].value == pytest.approx(100 * value, abs=1e-9) and found[f"fprd/term/{term}"].n == n
    assert found["fprd"].n == (labels == "0").sum() and {m.ideal for m in found.values()} == {0.0, None}


def test_the_floor_is_drawn_by_the_seed():
    found = [fprd(*world()[:2], "1", world()[2], TERMS, seed=seed, samples=10, shuffles=50).measures for seed in (1, 1, 2)]
    first, again, other = (next(m for m in measures if m.name == "fprd/shuffled") for measures in found)
    assert (first.value, first.low, first.high) == (again.value, again.low, again.high) and first.value != other.value and first.low < first.value < first.high


def test_a_small_table_by_hand():
    # negatives: a gay, taken for hateful; a white; b none; c gay. FPR 1/4, gay 1/2, white 0: |1/2 - 1/4| + |0 - 1/4| = 1/2
    predicted, labels = ["1", "0", "0", "0", "1"], ["0", "0", "0", "0", "1"]
    mentioned = [[True, False], [False, True], [False, False], [True, False], [True, True]]
    result = fprd(predicted, labels, "1", mentioned, ["gay", "white"])
    assert result.measures[0].value == 0.5 and result.per_term == {"gay": 50.0, "white": 0.0} and result.negatives == {"gay": 2, "white": 1}
    # the script: FP / all texts: 1/5; gay 1/3, white 0/2: |1/3 - 1/5| + 1/5 = 1/3
    assert {m.name: m.value for m in result.measures}["fprd/script"] == pytest.approx(1 / 3)
    assert (result.measures[-1].name, result.measures[-1].low) == ("fprd/term/white", pytest.approx(np.nan, nan_ok=True))  # one text has no spread


def test_terms_without_negatives_are_left_out_and_named():
    result = fprd(*world()[:2], "1", world()[2], TERMS)
    assert result.left_out == ["deaf"] and result.negatives["deaf"] == 0 and "fprd/term/deaf" not in {m.name for m in result.measures}


def test_invariances():
    predicted, labels, mentioned = world()
    value = fprd(predicted, labels, "1", mentioned, TERMS, samples=2).measures[0].value
    order = np.random.default_rng(1).permutation(len(labels))
    assert fprd(predicted[order], labels[order], "1", mentioned[order], TERMS, samples=2).measures[0].value == pytest.approx(value, abs=1e-12)
    backwards = fprd(predicted, labels, "1", mentioned[:, ::-1], TERMS[::-1], samples=2)
    assert backwards.measures[0].value == pytest.approx(value, abs=1e-12)
    told = np.where(labels == "1", np.where(predicted == "1", "0", "1"), predicted)  # what hateful texts are called does not matter
    assert fprd(told, labels, "1", mentioned, TERMS, samples=2).measures[0].value == pytest.approx(value, abs=1e-12)
    named = {"0": "no", "1": "hate"}
    assert fprd([named[p] for p in predicted], [named[y] for y in labels], "hate", mentioned, TERMS, samples=2).measures[0].value == pytest.approx(value)


def test_the_floor_is_fprd_under_shuffled_predictions():
    predicted, labels, mentioned = world(gap=0.6)
    result = fprd(predicted, labels, "1", mentioned, TERMS)
    random, negative, shuffled = np.random.default_rng(0), np.flatnonzero(labels == "0"), []
    for _ in range(150):
        moved = predicted.copy()
        moved[negative] = random.permutation(predicted[negative])
        shuffled.append(by_hand(moved, labels, mentioned))
    floor = result.measures[1]
    assert floor.name == "fprd/shuffled" and floor.ideal is None
    assert abs(floor.value - np.mean(shuffled)) < 4 * np.std(shuffled) / np.sqrt(150)
    assert floor.low < floor.value < floor.high < result.measures[0].low  # what was planted shows
    fair = fprd(*world(gap=0.0)[:2], "1", world(gap=0.0)[2], TERMS).measures
    assert fair[1].low <= fair[0].value <= fair[1].high


def test_intervals_are_those_of_drawing_examples():
    predicted, labels, mentioned = world()
    measures = {m.name: m for m in fprd(predicted, labels, "1", mentioned, TERMS, samples=3000).measures}

    def term(i):
        return 100 * rates(predicted[i], labels[i], mentioned[i], 0)[0]

    low, high = bootstrap.interval(term, len(labels), seed=1, samples=400)
    assert abs(measures["fprd/term/gay"].low - low) < 0.2 * (high - low) and abs(measures["fprd/term/gay"].high - high) < 0.2 * (high - low)
    drawn = [by_hand(predicted[i], labels[i], mentioned[i]) for i in np.random.default_rng(2).integers(0, len(labels), (300, len(labels)))]
    low, high = np.quantile(drawn, [0.025, 0.975]) - (np.mean(drawn) - measures["fprd"].value)
    assert abs(measures["fprd"].low - low) < 0.2 * (high - low) and abs(measures["fprd"].high - high) < 0.2 * (high - low)


def test_the_interval_covers_what_other_test_sets_give():
    results = [fprd(*world(seed=seed)[:2], "1", world(seed=seed)[2], TERMS, samples=200, shuffles=1).measures[0] for seed in range(120)]
    mean = np.mean([m.value for m in results])
    assert sum(m.low <= mean <= m.high for m in results) >= 0.88 * 120


# ---------------------------------------------------------------- mentions

def test_a_mention_is_a_whole_word_in_any_case():
    texts = ["Gay rights", "gaya is a town", "GAY!", "non-gay, he said", "gay_x gay1", "gáy", "African\n American food", "african-american", "an American's", "gay\u0301"]
    found = mentions(texts, TERMS)
    assert found[:, 0].tolist() == [True, False, True, True, False, False, False, False, False, False]  # a mark belongs to its word
    assert found[6].tolist() == [False, False, True, True, False]
    assert found[:, 2].sum() == 1 and found[7, 3] and found[8, 3]
    assert mentions(["what about l'gbt and c++ ", "c++x"], ["l'gbt", "c++"]).tolist() == [[True, True], [False, False]]
    assert not mentions(["panafrican american food", "xc++", "african americans"], ["african american", "c++"]).any()


def test_mentions_equal_one_regular_expression_a_term():
    random = np.random.default_rng(0)
    words = ["gay", "Gay", "gays", "african", "American", "AMERICAN", "white", "x-white", "deaf.", "é", "deaf'", "e\u0301white", "  ", "\n"]
    texts = [random.choice([" ", "-", ""]).join(random.choice(words, 6)) for _ in range(400)]
    inside = word_class()
    patterns = [re.compile(f"(?<![{inside}])" + r"\s+".join(term.split()) + f"(?![{inside}])", re.I) for term in TERMS]
    slow = [[bool(pattern.search(text)) for pattern in patterns] for text in texts]
    assert mentions(texts, TERMS).tolist() == slow and all(0 < n < 400 for n in np.sum(slow, axis=0))


def test_terms_come_one_a_line(tmp_path):
    (tmp_path / "t.csv").write_text('\ufeffterm,note\r\n"African  American",x\r\n\r\nGay\r\ngay\r\n', encoding="utf-8")
    assert read_terms(tmp_path / "t.csv") == ["african american", "gay"]
    (tmp_path / "t.txt").write_text("middle eastern, or so\nterm\n")
    assert read_terms(tmp_path / "t.txt") == ["middle eastern, or so", "term"]
    for name, header in (("T.CSV", "terms"), ("t.Csv.gz", "identity")):
        with (gzip.open if name.endswith("gz") else open)(tmp_path / name, "wt") as file:
            file.write(f"{header},note\nGay,x\n")
        assert read_terms(tmp_path / name) == ["gay"]
    (tmp_path / "none.csv").write_text("identity\n\n")
    with pytest.raises(DataError, match="none.csv: expected identity terms, one a line, found none"):
        read_terms(tmp_path / "none.csv")
    (tmp_path / "bad.csv").write_text('gay\n"x" y\n')
    with pytest.raises(DataError, match="bad.csv:2: not csv"):
        read_terms(tmp_path / "bad.csv")
    with pytest.raises(DataError, match="not.there:1: cannot be read: No such file"):
        read_terms(tmp_path / "not.there")


def test_errors_say_what_was_expected():
    with pytest.raises(DataError, match=r"expected texts without the label '1' that mention an identity term, found none with any of 1: gay"):
        fprd(["1", "0"], ["1", "0"], "1", [[True], [False]], ["gay"])
    for n, shown in ((5, "5: a, b, c, d, e"), (6, "6: a, b, c, d, e, ...")):
        with pytest.raises(DataError, match=f"found none with any of {shown}$"):
            fprd(["0"], ["0"], "1", [[False] * n], list("abcdef"[:n]))
    with pytest.raises(DataError, match="expected texts without the label '1', found none"):
        fprd(["1"], ["1"], "1", [[True]], ["gay"])
    with pytest.raises(DataError, match="expected mentions of 2 terms in 1 texts, got 1 in 1"):
        fprd(["1"], ["0"], "1", [[True]], ["gay", "white"])


# ---------------------------------------------------------------- texts of one template

def templates(count=40, terms=6, seed=0):
    """Every template with every term; a template is taken for hateful with all terms or with none, but for one term in some."""
    random = np.random.default_rng(seed)
    texts = [f"{TERMS_OF[z].title()} people of town {i} ." for i in range(count) for z in range(terms)]
    wrong = np.repeat(random.random(count) < 0.4, terms) ^ (np.tile(np.arange(terms), count) == 0) & np.repeat(random.random(count) < 0.3, terms)
    return texts, wrong.astype(int).astype(str), ["0"] * len(texts)


TERMS_OF = ["gay", "white", "african american", "american", "deaf", "old"]


def test_sums_over_many_terms_have_intervals_above_1():
    """Of eight terms those of four are taken for hateful four times in five, those of the others never; each text mentions one, every fourth is hateful."""
    terms = [f"t{z}" for z in range(8)]
    mentioned = np.eye(8, dtype=bool)[np.arange(320) % 8]
    predicted, labels = np.where((np.arange(320) % 8 < 4) & (np.arange(320) // 8 % 5 > 0), "1", "0"), np.where(np.arange(320) // 8 % 4 > 0, "0", "1")
    found = {m.name: m for m in fprd(predicted, labels, "1", mentioned, terms, samples=300).measures}
    assert all(1 < m.low < m.value < m.high < 8 for m in (found["fprd"], found["fprd/script"]))
    one, other = (fprd_tally(said, labels, "1", mentioned, terms).tally for said in (np.where(labels == "1", "1", "0"), predicted))
    compared = {d.name: d for d in tally.differences(one, other)[0]}
    assert all(1 < d.low < d.value < d.high for d in (compared["fprd"], compared["fprd/script"]))


def test_texts_of_one_template_have_one_frame():
    assert frames(["Gay men, GAY!", "african  american men", "Men of Gaytown", "Bold men"], TERMS_OF) == ["_ men, _!", "_ men", "men of gaytown", "bold men"]
    assert frames(["African American men", "african men"], ["african", "african american"]) == ["_ men", "_ men"]  # the longest term that is there
    texts, *_ = templates()
    assert len(set(frames(texts, TERMS_OF))) == 40


def test_intervals_of_templates_draw_whole_frames():
    texts, predicted, labels = templates()
    mentioned, clusters = mentions(texts, TERMS_OF), frames(texts, TERMS_OF)
    found = {m.name: m for m in fprd(predicted, labels, "1", mentioned, TERMS_OF, clusters=clusters, samples=4000).measures}
    alone = {m.name: m for m in fprd(predicted, labels, "1", mentioned, TERMS_OF, samples=4000).measures}
    assert {name: m.value for name, m in found.items()} == pytest.approx({name: m.value for name, m in alone.items()})
    order = np.random.default_rng(1).permutation(240)
    mixed = fprd(np.array(predicted)[order], labels, "1", mentioned[order], TERMS_OF, clusters=np.array(clusters)[order], samples=4000).measures
    assert {m.name: (m.value, m.low, m.high) for m in mixed if m.name != "fprd/shuffled"} == {m.name: pytest.approx((m.value, m.low, m.high)) for m in found.values() if m.name != "fprd/shuffled"}
    drawn = np.random.default_rng(3).integers(0, 40, (2000, 40))
    rates = (np.array(predicted) == "1").reshape(40, 6)[drawn].mean((1, 2)) * 100
    low, high = np.quantile(rates, [0.025, 0.975])
    assert abs(found["fprd/fpr"].low - low) < 0.08 * (high - low) and abs(found["fprd/fpr"].high - high) < 0.08 * (high - low)
    assert found["fprd/fpr"].high - found["fprd/fpr"].low > 1.8 * (alone["fprd/fpr"].high - alone["fprd/fpr"].low)


def test_of_templates_a_figure_rests_on_the_frames_that_have_its_texts():
    texts = ["gay and white men", "gay and deaf men", "a white man", "a deaf man", "old white men", "old deaf men"]  # gay: two texts of one frame
    found = fprd(list("101010"), ["0"] * 6, "1", mentions(texts, TERMS), TERMS, clusters=frames(texts, TERMS)).measures
    assert [m.name for m in found if np.isnan(m.low)] == ["fprd/term/gay"] and found[-3].n == 2
    texts = [f"{term} {word}" for word in ("men", "towns", "food", "hate", "spite", "scorn", "venom") for term in TERMS[:2]]  # of seven frames three are harmless
    labels, mentioned = ["0"] * 6 + ["1"] * 8, mentions(texts, TERMS[:2])
    one, other = (fprd_tally([answer] * 6 + ["1"] * 8, labels, "1", mentioned, TERMS[:2], clusters=frames(texts, TERMS[:2])).tally for answer in "01")
    found = {d.name: (d.value, d.p) for d in tally.differences(one, other)[0]}
    assert found == {"fprd": (0, 1), "fprd/script": (0, 1)} | {f"fprd/{rate}": (100, 0.25) for rate in ("fpr", "term/gay", "term/white")}
    assert [f.units for f in one.figures] == [3, None, 3, 3, 3]


# ---------------------------------------------------------------- through the commands

WORDS = ["guard", "he", "his", "nurse", "she"]  # sorted, as `compare` counts them: resamples are drawn in that order
FRAMES = ["{} is a judge .", "the poet saw {} .", "{} kneads dough .", "a surgeon and {} .", "{} works late .", "it is {} ."]


@pytest.fixture(scope="module")
def answered(small, tmp_path_factory):
    """Two classifiers of labels of their own, and what `evaluate` says of them: a folder with a and b .json and .jsonl."""
    root = tmp_path_factory.mktemp("answered")
    header, *rows = list(csv.reader(small.binary.read_text().splitlines()))
    with open(root / "train.csv", "w", newline="") as file:
        csv.writer(file).writerows([["text", "kind"], *([text, "hate" if i % 3 == 0 else "none"] for i, (text, _) in enumerate(rows))])
    with open(root / "templates.csv", "w", newline="") as file:
        csv.writer(file).writerows([["Text", "bin_label"], *([frame.format(word), i % 4 // 3] for i, frame in enumerate(FRAMES) for word in WORDS)])
    (root / "terms.txt").write_text("\n".join(WORDS) + "\n")
    for seed, name in enumerate("ab"):
        done("downstream", *flags_of(dict(model=small.base, train=root / "train.csv", dev=root / "train.csv", text="text", label="kind", positive="hate", epochs=6, lr=3e-3, seed=seed,
                                          class_weights="hate=2", out=root / name)))
        done("evaluate", root / name, "--on", f"fprd={root / 'train.csv'}", "--on", f"iptts={root / 'templates.csv'}", "--terms", root / "terms.txt", "--seed", 3,
             "--json", root / f"{name}.json", "--examples", root / f"{name}.jsonl")
    return root


def test_templates_with_terms_of_their_own_are_measured_again_with_them(answered, tmp_path):
    """Two files, each beside its terms: the settings name neither for both, the files all."""
    asked = []
    for name, words in (("one", WORDS), ("two", WORDS[:2])):
        (tmp_path / name).mkdir()
        shutil.copy(answered / "templates.csv", tmp_path / name / f"{name}.csv")
        (tmp_path / name / "identity.csv").write_text("\n".join(words) + "\n")
        asked += ["--on", f"iptts={tmp_path / name / name}.csv"]
    done("evaluate", answered / "a", *asked, "--samples", 40, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert "terms" not in found["settings"] and {Path(file).name for file in found["files"]} == {"one.csv", "two.csv", "identity.csv"} and len(found["files"]) == 4
    (tmp_path / "again.toml").write_text(tomli_w.dumps(found["settings"] | {"json": str(tmp_path / "again.json")}))
    done("evaluate", "--config", tmp_path / "again.toml")
    assert json.loads((tmp_path / "again.json").read_text())["measures"] == found["measures"]
    done("evaluate", answered / "a", *asked[:2], "--samples", 40, "--json", tmp_path / "alone.json")
    assert json.loads((tmp_path / "alone.json").read_text())["settings"]["terms"] == str(tmp_path / "one" / "identity.csv")
    done("evaluate", answered / "a", *asked[:2], "--samples", 40, "--terms", tmp_path / "two" / "identity.csv", "--json", tmp_path / "named.json")  # named, so not those beside it
    assert {m["name"] for m in json.loads((tmp_path / "named.json").read_text())["measures"] if "/term/" in m["name"]} == {f"fprd-iptts/term/{word}" for word in WORDS[:2]}
    assert json.loads((tmp_path / "named.json").read_text())["settings"]["terms"] == str(tmp_path / "two" / "identity.csv")


def test_templates_need_no_terms_where_some_lie_beside_them(tmp_path):
    given = dict(labels=("0", "1"), positive="1", neutral=None)
    extrinsic.check_asked("fprd", str(tmp_path / "t.csv"), terms="terms.txt", **given)
    for name in ("fprd", "iptts"):
        with pytest.raises(ConfigError, match=f"^terms: expected a file of identity terms for {name}"):
            extrinsic.check_asked(name, str(tmp_path / "t.csv"), terms=None, **given)
    (tmp_path / "identity.csv").touch()
    extrinsic.check_asked("iptts", str(tmp_path / "t.csv"), terms=None, **given)


def test_templates_with_another_label_are_named_by_their_line(answered, tmp_path):
    (tmp_path / "t.csv").write_text("Text,bin_label\nnurse,0\nguard,2\n")
    said = cli("evaluate", answered / "a", "--on", f"iptts={tmp_path / 't.csv'}", "--terms", answered / "terms.txt")
    assert said.code == 2 and said.err.endswith(f"{tmp_path}/t.csv:3: expected 0 or 1 in column 'bin_label', got '2'\n")


def test_terms_of_both_texts_of_a_pair_are_mentioned():
    examples = [Example("a", "old b", "0", None, "f:1"), Example("young a", "b", "0", None, "f:2"), Example("a", "b", "1", None, "f:3")]
    found = extrinsic._fprd(Answers(examples, ("0", "1"), np.full((3, 2), 0.5), ["0", "0", "1"], []), "1", ["old", "young"], "fprd", "f", Evaluate(model="m", samples=40))
    assert [row["terms"] for row in found.examples] == [["old"], ["young"], []]
    across = [Example("an african", "american food", "0", None, "f:1"), Example("african\namerican food", "b", "0", None, "f:2")]  # a term is of one text
    found = extrinsic._fprd(Answers(across, ("0", "1"), np.full((2, 2), 0.5), ["0", "0"], []), "1", TERMS, "fprd", "f", Evaluate(model="m", samples=40))
    assert [row["terms"] for row in found.examples] == [["american"], ["african american", "american"]]
    with pytest.raises(DataError, match="^f: expected texts without the label '1' that mention an identity term, found none with any of 1: tall$"):
        extrinsic._fprd(Answers(examples, ("0", "1"), np.full((3, 2), 0.5), ["0", "0", "1"], []), "1", ["tall"], "fprd", "f", Evaluate(model="m"))


def rows_of(folder, name, measure):
    return [row for row in map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines()) if row["measure"] == measure]


@pytest.mark.parametrize("measure,positive", [("fprd", "hate"), ("fprd-iptts", "1")])
def test_evaluate_and_compare_measure_what_the_definitions_say(measure, positive, answered):
    """Of templates, what a run calls hateful is 1, and whole frames are drawn."""
    counted = []
    for name in "ab":
        rows = rows_of(answered, name, measure)
        texts, labels, predicted = ([row[key] for row in rows] for key in ("text", "label", "predicted"))
        assert set(predicted) == {positive, "0" if positive == "1" else "none"} and set(labels) == set(predicted)
        likeliest = [max(row["probabilities"], key=row["probabilities"].get) for row in rows]
        assert [p == positive for p in predicted] == [p == "hate" for p in likeliest]
        mentioned, clusters = mentions(texts, WORDS), frames(texts, WORDS) if measure == "fprd-iptts" else None
        expected = {m.name: m for m in fprd(predicted, labels, positive, mentioned, WORDS, clusters=clusters, name=measure, seed=3).measures}
        found = {m["name"]: m for m in json.loads((answered / f"{name}.json").read_text())["measures"] if m["name"].split("/")[0] == measure}
        assert found == {key: m.as_json() for key, m in expected.items()} and found[measure]["value"] > 0
        if clusters:
            assert found[measure]["high"] != fprd(predicted, labels, positive, mentioned, WORDS, name=measure, seed=3).measures[0].high
        counted.append(fprd_tally(predicted, labels, positive, mentioned, WORDS, clusters=clusters, name=measure).tally)
    done("compare", answered / "a.jsonl", answered / "b.jsonl", "--seed", 3, "--json", answered / "d.json")
    (expected,) = [d for d in tally.differences(*counted, seed=3)[0] if d.name == measure]
    (found,) = [d for d in json.loads((answered / "d.json").read_text())["differences"] if d["name"] == measure]
    assert (found["difference"], found["low"], found["high"]) == pytest.approx((expected.value, expected.low, expected.high))


def test_the_floor_shuffles_the_answers_to_negatives_alone():
    """Of two negatives one is wrong and one mentions the term: whichever is wrong, |0 or 1 - 1/2|. The hateful text, taken for hateful, is no part of it."""
    floor = fprd(["1", "0", "1"], ["0", "0", "1"], "1", [[True], [False], [True]], ["gay"]).measures[1]
    assert (floor.name, floor.value, floor.low, floor.high) == ("fprd/shuffled", 0.5, 0.5, 0.5)


def test_a_term_that_a_resample_lacks_counts_as_the_mean_of_the_others():
    counted = fprd_tally(["1", "0", "0"], ["0"] * 3, "1", [[True, False], [False, True], [False, False]], ["gay", "white"])
    texts, negatives, wrong = [4, 2, 0], [4, 2, 0], [1, 2, 0]  # of all, gay, white: FPR 1/4, 1 and none
    assert [figure.value(np.array([*texts, *negatives, *wrong], float)) for figure in counted.tally.figures[:2]] == [1.5, 1.5]  # 3/4 twice


def test_without_hateful_texts_the_scripts_variant_is_the_same():
    predicted, labels, mentioned = world()
    first, _, script, *_ = fprd(predicted[labels == "0"], labels[labels == "0"], "1", mentioned[labels == "0"], TERMS, samples=200).measures
    assert (script.name, script.value, script.low, script.high) == ("fprd/script", first.value, first.low, first.high)


def test_the_floor_is_a_mean_of_shuffles():
    """Of four negatives one is wrong and one mentions the term: |1 - 1/4| for a quarter of the shuffles, else 1/4."""
    floor = fprd(["1", "0", "0", "0"], ["0"] * 4, "1", [[True], [False], [False], [False]], ["gay"], shuffles=4000).measures[1]
    assert floor.value == pytest.approx(0.375, abs=0.02) and (floor.low, floor.high) == (0.25, 0.75)
