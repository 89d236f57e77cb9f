"""bench/roofline.py: floors, shares, the lines that say what limits a kernel, and targets, from rows made by hand."""

import dataclasses

import pytest

from .benched import modules
from .outside import one_thread  # noqa: F401  (a fixture: small models on one thread)

bench = modules("rows", "roofline")


def op_row(bench, name, provider, x, ms, roof=(), **extra):
    return bench.rows.Row(name, provider, "full", "time", "ms", "rows", x, ms, ms, ms, {"roof": [list(r) for r in roof]} | extra if roof else extra, "d", "t", None, "c", "2026")


def ceilings_of(bench):
    def ceiling(name, metric, y):
        return bench.rows.Row(name, "torch", "forward", metric, bench.rows.UNITS[metric], "n", 1, y, y, y, {}, "d", "t", None, "c", "2026")

    return [ceiling("gemm", "arithmetic", 100.0), ceiling("gemm", "arithmetic", 800.0), ceiling("copy", "bandwidth", 2000.0)]


def test_the_floor_is_the_slower_of_both_ceilings_for_each_stretch(bench):
    """8e9 flops at 800 TFLOP/s are 0.01 ms, 4e7 bytes at 2000 GB/s 0.02 ms."""
    row = op_row(bench, "adapter", "peftdebias", 4, 0.06, [(8e9, 4e6), (0.0, 4e7)])
    found = bench.roofline.with_shares([*ceilings_of(bench), row])
    assert [r.metric_name for r in found[3:]] == ["time", "roofline"] and found[4].y_50 == pytest.approx(50) and found[4].metric_unit == "%"
    assert bench.roofline.with_shares([row]) == [row]  # no ceilings, no share


def test_below_the_roofline_a_line_says_what_was_measured_of_the_host(bench):
    roof = [(0.0, 2e6)]  # 0.001 ms
    rows = [op_row(bench, "a", "peftdebias", 1, 0.0011, roof, host_ms=0.001), op_row(bench, "b", "peftdebias", 1, 0.01, roof, host_ms=0.009, limit="slow units"),
            op_row(bench, "c", "peftdebias, written", 1, 0.002, roof, host_ms=0.0001, limit="slow units"), op_row(bench, "d", "plain torch", 1, 1.0, roof)]
    b, c = bench.roofline.limits(bench.roofline.with_shares([*ceilings_of(bench), *rows]))
    # no CUDA graph: the host's work is in the time
    assert b == "b, rows 1: peftdebias reaches 10 % of its roofline. What limits it: the host: it needs 0.009 of the 0.01 ms to launch it"
    assert c == "c, rows 1: peftdebias, written reaches 50 % of its roofline. What limits it: not the host (0.0001 of 0.002 ms); slow units"


def eager(bench, row, ms):
    return dataclasses.replace(row, metric_name="eager time", metric_unit=bench.rows.UNITS["eager time"], y_50=ms, y_20=ms, y_80=ms)


def test_below_the_roofline_the_device_and_an_eager_launch_are_told_apart(bench):
    roof = [(0.0, 2e6)]  # 0.001 ms
    a, b, c = (op_row(bench, name, "peftdebias", 1, 0.01, roof, timed="graph", host_ms=host, clock_ms=clock, limit="slow units")
               for name, host, clock in (("a", 0.05, 0.0005), ("b", 0.002, 0.004), ("c", 0.05, None)))
    rows = bench.roofline.with_shares([*ceilings_of(bench), a, eager(bench, a, 0.06), b, eager(bench, b, 0.009), c])
    assert [line.split("What limits it: ")[1] for line in bench.roofline.limits(rows)] == [
        "slow units. Launched eagerly it takes 0.06 ms, not 0.01: the host needs 0.05", "slow units (0.004 of the 0.01 ms are the clock's own)", "slow units"]


