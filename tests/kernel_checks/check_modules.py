"""The modules with their kernels in place: one upstream step of a small model, loss and every gradient, against the same model on the plain twins."""

import dataclasses

import pytest
import torch

from peftdebias import kernels, methods, patch
from peftdebias.batches import Sample, pack
from peftdebias.encoder import EncoderConfig, Model
from peftdebias.methods.sparse import Sparse, SparseConfig
from peftdebias.tasks import Classification, MaskedLM

from .harness import DEVICE

CONFIG = EncoderConfig(kind="bert", layers=2, hidden=28, heads=2, feed_forward=37, vocab=61, max_positions=19, dropout=0.0, attention_dropout=0.0, classifier_dropout=0.0)
MINE = {"adapter", "dropout", "embed", "gelu", "mlm_loss", "norm", "sparse_add"}


@pytest.fixture
def placed(monkeypatch):
    """Puts the kernels named in MINE to work wherever the model runs, and counts what is called."""
    called, choose = [], kernels.choose

    def fused(op, reference, device=None, width=1):
        if op not in MINE:
            return choose(op, reference, device, width)
        called.append(op)
        with kernels.use("triton"):
            return choose(op, reference, device, width)

    return called, lambda: monkeypatch.setattr(kernels, "choose", fused), monkeypatch.undo


def batch():
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(5, 61, (n,), generator=generator).numpy() for n in (13, 1, 7)]
    return pack([Sample(ids, ids[:2] * 0 + range(len(ids[:2])), ids[:2]) for ids in texts]).to(DEVICE)


def made(method, config: EncoderConfig = CONFIG) -> tuple[Model, dict]:
    model = Model(config, mlm=True, labels=("a", "b", "c")).to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in [*model.parameters(), *method.parameters().values()]:
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    patch.attach(model, "gender", method)
    return model, method.parameters()


def sparse() -> Sparse:
    method, generator = Sparse(SparseConfig(k=90), CONFIG), torch.Generator().manual_seed(5)
    sites = ("embeddings.word", "layers.0.attention.query", "layers.1.attention.value.bias", "layers.1.feed_forward.down")
    for site, k in zip(sites, (50, 20, 5, 15)):
        size = patch.parameter_at(Model(CONFIG), site)[1][patch.parameter_at(Model(CONFIG), site)[2]].numel()
        method.indices[site] = torch.randperm(size, generator=generator)[:k].sort().values
        method.values[site] = torch.nn.Parameter(torch.zeros(k))
    return method


METHODS = {
    "pfeiffer": lambda: methods.create("adapter", CONFIG, options={"architecture": "pfeiffer", "bottleneck": 7}),
    "houlsby": lambda: methods.create("adapter", CONFIG, options={"architecture": "houlsby", "bottleneck": 7}),
    "parallel": lambda: methods.create("adapter", CONFIG, options={"architecture": "parallel", "bottleneck": 7, "activation": "gelu"}),
    "sparse": sparse,
}


def test_float64_goes_to_the_twins(placed):
    called, place, undo = placed
    place()
    for make in METHODS.values():
        model, _ = made(make())
        loss = MaskedLM.loss(None, model.double(), batch())
        assert loss.dtype == torch.float64 and loss.isfinite()
    undo()
    assert not called


@pytest.mark.parametrize("name,used", [("pfeiffer", "adapter"), ("houlsby", "adapter"), ("parallel", "adapter"), ("sparse", "sparse_add")])
@pytest.mark.parametrize("frozen", [False, True], ids=["upstream", "downstream"])
def test_one_step_is_the_same(placed, name, used, frozen):
    """upstream: the module learns, the base is frozen; downstream: the other way round, with class weights."""
    called, place, undo = placed

    def step():
        model, parameters = made(METHODS[name]())
        wanted = dict(model.named_parameters()) if frozen else parameters
        patch.train_only(model, wanted.values())
        model.train()
        asked = batch()
        if frozen:
            weights = torch.tensor([1.0, 6.7, 10.0])
            task = type("Task", (), {"weights": weights})()
            first = pack([Sample(ids.numpy(), ids[:1].numpy() * 0, ids[:1].numpy() % 3) for ids in asked.ids.cpu().split(asked.lengths)]).to(DEVICE)
            loss = Classification.loss(task, model, first)
        else:
            loss = MaskedLM.loss(None, model, asked)
        loss.backward()
        return loss.detach(), {n: p.grad for n, p in wanted.items() if p.grad is not None}

    loss, gradients = step()
    place()
    found, others = step()
    undo()
    assert {"embed", "mlm_loss", "norm", "gelu", used} <= set(called)
    torch.testing.assert_close(found, loss, rtol=2e-6, atol=0)
    assert set(gradients) == set(others) and len(gradients) >= 4
    for key, gradient in gradients.items():
        assert (others[key] - gradient).abs().max() <= 2e-5 * max(gradient.abs().max(), 1e-3), key


