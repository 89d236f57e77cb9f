"""The encoder's own ops: for each its plain twin (the specification), the function that picks an implementation for the tensors' device, and the binding to csrc.

    dropout.py     dropout from counters: the same mask in torch, C and Triton
    attention.py   bidirectional attention inside each sequence, prefixes and dropout inside
    norm.py        LayerNorm of dropout(hidden) + residual
    embeddings.py  rows of two tables, LayerNorm of their sum, dropout
    gelu.py        GELU (erf) of x + bias; that between two linears
    linear.py      x W^T + bias by the faster of two libraries
    scores.py      the same for a vocabulary, whose number of rows GPUs dislike
    compiled.py    what the bindings share; each stands beside its twin, attention's in attention_compiled.py

What it adds over kernels: the twins, and csrc/ops.cpp for a CPU. It leaves out methods and shapes of models (sites.py, encoder.py), and the ops that methods own (methods/).

Letters: T tokens, M rows asked for, B sequences, D hidden, F feed-forward, H heads, W head width, P prefix length.
"""

from .attention import attention, attention_padded, attention_ref
from .attention_compiled import heads_of
from .dropout import Drop, dropout
from .embeddings import embed, embed_ref
from .gelu import feed_forward, feed_forward_ref, gelu, gelu_ref
from .linear import linear, rounded_once
from .norm import Forked, Normal, norm, norm_ref
from .scores import scores

__all__ = ["Drop", "Forked", "Normal", "attention", "attention_padded", "attention_ref", "dropout", "embed", "embed_ref", "feed_forward", "feed_forward_ref", "gelu", "gelu_ref",
           "heads_of", "linear", "norm", "norm_ref", "rounded_once", "scores"]
