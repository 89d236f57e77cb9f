"""A step in its other forms is the same step: batches in fixed shapes, under torch.compile as one graph, and with nothing in it that asks the device."""

import contextlib
import dataclasses
import errno
import functools
import importlib
import re
from types import SimpleNamespace

import numpy
import pytest
import safetensors
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peftdebias import graphs, kernels, methods, patch
from peftdebias import lowered as lowered_file
from peftdebias.batches import IGNORED, Batch, with_inserted
from peftdebias.encoder import Encoder, Model
from peftdebias.errors import ModelError, PeftDebiasError
from peftdebias.graphs import Graphed, recorded
from peftdebias.kernels import dispatch
from peftdebias.lowered import lowered, may_be_lowered
from peftdebias.optimizer import FlatAdamW
from peftdebias.shapes import FINE, fill, rounded, shape_of
from peftdebias.step import Compiled, Step
from peftdebias.tasks import mlm_loss
from peftdebias.training import Schedule, make_optimizer, pick_step, train
from peftdebias.weights import save_model

from .outside import FEED_FORWARD, HIDDEN, LAYERS, VOCAB, assert_close, one_thread, ragged  # noqa: F401
from .plain import model_of

MODULES = {"lora": {"rank": 2, "dropout": 0.1}, "adapter": {"bottleneck": 3}, "prefix": {"length": 3}, "prompt": {"length": 3}, "bias": {}, "ia3": {}}


class Masked:
    def loss(self, model, batch):
        return mlm_loss(model.mlm_logits(batch), batch.targets)


class Labels:
    """Whole-base training: the first row of each text decides."""

    def loss(self, model, batch):
        return mlm_loss(model.class_logits(batch), batch.targets)


class Squares:
    """Of a module's parameters: compiled in no time."""

    def loss(self, model, batch):
        return sum(p.square().sum() for p in model.methods["gender"].values.values())


def made(name: str | None, dtype=torch.float32, cls=Step, options: dict | None = None, layers: int = LAYERS, hidden: int = HIDDEN, feed_forward: int = FEED_FORWARD,
         loss=None, **settings) -> Step:
    """A step of a small model in train mode; every parameter of the module drawn, so that each has a gradient. None trains the base. options: beside MODULES'. loss: in place of
    the task's."""
    model = model_of(dtype=dtype, layers=layers, hidden=hidden, feed_forward=feed_forward)
    if name is not None:
        method, generator = methods.create(name, model.config, options=MODULES.get(name, {}) | (options or {}), seed=0), torch.Generator().manual_seed(1)
        if name == "sparse":
            method.load(spread(method))
        for parameter in method.parameters().values():
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.1).to(dtype)
        patch.attach(model, "gender", method)
    parameters = {n: p for n, p in patch.all_parameters(model).items() if n.startswith("methods.") == (name is not None)}
    patch.train_only(model, parameters.values())
    model.train()
    task = SimpleNamespace(loss=loss) if loss else Masked() if name else Labels()
    return cls(model, task, make_optimizer(parameters, Schedule(steps=3, lr=1e-2)), parameters, clip=1e9, **settings)


def spread(method) -> dict[str, torch.Tensor]:
    """Values and indices for a sparse module, a few in every linear."""
    sites = [site for site in method.sites(method.encoder_config) if site.startswith("layers.") and not site.endswith(".bias")]
    counts = [len(range(i, method.config.k, len(sites))) for i in range(len(sites))]
    return {f"{site}.{part}": tensor for site, n in zip(sites, counts) for part, tensor in (("values", torch.ones(n)), ("indices", torch.arange(n, dtype=torch.int32) * 7))}


RAGGED, FULL = (13, 1, 7), (19, 17, 19, 9)  # 64 tokens: a shape that they fill


def batch_for(name: str | None, seed: int = 0, lengths=RAGGED):
    batch = ragged(lengths, rows="some" if name else "first", seed=seed)
    if name is None:
        batch.targets.remainder_(3)
    return batch


