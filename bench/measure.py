"""Time and memory of the providers of a case: `time_case`, on any device.

What it adds over lineup.py: the clock and the memory gauge. It leaves out the check that comes before (equality.py), which cases there are and where rows go.
"""

import contextlib
import ctypes
import functools
import gc
import math
import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy
import torch

from peftdebias import graphs

from . import rows
from .case import Case, Provider, Setting, Work
from .lineup import forget_compiled, let_go, may_fail, memory_may_end

SAMPLE_SECONDS = 0.02  # a timed sample lasts at least this long: quick calls are repeated inside it
WARM_UP = 2  # passes of one op: the first loads or compiles something, the second tells how many a sample takes
WARM_UP_STEPS = 3  # passes of whole steps on a GPU: a shape trains eagerly in the first, is captured in the second (peftdebias/graphs.py), and replayed from the third on
LOAD_AT_START = round(os.getloadavg()[0], 2)  # later the load average holds this run's own threads too

NO_GRAPH = "no CUDA graph"
"""In a line that tells why a time is that of an eager launch."""


def seconds(work: Work, passes: int, device: torch.device) -> float:
    """Wall-clock seconds of one pass; the device has finished at both ends."""
    _finish(device)
    started = time.perf_counter()
    for _ in range(passes):
        work.run()
    _finish(device)
    return (time.perf_counter() - started) / passes


def warmed_up(case: Case, work: Work, device: torch.device) -> float:
    """Runs the first passes, which compile, capture or load something; seconds of the last of them."""
    for _ in range(WARM_UP if case.mode != "step" else WARM_UP_STEPS if device.type == "cuda" else 1):
        once = seconds(work, 1, device)
    return once


FLUSH, FLUSHES = 2 ** 30, 3
"""Bytes written before every timed pass of one op, and how often: more than any L2 cache holds, and for longer than the host needs to hand over what comes behind."""


def cuda_seconds(launch: Callable[[], object], passes: int, device: torch.device) -> tuple[float, int]:
    """(seconds of one launch by the device's own clock, launches for which the device had to wait). The L2 cache is cold: what was written last is FLUSH bytes of
    something else. While the device writes these, the host hands over start event, launch and end event; where it was too slow for that, the launch does not count,
    unless it was too slow for all."""
    cold = torch.empty(FLUSH, dtype=torch.int8, device=device)
    marks, late = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(passes)], []
    with torch.cuda.device(device):
        for start, end in marks:
            # What lies in L2 then is not in memory yet, and the launch waits for that; in turn its own last lines are written behind its end. After a flush that only reads,
            # up to an L2 of its writes would cost nothing: this one flatters nobody.
            for _ in range(FLUSHES):
                cold.zero_()
            start.record()
            launch()
            end.record()
            late.append(start.query())  # true: the device has passed the start before it had the end
    _finish(device)
    spent = [start.elapsed_time(end) / 1000 for start, end in marks]
    counted = [one for one, behind in zip(spent, late) if not behind] or spent
    return sum(counted) / len(counted), sum(late)


def graphed(run: Callable[[], object], device: torch.device) -> torch.cuda.CUDAGraph:
    """`run` captured once, https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs. Raises where it cannot be, and leaves torch as it was.

    Its results are dropped: their memory is the graph's own, and a replay writes there again.
    """
    with torch.cuda.device(device):
        before, side, graph = torch.cuda.current_stream(), _side_stream(device), torch.cuda.CUDAGraph()
        try:
            side.wait_stream(before)
            with torch.cuda.stream(side):
                for _ in range(3):
                    run()
        finally:
            before.wait_stream(side)
        torch.cuda.synchronize()
        with graphs.recorded(graph, device):
            run()
        graph.replay()
        torch.cuda.synchronize()
    return graph


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: every stream has workspaces of its own in the matrix products' library."""
    return torch.cuda.Stream(device)


def launched(case: Case, name: str, work: Work, device: torch.device, say: Callable[[str], None]) -> Callable[[], object]:
    """What a timed pass of one op launches on a GPU: its CUDA graph, or the pass itself where it has none. Notes in the work's `extra` which of the two (`timed`)."""
    try:
        graph = graphed(work.capture or work.run, device)
    except Exception as error:
        why = error.__context__ or error  # what broke the capture off, not that it could not be ended then
        say(f"{case.name}: {name}: {NO_GRAPH}, so its time is that of an eager launch, the host's work among it: {type(why).__name__}: {(str(why).splitlines() or [''])[0]}")
        work.extra["timed"] = "eager"
        return work.run
    work.extra["timed"] = "graph"
    if draws(graph, device):
        work.extra["seeding_ms"] = seeding_ms(device)
    return graph.replay


def draws(graph: torch.cuda.CUDAGraph, device: torch.device) -> bool:
    """Whether a replay draws from torch's generator. It then launches two kernels more, in front of the graph, that write where the generator stands; an eager launch has
    none, nor has what draws from a seed of its own."""
    before = torch.cuda.get_rng_state(device)
    graph.replay()
    return not torch.equal(before, torch.cuda.get_rng_state(device))


