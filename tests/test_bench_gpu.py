"""bench/gpu.py: its whole path on a CPU, processes beside each other, and what a GPU adds where a test answers for it. No figure is looked at."""

import contextlib
import dataclasses
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from .benched import HAVE_BOTH, ROOT, modules, planted, quick  # noqa: F401  (quick is a fixture)
from .outside import one_thread  # noqa: F401  (a fixture: small models on one thread)

bench = modules("case", "cases", "cases_steps", "equality", "gpu", "lineup", "measure", "rows")
CEILINGS = {"gemm", "copy", "gemm at the end"}


def test_a_provider_that_fails_takes_nothing_from_the_others(bench, quick, monkeypatch, capsys, tmp_path):  # noqa: F811
    """Ours, so the run ends red; what the others take is measured. Without somebody to hear of it, it is raised."""
    case, out, work = bench.cases.CASES["sparse_add"], tmp_path / "rows.json", bench.case.Work(lambda: 1 / 0, dict)
    name, ours = next((name, p) for name, p in case.providers.items() if p.kernels)
    setting = bench.case.Setting("micro", 7, tmp_path, stand_in=True)
    with pytest.raises(ZeroDivisionError):
        bench.measure.time_case(case, setting, {name: dataclasses.replace(ours, build=lambda setting: work)}, 1)
    time_case = bench.measure.time_case
    monkeypatch.setattr(bench.measure, "time_case", lambda c, s, providers, *a, **k: time_case(
        c, s, {n: dataclasses.replace(p, build=lambda setting: work) if n == name and c.name == case.name else p for n, p in providers.items()}, *a, **k))
    assert bench.gpu.main(["--device", "cpu", "--dry-run", "--repeats", "1", "--only", "sparse_add", "--out", str(out)]) == 1
    others = {n for n in case.providers if n != name and not case.providers[n].compiled}
    assert others and {row["provider"] for row in json.loads(out.read_text()) if row["kernel_name"] == "sparse_add"} == others
    line = f"sparse_add: {name} is not measured: ZeroDivisionError: division by zero"
    assert line in capsys.readouterr().err and out.with_suffix(".md").read_text().split("## Red")[1].split("##")[0].count(line) == 1


@pytest.mark.parametrize("error", [RuntimeError("an illegal address\nsomewhere"), torch.OutOfMemoryError("20 GiB")], ids=["fails", "memory"])
@pytest.mark.parametrize("when", [2, 4, 5], ids=["first pass", "a sample", "behind the samples"])
def test_a_provider_that_fails_later_takes_nothing_from_the_others_either(bench, quick, tmp_path, error, when):  # noqa: F811
    """Two passes to warm up, two samples, then its memory."""
    runs, said, heard = [], [], []

    def run():
        runs.append(1)
        if len(runs) == when:
            raise error

    case, setting = one_case(bench, "full", fails=bench.case.Work(run, dict), lasts=bench.case.Work(int, dict)), bench.case.Setting("micro", 1, tmp_path)
    memory = {"memory": lambda name: run() if name == "fails" else 3.0}
    found = bench.measure.time_case(case, setting, dict(case.providers), 2, say=said.append, failed=heard.append, **memory)
    assert {row.provider for row in found} == {"lasts"} and {row.extra_config["repeats"] for row in found} == {2} and len(runs) == when
    lines = ["k: fails is not measured: RuntimeError: an illegal address"]
    assert (said, heard) == ((["k: fails is not measured: out of memory"], []) if type(error) is torch.OutOfMemoryError else (lines, lines))
    runs.clear()
    assert bench.measure.time_case(case, setting, {"fails": case.providers["fails"]}, 2, failed=heard.append, **memory) == []
    runs.clear()
    if type(error) is RuntimeError:  # there is nobody to hear of it
        with pytest.raises(RuntimeError, match="illegal address"):
            bench.measure.time_case(case, setting, dict(case.providers), 2, **memory)


