"""bench/: a sound registry, equality before time, rows with their schema, and the GPU script's whole path on a CPU. No figure is looked at."""

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import types
import weakref
from pathlib import Path

import pytest
import torch

from .outside import one_thread  # noqa: F401  (a fixture: small models on one thread)

ROOT = Path(__file__).resolve().parent.parent
HAVE_BOTH = all(importlib.util.find_spec(name) for name in ("transformers", "peft"))
FIELDS = ["kernel_name", "provider", "mode", "metric_name", "metric_unit", "x_name", "x_value", "y_50", "y_20", "y_80", "extra_config", "device_name", "torch_version",
          "triton_version", "commit", "timestamp"]


@pytest.fixture(scope="module")
def bench():
    """The modules of bench/ by name; the checkout's root is on the path while they are imported."""
    sys.path.insert(0, str(ROOT))
    try:
        return type("bench", (), {name: importlib.import_module(f"bench.{name}") for name in ("case", "cases", "measure", "rows", "roofline", "run", "gpu", "texts")})
    finally:
        sys.path.remove(str(ROOT))


@pytest.fixture
def quick(bench, monkeypatch):
    """Samples of any duration count."""
    monkeypatch.setattr(bench.measure, "SAMPLE_SECONDS", 0.0)


def planted(bench, monkeypatch, name: str, change, provider_name: str | None = None):
    """Puts a case in the registry of which one provider, ours if none is named, gives results that `change` spoilt."""
    case = bench.cases.CASES[name]
    last = provider_name or ("peftdebias" if "peftdebias" in case.providers else list(case.providers)[-1])
    provider = case.providers[last]

    def build(setting):
        work = provider.build(setting)
        return dataclasses.replace(work, results=lambda: change(work.results()))

    spoilt = dataclasses.replace(case, providers={**case.providers, last: dataclasses.replace(provider, build=build)})
    monkeypatch.setitem(bench.cases.CASES, name, spoilt)


# ---------------------------------------------------------------- registry

def test_every_case_is_whole(bench):
    for name, case in bench.cases.CASES.items():
        assert case.name == name and case.what and case.x_values and case.providers
        assert case.mode in bench.rows.MODES
        assert not case.providers[case.baseline].compiled
    listing = bench.run.listing()
    assert all(name in listing for case in bench.cases.CASES.values() for name in [case.name, *case.providers])


def test_texts_are_the_same_for_all_and_as_long_as_asked(bench, tmp_path):
    setting = bench.case.Setting("base", 54, tmp_path)
    bucketed = bench.texts.texts(setting)
    random = bench.texts.shuffled(bucketed, setting.seed)
    assert [len(batch) for batch in bucketed] == [16] * 4 == [len(batch) for batch in random]
    assert sorted(id(s) for batch in bucketed for s in batch) == sorted(id(s) for batch in random for s in batch)
    lengths = [len(s.ids) for batch in bucketed for s in batch]
    assert abs(sum(lengths) / len(lengths) - 54) < 6 and 5 <= min(lengths) and max(lengths) == 128
    assert bench.texts.padding(bucketed) < 0.1 and 0.5 < bench.texts.padding(random) < 0.65
    for sample in (s for batch in bucketed for s in batch):
        assert len(sample.rows) == len(sample.targets) == max(1, round(0.15 * len(sample.ids)))
        assert set(sample.ids[sample.rows].tolist()) == {999} and not set(sample.targets.tolist()) & {999}  # what is asked is not shown
    assert {len(s.ids) for batch in bench.texts.texts(bench.case.Setting("tiny", 128, tmp_path)) for s in batch} == {128}


# ---------------------------------------------------------------- equality first

def test_bound_is_of_the_contracts(bench):
    bound = bench.case.output_bound
    assert bound("y", torch.tensor([0.5])) == pytest.approx(2e-6) and bound("y", torch.tensor([-30.0])) == pytest.approx(6e-5)
    assert bound("gradient of x", torch.tensor([1e-3])) == pytest.approx(5e-8) and bound("gradient of x", torch.tensor([0.5])) == pytest.approx(2e-6)


