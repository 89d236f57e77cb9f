"""What the kernels share: the product of two tiles, the sum of stretches, how launchers look at tensors, and what is compiled ahead. It computes no op."""

import dataclasses
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "yes", "true", "on"))
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""The dtypes that the kernels take, by Triton's names."""
SUMMED = 1024
"""Numbers that one program of `sum_stretches` sums: its BLOCK."""


@triton.jit
def dot(a, b, total):
    """total [m, n] fp32 + a [m, k] @ b [k, n]: products of two bf16 or fp16 values are exact and summed in fp32; float32 stays float32 (no TF32).

    m, n and k are at least 16. Triton's interpreter multiplies the bits of bf16 as whole numbers, so there tiles are widened first; the result is the same.
    """
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def sum_stretches(partial, total, number, stretches, BLOCK: tl.constexpr):
    """partial [stretches, N] fp32 -> total [N]: the sum over the stretches, in their order."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    found = tl.zeros([BLOCK], tl.float32)
    for i in range(0, stretches):
        found += tl.load(partial + i * number + n, mask=n < number, other=0.0)
    tl.store(total + n, found, mask=n < number)


def ceil_div(n: int, d: int) -> int:
    return -(-n // d)


def power(n: int, least: int = 16) -> int:
    """The smallest power of two that is >= n and >= least: tiles are that wide."""
    return max(least, triton.next_power_of_2(n))


def expect(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = tuple(DTYPES), device: torch.device | None = None) -> None:
    """Refuse by name what a launcher cannot take. shape: expected sizes, -1 is any. Raises ValueError with expected and got."""
    if tensor.dim() != len(shape) or any(want not in (-1, have) for want, have in zip(shape, tensor.shape)):
        raise ValueError(f"{op}, {name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{op}, {name}: expected one of {', '.join(str(d).removeprefix('torch.') for d in dtypes)}, got {str(tensor.dtype).removeprefix('torch.')}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{op}, {name}: expected a tensor on {device}, got one on {tensor.device}")


def product_dtype(x: Tensor) -> torch.dtype:
    """What a library product of x would be computed in: autocast's dtype where it is on, else x's."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def on(tensor: Tensor):
    """A context in which launches go to the tensor's own CUDA device, and to its current stream; nothing on a CPU (interpreter)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else _Nothing()


class _Nothing:
    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


@dataclasses.dataclass(frozen=True)
class Spec:
    """What of a kernel file is compiled without a device (bench/compile_report.py): one kernel at its default tiles. `specs(arch)` of a file lists them.

    signature: name of every run-time argument -> Triton's type ("*bf16", "i32", "fp32"), in the kernel's order. constants: name -> value of every tl.constexpr
    argument; an optional pointer that is None is one of them. aligned: whole-number arguments that are multiples of 16 where it matters; pointers always are.
    """

    name: str
    kernel: object
    signature: dict[str, str]
    constants: dict[str, object]
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] = ()
