"""The cache of tokenised families: the same batches, no text read on a hit, a key that sees every change, damage noticed, two writers at once."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy
import pytest
import tokenizers

from peftdebias import axes, cache, native, outputs, stream, worker
from peftdebias.cache import Cache
from peftdebias.cda import Intervention
from peftdebias.errors import ConfigError
from peftdebias.holdout import HeldOut
from peftdebias.stream import Stream, tokenised
from peftdebias.tokens import STYLES, Tokenizer
from peftdebias.worker import Epochs

from .test_stream import equal, file, given, recipe, wordpiece  # noqa: F401


@pytest.fixture
def made(file, tmp_path):  # noqa: F811
    return recipe(file, buffer=70, held_out=HeldOut(0.1), cache=str(tmp_path / "cache"))


def folders(made) -> list[str]:
    return sorted(path.name for path in Path(made.cache).iterdir())


def write(made) -> list:
    """Its batches of one epoch; the cache is whole afterwards."""
    with Epochs(made) as epochs:
        return list(epochs.epoch(0))


def note(made) -> str:
    with Epochs(made) as epochs:
        return epochs.ready().notes[0]


def test_a_corpus_that_is_written_to_meanwhile_is_not_kept(made):
    """Nor what comes of it under the name of its contents before, should these come back."""
    (file,) = map(Path, made.files[:1])
    before, seen = file.read_bytes(), []
    with Epochs(made) as epochs:
        epochs.ready()
        for batch in epochs.epoch(0):
            seen.append(batch)
            if len(seen) == 1:
                file.write_bytes(before + b"he is late\n")
    file.write_bytes(before)
    assert len(seen) > 1 and not Path(made.cache).exists()
    write(made)
    assert folders(made) == [Cache(made).folder.name]


def test_a_hit_reads_no_text_and_gives_the_same_batches(made, monkeypatch):
    plain = dataclasses.replace(made, cache=None)
    expected = given(plain, 60)
    with Epochs(made) as epochs:
        assert epochs.ready().notes == [f"cache: {Cache(made).folder} is written"]
        assert equal(list(epochs.epoch(0)), [g.packed for g in expected if g.position["epoch"] == 0])
        counts = epochs.counts
    assert folders(made) == [Cache(made).folder.name]

    def never(*args, **kwargs):
        raise AssertionError("text was read")

    with monkeypatch.context() as patched:
        patched.setattr(stream, "tokenised", never)
        again = given(made, 60)
        with Epochs(made) as epochs:
            found = epochs.ready()
    assert equal([g.packed for g in again], [g.packed for g in expected])
    assert found.notes == [f"cache: {Cache(made).folder} is read"] and found.whole
    assert dataclasses.replace(found, notes=[]) == dataclasses.replace(counts, notes=[])
    for one, other in ((made, expected), (made, again), (plain, again)):  # a position of either opens either
        for at in (0, 25, 33, 50):
            assert equal([g.packed for g in given(one, 4, other[at].position)], [g.packed for g in expected[at + 1 : at + 5]])


def test_a_run_that_begins_in_the_middle_writes_no_cache(made):
    """It would hold the rest of the corpus, as if that were all."""
    at = next(g.position for g in given(dataclasses.replace(made, cache=None), 60) if g.position["family"])
    given(made, 60, at | {"epoch": 0})
    whole = write(dataclasses.replace(made, cache=None))
    assert equal(write(made), whole) and equal(write(made), whole)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("name", ["ids.bin", "about.json"])
def test_a_disk_that_is_full_when_the_last_bytes_are_written_is_said(made, name, monkeypatch):
    monkeypatch.setattr(cache, "open", lambda path, mode: open("/dev/full" if Path(path).name == name else path, mode), raising=False)
    with pytest.raises(ConfigError, match=rf"^--cache {made.cache}: cannot be written: No space left on device$"):
        write(made)
    assert not Path(made.cache).exists()


def test_a_file_that_cannot_be_made_is_said(made, monkeypatch):
    def refused(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(cache, "open", refused, raising=False)
    with pytest.raises(ConfigError, match=rf"^--cache {made.cache}: cannot be written: Permission denied$"):
        write(made)


def test_the_background_process_writes_and_reads_it_too(made):
    expected = write(dataclasses.replace(made, cache=None))
    for _ in range(2):
        with Epochs(made, 1) as epochs:
            assert equal(list(epochs.epoch(0)), expected)
    assert epochs.counts.notes[0].endswith("is read")


@pytest.mark.parametrize("change", [
    {"column": "x"}, {"unit": "sentence"}, {"on_error": "skip"}, {"max_length": 9}, {"shard": (0, 2)}, {"held_out": HeldOut(0.2)}, {"held_out": HeldOut(0.1, frozenset([3]))},
    {"held_out": HeldOut(0.1, axis=axes.load_axis("gender"))},
    {"intervention": Intervention(keep="originals")}, {"axis": axes.load_axis("race")}, {"axis": dataclasses.replace(axes.load_axis("gender"), keep_untouched=True)},
    {"tokenizer": wordpiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "he"])},
], ids=lambda change: "-".join(f"{k}={v}" if isinstance(v, (str, int, float)) else k for k, v in change.items()))  # fmt: skip
def test_the_key_sees_what_decides_the_families(made, change):
    assert cache.key(dataclasses.replace(made, **change)) != cache.key(made)


def test_the_key_sees_the_text_and_nothing_that_decides_the_order(made, file, tmp_path):  # noqa: F811
    other = dataclasses.replace(made, seed=9, batch={"batch_tokens": 50}, buffer=3, threads=2, cache="elsewhere")
    assert cache.key(other) == cache.key(made)
    copy = shutil.copy(file, tmp_path / "other name.txt")
    assert cache.key(dataclasses.replace(made, files=(str(copy),))) == cache.key(made)
    with open(copy, "a") as text:
        text.write("he\n")
    assert cache.key(dataclasses.replace(made, files=(str(copy),))) != cache.key(made)
    assert cache.key(dataclasses.replace(made, files=made.files * 2)) != cache.key(made)


def cut(folder):
    with open(folder / "ids.bin", "r+b") as ids:
        ids.truncate(12)


DAMAGE = {
    "a file cut short": (cut, r"ids.bin: expected \d+ bytes, got 12"),
    "a file too long": (lambda folder: open(folder / "sizes.bin", "ab").write(b"1234"), r"sizes.bin: expected \d+ bytes, got \d+"),
    "a file gone": (lambda folder: (folder / "lengths.bin").unlink(), "lengths.bin"),
    "nothing about it": (lambda folder: (folder / "about.json").unlink(), "about.json"),
    "about.json cut short": (lambda folder: (folder / "about.json").write_text('{"bytes": {"ids"'), "line 1"),
    "about.json of something else": (lambda folder: (folder / "about.json").write_text(json.dumps({"bytes": 3})), "int"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_cache_is_named_and_made_again(what, made):
    expected, folder = write(made), Cache(made).folder
    damage, words = DAMAGE[what]
    damage(folder)
    said = note(made)
    assert re.fullmatch(rf"cache: {re.escape(str(folder))} was damaged and is made again \(.*{words}.*\)", said), said
    assert equal(write(made), expected) and note(made) == f"cache: {folder} is read"


def test_what_is_not_finished_leaves_nothing(made, monkeypatch):
    monkeypatch.setattr(worker, "PATIENCE", 60)
    events = Stream(made).run()
    next(events), next(events)
    assert len(folders(made)) == 1 and ".partial-" in folders(made)[0]
    events.close()
    assert not Path(made.cache).exists()
    with Epochs(dataclasses.replace(made, files=made.files * 100), 1) as epochs:  # more than waits in the pipe
        next(epochs.epoch(0))
    assert not Path(made.cache).exists()


def test_two_writers_at_once_do_no_harm(made):
    plain = dataclasses.replace(made, cache=None)
    one, other = (Cache(made).writing(tokenised(plain)) for _ in range(2))
    next(one), next(other)
    assert len(folders(made)) == 2
    list(one)
    before = (Cache(made).folder / "ids.bin").stat().st_ino
    list(other)
    assert folders(made) == [Cache(made).folder.name] and (Cache(made).folder / "ids.bin").stat().st_ino == before  # the first to finish counts
    assert equal(write(made), write(plain))


def test_what_a_killed_writer_left_is_removed_when_the_same_is_written(made):
    left = outputs.partial_of(Cache(made).folder)  # what a process that is gone had locked
    left.mkdir(parents=True), (left / "ids.bin").write_bytes(b"1234")
    writing = Cache(made).writing(tokenised(dataclasses.replace(made, cache=None)))
    next(writing)
    assert not left.exists() and len(folders(made)) == 1  # its own
    list(writing)
    assert folders(made) == [Cache(made).folder.name]


def test_memory_stays_bounded_in_reading(made, monkeypatch):
    write(made)
    found, _ = Cache(made).open()
    monkeypatch.setattr(cache, "READ", 7)
    parts = list(found.blocks())
    assert [len(p) for p, _ in parts[:-1]] == [7] * (len(parts) - 1) and len(parts) > 20
    assert [first for _, first in parts] == list(range(0, 7 * len(parts), 7))
    skipped = list(found.blocks(30))
    sources = numpy.concatenate([p.sources for p, _ in parts])
    assert skipped[0][1] == 30 and numpy.array_equal(numpy.concatenate([p.sources for p, _ in skipped]), sources[30:])
    ids = numpy.concatenate([p.ids for p, _ in parts])
    assert numpy.array_equal(numpy.concatenate([p.ids for p, _ in skipped]), ids[-sum(len(p.ids) for p, _ in skipped):])


def test_a_folder_that_cannot_be_written_is_named(made, tmp_path):
    (tmp_path / "file").write_text("")
    with Epochs(dataclasses.replace(made, cache=str(tmp_path / "file"))) as epochs, pytest.raises(ConfigError, match=f"^--cache {tmp_path}/file: cannot be written: "):
        epochs.ready()


def test_a_run_that_ends_before_leaves_no_folder_of_its_own(made, tmp_path):
    made = dataclasses.replace(made, cache=str(tmp_path / "new" / "cache"))
    writing = Cache(made).writing(iter([block for block in tokenised(made)]))
    next(writing)
    assert (tmp_path / "new" / "cache").is_dir()
    writing.close()
    assert not (tmp_path / "new").exists()
    (tmp_path / "new").mkdir()  # which the user made
    writing = Cache(made).writing(iter([block for block in tokenised(made)]))
    next(writing)
    writing.close()
    assert list((tmp_path / "new").rglob("*")) == []


def test_the_key_sees_how_a_file_is_read(tmp_path):
    """The same bytes as a table and as plain lines."""
    keys = set()
    for name in ("a.txt", "a.tsv", "a.csv", "a.txt.gz"):
        (tmp_path / name).write_text("text\the\nhe is\tx\n")
        keys.add(cache.key(recipe(tmp_path / name)))
    assert len(keys) == 4


def test_the_key_sees_no_place_of_an_axis(made):
    assert cache.key(dataclasses.replace(made, axis=dataclasses.replace(made.axis, source="elsewhere", description="other"))) == cache.key(made)


def test_the_key_sees_the_sources_that_read_and_swap(made, monkeypatch):
    plain, keys = cache.digest, {cache.key(made)}
    read = ("axes/__init__", "buckets", "cda", "cda_engine", "corpus", "holdout", "lines", "pronouns", "records", "sentences", "splice", "tokens")
    for source in (*(f"{name}.py" for name in read), "axes/pronouns.toml"):
        monkeypatch.setattr(cache, "digest", lambda path: "another" if path == Path(cache.__file__).parent / source else plain(path))
        keys.add(cache.key(made))
    monkeypatch.setattr(cache, "digest", lambda path: "another" if path.suffix != ".py" and path.name.startswith("_native") else plain(path))
    keys.add(cache.key(made))
    monkeypatch.setattr(cache, "FORMAT", 0)
    assert len(keys | {cache.key(made)}) == (16 if native.library() else 15)


def test_the_key_sees_which_families_are_held_out_and_which_word_has_an_id(made):
    keys = {cache.key(dataclasses.replace(made, held_out=HeldOut(0.1, frozenset([place])))) for place in (3, 4)}
    keys |= {cache.key(dataclasses.replace(made, tokenizer=wordpiece([*STYLES["bert"].values(), *words]))) for words in (("he", "she"), ("she", "he"))}
    assert len(keys) == 4


def test_the_counts_of_a_hit_are_those_of_the_whole_pass(made):
    many = dataclasses.replace(made, files=made.files * 2)
    blocks = list(Cache(many).writing(tokenised(many)))
    last, (found, _) = dataclasses.asdict(blocks[-1].counts), Cache(many).open()
    assert found.counts == {name: value for name, value in last.items() if name not in ("whole", "notes")} and len(blocks) > 1


def test_the_key_sees_how_pairs_are_framed(made):
    """And texts: two tokenizers may differ in nothing else than which of their tokens begins a text, or in whether a text's [CLS] is read as text."""
    backend, keys = made.tokenizer.backend, {cache.key(made)}
    for style, changes in (("roberta", {}), ("bert", {"cls_token": "[PAD]"}), ("bert", {"sep_token": "[PAD]"})):
        other = Tokenizer(backend, style, {f"{role}_token": token for role, token in STYLES["bert"].items()} | changes)
        keys.add(cache.key(dataclasses.replace(made, tokenizer=other)))
    other = Tokenizer(tokenizers.Tokenizer.from_str(backend.to_str()), "bert")
    assert cache.key(dataclasses.replace(made, tokenizer=other)) in keys
    other.backend.encode_special_tokens = True
    assert len(keys | {cache.key(dataclasses.replace(made, tokenizer=other))}) == 5
