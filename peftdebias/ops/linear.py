"""x W^T + bias, by the library that multiplies fastest on this processor.

torch's float32 products go to its BLAS, which is MKL in the usual builds, and MKL uses AVX-512 on Intel's processors only; oneDNN, which torch carries too, uses it on
all. Where AVX-512 multiplies no faster than AVX2 does (AMD's family 25) it takes a wide W for oneDNN to gain. bench/run.py linear measures both. oneDNN makes code for every
shape that it meets and keeps it (0.3 ms and about as many MiB each), so the rows of a batch, never as many twice, go in pieces of few sizes.

What it adds over torch.nn.functional.linear: that choice, for plain float32 on a CPU; there, inside of `bf16_products`, wide products in bf16; and on a GPU, where products
of 16 bits have trained parameters, gradients that are not rounded (kernels/fused/linear_trained.py). For all else it is that function. Two forms, "blas" and "onednn": by the
processor, or by PEFTDEBIAS_LINEAR, or `with dispatch.use("linear", "onednn"):`; "blas" wherever OpenMP may give oneDNN fewer threads than it counts on (openmp.py).

Letters: T rows, in and out widths.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from .. import kernels
from ..kernels import dispatch
from ..kernels.op import first_order
from ..processor import described, family, vendor
from . import compiled, openmp
from .norm import Normal

LEAST = 1e7  # FLOPs: below it a call costs more than it saves
PIECE, FEW, STEP, ROUND = 512, 256, 64, 16  # rows: of a piece at most; up to which a product is not cut; multiples of which a piece and an uncut product have
NARROW = 512  # inputs and outputs of W at least, or WIDE outputs, for oneDNN where AVX-512 is no faster than AVX2
LEAST_BF16 = 128  # inputs and outputs of W at least, for bf16 to gain more than rounding costs
WIDE = 8192  # columns from which a product is not cut: putting its pieces together would cost more than code for another number of rows

linear_ref = F.linear
"""x [..., in], weight [out, in], bias [out] or None -> [..., out]; the specification."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, normal: Normal | None = None) -> Tensor:
    """linear_ref by the library that is faster here. normal: what a norm keeps that x is made of; then a product that would keep x for its backward keeps that."""
    if trained_in_16_bits(x, weight, bias) and kernels.decide("linear_trained", x.device)[0] == "triton":
        return kernels.choose("linear_trained", reference=linear_ref, device=x.device)(x, weight, bias, normal)
    if not (bf16 := in_bf16(x, weight, bias)) and not _taken(x, weight, bias):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias, bf16) if compiled.recorded(x, weight, bias) else product(x, weight, bias, bf16)


def product_dtype(x: Tensor) -> torch.dtype:
    """What a product of x is computed in: autocast's dtype where it is on, else x's."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def trained_in_16_bits(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether parameters want gradients of a product in 16 bits, which kernels/fused/linear_trained.py keeps from rounding."""
    return compiled.recorded(*parameters) and in_16_bits(x, *parameters)


