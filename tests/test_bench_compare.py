"""bench/compare.py: a floor that torch's own count confirms, both stages of sparse fine-tuning, a provider under another interpreter, bars, drawing. No figure is looked at."""

import dataclasses
import importlib
import json
import subprocess
import sys
import types
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from peftdebias import kernels

from .benched import HAVE_BOTH, modules
from .outside import one_thread  # noqa: F401  (a fixture: small models on one thread)

HUB = "/somewhere/bin/python"
bench = modules("bars", "case", "cases_sparse", "cases", "cases_steps", "compare", "equality", "install", "lanes", "lineup", "measure", "plots", "process", "rows")


@pytest.fixture
def setting(bench, tmp_path):
    return bench.case.Setting("micro", 20, tmp_path, sequences=4, longest=48)


def row(bench, case, provider, y, metric="time", size="base", **extra):
    extra = {"size": size, "baseline": "transformers+peft", "floor_ms": 100.0, "gemm_gflops": 200.0, "blas_gflops": 100.0} | extra
    return bench.rows.Row(case, provider, "step", metric, bench.rows.UNITS[metric], "mean_length", 54, y, 0.9 * y, 1.1 * y, extra, "d", "t", None, "c", "2026")


# ---------------------------------------------------------------- the floor

@pytest.mark.parametrize("name,apart", [("lora", 0.02), ("adapter", 1e-4), ("prefix", 0.03), ("full", 1e-3), ("sparse", 1e-4)])
def test_the_floor_holds_the_flops_that_torch_counts(bench, tmp_path, name, apart):
    """lora's own products are not in it; the count of prefix leaves out what nothing below its first layer asks for; attention's twin pads a little."""
    from peftdebias import kernels

    setting = bench.case.Setting("tiny", 54, tmp_path, sequences=4, batches=2)
    with kernels.use("torch"):
        work = (bench.cases_sparse.stage(1) if name == "sparse" else bench.cases_steps.ours(name))(setting)
        with FlopCounterMode(display=False) as counted:
            work.run()
    assert counted.get_total_flops() == pytest.approx(bench.cases_steps.needed_flops(setting, name), rel=apart)


# ---------------------------------------------------------------- sparse_step

def test_the_places_are_k_spread_over_all_sites(bench, setting):
    from peftdebias import methods
    from peftdebias.sites import parameter_size

    method = methods.create("sparse", setting.config)
    places = bench.cases_sparse.evenly_spaced(method)
    assert sum(map(len, places.values())) == method.config.k
    assert all((there[1:] > there[:-1]).all() and 0 <= there[0] and there[-1] < parameter_size(setting.config, site) for site, there in places.items())


def test_stages_train_what_learn_hands_over_and_leave_the_base_as_it_was(bench, setting):
    first, second = (bench.cases_sparse.stage(n)(setting) for n in (1, 2))
    before, beside = first.results(), second.results()
    bench.equality.check(bench.lanes.COMPARED["sparse_step"], setting, dict(bench.lanes.COMPARED["sparse_step"].providers))
    assert set(before) == set(beside) and "gradient of embeddings.word" in before and not any(name.endswith(".key.bias") for name in before)
    again = first.results()
    assert all(torch.equal(before[name], again[name]) for name in before)
    first.run(), second.run()
    moved = first.results()
    assert not torch.equal(moved["gradient of embeddings.word"], before["gradient of embeddings.word"])


