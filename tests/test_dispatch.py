"""The table that picks LoRA's form, from rows as bench/gpu.py writes them to what dispatch.pick reads."""

import dataclasses
import errno
import json
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import dispatch_table, rows  # noqa: E402
from peftdebias import kernels  # noqa: E402
from peftdebias.kernels import dispatch  # noqa: E402

HOW = {"dtype": torch.bfloat16, "inside": 768, "outside": 768, "rank": 8}


def row(case: str, form: str, x: float, ms: float, **changes) -> rows.Row:
    extra = {"size": "base", "precision": "bf16"} | changes.pop("extra", {})
    made = rows.Row(case, f"peftdebias, {form}", "full", "time", "ms", "rows", x, ms, ms, ms, extra, "NVIDIA X", "2", "3", "abc", "now")
    return dataclasses.replace(made, **changes)


MEASURED = [row("lora_linear", "written", 4096, 2.0), row("lora_linear", "epilogue", 4096, 1.0), row("lora_linear_wide", "written", 4096, 1.0),
            row("lora_linear_wide", "epilogue", 4096, 2.0), row("lora_dropout", "epilogue", 4096, 3.0), row("lora_dropout", "library", 4096, 1.0),
            row("lora_linear", "written", 65536, 1.0), row("lora_linear", "epilogue", 65536, 2.0)]


@pytest.fixture
def fresh():
    for cache in (dispatch.table, dispatch._measured):
        cache.cache_clear()
    yield
    for cache in (dispatch.table, dispatch._measured):
        cache.cache_clear()


def test_what_was_measured_is_what_is_picked(tmp_path, monkeypatch, fresh):
    passed_over = [row("lora_linear", "epilogue", 65536, 0.1, extra={"dry_run": True}), row("lora_linear", "epilogue", 65536, 0.1, device_name="CPU Y"),
                   row("lora_linear", "epilogue", 65536, 0.1, metric_name="rate"), row("lora_linear", "other", 65536, 0.1), row("adapter", "epilogue", 65536, 0.1),
                   row("lora_linear", "epilogue", 65536, 0.1, provider="peft")]
    rows.write(tmp_path / "x.json", MEASURED + passed_over, "x")
    old = {"device": "NVIDIA X", "dtype": "bfloat16", "dropout": False, "rows": 4096, "inside": 768, "outside": 768, "rank": 8, "ms": {"epilogue": 9.0}}
    out = tmp_path / "dispatch.json"
    out.write_text(json.dumps({"lora_linear": [old, old | {"device": "NVIDIA Z"}, old | {"rows": 1, "inside": 1, "outside": 1}]}))  # one that is measured now, two that are not
    assert dispatch_table.main([str(tmp_path / "x.json"), "--out", str(out)]) == 0
    table = json.loads(out.read_text())["lora_linear"]
    assert [(line["device"][-1], line["rows"]) for line in table[:2]] == [("Z", 4096), ("X", 1)] and {line["device"] for line in table[2:]} == {"NVIDIA X"}
    assert len(table) == 2 + 4 and sum(len(line["ms"]) for line in table) == 2 + len(MEASURED)
    monkeypatch.setattr(dispatch, "TABLE", out)
    monkeypatch.setattr(dispatch, "_name", lambda device: "NVIDIA X")
    every, device = dispatch.FORMS["lora_linear"], torch.device("cuda")

    def picked(candidates=every, dropout=False, **sizes):
        return dispatch.pick("lora_linear", candidates, device=device, dropout=dropout, **HOW | sizes)

    assert picked(rows=4000) == "epilogue" and picked(rows=50_000) == "written" and picked(rows=4096, outside=3072) == "written"
    assert picked(("epilogue", "library"), True, rows=4096) == "library" and picked(("epilogue", "library"), rows=4096) == "epilogue"
    assert picked(rows=4096, dtype=torch.float16) == "written"  # nothing measured: the default


def test_dA_and_dB_go_by_rows_and_pieces(tmp_path, monkeypatch, fresh):
    measured = [row("lora_grads", "twice", 4096, 1.0), row("lora_grads", "once", 4096, 2.0), row("lora_grads", "twice", 65536, 2.0), row("lora_grads", "once", 65536, 1.0),
                row("lora_grads_two", "twice", 4096, 2.0), row("lora_grads_two", "once", 4096, 1.0)]
    rows.write(tmp_path / "x.json", measured, "x")
    assert dispatch_table.main([str(tmp_path / "x.json"), "--out", str(tmp_path / "dispatch.json")]) == 0
    monkeypatch.setattr(dispatch, "TABLE", tmp_path / "dispatch.json")
    monkeypatch.setattr(dispatch, "_name", lambda device: "NVIDIA X")

    def picked(**sizes):
        return dispatch.pick("lora_grads", dispatch.FORMS["lora_grads"], device=torch.device("cuda"), dropout=False, **HOW | sizes)

    assert [picked(rows=4096), picked(rows=65536), picked(rows=4096, outside=1536, rank=16)] == ["twice", "once", "once"]


