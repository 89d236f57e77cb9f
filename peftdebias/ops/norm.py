"""LayerNorm of dropout(hidden) + residual. Ba et al. 2016, arXiv 1607.06450; where it stands in BERT: Devlin et al. 2019, after every block."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..kernels.dropout_ref import Drop, dropout_ref


def norm_ref(hidden: Tensor, residual: Tensor | None, gain: Tensor, bias: Tensor, epsilon: float, drop: Drop | None = None) -> Tensor:
    """hidden [T, D], residual [T, D] or None, gain and bias [D] -> [T, D]; the specification. epsilon is added to the variance (of D values, not D - 1)."""
    hidden = hidden if drop is None else dropout_ref(hidden, *drop)
    hidden = hidden if residual is None else hidden + residual
    return F.layer_norm(hidden, gain.shape, gain, bias, epsilon)


def norm(hidden: Tensor, residual: Tensor | None, gain: Tensor, bias: Tensor, epsilon: float, drop: Drop | None = None) -> Tensor:
    """norm_ref by the implementation that `kernels` chooses for the tensors' device; no kernel takes float64."""
    plain = hidden.dtype == torch.float64
    return (norm_ref if plain else kernels.choose("norm", reference=norm_ref, device=hidden.device))(hidden, residual, gain, bias, epsilon, drop)