# ---------------------------------------------------------------- fixed shapes

def test_sizes_are_rounded_up_by_an_eighth_at_most():
    for size in (1, 15, 16, 17, 63, 64, 129, 500, 4097):
        assert size <= rounded(size, 16) <= max(16 * -(-size // 16), size * 9 / 8)
        assert size <= rounded(size, 16, FINE) <= max(16 * -(-size // 16), size * 17 / 16)
    assert len({rounded(size, 64) for size in range(4096, 8192)}) <= 9


@pytest.mark.parametrize("lengths", [RAGGED, (19,), (1, 1), (17, 0, 3), FULL, (13,) * 8, (13,) * 97])
def test_a_filled_batch_holds_the_texts_and_a_tail_that_counts_for_nothing(lengths):
    batch = ragged(tuple(n for n in lengths if n)) if 0 in lengths else ragged(lengths)
    shape = shape_of(batch, 19)
    filled = fill(batch, shape)
    tokens, rows = len(batch.ids), len(batch.rows)
    assert (len(filled.ids), len(filled.rows), len(filled.cu_seqlens) - 1) == shape[:3] and (tokens == shape.tokens) == (lengths == FULL)
    for name in ("ids", "positions", "segments"):
        assert torch.equal(getattr(filled, name)[:tokens], getattr(batch, name)) and len(getattr(filled, name)) == shape.tokens
    assert torch.equal(filled.rows[:rows], batch.rows) and torch.equal(filled.targets[:rows], batch.targets) and (filled.targets[rows:] == IGNORED).all()
    assert torch.equal(filled.cu_seqlens[:len(batch.cu_seqlens)], batch.cu_seqlens) and filled.cu_seqlens[-1] == shape.tokens
    assert filled.cu_seqlens.diff().max() <= shape.longest <= 19 and filled.cu_rows[-1] == shape.rows and filled.cu_rows.diff().max() <= shape.most_rows
    assert not filled.ids[tokens:].any() and not filled.segments[tokens:].any()  # rows that every table has
    assert (filled.cu_seqlens.diff() >= 0).all() and filled.positions.max() < 19 and (filled.rows < shape.tokens).all()


@pytest.mark.parametrize("name,lengths", [*((name, RAGGED) for name in (*MODULES, None)), ("lora", FULL), ("prefix", FULL), (None, FULL)])
def test_a_filled_batch_has_the_loss_and_the_gradients_of_the_batch(name, lengths):
    """With dropout: the masks of the texts' rows stay what they were."""
    step, batch = made(name, torch.float64), batch_for(name, lengths=lengths)
    found = []
    for given in (batch, step.shaped(batch)):
        torch.manual_seed(3)
        found.append((step.gradients(given), {n: p.grad.clone() for n, p in patch.all_parameters(step.model).items() if p.grad is not None}))
    assert_close(found[1][0], found[0][0], "loss")
    assert found[0][1].keys() == found[1][1].keys() and len(found[0][1]) >= 1
    for parameter, gradient in found[0][1].items():
        assert_close(found[1][1][parameter], gradient, parameter)
        assert name is None or gradient.abs().max() > 0, parameter


def test_bounds_grow_with_what_is_put_before_the_texts():
    """Every sequence, the dummies too, is longer then: a bound that stays leaves a text's last tokens out of attention."""
    batch = ragged(FULL)
    filled = fill(batch, shape_of(batch, 19))
    _, longer = with_inserted(filled, 5)
    assert longer.bounds == (filled.bounds.tokens + 5 * (len(filled.cu_seqlens) - 1), filled.bounds.longest + 5, filled.bounds.rows)
    assert longer.cu_seqlens.diff().max() <= longer.spans.most_keys and longer.cu_seqlens[-1] == longer.spans.keys


def test_a_text_that_the_model_does_not_take_has_no_shape():
    with pytest.raises(ModelError, match="text of 20 tokens: expected at most 19"):
        shape_of(ragged((5, 20)), 19)


def test_texts_of_like_sizes_share_a_shape():
    random = numpy.random.default_rng(0)
    shapes = {shape_of(ragged(tuple(random.integers(5, 19, 40)), seed=i), 19) for i in range(20)}
    assert len(shapes) <= 4


# ---------------------------------------------------------------- layers computed again

RECOMPUTED = {**{name: (name, {}) for name in MODULES}, "base": (None, {}), "sparse": ("sparse", {"k": 40}), "lora without dropout": ("lora", {"dropout": 0.0}),
              "adapter behind both blocks": ("adapter", {"architecture": "houlsby"}), "re-parametrised prefix": ("prefix", {"reparametrised": True, "inner": 5})}


def losses_and_gradients(step: Step, name: str | None, save: bool, seeds=(3, 4)) -> list[dict]:
    found = []
    with step.model.recomputing(save):
        for seed in seeds:
            torch.manual_seed(seed)
            loss = step.gradients(batch_for(name, seed))
            found.append({"loss": loss, **{n: p.grad.clone() for n, p in patch.all_parameters(step.model).items() if p.grad is not None}})
    return found


@pytest.mark.parametrize("implementation", ["torch", "auto"])
@pytest.mark.parametrize("name", RECOMPUTED)
def test_saving_memory_changes_no_bit(name, implementation):
    """With dropout, and the last layer on the rows asked for: the loss and every gradient."""
    method, options = RECOMPUTED[name]
    with kernels.use(implementation):
        step = made(method, options=options)
        plain, saved = (losses_and_gradients(step, method, save) for save in (False, True))
    for one, other in zip(plain, saved):
        assert one.keys() == other.keys() and len(one) > 1
        for key, tensor in one.items():
            assert torch.equal(other[key], tensor), key
            assert key == "loss" or method is None or tensor.abs().max() > 0, key
    assert not torch.equal(plain[0]["loss"], plain[1]["loss"])  # other masks


def test_saving_memory_changes_no_bit_where_products_are_large():
    """Sizes that the CPU's own forms of a linear take, and a batch that is no multiple of their pieces."""
    step, found = made("lora", hidden=96, feed_forward=160, layers=2), []
    for save in (False, True):
        torch.manual_seed(3)
        with step.model.recomputing(save):
            found.append([step.gradients(batch_for("lora", lengths=(53,) * 13 + (7,))), *(p.grad.clone() for p in step.parameters)])
    assert all(torch.equal(a, b) for a, b in zip(*found)) and all(g.abs().max() > 0 for g in found[0])


def test_saving_memory_keeps_the_inputs_of_the_layers_alone(monkeypatch):
    """Each layer runs twice, and autograd keeps one tensor's memory for it, its input's."""
    kept, ran, original = {}, [], Encoder._layer
    monkeypatch.setattr(Encoder, "_layer", lambda self, i, *inputs: (ran.append(i), original(self, i, *inputs))[1])
    for save in (False, True):
        for layers in (2, 5):
            step, count = made("lora", layers=layers), []
            with step.model.recomputing(save), torch.autograd.graph.saved_tensors_hooks(lambda t: (count.append(t), t)[1], lambda t: t):
                step.gradients(batch_for("lora"))
            kept[save, layers] = len({t.untyped_storage().data_ptr() for t in count})
    assert kept[True, 5] - kept[True, 2] == 3 and kept[False, 5] - kept[False, 2] > 3 * 5
    assert ran == [0, 1] + [*range(5)] + [0, 1, 1, 0] + [*range(5), *reversed(range(5))]


def test_saving_memory_remembers_each_pass():
    """Two forward passes before their backward: each is computed again with its own masks. Scores without gradients compute nothing twice."""
    step, found = made("lora"), []
    for save in (False, True):
        torch.manual_seed(5)
        with step.model.recomputing(save):
            total = step.loss(step.model, batch_for("lora", 1)) + step.loss(step.model, batch_for("lora", 2))
            step.optimizer.zero_grad()
            total.backward()
        found.append([p.grad.clone() for p in step.parameters])
    assert all(torch.equal(a, b) for a, b in zip(*found)) and not step.model.encoder.recompute


def test_saving_memory_computes_again_as_was_asked_for_whoever_runs_the_backward(monkeypatch):
    """A GPU's backward runs in a thread of its own, which has entered none of the `with` blocks around the forward pass."""
    step, found, original = made("lora"), [], Encoder._layer
    monkeypatch.setattr(Encoder, "_layer", lambda self, i, *inputs: (found.append((kernels.setting(), dispatch.asked("attention"), dispatch.asked("linear"))), original(self, i, *inputs))[1])
    with kernels.use("torch"), dispatch.use("attention", "padded"), step.model.recomputing(True):
        loss = step.loss(step.model, batch_for("lora"))
    loss.backward()
    assert found == 2 * LAYERS * [("torch", "padded", None)]


# ---------------------------------------------------------------- torch.compile

def dynamo_config():
    return importlib.import_module("torch._dynamo.config")


@pytest.mark.parametrize("name,save", [pytest.param(name, save, marks=() if name == "lora" and not save else pytest.mark.slow)
                                       for name in ("lora", "adapter", "prefix", "prompt", "bias", "ia3", None) for save in (False, True)])
def test_the_step_compiles_without_graph_breaks(name, save):
    """fullgraph: a break would raise. Losses of three steps, with dropout, as eager has them; one shape is compiled once. With layers computed again too (save)."""
    torch.compiler.reset()
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    found = []
    with kernels.use("torch"):
        for step in (made(name, layers=2), made(name, cls=Compiled, backend=backend, layers=2)):  # the last layer and one that is not
            torch.manual_seed(3)
            with step.model.recomputing(save and isinstance(step, Compiled)):
                found.append([float(step(batch_for(name, seed), 1e-2)) for seed in range(3)])
    numpy.testing.assert_allclose(found[1], found[0], rtol=2e-5)
    assert len(compiled) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", None])
def test_the_step_compiles_to_machine_code(name):
    """Inductor draws no other masks: they come from the counters."""
    torch.compiler.reset()
    with kernels.use("torch"):
        found = []
        for step in (made(name), made(name, cls=Compiled)):
            found.append([])
            for seed in range(3):
                torch.manual_seed(seed)
                found[-1].append(float(step(batch_for(name, seed), 1e-2)))
    numpy.testing.assert_allclose(found[1], found[0], rtol=2e-5)


# ---------------------------------------------------------------- nothing waits for the device

class Watch(TorchDispatchMode):
    """Refuses every op whose result the host reads, or whose shape depends on values: on a GPU each would wait for the device."""

    READS = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::masked_select", "aten::_unique2", "aten::equal", "aten::unique_dim"}

    def __init__(self):
        super().__init__()
        self.ops = 0

    def __torch_dispatch__(self, op, types, arguments=(), keywords=None):
        self.ops += 1
        name = op._schema.name
        data_shaped = name == "aten::repeat_interleave" or (name == "aten::index" and any(i is not None and i.dtype == torch.bool for i in arguments[1]))
        if name in self.READS or data_shaped:
            raise AssertionError(f"{name}: the host would wait for the device")
        return op(*arguments, **(keywords or {}))


@pytest.mark.parametrize("name", [*MODULES, None])
@pytest.mark.parametrize("fixed", [False, True], ids=["as it is", "in a fixed shape"])
def test_a_step_reads_nothing_from_the_device(name, fixed, monkeypatch):
    """Forward, backward, clipping, AdamW; what a batch needs beside itself was made with it."""
    step = made(name)
    batch = batch_for(name)
    batch = step.shaped(batch) if fixed else batch.staged().on(batch.staged().flat)
    for read in ("tolist", "item", "numpy", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, read, lambda *_, read=read: pytest.fail(f"Tensor.{read} in a step"))
    with kernels.use("torch"), Watch() as watch:
        step(batch, 1e-2)
    assert watch.ops > 100


def test_the_watch_sees_what_it_should():
    for read in (lambda x: float(x.sum()), lambda x: x[x > 0], lambda x: x.nonzero()):
        with pytest.raises(AssertionError, match="the host would wait"), Watch():
            read(torch.ones(3))


# ---------------------------------------------------------------- CUDA graphs

def test_without_a_gpu_the_graph_falls_back_and_says_so_once():
    said = []
    found = []
    for step in (made("lora"), made("lora", cls=Graphed, say=said.append)):
        torch.manual_seed(3)
        found.append([float(step(batch_for("lora", seed), 1e-2)) for seed in range(2)])
    assert found[0] == found[1] and said == ["CUDA graphs: off, every step runs eagerly: expected a CUDA device, the model is on cpu"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_capture_hands_over_what_the_optimizer_s_launches_read(fails, monkeypatch):
    """And one that fails leaves none of it behind. The device is pretended: what is captured here runs at once."""
    step = made("lora", cls=Graphed)
    batch, calls, table = batch_for("lora"), [], torch.zeros(3)
    step(batch, 1e-2)

    class Graph:
        def pool(self):
            return "pool"

    @contextlib.contextmanager
    def graph(made, pool, stream):
        calls.append("begins")
        yield
        if fails:
            raise RuntimeError("operation not permitted\nwhen capturing")
        calls.append("ends")

    for name, instead in (("CUDAGraph", Graph), ("graph", graph), ("synchronize", lambda device: None), ("device", lambda device: contextlib.nullcontext()),
                          ("current_stream", lambda: None), ("set_stream", lambda stream: None)):
        monkeypatch.setattr(torch.cuda, name, instead)
    monkeypatch.setattr(step.optimizer, "captured", lambda: calls.append("handed over") or [table], raising=False)
    found = step._capture(step.shaped(batch).staged(pinned=False))
    if fails:
        assert found is None and calls == ["begins", "handed over"] and step.off == "operation not permitted"
    else:
        assert [t is table for t in found.tables] == [True] and calls == ["begins", "ends", "handed over"] and step.pool == "pool"


class Recorded:
    """What a CUDA graph is, of the calls that are made while it is recorded: they run when it is replayed, and not before."""

    def __init__(self):
        self.calls, self.replays = [], 0

    def pool(self):
        return "pool"

    def replay(self):
        self.replays += 1
        for call in self.calls:
            call()


@pytest.fixture
def recorder(monkeypatch):
    """A step that records and replays on the CPU, made by `recorder(said, broken=..., **of made)`; broken: what it does cannot be captured."""
    open_graph = []

    @contextlib.contextmanager
    def graph(into, pool, stream):
        open_graph.append(into)
        try:
            yield
        except ValueError:
            raise RuntimeError("the capture could not be ended")
        finally:
            open_graph.clear()

    waits, staged = SimpleNamespace(wait_stream=lambda other: None), Batch.staged
    for name, instead in (("CUDAGraph", Recorded), ("graph", graph), ("synchronize", lambda device=None: None), ("device", lambda device: contextlib.nullcontext()),
                          ("current_stream", lambda device=None: waits), ("set_stream", lambda stream: None), ("stream", lambda stream: contextlib.nullcontext()),
                          ("empty_cache", lambda: None)):
        monkeypatch.setattr(torch.cuda, name, instead)
    monkeypatch.setattr(Batch, "staged", lambda self, pinned=False: staged(self))

    def make(said, broken=False, **settings):
        step = made("lora", cls=Graphed, **settings)
        step.off, step.stream, step.say = None, waits, said.append
        gradients, apply = step.gradients, step.optimizer.apply

        def record_gradients(batch):
            if not open_graph:
                return gradients(batch)
            if broken:
                raise ValueError("operation not permitted\nwhen capturing")
            loss = torch.zeros(())
            open_graph[0].calls.append(lambda: loss.copy_(gradients(dataclasses.replace(batch))))  # which has computed nothing yet, as a device that replays
            return loss

        monkeypatch.setattr(step, "gradients", record_gradients)
        monkeypatch.setattr(step.optimizer, "apply", lambda: open_graph[0].calls.append(apply) if open_graph else apply())
        return step
    return make


def trained(step: Step, shapes: str, shaped: bool = False) -> list[Tensor]:
    """Its losses, as they were returned, and then what is trained. shapes: which batch comes when; a and A have one shape."""
    losses = []
    for seed, shape in enumerate(shapes):
        torch.manual_seed(seed)
        batch = batch_for("lora", seed, {"a": RAGGED, "A": FULL, "b": (19,) * 9, "c": (5,) * 33}[shape])
        losses.append(step(step.shaped(batch) if shaped else batch, 1e-2 / (1 + seed)))
    return [*losses, *step.parameters]


@pytest.mark.parametrize("most,replays", [(96, [2, 3]), (1, [3])])
def test_replayed_steps_are_the_steps(most, replays, recorder, monkeypatch):
    """Each shape eagerly first, then from its graph, with the batch and the rate of the moment; those beyond the most go on eagerly."""
    monkeypatch.setattr(graphs, "MOST", most)
    said = []
    step = recorder(said)
    found, expected = trained(step, "aAbabcAb"), trained(made("lora"), "aAbabcAb", shaped=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)) and said == []
    assert sorted(one.graph.replays for one in step.captured.values()) == replays


def test_a_step_that_cannot_be_captured_is_trained_eagerly(recorder):
    """Once, and from then on; the line tells what broke the capture off."""
    said = []
    step = recorder(said, broken=True, dtype=torch.float64)
    found, expected = trained(step, "aaba"), trained(made("lora", torch.float64), "aaba")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)  # the first step is of a filled batch
    assert said == ["CUDA graphs: off, every step runs eagerly: operation not permitted"] and not step.captured


def test_a_step_that_leaves_a_parameter_out_is_not_captured(recorder):
    said = []
    step = recorder(said, loss=lambda model, batch: list(model.methods["gender"].values.values())[0].square().sum())
    trained(step, "aaa")
    assert said == ["CUDA graphs: off, every step runs eagerly: a trained parameter has no gradient"] and not step.captured


@pytest.mark.parametrize("captured", [True, False])
def test_a_new_shape_without_memory_beside_the_captured_ones_gives_these_up(captured, monkeypatch):
    """The device is pretended. The step is repeated, and trained once; without captured ones there is nothing to give up."""
    said, calls, plain = [], [], made("lora")
    step = made("lora", cls=Graphed, say=said.append)
    step.off, step.stream = None, SimpleNamespace(wait_stream=lambda other: None)
    said.clear()
    for name, instead in (("current_stream", lambda device: SimpleNamespace(wait_stream=lambda other: None)), ("stream", lambda stream: contextlib.nullcontext()),
                          ("synchronize", lambda device: None), ("empty_cache", lambda: calls.append("emptied"))):
        monkeypatch.setattr(torch.cuda, name, instead)
    if captured:
        step.captured["another shape"] = object()
    gradients = step.gradients

    def first_without_memory(batch):
        calls.append(len(step.captured))
        if len(calls) == 1:
            torch.manual_seed(5)
            gradients(batch)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        torch.manual_seed(3)
        return gradients(batch)

    monkeypatch.setattr(step, "gradients", first_without_memory)
    if not captured:
        with pytest.raises(torch.OutOfMemoryError):
            step(batch_for("lora"), 1e-2)
        assert step.off is None and said == []
        return
    found = float(step(batch_for("lora"), 1e-2))
    torch.manual_seed(3)
    expected = float(plain(plain.shaped(batch_for("lora")), 1e-2))
    assert found == expected and calls == [1, "emptied", 0] and step.captured == {} and step.pool is None
    assert all(torch.equal(a, b) for a, b in zip(step.parameters, plain.parameters))
    assert said == ["CUDA graphs: off, every step runs eagerly: the device has no memory for a new shape of batch beside those captured"]


def test_a_capture_that_cannot_be_ended_leaves_torch_as_it_was(monkeypatch):
    """The device is pretended: torch's own `graph` leaves the stream that captures in place there."""
    streams, states = ["main"], []

    class Unended:
        def __init__(self, graph, **how):
            assert how == {"pool": 7}

        def __enter__(self):
            streams.append("captures")

        def __exit__(self, *error):
            raise RuntimeError("operation failed due to a previous error during capture")

    generator = SimpleNamespace(clone_state=lambda: "state", graphsafe_set_state=states.append)
    for name, instead in (("graph", Unended), ("current_stream", lambda: streams[-1]), ("set_stream", streams.append), ("synchronize", lambda: None),
                          ("device", lambda device: contextlib.nullcontext()), ("current_device", lambda: 0), ("default_generators", [generator])):
        monkeypatch.setattr(torch.cuda, name, instead)
    with pytest.raises(RuntimeError, match="previous error") as raised, recorded("graph", torch.device("cuda"), pool=7):
        raise ValueError("an operation that is not permitted")
    assert streams == ["main", "captures", "main"] and states == ["state"] and isinstance(raised.value.__context__, ValueError)


@pytest.mark.parametrize("pulled", [False, True])
def test_a_step_whose_optimizer_clips_as_it_reads_is_the_step(pulled):
    """In the two halves that a graph is made of; a gradient that is added after the backward is clipped with the others."""
    found = []
    for as_read in (False, True):
        step = made("lora", torch.float64)
        step.optimizer, step.clip = FlatAdamW([{"params": step.parameters}], lr=1e-2, as_read=as_read), 0.3
        step.pull = (lambda step=step: [p.grad.add_(0.1) for p in step.parameters]) if pulled else None
        for seed in range(3):
            torch.manual_seed(seed)
            step.gradients(batch_for("lora", seed))
            norm = torch.nn.utils.get_total_norm([p.grad for p in step.parameters])
            assert (norm > 0.3001) == as_read
            step.optimizer.advance()
            step.optimizer.apply()
        found.append([p.detach() for p in step.parameters])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_which_step_is_taken():
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert [pick_step(name, device) for name in ("auto", "eager", "compiled") for device in (cpu, gpu)] == ["eager", "graph", "eager", "eager", "compiled", "compiled"]
    assert pick_step("graph", gpu) == "graph"
    with pytest.raises(Exception, match="--step graph: expected a GPU, got cpu; use eager or compiled"):
        pick_step("graph", cpu)


def test_a_step_that_cannot_be_compiled_says_so_in_one_line():
    def broken(graph, inputs):
        raise OSError("no compiler here\nand more")

    step = made("lora", cls=functools.partial(Compiled, backend=broken), loss=Squares().loss)
    with pytest.raises(PeftDebiasError, match="^--step compiled: torch.compile cannot build the step: OSError: no compiler here; expected a compiler that works, or --step eager$"):
        step(batch_for("lora"), 1e-3)


@pytest.mark.parametrize("error,words", [(OSError(errno.ENOSPC, "No space left on device", "/cache/graph"), "/cache/graph: No space left on device"),
                                         (OSError("torn"), "its files: torn")])
def test_a_folder_for_what_is_compiled_that_cannot_be_written_says_so_in_one_line(error, words):
    step = made("lora", cls=functools.partial(Compiled, backend="eager"))

    def full(model, batch):
        raise error

    step.loss = full
    with pytest.raises(PeftDebiasError, match=f"^--step compiled: torch.compile cannot keep what it builds: {words}; expected a folder that it can "
                                              r"write to \(TORCHINDUCTOR_CACHE_DIR\), or --step eager$"):
        step(batch_for("lora"), 1e-3)


def test_compiling_that_the_environment_turns_off_is_refused():
    with dynamo_config().patch(disable=True):
        assert pick_step("eager", torch.device("cpu")) == "eager"
        with pytest.raises(PeftDebiasError, match="^--step compiled: expected torch.compile, which the environment turns off here"):
            pick_step("compiled", torch.device("cpu"))


@pytest.mark.parametrize("kind", ["method", "function", "callable"])
def test_graphs_of_one_training_are_not_anothers(kind):
    """Dynamo keeps so many graphs of a function and no more; trainings in one process are more than that. A step that was compiled says so and how long it took."""
    torch.compiler.reset()
    for _ in range(3 if kind != "callable" else 1):
        said, times = [], []
        loss = {"method": Squares().loss, "callable": functools.partial(Squares().loss),
                "function": lambda model, batch, one=1, *, two=2: Squares.loss(None, model, batch) * one * two}[kind]
        step = made("bias", cls=functools.partial(Compiled, backend="eager"), say=said.append, loss=loss)
        with dynamo_config().patch(recompile_limit=1):
            for seed in (0, 1):
                step(batch_for("bias", seed), 1e-3)
                times.append(step.preparing)
        assert len(said) == 1 and re.fullmatch(r"step: compiled once, in \d+ s", said[0]) and times[0] > 0 == times[1]


@pytest.mark.parametrize("cls", [Step, functools.partial(Compiled, backend="eager")])
def test_a_loss_keeps_nothing_of_its_pass(cls):
    """Whoever collects the losses would keep every step's activations."""
    assert not made("bias", cls=cls, loss=Squares().loss)(batch_for("bias"), 1e-3).requires_grad


def test_what_is_compiled_sees_few_shapes():
    step, seen = made("bias", cls=functools.partial(Compiled, backend="eager"), loss=Squares().loss), set()
    gradients, step.gradients = step.gradients, lambda batch: seen.add(batch.bounds) or gradients(batch)
    for lengths in (RAGGED, (13, 2, 7), (19, 5), (3,)):
        step(batch_for("bias", lengths=lengths), 1e-3)
    assert len(seen) == 1 and None not in seen


def test_a_folder_that_cannot_be_made_when_torch_compile_is_loaded_is_one_line(monkeypatch):
    def refused(name):
        raise PermissionError(errno.EACCES, "Permission denied", "/cache/inductor")

    monkeypatch.setattr(importlib, "import_module", refused)
    with pytest.raises(PeftDebiasError, match="^--step compiled: torch.compile cannot keep what it builds: /cache/inductor: Permission denied; expected a folder"):
        pick_step("compiled", torch.device("cpu"))


def test_what_a_stopped_compilation_left_is_told():
    def torn(graph, inputs):
        raise ImportError("/cache/main.so: file too short")

    step = made("bias", cls=functools.partial(Compiled, backend=torn), loss=Squares().loss)
    with pytest.raises(PeftDebiasError, match="ImportError: /cache/main.so: file too short; expected files that are whole .a compilation that was stopped can leave one that is not: "
                                              "remove it.*, or --step eager$"):
        step(batch_for("bias"), 1e-3)


# ---------------------------------------------------------------- bf16

def test_what_a_merge_replaced_is_not_made_bf16():
    """Unmerging would give back what was rounded."""
    model = made("ia3").model
    patch.train_only(model, ())
    patch.merge(model)
    replaced = {id(parameter) for parameter, _, _ in model.encoder.hooks.merged.tensors}
    lowerable = set(map(id, may_be_lowered(model)))
    assert replaced and lowerable and not replaced & lowerable


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
