"""The plain twin of bias + GELU is z Phi(z)."""

import math

import torch

from peftdebias.ops import gelu_ref


def test_the_reference_is_z_times_the_normal_distribution_function():
    x, bias = torch.linspace(-6, 6, 13 * 7, dtype=torch.float64).view(13, 7), torch.linspace(-1, 1, 7, dtype=torch.float64)
    expected = [[z * 0.5 * math.erfc(-z / math.sqrt(2)) for z in row] for row in (x + bias).tolist()]
    torch.testing.assert_close(gelu_ref(x, bias), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(gelu_ref(x + bias), gelu_ref(x, bias))
