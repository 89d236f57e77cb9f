"""What the bindings to csrc/ops.cpp share: the calls, which tensors they take, how they are registered.

A compiled op is a torch.autograd.Function around ctypes calls, a few microseconds each; it is registered beside its twin where the library is there. Every one asks
`takes` first: for other tensors than plain float32 on a CPU, under torch.compile and torch.export, where such a call cannot be traced, and under torch.func and in forward mode,
of which it knows nothing, the twin does the work.
"""

import ctypes

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import kernels, native
from ..kernels.dropout_ref import Drop, threshold_of

_DROP = "plli"  # seed, site, threshold; threads
CALLS = {
    "dropout": "plpll" + _DROP,
    "norm_forward": "plplppppppllf" + _DROP,
    "norm_backward": "plpppppppll" + _DROP,
    "gelu": "plplppplli",
    "adamw": "pppppldddi",
    "loss_forward": "ppppplli",
    "loss_backward": "pppppplli",
    "attention_forward": "plplplpplpppllll" + _DROP,
    "attention_backward": "plplplpplpplplplplppllll" + _DROP,
}
"""The library's functions without their prefix, an argument a letter: p pointer, l int64, i int, f float, d double; what they are stands in csrc/ops.cpp."""
LEVEL = {"ops_limit": ("i", None), "ops_level": ("", ctypes.c_int)}
"""What says which processor's kernels run: arguments and result, which is no code."""

_TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float, "d": ctypes.c_double}
_PLAIN = (Tensor, Parameter)
_ERRORS = {1: (MemoryError, "no memory for the sums of its threads"), 2: (IndexError, "expected targets inside the vocabulary, got one outside")}


def _functions() -> dict:
    found, trouble = native.load()
    if found is None:
        if native.asked() == "auto":
            native.say_once(trouble)
        return {}
    functions = {}
    for name, (letters, result) in ({name: (letters, ctypes.c_int) for name, letters in CALLS.items()} | LEVEL).items():
        functions[name] = getattr(found, "peftdebias_" + name)
        functions[name].argtypes, functions[name].restype = [_TYPES[letter] for letter in letters], result
    return functions


FUNCTIONS = _functions()
"""Name in CALLS or LEVEL -> the function; empty where the library is not."""


def register(op: str):
    """Decorator: the function below is the "native" implementation of `op`, where there is the library."""
    return kernels.register(op, "native") if FUNCTIONS else lambda function: function


def call(name: str, *arguments) -> None:
    """Raises MemoryError where the library has none, IndexError where a target is no index."""
    code = FUNCTIONS[name](*arguments)
    if code:
        raise _ERRORS[code][0](f"peftdebias._native, {name}: {_ERRORS[code][1]}")


def empty(*shape: int) -> Tensor:
    """Memory for an op to write: float32 on the CPU, whatever torch's defaults are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def takes(*tensors: Tensor | None) -> bool:
    """Whether compiled ops take these tensors, here and now; None is taken."""
    return plain(*tensors) and all(t is None or (t.dtype == torch.float32 and t.is_cpu and not t.is_neg()) for t in tensors)  # negated: their memory is not


def plain(*tensors: Tensor | None) -> bool:
    """Whether these are tensors with values, and nobody traces or transforms; None is one."""
    return not torch.compiler.is_compiling() and not kernels.transformed() and all(t is None or type(t) in _PLAIN for t in tensors)


def recorded(*tensors: Tensor | None) -> bool:
    """Whether a backward may come."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def lined(x: Tensor) -> Tensor:
    """x itself where neighbours in a row lie next to each other and their memory says what they are (no negated view, which a gradient may be), else a copy."""
    x = x.resolve_neg()
    return x if x.stride(-1) == 1 else x.contiguous()


def pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def drawing(drop: Drop | None) -> tuple[int | None, int, int, int]:
    """What calls that drop take at the end: seed, site, threshold, threads. Raises ValueError on a seed that C cannot read."""
    if drop is None:
        return None, 0, 0, torch.get_num_threads()
    if drop.seed.dtype != torch.int64 or drop.seed.numel() != 1 or not drop.seed.is_cpu:
        raise ValueError(f"dropout: expected a seed of int64 [1] on the cpu, got {drop.seed.dtype} {list(drop.seed.shape)} on {drop.seed.device}")
    return drop.seed.data_ptr(), drop.site, threshold_of(drop.rate), torch.get_num_threads()
