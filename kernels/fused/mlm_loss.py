"""Cross-entropy of the rows asked for, its gradient written over the logits. Computes mlm_loss_ref of peftdebias/tasks.py:

    loss = sum_m w[y_m] (log sum_v exp l[m, v] - l[m, y_m]) / sum_m w[y_m]        w = 1 where no weights are given

    l logits [M, V] float32, bfloat16 or float16, y targets int64 [M] in [0, V) or IGNORED, w weights [V] float32 -> loss [] float32. V is the vocabulary, or a classifier's
    labels. Arithmetic is float32. Rows of l may lie apart; any other tensor that is not contiguous is copied first. No label smoothing. A row whose target
    is IGNORED (the tail of a bucket) counts for nothing; any other target outside [0, V) makes the loss nan; nothing beyond the logits is read. The loss of no rows
    is 0; where weights are given and their sum is 0 it is nan.

Saved: the logits, y, of every row the largest logit a and z = sum_v exp(l[v] - a) (a + log z in one number would lose what a has before the point), and what
the sum is divided by. With g the gradient of the loss:

    dl[m, v] = g w[y_m] (exp(l[m, v] - a_m) / z_m - [v = y_m]) / sum w

The backward writes dl over l: no second [M, V] is ever made. This is the one saved tensor that a kernel here overwrites, and autograd is told so: whoever else
holds on to the logits for a backward of their own, or runs this backward twice, gets torch's error ("modified by an inplace operation"), not a wrong gradient.
The sums over M are taken in float64, in one order, by one program: the loss repeats bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import register
from .op import op
from .tiles import DTYPES, Spec, ceil_div, expect, on, power, rows_together

WIDEST = 4096  # of V, that a program takes at a time
ROWS = 1024  # that the program which takes the mean adds at a time
IGNORED = tl.constexpr(-100)  # torch's own ignore_index


# ---------------------------------------------------------------- forward

@triton.jit
def _exp(x):
    """exp x fp32; 0 below 2^-126, which spares the four instructions that tl.exp has for smaller values."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _more(block, largest, total):
    """The largest so far and the sum relative to it, with a block [BLOCK] fp32 of the row added."""
    higher = tl.maximum(largest, tl.max(block, 0))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # only -inf so far: every term is exp(-inf) = 0
    return higher, total * _exp(largest - base) + tl.sum(_exp(block - base), 0)


