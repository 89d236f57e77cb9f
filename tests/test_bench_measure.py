"""bench/measure.py on a GPU, whose calls answer something here: which times and peaks are taken, when, and of what. No figure is looked at."""

import contextlib
import dataclasses
import types

import pytest
import torch

from .benched import modules, one_case, quick  # noqa: F401  (quick is a fixture)
from .outside import one_thread  # noqa: F401  (a fixture: small models on one thread)

bench = modules("case", "gpu", "lineup", "measure", "rows")


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
