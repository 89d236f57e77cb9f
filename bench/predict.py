"""python bench/predict.py TEXTS --tokenizer FOLDER: labelling texts in this package and in transformers + peft, merged and unmerged; every provider in a process of its own, on a CPU.

    python bench/predict.py ../shared/data/ghc/ghc_train.tsv --column text --tokenizer ../shared/models/bert-tiny-mlm --out bench/results/predict-cpu.json

First all must give the same probabilities (exit code 1, and no times, where they do not). Then they take turns, pass by pass. predict_calls: a call of 1 and one of 256 texts,
p50 and p99 over the calls of a pass. predict_file: all texts in one call, which may sort them; theirs in batches of 64, in the file's order and sorted by length. From
texts to labels and probabilities: the tokenizer counts. The weights are drawn: only shapes matter for time. The ceiling beside predict_file is FLOPs that the texts need
over the best sgemm rate measured in the same run, and the tokenizer's own time.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy  # noqa: E402
import torch  # noqa: E402

from bench import equality, measure, rows  # noqa: E402
from bench.arguments import Parser, complain, positive, results_file, say  # noqa: E402
from bench.case import SIZES, output_bound  # noqa: E402
from bench.cases_predict import IN_BF16, ONE_CALL, OURS, PREDICTORS, SORTED, THEIRS, WHOLE_FILE, Predictor, Task, forward_flops  # noqa: E402
from bench.compare import gemm_rates  # noqa: E402
from bench.process import Ended, Process, serve  # noqa: E402
from peftdebias.errors import PeftDebiasError  # noqa: E402
from peftdebias.ops.linear import no_bf16  # noqa: E402
from peftdebias.tokens import load_tokenizer  # noqa: E402

PARTS = ("calls", "file")
BATCH, LARGE = 64, 256
CHECKED = 100  # texts that all must answer alike
CEILING = "ceiling: matrix products + tokenizer"
BARS = {SORTED: 1.4, THEIRS: 3.0}
"""How many times as fast OURS is to be, of the whole file."""


# ---------------------------------------------------------------- equality

def check(task: Task, texts: list[str]) -> dict[str, float]:
    """name -> its largest difference from the first as a share of the allowed one. Raises equality.Unequal where a probability is off."""
    shares, expected = {}, None
    for name, build in available().items():
        predict = build(task)
        tensor = {"probabilities": torch.tensor([list(answer["probabilities"].values()) for answer in predict(texts[:CHECKED], BATCH)], dtype=torch.float64)}
        expected = expected or tensor
        (found,) = equality.differences(expected, tensor, output_bound)
        if found.red:
            raise equality.Unequal(f"{name} differs from {next(iter(available()))}; nothing is timed\n  probabilities: max|difference| {found.apart:.3g}, allowed {found.allowed:.3g}")
        shares[name] = found.apart / found.allowed
    return shares


def available(bf16: bool = False) -> dict:
    there = all(importlib.util.find_spec(name) for name in ("transformers", "peft"))
    return {name: build for name, build in (PREDICTORS | (IN_BF16 if bf16 else {})).items() if there or name.startswith("peftdebias")}


# ---------------------------------------------------------------- the other end

def timed_calls(predict: Predictor, texts: list[str], batch: int) -> list[float]:
    """Seconds of each call."""
    spent = []
    for start in range(0, len(texts), batch):
        began = time.perf_counter()
        predict(texts[start:start + batch], batch)
        spent.append(time.perf_counter() - began)
    return spent


def child(name: str, task: Task) -> None:
    """Answers `calls BATCH TEXTS` and `file`."""
    def start():
        texts, predict = task.texts(), (PREDICTORS | IN_BF16)[name](task)
        predict(texts[:LARGE], BATCH)

        def answer(line: str) -> list[float]:
            what, *numbers = line.split()
            if what == "calls":
                batch, count = map(int, numbers)
                return timed_calls(predict, texts[:count], batch)
            began = time.perf_counter()
            predict(texts, BATCH)
            return [time.perf_counter() - began]

        return {"texts": len(texts)}, answer

    serve(start)


# ---------------------------------------------------------------- this end

def in_turns(lanes: dict[str, Process], line: str, repeats: int, between=lambda: None) -> dict[str, list[list[float]]]:
    """name -> of each repeat, seconds of the calls. Every repeat begins with another one."""
    spent: dict[str, list[list[float]]] = {name: [] for name in lanes}
    for i in range(repeats):
        for name in measure.in_turn(lanes, i):
            spent[name].append(lanes[name].ask(line))
        between()
    return spent


def metrics_of(passes: list[list[float]], texts: int) -> dict[str, list[float]]:
    """Metric -> (y_50, y_20, y_80) over the passes."""
    def over(values: list[float]) -> list[float]:
        low, middle, high = (float(numpy.quantile(values, q)) for q in (0.2, 0.5, 0.8))
        return [middle, low, high]

    found = {"time": over([1000 * float(numpy.median(calls)) for calls in passes]), "texts": over([texts / sum(calls) for calls in passes])}
    if len(passes[0]) >= 100:
        found["p99"] = over([1000 * float(numpy.quantile(calls, 0.99)) for calls in passes])
    return found


class Table:
    """Rows with what all of them share."""

    def __init__(self, task: Task, lengths: list[int], shares: dict[str, float]):
        size, longest = SIZES[task.size_name], max(lengths)
        self.rows: list[rows.Row] = []
        self.task, self.shares = task, shares
        self.setting = (f"{size.layers} layers x {size.hidden}, {size.heads} heads, feed-forward {size.feed_forward}, random weights (no checkpoint of that shape is used), LoRA on query and value; "
                        f"{len(lengths)} texts of {Path(task.file).name}, mean {numpy.mean(lengths):.1f} and at most {longest} tokens; float32, or products in bf16 where that is said")

    def add(self, kernel: str, baseline: str, provider: str, x: tuple[str, float], metrics: dict[str, list[float]], **extra) -> None:
        extra = {"size": self.task.size_name, "baseline": baseline, "precision": "bf16" if provider in IN_BF16 else "float32", "load_average": round(os.getloadavg()[0], 2), "load_at_start": measure.LOAD_AT_START,
                 "device": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}", "setting": self.setting,
                 "versions": {n: rows.version(n) for n in ("transformers", "peft")}, "largest_difference_as_share_of_allowed": self.shares.get(provider), **extra}
        common = dict(extra_config=extra, device_name=rows.device_name(torch.device("cpu")), torch_version=torch.__version__, triton_version=rows.version("triton"), commit=rows.commit(),
                      timestamp=rows.now())
        self.rows += [rows.Row(kernel, provider, "predict", metric, rows.UNITS[metric], *x, *ys, **common) for metric, ys in metrics.items()]


def bars(found: list[rows.Row]) -> list[str]:
    """Of the whole file, in words."""
    times = {row.provider: row.y_50 for row in found if row.kernel_name == "predict_file" and row.metric_name == "time"}
    if OURS not in times:
        return []
    lines = [f"{OURS}: {times[OURS] / 1000:.2f} s, {times[OURS] / times[CEILING]:.2f} times the ceiling ({times[CEILING] / 1000:.2f} s)"]
    for other, bar in BARS.items():
        if other in times:
            reached = times[other] / times[OURS]
            lines.append(f"{reached:.2f} times as fast as {other}{'' if 'sorted' in other else ', in the order of the file'}; asked for at least {bar:g}: "
                         f"{'met' if reached >= bar else 'not met'}; at the ceiling it would be {times[other] / times[CEILING]:.2f}")
    return lines


def measured(task: Task, arguments) -> tuple[list[rows.Row], list[str]]:
    """All equality checks, then all times: rows, and the bars in words."""
    texts, tokenizer = task.texts(), load_tokenizer(task.tokenizer)
    lengths = [len(e.ids) for e in tokenizer.encode(texts, max_length=task.longest)]
    task.model_folder()
    shares = check(task, texts)
    say(f"equal: largest difference {max(shares.values()):.2g} of the allowed one")
    table, parts = Table(task, lengths, shares), arguments.only or PARTS
    names = [name for name in available(arguments.bf16) if ("calls" in parts and name in ONE_CALL) or ("file" in parts and name in WHOLE_FILE)]
    lanes = {name: Process(name, [sys.executable, __file__, "--serve", name, json.dumps(dataclasses.asdict(task))]) for name in names}
    if not any(name.startswith("transformers") for name in names):
        say("transformers and peft: not installed, ours is timed alone")
    for batch, count in ((1, arguments.singles), (LARGE, arguments.large)) if "calls" in parts else ():
        count = min(count, len(texts))
        batch = min(batch, count)
        count -= count % batch  # calls of one size
        say(f"calls of {batch}: timing")
        for name, passes in in_turns({n: lanes[n] for n in names if n in ONE_CALL}, f"calls {batch} {count}", arguments.repeats).items():
            table.add("predict_calls", names[0], name, ("texts a call", batch), metrics_of(passes, count), repeats=arguments.repeats, calls=len(passes[0]))
    if "file" in parts:
        say(f"{len(texts)} texts: timing")
        rates, tokenizing = [max(gemm_rates().values())], []

        def between() -> None:
            rates.append(max(gemm_rates(2).values()))
            began = time.perf_counter()
            tokenizer.encode(texts, max_length=task.longest)
            tokenizing.append(time.perf_counter() - began)

        chosen = {n: lanes[n] for n in names if n in WHOLE_FILE}
        spent = in_turns(chosen, "file", arguments.file_repeats, between)
        floor = forward_flops(task.config, lengths) / max(rates)
        extra = {"repeats": arguments.file_repeats, "floor_ms": 1000 * floor, "gemm_gflops": max(rates) / 1e9, "tokenizer_ms": 1000 * min(tokenizing), "batch": BATCH}
        baseline = next(iter(chosen))
        for name, passes in spent.items():
            table.add("predict_file", baseline, name, ("texts", len(texts)), metrics_of(passes, len(texts)), **extra)
        table.add("predict_file", baseline, CEILING, ("texts", len(texts)), metrics_of([[floor + min(tokenizing)]], len(texts)), **extra)
    for lane in lanes.values():
        lane.close()
    return table.rows, bars(table.rows)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--serve"]:
        child(argv[1], Task(**json.loads(argv[2])))
        return 0
    top = Parser(prog="bench/predict.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("file", metavar="TEXTS", help="txt, csv, tsv or jsonl")
    top.add_argument("--tokenizer", required=True, metavar="FOLDER", help="whose tokenizer and vocabulary are used")
    top.add_argument("--column", metavar="COL", help="with the text (default text)")
    top.add_argument("--size", default="minilm", choices=SIZES)
    top.add_argument("--longest", type=int, default=128, metavar="N", help="tokens that a text is cut to (default 128)")
    top.add_argument("--bf16", action="store_true", help="with products in bf16, ours and theirs under autocast, on a processor that multiplies it")
    top.add_argument("--only", nargs="+", choices=PARTS, help="default: both")
    for flag, value, what in (("--texts", 10000, "of the whole file"), ("--singles", 200, "texts in a pass of single calls"), ("--large", 1024, f"texts in a pass of calls of {LARGE}"),
                              ("--repeats", 5, "passes of calls"), ("--file-repeats", 3, "passes of the whole file")):
        top.add_argument(flag, type=positive, default=value, metavar="N", help=f"{what} (default {value})")
    top.add_argument("--out", type=results_file, metavar="FILE.json")
    arguments = top.parse_args(argv)
    if not 8 <= arguments.longest <= SIZES[arguments.size].positions:
        return complain(f"--longest: expected 8 to {SIZES[arguments.size].positions} for the size {arguments.size}, got {arguments.longest}")
    if arguments.bf16 and (why := no_bf16()):
        say(f"--bf16: not measured: {why}")
        arguments.bf16 = False
    with tempfile.TemporaryDirectory(prefix="peftdebias-bench-") as folder:
        task = Task(arguments.size, arguments.tokenizer, arguments.file, arguments.column, arguments.texts, arguments.longest, folder)
        try:
            found, lines = measured(task, arguments)
        except equality.Unequal as red:
            print(red)
            return 1
        except (PeftDebiasError, Ended) as error:
            return complain(str(error))
    heading, notes = f"Measured by bench/predict.py on {rows.device_name(torch.device('cpu'))}", {"The whole file": lines} if lines else {}
    print(f"# {heading}\n\n{rows.table(found, notes)}")
    if arguments.out:
        if not rows.saved(arguments.out, lambda: rows.write(arguments.out, found, heading, notes)):
            return 1
        say(f"result: {arguments.out} and {arguments.out.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
