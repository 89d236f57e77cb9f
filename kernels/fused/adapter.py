"""Bottleneck adapter and its residual in one kernel; the backward that goes with it. Computes adapter_ref of peftdebias/methods/adapter.py:

    z = x down^T + c        y = h + s (f(z) up^T + e)        f: relu, silu, gelu (erf) or gelu_new (tanh)

    x [T, D] what goes down, h [T, D] the residual (not x, unless the caller hands the same tensor twice), down [K, D], c [K], up [D, K], e [D] -> y [T, D].
    float32, bfloat16 or float16; x and the four parameters alike, h of its own, y as h + x would be. Under autocast x and the parameters may be of any of these:
    products are of autocast's dtype, and nobody casts a tensor beforehand. All sums are float32. Tensors that are not contiguous are copied first.
    K is padded to a power of two inside the kernel (48 -> 64), and taken in slices of 256 where it is larger: y is a sum over K.

Saved for the backward, besides the parameters: with parameters that train, x and z [T, K] (with `recompute` x alone; z is then computed again); with frozen ones
neither, but for ReLU one bit for each of z, packed in bytes, and z for the others. f(z) and f'(z) are always recomputed. No saved tensor is overwritten.

With dy the gradient of y, and all products over T:

    dz = s (dy up) * f'(z)        dx = dz down        dh = dy        ddown = dz^T x        dc = sum dz        dup = s dy^T f(z)        de = s sum dy

x and h the same tensor: its gradient dz down + dy is written at once. Parameters that are frozen get no gradient, and dz is not even written.
The gradients of the parameters are sums over all of T: every program sums a stretch of T, a second kernel sums the stretches, in float32 and always in the
same order: they repeat bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import register
from .gelu import erf_gelu, erf_gelu_slope
from .op import op
from .tiles import DTYPES, Spec, arch_of, ceil_div, dot, expect, on, power, sum_spec, sum_stretches

ACTIVATIONS = ("relu", "silu", "gelu", "gelu_new")
WIDEST = 256  # K of one launch
STRETCH = 512  # rows of T that one program sums for the gradients of the parameters, at least
MOST_STRETCHES = 22
FILLED = 128  # programs that there should be at the least
BLOCK = 1024  # values that one program rounds


# ---------------------------------------------------------------- arithmetic

@triton.jit
def _activate(z, NAME: tl.constexpr):
    """f(z); f(0) = 0 for all four, so padding of K stays zero. fp32."""
    if NAME == "relu":
        return tl.where(z < 0.0, 0.0, z)  # keeps NaN
    elif NAME == "silu":
        return z * tl.sigmoid(z)
    elif NAME == "gelu":
        return erf_gelu(z)
    else:
        return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))  # (1 + tanh u) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (z + 0.044715 z^3)


@triton.jit
def _slope(z, NAME: tl.constexpr):
    """f'(z). fp32."""
    if NAME == "relu":
        return tl.where(z > 0.0, 1.0, 0.0)
    elif NAME == "silu":
        p = tl.sigmoid(z)
        return p * (1.0 + z * (1.0 - p))
    elif NAME == "gelu":
        return erf_gelu_slope(z)
    else:
        p = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        return p + z * p * (1.0 - p) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)