def test_a_line_of_the_table_has_the_median_and_the_columns_of_both_pieces():
    one = dataclasses.replace(row("lora_grads_two", "twice", 4096, 2.0), y_20=1.0, y_80=3.0)
    (line,) = dispatch_table.lines([one])["lora_grads"].values()
    assert (line["outside"], line["rank"], line["ms"]) == (1536, 16, {"twice": 2.0})


def test_a_feed_forward_block_is_as_wide_as_its_inside_and_has_no_rank():
    by_the_host = row("feed_forward", "library", 4096, 1.0)
    by_the_host.extra_config["timed"] = "eager"
    (line,) = dispatch_table.lines([row("feed_forward", "fused", 4096, 2.0), row("feed_forward", "fused", 4096, 9.0, metric_name="eager time"), by_the_host])["feed_forward"].values()
    assert line == {"device": "NVIDIA X", "dtype": "bfloat16", "dropout": False, "rows": 4096, "inside": 768, "outside": 3072, "ms": {"fused": 2.0}}


def test_the_forms_of_attention_are_measured_by_rows_sequences_and_lengths(tmp_path, monkeypatch, fresh):
    def attention(provider: str, ms: float, dropout: float = 0.0, case: str = "attention", **sizes) -> rows.Row:
        sizes = {"rows": 6912, "sequences": 128, "longest": 128, "prefix": 0, "width": 768} | sizes
        return row(case, "", 128, ms, provider=provider, extra={"sizes": sizes, "dropout": dropout})

    even = {"rows": 16384, "case": "attention_even"}
    rows.write(tmp_path / "x.json", [attention("peftdebias", 1.0), attention("attention_padded", 2.0), attention("torch varlen", 3.0), attention("attention_ref", 0.1),
                                     attention("peftdebias", 3.0, **even), attention("torch varlen", 1.0, **even), attention("attention_padded", 2.0, **even),
                                     attention("peftdebias", 1.0, 0.1, "attention_dropout"), row("lora_linear", "written", 4096, 1.0)], "x")
    out = tmp_path / "dispatch.json"
    assert dispatch_table.main([str(tmp_path / "x.json"), "--out", str(out)]) == 0
    assert [(op, [len(line["ms"]) for line in lines]) for op, lines in json.loads(out.read_text()).items()] == [("attention", [3, 3, 1]), ("lora_linear", [1])]
    monkeypatch.setattr(dispatch, "TABLE", out)
    monkeypatch.setattr(dispatch, "_name", lambda device: "NVIDIA X")

    def picked(rows: int, candidates=dispatch.FORMS["attention"], dropout=False) -> str:
        return dispatch.decide("attention", candidates, device=torch.device("cuda"), dtype=torch.bfloat16, dropout=dropout, rows=rows, sequences=128, longest=128, prefix=0,
                               width=768)

    assert picked(7000) == ("fused", "the fastest when measured here at rows 6912, sequences 128, longest 128, prefix 0, width 768")
    assert picked(16000)[0] == "varlen" and picked(16000, ("fused", "padded"))[0] == "padded" and picked(16000, dropout=True)[0] == "fused"


def test_of_two_files_the_later_measurement_counts(tmp_path):
    for name, ms in (("old", 3.0), ("new", 1.0)):
        rows.write(tmp_path / f"{name}.json", [row("lora_linear", "written", 4096, ms), row("lora_linear", "written", {"old": 1, "new": 65536}[name], 2.0)], "x")
    out = tmp_path / "dispatch.json"
    assert dispatch_table.main([str(tmp_path / "old.json"), str(tmp_path / "new.json"), "--out", str(out)]) == 0
    assert {line["rows"]: line["ms"]["written"] for line in json.loads(out.read_text())["lora_linear"]} == {4096: 1.0, 1: 2.0, 65536: 2.0}


def test_a_form_that_is_measured_again_leaves_the_others(tmp_path):
    """In several files, and in the table that is there; a form that there is no more goes."""
    out = tmp_path / "dispatch.json"
    rows.write(tmp_path / "both.json", [row("lora_grads", "twice", 4096, 1.0), row("lora_grads", "once", 4096, 2.0)], "x")
    rows.write(tmp_path / "one.json", [row("lora_grads", "once", 4096, 1.5)], "x")
    for files in (["both", "one"], ["one"]):
        assert dispatch_table.main([*(str(tmp_path / f"{name}.json") for name in files), "--out", str(out)]) == 0
        (line,) = json.loads(out.read_text())["lora_grads"]
        assert line["ms"] == {"twice": 1.0, "once": 1.5}
        out.write_text(json.dumps({"lora_grads": [line | {"ms": line["ms"] | {"gone": 0.1}}]}))