def test_targets_are_held_against_what_was_measured(bench):
    roof = [(0.0, 0.0), (0.0, 0.0), (0.0, 1.6e6)]  # one pass over x and dY: 0.0008 ms at 2000 GB/s
    rows = [op_row(bench, "lora_linear", "peft", 8, 0.010, roof), op_row(bench, "lora_linear", "peftdebias, written", 8, 0.005, roof),
            op_row(bench, "lora_linear", "peftdebias, epilogue", 8, 0.007, roof), op_row(bench, "lora_frozen", "torch", 8, 0.003, roof[:2]),
            op_row(bench, "adapter", "plain torch", 8, 0.010, roof), op_row(bench, "adapter", "peftdebias", 8, 0.004, roof)]
    peft, frozen, adapter = bench.roofline.targets([*ceilings_of(bench), *rows])
    assert peft == "lora_linear, rows 8: peftdebias, written takes 0.50 of the time of peft's layer, asked for at most 0.60: met (without lora_write)"
    assert frozen.endswith("1.25 passes over x and dY, asked for at most 1.00: not met (without lora_write)") and "takes 1.25 of" in frozen  # 0.005 / (0.003 + 1.25 * 0.0008)
    assert adapter == "adapter, rows 8: peftdebias takes 0.40 of plain torch's time, asked for at most 0.50: met"
    late = [eager(bench, row, ms) for row, ms in zip(rows, (0.1, 0.12, 0.11, 0.02, 0.1, 0.06))]
    lines = bench.roofline.targets([*ceilings_of(bench), *rows, *late])
    assert lines[:3] == [peft, frozen, adapter]
    assert lines[3] == "lora_linear, rows 8: launched eagerly, peftdebias, epilogue takes 1.10 of the time of peft's layer, asked for at most 0.60: not met"
    assert len(lines) == 6 and lines[5] == "adapter, rows 8: launched eagerly, peftdebias takes 0.60 of plain torch's time, asked for at most 0.50: not met"


def test_what_the_form_written_leaves_out_is_told_with_its_target(bench):
    """0.06 ms for query and value of 12 layers."""
    rows = [op_row(bench, "lora_linear", provider, 8, ms, [(0.0, 1e6)]) for provider, ms in (("peft", 0.01), ("peftdebias, written, one pass", 0.005), ("peftdebias, epilogue", 0.007))]
    write = [op_row(bench, "lora_write", provider, 12, ms) for provider, ms in (("plain torch", 0.3), ("peftdebias", 0.06))]
    line = "lora_linear, rows 8: peftdebias, written, one pass takes 0.50 of the time of peft's layer, asked for at most 0.60: met"
    assert bench.roofline.targets(rows + write) == [f"{line} (without lora_write, 0.0025 ms a linear of query or value)"]
    assert bench.roofline.targets([rows[0], rows[2]] + write) == ["lora_linear, rows 8: peftdebias, epilogue takes 0.70 of the time of peft's layer, asked for at most 0.60: not met"]


def test_a_time_that_holds_the_hosts_work_is_held_against_none(bench):
    """Of an op that has no CUDA graph: on either side it would make the other's time mean nothing."""
    roof = [(0.0, 2e6)]
    for slow in ("peft", "peftdebias, written"):
        found = [op_row(bench, "lora_linear", name, 4096, ms, roof, timed="eager" if name == slow else "graph") for name, ms in (("peft", 1.0), ("peftdebias, written", 0.5))]
        assert bench.roofline.targets(found) == []
        late = [eager(bench, row, 1.0) for row in found]
        assert [line.split(", asked")[0] for line in bench.roofline.targets([*found, *late])] == ["lora_linear, rows 4096: launched eagerly, peftdebias, written takes 1.00 of the time of peft's layer"]
    (line,) = bench.roofline.targets([op_row(bench, "lora_linear", name, 4096, ms, roof, timed="graph") for name, ms in (("peft", 1.0), ("peftdebias, written", 0.5))])
    assert "takes 0.50 of the time of peft's layer" in line


def test_the_rate_is_asked_for_at_one_shape(bench):
    def row(name, metric, y):
        return bench.rows.Row(name, "peftdebias", "step", metric, bench.rows.UNITS[metric], "mean_length", 256, y, y, y, {"baseline": "old", "longest": 256}, "d", "t", None, "c", "2026")

    for tflops, verdict in ((480.0, "60 % of the best matrix product's rate, asked for at least 55 %: met"), (400.0, "50 % of the best matrix product's rate, asked for at least 55 %: not met")):
        found = [*ceilings_of(bench), row("lora_step 128x256", "time", 1.0), row("lora_step 128x256", "arithmetic", tflops)]
        assert bench.roofline.targets(found) == [f"lora_step 128x256, mean_length 256: peftdebias reaches {verdict}"]
    found = [*ceilings_of(bench), row("lora_step 32x128", "time", 1.0), row("lora_step 32x128", "arithmetic", 80.0)]
    assert bench.roofline.targets(found) == ["lora_step 32x128, mean_length 256: peftdebias reaches 10 % of the best matrix product's rate"]