@triton.jit
def _descend(x, down, c, t, tokens, width, inner, PRODUCT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr):
    """z [ROWS, INNER] fp32 = x [T, D] at rows t, times down [K, D] transposed, plus c [K]; zero in padded columns."""
    k = tl.arange(0, INNER)
    z = tl.zeros([ROWS, INNER], tl.float32)
    for start in range(0, width, COLUMNS):
        d = start + tl.arange(0, COLUMNS)
        rows = tl.load(x + t[:, None] * width + d[None, :], mask=(t[:, None] < tokens) & (d[None, :] < width), other=0.0).to(PRODUCT)
        weight = tl.load(down + k[:, None] * width + d[None, :], mask=(k[:, None] < inner) & (d[None, :] < width), other=0.0).to(PRODUCT)
        z = dot(rows, tl.trans(weight), z)
    return z + tl.load(c + k, mask=k < inner, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _round(down, c, up, e, rounded, size, inner, width, BLOCK: tl.constexpr):
    """rounded [2 size + inner + width] of the products' dtype: down [size], c [inner], up [size] and e [width] end to end. All programs of the kernels below read them, so
    they are rounded once, and not there."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    second = at - size - inner
    value = tl.load(down + at, mask=at < size, other=0.0) + tl.load(c + at - size, mask=(at >= size) & (second < 0), other=0.0)
    value += tl.load(up + second, mask=(second >= 0) & (second < size), other=0.0) + tl.load(e + second - size, mask=(second >= size) & (second < size + width), other=0.0)
    tl.store(rounded + at, value, mask=second < size + width)


# ---------------------------------------------------------------- forward

@triton.jit(do_not_specialize=["tokens"])
def _forward(x, h, down, c, up, e, y, kept, tokens, width, inner, scale, NAME: tl.constexpr, KEEP: tl.constexpr, PRODUCT: tl.constexpr, ROWS: tl.constexpr,
             COLUMNS: tl.constexpr, INNER: tl.constexpr):
    """x, h [T, D], down [K, D], c [K], up [D, K], e [D] -> y [T, D] and kept: z [T, K], or uint8 [T, INNER / 8] with bit k % 8 of byte k / 8 set where z > 0,
    or nothing. A program takes ROWS rows: down and up pass by once, x and h are read once, y is written once."""
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, INNER)
    z = _descend(x, down, c, t, tokens, width, inner, PRODUCT, ROWS, COLUMNS, INNER)
    if KEEP == "z":
        tl.store(kept + t[:, None] * inner + k[None, :], z, mask=(t[:, None] < tokens) & (k[None, :] < inner))
    elif KEEP == "bits":
        lane = tl.arange(0, 8)
        bits = tl.reshape((z > 0.0).to(tl.int32), [ROWS, INNER // 8, 8]) << lane[None, None, :]
        octet = tl.arange(0, INNER // 8)
        tl.store(kept + t[:, None] * (INNER // 8) + octet[None, :], tl.sum(bits, 2).to(tl.uint8), mask=(t[:, None] < tokens) & (octet[None, :] < INNER // 8))
    active = _activate(z, NAME).to(PRODUCT)
    for start in range(0, width, COLUMNS):
        d = start + tl.arange(0, COLUMNS)
        inside = (t[:, None] < tokens) & (d[None, :] < width)
        weight = tl.load(up + d[:, None] * inner + k[None, :], mask=(d[:, None] < width) & (k[None, :] < inner), other=0.0).to(PRODUCT)
        rise = dot(active, tl.trans(weight), tl.zeros([ROWS, COLUMNS], tl.float32)) + tl.load(e + d, mask=d < width, other=0.0).to(tl.float32)[None, :]
        residual = tl.load(h + t[:, None] * width + d[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(y + t[:, None] * width + d[None, :], residual + scale * rise, mask=inside)


# ---------------------------------------------------------------- backward

@triton.jit(do_not_specialize=["tokens"])
def _backward(dy, x, kept, down, c, up, dx, z_out, dz_out, tokens, width, inner, scale, NAME: tl.constexpr, KEEP: tl.constexpr, TRAINED: tl.constexpr,
              WANTED: tl.constexpr, SAME: tl.constexpr, PRODUCT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr):
    """dy [T, D], kept as _forward left it (KEEP "inputs": x [T, D], and z is computed again), down [K, D], c [K], up [D, K] -> dx [T, D] where WANTED (with SAME:
    plus dy); where TRAINED dz_out [T, K], and z_out [T, K] where z was computed again."""
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, INNER)
    inside_k = (t[:, None] < tokens) & (k[None, :] < inner)
    pulled = tl.zeros([ROWS, INNER], tl.float32)  # dy up
    for start in range(0, width, COLUMNS):
        d = start + tl.arange(0, COLUMNS)
        rows = tl.load(dy + t[:, None] * width + d[None, :], mask=(t[:, None] < tokens) & (d[None, :] < width), other=0.0).to(PRODUCT)
        weight = tl.load(up + d[:, None] * inner + k[None, :], mask=(d[:, None] < width) & (k[None, :] < inner), other=0.0).to(PRODUCT)
        pulled = dot(rows, weight, pulled)
    if KEEP == "bits":
        octets = tl.load(kept + t[:, None] * (INNER // 8) + (k // 8)[None, :], mask=t[:, None] < tokens, other=0).to(tl.int32)
        slope = ((octets >> (k % 8)[None, :]) & 1).to(tl.float32)
    else:
        if KEEP == "inputs":
            z = _descend(x, down, c, t, tokens, width, inner, PRODUCT, ROWS, COLUMNS, INNER).to(PRODUCT)
            if TRAINED:
                tl.store(z_out + t[:, None] * inner + k[None, :], z, mask=inside_k)
        else:
            z = tl.load(kept + t[:, None] * inner + k[None, :], mask=inside_k, other=0.0)
        slope = _slope(z.to(tl.float32), NAME)
    dz = (scale * pulled * slope).to(PRODUCT)
    if TRAINED:
        tl.store(dz_out + t[:, None] * inner + k[None, :], dz, mask=inside_k)
    if WANTED:
        for start in range(0, width, COLUMNS):
            d = start + tl.arange(0, COLUMNS)
            inside = (t[:, None] < tokens) & (d[None, :] < width)
            weight = tl.load(down + k[:, None] * width + d[None, :], mask=(k[:, None] < inner) & (d[None, :] < width), other=0.0).to(PRODUCT)
            fall = dot(dz, weight, tl.zeros([ROWS, COLUMNS], tl.float32))
            if SAME:
                fall += tl.load(dy + t[:, None] * width + d[None, :], mask=inside, other=0.0).to(tl.float32)
            tl.store(dx + t[:, None] * width + d[None, :], fall, mask=inside)


@triton.jit(do_not_specialize=["tokens", "stretch"])
def _backward_parameters(dy, x, z, dz, partial, tokens, width, inner, scale, stretch, NAME: tl.constexpr, PRODUCT: tl.constexpr, BY_PRODUCT: tl.constexpr,
                         ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr):
    """dy, x [T, D], z, dz [T, K] -> partial [stretches, N] fp32, N = K D + K + D K + D: ddown, dc, dup, de of the rows [i stretch, (i + 1) stretch) of T.
    Program (j, i) sums columns j COLUMNS .. of D over stretch i. BY_PRODUCT: dc and de as products with ones, where no thread waits for another's part of a sum."""
    k, d = tl.arange(0, INNER), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1).to(tl.int64) * stretch
    ddown, dup = tl.zeros([INNER, COLUMNS], tl.float32), tl.zeros([COLUMNS, INNER], tl.float32)
    if BY_PRODUCT:
        dc, de, ones = tl.zeros([INNER, 16], tl.float32), tl.zeros([COLUMNS, 16], tl.float32), tl.full([ROWS, 16], 1.0, tl.float32).to(PRODUCT)
    else:
        dc, de = tl.zeros([INNER], tl.float32), tl.zeros([COLUMNS], tl.float32)
    for start in range(0, stretch, ROWS):
        t = first + start + tl.arange(0, ROWS)
        inside_k = (t[:, None] < tokens) & (k[None, :] < inner)
        inside_d = (t[:, None] < tokens) & (d[None, :] < width)
        fallen = tl.load(dz + t[:, None] * inner + k[None, :], mask=inside_k, other=0.0)
        active = _activate(tl.load(z + t[:, None] * inner + k[None, :], mask=inside_k, other=0.0).to(tl.float32), NAME).to(PRODUCT)
        rows = tl.load(x + t[:, None] * width + d[None, :], mask=inside_d, other=0.0).to(PRODUCT)
        pull = tl.load(dy + t[:, None] * width + d[None, :], mask=inside_d, other=0.0).to(PRODUCT)
        ddown = dot(tl.trans(fallen), rows, ddown)
        dup = dot(tl.trans(pull), active, dup)
        if BY_PRODUCT:
            dc = dot(tl.trans(fallen), ones, dc)
            de = dot(tl.trans(pull), ones, de)
        else:
            dc += tl.sum(fallen.to(tl.float32), 0)
            de += tl.sum(pull.to(tl.float32), 0)
    if BY_PRODUCT:  # 16 times the same sum
        dc, de = tl.max(dc, 1), tl.max(de, 1)
    size = inner * width
    partial += tl.program_id(1).to(tl.int64) * (2 * size + inner + width)
    tl.store(partial + k[:, None] * width + d[None, :], ddown, mask=(k[:, None] < inner) & (d[None, :] < width))
    tl.store(partial + size + inner + d[:, None] * inner + k[None, :], scale * dup, mask=(d[:, None] < width) & (k[None, :] < inner))
    tl.store(partial + 2 * size + inner + d, scale * de, mask=d < width)
    if tl.program_id(0) == 0:
        tl.store(partial + size + k, dc, mask=k < inner)