@functools.cache
def seeding_ms(device: torch.device) -> float:
    """Milliseconds that cuda_seconds shows more for the graph of one kernel that draws than for one that does not: what `draws` says of it, which no time shall hold."""
    one = torch.zeros(1, device=device)
    drawing = graphed(lambda: one.uniform_(), device)
    spent = 1000 * min(cuda_seconds(drawing.replay, 10, device)[0] for _ in range(3))
    return round(max(0.0, spent - (clock_ms(device) or spent)), 5)


@functools.cache
def clock_ms(device: torch.device) -> float | None:
    """Milliseconds that cuda_seconds shows for the graph of one kernel that does next to nothing: the part of every time that is the clock's own. None without graphs."""
    with contextlib.suppress(Exception):
        one = torch.zeros(1, device=device)
        graph = graphed(lambda: one.add_(1), device)
        return round(1000 * min(cuda_seconds(graph.replay, 10, device)[0] for _ in range(3)), 5)
    return None


def host_seconds(work: Work, passes: int, device: torch.device) -> float:
    """Seconds the host needs to hand over one pass, whether the device has finished or not."""
    _finish(device)
    started = time.perf_counter()
    for _ in range(min(passes, 20)):
        work.run()
    spent = (time.perf_counter() - started) / min(passes, 20)
    _finish(device)
    return spent


