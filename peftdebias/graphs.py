"""A training step replayed as a CUDA graph: one launch where there were hundreds, which pays where the host hands these over more slowly than the device does them.

What it adds over step.py: buffers. Batches come in a few fixed shapes (shapes.py); a shape seen for the first time trains eagerly, the second time its step is captured
and from then on replayed. All that changes between replays lies in device memory: the batch, in one buffer that one copy from pinned memory fills; the rates of AdamW;
dropout's seed, which torch's generator draws anew at each replay. What is captured is exactly Step.gradients and the optimizer's `apply`.

Memory: the captured steps share one pool, which the largest of them must have begun, or it grows in pieces that fit nothing else; so before a larger one is captured the
others are let go, and captured again when they come next. A step that runs eagerly needs its own beside that.

Where that cannot be, the step runs as step.Step does it, and one line says why. CUDA Graphs: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from .batches import Batch
from .shapes import Shape, fill
from .step import Step

MOST = 96
"""Shapes that are captured; each keeps its batch, its loss and what the optimizer reads. Activations and gradients share one pool: a gradient stands until the next capture or replay."""

OFF = "CUDA graphs: off, every step runs eagerly"
"""How the line begins that says why."""


@dataclasses.dataclass
class Captured:
    """inputs: the buffer that the graph reads; loss: what it writes; tables: what of the optimizer's it reads."""

    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    loss: Tensor
    tables: list[Tensor]


@contextlib.contextmanager
def recorded(graph: torch.cuda.CUDAGraph, device: torch.device, **how) -> Iterator[None]:
    """`torch.cuda.graph` on that device, which leaves torch as it was where the block raises: a capture that cannot be ended, as after an operation that it does not
    permit, leaves its own stream in place and the generator of random numbers in the middle of a capture."""
    with torch.cuda.device(device):
        before = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, **how):
                yield
        except Exception:
            torch.cuda.set_stream(before)
            with contextlib.suppress(Exception):
                torch.cuda.synchronize()
            with contextlib.suppress(Exception):
                generator = torch.cuda.default_generators[torch.cuda.current_device()]
                generator.graphsafe_set_state(generator.clone_state())
            raise


class Graphed(Step):
    """Step, replayed. `off` says why it is not, None where it is."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.seen: set[Shape] = set()
        self.captured: dict[Shape, Captured] = {}
        self.pool, self.stream = None, None
        self.off: str | None = None
        if self.model.device.type != "cuda":
            self._fall_back(f"expected a CUDA device, the model is on {self.model.device}")
        else:
            self.stream = torch.cuda.Stream(self.model.device)  # of the model's device, which need not be the current one

    def __call__(self, batch: Batch, rate: float) -> Tensor:
        self.preparing = 0.0
        if self.off is not None:
            return super().__call__(batch, rate)
        shape = self.shape_of(batch)
        known = self.captured.get(shape)
        if known is None and shape not in self.seen:
            self.seen.add(shape)
            torch.cuda.empty_cache()  # what eager steps of other shapes left fits few of this one's tensors
            return self.eagerly(batch, rate)
        if known is None and len(self.captured) >= MOST:
            return self.eagerly(batch, rate)
        self.optimizer.set_rate(rate)
        host = fill(batch, shape).staged(pinned=True)
        if known is None:
            torch.cuda.synchronize(self.model.device)  # what is under way is no part of the capture's time
            began = time.perf_counter()
            known = self._capture(host, shape)
            if known is None:
                return super().__call__(batch, rate)
            self.captured[shape], self.preparing = known, time.perf_counter() - began
        known.inputs.copy_(host.flat, non_blocking=True)
        self.optimizer.advance()
        known.graph.replay()
        return known.loss.clone()  # the next replay writes over it

    def eagerly(self, batch: Batch, rate: float) -> Tensor:
        """In the fixed shape, on the stream that captures, as a capture needs its kernels warmed up. The memory of the captured steps is theirs alone, so this step needs
        room beside them; where there is none, they are given up."""
        self.optimizer.set_rate(rate)
        batch, main, trouble = self.shaped(batch), torch.cuda.current_stream(self.model.device), None
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            try:
                loss = self.gradients(batch.to(self.model.device))
            except torch.OutOfMemoryError:  # which holds on to what was allocated until it is let go
                if not self.captured:
                    raise
                trouble = "the device has no memory for a new shape of batch beside those captured"
            if trouble:
                self._fall_back(trouble)
                loss = self.gradients(batch.to(self.model.device))
            self.optimizer.step()
        main.wait_stream(self.stream)
        return loss

    def _capture(self, host, shape: Shape) -> Captured | None:
        """The step of this shape. Nothing is trained: a capture records. None, and a line, where the step cannot be captured."""
        if not self.optimizer.together:
            return self._fall_back("a trained parameter has no gradient")
        if self.captured and shape > max(self.captured):
            self._let_go()
        inputs = host.flat.to(self.model.device)
        batch, graph = host.on(inputs), torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.model.device)  # the copy as well
        try:
            with recorded(graph, self.model.device, pool=self.pool, stream=self.stream):
                loss = self.gradients(batch)
                self.optimizer.apply()
        except RuntimeError as error:
            self.optimizer.captured()  # of a launch that nobody will replay
            why = error.__context__ or error  # what broke the capture off, not that it could not be ended then
            return self._fall_back((str(why).strip().splitlines() or [type(why).__name__])[0])
        self.pool = graph.pool()
        return Captured(graph, inputs, loss, self.optimizer.captured())

    def _fall_back(self, why: str) -> None:
        self.off = why
        self._let_go()
        self.say(f"{OFF}: {why}")

    def _let_go(self) -> None:
        """Of the captured steps; their memory goes back to the device."""
        if self.stream is not None:
            torch.cuda.synchronize(self.model.device)  # replays may still run
        self.captured.clear()
        self.optimizer.zero_grad(set_to_none=True)  # gradients that a capture left lie in the graphs' memory
        self.pool = None
        if self.stream is not None:
            with contextlib.suppress(RuntimeError):  # where a capture was broken off, torch may hold that it goes on
                torch.cuda.empty_cache()
