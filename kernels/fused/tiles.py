"""What the kernels share: the product of two tiles, the sum of partial sums, how launchers look at tensors, and what is compiled ahead. It computes no op."""

import contextlib
import dataclasses
import functools
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "yes", "true", "on"))
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""The dtypes that the kernels take, by Triton's names."""


@triton.jit
def dot(a, b, total):
    """total [m, n] fp32 + a [m, k] @ b [k, n]: products of two bf16 or fp16 values are exact and summed in fp32; float32 stays float32 (no TF32).

    a and b are of one dtype; m, n and k are at least 16. Triton's interpreter multiplies the bits of bf16 as whole numbers, so there tiles are widened first; the result is the same.
    """
    if INTERPRETED:
        tl.static_assert(a.dtype == b.dtype, "a product of two dtypes, which no GPU has")
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def reciprocal(x):
    """1 / x fp32 within one unit of the last place, by one instruction where a division takes eight; 0 for |x| above 2^126."""
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def address(place, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """An address out of a table, int64, as a pointer to TYPE. ALIGNED: it is a multiple of 16."""
    found = tl.load(place).to(tl.pointer_type(TYPE))
    return tl.multiple_of(found, 16) if ALIGNED else found  # said of the pointer: of the number it would be forgotten


@triton.jit
def reduce(partial, result, chunks, rank, N, scale, rank_stride, column_stride, tile, k, CHUNKS: tl.constexpr, BN: tl.constexpr):
    """BN columns of row k of result [rank, N] = scale * sum over the chunks of partial fp32 [chunks, rank, N], in one order: the last stage of a sum over T, whose first
    sums chunks of rows. CHUNKS chunks at a time."""
    columns, total = tile * BN + tl.arange(0, BN), tl.zeros((BN,), tl.float32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        places = (chunk[:, None].to(tl.int64) * rank + k) * N + columns[None, :]
        total += tl.sum(tl.load(partial + places, mask=(chunk < chunks)[:, None] & (columns < N)[None, :], other=0.0), 0)
    tl.store(result + k * rank_stride + columns * column_stride, (total * scale).to(result.dtype.element_ty), mask=columns < N)


@triton.jit(do_not_specialize=["stretches"])
def sum_kernel(partial, result, stretches, N, CHUNKS: tl.constexpr, BN: tl.constexpr):
    """result [N] = the sum over the stretches of partial fp32 [stretches, N]. Programs (tile of columns)."""
    reduce(partial, result, stretches, 1, N, 1.0, N, 1, tl.program_id(0), 0, CHUNKS, BN)


def ceil_div(n: int, d: int) -> int:
    return -(-n // d)


def power(n: int) -> int:
    """The smallest power of two that is >= n and >= 16: tiles are that wide."""
    return max(16, 1 << (n - 1).bit_length())


def expect(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = tuple(DTYPES), device: torch.device | None = None) -> None:
    """Refuse by name what a launcher cannot take. shape: expected sizes, -1 is any. Raises ValueError with expected and got."""
    sizes = tensor.shape
    if len(sizes) != len(shape) or any([want not in (-1, have) for want, have in zip(shape, sizes)]):
        raise ValueError(f"{op}, {name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{op}, {name}: expected one of {', '.join(str(d).removeprefix('torch.') for d in dtypes)}, got {str(tensor.dtype).removeprefix('torch.')}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{op}, {name}: expected a tensor on {device}, got one on {tensor.device}")


def rows_together(tensor: Tensor) -> Tensor:
    """The tensor, copied only where neighbours in a row are not next to each other."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 and tensor.is_contiguous() else tensor.contiguous()


def product_dtype(x: Tensor) -> torch.dtype:
    """What a library product of x would be computed in: autocast's dtype where it is on, else x's."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def arch_of(tensor: Tensor) -> int:
    """80, 86, 90, 100, ...: `like` of the tensor's device, which tiles may go by; 90 for a CPU (interpreter)."""
    return _arch(tensor.device.index) if tensor.is_cuda else 90


@functools.cache
def _arch(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return like(10 * major + minor)


def like(arch: int) -> int:
    """The compute capability, without its point, whose tiles sm_`arch` takes. 86 stands for all that multiply tiles as sm_80 does and have 99 KB of shared memory a program:
    sm_86 and 89, and sm_120, which is newer than sm_100 and has nothing of it that these kernels use."""
    return 86 if 80 < arch < 90 or arch >= 120 else arch


def processors(tensor: Tensor) -> int:
    """How many multiprocessors the tensor's device has, for a launcher that gives each a program; 3 for a CPU (interpreter)."""
    return _processors(tensor.device.index) if tensor.is_cuda else 3


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def on(tensor: Tensor):
    """A context in which launches go to the tensor's own CUDA device, and to its current stream; nothing where that is the current device, or a CPU (interpreter)."""
    device = tensor.get_device()
    return _HERE if device < 0 or device == torch.cuda.current_device() else torch.cuda.device(device)


_HERE = contextlib.nullcontext()


def capturing(device: torch.device) -> bool:
    """Whether what is launched there now is recorded in a CUDA graph and runs later."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@dataclasses.dataclass(frozen=True)
class Spec:
    """What of a kernel file is compiled without a device (bench/compile_report.py): one kernel at its default tiles. `specs(arch)` of a file lists them.

    signature: name of every run-time argument -> Triton's type ("*bf16", "i32", "fp32"), in the kernel's order. constants: name -> value of every tl.constexpr
    argument; an optional pointer that is None is one of them. aligned: whole-number arguments that are multiples of 16 where it matters, none of them
    `do_not_specialize`, as counts are that change with the batch (docs/kernels.md); pointers always are. maxnreg: registers of a thread at most, None for the compiler's own
    limit.
    """

    name: str
    kernel: object
    signature: dict[str, str]
    constants: dict[str, object]
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] = ()
    maxnreg: int | None = None


def summed(stretches: int) -> dict[str, int]:
    """CHUNKS, BN and warps: few columns have few programs, so a program takes many stretches at a time."""
    return {"CHUNKS": 64, "BN": 32, "num_warps": 4} if stretches <= 256 else {"CHUNKS": 256, "BN": 16, "num_warps": 8}


def sum_stretches(partial: Tensor, result: Tensor) -> None:
    """result [N], of any dtype, = the sum over the stretches of partial fp32 [stretches, N], in one order. For a launcher, inside `on`."""
    (stretches, columns), sizes = partial.shape, summed(partial.shape[0])
    sum_kernel[(ceil_div(columns, sizes["BN"]),)](partial, result, stretches, columns, enable_fp_fusion=True, **sizes)


def sum_spec(stretches: int = 1) -> Spec:
    """sum_stretches as a line of a file's `specs`."""
    sizes = summed(stretches)
    warps, signature = sizes.pop("num_warps"), {"partial": "*fp32", "result": "*fp32", "stretches": "i32", "N": "i32"}
    return Spec(f"sum of {'many ' if stretches > 256 else ''}stretches", sum_kernel, signature, sizes, warps, aligned=("N",))
