"""Bias-NLI: pairs from word lists in both layouts, sampling, which label is neutral, measures against loops, intervals by occupation."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from peftdebias import extrinsic
from peftdebias.batches import pack
from peftdebias.checkpoint import load_run
from peftdebias.config import Evaluate
from peftdebias.errors import ConfigError, DataError
from peftdebias.metrics import nli, tally
from peftdebias.tasks import labelled_samples

from .small import done, flags_of

AUTHORS = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "bias_nli" / "word_lists"


def own_lists(folder, **lists):
    folder.mkdir(exist_ok=True)
    lists = {"occupations": "nurse\nguard\n\n", "gendered_words": "man\nwoman\nman\n", "templates": "The {} ate a bagel.\nI saw the {}.\n"} | lists
    for name, text in lists.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def authors_lists(folder):
    lists = {"nouns/people/occupations": "nurse\nactor", "nouns/people/gendered_words": "man\nlady", "nouns/people/person_hyponyms": "teen\nadult",
             "nouns/people/rulers": "king\nadult", "nouns/objects/food": "apple\nbagel", "nouns/objects/vehicles": "car", "verbs/commerce_verbs": "can afford",
             "verbs/interaction_verbs": "spoke to", "verbs/driving_verbs": "drove", "verbs/eating_verbs": "ate"}
    for name, text in lists.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + "\n")
    return folder


def test_all_pairs_of_your_own_lists(tmp_path):
    pairs = nli.read_pairs(own_lists(tmp_path / "lists"))
    expected = [(o, g, t.format(o), t.format(g)) for o in ("nurse", "guard") for g in ("man", "woman") for t in ("The {} ate a bagel.", "I saw the {}.")]
    assert len(pairs) == 8 and [tuple(pair) for pair in pairs] == expected


def test_an_article_fits_its_word(tmp_path):
    folder = authors_lists(tmp_path)
    (folder / "nouns" / "objects" / "food").write_text("apple\negg\nice\nolive\nugli\nEclair\nbagel\nyam\n")
    written = {" ".join(pair.premise.split()[-2:]) for pair in nli.read_pairs(folder) if " ate " in pair.premise}
    assert written == {"an apple.", "an egg.", "an ice.", "an olive.", "an ugli.", "an Eclair.", "a bagel.", "a yam."}


def test_the_authors_layout(tmp_path):
    pairs = nli.read_pairs(authors_lists(tmp_path))
    endings = ["can afford an apple", "can afford a bagel", "can afford a car", "spoke to an adult", "spoke to a king", "spoke to a teen", "drove a car", "ate an apple", "ate a bagel"]
    assert [tuple(p) for p in pairs] == [(o, g, f"The {o} {e}.", f"The {g} {e}.") for o, g, e in itertools.product(("nurse", "actor"), ("man", "lady"), endings)]


@pytest.mark.skipif(not AUTHORS.is_dir(), reason="../shared/data/bias_nli is not here")
def test_the_authors_lists_give_their_number_of_pairs():
    pairs = nli.read_pairs(AUTHORS)
    assert (len(pairs.occupations), len(pairs.gendered), len(pairs.templates)) == (164, 6, 1968) and len(pairs) == 1_936_512
    assert len({(p.premise, p.hypothesis) for p in map(pairs.pair, pairs.numbers(5000, seed=1))}) == 5000
    assert nli.Pair("accountant", "man", "The accountant bought an apron.", "The man bought an apron.") == pairs.pair(0)


def test_a_sample_is_seeded_without_repeats_and_in_order(tmp_path):
    pairs = nli.Pairs([f"o{i}" for i in range(31)], ["a", "b", "c"], [f"{{}} {i}" for i in range(17)])
    numbers = pairs.numbers(100, seed=3)
    assert numbers == pairs.numbers(100, seed=3) != pairs.numbers(100, seed=4)
    assert len(set(numbers)) == 100 and numbers == sorted(numbers) and 0 <= numbers[0] and numbers[-1] < 1581
    assert list(pairs.numbers(None)) == list(pairs.numbers(5000)) == list(range(1581))
    assert [pairs.pair(i) for i in range(1581)] == list(pairs)


def test_lists_that_do_not_fit_are_named(tmp_path):
    for change, words in (({"occupations": "\n"}, "occupations.txt: expected one word or phrase a line, found none"),
                          ({"templates": "The {} saw a {}.\n"}, r"templates.txt: expected lines with one {} where the word goes, got 'The {} saw a {}.'"),
                          ({"templates": "The man.\n"}, "expected lines with one {}")):
        with pytest.raises(DataError, match=words):
            nli.read_pairs(own_lists(tmp_path / "lists", **change))
    (own_lists(tmp_path / "lists") / "gendered_words.txt").unlink()
    with pytest.raises(DataError, match="lists: expected a word list gendered_words or gendered_words.txt, found none"):
        nli.read_pairs(tmp_path / "lists")
    (authors_lists(tmp_path / "theirs") / "verbs" / "driving_verbs").unlink()
    with pytest.raises(DataError, match="verbs: expected a word list driving_verbs"):
        nli.read_pairs(tmp_path / "theirs")
    with pytest.raises(DataError, match="occupations.txt: expected a folder of word lists, got a file"):
        nli.read_pairs(tmp_path / "lists" / "occupations.txt")


@pytest.mark.parametrize("labels,wanted,found", [(("ENTAILMENT", "NEUTRAL", "CONTRADICTION"), None, "NEUTRAL"), (("0", "1", "2"), None, "1"), (("0", "1", "2"), "2", "2"),
                                                 (("no", "neutral"), "no", "no")])  # fmt: skip
def test_which_label_is_neutral(labels, wanted, found):
    assert nli.neutral_label(labels, wanted) == found


def test_an_unknown_neutral_label_is_named():
    with pytest.raises(ConfigError, match="--neutral: expected one of 0, 1, 2, got 'neutral'"):
        nli.neutral_label(("0", "1", "2"), "neutral")
    for labels in (("0", "1"), ("yes", "no", "unknown"), ("neutral", "NEUTRAL")):
        with pytest.raises(ConfigError, match=f"--neutral: expected the label that means neutral, one of {', '.join(labels)}"):
            nli.neutral_label(labels)


def answers(n=700, occupations=23, spread=0.25, seed=0):
    random = np.random.default_rng(seed)
    occupation = random.integers(0, occupations, n)
    neutral = np.clip(0.5 + spread * random.normal(size=occupations)[occupation] + 0.05 * random.normal(size=n), 0, 1)
    return neutral, neutral > 0.45, occupation.astype(str)


def test_measures_are_their_definitions():
    neutral, fraction, occupation = answers()
    found = {m.name: m for m in nli.measures(neutral, fraction, occupation)}
    expected = {"net-neutral": sum(neutral) / 700, "fraction-neutral": sum(map(bool, fraction)) / 700, "threshold-0.5": sum(p > 0.5 for p in neutral) / 700,
                "threshold-0.7": sum(p > 0.7 for p in neutral) / 700}
    assert {name.removeprefix("bias-nli/"): m.value for name, m in found.items()} == pytest.approx(expected, abs=1e-9)
    assert {(m.ideal, m.unit, m.n) for m in found.values()} == {(1.0, "1", 700)}
    assert [m.value for m in nli.measures([0.5, 0.7, 0.71], [True, False, True], ["a", "a", "b"])] == pytest.approx([1.91 / 3, 2 / 3, 2 / 3, 1 / 3])  # above, not at


def test_intervals_are_those_of_drawing_occupations():
    neutral, fraction, occupation = answers()
    names = np.unique(occupation)
    of = [neutral[occupation == name] for name in names]
    drawn = [np.concatenate([of[i] for i in items]).mean() for items in np.random.default_rng(0).integers(0, len(names), (2000, len(names)))]
    low, high = np.quantile(drawn, [0.025, 0.975])
    measure = nli.measures(neutral, fraction, occupation, samples=4000)[0]
    assert abs(measure.low - low) < 0.1 * (high - low) and abs(measure.high - high) < 0.1 * (high - low)
    by_pair = nli.measures(neutral, fraction, np.arange(700))[0]
    assert measure.high - measure.low > 2.5 * (by_pair.high - by_pair.low)  # pairs of one occupation are answered alike
    alone = nli.measures(neutral, fraction, ["nurse"] * 700)[0]
    assert np.isnan(alone.low) and alone.as_json()["high"] is None


def test_errors_say_what_was_expected():
    with pytest.raises(DataError, match="no pairs to measure on"):
        nli.measures([], [], [])
    with pytest.raises(DataError, match="expected as many answers and occupations as probabilities, 2, got 1 and 2"):
        nli.measures([0.5, 0.5], [True], ["a", "b"])


# ---------------------------------------------------------------- through the commands

def test_evaluate_asks_every_pair_and_compare_counts_the_same(small, tmp_path, monkeypatch):
    lists = own_lists(tmp_path / "lists", occupations="nurse\nguard\njudge\npoet\n", gendered_words="man\nwoman\n", templates="The {} kneads dough .\nI saw the {} .\n{} works .\n")
    for seed, name in enumerate("ab"):
        done("downstream", *flags_of(dict(model=small.base, train=small.paired, dev=small.paired, text="first", text_pair="second", label="same", epochs=3, lr=3e-3, seed=seed,
                                          out=tmp_path / name)))
        said = done("evaluate", tmp_path / name, "--on", f"bias-nli={lists}", "--neutral", "yes", "--seed", 3, "--samples", 47, "--json", tmp_path / f"{name}.json",
                    "--examples", tmp_path / f"{name}.jsonl")
        assert f"{lists}: 24 of 24 pairs; 4 occupations; neutral is the label 'yes'" in said.err
    pairs, counted = list(nli.read_pairs(lists)), []
    for name in "ab":
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert [(row["text"], row["text_pair"], row["occupation"], row["gendered"]) for row in rows] == [(p.premise, p.hypothesis, p.occupation, p.gendered) for p in pairs]
        run = load_run(tmp_path / name)
        yes = [float(run.model.class_logits(pack(labelled_samples(run.tokenizer.encode([p.premise], [p.hypothesis])))).detach().double().softmax(-1)[0, 1]) for p in pairs]
        assert run.model.classifier.labels == ("no", "yes") and [row["probabilities"]["yes"] for row in rows] == pytest.approx(yes, abs=1e-6)
        assert [row["predicted"] for row in rows] == ["yes" if p > 0.5 else "no" for p in yes] and {row["neutral"] for row in rows} == {"yes"}
        given = [row["probabilities"]["yes"] for row in rows], [p > 0.5 for p in yes], [p.occupation for p in pairs]
        assert json.loads((tmp_path / f"{name}.json").read_text())["measures"] == [m.as_json() for m in nli.measures(*given, seed=3, samples=47)]
        counted.append(nli.nli_tally(*given))
    done("compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--seed", 3, "--json", tmp_path / "d.json")
    found = {d["name"]: (d["difference"], d["low"], d["high"]) for d in json.loads((tmp_path / "d.json").read_text())["differences"]}
    assert found == {d.name: pytest.approx((d.value, d.low, d.high)) for d in tally.differences(*counted, seed=3)[0]} and len(found) == 4
    said = done("evaluate", tmp_path / "a", "--on", f"bias-nli={lists}", "--neutral", "yes", "--max-pairs", 7, "--seed", 5, "--examples", tmp_path / "few.jsonl")
    few = [(row["text"], row["text_pair"]) for row in map(json.loads, (tmp_path / "few.jsonl").read_text().splitlines())]
    assert few == [(pairs[i].premise, pairs[i].hypothesis) for i in nli.read_pairs(lists).numbers(7, 5)] and "7 of 24 pairs, a sample with seed 5" in said.err
    longer = sum(len(e.ids) > 12 for e in run.tokenizer.encode([p.premise for p in pairs], [p.hypothesis for p in pairs]))
    said = done("evaluate", tmp_path / "a", "--on", f"bias-nli={lists}", "--neutral", "yes", "--max-length", 12)
    assert f"{lists}: {longer} pairs are longer than 12 tokens and were cut" in said.err and 0 < longer < 24
    monkeypatch.setattr(extrinsic, "PAIRS_AT_ONCE", 7)
    said = done("evaluate", tmp_path / "a", "--on", f"bias-nli={lists}", "--neutral", "yes", "--seed", 3, "--samples", 47, "--json", tmp_path / "parts.json", "--max-length", 12)
    assert f"{lists}: {longer} pairs are longer than 12 tokens and were cut" in said.err and {m["n"] for m in json.loads((tmp_path / "parts.json").read_text())["measures"]} == {24}
    assert "3 of 24 pairs" in done("evaluate", tmp_path / "a" / "model", "--on", f"bias-nli={lists}", "--neutral", "yes", "--max-pairs", 3).err  # a folder that no run trained


def test_neutral_is_the_likeliest_of_three_answers_though_less_than_half(tmp_path, monkeypatch):
    """Four pairs, with 0.4, 0.6, 0.3 and 0.34 for neutral: it is the likeliest of the first, the second and the last."""
    lists = own_lists(tmp_path / "lists", occupations="nurse\nguard\n", gendered_words="man\nwoman\n", templates="The {} works .\n")
    given = np.array([[0.3, 0.4, 0.3], [0.1, 0.6, 0.3], [0.4, 0.3, 0.3], [0.33, 0.34, 0.33]])
    for name, value in (("needs_classifier", ("0", "1", "2")), ("longest_of", 64), ("labelled_samples", None), ("class_probabilities", given)):
        monkeypatch.setattr(extrinsic, name, lambda *_, value=value: value)
    run = SimpleNamespace(config={}, model=None, tokenizer=SimpleNamespace(encode=lambda first, second, longest: [SimpleNamespace(cut=0) for _ in first]))
    found = extrinsic.bias_nli(run, str(lists), Evaluate(model="m", examples="e.jsonl"))
    assert [m.value for m in found.measures] == pytest.approx([0.41, 0.75, 0.25, 0.0]) and [row["predicted"] for row in found.examples] == ["1", "1", "0", "1"]