@pytest.mark.parametrize("trained", ["module", "base", "biases"])
def test_one_step_with_dropout_is_the_same(placed, trained):
    """The same seed is the same mask at every place, in the norms' kernels and the twins. biases: of norms and linears alone, whose sums have no gains beside them."""
    called, place, undo = placed

    def step():
        model, parameters = made(METHODS["pfeiffer"](), dataclasses.replace(CONFIG, dropout=0.3, attention_dropout=0.3))
        base = dict(model.encoder.named_parameters())
        wanted = {"module": parameters, "base": base, "biases": {n: p for n, p in base.items() if n.endswith("bias")}}[trained]
        patch.train_only(model, wanted.values())
        model.train()
        torch.manual_seed(11)
        loss = MaskedLM.loss(None, model, batch())
        loss.backward()
        return loss.detach(), {n: p.grad for n, p in wanted.items() if p.grad is not None}

    loss, gradients = step()
    place()
    found, others = step()
    undo()
    assert {"dropout", "embed", "gelu", "norm"} <= set(called)
    torch.testing.assert_close(found, loss, rtol=2e-6, atol=0)
    assert set(gradients) == set(others) and len(gradients) >= 4
    for key, gradient in gradients.items():
        assert (others[key] - gradient).abs().max() <= 2e-5 * max(gradient.abs().max(), 1e-3), key


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("prompt", [False, True], ids=["", "prompt"])
def test_the_whole_encoder_is_the_same(kind, prompt, monkeypatch):
    """Hidden states of all tokens and every gradient of the base, tables among them. Vectors before the texts stand between the look-ups and the norm: then each is an op of its
    own."""
    config = dataclasses.replace(CONFIG, kind=kind, position_offset=2 if kind == "roberta" else 0, dropout=0.3, attention_dropout=0.3)
    called, choose = [], kernels.choose
    monkeypatch.setattr(kernels, "choose", lambda op, *a, **k: called.append(op) or choose(op, *a, **k))
    asked, found = batch(), []
    asked = dataclasses.replace(asked, segments=asked.positions % 2)
    for implementation in ("torch", "triton"):
        model, _ = made(methods.create("prompt" if prompt else "lora", config, options={"length": 2} if prompt else {"rank": 2}), config)
        patch.train_only(model, model.encoder.parameters())
        model.train()
        torch.manual_seed(11)
        with kernels.use(implementation):
            hidden = model.encoder(asked, all_rows=True)
            pull = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(7)).to(DEVICE)
            hidden.backward(pull)
        found.append({"hidden states": hidden.detach()} | {n: p.grad for n, p in model.encoder.named_parameters()})
        assert ("embed" in called) is not prompt and ("dropout" in called) is prompt
        called.clear()
    twin, mine = found
    for name, expected in twin.items():
        assert expected.any(), name
        assert (mine[name] - expected).abs().max() <= 2e-5 * expected.abs().max(), name


def test_a_compiled_step_writes_weights_by_kernels_that_nobody_has_asked_for_yet(monkeypatch):
    """LoRA's W' is made while torch.compile traces, and what is registered meanwhile it would not see."""
    from peftdebias.step import Compiled, Step
    from peftdebias.training import Schedule, make_optimizer

    kernels.load(torch.device("cuda"))
    there = {key: f for key, f in kernels._registry.items() if key[1] == "triton"}
    monkeypatch.setattr(kernels, "_registry", {key: f for key, f in kernels._registry.items() if key not in there})
    monkeypatch.setattr(kernels, "_load", lambda file: kernels._registry.update({key: f for key, f in there.items() if kernels.TRITON[key[0]] == file}))
    found = []
    with kernels.use("triton"):
        for kind in (Compiled, Step):
            model, parameters = made(methods.create("lora", CONFIG, options={"rank": 2}))
            patch.train_only(model, parameters.values())
            model.train()
            more = {"backend": "eager"} if kind is Compiled else {}
            step = kind(model, type("Task", (), {"loss": lambda self, model, batch: MaskedLM.loss(None, model, batch)})(), make_optimizer(parameters, Schedule(steps=1, lr=0.1)), parameters, clip=1e9, **more)
            found.append((step.gradients(batch()), *(p.grad for p in parameters.values())))
    assert len(found[0]) == 1 + 4 * CONFIG.layers and all(g.any() for g in found[0])
    for mine, eager in zip(*found):
        torch.testing.assert_close(mine, eager, rtol=1e-5, atol=1e-6)
