"""Which ops the time of one provider's pass goes to: `bench/run.py NAME --profile PROVIDER`, on a CPU."""

import statistics
import time

import torch
from torch.profiler import ProfilerActivity, profile

from .case import Case, Setting

SHOWN = 12  # ops; the rest is one line
WARM = 2  # passes before anything is timed


def ops_table(case: Case, setting: Setting, provider: str, repeats: int) -> str:
    """Markdown: ms a step without the profiler (median, smallest and largest of `repeats` passes), then every op's own ms a step and its share of one profiled pass;
    what an op spends in others that it calls counts there."""
    work = case.providers[provider].build(setting)
    for _ in range(WARM):
        work.run()
    spent = []
    for _ in range(repeats):
        began = time.perf_counter()
        work.run()
        spent.append(1000 * (time.perf_counter() - began) / work.steps)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        work.run()
    ops = sorted(((event.self_cpu_time_total / 1000 / work.steps, event.count / work.steps, event.key) for event in seen.key_averages()), reverse=True)
    total = sum(ms for ms, _, _ in ops)
    rest = ops[SHOWN:]
    shown = ops[:SHOWN] + ([(sum(ms for ms, _, _ in rest), sum(n for _, n, _ in rest), f"{len(rest)} others")] if rest else [])
    head = [f"{case.name}, {setting.size_name}, {case.x_name} {setting.x:g}: {provider}: {statistics.median(spent):.4g} ms a step ({min(spent):.4g} to {max(spent):.4g}, {repeats} passes of "
            f"{work.steps}), {torch.get_num_threads()} threads", "", "| op | calls a step | own ms a step | share, % |", "|---|---:|---:|---:|"]
    return "\n".join(head + [f"| `{key}` | {count:.4g} | {ms:.3g} | {100 * ms / total:.3g} |" for ms, count, key in shown])
