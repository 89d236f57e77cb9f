"""AdamW in one launch: of values that lie in one flat tensor, or of many tensors wherever they lie. Loshchilov and Hutter 2019, arXiv 1711.05101.

adamw computes adamw_ref of peftdebias/optimizer.py, which is torch.optim.AdamW's formula, for step t = 1, 2, ...:

    m <- m + (1 - b1) (g - m)        q <- b2 q + (1 - b2) g^2
    w <- (1 - lr decay) w - lr / (1 - b1^t) * m / (sqrt(q) / sqrt(1 - b2^t) + epsilon)

    with f g for g where a factor f is given: what clipping the gradients' norm multiplies them with. So no pass of its own over all gradients does that: of a base of 109 M
    weights it would read and write 870 MB beside the 3 GB of this one.

    w, g, m, q [n], contiguous float32, no two of them the same memory; w, m and q are overwritten, g and f, [] float32, are read. What changes from step to step, (1 - lr decay,
    lr / (1 - b1^t), sqrt(1 - b2^t)), lies in device memory, so that a captured CUDA graph can be replayed.

AdamWOfMany computes AdamWOfManyRef of that file: the same of many tensors.

How. A program owns COUNT values; only those at a tensor's end are asked one by one whether they are there, which forbids loads of several at once. Of many tensors, which ones
it owns says a table on the device: `tiles` int32 [N, 2] (tensor, which COUNT values of it) and `sizes` int64 [S], made once, and `places` int64 [S, 4], the addresses of w, g, m
and q. Autograd may put a gradient elsewhere in every step; then they are sent anew, from pinned memory. While a CUDA graph is captured nothing can be sent, and nothing runs:
the graph gets a table of its own, which `captured` fills once the capture is over. Its memory is there before the capture: what is allocated in one may have been another
tensor's a few kernels before, which every replay writes again. The optimizer calls all this outside of what torch.compile sees, so that it is no op of torch.library.
What limits it: memory, 28 bytes a value.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import register
from .op import op
from .tiles import Spec, address, capturing, ceil_div, expect, on

COUNT = 1024  # values that one program updates


# ---------------------------------------------------------------- kernels

@triton.jit
def _moments(g, m, q, b2, new1, new2):
    """The moments after gradient g; new1 = 1 - b1, new2 = 1 - b2, taken in float64 (in float32 1 - 0.999 is off by 1e-5)."""
    return m + new1 * (g - m), b2 * q + new2 * g * g


@triton.jit
def _elements(w, g, m, q, rates, factor, n, inside, b2, new1, new2, epsilon):
    """The elements n of w, g, m, q; all of them are there where `inside` is None. rates [3]: kept = 1 - lr decay, rate = lr / (1 - b1^t), root = sqrt(1 - b2^t). factor fp32 []
    or None. new1, new2: see _moments."""
    kept, rate, root = tl.load(rates), tl.load(rates + 1), tl.load(rates + 2)
    pull = tl.load(g + n, mask=inside)
    if factor is not None:
        pull *= tl.load(factor)
    first, second = _moments(pull, tl.load(m + n, mask=inside), tl.load(q + n, mask=inside), b2, new1, new2)
    value = kept * tl.load(w + n, mask=inside) - rate * first / (tl.sqrt_rn(second) / root + epsilon)
    tl.store(m + n, first, mask=inside)
    tl.store(q + n, second, mask=inside)
    tl.store(w + n, value, mask=inside)


@triton.jit
def _update(w, g, m, q, rates, factor, first, size, b2, new1, new2, epsilon, COUNT: tl.constexpr):
    """COUNT elements of w, g, m, q [size] from `first` on, or what is left. rates, new1, new2: see _elements."""
    n = first + tl.arange(0, COUNT)
    if first + COUNT <= size:
        _elements(w, g, m, q, rates, factor, n, None, b2, new1, new2, epsilon)
    else:
        _elements(w, g, m, q, rates, factor, n, n < size, b2, new1, new2, epsilon)


@triton.jit
def flat_kernel(w, g, m, q, rates, factor, size, b2, new1, new2, epsilon, COUNT: tl.constexpr):
    """w, g, m, q [size], rates [3], factor fp32 [] or None: see _elements."""
    _update(w, g, m, q, rates, factor, tl.program_id(0).to(tl.int64) * COUNT, size, b2, new1, new2, epsilon, COUNT)


@triton.jit
def many_kernel(tiles, sizes, places, rates, factor, b2, new1, new2, epsilon, ALIGNED: tl.constexpr, COUNT: tl.constexpr):
    """tiles int32 [N, 2], sizes int64 [S], places int64 [S, 4], factor fp32 [] or None; see the file's first lines. ALIGNED: all addresses are multiples of 16."""
    tile = tiles + 2 * tl.program_id(0)
    tensor = tl.load(tile).to(tl.int64)
    place = places + 4 * tensor
    w, g, m, q = (address(place, tl.float32, ALIGNED), address(place + 1, tl.float32, ALIGNED), address(place + 2, tl.float32, ALIGNED),
                  address(place + 3, tl.float32, ALIGNED))
    _update(w, g, m, q, rates, factor, tl.load(tile + 1).to(tl.int64) * COUNT, tl.load(sizes + tensor), b2, new1, new2, epsilon, COUNT)


