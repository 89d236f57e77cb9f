"""The scripts of bench/ that print what they measure: each runs on little, and bad input gets one line. No figure is looked at."""

import importlib
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy
import pytest
import torch

from peftdebias import cli

from .benched import modules

ROOT = Path(__file__).resolve().parent.parent
LINES = ["He told his mother that she should call him.", "The nurse said that her shift had ended.", "A king and a queen sat there."]
bench = modules("cda", "crows", "pronouns")


def script(*words) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT / "bench", capture_output=True, text=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    file.write_text("\n".join(LINES * 200) + "\n")
    return file


def printed(ran: subprocess.CompletedProcess) -> list[dict]:
    """The JSON lines, every one of which names machine and commit."""
    assert ran.returncode == 0, ran.stderr
    found = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    assert found and all({"cores", "load", "commit"} <= set(line) for line in found)
    return found


def test_pronouns_that_come_back(corpus):
    ran = script("pronouns.py", corpus, "--half", "all")
    assert ran.returncode == 0 and [line.split()[:3] for line in ran.stdout.splitlines() if line.startswith(("his", "him", "her "))] == [["his", "200", "200"], ["him", "200", "200"], ["her", "200", "200"]]


def test_speed_of_the_stream(shared, corpus):
    (line,) = printed(script("stream.py", "speed", "--corpus", corpus, "--model", shared / "models/bert-tiny-mlm", "--repeats", "1"))
    assert line["texts"] == 1200 and set(line["median"]) == {"encode_batch_fast", "pipeline"} and line["with_masks"] >= 0


@pytest.mark.slow
def test_waiting_and_memory_of_the_stream(shared, corpus, tmp_path):
    model = shared / "models/bert-tiny-mlm"
    lines = printed(script("stream.py", "waiting", "--corpus", corpus, "--model", model, "--steps", "3"))
    assert [line["steps"] for line in lines] == [3, 3]
    lines = printed(script("stream.py", "memory", "--corpus", corpus, "--model", model, "--gigabytes", "0.001", "--seconds", "2", "--folder", tmp_path))
    assert [line["what"] for line in lines] == ["batches", "swapped"] and all(line["peak_mb"] > 1 for line in lines)


@pytest.mark.slow
def test_counterfactuals(corpus):
    lines = printed(script("cda.py", corpus, "--megabytes", "1", "--repeats", "1"))
    assert [line["what"] for line in lines] == ["engine", "engine", "augment, whole process", "augment, whole process", "twin", "copy of memory"]


@pytest.mark.slow
def test_crows_pairs(shared):
    lines = printed(script("crows.py", shared / "data/crows_pairs/crows_pairs_anonymized.csv", shared / "models/bert-tiny-mlm", "--pairs", "4", "--slow", "4", "--repeats", "1"))
    assert [line["what"].split(",")[0] for line in lines] == ["equality", "crows-pairs", "equality", "crows-pairs", "the whole file"]


