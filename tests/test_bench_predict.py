"""bench/predict.py and bench/scale.py at tiny sizes: equality before time, rows with their schema, what is computed from them. No figure is looked at."""

import json
import sys
import types
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from peftdebias.encoder import EncoderConfig, Model
from peftdebias.tokens import load_tokenizer

from .benched import FIELDS, ROOT, modules
from .outside import library, one_thread  # noqa: F401

bench = modules("cases_predict", "cases_scale", "compare", "measure", "predict", "process", "rows", "scale")


@pytest.fixture
def task(bench, small, tmp_path):
    return bench.cases_predict.Task("micro", str(small.base), str(small.corpus), None, 40, 32, str(tmp_path))


def words_of(task, *more) -> list[str]:
    return [task.file, "--tokenizer", task.tokenizer, "--size", "micro", "--longest", "32", "--texts", "40", "--singles", "3", "--large", "40", "--repeats", "2", "--file-repeats", "2", *more]


# ---------------------------------------------------------------- predict

def test_answers_differ_from_text_to_text_and_are_the_same_on_both_sides(bench, task):
    """Without that, equality would say nothing."""
    library("transformers"), library("peft")
    texts = task.texts()
    shares = bench.predict.check(task, texts)
    assert set(shares) == set(bench.cases_predict.PREDICTORS) and max(shares.values()) <= 1
    probabilities = [answer["probabilities"]["a"] for answer in bench.cases_predict.ours(True)(task)(texts, 1)]
    assert len(texts) == 40 and max(probabilities) - min(probabilities) > 1e-2


def test_both_sides_cut_long_texts_alike(bench, task, tmp_path):
    library("transformers"), library("peft")
    long = Path(tmp_path / "long.txt")
    long.write_text("\n".join(" ".join([text] * 9) for text in task.texts()[:5]) + "\n")
    with pytest.warns(UserWarning, match="5 of 5 texts are longer than 32 tokens"):
        bench.predict.check(bench.cases_predict.dataclasses.replace(task, file=str(long)), long.read_text().splitlines())


@pytest.mark.parametrize("merged", [False, True])
def test_the_module_counts(bench, task, merged, monkeypatch):
    texts, module_values = task.texts()[:4], bench.cases_predict.module_values
    found = bench.cases_predict.ours(merged)(task)(texts, 1)
    monkeypatch.setattr(bench.cases_predict, "module_values", lambda *names: {key: 0 * value for key, value in module_values(*names).items()})
    assert found != bench.cases_predict.ours(merged)(task)(texts, 1)


