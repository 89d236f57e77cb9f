"""bench/gpu.py: its whole path on a CPU, what is left out and said, and processes beside each other. No figure is looked at."""

import dataclasses
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from .benched import CEILINGS, HAVE_BOTH, ROOT, modules, one_case, planted, quick  # noqa: F401  (quick is a fixture)
from .outside import one_thread  # noqa: F401  (a fixture: small models on one thread)

bench = modules("case", "cases", "gpu", "lineup", "measure", "rows")


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
