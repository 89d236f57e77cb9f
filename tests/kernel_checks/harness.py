"""What a kernel is held against: its plain twin in float64, with the error that the twin itself makes in the kernel's dtype as the measure.

    compare(fused, twin, {"x": x, "a": a}, dtype=torch.bfloat16, gradients=("x", "a"))

The files check_*.py here run in a process of their own under TRITON_INTERPRET=1, started by tests/test_kernels.py; on a GPU machine without that variable
the same files run on the device.
"""

import contextlib
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GUARD = 64  # elements of NaN on either side of an input; keeps it aligned


@contextlib.contextmanager
def poisoned():
    """Inside the `with` block every tensor that torch makes without values holds NaN (whole numbers: the largest), so an element nobody wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]


class Guarded:
    """A contiguous copy of a tensor between two stretches of NaN: a read beyond its ends spoils the result, a write beyond them is found by `check`."""

    def __init__(self, tensor: Tensor):
        around = math.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max if tensor.dtype != torch.bool else True
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


def compare(fused: Callable, twin: Callable, inputs: dict[str, Tensor], *, dtype: torch.dtype, gradients: Iterable[str] = (), plain: Callable | None = None,
            float32: Iterable[str] = (), seed: int = 0, layout: Callable[[Tensor], Tensor] = lambda t: t, factor: float = 2.0) -> dict[str, float]:
    """Hold fused(**inputs) and its gradients against twin(**inputs).

    inputs: float64 tensors by name, rounded to `dtype` (those named in `float32`: to float32; whole numbers stay) before anybody sees them. The truth is
    the twin in float64; the measure is `plain` (default: the twin) in that dtype. Each tensor's max|error| is at most `factor` times the measure's own, and
    where that is smaller than the rounding of the result to its dtype, twice that rounding (float32, whose sums are rounded too: two roundings; on a few elements
    the measure may be lucky). Returns {tensor: error as a share of what is allowed}.
    """
    rounded = {name: t.to(torch.float32 if name in float32 else dtype) if t.is_floating_point() else t for name, t in inputs.items()}
    truth = run(twin, {name: t.double() if t.is_floating_point() else t for name, t in rounded.items()}, gradients, seed)
    measure = run(plain or twin, rounded, gradients, seed)
    with poisoned():
        got = run(fused, rounded, gradients, seed, layout)
    assert set(got) == set(truth), f"expected {sorted(truth)}, got {sorted(got)}"
    shares = {}
    for name, expected in truth.items():
        assert got[name].shape == expected.shape, f"{name}: expected shape {list(expected.shape)}, got {list(got[name].shape)}"
        if not expected.numel():
            continue
        own = torch.float32 if name.removeprefix("gradient of ") in float32 else dtype
        rounding = torch.finfo(own).eps * (1 if own == torch.float32 else 0.5) * float(expected.abs().max())
        error, theirs = (float((x[name] - expected).abs().max()) for x in (got, measure))
        allowed = factor * max(theirs, rounding)
        assert error <= allowed, f"{name}, {str(dtype).removeprefix('torch.')}: max|error| {error:.3g}, allowed {allowed:.3g} (plain torch's own {theirs:.3g})"
        shares[name] = error / allowed if allowed else 0.0
    return shares
