"""Scores of a vocabulary out of a wider product: values and gradients of the plain linear, whether the loss writes over the scores or not."""

import pytest
import torch

from peftdebias.ops.scores import FEW, ROUND, _Scores, scores

from .outside import assert_close


def given(size: int = 97) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((7, 13), (size, 13), (size,), (7, size)))


@pytest.mark.parametrize("size", [1, 30, 64, 97])
@pytest.mark.parametrize("over", [False, True])
def test_the_wider_product_is_the_plain_one(size, over):
    x, weight, bias, dy = given(size)
    x.requires_grad_()
    expected = torch.nn.functional.linear(x, weight, bias)
    (gradient,) = torch.autograd.grad(expected, x, dy)
    found = _Scores.apply(x, weight, bias)
    assert found.shape == expected.shape and found.stride() == (-(-size // ROUND) * ROUND, 1)
    assert_close(found, expected, "scores")
    if over:
        found.data.copy_(dy)
    assert_close(torch.autograd.grad(found, x, found.data if over else dy)[0], gradient, "gradient")


def test_a_gradient_that_looks_like_the_scores_but_lies_elsewhere():
    """Its neighbours hold something else than zeros."""
    x, weight, bias, dy = given()
    x.requires_grad_()
    found = _Scores.apply(x, weight, bias)
    elsewhere = torch.full((7, found.stride(0)), torch.nan, dtype=torch.float64)[:, :97]
    elsewhere.copy_(dy)
    assert_close(torch.autograd.grad(found, x, elsewhere)[0], dy @ weight, "gradient")


def test_on_a_cpu_they_are_the_plain_product():
    x, weight, bias, _ = (t.bfloat16() for t in given())
    x = x.repeat(FEW, 1)
    assert torch.equal(scores(x, weight, bias), torch.nn.functional.linear(x, weight, bias)) and scores(x, weight, bias).is_contiguous()
    with torch.autocast("cpu", torch.bfloat16):
        assert scores(x.float(), weight, bias).dtype == torch.bfloat16
