"""The plain twin of dropout + residual + LayerNorm is what it says, step by step."""

import torch

from peftdebias.kernels.dropout_ref import dropout_ref
from peftdebias.ops import Drop, norm_ref


def test_the_reference_is_layer_norm_of_the_dropped_plus_the_residual():
    generator = torch.Generator().manual_seed(0)
    hidden, residual = torch.randn(2, 13, 37, dtype=torch.float64, generator=generator)
    gain, bias = torch.randn(2, 37, dtype=torch.float64, generator=generator)
    drop = Drop(0.3, torch.tensor([5]), 2)
    x = dropout_ref(hidden, *drop) + residual
    expected = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-3).sqrt() * gain + bias
    torch.testing.assert_close(norm_ref(hidden, residual, gain, bias, 1e-3, drop), expected)
    torch.testing.assert_close(norm_ref(x, None, gain, bias, 1e-3), expected)
    assert (expected - norm_ref(hidden, residual, gain, bias, 1e-3)).abs().max() > 0.1


def test_gradients_of_the_reference():
    generator = torch.Generator().manual_seed(0)
    hidden, residual = (torch.randn(3, 7, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    gain, bias = (torch.randn(7, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda *x: norm_ref(*x, 1e-5, Drop(0.3, torch.tensor([5]), 2)), (hidden, residual, gain, bias))