def test_gpu_without_a_device_measures_nothing(bench, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.gpu.main([]) == 2
    assert capsys.readouterr() == ("", "no CUDA device here: not measured\n")


def test_the_place_of_a_run_s_rows_that_nobody_named_is_tried_as_well(bench, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True), monkeypatch.setattr(bench.gpu, "Run", lambda *given: pytest.fail("begun"))
    monkeypatch.setattr(bench.rows, "device_name", lambda device: "NVIDIA X"), monkeypatch.setattr(bench.rows, "slug", lambda device: "nvidia-x")
    monkeypatch.setattr(bench.gpu, "ROOT", Path("/proc/foo"))
    assert bench.gpu.main([]) == 2
    assert capsys.readouterr() == ("", "bench: /proc/foo/bench/results/nvidia-x.json: cannot be written: No such file or directory\n")


@pytest.mark.skipif(not HAVE_BOTH, reason="compares with transformers and peft, which are not installed")
def test_gpu_path_runs_on_a_cpu(bench, quick, capsys, tmp_path):  # noqa: F811
    out = tmp_path / "rows.json"
    assert bench.gpu.main(["--device", "cpu", "--dry-run", "--repeats", "1", "--out", str(out)]) == 0
    printed, said = capsys.readouterr()
    rows = json.loads(out.read_text())
    assert {row["kernel_name"] for row in rows} == {*CEILINGS, "lora_step", *bench.gpu.DRY}
    assert {(row["kernel_name"], row["metric_unit"]) for row in rows if row["kernel_name"] in ("gemm", "copy", "lora_step")} == {
        *((k, "ms") for k in ("gemm", "copy", "lora_step")), ("gemm", "TFLOP/s"), ("copy", "GB/s"), ("lora_step", "valid tokens/s"), ("lora_step", "TFLOP/s")}
    assert {row["provider"] for row in rows if row["kernel_name"] == "lora_step"} == {"transformers+peft", "transformers+peft, length-bucketed", "peftdebias", "peftdebias, CUDA graph"}
    assert {row["x_value"] for row in rows if row["kernel_name"] == "lora_step"} == {20, 48} and all(row["extra_config"]["dry_run"] for row in rows)
    for name in bench.gpu.DRY:  # every provider that needs no compiler and takes float32, each with its share of the roofline
        wanted = {n for n, p in bench.cases.CASES[name].providers.items() if not p.compiled and p.takes("float32")}
        assert {row["provider"] for row in rows if row["kernel_name"] == name and row["metric_name"] == "roofline"} == wanted
    assert "the figures mean nothing" in printed and "attention, micro, sequences 3: equal" in said and "adapter, micro, rows 37: equal in bf16" in said
    assert "adapter: plain twins stand in for peftdebias: Triton does not run on cpu" in said
    assert "## Targets" in printed and "\n## Not measured\n" in printed and "asked for at most 0.60" in printed and printed.split("# ", 1)[1].strip() in out.with_suffix(".md").read_text()


def test_every_kernel_has_a_case_and_every_case_a_place_in_the_gpu_run(bench):
    from peftdebias import kernels

    benched = {op for case in bench.cases.CASES.values() for p in case.providers.values() for op in p.kernels}
    assert benched == set(kernels.TRITON)
    cases = {name for name, case in bench.cases.CASES.items() if case.mode != "step"} - {"gemm", "copy", *bench.cases.NATIVE_CASES}
    assert cases == set(bench.gpu.TIMED) == set(bench.gpu.DRY) and {n for n in cases if bench.cases.CASES[n].rounded} == set(bench.gpu.CHECKED)


def test_a_kernel_that_errs_in_bf16_alone_is_red(bench, quick, monkeypatch, capsys):  # noqa: F811
    """Right in float32, three roundings off in bf16: that case is not timed, the ceilings are."""
    planted(bench, monkeypatch, "adapter_frozen", lambda r: {n: t * (1 + 3 * 2 ** -8) if t.dtype == torch.bfloat16 else t for n, t in r.items()})
    time_case = bench.measure.time_case
    monkeypatch.setattr(bench.measure, "time_case", lambda case, *a, **k: pytest.fail("timed") if case.name == "adapter_frozen" else time_case(case, *a, **k))
    assert bench.gpu.main(["--device", "cpu", "--dry-run", "--only", "adapter_frozen"]) == 1
    assert "adapter_frozen, micro, rows 13: peftdebias in bf16 errs more than twice what plain torch does in 3 of 3 tensors; not timed" in capsys.readouterr().out


def test_rows_of_some_cases_have_a_file_of_their_own(bench):
    named = lambda *argv: bench.gpu.file_name("nvidia-x", bench.gpu.parser().parse_args(argv))  # noqa: E731
    assert [named(), named("--steps"), named("--only", "lora,embed"), named("--steps", "--only", "lora_step", "--shapes", "128x128,32x128"), named("--size", "small", "--no-compile")] == [
        "nvidia-x.json", "nvidia-x-steps.json", "nvidia-x-lora+embed.json", "nvidia-x-steps-lora_step-128x128+32x128.json", "nvidia-x-small-uncompiled.json"]
    every, others = (",".join(bench.gpu.TIMED)[:many] for many in (None, -1))
    names = [bench.gpu.file_name("nvidia-x", bench.gpu.parser().parse_args(["--only", some])) for some in (every, others)]
    assert len(every) > 300 and all(len(name) < 120 for name in names) and names[0] != names[1]


def test_a_run_that_is_stopped_leaves_what_it_had_measured(bench, quick, monkeypatch, tmp_path):  # noqa: F811
    """Beside the place of the whole run's rows, which stays as it was."""
    time_case, out = bench.measure.time_case, tmp_path / "rows.json"

    def stopped(case, *rest, **options):
        if case.name == "sparse_add":
            raise KeyboardInterrupt
        return time_case(case, *rest, **options)

    out.write_text("an earlier run")
    words = ["--device", "cpu", "--dry-run", "--repeats", "1", "--only", "sparse_add", "--out", str(out)]
    with monkeypatch.context() as during, pytest.raises(KeyboardInterrupt):
        during.setattr(bench.measure, "time_case", stopped)
        bench.gpu.main(words)
    partial = tmp_path / "rows.partial.json"
    assert {row.kernel_name for row in bench.rows.read(partial)} == {"gemm", "copy"} and out.read_text() == "an earlier run"
    assert "the rest: the run did not come to its end" in partial.with_suffix(".md").read_text()
    assert bench.gpu.main(words) == 0
    assert {row.kernel_name for row in bench.rows.read(out)} == {*CEILINGS, "sparse_add"} and not list(tmp_path.glob("*.partial.*"))


def test_a_disk_that_fills_up_costs_no_figure(bench, quick, monkeypatch, capsys, tmp_path):  # noqa: F811
    """In between a line each time, and no case is red for it; in the end the tables are printed, and what was written in between stays."""
    write, full = bench.rows.write, {"rows.partial.json"}

    def filling(path, *given):
        if path.name in full:
            raise OSError(28, "No space left on device")
        write(path, *given)

    monkeypatch.setattr(bench.rows, "write", filling)
    words = ["--device", "cpu", "--dry-run", "--repeats", "1", "--only", "sparse_add", "--out", str(tmp_path / "rows.json")]
    assert bench.gpu.main(words) == 0 and json.loads((tmp_path / "rows.json").read_text())
    out, err = capsys.readouterr()
    assert err.count(f"bench: {tmp_path / 'rows.partial.json'}: cannot be written: No space left on device\n") == 4 and out.split("## Red: not equal, or failed\n\n")[1].startswith("- none\n")
    (tmp_path / "rows.json").unlink(), full.clear(), full.add("rows.json")
    assert bench.gpu.main(words) == 1 and {row.kernel_name for row in bench.rows.read(tmp_path / "rows.partial.json")} == {*CEILINGS, "sparse_add"}
    out, err = capsys.readouterr()
    assert "## sparse_add (full)" in out and err.endswith(f"timing\nbench: {tmp_path / 'rows.json'}: cannot be written: No space left on device\n")


def test_out_of_time_leaves_out_and_says_so(bench, quick, capsys):  # noqa: F811
    assert bench.gpu.main(["--device", "cpu", "--dry-run", "--repeats", "1", "--only", "sparse_add", "--compile", "--minutes", "1e-9"]) == 2
    said = capsys.readouterr().err
    assert "sparse_add: plain torch, compiled is not measured: " in said and "sparse_add, micro, weight_rows 7: not measured: the run has used 90% of its time" in said
    assert said.endswith("bench: --minutes 1e-09: too little for any figure\n")


def test_what_is_left_out_stands_beside_the_rows(bench, quick, monkeypatch, capsys, tmp_path):  # noqa: F811
    out = tmp_path / "rows.json"
    monkeypatch.setattr(bench.gpu.Clock, "reason", lambda clock: "no time for it")
    assert bench.gpu.main(["--device", "cpu", "--dry-run", "--repeats", "1", "--only", "sparse_add", "--compile", "--out", str(out)]) == 0
    line = "sparse_add: plain torch, compiled is not measured: no time for it"
    assert all(text.split("## Not measured")[1].count(line) == 1 for text in (capsys.readouterr().out, out.with_suffix(".md").read_text()))


# ---------------------------------------------------------------- what a GPU adds, without one

@pytest.fixture
def pretend(bench, monkeypatch):
    """The calls that need a GPU answer something; what is launched runs. Returns what was launched, in order."""
    launched = []

    class Graph:
        def __init__(self, run):
            self.run = run

        def replay(self):
            launched.append(self.run())

    def graphed(run, device):
        if run() == "no":
            try:
                raise RuntimeError("operation not permitted\nwhen capturing")
            except RuntimeError:
                raise RuntimeError("capture cannot be ended")
        return Graph(run)

    bench.measure.clock_ms.cache_clear()
    monkeypatch.setattr(bench.measure, "clock_ms", lambda device: 0.002)
    monkeypatch.setattr(bench.measure, "draws", lambda graph, device: graph.run() == "draws")
    monkeypatch.setattr(bench.measure, "seeding_ms", lambda device: 100.0)
    monkeypatch.setattr(bench.measure, "graphed", graphed)
    monkeypatch.setattr(bench.measure, "cuda_seconds", lambda launch, passes, device: (launch(), (0.5, 1))[1])
    monkeypatch.setattr(bench.measure, "_finish", lambda device: None)
    monkeypatch.setattr(bench.measure, "cuda_peak", lambda work, device: 3.0)
    monkeypatch.setattr(bench.measure, "_settled", lambda device: 2 ** 20)
    monkeypatch.setattr(bench.rows, "device_name", lambda device: "NVIDIA X")
    for name, mib in (("max_memory_allocated", 11), ("memory_reserved", 4), ("max_memory_reserved", 22)):
        monkeypatch.setattr(torch.cuda, name, lambda device=None, mib=mib: mib * 2 ** 20)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return launched


def one_case(bench, mode, **works):
    return bench.case.Case("k", mode, "what", {name: bench.case.Provider(lambda setting, work=work: work) for name, work in works.items()}, "rows", (1,), bench.case.output_bound)


def test_on_a_gpu_an_op_has_two_times_and_without_a_graph_that_is_said(bench, quick, pretend, tmp_path):  # noqa: F811
    op = dict(results=dict, roof=((0.0, 1e6),))
    case = one_case(bench, "full", plain=bench.case.Work(lambda: "whole", **op), ours=bench.case.Work(lambda: "whole", capture=lambda: "device", **op),
                    theirs=bench.case.Work(lambda: "draws", **op), other=bench.case.Work(lambda: "no", **op), ceiling=bench.case.Work(lambda: "whole", dict))
    said, setting = [], bench.case.Setting("micro", 1, tmp_path, torch.device("cuda"))
    rows = {(row.provider, row.metric_name): row for row in bench.measure.time_case(case, setting, dict(case.providers), 2, say=said.append)}
    assert said == ["k: other: no CUDA graph, so its time is that of an eager launch, the host's work among it: RuntimeError: operation not permitted"]
    assert sorted(pretend) == ["device", "device", "draws", "draws", "whole", "whole"]  # two repeats of each graph
    for name, timed, ms in (("plain", "graph", 500), ("ours", "graph", 500), ("theirs", "graph", 400), ("other", "eager", 500)):
        row = rows[name, "time"]
        assert row.extra_config.get("seeding_ms") == (100 if name == "theirs" else None)
        assert row.y_50 == pytest.approx(ms) and row.extra_config["timed"] == timed and row.extra_config["late_launches"] == 2 and row.extra_config["clock_ms"] == 0.002
        assert row.extra_config["host_ms"] >= 0 and rows[name, "eager time"].y_50 < 500 and rows[name, "peak memory"].y_50 == 3
    assert rows["ceiling", "time"].y_50 < 500 and ("ceiling", "eager time") not in rows and "timed" not in rows["ceiling", "time"].extra_config
    lines = bench.rows.table(list(rows.values())).splitlines()
    assert [line.split("|")[5].strip() for line in lines if line.startswith("| micro | 1 | ") and "ceiling" not in line] == ["1.00", "1.00", "0.80", "by the host"]
    heads = next(line for line in lines if line.startswith("| size"))
    assert heads.startswith("| size | rows | provider | time, ms | of baseline | eager time, ms |")


@pytest.mark.parametrize("device,untimed", [("cuda", ["a", "b"]), ("cpu", [])])
def test_on_a_gpu_all_run_once_between_the_last_that_is_built_and_the_first_sample(bench, quick, pretend, monkeypatch, tmp_path, device, untimed):  # noqa: F811
    """Building a step gives the device back what torch holds in store; who was built before pays for that outside of its samples."""
    did = []
    case = one_case(bench, "step", a=bench.case.Work(lambda: did.append("a"), dict), b=bench.case.Work(lambda: did.append("b"), dict))
    monkeypatch.setattr(bench.measure, "seconds", lambda work, passes, device: did.append("timed") or work.run() or 1.0)
    bench.measure.time_case(case, bench.case.Setting("micro", 1, tmp_path, torch.device(device)), dict(case.providers), 1)
    first = 3 if device == "cuda" else 1
    assert did == [*first * ["timed", "a"], *first * ["timed", "b"], *untimed, "timed", "a", "timed", "b"]


def test_what_a_replay_does_for_torchs_generator_is_measured_beside_the_clock(bench, monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.get_rng_state())
    assert [bench.measure.draws(types.SimpleNamespace(replay=run), device) for run in (lambda: torch.rand(1), lambda: torch.ones(1))] == [True, False]
    spent = iter([9e-6, 7e-6, 8e-6])
    monkeypatch.setattr(bench.measure, "graphed", lambda run, device: types.SimpleNamespace(replay=run))
    monkeypatch.setattr(bench.measure, "cuda_seconds", lambda launch, passes, device: (launch(), (next(spent), 0))[1])
    monkeypatch.setattr(bench.measure, "clock_ms", lambda device: 0.004)
    bench.measure.seeding_ms.cache_clear()
    assert bench.measure.seeding_ms(device) == pytest.approx(0.003)
    bench.measure.seeding_ms.cache_clear()


def test_no_case_is_begun_that_would_end_too_late(bench, monkeypatch, tmp_path):
    def time_case(case, *others, **named):
        clock.started -= 350
        return []

    monkeypatch.setattr(bench.measure, "time_case", time_case)
    case, said, clock = one_case(bench, "full", plain=bench.case.Work(lambda: None, dict)), [], bench.gpu.Clock(1000 / 60, steps=False)
    entries = [(case, bench.case.Setting("micro", x, tmp_path, torch.device("cpu"))) for x in (1, 2, 3)]
    bench.gpu.timed(entries, {"k": case.providers}, {}, 1, clock, {}, lambda key: None, said.append)
    assert said == ["k, micro, rows 1: timing", "k, micro, rows 2: timing", "k, micro, rows 3: not measured: the run has 300 s left, and a case took 350"]
    clock.started -= 100.5
    assert clock.full(100) == "" and clock.full(300) == "the run has 199 s left, and a case took 300"
    clock.started -= 100
    assert clock.full(0) == "the run has used 90% of its time"


def test_what_others_compile_and_differs_is_not_timed_and_the_rest_is(bench, quick, monkeypatch, capsys, tmp_path):  # noqa: F811
    plain = next(iter(bench.cases.CASES["sparse_add"].providers.values()))
    monkeypatch.setitem(bench.cases.CASES["sparse_add"].providers, "plain torch, compiled", dataclasses.replace(plain, compiled=True))
    planted(bench, monkeypatch, "sparse_add", lambda results: {name: tensor + 1 for name, tensor in results.items()}, "plain torch, compiled")
    words, out = ["--device", "cpu", "--dry-run", "--compile", "--repeats", "1", "--only", "sparse_add"], tmp_path / "rows.json"
    line = "plain torch, compiled is not measured: it differs from what is not compiled"
    assert bench.gpu.main([*words, "--check"]) == 0 and capsys.readouterr().out == f"sparse_add, 7: {line}\n"
    assert bench.gpu.main([*words, "--out", str(out)]) == 0 and f"sparse_add: {line}" in capsys.readouterr().err
    assert {row["provider"] for row in json.loads(out.read_text()) if row["kernel_name"] == "sparse_add"} == {*bench.cases.CASES["sparse_add"].providers} - {"plain torch, compiled"}
    assert out.with_suffix(".md").read_text().split("## Not measured")[1].count(line) == 1


def test_a_launch_that_the_device_waited_for_does_not_count(bench, monkeypatch):
    """Unless all did."""
    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            pass

        def query(self):
            return next(late)

        def elapsed_time(self, end):
            return next(spent)

    monkeypatch.setattr(torch.cuda, "Event", Event), monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(bench.measure, "FLUSH", 8)
    for answers, expected in (([True, False, False], (2.0, 1)), ([True, True, True], (5.0, 3))):
        late, spent = iter(answers), iter([11000.0, 1000.0, 3000.0])
        assert bench.measure.cuda_seconds(int, 3, torch.device("cpu")) == expected


def test_the_peak_of_an_op_is_above_what_lay_there(bench, monkeypatch):
    for name, found in (("synchronize", None), ("reset_peak_memory_stats", None), ("memory_allocated", 3 * 2 ** 20), ("max_memory_allocated", 5 * 2 ** 20)):
        monkeypatch.setattr(torch.cuda, name, lambda device, found=found: found)
    assert bench.measure.cuda_peak(bench.case.Work(int, dict), torch.device("cuda")) == 2


def test_the_lower_quantile_of_an_eager_launch_is_the_faster_one(bench, quick, pretend, monkeypatch, tmp_path):  # noqa: F811
    case, spent = one_case(bench, "full", ours=bench.case.Work(int, dict, roof=((0.0, 1e6),))), iter([100.0, 100.0, *range(1, 7)])
    monkeypatch.setattr(bench.measure, "seconds", lambda work, passes, device: next(spent))
    rows = {row.metric_name: row for row in bench.measure.time_case(case, bench.case.Setting("micro", 1, tmp_path, torch.device("cuda")), dict(case.providers), 6)}
    assert (rows["eager time"].y_20, rows["eager time"].y_50, rows["eager time"].y_80) == pytest.approx((2000, 3500, 5000))


def test_on_a_gpu_the_peak_of_a_step_is_that_of_its_first_passes(bench, quick, pretend, monkeypatch, tmp_path):  # noqa: F811
    """Building leaves 1 MiB, the passes reach 11, and 2 MiB of AdamW's state were there before; torch held 4 MiB of the device, and 22 in the end."""
    runs = []
    case = one_case(bench, "step", ours=bench.case.Work(lambda: runs.append(1), dict, state=2 ** 21))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 11 * 2 ** 20 if len(runs) == 3 else pytest.fail("read before the third pass, or after it"))
    rows = {row.metric_name: row for row in bench.measure.time_case(case, bench.case.Setting("micro", 1, tmp_path, torch.device("cuda")), dict(case.providers), 2)}
    assert set(rows) == {"time", "peak memory", "reserved memory"} and rows["peak memory"].y_50 == 12 and rows["reserved memory"].y_50 == 20 and rows["time"].extra_config["built_mib"] == 0 and not pretend


