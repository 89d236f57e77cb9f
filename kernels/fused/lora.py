"""LoRA, part three of four: the product whose sums begin with the low-rank product, dropout inside; and which of three forms runs.

Contract. lora_linear(x, weight, bias, a, b, scale, rate, seed, site) computes lora_linear_ref of peftdebias/methods/lora.py:
    y = x W^T + bias + s (z A^T) B^T,    z = x dropped with `rate` (dropout.py: bits from seed int64 [1] and site), or x itself at rate 0.
x [T, in] of fp32, bf16 or fp16, rows of any stride; W [out, in], bias [out] or None, A [r, in], B [out, r] of any of these dtypes (W is rounded to x's first, A and B
inside; under autocast all to its dtype); r >= 1, above 64 by the library alone. Returns y [T, out] in x's dtype. fp32 accumulation; u = z A^T is rounded to x's dtype
before it meets B, as a library's would be. Saves x, W, A, B and the seed, no mask; and of x's dtype u [T, r], and A and B as the kernels read them (lora_thin.py). Overwrites
none of them. Gradients of A and B come in their own dtype; W and bias have gradients where they are asked for.

Derivation. With v = dY B [T, r] and u = z A^T:
    dx = dY W + (s / q) m * (v A)        m the mask, q the share kept; m / q is what dropout multiplies by
    dA = s v^T z,  dB = s dY^T u         (lora_grads.py, which takes u and v from here)         dW = dY^T x,  dbias = column sums of dY

Forms. "written": W' = W + s B A was written once a forward pass (lora_write.py), so forward and dx are library GEMMs; without dropout, for who wrote it: `lora_written`.
"epilogue": u and v by lora_thin.py, which draws the mask of x once, and the kernel below for both directions. "library": torch's own products, dropout from dropout.py.
dispatch.py picks one by shape, dtype and dropout; a backward has what its forward had.
The low-rank product is no epilogue in time: it comes first, and the wide one is added to it. So scale and mask meet float32 sums, and no second tile of sums is held
beside those of the wide product; that leaves room for two programs a multiprocessor, one of which multiplies while the other begins or ends.
What limits it: it is as good as its GEMM, and a library's is hard to match.

Letters: T rows, I = in, O = out, R ranks (padded to a power of two), K columns of the left factor, N of the result, BM, BN, BK rows, columns and depth of a tile.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import dispatch, product, register
from .dropout import dropout, keep
from .dropout_ref import threshold_of
from .lora_grads import check, lora_grads_op
from .lora_thin import MAX_RANK, pack, ranks_of, thin
from .op import backward_only, op
from .product import place, wide
from .tiles import DTYPES, Spec, arch_of, ceil_div, dot, expect, on, power, product_dtype, rows_together

# ---------------------------------------------------------------- the kernel, of both directions

@triton.jit(do_not_specialize=["T", "site", "threshold"])
def product_kernel(left, weight, bias, low, factor, seed, result, T, K, N, left_stride, site, threshold, scale, FORWARD: tl.constexpr, DROPS: tl.constexpr, EVEN: tl.constexpr,
                   BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr):
    """FORWARD: result [T, N] = left [T, K] weight^T + bias + scale low factor^T, with weight [N, K], bias [N] or None, low = u [T, R], factor = B [N, R]. Else
    left weight + scale * m * (low factor), with left dY, weight [K, N], low = v, factor = A [R, N]; m the mask of [T, N] with DROPS, seed int64 [1] or None, scale s / q then.
    EVEN: K is a multiple of BK."""
    row_tile, column_tile = place(T, N, BM, BN, GROUP)
    first, r, n, ranks = row_tile.to(tl.int64) * BM, tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, R)
    rows, columns = r < T - first, n < N - column_tile * BN  # which are there
    left, low, result = left + first * left_stride, low + first * R, result + first * N + column_tile * BN
    if FORWARD:
        weight += column_tile.to(tl.int64) * BN * K
        right = tl.load(factor + column_tile * BN * R + (n[None, :] * R + ranks[:, None]), mask=columns[None, :], other=0.0)  # [R, BN]
    else:
        weight += column_tile * BN
        right = tl.load(factor + column_tile * BN + (ranks[:, None] * N + n[None, :]), mask=columns[None, :], other=0.0)
    total = dot(tl.load(low + (r[:, None] * R + ranks[None, :]), mask=rows[:, None], other=0.0), right, tl.zeros((BM, BN), tl.float32)) * scale
    if DROPS:
        total = tl.where(keep(first + r, column_tile * (BN // 8), (N + 7) // 8, tl.load(seed), site, threshold, BN // 8), total, 0.0)
    if bias is not None:
        total += tl.load(bias + column_tile * BN + n, mask=columns, other=0.0).to(tl.float32)[None, :]
    total = wide(left, weight, total, rows, columns, left_stride, K, N, FORWARD, EVEN, BM, BN, BK)
    tl.store(result + (r[:, None] * N + n[None, :]), total.to(result.dtype.element_ty), mask=rows[:, None] & columns[None, :])


# ---------------------------------------------------------------- specs, launchers

def tiles_for(dtype: torch.dtype, ranks: int, regular: bool, drops: bool, arch: int = 90) -> dict[str, int]:
    """Those of product.py, and R: ranks. With 128 registers a thread two programs fit a multiprocessor, unless more than 32 ranks take the shared memory; beside a mask triton 3.6
    takes no more, and 3.9 would spill under that bound."""
    sizes = product.tiles_for(dtype, regular) | {"R": ranks}
    return sizes | ({"maxnreg": 128} if sizes["BM"] == 128 and ranks <= 32 and 90 <= arch < 100 and not drops else {})


def specs(arch: int) -> list[Spec]:
    found = []
    numbers = dict.fromkeys(("T", "K", "N", "left_stride", "site", "threshold"), "i32") | {"scale": "fp32"}
    for dtype, kind in DTYPES.items():
        for rank in (8, 64):
            for name, forward, drops, regular in (("forward", True, False, True), ("dx", False, False, True), ("dx, dropout", False, True, True), ("dx, dropout, ragged", False, True, False)):
                sizes = tiles_for(dtype, power(rank), regular, drops, arch)
                options = {key: sizes.pop(key) for key in ("num_warps", "num_stages", "maxnreg") if key in sizes}
                absent = ([] if drops else ["seed"]) + ([] if forward else ["bias"])
                pointers = dict.fromkeys(("left", "weight", "bias", "low", "factor", "result"), f"*{kind}") | {"seed": "*i64"}
                signature = {n: (pointers | numbers)[n] for n in product_kernel.arg_names if n in pointers | numbers and n not in absent}
                found.append(Spec(f"{name}, {kind}, r {rank}", product_kernel, signature, {"FORWARD": forward, "DROPS": drops, "EVEN": regular} | dict.fromkeys(absent) | sizes,
                                  aligned=("K", "N", "left_stride") if regular else (), **options))
    return found


def _product(left: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor, factor: Tensor, forward: bool, scale: float, rate: float, seed: Tensor | None, site: int) -> Tensor:
    """[T, N] by product_kernel."""
    left, weight = rows_together(left), weight.contiguous()
    (rows, depth), columns = left.shape, weight.shape[0] if forward else weight.shape[1]
    result = left.new_empty(rows, columns)
    if result.numel():
        drops, threshold = rate > 0 and not forward, threshold_of(rate)
        sizes = tiles_for(left.dtype, low.shape[1], product.is_regular(depth, columns, left.stride(0)), drops, arch_of(left))
        with on(left):
            product_kernel[(ceil_div(rows, sizes["BM"]) * ceil_div(columns, sizes["BN"]),)](
                left, weight, None if bias is None else bias.contiguous(), low, factor, seed if drops else None, result, rows, depth, columns, left.stride(0), site,
                threshold, scale if forward else scale * 65536 / threshold, FORWARD=forward, DROPS=drops, EVEN=depth % sizes["BK"] == 0,
                enable_fp_fusion=True, **sizes)
    return result


def form_for(first: Tensor, weight: Tensor, rank: int, rate: float, asked: str) -> str:
    """"epilogue" or "library" for a product of `first`, x or dy. Looked up when the op runs, so a compiled graph holds no choice but the one `asked` for by name."""
    if rank > MAX_RANK:
        return "library"
    if asked in ("epilogue", "library"):
        return asked
    return dispatch.pick("lora_linear", ("epilogue", "library"), device=first.device, dtype=first.dtype, dropout=rate > 0, rows=first.shape[0], inside=weight.shape[1],
                         outside=weight.shape[0], rank=rank)


# ---------------------------------------------------------------- the product, by its kernel or by the library

def _halves(packed: Tensor, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [R, in] and B [out, R] as they lie in `packed`."""
    (out, width), ranks = weight.shape, ranks_of(rank)
    return packed[:ranks * width].view(ranks, width), packed[ranks * width:].view(out, ranks)


