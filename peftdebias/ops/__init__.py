"""The encoder's own ops: for each its plain twin (the specification), and the function that picks an implementation for the tensors' device.

    dropout.py     dropout from counters: the same mask in torch, C and Triton
    attention.py   bidirectional attention inside each sequence, prefixes and dropout inside
    norm.py        LayerNorm of dropout(hidden) + residual
    gelu.py        GELU (erf) of x + bias

What it adds over kernels: the twins. It leaves out methods and shapes of models (sites.py, encoder.py), and the ops that methods own (methods/).

Letters: T tokens, M rows asked for, B sequences, D hidden, F feed-forward, H heads, W head width, P prefix length.
"""

from .attention import attention, attention_padded, attention_ref
from .dropout import Drop, dropout
from .gelu import gelu, gelu_ref
from .norm import norm, norm_ref

__all__ = ["Drop", "attention", "attention_padded", "attention_ref", "dropout", "gelu", "gelu_ref", "norm", "norm_ref"]