def test_what_takes_most_memory_in_training_is_in_the_peak_of_a_step(bench, quick, pretend, monkeypatch, tmp_path):  # noqa: F811
    """A step of a new shape beside those captured, behind the passes; what a compiled provider's first pass takes beyond the others is not."""
    runs, settled = [], []
    providers = {"ours": bench.case.Provider(lambda setting: bench.case.Work(lambda: runs.append("run"), dict, most=lambda: runs.append("most"))),
                 "theirs": bench.case.Provider(lambda setting: bench.case.Work(lambda: runs.append("compiled"), dict), compiled=True)}
    case = dataclasses.replace(one_case(bench, "step"), providers=providers)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device=None: (30 if runs[-1] == "most" else 22) * 2 ** 20)
    monkeypatch.setattr(bench.measure, "_settled", lambda device: settled.append(list(runs)) or 0)
    monkeypatch.setattr(torch.profiler, "profile", lambda **how: pytest.fail("profiled between the times, where it stays attached"))
    rows = {(row.provider, row.metric_name): row for row in bench.measure.time_case(case, bench.case.Setting("micro", 1, tmp_path, torch.device("cuda")), dict(providers), 1)}
    assert runs[:4] == ["run"] * 3 + ["most"] and rows["ours", "reserved memory"].y_50 == 26 and rows["ours", "time"].extra_config["reserved_by_passes_mib"] == 18
    assert settled[2:] == [runs[:4], runs[:4], [*runs[:4], "compiled"]] and rows["theirs", "reserved memory"].y_50 == 18


