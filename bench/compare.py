"""python bench/compare.py [NAME...]: the same training step in this package and in transformers + peft, in three dresses (as a user writes it, under torch.compile,
length-bucketed); every provider in a process of its own, on a CPU.

    python bench/compare.py lora --size small,base --out bench/results/compare-cpu.json

First all providers must compute the same loss and gradients (exit code 1, and no times, where they do not). Then each lives in a fresh process, they take turns pass by
pass, and the rows say: ms a step, valid tokens a second, peak memory above the loaded weights, bytes saved for the backward. The floor beside them is FLOPs that the batch
needs over the best sgemm rate measured in the same run. At the end: import time, size of an adapter file, size and number of installed packages.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy  # noqa: E402
import torch  # noqa: E402

from bench import measure, rows  # noqa: E402
from bench.case import SIZES, Case, Provider, Setting  # noqa: E402
from bench.cases_steps import STEP_CASES, needed_flops  # noqa: E402
from bench.run import Parser, check, complain, say, title  # noqa: E402

GEMM = (1024, 768, 3072)  # rows, inside, outside of the products whose best rate is the ceiling
REPEATS = 5


# ---------------------------------------------------------------- the floor

def gemm_rate(repeats: int = 7) -> float:
    """The best float32 rate of torch.mm here, FLOP/s."""
    rows_, inside, outside = GEMM
    a, b = torch.randn(rows_, inside), torch.randn(inside, outside)
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(5):
            torch.mm(a, b)
        best = min(best, (time.perf_counter() - began) / 5)
    return 2.0 * rows_ * inside * outside / best


# ---------------------------------------------------------------- one provider in a process

def child(case: Case, provider: str, setting: Setting) -> int:
    """Answers lines of standard input: `pass` -> seconds of one; `saved` -> MiB kept for the backward."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    work = case.providers[provider].build(setting)
    work.run()
    print(json.dumps({"steps": work.steps, "tokens": work.tokens, "extra": work.extra}), file=out, flush=True)
    for line in sys.stdin:
        found = measure.seconds(work, 1, setting.device) if line.strip() == "pass" else saved_mib(work)
        print(json.dumps(found), file=out, flush=True)
    return 0


