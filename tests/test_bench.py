"""bench/: a sound registry, equality before time, rows with their schema. No figure is looked at."""

import dataclasses
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from .benched import FIELDS, HAVE_BOTH, ROOT, modules, planted, quick  # noqa: F401  (quick is a fixture)
from .outside import one_thread  # noqa: F401  (a fixture: small models on one thread)

bench = modules("case", "cases", "gpu", "measure", "rows", "run", "texts")


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
def test_a_planted_difference_is_red_and_nothing_is_timed(bench, quick, monkeypatch, capsys, tmp_path, spoil, shown):  # noqa: F811
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

def test_rows_have_the_schema_and_tables_come_from_them(bench, quick, capsys, tmp_path):  # noqa: F811
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


def test_the_least_that_an_op_reads_and_writes(bench, tmp_path):
    """AdamW: p, g, m and v in, p, m and v out. A block whose GELU is behind its products has no passes of its own for it."""
    cases, setting = bench.cases.CASES, lambda x: bench.case.Setting("micro", x, tmp_path, stand_in=True)  # noqa: E731
    assert cases["sparse_adamw"].providers["torch.optim.AdamW, fused"].build(setting(300)).roof == ((0.0, 7.0 * 4 * 300),)
    for name in ("feed_forward", "trained_feed_forward"):
        library, fused = (cases[name].providers[f"peftdebias, {form}"].build(setting(7)).roof for form in ("library", "fused"))
        assert len(library) == len(fused) + 2 and library[:len(fused)] == fused and all(flops for flops, _ in fused)


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