def test_the_device_s_own_time_of_the_two_that_a_target_compares_is_taken_when_all_timing_is_over(bench, monkeypatch, tmp_path, capsys):
    """Of each that has rows, in all of them; one that fails, or has no time, is a line and nothing else."""
    gpu, asked, setting = bench.gpu, [], bench.case.Setting("micro", 1, tmp_path)
    case = dataclasses.replace(one_case(bench, "step", theirs=None, other=None), name="k 2x2")
    case = dataclasses.replace(case, providers=case.providers | {f"peftdebias{more}": bench.case.Provider(int) for more in ("", ", CUDA graph", ", frozen module folded")})
    entries = [(dataclasses.replace(case, name=name), dataclasses.replace(setting, x=x)) for name, x in (("k 2x2", 1), ("k 2x2", 2), ("k 3x3", 1))]

    def measured():
        ms = {"theirs": 9, "other": 8, "peftdebias": 5, "peftdebias, CUDA graph": 4, "peftdebias, frozen module folded": 3}
        return [bench.rows.Row(case.name, p, "step", metric, "", "rows", s.x, y, y, y, {"baseline": "theirs", "longest": 2}, "d", "t", None, "c", "2026")
                for case, s in entries for p, y in ms.items() for metric in ("time", "rate") if (case.name, p) != ("k 3x3", "theirs")]

    def busy_ms(case, setting, provider):
        asked.append((case.name, setting.x, next(name for name, p in case.providers.items() if p is provider)))
        return {1: 7.0, 2: None}[setting.x] if asked[-1][2] != "theirs" else 1 / 0

    monkeypatch.setattr(bench.measure, "busy_ms", busy_ms)
    found = measured()
    gpu.busy(entries, {"k": case.providers}, found, gpu.Clock(8, True))
    graph = "peftdebias, CUDA graph"
    assert asked == [("k 2x2", 1, "theirs"), ("k 2x2", 1, graph), ("k 2x2", 2, "theirs"), ("k 2x2", 2, graph), ("k 3x3", 1, graph)]
    assert {(row.kernel_name, row.x_value, row.provider, row.metric_name): row.extra_config["busy_ms"] for row in found if "busy_ms" in row.extra_config} == {
        (name, 1, graph, metric): 7.0 for name in ("k 2x2", "k 3x3") for metric in ("time", "rate")}
    assert capsys.readouterr().err == "".join(f"k 2x2, micro, rows {x}: theirs: no busy_ms: ZeroDivisionError: division by zero\n" for x in (1, 2))
    asked.clear(), gpu.busy(entries, {"k": case.providers}, measured(), gpu.Clock(1e-9, True))
    assert not asked and capsys.readouterr().err == "k 2x2, micro, rows 1: theirs: no busy_ms, nor of what follows: the run has used 90% of its time\n"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True), monkeypatch.setattr(bench.lineup, "taking_part", lambda *a: {})
    monkeypatch.setattr(bench.rows, "device_name", lambda device: "NVIDIA X"), monkeypatch.setattr(gpu.Run, "equality", lambda run, clock: ({}, {}))
    monkeypatch.setattr(gpu, "timed", lambda *a, **k: asked.append("timed") or measured()), monkeypatch.setattr(gpu, "busy", lambda *a: asked.append("busy"))
    assert gpu.main(["--no-apart", "--steps", "--only", "lora_step", "--out", str(tmp_path / "rows.json")]) == 0 and asked == ["timed", "busy"]


def test_what_the_device_works_is_of_a_step_of_a_provider_that_is_built_anew(bench, monkeypatch, tmp_path):
    runs, seen = [], []
    events = [types.SimpleNamespace(self_device_time_total=us) for us in (2500, 1500)]
    monkeypatch.setattr(torch.profiler, "profile", lambda **how: seen.append(len(runs)) or contextlib.nullcontext(types.SimpleNamespace(key_averages=lambda: events)))
    monkeypatch.setattr(bench.measure, "_finish", lambda device: None)
    case, setting = one_case(bench, "step", ours=bench.case.Work(lambda: runs.append(1), dict, steps=2)), bench.case.Setting("micro", 1, tmp_path, torch.device("cuda"))
    assert bench.measure.busy_ms(case, setting, case.providers["ours"]) == 2 and (seen, len(runs)) == ([3], 4)  # behind what captures and compiles
    events.clear()
    assert bench.measure.busy_ms(case, setting, case.providers["ours"]) is None


def test_a_graph_s_most_is_its_longest_batch_run_eagerly(bench, monkeypatch, tmp_path):
    setting, asked = bench.case.Setting("micro", 20, tmp_path, batches=3, longest=48, sequences=4), []
    assert bench.cases_steps.ours("lora", "graph")(setting).most is None  # nothing is captured on a CPU
    step = types.SimpleNamespace(loss=None, eagerly=lambda batch, rate: asked.append(len(batch.ids)))
    monkeypatch.setitem(bench.cases_steps.training.STEPS, "graph", lambda *given, **how: step)
    model = bench.cases_steps.load_model(bench.cases_steps.model_folder(setting))[0]
    monkeypatch.setattr(bench.cases_steps, "loaded", lambda key, load, setting: model)
    monkeypatch.setattr(model, "to", lambda device: model)
    for module in ("training.make_optimizer", "rounded_beforehand"):
        monkeypatch.setattr(f"bench.cases_steps.{module}", lambda *given, **how: contextlib.nullcontext())
    optimizer = types.SimpleNamespace(flat=(), state={}, param_groups=[])
    monkeypatch.setattr(bench.cases_steps.training, "make_optimizer", lambda *given: optimizer)
    bench.cases_steps.ours("lora", "graph")(dataclasses.replace(setting, device=torch.device("cuda"))).most()
    assert asked == [max(sum(len(s.ids) for s in batch) for batch in bench.cases_steps.texts(setting))]


def test_what_is_compiled_answers_for_itself(bench, monkeypatch, tmp_path):
    """The tensors that are compared are those of the compiled function, not of the plain one beside it."""
    setting = bench.case.Setting("micro", 20, tmp_path, batches=2, longest=48, sequences=4, dropout=0.0)
    monkeypatch.setattr(torch, "compile", lambda function, **how: lambda *given: 3 * function(*given))
    found = {kind: bench.cases_steps.ours("lora", kind)(setting).results() for kind in ("eager", "compiled")}
    for name, expected in found["eager"].items():
        torch.testing.assert_close(found["compiled"][name], 3 * expected, rtol=2e-4, atol=1e-7)


@pytest.mark.skipif(not HAVE_BOTH, reason="transformers and peft are not installed")
def test_a_base_in_bf16_trains_without_autocast(bench, monkeypatch, tmp_path):
    """On a GPU alone, and at the foremost shape; A and B stay in float32."""
    case, setting = bench.cases.CASES["lora_step"], bench.case.Setting("micro", 20, tmp_path, precision="bf16", batches=2, longest=48, sequences=4, dropout=0.0)
    name = "transformers+peft, base in bf16"
    assert name in bench.lineup.taking_part(case, False, print, "cuda", True) and name not in bench.lineup.taking_part(case, False, print, "cpu")
    monkeypatch.setattr(bench.cases_steps, "autocast", lambda setting: pytest.fail("under autocast"))
    work = case.providers[name].build(setting)
    work.run()
    found = work.results()
    monkeypatch.undo()
    expected = case.providers["transformers+peft"].build(setting).results()
    assert 0 < abs(float(found["loss"] - expected["loss"])) < 0.02 and {t.dtype for key, t in found.items() if key != "loss"} == {torch.float32}


def test_a_loaded_base_is_copied_for_a_gpu(bench, tmp_path):
    steps = bench.cases_steps
    made, on = [], {device: bench.case.Setting("micro", 20, tmp_path, torch.device(device)) for device in ("cuda", "cpu")}

    def load():
        made.append(steps.load_model(steps.model_folder(on["cpu"]))[0])
        return made[-1]

    a, b = (steps.loaded((tmp_path, "ours"), load, on["cuda"]) for _ in range(2))
    assert len(made) == 1 and len({id(m) for m in (a, b, made[0])}) == 3
    values = [dict(m.named_parameters()) for m in (a, b, made[0])]
    assert values[0].keys() == values[1].keys() == values[2].keys() and len({p.data_ptr() for v in values for p in v.values()}) == 3 * len(values[0])
    assert all(torch.equal(values[0][name], p) for name, p in values[2].items())
    assert steps.loaded((tmp_path, "ours"), load, on["cpu"]) is made[1]


