"""What is asked for of the ratios in compare.py's rows, as data, and one line for each that was measured: how far it got, which bar it has, met or missed.

What it adds over rows.py: the bars. From rows alone; nothing is measured here.
"""

import dataclasses
from collections.abc import Sequence

import numpy

from .rows import Row

FLOOR, BUCKETED = "the floor", "length-bucketed"
THEIRS = {"lora_step": "transformers+peft", "adapter_step": "transformers+adapters", "prefix_step": "transformers+peft", "full_step": "transformers"}
"""case -> the other side that its bars are held against."""
SIZES = ("small", "base")
IMPORT_MS = 50.0
"""`import peftdebias` may add this to `import torch`."""


@dataclasses.dataclass(frozen=True)
class Bar:
    """`provider` is to take at most `at_most` of `of`: another provider, or FLOOR. paired: decided on passes of these two alone, in turns."""

    case: str
    sizes: tuple[str, ...]
    provider: str
    of: str
    at_most: float
    metric: str = "time"
    paired: bool = False


def _upstream(case: str) -> list[Bar]:
    them = THEIRS[case]
    asked = ((("base",), them, 0.25), (("base",), f"{them}, {BUCKETED}", 0.60), (("base",), FLOOR, 1.3), (("small",), them, 0.10), (("small",), f"{them}, {BUCKETED}", 0.25))
    return [*(Bar(case, sizes, "peftdebias", of, at_most) for sizes, of, at_most in asked), Bar(case, SIZES, "peftdebias", them, 0.30, "peak memory")]


FOLDED = "peftdebias, frozen module folded"
BARS = (*_upstream("lora_step"), *_upstream("adapter_step"), *_upstream("prefix_step"),
        Bar("full_step", SIZES, FOLDED, "peftdebias", 1.02, paired=True), Bar("full_step", SIZES, FOLDED, "transformers", 0.5), Bar("full_step", SIZES, FOLDED, f"transformers, {BUCKETED}", 0.75),
        Bar("sparse_step", SIZES, "peftdebias, stage 1", FLOOR, 1.3), Bar("sparse_step", SIZES, "peftdebias, stage 2", "peftdebias, stage 1", 1.05, paired=True))


def pairs(case: str) -> list[tuple[str, str]]:
    """(provider, of) whose ratio is so near to 1 that their passes take turns by themselves."""
    return [(bar.provider, bar.of) for bar in BARS if bar.case == case and bar.paired]


def lines(found: Sequence[Row]) -> list[str]:
    """For each case, size and provider of ours: time beside each other side and the floor, peak memory beside each other side."""
    out = []
    for case, size in dict.fromkeys((row.kernel_name, row.extra_config["size"]) for row in found):
        mine = {(row.provider, row.metric_name): row for row in found if (row.kernel_name, row.extra_config["size"]) == (case, size)}
        asked = [bar for bar in BARS if bar.case == case and size in bar.sizes]
        for provider in dict.fromkeys(p for p, _ in mine if p.startswith("peftdebias")):
            for metric, words in (("time", "{:.3g} ms a step"), ("peak memory", "peak memory {:.0f} MiB")):
                if (provider, metric) not in mine:
                    continue
                bars = {bar.of: bar for bar in asked if (bar.provider, bar.metric) == (provider, metric)}
                parts = [_part(mine[provider, metric], other, bars.get(of)) for (of, m), other in mine.items() if m == metric and (not of.startswith("peftdebias") or of in mine[provider, metric].extra_config.get("paired", {}))]
                parts += [_floor(mine[provider, metric], bars.get(FLOOR))] if metric == "time" else []
                parts += [f"{of}: not measured here (bar {bar.at_most:g})" for of, bar in bars.items() if of != FLOOR and (of, metric) not in mine]
                out.append(f"{case}, {size}: {provider}: {words.format(mine[provider, metric].y_50)}" + "".join(f"; {part}" for part in parts))
    return out


def _part(own: Row, other: Row, bar: Bar | None) -> str:
    ratios = own.extra_config.get("paired", {}).get(other.provider) if own.metric_name == "time" else None
    if not ratios:
        return f"{own.y_50 / other.y_50:.3g} of {other.provider}{verdict(own.y_50 / other.y_50, bar and bar.at_most)}"
    low, middle, high = (float(numpy.quantile(ratios, q)) for q in (0.2, 0.5, 0.8))
    return f"{middle:.4g} ({low:.4g} to {high:.4g}, {len(ratios)} pairs of passes) of {other.provider}{verdict(middle, bar and bar.at_most)}"


def _floor(own: Row, bar: Bar | None) -> str:
    floor = own.extra_config["floor_ms"]
    blas = f" (torch.mm: {own.extra_config['blas_gflops']:.0f})" if "blas_gflops" in own.extra_config else ""
    of = "the floor" if own.extra_config.get("precision") != "bf16" else "the floor in float32"
    return f"{own.y_50 / floor:.3g} of {of}, {floor:.3g} ms at {own.extra_config['gemm_gflops']:.0f} GFLOP/s{blas}{verdict(own.y_50 / floor, bar and bar.at_most)}"


def verdict(reached: float, at_most: float | None, unit: str = "") -> str:
    return "" if at_most is None else f" (bar {at_most:g}{unit}: {'met' if reached <= at_most else 'missed'})"
