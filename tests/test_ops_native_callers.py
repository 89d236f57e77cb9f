"""The compiled ops and who calls them: any number of threads, forks, other dtypes and devices, torch.compile, second derivatives, a package without them."""

import concurrent.futures
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from peftdebias import kernels, native, tasks
from peftdebias.batches import IGNORED, Spans
from peftdebias.errors import ModelError
from peftdebias.ops import Drop, compiled, dropout, gelu_ref, heads_of, norm_ref
from peftdebias.ops.attention_compiled import attention_compiled
from peftdebias.ops.dropout import dropout_compiled
from peftdebias.ops.gelu import gelu_compiled
from peftdebias.ops.norm import norm_compiled

from .natively import LEVELS, close, drawn, dropping, everything, running
from .outside import attached
from .plain import model_of, some

pytestmark = pytest.mark.skipif(not compiled.FUNCTIONS, reason=f"no compiled ops: {native.load()[1]}")


@pytest.mark.parametrize("level", range(len(LEVELS)), ids=LEVELS)
def test_any_number_of_threads_gives_the_same_bits(level):
    found = []
    for count in (1, 2, 3, 7, 2, 1):
        with running(level, count):
            found.append(everything(rows=3000))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_threads_flush_what_their_caller_flushes():
    """In a process of its own: nothing of it is left to other tests. The pool's thread is there before the setting changes, either way."""
    code = """
import torch
from peftdebias.ops.dropout import dropout_compiled
small, seed = torch.full((4096, 768), 1e-39), torch.tensor([3])
def kept(threads):
    torch.set_num_threads(threads)
    y = dropout_compiled(small, 0.1, seed, 1).view(torch.int32)  # as whole numbers: a comparison would flush too
    return int((y != 0).sum())
before = kept(2)
assert before == kept(1) > 0.8 * small.numel()
if torch.set_flush_denormal(True):
    assert [kept(2) for _ in range(4)] == [0] * 4 and kept(1) == 0
    torch.set_flush_denormal(False)
    assert [kept(2) for _ in range(4)] == [before] * 4
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_other_tensors_are_left_to_the_twins(monkeypatch):
    """float64, and anything that no plain pointer says: no call into the library."""
    monkeypatch.setattr(compiled, "call", lambda name, *rest: pytest.fail(f"{name} was called"))
    everything(torch.float64)
    with torch.device("meta"):
        assert dropout_compiled(torch.ones(3, 4), 0.0, torch.tensor([1]), 0).is_meta
    half = drawn(5, 8).bfloat16()
    assert torch.equal(gelu_compiled(half), gelu_ref(half))
    assert torch.equal(norm_compiled(half, drawn(5, 8), torch.ones(8), torch.zeros(8), 1e-5), norm_ref(half, drawn(5, 8), torch.ones(8), torch.zeros(8), 1e-5))


def test_a_negated_view_is_what_it_says_and_not_what_its_memory_holds():
    """As x.conj().imag is one; given to an op, and as the gradient of what it gave."""
    x, spans = drawn(5, 8, seed=1), Spans.of((3, 2), (3, 2))

    def attend(x):
        return attention_compiled(*heads_of(x, 1, 2) * 3, spans).flatten(1)

    def loss(x):
        return tasks.mlm_loss_compiled(x * 1 if x.requires_grad else x, torch.tensor([1, 2, 3, 4, IGNORED]))

    for op in (gelu_compiled, attend, loss, lambda x: dropout_compiled(x, *dropping(0.5)), lambda x: norm_compiled(x, x, torch.ones(8), torch.zeros(8), 1e-5)):
        assert torch._neg_view(x).is_neg()
        torch.testing.assert_close(op(torch._neg_view(x)), op(-x))
        found = []
        for turned in (torch._neg_view, torch.neg):
            given = x.clone().requires_grad_()
            y = op(given)
            y.register_hook(turned)
            y.backward(torch.ones_like(y))
            found.append(given.grad)
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, "meta"], ids=str)
def test_what_c_writes_to_is_float32_on_the_cpu_whatever_the_defaults_are(default):
    """In a process of its own: it would be memory of others."""
    code = f"""
import numpy, torch
from peftdebias.batches import Spans
from peftdebias.encoder import EncoderConfig, Model
from peftdebias.batches import Sample, pack
from peftdebias import methods, patch, tasks
torch.manual_seed(0)
model = Model(EncoderConfig(kind="bert", layers=2, hidden=32, heads=2, feed_forward=48, vocab=97, max_positions=64), mlm=True)
batch = pack([Sample(numpy.arange(5, 5 + n), numpy.arange(n), numpy.arange(n)) for n in (37, 11, 24)])
def everything():
    patch.attach(model, "a", methods.create("lora", model.config, options=dict(rank=3), seed=1))
    patch.attach(model, "b", methods.create("prefix", model.config, options=dict(length=3), seed=1))
    found = [model.eval().mlm_logits(batch)]
    model.train()
    model.encoder.seed = None
    torch.default_generator.manual_seed(7)
    loss = tasks.mlm_loss(model.mlm_logits(batch), batch.targets)
    loss.backward()
    found += [loss, *(p.grad.clone() for p in patch.all_parameters(model).values())]
    for p in patch.all_parameters(model).values(): p.grad = None
    patch.detach(model, "a"), patch.detach(model, "b")
    return found