def test_a_difference_is_red_and_nothing_is_timed(bench, task, monkeypatch, capsys, tmp_path):
    build = bench.cases_predict.ours(True)

    def spoilt(task):
        predict = build(task)
        return lambda texts, batch: [answer | {"probabilities": {k: p + 1e-4 for k, p in answer["probabilities"].items()}} for answer in predict(texts, batch)]

    monkeypatch.setattr(bench.predict.importlib.util, "find_spec", lambda name: None)  # nor is the first of PREDICTORS what the others are held against then
    monkeypatch.setattr(bench.predict, "PREDICTORS", {"transformers+peft": None, "peftdebias": bench.cases_predict.ours(False), "peftdebias, merged": spoilt})
    monkeypatch.setattr(bench.predict, "Process", lambda *a: pytest.fail("timed"))
    assert bench.predict.main(words_of(task, "--out", str(tmp_path / "rows.json"))) == 1
    printed = capsys.readouterr().out
    assert "peftdebias, merged differs from peftdebias; nothing is timed" in printed and "max|difference| 0.0001, allowed 2e-06" in printed and not (tmp_path / "rows.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("left_out", [("transformers+peft", "peftdebias"), ()], ids=["some", "all"])
def test_rows_bars_and_ceiling(bench, task, left_out, capsys, tmp_path, monkeypatch):
    """Providers of both sides, each in its own process."""
    library("transformers"), library("peft")
    one_call, whole_file = ([name for name in names if name not in (*left_out, *bench.cases_predict.IN_BF16)] for names in (bench.cases_predict.ONE_CALL, bench.cases_predict.WHOLE_FILE))
    monkeypatch.setattr(bench.predict, "ONE_CALL", one_call), monkeypatch.setattr(bench.predict, "WHOLE_FILE", whole_file)
    monkeypatch.setattr(bench.compare, "GEMM", (64, 96, 128))
    out = tmp_path / "rows.json"
    assert bench.predict.main(words_of(task, "--out", str(out))) == 0
    rows, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert all(list(row) == FIELDS and row["mode"] == "predict" and row["y_20"] <= row["y_50"] <= row["y_80"] for row in rows)
    calls = {(row["provider"], row["x_value"], row["metric_name"]) for row in rows if row["kernel_name"] == "predict_calls"}
    assert calls == {(name, x, metric) for name in one_call for x in (1, 40) for metric in ("time", "texts")}  # calls are as large as they are, and fewer than 100
    times = {row["provider"]: row for row in rows if row["kernel_name"] == "predict_file" and row["metric_name"] == "time"}
    ceiling = times[bench.predict.CEILING]
    assert set(times) == {*whole_file, bench.predict.CEILING}
    assert ceiling["y_50"] == pytest.approx(ceiling["extra_config"]["floor_ms"] + ceiling["extra_config"]["tokenizer_ms"]) and ceiling["extra_config"]["floor_ms"] > 0
    assert "## The whole file" in printed and "asked for at least 1.4" in printed and "random weights" in printed and "mean" in printed


def test_a_hundred_calls_have_a_slowest(bench):
    found = bench.predict.metrics_of([[0.001] * 98 + [0.003] * 2, [0.002] * 100, [0.001] * 100], 100)
    assert found["time"][0] == pytest.approx(1.0) and found["p99"][0] == pytest.approx(2.0) and found["texts"][0] == pytest.approx(100 / 0.104)
    assert set(bench.predict.metrics_of([[0.001] * 99], 99)) == {"time", "texts"}


def test_bars_say_met_and_not_met(bench):
    def row(provider, ms):
        return bench.rows.Row("predict_file", provider, "predict", "time", "ms", "texts", 1, ms, ms, ms, {}, "d", "t", None, "c", "2026")

    theirs = bench.predict.THEIRS
    lines = bench.predict.bars([row(theirs, 2900.0), row(f"{theirs}, sorted by length", 1500.0), row(bench.predict.OURS, 1000.0), row(bench.predict.CEILING, 800.0)])
    assert lines == ["peftdebias, merged: 1.00 s, 1.25 times the ceiling (0.80 s)",
                     f"1.50 times as fast as {theirs}, sorted by length; asked for at least 1.4: met; at the ceiling it would be 1.88",
                     f"2.90 times as fast as {theirs}, in the order of the file; asked for at least 3: not met; at the ceiling it would be 3.62"]


def test_the_floor_counts_the_products_that_run(bench, small, monkeypatch):
    """Against torch's own counter, which sees into the specification of attention and not into torch's fused op."""
    from torch.utils.flop_counter import FlopCounterMode

    from peftdebias import kernels
    from peftdebias.ops import attention_ref
    from peftdebias.tasks import labelled_samples, scored_batches

    config = EncoderConfig(kind="bert", layers=3, hidden=32, heads=2, feed_forward=64, vocab=500, max_positions=64)
    model = Model(config, labels=("a", "b")).eval()
    encoded = load_tokenizer(small.base).encode(["he is a nurse", "she"], max_length=16)
    monkeypatch.setattr("peftdebias.encoder.attention", attention_ref)
    with kernels.use("torch"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        for _, batch in scored_batches(model, labelled_samples(encoded)):
            model.class_logits(batch)
    assert bench.cases_predict.forward_flops(config, [len(e.ids) for e in encoded]) == pytest.approx(counter.get_total_flops())


def test_who_is_called_merged_is_and_batches_are_as_they_say(bench, task, monkeypatch):
    library("transformers"), library("peft")
    import peft
    import transformers

    merged, lengths, merge, theirs, pad = [], [], bench.cases_predict.patch.merge, peft.LoraModel.merge_and_unload, transformers.PreTrainedTokenizerBase.pad
    monkeypatch.setattr(bench.cases_predict.patch, "merge", lambda *a: (merged.append(1), merge(*a))[1])
    monkeypatch.setattr(peft.LoraModel, "merge_and_unload", lambda *a, **k: (merged.append(1), theirs(*a, **k))[1])
    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "pad", lambda self, rows, **k: (lengths.extend(map(len, rows["input_ids"])), pad(self, rows, **k))[1])
    texts = task.texts()[:6]
    for name, build in bench.cases_predict.PREDICTORS.items():
        lengths.clear(), merged.clear()
        build(task)(texts, 2)
        assert len(merged) == ("merged" in name)
        assert len(lengths) == (6 if "transformers" in name else 0)
        assert not lengths or (lengths == sorted(lengths)) == ("sorted" in name)


def test_every_pass_begins_with_another_one(bench):
    class Lane:
        def __init__(self, name):
            self.name = name

        def ask(self, line):
            asked.append(self.name)
            return [1.0]

    asked, names = [], "abc"
    assert bench.predict.in_turns({name: Lane(name) for name in names}, "file", 3) == {name: [[1.0]] * 3 for name in names}
    assert "".join(asked) == "abcbcacab"


def test_the_ceiling_is_of_the_best_rate_and_calls_are_of_one_size(bench, task, monkeypatch):
    class Lane:
        def __init__(self, name, command):
            pass

        def ask(self, line):
            asked.append(line)
            return [1.0]

        def close(self):
            pass

    asked, rates = [], iter([1e9, 1e9, 1e9])
    monkeypatch.setattr(bench.predict, "Process", Lane), monkeypatch.setattr(bench.predict, "LARGE", 16)
    monkeypatch.setattr(bench.predict, "gemm_rates", lambda repeats=7: {"blas": next(rates)})
    monkeypatch.setattr(bench.predict, "available", lambda bf16: [bench.predict.OURS, *([f"{bench.predict.OURS}, bf16"] if bf16 else [])]), monkeypatch.setattr(bench.predict, "check", lambda *_: {bench.predict.OURS: 0.0})
    settings = types.SimpleNamespace(only=None, singles=3, large=40, repeats=1, file_repeats=2, bf16=True)
    rows, _ = bench.predict.measured(task, settings)
    assert asked == ["calls 1 3"] * 2 + ["calls 16 32"] * 2 + ["file"] * 4
    assert {row.provider: row.extra_config["precision"] for row in rows} == {bench.predict.OURS: "float32", f"{bench.predict.OURS}, bf16": "bf16", bench.predict.CEILING: "float32"}
    asked.clear()
    rates, settings.bf16 = iter([1e9, 4e9, 2e9]), False
    rows, _ = bench.predict.measured(task, settings)
    lengths = [len(e.ids) for e in load_tokenizer(task.tokenizer).encode(task.texts(), max_length=task.longest)]
    extra = rows[-1].extra_config
    assert asked == ["calls 1 3", "calls 16 32", "file", "file"] and extra["gemm_gflops"] == 4
    assert extra["floor_ms"] == pytest.approx(1000 * bench.cases_predict.forward_flops(task.config, lengths) / 4e9)


@pytest.mark.parametrize(("script", "words", "shown"), [
    ("predict", ["none.txt", "--tokenizer", "."], "bench: .: expected tokenizer.json"),
    ("predict", ["none.txt"], "required: --tokenizer"),
    ("predict", ["none.txt", "--tokenizer", ".", "--texts", "0"], "--texts: expected at least 1, got 0"),
    ("predict", ["none.txt", "--tokenizer", ".", "--longest", "600"], "--longest: expected 8 to 512 for the size minilm, got 600"),
    ("predict", ["none.txt", "--tokenizer", ".", "--out", "x.csv"], "expected a file name that ends in .json"),
    ("scale", ["nope"], "no curve 'nope'; expected some of tokens, length"),
    ("scale", ["--repeats", "0"], "--repeats: expected at least 1, got 0"),
    ("scale", ["--out", "x.svg"], "expected a file name that ends in .json"),
])
def test_bad_arguments_get_one_line_and_exit_code_2(bench, small, capsys, script, words, shown, tmp_path):
    words = [str(small.corpus) if word == "none.txt" else str(tmp_path) if word == "." else word for word in words]
    try:
        code = getattr(bench, script).main(words)
    except SystemExit as left:
        code = left.code
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("bench: ") and shown.removeprefix("bench: .: ") in err


def test_a_missing_file_gets_one_line(bench, small, capsys, tmp_path):
    assert bench.predict.main([str(tmp_path / "no.txt"), "--tokenizer", str(small.base), "--size", "micro", "--longest", "32"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_process_that_ends_is_an_error(bench):
    with pytest.raises(RuntimeError, match="theirs: its process ended with code 3"):
        bench.process.Process("theirs", [sys.executable, "-c", "raise SystemExit(3)"])
    lane = bench.process.Process("theirs", [sys.executable, "-c", "print(1, flush=True); input()"])
    lane.process.kill(), lane.process.wait()
    for _ in range(2):  # whether the pipe is broken already or not
        with pytest.raises(bench.process.Ended, match=r"^theirs: its process was killed by signal 9 \(out of memory\?\)$"):
            lane.ask("pass")


def test_what_a_library_prints_is_no_answer(bench):
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); from bench.process import serve\n"
            "serve(lambda: (print('loading'), ({'about': 1}, lambda line: (print('noise'), line.upper())[1]))[1])")
    process = bench.process.Process("ours", [sys.executable, "-c", code])
    assert process.about == {"about": 1} and [process.ask(word) for word in ("a", "b")] == ["A", "B"]
    process.close()
    assert process.process.returncode == 0


# ---------------------------------------------------------------- scale

def test_a_power_is_found_with_its_error(bench):
    exact = bench.scale.fit([1, 2, 4, 8], [3 * x ** 1.5 for x in (1, 2, 4, 8)])
    assert (exact.exponent, exact.factor, exact.last) == pytest.approx((1.5, 3, 1.5)) and exact.error == pytest.approx(0, abs=1e-9)
    bent = bench.scale.fit([1, 2, 4], [2, 3, 5])  # 1 + x: an offset
    assert bent.exponent < bent.last < 1 and bent.error > 0
    assert bench.scale.fit([1, 2], [1, 4]).error is None and bench.scale.fit([1], [1]) is None and bench.scale.fit([1, 2], [0.0, 1.0]) is None
    # log y 0, 1, 1 at log x 0, 1, 2: slope 1/2, residuals 1/6, so sqrt(1/6 / 1 / 2)
    e = 2.718281828459045
    assert bench.scale.fit([1, e, e * e], [1, e, e]).error == pytest.approx((1 / 12) ** 0.5)


def test_one_thing_changes_in_each_curve(bench):
    """Of a step: the fields of the shape that differ between the points."""
    own = {"length": {"length", "sequences"}, "tokens": {"sequences"}, "layers": {"layers"}, "width": {"hidden"}, "rank": {"rank"}, "modules": {"modules"}, "corpus": {"corpus"}}
    fields = [f.name for f in bench.scale.dataclasses.fields(bench.cases_scale.Shape)]
    for name, growth in bench.cases_scale.GROWTHS.items():
        shapes = [growth.shape(x) for x in growth.values]
        assert {f for f in fields if len({getattr(s, f) for s in shapes}) > 1} == own[name]
        if name in ("tokens", "length"):
            assert [s.sequences * s.length for s in shapes] == (list(growth.values) if name == "tokens" else [bench.cases_scale.TOKENS] * len(shapes))


def test_points_are_in_milliseconds_and_the_fit_is_of_the_medians(bench, monkeypatch, tmp_path):
    spent = {32: [1.0, 2.0, 9.0], 64: [2.0, 4.0, 4.1]}
    given = {x: iter(seconds) for x, seconds in spent.items()}
    monkeypatch.setattr(bench.scale, "build", lambda shape, saving, folder: bench.scale.Work(lambda: shape.length, dict))
    monkeypatch.setattr(bench.scale.measure, "seconds", lambda work, passes, device: next(given[work.run()]))
    monkeypatch.setattr(bench.scale.measure, "cpu_peak", lambda *_: None)
    rows = bench.scale.measured("length", (32, 64), 3, {}, tmp_path)
    assert [(row.x_value, row.y_50, row.extra_config["fit"]["exponent"]) for row in rows] == [(32, 2000, pytest.approx(1)), (64, 4000, pytest.approx(1))]


def test_what_is_saved_is_a_share_of_what_it_takes_without(bench):
    def row(provider, y):
        return bench.rows.Row("scale_layers", provider, "step", "time", "ms", "layers", 4, y, y, y, {}, "d", "t", None, "c", "2026")

    assert bench.scale.savings([row("peftdebias", 100.0), row(bench.cases_scale.SAVING, 130.0)]) == ["4 layers, --save-memory over without: time 1.30"]


def test_a_step_has_the_rank_and_the_modules_of_its_shape(bench, monkeypatch):
    create, made = bench.cases_scale.methods.create, []
    monkeypatch.setattr(bench.cases_scale.methods, "create", lambda *a, **k: (made.append(k["options"]), create(*a, **k))[1])
    work = bench.cases_scale.step_of(bench.cases_scale.Shape(layers=1, hidden=64, vocab=97, sequences=2, length=32, rank=3, modules=2), False)
    assert made == 2 * [{"rank": 3}] and work.tokens == 64


def test_weights_are_not_kept_for_the_backward(bench):
    """The table of 20,000 words has 4.9 MiB, the scores of five places have 0.4."""
    assert bench.cases_scale.step_of(bench.cases_scale.Shape(layers=1, hidden=64, vocab=20000, sequences=1, length=32), False).held() < 4


def test_what_is_kept_for_the_backward_holds_no_parameter(bench, monkeypatch):
    shape, patch = bench.cases_scale.Shape(layers=1, hidden=64, vocab=97, sequences=2, length=32, rank=64), bench.cases_scale.patch
    found = bench.cases_scale.step_of(shape, False).held()
    monkeypatch.setattr(patch, "all_parameters", lambda model: dict(model.named_parameters()))
    assert bench.cases_scale.step_of(shape, False).held() > found


def test_curves_rows_and_a_drawing(bench, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "scale.json"
    assert bench.scale.main(["--small", "--repeats", "1", "--out", str(out)]) == 0
    rows, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert all(list(row) == FIELDS and row["y_50"] > 0 for row in rows if row["metric_name"] != "peak memory")
    assert {row["x_name"] for row in rows} == set(bench.cases_scale.GROWTHS) and all("fit" in row["extra_config"] for row in rows if row["metric_name"] == "time")
    saved = {(row["provider"], row["x_value"]): row["y_50"] for row in rows if row["kernel_name"] == "scale_layers" and row["metric_name"] == "saved for backward"}
    assert saved[bench.cases_scale.SAVING, 2] < saved["peftdebias", 2] and saved["peftdebias", 2] > saved["peftdebias", 1]
    assert "## Exponents" in printed and "- 2 layers, --save-memory over without: time" in printed
    assert ElementTree.parse(out.with_suffix(".svg")).getroot().tag.endswith("svg")


def test_products_in_bf16_are_asked_for(bench, task, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(bench.predict, "measured", lambda task, arguments: seen.append(arguments.bf16) or ([], []))
    for why, options in (("", ()), ("", ("--bf16",)), ("a processor without it", ("--bf16",))):
        monkeypatch.setattr(bench.predict, "no_bf16", lambda: why)
        assert bench.predict.main(words_of(task, *options)) == 0
    assert seen == [False, True, False] and capsys.readouterr().err == "--bf16: not measured: a processor without it\n"
    assert f"{bench.predict.OURS}, bf16" in set(bench.predict.available(True)) - set(bench.predict.available()) <= set(bench.cases_predict.IN_BF16)
