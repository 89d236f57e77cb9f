"""bench/: a sound registry, equality before time, rows with their schema. No figure is looked at."""

import argparse
import contextlib
import dataclasses
import errno
import json
import math
import os
import subprocess
import sys
import types
import weakref
from pathlib import Path

import numpy
import pytest
import torch

from peftdebias.optimizer import FlatAdamW

from .benched import FIELDS, HAVE_BOTH, ROOT, modules, planted, quick  # noqa: F401  (quick is a fixture)
from .outside import one_thread  # noqa: F401  (a fixture: small models on one thread)

bench = modules("arguments", "case", "cases", "cases_adamw", "cases_native", "cases_sparse", "cases_steps", "equality", "gpu", "lineup", "measure", "rows", "run", "texts")


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
    monkeypatch.setattr(bench.measure, "time_case", lambda *a, **k: pytest.fail("timed"))
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
    with pytest.raises(bench.equality.Unequal, match="in 1 of 9 tensors") as red:
        bench.equality.check(case, setting, bench.lineup.taking_part(case, False, print))
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


def test_a_profile_counts_what_an_op_spends_itself(bench, monkeypatch, tmp_path):
    case = dataclasses.replace(bench.cases.CASES["gemm"], providers={"torch": bench.case.Provider(lambda setting: bench.case.Work(int, dict, steps=2))})
    ops = [types.SimpleNamespace(key="outer", count=4, self_cpu_time_total=1000, cpu_time_total=4000), types.SimpleNamespace(key="inner", count=2, self_cpu_time_total=3000, cpu_time_total=3000)]
    profile = contextlib.nullcontext(types.SimpleNamespace(key_averages=lambda: ops))
    monkeypatch.setattr("bench.profiled.profile", lambda activities: profile)
    lines = bench.run.ops_table(case, bench.case.Setting("micro", 1, tmp_path), "torch", 1).splitlines()
    assert lines[-2:] == ["| `inner` | 1 | 1.5 | 75 |", "| `outer` | 2 | 0.5 | 25 |"]


def test_ratio_is_of_the_baseline_on_the_same_line(bench):
    def row(provider, x, y, size="a"):
        return bench.rows.Row("k", provider, "full", "time", "ms", "n", x, y, y, y, {"size": size, "baseline": "old"}, "d", "t", None, "c", "2026")

    lines = bench.rows.table([row("old", 1, 10.0), row("new", 1, 4.0), row("old", 2, 100.0), row("new", 2, 50.0), row("new", 2, 1.0, "b")]).splitlines()
    assert [line.split(" | ")[-1].strip(" |") for line in lines if line.startswith(("| a", "| b"))] == ["1.00", "0.40", "1.00", "0.50", "no baseline"]


def test_a_missing_library_leaves_its_providers_out(bench, monkeypatch):
    case, said = bench.cases.CASES["lora_step"], []
    monkeypatch.setattr(bench.lineup.importlib.util, "find_spec", lambda name: None)
    assert list(bench.lineup.taking_part(case, True, said.append)) == ["peftdebias", "peftdebias, compiled"]
    assert len(said) == 4 and "transformers and peft not installed" in said[0]


def test_a_compiler_that_fails_leaves_only_its_provider_out(bench, tmp_path):
    def broken(setting):
        raise RuntimeError("no compiler\nat all")

    case, said = bench.cases.CASES["attention"], []
    providers = {**case.providers, "compiled": bench.case.Provider(broken, compiled=True)}
    setting = bench.case.Setting("micro", 2, tmp_path, stand_in=True)
    bench.equality.check(case, setting, providers, said.append)
    assert list(providers) == list(case.providers) and said == ["attention: compiled is not measured: RuntimeError: no compiler"]
    with pytest.raises(RuntimeError):
        bench.equality.check(case, setting, {**providers, "ours": bench.case.Provider(broken)})


