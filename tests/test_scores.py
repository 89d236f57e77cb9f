"""Scores of a vocabulary out of a wider product: values and gradients of the plain linear, whether the loss writes over the scores or not."""

import copy
import importlib

import pytest
import torch

from peftdebias import kernels
from peftdebias.lowered import lowered, may_be_lowered
from peftdebias.ops import compiled
from peftdebias.ops.scores import FEW, ROUND, _Scores, narrow, scores, turned, widen, wider

from .outside import assert_close, drawn_model

room = importlib.import_module("peftdebias.ops.scores")  # the package has a function of that name


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


@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_row_without_a_gradient_adds_nothing_whatever_its_x(bad, over):
    """As a row does whose target is ignored; the other rows' gradients stay theirs."""
    x, weight, bias, dy = given()
    x[2, 0], dy[2] = bad, 0
    found = _Scores.apply(x.requires_grad_(), weight, bias)
    if over:
        found.data.copy_(dy)
    (gradient,) = torch.autograd.grad(found, x, found.data if over else dy)
    assert not gradient[2].any()
    assert_close(gradient, dy @ weight, "gradient")


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


# ---------------------------------------------------------------- a weight that rows of zeros follow

def laid(size: int = 97) -> tuple[torch.Tensor, ...]:
    x, weight, bias, dy = given(size)
    parameter = torch.nn.Parameter(weight, requires_grad=False)
    widen(parameter)
    return x.requires_grad_(), parameter, bias, dy


def test_a_weight_that_lies_wider_has_the_padded_ones_bits_and_is_not_padded(monkeypatch):
    """In every call with the bias of that call."""
    x, parameter, bias, dy = laid()
    weight = given()[1]
    assert torch.equal(parameter, weight) and parameter.is_contiguous()
    for shift in (bias, 2 * bias):
        wanted = _Scores.apply(x, weight, shift)
        (gradient,) = torch.autograd.grad(wanted, x, dy)
        with monkeypatch.context() as patch:
            patch.setattr(room.F, "pad", lambda *_: pytest.fail("padded"))
            found = _Scores.apply(x, parameter, shift)
        assert torch.equal(found, wanted) and found.stride() == (2 * ROUND, 1)
        assert torch.equal(torch.autograd.grad(found, x, dy)[0], gradient)
    parameter.mul_(2)  # its values may change
    assert torch.equal(_Scores.apply(x, parameter, bias), _Scores.apply(x, 2 * weight, bias))


MOVED = {"other memory": lambda data: data.clone(), "fewer rows": lambda data: data[:90], "fewer columns": lambda data: data[:, :12],
         "columns together": lambda data: data.as_strided((97, 13), (1, 97)), "another dtype": lambda data: data.view(torch.int64)}


@pytest.mark.parametrize("what", MOVED)
def test_a_parameter_that_lies_otherwise_now_is_not_taken_for_a_wider_one(what):
    _, parameter, _, _ = laid()
    assert wider(parameter, parameter.dtype) is not None
    parameter.data = MOVED[what](parameter.data)
    assert wider(parameter, parameter.dtype) is None


def test_only_the_parameter_itself_and_in_its_dtype_is_known_to_lie_wider():
    _, parameter, _, _ = laid()
    assert wider(parameter, parameter.dtype) is not None
    assert wider(parameter, torch.bfloat16) is None and wider(parameter.detach(), parameter.dtype) is None
    narrow(parameter)
    assert wider(parameter, parameter.dtype) is None


def test_its_copies_are_not_wider_and_the_memory_goes_with_it():
    _, parameter, _, _ = laid()
    before = len(room._wider)
    copied = copy.deepcopy(parameter)
    assert copied.untyped_storage().nbytes() == 97 * 13 * 8 and wider(copied, copied.dtype) is None and wider(parameter, parameter.dtype)
    del parameter
    assert len(room._wider) == before - 1


def test_an_update_between_forward_and_backward_is_refused_not_answered_wrongly():
    """The backward multiplies by the memory that the weight lies in."""
    x, parameter, bias, dy = laid()
    found = _Scores.apply(x, parameter, bias)
    parameter.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.backward(dy)


@pytest.mark.parametrize("size", [8, 64, 96])
def test_rows_that_are_a_multiple_already_stay_where_they_are(size):
    parameter = torch.nn.Parameter(given(size)[1])
    place = parameter.data_ptr()
    widen(parameter)
    assert parameter.data_ptr() == place and wider(parameter, parameter.dtype) is None


# ---------------------------------------------------------------- turned round, by MKL on AMD's processors

@pytest.mark.parametrize("rows", [1, 7, 16, 161, 330])
@pytest.mark.parametrize("block", [1, 40, 4096])
def test_the_turned_product_is_the_plain_one(rows, block, monkeypatch):
    monkeypatch.setattr(room, "BLOCK", block)
    _, weight, bias, _ = given()
    x = torch.randn(rows, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = turned(x, weight, bias)
    assert found.is_contiguous()
    assert_close(found, torch.nn.functional.linear(x, weight, bias), "scores")


@pytest.mark.skipif(not compiled.FUNCTIONS, reason="no compiled ops")
def test_where_the_product_is_turned_it_has_the_plain_gradient_and_elsewhere_it_is_not(monkeypatch):
    calls = []
    monkeypatch.setattr(room, "_mkl_on_amd", lambda: True)
    monkeypatch.setattr(room, "linear_form", lambda: ("blas", ""))
    monkeypatch.setattr(room, "turned", lambda *tensors: calls.append(len(tensors[0])) or turned(*tensors))
    monkeypatch.setattr(room, "TALL", 97), monkeypatch.setattr(room, "WIDE", 13)
    x, weight, bias, dy = (t.float() for t in given())
    x, dy = x.repeat(2, 1).requires_grad_(), dy.repeat(2, 1)
    found, expected = scores(x, weight, bias), torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(found, x, dy)[0], torch.autograd.grad(expected, x, dy)[0], rtol=1e-5, atol=1e-5)
    scores(x.detach(), weight, bias)
    assert calls == [14, 14]
    with kernels.use("torch"):
        scores(x, weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        scores(x, weight, bias)
    scores(x[:7], weight, bias), scores(x.double(), weight.double(), bias.double()), scores(x, weight[:96], bias[:96])
    trained = scores(x, weight.clone().requires_grad_(), bias)
    monkeypatch.setattr(room, "linear_form", lambda: ("onednn", ""))
    scores(x, weight, bias)
    monkeypatch.setattr(room, "_mkl_on_amd", lambda: False)
    scores(x, weight, bias)
    assert calls == [14, 14] and trained.requires_grad


def test_what_was_lowered_is_no_longer_wider():
    model = drawn_model().float().requires_grad_(False)
    weight = model.mlm_decoder()[0]
    with lowered(model):
        assert weight in room._wider and weight.dtype == torch.bfloat16
    assert weight not in room._wider and weight.dtype == torch.float32


def test_what_is_not_float32_is_not_lowered():
    assert not may_be_lowered(drawn_model().requires_grad_(False))