def test_the_floor_of_crows_pairs_counts_distinct_contexts(bench):
    """Against torch's own counter, on what questions.py runs of each: the last layer's queries, output and feed-forward and the head on one row."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from peftdebias import kernels, questions
    from peftdebias.encoder import EncoderConfig, Model
    from peftdebias.ops import attention_ref

    config = EncoderConfig(kind="bert", layers=3, hidden=32, heads=2, feed_forward=48, vocab=100, max_positions=64)
    asked = [questions.MaskedToken(numpy.arange(5, 5 + n), place, target) for n, place, target in ((6, 2, 9), (6, 2, 11), (6, 3, 9), (9, 4, 9))]
    with kernels.use("torch"), torch.no_grad(), pytest.MonkeyPatch.context() as patch, FlopCounterMode(display=False) as counter:
        patch.setattr("peftdebias.encoder.attention", attention_ref)
        questions.masked_log_probs(Model(config, mlm=True).eval(), asked)
    assert bench.crows.flops(config, asked) == pytest.approx(counter.get_total_flops())


def test_the_quoted_half_is_the_one_that_the_rules_were_not_built_on(bench):
    lines = ["first", "second", "third", "fourth"]
    assert [lines[bench.pronouns.HALVES[name]] for name in ("quoted", "built")] == [["second", "fourth"], ["first", "third"]]
    assert bench.pronouns.share({("his", "her", "his"): 3, ("his", "hers", "hers"): 1, ("her", "his", "her"): 5}, "his") == (3, 4)


def test_megabytes_a_second_are_of_the_input(bench, monkeypatch, capsys):
    now = iter([0.0, 2.0, 10.0, 11.0, 20.0, 24.0])
    with monkeypatch.context() as patch:
        patch.setattr(bench.cda, "time", type("clock", (), {"perf_counter": staticmethod(lambda: next(now))}))
        found = bench.cda.rates(int, 4_000_000, 3)
    assert found == [1, 2, 4] and bench.cda.show("engine", found) == 2 and json.loads(capsys.readouterr().out)["MB/s"] == 2


def test_a_row_of_seeds_and_the_split_of_hate_speech(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "bench")
    import all_methods
    import bug_gender

    assert bug_gender.row("k", [1.0, 2.0, 3.0]) == "| k | 2.00 ± 1.00 | 1.00, 2.00, 3.00 |" and bug_gender.row("k", [1.0]) == "| k | 1.00 | 1.00 |"
    (tmp_path / "in.tsv").write_text("head\n" + "".join(f"{i}\n" for i in range(50)))
    train, dev = (path.read_text().splitlines() for path in all_methods.carve_dev(tmp_path / "in.tsv", tmp_path))
    assert (len(train), len(dev)) == (46, 6) and train[0] == dev[0] == "head" and not set(train[1:]) & set(dev[1:])
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in ({"loss": 3.0}, {"loss": 2.5}, {"loss": 2.0, "seconds": 9.0})))
    assert all_methods.losses(tmp_path) == (3.0, 2.0, 9.0)


# ---------------------------------------------------------------- what the figures are of

@pytest.fixture
def scripted(monkeypatch):
    """The scripts of bench/ by name, as they import each other."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module


