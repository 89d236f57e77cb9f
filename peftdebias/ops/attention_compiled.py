"""Attention by csrc/ops.cpp, and query, key and value out of one product so that their gradients come back as one tensor.

What it adds over attention.py: the binding. The compiled op takes rows of any stride, so slices of one product [T, 3D] are not copied; its backward writes their gradients
as slices of one [T, 3D] too, which `heads_of` hands on as it is, where torch's split would put three tensors together. Saves query, key and value as they are, two numbers
a query and head, and the seed: no probabilities, no mask, not the output.

Letters: T tokens, Mq query rows, B sequences, H heads, W head width, P prefix length.
"""

import torch
from torch import Tensor

from ..batches import Spans
from ..kernels.dropout_ref import Drop
from ..kernels.op import first_order
from . import compiled
from .attention import Prefix, attention_padded


@compiled.register("attention")
def attention_compiled(query: Tensor, key: Tensor, value: Tensor, spans: Spans, prefix: Prefix | None = None, drop: Drop | None = None) -> Tensor:
    """attention_ref by csrc/ops.cpp. Raises ValueError where the spans do not add up to the rows, or heads differ in number or width."""
    both = prefix or (None, None)
    if not compiled.takes(query, key, value, *both):
        return attention_padded(query, key, value, spans, prefix, drop)
    rows, (queries, keys) = (len(query), len(key), len(value)), (sum(spans.query_lengths), sum(spans.key_lengths))
    if rows != (queries, keys, keys):
        raise ValueError(f"attention: expected {queries} queries, {keys} keys and values, got {rows[0]}, {rows[1]} and {rows[2]}")
    others = [tuple(x.shape) for x in (key, value, *both) if x is not None]
    if any(shape[1:] != query.shape[1:] for shape in others) or len(set(others[2:])) > 1:
        raise ValueError(f"attention: expected keys, values and a prefix with heads {tuple(query.shape[1:])} like the queries, got {', '.join(map(str, others))}")
    if compiled.recorded(query, key, value, *both):
        return _Attention.apply(query, key, value, *both, spans, drop)
    return _forward(query, key, value, *both, spans, drop, None)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, prefix_key, prefix_value, spans, drop):
        statistics = compiled.empty(query.shape[1], query.shape[0], 2)
        ctx.spans, ctx.drop = spans, None if drop is None else (drop.rate, drop.site)
        ctx.save_for_backward(query, key, value, prefix_key, prefix_value, statistics, None if drop is None else drop.seed)
        return _forward(query, key, value, prefix_key, prefix_value, spans, drop, statistics)

    @staticmethod
    def backward(ctx, dout):
        first_order("attention")
        query, key, value, prefix_key, prefix_value, statistics, seed = ctx.saved_tensors
        drop = None if ctx.drop is None else Drop(ctx.drop[0], seed, ctx.drop[1])
        needs, (_, heads, width) = ctx.needs_input_grad[:5], query.shape
        dquery, dkey, dvalue = _gradients(query, key, value, needs)
        dprefix = compiled.empty(2, *prefix_key.shape) if needs[3] or needs[4] else None
        q, k, v, do = (_headed(x) for x in (query, key, value, dout.resolve_neg()))
        pk, pv = _whole(prefix_key), _whole(prefix_value)
        lengths = ctx.spans.host_lengths
        compiled.call("attention_backward", *_place(q), *_place(k), *_place(v), compiled.pointer(pk), compiled.pointer(pv), 0 if pk is None else len(pk), statistics.data_ptr(),
                      *_place(do), *_place(dquery), *_place(dkey), *_place(dvalue), compiled.pointer(dprefix), lengths.data_ptr(), lengths.shape[1], len(query), heads,
                      width, *compiled.drawing(drop))
        return dquery, dkey, dvalue, dprefix[0] if needs[3] else None, dprefix[1] if needs[4] else None, None, None


def _forward(query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor | None, prefix_value: Tensor | None, spans: Spans, drop: Drop | None,
             statistics: Tensor | None) -> Tensor:
    """Writes the statistics [H, Mq, 2] of the scores where they are given (csrc/ops.h)."""
    q, k, v, pk, pv = _headed(query), _headed(key), _headed(value), _whole(prefix_key), _whole(prefix_value)
    out, lengths = compiled.empty(*query.shape), spans.host_lengths
    compiled.call("attention_forward", *_place(q), *_place(k), *_place(v), compiled.pointer(pk), compiled.pointer(pv), 0 if pk is None else len(pk), out.data_ptr(),
                  compiled.pointer(statistics), lengths.data_ptr(), lengths.shape[1], *query.shape, *compiled.drawing(drop))
    return out


def _headed(x: Tensor) -> Tensor:
    """[., H, W] with heads W apart."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _whole(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _place(x: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if x is None else (x.data_ptr(), x.stride(0))


def _gradients(query: Tensor, key: Tensor, value: Tensor, needs: tuple[bool, ...]) -> list[Tensor | None]:
    """Room for the gradients asked for: slices of one tensor where the values are."""
    for first, group in ((0, (query, key, value)), (1, (key, value))):
        if all(needs[first:3]) and _adjacent(group):
            rows, heads, width = group[0].shape
            alone = [compiled.empty(*query.shape) if needs[0] else None] if first else []
            return [*alone, *compiled.empty(rows, len(group), heads, width).unbind(1)]
    return [compiled.empty(*x.shape) if need else None for x, need in zip((query, key, value), needs)]


def _adjacent(group: tuple[Tensor, ...]) -> bool:
    """Whether tensors [T, H, W] are the slices of one [T, n H W], in order."""
    first, (_, heads, width) = group[0], group[0].shape
    strides, size = (len(group) * heads * width, width, 1), first.element_size() * heads * width
    return all(x.shape == first.shape and x.stride() == strides and x.data_ptr() == first.data_ptr() + i * size for i, x in enumerate(group)) and (
        len({x.untyped_storage().data_ptr() for x in group}) == 1)


# ---------------------------------------------------------------- query, key, value out of one product

def heads_of(x: Tensor, parts: int, heads: int) -> list[Tensor]:
    """x [T, parts * D] -> `parts` views [T, H, W]. Where attention gives their gradients as slices of one tensor, that is x's: nothing is put together."""
    if (compiled.FUNCTIONS and compiled.takes(x) or x.is_cuda and compiled.plain(x)) and compiled.recorded(x) and x.is_contiguous():
        return list(_Parts.apply(x, parts, heads))
    width = x.shape[1] // parts
    return [part.reshape(len(x), heads, width // heads) for part in x.split(width, -1)]


class _Parts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, parts, heads):
        ctx.shape = x.shape
        return x.view(len(x), parts, heads, x.shape[1] // parts // heads).unbind(1)

    @staticmethod
    def backward(ctx, *gradients):
        if not torch.is_grad_enabled() and _adjacent(gradients):  # else the view would be of the first alone, for whoever differentiates again
            return gradients[0].as_strided(ctx.shape, (ctx.shape[1], 1)), None, None
        return torch.cat([g.flatten(1) for g in gradients], 1), None, None