def _made(x: Tensor, weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    (out, width), ranks = weight.shape, ranks_of(rank)
    return x.new_empty(x.shape[0], out), x.new_empty(x.shape[0], ranks), x.new_empty(ranks * (width + out))


@op("lora_linear", fake=lambda x, weight, bias, a, *others: _made(x, weight, a.shape[0]))
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, rate: float, seed: Tensor | None, site: int,
             form: str, grads: str) -> tuple[Tensor, Tensor, Tensor]:
    """y [T, out], u [T, R] and `packed`. form and grads: those of lora_linear and lora_grads that are asked for by name, or nothing; a backward has what its forward was
    asked for."""
    packed = pack([a], [b], x.dtype)
    low, up = _halves(packed, weight, a.shape[0])
    if form_for(x, weight, a.shape[0], rate, form) == "epilogue":
        x = rows_together(x)
        u, _ = thin(x, None, packed, *reversed(weight.shape), 0, 1, a.shape[0], rate, seed, site)
        return _product(x, weight, bias, u, up, True, scale, rate, seed, site), u, packed
    u = F.linear(dropout(x, rate, seed, site) if rate else x, low)
    return F.linear(x, weight, bias).addmm_(u, up.t(), alpha=scale), u, packed


@op("lora_dx", fake=lambda dy, weight, packed, rank, *others: (dy.new_empty(dy.shape[0], weight.shape[1]), dy.new_empty(dy.shape[0], ranks_of(rank))))
def _dx(dy: Tensor, weight: Tensor, packed: Tensor, rank: int, scale: float, rate: float, seed: Tensor | None, site: int, form: str) -> tuple[Tensor, Tensor]:
    """dx [T, in] and v [T, R]."""
    low, up = _halves(packed, weight, rank)
    if form_for(dy, weight, rank, rate, form) == "epilogue":
        dy = rows_together(dy)
        _, v = thin(None, dy, packed, *reversed(weight.shape), 0, 1, rank, 0.0, None, 0)
        return _product(dy, weight, None, v, low, False, scale, rate, seed, site), v
    v = dy @ up
    through = v @ low
    return (dy @ weight).add_(dropout(through, rate, seed, site) if rate else through, alpha=scale), v