def test_what_others_compile_and_differs_is_left_out_and_what_we_compile_is_red(bench, tmp_path):
    setting, said = bench.case.Setting("micro", 1, tmp_path), []

    def of(value, **kind):
        return bench.case.Provider(lambda setting: bench.case.Work(int, lambda: {"y": torch.full((2,), value)}), **kind)

    case = bench.case.Case("k", "full", "what", {"plain": of(1.0), "theirs, compiled": of(2.0, compiled=True), "other": of(1.0)}, "rows", (1,), bench.case.output_bound)
    providers = dict(case.providers)
    assert bench.equality.check(case, setting, providers, said.append) == {"theirs, compiled": math.inf, "other": 0} and list(providers) == ["plain", "other"]
    assert len(said) == 1 and said[0].startswith("k, micro, rows 1: theirs, compiled differs from plain in 1 of 1 tensors; not timed\n  y: max|difference| 1, allowed ")
    for name, kind in (("peftdebias, compiled", {"compiled": True}), ("theirs", {})):
        with pytest.raises(bench.lineup.Unequal, match=f"{name} differs from plain"):
            bench.equality.check(case, setting, {"plain": of(1.0), name: of(2.0, **kind)})


def test_a_provider_that_has_too_little_memory_is_left_out(bench, tmp_path):
    def large(setting):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    case, said, setting = bench.cases.CASES["gelu"], [], bench.case.Setting("micro", 13, tmp_path, stand_in=True)
    providers = bench.lineup.taking_part(case, False, said.append, "cpu", True)
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
    assert list(bench.lineup.taking_part(case, False, said.append)) == ["torch"] and said == ["gemm: ours is not measured: no cpu"]
    assert list(bench.lineup.taking_part(case, False, said.append, "cuda")) == ["torch", "ours"]


def test_a_provider_of_one_precision_takes_no_part_in_another(bench, tmp_path):
    def built(setting):
        assert setting.precision == "bf16"
        return bench.case.Work(run=int, results=lambda: {"y": torch.ones(1)})

    made, said = bench.case.Provider(built, kernels=("gelu",), precisions=("bf16",)), []
    case = dataclasses.replace(bench.cases.CASES["gemm"], providers={"torch": bench.cases.CASES["gemm"].providers["torch"], "half": made})
    setting = bench.case.Setting("micro", 8, tmp_path)
    assert bench.equality.check(case, setting, dict(case.providers)) == {}
    rows = bench.measure.time_case(case, setting, dict(case.providers), 1, say=said.append)
    assert {row.provider for row in rows} == {"torch"} and said == ["gemm: half is not measured: it takes bf16, not float32"]
    with pytest.raises(bench.equality.Unequal, match="half"):  # there it is held against the others
        bench.equality.check_rounded(case, setting, dict(case.providers))


def test_peak_memory_sees_what_a_pass_takes(bench, tmp_path):
    work = bench.case.Work(run=lambda: torch.ones(40 * 2 ** 18).sum(), results=dict)  # 40 MiB
    peak = bench.measure.cpu_peak(bench.case.Provider(lambda setting: work), bench.case.Setting("micro", 1, tmp_path))
    assert peak is None or 38 < peak < 60  # None: not on Linux, or not allowed
    with_state = bench.measure.cpu_peak(bench.case.Provider(lambda setting: dataclasses.replace(work, state=100 * 2 ** 20)), bench.case.Setting("micro", 1, tmp_path))
    assert peak is None or 138 < with_state < 160


# ---------------------------------------------------------------- the commands