def test_steps_begin_with_what_matters_most(bench, tmp_path):
    def names(entries):
        return [(case.name, setting.x) for case, setting in entries]

    to_check, timed = bench.gpu.step_plan(torch.device("cpu"), "base", False, tmp_path)
    assert [case.name for case, _ in timed[:3]] == ["gemm", "gemm", "copy"]
    assert names(timed[-1:]) == [("gemm at the end", 8192)]
    steps = timed[3:-1]
    assert names(steps[:8]) == [("lora_step 128x128", 51), ("lora_step 128x128", 128), ("lora_step 128x256", 102), ("lora_step 128x256", 256), ("lora_step 32x128", 51),
                                ("lora_step 32x128", 128), ("adapter_step 128x128", 51), ("adapter_step 128x128", 128)]
    assert len(steps) == len(set(names(steps))) == 4 * 3 * 2
    for case, setting in steps:
        method, shape = case.name.split()
        known, first = bench.cases.CASES[method].providers, shape == "128x128"
        left = {f"{case.baseline}, length-bucketed"} if setting.x == setting.longest else set()
        left |= {"peftdebias, compiled", f"{case.baseline}, base in bf16"} if method != "lora_step" or not first else set()
        assert list(case.providers) == [name for name in known if name not in left] and f"{setting.sequences}x{setting.longest}" == shape
    assert names(to_check) == [(f"{method}_step 32x128", 51) for method in ("lora", "adapter", "prefix", "full")]  # the smallest
    assert [any(p.compiled for p in case.providers.values()) for case, _ in to_check] == [True, False, False, False]
    to_check, _ = bench.gpu.step_plan(torch.device("cpu"), "base", False, tmp_path, compiled=False)
    assert not any(p.compiled for case, _ in to_check for p in case.providers.values())
    to_check, timed = bench.gpu.step_plan(torch.device("cpu"), "base", False, tmp_path, ("32x128", "128x256"))
    assert [name for name, _ in names(timed[3:])][:6:2] == ["lora_step 128x256", "lora_step 32x128", "adapter_step 128x256"]
    only = bench.gpu.chosen(timed, "full_step")
    assert names(only[3:-1]) == [("full_step 128x256", 102), ("full_step 128x256", 256), ("full_step 32x128", 51), ("full_step 32x128", 128)]
    providers = {case.name: case.providers for case, _ in timed}
    assert bench.gpu.compiled_at(timed, {name: case.providers for name, case in bench.cases.CASES.items()})[:5] == [
        ("lora_step 128x256", 102, "transformers+peft, compiled"), ("lora_step 128x256", 102, "peftdebias, compiled"), ("lora_step 128x256", 256, "transformers+peft, compiled"),
        ("lora_step 128x256", 256, "peftdebias, compiled"), ("lora_step 32x128", 51, "transformers+peft, compiled")] and "peftdebias, compiled" not in providers["lora_step 32x128"]
    for compiled in (True, False):  # of a step; a single op is compared compiled as well
        to_check, timed = bench.gpu.plan(torch.device("cpu"), "base", False, tmp_path, compiled)  # a single op at its last size
        assert {case.name for case, _ in to_check if any(p.compiled for p in case.providers.values())} >= {"gelu"}
        assert [(setting.x, any(p.compiled for p in case.providers.values())) for case, setting in to_check if case.name == "lora_step"] == [(54, compiled), (128, compiled)]
        keys = bench.gpu.compiled_at(timed, {name: case.providers for name, case in bench.cases.CASES.items()})
        assert [key for key in keys if key[0] == "gelu"] == [("gelu", 65536, "plain torch, compiled")]
        assert {(x, name) for case, x, name in keys if case == "lora_step"} == {(x, name) for x in (54, 128) for name in ("transformers+peft, compiled", *["peftdebias, compiled"] * compiled)}


@pytest.mark.skipif(not HAVE_BOTH, reason="compares with transformers and peft, which are not installed")
def test_a_method_that_is_not_equal_is_timed_at_no_shape(bench, quick, monkeypatch, capsys, tmp_path):  # noqa: F811
    planted(bench, monkeypatch, "adapter_step", lambda r: {**r, "loss": r["loss"] + 1})
    monkeypatch.setattr(bench.gpu, "unlike_the_cpu", lambda *_: {})
    out = tmp_path / "rows.json"
    assert bench.gpu.main(["--device", "cpu", "--dry-run", "--steps", "--repeats", "1", "--only", "lora_step,adapter_step", "--out", str(out)]) == 1
    assert "adapter_step 4x48, micro, mean_length 19: peftdebias differs from transformers, adapters by hand" in capsys.readouterr().out
    rows = json.loads(out.read_text())
    assert {row["kernel_name"] for row in rows} == {*CEILINGS, "lora_step 4x48"}
    providers = {x: {row["provider"] for row in rows if row["kernel_name"] == "lora_step 4x48" and row["x_value"] == x} for x in (19, 48)}
    assert providers[19] - providers[48] == {"transformers+peft, length-bucketed"} and "peftdebias, CUDA graph" in providers[48]


def test_both_phases_against_the_twins_and_in_the_loop_with_its_validations(bench, tmp_path, monkeypatch):
    curves, said = bench.gpu.curves, []
    assert curves.check(torch.device("cpu"), tmp_path, 3, "micro", phases=("lora", "full"), say=said.append) == []
    assert [line.split(":")[0] for line in said[1::2]] == ["lora, float32, eager, the loop of training.py", "full, float32, eager, the loop of training.py"]
    setting = bench.case.Setting("micro", 40, tmp_path, torch.device("cpu"), "bf16", dropout=0.0, sequences=4, longest=64, batches=2)
    assert curves.whole(setting, "adapter", 2, "eager", say=said.append) == []
    monkeypatch.setattr(curves.training, "autocast", lambda *_: contextlib.nullcontext())
    (red,) = curves.whole(setting, "adapter", 2, "eager", say=said.append)
    assert red.startswith("adapter, bf16, eager, the loop of training.py: RuntimeError: ")


def test_curves_that_part_are_red(bench):
    curves, nan = bench.gpu.curves, float("nan")
    first = {"a": torch.tensor([1.0, 0.0], dtype=torch.float64)}
    wanted = curves.Curve(60 * [1.0], first)

    def red(losses, gradients=first, precision="float32"):
        return curves.trouble(curves.Curve(losses, gradients), wanted, precision)[0]

    def turned(cosine):
        return {"a": torch.tensor([cosine, (1 - cosine ** 2) ** 0.5], dtype=torch.float64)}

    assert red(60 * [1.0]) == red(60 * [1.005], turned(0.995), "bf16") == []
    assert red(55 * [1.0] + 5 * [1.001]) == red(55 * [1.0] + [1.001] + 4 * [1.0]) == ["loss over all steps: off by 0.001, allowed 0.0001"]
    assert red(60 * [1.00005]) == ["loss over the first 50 steps: off by 5e-05, allowed 1e-05"] and len(red(60 * [nan])) == 2
    assert red(60 * [1.0], {}) == ["gradients: expected those of 1 parameters, got 0", "gradient of a: nan of what is allowed"]
    assert red(60 * [1.0], {"a": nan * first["a"]}) == ["gradient of a: nan of what is allowed"]
    assert red(60 * [1.0], turned(0.98), "bf16") == ["gradient of a: 2 of what is allowed"]


def test_a_validation_that_rises_in_the_loop_is_red(bench, monkeypatch, tmp_path):
    curves, found = bench.gpu.curves, types.SimpleNamespace(before={"loss": 1.0}, best={"loss": 1.02})
    monkeypatch.setattr(curves, "begun", lambda setting, phase: (None, {}, [[]], None)), monkeypatch.setattr(curves.training, "train", lambda *_, **__: found)
    setting = bench.case.Setting("micro", 40, tmp_path)
    assert curves.whole(setting, "lora", 2, "eager", say=lambda line: None) == [
        "lora, float32, eager, the loop of training.py: validation 1.0000 before, 1.0200 at best in 2 steps"]
    found.best["loss"] = 1.009
    assert curves.whole(setting, "lora", 2, "eager", say=lambda line: None) == []


