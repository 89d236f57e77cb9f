"""python bench/compare.py [NAME...]: the same training step in this package and in the libraries that everybody uses, in three dresses (as a user writes it, under
torch.compile, length-bucketed); every provider in a process of its own, on a CPU.

    python bench/compare.py lora --size small,base --out bench/results/compare-cpu.json
    python bench/compare.py adapter --adapters-venv venv-adapters        AdapterHub's library, in the virtual environment that bench/README.md makes

First all providers of all cases must compute the same loss and gradients (exit code 1, and no times, where they do not). Then each lives in a fresh process, they take turns pass
by pass, and the rows say: ms a step, valid tokens a second, peak memory above the loaded weights, bytes saved for the backward, size of an adapter file. Where a process ends
before its time, what was measured until then is kept (exit code 2). The floor beside them is FLOPs that the batch needs over the best sgemm rate measured in the same run. Then the
bars (bars.py), import time, size and number of installed packages; with --out a drawing as well (plots.py).
"""

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy  # noqa: E402
import torch  # noqa: E402

from bench import bars, equality, install, lanes, lineup, measure, plots, rows  # noqa: E402
from bench.arguments import Parser, complain, positive, results_file, say, told  # noqa: E402
from bench.case import SIZES, Case, Provider, Setting  # noqa: E402
from bench.cases_steps import needed_flops  # noqa: E402
from bench.process import Ended, Process  # noqa: E402
from bench.run import check, title  # noqa: E402
from peftdebias.kernels import dispatch  # noqa: E402
from peftdebias.ops import linear  # noqa: E402
from peftdebias.outputs import write_text  # noqa: E402

GEMM = (1024, 768, 3072)  # rows, inside, outside of the products whose best rate is the ceiling
REPEATS, PAIRS = 5, 15


# ---------------------------------------------------------------- the floor

def gemm_rates(repeats: int = 7) -> dict[str, float]:
    """form of ops.linear -> its best float32 rate here, FLOP/s: torch's BLAS, and oneDNN where torch carries it."""
    rows_, inside, outside = GEMM
    a, b, best = torch.randn(rows_, inside), torch.randn(outside, inside), {}
    for form in dispatch.FORMS["linear"]:
        with dispatch.use("linear", form):
            for _ in range(repeats):
                began = time.perf_counter()
                for _ in range(5):
                    linear(a, b)
                best[form] = min(best.get(form, float("inf")), (time.perf_counter() - began) / 5)
    return {form: 2.0 * rows_ * inside * outside / seconds for form, seconds in best.items()}


# ---------------------------------------------------------------- the comparison

def compare(case: Case, setting: Setting, providers: dict[str, Provider], repeats: int, pairs: int, share: dict[str, float]) -> list[rows.Row]:
    """Rows of all providers that come up. pairs: passes of two that are near to each other, in turns (bars.pairs)."""
    rates, up = gemm_rates(), {}
    for provider, what in providers.items():
        try:
            up[provider] = lanes.lane(case, provider, setting)
        except RuntimeError as error:
            if not what.compiled:
                raise
            say(f"{case.name}: {provider} is not measured: {error}")
    times: dict[str, list[float]] = {provider: [] for provider in up}
    load = os.getloadavg()[0]
    for i in range(repeats):
        for provider in measure.in_turn(up, i):
            times[provider].append(up[provider].ask("pass"))
        rates = {form: max(rate, rates[form]) for form, rate in gemm_rates(2).items()}
    ratios = {pair: in_turns(*(up[p] for p in pair), pairs) for pair in bars.pairs(case.name) if set(pair) <= set(up)}
    floor = needed_flops(setting, case.name.removesuffix("_step")) / max(rates.values())
    found = []
    for provider, lane in up.items():
        compiled, about = providers[provider].compiled, lane.about
        file, saved = lane.ask("file"), None if compiled else lane.ask("saved")
        lane.close()
        low, middle, high = (float(numpy.quantile(times[provider], q)) for q in (0.2, 0.5, 0.8))
        metrics = {"time": [1000 * s / about["steps"] for s in (middle, low, high)], "rate": [about["tokens"] / s for s in (middle, high, low)]}
        if not compiled:  # a fresh process would count the compiler's memory
            metrics |= {"peak memory": [lanes.peak_mib(case, provider, setting)] * 3, "saved for backward": [saved] * 3}
        metrics |= {"adapter file": [file] * 3}
        extra = {"size": setting.size_name, "baseline": case.baseline, "precision": "bf16" if providers[provider].bf16 else setting.precision, "repeats": repeats, "load_average": round(load, 2),
                 "load_at_start": measure.LOAD_AT_START, "device": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
                 "floor_ms": 1000 * floor / about["steps"], "gemm_gflops": max(rates.values()) / 1e9, "blas_gflops": rates["blas"] / 1e9, "versions": about["versions"],
                 "largest_difference_as_share_of_allowed": share.get(provider), **about["extra"]}
        if paired := {of: ratio for (own, of), ratio in ratios.items() if own == provider}:
            extra["paired"] = paired
        common = dict(extra_config=extra, device_name=rows.device_name(setting.device), torch_version=about["torch"], triton_version=about["triton"],
                      commit=rows.commit(), timestamp=rows.now())
        found += [rows.Row(case.name, provider, case.mode, metric, rows.UNITS[metric], case.x_name, setting.x, *ys, **common)
                  for metric, ys in metrics.items() if ys[0] is not None]
    return found


