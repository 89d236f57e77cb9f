"""An encoder's embeddings: a row of each of two tables, LayerNorm of their sum, dropout. Devlin et al. 2019; there the segment's row is added before (encoder.py)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..kernels.dropout_ref import Drop, dropout_ref
from . import compiled
from .dropout import dropout
from .norm import norm, norm_ref


def embed_ref(ids: Tensor, places: Tensor, word: Tensor, placed: Tensor, gain: Tensor, bias: Tensor, epsilon: float, drop: Drop | None = None) -> Tensor:
    """ids and places int64 [T], word [V, D], placed [N, D], gain and bias [D] -> [T, D]; the specification. epsilon as in norm_ref. Ids lie in [0, V), places in [0, N)."""
    y = norm_ref(F.embedding(ids, word), F.embedding(places, placed), gain, bias, epsilon)
    return y if drop is None else dropout_ref(y, *drop)


def embed(ids: Tensor, places: Tensor, word: Tensor, placed: Tensor, gain: Tensor, bias: Tensor, epsilon: float, drop: Drop | None = None) -> Tensor:
    """embed_ref by the implementation that `kernels` chooses for the tensors' device; no kernel takes float64."""
    plain = torch.float64 in (word.dtype, placed.dtype)
    return (embed_ref if plain else kernels.choose("embed", reference=embed_ref, device=word.device, width=word.shape[-1]))(ids, places, word, placed, gain, bias, epsilon, drop)


@compiled.register("embed")
def embed_compiled(ids: Tensor, places: Tensor, word: Tensor, placed: Tensor, gain: Tensor, bias: Tensor, epsilon: float, drop: Drop | None = None) -> Tensor:
    """embed_ref by torch's look-ups and the compiled norm and dropout, which save what they save."""
    return dropout(norm(F.embedding(ids, word), F.embedding(places, placed), gain, bias, epsilon), drop)