def test_the_committed_table_can_be_read(fresh):
    assert {"lora_linear", "lora_grads", "attention"} <= {op for op, lines in dispatch.table().items() if lines}
    linear = {"rows", "inside", "outside", "rank"}
    sizes = {"lora_linear": linear, "lora_grads": linear, "attention": {"rows", "sequences", "longest", "prefix", "width"}, "feed_forward": linear - {"rank"}}
    for op, lines in dispatch.table().items():
        for line in lines:
            assert set(line) == {"device", "dtype", "dropout", "ms"} | sizes[op] and set(line["ms"]) <= set(dispatch.FORMS[op])


def test_a_compiled_graph_has_the_default_and_is_one_for_all_sizes(tmp_path, monkeypatch, fresh):
    line = {"device": "cpu", "dtype": "float32", "dropout": False, "inside": 4, "outside": 4, "rank": 2}
    out = tmp_path / "dispatch.json"
    out.write_text(json.dumps({"lora_linear": [line | {"rows": n, "ms": {"written": float(n), "library": 5.0}} for n in (2, 64)]}))
    monkeypatch.setattr(dispatch, "TABLE", out)
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    def run(x):
        form = dispatch.pick("lora_linear", ("written", "library"), device=x.device, dtype=x.dtype, dropout=False, rows=x.shape[0], inside=4, outside=4, rank=2)
        return x * (2.0 if form == "written" else 3.0)

    traced = torch.compile(run, fullgraph=True, dynamic=True, backend=backend)
    for rows in (3, 40, 70):
        assert torch.equal(traced(torch.ones(rows, 4)), torch.full((rows, 4), 2.0))
    assert len(compiled) == 1 and run(torch.ones(70, 4))[0, 0] == 3.0  # by what was measured


def test_the_environment_asks_for_a_form(monkeypatch, fresh):
    monkeypatch.setenv("PEFTDEBIAS_LORA_LINEAR", "library")
    how = HOW | {"device": torch.device("cpu"), "dropout": False, "rows": 5}
    assert dispatch.decide("lora_linear", ("epilogue", "library"), **how) == ("library", "asked for by name")
    assert dispatch.decide("lora_linear", ("epilogue",), **how)[0] == "epilogue"  # where it can serve
    monkeypatch.setenv("PEFTDEBIAS_LORA_LINEAR", "fast")
    with pytest.raises(ValueError, match="PEFTDEBIAS_LORA_LINEAR: expected one of written, epilogue, library for lora_linear, got 'fast'"):
        dispatch.decide("lora_linear", ("epilogue",), **how)


@pytest.mark.parametrize("content,words", [
    (None, "rows.json: no such file"), ("{}", "found none"), ("[1]", "expected rows of bench/gpu.py"), ("not json", "expected rows of bench/gpu.py"),
])
def test_errors_leave_the_table_alone(content, words, tmp_path, capsys):
    path, out = tmp_path / "rows.json", tmp_path / "dispatch.json"
    if content is not None:
        path.write_text(content)
    assert dispatch_table.main([str(path), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert words in said and len(said.splitlines()) == 1 and not out.exists()


def test_a_table_that_cannot_be_written_gets_one_line(monkeypatch, tmp_path, capsys):
    def full(*given):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    rows.write(tmp_path / "x.json", [row("lora_grads", "once", 4096, 2.0)], "t")
    monkeypatch.setattr(dispatch_table, "write_text", full)
    assert dispatch_table.main([str(tmp_path / "x.json"), "--out", str(tmp_path / "dispatch.json")]) == 2
    assert capsys.readouterr().err == f"bench: {tmp_path}/dispatch.json: cannot be written: No space left on device\n"


def test_a_constant_is_marked_as_torch_marks_it():
    def ours():
        return 1

    def torchs():
        return 1

    assert kernels.constant(ours).__dict__ == torch.compiler.assume_constant_result(torchs).__dict__ != {}


def test_a_block_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("PEFTDEBIAS_KERNELS", "native")
    monkeypatch.setenv("PEFTDEBIAS_LINEAR", "onednn")
    with kernels.use("torch"), dispatch.use("linear", "blas"):
        assert (kernels.setting(), dispatch.asked("linear")) == ("torch", "blas")
    assert (kernels.setting(), dispatch.asked("linear")) == ("native", "onednn")


def test_the_widest_row_that_a_kernel_takes_is_taken(monkeypatch):
    monkeypatch.setattr(kernels, "missing", lambda *asked: "")
    monkeypatch.setitem(kernels._registry, ("norm", "triton"), "kernel")
    monkeypatch.setenv("PEFTDEBIAS_KERNELS", "auto")
    assert [kernels.choose("norm", "twin", "cuda", width=width) for width in (4096, 4097)] == ["kernel", "twin"]
