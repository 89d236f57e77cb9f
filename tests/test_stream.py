"""The stream against ten lines that hold everything in memory; windows, positions, shards, the background process and how it ends."""

import dataclasses
import gzip
import io
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy
import pytest

from peftdebias import buckets, corpus, lines, stream, worker
from peftdebias.axes import load_axis
from peftdebias.batches import Sample, from_packed, pack, plan
from peftdebias.buckets import Families
from peftdebias.cda import KEEP, Intervention, counterfactuals, families
from peftdebias.errors import ConfigError, DataError, PeftDebiasError
from peftdebias.holdout import HeldOut
from peftdebias.stream import Ended, Filled, Given, Recipe, Start, Stream, ahead, fill
from peftdebias.tokens import STYLES, mask_tokens, wordpiece
from peftdebias.worker import Epochs, default_workers

WORDS = "he she his her nurse baker king queen walks reads and the in a ship town .".split()
TOKENIZER = wordpiece([*STYLES["bert"].values(), *WORDS])
GENDER = load_axis("gender")


def texts(count: int, seed: int = 0) -> list[str]:
    """Of 1 to 12 words; some have no word of the axis, some have an unknown one, all are different."""
    chosen = random.Random(seed)
    return [" ".join(chosen.choices(WORDS[:12 if chosen.random() < 0.9 else 4], k=chosen.randint(1, 11))) + f" {number}" for number in range(count)]


def recipe(path, **changes) -> Recipe:
    files = path if isinstance(path, tuple) else (path,)
    return Recipe(tuple(map(str, files)), GENDER, TOKENIZER, 10, 3, {"batch_size": 16}, **changes)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(lines.blocks, "__defaults__", (0, 0, 700))  # BLOCK was read when the function was made
    monkeypatch.setattr(corpus, "BLOCK", 700)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("stream") / "c.txt"
    path.write_text("\n".join(texts(300)) + "\n")
    return path


def same(one, other) -> bool:
    return all(a.dtype == b.dtype and numpy.array_equal(a, b) for a, b in ((getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one)))


def equal(some, others) -> bool:
    return len(some) == len(others) > 0 and all(map(same, some, others))


def given(made: Recipe, count: int, position: dict | None = None) -> list[Given]:
    """The first batches of a run, at most `count`."""
    found, events = [], Stream(made).run(position=position)
    for event in events:
        found += [event] if isinstance(event, Given) else []
        if len(found) == count:
            break
    events.close()
    return found


@pytest.mark.parametrize("workers", [0, 1])
def test_numbers_of_numpy_serve_as_epoch_and_workers(file, workers):
    with Epochs(recipe(file), numpy.int64(workers)) as epochs:
        next(epochs.epoch(numpy.int64(1)))
        assert type(epochs.position["epoch"]) is int and next(epochs.resume(epochs.position)) is not None


@pytest.mark.parametrize("workers", [0, 1])
def test_one_pass_at_a_time(file, workers):
    """The batches of one are never another's: the one that was under way is told; the new one is whole."""
    with Epochs(recipe(file), workers) as epochs:
        expected = [packed.family.tolist() for packed in epochs.epoch(1)]
        first = epochs.epoch(0)
        next(first)
        second = epochs.epoch(1)
        found = [next(second).family.tolist()]
        with pytest.raises(ConfigError, match="^epochs: a pass was begun while this one was under way; expected one at a time$"):
            next(first)
        assert found + [packed.family.tolist() for packed in second] == expected


# ---------------------------------------------------------------- the same as in memory

@pytest.mark.parametrize("batch,gathered", [({"batch_size": 16}, 64), ({"batch_tokens": 90}, 3)])
def test_a_corpus_of_one_window_gives_what_everything_in_memory_would(file, batch, gathered, small_blocks, monkeypatch):
    """However many batches are gathered together."""
    monkeypatch.setattr(buckets, "GATHER", gathered)
    made = dataclasses.replace(recipe(file, held_out=HeldOut(0.1)), batch=batch)
    with Epochs(made) as epochs:
        for number in range(3):
            expected = in_memory([t for t in file.read_text().splitlines()], made, number)
            found = [from_packed(packed) for packed in epochs.epoch(number)]
            assert len(found) == len(expected) > 10
            for one, other in zip(found, expected):
                for field in dataclasses.fields(one):
                    a, b = getattr(one, field.name), getattr(other, field.name)
                    assert (a == b) if a is None or isinstance(a, (int, tuple)) else (a.dtype == b.dtype and a.tolist() == b.tolist()), field.name


