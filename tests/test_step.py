"""A step in its other forms is the same step: batches in fixed shapes, under torch.compile as one graph, and with nothing in it that asks the device."""

import errno
import functools
import importlib
import re

import numpy
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peftdebias import kernels, patch
from peftdebias.batches import IGNORED, with_inserted
from peftdebias.encoder import Encoder
from peftdebias.errors import ModelError, PeftDebiasError
from peftdebias.kernels import dispatch
from peftdebias.optimizer import FlatAdamW
from peftdebias.shapes import FINE, fill, rounded, shape_of
from peftdebias.step import Compiled, Step
from peftdebias.training import pick_step

from .outside import HIDDEN, LAYERS, assert_close, one_thread, ragged  # noqa: F401
from .steps import FULL, MODULES, RAGGED, Squares, batch_for, made


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


def test_each_block_ends_with_what_was_asked_for_around_it():
    model = made("lora").model
    with model.recomputing():
        with pytest.raises(KeyError), model.recomputing(False):
            assert not model.encoder.recompute
            raise KeyError
        assert model.encoder.recompute
    assert not model.encoder.recompute


def test_a_backward_that_computes_layers_again_leaves_the_encoder_as_it_was():
    """Also one that comes when another pass has begun: its masks are that pass's own."""
    step = made("lora", options={"dropout": 0.0})
    encoder = step.model.encoder
    weight, found = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(0)), []
    for again in (False, True):
        torch.manual_seed(5)
        with step.model.recomputing(again):
            first, _ = (encoder(batch_for("lora", seed), all_rows=True) for seed in (3, 4))
            seed = encoder.seed
            found.append(torch.autograd.grad((first * weight).sum(), step.parameters))
        assert encoder.seed is seed and encoder.written == {}
    assert all(torch.equal(one, other) for one, other in zip(*found))


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


@pytest.mark.parametrize("name,save,by", [("lora", False, "eager"), *(pytest.param(name, save, "aot_eager", marks=pytest.mark.slow)
                                                                      for name in ("lora", "adapter", "prefix", "prompt", "bias", "ia3", None) for save in (False, True))])
def test_the_step_compiles_without_graph_breaks(name, save, by):
    """fullgraph: a break would raise. Losses of three steps, with dropout, as eager has them; one shape is compiled once. With layers computed again too (save).
    by "eager" Dynamo alone traces, in a third of the time; by "aot_eager" the forward and the backward of AOTAutograd run too."""
    torch.compiler.reset()
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return torch._dynamo.lookup_backend(by)(graph, inputs)

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


def test_no_gradient_lies_beside_the_activations_of_a_forward_pass():
    step, seen = made("lora"), []
    loss = step.loss
    step.loss = lambda *given: seen.append([p.grad is None for p in step.parameters]) or loss(*given)
    for seed in range(2):
        step.gradients(batch_for("lora", seed))
        assert all(p.grad is not None for p in step.parameters)
    assert len(seen) == 2 and all(map(all, seen))


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
