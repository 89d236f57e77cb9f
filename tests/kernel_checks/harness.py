"""What a kernel is held against: its plain twin in float64, with the error that the twin itself makes in the kernel's dtype as the measure.

    compare(fused, twin, {"x": x, "a": a}, dtype=torch.bfloat16, gradients=("x", "a"))

Both the root mean square of a tensor's errors and the largest of them are at most twice plain torch's own. Nothing is added: where plain torch errs by nothing, the
kernel must. A single draw of few elements cannot carry that bound, as rounding errors are as good as random and either side may be lucky: the square of the
ratio of two root mean squares over n independent errors each is distributed as F(n, n), so of two equally good programs the one errs more than twice as much
as the other in one trial of 30 at n = 8, in one of 14 000 at n = 32. The largest error, which shows a single wrong element among thousands where a mean would
hide it, is one number whatever n is: over 2590 values it differed by a factor of 2.2 between two programs whose root mean squares differed by 8 %. So a
tensor's errors are gathered over as many draws as make VALUES of them, and where one of the two is beyond its bound then, over MORE times as many, up to DRAWS:
all the errors of all the draws are judged together, two or three times in all, so that what errs more than twice as much still does. (Where a division by almost
nothing makes errors of all sizes, a norm over two columns, 32 values said 3.8 for a program that over 640 errs 0.6 times as much.)

The files check_*.py here run in a process of their own under TRITON_INTERPRET=1, started by tests/test_kernels.py; on a GPU machine without that variable
the same files run on the device.
"""

import contextlib
import math
import sys
import unittest.mock
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import poison  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VALUES = 32  # errors that a bound is held on, at the least
MORE, DRAWS = 8, 64  # of the inputs, where a judgement is not enough
STEPS = 16  # draws of a whole step; a tensor's ratio is spread by a factor of up to 3 (one standard deviation), the mean of 16 by 1.32
WRONG = 1000.0  # times plain torch's root mean square error in one draw: an element further off is wrong, not unlucky
GUARD = 64  # elements of NaN on either side of an input; keeps it aligned


def product_in_order(left: numpy.ndarray, right: numpy.ndarray) -> numpy.ndarray:
    """left [..., m, k] @ right [..., k, n], float32, as a GPU's plain units make it: one fused multiply-add after the other along k."""
    wide, other = left.astype(numpy.float64), right.astype(numpy.float64)  # in float64 the product of two float32 is exact
    total = numpy.zeros((*left.shape[:-1], right.shape[-1]), left.dtype)
    for k in range(left.shape[-1]):
        total = (total + wide[..., k, None] * other[..., k, None, :]).astype(left.dtype)
    return total


class Watcher(TorchDispatchMode):
    """Sees every op that torch runs, and changes nothing."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class ProductsInOrder(TorchDispatchMode):
    """Inside the `with` block torch's float32 products on a CPU are product_in_order. By itself a CPU sums small products in lanes, of which each errs less: the
    measure of a kernel whose products are made as a GPU makes them is plain torch whose products are made so too."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default) and args[0].dtype == torch.float32 and args[0].device.type == "cpu":
            return torch.from_numpy(product_in_order(*(x.detach().numpy() for x in args)))
        return function(*args, **(kwargs or {}))


class Guarded:
    """A contiguous copy of a tensor between two stretches of NaN: a read beyond its ends spoils the result, a write beyond them is found by `check`. around: another number,
    where what is read beyond would be written there again."""

    def __init__(self, tensor: Tensor, around: float = math.nan):
        around = around if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max if tensor.dtype != torch.bool else True
        self.buffer = torch.full((tensor.numel() + 2 * GUARD,), around, dtype=tensor.dtype, device=tensor.device)
        self.inside = slice(GUARD, GUARD + tensor.numel())
        self.view = self.buffer[self.inside].view(tensor.shape).copy_(tensor)
        self.before = self.buffer.clone()

    def check(self, name: str, unchanged: bool = True) -> None:
        """No write beyond the ends; with `unchanged` none inside either."""
        now, before = self.buffer.clone(), self.before.clone()
        if not unchanged:
            now[self.inside] = before[self.inside] = 0
        assert torch.equal(now.nan_to_num(7e4), before.nan_to_num(7e4)), f"{name}: expected an input to stay as it is{'' if unchanged else ' beyond its ends'}"