def test_curves_are_held_against_the_twins_on_the_cpu(bench, monkeypatch, tmp_path):
    asked, curves = [], bench.gpu.curves
    monkeypatch.setattr(curves, "curve", lambda setting, phase, steps, implementation, *_, **__: (asked.append((setting.device.type, implementation)), curves.Curve([1.0], {}))[1])
    monkeypatch.setattr(curves, "whole", lambda *_: [])
    assert curves.check(torch.device("cpu"), tmp_path, 1, "micro", phases=("lora",), say=lambda line: None) == [] and asked == [("cpu", "torch"), ("cpu", "auto")]


def test_the_base_of_the_curves_is_updated_as_a_whole_base_is(bench):
    """On a device the 200 steps of `full` are what shows WholeAdamW in captured steps: its model must be larger than what is gathered into one tensor."""
    with torch.device("meta"):
        model = bench.gpu.curves.Model(bench.case.SIZES["tiny"].encoder_config(0.0), labels=("a", "b"))
    assert sum(p.numel() for p in model.parameters()) > bench.gpu.curves.training.FLAT["triton"]


@pytest.mark.skipif(not HAVE_BOTH, reason="compares with transformers and peft, which are not installed")
def test_a_method_whose_losses_leave_those_of_the_cpu_is_not_timed(bench, quick, monkeypatch, capsys, tmp_path):  # noqa: F811
    monkeypatch.setattr(bench.gpu.curves, "check", lambda *_, phases, **__: ["lora, float32, eager: loss over all steps: off by 1"] if phases == ("lora",) else [])
    out = tmp_path / "rows.json"
    assert bench.gpu.main(["--device", "cpu", "--dry-run", "--steps", "--repeats", "1", "--only", "lora_step,prefix_step", "--out", str(out)]) == 1
    assert "- lora, float32, eager: loss over all steps: off by 1" in capsys.readouterr().out
    assert {row["kernel_name"] for row in json.loads(out.read_text())} == {*CEILINGS, "prefix_step 4x48"}


def test_a_red_check_ends_red_whatever_is_timed(bench, quick, monkeypatch, capsys):  # noqa: F811
    """Without any timing, and where there was time for none."""
    planted(bench, monkeypatch, "sparse_add", lambda r: {name: t + 1 for name, t in r.items()})
    words = ["--device", "cpu", "--dry-run", "--repeats", "1", "--only", "sparse_add"]
    for more in ["--check"], ["--minutes", "1e-9"]:
        assert bench.gpu.main([*words, *more]) == 1
        printed = capsys.readouterr().out
        assert printed.startswith("sparse_add, micro, weight_rows 7: peftdebias differs from ") and "equal" not in printed and "|" not in printed.replace("max|difference|", "")


def test_a_row_has_the_share_of_its_own_case_and_a_shape_that_fails_is_red_alone(bench, monkeypatch, tmp_path):
    gelu, norm = (dataclasses.replace(bench.cases.CASES[name], name=f"{name} 1x1", mode="step") for name in ("gelu", "norm"))
    other, seen, red = dataclasses.replace(gelu, name="gelu 2x2"), [], {}

    def time_case(case, setting, providers, repeats, *, shares, say, failed):
        seen.append((case.name, setting.x, shares))
        return 1 / 0 if case is gelu else []

    monkeypatch.setattr(bench.measure, "time_case", time_case)
    entries = [(case, bench.case.Setting("micro", x, tmp_path)) for case, x in ((gelu, 1), (gelu, 2), (other, 1), (other, 2), (norm, 3))]
    shares = {("norm", 1): {"ours": 0.1}, ("gelu", 2): {"ours": 0.2}}
    assert bench.gpu.timed(entries, {"gelu": {}, "norm": {}}, shares, 1, bench.gpu.Clock(8, False), red, lambda key: "", lambda line: None) == []
    assert seen == [("gelu 1x1", 1, {"ours": 0.2}), ("gelu 1x1", 2, {"ours": 0.2}), ("gelu 2x2", 1, {"ours": 0.2}), ("gelu 2x2", 2, {"ours": 0.2}), ("norm 1x1", 3, {"ours": 0.1})]
    assert red == {"gelu 1x1": "\n".join(f"gelu 1x1, micro, rows {x}: ZeroDivisionError: division by zero" for x in (1, 2))}
    seen.clear()  # what was red before any timing is not timed
    assert bench.gpu.timed(entries, {"gelu": {}, "norm": {}}, shares, 1, bench.gpu.Clock(8, False), {"gelu 1x1": "failed", "norm": "unequal"}, lambda key: "", lambda line: None) == []
    assert [name for name, *_ in seen] == ["gelu 2x2"] * 2


def test_on_a_gpu_all_is_measured_in_bf16_and_steps_are_of_the_texts_that_are_said(bench, tmp_path):
    device = torch.device("cuda")
    for made in (bench.gpu.plan, bench.gpu.step_plan):
        checks, timed = made(device, "base", False, tmp_path)
        assert all((s.precision, s.device, s.size_name, s.stand_in) == ("bf16", device, "base", False) for _, s in checks + timed)
        steps = {(s.x, s.sequences, s.longest, s.batches) for case, s in timed if bench.gpu.stem(case) == "lora_step"}
        assert steps == ({(54, 32, 128, None), (128, 32, 128, None)} if made is bench.gpu.plan else
                         {(51, 128, 128, 8), (128, 128, 128, 2), (102, 128, 256, 8), (256, 128, 256, 2), (51, 32, 128, 8), (128, 32, 128, 2)})


@pytest.mark.parametrize("words", [[], ["--steps"]], ids=["ops", "steps"])
def test_before_a_timing_on_a_gpu_no_step_is_compiled_to_be_compared_and_steps_are_checked_first(bench, monkeypatch, tmp_path, words):
    calls = []
    monkeypatch.setattr(bench.lineup, "taking_part", lambda *given: {}), monkeypatch.setattr(bench.gpu, "together", lambda made, *given: calls.extend(made) or [None] * len(made))
    for more, expected in ((["--check"], True), ([], False)):
        run = bench.gpu.Run(bench.gpu.parser().parse_args([*words, *more, "--only", "gelu,embed,lora_step,full_step"]), tmp_path)
        assert any(p.compiled for case, _ in run.to_check if case.mode == "step" for p in case.providers.values()) == expected
    run.device = torch.device("cpu")
    bench.gpu.beforehand(run, bench.gpu.Clock(8, False))
    assert [call[1][2] for call in calls] == (["lora_step", "full_step"] if words else ["lora_step", "embed", "gelu"])


def test_equality_is_asked_in_float32_itself(bench, tmp_path):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        bench.gpu.Run(bench.gpu.parser().parse_args(["--device", "cpu", "--dry-run", "--only", "sparse_add"]), tmp_path)
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


