"""Models in folders, for the tests of what is read from them: a random one saved by us, its tensors changed and stored again, the error's one line.

The fixtures `saved` (both kinds) and `bert` are for files that import them.
"""

import json

import pytest
import safetensors.torch
import torch

from peftdebias.encoder import EncoderConfig, Model
from peftdebias.errors import ModelError
from peftdebias.weights import read_tensors, save_model

from .outside import HIDDEN, LAYERS, VOCAB, randomize

KINDS = ("bert", "roberta")
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def model_of(kind="bert", mlm=True, labels=(), seed=0, **changes) -> Model:
    sizes = dict(kind=kind, layers=LAYERS, hidden=HIDDEN, heads=3, feed_forward=41, vocab=VOCAB, max_positions=53, norm_eps=1e-5,
                 classifier_dropout=0.2, segments=2, pad_id=0, position_offset=0)
    if kind == "roberta":
        sizes |= dict(segments=1, pad_id=1, position_offset=2)
    return randomize(Model(EncoderConfig(**sizes | changes), mlm=mlm, labels=labels), seed).eval()


def tensors_of(model):
    return {name: p.detach() for name, p in model.named_parameters()} | model.carried


def assert_same(one, other):
    assert set(one) == set(other)
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


def store(folder, tensors):
    """The tensors in a folder beside its config.json, as one safetensors file; in the place of one that may still be mapped into memory."""
    safetensors.torch.save_file({name: t.clone().contiguous() for name, t in tensors.items()}, folder / "new")
    (folder / "new").replace(folder / "model.safetensors")


def edit_config(folder, **changes):
    """Keys of config.json set, or removed with None."""
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


@pytest.fixture(params=KINDS)
def saved(request, tmp_path):
    """(folder, model, its tensors by their names)."""
    model = model_of(request.param)
    save_model(model, tmp_path)
    return tmp_path, model, read_tensors(tmp_path)


@pytest.fixture
def bert(tmp_path):
    model = model_of()
    save_model(model, tmp_path)
    return tmp_path, model, read_tensors(tmp_path)


def word_table(tensors):
    return next(t for name, t in tensors.items() if name.endswith("word_embeddings.weight"))


def head(tensors):
    """(where the decoder is, where the bias of the masked-LM head is)."""
    return ("lm_head.decoder", "lm_head.bias") if "lm_head.bias" in tensors else ("cls.predictions.decoder", "cls.predictions.bias")


def stored_decoder(tensors):
    return tensors | {head(tensors)[0] + ".weight": word_table(tensors)}


def message(call):
    """The ModelError's message; it must be one line."""
    with pytest.raises(ModelError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)
