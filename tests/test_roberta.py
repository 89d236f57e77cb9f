"""A RoBERTa from end to end: random weights under the real tokenizer, both phases by the command line, then `load`, `predict` and `fill_mask`.

No real weights could be had. Everything is compared with transformers on the folder that `export --as merged` writes.
"""

import json

import pytest
import torch

import peftdebias
from peftdebias import weights
from peftdebias.encoder import EncoderConfig, Model
from peftdebias.errors import ConfigError
from peftdebias.tokens import load_tokenizer

from .outside import assert_close, library, one_thread  # noqa: F401
from .small import POSITIONS, done, lines

TEXTS = ["The nurse said that he was late.", "she", "A café, “naïve” 🙂 and  two  spaces", "", "<mask> and </s> inside"]
PAIRS = ["He left early.", "", "The doctor thanked her.", "Alone.", "x y z"]


@pytest.fixture(scope="module")
def runs(shared, small, tmp_path_factory):
    """base; up (LoRA, masked-LM); down (labels one text, under up's module); paired (labels two texts, likewise)."""
    out = tmp_path_factory.mktemp("roberta")
    (out / "tokenizer").mkdir()
    (out / "tokenizer" / "tokenizer.json").write_bytes((shared / "data" / "tokenizers" / "roberta-base.json").read_bytes())
    tokenizer = load_tokenizer(out / "tokenizer")
    model = Model(EncoderConfig(kind="roberta", layers=2, hidden=32, heads=2, feed_forward=48, vocab=tokenizer.vocab_size, max_positions=POSITIONS, segments=1,
                                position_offset=2, pad_id=1, norm_eps=1e-5, initializer_range=0.2), mlm=True)
    model.initialize(model, torch.Generator().manual_seed(0))
    base = weights.save_model(model, out / "base", tokenizer)
    done("upstream", *small.learning(model=base, out=out / "up", steps=4))
    done("downstream", *small.task(model=base, adapter=out / "up", out=out / "down", epochs=1))
    paired = {"train": small.paired, "dev": small.paired, "test": small.paired, "text": "first", "text_pair": "second", "label": "same", "group": None}
    done("downstream", *small.task(model=base, adapter=out / "up", out=out / "paired", epochs=1, **paired))
    return out


@pytest.fixture
def merged(runs, tmp_path):
    """name -> (transformers' tokenizer, their model in eval mode) of the run with its module in the weights."""
    transformers = library("transformers")

    def load(name: str, automatic: str):
        done("export", runs / name, "--as", "merged", "--out", tmp_path / name)
        return transformers.AutoTokenizer.from_pretrained(tmp_path / name), getattr(transformers, automatic).from_pretrained(tmp_path / name).eval()
    return load


@torch.no_grad()
@pytest.mark.parametrize("name,pairs", [("down", None), ("paired", PAIRS), ("paired", None)])
def test_predict_equals_transformers(name, pairs, runs, merged):
    tokenizer, model = merged(name, "AutoModelForSequenceClassification")
    loaded = peftdebias.load(runs / name)
    assert loaded.methods == ("gender",) and loaded.run.model.config.kind == "roberta"
    if name == "paired" and pairs is None:
        with pytest.raises(ConfigError, match="paired: the run was trained on text pairs; expected such, got texts alone"):
            loaded.predict(TEXTS)
        del loaded.run.config["text"]  # as a folder that no run trained, which answers both
    found = loaded.predict(TEXTS, pairs)
    assert [f["text"] for f in found] == TEXTS and len({f["probabilities"][f["label"]] for f in found}) == len(TEXTS)
    for i, answer in enumerate(found):
        encoded = tokenizer([TEXTS[i]], None if pairs is None else [pairs[i]], return_tensors="pt")  # lists: with a bare "" they see no pair
        expected = model(**encoded).logits.softmax(-1)[0]
        assert list(answer["probabilities"]) == [model.config.id2label[c] for c in range(len(expected))]
        assert_close(torch.tensor(list(answer["probabilities"].values())), expected, TEXTS[i])
        assert answer["label"] == model.config.id2label[int(expected.argmax())]
    with loaded.without("gender"):
        assert loaded.predict(TEXTS, pairs)[0]["probabilities"] != found[0]["probabilities"]


@torch.no_grad()
@pytest.mark.parametrize("text", ["The nurse said that <mask> was late.", "The nurse said that<mask> was late.", "<mask> left, and <mask> café too<mask>"])
def test_fill_mask_equals_transformers(text, runs, merged):
    tokenizer, model = merged("up", "AutoModelForMaskedLM")
    loaded = peftdebias.load(runs / "up")
    found = loaded.fill_mask(text, top=7)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    places = (ids[0] == tokenizer.mask_token_id).nonzero()[:, 0]
    assert len(found) == len(places) == text.count("<mask>")
    for answers, expected in zip(found, model(ids).logits[0, places].double().softmax(-1)):
        best = expected.topk(7)
        assert [a["id"] for a in answers] == best.indices.tolist() and [a["probability"] for a in answers] == pytest.approx(best.values.tolist(), rel=1e-4)
        assert [a["token"] for a in answers] == [tokenizer.decode([i]) for i in best.indices.tolist()]


def test_the_mask_takes_the_space_before_it(runs):
    """" <mask>" stands for a word with its space: answers are the same with and without, and an answer that begins a word says so by a space."""
    loaded = peftdebias.load(runs / "up")
    apart, close = loaded.fill_mask("He said <mask> left.", top=300), loaded.fill_mask("He said<mask> left.", top=300)
    assert apart == close and any(a["token"].startswith(" ") for a in apart[0]) and any(a["token"][:1].isalpha() for a in apart[0])
    for text in ("He said [MASK] left.", "He said < mask > left."):
        with pytest.raises(ConfigError, match="fill_mask: expected <mask> in the text .*, got none"):
            loaded.fill_mask(text)


@torch.no_grad()
def test_an_exported_pair_classifier_answers_as_the_object_does(runs, tmp_path):
    """Its ids hold pairs, and there is one segment."""
    loaded = peftdebias.load(runs / "paired")
    graph = torch.export.load(loaded.export(tmp_path / "pairs.pt2")).module()
    for encoded, answer in zip(loaded.run.tokenizer.encode(TEXTS, PAIRS), loaded.predict(TEXTS, PAIRS)):
        ids = torch.from_numpy(encoded.ids)[None].long()
        assert_close(graph(ids, torch.ones_like(ids)).softmax(-1)[0], torch.tensor(list(answer["probabilities"].values())))


def test_the_commands_answer_as_the_object_does(runs, small, tmp_path):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"first": a, "second": b}) + "\n" for a, b in zip(TEXTS[:3], PAIRS[:3])))
    done("predict", runs / "paired", tmp_path / "texts.jsonl", "--out", tmp_path / "answers.jsonl")
    found = peftdebias.load(runs / "paired").predict(TEXTS[:3], [p or "" for p in PAIRS[:3]])
    for line, answer in zip(lines(tmp_path / "answers.jsonl"), found, strict=True):
        assert (line["text"], line["label"]) == (answer["text"], answer["label"]) and line["probabilities"] == pytest.approx(answer["probabilities"], abs=1e-6)
    done("evaluate", runs / "up", "--on", f"crows-pairs={small.pairs}", "--on", f"perplexity={small.heldout}")
    done("evaluate", runs / "down", "--on", f"classification={small.test}")
