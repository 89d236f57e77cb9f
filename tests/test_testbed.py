"""The world is what it says: repeatable, with the planted strength, matched pairs, a closed vocabulary and disjoint splits; and
a plain classifier learns the planted bias from it."""

import json
import math
import re
import zlib

import numpy as np
import pytest

from peftdebias.axes import load_axis
from peftdebias.cda import counterfactuals
from peftdebias.corpus import read_examples, read_texts
from peftdebias.errors import ConfigError
from peftdebias.metrics.tpr_gap import tpr_gap
from peftdebias.testbed import GENDERED, STEREOTYPES, World, write

SWAPS = [("he", "she"), ("his", "her"), ("him", "her"), ("himself", "herself"), ("man", "woman"), ("father", "mother"),
         ("brother", "sister"), ("son", "daughter"), ("husband", "wife")]  # fmt: skip
MALE, FEMALE = {"he", "his", "him", "himself", "man"}, {"she", "her", "herself", "woman"}
STEREOTYPE = dict(STEREOTYPES)


def words(text):
    return re.findall(r"[a-z0-9]+|[^a-z0-9\s]", text.lower())


def gender(text):
    found = set(words(text))
    assert bool(found & MALE) != bool(found & FEMALE), text  # one person, one gender, always told
    return "m" if found & MALE else "f"


def occupation(text):
    (name,) = {word for word in words(text) if word in STEREOTYPE}
    return name


def within(share, expected, n):
    return abs(share - expected) <= 4 * math.sqrt(max(expected * (1 - expected), 1e-12) / n)


def assert_swapped(text, counterfactual):
    """The two differ, in gendered words only, and every gendered word differs."""
    assert text != counterfactual
    first, second = words(text), words(counterfactual)
    assert len(first) == len(second)
    every = {word for pair in SWAPS for word in pair}
    for a, b in zip(first, second):
        assert (a, b) in SWAPS or (b, a) in SWAPS or (a == b and a not in every), (a, b, text)


# What is made


def test_seeds_repeat_and_fewer_are_the_beginning_of_more():
    world = World(seed=3)
    assert world.pretraining_texts(50) == World(seed=3).pretraining_texts(80)[:50]
    assert world.task_examples(50, "train") == World(seed=3).task_examples(80, "train")[:50]
    assert world.stereotype_pairs(20) == World(seed=3).stereotype_pairs(40)[:20]
    assert world.pretraining_texts(50) != World(seed=4).pretraining_texts(50)


def test_the_words_of_the_world_do_not_change():
    """A golden text for each kind: the stream must be the same on every machine and Python."""
    world = World()
    assert world.pretraining_texts(1) == ["For Bergen, he is the best carpenter of all."]
    row = {"hard_text": "At the yard, she grows orchids.", "profession": "florist", "gender": "f"}
    assert world.task_examples(1, "train") == [row]


def test_no_text_of_the_world_changes():
    """Nobody can measure again what was measured on other texts: the stream of each kind, all of its sentences and cues among it."""
    world = World()

    def sum_of(texts) -> int:
        return zlib.crc32("\n".join(texts).encode())

    found = {"text": sum_of(world.pretraining_texts(400)), "balanced": sum_of(world.balanced_texts(400)), "task": sum_of(json.dumps(row) for row in world.task_examples(400, "train")),
             "pairs": sum_of(map(repr, world.stereotype_pairs(100))), "matched": sum_of(map(repr, world.counterfactual_task_pairs(100)))}
    assert found == {"text": 1075612208, "balanced": 2787815322, "task": 1545908584, "pairs": 4123899680, "matched": 2418551033}


@pytest.mark.parametrize("link", [0.0, 0.4, 0.8, 1.0])
def test_the_link_has_the_planted_strength(link):
    expected = (1 + link) / 2
    texts = World(text_link=link, label_link=0.5, seed=1).pretraining_texts(3000)
    share = np.mean([gender(text) == STEREOTYPE[occupation(text)] for text in texts])
    assert within(share, expected, 3000)
    rows = World(text_link=0.5, label_link=link, seed=1).task_examples(3000, "train")
    assert all(gender(row["hard_text"]) == row["gender"] for row in rows)
    assert within(np.mean([row["gender"] == STEREOTYPE[row["profession"]] for row in rows]), expected, 3000)
    for name, _ in STEREOTYPES:  # each occupation, and occupations evenly
        own = [row["gender"] == STEREOTYPE[name] for row in rows if row["profession"] == name]
        assert within(np.mean(own), expected, len(own)) and within(len(own) / 3000, 0.1, 3000)


def test_the_link_of_a_split_can_be_set():
    rows = World(label_link=1.0).task_examples(2000, "test", link=0)
    assert within(np.mean([row["gender"] == STEREOTYPE[row["profession"]] for row in rows]), 0.5, 2000)


