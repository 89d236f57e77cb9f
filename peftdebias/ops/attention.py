"""Bidirectional attention inside each sequence of a packed batch: softmax(q k^T / sqrt(W)) v. Vaswani et al. 2017, arXiv 1706.03762.

Prefix keys and values are shared by the batch and come before each sequence's own (Li and Liang 2021, arXiv 2101.00190). Dropout acts on the probabilities.

Where kernels/fused/attention.py can run there are three forms that compute the same, and dispatch.py picks one. "fused": that kernel. "padded": attention_padded,
torch's scaled_dot_product_attention on a copy; with dropout its plain formula, since torch's own draws other bits. "varlen": torch.nn.attention.varlen, for 16 bits
without prefix and dropout, where torch has it.
"""

import functools
import importlib.util
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..batches import Spans
from ..kernels import dispatch
from ..kernels.dropout_ref import Drop, attention_keep

Prefix = tuple[Tensor, Tensor]


def attention_ref(query: Tensor, key: Tensor, value: Tensor, spans: Spans, prefix: Prefix | None = None, drop: Drop | None = None) -> Tensor:
    """query [Mq, H, W], key and value [T, H, W] -> [Mq, H, W]; the specification. prefix: keys and values [P, H, W], without positions.

    A sequence without keys gives no rows, whatever its queries ask: it has none. With a prefix it has those keys alone.
    """
    outputs, q0, k0 = [], 0, 0
    shared = 0 if prefix is None else len(prefix[0])
    for queries, keys in zip(spans.query_lengths, spans.key_lengths):
        q, k, v = query[q0:q0 + queries], key[k0:k0 + keys], value[k0:k0 + keys]
        if prefix is not None:
            k, v = torch.cat([prefix[0], k]), torch.cat([prefix[1], v])
        shares = (torch.einsum("qhw,khw->hqk", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
        if drop is not None:
            shares = _dropped(shares, attention_keep(torch.arange(q0, q0 + queries, device=q.device), shared, keys, q.shape[1], drop), drop)
        outputs.append(torch.einsum("hqk,khw->qhw", shares, v))
        q0, k0 = q0 + queries, k0 + keys
    return torch.cat(outputs) if outputs else query


def attention_padded(query: Tensor, key: Tensor, value: Tensor, spans: Spans, prefix: Prefix | None = None, drop: Drop | None = None) -> Tensor:
    """attention_ref on a padded copy, a few large ops instead of B small ones: torch's scaled_dot_product_attention, with dropout the plain formula."""
    batch, heads, width = spans.cu_keys.shape[0] - 1, query.shape[1], query.shape[2]
    q = _padded_queries(query, spans)  # [Mq, H, W] -> [B, H, Sq, W]
    k, v = (_pad(x, batch, spans.most_keys, spans.exact, lambda: spans.key_places) for x in (key, value))
    mask = spans.key_mask
    if prefix is not None:
        k, v = (torch.cat([p.transpose(0, 1).expand(batch, -1, -1, -1), x], 2) for p, x in zip(prefix, (k, v)))
        mask = None if mask is None else F.pad(mask, (prefix[0].shape[0], 0), value=True)
    if drop is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None, :])
    else:
        shares = q @ k.transpose(2, 3) / math.sqrt(width)  # [B, H, Sq, P + S]
        shares = (shares if mask is None else shares.masked_fill(~mask[:, None, None, :], -math.inf)).softmax(-1)
        keep = attention_keep(torch.arange(query.shape[0], device=q.device), 0 if prefix is None else prefix[0].shape[0], spans.most_keys, heads, drop)  # [H, Mq, P + S]
        out = _dropped(shares, _padded_queries(keep.transpose(0, 1), spans), drop) @ v
    out = out.transpose(1, 2).reshape(-1, heads, width)  # [B, H, Sq, W] -> [B * Sq, H, W]
    return out if spans.exact and out.shape[0] == query.shape[0] else out.index_select(0, spans.query_places)


def attention_varlen(query: Tensor, key: Tensor, value: Tensor, spans: Spans, prefix: None = None, drop: None = None) -> Tensor:
    """attention_ref by torch.nn.attention.varlen: CUDA, bfloat16 or float16, neither prefix nor dropout."""
    from torch.nn.attention.varlen import varlen_attn  # importing it loads triton

    return varlen_attn(query, key, value, spans.cu_queries, spans.cu_keys, spans.most_queries, spans.most_keys)


def attention(query: Tensor, key: Tensor, value: Tensor, spans: Spans, prefix: Prefix | None = None, drop: Drop | None = None) -> Tensor:
    """attention_ref by the implementation that `kernels` chooses for the tensors' device, in the form that `dispatch` picks; no kernel takes float64, nor Triton's wider heads
    than kernels.WIDEST."""
    op = attention_padded if query.dtype == torch.float64 else kernels.choose("attention", reference=attention_padded, device=query.device, width=query.shape[2])
    if op is not attention_padded and kernels.decide("attention", query.device)[0] == "triton":
        op = {"fused": op, "padded": attention_padded, "varlen": attention_varlen}[_form(query, key, spans, prefix, drop)]
    return op(query, key, value, spans, prefix, drop)


def forms(query: Tensor, spans: Spans, prefix: Prefix | None, drop: Drop | None) -> tuple[str, ...]:
    """The forms that can serve. A sequence without keys leaves torch's ops without an answer."""
    if not spans.exact or (not min(spans.key_lengths, default=0) and prefix is None):
        return ("fused",)
    varlen = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and prefix is None and drop is None and query.shape[2] % 8 == 0 and has_varlen()
    return ("fused", "padded", "varlen") if varlen and min(spans.query_lengths) else ("fused", "padded")


@functools.cache
def has_varlen() -> bool:
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


def _form(query: Tensor, key: Tensor, spans: Spans, prefix: Prefix | None, drop: Drop | None) -> str:
    """A compiled graph holds no choice but the one asked for by name."""
    candidates = forms(query, spans, prefix, drop)
    if torch.compiler.is_compiling():
        form = dispatch.asked("attention")
        return form if form in candidates else candidates[0]
    return dispatch.pick("attention", candidates, device=query.device, dtype=query.dtype, dropout=drop is not None, rows=len(key), sequences=spans.cu_keys.shape[0] - 1,
                         longest=spans.most_keys, prefix=0 if prefix is None else len(prefix[0]), width=query.shape[1] * query.shape[2])


def _dropped(shares: Tensor, keep: Tensor, drop: Drop) -> Tensor:
    return torch.where(keep, shares * drop.scale, 0.0)


def _padded_queries(packed: Tensor, spans: Spans) -> Tensor:
    return _pad(packed, spans.cu_queries.shape[0] - 1, spans.most_queries, spans.exact, lambda: spans.query_places)


def _pad(packed: Tensor, batch: int, longest: int, exact: bool, places: Callable[[], Tensor]) -> Tensor:
    """[N, H, W] -> [B, H, longest, W]."""
    if exact and packed.shape[0] == batch * longest:  # all of one length: nothing to copy
        return packed.reshape(batch, longest, *packed.shape[1:]).transpose(1, 2)
    padded = packed.new_zeros(batch * longest, *packed.shape[1:]).index_copy(0, places(), packed)
    return padded.view(batch, longest, *packed.shape[1:]).transpose(1, 2)