def busy_ms(case: Case, setting: Setting, provider: Provider) -> float | None:
    """Milliseconds for which the device works on a step of that provider, built anew, by torch's profiler, what runs beside each other counted twice; None where it sees
    nothing. What is missing to the time of a step is the host's: how long the host needs by itself cannot be told where it waits for the device in between, as transformers does
    to look at a mask. For when nothing is timed in this process any more: the profiler's library stays attached, and what runs behind it is slower, by 10 to 20 % (pytorch#144455)."""
    forget_compiled({case.name: provider})
    work = provider.build(setting)
    warmed_up(case, work, setting.device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        work.run()
        _finish(setting.device)
    return sum(event.self_device_time_total for event in seen.key_averages()) / 1e3 / work.steps or None


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turn(names: Iterable, repeat: int) -> list:
    """The names in the order of a repeat, each of which begins with another one, so that noise hits all alike."""
    names = list(names)
    first = repeat % max(1, len(names))
    return names[first:] + names[:first]


def time_case(case: Case, setting: Setting, providers: dict[str, Provider], repeats: int, *, shares: dict[str, float] | None = None,
              memory: Callable[[str], float | None] | None = None, say: Callable[[str], None] = lambda line: None,
              failed: Callable[[str], None] | None = None) -> list[rows.Row]:
    """Rows of all providers. They take turns within every repeat (in_turn).

    failed: hears of a provider, other than a compiled one, that raises, in its first passes or later, and has no rows; the others have theirs. Without it that is raised.

    A single op on a GPU (it has a roof) has two times: that of its CUDA graph by the device's clock, cold cache, and the wall-clock of an eager launch. Anything else
    has wall-clock time alone.

    shares: what `check` gave. memory: name of a provider -> its peak in MiB above the loaded weights; None measures it here on a GPU, not on a CPU. There the peak of a
    single op is what one eager pass takes at most above what was allocated before. That of a whole step is what was allocated at most in the first passes, with all that
    these make once (a library's workspaces; what torch.compile needs while it works is not among it), above what was allocated when the provider was built; optimizer state counts
    wherever it is made (Work.state). Between replays a CUDA graph's memory is not allocated by torch's count, and nobody else's either: of a step there is also what
    torch took from the device at most (reserved memory), counted from the same point.
    """
    device, works, passes, peaks, reserved, launches = setting.device, {}, {}, {}, {}, {}
    cuda = device.type == "cuda"
    forget_compiled(providers)
    for name, provider in list(providers.items()):
        if not provider.takes(setting.precision):
            say(f"{case.name}: {name} is not measured: it takes {' and '.join(provider.precisions)}, not {setting.precision}")
            continue
        with may_fail(case, name, providers, say, failed), memory_may_end(case, name, device, say):
            works[name], passes[name], peak, launch = _made(case, setting, name, provider, say)
            if peak is not None:
                peaks[name], reserved[name] = peak
            if launch is not None:
                launches[name] = launch
        if name not in works:
            let_go()
    if not works:
        return []
    samples: dict[str, list[float]] = {name: [] for name in works}
    eager: dict[str, list[float]] = {name: [] for name in launches}
    late = dict.fromkeys(launches, 0)
    load = os.getloadavg()[0]

    def unless_it_fails(name: str, measured: Callable[[str], object]) -> None:
        """Where it does, that provider takes no part from then on."""
        with may_fail(case, name, providers, say, failed), memory_may_end(case, name, device, say):
            measured(name)
            return
        works.pop(name), launches.pop(name, None)
        let_go()

    def sampled(name: str) -> None:
        if name in launches:
            spent, behind = cuda_seconds(launches[name], passes[name], device)
            samples[name].append(spent - works[name].extra.get("seeding_ms", 0.0) / 1000)
            late[name] += behind
        (eager if name in launches else samples)[name].append(seconds(works[name], passes[name], device))

    def behind_the_samples(name: str) -> None:
        if name in launches:
            works[name].extra |= {"host_ms": round(1000 * host_seconds(works[name], passes[name], device), 5), "clock_ms": clock_ms(device), "late_launches": late[name]}
        if memory or name not in peaks:
            peaks[name] = memory(name) if memory else cuda_peak(works[name], device) if cuda else None

    for name in list(works) if cuda else ():  # not timed: building those behind it gave back to the device what it had in store, and it asks for that again
        unless_it_fails(name, lambda name: works[name].run())
    for i in range(repeats):
        for name in in_turn(works, i):
            unless_it_fails(name, sampled)
    for name in list(works):
        unless_it_fails(name, behind_the_samples)
    found = []
    for name, work in works.items():
        found += _rows(case, setting, name, work, samples[name], eager.get(name, []), passes[name], peaks[name], reserved.get(name), load, (shares or {}).get(name))
    return found


def _made(case: Case, setting: Setting, name: str, provider: Provider,
          say: Callable[[str], None]) -> tuple[Work, int, tuple[float, float] | None, Callable[[], object] | None]:
    """(its work, passes a sample, a step's peaks on a GPU in MiB, allocated and reserved, what a pass of an op launches there); a frame of its own, so that nothing stays
    where it fails."""
    device, peak, launch = setting.device, None, None
    cuda, step = device.type == "cuda", case.mode == "step"
    empty = _settled(device) if cuda and step else 0
    work = provider.build(setting)
    built = _settled(device) if cuda and step else 0
    taken = torch.cuda.memory_reserved(device) if cuda and step else 0
    if provider.compiled and cuda and step:
        seconds(work, 1, device)
        _settled(device)  # what torch.compile tries out while it works is no part of a step's memory
    once = warmed_up(case, work, device)
    if cuda and step:  # before the next provider is built
        if work.most:
            work.extra["reserved_by_passes_mib"] = round((torch.cuda.max_memory_reserved(device) - taken + work.state) / 2 ** 20, 2)
            work.most()
            _finish(device)
        peak = ((torch.cuda.max_memory_allocated(device) - built + work.state) / 2 ** 20, (torch.cuda.max_memory_reserved(device) - taken + work.state) / 2 ** 20)
        work.extra["built_mib"] = round((built - empty) / 2 ** 20, 2)
    if cuda and work.roof:
        launch = launched(case, name, work, device, say)
    return work, max(1, math.ceil(SAMPLE_SECONDS / once)) if once < SAMPLE_SECONDS else 1, peak, launch


def _settled(device: torch.device) -> int:
    """Bytes that are allocated once nothing is left to be collected or kept in store; the peaks are counted from here on."""
    gc.collect()  # models hold cycles
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def cuda_peak(work: Work, device: torch.device) -> float:
    """MiB that one pass takes at most above what was allocated before it."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work.run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2 ** 20


def _rows(case: Case, setting: Setting, provider: str, work: Work, samples: list[float], eager: list[float], passes: int, peak: float | None, reserved: float | None, load: float,
          share: float | None) -> list[rows.Row]:
    low, middle, high = (float(numpy.quantile(samples, q)) for q in (0.2, 0.5, 0.8))  # seconds a pass
    metrics = {"time": [1000 * s / work.steps for s in (middle, low, high)]}  # y_50, y_20, y_80
    if eager:
        metrics["eager time"] = [1000 * float(numpy.quantile(eager, q)) / work.steps for q in (0.5, 0.2, 0.8)]
    for metric, amount, unit in (("rate", work.tokens, 1), ("arithmetic", work.flops, 1e12), ("bandwidth", work.bytes, 1e9)):
        if amount:
            metrics[metric] = [amount / unit / s for s in (middle, high, low)]
    for metric, mib in (("peak memory", peak), ("reserved memory", reserved)):
        if mib is not None:
            metrics[metric] = [mib] * 3
    if setting.device.type == "cuda":
        device = "CUDA {}, compute capability {}.{}".format(torch.version.cuda, *torch.cuda.get_device_capability(setting.device))
    else:
        device = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    extra = {"size": setting.size_name if case.sized else "any", "baseline": case.baseline, "precision": "bf16" if case.providers[provider].bf16 else setting.precision,
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
    """MiB that one pass takes at most above what the process held once the weights were loaded, optimizer state counted wherever it is made (Work.state). Linux only (None
    elsewhere).

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
    return mib("VmHWM") - before + work.state / 2 ** 20
