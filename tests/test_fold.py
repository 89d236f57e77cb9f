"""Folding is exact: training W' = W + D under a frozen D is training W, and weight decay has to act on W' - D for that."""

import dataclasses

import numpy
import pytest
import torch
import torch.nn.functional as F

from peftdebias import methods, patch
from peftdebias.batches import Sample, pack
from peftdebias.encoder import EncoderConfig, Model
from peftdebias.training import Schedule, train

from . import toys

TINY = EncoderConfig(kind="bert", layers=2, hidden=14, heads=2, feed_forward=37, vocab=61, max_positions=19, dropout=0.0, attention_dropout=0.0,
                     classifier_dropout=0.0)
STEPS = 50


class Task:
    """Fixed random batches of labelled texts, and a validation that prefers the last step."""

    metric, higher_is_better = "age", True

    def __init__(self):
        self.seen = 0

    def epoch(self, number):
        generator = numpy.random.default_rng(number)
        for _ in range(10):
            yield pack([Sample(generator.integers(5, 61, n), numpy.array([0]), generator.integers(0, 3, 1)) for n in (13, 1, 7)])

    def loss(self, model, batch):
        return F.cross_entropy(model.class_logits(batch), batch.targets)

    def validate(self, model):
        self.seen += 1
        return {"age": self.seen}


MODULES = {
    "two LoRAs": (("gender", "lora", {"rank": 3}), ("race", "lora", {"rank": 2, "targets": ("query", "output", "down")})),
    "one of each kind": (("gender", "lora", {"rank": 3, "rank_stabilized": True, "dropout": 0.1}), ("race", "bias", {}), ("age", "sparse", {"k": 60})),
    "beside what does not fold": (("gender", "sparse", {"k": 60}), ("race", "adapter", {"bottleneck": 3}), ("age", "ia3", {}), ("group", "lora", {"rank": 2})),
}


def downstream(fold: bool, naive: bool = False, modules: str = "two LoRAs", kind: str = "bert") -> dict[str, torch.Tensor]:
    """The base after 50 steps at lr 1e-3 and weight decay 0.1, frozen modules attached, in float64."""
    config = TINY if kind == "bert" else dataclasses.replace(TINY, kind=kind, segments=1, position_offset=2)
    model = Model(config, labels=("a", "b", "c")).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3, generator=generator)
    for name, of, options in MODULES[modules]:
        method = methods.create(of, config, options=options, seed=1)
        if of == "sparse":  # some of a linear's weights, of a bias and of the word table
            sites = {"layers.0.attention.value": 30, "layers.1.feed_forward.up.bias": 10, "embeddings.word": 20}
            method.load({f"{site}.{part}": t for site, n in sites.items() for part, t in (("values", torch.ones(n)), ("indices", torch.arange(n, dtype=torch.int32) * 3))})
        for p in method.parameters().values():
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3
        patch.attach(model, name, method)
    trained = {n: p for n, p in patch.all_parameters(model).items() if not n.startswith("methods.")}
    patch.train_only(model, trained.values())
    folded = patch.fold(model) if fold else None
    if naive:
        folded = dataclasses.replace(folded)
        undo, folded.after_step = folded.unfold, lambda rates: None
    schedule = Schedule(steps=STEPS, lr=1e-3, weight_decay=0.1, warmup=0.1, validate_every=STEPS, seed=0)
    train(model, Task(), trained, schedule, folded=folded)
    if fold:
        (undo if naive else folded.unfold)()
    return {n: p.detach() for n, p in trained.items()}


def furthest(one: dict, other: dict) -> float:
    return max(float((one[n] - other[n]).abs().max()) for n in one)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("modules", MODULES)
def test_folded_and_unfolded_training_end_in_the_same_base(modules, kind):
    assert furthest(downstream(True, modules=modules, kind=kind), downstream(False, modules=modules, kind=kind)) < 1e-10


def test_naive_decay_on_the_merged_weight_does_not():
    assert furthest(downstream(fold=True, naive=True), downstream(fold=False)) > 1e-4