def in_16_bits(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether the products of x [T, in] with these are in 16 bits, and nobody watches them."""
    casts, dtype = torch.is_autocast_enabled(x.device.type), product_dtype(x)
    if dtype.itemsize != 2 or x.dim() != 2 or x.dtype == torch.float64:
        return False
    return (casts or all(p is None or p.dtype == dtype for p in parameters)) and compiled.plain(x, *parameters) and not kernels.watched()


def rounded_once(x: Tensor, parameters: list[Tensor]) -> contextlib.AbstractContextManager:
    """Inside the `with` block the parameters among these that such products of x would each round are rounded already, all in one launch."""
    wanted = [p for p in parameters if p.dtype == torch.float32 and p.requires_grad]
    if not wanted or not trained_in_16_bits(x, *wanted) or kernels.decide("linear_trained", x.device)[0] != "triton":
        return contextlib.nullcontext()
    from ..kernels.linear_trained import rounded_once  # Triton is there

    return rounded_once(wanted, product_dtype(x))


def form() -> tuple[str, str]:
    """("blas" or "onednn", why) for float32 on this CPU."""
    form = dispatch.asked("linear")
    if kernels.setting() in ("torch", "triton"):
        return "blas", "asked for by name" if form == "blas" else f"kernels are {kernels.setting()}"
    found = (form, "asked for by name") if form == "blas" or (form and _there()) else _faster()
    if found[0] == "onednn" and (trouble := openmp.too_few()):
        return "blas", f"{trouble}, and oneDNN would leave a part of its product undone"
    return found


@functools.cache
def _there() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def _faster() -> tuple[str, str]:
    if not _there():
        return "blas", "this torch carries no oneDNN for this processor"
    level, maker = torch.backends.cpu.get_cpu_capability(), vendor()
    if level != "AVX512" or maker == "GenuineIntel" or not torch.backends.mkl.is_available():
        return "blas", f"nothing known to be faster on {maker or 'this processor'}, {level}"
    wide = f"; by MKL, as fast for less, where W has fewer than {NARROW} inputs or outputs and no vocabulary's" if _halved() else ""
    return "onednn", f"{level} on {maker}, which MKL leaves unused there{wide}"


def _halved() -> bool:
    """Whether AVX-512 is worked off in two halves, so that AVX2 multiplies at the same rate."""
    return vendor() == "AuthenticAMD" and family() == 25


def _pays(weight: Tensor) -> bool:
    return len(weight) >= WIDE or min(weight.shape) >= NARROW or not _halved() or dispatch.asked("linear") == "onednn"


def _taken(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return _large(x, weight, bias) and _pays(weight) and form()[0] == "onednn"


def _large(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether it is a plain float32 product of two matrices on a CPU, large enough for oneDNN."""
    return (compiled.takes(x, weight, bias) and x.dim() == weight.dim() == 2 and 2.0 * x.numel() * len(weight) >= LEAST and len(x) >= ROUND
            and not torch.is_autocast_enabled("cpu"))


class _Linear(torch.autograd.Function):
    """dx = dy W, dW = dy^T x, dbias = the sum of dy's rows. Saves x where W is trained, W where x is; rounded where the product is."""

    @staticmethod
    def forward(ctx, x, weight, bias, bf16):
        to_x, to_weight, *_ = ctx.needs_input_grad
        if bf16:
            x, weight = x.bfloat16(), _rounded(weight)
        ctx.bf16 = bf16
        ctx.save_for_backward(x if to_weight else None, weight if to_x else None)
        return _multiplied(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        first_order("linear")
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias, _ = ctx.needs_input_grad
        mine = dy.bfloat16() if ctx.bf16 else dy
        return _multiplied(mine, weight.t()) if to_x else None, _multiplied_outer(mine, x) if to_weight else None, dy.sum(0) if to_bias else None, None


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, bf16: bool = False) -> Tensor:
    """x [T, in] W^T [in, out] + bias -> [T, out], without a gradient; weight may be the transpose of a matrix. bf16: in it. Else plain, where
    oneDNN is not taken."""
    if bf16:
        return _multiplied(x.bfloat16(), _rounded(weight), bias)
    return _onednn(x, weight, bias) if _taken(x, weight, bias) else F.linear(x, weight, bias)


# ---------------------------------------------------------------- bf16, on a CPU that multiplies it

_BF16 = contextvars.ContextVar("peftdebias_bf16_products", default=False)
_KEPT = contextvars.ContextVar("peftdebias_rounded_matrices", default=None)


@contextlib.contextmanager
def bf16_products() -> Iterator[None]:
    """Inside the `with` block `linear` rounds float32 on a CPU to bf16 for wide products: what comes of one is summed in float32, rounded once and float32 again,
    the bias added to that. Vectors, parameters and thin products, those of modules, stay float32. A backward does as its forward did."""
    token = _BF16.set(True)
    try:
        yield
    finally:
        _BF16.reset(token)


@contextlib.contextmanager
def rounding_once(trained: bool = False, kept: dict | None = None) -> Iterator[None]:
    """Inside the `with` block a parameter's matrix is rounded for the first of those products, and again when somebody has written to it or put another in its place; what is
    written to a few numbers of its `data` alone is not seen. It takes two bytes a number until the block ends. trained: those that want gradients too, where nothing is trained.
    kept: where the rounded ones are kept, for further blocks."""
    token = _KEPT.set(({} if kept is None else kept, trained))
    try:
        yield
    finally:
        _KEPT.reset(token)


def _rounded(weight: Tensor) -> Tensor:
    kept, trained = _KEPT.get() or (None, False)
    owner = weight if isinstance(weight, Parameter) else weight._base  # what a slice or a transpose is of
    if kept is None or not isinstance(owner, Parameter) or (owner.requires_grad and not trained) or owner.is_inference() or not owner.is_contiguous():
        return weight.bfloat16()  # of what is made in inference mode nobody counts the writes
    found, state = kept.get(id(owner)), _state(owner, trained)
    if found is None or found[0] != state:
        with torch.inference_mode(False):  # a backward may want what a validation has rounded
            found = kept[id(owner)] = state, owner.detach().bfloat16(), owner, owner.detach()  # held, so that neither id nor address becomes another's
    return found[1] if weight is owner else found[1].as_strided(weight.shape, weight.stride(), weight.storage_offset() - owner.storage_offset())


def _state(parameter: Parameter, trained: bool) -> tuple:
    """What is another one after somebody has written to it or put another tensor in its place. trained: also by torch's fused optimizers, which count no writes and change every
    number."""
    some = parameter.detach().view(-1)[::max(1, parameter.numel() // 64)].sum().item() if trained else 0.0
    return parameter._version, parameter.data_ptr(), some


def no_bf16() -> str:
    """Why this CPU gains nothing by bf16, or would err, in words; empty where it multiplies it."""
    if not _there():
        return "this torch carries no oneDNN for this processor"
    if not {"avx512_bf16", "amx_bf16"} & set(described().get("flags", "").split()):
        return "a processor without AVX-512 BF16 and AMX"
    if not _multiplies_bf16():
        return "oneDNN is told to do without (ONEDNN_MAX_CPU_ISA)"
    return openmp.too_few()


@functools.cache
def _multiplies_bf16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def in_bf16(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether this product is one of those."""
    return not torch.compiler.is_compiling() and _BF16.get() and _large(x, weight, bias) and min(weight.shape) >= LEAST_BF16 and not openmp.too_few()


def _multiplied(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`product` of two in float32 or in bf16, float32."""
    if x.dtype == torch.float32:
        return _onednn(x, weight, bias)
    y = F.linear(x, weight).float() if kernels.setting() == "torch" else _onednn(x, weight)
    return y if bias is None else y.add_(bias)


def _multiplied_outer(dy: Tensor, x: Tensor) -> Tensor:
    """dy^T x [out, in] of dy [T, out] and x [T, in] in float32 or in bf16, float32."""
    return (dy.t() @ x).float() if x.dtype != torch.float32 and kernels.setting() == "torch" else _onednn_outer(dy, x)


# ---------------------------------------------------------------- by oneDNN

def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`product`, float32 also of bf16, by pieces of the rows."""
    x, rows = _apart(x), len(x)
    with torch.no_grad():
        if rows <= FEW or len(weight) >= WIDE:
            return _call(_filled(x, -(-rows // ROUND) * ROUND), weight, bias)[:rows].float()
        y = x.new_empty(rows, len(weight), dtype=torch.float32)
        for start, size in pieces(rows):
            y[start:start + size] = _call(x[start:start + size], weight, bias)
    return y


def _onednn_outer(dy: Tensor, x: Tensor) -> Tensor:
    """dy^T x [out, in] of dy [T, out] and x [T, in]."""
    rows = len(x) // STEP * STEP
    if not rows:
        return dy.float().t() @ x.float()
    dy, x = _apart(dy), _apart(x)
    with torch.no_grad():
        y = _call(dy[:rows].t(), x[:rows].t(), None).float()
        return y if rows == len(x) else y.addmm_(dy[rows:].t().float(), x[rows:].float())


def pieces(rows: int) -> list[tuple[int, int]]:
    """(first row, how many) of parts that cover more than FEW rows: one size as often as it goes, and for the rest a multiple of STEP that ends with the last row.
    It may begin inside the part before, which costs less than a call for a few rows."""
    whole = PIECE if rows >= PIECE else FEW
    rest = -(-(rows % whole) // STEP) * STEP
    return [(start, whole) for start in range(0, rows - whole + 1, whole)] + ([(rows - rest, rest)] if rest else [])


def _call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _apart(x: Tensor) -> Tensor:
    """x itself where its rows lie apart and neighbours in a row side by side, else a copy."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _filled(x: Tensor, rows: int) -> Tensor:
    """x with rows behind that nobody looks at, `rows` in all: what its memory holds there, as the logits of a product like this do, else zeros."""
    if len(x) == rows:
        return x
    end = x.storage_offset() + (rows - 1) * x.stride(0) + x.shape[1]
    if end * x.element_size() <= x.untyped_storage().nbytes():
        return x.as_strided((rows, x.shape[1]), x.stride())
    return F.pad(x, (0, 0, 0, rows - len(x)))
