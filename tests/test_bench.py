"""bench/: a sound registry, equality before time, rows with their schema, and the GPU script's whole path on a CPU. No figure is looked at."""

import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
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
        return type("bench", (), {name: importlib.import_module(f"bench.{name}") for name in ("cases", "measure", "rows", "run", "gpu")})
    finally:
        sys.path.remove(str(ROOT))


@pytest.fixture
def quick(bench, monkeypatch):
    """Samples of any duration count."""
    monkeypatch.setattr(bench.measure, "SAMPLE_SECONDS", 0.0)


def planted(bench, monkeypatch, name: str, change):
    """Puts a case in the registry whose last provider gives results that `change` spoilt."""
    case = bench.cases.CASES[name]
    last, provider = list(case.providers.items())[-1]

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
    setting = bench.cases.Setting("base", 54, tmp_path)
    bucketed = bench.cases.texts(setting)
    random = bench.cases.shuffled(bucketed, setting.seed)
    assert [len(batch) for batch in bucketed] == [16] * 4 == [len(batch) for batch in random]
    assert sorted(id(s) for batch in bucketed for s in batch) == sorted(id(s) for batch in random for s in batch)
    lengths = [len(s.ids) for batch in bucketed for s in batch]
    assert abs(sum(lengths) / len(lengths) - 54) < 6 and 5 <= min(lengths) and max(lengths) == 128
    assert bench.cases.padding(bucketed) < 0.1 and 0.5 < bench.cases.padding(random) < 0.65
    for sample in (s for batch in bucketed for s in batch):
        assert len(sample.rows) == len(sample.targets) == max(1, round(0.15 * len(sample.ids)))
        assert set(sample.ids[sample.rows].tolist()) == {999} and not set(sample.targets.tolist()) & {999}  # what is asked is not shown
    assert {len(s.ids) for batch in bench.cases.texts(bench.cases.Setting("tiny", 128, tmp_path)) for s in batch} == {128}


# ---------------------------------------------------------------- equality first

def test_bound_is_of_the_contracts(bench):
    bound = bench.cases.output_bound
    assert bound("y", torch.tensor([0.5])) == pytest.approx(2e-6) and bound("y", torch.tensor([-30.0])) == pytest.approx(6e-5)
    assert bound("gradient of x", torch.tensor([1e-3])) == pytest.approx(5e-8) and bound("gradient of x", torch.tensor([0.5])) == pytest.approx(2e-6)


