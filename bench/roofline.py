"""How near to the machine's ceilings each op comes, what holds it below, and whether the targets are met; from rows alone.

An op's floor is the sum, over its stretches of work that cannot overlap, of the larger of flops / (best matrix product measured) and bytes / (best copy measured,
bytes read and written both counted). The ceilings are rows `gemm` and `copy` of the same run, so no figure of a data sheet goes in.
"""

import dataclasses
from collections.abc import Sequence

from .rows import UNITS, Row

GOOD = 80.0
"""Per cent of its roofline above which nothing needs to be said."""

OURS = "peftdebias"


def ceilings(found: Sequence[Row]) -> tuple[float, float] | None:
    """(flops/s of the best matrix product, bytes/s of the best copy) of these rows; None where one is missing."""
    products = [row.y_50 for row in found if row.kernel_name.split()[0] == "gemm" and row.metric_name == "arithmetic"]
    copies = [row.y_50 for row in found if row.kernel_name == "copy" and row.metric_name == "bandwidth"]
    return (1e12 * max(products), 1e9 * max(copies)) if products and copies else None


def floor_ms(row: Row, tops: tuple[float, float]) -> float:
    """Milliseconds that the op of a time row takes at the ceilings."""
    return 1000 * sum(max(flops / tops[0], size / tops[1]) for flops, size in row.extra_config["roof"])


def with_shares(found: Sequence[Row]) -> list[Row]:
    """The rows, and behind the time of every op with a roof its share of it in per cent."""
    tops, out = ceilings(found), []
    for row in found:
        out.append(row)
        if tops and row.metric_name == "time" and row.extra_config.get("roof"):
            floor = 100 * floor_ms(row, tops)
            out.append(dataclasses.replace(row, metric_name="roofline", metric_unit=UNITS["roofline"], y_50=floor / row.y_50, y_20=floor / row.y_80, y_80=floor / row.y_20))
    return out


def limits(found: Sequence[Row]) -> list[str]:
    """One line for every op of ours below GOOD: what bounds its kernels by the way they are built, and what an eager launch takes where that is more than the device's own
    time. Where the time holds the host's work (no CUDA graph of it), whether that is what limits it."""
    lines = []
    times, eager = ({_key(row): row for row in found if row.metric_name == metric} for metric in ("time", "eager time"))
    for row in found:
        if row.metric_name == "roofline" and row.provider.startswith(OURS) and row.y_50 < GOOD:
            time, host, why = times[_key(row)].y_50, row.extra_config.get("host_ms"), row.extra_config.get("limit") or "a profile has to say"
            if row.extra_config.get("timed") == "graph":
                clock, launched = row.extra_config.get("clock_ms") or 0.0, eager.get(_key(row))
                why += f" ({clock:.3g} of the {time:.3g} ms are the clock's own)" if clock >= 0.1 * time else ""
                if launched and launched.y_50 > time:
                    why += f". Launched eagerly it takes {launched.y_50:.3g} ms, not {time:.3g}: the host needs {host:.3g}"
            elif host is not None:
                why = f"the host: it needs {host:.3g} of the {time:.3g} ms to launch it" if host >= 0.8 * time else f"not the host ({host:.3g} of {time:.3g} ms); {why}"
            lines.append(f"{_where(row)}: {row.provider} reaches {row.y_50:.0f} % of its roofline. What limits it: {why}")
    return lines


def targets(found: Sequence[Row]) -> list[str]:
    """One line a target: what was reached, what was asked for. Those of single ops by the device's own time, and once more as launched eagerly."""
    return _ops(found, "time", "") + _ops(found, "eager time", "launched eagerly, ") + _steps(found)


def _ops(found: Sequence[Row], metric: str, how: str) -> list[str]:
    """Of single ops, by one of their two times. how: in words, before the provider. A time that holds the host's work, where there was no CUDA graph, is none of the device's."""
    times = {_key(row): row for row in found if row.metric_name == metric and (metric != "time" or row.extra_config.get("timed") != "eager")}
    lines, tops = [], ceilings(found)

    def line(row: Row, reached: float, asked: float, of: str) -> None:
        lines.append(f"{_where(row)}: {how}{row.provider} takes {reached:.2f} of {of}, asked for at most {asked:.2f}: {'met' if reached <= asked else 'not met'}{_without_write(row, times)}")

    for name in ("lora_linear", "lora_linear_wide"):
        for x in dict.fromkeys(row.x_value for row in times.values() if row.kernel_name == name):
            ours = min((row for (k, p, v), row in times.items() if (k, v) == (name, x) and p.startswith(OURS)), key=lambda row: row.y_50, default=None)
            if ours is None:
                continue
            if theirs := times.get((name, "peft", x)):
                line(ours, ours.y_50 / theirs.y_50, 0.6, "the time of peft's layer")
            frozen = times.get((name.replace("linear", "frozen"), "torch", x))
            if frozen and tops:
                budget = frozen.y_50 + 1.25 * 1000 * ours.extra_config["roof"][2][1] / tops[1]
                line(ours, ours.y_50 / budget, 1.0, "the frozen linear's forward and dX + 1.25 passes over x and dY")
    for (name, provider, x), row in times.items():
        if name == "adapter" and provider == OURS and (plain := times.get((name, "plain torch", x))):
            line(row, row.y_50 / plain.y_50, 0.5, "plain torch's time")
    return lines


