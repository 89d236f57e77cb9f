"""Equality first, then time: `check` and `time_case`, on any device.

What it adds over cases.py: the comparison, the clock and the memory gauge. It leaves out which cases there are and where rows go.
"""

import contextlib
import ctypes
import dataclasses
import gc
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from torch import Tensor

from peftdebias import kernels

from . import rows
from .case import Case, Provider, Setting, Work

SAMPLE_SECONDS = 0.02  # a timed sample lasts at least this long: quick calls are repeated inside it
WARM_UP = 1
LOAD_AT_START = round(os.getloadavg()[0], 2)  # later the load average holds this run's own threads too


class Unequal(Exception):
    """Providers disagree; the message names every tensor that does and by how much."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """max|difference| of one tensor and what is allowed; `apart` is infinite where shapes differ or a tensor is missing."""

    tensor: str
    apart: float
    allowed: float

    @property
    def red(self) -> bool:
        return not self.apart <= self.allowed  # nan is red


# ---------------------------------------------------------------- who takes part

def taking_part(case: Case, compiled: bool, say: Callable[[str], None], device: str = "cpu", stand_in: bool = False) -> dict[str, Provider]:
    """The providers of this run; says which are left out for want of a library, or because a kernel does not run on the device. stand_in: those stay."""
    found = {}
    for name, provider in case.providers.items():
        missing = [library for library in provider.needs if importlib.util.find_spec(library) is None]
        trouble = [why for op in provider.kernels if (why := kernels.missing(op, "triton", device))]
        lacking = [why for op in provider.native if (why := kernels.missing(op, "native") or (device != "cpu" and f"csrc does not run on {device}"))]
        if lacking:
            say(f"{case.name}: {name} is not measured: {lacking[0]}")
            continue
        if missing:
            say(f"{case.name}: {name} is not measured: {' and '.join(missing)} not installed (pip install -e '.[bench]')")
            continue
        if trouble:
            say(f"{case.name}: {f'plain twins stand in for {name}' if stand_in else f'{name} is not measured'}: {trouble[0]}")
        if (stand_in or not trouble) and (compiled or not provider.compiled):
            found[name] = provider
    return found


# ---------------------------------------------------------------- equality

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

    results: how a provider's are had. Raises Unequal when one is red. A compiled provider that does not even run is left out of `providers`, and said.
    """
    setting = dataclasses.replace(setting, precision="float32")
    expected, baseline, shares = None, None, {}
    for name, provider in list(providers.items()):
        if not provider.compared:
            continue
        with _compiler_may_fail(case, name, providers, say):
            got = results(name, provider, setting)
            if expected is None:
                expected, baseline = got, name
                continue
            found = differences(expected, got, case.bound)
            red = [d for d in found if d.red]
            if red:
                raise _unequal(case, setting, f"{name} differs from {baseline}", found)
            del got
            gc.collect()  # models hold cycles; a large one is not kept beside the next
            shares[name] = max((d.apart / d.allowed if d.allowed else 0.0 for d in found), default=0.0)
    return shares


def check_rounded(case: Case, setting: Setting, providers: dict[str, Provider]) -> dict[str, float]:
    """Every provider with kernels of ours in bf16 against the first provider in float64: each tensor's max|error| is at most twice that of the first provider in
    bf16, or twice the rounding of the result. {provider: its largest error as a share of that}. Raises Unequal."""
    setting = dataclasses.replace(setting, precision="bf16")
    first, shares = next(name for name, p in providers.items() if p.compared and not p.compiled), {}
    truth = providers[first].build(dataclasses.replace(setting, precision="float64")).results()
    plain = providers[first].build(setting).results()
    allowed = {name: 2 * max(float((plain[name].double() - t.double()).abs().max()), _rounding(plain[name].dtype) * float(t.abs().max())) for name, t in truth.items()}
    for name, provider in providers.items():
        if provider.kernels and provider.compared:
            found = [dataclasses.replace(d, allowed=allowed.get(d.tensor, 0.0)) for d in differences(truth, provider.build(setting).results(), lambda *_: 0.0)]
            if any(d.red for d in found):
                raise _unequal(case, setting, f"{name} in bf16 errs more than twice what {first} does", found)
            shares[name] = max(d.apart / d.allowed if d.allowed else 0.0 for d in found)
    return shares


def _rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _unequal(case: Case, setting: Setting, words: str, found: list[Difference]) -> Unequal:
    red = [d for d in found if d.red]
    lines = [f"{case.name}, {setting.size_name}, {case.x_name} {setting.x:g}: {words} in {len(red)} of {len(found)} tensors; not timed"]
    return Unequal("\n".join(lines + [f"  {d.tensor}: max|difference| {d.apart:.3g}, allowed {d.allowed:.3g}" for d in red]))


@contextlib.contextmanager
def _compiler_may_fail(case: Case, name: str, providers: dict[str, Provider], say: Callable[[str], None]):
    """torch.compile needs a compiler and may not know a model: then that provider is not measured, and the others go on."""
    try:
        yield
    except Unequal:
        raise
    except Exception as error:
        if not providers[name].compiled:
            raise
        del providers[name]
        say(f"{case.name}: {name} is not measured: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


# ---------------------------------------------------------------- time

def seconds(work: Work, passes: int, device: torch.device) -> float:
    """Wall-clock seconds of one pass; the device has finished at both ends."""
    _finish(device)
    started = time.perf_counter()
    for _ in range(passes):
        work.run()
    _finish(device)
    return (time.perf_counter() - started) / passes


FLUSH = 2 ** 28  # bytes written before every timed call of one op, more than any L2 cache holds


def cuda_seconds(work: Work, passes: int, device: torch.device) -> float:
    """Seconds of one pass as the device's own clock has them, with a cold L2 cache: what was written last is FLUSH bytes of something else. For single ops."""
    cold = torch.empty(FLUSH, dtype=torch.int8, device=device)
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(passes)]
    with torch.cuda.device(device):
        for start, end in marks:
            cold.zero_()
            start.record()
            work.run()
            end.record()
    _finish(device)
    return sum(start.elapsed_time(end) for start, end in marks) / 1000 / passes


