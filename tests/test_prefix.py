"""Prefixes read as a proof: keys and values put before each text's own, the MLP that may give them, positions, and equality with peft. What holds for
every method: test_methods.py."""

import pytest
import torch

from peftdebias import patch
from peftdebias.checkpoint import describe_base, load_adapter, save_adapter
from peftdebias.errors import ConfigError, ModelError
from peftdebias.methods import create, prefix
from peftdebias.methods.prefix import PrefixConfig, prefix_mlp_ref

from .outside import (HEAD_WIDTH, HEADS, HIDDEN, LAYERS, POSITIONS, assert_close, assert_equals_peft, assert_spelled_out, attached, batch_for, drawn_model,
                      one_thread, ragged, spelled_out, with_peft)

MLP = ("embedding", "down.weight", "down.bias", "up.weight", "up.bias")


def flat(method):
    """prefix(layer) of a flat module."""
    return lambda i: (method.values[f"layers.{i}.key"], method.values[f"layers.{i}.value"])


def from_mlp(method):
    """prefix(layer) of a re-parametrised module, one row of E at a time and no reshaping by strides."""
    e, w1, b1, w2, b2 = (method.values[name] for name in MLP)

    def prefix(i):
        rows = [w2 @ torch.tanh(w1 @ row + b1) + b2 for row in e]
        parts = [[row[(2 * i + j) * HIDDEN:(2 * i + j + 1) * HIDDEN] for row in rows] for j in (0, 1)]
        return [torch.stack([torch.stack(x.split(HEAD_WIDTH)) for x in part]) for part in parts]

    return prefix


@pytest.mark.parametrize("head", ["mlm", "class"])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("options,spelled", [({}, flat), ({"reparametrised": True, "inner": 11}, from_mlp)], ids=["flat", "reparametrised"])
@pytest.mark.parametrize("positioned", [False, True])
def test_it_is_keys_and_values_before_each_text(positioned, options, spelled, kind, head):
    model = drawn_model(kind)
    method = attached(model, "gender", "prefix", length=5, positioned=positioned, **options)
    assert_spelled_out(model, batch_for(model, head), head, prefix=spelled(method), shift=5 if positioned else 0)


def test_two_stand_end_to_end():
    model = drawn_model()
    one, two = attached(model, "gender", "prefix", 1, length=5), attached(model, "race", "prefix", 2, length=2, reparametrised=True, inner=3)
    first, second = flat(one), from_mlp(two)
    batch = batch_for(model, "mlm")
    assert_spelled_out(model, batch, "mlm", prefix=lambda i: [torch.cat(both) for both in zip(first(i), second(i))])
    with model.without("gender"):
        assert_close(model.mlm_logits(batch), spelled_out(drawn_model(), batch, "mlm", prefix=second))


def test_the_mlp_runs_once_a_forward_and_on_its_own_rows_only(monkeypatch):
    model = drawn_model()
    method = attached(model, "gender", "prefix", length=5, reparametrised=True, inner=11)
    seen = []
    monkeypatch.setattr(prefix, "prefix_mlp_ref", lambda embedding, *rest: seen.append(tuple(embedding.shape)) or prefix_mlp_ref(embedding, *rest))
    patch.train_only(model, method.parameters().values())
    for forwards in (1, 2, 3):
        model.mlm_logits(batch_for(model, "mlm")).square().sum().backward()  # would raise if a graph were used twice
        assert seen == [(5, HIDDEN)] * forwards
        assert method._step is None  # nothing of a step outlives it
    with torch.no_grad():
        before = model.mlm_logits(batch_for(model, "mlm"))
        method.values["embedding"] += 1
        assert (model.mlm_logits(batch_for(model, "mlm")) - before).abs().max() > 1e-3
    for found, expected in zip(method.key_value(2), from_mlp(method)(2), strict=True):  # asked for alone, outside of a forward
        assert_close(found, expected)


def test_its_files_are_flat():
    model = drawn_model()
    method = attached(model, "gender", "prefix", length=5, reparametrised=True, inner=11, positioned=True)
    assert set(method.parameters()) == set(MLP)
    wanted = {f"layers.{i}.{part}": (5, HEADS, HEAD_WIDTH) for i in range(LAYERS) for part in ("key", "value")}
    assert {name: tuple(t.shape) for name, t in method.state().items()} == wanted
    assert method.saved_config() == PrefixConfig(length=5, inner=11, positioned=True)
    assert method.count() == 2 * LAYERS * 5 * HIDDEN < sum(p.numel() for p in method.parameters().values())
    assert set(create("prefix", model.config).parameters()) == set(wanted)