@pytest.mark.parametrize("change,words", [
    ({"shard": (2, 2)}, r"shard: expected \(i, n\) with i from 0 to n - 1, got \(2, 2\)"),
    ({"shard": (0, 0)}, "shard: expected"),
    ({"shard": (-1, 2)}, "shard: expected"),
    ({"batch": {"batch_tokens": 0}}, "batch: expected batch_size or batch_tokens of at least 1, got {'batch_tokens': 0}"),
    ({"batch": {"batch_size": 3, "batch_tokens": 3}}, "batch: expected"),
    ({"batch": {}}, "batch: expected"),
    ({"buffer": 0}, "buffer: expected at least 1, got 0"),
    ({"max_length": 2}, "max_length: expected at least 3, got 2"),
    ({"max_length": "a"}, "Recipe: max_length: expected a whole number, got 'a'"),
    ({"seed": -1}, "seed: expected a whole number from 0 to 9223372036854775807, got -1"),
    ({"seed": "a"}, "Recipe: seed: expected a whole number, got 'a'"),
    ({"attribute_weight": float("nan")}, "attribute_weight: expected a number from 1 to 1000, got nan"),
    ({"attribute_weight": 0}, "attribute_weight: expected a number from 1 to 1000, got 0.0"),
    ({"attribute_weight": "a"}, "Recipe: attribute_weight: expected a number, got 'a'"),
    ({"threads": 1.5}, "Recipe: threads: expected a whole number, got 1.5"),
    ({"files": (3,)}, r"Recipe: files: expected a list of texts, got \(3,\)"),
    ({"tokenizer": None}, "Recipe: tokenizer: expected an instance of Tokenizer, got None"),
    ({"axis": "gender"}, "Recipe: axis: expected an instance of Axis, got 'gender'"),
    ({"held_out": None}, "Recipe: held_out: expected an instance of HeldOut, got None"),
    ({"batch": None}, "Recipe: batch: expected a table of options, got None"),
    ({"batch": {"batch_size": "x"}}, "batch: expected batch_size or batch_tokens of at least 1, got {'batch_size': 'x'}"),
    ({"shard": 3}, r"shard: expected \(i, n\) with i from 0 to n - 1, got 3"),
    ({"shard": ("a", 2)}, "shard: expected"),
])  # fmt: skip
def test_a_recipe_that_makes_no_sense_is_refused(change, words, file):
    with pytest.raises(ConfigError, match=f"^{words}"):
        dataclasses.replace(recipe(file), **change)


def test_a_recipe_of_one_file_is_of_a_list_of_one(file):
    assert dataclasses.replace(recipe(file), files=str(file)) == dataclasses.replace(recipe(file), files=file) == recipe(file)


def test_epochs_are_of_a_recipe_by_number_until_they_are_closed(file):
    with pytest.raises(ConfigError, match="^epochs: expected a Recipe, got NoneType$"):
        Epochs(None)
    for workers in (None, 1.5, -1, "a"):
        with pytest.raises(ConfigError, match=f"^workers: expected a whole number of at least 0, got {workers!r}$"):
            Epochs(recipe(file), workers)
    for workers in (0, 1):
        with Epochs(recipe(file), workers) as epochs:
            for number in (-1, "a", None):
                with pytest.raises(ConfigError, match=f"^epoch: expected a whole number of at least 0, got {number!r}$"):
                    next(epochs.epoch(number))
            assert list(epochs.epoch(0))
        for ask in (epochs.ready, lambda: next(epochs.epoch(0)), lambda: next(epochs.epoch(1)), lambda: next(epochs.resume(epochs.position))):
            with pytest.raises(ConfigError, match="^epochs: closed; expected new ones, which begin anew$"):
                ask()


