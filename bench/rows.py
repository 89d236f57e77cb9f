"""A row: one figure of one provider in one setting, with all that is needed to read it later; tables are made from rows alone.

What it adds over measure.py: names, JSON and Markdown. It leaves out measuring.
"""

import dataclasses
import datetime
import functools
import json
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from peftdebias import processor
from peftdebias.errors import ConfigError
from peftdebias.outputs import write_text

from . import ROOT
from .arguments import say

MODES = ("forward", "backward", "full", "step", "predict")
UNITS = {"time": "ms", "eager time": "ms", "p99": "ms", "texts": "texts/s", "rate": "valid tokens/s", "arithmetic": "TFLOP/s", "bandwidth": "GB/s", "roofline": "%", "peak memory": "MiB", "reserved memory": "MiB", "saved for backward": "MiB",
         "adapter file": "KiB"}
"""metric_name -> metric_unit. time: of one step (mode step) or one call; of a single op on a GPU the device's own. eager time: of such an op as it is launched eagerly, the host's
work among it. p99: of the calls of one pass, whose median is the time. roofline: the least time at the measured
ceilings, over the time (roofline.py). peak memory: above what lay there once the weights were loaded (measure.time_case). reserved memory: of a
step on a GPU, what torch took from the device at most beyond what it held then, the memory that CUDA graphs keep among it. adapter file: what is kept of the trained module, tensors and configuration."""


@dataclasses.dataclass(frozen=True)
class Row:
    """y_50, y_20, y_80: median and quantiles over the repeats, all three the same where there is one. extra_config: whatever JSON holds."""

    kernel_name: str
    provider: str
    mode: str
    metric_name: str
    metric_unit: str
    x_name: str
    x_value: float
    y_50: float
    y_20: float
    y_80: float
    extra_config: dict
    device_name: str
    torch_version: str
    triton_version: str | None
    commit: str
    timestamp: str


# ---------------------------------------------------------------- where and with what

@functools.cache
def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with its family and model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {processor.named()}"


def slug(device: torch.device) -> str:
    """device_name as part of a file name: `cpu-amd-epyc`, `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


version = functools.cache(processor.installed)


@functools.cache
def commit() -> str:
    """The commit of this checkout, `+changes` where files differ from it, `+unchecked` where git does not say whether; `unknown` where it says nothing."""
    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    # What was measured is the code; results written beside it do not count as a change of it.
    if head is None:
        return "unknown"
    changed = git("status", "--porcelain", "--", ".", ":!bench/results")
    return head + ("+unchecked" if changed is None else "+changes" if changed else "")


def machine() -> dict[str, object]:
    """Where and on which code a script without rows measured: cpu, cores that it may use, load average, commit."""
    return {"cpu": processor.named(), "cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 1), "commit": commit()}


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


# ---------------------------------------------------------------- files and tables

def write(path: Path, rows: Sequence[Row], title: str, notes: dict[str, Sequence[str]] | None = None, drawings: dict[str, str] | None = None) -> None:
    """FILE.json with the rows, one a line, and beside it FILE.md with their tables. drawings: file name -> what it shows, linked above the tables."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "[\n" + ",\n".join(json.dumps(dataclasses.asdict(row)) for row in rows) + "\n]\n")
    links = "".join(f"![{words}]({name})\n\n" for name, words in (drawings or {}).items())
    write_text(path.with_suffix(".md"), f"# {title}\n\n{links}{table(rows, notes)}\n")


def saved(path: Path, *written: Callable[[], object]) -> bool:
    """Whether all of it, results at `path` and beside it, could be written; where it could not, a line says why: they are to be printed before."""
    try:
        for write_one in written:
            write_one()
    except (OSError, ConfigError) as error:
        say(f"bench: {error if isinstance(error, ConfigError) else f'{path}: cannot be written: {error.strerror or error}'}")
        return False
    return True