def test_as_many_processes_as_the_memory_has_room_for_and_what_is_not_compiled_is_not_timed(bench, tmp_path, monkeypatch):
    asked, answers = [], {}
    monkeypatch.setattr(bench.gpu, "together", lambda calls, workers, most: asked.append(workers) or [
        answers.get(call[1][2:4]) if call[0].endswith("compile_job") else ({}, {}) for call in calls])
    monkeypatch.setattr(bench.gpu.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(bench.gpu.torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(total_memory=41 * 2 ** 30))
    for words, only, expected, wrong in ((["--steps"], "lora_step", 2, ["", "no room"]), ([], "gelu,norm,embed", 5, [""])):  # 20 GiB each, 8 GiB each
        run = bench.gpu.Run(bench.gpu.parser().parse_args(["--device", "cpu", "--dry-run", "--compile", "--only", only, *words]), tmp_path, lambda line: None)
        run.device, keys = torch.device("cuda"), bench.gpu.compiled_at(run.to_time, run.providers)
        first, second, *others = dict.fromkeys((name, provider) for name, _, provider in keys)  # one job of each, for all its x
        answers |= {first: wrong, second: RuntimeError("its process ended with code 9")}
        red, _, ahead = bench.gpu.beforehand(run, bench.gpu.Clock(10, False))
        of = {job: [why for (name, _, provider), why in ahead.items() if (name, provider) == job] for job in (first, second, *others)}
        assert asked.pop() == expected and red == {} and set(ahead) == set(keys)
        assert of == {first: wrong, second: len(wrong) * ["its process ended with code 9"]} | {job: ["it had no time"] for job in others}
    said = []
    taking = bench.gpu.affordable(bench.cases.CASES["norm"], {"a": bench.case.Provider(int, compiled=True), "b": bench.case.Provider(int)}, lambda name: "it had no time", said.append)
    assert list(taking) == ["b"] and said == ["norm: a is not measured: it had no time"]


def test_what_pads_to_one_shape_is_compiled_by_one_process(bench, monkeypatch, tmp_path):
    """All x of a provider, one behind the other, each as it is timed: from nothing compiled. What fails at one of them is said of that one."""
    did = []
    name, theirs = "lora_step 4x48", bench.case.Provider(lambda setting: did.append(("built", setting.x)) or setting.x, compiled=True)
    monkeypatch.setattr(bench.lineup, "taking_part", lambda *given: {"transformers+peft, compiled": theirs}), monkeypatch.setattr(bench.lineup, "forget_compiled", lambda providers: did.append(dict(providers)))
    monkeypatch.setattr(bench.measure, "warmed_up", lambda case, work, device: 1 / 0 if work == 19 else did.append((case.name, work)))
    arguments = bench.gpu.parser().parse_args(["--device", "cpu", "--dry-run", "--steps", "--compile", "--only", "lora_step"])
    assert bench.gpu.compile_job(arguments, tmp_path, name, "transformers+peft, compiled", [19, 48]) == ["ZeroDivisionError: division by zero", ""]
    forgotten = {"transformers+peft, compiled": theirs}
    assert did == [forgotten, ("built", 19), forgotten, ("built", 48), (name, 48)]


def test_on_a_gpu_checks_are_processes_of_their_own(bench, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True), monkeypatch.setattr(bench.lineup, "taking_part", lambda *a: {})
    monkeypatch.setattr(bench.rows, "device_name", lambda device: "NVIDIA X"), monkeypatch.setattr(bench.rows, "slug", lambda device: "nvidia-x")
    monkeypatch.setattr(bench.gpu, "beforehand", lambda run, clock: asked.append("apart") or ({"gelu": "gelu: unlike"}, {}, {}))
    monkeypatch.setattr(bench.gpu.Run, "equality", lambda run, clock: asked.append("here") or ({}, {}))
    for words, expected in (([], "apart"), (["--no-apart"], "here"), (["--device", "cpu", "--dry-run"], "here")):
        assert bench.gpu.main([*words, "--check", "--only", "gelu"]) == (expected == "apart") and asked.pop() == expected
    assert capsys.readouterr().out == "gelu: unlike\n" + 2 * "1 checks, all equal\n"


def test_a_method_is_held_against_the_cpu_for_200_steps_and_waits_for_nothing(bench, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(bench.gpu.curves, "check", lambda device, folder, steps, size, phases, say: asked.append((steps, size, phases))
                        or [f"{phases[0]} parts"] * (phases[0] == "lora"))
    monkeypatch.setattr(bench.gpu.curves, "waits", lambda device, folder, phases: ["item()"] * (phases[0] == "full"))
    red = bench.gpu.unlike_the_cpu(torch.device("cuda"), False, tmp_path, ["lora_step", "full_step", "prefix_step"])
    assert red == {"lora_step": "lora parts", "full_step": "a step waits for the device: item()"} and asked == [(200, "tiny", (phase,)) for phase in ("lora", "full", "prefix")]
    bench.gpu.unlike_the_cpu(torch.device("cpu"), True, tmp_path, ["full_step"])
    assert asked[-1] == (3, "micro", ("full",))


def test_on_a_gpu_curves_are_of_both_precisions_and_both_kinds_of_step(bench, monkeypatch, tmp_path):
    """What parts is red, and so is what fails in the loop."""
    curves, asked, loops = bench.gpu.curves, [], []

    def curve(setting, phase, steps, implementation, kind="eager", say=None):
        asked.append((setting.device.type, setting.precision, kind, implementation, setting.batches))
        return curves.Curve([1.5 if (setting.precision, kind) == ("bf16", "graph") else 1.0], {})

    monkeypatch.setattr(curves, "curve", curve)
    monkeypatch.setattr(curves, "whole", lambda setting, phase, steps, kind, *rest: loops.append((setting.precision, kind, steps)) or ["it fails"])
    red = curves.check(torch.device("cuda"), tmp_path, 200, phases=("lora",), say=lambda line: None)
    assert asked == [("cpu", "float32", "eager", "torch", 8), *(("cuda", precision, kind, "auto", 8) for precision in ("float32", "bf16") for kind in ("eager", "graph"))]
    assert loops == [("bf16", "graph", 40)]
    assert red == [*(f"lora, bf16, graph: loss over {what} steps: off by 0.5, allowed 0.01" for what in ("the first 50", "all")), "it fails"]


def test_a_curve_goes_through_the_batches_by_the_ops_that_it_is_asked_for(bench, monkeypatch, tmp_path):
    from peftdebias import kernels

    curves, seen = bench.gpu.curves, []
    loss = curves.MaskedLM.loss
    monkeypatch.setattr(curves.MaskedLM, "loss", lambda self, model, batch: (seen.append((kernels.setting(), int(batch.ids.sum()))), loss(self, model, batch))[1])
    setting = bench.case.Setting("micro", 20, tmp_path, dropout=0.0, sequences=4, longest=48, batches=3)
    found = curves.curve(setting, "lora", 4, "torch", say=lambda line: None)
    sums = [sum(int(s.ids.sum()) for s in batch) for batch in curves.texts(setting)]
    assert seen == [("torch", sums[i]) for i in (0, 0, 0, 1, 2, 0)] and len(found.losses) == 4 and len(set(sums)) == 3


def test_steps_that_were_to_be_replayed_and_ran_eagerly_are_red(bench, monkeypatch, tmp_path):
    """Their losses and times are no graph's. On a CPU there is none, which is the plainest way to have none."""
    curves, why = bench.gpu.curves, "expected a CUDA device, the model is on cpu"
    setting = bench.case.Setting("micro", 20, tmp_path, dropout=0.0, sequences=4, longest=48, batches=3)
    found, eager = (curves.curve(setting, "lora", 2, "torch", kind, lambda line: None) for kind in ("graph", "eager"))
    assert (found.off, eager.off) == (why, "") and found.losses == eager.losses and found.gradients.keys() == eager.gradients.keys() and found.gradients
    assert curves.whole(setting, "lora", 2, "graph", "torch", say=lambda line: None) == [
        f"lora, float32, graph, the loop of training.py: CUDA graphs: off, every step runs eagerly: {why}"]
    monkeypatch.setattr(curves, "curve", lambda setting, *rest, **more: curves.Curve([1.0], {}, "no room" if setting.precision == "bf16" and "graph" in rest else ""))
    monkeypatch.setattr(curves, "whole", lambda *_: [])
    assert curves.check(torch.device("cuda"), tmp_path, 1, phases=("lora",), say=lambda line: None) == ["lora, bf16, graph: no CUDA graph: no room"]
    asked, step = [], types.SimpleNamespace(off="no room")
    with monkeypatch.context() as patched:
        patched.setattr(bench.cases_steps, "expect_replayed", lambda step, device: asked.append((step.off, device.type)))
        bench.cases_steps.ours("lora", "graph")(setting).run()
    assert asked == [(why, "cpu")]
    bench.cases_steps.expect_replayed(step, torch.device("cpu"))
    bench.cases_steps.expect_replayed(object(), torch.device("cuda"))
    with pytest.raises(RuntimeError, match="^CUDA graphs are off: no room$"):
        bench.cases_steps.expect_replayed(step, torch.device("cuda"))


def test_both_kinds_of_step_are_watched_for_waits(bench, monkeypatch, tmp_path):
    """The device is pretended; what a step's work holds is held while it runs."""
    curves, modes, ran = bench.gpu.curves, [], []

    class Step:
        def __init__(self, kind):
            held = self.held = [1]

            def run():  # as a Work's: it does not hold what holds it
                ran.append((kind, modes[-1], bool(held)))
                if kind == "graph" and modes[-1] == "error":
                    raise RuntimeError("called a synchronizing CUDA operation\nat x")

            self.run = run

        def __del__(self):
            self.held.clear()

    monkeypatch.setattr(bench.cases_steps, "ours", lambda phase, kind: lambda setting: Step(kind))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    assert curves.waits(torch.device("cpu"), tmp_path, ("lora",)) == ["lora, graph: called a synchronizing CUDA operation"]
    assert ran == [("eager", "default", True), ("eager", "error", True), *(("graph", "default", True),) * 3, ("graph", "error", True)] and modes[-1] == "default"


def test_curves_without_a_device_end_in_one_line(bench, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.gpu.curves.main(["--device", "cuda"]) == 2 and capsys.readouterr() == ("", "bench: --device cuda: expected a CUDA device, found none\n")


@pytest.mark.parametrize("red", [[], ["lora, float32, eager: loss over all steps: off by 1"]])
def test_curves_that_part_end_with_exit_code_1(bench, monkeypatch, capsys, red):
    asked = []
    monkeypatch.setattr(bench.gpu.curves, "check", lambda *a: asked.append(a) or red)
    code = bench.gpu.curves.main(["--device", "cpu", "--steps", "7", "--size", "micro", "--kernels", "torch", "--phases", "full", "lora"])
    assert code == len(red) and capsys.readouterr().out == "".join(f"RED {line}\n" for line in red) and asked[0][2:] == (7, "micro", "torch", ("full", "lora"))


def test_jobs_side_by_side_answer_in_their_order(bench, tmp_path):
    """Each in a process of its own: one that dies or prints takes nothing from the others; what has not begun in time has no answer."""
    from bench.aside import together

    (tmp_path / "jobs.py").write_text("import os\ndef double(x):\n    print('noise')\n    return 2 * x\ndef end(code):\n    os._exit(code)\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        first, second, third, fourth = together([("jobs:double", ([1],), 600), ("jobs:end", (3,), 600), ("jobs:double", (1.5,), 600), ("jobs:end", (0,), 600)], 2, 600)
        assert str(together([("time:sleep", (60,), 60)], 1, 3)) == "[RuntimeError('its process did not end in the 3 s that it had')]"
    assert first == [1, 1] and third == 3.0 and isinstance(second, RuntimeError) and str(second) == "its process ended with code 3"
    assert isinstance(fourth, RuntimeError) and str(fourth) == "its process gave no answer: Ran out of input"
    assert together([("jobs:double", (1,), 0), ("jobs:double", (1,), 60)], 1, 0) == [None, None]


def test_a_compiled_step_that_parts_or_fails_is_left_out_alone(bench, monkeypatch, tmp_path, capsys):
    """It is LoRA's, compared on one batch; the other providers of its case are timed."""
    curves, asked = bench.gpu.curves, []

    def curve(setting, phase, steps, implementation, kind="eager", say=None):
        asked.append((setting.device.type, setting.precision, phase, kind, implementation, setting.batches))
        if fails and kind == "compiled":
            raise RuntimeError("no compiler\nhere")
        return curves.Curve([1.5 if kind == "compiled" else 1.0], {})

    monkeypatch.setattr(curves, "curve", curve)
    fails = False
    red = curves.compiled(torch.device("cuda"), tmp_path, say=lambda line: None)
    assert asked == [("cpu", "float32", "lora", "eager", "torch", 1), ("cuda", "float32", "lora", "compiled", "auto", 1)] and len(red) == 2 and "off by 0.5" in red[0]
    fails = True
    assert curves.compiled(torch.device("cuda"), tmp_path, say=lambda line: None) == ["lora, float32, compiled: RuntimeError: no compiler"]
    run = bench.gpu.Run(bench.gpu.parser().parse_args(["--device", "cpu", "--dry-run", "--steps", "--only", "lora_step,full_step", "--compile"]), tmp_path)
    monkeypatch.setattr(bench.gpu, "unlike_the_cpu", lambda *given: {}), monkeypatch.setattr(bench.gpu, "checked", lambda entries, providers, clock, red: {})
    run.device = torch.device("cuda")
    name = bench.gpu.COMPILED_STEP
    assert run.equality(bench.gpu.Clock(8, True))[0] == {name: "lora, float32, compiled: RuntimeError: no compiler"}
    assert run.equality(bench.gpu.Clock(8, True), ["full_step"])[0] == {} and name in bench.cases.CASES["lora_step"].providers
    timed = []
    monkeypatch.setattr(bench.measure, "time_case", lambda case, setting, taking, *rest, **more: timed.append((case.name, name in taking, len(taking) > 3)) or [])
    entries = [entry for entry in run.to_time if entry[0].name == "lora_step 4x48"][:1]
    for red, there in (({}, True), ({name: "no compiler"}, False)):
        bench.gpu.timed(entries, run.providers, {}, 1, bench.gpu.Clock(8, True), red, lambda key: "")
        assert timed.pop() == ("lora_step 4x48", there, True)
    assert f"{name} is not measured: no compiler" in capsys.readouterr().err


def test_checks_beside_each_other_find_what_one_process_finds(bench, tmp_path, capsys):
    arguments = bench.gpu.parser().parse_args(["--device", "cpu", "--dry-run", "--only", "sparse_add,mlm_loss", "--check"])
    run = bench.gpu.Run(arguments, tmp_path)
    alone = run.equality(bench.gpu.Clock(8, False))
    assert bench.gpu.beforehand(run, bench.gpu.Clock(8, False)) == (*alone, {}) and set(alone[1]) == {("sparse_add", 7), ("mlm_loss", 13)} and not alone[0]
    assert "2 checks and 0 times torch.compile, 1 at a time" in capsys.readouterr().err
    red, shares, _ = bench.gpu.beforehand(run, bench.gpu.Clock(1e-9, False))
    assert shares == {} and red == {name: f"{name}: not checked: the run has used 40% of its time" for name in ("sparse_add", "mlm_loss")}


@pytest.mark.slow
def test_checks_beside_each_other_from_the_command_line():
    """By name, where the script is `__main__` and its processes have another."""
    words = [sys.executable, ROOT / "bench" / "gpu.py", "--device", "cpu", "--dry-run", "--apart", "--only", "sparse_add,mlm_loss", "--check"]
    done = subprocess.run(words, text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (0, "2 checks, all equal\n"), done.stderr


def test_nobody_waits_for_a_job_that_does_not_end(bench, tmp_path, monkeypatch):
    """Where several are at work: past its minutes for that, the timings have theirs."""
    run = bench.gpu.Run(bench.gpu.parser().parse_args(["--device", "cpu", "--dry-run", "--only", "sparse_add"]), tmp_path)  # one job, which has the machine
    given = []
    monkeypatch.setattr(bench.gpu, "together", lambda calls, workers, most: given.append((calls[0][2], workers, most)) or [None] * len(calls))
    monkeypatch.setattr(bench.gpu.os, "cpu_count", lambda: 16)
    monkeypatch.setattr(bench.gpu.torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(total_memory=139 * 2 ** 30))
    for device in ("cuda", "cpu"):  # one at a time is waited for
        run.device = torch.device(device)
        bench.gpu.beforehand(run, bench.gpu.Clock(10, False))
    assert given == [(pytest.approx(240, abs=30), 1, pytest.approx(330, abs=30)), (pytest.approx(540, abs=30), 1, pytest.approx(540, abs=30))]


@pytest.mark.slow
def test_what_is_compiled_ahead_is_found_again(bench, tmp_path, monkeypatch):
    """By another process than the one that compiled it, the one that times: nothing is compiled there."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    given = ["--device", "cpu", "--dry-run", "--only", "gelu", "--compile"]
    code = ("import sys, pathlib; sys.path.insert(0, {root!r}); import torch; from bench import gpu\n"
            "run = gpu.Run(gpu.parser().parse_args({given}), pathlib.Path({folder!r})); key, = gpu.compiled_at(run.to_time, run.providers)\n"
            "{do}\nfrom torch._dynamo.utils import counters; print('misses', counters['inductor']['fxgraph_cache_miss'], 'hits', counters['inductor']['fxgraph_cache_hit'])")
    said = []
    for do in ("print(gpu.beforehand(run, gpu.Clock(80, False))[2])", "case, setting = next(entry for entry in run.to_time if entry[0].name == key[0]); print(gpu.measure.warmed_up(case, run.providers['gelu'][key[2]].build(setting), setting.device) > 0)"):
        done = subprocess.run([sys.executable, "-c", code.format(root=str(ROOT), given=given, folder=str(tmp_path), do=do)], text=True, capture_output=True)
        said.append(done.stdout)
        assert done.returncode == 0, done.stderr
    assert said[0] == "{('gelu', 13, 'plain torch, compiled'): ''}\nmisses 0 hits 0\n"
    assert said[1].startswith("True\nmisses 0 hits ") and not said[1].endswith("hits 0\n")
