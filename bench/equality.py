"""Equality before time: `check` in float32, `check_rounded` in bf16, on any device.

What it adds over lineup.py: the comparison of what they compute. It leaves out the clock (measure.py).
"""

import dataclasses
import gc
import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .case import Case, Provider, Setting
from .lineup import Unequal, forget_compiled, let_go, may_fail
from .poison import poisoned
from .roofline import OURS


@dataclasses.dataclass(frozen=True)
class Difference:
    """max|difference| of one tensor, or what `kind` says, and what is allowed; `apart` is infinite where shapes differ or a tensor is missing."""

    tensor: str
    apart: float
    allowed: float
    kind: str = "max|difference|"

    @property
    def red(self) -> bool:
        return not self.apart <= self.allowed  # nan is red


RMS = "root mean square of differences"


def differences(expected: dict[str, Tensor], got: dict[str, Tensor], bound: Callable[[str, Tensor], float]) -> list[Difference]:
    """One Difference for every name on either side."""
    found = []
    for name in dict.fromkeys([*expected, *got]):
        if name not in expected or name not in got or expected[name].shape != got[name].shape:
            found.append(Difference(name, math.inf, 0.0))
            continue
        apart = (got[name].double().cpu() - expected[name].double().cpu()).abs().max()
        found.append(Difference(name, float(apart), bound(name, expected[name])))
    return found


def in_this_process(name: str, provider: Provider, setting: Setting) -> dict[str, Tensor]:
    work = provider.build(setting)  # it lives while it computes
    return work.results()


def check(case: Case, setting: Setting, providers: dict[str, Provider], say: Callable[[str], None] = lambda line: None,
          results: Callable[[str, Provider, Setting], dict[str, Tensor]] = in_this_process) -> dict[str, float]:
    """Every provider against the first, in float32 without dropout; {provider: its largest difference as a share of the allowed one}.

    results: how a provider's are had. Raises Unequal when one is red. What others compile and is red, with an infinite share, or does not even run, is left out of `providers`, and
    said: that is no fault of ours.
    """
    setting = dataclasses.replace(setting, precision="float32")
    expected, baseline, shares = None, None, {}
    forget_compiled(providers)
    for name, provider in list(providers.items()):
        if not provider.compared or not provider.takes(setting.precision):
            continue
        with may_fail(case, name, providers, say):
            got = unwritten_seen(name, provider, setting) if case.rounded and provider.kernels and results is in_this_process else results(name, provider, setting)
            if expected is None:
                expected, baseline = got, name
                continue
            found = differences(expected, got, case.bound)
            red = [d for d in found if d.red]
            if red and (not provider.compiled or name.startswith(OURS)):
                raise _unequal(case, setting, f"{name} differs from {baseline}", found)
            if red:
                say(str(_unequal(case, setting, f"{name} differs from {baseline}", found)))
                del providers[name]
            del got
            gc.collect()  # models hold cycles; a large one is not kept beside the next
            shares[name] = math.inf if red else max((d.apart / d.allowed if d.allowed else 0.0 for d in found), default=0.0)
        if name not in providers:
            let_go()
    return shares


def check_rounded(case: Case, setting: Setting, providers: dict[str, Provider]) -> dict[str, float]:
    """Every provider with kernels of ours in bf16 against the first provider in float64: each tensor's max|error| is at most twice that of the first provider in
    bf16, or twice the rounding of the result's largest element; and so is the root mean square of the errors, which small elements weigh in too.
    {provider: its largest error as a share of that}. Raises Unequal."""
    setting = dataclasses.replace(setting, precision="bf16")
    first, shares = next(name for name, p in providers.items() if p.compared and not p.compiled), {}
    truth = providers[first].build(dataclasses.replace(setting, precision="float64")).results()
    plain = providers[first].build(setting).results()
    allowed = {name: 2 * max(float((plain[name].double() - t.double()).abs().max()), _rounding(plain[name].dtype) * float(t.abs().max())) for name, t in truth.items()}
    for name, provider in providers.items():
        if provider.kernels and provider.compared and provider.takes("bf16"):
            got = unwritten_seen(name, provider, setting)
            found = [dataclasses.replace(d, allowed=allowed.get(d.tensor, 0.0)) for d in differences(truth, got, lambda *_: 0.0)]
            found += [Difference(tensor, spread(got[tensor], t), 2 * max(spread(plain[tensor], t), _rounding(plain[tensor].dtype) * spread(t, 0 * t)), RMS)
                      for tensor, t in truth.items() if tensor in got and got[tensor].shape == t.shape]
            if any(d.red for d in found):
                raise _unequal(case, setting, f"{name} in bf16 errs more than twice what {first} does", found)
            shares[name] = max(d.apart / d.allowed if d.allowed else 0.0 for d in found)
    return shares


def spread(got: Tensor, truth: Tensor) -> float:
    """Root mean square of the errors; 0 where there is no element."""
    return float((got.double().cpu() - truth.double().cpu()).square().mean().sqrt()) if truth.numel() else 0.0


def unwritten_seen(name: str, provider: Provider, setting: Setting) -> dict[str, Tensor]:
    """in_this_process, where what a kernel of ours left unwritten is NaN and no earlier run's result."""
    with warnings.catch_warnings(), poisoned():
        warnings.filterwarnings("ignore", ".*[Dd]eterministic")  # of libraries' products and sums, which are what they are
        return in_this_process(name, provider, setting)


def _rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _unequal(case: Case, setting: Setting, words: str, found: list[Difference]) -> Unequal:
    red, tensors = [d for d in found if d.red], {d.tensor for d in found}
    lines = [f"{case.name}, {setting.size_name}, {case.x_name} {setting.x:g}: {words} in {len({d.tensor for d in red})} of {len(tensors)} tensors; not timed"]
    return Unequal("\n".join(lines + [f"  {d.tensor}: {d.kind} {d.apart:.3g}, allowed {d.allowed:.3g}" for d in red]))