def specs(arch: int) -> list[Spec]:
    """What is compiled ahead."""
    numbers = {name: "fp32" for name in ("b2", "new1", "new2", "epsilon")}
    many = {"tiles": "*i32", "sizes": "*i64", "places": "*i64", "rates": "*fp32"}
    flat, found = {name: "*fp32" for name in (*"wgmq", "rates")}, []
    for words, factor, constants in (("", {"factor": "*fp32"}, {}), (", unclipped", {}, {"factor": None})):
        found.append(Spec("adamw" + words, flat_kernel, flat | factor | {"size": "i32"} | numbers, {"COUNT": COUNT} | constants))
        found.append(Spec("adamw of many" + words, many_kernel, many | factor | numbers, {"ALIGNED": True, "COUNT": COUNT} | constants))
    return found


# ---------------------------------------------------------------- one flat tensor

@op("adamw", fake=lambda *given: None, overwrites=("values", "first", "second"))
def _adamw(values: Tensor, gradient: Tensor, first: Tensor, second: Tensor, rates: Tensor, factor: Tensor | None, b1: float, b2: float, epsilon: float) -> None:
    if values.numel():
        with on(values):
            flat_kernel[ceil_div(values.numel(), COUNT),](values, gradient, first, second, rates, factor, values.numel(), b2, 1 - b1, 1 - b2, epsilon, COUNT=COUNT,
                                                          num_warps=4, enable_fp_fusion=True)


@register("adamw", "triton")
def adamw(values: Tensor, gradient: Tensor, first: Tensor, second: Tensor, rates: Tensor, factor: Tensor | None = None, *, betas: tuple[float, float], epsilon: float) -> None:
    """One step, in place; rates [3], factor []; see the head of this file. Raises ValueError that names what it cannot take."""
    for name, tensor, size in (("values", values, values.numel()), ("gradient", gradient, values.numel()), ("first", first, values.numel()),
                               ("second", second, values.numel()), ("rates", rates, 3)):
        expect("adamw", name, tensor, (size,), (torch.float32,), values.device)
        if not tensor.is_contiguous():
            raise ValueError(f"adamw, {name}: expected a contiguous tensor, got stride {tensor.stride(0)}")
    if factor is not None:
        expect("adamw", "factor", factor, (), (torch.float32,), values.device)
    _adamw(values, gradient, first, second, rates, factor, *betas, epsilon)


# ---------------------------------------------------------------- many tensors