@pytest.mark.parametrize("name", ["c.txt.gz", "C.TXT.GZ"])
def test_a_position_in_a_packed_file_lies_behind_its_size(name, tmp_path):
    """Bytes are counted unpacked."""
    (tmp_path / name).write_bytes(gzip.compress(b"he is a nurse\n" * 1000))
    made = recipe(tmp_path / name, buffer=50)
    everything = given(made, 120)
    at = next(i for i, g in enumerate(everything) if g.position["place"][1] > (tmp_path / name).stat().st_size)
    with Epochs(made) as epochs:
        assert same(next(epochs.resume(everything[at].position)), everything[at + 1].packed)


def test_only_positions_are_resumed(file):
    with pytest.raises(ConfigError, match="workers: expected a whole number of at least 0, got -1"):
        Epochs(recipe(file), -1)
    with Epochs(recipe(file)) as epochs:
        next(epochs.epoch(0))
        for position in (None, {}, epochs.position | {"batch": -1}, epochs.position | {"batch": "1"}, epochs.position | {"more": 1}, epochs.position | {"place": "x"},
                         epochs.position | {"place": [0, 0, -1, 0]}, epochs.position | {"place": [0, 0]}):
            with pytest.raises(ConfigError, match="resume: expected a position that came with a batch, a dict of epoch, window, batch, family, text, place, got"):
                next(epochs.resume(position))
        for place, words in (([9, 0, 0, 0], "in one of the corpus's 1 files, got one in file 10"), ([0, 10**12, 0, 0], "got one behind 1000000000000")):
            with pytest.raises(ConfigError, match=f"resume: expected a position .*{words}"):
                next(epochs.resume(epochs.position | {"place": place}))


