"""LoRA, part two of three: the product with the low-rank product as its epilogue, dropout inside; and which of three forms runs.

Contract. lora_linear(x, weight, bias, a, b, scale, rate, seed, site) computes lora_linear_ref of peftdebias/methods/lora.py:
    y = x W^T + bias + s (z A^T) B^T,    z = x dropped with `rate` (dropout.py: bits from seed int64 [1] and site), or x itself at rate 0.
x [T, in] of fp32, bf16 or fp16, rows of any stride; W [out, in], bias [out] or None, A [r, in], B [out, r] of any of these dtypes (W is rounded to x's first, A and B
inside; under autocast all to its dtype); r >= 1, above 64 by the library alone. Returns y [T, out] in x's dtype. fp32 accumulation; u = z A^T is rounded to x's dtype
before it meets B, as a library's would be. Saves x, W, A, B and the seed, no mask and no u; overwrites none of them. Gradients of A and B come in their own dtype; W
and bias have gradients where they are asked for.

Derivation. With v = dY B [T, r] and u = z A^T:
    dx = dY W + (s / q) m * (v A)        m the mask, q the share kept; m / q is what dropout multiplies by
    dA = s v^T z,  dB = s dY^T u         (lora_grads.py)         dW = dY^T x,  dbias = column sums of dY

Forms. "written": W' = W + s B A was written once a step (lora_write.py), so forward and dx are library GEMMs; without dropout, for who wrote it: `lora_written`.
"epilogue": the two kernels below. "library": torch's own products, dropout from dropout.py. dispatch.py picks one by shape,
dtype and dropout.
What limits the epilogue form: it is as good as its GEMM, and a library's is hard to match; with dropout each of the out / BN programs of a row tile draws the mask.

Letters: T rows, I = in, O = out, R rank (padded to a power of two), BM, BN, BK rows, columns and depth of a tile.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import dispatch, register
from .dropout import dropout, keep
from .dropout_ref import threshold_of
from .lora_grads import MAX_RANK, check, lora_grads_op
from .op import op
from .tiles import DTYPES, Spec, ceil_div, dot, expect, on, power, product_dtype, rows_together

# ---------------------------------------------------------------- kernels, forward beside backward

@triton.jit
def _place(rows, columns, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, column tile) of this program: GROUP row tiles go through all columns together, so that both operands stay in L2."""
    down, across = tl.cdiv(rows, BM), tl.cdiv(columns, BN)
    program = tl.program_id(0)
    first = program // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    inside = program % (GROUP * across)
    return first + inside % height, inside // height