class Fenced:
    """Inside the `with` block what Python code makes without values lies between two stretches of a number that nobody may overwrite; `check` looks at them. Of floats it is a
    NaN of its own bits: what is read there spoils the result, and a NaN that a kernel makes is another. The functions are replaced: a mode of torch's is off inside
    backward() and torch.autograd.grad."""

    MAKES = ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty"))
    NUMBER = 77
    BITS = {torch.float16: (torch.int16, 0x7E4D), torch.bfloat16: (torch.int16, 0x7FCD), torch.float32: (torch.int32, 0x7FC0004D), torch.float64: (torch.int64, 0x7FF800000000004D)}

    def __init__(self):
        self.made: list[tuple[Tensor, slice, int]] = []  # bits, where in them the tensor lies, those of the fence

    def __enter__(self) -> "Fenced":
        self._replaced = contextlib.ExitStack()
        for owner, name in self.MAKES:
            self._replaced.enter_context(unittest.mock.patch.object(owner, name, self._fenced(getattr(owner, name))))
        return self

    def __exit__(self, *error) -> None:
        self._replaced.close()

    def _fenced(self, make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args, **kwargs):
            found = make(*args, **kwargs)
            if type(found) is not Tensor or not found.is_contiguous() or found.dtype == torch.bool:
                return found
            inside = slice(GUARD, GUARD + found.numel())
            bits, number = self.BITS.get(found.dtype, (found.dtype, self.NUMBER))
            buffer = torch.full((found.numel() + 2 * GUARD,), number, dtype=bits, device=found.device)
            self.made.append((buffer, inside, number))
            return buffer.view(found.dtype)[inside].view(found.shape).copy_(found)

        return made

    def check(self) -> None:
        for buffer, inside, number in self.made:
            beyond = torch.cat((buffer[:inside.start], buffer[inside.stop:]))
            assert (beyond == number).all(), f"expected no write beyond an output or scratch tensor of {inside.stop - inside.start} elements"


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """bench.poison.poisoned, and a fence around every tensor that is made so."""
    with poison.poisoned(), Fenced() as fence:
        yield
    fence.check()


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """float64 normal values on the device; the same for the same seed and shape."""
    return (torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE)


def strided(tensor: Tensor) -> Tensor:
    """The same values, not contiguous: every second element of the last axis of a larger tensor, the others NaN."""
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), math.nan if tensor.is_floating_point() else 0, dtype=tensor.dtype, device=tensor.device)
    wide[..., ::2] = tensor
    return wide[..., ::2]


def run(function: Callable, inputs: dict[str, Tensor], gradients: Iterable[str], seed: int, layout: Callable[[Tensor], Tensor] = lambda t: t) -> dict[str, Tensor]:
    """Outputs of `function(**inputs)` and the gradients of the named inputs, for an output gradient drawn from the seed, by name, in float64."""
    guards = {name: Guarded(tensor.detach()) for name, tensor in inputs.items()}
    given = {name: layout(guard.view) if inputs[name].is_floating_point() else guard.view for name, guard in guards.items()}
    wanted = list(gradients)
    for name in wanted:
        given[name] = given[name].detach().requires_grad_()
    found = function(**given)
    found = {"output": found} if isinstance(found, Tensor) else dict(found)
    result = {name: tensor.detach().double() for name, tensor in found.items()}
    if wanted:
        pulls = [layout(drawn(*t.shape, seed=seed + 100 + i).to(t.dtype)) for i, t in enumerate(found.values())]
        got = torch.autograd.grad(list(found.values()), [given[name] for name in wanted], pulls)
        result |= {f"gradient of {name}": g.double() for name, g in zip(wanted, got)}
    for name, guard in guards.items():
        guard.check(name)
    return result


def redrawn(inputs: dict[str, Tensor], draw: int) -> dict[str, Tensor]:
    """Another draw like the inputs, which are draw 0: the values of each floating tensor in another order, times a factor from 0.7 to 1.4, one a tensor, so that
    a single value rounds differently too. Whole numbers stay."""
    if not draw:
        return inputs
    generator, found = torch.Generator().manual_seed(draw), {}
    for name, t in inputs.items():
        if t.is_floating_point():
            order = torch.randperm(t.numel(), generator=generator).to(t.device)
            t = t.flatten()[order].view(t.shape) * (0.7 + 0.7 * torch.rand((), dtype=torch.float64, generator=generator).to(t.device))
        found[name] = t
    return found