def test_words_of_the_axis_are_masked_more_where_the_recipe_says_so(file):
    plain, weighted = (given(recipe(file, attribute_weight=weight), 160) for weight in (1.0, 50.0))
    plain, weighted = ([g.packed for g in some[:len(some) // 2]] for some in (plain, weighted))
    words = [int(TOKENIZER.encode([word])[0].ids[1]) for word in WORDS if word in GENDER.words]
    assert [p.row_lengths.tolist() for p in plain] == [p.row_lengths.tolist() for p in weighted]  # the same texts, as many words of each masked
    others = [1 - numpy.isin(numpy.concatenate([p.targets for p in some]), words).mean() for some in (plain, weighted)]
    assert len(words) == 6 and 0 < others[1] < others[0] / 2, others


def in_memory(everything: list[str], made: Recipe, epoch: int):
    """The specification."""
    found = [(family.source, family.members) for family in families(everything, GENDER) if not made.held_out(family)]
    ids = [[e.ids for e in TOKENIZER.encode(members, max_length=made.max_length)] for _, members in found]
    batches = []
    for i, items in enumerate(plan([sum(map(len, f)) for f in ids], members=[len(f) for f in ids], seed=(made.seed, 0, epoch), **made.batch)):
        generator = numpy.random.default_rng([made.seed, 2, epoch, i])
        batches.append(pack([Sample(*mask_tokens(text, TOKENIZER, generator), family=found[item][0]) for item in items for text in ids[item]]))
    return batches


def test_counts_are_of_the_whole_pass(file):
    everything = file.read_text().splitlines()
    with Epochs(recipe(file, held_out=HeldOut(0.1))) as epochs:
        counts = epochs.ready()
    every = list(families(everything, GENDER))
    found = [family for family in every if not HeldOut(0.1)(family)]
    assert counts.held_out == len(every) - len(found) > 5
    assert (counts.texts, counts.families, counts.members, counts.whole) == (len(everything) - counts.held_out, len(found), sum(len(f.members) for f in found), True)
    assert counts.cut == sum(e.cut > 0 for f in found for e in TOKENIZER.encode(f.members, max_length=10)) > 5


def test_counts_are_of_the_pass_that_has_read_most(file, small_blocks):
    with Epochs(recipe(file, buffer=50)) as epochs:
        first, batches = epochs.ready().texts, epochs.epoch(0)
        for _ in range(20):
            next(batches)
        most = epochs.counts.texts
        next(epochs.epoch(0))
        assert epochs.counts.texts == most > first


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("keep_untouched", [True, False])
def test_texts_with_words_are_counted_whatever_is_kept(keep, keep_untouched, file):
    everything = file.read_text().splitlines()
    made = dataclasses.replace(recipe(file, intervention=Intervention(keep=keep)), axis=dataclasses.replace(GENDER, keep_untouched=keep_untouched))
    with Epochs(made) as epochs:
        assert epochs.ready().touched == sum(bool(counterfactuals(text, GENDER)) for text in everything) < len(everything)


def test_what_is_left_out_is_counted_up_to_the_end(tmp_path, small_blocks):
    (tmp_path / "c.txt").write_bytes(b"\xff\n" + "\n".join(texts(60)).encode() + b"\n" + b"\xff\n" * 900)  # blocks with nothing but corrupt lines
    for buffer in (999, 20):
        with Epochs(recipe(tmp_path / "c.txt", on_error="skip", buffer=buffer)) as epochs:
            list(epochs.epoch(0))
        assert epochs.counts.whole and epochs.counts.skipped == 901 and len(epochs.counts.first_skipped) == 5
        assert epochs.counts.first_skipped[1] == f"{tmp_path}/c.txt:62: expected utf-8, got 0xff at byte 1 of the line"


# ---------------------------------------------------------------- windows

def test_windows_follow_the_files_and_every_family_comes_once_an_epoch(file, small_blocks):
    whole = {int(source) for packed in (g.packed for g in given(recipe(file), 50)) for source in packed.family}
    seen, window, epochs = {}, -1, []
    for event in Stream(recipe(file, buffer=40)).run():
        if isinstance(event, Filled):
            window += 1
        elif isinstance(event, Given):
            assert event.position["window"] == window
            seen.setdefault(window, set()).update(event.packed.family.tolist())
        else:
            assert [len(members) for members in seen.values()] == [40] * (len(whole) // 40) + [len(whole) % 40] and window > 4
            assert set.union(*seen.values()) == whole and all(max(seen[w]) < min(seen[w + 1]) for w in range(window))
            epochs.append(seen)
            seen, window = {}, -1
            if len(epochs) == 2:
                break
    assert event == Ended(1)


def test_equal_windows_are_shuffled_and_masked_differently(tmp_path):
    (tmp_path / "c.txt").write_text("\n".join(texts(60)) + "\n")
    once, twice = recipe(tmp_path / "c.txt"), recipe((tmp_path / "c.txt",) * 2)
    size = given(once, 1)[0].packed.family.size and len({int(s) for g in given(once, 8) for s in g.packed.family})
    found = [g for g in given(dataclasses.replace(twice, buffer=size), 30) if g.position["epoch"] == 0]
    first, second = ([g.packed for g in found if g.position["window"] == w] for w in (0, 1))
    assert sorted(s - 60 for p in second for s in set(p.family.tolist())) == sorted(s for p in first for s in set(p.family.tolist()))  # the same texts
    order = [[s % 60 for p in packed for s in p.family.tolist()] for packed in (first, second)]
    assert order[0] != order[1] and not equal([p for p in first], [p for p in second])


def test_a_window_holds_so_many_tokens_at_most():
    """Five families of 4, 4, 9, 2 and 2 tokens."""
    made = Families.of([[numpy.zeros(n, numpy.int32)] for n in (4, 4, 9, 2, 2)])
    blocks = [stream.Block(made[:2], lambda f: Start(f, f), stream.Counts()), stream.Block(made[2:], lambda f: Start(2 + f, 2 + f), stream.Counts())]

    def sizes(buffer, tokens):
        return [(w.number, w.start.family, w.families.lengths.tolist(), w.last) for w in fill(blocks, buffer, tokens=tokens)]

    assert sizes(99, 8) == [(0, 0, [4, 4], False), (1, 2, [9], False), (2, 3, [2, 2], True)]  # one of 9 comes alone
    assert sizes(2, 99) == [(0, 0, [4, 4], False), (1, 2, [9, 2], False), (2, 4, [2], True)]
    assert sizes(5, 21) == [(0, 0, [4, 4, 9, 2, 2], True)]
    assert sizes(3, 12) == [(0, 0, [4, 4], False), (1, 2, [9, 2], False), (2, 4, [2], True)]
    assert list(fill([], 5)) == []


# ---------------------------------------------------------------- positions and shards

FILES = {
    "txt": ("c.txt", lambda all: "\n".join(all[:100]) + "\n\n \n" + "\r\n".join(all[100:]), {}),
    "txt.gz": ("c.txt.gz", lambda all: gzip.compress("\n".join(all).encode()), {}),
    "csv": ("c.csv", lambda all: "id,text\n" + "".join(f'{i},"{t}\nand ""him"""\n' for i, t in enumerate(all)), {}),
    "tsv": ("c.tsv", lambda all: "".join(f"{i}\t{t}\n" for i, t in enumerate(all)), {"column": "1"}),
    "jsonl": ("c.jsonl", lambda all: "".join(json.dumps({"text": t}) + "\n" for t in all), {}),
    "sentences": ("c.txt", lambda all: "\n".join(". ".join(w.capitalize() for w in t.split()) for t in all), {"unit": "sentence"}),
    "documents": ("c.txt", lambda all: "\n".join(t + "\n" * (i % 3 == 0) for i, t in enumerate(all)), {"unit": "document"}),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_position_gives_exactly_the_batches_that_follow(kind, tmp_path, small_blocks):
    name, content, options = FILES[kind]
    data = content(texts(130))
    (tmp_path / "a").mkdir()
    for path, part in ((tmp_path / name, data), (tmp_path / "a" / name, data)):
        path.write_bytes(part if isinstance(part, bytes) else part.encode())
    made = recipe((tmp_path / name, tmp_path / "a" / name), buffer=70, held_out=HeldOut(0.1), **options)
    everything = given(made, 160 if kind == "sentences" else 75)
    windows = {(g.position["epoch"], g.position["window"]) for g in everything}
    assert len(windows) > 3 and (1, 0) in windows
    assert kind != "sentences" or {g.position["place"][3] for g in everything} > {0}  # windows begin in the middle of a record
    for at in range(0, len(everything) - 5, 3 if kind == "txt" else 11):
        position = json.loads(json.dumps(everything[at].position))
        following = given(made, 5, position)
        assert equal([g.packed for g in following], [g.packed for g in everything[at + 1 : at + 6]]), position
        assert [g.position for g in following] == [g.position for g in everything[at + 1 : at + 6]]


def test_a_pass_that_begins_in_the_middle_is_not_whole(file):
    made = recipe(file, buffer=50)
    position = next(g.position for g in given(made, 60) if g.position["window"])
    with Epochs(made) as epochs:
        list(epochs.resume(position))
        assert not epochs.counts.whole
        list(epochs.epoch(1))
        assert epochs.counts.whole


@pytest.mark.parametrize("parts", [2, 3])
def test_shards_are_the_whole_and_keep_its_numbers(parts, file, small_blocks):
    def members(**options):
        with Epochs(recipe(file, held_out=HeldOut(0.1), **options)) as epochs:
            return sorted((int(s), int(n)) for p in epochs.epoch(0) for s, n in zip(p.family, p.lengths))

    shards = [members(shard=(i, parts), buffer=50) for i in range(parts)]
    assert all({source % parts for source, _ in shard} == {i} for i, shard in enumerate(shards))
    assert sorted(sum(shards, [])) == members()


# ---------------------------------------------------------------- the background process

def gone(pid: int) -> bool:
    """Whether the process ends within ten seconds."""
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":  # its parent has not asked yet
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("workers", [1, 2])
def test_the_background_process_gives_the_same_bits(workers, file):
    made = recipe(file, buffer=100, held_out=HeldOut(0.1))
    with Epochs(made) as here, Epochs(made, workers) as there:
        assert here.ready() == there.ready() and there.counts.texts > 0
        assert equal(list(here.epoch(0)), list(there.epoch(0))) and here.counts == there.counts and there.counts.whole
        assert equal(list(here.epoch(1)), list(there.epoch(1))) and here.position == there.position
        first = next(there.epoch(0))  # left after one batch
        assert equal(list(here.epoch(0)), again := list(there.epoch(0))) and same(first, again[0])
        half, position = there.epoch(3), None
        taken = [next(half) for _ in range(9)]
        position = there.position
        assert equal(list(there.resume(position)), list(here.epoch(3))[9:]) and len(taken) == 9
        assert equal(list(here.epoch(4)), list(there.epoch(4)))
        pid = there._source.process.pid
        if Path("/proc/self/maps").exists():
            assert "torch" not in Path(f"/proc/{pid}/maps").read_text()
    assert gone(pid)


def test_what_goes_wrong_in_the_process_is_said_here(tmp_path):
    (tmp_path / "bad.txt").write_bytes("\n".join(texts(200)).encode() + b"\n\xff\n")
    said = []
    for workers in (0, 1):
        with Epochs(recipe(tmp_path / "bad.txt", buffer=50), workers) as epochs:
            with pytest.raises(DataError) as caught:
                for count, _ in enumerate(epochs.epoch(0), 1):
                    pass
            said.append((type(caught.value), str(caught.value), count))
    assert said[0] == said[1] and said[0][1] == f"{tmp_path}/bad.txt:201: expected utf-8, got 0xff at byte 1 of the line" and count > 10


class Raising(str):
    """Where it is unpickled, a pass over the corpus raises what its text makes; it is None there."""

    def __reduce__(self):
        return exec, (f"import peftdebias.stream as s\ndef run(*args):\n    raise {self}\n    yield\ns.Stream.run = run",)


@pytest.mark.parametrize("said, error", [("MemoryError('no memory for the sums')", MemoryError("no memory for the sums")), ("MemoryError", MemoryError()),
                                         ("OSError(28, 'No space left on device', 'a/b')", OSError(28, "No space left on device", "a/b")),
                                         ("OSError(28, 'No space left on device')", OSError(28, "No space left on device")),
                                         ("__import__('numpy')._core._exceptions._ArrayMemoryError((10 ** 15,), __import__('numpy').dtype('f8'))",
                                          MemoryError("Unable to allocate 7.11 PiB for an array with shape (1000000000000000,) and data type float64"))])  # fmt: skip
def test_memory_and_disks_that_end_in_the_process_are_errors_of_the_same_kind_here(said, error, file):
    with Epochs(dataclasses.replace(recipe(file), cache=Raising(said)), 1) as epochs, pytest.raises(type(error)) as caught:
        epochs.ready()
    assert (caught.value.args, getattr(caught.value, "filename", None)) == (error.args, getattr(error, "filename", None))
    for said in ("OSError('obtaining file position failed')", "OSError(5, 'Input/output error')"):  # a bug, here as there: its traceback is the process's
        with Epochs(dataclasses.replace(recipe(file), cache=Raising(said)), 1) as epochs, pytest.raises(RuntimeError, match=r"in the background process:\nTraceback(.|\n)*OSError: .*(failed|Input)"):
            epochs.ready()


class Loud(str):
    """Prints where it is unpickled, and is None there."""

    def __reduce__(self):
        return exec, ("print('loud', flush=True)",)


def test_what_the_process_prints_is_no_frame(file):
    with Epochs(recipe(file)) as here, Epochs(dataclasses.replace(recipe(file), column=Loud()), 1) as there:
        assert equal(list(there.epoch(0)), list(here.epoch(0)))


def test_a_process_that_is_killed_is_one_clear_line(file):
    with Epochs(recipe(file, buffer=50), 1) as epochs:
        batches = epochs.epoch(0)
        next(batches)
        epochs._source.process.kill()
        with pytest.raises(PeftDebiasError, match=r"^the background process that makes batches was killed by signal 9; expected it to last"):
            while True:
                list(batches)
                batches = epochs.epoch(epochs.position["epoch"] + 1)


class Leaves(str):
    """Ends the process where it is unpickled."""

    def __reduce__(self):
        return os._exit, (3,)


def test_a_process_that_ends_by_itself_is_one_clear_line(file):
    with Epochs(dataclasses.replace(recipe(file), column=Leaves()), 1) as epochs:
        with pytest.raises(PeftDebiasError, match=r"^the background process that makes batches ended with code 3; expected it to last"):
            epochs.ready()


def test_a_frame_that_is_cut_off_is_the_end():
    whole = io.BytesIO()
    worker._send(whole, {"kind": "given"}, [numpy.arange(3), numpy.arange(2)])
    head, body = worker._read_frame(io.BytesIO(whole.getvalue()))
    numbers = numpy.frombuffer(body, numpy.int64)
    assert head == {"kind": "given"} and numbers.tolist() == [0, 1, 2, 0, 1] and numbers.flags.aligned
    assert all(worker._read_frame(io.BytesIO(whole.getvalue()[:size])) is None for size in range(len(whole.getvalue())))


def test_a_corpus_without_a_family_ends_there_as_here(tmp_path):
    (tmp_path / "c.txt").write_text("a ship in the town\n")
    made = dataclasses.replace(recipe(tmp_path / "c.txt"), axis=dataclasses.replace(GENDER, keep_untouched=False))
    for workers in (0, 1):
        with Epochs(made, workers) as epochs:
            assert epochs.ready().texts == 0 and list(epochs.epoch(0)) == []


def test_it_needs_no_thread_here_and_takes_a_large_recipe(file):
    """What is sent, more than a pipe holds, and what waits in the pipe never stop each other; a command throws away what waits."""
    made = dataclasses.replace(recipe(file, buffer=100), tokenizer=wordpiece([*STYLES["bert"].values(), *WORDS, *(f"word{i}" for i in range(80_000))]))
    assert len(pickle.dumps(made)) > 1 << 20
    with Epochs(made) as here:
        expected = list(here.epoch(0))
    before = threading.active_count()
    with Epochs(made, 1) as there:
        for _ in range(3):
            assert same(next(there.epoch(0)), expected[0])
            time.sleep(0.3)  # the pipe fills: there is always another epoch
        assert equal(list(there.epoch(0)), expected) and threading.active_count() <= before  # another's may end


class Cut:
    """A pipe into which Ctrl-C lets five bytes."""

    def __init__(self, pipe):
        self.close, self._pipe = pipe.close, pipe

    def write(self, data: bytes) -> None:
        self._pipe.write(data[:5])
        raise KeyboardInterrupt


def test_what_ctrl_c_breaks_off_is_not_read_on(file, monkeypatch):
    """In the middle of a frame, of a command and of the recipe: the next run has a process of its own and the same batches."""
    monkeypatch.setattr(worker, "PATIENCE", 60)  # what was broken off is read once the process has started
    with Epochs(recipe(file)) as here:
        expected = list(here.epoch(0))

    def in_a_frame(stream):
        stream.read(5)
        raise KeyboardInterrupt

    with Epochs(recipe(file), 1) as there:
        source, processes = there._source, []
        for begun, where in ((0, "command"), (1, "frame"), (1, "command")):  # with begun 0 the recipe goes before the command
            processes.append(source.process)
            batches = there.epoch(0) if where == "command" else there._batches()
            if begun:
                assert same(next(there.epoch(0)), expected[0])
            with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
                patched.setattr(worker, "_read_frame", in_a_frame) if where == "frame" else patched.setattr(source.process, "stdin", Cut(source.process.stdin))
                next(batches)
            assert equal(list(there.epoch(0)), expected)
        processes.append(source.process)
    assert len({process.pid for process in processes}) == 4 and [process.returncode for process in processes] == [0] * 4


@pytest.mark.slow
def test_ctrl_c_at_any_moment_leaves_batches_that_are_right(file):
    made = recipe(file, buffer=100)
    with Epochs(made) as here:
        expected = list(here.epoch(0))

    def interrupt(*_):
        raise KeyboardInterrupt

    before, chosen, struck = signal.signal(signal.SIGALRM, interrupt), random.Random(0), 0
    try:
        with Epochs(made, 1) as there:
            for _ in range(60):
                try:
                    signal.setitimer(signal.ITIMER_REAL, chosen.choice((0.01, 0.3, 1)) * chosen.random())
                    for _ in range(200):
                        list(there.epoch(0))
                except KeyboardInterrupt:
                    struck += 1
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                assert equal(list(there.epoch(0)), expected)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert struck > 50


SCRIPT = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever starts the tests in the background may have it ignored
sys.path.insert(0, {tests!r})
from peftdebias.worker import Epochs
from peftdebias.stream import Recipe
from peftdebias.axes import load_axis
from peftdebias.tokens import wordpiece
recipe = Recipe(({file!r},), load_axis("gender"), wordpiece({vocabulary!r}), 10, 0, {{"batch_size": 4}}, buffer=50)
epochs = Epochs(recipe, 1)
number = 0
while True:  # no guard for __main__, no with
    for batch in epochs.epoch(number):
        if number == 0:
            print(epochs._source.process.pid, flush=True)
            {then}
    number += 1
"""


@pytest.mark.parametrize("then,signal_number,code", [("sys.exit(7)", None, 7), ("pass", signal.SIGKILL, -9), ("pass", signal.SIGINT, -2)])
def test_no_process_outlives_the_training(then, signal_number, code, file):
    """A script without a guard: it ends early, is killed, or is stopped by Ctrl-C, which goes to its whole group."""
    words = SCRIPT.format(tests=str(Path(__file__).parent), file=str(file), vocabulary=[*STYLES["bert"].values(), *WORDS], then=then)
    process = subprocess.Popen([sys.executable, "-c", words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    worker = int(process.stdout.readline())
    if signal_number:
        os.killpg(process.pid, signal_number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == code and gone(worker)
    assert said.count("Traceback") == (signal_number == signal.SIGINT) and "peftdebias.worker import main" not in said


def test_small_corpora_start_no_process(tmp_path, monkeypatch):
    (tmp_path / "c.txt").write_text("he is\n")
    assert default_workers((str(tmp_path / "c.txt"),)) == 0
    with open(tmp_path / "large.txt", "wb") as file:
        file.truncate(64 << 20)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert default_workers((str(tmp_path / "large.txt"),)) == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    assert default_workers((str(tmp_path / "large.txt"),)) == 0


# ---------------------------------------------------------------- ahead

def test_ahead_keeps_the_order_and_passes_errors_on():
    def three():
        yield from (1, 2)
        raise ConfigError("third")

    items = ahead(three())
    assert next(items) == 1 and next(items) == 2
    with pytest.raises(ConfigError, match="^third$"):
        next(items)
    assert list(ahead(range(5), 3)) == list(range(5))


def test_ahead_makes_one_item_more_and_is_closed_with_its_source():
    made, closed = [], []

    def source():
        try:
            for i in range(100):
                made.append(i)
                yield i
        finally:
            closed.append(True)

    items = ahead(source())
    assert next(items) == 0
    for _ in range(2000):
        if len(made) == 2:
            break
        time.sleep(0.01)
    time.sleep(0.02)
    assert made == [0, 1]
    items.close()
    assert closed == [True] and len(made) == 2


def test_what_a_recipe_is_made_of_is_checked(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "he is"}\n')
    with Epochs(recipe(tmp_path / "c.jsonl", unit="document")) as epochs:
        with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}/c.jsonl: --unit document: expected txt files, whose documents end at blank lines, got jsonl")):
            epochs.ready()


def test_a_process_that_cannot_be_started_is_one_line(file, monkeypatch):
    def refused(*args, **kwargs):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refused)
    with pytest.raises(ConfigError, match="^--workers: the background process cannot be started: Resource temporarily unavailable; --workers 0 needs none$"):
        Epochs(recipe(file), 1)
    monkeypatch.setattr(sys, "executable", None)  # as in a program that embeds Python
    with pytest.raises(ConfigError, match="^--workers: the background process cannot be started: sys.executable names no Python here; --workers 0 needs none$"):
        Epochs(recipe(file), 1)