@triton.jit(do_not_specialize=["site"])
def forward_kernel(x, weight, bias, a, b, seed, y, T, I, O, x_stride, rank, site, threshold, low_scale, DROPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                   BK: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr):
    """y [T, O] of x [T, I], weight [O, I], bias [O] or None, a [rank, I], b [O, rank], seed int64 [1] or None; low_scale = s / q."""
    row_tile, column_tile = _place(T, O, BM, BN, GROUP)
    rows, columns, ranks = (row_tile * BM + tl.arange(0, BM)).to(tl.int64), column_tile * BN + tl.arange(0, BN), tl.arange(0, R)
    total, u = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, R), tl.float32)
    start = 0 if seed is None else tl.load(seed)
    for k in range(0, I, BK):
        depth = k + tl.arange(0, BK)
        value = tl.load(x + rows[:, None] * x_stride + depth[None, :], mask=(rows < T)[:, None] & (depth < I)[None, :], other=0.0)
        w = tl.load(weight + columns[None, :].to(tl.int64) * I + depth[:, None], mask=(columns < O)[None, :] & (depth < I)[:, None], other=0.0)  # [BK, BN]
        low = tl.load(a + ranks[None, :] * I + depth[:, None], mask=(ranks < rank)[None, :] & (depth < I)[:, None], other=0.0)  # [BK, R]
        total = dot(value, w, total)
        if DROPS:
            value = tl.where(keep(rows, k // 8, (I + 7) // 8, start, site, threshold, BK // 8), value, 0.0)
        u = dot(value, low.to(value.dtype), u)
    up = tl.load(b + columns[None, :] * rank + ranks[:, None], mask=(columns < O)[None, :] & (ranks < rank)[:, None], other=0.0)  # [R, BN]
    total = dot((u * low_scale).to(x.dtype.element_ty), up.to(x.dtype.element_ty), total)
    if bias is not None:
        total += tl.load(bias + columns, mask=columns < O, other=0.0).to(tl.float32)[None, :]
    tl.store(y + rows[:, None] * O + columns[None, :], total.to(y.dtype.element_ty), mask=(rows < T)[:, None] & (columns < O)[None, :])


@triton.jit(do_not_specialize=["site"])
def dx_kernel(dy, weight, a, b, seed, dx, T, I, O, dy_stride, rank, site, threshold, low_scale, DROPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
              BK: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr):
    """dx [T, I] of dy [T, O]; the others as in forward_kernel. The mask meets one tile of the result, once."""
    row_tile, column_tile = _place(T, I, BM, BN, GROUP)
    rows, columns, ranks = (row_tile * BM + tl.arange(0, BM)).to(tl.int64), column_tile * BN + tl.arange(0, BN), tl.arange(0, R)
    total, v = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, R), tl.float32)
    for k in range(0, O, BK):
        depth = k + tl.arange(0, BK)
        value = tl.load(dy + rows[:, None] * dy_stride + depth[None, :], mask=(rows < T)[:, None] & (depth < O)[None, :], other=0.0)
        w = tl.load(weight + depth[:, None].to(tl.int64) * I + columns[None, :], mask=(depth < O)[:, None] & (columns < I)[None, :], other=0.0)  # [BK, BN]
        up = tl.load(b + depth[:, None] * rank + ranks[None, :], mask=(depth < O)[:, None] & (ranks < rank)[None, :], other=0.0)  # [BK, R]
        total = dot(value, w, total)
        v = dot(value, up.to(value.dtype), v)
    low = tl.load(a + ranks[:, None] * I + columns[None, :], mask=(ranks < rank)[:, None] & (columns < I)[None, :], other=0.0)  # [R, BN]
    v = (v * low_scale).to(dy.dtype.element_ty)
    if DROPS:
        through = dot(v, low.to(dy.dtype.element_ty), tl.zeros((BM, BN), tl.float32))
        total += tl.where(keep(rows, column_tile * (BN // 8), (I + 7) // 8, tl.load(seed), site, threshold, BN // 8), through, 0.0)
    else:
        total = dot(v, low.to(dy.dtype.element_ty), total)
    tl.store(dx + rows[:, None] * I + columns[None, :], total.to(dx.dtype.element_ty), mask=(rows < T)[:, None] & (columns < I)[None, :])


# ---------------------------------------------------------------- sizes, specs, launchers

def tiles_for(dtype: torch.dtype, rank: int, drops: bool, forward: bool) -> dict[str, int]:
    """BM, BN, BK, R, GROUP and how the compiler schedules. A wide rank and a mask take registers: beside one of them the depth of a tile is halved, and the
    width of the forward's beside both."""
    if dtype == torch.float32:
        return {"BM": 32, "BN": 64, "BK": 32, "R": power(rank), "GROUP": 8, "num_warps": 8, "num_stages": 2}
    return {"BM": 128, "BN": 64 if drops and rank > 32 and forward else 128, "BK": 32 if drops or rank > 32 else 64, "R": power(rank), "GROUP": 8, "num_warps": 8, "num_stages": 3}


def specs(arch: int) -> list[Spec]:
    found = []
    for dtype, kind in DTYPES.items():
        for rank in (8, 64):
            for drops in (False, True):
                numbers = {"T": "i32", "I": "i32", "O": "i32", "rank": "i32", "site": "i32", "threshold": "i32", "low_scale": "fp32"}
                same = {name: f"*{kind}" for name in ("x", "weight", "bias", "y", "dy", "dx")} | {"a": "*fp32", "b": "*fp32", "x_stride": "i32", "dy_stride": "i32"}
                signature = same | numbers | ({"seed": "*i64"} if drops else {})
                for name, kernel in (("forward", forward_kernel), ("dx", dx_kernel)):
                    sizes = tiles_for(dtype, rank, drops, kernel is forward_kernel)
                    warps, stages = sizes.pop("num_warps"), sizes.pop("num_stages")
                    constants = {"DROPS": drops} | sizes | ({} if drops else {"seed": None})
                    own = {key: value for key, value in signature.items() if key in kernel.arg_names}
                    stride = "x_stride" if kernel is forward_kernel else "dy_stride"
                    found.append(Spec(f"{name}, {kind}, r {rank}{', dropout' if drops else ''}", kernel, own, constants, warps, stages, aligned=("I", "O", stride)))
    return found


def _launch(kernel, first: Tensor, columns: int, weight: Tensor, more: tuple, a: Tensor, b: Tensor, scale: float, rate: float, seed: Tensor | None, site: int) -> Tensor:
    """[T, columns]: `kernel` on `first`, x or dy. more: bias, for the forward."""
    first, a, b = rows_together(first), a.contiguous(), b.contiguous()
    rows, result = first.shape[0], torch.empty((first.shape[0], columns), dtype=first.dtype, device=first.device)
    if not result.numel():
        return result
    sizes, threshold = tiles_for(first.dtype, a.shape[0], rate > 0, kernel is forward_kernel), threshold_of(rate)
    with on(first):
        kernel[(ceil_div(rows, sizes["BM"]) * ceil_div(columns, sizes["BN"]),)](
            first, weight.contiguous(), *more, a, b, seed if rate else None, result, rows, weight.shape[1], weight.shape[0], first.stride(0), a.shape[0], site, threshold,
            scale * 65536 / threshold, DROPS=rate > 0, enable_fp_fusion=True, **sizes)
    return result


def form_for(first: Tensor, weight: Tensor, rank: int, rate: float, asked: str) -> str:
    """"epilogue" or "library" for a product of `first`, x or dy. Looked up when the op runs, so a compiled graph holds no choice but the one `asked` for by name."""
    if rank > MAX_RANK:
        return "library"
    if asked in ("epilogue", "library"):
        return asked
    return dispatch.pick("lora_linear", ("epilogue", "library"), device=first.device, dtype=first.dtype, dropout=rate > 0, rows=first.shape[0], inside=weight.shape[1],
                         outside=weight.shape[0], rank=rank)


# ---------------------------------------------------------------- the product, by the epilogue or by the library

@op("lora_linear", fake=lambda x, weight, *others: x.new_empty(x.shape[0], weight.shape[0]))
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, rate: float, seed: Tensor | None, site: int,
             form: str, grads: str) -> Tensor:
    """form and grads: those of lora_linear and lora_grads that are asked for by name, or nothing; a backward has what its forward was asked for."""
    if form_for(x, weight, a.shape[0], rate, form) == "epilogue":
        return _launch(forward_kernel, x, weight.shape[0], weight, (None if bias is None else bias.contiguous(),), a, b, scale, rate, seed, site)
    z = dropout(x, rate, seed, site) if rate else x
    return F.linear(x, weight, bias).addmm_(F.linear(z, a.to(x.dtype)), b.to(x.dtype).t(), alpha=scale)


@op("lora_dx", fake=lambda dy, weight, *others: dy.new_empty(dy.shape[0], weight.shape[1]))
def _dx(dy: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, rate: float, seed: Tensor | None, site: int, form: str) -> Tensor:
    if form_for(dy, weight, a.shape[0], rate, form) == "epilogue":
        return _launch(dx_kernel, dy, weight.shape[1], weight, (), a, b, scale, rate, seed, site)
    through = (dy @ b.to(dy.dtype)) @ a.to(dy.dtype)
    return (dy @ weight).add_(dropout(through, rate, seed, site) if rate else through, alpha=scale)


def _save(ctx, inputs, output):
    x, weight, bias, a, b, ctx.scale, ctx.rate, seed, ctx.site, ctx.form, ctx.grads = inputs
    needs = ctx.needs_input_grad
    ctx.save_for_backward(x if needs[1] or needs[3] or needs[4] else None, weight if needs[0] else None, a, b, seed)


def _backward(ctx, dy: Tensor):
    x, weight, a, b, seed = ctx.saved_tensors
    needs, how = ctx.needs_input_grad, (ctx.scale, ctx.rate, seed, ctx.site)
    dx = _dx(dy, weight, a, b, *how, ctx.form) if needs[0] else None
    da, db = lora_grads_op(x, dy, [a], [b], ctx.scale, 0, *how[1:], ctx.grads) if needs[3] or needs[4] else (None, None)
    return (dx, dy.t() @ x if needs[1] else None, dy.sum(0) if needs[2] else None, da if needs[3] else None, db if needs[4] else None, None, None, None, None, None, None)


_forward.differentiate(_save, _backward)


# ---------------------------------------------------------------- the written form

@op("lora_written", fake=lambda x, written, *others: x.new_empty(x.shape[0], written.shape[0]))
def _written(x: Tensor, written: Tensor, bias: Tensor | None, a: list[Tensor], b: list[Tensor], scales: list[float], firsts: list[int],
             grads: str) -> Tensor:
    return F.linear(x, written, bias)


def _save_written(ctx, inputs, output):
    x, written, bias, a, b, ctx.scales, ctx.firsts, ctx.grads = inputs
    ctx.pieces, ctx.has_bias = len(a), bias is not None
    ctx.save_for_backward(x, written, *a, *b)


def _backward_written(ctx, dy: Tensor):
    x, written, *thin = ctx.saved_tensors
    a, b = thin[:ctx.pieces], thin[ctx.pieces:]
    to_a, to_b = [], []
    for i, n in _alike(a, b, ctx.scales, ctx.firsts):
        apart = ctx.firsts[i + 1] - ctx.firsts[i] if n > 1 else 0
        da, db = lora_grads_op(x, dy[:, ctx.firsts[i]:], a[i:i + n], b[i:i + n], ctx.scales[i], apart, 0.0, None, 0, ctx.grads)
        to_a += da.split(len(a[i]))
        to_b += db.split(len(b[i]))
    return dy @ written if ctx.needs_input_grad[0] else None, None, dy.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None, to_a, to_b, None, None, None


def _alike(a: list[Tensor], b: list[Tensor], scales: list[float], firsts: list[int]) -> list[tuple[int, int]]:
    """[(first piece, how many)]: neighbours of one shape and scale, equally far apart, that lora_grads_op takes together."""
    runs = []
    for i in range(len(a)):
        start, n = runs[-1] if runs else (0, 0)
        same = n and (a[i].shape, b[i].shape, a[i].dtype, scales[i]) == (a[start].shape, b[start].shape, a[start].dtype, scales[start])
        even = n < 2 or firsts[i] - firsts[i - 1] == firsts[start + 1] - firsts[start]
        if same and even and (n + 1) * len(a[i]) <= MAX_RANK and firsts[i] > firsts[i - 1]:
            runs[-1] = start, n + 1
        else:
            runs.append((i, 1))
    return runs


_written.differentiate(_save_written, _backward_written)


@register("lora_written", "triton")
def lora_written(x: Tensor, written: Tensor, bias: Tensor | None, pieces: list[tuple[int, Tensor, Tensor, float]]) -> Tensor:
    """lora_written_ref of peftdebias/written.py. x [T, in] and written W' [out, in] of one dtype, bias [out] or None; pieces (first row, A, B, s) say what W' holds.

    The product sees W' alone; the gradients of A and B come from x and dY. W' itself has none: W is frozen. Raises ValueError, naming the tensor.
    """
    if not pieces:
        raise ValueError("lora_written: expected at least one piece, got none")
    for first, a, b, _ in pieces:
        check("lora_written", x, a, b, 0.0, None)
        expect("lora_written", "W'", written, (-1, x.shape[1]), (x.dtype,), x.device)
        if first + b.shape[0] > written.shape[0]:
            raise ValueError(f"lora_written, piece: expected rows within {written.shape[0]}, got {first} to {first + b.shape[0]}")
    return _written(x, written, bias, [p[1] for p in pieces], [p[2] for p in pieces], [float(p[3]) for p in pieces], [p[0] for p in pieces],
                    dispatch.asked("lora_grads") or "")


# ---------------------------------------------------------------- the public function

@register("lora_linear", "triton")
def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, rate: float = 0.0, seed: Tensor | None = None,
                site: int = 0) -> Tensor:
    """lora_linear_ref as the file's first lines say, by the form that dispatch.py picks. Raises ValueError, naming the tensor."""
    x = x.to(product_dtype(x))
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    check("lora_linear", x, a, b, rate, seed)
    expect("lora_linear", "W", weight, (b.shape[0], x.shape[1]), (x.dtype,), x.device)
    if bias is not None:
        expect("lora_linear", "bias", bias, (b.shape[0],), (x.dtype,), x.device)
    return _forward(x, weight, bias, a, b, float(scale), float(rate), seed, site, dispatch.asked("lora_linear") or "", dispatch.asked("lora_grads") or "")