def _save(ctx, inputs, output):
    x, weight, bias, a, b, ctx.scale, ctx.rate, seed, ctx.site, ctx.form, ctx.grads = inputs
    needs, (_, u, packed) = ctx.needs_input_grad, output
    thin_trained = needs[3] or needs[4]
    ctx.save_for_backward(x if needs[1] or thin_trained else None, weight if needs[0] else None, a, b, seed, u if thin_trained else None, packed)
    ctx.mark_non_differentiable(u, packed)


def _backward(ctx, dy: Tensor, *_):
    x, weight, a, b, seed, u, packed = ctx.saved_tensors
    needs, how = ctx.needs_input_grad, (ctx.rate, seed, ctx.site)
    dx, v = _dx(dy, weight, packed, a.shape[0], ctx.scale, *how, ctx.form) if needs[0] else (None, None)
    da, db = lora_grads_op(x, dy, [a], [b], ctx.scale, 0, *how, ctx.grads, packed, u, v) if needs[3] or needs[4] else (None, None)
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
    """lora_written_ref of peftdebias/written.py. x [T, in], written W' [out, in], rounded to x's dtype, under autocast both to its, bias [out] or None likewise; pieces
    (first row, A, B, s) say what W' holds.

    The product sees W' alone; the gradients of A and B come from x and dY. W' itself has none: W is frozen. A piece that is frozen costs nothing: no gradients, and where all
    are, x is not kept. Raises ValueError, naming the tensor.
    """
    if not pieces:
        raise ValueError("lora_written: expected at least one piece, got none")
    x = x.to(product_dtype(x))
    written, bias = written.to(x.dtype), None if bias is None else bias.to(x.dtype)
    for first, a, b, _ in pieces:
        check("lora_written", x, a, b, 0.0, None)
        expect("lora_written", "W'", written, (-1, x.shape[1]), (x.dtype,), x.device)
        if first + b.shape[0] > written.shape[0]:
            raise ValueError(f"lora_written, piece: expected rows within {written.shape[0]}, got {first} to {first + b.shape[0]}")
    pieces = [p for p in pieces if p[1].requires_grad or p[2].requires_grad]
    if not pieces:
        backward_only("lora_written")
        return F.linear(x, written.detach(), bias)
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
    return _forward(x, weight, bias, a, b, float(scale), float(rate), seed, site, dispatch.asked("lora_linear") or "", dispatch.asked("lora_grads") or "")[0]