def compare(fused: Callable, twin: Callable, inputs: dict[str, Tensor], *, dtype: torch.dtype, gradients: Iterable[str] = (), plain: Callable | None = None,
            float32: Iterable[str] = (), seed: int = 0, layout: Callable[[Tensor], Tensor] = lambda t: t, factor: float = 2.0,
            values: int = VALUES, in_order: bool = False) -> dict[str, float]:
    """Hold fused(**inputs) and its gradients against twin(**inputs).

    inputs: float64 tensors by name, rounded to `dtype` (those named in `float32`: to float32; whole numbers stay) before anybody sees them. The truth is the
    twin in float64; the measure is `plain` (default: the twin) in that dtype. in_order: on a CPU the measure's products are summed as a GPU's (ProductsInOrder).
    Over a tensor's elements and all draws of the inputs (`redrawn`) the root mean square of the errors and the largest error are at most `factor` times the
    measure's own. Inputs are drawn until each tensor has been seen with `values` elements, one that has them at once is drawn once; and MORE times as often, up
    to DRAWS, where a tensor is beyond its bound then. Returns {tensor: the larger of these two as a share of what is allowed}.
    """
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    draw, draws, judged = 0, 1, {}
    while draw < draws:
        given = {name: t.to(torch.float32 if name in float32 else dtype) if t.is_floating_point() else t for name, t in redrawn(inputs, draw).items()}
        pull = seed + 1000 * draw
        truth = run(twin, {name: t.double() if t.is_floating_point() else t for name, t in given.items()}, gradients, pull)
        with ProductsInOrder() if in_order else contextlib.nullcontext():
            measure = run(plain or twin, given, gradients, pull)
        with poisoned():
            got = run(fused, given, gradients, pull, layout)
        assert set(got) == set(truth), f"expected {sorted(truth)}, got {sorted(got)}"
        for name, expected in truth.items():
            assert got[name].shape == expected.shape, f"{name}: expected shape {list(expected.shape)}, got {list(got[name].shape)}"
            if expected.numel():
                found.setdefault(name, []).append(tuple((side[name] - expected).flatten() for side in (got, measure)))
        sizes = [t.numel() for t in truth.values() if t.numel()]
        draw, draws = draw + 1, max(draws, -(-values // min(sizes)) if sizes else 1)
        if draw == draws:
            judged = {name: _judged(*map(torch.cat, zip(*errors)), factor) for name, errors in found.items()}
            draws = max(draws, min(MORE * draws, DRAWS)) if any(share > 1 for share, _ in judged.values()) else draws
    wrong = [f"{name}, {str(dtype).removeprefix('torch.')}: {words}, {draw} draws" for name, (share, words) in judged.items() if not share <= 1]
    assert not wrong, "; ".join(wrong)
    return {name: share for name, (share, _) in judged.items()}


def compare_steps(fused: Callable[[int], dict[str, Tensor]], plain: Callable[[int], dict[str, Tensor]], truth: Callable[[int], dict[str, Tensor]], *,
                  factor: float = 2.0, steps: int = STEPS) -> dict[str, float]:
    """Hold whole steps of a model, fused(draw) -> {name of an output or gradient: tensor}, against truth(draw), the same numbers by the twins in float64.

    The measure is plain(draw), the twins in fused's dtype. The ratio of the two root mean square errors, as a geometric mean over the draws, is at most `factor` for each
    tensor, and so is the largest errors'; no element of any draw is wrong (WRONG). `steps` draws, and 4 * `steps` where a tensor is beyond its bound then.
    Returns {tensor: the larger of the two ratios}.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    draw, draws, ratios = 0, steps, {}
    while draw < draws:
        expected, measure, got = truth(draw), plain(draw), fused(draw)
        assert set(got) == set(expected), f"expected {sorted(expected)}, got {sorted(got)}"
        for name, t in expected.items():
            assert got[name].shape == t.shape, f"{name}: expected shape {list(t.shape)}, got {list(got[name].shape)}"
            errors, theirs = (side[name].detach().double() - t for side in (got, measure))
            (error, most), (own, own_most) = ((float(e.square().mean().sqrt()), float(e.abs().max())) for e in (errors, theirs))
            assert most <= WRONG * own, f"{name}, draw {draw}: max|error| {most:.3g}, allowed {WRONG * own:.3g} (plain torch's own root mean square {own:.3g})"
            found.setdefault(name, []).append((math.log(error / own), math.log(most / own_most)) if error else (0.0, 0.0))
        draw += 1
        if draw == draws:
            ratios = {name: math.exp(max(sum(logs) / draw for logs in zip(*both))) for name, both in found.items()}
            draws = 4 * steps if max(ratios.values()) > factor else draws
    for name, ratio in ratios.items():
        assert ratio <= factor, f"{name}: errors {ratio:.3g} times plain torch's own over {draw} draws, allowed {factor:.3g} times"
    return ratios


def _judged(errors: Tensor, theirs: Tensor, factor: float) -> tuple[float, str]:
    """(how much of what is allowed `errors` [n] take, with `theirs` [n] as the measure; the figures in words)."""
    found = []
    for kind, of in (("root mean square error", lambda t: t.square().mean().sqrt()), ("max|error|", lambda t: t.abs().max())):
        error, own = float(of(errors)), float(of(theirs))
        share = error / (factor * own) if own else math.inf if error else 0.0
        found.append((share, f"{kind} {error:.3g} over {errors.numel()} values, allowed {factor * own:.3g} (plain torch's own {own:.3g})"))
    return max(found, key=lambda one: math.inf if math.isnan(one[0]) else one[0])
