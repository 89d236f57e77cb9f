"""Which implementation of an op runs. Imported as `peftdebias.kernels`; needs torch only, and knows nothing of peftdebias.

    attention = kernels.choose("attention", reference=attention_ref, device=x.device)

An op has up to three implementations: "torch" (the caller's plain twin, always there), "native" (csrc on a CPU) and "triton" (CUDA).
`PEFTDEBIAS_KERNELS=auto|torch|native|triton`, or `with kernels.use("torch"):`, forces one; a forced one that does not exist is an error,
`auto` takes the fastest that the device can run and falls back to the twin. `decide` is the one place where that is decided, in words as well.

The Triton files are imported when one of their ops is first asked for on a CUDA device (or forced): importing this package does not import triton, and
works where there is none. Under TRITON_INTERPRET=1 they run on a CPU, slowly, for whoever forces "triton".
"""

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import os

import torch
from torch.autograd import forward_ad

KINDS = ("auto", "torch", "native", "triton")

TRITON: dict[str, str] = {
    "adapter": "adapter",
    "adamw": "adamw",
    "adamw_of_many": "adamw",
    "attention": "attention",
    "dropout": "dropout",
    "embed": "embeddings",
    "feed_forward": "feed_forward",
    "gelu": "gelu",
    "linear_trained": "linear_trained",
    "lora_grads": "lora_grads",
    "lora_linear": "lora",
    "lora_write": "lora_write",
    "lora_written": "lora",
    "mlm_loss": "mlm_loss",
    "norm": "norm",
    "sparse_add": "sparse",
}
"""op -> the file here whose import registers its Triton implementation."""

WIDEST = {"attention": 128, "embed": 4096, "norm": 4096}
"""op -> the columns of a row (attention: of a head) that its Triton implementation takes at most."""

LEAST = (8, 0)
"""The compute capability from which on the kernels run: the first that multiplies tiles of bf16."""

_registry: dict[tuple[str, str], object] = {}
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("peftdebias_kernels", default=None)


def register(op: str, kind: str):
    """Decorator: the function below is the `kind` ("native" or "triton") implementation of `op`."""
    if kind not in KINDS[2:]:
        raise ValueError(f"kind of kernel: expected one of {KINDS[2:]}, got {kind!r}")

    def enter(function):
        _registry[op, kind] = function
        return function

    return enter


def setting() -> str:
    """What is asked for now: the innermost `use`, else PEFTDEBIAS_KERNELS, else "auto"."""
    kind = _forced.get() or os.environ.get("PEFTDEBIAS_KERNELS", "auto")
    if kind not in KINDS:
        raise ValueError(f"PEFTDEBIAS_KERNELS: expected one of {', '.join(KINDS)}, got {kind!r}")
    return kind


@contextlib.contextmanager
def use(kind: str):
    """Force one kind of implementation inside the `with` block (per thread and task)."""
    if kind not in KINDS:
        raise ValueError(f"kernels.use: expected one of {', '.join(KINDS)}, got {kind!r}")
    token = _forced.set(kind)
    try:
        yield
    finally:
        _forced.reset(token)


def registered() -> set[str]:
    """The ops of which there is more than a twin here, whatever can run."""
    return {op for op, _ in _registry}


class NoKernel(LookupError):
    """A kind that was asked for by name has no such op here."""


def choose(op: str, reference, device=None, width: int = 1):
    """The implementation of `op` to call now. `reference` is the caller's plain-torch twin.

    device: the torch.device the tensors live on; None is a CPU. width: columns of the tensors' rows, for the ops of WIDEST. Raises NoKernel where a forced kind has
    no such op.
    """
    kind, why = decide(op, device, width > WIDEST.get(op, width))
    if kind is None:
        raise NoKernel(why)
    return reference if kind == "torch" else _registry[op, kind]


def constant(function):
    """Decorator: under torch.compile what the function says when it traces stands. That is all that torch.compiler.assume_constant_result does, but for importing the compiler,
    which takes seconds."""
    function._dynamo_marked_constant = True
    return function


@constant
def decide(op: str, device=None, too_wide: bool = False) -> tuple[str | None, str]:
    """(the kind that `choose` takes for `op` on `device`, why, in words); None where it would raise, and what it would say. too_wide: of rows above WIDEST, which a
    Triton implementation that is asked for by name refuses itself."""
    kind, device = setting(), torch.device(device or "cpu")
    if kind == "torch":
        return "torch", "asked for by name"
    if kind == "auto":
        if transformed():
            return "torch", "torch.func or forward mode asks for more than a backward, which plain torch has"
        kind = "triton" if device.type == "cuda" else "native"
        trouble = missing(op, kind, device) or (f"the kernel takes at most {WIDEST[op]} columns" if too_wide and kind == "triton" else "")
        if not trouble:
            return kind, f"the fastest on {device.type}"
        return "torch", f"{trouble}; plain torch does its work"
    trouble = missing(op, kind, device)
    if trouble:
        return None, f"{op}: {trouble}; no {kind} implementation here, expected one of {available(op)}"
    return kind, "asked for by name"


def watched() -> bool:
    """Whether somebody traces, watches every op that torch runs, or transforms functions: then what is called must be an op that torch knows."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active()


def transformed() -> bool:
    """Whether torch.func transforms functions, or forward mode carries tangents: kernels have a backward and nothing else, and would say nothing of a tangent."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def load(device=None) -> None:
    """Read the files of all kernels that would run on `device` now. For torch.compile: what is registered while it traces it does not see."""
    for op in TRITON:
        decide(op, device)


def missing(op: str, kind: str, device: torch.device | str = "cuda") -> str:
    """Why `op` has no `kind` implementation that runs on `device`; empty where it has one."""
    if kind == "triton" and op in TRITON:
        device = torch.device(device)
        trouble = no_triton() or (unsuited(device.index) if device.type == "cuda" else "" if interpreted() else f"Triton does not run on {device.type}")
        if trouble:
            return trouble
        _load(TRITON[op])
    return "" if (op, kind) in _registry else f"no {kind} kernel for this op"


def available(op: str) -> list[str]:
    """The kinds that `op` has here: always "torch", then what is registered."""
    return ["torch"] + [kind for kind in KINDS[2:] if (op, kind) in _registry]


@functools.cache
def no_triton() -> str:
    """Why Triton cannot be used here; empty where it can. Finds it without importing it."""
    return "" if importlib.util.find_spec("triton") else "triton is not installed"


def unsuited(index: int | None) -> str:
    """Why the CUDA device of that number (None: the current one) cannot run the kernels here; empty where it can, or where there is none."""
    if torch.version.hip:
        return "the kernels are written for NVIDIA's GPUs, and this torch is for AMD's"
    if not torch.cuda.is_available():
        return ""
    return _too_old(torch.cuda.current_device() if index is None else index)


@functools.cache
def _too_old(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return "" if (major, minor) >= LEAST else f"the kernels need compute capability {LEAST[0]}.{LEAST[1]}, cuda:{index} has {major}.{minor}"


def interpreted() -> bool:
    """Whether Triton's interpreter is asked for (TRITON_INTERPRET=1, set before triton is imported): its kernels then run on a CPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "yes", "true", "on")


@functools.cache
def _load(file: str) -> None:
    importlib.import_module(f"{__name__}.{file}")
