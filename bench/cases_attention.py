"""Attention alone, one layer's, on ragged sequences: the fused kernel beside the reference, torch's scaled_dot_product_attention on a padded copy, and its varlen op.

What it adds over cases_kernels.py: lengths of texts. The index tensors of Spans are made before the clock starts: all layers of a batch share them. `roof` counts q, k,
v, y and their gradients moved once, and the products of every query with the keys of its own sequence and of the prefix.

Letters: T tokens, B sequences, H heads, W head width, P prefix length.
"""

from collections.abc import Callable

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from peftdebias.batches import Spans
from peftdebias.kernels.dropout_ref import Drop
from peftdebias.ops import attention_padded, attention_ref
from peftdebias.ops.attention import attention_varlen

from .case import Case, Provider, Setting, Work, output_bound
from .cases_kernels import RATE, bytes_of, drawn, full, fused
from .texts import random_lengths

MEAN = 54  # of lengths up to 128: 42 % of a padded batch is valid
PREFIX = 30


def attention(form: str, even: bool = False, rate: float = 0.0, prefix: int = 0) -> Callable[[Setting], Work]:
    """form: reference, padded, varlen, fused, or sdpa: torch's own dropout, whose masks are others. even: every text as long as the longest. x: how many sequences."""
    def build(setting: Setting) -> Work:
        size, longest = setting.size, min(setting.longest, setting.size.positions)
        lengths = tuple(random_lengths(int(setting.x), longest if even else min(MEAN, longest), longest, numpy.random.default_rng(setting.seed)).tolist())
        spans, tokens, heads, width = Spans.of(lengths, lengths, setting.device), sum(lengths), size.heads, size.hidden // size.heads
        given = {name: drawn(setting, seed=i, shape=(tokens, heads, width)) for i, name in enumerate(("query", "key", "value"))}
        if prefix:
            given |= {name: drawn(setting, True, seed=10 + i, shape=(prefix, heads, width)) for i, name in enumerate(("prefix_key", "prefix_value"))}
        drop = Drop(rate, torch.tensor([5], device=setting.device), 3) if rate else None
        op = {"reference": attention_ref, "padded": attention_padded, "varlen": attention_varlen, "sdpa": attention_sdpa}.get(form) or fused("attention", attention_padded, setting)
        if form == "varlen" and (setting.device.type != "cuda" or setting.precision != "bf16"):
            op = attention_padded  # it has 16 bits alone, on CUDA: elsewhere there is nothing of it to check

        def forward(query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor | None = None, prefix_value: Tensor | None = None) -> Tensor:
            return op(query, key, value, spans, None if prefix_key is None else (prefix_key, prefix_value), drop)

        pairs = float(sum(n * (n + prefix) for n in lengths))
        product, tensor = 2.0 * pairs * size.hidden, float(tokens * size.hidden * bytes_of(setting))
        words = f"{heads} heads x {width}, mean {tokens / max(1, len(lengths)):.1f} and at most {max(lengths)} tokens, dropout {rate:g}, prefix {prefix}; forward and backward"
        work = full(setting, forward, given, tuple(given), words, tokens=tokens, roof=((2 * product, 4 * tensor), (5 * product, 8 * tensor)),
                    limit="short sequences: little work a program" + ("; ten rounds of Philox for eight probabilities" if rate else ""))
        work.extra |= {"sizes": {"rows": tokens, "sequences": len(lengths), "longest": max(lengths), "prefix": prefix, "width": size.hidden}, "dropout": rate}
        return work

    return build


def attention_sdpa(query: Tensor, key: Tensor, value: Tensor, spans: Spans, prefix: None, drop: Drop) -> Tensor:
    """attention_padded by F.scaled_dot_product_attention with its own dropout."""
    batch, mask = spans.cu_keys.shape[0] - 1, spans.key_mask

    def padded(packed: Tensor) -> Tensor:
        wide = packed.new_zeros(batch * spans.most_keys, *packed.shape[1:]).index_copy(0, spans.key_places, packed)
        return wide.view(batch, spans.most_keys, *packed.shape[1:]).transpose(1, 2)

    out = F.scaled_dot_product_attention(padded(query), padded(key), padded(value), None if mask is None else mask[:, None, None, :], dropout_p=drop.rate)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, spans.key_places)


def _case(name: str, what: str, varlen: bool = False, **variant) -> Case:
    providers = {"torch SDPA": Provider(attention("sdpa", **variant), compared=False)} if "rate" in variant else {}
    providers |= {"attention_ref": Provider(attention("reference", **variant)), "attention_padded": Provider(attention("padded", **variant))}
    if varlen:
        providers["torch varlen"] = Provider(attention("varlen", **variant), ("torch.nn.attention.varlen",), kernels=("attention",))
    providers["peftdebias"] = Provider(attention("fused", **variant), kernels=("attention",))
    return Case(name, "full", what, providers, "sequences", (4, 16), output_bound, rounded=True)


ATTENTION_CASES = {case.name: case for case in (
    _case("attention", "attention inside ragged sequences", varlen=True),
    _case("attention_even", "the same, all texts of one length", varlen=True, even=True),
    _case("attention_dropout", f"the same inside ragged sequences, dropout {RATE:g}; torch SDPA's copies to padded tensors and back are in its time", rate=RATE),
    _case("attention_prefix", f"the same inside ragged sequences, a prefix of {PREFIX} that trains", prefix=PREFIX),
)}

FORMS = {"attention_padded": "padded", "torch varlen": "varlen", "peftdebias": "fused"}
"""provider -> the form of `attention` that it is (kernels/fused/dispatch.py)."""
