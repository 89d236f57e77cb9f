"""The scripts of bench/ that print what they measure: each runs on little, and bad input gets one line. No figure is looked at."""

import json
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

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
    (("stream.py", "waiting", "--model", "/proc/self", "--steps", "1"), "/proc/self: expected a Hugging Face model folder with config.json, found none"),
    pytest.param(("cda.py", "/nowhere"), "file: /nowhere: no such file", marks=pytest.mark.slow),
    pytest.param(("crows.py", "/nowhere", "/nowhere"), "file: /nowhere: no such file", marks=pytest.mark.slow),
    pytest.param(("curves.py", "--steps", "0"), "--steps: expected at least 1, got 0", marks=pytest.mark.slow),
])
def test_bad_arguments_get_one_line_and_exit_code_2(words, said, shared):
    ran = script(*words)
    assert ran.returncode == 2 and ran.stdout == "" and ran.stderr == f"bench: {said}\n"
