"""One training step: forward, backward, clipping, AdamW. Nothing in it waits for the device; the loss that it returns is still there.

    step = Step(model, task, optimizer, parameters, clip=1.0)
    loss = step(batch, rate)

What it adds over training.py, which decides how many steps there are and at which rate: how a step runs. Step is the specification; Compiled hands the forward pass and
its backward to torch.compile, each as one graph; graphs.Graphed replays the whole step as a CUDA graph. The last two bring batches to a few shapes first (shapes.py).
"""

import importlib
import time
import types
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter

from . import kernels
from .batches import Batch
from .encoder import Model
from .errors import PeftDebiasError
from .lowered import autocast
from .optimizer import FlatAdamW, LargeAdamW, WholeAdamW
from .shapes import Shape, fill, shape_of


class Step:
    """One update of `parameters`. task: see tasks.MaskedLM. precision: as lowered.autocast has it. pull: called after the backward, adds a gradient of its own to
    the parameters'. say: hears lines that a user should read, each once. preparing: seconds of the last step, where it was compiled or captured first, else 0
    (what Triton compiles at a kernel's first launch is not among them)."""

    preparing = 0.0

    def __init__(self, model: Model, task, optimizer: FlatAdamW | WholeAdamW | LargeAdamW, parameters: dict[str, Parameter], *, clip: float = 1.0, precision: str = "float32",
                 pull: Callable[[], None] | None = None, say: Callable[[str], None] = lambda line: None):
        self.model, self.loss, self.optimizer, self.parameters = model, task.loss, optimizer, list(parameters.values())
        self.clip, self.precision, self.pull, self.say = clip, precision, pull, say

    def __call__(self, batch: Batch, rate: float) -> Tensor:
        """batch: on the host. Returns the loss, [], detached and on the model's device."""
        self.optimizer.set_rate(rate)
        loss = self.gradients(batch.to(self.model.device))
        self.optimizer.step()
        return loss

    def gradients(self, batch: Batch) -> Tensor:
        """Leaves gradients in the parameters, clipped, or as the optimizer will clip them; batch on the device."""
        self.optimizer.zero_grad(set_to_none=True)  # before the forward pass, beside whose activations they need not be
        with autocast(self.model.device, self.precision):
            loss = self.loss(self.model, batch)
        loss.backward()
        if self.pull is not None:
            self.pull()
        self.optimizer.clip(self.parameters, self.clip)
        return loss.detach()

    def shape_of(self, batch: Batch) -> Shape:
        """The fixed shape that a host batch is brought to."""
        return shape_of(batch, self.model.encoder.longest)

    def shaped(self, batch: Batch) -> Batch:
        """It in that shape."""
        return fill(batch, self.shape_of(batch))


class Compiled(Step):
    """Step under torch.compile, without graph breaks; the first shape is compiled when it is seen, from the second on with sizes that may vary."""

    def __init__(self, *arguments, backend: str = "inductor", **settings):
        super().__init__(*arguments, **settings)
        kernels.load(self.model.device)
        # Inductor has a generator of its own; the seed of a pass shall be the one that eager draws.
        options = {"fallback_random": True} if backend == "inductor" else None
        self.loss = torch.compile(_by_own_code(self.loss), fullgraph=True, backend=backend, options=options)

    def __call__(self, batch: Batch, rate: float) -> Tensor:
        began, graphs = time.perf_counter(), _graphs()
        try:
            loss = super().__call__(self.shaped(batch), rate)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            cause = error.inner_exception
            said = (str(cause).strip().splitlines() or [""])[0]
            wanted = "files that are whole (a compilation that was stopped can leave one that is not: remove it)" if isinstance(cause, ImportError) else "a compiler that works"
            raise PeftDebiasError(f"--step compiled: torch.compile cannot build the step: {type(cause).__name__}: {said}; expected {wanted}, or --step eager") from error
        except OSError as error:
            raise _unkept(error) from error
        made = _graphs() - graphs
        self.preparing = time.perf_counter() - began if made > 0 else 0.0
        if made > 0:
            self.say(f"step: compiled {'once' if made == 1 else f'{made} times'}, in {self.preparing:.0f} s")
        return loss


def expect_compiler() -> None:
    """Raises PeftDebiasError where the environment turns torch.compile off, or leaves it no folder to write to, which it makes when it is loaded."""
    try:
        off = importlib.import_module("torch._dynamo.config").disable
    except OSError as error:
        raise _unkept(error) from error
    if off:
        raise PeftDebiasError("--step compiled: expected torch.compile, which the environment turns off here (TORCH_COMPILE_DISABLE, TORCHDYNAMO_DISABLE); use eager")


def _unkept(error: OSError) -> PeftDebiasError:
    return PeftDebiasError(f"--step compiled: torch.compile cannot keep what it builds: {error.filename or 'its files'}: {error.strerror or error}; expected a folder that it can "
                           "write to (TORCHINDUCTOR_CACHE_DIR), or --step eager")


def _by_own_code(loss: Callable) -> Callable:
    """The same function or method. Dynamo keeps the graphs of a code object together, and only so many: those of one training are not another's."""
    function = getattr(loss, "__func__", loss)
    if not isinstance(function, types.FunctionType):
        return loss
    own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return own if function is loss else types.MethodType(own, loss.__self__)


def _graphs() -> int:
    """How many graphs this process has compiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
