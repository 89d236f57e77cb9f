"""Where Triton's interpreter rounds unlike any GPU or takes its time, and what mends that.

It hands a kernel Python's own floats, of 64 bits, where a GPU gets float32: here they are float32. It cuts float32 down to bfloat16 where a GPU rounds to nearest even, so
its errors would be twice those of any device: here it rounds. And it multiplies tiles by BLAS, which sums a product's terms in an order that depends on the tile's shape:
`products_in_order` is for kernels that take the same product of tiles of other shapes and count on the same bits.

It reads and writes wherever an address points to, where a GPU ends the program or not, by luck: here a kernel loads and stores nothing but the tensors that it was given.

That of triton 3.6 cannot count a loop beside numpy 2.4: here it can.
"""

import os

import numpy
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


def narrow_floats() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def narrow(argument):
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(numpy.array([argument], numpy.float32), tl.float32), tl.float32)
        return convert(argument)

    interpreter._implicit_cvt = narrow


def count_loops() -> None:
    """A loop's bounds are arrays of one number, which triton 3.6 has numpy make whole numbers of; from 2.4 on numpy refuses what has a dimension."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


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


def remember_types() -> None:
    """The interpreter makes the type of every tensor anew, and for it a table of numpy's types, a quarter of its time; what a type is made of is kept here."""
    import triton.language as tl
    from triton.runtime import interpreter

    make_type, make_tensor, numpy_of = tl.block_type.__init__, tl.tensor.__init__, interpreter._get_np_dtype
    types, dtypes, of_scalars = {}, {}, []

    def block_type(self, element_ty, shape):
        key = element_ty.name, getattr(element_ty, "address_space", None), *(getattr(n, "value", n) for n in shape)
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = vars(self) | {"of_tensors": []}
        vars(self).update(types[key])

    def tensor(self, handle, type):
        kept = vars(type).get("of_tensors", of_scalars)
        if not kept:
            make_tensor(self, handle, type)
            kept.extend((self.numel, self.shape))
        self.handle, self.type, self.dtype, (self.numel, self.shape) = handle, type, type.scalar, kept

    def np_dtype(of):
        key = of.scalar.name
        if key not in dtypes:
            dtypes[key] = numpy_of(of)
        return dtypes[key]

    tl.block_type.__init__, tl.tensor.__init__, interpreter._get_np_dtype = block_type, tensor, np_dtype


def take_what_fits() -> None:
    """The interpreter goes through all rules of promotion and broadcasting for two tensors of one type, and casts, compares and asserts by itself to see that whole numbers
    do not overflow: together a third of its time. Two tensors of one type are taken as they are, and an overflow is looked for in one go."""
    import triton.language as tl
    from triton.language.semantic import TritonSemantic

    check, unwrap = TritonSemantic.binary_op_type_checking_impl, tl.core._unwrap_if_constexpr
    as_numpy = {"add": numpy.add, "sub": numpy.subtract, "mul": numpy.multiply}

    def checked(self, left, right, allow_left_pointer=False, allow_right_pointer=False, arithmetic=True, division=False):
        if type(left) is tl.tensor and type(right) is tl.tensor and left.shape is right.shape and not division and left.dtype.name == right.dtype.name and not left.dtype.is_ptr():
            return left, right
        return check(self, left, right, allow_left_pointer, allow_right_pointer, arithmetic, division)

    def sanitized(self, left, right, operation):
        of = left.type.scalar
        if of.int_bitwidth < 64:
            found = as_numpy[operation.__name__](left.handle.data.astype(numpy.int64), right.handle.data.astype(numpy.int64))
            within = (found >= of.get_int_min_value()).all() and (found <= of.get_int_max_value()).all()
            assert within, f"int{of.int_bitwidth} overflow detected for operation {operation.__name__}"

    def unwrapped(value):
        return value if type(value) is tl.tensor else unwrap(value)

    TritonSemantic.binary_op_type_checking_impl, TritonSemantic.binary_op_sanitize_overflow_impl, tl.core._unwrap_if_constexpr = checked, sanitized, unwrapped


ADDRESSES_FROM_TABLES = {"many_kernel", "write_kernel"}  # kernels that are given numbers in place of tensors


def stay_inside() -> None:
    """A load or a store whose mask lets it touch anything else than the tensors of its launch is an error. Tensors of a GPU, which the interpreter copies, are not looked after,
    nor which of two that lie side by side is meant."""
    from triton.runtime import interpreter

    launch, builder = interpreter.GridExecutor.__call__, interpreter.InterpreterBuilder
    within: list[tuple[str, numpy.ndarray, numpy.ndarray]] = []  # the launches that are running: name, where stretches of memory begin, and end

    def watched_launch(self, *args, **kwargs):
        name, given = self.fn.__name__, [*args, *kwargs.values()]
        if name in ADDRESSES_FROM_TABLES or any(isinstance(t, torch.Tensor) and t.device.type != "cpu" for t in given):
            return launch(self, *args, **kwargs)
        within.append((name, *_stretches(given)))
        try:
            return launch(self, *args, **kwargs)
        finally:
            within.pop()

    def looked_at(what, touch, mask_place):
        def touched(self, pointers, *args):
            if within:
                name, begins, ends = within[-1]
                allowed = numpy.broadcast_to(args[mask_place].data, pointers.data.shape).astype(bool)
                at = pointers.data[allowed].astype(numpy.uint64)
                place = numpy.searchsorted(begins, at, "right").astype(numpy.int64) - 1
                size = numpy.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
                beyond = int(((place < 0) | (at + size > ends[place])).sum()) if len(begins) else at.size
                assert not beyond, f"{name}: expected no {what} beyond its tensors, got {beyond} of {at.size}"
            return touch(self, pointers, *args)

        return touched

    interpreter.GridExecutor.__call__ = watched_launch
    builder.create_masked_load = looked_at("load", builder.create_masked_load, 0)
    builder.create_masked_store = looked_at("store", builder.create_masked_store, 1)


def _stretches(given: list) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(where the memory of the tensors in `given` begins, where it ends), in order, what lies side by side as one."""
    found: list[list[int]] = []
    tensors = [t for t in given if isinstance(t, torch.Tensor) and t.numel()]
    for begin, end in sorted((t.data_ptr(), t.data_ptr() + (1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride()))) * t.element_size()) for t in tensors):
        if found and begin <= found[-1][1]:
            found[-1][1] = max(end, found[-1][1])
        else:
            found.append([begin, end])
    begins, ends = zip(*found) if found else ((), ())
    return numpy.array(begins, numpy.uint64), numpy.array(ends, numpy.uint64)


if os.environ.get("TRITON_INTERPRET") == "1":
    stay_inside()
    round_to_bfloat16()
    narrow_floats()
    count_loops()
    patch_once()
    remember_types()
    take_what_fits()


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
