"""Where Triton's interpreter rounds unlike any GPU or takes its time, and what mends that.

It cuts float32 down to bfloat16 where a GPU rounds to nearest even, so its errors would be twice those of any device: here it rounds. And it multiplies tiles by
BLAS, which sums a product's terms in an order that depends on the tile's shape: `products_in_order` is for kernels that take the same product of tiles of other
shapes and count on the same bits.
"""

import os

import pytest
import torch

from .harness import product_in_order


def round_to_bfloat16() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    cut = interpreter._convert_float

    def convert(values, given, wanted, mode):
        if given == tl.float32 and wanted == tl.bfloat16:
            return torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.int16).numpy().view("uint16")
        return cut(values, given, wanted, mode)

    interpreter._convert_float = convert


def patch_once() -> None:
    """The interpreter looks through all of triton.language in every call of a device function, a quarter of its time, though the launch around it, or an earlier call,
    has put its own there already."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def patch_what_is_left(function):
        seen = [module for module in function.__globals__.values() if module is tl or module is tl.core]
        return patch(function) if any(tl.core.is_builtin(module.load) for module in seen) else interpreter._LangPatchScope()

    interpreter._patch_lang = patch_what_is_left


if os.environ.get("TRITON_INTERPRET") == "1":
    round_to_bfloat16()
    patch_once()


@pytest.fixture
def products_in_order(monkeypatch):
    """Products of tiles as a GPU's float32 units make them, one fused multiply-add after the other along k; then what was there before is added. On a device nothing
    is changed."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    def dot(self, a, b, d, *options):
        return interpreter.TensorHandle(product_in_order(a.data, b.data) + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