@register("adamw_of_many", "triton")
class AdamWOfMany:
    """AdamW of these tensors; see the head of this file. values, first, second: contiguous float32 tensors of any shapes, alike, on one device, which keep their memory. Raises
    ValueError that names what it cannot take."""

    def __init__(self, values: list[Tensor], first: list[Tensor], second: list[Tensor]):
        if not values or not len(values) == len(first) == len(second):
            raise ValueError(f"adamw_of_many: expected as many tensors of each kind, at least one, got {len(values)}, {len(first)} and {len(second)}")
        self.device, self.tensors = values[0].device, (values, first, second)
        self.known: tuple[list, Tensor | None] = [], None  # addresses, and the table that holds them
        self.waiting: list[tuple[Tensor, list | None]] = []  # tables of launches that were captured, and what they are to hold; None: they hold it
        for name, tensors in zip(("values", "first", "second"), self.tensors):
            for i, tensor in enumerate(tensors):
                self._check(f"{name} {i}", tensor, i)
        sizes = torch.tensor([tensor.numel() for tensor in values], device="cpu")
        parts = (sizes + COUNT - 1) // COUNT
        owner = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), parts)
        self.tiles = torch.stack([owner, torch.arange(len(owner), device="cpu") - (parts.cumsum(0) - parts)[owner]], 1).int().to(self.device)
        self.sizes = sizes.to(self.device)
        self.spare: Tensor | None = self._table()  # for the next capture

    def __call__(self, gradients: list[Tensor], rates: Tensor, factor: Tensor | None, *, betas: tuple[float, float], epsilon: float) -> None:
        """One step, in place. gradients: alike, of any strides. rates [3], factor []: float32, on the device."""
        if len(gradients) != len(self.tensors[0]):
            raise ValueError(f"adamw_of_many: expected {len(self.tensors[0])} gradients, got {len(gradients)}")
        gradients = [gradient.contiguous() for gradient in gradients]
        for i, gradient in enumerate(gradients):
            self._check(f"gradient {i}", gradient, i)
        expect("adamw_of_many", "rates", rates, (3,), (torch.float32,), self.device)
        if factor is not None:
            expect("adamw_of_many", "factor", factor, (), (torch.float32,), self.device)
        values, first, second = self.tensors
        addresses = [[t.data_ptr() for t in four] for four in zip(values, gradients, first, second)]
        if len(self.tiles):
            with on(self.tiles):
                many_kernel[(len(self.tiles),)](self.tiles, self.sizes, self._places(addresses), rates, factor, betas[1], 1 - betas[0], 1 - betas[1], epsilon,
                                                ALIGNED=all(a % 16 == 0 for four in addresses for a in four), COUNT=COUNT, num_warps=4, enable_fp_fusion=True)

    def captured(self) -> list[Tensor]:
        """To be called once a capture is over, before its first replay: fills the tables of its launches, and hands them over, for whoever keeps the graph to keep."""
        tables = [table if addresses is None else table.copy_(torch.tensor(addresses, device="cpu")) for table, addresses in self.waiting]
        self.waiting, self.spare = [], self._table() if self.spare is None else self.spare
        return tables

    def _table(self) -> Tensor:
        return torch.empty(len(self.sizes), 4, dtype=torch.int64, device=self.device)

    def _places(self, addresses: list[list[int]]) -> Tensor:
        """The table on the device; while a graph is captured, one that is in `waiting` as well."""
        new = addresses != self.known[0]
        if capturing(self.device):
            if new and self.spare is None:
                raise RuntimeError("adamw_of_many: expected one step a capture, and `captured` behind it")
            table = self.spare if new else self.known[1]
            self.spare = None if new else self.spare
            self.waiting.append((table, addresses if new else None))
            return table
        if new:
            host = torch.tensor(addresses, device="cpu")
            self.known = addresses, host.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else host
        return self.known[1]

    def _check(self, name: str, tensor: Tensor, i: int) -> None:
        expect("adamw_of_many", name, tensor, tuple(self.tensors[0][i].shape), (torch.float32,), self.device)
        if not tensor.is_contiguous():
            raise ValueError(f"adamw_of_many, {name}: expected a contiguous tensor, got strides {list(tensor.stride())}")