def saved_mib(work) -> float:
    """MiB of the tensors that autograd keeps during one pass, each storage once, those of parameters and inputs apart; the most in any step."""
    steps: list[dict] = [{}]

    def keep(tensor):
        if tensor.grad_fn is None and not tensor.is_leaf or not isinstance(tensor, torch.nn.Parameter):
            steps[-1][tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    original = torch.Tensor.backward
    parameters = {p.untyped_storage().data_ptr() for p in _parameters()}

    def backward(self, *arguments, **settings):
        original(self, *arguments, **settings)
        steps.append({})

    torch.Tensor.backward = backward
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            work.run()
    finally:
        torch.Tensor.backward = original
    return max(sum(size for place, size in step.items() if place not in parameters) for step in steps) / 2 ** 20


def _parameters() -> list[torch.nn.Parameter]:
    import gc

    return [o for o in gc.get_objects() if type(o) is torch.nn.Parameter]


class Lane:
    """A provider's process."""

    def __init__(self, case: Case, provider: str, setting: Setting):
        self.provider = provider
        self.process = subprocess.Popen([*_command(case, provider, setting), "--child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._read()

    def ask(self, what: str):
        print(what, file=self.process.stdin, flush=True)
        return self._read()

    def _read(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.provider}: its process ended with code {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def _command(case: Case, provider: str, setting: Setting) -> list[str]:
    return [sys.executable, __file__, case.name, "--size", setting.size_name, "--batches", str(setting.number), "--folder", str(setting.folder), "--provider", provider]


def peak_mib(case: Case, provider: str, setting: Setting) -> float:
    done = subprocess.run([*_command(case, provider, setting), "--peak"], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------- the comparison

def compare(case: Case, setting: Setting, providers: dict[str, Provider], repeats: int, share: dict[str, float]) -> list[rows.Row]:
    name, ceiling = case.name.removesuffix("_step"), gemm_rate()
    lanes = {}
    for provider, what in providers.items():
        try:
            lanes[provider] = Lane(case, provider, setting)
        except RuntimeError as error:
            if not what.compiled:
                raise
            say(f"{case.name}: {provider} is not measured: {error}")
    times: dict[str, list[float]] = {provider: [] for provider in lanes}
    load = os.getloadavg()[0]
    for i in range(repeats):
        for provider in [*lanes][i % len(lanes):] + [*lanes][:i % len(lanes)]:
            times[provider].append(lanes[provider].ask("pass"))
        ceiling = max(ceiling, gemm_rate(2))
    floor = needed_flops(setting, name) / ceiling
    found = []
    for provider, lane in lanes.items():
        compiled = providers[provider].compiled
        saved = None if compiled else lane.ask("saved")
        lane.close()
        low, middle, high = (float(numpy.quantile(times[provider], q)) for q in (0.2, 0.5, 0.8))
        about = lane.about
        metrics = {"time": [1000 * s / about["steps"] for s in (middle, low, high)], "rate": [about["tokens"] / s for s in (middle, high, low)]}
        if not compiled:  # a fresh process would count the compiler's memory
            metrics |= {"peak memory": [peak_mib(case, provider, setting)] * 3, "saved for backward": [saved] * 3}
        extra = {"size": setting.size_name, "baseline": case.baseline, "precision": setting.precision, "repeats": repeats, "load_average": round(load, 2),
                 "load_at_start": measure.LOAD_AT_START, "device": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
                 "floor_ms": 1000 * floor / about["steps"], "gemm_gflops": ceiling / 1e9, "versions": {n: rows.version(n) for n in ("transformers", "peft")},
                 "largest_difference_as_share_of_allowed": share.get(provider), **about["extra"]}
        common = dict(extra_config=extra, device_name=rows.device_name(setting.device), torch_version=torch.__version__, triton_version=rows.version("triton"),
                      commit=rows.commit(), timestamp=rows.now())
        found += [rows.Row(case.name, provider, case.mode, metric, rows.UNITS[metric], case.x_name, setting.x, *ys, **common) for metric, ys in metrics.items()]
    return found


def bars(found: list[rows.Row]) -> list[str]:
    """Ours against each dress and against the floor, in words."""
    lines = []
    for name, size in dict.fromkeys((row.kernel_name, row.extra_config["size"]) for row in found):
        mine = {(row.provider, row.metric_name): row for row in found if (row.kernel_name, row.extra_config["size"]) == (name, size)}
        own = mine["peftdebias", "time"]
        floor = own.extra_config["floor_ms"]
        ratios = [f"{own.y_50 / row.y_50:.2f} of {provider}" for (provider, metric), row in mine.items() if metric == "time" and not provider.startswith("peftdebias")]
        lines.append(f"{name}, {size}: {own.y_50:.0f} ms a step: {'; '.join(ratios)}; {own.y_50 / floor:.2f} of the floor ({floor:.0f} ms at {own.extra_config['gemm_gflops']:.0f} GFLOP/s)")
        memory = [(p, row.y_50) for (p, metric), row in mine.items() if metric == "peak memory"]
        ours = dict(memory).get("peftdebias")
        lines += [f"{name}, {size}: peak memory {ours:.0f} MiB: {'; '.join(f'{ours / m:.2f} of {p}' for p, m in memory if p != 'peftdebias')}"] if ours else []
        plain = mine.get(("peftdebias, frozen module folded", "time"))
        lines += [f"{name}, {size}: with a frozen module folded {plain.y_50 / own.y_50:.3f} of plain"] if plain else []
    return lines


# ---------------------------------------------------------------- start-up and size

def start_up(repeats: int = 7) -> dict[str, float]:
    """Milliseconds of `python -c "import ..."`, medians; they take turns."""
    kinds = {"import torch": "import torch", "import torch, peftdebias": "import torch, peftdebias"}
    if all(importlib.util.find_spec(n) for n in ("transformers", "peft")):
        kinds["import torch, transformers, peft"] = "import torch, transformers, peft"
    spent: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(repeats):
        for name, code in kinds.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
            spent[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in spent.items()}


def installed(root: str) -> tuple[int, float]:
    """(how many packages, MiB) a package brings, with all that it requires, itself counted."""
    seen, waiting = set(), [root]
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in seen:
            continue
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            wanted = importlib.metadata.distribution(name).requires or []
            seen.add(name)
            waiting += [re.match(r"[A-Za-z0-9._-]+", line)[0] for line in wanted if "extra ==" not in line]
    size = 0
    for name in seen:
        for file in importlib.metadata.distribution(name).files or ():
            with contextlib.suppress(OSError):
                size += os.path.getsize(file.locate())
    return len(seen), size / 2 ** 20


def main(argv: list[str] | None = None) -> int:
    top = Parser(prog="bench/compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(n.removesuffix('_step') for n in STEP_CASES)} (default all)")
    top.add_argument("--size", default="small", metavar="S[,S...]", help=f"{', '.join(SIZES)} (default small)")
    top.add_argument("--repeats", type=int, default=REPEATS, metavar="N")
    top.add_argument("--batches", type=int, metavar="N", help="batches in one pass (default: by size)")
    top.add_argument("--compile", action="store_true", help="with the compiled dress (slow to start)")
    top.add_argument("--out", type=Path, metavar="FILE.json")
    for flag in ("--provider", "--folder"):
        top.add_argument(flag, help=argparse.SUPPRESS)
    for flag in ("--child", "--peak"):
        top.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    arguments = top.parse_args(argv)
    names = [n.removesuffix("_step") + "_step" for n in arguments.names] or [*STEP_CASES]
    for name in names:
        if name not in STEP_CASES:
            return complain(f"no case {name.removesuffix('_step')!r}; expected some of {', '.join(n.removesuffix('_step') for n in STEP_CASES)}")
    for size in arguments.size.split(","):
        if size not in SIZES:
            return complain(f"no size {size!r}; expected one of {', '.join(SIZES)}")
    if arguments.repeats < 1:
        return complain(f"--repeats: expected at least 1, got {arguments.repeats}")
    with tempfile.TemporaryDirectory(prefix="peftdebias-bench-") as made:
        folder = Path(arguments.folder or made)
        settings = [(case, Setting(size, x, folder, batches=arguments.batches, longest=min(128, SIZES[size].positions // 2)))
                    for case in map(STEP_CASES.get, names) for size in arguments.size.split(",") for x in case.x_values]
        if arguments.provider:
            (case, setting), = settings
            if arguments.peak:
                print(json.dumps(measure.cpu_peak(case.providers[arguments.provider], setting)))
                return 0
            return child(case, arguments.provider, setting)
        found = []
        for case, setting in settings:
            providers = measure.taking_part(case, arguments.compile, say)
            try:
                share = check(case, setting, {n: p for n, p in providers.items() if not p.compiled})
            except measure.Unequal as red:
                print(red)
                return 1
            say(f"{title(case, setting)}: timing")
            found += compare(case, setting, providers, arguments.repeats, share)
    times = start_up()
    sizes = {root: installed(root) for root in ("peftdebias", "transformers", "peft") if rows.version(root)}
    notes = {"Ours beside theirs": bars(found),
             "Start-up": [f"`{name}`: {ms:.0f} ms" for name, ms in times.items()] + [f"peftdebias adds {times['import torch, peftdebias'] - times['import torch']:.0f} ms to torch"],
             "Installed, with all that each requires (torch included)": [f"{root}: {count} packages, {size:.0f} MiB" for root, (count, size) in sizes.items()]}
    heading = f"Measured by bench/compare.py on {rows.device_name(torch.device('cpu'))}"
    print(f"# {heading}\n\n{rows.table(found, notes)}")
    if arguments.out:
        rows.write(arguments.out, found, heading, notes)
        say(f"result: {arguments.out} and {arguments.out.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