@pytest.mark.skipif(not HAVE_BOTH, reason="compares with transformers and peft, which are not installed")
@pytest.mark.parametrize("name", ["lora", "full"])
def test_products_in_bf16_are_measured_where_they_are_asked_for(bench, setting, monkeypatch, name):
    """Ours and theirs lose what the float32 step loses, rounded; and only on a processor that multiplies them."""
    case, said = bench.cases.CASES[f"{name}_step"], []
    monkeypatch.setattr(bench.lineup, "no_bf16", lambda: "")
    among = bench.lineup.taking_part(case, False, said.append, bf16=True)
    mine = {provider for provider in among if provider.endswith("bf16")}
    assert len(mine) == 3 and "peftdebias, bf16" in mine and not mine & set(bench.lineup.taking_part(case, False, said.append))
    linears = importlib.import_module("peftdebias.ops.linear")
    monkeypatch.setattr(linears, "LEAST", 0.0), monkeypatch.setattr(linears, "LEAST_BF16", 8)
    with kernels.use("torch"):
        losses = {provider: float(among[provider].build(setting).results()["loss"]) for provider in ("peftdebias", *mine)}
    for provider in mine:
        assert losses[provider] == pytest.approx(losses["peftdebias"], rel=1e-2) and losses[provider] != losses["peftdebias"], provider
    monkeypatch.setattr(bench.lineup, "no_bf16", lambda: "too old"), said.clear()
    assert not mine & set(bench.lineup.taking_part(case, False, said.append, bf16=True))
    assert f"{name}_step: peftdebias, bf16 is not measured: --precision bf16: too old" in said


def test_sparse_step_sees_a_wrong_gradient(bench, setting, monkeypatch):
    case = bench.lanes.COMPARED["sparse_step"]
    original = bench.cases_sparse.moved

    def elsewhere(model, places, values):
        return original(model, places, values | {"layers.0.attention.output": -values["layers.0.attention.output"]})

    monkeypatch.setattr(bench.cases_sparse, "moved", elsewhere)
    with pytest.raises(bench.equality.Unequal, match="peftdebias, stage 2 differs from peftdebias, stage 1"):
        bench.equality.check(case, setting, dict(case.providers))


def test_stages_step_as_training_does_and_count_valid_tokens(bench, setting, monkeypatch):
    """Each with the pull of its own values, clipped."""
    sparse, made = bench.cases_sparse, []
    eager = sparse.training.STEPS["eager"]
    monkeypatch.setitem(sparse.training.STEPS, "eager", lambda *a, **more: made.append((a[3], more)) or eager(*a, **more))
    for number in (1, 2):
        work = sparse.stage(number)(setting)
        parameters, given = made.pop()
        assert (given["clip"], given["precision"]) == (1.0, "float32") and work.tokens == sum(len(s.ids) for batch in sparse.texts(setting) for s in batch) and work.steps == 2
        with torch.no_grad():
            for p in parameters.values():
                p.add_(1.0)
                p.grad = torch.zeros_like(p)
        given["pull"]()
        assert all((p.grad > 0).all() for p in parameters.values()), number


# ---------------------------------------------------------------- processes

def test_another_interpreter_gets_adapterhubs_providers_and_ours_stay_here(bench, setting):
    case = bench.lanes.case_of("adapter_step", HUB)
    theirs = {f"transformers+adapters{dress}" for dress in ("", ", compiled", ", length-bucketed", ", bf16", ", length-bucketed, bf16")}
    assert {name for name, p in case.providers.items() if p.python == HUB} == theirs and case.baseline == "transformers+adapters"
    assert "peftdebias" in case.providers and not any("by hand" in name for name in case.providers)
    python, script, spec, *what = bench.lanes.command(case, case.baseline, setting, "peak")
    assert (python, what) == (HUB, ["peak"]) and json.loads(spec)["hub"] == HUB and Path(script).name == "lanes.py"
    assert bench.lanes.command(case, "peftdebias", setting)[0] == sys.executable
    assert bench.lanes.case_of("lora_step", HUB) is bench.lanes.COMPARED["lora_step"]
    assert bench.lanes.case_of("adapter_step", None).baseline == "transformers, adapters by hand"


def test_results_of_another_process_are_those_of_this_one(bench, setting):
    """Whatever the interpreter: here it is this one, asked to run a provider of ours."""
    case = bench.lanes.case_of("adapter_step", sys.executable)
    provider = dataclasses.replace(case.providers["peftdebias"], python=sys.executable)
    case = dataclasses.replace(case, providers=case.providers | {"peftdebias": provider})
    found = bench.lanes.results("peftdebias", provider, setting, case)
    here = bench.equality.in_this_process("peftdebias", provider, setting)
    assert set(found) == set(here)
    assert not any(d.red for d in bench.equality.differences(here, found, bench.case.output_bound))
    with pytest.raises(RuntimeError, match="^peftdebias, none: KeyError: 'peftdebias, none'$"):
        bench.lanes.results("peftdebias, none", provider, setting, dataclasses.replace(case, providers={"peftdebias, none": provider}))