def test_a_saved_mlp_is_loaded_as_what_it_gave(tmp_path):
    model = drawn_model()
    method = attached(model, "gender", "prefix", length=5, reparametrised=True, inner=11)
    save_adapter(tmp_path / "adapter", method, "gender", describe_base(model))
    loaded = load_adapter(tmp_path / "adapter", model).method
    assert loaded.config == PrefixConfig(length=5, inner=11) and not loaded.config.reparametrised
    assert all(loaded.values[name].equal(tensor.float()) for name, tensor in method.state().items()) and len(loaded.values) == 2 * LAYERS


def test_reference_gradients():
    shapes = ((2, 6), (4, 6), (4,), (24, 4), (24,))
    tensors = [torch.randn(*s, dtype=torch.float64, generator=torch.Generator().manual_seed(i)).requires_grad_() for i, s in enumerate(shapes)]
    assert prefix_mlp_ref(*tensors, 3, 2).shape == (2, 2, 2, 3, 2)
    assert torch.autograd.gradcheck(lambda *t: prefix_mlp_ref(*t, 3, 2), tensors)


def test_positions_are_taken_only_when_asked_for():
    model = drawn_model()
    attached(model, "gender", "prefix", length=5)
    longest = batch_for(model, "class", lengths=(POSITIONS,))
    assert model.class_logits(longest).isfinite().all()
    attached(model, "race", "prefix", 2, length=3, positioned=True)
    with pytest.raises(ModelError, match=f"text of {POSITIONS} tokens: expected at most {POSITIONS - 3}"):
        model.class_logits(longest)
    with model.without("race"):
        assert model.class_logits(longest).isfinite().all()


@pytest.mark.parametrize("options,words", [
    ({"length": 0}, "prefix length: expected at least 1, got 0"),
    ({"inner": 0}, "prefix inner: expected at least 1, got 0"),
])
def test_errors(options, words):
    with pytest.raises(ConfigError, match=words):
        create("prefix", drawn_model().config, options=options)


# ---------------------------------------------------------------- peft

@pytest.mark.parametrize("kind,head,projected", [("bert", "mlm", False), ("bert", "class", True), ("roberta", "mlm", True), ("roberta", "class", False)])
def test_equals_peft(kind, head, projected):
    """Theirs shifts the text's positions by the prefix's length: ours, `positioned`, does. As masked-LM it goes through their feature extraction."""
    model = drawn_model(kind)
    options = {"reparametrised": True, "inner": 11} if projected else {}
    method = attached(model, "gender", "prefix", length=5, positioned=True, **options)
    wrapped = with_peft(model, head, "PrefixTuningConfig", num_virtual_tokens=5, prefix_projection=projected, encoder_hidden_size=11,
                        task_type={"mlm": "FEATURE_EXTRACTION", "class": "SEQ_CLS"}[head])
    encoder = wrapped.prompt_encoder["default"]
    if projected:
        partners = (encoder.embedding.weight, *encoder.transform.parameters())
        pairs = {name: (partner, lambda own: own, (method.values[name],)) for name, partner in zip(MLP, partners, strict=True)}
    else:
        layers = [method.values[f"layers.{i}.{part}"] for i in range(LAYERS) for part in ("key", "value")]
        pairs = {"layers": (encoder.embedding.weight, lambda *own: torch.cat([x.flatten(1) for x in own], 1), layers)}
    batch = batch_for(model, head) if head == "class" else ragged()  # their feature extraction drops segment ids
    assert_equals_peft(model, wrapped, pairs, head, batch)


def test_the_mlp_is_drawn_within_one_by_the_root_of_its_inputs_and_run_again_by_every_pass():
    method = create("prefix", drawn_model().config, options={"length": 7, "reparametrised": True, "inner": 300})
    for name in ("down.weight", "up.weight"):
        bound = method.values[name].shape[1] ** -0.5
        assert 0.9 * bound < method.values[name].abs().max() <= bound
    method.key_value(0)  # a pass that broke off here
    with torch.no_grad():
        method.values["embedding"].mul_(2)
    assert torch.equal(method.key_value(0)[0], method._flat()[0][0])
