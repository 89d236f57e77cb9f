"""An encoder's embeddings in one kernel: two look-ups, LayerNorm and dropout behind it; and the backward. Computes embed_ref of peftdebias/ops/embeddings.py:

    s = word[id] + placed[place]        n = (s - mean s) i,    i = 1 / sqrt(var s + epsilon)        y = m (gain n + bias) / q        mean and var over the D values of a row

    ids, places int64 [T], word [V, D], placed [N, D], gain and bias [D] -> y [T, D]; m the mask of dropout.py, q the share it keeps; m / q = 1 without dropout.
    word, placed, gain and bias each of float32, bfloat16 or float16, the tables with rows of any stride; D up to 4096. y is of autocast's dtype where that is on, else
    of word's. All arithmetic is float32, and neither s nor what is dropped is rounded before the end. The mask is the one that `dropout` draws on y.

    A token whose id or place is no row of its table reads nothing: its row of y is NaN, dropped or not, and no row of the tables gets a gradient from it.

With dy the gradient of y, e = m dy / q and g = gain e, as in norm.py:

    ds = i (g - mean g - n mean(g n))        dword[v] = sum of ds over the tokens with id v        dplaced likewise        dgain = sum_t e n        dbias = sum_t e

Saved for the backward: n [T, D] in y's dtype and i [T] in float32, the seed and the gain, and where a table is trained both row numbers of each token, -1 where there
is no such row, in int32: torch sorts by them, in half the passes of int64. No mask. Nothing where nobody wants a gradient; for that of the bias alone neither n nor i. No saved
tensor is overwritten. Every gradient is computed only where it is asked for.
ds is of the dtype of the tables that are trained, the wider of two, and is written once for both. torch's own embedding_dense_backward, which F.embedding has too, sums its
rows into a table: float32 tables get sums of float32 rows.

How. A program holds whole rows, as in norm.py, whose backward kernel serves here too. What torch would write and read again, both looked-up rows and the norm's result
before dropout, never leaves registers.
What limits it: memory, the rows of word wherever they lie, and with dropout ten rounds of Philox for eight elements.

The room: peftdebias/ops/embeddings.py (specification), this file, norm.py (tiles, backward), tests/kernel_checks/check_embeddings.py (proof). Letters: T tokens, D columns,
V and N rows of the tables.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import WIDEST, register
from .dropout import keep
from .dropout_ref import Drop, threshold_of
from .norm import STRETCHES, backward_kernel, centre, columns_of, is_tight, norm_backward, registers, spec_of, tiles_for, vector_of
from .op import op
from .tiles import DTYPES, Spec, arch_of, ceil_div, expect, on, product_dtype, rows_together, sum_spec

# ---------------------------------------------------------------- kernel, specs

@triton.jit(do_not_specialize=["T", "V", "N", "site", "threshold"])
def embed_kernel(ids, places, word, placed, gain, bias, seed, y, normal, inverse, checked, T, D, V, N, word_stride, placed_stride, epsilon, site, threshold, scale,
                 DROPS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, BD: tl.constexpr, WHOLE: tl.constexpr):
    """ids, places int64 [T], word [V, D], placed [N, D], gain, bias [D], seed int64 [1] or None -> y [T, D]; normal [T, D] and inverse fp32 [T] (n and i) unless None;
    checked int32 [2, T] (ids and places, -1 where a token lacks one of its rows) unless None. scale = 1 / q. A program does ROWS rows."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    start = 0 if seed is None else tl.load(seed)
    id, place = tl.load(ids + rows, mask=rows < T, other=0), tl.load(places + rows, mask=rows < T, other=0)
    there = (id >= 0) & (id < V) & (place >= 0) & (place < N)
    if checked is not None:
        tl.store(checked + rows, tl.where(there, id, -1), mask=rows < T)
        tl.store(checked + T + rows, tl.where(there, place, -1), mask=rows < T)
    parts, total = (), tl.zeros([ROWS, BD], tl.float32)
    for part in tl.static_range(PARTS):
        d, inside = columns_of(part, rows, T, D, BD, WHOLE)
        inside = inside & there[:, None]
        found = tl.load(word + id[:, None] * word_stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
        found += tl.load(placed + place[:, None] * placed_stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
        total += found
        parts = parts + (found,)
    centred, factor = centre(parts, total, D, epsilon, ROWS, PARTS, BD, WHOLE)
    factor = tl.where(there, factor, float("nan"))
    if normal is not None:
        tl.store(inverse + rows, factor, mask=rows < T)
    for part in tl.static_range(PARTS):
        d, inside = columns_of(part, rows, T, D, BD, WHOLE)
        n = centred[part] * factor[:, None]
        if normal is not None:
            tl.store(normal + rows[:, None] * D + d[None, :], n, mask=inside)
        found = n * vector_of(gain, part, D, BD, WHOLE) + vector_of(bias, part, D, BD, WHOLE)
        if DROPS:
            kept = keep(rows, part * (BD // 8), (D + 7) // 8, start, site, threshold, BD // 8)
            found = tl.where(kept | ~there[:, None], found * scale, 0.0)
        tl.store(y + rows[:, None] * D + d[None, :], found, mask=inside)


def specs(arch: int) -> list[Spec]:
    """What is compiled ahead: rows of three parts, whole and not, and with dropout those of one; frozen and trained; float32 tables to bf16 too, as autocast has them. The
    backward is norm.py's kernel, whose form without dropout is compiled there."""
    found, nobody = [], ("partial_gain", "partial_bias")
    kinds = [(dtype, kind, kind) for dtype, kind in DTYPES.items()] + [(torch.float32, "fp32", "bf16")]
    for dtype, table, kind in kinds:
        given = dict.fromkeys(("word", "placed", "dhidden"), "*" + table) | dict.fromkeys(("y", "normal", "dy"), "*" + kind)
        given |= dict.fromkeys(("gain", "bias", "inverse", *nobody), "*fp32") | dict.fromkeys(("ids", "places"), "*i64") | {"checked": "*i32", "V": "i32", "N": "i32"}
        words = table if table == kind else f"{table} to {kind}"
        for width in (768, 700, 1024):
            for drops in (False, True) if width < 1024 else (True,):
                bound = registers(is_tight(dtype, tiles_for(width)["WHOLE"]), arch)
                found += [spec_of(f"forward alone, {words}", embed_kernel, width, given, ("normal", "inverse", "checked"), drops, **bound),
                          spec_of(f"forward, trained, {words}", embed_kernel, width, given, (), drops, **bound)]
            for name, nothing in (("backward, tables trained", nobody), ("backward, all trained", ()), ("backward, gain and bias trained", ("dhidden",))):
                found.append(spec_of(f"{name}, {words}", backward_kernel, width, given, ("again", "dresidual", *nothing), True, AFTER=True))
    return [*found, sum_spec(), sum_spec(STRETCHES)]


# ---------------------------------------------------------------- launchers

@op("embed_forward", fake=lambda ids, places, word, placed, gain, bias, epsilon, rate, seed, site, dtype, *kept: _outputs(ids, word, dtype, *kept))
def _embed_forward(ids: Tensor, places: Tensor, word: Tensor, placed: Tensor, gain: Tensor, bias: Tensor, epsilon: float, rate: float, seed: Tensor | None, site: int,
                   dtype: torch.dtype, keeps: bool, tables: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [T, D] of `dtype`; where keeps, n [T, D] and i [T], else empty; where tables, ids and places [2, T], -1 where there is no such row, else empty."""
    word, placed = rows_together(word), rows_together(placed)
    y, normal, inverse, checked = _outputs(ids, word, dtype, keeps, tables)
    rows, width = y.shape
    if rows:
        sizes, threshold = tiles_for(width), threshold_of(rate)
        with on(word):
            embed_kernel[(ceil_div(rows, sizes["ROWS"]),)](
                ids.contiguous(), places.contiguous(), word, placed, gain.contiguous(), bias.contiguous(), seed if rate else None, y, normal if keeps else None,
                inverse if keeps else None, checked if tables else None, rows, width, len(word), len(placed), word.stride(0), placed.stride(0), epsilon, site, threshold,
                65536 / threshold, DROPS=rate > 0, enable_fp_fusion=True, **sizes, **registers(is_tight(word.dtype, sizes["WHOLE"]), arch_of(word)))
    return y, normal, inverse, checked


def _outputs(ids: Tensor, word: Tensor, dtype: torch.dtype, keeps: bool, tables: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, width = ids.shape[0], word.shape[1]
    return (word.new_empty(rows, width, dtype=dtype), word.new_empty((rows, width) if keeps else 0, dtype=dtype),
            word.new_empty(rows if keeps else 0, dtype=torch.float32), ids.new_empty((2, rows) if tables else 0, dtype=torch.int32))


def _setup(ctx, inputs, output):
    _, normal, inverse, checked = output
    _, _, word, placed, gain, bias, _, ctx.rate, seed, ctx.site, *_ = inputs
    ctx.tables, ctx.dtypes = ((word.dtype, len(word)), (placed.dtype, len(placed))), (gain.dtype, bias.dtype)
    ctx.save_for_backward(normal, inverse, checked, gain, seed)
    ctx.mark_non_differentiable(normal, inverse, checked)


def _backward_formula(ctx, dy, *_):
    """Gradients of word, placed, gain and bias, each where asked for."""
    normal, inverse, checked, gain, seed = ctx.saved_tensors
    *of_tables, of_gain, of_bias = ctx.needs_input_grad[2:6]
    wanted = [dtype for (dtype, _), of in zip(ctx.tables, of_tables) if of]
    dtype = functools.reduce(torch.promote_types, wanted) if wanted else None
    ds, _, parameters = norm_backward(dy, None, normal, inverse, gain, ctx.rate, seed, ctx.site, ctx.rate > 0, dtype, None, of_gain, of_bias)
    # Rows of number -1 are passed over.
    tables = [torch.ops.aten.embedding_dense_backward(ds.to(dtype), checked[i], size, -1, False) if of_tables[i] else None for i, (dtype, size) in enumerate(ctx.tables)]
    return (None, None, *tables, parameters[0].to(ctx.dtypes[0]) if of_gain else None, parameters[-1].to(ctx.dtypes[1]) if of_bias else None, *(None,) * 7)


_embed_forward.differentiate(_setup, _backward_formula)


# ---------------------------------------------------------------- the op

@register("embed", "triton")
def embed(ids: Tensor, places: Tensor, word: Tensor, placed: Tensor, gain: Tensor, bias: Tensor, epsilon: float, drop: Drop | None = None) -> Tensor:
    """ids and places int64 [T], word [V, D], placed [N, D], gain and bias [D] -> [T, D]; a row of NaN where an id or a place is no row; see the head of this file. Raises
    ValueError that names what it cannot take."""
    expect("embed", "word", word, (-1, -1))
    width = word.shape[1]
    if not 1 <= width <= WIDEST["embed"]:
        raise ValueError(f"embed, word: expected 1 to {WIDEST['embed']} columns, got {width}")
    expect("embed", "placed", placed, (-1, width), device=word.device)
    expect("embed", "ids", ids, (-1,), (torch.int64,), word.device)
    expect("embed", "places", places, (ids.shape[0],), (torch.int64,), word.device)
    expect("embed", "gain", gain, (width,), device=word.device)
    expect("embed", "bias", bias, (width,), device=word.device)
    rate, seed, site = drop or (0.0, None, 0)
    threshold_of(rate)
    if rate:
        expect("embed", "seed", seed, (1,), (torch.int64,), word.device)
    tables = torch.is_grad_enabled() and (word.requires_grad or placed.requires_grad)
    keeps = tables or (torch.is_grad_enabled() and gain.requires_grad)
    return _embed_forward(ids, places, word, placed, gain, bias, epsilon, rate, seed if rate else None, site, product_dtype(word), keeps, tables)[0]
