"""GELU (erf) of x + bias. Hendrycks and Gimpel 2016, arXiv 1606.08415: gelu(z) = z Phi(z), Phi the normal distribution function."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels


def gelu_ref(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, F], bias [F] or None -> [T, F]; the specification."""
    return F.gelu(x if bias is None else x + bias.to(x.dtype))


def gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """gelu_ref by the implementation that `kernels` chooses for the tensors' device; no kernel takes float64."""
    plain = x.dtype == torch.float64
    return (gelu_ref if plain else kernels.choose("gelu", reference=gelu_ref, device=x.device))(x, bias)
