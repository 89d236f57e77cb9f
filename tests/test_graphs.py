"""A step that is replayed as a CUDA graph is the step, and one that cannot be goes on eagerly; without a GPU, whose part a recorder plays here."""

import contextlib
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from peftdebias import graphs
from peftdebias.batches import Batch
from peftdebias.graphs import Graphed, recorded
from peftdebias.step import Step

from .outside import assert_close, one_thread  # noqa: F401
from .steps import FULL, RAGGED, batch_for, made


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
    found = step._capture(step.shaped(batch).staged(pinned=False), step.shape_of(batch))
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


@pytest.mark.parametrize("order,most,replays", [("bbabaAcab", 96, [3, 3]), ("aAbabcAb", 1, [3]), ("aAbabcAb", 96, [1, 2])])
def test_replayed_steps_are_the_steps(order, most, replays, recorder, monkeypatch):
    """Each shape eagerly first, then from its graph, with the batch and the rate of the moment; those beyond the most go on eagerly. Where b is captured, which is larger than
    a, a is captured again."""
    monkeypatch.setattr(graphs, "MOST", most)
    said = []
    step = recorder(said)
    found, expected = trained(step, order), trained(made("lora"), order, shaped=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)) and said == []
    assert sorted(one.graph.replays for one in step.captured.values()) == replays


def test_the_largest_shape_begins_the_pool_and_a_new_one_finds_no_leavings(recorder, monkeypatch):
    """Every shape is larger than those before it; what is let go has no gradients left in its memory."""
    step, calls = recorder([]), []

    def emptied():
        calls.append(("emptied", len(step.captured), step.pool, sum(p.grad is not None for p in step.parameters)))

    monkeypatch.setattr(torch.cuda, "empty_cache", emptied)
    trained(step, "aa")
    of_a, count = next(iter(step.captured.values())), len(step.parameters)
    trained(step, "bbaab")
    assert calls == [("emptied", 0, None, 0), ("emptied", 1, "pool", count), ("emptied", 0, None, 0)]  # a and b are new; b is captured
    assert len(step.captured) == 2 and of_a not in step.captured.values() and step.off is None


def test_a_capture_is_told_as_time_that_is_no_steps(recorder, monkeypatch):
    """Steps under way are waited for before it begins."""
    step, found, clock = recorder([]), [], [0.0]
    monkeypatch.setattr(graphs.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: clock.__setitem__(0, clock[0] + 7))
    for shape in "aaaba":
        trained(step, shape)
        found.append(step.preparing)
    assert found == [0, 7, 0, 0, 0]  # the second of the capture's waits


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
        if len(calls) == 2:
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
    assert found == expected and calls == ["emptied", 1, "emptied", 0] and step.captured == {} and step.pool is None
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