@pytest.mark.parametrize("spoil,shown", [
    (lambda r: {**r, "gradient of key": r["gradient of key"] * 1.001}, "gradient of key: max|difference| "),
    (lambda r: {**r, "y": r["y"].index_fill(0, torch.tensor([3]), float("nan"))}, "y: max|difference| nan"),
    (lambda r: {name: t for name, t in r.items() if name != "gradient of query"}, "gradient of query: max|difference| inf"),
    (lambda r: {**r, "y": r["y"][:-1]}, "y: max|difference| inf"),
], ids=["value", "nan", "missing", "shape"])
def test_a_planted_difference_is_red_and_nothing_is_timed(bench, quick, monkeypatch, capsys, tmp_path, spoil, shown):
    planted(bench, monkeypatch, "attention", spoil, "attention_padded")
    time_case = bench.measure.time_case
    monkeypatch.setattr(bench.measure, "time_case", lambda case, *a, **k: pytest.fail("timed") if case.name == "adapter_frozen" else time_case(case, *a, **k))
    out = tmp_path / "rows.json"
    assert bench.run.main(["attention", "--size", "micro", "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "attention_padded differs from attention_ref in 1 of 4 tensors; not timed" in printed and shown in printed and "allowed" in printed
    assert " ms" not in printed and "|---" not in printed and not out.exists()


@pytest.mark.skipif(not HAVE_BOTH, reason="compares with transformers and peft, which are not installed")
def test_lora_step_sees_a_wrong_gradient_of_one_matrix(bench, monkeypatch, tmp_path):
    name = "gradient of layers.1.attention.value.a"
    planted(bench, monkeypatch, "lora_step", lambda r: {**r, name: r[name].flip(0)})
    case, setting = bench.cases.CASES["lora_step"], bench.case.Setting("micro", 20, tmp_path, sequences=4, longest=48)
    with pytest.raises(bench.measure.Unequal, match="in 1 of 9 tensors") as red:
        bench.measure.check(case, setting, bench.measure.taking_part(case, False, print))
    assert f"\n  {name}: " in str(red.value)


# ---------------------------------------------------------------- rows

def test_rows_have_the_schema_and_tables_come_from_them(bench, quick, capsys, tmp_path):
    out = tmp_path / "deep" / "rows.json"
    assert bench.run.main(["attention", "lora_step", "lora_linear", "--size", "micro", "--repeats", "2", "--batches", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    rows = json.loads(out.read_text())
    attentions = {"attention", "attention_even", "attention_dropout", "attention_prefix"}
    assert {row["kernel_name"] for row in rows} == attentions | {"lora_step", "lora_linear", "lora_linear_wide"}
    for row in rows:
        assert list(row) == FIELDS
        assert row["y_20"] <= row["y_50"] <= row["y_80"] and row["metric_unit"] == bench.rows.UNITS[row["metric_name"]]
        assert row["extra_config"]["size"] == "micro" and row["device_name"] and row["timestamp"].endswith("+00:00")
    step = {(row["provider"], row["metric_name"]): row for row in rows if row["kernel_name"] == "lora_step"}
    assert ("transformers+peft", "time") in step or not HAVE_BOTH
    time, rate = step["peftdebias", "time"], step["peftdebias", "rate"]
    assert rate["y_50"] * time["y_50"] / 1000 == pytest.approx(16 * time["extra_config"]["mean_length"])
    assert time["extra_config"]["baseline"] == "transformers+peft" and time["extra_config"]["dropout"] == 0.1
    assert bench.rows.table(bench.rows.read(out)) in printed and bench.rows.table(bench.rows.read(out)) in out.with_suffix(".md").read_text()
    assert "## lora_step (step)" in printed and "| micro | 54 | peftdebias |" in printed


def test_profile_shows_where_the_time_of_one_provider_goes(bench, capsys):
    assert bench.run.main(["native_gelu", "--size", "micro", "--profile", "torch", "--repeats", "2"]) == 0
    tables = capsys.readouterr().out.strip().split("\n\nnative_gelu, micro, ")
    assert len(tables) == 2  # one for each number of rows
    for table in tables:
        ops = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
        assert ": torch: " in table and any("aten::gelu" in op[1] for op in ops) and sum(float(op[4]) for op in ops) == pytest.approx(100, abs=1)


def test_ratio_is_of_the_baseline_on_the_same_line(bench):
    def row(provider, x, y, size="a"):
        return bench.rows.Row("k", provider, "full", "time", "ms", "n", x, y, y, y, {"size": size, "baseline": "old"}, "d", "t", None, "c", "2026")

    lines = bench.rows.table([row("old", 1, 10.0), row("new", 1, 4.0), row("old", 2, 100.0), row("new", 2, 50.0), row("new", 2, 1.0, "b")]).splitlines()
    assert [line.split(" | ")[-1].strip(" |") for line in lines if line.startswith(("| a", "| b"))] == ["1.00", "0.40", "1.00", "0.50", "no baseline"]


def test_a_missing_library_leaves_its_providers_out(bench, monkeypatch):
    case, said = bench.cases.CASES["lora_step"], []
    monkeypatch.setattr(bench.measure.importlib.util, "find_spec", lambda name: None)
    assert list(bench.measure.taking_part(case, True, said.append)) == ["peftdebias", "peftdebias, compiled"]
    assert len(said) == 4 and "transformers and peft not installed" in said[0]


def test_a_compiler_that_fails_leaves_only_its_provider_out(bench, tmp_path):
    def broken(setting):
        raise RuntimeError("no compiler\nat all")

    case, said = bench.cases.CASES["attention"], []
    providers = {**case.providers, "compiled": bench.case.Provider(broken, compiled=True)}
    setting = bench.case.Setting("micro", 2, tmp_path, stand_in=True)
    bench.measure.check(case, setting, providers, said.append)
    assert list(providers) == list(case.providers) and said == ["attention: compiled is not measured: RuntimeError: no compiler"]
    with pytest.raises(RuntimeError):
        bench.measure.check(case, setting, {**providers, "ours": bench.case.Provider(broken)})


def test_a_provider_that_has_too_little_memory_is_left_out(bench, tmp_path):
    def large(setting):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    case, said, setting = bench.cases.CASES["gelu"], [], bench.case.Setting("micro", 13, tmp_path, stand_in=True)
    providers = bench.measure.taking_part(case, False, said.append, "cpu", True)
    (first, one), said[:] = next(iter(providers.items())), []
    class Memory:
        pass

    def fails(setting):
        held = Memory()
        kept.append(weakref.ref(held))
        return bench.case.Work(lambda: large(held), dict)

    def seen(run):
        return lambda: free.append(kept[-1]() is None) or run()

    kept, free = [], []
    watched = dataclasses.replace(one, build=lambda setting: dataclasses.replace(work := one.build(setting), run=seen(work.run)))
    bench.measure.time_case(case, setting, {"fails": bench.case.Provider(fails), first: watched}, 1, say=lambda line: None)
    assert free and all(free)  # what it held is gone before others are timed
    found = bench.measure.time_case(case, setting, {"large": bench.case.Provider(large), first: one}, 1, say=said.append)
    assert {row.provider for row in found} == {first} and said == ["gelu: large is not measured: out of memory"]
    assert bench.measure.time_case(case, setting, {"large": bench.case.Provider(large)}, 1, say=said.append) == []


def test_a_provider_that_fails_takes_nothing_from_the_others(bench, quick, monkeypatch, capsys, tmp_path):
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


def test_a_provider_that_a_device_refuses_is_left_out(bench):
    made, said = bench.case.Provider(int, refuses=lambda device: f"no {device}" if device == "cpu" else ""), []
    case = dataclasses.replace(bench.cases.CASES["gemm"], providers={"torch": bench.case.Provider(int), "ours": made})
    assert list(bench.measure.taking_part(case, False, said.append)) == ["torch"] and said == ["gemm: ours is not measured: no cpu"]
    assert list(bench.measure.taking_part(case, False, said.append, "cuda")) == ["torch", "ours"]


def test_a_provider_of_one_precision_takes_no_part_in_another(bench, tmp_path):
    def built(setting):
        assert setting.precision == "bf16"
        return bench.case.Work(run=int, results=lambda: {"y": torch.ones(1)})

    made, said = bench.case.Provider(built, kernels=("gelu",), precisions=("bf16",)), []
    case = dataclasses.replace(bench.cases.CASES["gemm"], providers={"torch": bench.cases.CASES["gemm"].providers["torch"], "half": made})
    setting = bench.case.Setting("micro", 8, tmp_path)
    assert bench.measure.check(case, setting, dict(case.providers)) == {}
    rows = bench.measure.time_case(case, setting, dict(case.providers), 1, say=said.append)
    assert {row.provider for row in rows} == {"torch"} and said == ["gemm: half is not measured: it takes bf16, not float32"]
    with pytest.raises(bench.measure.Unequal, match="half"):  # there it is held against the others
        bench.measure.check_rounded(case, setting, dict(case.providers))


def test_peak_memory_sees_what_a_pass_takes(bench, tmp_path):
    work = bench.case.Work(run=lambda: torch.ones(40 * 2 ** 18).sum(), results=dict)  # 40 MiB
    peak = bench.measure.cpu_peak(bench.case.Provider(lambda setting: work), bench.case.Setting("micro", 1, tmp_path))
    assert peak is None or 38 < peak < 60  # None: not on Linux, or not allowed
    with_state = bench.measure.cpu_peak(bench.case.Provider(lambda setting: dataclasses.replace(work, state=100 * 2 ** 20)), bench.case.Setting("micro", 1, tmp_path))
    assert peak is None or 138 < with_state < 160


# ---------------------------------------------------------------- the commands

@pytest.mark.parametrize("script,words,shown", [
    ("run", ["nope"], "no case 'nope'; expected one of gemm, copy, lora_step, adapter_step, prefix_step, full_step, sparse_step, attention, attention_even, attention_dropout, attention_prefix, lora_linear"),
    ("run", ["--size", "tiny,huge"], "no size 'huge'; expected one of micro, tiny, small, base"),
    ("run", ["--repeats", "0"], "expected at least 1, got 0"),
    ("run", ["--repeats", "x"], "--repeats: expected a whole number, got 'x'"),
    ("run", ["--out", "rows.csv"], "rows.csv: expected a file name that ends in .json"),
    ("run", ["lora_step", "--profile", "peft"], "--profile: lora_step has no provider 'peft'; expected one of transformers+peft; "),
    ("run", ["lora_step", "--profile", "peftdebias", "--memory"], "--profile and --memory: expected one of them"),
    ("run", ["lora_step", "--profile", "transformers+peft, compiled"], "--profile 'transformers+peft, compiled': expected --compile beside it"),
    ("gpu", ["--device", "cpu"], "expected --dry-run beside it"),
    ("gpu", ["--size", "huge"], "invalid choice: 'huge'"),
    ("gpu", ["--only", "adapter,nope"], "--only: no case 'nope'; expected some of gemm, copy"),
    ("gpu", ["--steps", "--shapes", "32x128,1x2"], "--shapes: no shape '1x2'; expected some of 128x128, 128x256, 32x128"),
    ("gpu", ["--shapes", "32x128"], "--shapes: expected --steps beside it"),
    ("gpu", ["--minutes", "0"], "--minutes: expected more than 0, got 0"),
    ("gpu", ["--minutes", "inf"], "--minutes: expected more than 0, got inf"),
    ("gpu", ["--device", "cpu", "--dry-run", "--check", "--only", "gemm"], "--only gemm: expected a case that is checked here, got none"),
    ("gpu", ["--device", "cpu", "--dry-run", "--steps", "--only", "gelu"], "--only gelu: expected a case that is timed here, got none"),
    ("gpu", ["--out", f"{__file__}/rows.json"], "expected a file in a folder, a file is in its way"),
])
def test_bad_arguments_get_one_line_and_exit_code_2(bench, capsys, script, words, shown):
    try:
        code = getattr(bench, script).main(words)
    except SystemExit as left:
        code = left.code
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("bench: ") and shown in err


def test_gpu_without_a_device_measures_nothing(bench, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.gpu.main([]) == 2
    assert capsys.readouterr() == ("", "no CUDA device here: not measured\n")


@pytest.mark.skipif(not HAVE_BOTH, reason="compares with transformers and peft, which are not installed")
def test_gpu_path_runs_on_a_cpu(bench, quick, capsys, tmp_path):
    out = tmp_path / "rows.json"
    assert bench.gpu.main(["--device", "cpu", "--dry-run", "--repeats", "1", "--out", str(out)]) == 0
    printed, said = capsys.readouterr()
    rows = json.loads(out.read_text())
    assert {row["kernel_name"] for row in rows} == {"gemm", "copy", "lora_step", *bench.gpu.DRY}
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


def test_a_kernel_that_errs_in_bf16_alone_is_red(bench, quick, monkeypatch, capsys):
    """Right in float32, three roundings off in bf16: that case is not timed, the ceilings are."""
    planted(bench, monkeypatch, "adapter_frozen", lambda r: {n: t * (1 + 3 * 2 ** -8) if t.dtype == torch.bfloat16 else t for n, t in r.items()})
    time_case = bench.measure.time_case
    monkeypatch.setattr(bench.measure, "time_case", lambda case, *a, **k: pytest.fail("timed") if case.name == "adapter_frozen" else time_case(case, *a, **k))
    assert bench.gpu.main(["--device", "cpu", "--dry-run", "--only", "adapter_frozen"]) == 1
    assert "adapter_frozen, micro, rows 13: peftdebias in bf16 errs more than twice what plain torch does in 3 of 3 tensors; not timed" in capsys.readouterr().out


def test_small_elements_that_are_wrong_are_red(bench):
    """Each is less than a rounding of the largest, which one element of a thousand is."""
    def work(setting, keeps=0.0):
        y = torch.full((1000,), 1e-3, dtype={"float64": torch.float64, "bf16": torch.bfloat16}[setting.precision])
        y[0] = 1.0
        return bench.case.Work(lambda: None, lambda: {"y": torch.where(y.abs() > keeps, y, 0)})

    providers = {"plain": bench.case.Provider(work), "peftdebias": bench.case.Provider(lambda setting: work(setting, 0.5), kernels=("gelu",))}
    case = bench.case.Case("k", "full", "what", providers, "rows", (1,), bench.case.output_bound, rounded=True)
    with pytest.raises(bench.measure.Unequal, match=r"in 1 of 1 tensors; not timed\n  y: root mean square of differences 0.000999, allowed 0.000247$"):
        bench.measure.check_rounded(case, bench.case.Setting("micro", 1, Path(".")), providers)


def test_what_a_kernel_leaves_unwritten_is_red(bench, monkeypatch):
    """Though an earlier run left the right values there."""
    def work(setting):
        return bench.case.Work(lambda: None, lambda: {"y": torch.empty(1000) if ours[0] else torch.zeros(1000)})

    ours, quick = [False], bench.case.Setting("micro", 1, Path("."))
    providers = {"plain": bench.case.Provider(work), "peftdebias": bench.case.Provider(lambda s: (ours.__setitem__(0, True), work(s))[1], kernels=("gelu",))}
    case = bench.case.Case("k", "full", "what", providers, "rows", (1,), bench.case.output_bound, rounded=True)
    with pytest.raises(bench.measure.Unequal, match="y: max.difference. nan"):
        bench.measure.check(case, quick, providers)
    assert not torch.are_deterministic_algorithms_enabled()


def test_rows_of_some_cases_have_a_file_of_their_own(bench):
    named = lambda *argv: bench.gpu.file_name("nvidia-x", bench.gpu.parser().parse_args(argv))  # noqa: E731
    assert [named(), named("--steps"), named("--only", "lora,embed"), named("--steps", "--only", "lora_step", "--shapes", "128x128,32x128"), named("--size", "small", "--no-compile")] == [
        "nvidia-x.json", "nvidia-x-steps.json", "nvidia-x-lora+embed.json", "nvidia-x-steps-lora_step-128x128+32x128.json", "nvidia-x-small-uncompiled.json"]


def test_a_run_that_is_stopped_leaves_what_it_had_measured(bench, quick, monkeypatch, tmp_path):
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
    assert {row.kernel_name for row in bench.rows.read(out)} == {"gemm", "copy", "sparse_add"} and not list(tmp_path.glob("*.partial.*"))


def test_the_least_that_an_op_reads_and_writes(bench, tmp_path):
    """AdamW: p, g, m and v in, p, m and v out. A block whose GELU is behind its products has no passes of its own for it."""
    cases, setting = bench.cases.CASES, lambda x: bench.case.Setting("micro", x, tmp_path, stand_in=True)  # noqa: E731
    assert cases["sparse_adamw"].providers["torch.optim.AdamW, fused"].build(setting(300)).roof == ((0.0, 7.0 * 4 * 300),)
    for name in ("feed_forward", "trained_feed_forward"):
        library, fused = (cases[name].providers[f"peftdebias, {form}"].build(setting(7)).roof for form in ("library", "fused"))
        assert len(library) == len(fused) + 2 and library[:len(fused)] == fused and all(flops for flops, _ in fused)


def test_out_of_time_leaves_out_and_says_so(bench, quick, capsys):
    assert bench.gpu.main(["--device", "cpu", "--dry-run", "--repeats", "1", "--only", "sparse_add", "--compile", "--minutes", "1e-9"]) == 2
    said = capsys.readouterr().err
    assert "sparse_add: plain torch, compiled is not measured: " in said and "sparse_add, micro, weight_rows 7: not measured: the run has used 90% of its time" in said
    assert said.endswith("bench: --minutes 1e-09: too little for any figure\n")


# ---------------------------------------------------------------- the roofline

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
    assert peft == "lora_linear, rows 8: peftdebias, written takes 0.50 of the time of peft's layer, asked for at most 0.60: met"
    assert frozen.endswith("1.25 passes over x and dY, asked for at most 1.00: not met") and "takes 1.25 of" in frozen  # 0.005 / (0.003 + 1.25 * 0.0008)
    assert adapter == "adapter, rows 8: peftdebias takes 0.40 of plain torch's time, asked for at most 0.50: met"
    late = [eager(bench, row, ms) for row, ms in zip(rows, (0.1, 0.12, 0.11, 0.02, 0.1, 0.06))]
    lines = bench.roofline.targets([*ceilings_of(bench), *rows, *late])
    assert lines[:3] == [peft, frozen, adapter]
    assert lines[3] == "lora_linear, rows 8: launched eagerly, peftdebias, epilogue takes 1.10 of the time of peft's layer, asked for at most 0.60: not met"
    assert len(lines) == 6 and lines[5] == "adapter, rows 8: launched eagerly, peftdebias takes 0.60 of plain torch's time, asked for at most 0.50: not met"


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


def test_on_a_gpu_an_op_has_two_times_and_without_a_graph_that_is_said(bench, quick, pretend, tmp_path):
    op = dict(results=dict, roof=((0.0, 1e6),))
    case = one_case(bench, "full", plain=bench.case.Work(lambda: "whole", **op), ours=bench.case.Work(lambda: "whole", capture=lambda: "device", **op),
                    other=bench.case.Work(lambda: "no", **op), ceiling=bench.case.Work(lambda: "whole", dict))
    said, setting = [], bench.case.Setting("micro", 1, tmp_path, torch.device("cuda"))
    rows = {(row.provider, row.metric_name): row for row in bench.measure.time_case(case, setting, dict(case.providers), 2, say=said.append)}
    assert said == ["k: other: no CUDA graph, so its time is that of an eager launch, the host's work among it: RuntimeError: operation not permitted"]
    assert sorted(pretend) == ["device", "device", "whole", "whole"]  # two repeats of each graph
    for name, timed in (("plain", "graph"), ("ours", "graph"), ("other", "eager")):
        row = rows[name, "time"]
        assert row.y_50 == 500 and row.extra_config["timed"] == timed and row.extra_config["late_launches"] == 2 and row.extra_config["clock_ms"] == 0.002
        assert row.extra_config["host_ms"] >= 0 and rows[name, "eager time"].y_50 < 500 and rows[name, "peak memory"].y_50 == 3
    assert rows["ceiling", "time"].y_50 < 500 and ("ceiling", "eager time") not in rows and "timed" not in rows["ceiling", "time"].extra_config
    heads = next(line for line in bench.rows.table(list(rows.values())).splitlines() if line.startswith("| size"))
    assert heads.startswith("| size | rows | provider | time, ms | of baseline | eager time, ms |")


def test_on_a_gpu_the_peak_of_a_step_is_that_of_its_first_passes(bench, quick, pretend, monkeypatch, tmp_path):
    """Building leaves 1 MiB, the passes reach 11, and 2 MiB of AdamW's state were there before; torch held 4 MiB of the device, and 22 in the end."""
    runs = []
    case = one_case(bench, "step", ours=bench.case.Work(lambda: runs.append(1), dict, state=2 ** 21))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 11 * 2 ** 20 if len(runs) == 3 else pytest.fail("read before the third pass, or after it"))
    rows = {row.metric_name: row for row in bench.measure.time_case(case, bench.case.Setting("micro", 1, tmp_path, torch.device("cuda")), dict(case.providers), 2)}
    assert set(rows) == {"time", "peak memory", "reserved memory"} and rows["peak memory"].y_50 == 12 and rows["reserved memory"].y_50 == 20 and rows["time"].extra_config["built_mib"] == 0 and not pretend


def test_a_loaded_base_is_copied_for_a_gpu(bench, tmp_path):
    steps = importlib.import_module("bench.cases_steps")
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
    steps = timed[3:]
    assert names(steps[:8]) == [("lora_step 128x128", 51), ("lora_step 128x128", 128), ("lora_step 128x256", 102), ("lora_step 128x256", 256), ("lora_step 32x128", 51),
                                ("lora_step 32x128", 128), ("adapter_step 128x128", 51), ("adapter_step 128x128", 128)]
    assert len(steps) == len(set(names(steps))) == 4 * 3 * 2
    for case, setting in steps:
        method, shape = case.name.split()
        known, first = bench.cases.CASES[method].providers, shape == "128x128"
        left = {f"{case.baseline}, length-bucketed"} if setting.x == setting.longest else set()
        left |= {"peftdebias, compiled"} if method != "lora_step" or not first else set()
        assert list(case.providers) == [name for name in known if name not in left] and f"{setting.sequences}x{setting.longest}" == shape
    assert names(to_check) == [(f"{method}_step 32x128", 51) for method in ("lora", "adapter", "prefix", "full")]  # the smallest
    assert [any(p.compiled for p in case.providers.values()) for case, _ in to_check] == [True, False, False, False]
    to_check, timed = bench.gpu.step_plan(torch.device("cpu"), "base", False, tmp_path, ("32x128", "128x256"))
    assert [name for name, _ in names(timed[3:])][:6:2] == ["lora_step 128x256", "lora_step 32x128", "adapter_step 128x256"]
    only = bench.gpu.chosen(timed, "full_step")
    assert names(only[3:]) == [("full_step 128x256", 102), ("full_step 128x256", 256), ("full_step 32x128", 51), ("full_step 32x128", 128)]
    providers = {case.name: case.providers for case, _ in timed}
    assert bench.gpu.compiled_at(timed, {name: case.providers for name, case in bench.cases.CASES.items()})[:5] == [
        ("lora_step 128x256", 102, "transformers+peft, compiled"), ("lora_step 128x256", 102, "peftdebias, compiled"), ("lora_step 128x256", 256, "transformers+peft, compiled"),
        ("lora_step 128x256", 256, "peftdebias, compiled"), ("lora_step 32x128", 51, "transformers+peft, compiled")] and "peftdebias, compiled" not in providers["lora_step 32x128"]
    to_check, timed = bench.gpu.plan(torch.device("cpu"), "base", False, tmp_path)  # a single op at its last size
    keys = bench.gpu.compiled_at(timed, {name: case.providers for name, case in bench.cases.CASES.items()})
    assert [key for key in keys if key[0] == "gelu"] == [("gelu", 65536, "plain torch, compiled")] and len([key for key in keys if key[0] == "lora_step"]) == 4


@pytest.mark.skipif(not HAVE_BOTH, reason="compares with transformers and peft, which are not installed")
def test_a_method_that_is_not_equal_is_timed_at_no_shape(bench, quick, monkeypatch, capsys, tmp_path):
    planted(bench, monkeypatch, "adapter_step", lambda r: {**r, "loss": r["loss"] + 1})
    monkeypatch.setattr(bench.gpu, "unlike_the_cpu", lambda *_: {})
    out = tmp_path / "rows.json"
    assert bench.gpu.main(["--device", "cpu", "--dry-run", "--steps", "--repeats", "1", "--only", "lora_step,adapter_step", "--out", str(out)]) == 1
    assert "adapter_step 4x48, micro, mean_length 19: peftdebias differs from transformers, adapters by hand" in capsys.readouterr().out
    rows = json.loads(out.read_text())
    assert {row["kernel_name"] for row in rows} == {"gemm", "copy", "lora_step 4x48"}
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


def test_the_base_of_the_curves_is_updated_as_a_whole_base_is(bench):
    """On a device the 200 steps of `full` are what shows WholeAdamW in captured steps: its model must be larger than what is gathered into one tensor."""
    with torch.device("meta"):
        model = bench.gpu.curves.Model(bench.case.SIZES["tiny"].encoder_config(0.0), labels=("a", "b"))
    assert sum(p.numel() for p in model.parameters()) > bench.gpu.curves.training.FLAT["triton"]


@pytest.mark.skipif(not HAVE_BOTH, reason="compares with transformers and peft, which are not installed")
def test_a_method_whose_losses_leave_those_of_the_cpu_is_not_timed(bench, quick, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench.gpu.curves, "check", lambda *_, phases, **__: ["lora, float32, eager: loss over all steps: off by 1"] if phases == ("lora",) else [])
    out = tmp_path / "rows.json"
    assert bench.gpu.main(["--device", "cpu", "--dry-run", "--steps", "--repeats", "1", "--only", "lora_step,prefix_step", "--out", str(out)]) == 1
    assert "- lora, float32, eager: loss over all steps: off by 1" in capsys.readouterr().out
    assert {row["kernel_name"] for row in json.loads(out.read_text())} == {"gemm", "copy", "prefix_step 4x48"}


def test_jobs_side_by_side_answer_in_their_order(bench, tmp_path):
    """Each in a process of its own: one that dies or prints takes nothing from the others; what has not begun in time has no answer."""
    from bench.aside import together

    (tmp_path / "jobs.py").write_text("import os\ndef double(x):\n    print('noise')\n    return 2 * x\ndef end(code):\n    os._exit(code)\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        first, second, third, fourth = together([("jobs:double", ([1],), 60), ("jobs:end", (3,), 60), ("jobs:double", (1.5,), 60), ("jobs:end", (0,), 60)], 2, 60)
        assert str(together([("time:sleep", (60,), 60)], 1, 3)) == "[RuntimeError('its process did not end in time')]"
    assert first == [1, 1] and third == 3.0 and isinstance(second, RuntimeError) and str(second) == "its process ended with code 3"
    assert isinstance(fourth, RuntimeError) and str(fourth) == "its process gave no answer: Ran out of input"
    assert together([("jobs:double", (1,), 0), ("jobs:double", (1,), 60)], 1, 0) == [None, None]


def test_checks_beside_each_other_find_what_one_process_finds(bench, tmp_path, capsys):
    arguments = bench.gpu.parser().parse_args(["--device", "cpu", "--dry-run", "--only", "sparse_add,mlm_loss", "--check"])
    run = bench.gpu.Run(arguments, tmp_path)
    alone = run.equality(bench.gpu.Clock(8, False))
    assert bench.gpu.beforehand(run, bench.gpu.Clock(8, False)) == (*alone, {}) and set(alone[1]) == {("sparse_add", 7), ("mlm_loss", 13)} and not alone[0]
    assert "2 checks and 0 times torch.compile, 1 at a time" in capsys.readouterr().err
    done = subprocess.run([sys.executable, ROOT / "bench" / "gpu.py", "--device", "cpu", "--dry-run", "--apart", "--only", "sparse_add,mlm_loss", "--check"], text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (0, "2 checks, all equal\n"), done.stderr  # by name, where the script is `__main__` and its processes have another
    red, shares, _ = bench.gpu.beforehand(run, bench.gpu.Clock(1e-9, False))
    assert shares == {} and red == {name: f"{name}: not checked: the run has used 40% of its time" for name in ("sparse_add", "mlm_loss")}


def test_nobody_waits_for_a_job_that_does_not_end(bench, tmp_path, monkeypatch):
    """Where several are at work: past its minutes for that, the timings have theirs."""
    run = bench.gpu.Run(bench.gpu.parser().parse_args(["--device", "cpu", "--dry-run", "--only", "sparse_add"]), tmp_path)
    given = []
    monkeypatch.setattr(bench.gpu, "together", lambda calls, workers, most: given.append((calls[0][2], workers, most)) or [None] * len(calls))
    monkeypatch.setattr(bench.gpu.os, "cpu_count", lambda: 16)
    monkeypatch.setattr(bench.gpu.torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(total_memory=139 * 2 ** 30))
    for device in ("cuda", "cpu"):  # one at a time is waited for
        run.device = torch.device(device)
        bench.gpu.beforehand(run, bench.gpu.Clock(10, False))
    assert given == [(pytest.approx(240, abs=1), 8, pytest.approx(330, abs=1)), (pytest.approx(540, abs=1), 1, pytest.approx(540, abs=1))]


@pytest.mark.slow
def test_what_is_compiled_ahead_is_found_again(bench, tmp_path, monkeypatch):
    """By another process than the one that compiled it, the one that times: nothing is compiled there."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    given = ["--device", "cpu", "--dry-run", "--only", "gelu", "--compile"]
    code = ("import sys, pathlib; sys.path.insert(0, {root!r}); import torch; from bench import gpu\n"
            "run = gpu.Run(gpu.parser().parse_args({given}), pathlib.Path({folder!r})); key, = gpu.compiled_at(run.to_time, run.providers)\n"
            "{do}\nfrom torch._dynamo.utils import counters; print('misses', counters['inductor']['fxgraph_cache_miss'], 'hits', counters['inductor']['fxgraph_cache_hit'])")
    said = []
    for do in ("print(gpu.beforehand(run, gpu.Clock(80, False))[2])", "case, setting = run.to_time[-1]; print(gpu.measure.warmed_up(case, run.providers['gelu'][key[2]].build(setting), setting.device) > 0)"):
        done = subprocess.run([sys.executable, "-c", code.format(root=str(ROOT), given=given, folder=str(tmp_path), do=do)], text=True, capture_output=True)
        said.append(done.stdout)
        assert done.returncode == 0, done.stderr
    assert said[0] == "{('gelu', 13, 'plain torch, compiled'): ''}\nmisses 0 hits 0\n"
    assert said[1].startswith("True\nmisses 0 hits ") and not said[1].endswith("hits 0\n")


ANOTHER = """
import importlib.util, pathlib, sys
class Finder:  # what an editable install of another checkout leaves behind
    def find_spec(name, path=None, target=None):
        file = pathlib.Path("another.py")
        file.write_text("")
        return importlib.util.spec_from_file_location(name, file) if name == "peftdebias.kernels" else None
sys.meta_path.append(Finder)
"""


@pytest.mark.parametrize("before", ["", ANOTHER], ids=["nothing installed", "another checkout"])
def test_a_bare_checkout_is_enough(tmp_path, before):
    """`-S` reads no .pth file, and so sees no editable install: peftdebias and its kernels are found through bench alone, beside an installed torch."""
    installed = str(Path(torch.__file__).parent.parent)
    code = before + f"import sys; sys.path[:0] = [{str(ROOT)!r}, {installed!r}]; import bench, peftdebias; from peftdebias import kernels; print(peftdebias.__file__, kernels.__file__)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(ROOT / "peftdebias" / "__init__.py"), str(ROOT / "kernels" / "fused" / "__init__.py")]
