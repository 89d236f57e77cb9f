"""What would see a kernel that touches memory of others: the fence around what launchers make, in a backward too, and the interpreter that stays inside its tensors
and whose whole numbers do not overflow."""

import math

import pytest
import torch
import triton
import triton.language as tl

from peftdebias.kernels.gelu import gelu

from .harness import DEVICE, GUARD, Fenced, drawn


@triton.jit
def copy_kernel(X, Y, given, written, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(Y + columns, tl.load(X + columns, mask=columns < given, other=0.0), mask=columns < written)


def test_the_fence_is_nan_in_every_dtype_of_floats():
    with Fenced() as fence:
        for dtype in fence.BITS:
            torch.empty(3, dtype=dtype, device=DEVICE)
    for (buffer, inside, _), dtype in zip(fence.made, fence.BITS):
        assert buffer.view(dtype)[:inside.start].isnan().all()
    fence.check()


def copied(given: int, written: int) -> torch.Tensor:
    """13 numbers, of which a kernel reads and writes so many."""
    x = drawn(13).float()
    y = torch.empty_like(x)
    copy_kernel[(1,)](x, y, given, written, BLOCK=32)
    return y


def test_the_fence_stands_around_what_a_backward_makes():
    x = drawn(3, 5).float().requires_grad_()
    with Fenced() as fence:
        y = gelu(x)
        before = len(fence.made)
        torch.autograd.grad(y, x, torch.ones_like(y))
    fence.check()
    buffer, inside, _ = next(one for one in fence.made[before:] if one[1] == slice(GUARD, GUARD + 15))
    buffer.view(torch.float32)[inside.stop] = math.nan  # as a kernel writes it that reads NaN beyond its input
    with pytest.raises(AssertionError, match="expected no write beyond an output or scratch tensor of 15 elements"):
        fence.check()


@triton.jit
def combined_kernel(X, Y, OPERATION: tl.constexpr):
    x, y = tl.load(X), tl.load(Y)
    tl.store(Y, x + y if OPERATION == "add" else x - y if OPERATION == "sub" else x * y)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a device has no such watch")
@pytest.mark.parametrize("operation, x, y", [("add", 2**31 - 6, 5), ("sub", 5 - 2**31, 5), ("mul", 2**16, 2**15 - 1)])
def test_whole_numbers_do_not_overflow(operation, x, y):
    x, y = torch.tensor([x], dtype=torch.int32), torch.tensor([y], dtype=torch.int32)
    combined_kernel[(1,)](x, y.clone(), OPERATION=operation)
    with pytest.raises(Exception, match=f"int32 overflow detected for operation {operation}"):
        combined_kernel[(1,)](x, y + (2 if operation == "mul" else 5), OPERATION=operation)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a device has no such watch")
def test_a_kernel_touches_its_tensors_alone():
    assert copied(13, 13).isfinite().all()
    for given, written, words in ((14, 13, "copy_kernel: expected no load beyond its tensors, got 1 of 14"), (13, 20, "copy_kernel: expected no store beyond its tensors, got 7 of 20")):
        with pytest.raises(Exception, match=words):
            copied(given, written)