def test_ratios_of_the_stream_are_of_ours_to_the_tokenizer_and_masks_are_made_once(scripted, shared, corpus, monkeypatch, capsys):
    from peftdebias import buckets

    stream, original, asked, masked = scripted("stream"), buckets.mask_flat, [], []
    ours, theirs = [(0.03, 2), (0.05, 3), (0.04, 4)], [(0.02, 1), (0.02, 1), (0.08, 1)]  # seconds, of the processor
    turns = [ours[0], theirs[0], theirs[1], ours[1], ours[2], theirs[2], (9, 9)]
    wall, cpu = (iter([second for taken in turns for second in (0, taken[which])]) for which in (0, 1))
    monkeypatch.setattr(stream, "time", types.SimpleNamespace(perf_counter=lambda: (asked.append(1), next(wall))[1], process_time=lambda: next(cpu)))
    monkeypatch.setattr(buckets, "mask_flat", lambda *a, **more: (masked.append(len(asked)), original(*a, **more))[1])
    stream.speed(types.SimpleNamespace(corpus=str(corpus), model=shared / "models/bert-tiny-mlm", threads=1, repeats=3, buffer=131072))
    line = json.loads(capsys.readouterr().out)
    assert line["seconds"] == {"encode_batch_fast": [0.02, 0.02, 0.08], "pipeline": [0.03, 0.05, 0.04]} and line["median"] == {"encode_batch_fast": 0.02, "pipeline": 0.04}
    assert (line["ratio"], line["ratio_of_pairs"], line["ratio_of_cpu"], line["with_masks"]) == (2, 1.5, 3, 9) and set(masked) == {2 * len(turns) - 1}
    assert line["input_mb_a_second"] == round(corpus.stat().st_size / 1e6 / 0.04, 2)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_memory_is_of_a_process_and_all_below_it_in_bytes(scripted, monkeypatch):
    stream = scripted("stream")
    with subprocess.Popen(["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE, text=True) as shell:
        below = int(shell.stdout.readline())
        try:
            assert stream.family(shell.pid) == [shell.pid, below]
        finally:
            os.kill(below, signal.SIGTERM)
    rollup = "Rss: 99 kB\nPss: 7 kB\nPss_Dirty: 6 kB\nPss_Anon: 3 kB\nPss_File: 2 kB\nPss_Shmem: 1 kB\n"
    monkeypatch.setattr(stream, "Path", lambda place: types.SimpleNamespace(read_text=lambda: rollup))
    assert stream.sizes(1) == (4 * 1024, 7 * 1024)
    polled, found, peak = iter([None, None, 0]), iter([(5e6, 9), (1e6, 1), (2e6, 3), (3e6, 20)]), {"pss": 0, "own": 0}
    monkeypatch.setattr(stream, "family", lambda pid: [pid, pid + 1]), monkeypatch.setattr(stream, "sizes", lambda pid: next(found))
    monkeypatch.setattr(stream, "time", types.SimpleNamespace(sleep=lambda seconds: None))
    stream.watch(types.SimpleNamespace(pid=1, poll=lambda: next(polled)), peak)
    assert peak == {"own": 6e6, "processes": [5, 1], "pss": 23}  # each at its own time


def test_memory_of_a_process_that_fails_is_none_and_its_code_is_kept(scripted, corpus, monkeypatch, tmp_path, capsys):
    stream, python = scripted("stream"), tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 2\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(SystemExit) as left:
        stream.memory(types.SimpleNamespace(gigabytes=[1e-9], folder=tmp_path, corpus=str(corpus), what=["batches", "swapped"], seconds=1, threads=1, model="m"))
    assert left.value.code == 2 and capsys.readouterr() == ("", "") and list(tmp_path.iterdir()) == [python]
    python.write_text("#!/bin/sh\nkill -9 $$\n")
    with pytest.raises(SystemExit) as left:
        stream.memory(types.SimpleNamespace(gigabytes=[1e-9], folder=tmp_path, corpus=str(corpus), what=["swapped"], seconds=1, threads=1, model="m"))
    assert left.value.code == 2 and capsys.readouterr().err == "bench: swapped: expected the process that is watched to last, got it ended by signal 9 (out of memory?)\n"


def test_waiting_is_in_percent_and_of_either_buffer(scripted, monkeypatch, capsys, tmp_path):
    stream, given = scripted("stream"), []

    def run(words, **options):
        given.append(vars(cli.parser().parse_args(words[3:])))
        made = Path(given[-1]["out"])
        made.mkdir()
        events = [{"event": "step", "tokens_per_second": 5}, {"event": "step", "tokens_per_second": 6},
                  {"event": "final", "seconds": 3.0, "waiting": given[-1]["shuffle_buffer"] / 1e6}]
        (made / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(stream, "subprocess", types.SimpleNamespace(run=run))
    stream.waiting(types.SimpleNamespace(model="m", corpus="c", steps=9, threads=3))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["shuffle_buffer"], line["waiting_percent"], line["tokens_per_second"], line["seconds"]) for line in lines] == [(131072, 13.11, 6, 3), (8192, 0.82, 6, 3)]
    assert [(of["steps"], of["workers"], of["model"], of["corpus"]) for of in given] == 2 * [(9, 3, "m", ["c"])]


def test_what_is_read_and_swapped_is_counted_by_the_text(scripted, shared, corpus, capsys):
    scripted("stream").take(types.SimpleNamespace(what="swapped", file=str(corpus), model=shared / "models/bert-tiny-mlm", threads=1))
    assert json.loads(capsys.readouterr().out)["texts"] == 600


def test_the_engine_is_held_against_its_twin_and_a_copy(bench, corpus, monkeypatch, capsys):
    cda, sizes, threads, found = bench.cda, [], [], iter([[10.0], [15.0], [8.0], [9.0], [2.0], [1.0, 100.0, 101.0]])
    if cda.native.library() is None:
        pytest.skip("the engine is not compiled here")
    engine = cda.NativeEngine
    monkeypatch.setattr(cda, "NativeEngine", lambda axis, spec, number, library: (threads.append(number), engine(axis, spec, number, library))[1])
    monkeypatch.setattr(cda, "rates", lambda function, size, repeats: (sizes.append(size), next(found))[1])
    monkeypatch.setattr(sys, "argv", ["cda.py", str(corpus), "--megabytes", "1"])
    cda.main()
    said = capsys.readouterr().out.splitlines()
    lines, size = [json.loads(line) for line in said if line.startswith("{")], corpus.stat().st_size
    assert [line["MB/s"] for line in lines] == [10, 15, 8, 9, 2, 100] and lines[1]["times one thread"] == 1.5
    assert [line["threads"] for line in lines[:4]] == [1, 2, 1, 2] == threads[1:] * 2
    long = size * (1_000_000 // size + 1)
    assert sizes == [long, long, long, long, size - 1, long] and said[-1] == "one thread of the engine: 5 times its twin, 10.0 % of a copy"
    assert cda.blocks(b"ab\ncdef\ng\nh", 2) == [b"ab\n", b"cdef\n", b"g\nh"]
    monkeypatch.setattr(cda, "PythonEngine", lambda axis: types.SimpleNamespace(write_lines=lambda data: types.SimpleNamespace(chunks=[b"others"])))
    with pytest.raises(SystemExit, match="the engine and its twin write different rows"):
        cda.main()
    assert not capsys.readouterr().out


def test_pronouns_are_told_apart_where_the_counterfactual_reads_her(bench, monkeypatch, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("The king and his man called him.\nA friend of his came.\nHe gave his permission.\nShe gave the book to her.\n")
    monkeypatch.setattr(sys, "argv", ["pronouns.py", str(tmp_path / "texts.txt"), "--half", "all"])
    bench.pronouns.main()
    rows = [line.split(maxsplit=4) for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [["his", "3", "2", "66.67%", "33.33%  her 2, hers 1"],
                    ["him", "1", "1", "100.00%", "100.00%  her 1"], ["her", "1", "1", "100.00%", "him 1"], ["hers", "0", "0", "0.00%"]]


def test_crows_pairs_are_timed_by_the_question_against_the_best_product(bench, shared, monkeypatch, capsys):
    """And not at all where the answers are not the slow way's, in either precision."""
    from peftdebias import weights
    from peftdebias.metrics import crows_pairs

    crows, run = bench.crows, weights.load(shared / "models/bert-tiny-mlm", mlm=True, labels=())
    pairs, a = crows_pairs.read_pairs(shared / "data/crows_pairs/crows_pairs_anonymized.csv")[:2], types.SimpleNamespace(slow=3, repeats=3)
    asked, _ = crows_pairs.questions(pairs, crows_pairs.encode_pairs(run.tokenizer, pairs, run.model.config.max_positions), run.tokenizer.mask_id)
    turns = iter([8.0, 1.0, 2.0, 8.0, 80.0, 9.0])  # slow, ours, ours, slow, slow, ours
    with monkeypatch.context() as patch:
        patch.setattr(crows, "timed", lambda function: {"wall": (taken := next(turns)), "cpu": 2 * taken})
        best = iter([1e9, 2e9, 4e9, 1e9, 1e9, 1e9])
        patch.setattr(crows, "rates", lambda: {"wall": (rate := next(best)), "cpu": rate / 8})
        crows.compare("tiny", run.model.eval(), run.tokenizer, pairs, a)
    equality, line = map(json.loads, capsys.readouterr().out.splitlines())
    assert equality["questions"] == line["slow_questions"] == 3 and line["questions"] == len(asked) > 10
    assert line["times_slow"]["wall"] == line["times_slow"]["cpu"] == round(8 / 3 / (2 / len(asked)), 2) and line["best_gflops"] == {"wall": 4, "cpu": 0.5}
    assert line["times_floor"] == {clock: round(seconds / (crows.flops(run.model.config, asked) / rate), 2) for clock, seconds, rate in (("wall", 2, 4e9), ("cpu", 4, 5e8))}
    right = crows.questions.masked_log_probs
    for kind in (torch.float32, torch.float64):
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="nothing is timed"):
            patch.setattr(crows.questions, "masked_log_probs", lambda model, asked: right(model, asked) + 1e-3 * (next(model.parameters()).dtype == kind))
            crows.check(run.model.float(), asked[:2])


def test_the_rate_of_a_product_is_the_best_of_all_tries(bench, monkeypatch):
    tries = itertools.count()
    monkeypatch.setattr(bench.crows, "SHAPES", ((2, 3, 5),)), monkeypatch.setattr(bench.crows, "timed", lambda function: {"wall": 2.0 if next(tries) == 1 else 4.0, "cpu": 1.0})
    assert bench.crows.rates() == {"wall": pytest.approx(5e8), "cpu": pytest.approx(1e9)}


def commands(monkeypatch, script, figures) -> list[dict]:
    """Gets every command that a script runs, as the command line reads it; what the command would leave holds figures(command, what was given)."""
    asked = []

    def run(words):
        given = vars(cli.parser().parse_args(shlex.split(words)))
        asked.append(given)
        rows = [{"name": name, "value": value} for name, value in figures(given).items()]
        if given["command"] == "evaluate":
            Path(given["json"]).write_text(json.dumps({"measures": rows}))
            return
        Path(given["out"]).mkdir()
        events = [{"loss": 3.0}, {"loss": 2.0}, {"loss": 1.5, "seconds": 7.0, "measures": rows}]
        (Path(given["out"]) / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))

    monkeypatch.setattr(script, "peftdebias", run)
    return asked


def named(place: str | Path) -> str:
    return Path(place).name


def test_the_tables_of_gender_are_of_every_seed_beside_the_base(scripted, monkeypatch, tmp_path, capsys):
    """Each command with its own seed; a base is measured once; what is there is not made again."""
    script = scripted("bug_gender")

    def figures(given):
        of = int(named(given["adapter"][0])[-1]) + 1 if given.get("adapter") else 0  # 0: without a module
        task = given["command"] == "downstream"
        names = ("accuracy", "tpr-gap/rms", "tpr-gap/rms-shuffled") if task else ("crows-pairs/bias-bench/gender", "crows-pairs/nangia/gender", "perplexity")
        return {name: 10.0 * (at + 1) + of + (given.get("seed", 0) / 10) for at, name in enumerate(names)}

    asked, out = commands(monkeypatch, script, figures), tmp_path / "out"
    for name in ("models/bert-tiny-mlm", "data/crows_pairs/crows_pairs_anonymized.csv", "data/corpus/wikitext2_valid.txt", "data/corpus/bug_upstream.txt",
                 *(f"data/bug_professions/{split}.jsonl" for split in ("train", "dev", "test"))):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(sys, "argv", ["bug_gender.py", str(tmp_path), str(out), "--seeds", "1", "4"])
    script.main()
    said = capsys.readouterr().out.splitlines()
    for row in ("| crows-pairs/bias-bench/gender, base | 10.00 | 10.00 |", "| crows-pairs/bias-bench/gender, base + LoRA | 13.50 ± 2.12 | 12.00, 15.00 |",
                "| perplexity, base + LoRA | 33.50 ± 2.12 | 32.00, 35.00 |", "| accuracy, plain | 10.25 ± 0.21 | 10.10, 10.40 |", "| accuracy, lora | 13.75 ± 2.33 | 12.10, 15.40 |",
                "| tpr-gap/rms, lora | 23.75 ± 2.33 | 22.10, 25.40 |", "| seconds, plain | 7.00 ± 0.00 | 7.00, 7.00 |"):
        assert row in said, row
    made = [(given["command"], given.get("seed"), named(given["adapter"][0]) if given.get("adapter") else None) for given in asked]
    assert made == [("evaluate", None, None)] + [one for seed in (1, 4) for one in (("upstream", seed, None), ("evaluate", None, f"gender-{seed}"), ("downstream", seed, None),
                                                                                      ("downstream", seed, f"gender-{seed}"))]
    script.main()
    assert len(asked) == len(made) and capsys.readouterr().out.splitlines() == said


def test_every_method_is_learnt_measured_and_used_as_what_it_is(scripted, monkeypatch, tmp_path, capsys):
    """Full-Debias is a base, the others are modules, and those that have a size have 1 %."""
    script, shared = scripted("all_methods"), tmp_path / "shared"
    (shared / "data" / "ghc").mkdir(parents=True)
    (shared / "data" / "ghc" / "ghc_train.tsv").write_text("text\n" + 20 * "x\n")
    of = {"bert-tiny-mlm": 1.0, "gender-full": 2.0, "gender-lora": 3.0, "gender-bias": 4.0}

    def figures(given):
        value = of[named((given.get("adapter") or [given["model"]])[0])]
        return {"crows-pairs/bias-bench/gender": 50 + value} if given["command"] == "evaluate" else {"accuracy": 70 + value, "tpr-gap/rms": 10 + value}

    asked = commands(monkeypatch, script, figures)
    monkeypatch.setattr(sys, "argv", ["all_methods.py", str(shared), str(tmp_path / "out"), "--axes", "gender", "--methods", "none", "full", "lora", "bias"])
    script.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[1:] == ["| none (base, plain fine-tuning) | - | 51.0 | 71.0 | 11.0 | - | 7 |", "| full | 3.000 -> 1.500 | 52.0 | 72.0 | 12.0 | 7 | 7 |",
                        "| lora | 3.000 -> 1.500 | 53.0 | 73.0 | 13.0 | 7 | 7 |", "| bias | 3.000 -> 1.500 | 54.0 | 74.0 | 14.0 | 7 | 7 |"]
    assert [(given["method"], given.get("budget")) for given in asked if given["command"] == "upstream"] == [("full", None), ("lora", 0.01), ("bias", None)]
    assert all(given["seed"] == 0 for given in asked if given["command"] != "evaluate")


@pytest.mark.parametrize("words,said", [
    (("pronouns.py", "/nowhere"), "file: /nowhere: no such file"),
    (("names.py", "/nowhere"), "folder: /nowhere: no such folder"),
    (("stream.py", "memory", "--folder", "/nowhere"), "--folder: /nowhere: no such folder"),
    (("stream.py", "memory", "--gigabytes", "0"), "--gigabytes: expected more than 0, got 0"),
    (("stream.py", "memory", "--seconds", "x"), "--seconds: expected a number, got 'x'"),
    (("pronouns.py", "/tmp"), "file: /tmp: expected a file, got a folder"),
    (("stream.py", "speed", "--repeats", "0"), "--repeats: expected at least 1, got 0"),
    (("all_methods.py", "/nowhere", "out"), "shared: /nowhere: no such folder"),
    (("bug_gender.py", "/nowhere", "out"), "shared: /nowhere: no such folder"),
    (("all_methods.py", "/proc", "out"), "shared: /proc/data/ghc/ghc_train.tsv: no such file"),
    (("bug_gender.py", "/proc", "out"), "shared: /proc/models/bert-tiny-mlm: no such file"),
    (("stream.py", "waiting", "--model", "/proc/self", "--steps", "1"), "/proc/self: expected a Hugging Face model folder with config.json, found none"),
    pytest.param(("cda.py", "/nowhere"), "file: /nowhere: no such file", marks=pytest.mark.slow),
    pytest.param(("crows.py", "/nowhere", "/nowhere"), "file: /nowhere: no such file", marks=pytest.mark.slow),
    pytest.param(("curves.py", "--steps", "0"), "--steps: expected at least 1, got 0", marks=pytest.mark.slow),
])
def test_bad_arguments_get_one_line_and_exit_code_2(words, said, shared):
    ran = script(*words)
    assert ran.returncode == 2 and ran.stdout == "" and ran.stderr == f"bench: {said}\n"
