"""GELU (erf) of x + bias. Hendrycks and Gimpel 2016, arXiv 1606.08415: gelu(z) = z Phi(z), Phi the normal distribution function."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..kernels.op import first_order
from . import compiled
from .linear import in_16_bits, linear, linear_ref
from .norm import Normal


def gelu_ref(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, F], bias [F] or None -> [T, F]; the specification."""
    return F.gelu(x if bias is None else x + bias.to(x.dtype))


def gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """gelu_ref by the implementation that `kernels` chooses for the tensors' device; no kernel takes float64."""
    plain = x.dtype == torch.float64
    return (gelu_ref if plain else kernels.choose("gelu", reference=gelu_ref, device=x.device))(x, bias)


def feed_forward_ref(x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None) -> Tensor:
    """x [T, D], up [F, D], up_bias [F] or None, down [D, F], down_bias [D] or None -> [T, D]; the specification."""
    return linear_ref(gelu_ref(linear_ref(x, up), up_bias), down, down_bias)


def feed_forward(x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None, normal: Normal | None = None) -> Tensor:
    """feed_forward_ref by `linear` and `gelu`; where these would keep both results and x for trained weights, by what keeps less, and where a form of kernels/fused/feed_forward.py
    was measured to be faster, by that. normal: as `linear` takes it."""
    if in_16_bits(x, up, down) and kernels.decide("feed_forward", x.device)[0] == "triton" and (compiled.recorded(up, down) or _fused(x, up)):
        return kernels.choose("feed_forward", reference=feed_forward_ref, device=x.device)(x, up, up_bias, down, down_bias, normal)
    return linear(gelu(linear(x, up), up_bias), down, down_bias)


def _fused(x: Tensor, up: Tensor) -> bool:
    from ..kernels.feed_forward import form_for  # Triton is there

    return form_for(x, len(up)) == "fused"


@compiled.register("gelu")
def gelu_compiled(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """gelu_ref by csrc/ops.cpp. Saves x and the bias, not their sum."""
    if x.dim() != 2 or not compiled.takes(x, bias) or (bias is not None and bias.shape != x.shape[1:]):
        return gelu_ref(x, bias)
    return _Gelu.apply(x, bias) if compiled.recorded(x, bias) else _run(x, None, bias, None)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias):
        ctx.save_for_backward(x, bias)
        return _run(x, None, bias, None)

    @staticmethod
    def backward(ctx, dy):
        first_order("gelu")
        x, bias = ctx.saved_tensors
        dbias = torch.empty_like(bias, memory_format=torch.contiguous_format) if ctx.needs_input_grad[1] else None
        return _run(x, dy, bias, dbias), dbias


def _run(x: Tensor, dy: Tensor | None, bias: Tensor | None, dbias: Tensor | None) -> Tensor:
    """gelu(x + bias), or dx where dy is given; writes dbias."""
    x, out = compiled.lined(x), compiled.empty(*x.shape)
    dy, bias = None if dy is None else compiled.lined(dy), None if bias is None else bias.contiguous()
    compiled.call("gelu", x.data_ptr(), x.stride(0), compiled.pointer(dy), 0 if dy is None else dy.stride(0), compiled.pointer(bias), out.data_ptr(),
                  compiled.pointer(dbias), *x.shape, torch.get_num_threads())
    return out