def host_seconds(work: Work, passes: int, device: torch.device) -> float:
    """Seconds the host needs to hand over one pass, whether the device has finished or not."""
    _finish(device)
    started = time.perf_counter()
    for _ in range(min(passes, 20)):
        work.run()
    spent = (time.perf_counter() - started) / min(passes, 20)
    _finish(device)
    return spent


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_case(case: Case, setting: Setting, providers: dict[str, Provider], repeats: int, *, shares: dict[str, float] | None = None,
              memory: Callable[[str], float | None] | None = None, say: Callable[[str], None] = lambda line: None) -> list[rows.Row]:
    """Rows of all providers. They take turns within every repeat, each repeat starting with another, so that noise hits all alike.

    shares: what `check` gave. memory: name of a provider -> its peak in MiB above the loaded weights; None measures it here on a GPU, not on a CPU.
    """
    device, works, passes, peaks = setting.device, {}, {}, {}
    for name, provider in list(providers.items()):
        with _compiler_may_fail(case, name, providers, say):
            work = provider.build(setting)
            for _ in range(WARM_UP):
                once = seconds(work, 1, device)
            works[name], passes[name] = work, max(1, math.ceil(SAMPLE_SECONDS / once)) if once < SAMPLE_SECONDS else 1
    samples: dict[str, list[float]] = {name: [] for name in works}
    load = os.getloadavg()[0]
    for i in range(repeats):
        for name in [*works][i % len(works):] + [*works][:i % len(works)]:
            alone = device.type == "cuda" and works[name].roof  # one op: the device's clock, cold cache
            samples[name].append((cuda_seconds if alone else seconds)(works[name], passes[name], device))
    for name, work in works.items():
        if device.type == "cuda" and work.roof:
            work.extra["host_ms"] = round(1000 * host_seconds(work, passes[name], device), 5)
        peaks[name] = memory(name) if memory else cuda_peak(works[name], device) if device.type == "cuda" else None
    found = []
    for name, work in works.items():
        found += _rows(case, setting, name, work, samples[name], passes[name], peaks[name], load, (shares or {}).get(name))
    return found


def cuda_peak(work: Work, device: torch.device) -> float:
    """MiB that one pass takes at most above what was allocated before it."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work.run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2 ** 20


def _rows(case: Case, setting: Setting, provider: str, work: Work, samples: list[float], passes: int, peak: float | None, load: float,
          share: float | None) -> list[rows.Row]:
    low, middle, high = (float(numpy.quantile(samples, q)) for q in (0.2, 0.5, 0.8))  # seconds a pass
    metrics = {"time": [1000 * s / work.steps for s in (middle, low, high)]}  # y_50, y_20, y_80
    for metric, amount, unit in (("rate", work.tokens, 1), ("arithmetic", work.flops, 1e12), ("bandwidth", work.bytes, 1e9)):
        if amount:
            metrics[metric] = [amount / unit / s for s in (middle, high, low)]
    if peak is not None:
        metrics["peak memory"] = [peak] * 3
    if setting.device.type == "cuda":
        device = "CUDA {}, compute capability {}.{}".format(torch.version.cuda, *torch.cuda.get_device_capability(setting.device))
    else:
        device = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    extra = {"size": setting.size_name if case.sized else "any", "baseline": case.baseline, "precision": setting.precision,
             "repeats": len(samples), "passes_a_sample": passes, "steps_a_pass": work.steps, "load_average": round(load, 2),
             "load_at_start": LOAD_AT_START, "device": device,
             "versions": {name: rows.version(name) for name in ("transformers", "peft")}, **({"roof": work.roof, "limit": work.limit} if work.roof else {}), **work.extra}
    if share is not None:
        extra["largest_difference_as_share_of_allowed"] = round(share, 4)
    common = dict(extra_config=extra, device_name=rows.device_name(setting.device), torch_version=torch.__version__, triton_version=rows.version("triton"),
                  commit=rows.commit(), timestamp=rows.now())
    return [rows.Row(case.name, provider, case.mode, metric, rows.UNITS[metric], case.x_name, setting.x, *ys, **common)
            for metric, ys in metrics.items()]


# ---------------------------------------------------------------- memory on a CPU

def cpu_peak(provider: Provider, setting: Setting) -> float | None:
    """MiB that one pass takes at most above what the process held once the weights were loaded. Linux only (None elsewhere).

    For a fresh process: Linux keeps the largest resident size of a process; it is set back here after loading, when freed memory was given back.
    """
    status = Path("/proc/self/status")
    work = provider.build(setting)
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None

    def mib(field: str) -> float:
        return int(re.search(rf"^{field}:\s*(\d+) kB", status.read_text(), re.M)[1]) / 1024

    before = mib("VmRSS")
    work.run()
    return mib("VmHWM") - before