expected = everything()
default = {str(default) if default != "meta" else repr(default)}
torch.set_default_device(default) if default == "meta" else torch.set_default_dtype(default)
for _ in range(5):
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(everything(), expected, strict=True))
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_a_step_compiles_whole_with_the_twins_inside():
    spans = Spans.of((9, 4), (9, 4))
    assert len(spans.query_places) == len(spans.key_places) == 13 and spans.key_mask is not None  # made before

    def run(x, seed):
        drop = Drop(0.1, seed, 3)
        y = attention_compiled(*heads_of(x, 3, 2), spans, None, drop).flatten(1)
        return dropout(gelu_compiled(norm_compiled(y, y * 2, torch.ones(8), torch.zeros(8), 1e-5, drop), torch.ones(8)), drop)

    x, seed, results = drawn(13, 24).requires_grad_(), torch.tensor([5]), []
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        y = function(x, seed)
        results.append({"y": y.detach(), "x": torch.autograd.grad(y.sum(), x)[0]})
    close(results[1], {name: t.double() for name, t in results[0].items()})


def test_choose_takes_them_by_itself():
    for op in ("dropout", "norm", "embed", "gelu", "attention", "adamw", "mlm_loss"):
        assert kernels.decide(op, torch.device("cpu")) == ("native", "the fastest on cpu")
        assert kernels.decide(op, torch.device("cuda"))[0] != "native"
        with kernels.use("torch"):
            assert kernels.choose(op, reference=print) is print


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_forked_child_makes_threads_of_its_own():
    code = """
import multiprocessing, torch
from tests.natively import everything
torch.set_num_threads(2)
sums = lambda: [t.double().sum().item() for t in everything()]
def child(pipe):
    pipe.send(sums())
if __name__ == "__main__":
    before = sums()
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        mine, theirs = context.Pipe()
        process = context.Process(target=child, args=(theirs,))
        process.start()
        assert mine.poll(60), "the child hangs"
        assert mine.recv() == before == sums()
        process.join(60)
        assert process.exitcode == 0
    print("same")
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=Path(__file__).parent.parent)
    assert ran.returncode == 0 and ran.stdout == "same\n", ran.stdout + ran.stderr


@pytest.mark.parametrize("method", ["adapter", "prefix"])
def test_a_second_derivative_is_that_of_float64_or_an_error(method):
    """Of the inputs asked for alone: there autograd leaves out, without a word, what a backward that cannot be differentiated reads of the forward."""
    def pulled(kind: str, dtype: torch.dtype) -> list[Tensor]:
        model, batch = model_of(), some("bert")
        trained = list(attached(model, "x", method).parameters().values())
        model.to(dtype)
        with kernels.use(kind), sdpa_kernel(SDPBackend.MATH):  # the only one of torch's with a second derivative
            first = torch.autograd.grad(torch.nn.functional.cross_entropy(model.mlm_logits(batch), batch.targets), trained, create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in first), trained)

    for found, expected in zip(pulled("torch", torch.float32), pulled("auto", torch.float64), strict=True):
        assert torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    with pytest.raises(RuntimeError, match=r": expected a backward without create_graph, .*\(PEFTDEBIAS_KERNELS=torch, in float32\)$"):
        pulled("auto", torch.float32)


def test_lengths_below_0_never_reach_memory():
    query, keys = drawn(5, 2, 4), drawn(5, 2, 4)
    for lengths in (((6, -1), (6, -1)), ((-1, 6), (3, 2)), ((3, 2), (5,))):
        with pytest.raises(ModelError, match=r"^Spans.of: expected lengths from 0, as many of queries as of keys, got \("):
            Spans.of(*lengths)
    by_hand = Spans(torch.tensor([0, 6, 5], dtype=torch.int32), torch.tensor([0, 3, 5], dtype=torch.int32), 5, 5, 6, 3)
    with pytest.raises(ModelError, match=r"^spans: expected ascending cu_queries and cu_keys, got lengths \(6, -1\) and \(3, 2\)$"):
        attention_compiled(query, keys, keys, by_hand)


def test_every_backward_that_has_no_derivative_says_so():
    from peftdebias import methods, written  # noqa: F401

    found = [cls for cls in torch.autograd.Function.__subclasses__() if cls.__module__.startswith("peftdebias.") and "backward" in vars(cls) and ".kernels." not in cls.__module__]
    assert {cls.__name__ for cls in found} == {"_Norm", "_Gelu", "_Linear", "_Scores", "_Turned", "_Attention", "_Parts", "_Dropout", "_Adapter", "_Apart", "_Loss"}
    for cls in found:
        if cls.__name__ != "_Parts":  # which puts gradients side by side, differentiably
            with pytest.raises(RuntimeError, match="expected a backward without create_graph"):
                cls.backward(None, None)


def test_callers_on_two_threads_do_not_disturb_each_other():
    expected = everything()
    with running(len(LEVELS) - 1, 2), concurrent.futures.ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda _: everything(), range(12)):
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_without_the_library_the_twins_do_the_work_and_it_is_said_once():
    code = """
import importlib.util, warnings
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "peftdebias._native" else find(name, *rest)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    from peftdebias import kernels, ops, tasks, training, cda_engine
    from peftdebias.axes import load_axis
    assert kernels.decide("dropout", torch.device("cpu")) == ("torch", "no native kernel for this op; plain torch does its work")
    drop = ops.Drop(0.5, torch.tensor([5]), 1)
    assert torch.equal(ops.dropout(torch.ones(3, 7), drop), ops.dropout.__globals__["dropout_ref"](torch.ones(3, 7), *drop))
    cda_engine.engine(load_axis("gender"))
print([str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout.count("peftdebias._native is not built") == 1, ran.stdout + ran.stderr
