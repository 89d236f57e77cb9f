"""Frozen matrices in bf16 while a bf16 training runs: which may be, that they come back, and that the step is the float32 step rounded."""

import importlib

import pytest
import safetensors
import torch

from peftdebias import patch
from peftdebias import lowered as lowered_file
from peftdebias.encoder import Model
from peftdebias.lowered import lowered, may_be_lowered
from peftdebias.training import Schedule, train
from peftdebias.weights import save_model

from .outside import HIDDEN, VOCAB, one_thread  # noqa: F401
from .steps import MODULES, Masked, batch_for, made


def test_what_a_merge_replaced_is_not_made_bf16():
    """Unmerging would give back what was rounded."""
    model = made("ia3").model
    patch.train_only(model, ())
    patch.merge(model)
    replaced = {id(parameter) for parameter, _, _ in model.encoder.hooks.merged.tensors}
    lowerable = set(map(id, may_be_lowered(model)))
    assert replaced and lowerable and not replaced & lowerable


def test_what_is_no_float32_is_left_alone():
    model = made("adapter").model
    assert may_be_lowered(model) and not may_be_lowered(model.double())


@pytest.mark.parametrize("name,stays", [("lora", {"qkv.weight"}), ("adapter", set()), ("bias", {"bias"})])
def test_frozen_matrices_are_bf16_while_they_may_be(name, stays):
    step = made(name)
    names = {id(p): n for n, p in step.model.named_parameters()}
    before = {n: p.detach().clone() for n, p in step.model.named_parameters()}
    chosen = {names[id(p)] for p in may_be_lowered(step.model)}
    assert not any("norm" in n or n == "mlm.bias" for n in chosen) and "encoder.embeddings.word.weight" in chosen
    linears = {f"{n}.{kind}" for n, m in step.model.named_modules() if isinstance(m, torch.nn.Linear) for kind in ("weight", "bias")}
    kept = {n for n in linears - chosen}
    assert kept == {n for n in linears if "encoder." in n and any(n.endswith(s) for s in stays)}, kept
    with pytest.raises(KeyError), lowered(step.model):
        assert {n for n, p in step.model.named_parameters() if p.dtype == torch.bfloat16} == chosen
        raise KeyError
    assert all(torch.equal(p, before[n]) and p.dtype == torch.float32 for n, p in step.model.named_parameters())


def test_matrices_that_could_not_all_be_bf16_are_put_back(monkeypatch):
    """No memory for the last of them, say."""
    step = made("lora")
    before = {n: p.detach().clone() for n, p in step.model.named_parameters()}
    monkeypatch.setattr(lowered_file, "widen", lambda parameter: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError), lowered(step.model):
        raise AssertionError("the block does not run")
    assert all(torch.equal(p, before[n]) and p.dtype == torch.float32 for n, p in step.model.named_parameters())


@pytest.mark.parametrize("name", ["lora", "adapter", "prefix"])
def test_a_bf16_step_is_the_float32_step_rounded(name):
    found = []
    for precision in ("float32", "bf16"):
        step = made(name, precision=precision)
        torch.manual_seed(3)
        with lowered(step.model) if precision == "bf16" else torch.enable_grad():
            loss = step.gradients(batch_for(name))
        found.append((float(loss), torch.cat([p.grad.flatten() for p in step.parameters])))
        assert found[-1][1].dtype == torch.float32
    assert found[1][0] == pytest.approx(found[0][0], rel=2e-2) and found[1][0] != found[0][0]
    assert torch.nn.functional.cosine_similarity(found[0][1], found[1][1], 0) > 0.98


@pytest.mark.parametrize("tied", [True, False])
def test_a_lowered_decoder_is_not_padded_in_every_step(tied, monkeypatch, tmp_path):
    """The path of a GPU, here on a CPU: the same bits as with a copy in every step, and files without the rows behind it."""
    step, batch, room, pads, found = made("lora", precision="bf16"), batch_for("lora"), importlib.import_module("peftdebias.ops.scores"), [], []
    if not tied:
        step.model.mlm.decoder = torch.nn.Linear(HIDDEN, VOCAB, bias=False).requires_grad_(False)
    decoder, pad = step.model.mlm_decoder()[0], room.F.pad
    before, place = decoder.detach().clone(), decoder.data_ptr()
    monkeypatch.setattr(room, "_widens", lambda *_: True)
    with lowered(step.model):
        wide = room.wider(decoder, torch.bfloat16)
        assert len(wide.matrix) == 128 and torch.equal(wide.matrix[:VOCAB], before.bfloat16()) and not wide.matrix[VOCAB:].any()
        assert [p is decoder for p in step.model.parameters() if p in room._wider] == [True]
        save_model(step.model, tmp_path)
        with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
            saved = file.get_tensor("bert.embeddings.word_embeddings.weight" if tied else "cls.predictions.decoder.weight")
        assert torch.equal(saved, before.bfloat16())
        monkeypatch.setattr(room.F, "pad", lambda tensor, *more: pads.append(tensor.shape) or pad(tensor, *more))
        for times in (0, 1):
            torch.manual_seed(3)
            found.append([step.gradients(batch), *(p.grad.clone() for p in step.parameters)])
            assert pads.count(decoder.shape) == times
            room.narrow(decoder)
    assert all(torch.equal(a, b) for a, b in zip(*found)) and torch.equal(decoder, before) and decoder.data_ptr() == place


def test_behind_the_block_nothing_keeps_the_wider_memory():
    step, room = made("lora"), importlib.import_module("peftdebias.ops.scores")
    with lowered(step.model):
        assert step.model.mlm_decoder()[0] in room._wider
    assert step.model.mlm_decoder()[0] not in room._wider


class Scored(Masked):
    """Batches and a validation beside the loss, as train takes them."""

    metric, higher_is_better = "loss", False

    def __init__(self, name: str):
        self.batch = batch_for(name)

    def epoch(self, number):
        return [self.batch] * 2

    def validate(self, model):
        before = model.training
        with torch.no_grad():
            loss = self.loss(model.eval(), self.batch)
        model.train(before)
        return {"loss": float(loss)}


@pytest.mark.parametrize("name", [*MODULES, "sparse"])
def test_a_bf16_training_validates(name):
    """Frozen matrices are bf16 and other parameters float32 while it lasts; a validation has to go through with that, before the first step too."""
    step = made(name, options={"k": 40} if name == "sparse" else None)
    parameters = step.model.methods["gender"].parameters()
    losses = [train(step.model, Scored(name), parameters, Schedule(steps=3, lr=lr, validate_every=2, precision=precision)).before["loss"]
              for lr, precision in ((0.0, "float32"), (1e-2, "bf16"))]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2) and losses[1] != losses[0]


def test_base_parameters_that_are_trained_stay_float32():
    step = made(None)
    assert isinstance(step.model, Model) and may_be_lowered(step.model) == []