@pytest.mark.parametrize("spoil,shown", [
    (lambda r: {**r, "gradient of key": r["gradient of key"] * 1.001}, "gradient of key: max|difference| "),
    (lambda r: {**r, "y": r["y"].index_fill(0, torch.tensor([3]), float("nan"))}, "y: max|difference| nan"),
    (lambda r: {name: t for name, t in r.items() if name != "gradient of query"}, "gradient of query: max|difference| inf"),
    (lambda r: {**r, "y": r["y"][:-1]}, "y: max|difference| inf"),
], ids=["value", "nan", "missing", "shape"])
def test_a_planted_difference_is_red_and_nothing_is_timed(bench, quick, monkeypatch, capsys, tmp_path, spoil, shown):
    planted(bench, monkeypatch, "attention", spoil)
    monkeypatch.setattr(bench.measure, "time_case", lambda *a, **k: pytest.fail("timed"))
    out = tmp_path / "rows.json"
    assert bench.run.main(["attention", "--size", "micro", "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "attention_padded differs from attention_ref in 1 of 4 tensors; nothing is timed" in printed and shown in printed and "allowed" in printed
    assert " ms" not in printed and "|---" not in printed and not out.exists()


@pytest.mark.skipif(not HAVE_BOTH, reason="compares with transformers and peft, which are not installed")
def test_lora_step_sees_a_wrong_gradient_of_one_matrix(bench, monkeypatch, tmp_path):
    name = "gradient of layers.1.attention.value.a"
    planted(bench, monkeypatch, "lora_step", lambda r: {**r, name: r[name].flip(0)})
    case, setting = bench.cases.CASES["lora_step"], bench.cases.Setting("micro", 20, tmp_path, sequences=4, longest=48)
    with pytest.raises(bench.measure.Unequal, match="in 1 of 9 tensors") as red:
        bench.measure.check(case, setting, bench.measure.taking_part(case, False, print))
    assert f"\n  {name}: " in str(red.value)


# ---------------------------------------------------------------- rows

def test_rows_have_the_schema_and_tables_come_from_them(bench, quick, capsys, tmp_path):
    out = tmp_path / "deep" / "rows.json"
    assert bench.run.main(["attention", "lora", "--size", "micro", "--repeats", "2", "--batches", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    rows = json.loads(out.read_text())
    assert {row["kernel_name"] for row in rows} == {"attention", "lora_step", "lora_linear"}
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


def test_ratio_is_of_the_baseline_on_the_same_line(bench):
    def row(provider, x, y, size="a"):
        return bench.rows.Row("k", provider, "full", "time", "ms", "n", x, y, y, y, {"size": size, "baseline": "old"}, "d", "t", None, "c", "2026")

    lines = bench.rows.table([row("old", 1, 10.0), row("new", 1, 4.0), row("old", 2, 100.0), row("new", 2, 50.0), row("new", 2, 1.0, "b")]).splitlines()
    assert [line.split(" | ")[-1].strip(" |") for line in lines if line.startswith(("| a", "| b"))] == ["1.00", "0.40", "1.00", "0.50", "no baseline"]


def test_a_missing_library_leaves_its_providers_out(bench, monkeypatch):
    case, said = bench.cases.CASES["lora_step"], []
    monkeypatch.setattr(bench.measure.importlib.util, "find_spec", lambda name: None)
    assert list(bench.measure.taking_part(case, True, said.append)) == ["peftdebias"]
    assert len(said) == 3 and "transformers and peft not installed" in said[0]


def test_a_compiler_that_fails_leaves_only_its_provider_out(bench, tmp_path):
    def broken(setting):
        raise RuntimeError("no compiler\nat all")

    case, said = bench.cases.CASES["attention"], []
    providers = {**case.providers, "compiled": bench.cases.Provider(broken, compiled=True)}
    bench.measure.check(case, bench.cases.Setting("micro", 2, tmp_path), providers, said.append)
    assert list(providers) == list(case.providers) and said == ["attention: compiled is not measured: RuntimeError: no compiler"]
    with pytest.raises(RuntimeError):
        bench.measure.check(case, bench.cases.Setting("micro", 2, tmp_path), {**providers, "ours": bench.cases.Provider(broken)})


def test_peak_memory_sees_what_a_pass_takes(bench, tmp_path):
    work = bench.cases.Work(run=lambda: torch.ones(40 * 2 ** 18).sum(), results=dict)  # 40 MiB
    peak = bench.measure.cpu_peak(bench.cases.Provider(lambda setting: work), bench.cases.Setting("micro", 1, tmp_path))
    assert peak is None or 38 < peak < 60  # None: not on Linux, or not allowed


# ---------------------------------------------------------------- the commands

@pytest.mark.parametrize("script,words,shown", [
    ("run", ["nope"], "no case 'nope'; expected one of gemm, copy, lora_step, lora_linear, attention"),
    ("run", ["--size", "tiny,huge"], "no size 'huge'; expected one of micro, tiny, small, base"),
    ("run", ["--repeats", "0"], "expected at least 1, got 0"),
    ("run", ["--repeats", "x"], "invalid int value: 'x'"),
    ("run", ["--out", "rows.csv"], "rows.csv: expected a file name that ends in .json"),
    ("gpu", ["--device", "cpu"], "expected --dry-run beside it"),
    ("gpu", ["--size", "huge"], "invalid choice: 'huge'"),
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
    assert {(row["kernel_name"], row["metric_unit"]) for row in rows} == {(k, "ms") for k in ("gemm", "copy", "lora_step")} | {
        ("gemm", "TFLOP/s"), ("copy", "GB/s"), ("lora_step", "valid tokens/s")}
    assert {row["provider"] for row in rows if row["kernel_name"] == "lora_step"} == {"transformers+peft", "transformers+peft, length-bucketed", "peftdebias"}
    assert {row["x_value"] for row in rows if row["kernel_name"] == "lora_step"} == {20, 48} and all(row["extra_config"]["dry_run"] for row in rows)
    assert "the figures mean nothing" in printed and "attention, micro, sequences 3: equal" in said


def test_a_bare_checkout_is_enough(tmp_path):
    """`-S` leaves out every installed package, and so an editable install: peftdebias and its kernels are found through bench alone."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import bench, peftdebias; from peftdebias import kernels; print(peftdebias.__file__, kernels.__file__)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(ROOT / "peftdebias" / "__init__.py"), str(ROOT / "kernels" / "fused" / "__init__.py")]