@triton.jit
def _row_sums(logits, targets, weights, losses, tops, sums, vocabulary, row_stride, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """logits [M, V], targets [M], weights [V] where WEIGHTED -> losses [M] = w (log z - (l[y] - a)), tops [M] = a, sums [M] = z. A program a row, which it reads
    once: the largest so far and the sum relative to it are carried along (Milakov and Gimelshein 2018, arXiv 1805.02867). Whole blocks have no mask: V is rarely a
    multiple of 8, and under one that ends between two neighbours of a thread it would fetch them one by one."""
    m = tl.program_id(0).to(tl.int64)
    logits += m * row_stride
    largest, total, whole = float("-inf"), 0.0, vocabulary // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        largest, total = _more(tl.load(logits + start + tl.arange(0, BLOCK)).to(tl.float32), largest, total)
    if whole < vocabulary:
        v = whole + tl.arange(0, BLOCK)
        largest, total = _more(tl.load(logits + v, mask=v < vocabulary, other=float("-inf")).to(tl.float32), largest, total)
    y = tl.load(targets + m)
    inside = (y >= 0) & (y < vocabulary)
    loss = tl.log(total) - (tl.load(logits + y, mask=inside, other=float("nan")).to(tl.float32) - largest)
    if WEIGHTED:
        loss *= tl.load(weights + y, mask=inside, other=1.0)
    tl.store(losses + m, tl.where(y == IGNORED, 0.0, loss))
    tl.store(tops + m, largest)
    tl.store(sums + m, total)


@triton.jit(do_not_specialize=["rows"])
def _mean(losses, targets, weights, loss, share, rows, vocabulary, WEIGHTED: tl.constexpr, ROWS: tl.constexpr):
    """losses [M], targets [M], weights [V] where WEIGHTED -> share [] = sum w, of no weights at least 1, and loss [] = the sum of the losses / share. One program."""
    total, counted = tl.zeros([ROWS], tl.float64), tl.zeros([ROWS], tl.float64)
    for start in range(0, rows, ROWS):
        m = start + tl.arange(0, ROWS)
        y = tl.load(targets + m, mask=m < rows, other=IGNORED)
        weight = tl.where(y == IGNORED, 0.0, 1.0)
        if WEIGHTED:
            weight *= tl.load(weights + y, mask=(y >= 0) & (y < vocabulary), other=1.0)
        total += tl.load(losses + m, mask=m < rows, other=0.0).to(tl.float64)
        counted += weight.to(tl.float64)
    divisor = tl.sum(counted, 0)
    if not WEIGHTED:
        divisor = tl.maximum(divisor, 1.0)
    divisor = divisor.to(tl.float32)
    tl.store(share, divisor)
    tl.store(loss, (tl.sum(total, 0) / divisor.to(tl.float64)).to(tl.float32))


# ---------------------------------------------------------------- backward

@triton.jit
def _slope(block, v, y, top, share, factor):
    """The gradient of logits [BLOCK] at the places v, fp32: share exp(l - a), less `factor` at y."""
    return _exp(block.to(tl.float32) - top) * share - tl.where(v == y, factor, 0.0)


@triton.jit
def _gradient_over_logits(logits, targets, weights, tops, sums, pull, share, vocabulary, row_stride, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """logits [M, V] become their gradient. targets, tops, sums [M], weights [V] where WEIGHTED, pull [] the loss's gradient, share [] = sum w. Program (m, b):
    block b of row m; whole blocks have no mask, as in _row_sums."""
    m = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logits += m * row_stride
    y = tl.load(targets + m)
    inside = (y >= 0) & (y < vocabulary)
    factor = tl.load(pull).to(tl.float32) / tl.load(share)
    if WEIGHTED:
        factor *= tl.load(weights + y, mask=inside, other=1.0)
    top, own, place = tl.load(tops + m), factor / tl.load(sums + m), tl.where(inside, y, -1).to(tl.int32)
    whole = (tl.program_id(1) + 1) * BLOCK <= vocabulary
    if y == IGNORED:
        tl.store(logits + v, tl.zeros([BLOCK], tl.float32), mask=v < vocabulary)
    elif whole:
        tl.store(logits + v, _slope(tl.load(logits + v), v, place, top, own, factor))
    else:
        tl.store(logits + v, _slope(tl.load(logits + v, mask=v < vocabulary, other=0.0), v, place, top, own, factor), mask=v < vocabulary)


# ---------------------------------------------------------------- launchers

def tile(vocabulary: int, forward: bool) -> dict:
    """BLOCK and launch options: the forward's sums pass between fewer warps."""
    block = min(WIDEST, power(vocabulary))
    return {"BLOCK": block, "num_warps": max(1, min(4 if forward else 8, block // 512)), "num_stages": 2, "enable_fp_fusion": True}


def specs(arch: int) -> list[Spec]:
    """What is compiled ahead: a vocabulary and a classifier's labels."""
    found, kinds = [], (("vocabulary", 30522, False), ("labels, weighted", 28, True))
    for dtype in DTYPES.values():
        for words, vocabulary, weighted in kinds:
            forward, backward = ({name: tile(vocabulary, first)[name] for name in ("num_warps", "num_stages")} | {"aligned": () if weighted else ("row_stride",)}
                                 for first in (True, False))  # scores.py pads a vocabulary's rows
            constants = {"WEIGHTED": weighted, "BLOCK": tile(vocabulary, True)["BLOCK"]}
            if not weighted:
                constants["weights"] = None
            pointers = {"logits": "*" + dtype, "targets": "*i64", "weights": "*fp32"}
            found.append(Spec(f"forward, {words}, {dtype}", _row_sums, pointers | {"losses": "*fp32", "tops": "*fp32", "sums": "*fp32", "vocabulary": "i32", "row_stride": "i32"}, constants, **forward))
            found.append(Spec(f"backward, {words}, {dtype}", _gradient_over_logits,
                              pointers | {"tops": "*fp32", "sums": "*fp32", "pull": "*fp32", "share": "*fp32", "vocabulary": "i32", "row_stride": "i32"}, constants, **backward))
    for words, _, weighted in kinds:
        signature = {"losses": "*fp32", "targets": "*i64", "weights": "*fp32", "loss": "*fp32", "share": "*fp32", "rows": "i32", "vocabulary": "i32"}
        found.append(Spec(f"mean, {words}", _mean, signature, {"WEIGHTED": weighted, "ROWS": ROWS} | ({} if weighted else {"weights": None})))
    return found


@op("mlm_loss_forward", fake=lambda logits, *others: tuple(logits.new_empty(shape, dtype=torch.float32) for shape in ((), logits.shape[:1], logits.shape[:1], ())))
def _loss_forward(logits: Tensor, targets: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss [], a and z [M], and what the sum was divided by, []; float32. See the head of this file."""
    rows, vocabulary = logits.shape
    losses, tops, sums = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(3))
    loss, share = (torch.empty((), dtype=torch.float32, device=logits.device) for _ in range(2))
    with on(logits):
        if rows:
            _row_sums[rows,](logits, targets, weights, losses, tops, sums, vocabulary, logits.stride(0), WEIGHTED=weights is not None, **tile(vocabulary, True))
        _mean[1,](losses, targets, weights, loss, share, rows, vocabulary, WEIGHTED=weights is not None, ROWS=ROWS, num_warps=4, enable_fp_fusion=True)
    return loss, tops, sums, share


@op("mlm_loss_backward", fake=lambda *given: None, overwrites=("logits",))
def _loss_backward(logits: Tensor, targets: Tensor, weights: Tensor | None, tops: Tensor, sums: Tensor, pull: Tensor, share: Tensor) -> None:
    """Writes the gradient over `logits`."""
    rows, vocabulary = logits.shape
    if rows:
        options = tile(vocabulary, False)
        grid = rows, ceil_div(vocabulary, options["BLOCK"])
        with on(logits):
            _gradient_over_logits[grid](logits, targets, weights, tops, sums, pull, share, vocabulary, logits.stride(0), WEIGHTED=weights is not None, **options)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward_formula(ctx, pull, *_):
    logits, targets, weights, tops, sums, share = ctx.saved_tensors
    logits = logits.detach()
    _loss_backward(logits, targets, weights, tops, sums, pull, share)
    return logits, None, None


_loss_forward.differentiate(_setup, _backward_formula)


# ---------------------------------------------------------------- the op

@register("mlm_loss", "triton")
def mlm_loss(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """logits [M, V], targets int64 [M], weights [V] -> [] float32, nats; see the head of this file. The backward overwrites the logits.

    Raises ValueError that names what it cannot take.
    """
    expect("mlm_loss", "logits", logits, (-1, -1))
    rows, vocabulary = logits.shape
    expect("mlm_loss", "targets", targets, (rows,), (torch.int64,), logits.device)
    if weights is not None:
        expect("mlm_loss", "weights", weights, (vocabulary,), device=logits.device)
        weights = weights.detach().to(torch.float32).contiguous()
    apart = rows < 2 or logits.stride(0) >= vocabulary  # rows of an expanded tensor share their memory, and so would their gradients
    return _loss_forward(rows_together(logits) if apart else logits.contiguous(), targets.contiguous(), weights)[0]