def test_the_memory_of_a_step_is_judged_by_what_is_allocated_and_by_what_is_taken(bench):
    def row(provider, metric, y):
        return bench.rows.Row("full_step 128x256", provider, "step", metric, bench.rows.UNITS[metric], "mean_length", 256, y, y, y, {"baseline": "theirs", "longest": 256}, "d", "t", None, "c", "2026")

    found = [row("theirs", "time", 10.0), row("theirs", "peak memory", 100.0), row("theirs", "reserved memory", 120.0),
             row("peftdebias", "time", 5.0), row("peftdebias", "peak memory", 49.0), row("peftdebias", "reserved memory", 84.0)]
    assert bench.roofline.targets(found)[1:] == ["full_step 128x256, mean_length 256: peak memory 0.49 of theirs's, asked for at most 0.50: met",
                                                "full_step 128x256, mean_length 256: reserved memory 0.70 of theirs's, asked for at most 0.50: not met"]
    assert len(bench.roofline.targets([r for r in found if r.metric_name != "reserved memory"])) == 2


def test_the_ceilings_are_the_best_that_were_measured(bench):
    slower = dataclasses.replace(ceilings_of(bench)[-1], y_50=500.0)
    assert bench.roofline.ceilings([*ceilings_of(bench), slower]) == (8e14, 2e12)


def test_the_lowest_share_is_that_of_the_slowest_time(bench):
    row = dataclasses.replace(op_row(bench, "adapter", "peftdebias", 4, 0.04, [(0.0, 4e7)]), y_20=0.025, y_80=0.08)
    share = bench.roofline.with_shares([*ceilings_of(bench), row])[-1]
    assert (share.y_20, share.y_50, share.y_80) == pytest.approx((25, 50, 80))


def test_a_step_that_waits_for_its_host_is_told(bench):
    def row(provider, ms, busy):
        return bench.rows.Row("lora_step 32x128", provider, "step", "time", "ms", "mean_length", 51, ms, ms, ms, {"baseline": "old", "longest": 128, "busy_ms": busy}, "d", "t", None, "c", "2026")

    words = "lora_step 32x128, mean_length 51: peftdebias takes 0.40 of old's time, asked for at most 0.30: not met"
    for ours, theirs, said in ((3.9, 8.0, ""), (None, 7.9, " (old waits for its host: the device works for 7.9 of 10 ms)"),
                               (1.0, None, " (peftdebias waits for its host: the device works for 1 of 4 ms)")):
        assert bench.roofline.targets([row("old", 10.0, theirs), row("peftdebias", 4.0, ours)]) == [words + said]


@pytest.mark.parametrize("x,eager,compiled", [(51, "0.30: not met", "0.50: met"), (128, "0.60: met", "0.90: met")], ids=["padded", "even"])
def test_the_fastest_of_ours_is_held_against_both_dresses(bench, x, eager, compiled):
    def row(provider, ms):
        return bench.rows.Row("full_step 32x128", provider, "step", "time", "ms", "mean_length", x, ms, ms, ms, {"baseline": "old", "longest": 128}, "d", "t", None, "c", "2026")

    found = [row(p, ms) for p, ms in (("old", 10.0), ("old, compiled", 8.0), ("peftdebias", 5.0), ("peftdebias, CUDA graph", 4.0), ("peftdebias, frozen module folded", 1.0))]
    assert bench.roofline.targets(found) == [f"full_step 32x128, mean_length {x}: peftdebias, CUDA graph takes 0.40 of old's time, asked for at most {eager}",
                                             f"full_step 32x128, mean_length {x}: peftdebias, CUDA graph takes 0.50 of old, compiled's time, asked for at most {compiled}"]