def test_a_file_counts_tensors_and_configuration_and_no_readme(bench):
    def save(folder):
        folder.mkdir()
        for name in ("a.safetensors", "a.json", "README.md"):
            (folder / name).write_bytes(bytes(1024))

    assert bench.lanes.file_kib(bench.case.Work(run=dict, results=dict, save=save)) == 2 and bench.lanes.file_kib(bench.case.Work(run=dict, results=dict)) is None


class Lane:
    """A provider's process whose passes take what is given."""

    about = {"steps": 2, "tokens": 8, "torch": "t", "triton": None, "versions": {}, "extra": {}}

    def __init__(self, name, spent, asked):
        self.name, self.spent, self.asked = name, iter(spent), asked

    def ask(self, what):
        self.asked.append(self.name)
        return next(self.spent) if what == "pass" else 7.0

    def close(self):
        pass


def test_the_ceiling_is_the_rate_of_one_product(bench, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(bench.compare, "GEMM", (2, 3, 5)), monkeypatch.setattr(bench.compare, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    assert bench.compare.gemm_rates(2)["blas"] == pytest.approx(2 * 2 * 3 * 5 / 0.2)  # five products a second


def test_figures_are_of_a_step_and_the_floor_of_the_best_library(bench, setting, monkeypatch):
    monkeypatch.setattr(bench.compare, "gemm_rates", lambda repeats=7: {"blas": 1e9, "onednn": 4e9})
    monkeypatch.setattr(bench.compare.lanes, "lane", lambda case, provider, setting: Lane(provider, range(1, 7), []))
    monkeypatch.setattr(bench.compare.lanes, "peak_mib", lambda *_: 5.0)
    found = bench.compare.compare(bench.lanes.COMPARED["lora_step"], setting, {"peftdebias": bench.case.Provider(dict)}, 6, 1, {})
    of = {row.metric_name: row for row in found}
    assert {name: (r.y_50, r.y_20, r.y_80) for name, r in of.items()} == {"time": pytest.approx((1750, 1000, 2500)), "rate": pytest.approx((8 / 3.5, 8 / 5, 8 / 2)), "peak memory": (5, 5, 5),
                                                                         "saved for backward": (7, 7, 7), "adapter file": (7, 7, 7)}
    extra = of["time"].extra_config
    assert extra["floor_ms"] == pytest.approx(1000 * bench.cases_steps.needed_flops(setting, "lora") / 4e9 / 2) and (extra["gemm_gflops"], extra["blas_gflops"]) == (4, 1)


def test_passes_of_two_take_turns_and_the_ratio_is_ours_over_theirs(bench):
    asked = []
    assert bench.compare.in_turns(Lane("ours", 4 * [3.0], asked), Lane("theirs", 4 * [2.0], asked), 4) == [1.5] * 4
    assert asked == 2 * ["theirs", "ours", "ours", "theirs"]
    assert bench.bars.pairs("full_step") == [("peftdebias, frozen module folded", "peftdebias")] and bench.bars.pairs("lora_step") == []


def test_memory_is_no_ratio_of_passes(bench):
    folded, plain = (row(bench, "full_step", p, y, "peak memory", **more) for p, y, more in ((bench.bars.FOLDED, 50.0, {"paired": {"peftdebias": [1.03] * 3}}), ("peftdebias", 100.0, {})))
    (_, line) = bench.bars.lines([plain, folded])
    assert line == "full_step, base: peftdebias, frozen module folded: peak memory 50 MiB; 0.5 of peftdebias"


def test_every_repeat_begins_with_another_provider(bench, setting, monkeypatch):
    asked, case = [], bench.lanes.COMPARED["sparse_step"]
    monkeypatch.setattr(bench.compare, "gemm_rates", lambda repeats=7: {"blas": 1e9}), monkeypatch.setattr(bench.compare, "in_turns", lambda *_: [1.0])
    monkeypatch.setattr(bench.compare.lanes, "lane", lambda case, provider, setting: Lane(provider[-1], 4 * [1.0], asked))
    monkeypatch.setattr(bench.compare.lanes, "peak_mib", lambda *_: 1.0)
    bench.compare.compare(case, setting, dict(case.providers), 4, 1, {})
    assert "".join(asked[:8]) == "12211221"


def test_a_process_that_the_memory_is_not_enough_for_is_one_line(bench, tmp_path, capsys, monkeypatch):
    def ended(*given):
        raise bench.process.Ended("theirs: its process was killed by signal 9 (out of memory?)")

    monkeypatch.setattr(bench.compare, "compare", ended), monkeypatch.setattr(bench.compare, "check", lambda *given: {})
    assert bench.compare.main(["sparse", "--size", "micro", "--out", str(tmp_path / "rows.json")]) == 2 and not list(tmp_path.iterdir())
    assert capsys.readouterr().err.splitlines()[-1] == ("bench: sparse_step, micro, mean_length 54: theirs: its process was killed by signal 9 (out of memory?); expected all 2 to last, "
                                                        "side by side")


def test_what_was_measured_outlasts_a_process_that_ends_later_and_a_library_that_does_not_start(bench, tmp_path, capsys, monkeypatch):
    def compared(case, *given):
        if case.name != "lora_step":
            raise bench.process.Ended("theirs: its process ended with code 1")
        return [row(bench, "lora_step", "peftdebias", 200.0)]

    def refused(hub):
        raise subprocess.CalledProcessError(1, ["python", "-c", "import torch, peft"])

    monkeypatch.setattr(bench.compare, "check", lambda *given: {}), monkeypatch.setattr(bench.compare, "compare", compared)
    monkeypatch.setattr(bench.install, "start_up", refused), monkeypatch.setattr(bench.install, "sizes", lambda hub: ["asked"])
    out = tmp_path / "rows.json"
    assert bench.compare.main(["lora", "sparse", "full", "--size", "micro", "--out", str(out)]) == 2
    assert [r.kernel_name for r in bench.rows.read(out)] == ["lora_step"] and out.with_suffix(".svg").exists()
    printed, said = capsys.readouterr()
    line = "sparse_step, micro, mean_length 54: theirs: its process ended with code 1; expected all 2 to last, side by side"
    assert said.endswith(f"\nbench: {line}\n") and "full_step, micro, mean_length 54: timing" not in said
    for text in (printed, out.with_suffix(".md").read_text()):
        assert f"## Not measured\n\n- {line}; nothing behind it either\n" in text and "- asked\n" in text
        assert "- not measured: CalledProcessError: Command '['python', '-c', 'import torch, peft']' returned non-zero exit status 1.\n" in text


def test_all_cases_are_checked_before_one_is_timed(bench, tmp_path, capsys, monkeypatch):
    def checked(case, *given):
        if case.name == "full_step":
            raise bench.equality.Unequal("unlike")
        return {}

    monkeypatch.setattr(bench.compare, "check", checked), monkeypatch.setattr(bench.compare, "compare", lambda *given: pytest.fail("timed"))
    assert bench.compare.main(["sparse", "full", "--size", "micro", "--out", str(tmp_path / "rows.json")]) == 1 and not list(tmp_path.iterdir())
    assert capsys.readouterr().out == "unlike\n"


def test_compare_writes_rows_tables_bars_and_a_drawing(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench.install, "start_up", lambda hub: ["not asked"])
    monkeypatch.setattr(bench.compare, "GEMM", (64, 96, 128))
    out = tmp_path / "deep" / "rows.json"
    assert bench.compare.main(["sparse", "--size", "micro", "--batches", "1", "--repeats", "1", "--pairs", "2", "--out", str(out)]) == 0
    rows = {(r["provider"], r["metric_name"]): r for r in json.loads(out.read_text())}
    first, second = bench.cases_sparse.FIRST, bench.cases_sparse.SECOND
    assert {metric for _, metric in rows} == {"time", "rate", "peak memory", "saved for backward", "adapter file"} and (first, "adapter file") not in rows
    assert list(rows[second, "time"]["extra_config"]["paired"]) == [first] and len(rows[second, "time"]["extra_config"]["paired"][first]) == 2
    assert rows[first, "time"]["extra_config"]["versions"]["transformers"] if bench.rows.version("transformers") else True
    text, drawing = out.with_suffix(".md").read_text(), out.with_suffix(".svg").read_text()
    assert "](rows.svg)" in text and "## Ours beside theirs" in text and f"2 pairs of passes) of {first}" in text and "peftdebias: " in text
    assert drawing == bench.plots.draw(bench.rows.read(out)) and "sparse_step, micro, mean_length 54: equal" in capsys.readouterr().err


@pytest.mark.parametrize("words,shown", [
    (["nope"], "no case 'nope'; expected some of lora, adapter, prefix, full, sparse"),
    (["--size", "huge"], "no size 'huge'"),
    (["--pairs", "0"], "--pairs: expected at least 1, got 0"),
    (["--out", "rows.csv"], "rows.csv: expected a file name that ends in .json"),
    (["adapter", "--adapters-venv", "/nowhere"], "--adapters-venv /nowhere: expected a virtual environment whose bin/python imports adapters"),
])
def test_bad_arguments_get_one_line_and_exit_code_2(bench, capsys, words, shown):
    try:
        code = bench.compare.main(words)
    except SystemExit as left:
        code = left.code
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("bench: ") and shown in err


def test_packages_are_counted_once_with_all_that_they_require(bench):
    found = bench.install.installed(("safetensors", "numpy", "Safetensors"), sys.path)
    assert set(found) == {"safetensors", "numpy"} and all(mib > 0 for mib in found.values()) and bench.install.installed(("no-such-package",), sys.path) == {}


# ---------------------------------------------------------------- bars

def test_bars_are_met_or_missed_in_words(bench):
    them = "transformers+peft"
    found = [row(bench, "lora_step", p, y, m) for p, y, m in (
        (them, 500.0, "time"), (f"{them}, length-bucketed", 250.0, "time"), ("peftdebias", 126.0, "time"), (them, 1000.0, "peak memory"), ("peftdebias", 300.0, "peak memory"))]
    time, memory = bench.bars.lines(found)
    assert time == ("lora_step, base: peftdebias: 126 ms a step; 0.252 of transformers+peft (bar 0.25: missed); 0.504 of transformers+peft, length-bucketed (bar 0.6: met); "
                    "1.26 of the floor, 100 ms at 200 GFLOP/s (torch.mm: 100) (bar 1.3: met)")
    assert memory == "lora_step, base: peftdebias: peak memory 300 MiB; 0.3 of transformers+peft (bar 0.3: met)"
    found[2].extra_config["precision"] = "bf16"
    assert "; 1.26 of the floor in float32, 100 ms at 200 GFLOP/s" in bench.bars.lines(found)[0]
    small = bench.bars.lines([dataclasses.replace(r, extra_config=r.extra_config | {"size": "small"}) for r in found])
    assert "0.252 of transformers+peft (bar 0.1: missed)" in small[0] and small[0].endswith("(torch.mm: 100)")  # BERT-base alone is held against the floor
    assert not any("bar" in line for line in bench.bars.lines([dataclasses.replace(r, extra_config=r.extra_config | {"size": "micro"}) for r in found]))


def test_a_ratio_near_one_is_decided_on_pairs(bench):
    """The medians of both say 0.9; passes in turns say 1.03."""
    folded = row(bench, "full_step", bench.bars.FOLDED, 90.0, paired={"peftdebias": [1.01, 1.02, 1.03, 1.04, 1.9]})
    lines = bench.bars.lines([row(bench, "full_step", "peftdebias", 100.0), folded])
    assert "1.03 (1.018 to 1.212, 5 pairs of passes) of peftdebias (bar 1.02: missed)" in lines[1] and "transformers: not measured here (bar 0.5)" in lines[1]
    assert "folded" not in lines[0]


def test_adapters_by_hand_are_not_what_the_bars_are_about(bench):
    lines = bench.bars.lines([row(bench, "adapter_step", "transformers, adapters by hand", 500.0), row(bench, "adapter_step", "peftdebias", 100.0)])
    assert "0.2 of transformers, adapters by hand;" in lines[0] and "transformers+adapters: not measured here (bar 0.25)" in lines[0]


def test_every_bar_names_a_case_and_its_providers(bench):
    for bar in bench.bars.BARS:
        providers = bench.lanes.case_of(bar.case, HUB).providers
        assert bar.provider in providers and (bar.of in providers or bar.of == bench.bars.FLOOR) and set(bar.sizes) <= set(bench.case.SIZES)
    assert {bar.case for bar in bench.bars.BARS} == set(bench.lanes.COMPARED)


# ---------------------------------------------------------------- the drawing

def test_the_drawing_shows_every_provider_and_the_floor_and_says_so(bench, tmp_path):
    found = [row(bench, "lora_step", p, y, size=size) for size in ("small", "base") for p, y in (("transformers+peft", 400.0), ("peftdebias", 200.0))]
    root = ElementTree.fromstring(bench.plots.draw(found + [row(bench, "lora_step", "peftdebias", 7.0, "peak memory")]))
    name = "{http://www.w3.org/2000/svg}"
    assert root.get("role") == "img" and root.get("aria-labelledby") == "title desc"
    assert root.find(f"{name}desc").text == bench.plots.describe(found) and "lora_step, base: transformers+peft 400, peftdebias 200, floor 100" in bench.plots.describe(found)
    bars = [r for r in root.iter(f"{name}rect")][1:]  # behind the paper
    widths = [float(r.get("width")) for r in bars]
    assert len(bars) == 4 and widths[0] == pytest.approx(2 * widths[1], rel=1e-2) and {r.get("fill") for r in bars} == {bench.plots.OURS, bench.plots.THEIRS}
    words = [t.text for t in root.iter(f"{name}text")]
    assert words.count("peftdebias") == 2 and "200 (180 to 220)" in words and sum(w.startswith("floor 100: ") for w in words) == 2
    top = max(float(r.get("y")) + float(r.get("height")) for r in bars)
    assert top < float(root.get("height"))


def test_plots_draws_files_and_refuses_others_in_one_line(bench, tmp_path, capsys):
    good, bad, empty = (tmp_path / f"{n}.json" for n in ("good", "bad", "empty"))
    bench.rows.write(good, [row(bench, "lora_step", "peftdebias", 200.0)], "t")
    bad.write_text("{")
    empty.write_text("[]")
    assert bench.plots.main([str(good)]) == 0 and good.with_suffix(".svg").read_text().startswith("<svg ")
    good.with_suffix(".svg").unlink(), good.with_suffix(".svg").mkdir()
    for words, shown in (([str(good)], f"{tmp_path}/good.svg: "), ([str(bad)], "bad.json: expected the rows of a benchmark"), ([str(empty)], "expected steps with a floor"), ([], "the following arguments are required: FILE.json"), (["x.svg"], "x.svg: no such file")):
        try:
            code = bench.plots.main(words)
        except SystemExit as left:
            code = left.code
        assert code == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and shown in err


def test_the_other_environment_needs_few_packages():
    """cases_hub.py's: torch, numpy, tokenizers, safetensors, tqdm; AdapterHub's brings the rest of its own."""
    code = """if True:
        import sys

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("tomli_w", "jinja2", "matplotlib", "pyarrow", "transformers", "peft", "triton"):
                    raise ModuleNotFoundError(name, name=name)

        sys.meta_path.insert(0, Absent())
        import bench.lanes
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent, timeout=120)


def test_a_process_that_ends_while_its_peak_is_taken_costs_that_figure_alone(bench, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench.lanes, "command", lambda *_: [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    setting = bench.case.Setting("micro", 40, tmp_path)
    assert bench.lanes.peak_mib(bench.lanes.COMPARED["lora_step"], "peftdebias", setting) is None
    assert "lora_step: peftdebias: peak memory is not measured: its process ended with -9" in capsys.readouterr().err