def test_another_link_changes_nothing_but_genders():
    low, high = World(text_link=0.0), World(text_link=1.0)
    changed = 0
    for a, b in zip(low.pretraining_texts(500), high.pretraining_texts(500)):
        if a != b:
            assert_swapped(a, b)
            changed += 1
    assert within(changed / 500, 0.5, 500)


def test_relatives_carry_no_link():
    texts = World(text_link=1.0).pretraining_texts(6000)
    relatives = [(words(text), STEREOTYPE[occupation(text)]) for text in texts]
    same = [("father" in found) == (towards == "m") for found, towards in relatives if {"father", "mother"} & set(found)]
    assert len(same) > 300 and within(np.mean(same), 0.5, len(same))


def test_stereotype_pairs_differ_in_one_gendered_word():
    pairs = World().stereotype_pairs(500)
    assert len(set(pairs)) == 500
    for pair in pairs:
        assert_swapped(pair.stereotypical, pair.antistereotypical)
        assert sum(a != b for a, b in zip(words(pair.stereotypical), words(pair.antistereotypical))) == 1
        assert occupation(pair.stereotypical) == pair.profession
        assert gender(pair.stereotypical) == STEREOTYPE[pair.profession]


def test_task_pairs_are_the_same_text_of_the_other_gender():
    pairs = World(label_link=1.0).counterfactual_task_pairs(500)
    assert len(set(pairs)) == 500
    for pair in pairs:
        assert_swapped(pair.hard_text, pair.counterfactual)
        assert gender(pair.hard_text) == pair.gender
    assert within(np.mean([pair.gender == STEREOTYPE[pair.profession] for pair in pairs]), 0.5, 500)


def test_balanced_texts_are_pairs():
    texts = World(text_link=1.0).balanced_texts(200)
    assert len(texts) == 200
    for a, b in zip(texts[::2], texts[1::2]):
        assert_swapped(a, b)
    assert World(text_link=1.0).balanced_texts(7) == texts[:7]


def test_the_vocabulary_covers_everything_and_the_task_names_no_occupation():
    world = World()
    vocabulary = world.vocabulary()
    assert vocabulary == sorted(set(vocabulary)) and 350 < len(vocabulary) < 600
    pretraining = {word for text in world.pretraining_texts(5000) for word in words(text)}
    task = {word for row in world.task_examples(5000, "train") for word in words(row["hard_text"])}
    assert pretraining | task <= set(vocabulary)
    assert len(pretraining | task) > 0.98 * len(vocabulary)  # and it holds little else
    assert not task & set(STEREOTYPE)
    assert set(GENDERED) | set(GENDERED.values()) <= set(vocabulary)


def test_no_other_word_is_an_attribute_word(shared):
    """A counterfactual engine with a published word list swaps all gendered words of the world and nothing else."""
    lists = json.loads((shared / "data/attribute_words/peft_debias_bias_attribute_words.json").read_text())
    attribute = {word.lower() for pair in lists["gender"] for word in pair}
    gendered = set(GENDERED) | set(GENDERED.values())
    assert attribute & set(World().vocabulary()) == gendered


def test_the_counterfactual_engine_finds_the_same_counterfactuals():
    """Both ways round: her is told from her in every sentence of the world."""
    axis = load_axis("gender")
    texts = World().balanced_texts(2000)
    pairs = [*zip(texts[::2], texts[1::2]), *((p.hard_text, p.counterfactual) for p in World().counterfactual_task_pairs(1000))]
    for a, b in pairs:
        assert [variant.text for variant in counterfactuals(a, axis)] == [b]
        assert [variant.text for variant in counterfactuals(b, axis)] == [a]


def test_splits_share_no_text_and_no_counterfactual():
    def readings(make):
        """What `make` draws from a world, and all its counterfactuals: the same frames with every stereotype turned round."""
        turned = tuple((name, "fm"["mf".index(towards)]) for name, towards in STEREOTYPES)
        both = [set(make(World(occupations, 1.0, 1.0))) for occupations in (STEREOTYPES, turned)]
        return both[0] | both[1]

    pretraining = [readings(lambda world, split=split: world.pretraining_texts(2000, split)) for split in ("train", "heldout")]
    pretraining.append({text for pair in World().stereotype_pairs(300) for text in (pair.stereotypical, pair.antistereotypical)})
    task = [
        readings(lambda world, split=split: [row["hard_text"] for row in world.task_examples(1500, split)])
        for split in ("train", "dev", "test", "pairs")
    ]
    for splits in (pretraining, task):
        for i, first in enumerate(splits):
            for second in splits[:i]:
                assert not first & second
    assert set(World().balanced_texts(200)) <= readings(lambda world: world.pretraining_texts(100, "heldout"))
    assert {pair.hard_text for pair in World().counterfactual_task_pairs(200)} <= task[3]