def read(path: Path) -> list[Row]:
    return [Row(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]


def table(rows: Sequence[Row], notes: dict[str, Sequence[str]] | None = None) -> str:
    """Markdown: where and with what, then a table a case. `of baseline` is a provider's median time over that of the case's first provider. notes: heading ->
    lines, below the tables."""
    if not rows:
        return "Nothing was measured."
    out = [_facts(rows)]
    for name, mode in dict.fromkeys((row.kernel_name, row.mode) for row in rows):
        group = [row for row in rows if (row.kernel_name, row.mode) == (name, mode)]
        metrics = [metric for metric in UNITS if any(row.metric_name == metric for row in group)]
        heads = ["size", group[0].x_name, "provider", *(f"{m}, {UNITS[m]}" for m in metrics)]
        if "time" in metrics:
            heads.insert(4, "of baseline")
        out += ["", f"## {name} ({mode})", "", "| " + " | ".join(heads) + " |", "|---" * 3 + "|---:" * (len(heads) - 3) + "|"]
        for key in dict.fromkeys(_line(row) for row in group):
            found = {row.metric_name: row for row in group if _line(row) == key}
            cells = [_cell(found.get(m)) for m in metrics]
            if "time" in metrics:
                cells.insert(1, _ratio(found["time"], group) if "time" in found else "")
            out.append("| " + " | ".join([*map(str, key), *cells]) + " |")
        out += _settings(group)
    for heading, lines in (notes or {}).items():
        out += ["", f"## {heading}", "", *(f"- {line}" for line in lines or ("none",))]
    return "\n".join(out)


def _settings(group: Sequence[Row]) -> list[str]:
    """What each line of a table was measured on, in words; with x where it differs between the x of one size."""
    words = dict.fromkeys((row.extra_config.get("size", ""), f"{row.x_name} {row.x_value:g}", row.extra_config.get("setting", "")) for row in group)
    found = []
    for size in dict.fromkeys(key[0] for key in words):
        mine = [(x, text) for s, x, text in words if s == size and text]
        same = len({text for _, text in mine}) == 1
        found += [f"- {size}: {mine[0][1]}"] if same else [f"- {size}, {x}: {text}" for x, text in mine]
    return ["", *found] if found else []


def _line(row: Row) -> tuple:
    return row.extra_config.get("size", ""), f"{row.x_value:g}", row.provider


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row.y_20 == row.y_80:
        return number(row.y_50)
    return f"{number(row.y_50)} ({number(row.y_20)} to {number(row.y_80)})"


def number(y: float) -> str:
    return f"{y:,.0f}" if abs(y) >= 1000 else f"{y:.3g}"


def _ratio(row: Row, group: Sequence[Row]) -> str:
    base = [r for r in group if r.metric_name == "time" and r.provider == row.extra_config.get("baseline") and _line(r)[:2] == _line(row)[:2]]
    if base and "eager" in (row.extra_config.get("timed"), base[0].extra_config.get("timed")):
        return "by the host"  # one holds its work, for want of a CUDA graph
    return f"{row.y_50 / base[0].y_50:.2f}" if base else "no baseline"


def _facts(rows: Sequence[Row]) -> str:
    def all_of(key) -> str:
        return ", ".join(dict.fromkeys(str(value) for row in rows if (value := key(row)) is not None)) or "none"

    libraries = dict.fromkeys(f", {name} {v}" for row in rows for name, v in row.extra_config.get("versions", {}).items())
    checked = any("largest_difference_as_share_of_allowed" in row.extra_config for row in rows)
    loads = [row.extra_config["load_average"] for row in rows if "load_average" in row.extra_config] or [float("nan")]
    return "\n".join((
        f"- {all_of(lambda r: r.device_name)}; {all_of(lambda r: r.extra_config.get('device', '?'))}",
        f"- torch {all_of(lambda r: r.torch_version)}, triton {all_of(lambda r: r.triton_version)}" + "".join(libraries),
        f"- commit {all_of(lambda r: r.commit)}; {min(r.timestamp for r in rows)} to {max(r.timestamp for r in rows)}",
        f"- load average {all_of(lambda r: r.extra_config.get('load_at_start', '?'))} at the start, {min(loads):.1f} to {max(loads):.1f} later, this run's own threads "
        "among them",
        "- median (20 % and 80 % quantile) over the repeats" + "; what has a largest_difference_as_share_of_allowed computed the same before it was timed" * checked,
    ))