STEP_TARGETS = {True: (0.6, 0.9), False: (0.3, 0.5)}
"""Whether all tokens of a padded batch are valid -> the share of eager's and of compiled transformers' time that our step may take."""

RATES = {"128x256": 55.0}
"""Texts x tokens of a step, as bench/gpu.py names its cases -> per cent of the best matrix product's rate that is asked for there."""


def fastest(found: Sequence[Row]) -> list[Row]:
    """Of every whole step at every x the time of ours that its targets are about: the least, that of a folded module apart."""
    times = [row for row in found if row.mode == "step" and row.metric_name == "time" and row.provider.startswith(OURS) and "folded" not in row.provider]
    return [min((row for row in times if (row.kernel_name, row.x_value) == key), key=lambda row: row.y_50) for key in dict.fromkeys((row.kernel_name, row.x_value) for row in times)]


def _steps(found: Sequence[Row]) -> list[str]:
    """Whole steps beside eager and compiled transformers, their peak memory, and their share of the matrix products' ceiling."""
    lines, tops = [], ceilings(found)
    for ours in fastest(found):
        name, x = ours.kernel_name, ours.x_value
        here = {(row.provider, row.metric_name): row for row in found if row.mode == "step" and (row.kernel_name, row.x_value) == (name, x)}
        base = ours.extra_config["baseline"]
        for provider, asked in zip((base, f"{base}, compiled"), STEP_TARGETS[x >= ours.extra_config["longest"]]):
            if theirs := here.get((provider, "time")):
                lines.append(f"{_where(ours)}: {ours.provider} takes {ours.y_50 / theirs.y_50:.2f} of {provider}'s time, asked for at most {asked:.2f}: "
                             f"{'met' if ours.y_50 / theirs.y_50 <= asked else 'not met'}{_by_host(ours)}{_by_host(theirs)}")
        for metric in ("peak memory", "reserved memory"):
            mine, theirs = here.get((ours.provider, metric)), here.get((base, metric))
            if mine and theirs:
                share = mine.y_50 / theirs.y_50
                lines.append(f"{_where(ours)}: {metric} {share:.2f} of {base}'s, asked for at most 0.50: {'met' if share <= 0.5 else 'not met'}")
        rate = here.get((ours.provider, "arithmetic"))
        if rate and tops:
            share, asked = 100 * rate.y_50 * 1e12 / tops[0], RATES.get(name.split()[-1])
            lines.append(f"{_where(ours)}: {ours.provider} reaches {share:.0f} % of the best matrix product's rate" +
                         (f", asked for at least {asked:.0f} %: {'met' if share >= asked else 'not met'}" if asked else ""))
    return lines


def _by_host(row: Row) -> str:
    """That a step's time is its host's, where it is: on another machine it is another, whatever the device."""
    busy = row.extra_config.get("busy_ms")
    return f" ({row.provider} waits for its host: the device works for {busy:.3g} of {row.y_50:.3g} ms)" if busy and busy < 0.8 * row.y_50 else ""


def _without_write(row: Row, times: dict[tuple[str, str, float], Row]) -> str:
    """That the time of the form `written` leaves out the making of W', which a step does in one launch for all linears, and what a linear's part of that takes: of the last of
    `lora_write`, on a layer's query and value, where it was measured."""
    if not row.provider.startswith(f"{OURS}, written"):
        return ""
    ms = [made.y_50 / (2 * x) for (name, provider, x), made in times.items() if (name, provider) == ("lora_write", OURS)]
    return f" (without lora_write{f', {ms[-1]:.2g} ms a linear of query or value' if ms else ''})"


def _key(row: Row) -> tuple[str, str, float]:
    return row.kernel_name, row.provider, row.x_value


def _where(row: Row) -> str:
    return f"{row.kernel_name}, {row.x_name} {row.x_value:g}"