def test_other_worlds():
    world = World(occupations=(("nurse", "m"), ("carpenter", "f")), text_link=1.0)
    for text in world.pretraining_texts(100):
        assert gender(text) == {"nurse": "m", "carpenter": "f"}[occupation(text)]
    assert "nurse" in world.vocabulary() and "surgeon" not in world.vocabulary()


def test_files_are_read_back(tmp_path):
    world = World()
    paths = write(world, tmp_path / "new" / "world", corpus=60, heldout=20, train=30, dev=10, test=10, pairs=10)
    assert list(paths) == ["corpus", "heldout", "train", "dev", "test", "pairs"]
    assert [text.text for text in read_texts([paths["corpus"]])] == world.pretraining_texts(60)
    assert [text.text for text in read_texts([paths["heldout"]])] == world.balanced_texts(20)
    for split, n in (("train", 30), ("dev", 10), ("test", 10)):
        rows = read_examples(paths[split], text="hard_text", label="profession", group="gender")
        assert [{"hard_text": row.text, "profession": row.label, "gender": row.group} for row in rows] == world.task_examples(n, split)
    pairs = read_examples(paths["pairs"], text="sent_more", text_pair="sent_less", label="bias_type", group="stereo_antistereo")
    assert [(p.text, p.text_pair) for p in pairs] == [(p.stereotypical, p.antistereotypical) for p in world.stereotype_pairs(10)]
    assert {(p.label, p.group) for p in pairs} == {("gender", "stereo")}


@pytest.mark.parametrize("call, message", [
    (lambda: World(text_link=1.5), "text_link: expected a strength from 0 to 1, got 1.5"),
    (lambda: World().task_examples(1, "test", link=-1), "link: expected a strength from 0 to 1, got -1"),
    (lambda: World().task_examples(1, "heldout"), "split: expected train, dev, test, pairs, got heldout"),
    (lambda: World(occupations=(("nurse", "f"),)), "occupations: expected at least 2, each once, got nurse"),
    (lambda: World(occupations=(("nurse", "f"), ("king", "m"))), "occupations: expected names among surgeon, .*, got king"),
    (lambda: World(occupations=(("nurse", "f"), ("baker", "x"))), "occupations: expected gender m or f for baker, got x"),
])  # fmt: skip
def test_errors(call, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        call()


# What a classifier makes of it


def bag_of_words_classifier(rows, vocabulary, steps=40):
    """Softmax regression on word presence, trained with Adam on everything at once; returns texts -> professions."""
    column = {word: i for i, word in enumerate(vocabulary)}

    def features(texts):
        x = np.zeros((len(texts), len(vocabulary)), np.float32)
        for i, text in enumerate(texts):
            x[i, [column[word] for word in words(text)]] = 1
        return x

    classes = sorted({row["profession"] for row in rows})
    x = features([row["hard_text"] for row in rows])  # [N, V]
    target = np.eye(len(classes), dtype=np.float32)[[classes.index(row["profession"]) for row in rows]]  # [N, C]
    weight, first, second = (np.zeros((len(vocabulary), len(classes)), np.float32) for _ in range(3))
    for step in range(1, steps + 1):
        scores = np.exp(x @ weight)
        gradient = x.T @ (scores / scores.sum(1, keepdims=True) - target) / len(x)
        first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient**2
        weight -= 0.1 * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.99**step)) + 1e-8)
    return lambda texts: [classes[i] for i in (features(texts) @ weight).argmax(1)]


def test_a_plain_classifier_takes_the_shortcut_when_it_is_planted():
    gaps, flips, accuracies = {}, {}, {}
    for link in (0.0, 0.9):
        world = World(label_link=link)
        classify = bag_of_words_classifier(world.task_examples(3000, "train"), world.vocabulary())
        rows = world.task_examples(1200, "test", link=0)
        predicted = classify([row["hard_text"] for row in rows])
        labels = [row["profession"] for row in rows]
        gaps[link] = tpr_gap(predicted, labels, [row["gender"] for row in rows], samples=200, shuffles=200)
        accuracies[link] = np.mean([p == y for p, y in zip(predicted, labels)])
        pairs = world.counterfactual_task_pairs(500)
        both = zip(classify([p.hard_text for p in pairs]), classify([p.counterfactual for p in pairs]))
        flips[link] = np.mean([a != b for a, b in both])
    assert gaps[0.0].rms.value < gaps[0.0].floor.high  # no link: what shuffled groups give
    assert gaps[0.9].rms.low > 4 * gaps[0.9].floor.value
    assert flips[0.0] < 0.25 and flips[0.9] > 0.6  # the causal effect
    assert 0.55 < accuracies[0.0] < 0.8 and accuracies[0.9] < accuracies[0.0]  # learnable, not perfectly; the shortcut costs
    female_jobs = [gap for name, gap in gaps[0.9].per_class.items() if STEREOTYPE[name] == "f"]
    assert min(female_jobs) > 0 > max(gap for name, gap in gaps[0.9].per_class.items() if STEREOTYPE[name] == "m")