def in_turns(own: Process, other: Process, pairs: int) -> list[float]:
    """Seconds of a pass of `own` over those of the pass of `other` beside it; who begins changes from pair to pair."""
    found = []
    for i in range(pairs):
        spent = {lane: lane.ask("pass") for lane in ((own, other) if i % 2 else (other, own))}
        found.append(spent[own] / spent[other])
    return found


# ---------------------------------------------------------------- the command

def interpreter(venv: Path) -> str | None:
    """The Python of AdapterHub's virtual environment; None where it does not import the library."""
    python = str(venv.absolute() / "bin" / "python")
    try:
        done = subprocess.run([python, "-c", "import adapters, torch, transformers"], capture_output=True)
    except OSError:
        return None
    return python if done.returncode == 0 else None


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="bench/compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("names", nargs="*", metavar="NAME", help=f"some of {_known()} (default all)")
    top.add_argument("--size", default="small", metavar="S[,S...]", help=f"{', '.join(SIZES)} (default small)")
    top.add_argument("--repeats", type=positive, default=REPEATS, metavar="N", help=f"passes of every provider (default {REPEATS})")
    top.add_argument("--pairs", type=positive, default=PAIRS, metavar="N", help=f"more passes, in turns, of two providers whose ratio is near 1 (default {PAIRS})")
    top.add_argument("--batches", type=positive, metavar="N", help="batches in one pass (default: by size)")
    top.add_argument("--compile", action="store_true", help="with the compiled dress (slow to start)")
    top.add_argument("--bf16", action="store_true", help="with products in bf16, ours and theirs under autocast, on a processor that multiplies it")
    top.add_argument("--adapters-venv", type=Path, metavar="DIR", help="a virtual environment with AdapterHub's `adapters`; without it the adapters are put into transformers by hand")
    top.add_argument("--out", type=results_file, metavar="FILE.json", help="write the rows there, FILE.md and FILE.svg beside it")
    return top


def _known() -> str:
    return ", ".join(name.removesuffix("_step") for name in lanes.COMPARED)


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    names = [name.removesuffix("_step") + "_step" for name in arguments.names] or [*lanes.COMPARED]
    for name in names:
        if name not in lanes.COMPARED:
            return complain(f"no case {name.removesuffix('_step')!r}; expected some of {_known()}")
    for size in arguments.size.split(","):
        if size not in SIZES:
            return complain(f"no size {size!r}; expected one of {', '.join(SIZES)}")
    hub = arguments.adapters_venv and interpreter(arguments.adapters_venv)
    if arguments.adapters_venv and not hub:
        return complain(f"--adapters-venv {arguments.adapters_venv}: expected a virtual environment whose bin/python imports adapters, torch and transformers")
    found, ended = [], ""
    with tempfile.TemporaryDirectory(prefix="peftdebias-bench-") as folder:
        settings = [(case, Setting(size, x, Path(folder), batches=arguments.batches, longest=min(128, SIZES[size].positions // 2)))
                    for case in (lanes.case_of(name, hub) for name in names) for size in arguments.size.split(",") for x in case.x_values]
        entries = [(case, setting, lineup.taking_part(case, arguments.compile, say, bf16=arguments.bf16)) for case, setting in settings]
        try:
            shares = [check(case, setting, providers, functools.partial(lanes.results, case=case)) for case, setting, providers in entries]
        except equality.Unequal as red:
            print(red)
            return 1
        for (case, setting, providers), share in zip(entries, shares):
            say(f"{title(case, setting)}: timing")
            try:
                found += compare(case, setting, providers, arguments.repeats, arguments.pairs, share)
            except Ended as error:
                ended = f"{title(case, setting)}: {error}; expected all {len(providers)} to last, side by side"
                break
    if ended and not found:
        return complain(ended)
    notes = {"Ours beside theirs": bars.lines(found), "Start-up": _asked(install.start_up, hub), "Installed, with all that each side requires, PyTorch among it": _asked(install.sizes, hub)}
    if ended:
        notes["Not measured"] = [f"{ended}; nothing behind it either"]
    heading = f"Measured by bench/compare.py on {rows.device_name(torch.device('cpu'))}"
    print(f"# {heading}\n\n{rows.table(found, notes)}")
    if arguments.out:
        drawn = arguments.out.with_suffix(".svg")
        if not rows.saved(arguments.out, lambda: rows.write(arguments.out, found, heading, notes, {drawn.name: plots.describe(found)}), lambda: write_text(drawn, plots.draw(found))):
            return 1
        say(f"result: {arguments.out}, {arguments.out.with_suffix('.md')} and {drawn}")
    return complain(ended) if ended else 0


def _asked(what: Callable[[str | None], list[str]], hub: str | None) -> list[str]:
    """The lines of install.py, or why there are none: what was measured before is not lost with them."""
    try:
        return what(hub)
    except (OSError, subprocess.SubprocessError) as error:
        return [f"not measured: {told(error)}"]


if __name__ == "__main__":
    sys.exit(main())