# ---------------------------------------------------------------- launchers

def tiles(inner: int, product: torch.dtype, arch: int, tokens: int | None = None, parts: int = 1) -> dict:
    """Tile sizes and launch options for INNER = inner. tokens: fewer rows a tile where there are few, so that a GPU's 100 to 150 multiprocessors all have one; None:
    plenty. parts: how many accumulators [INNER, COLUMNS] stay in registers; on sm_80 tiles beside two of them are smaller, and float32 products, which go through the
    plain units, take registers for their operands too. Measured on an H200; no spill elsewhere."""
    if product == torch.float32:
        rows, columns, stages = 16, 32 if inner <= 128 else 16, 2
    elif parts == 1:
        tall, wide = (64, 128) if 90 <= arch < 100 else (128, 64 if arch < 90 else 32)
        rows, columns, stages = max(16, min(tall, 64 * tall // inner)), max(16, min(wide, 64 * wide // inner)), 3
    else:
        rows, columns, stages = min(64, 4096 // inner), min(64, max(16, 4096 // inner)), 3
    if product == torch.float32 or arch < 90:
        rows, columns = rows if inner <= 32 else max(16, rows // parts), max(16, columns // parts)
    if tokens is not None:
        rows = min(rows, max(16, triton.next_power_of_2(tokens // FILLED + 1) // 2))
    warps = 8 if inner > 64 or parts == 1 and rows * inner > 4096 else 4
    of_parameters = {"BY_PRODUCT": product != torch.float32 and arch >= 90 and inner <= 64} if parts == 2 else {}  # elsewhere the further sums would spill
    return {"ROWS": rows, "COLUMNS": columns, "INNER": inner, "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True} | of_parameters


TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def specs(arch: int) -> list[Spec]:
    """What is compiled ahead: every variant at K = 64 in bf16; one at the narrowest and the widest K, and in the other dtypes. Under autocast x, the parameters
    and dx are float32 ("bf16 of fp32")."""
    variants = (("relu", "z", True), ("gelu", "inputs", True), ("relu", "bits", False), ("silu", "z", False), ("gelu_new", "z", True))
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    cases = ((64, bf16, bf16), (16, bf16, bf16), (WIDEST, bf16, bf16), (64, bf16, fp32), (64, fp16, fp16), (16, fp32, fp32), (64, fp32, fp32), (WIDEST, fp32, fp32))
    found, shape = [], {"tokens": "i32", "width": "i32", "inner": "i32", "scale": "fp32"}
    for inner, product, dtype in cases:
        words = f"{DTYPES[product]}{f' of {DTYPES[dtype]}' if dtype != product else ''}, K {inner}"
        inside, given = "*" + DTYPES[product], "*" + DTYPES[dtype]
        parameters = dict.fromkeys(("down", "c", "up"), given)

        def spec(name: str, kernel, pointers: dict[str, str], parts: int = 1, tokens: int | None = None, **chosen) -> Spec:
            tile = tiles(inner, product, arch, tokens, parts)
            options = {key: tile.pop(key) for key in ("num_warps", "num_stages")}
            del tile["enable_fp_fusion"]
            size = shape | {"stretch": "i32"} if kernel is _backward_parameters else shape
            return Spec(f"{name}, {words}", kernel, pointers | size, chosen | {"PRODUCT": TRITON_DTYPES[product], **tile}, aligned=("width", "inner"), **options)

        usual = (inner, dtype) == (64, bf16)
        for name, keep, trained, tokens in [(*v, None) for v in (variants if usual else variants[:1])] + [(*variants[0], t) for t in (2048, 4096) if usual]:
            kept, few = "*u8" if keep == "bits" else inside, f", {tokens} rows" if tokens else ""
            found.append(spec(f"forward, {name}, keeps {keep}{few}", _forward, {"x": given, "h": inside, **parameters, "e": given, "y": inside, "kept": kept},
                              tokens=tokens, NAME=name, KEEP=keep))
            pointers = {"dy": inside, "x": given, "kept": kept, **parameters, "dx": given, "z_out": inside, "dz_out": inside}
            found.append(spec(f"backward, {name}, kept {keep}{few}", _backward, pointers, tokens=tokens, NAME=name, KEEP=keep, TRAINED=trained, WANTED=True, SAME=trained))
        found.append(spec("backward, parameters", _backward_parameters, {"dy": inside, "x": given, "z": inside, "dz": inside, "partial": "*fp32"}, 2, NAME="gelu"))
    names = dict.fromkeys(("down", "c", "up", "e"), "*fp32") | {"rounded": "*bf16"} | dict.fromkeys(("size", "width", "inner"), "i32")
    return found + [Spec("parameters rounded", _round, names, {"BLOCK": BLOCK}, aligned=("size", "width", "inner")), sum_spec()]


def _rounded(product: torch.dtype, down: Tensor, c: Tensor, up: Tensor, e: Tensor | None = None) -> tuple[Tensor, ...]:
    """The parameters in the products' dtype; themselves where they are of it. For a launcher, inside `on`."""
    if down.dtype == product:
        return down, c, up, e
    (inner, size), width = (down.shape[0], down.numel()), 0 if e is None else e.numel()
    flat = down.new_empty(2 * size + inner + width, dtype=product)
    _round[(ceil_div(flat.numel(), BLOCK),)](down, c, up, c if e is None else e, flat, size, inner, width, BLOCK=BLOCK)
    first, second, third, fourth = flat.split((size, inner, size, width))
    return first.view_as(down), second, third.view_as(up), fourth


@op("adapter_forward", fake=lambda x, h, down, c, up, e, activation, scale, product, keep, trained, same: _outputs(x, h, down, product, keep))
def _adapter_forward(x: Tensor, h: Tensor, down: Tensor, c: Tensor, up: Tensor, e: Tensor, activation: str, scale: float, product: torch.dtype, keep: str,
                     trained: bool, same: bool) -> tuple[Tensor, Tensor]:
    """y [T, D] and what is kept for the backward; see the head of this file. keep: "z", "bits", "inputs" or "nothing". trained: the parameters get gradients.
    same: x and h are one tensor, whose gradient is written at once."""
    (tokens, width), inner = x.shape, down.shape[0]
    y, kept = _outputs(x, h, down, product, keep)
    if tokens:
        tile = tiles(power(inner), product, arch_of(x), tokens)
        with on(x):
            down, c, up, e = _rounded(product, down, c, up, e)
            _forward[ceil_div(tokens, tile["ROWS"]),](x, h, down, c, up, e, y, kept, tokens, width, inner, scale, NAME=activation, KEEP=keep,
                                                      PRODUCT=TRITON_DTYPES[product], **tile)
    return y, kept


def _outputs(x: Tensor, h: Tensor, down: Tensor, product: torch.dtype, keep: str) -> tuple[Tensor, Tensor]:
    tokens, inner = x.shape[0], down.shape[0]
    y = torch.empty_like(h, dtype=torch.promote_types(h.dtype, product))
    if keep == "z":
        return y, x.new_empty(tokens, inner, dtype=product)
    return y, x.new_empty((tokens, power(inner) // 8) if keep == "bits" else 0, dtype=torch.uint8)


@op("adapter_backward", fake=lambda dy, x, kept, down, c, up, activation, scale, product, keep, trained, dx_dtype, same: _gradients(dy, down, trained, dx_dtype))
def _adapter_backward(dy: Tensor, x: Tensor | None, kept: Tensor, down: Tensor, c: Tensor, up: Tensor, activation: str, scale: float, product: torch.dtype, keep: str,
                      trained: bool, dx_dtype: torch.dtype | None, same: bool) -> tuple[Tensor, Tensor]:
    """dx [T, D] of dx_dtype (None: nobody wants it) and, where trained, ddown, dc, dup, de end to end in the parameters' dtype; else empty."""
    (tokens, width), inner = dy.shape, down.shape[0]
    dx, total = _gradients(dy, down, trained, dx_dtype)
    if not tokens:
        return dx, total.zero_()
    tile = tiles(power(inner), product, arch_of(dy), tokens)
    options = {"NAME": activation, "PRODUCT": TRITON_DTYPES[product]}
    z, dz = kept, dy
    if trained:
        dz = dy.new_empty(tokens, inner, dtype=product)
        z = torch.empty_like(dz) if keep == "inputs" else kept
    with on(dy):
        down, c, up, _ = _rounded(product, down, c, up)
        _backward[ceil_div(tokens, tile["ROWS"]),](dy, dy if x is None else x, kept, down, c, up, dx, z, dz, tokens, width, inner, scale, KEEP=keep, TRAINED=trained,
                                                   WANTED=dx_dtype is not None, SAME=same, **options, **tile)
        if trained:
            tile = tiles(power(inner), product, arch_of(dy), parts=2)
            stretches = min(MOST_STRETCHES, ceil_div(tokens, STRETCH))
            stretch = ceil_div(ceil_div(tokens, stretches), tile["ROWS"]) * tile["ROWS"]
            stretches = ceil_div(tokens, stretch)
            partial = dy.new_empty(stretches, total.numel(), dtype=torch.float32)
            _backward_parameters[ceil_div(width, tile["COLUMNS"]), stretches](dy, x, z, dz, partial, tokens, width, inner, scale, stretch, **options, **tile)
            sum_stretches(partial.view(stretches, -1), total.view(-1))
    return dx, total


def _gradients(dy: Tensor, down: Tensor, trained: bool, dx_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    inner, width = down.shape
    dx = dy.new_empty(0) if dx_dtype is None else torch.empty_like(dy, dtype=dx_dtype)
    return dx, down.new_empty(2 * inner * width + inner + width if trained else 0)


def _setup(ctx, inputs, output):
    x, h, down, c, up, e, ctx.activation, ctx.scale, ctx.product, ctx.keep, ctx.trained, ctx.same = inputs
    ctx.dtypes = x.dtype, h.dtype
    ctx.save_for_backward(x if ctx.trained or ctx.keep == "inputs" else None, output[1], down, c, up)
    ctx.mark_non_differentiable(output[1])


def _backward_formula(ctx, dy, _):
    """Gradients of x, h and the parameters. Where ctx.trained is false the parameters are frozen, and x is not there."""
    x, kept, down, c, up = ctx.saved_tensors
    wanted, dx, parts = ctx.needs_input_grad, None, (None,) * 4
    if wanted[0] or ctx.trained:
        dx, total = _adapter_backward(dy.contiguous(), x, kept, down, c, up, ctx.activation, ctx.scale, ctx.product, ctx.keep, ctx.trained,
                                      ctx.dtypes[0] if wanted[0] else None, ctx.same)
    if ctx.trained:
        inner, width = down.shape
        ddown, dc, dup, de = total.split((inner * width, inner, inner * width, width))
        parts = tuple(p if w else None for p, w in zip((ddown.view(inner, width), dc, dup.view(width, inner), de), wanted[2:6]))
    dh = dy.to(ctx.dtypes[1]) if wanted[1] and not ctx.same else None
    return (dx if wanted[0] else None, dh, *parts, *(None,) * 6)


_adapter_forward.differentiate(_setup, _backward_formula)


# ---------------------------------------------------------------- the op

@register("adapter", "triton")
def adapter(inputs: Tensor, hidden: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, activation: str, scale: float = 1.0,
            recompute: bool = False) -> Tensor:
    """inputs, hidden [T, D], down [K, D], down_bias [K], up [D, K], up_bias [D] -> [T, D]; see the head of this file.

    recompute: keep no z for parameters that train; x is read once more in the backward. Raises ValueError that names what it cannot take.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"adapter, activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    expect("adapter", "inputs", inputs, (-1, -1))
    (tokens, width), inner = inputs.shape, down.shape[0]
    cast = torch.is_autocast_enabled(inputs.device.type)
    product = torch.get_autocast_dtype(inputs.device.type) if cast else inputs.dtype
    expect("adapter", "hidden", hidden, (tokens, width), device=inputs.device)
    parameters = {"down": (down, (inner, width)), "down_bias": (down_bias, (inner,)), "up": (up, (width, inner)), "up_bias": (up_bias, (width,))}
    for name, (tensor, shape) in parameters.items():
        expect("adapter", name, tensor, shape, (down.dtype,) if cast and name != "down" else tuple(TRITON_DTYPES) if cast else (inputs.dtype,), inputs.device)
    if inner > WIDEST:  # y is a sum over K: the slice behind takes what the one before gave as its residual
        hidden = adapter(inputs, hidden, down[:WIDEST], down_bias[:WIDEST], up[:, :WIDEST], up_bias, activation, scale, recompute)
        return adapter(inputs, hidden, down[WIDEST:], down_bias[WIDEST:], up[:, WIDEST:], torch.zeros_like(up_bias), activation, scale, recompute)
    tensors = [t.contiguous() for t in (down, down_bias, up, up_bias)]
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if not torch.is_grad_enabled() or not (trained or inputs.requires_grad):
        keep = "nothing"  # the gradient of h needs nothing
    elif trained:
        keep = "inputs" if recompute else "z"
    else:
        keep = "bits" if activation == "relu" else "z"
    same, x = hidden is inputs, inputs.contiguous()
    return _adapter_forward(x, x if same else hidden.contiguous(), *tensors, activation, float(scale), product, keep, trained, same)[0]