def no_room(*given):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_where_results_go_is_tried_before_anything_is_measured_and_left_as_it_was(bench, monkeypatch, tmp_path):
    out = tmp_path / "deep" / "deeper" / "rows.json"
    assert bench.arguments.results_file(str(out)) == out and not list(tmp_path.iterdir())
    monkeypatch.setattr(Path, "write_bytes", no_room)
    for place in (out, tmp_path / "rows.json"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{place}: cannot be written: No space left on device$"):
            bench.arguments.results_file(str(place))
        assert not list(tmp_path.iterdir())


def test_a_place_whose_tables_have_none_or_whose_name_is_too_long_is_refused_before(bench, tmp_path):
    (tmp_path / "rows.md").mkdir()
    for name, why in (("rows", "expected a file in a folder, got a folder rows.md beside it, where its tables or its drawing go"), ("x" * 245, "cannot be written: File name too long")):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{why}$"):
            bench.arguments.results_file(str(tmp_path / f"{name}.json"))
    assert [there.name for there in tmp_path.iterdir()] == ["rows.md"]


def test_results_that_cannot_be_written_in_the_end_have_been_printed(bench, quick, monkeypatch, capsys, tmp_path):  # noqa: F811
    monkeypatch.setattr(bench.rows, "write_text", no_room)
    assert bench.run.main(["native_gelu", "--size", "micro", "--repeats", "1", "--out", str(tmp_path / "rows.json")]) == 1
    out, err = capsys.readouterr()
    assert "## native_gelu (full)" in out and err.endswith(f"timing\nbench: {tmp_path / 'rows.json'}: cannot be written: No space left on device\n")


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
    ("gpu", ["--device", "cpu", "--dry-run", "--only", "dropout", "--out", "/proc/foo/rows.json"], "--out: /proc/foo/rows.json: cannot be written: "),
    ("run", ["dropout", "--out", "/proc/foo/rows.json"], "--out: /proc/foo/rows.json: cannot be written: "),
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
    with pytest.raises(bench.equality.Unequal, match=r"in 1 of 1 tensors; not timed\n  y: root mean square of differences 0.000999, allowed 0.000247$"):
        bench.equality.check_rounded(case, bench.case.Setting("micro", 1, Path(".")), providers)


def test_what_a_kernel_leaves_unwritten_is_red(bench, monkeypatch):
    """Though an earlier run left the right values there."""
    def work(setting):
        return bench.case.Work(lambda: None, lambda: {"y": torch.empty(1000) if ours[0] else torch.zeros(1000)})

    ours, quick = [False], bench.case.Setting("micro", 1, Path("."))
    providers = {"plain": bench.case.Provider(work), "peftdebias": bench.case.Provider(lambda s: (ours.__setitem__(0, True), work(s))[1], kernels=("gelu",))}
    case = bench.case.Case("k", "full", "what", providers, "rows", (1,), bench.case.output_bound, rounded=True)
    with pytest.raises(bench.equality.Unequal, match="y: max.difference. nan"):
        bench.equality.check(case, quick, providers)
    ours[0] = False
    with pytest.raises(bench.equality.Unequal, match="y: max.difference. nan"):
        bench.equality.check_rounded(case, quick, providers)
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_least_that_an_op_reads_and_writes(bench, tmp_path):
    """AdamW: p, g, m and v in, p, m and v out. A block whose GELU is behind its products has no passes of its own for it."""
    cases, setting = bench.cases.CASES, lambda x: bench.case.Setting("micro", x, tmp_path, stand_in=True)  # noqa: E731
    assert cases["sparse_adamw"].providers["torch.optim.AdamW, fused"].build(setting(300)).roof == ((0.0, 7.0 * 4 * 300),)
    for name in ("feed_forward", "trained_feed_forward"):
        library, fused = (cases[name].providers[f"peftdebias, {form}"].build(setting(7)).roof for form in ("library", "fused"))
        assert len(library) == len(fused) + 2 and library[:len(fused)] == fused and all(flops for flops, _ in fused)


def test_a_cell_shows_the_lower_quantile_first_and_settings_that_differ_have_their_x(bench):
    def row(x, setting):
        return bench.rows.Row("k", "old", "full", "time", "ms", "n", x, 2.0, 1.0, 3.0, {"size": "a", "baseline": "old", "setting": setting}, "d", "t", None, "c", "2026")

    text = bench.rows.table([row(1, "short"), row(2, "long")])
    assert "| 2 (1 to 3) |" in text and "- a, n 1: short\n- a, n 2: long" in text and "- a: same" in bench.rows.table([row(1, "same"), row(2, "same")])


def test_a_commit_with_edits_says_so(bench, monkeypatch, tmp_path):
    def git(*words):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a", *words], check=True, capture_output=True)

    git("init"), (tmp_path / "code.py").write_text("1"), git("add", "."), git("commit", "-m", "first")
    monkeypatch.setattr(bench.rows, "ROOT", tmp_path)
    clean = bench.rows.commit.__wrapped__()
    (tmp_path / "code.py").write_text("2")
    assert len(clean) == 12 and bench.rows.commit.__wrapped__() == clean + "+changes"
    (tmp_path / ".git" / "index").write_text("damaged")
    assert bench.rows.commit.__wrapped__() == clean + "+unchecked"


def test_figures_are_of_a_step_over_the_repeats_and_the_warm_up_is_none(bench, quick, monkeypatch, tmp_path):  # noqa: F811
    order, spent = [], {name: iter([100.0, *range(1, 7)]) for name in ("one", "two")}
    works = {name: bench.case.Work(lambda name=name: order.append(name), dict, steps=2, tokens=6) for name in spent}
    monkeypatch.setattr(bench.measure, "seconds", lambda work, passes, device: (work.run(), next(spent[order[-1]]))[1])
    case = bench.case.Case("k", "step", "what", {name: bench.case.Provider(lambda setting, name=name: works[name]) for name in works}, "rows", (1,), bench.case.output_bound, sized=False)
    rows = bench.measure.time_case(case, bench.case.Setting("micro", 1, tmp_path), dict(case.providers), 6, shares={"one": 0.25})
    found = {(row.provider, row.metric_name): (row.y_50, row.y_20, row.y_80) for row in rows}
    assert found["one", "time"] == found["two", "time"] == pytest.approx((1750, 1000, 2500)) and found["one", "rate"] == pytest.approx((6 / 3.5, 6 / 5, 6 / 2))
    assert order == ["one", "two"] + 3 * ["one", "two", "two", "one"]
    assert rows[0].extra_config["size"] == "any" and rows[0].extra_config["largest_difference_as_share_of_allowed"] == 0.25


def test_seconds_are_of_one_pass_that_has_ended(bench, monkeypatch):
    done, device = [], torch.device("cpu")
    work = bench.case.Work(lambda: done.append("run"), dict)
    monkeypatch.setattr(bench.measure, "_finish", lambda device: done.append("finish"))
    for measured, passes, expected in ((bench.measure.seconds, 3, 2.0), (bench.measure.host_seconds, 50, 0.3)):
        now = iter([10.0, 16.0])
        monkeypatch.setattr(bench.measure, "time", types.SimpleNamespace(perf_counter=lambda: next(now)))
        assert measured(work, passes, device) == expected
    assert done == ["finish", *3 * ["run"], "finish", "finish", *20 * ["run"], "finish"]


def test_the_share_is_that_of_the_worst_tensor_in_float32(bench, tmp_path):
    def built(apart):
        def build(setting):
            assert setting.precision == "float32"
            return bench.case.Work(int, lambda: {"a": torch.ones(2, dtype=torch.float64), "b": torch.full((2,), 1 + apart, dtype=torch.float64)})
        return bench.case.Provider(build)

    providers = {"plain": built(0.0), "ours": built(1e-6)}
    case = bench.case.Case("k", "full", "what", providers, "rows", (1,), bench.case.output_bound)
    assert bench.equality.check(case, bench.case.Setting("micro", 1, tmp_path, precision="bf16"), providers) == {"ours": pytest.approx(0.5)}


def test_one_element_may_err_twice_as_much_as_plain_torch_and_no_more(bench):
    def built(all_by, first_by):
        def build(setting):
            y = torch.full((1000,), 1.0 if setting.precision == "float64" else 1 + all_by, dtype=torch.float64)
            y[0] = 1.0 if setting.precision == "float64" else 1 + first_by
            return bench.case.Work(int, lambda: {"y": y.to(torch.float64 if setting.precision == "float64" else torch.bfloat16)})
        return build

    providers = {"plain": bench.case.Provider(built(2 ** -7, 2 ** -7)), "peftdebias": bench.case.Provider(built(0.0, 3 * 2 ** -7), kernels=("gelu",))}
    case = bench.case.Case("k", "full", "what", providers, "rows", (1,), bench.case.output_bound, rounded=True)
    with pytest.raises(bench.equality.Unequal, match=r"\n  y: max.difference. 0.0234, allowed 0.0156$"):
        bench.equality.check_rounded(case, bench.case.Setting("micro", 1, Path(".")), providers)


def test_the_ceilings_count_what_they_do(bench, tmp_path):
    built = {name: bench.cases.CASES[name].providers["torch"].build(bench.case.Setting("micro", x, tmp_path)) for name, x in (("gemm", 8), ("copy", 1))}
    assert built["gemm"].flops == 2 * 8 * 8 * 8 and built["copy"].bytes == 2 * 2 ** 20


def test_every_roof_is_what_has_to_be_moved_and_multiplied(bench, tmp_path):
    """micro: 28 wide, feed-forward 60, 97 words; rank 8, bottleneck 48, prefix 30; 7 rows of 4 bytes."""
    def roof(name, x=7, **fields):
        provider = next(p for n, p in bench.cases.CASES[name].providers.items() if n != "peft")
        return provider.build(bench.case.Setting("micro", x, tmp_path, stand_in=True, **fields)).roof

    row, product, thin = 4 * 7 * 28, (2 * 7 * 28 * 28, 4 * (2 * 7 * 28 + 28 * 28)), 4 * 7 * 48 * 28
    assert roof("lora_linear") == (product, product, (4 * 7 * 8 * 56, 2 * row)) and roof("lora_frozen") == (product, product)
    assert roof("lora_write", 2) == ((0, 2 * 2 * 4 * 3 * 28 * 28),) and roof("lora_grads_two") == ((4 * 7 * 8 * 2 * 56, 3 * row),)
    assert roof("adapter") == ((thin, 3 * row), (2 * thin, 3 * row)) and roof("adapter_frozen") == ((thin, 3 * row), (thin, 2 * row))
    assert roof("mlm_loss") == ((0, 4 * 7 * 97), (0, 2 * 4 * 7 * 97)) and roof("sparse_add") == ((0, 2 * row + 12), (0, 16))
    assert roof("dropout") == ((0, 2 * row), (0, 2 * row)) and roof("norm") == ((0, 4 * row), (0, 3 * row)) and roof("norm_dropout") == ((0, 4 * row), (0, 4 * row))
    assert roof("gelu") == ((0, 2 * 4 * 7 * 60), (0, 3 * 4 * 7 * 60)) and roof("trained_embed", longest=5)[1] == (0, 2 * row + 4 * 7 + 4 * 28 * (97 + 10))
    assert roof("trained_linear", precision="bf16") == ((2 * 7 * 28 * 28, 2 * 2 * 7 * 28 + 4 * 28 * 28),) * 3
    for name, keys in (("attention_even", 5), ("attention_prefix", 35)):
        pairs, tensor = 2 * (2 * 5 * keys) * 28, 4 * 2 * 5 * 28
        assert roof(name, 2, longest=5) == ((2 * pairs, 4 * tensor), (5 * pairs, 8 * tensor))
    norm, update = roof("whole_adamw", 1)
    assert norm[1] * 7 == update[1]


def test_what_an_optimizer_holds_already_is_counted_and_there(bench):
    """Pages that nobody wrote to would be counted a second time, in the pass."""
    parameters = [torch.nn.Parameter(torch.ones(5, 3)), torch.nn.Parameter(torch.ones(7))]
    flat = FlatAdamW([{"params": parameters}], 1e-3)
    flat.gradient.fill_(math.nan)
    assert bench.cases_steps.state_bytes(flat) == 3 * 4 * 22 and not flat.gradient.any() and flat.flat[0][3].data_ptr() == flat.gradient.data_ptr()
    theirs = torch.optim.AdamW(parameters)
    assert bench.cases_steps.state_bytes(theirs) == 0  # it makes its own in the first step


@pytest.mark.parametrize("number", [1, 2])
def test_a_stage_of_sparse_counts_its_optimizer(bench, number, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(bench.cases_sparse, "state_bytes", lambda optimizer: seen.append(optimizer) or 77)
    work = bench.cases_sparse.stage(number)(bench.case.Setting("micro", 20, tmp_path, sequences=4, longest=48))
    assert work.state == 77 and sum(p.numel() for group in seen[0].param_groups for p in group["params"]) > 0


@pytest.mark.skipif(not HAVE_BOTH, reason="compares with transformers and peft, which are not installed")
def test_every_side_of_a_step_drops_clips_and_counts_valid_tokens(bench, monkeypatch, tmp_path):
    setting, modes, clipped, padded = bench.case.Setting("micro", 20, tmp_path, sequences=4, longest=48), [], [], {}
    train, clip, pad = torch.nn.Module.train, torch.nn.utils.clip_grad_norm_, bench.cases_steps.pad
    monkeypatch.setattr(torch.nn.Module, "train", lambda self, mode=True: (modes.append(mode), train(self, mode))[1])
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: (clipped.append(a[1]), clip(*a))[1])
    for name in ("transformers+peft", "transformers+peft, length-bucketed", "peftdebias"):
        padded[name] = []
        monkeypatch.setattr(bench.cases_steps, "pad", lambda batch, device: (padded[name].append(made := pad(batch, device)), made)[1])
        work = bench.cases.CASES["lora_step"].providers[name].build(setting)
        work.run()
        assert modes[-1] and work.steps == 2 and work.tokens == sum(len(s.ids) for batch in bench.texts.texts(setting) for s in batch)
    assert work.state in (0, 3 * 4 * 1792)  # where the library is compiled: two moments and the gradients of A and B, flat
    random, bucketed = (sum(made["input_ids"].numel() for made in padded[name]) for name in list(padded)[:2])
    assert clipped == 6 * [1.0] and work.tokens <= bucketed < random
    assert work.extra["padding_random"] == pytest.approx(1 - work.tokens / random) and work.extra["padding_bucketed"] == pytest.approx(1 - work.tokens / bucketed)


def test_what_a_row_says_of_a_step_is_of_its_method(bench, tmp_path):
    setting = bench.case.Setting("micro", 20, tmp_path, sequences=4, longest=48)
    batches = bench.texts.texts(setting)
    masked, texts = (sum(len(s.rows) for batch in batches for s in batch), sum(map(len, batches)))
    found = {name: bench.cases_steps.facts(setting, batches, name) for name in ("lora", "adapter", "full")}
    assert [(of.get("rank"), of.get("masked"), of.get("asked")) for of in found.values()] == [(8, masked, None), (None, masked, None), (None, None, texts)] and masked > texts


def test_what_is_asked_for_reaches_every_case(bench, monkeypatch):
    """Sizes only where the work depends on them, batches, repeats, the case's own shares; memory of steps alone."""
    seen, memory = [], {}
    monkeypatch.setattr(bench.equality, "check", lambda case, setting, *rest: {"ours": setting.x})
    monkeypatch.setattr(bench.measure, "time_case", lambda case, setting, providers, repeats, **more: (
        memory.update({case.name: more["memory"] is not None}), seen.append((case.name, setting.size_name, setting.x, setting.number, repeats, more["shares"]["ours"])), [])[-1])
    assert bench.run.main(["gemm", "native_gelu", "full_step", "--size", "micro,tiny", "--repeats", "3", "--batches", "5", "--memory"]) == 0
    assert seen == [("gemm", "micro", 1024, 5, 3, 1024), ("gemm", "micro", 2048, 5, 3, 2048), ("full_step", "micro", 54, 5, 3, 54), ("full_step", "tiny", 54, 5, 3, 54),
                    *(("native_gelu", size, x, 5, 3, x) for size in ("micro", "tiny") for x in (860, 2048))]
    assert memory == {"gemm": False, "full_step": True, "native_gelu": False}
    seen.clear()
    assert bench.run.main(["full_step"]) == 0 and [one[3:5] for one in seen] == [(8, 15)]  # by size


def test_a_peak_is_asked_of_a_process_of_its_own_about_the_same_work(bench, monkeypatch, capsys, tmp_path):
    case, seen, answer = bench.cases.CASES["native_gelu"], [], {"returncode": 0}

    def another(words, **options):
        code = bench.run.main(words[2:])
        return types.SimpleNamespace(stdout="noise\n" + capsys.readouterr().out, stderr="why\nbecause\n", **{"returncode": code} | answer)

    monkeypatch.setattr(bench.run, "subprocess", types.SimpleNamespace(run=another))
    monkeypatch.setattr(bench.measure, "cpu_peak", lambda provider, setting: seen.append((provider, setting.size_name, setting.x, setting.number)) or 7.5)
    gauge = bench.run.memory_gauge(case, bench.case.Setting("micro", 2048, tmp_path, batches=3), None)
    assert gauge("peftdebias") == 7.5 and seen == [(case.providers["peftdebias"], "micro", 2048, 3)]
    answer["returncode"] = 1
    assert gauge("peftdebias") is None and capsys.readouterr().err == "native_gelu, micro, rows 2048: peftdebias: peak memory is not measured: because\n"
    compiled = dataclasses.replace(case, providers={"compiled": bench.case.Provider(int, compiled=True)})
    assert bench.run.memory_gauge(compiled, bench.case.Setting("micro", 2048, tmp_path), None)("compiled") is None and len(seen) == 2


def test_the_batches_of_a_pass_are_spread_over_all_lengths(bench, tmp_path):
    """The shortest and the longest among them, which comes first, the others in random order; one is the middle one. Another seed has other texts."""
    def lengths(number, seed=0):
        return [[len(s.ids) for s in batch] for batch in bench.texts.texts(bench.case.Setting("micro", 20, tmp_path, batches=number, seed=seed))]

    every = lengths(bench.texts.WINDOW)
    ascending = sorted(every)
    assert len(every) == bench.texts.WINDOW and sum(ascending, []) == sorted(sum(every, [])) and every[0] == ascending[-1] and every[1:] != ascending[:-1]
    assert lengths(2) == [ascending[-1], ascending[0]] and lengths(1) == [ascending[len(every) // 2]] and lengths(1, seed=1) != lengths(1)
    sample = lambda n: types.SimpleNamespace(ids=range(n))  # noqa: E731
    assert bench.texts.padding([[sample(2), sample(4)], [sample(3), sample(3)]]) == pytest.approx(1 / 7)  # of 2 x 4 and 2 x 3
    assert bench.texts.padding([[sample(2), sample(4)], [sample(3), sample(3)]], 8) == pytest.approx(1 - 12 / 32)
    assert [bench.texts.pad([bench.texts.Sample(*3 * [numpy.arange(11)])], torch.device("cpu"))["input_ids"].shape, bench.texts.multiple_for(torch.device("cuda"))] == [(1, 11), 8]


# ---------------------------------------------------------------- the cases of a CPU

@pytest.fixture
def native(bench):
    """(the module, its cases: name -> (setting -> {provider: Work})) where the library is compiled."""
    from peftdebias import kernels

    if kernels.missing("gelu", "native"):
        pytest.skip("csrc is not compiled here")
    return bench.cases_native


def test_every_provider_of_a_cpu_case_computes_the_same(bench, native, tmp_path):
    few = {"native_adamw": 300, "native_attention": 3, "native_attention_eval": 3}
    for name, case in native.NATIVE_CASES.items():
        setting = bench.case.Setting("micro", few.get(name, 7), tmp_path)
        first, *others = [provider.build(setting).results() for provider in case.providers.values() if provider.compared]
        assert others and not [d for other in others for d in bench.equality.differences(first, other, case.bound) if d.red], name


def test_cpu_cases_train_what_they_say(bench, native, tmp_path):
    expected = {"native_norm": ("hidden", "residual"), "native_norm_trained": ("hidden", "residual", "gain", "bias"), "native_norm_eval": ("hidden", "residual"), "linear": ("x",),
                "linear_trained": ("x", "weight", "bias"), "linear_vocab": ("x",), "scores": ("x",), "native_lora": ("x", "qa", "qb", "va", "vb"), "native_gelu": ("x",)}
    for name, gradients in expected.items():
        for provider in native.NATIVE_CASES[name].providers.values():
            assert list(provider.build(bench.case.Setting("micro", 7, tmp_path)).results()) == ["y", *(f"gradient of {one}" for one in gradients)], name


def test_cpu_cases_with_dropout_drop_on_every_side(bench, native, tmp_path):
    def outputs(name, x=7):
        return {p: provider.build(bench.case.Setting("micro", x, tmp_path)).results()["y"] for p, provider in native.NATIVE_CASES[name].providers.items()}

    for name in ("native_norm", "native_attention"):
        plain = outputs(f"{name}_eval")["torch"]
        assert all((y - plain).abs().max() > 0.01 for y in outputs(name).values()), name
    assert all(0.05 < float((y == 0).float().mean()) < 0.2 for y in outputs("native_dropout", 100).values())


def test_cpu_cases_time_what_their_providers_are_called(bench, native, monkeypatch, tmp_path):
    from peftdebias.kernels import dispatch

    given, setting = [], bench.case.Setting("micro", 300, tmp_path)
    monkeypatch.setattr(native, "FlatAdamW", lambda groups, lr, update: given.append(update) or types.SimpleNamespace(step=int))
    for name in ("plain twin", "peftdebias"):
        native.NATIVE_CASES["native_adamw"].providers[name].build(setting)
    assert given[0] is native.adamw_ref and given[1] is native.compiled("adamw", native.adamw_ref)
    for op in ("dropout", "norm", "gelu", "attention", "mlm_loss", "lora_apart", "adamw"):
        assert native.compiled(op, native.gelu_ref) is not native.gelu_ref
    given.clear()
    monkeypatch.setattr(native, "linear", lambda x, weight, bias: (given.append(dispatch.asked("linear")), torch.nn.functional.linear(x, weight, bias))[1])
    for provider, form in (("torch's BLAS", "blas"), ("oneDNN", "onednn")):
        native.NATIVE_CASES["linear"].providers[provider].build(setting).run()
        assert set(given) == {form} and not given.clear()


def test_adamw_of_a_gpu_case_is_the_one_its_provider_is_called(bench, monkeypatch, tmp_path):
    """A whole base's gradients are clipped in what runs and in what a CUDA graph holds."""
    adamw, clipped, setting = bench.cases_adamw, [], bench.case.Setting("micro", 1, tmp_path, stand_in=True)
    library, whole, clip = torch.optim.AdamW, adamw.WholeAdamW, torch.nn.utils.clip_grad_norm_
    made = {"library": [], "flat": [], "whole": []}
    monkeypatch.setattr(adamw, "fused", lambda op, twin, setting: op if op == "adamw" else type("Fused", (twin,), {}))
    monkeypatch.setattr(adamw, "FlatAdamW", lambda groups, lr, update: (made["flat"].append(update), types.SimpleNamespace(step=int, apply=int))[1])
    monkeypatch.setattr(adamw, "WholeAdamW", lambda groups, lr, many: (made["whole"].append(many), whole(groups, lr, many))[1])
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **more: (made["library"].append(more["fused"]), library(groups, **more))[1])
    monkeypatch.setattr(whole, "clip", lambda self, parameters, most: clipped.append(most))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: (clipped.append(a[1]), clip(*a))[1])
    works = {name: {p: provider.build(dataclasses.replace(setting, x=x)) for p, provider in bench.cases.CASES[name].providers.items()}
             for name, x in (("sparse_adamw", 300), ("whole_adamw", 1))}
    assert made["library"] == [True, True] and made["flat"][0] is adamw.adamw_ref and made["flat"][1] == "adamw"
    assert made["whole"][0] is adamw.AdamWOfManyRef and issubclass(made["whole"][1], adamw.AdamWOfManyRef) and made["whole"][1] is not adamw.AdamWOfManyRef
    for work in works["whole_adamw"].values():
        work.run()
    assert clipped == 3 * [1.0] and [work.capture is None for work in works["whole_adamw"].values()] == [True, False, False]
    for work in list(works["whole_adamw"].values())[1:]:
        work.capture()
    assert clipped == 5 * [1.0]


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