def test_fold_acts_on_what_is_foldable_and_unfold_gives_the_methods_back():
    model = Model(TINY, labels=("a", "b")).double().eval()
    model.initialize(model, torch.Generator().manual_seed(0))
    method = methods.create("lora", TINY)
    for name, p in method.parameters().items():
        p.data = torch.randn(p.shape, dtype=torch.float64)
    patch.attach(model, "gender", method)
    batch = next(Task().epoch(0))
    before = model.class_logits(batch)
    folded = patch.fold(model)
    assert folded.names == ("gender",) and not model.encoder.hooks.at("layers.0.attention.query")
    torch.testing.assert_close(model.class_logits(batch), before, rtol=1e-10, atol=1e-12)
    folded.unfold()
    assert model.encoder.hooks.at("layers.0.attention.query")
    torch.testing.assert_close(model.class_logits(batch), before, rtol=1e-10, atol=1e-12)
    with model.without("gender"):  # what is off is not folded in
        plain = model.class_logits(batch)
        assert patch.fold(model).names == () and model.class_logits(batch).equal(plain) and not plain.equal(before)


@pytest.mark.parametrize("kind,options", [("lora", {}), ("bias", {}), ("sparse", {"k": 5})])
def test_a_delta_beside_which_the_weights_have_few_digits_is_not_folded(kind, options):
    """Of a module that diverged, say. In float32 (w + 1e8) - 1e8 is 0."""
    model = Model(TINY, labels=("a", "b")).eval()
    model.initialize(model, torch.Generator().manual_seed(0))
    method = methods.create(kind, TINY, options=options)
    patch.attach(model, "gender", method)
    site = "layers.0.attention.query" + (".bias" if kind == "bias" else "")
    for size, folded in ((16.5, False), (15.5, True)):
        if kind == "lora":
            method.values[site + ".a"].data.fill_(0.0), method.values[site + ".b"].data.fill_(0.0)
            method.values[site + ".a"].data[0, 0], method.values[site + ".b"].data[1, 0] = 1.0, size / method.config.scale
        elif kind == "bias":
            method.values[site].data[2] = size
        else:
            method.load({site + ".values": torch.tensor([size, -1.0, 0.1, 0.2, 0.3]), site + ".indices": torch.arange(5, dtype=torch.int32)})
        before = {n: p.clone() for n, p in patch.all_parameters(model).items()}
        answers = model.class_logits(next(Task().epoch(0)))
        found = patch.fold(model)
        assert found.names == (("gender",) if folded else ())
        torch.testing.assert_close(model.class_logits(next(Task().epoch(0))), answers, rtol=1e-4, atol=1e-4)
        found.unfold()
        assert all((p - before[n]).abs().max() < 1e-6 for n, p in patch.all_parameters(model).items())


def test_what_is_not_trained_comes_back_bit_for_bit():
    """In float32 (w + d) - d need not be w."""
    model = Model(TINY, labels=("a", "b"))
    model.initialize(model, torch.Generator().manual_seed(0))
    for name, method in (("gender", "bias"), ("race", "bias"), ("age", "lora")):
        method = methods.create(method, TINY)
        for p in method.parameters().values():
            p.data = 0.5 * torch.randn(p.shape)
        patch.attach(model, name, method)
    ours = {n: p for n, p in patch.all_parameters(model).items() if not n.startswith("methods.")}
    for p in ours.values():
        p.data += 0.01 * torch.randn(p.shape)
    before = {n: p.detach().clone() for n, p in ours.items()}
    patch.train_only(model, [p for n, p in ours.items() if ".norm." not in n])
    folded = patch.fold(model)
    assert not torch.equal(ours["encoder.layers.0.attention.norm.bias"], before["encoder.layers.0.attention.norm.bias"])
    written = {n: p.detach().clone() for n, p in ours.items()}
    folded.after_step({})  # the decay of none
    assert all(torch.equal(p, written[n]) for n, p in ours.items())
    folded.after_step({id(p): 0.1 for p in ours.values()})
    folded.unfold()
    assert {n for n, p in ours.items() if not torch.equal(p, before[n])} == {
        n for n in ours if n.startswith("encoder.layers.") and ".norm." not in n and n.endswith((".bias", "qkv.weight"))}


@pytest.mark.parametrize("steps,warmup,rates", [(4, 0.5, [0.5, 1.0, 1.0, 0.5]), (3, 0.0, [1.0, 2 / 3, 1 / 3])])
def test_learning_rate_rises_and_falls_linearly(steps, warmup, rates):
    schedule = Schedule(steps=steps, lr=1.0, warmup=warmup)
    assert [schedule.rate(s) for s in range(1, steps + 1)] == pytest.approx(rates)


def test_what_was_folded_before_stays_folded():
    model = toys.model_of()
    patch.attach(model, "one", toys.dense(toys.SOME_LINEARS))
    patch.fold(model)
    patch.attach(model, "two", toys.dense(toys.SOME_LINEARS, seed=20))
    patch.fold(model).unfold()
    assert model.encoder.hooks.off == {"one"}
