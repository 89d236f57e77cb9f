"""Results: files whole or not at all, and never in the place of what they are made from, whichever command writes them."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from peftdebias import outputs
from peftdebias.errors import ConfigError
from peftdebias.outputs import alone, keep_apart, tables, writing, writing_folder

from .outside import one_thread  # noqa: F401
from .small import cli, done, tree


def test_a_file_takes_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "f.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), writing(str(path)) as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tree(tmp_path)) == ["f.txt"]
    with writing(str(path)) as file:
        file.write("né\u2028w")
        assert path.read_text() == "old"
    assert path.read_text(encoding="utf-8") == "né\u2028w" and list(tree(tmp_path)) == ["f.txt"]
    with writing("/dev/null") as file:
        file.write("gone")
    (tmp_path / "link.txt").symlink_to(path)
    with writing(str(tmp_path / "link.txt")) as file:
        file.write("through it")
    assert (tmp_path / "link.txt").is_symlink() and path.read_text() == "through it"
    for bad, words in ((tmp_path, "expected a file to write, got a folder"), (tmp_path / "none" / "f", "cannot be written: No such file or directory"),
                       (path / "f", "cannot be written: Not a directory")):
        with pytest.raises(ConfigError, match=f"^{bad}: {words}"), writing(str(bad)):
            pass


def folder(out, overwrite=False):
    return writing_folder(Path(out), overwrite, "folder with a", lambda there: (there / "a").exists())


def test_a_folder_takes_its_name_when_it_is_whole(tmp_path):
    with folder(tmp_path / "run") as made:
        (made / "a").write_text("1")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for out in ("run", "empty", "file"):
        with pytest.raises(ConfigError, match=f"^--out {tmp_path / out}: exists; expected a new folder [(]or --overwrite[)]$"), folder(tmp_path / out):
            pass
    (tmp_path / "empty").rmdir()
    (tmp_path / "file").unlink()
    for out in ("run", "link"):
        with folder(tmp_path / out, overwrite=True) as made:
            (made / "a").write_text(out)
        assert (tmp_path / "run" / "a").read_text() == out
    assert (tmp_path / "link").is_symlink() and sorted(p.name for p in tmp_path.iterdir()) == ["link", "run"]


@pytest.mark.parametrize("can", [True, False])
def test_a_folder_is_replaced(can, tmp_path, monkeypatch):
    if not can:
        monkeypatch.setattr(outputs, "_exchanged", lambda *paths: False)
    for value in "123":
        with folder(tmp_path / "run", overwrite=True) as made:
            (made / "a").write_text(value)
        assert (tmp_path / "run" / "a").read_text() == value and [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_reader_finds_the_old_folder_or_the_new_one(tmp_path):
    (tmp_path / "x").mkdir(), (tmp_path / "y").mkdir()
    if not outputs._exchanged(tmp_path / "x", tmp_path / "y"):
        pytest.skip("this system or its file system cannot exchange two names at once")
    code = f"import os, sys\nprint(flush=True)\nwhile not os.path.exists({str(tmp_path / 'end')!r}): os.stat({str(tmp_path / 'run')!r})"
    with folder(tmp_path / "run") as made:
        (made / "a").write_text("0")
    reader = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    reader.stdout.readline()
    for value in range(300):
        with folder(tmp_path / "run", overwrite=True) as made:
            (made / "a").write_text(str(value))
    (tmp_path / "end").touch()
    assert reader.communicate()[1] == b"" and reader.returncode == 0


def test_a_folder_that_is_not_finished_leaves_none_of_those_made_for_it(tmp_path):
    (tmp_path / "there").mkdir()
    for out in ("new/and/run", "there/run"):
        with pytest.raises(RuntimeError), folder(tmp_path / out) as made:
            (made / "a").write_text("1")
            raise RuntimeError
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*")] == [Path("there")]


@pytest.mark.skipif(outputs.fcntl is None, reason="knows no such locks")
def test_a_folder_that_is_tidied_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    flock, locked = outputs.fcntl.flock, []

    def late(descriptor, how):
        if not locked:  # another process came between
            for partial in tmp_path.glob(".run.partial-*"):
                partial.rmdir()
        locked.append(descriptor)
        flock(descriptor, how)

    monkeypatch.setattr(outputs.fcntl, "flock", late)
    with folder(tmp_path / "run") as made:
        (made / "a").write_text("1")
    assert len(locked) == 2 and list(tree(tmp_path)) == ["run", "run/a"]


def test_a_file_of_a_folder_that_cannot_be_written_is_told_by_the_name_it_was_to_have(tmp_path):
    for out, place, told in ((tmp_path / "run", "sub/a", tmp_path / "run" / "sub" / "a"), (tmp_path / "run", tmp_path / "sub" / "a", tmp_path / "sub" / "a")):
        with pytest.raises(FileNotFoundError) as found, folder(out) as made:
            (made / place).write_text("1")
        assert found.value.filename == str(told) and list(tmp_path.iterdir()) == []


def test_a_folder_is_vacant_but_for_what_killed_processes_left(tmp_path):
    assert outputs.vacant(tmp_path) and not outputs.vacant(tmp_path / "none")
    outputs.partial_of(tmp_path / "a.json").touch()
    assert outputs.vacant(tmp_path)
    for name in ("a.json", ".hidden", "b.partial-0a", ".b.partial-0A"):
        (tmp_path / name).touch()
        assert not outputs.vacant(tmp_path) and not outputs.vacant(tmp_path / name)
        (tmp_path / name).unlink()


@pytest.mark.parametrize("number, told", [(errno.ENOSPC, True), (errno.EINVAL, False)])
def test_a_disk_that_is_full_is_told_with_the_folder(number, told, tmp_path):
    with pytest.raises(OSError) as found, folder(tmp_path / "run"):
        raise OSError(number, "why")
    assert (found.value.errno, found.value.filename) == (number, str(tmp_path / "run") if told else None) and list(tmp_path.iterdir()) == []


def test_a_folder_that_somebody_made_meanwhile_stays(tmp_path):
    for overwrite, words in ((False, "exists; expected a new folder"), (True, "exists and is no folder with a; it is not replaced")):
        out = tmp_path / str(overwrite)
        with pytest.raises(ConfigError, match=words), folder(out, overwrite) as made:
            (made / "a").write_text("1")
            out.mkdir()
            (out / "theirs").write_text("2")
        assert list(tree(out)) == ["theirs"]
    assert len(list(tmp_path.iterdir())) == 2


def test_an_old_folder_comes_back_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a").write_text("old")
    rename = Path.rename

    def stopped(self, target):
        if ".partial-" in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(outputs, "_exchanged", lambda *paths: False)  # as on systems that cannot
    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(KeyboardInterrupt), folder(tmp_path / "run", overwrite=True) as made:
        (made / "a").write_text("new")
    assert (tmp_path / "run" / "a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_that_was_put_aside_when_the_process_was_killed_comes_back(overwrite, tmp_path):
    """On systems that cannot exchange two names."""
    put_aside, others = ".run.old-0123456789ab", [".run.old-1", ".run.old-b.old-0123456789ab", ".x.old-0123456789ab"]
    for name in (put_aside, *others):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("old")
    with contextlib.nullcontext() if overwrite else pytest.raises(ConfigError, match="exists; expected a new folder"), folder(tmp_path / "run", overwrite) as made:
        assert (tmp_path / "run" / "a").read_text() == "old"
        (made / "a").write_text("new")
    assert (tmp_path / "run" / "a").read_text() == ("new" if overwrite else "old") and {p.name for p in tmp_path.iterdir()} == {"run", *others}
    (tmp_path / put_aside).mkdir()
    with folder(tmp_path / "run", overwrite=True) as made:
        (made / "a").write_text("newer")
    assert (tmp_path / "run" / "a").read_text() == "newer" and {p.name for p in tmp_path.iterdir()} == {"run", *others}


def test_two_processes_do_not_work_in_one_folder(tmp_path):
    (tmp_path / "recipe.json").write_text("{}")
    code = f"from peftdebias.outputs import alone; from pathlib import Path\nwith alone(Path({str(tmp_path / 'recipe.json')!r}), '--out o'): pass"
    with alone(tmp_path / "recipe.json", "--out o"):
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert said.returncode == 1 and "--out o: another process is at work there; expected it to end first, or another folder" in said.stderr
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---------------------------------------------------------------- apart from what is read

def test_what_is_read_is_not_written(tmp_path, monkeypatch):
    read, other = tmp_path / "read.txt", tmp_path / "other.txt"
    read.write_text("a")
    (tmp_path / "link.txt").symlink_to(read)
    os.link(read, tmp_path / "hard.txt")
    for out in (read, tmp_path / "link.txt", tmp_path / "hard.txt", tmp_path / "." / "read.txt"):
        with pytest.raises(ConfigError, match=f"^--out {out}: is read, as {read}; expected another place, so that nothing is lost$"):
            keep_apart({"--out": out}, [None, read])
    with pytest.raises(ConfigError, match=f"^--out {tmp_path}: is read, as {read}"):  # the folder holds it
        keep_apart({"--out": tmp_path}, [read], folders=True)
    with pytest.raises(ConfigError, match=f"^--out {other}.gz: expected a name without .gz: what is written is not compressed$"):
        keep_apart({"--out": f"{other}.gz"}, [read])
    with pytest.raises(ConfigError, match="expected a name without .gz"):
        keep_apart({"--out": f"{other}.GZ"}, [read])
    with pytest.raises(ConfigError, match=f"^--stats {other}: is the place of --out too; expected two$"):
        keep_apart({"--stats": other, "--out": str(other)}, [read])
    with pytest.raises(ConfigError, match="is the place of --out too; expected two$"):
        keep_apart({"--stats": tmp_path / "no" / ".." / "other.txt", "--out": other}, [read])
    with pytest.raises(ConfigError, match="^--stats -: standard output is the place of --out too; expected two$"):
        keep_apart({"--out": "-", "--json": None, "--stats": "-"}, [])
    with pytest.raises(ConfigError, match="^--examples /dev/stdout: standard output is the place of --json too; expected two$"):
        keep_apart({"--json": "-", "--examples": "/dev/stdout"}, [])
    with open(read, "a") as ours:
        monkeypatch.setattr(sys, "stdout", ours)
        with pytest.raises(ConfigError, match=f"^--out: standard output is {read}, which is read; expected another place$"):
            keep_apart({"--out": "-"}, [None, tmp_path / "missing", read])
        with pytest.raises(ConfigError, match="^--out: standard output is .*hard.txt, which is read"):
            keep_apart({"--out": "/dev/stdout"}, [tmp_path / "hard.txt"])
        keep_apart({"--out": "-"}, [tmp_path / "missing", __file__])
        monkeypatch.setattr(sys, "stdout", None)
        keep_apart({"--out": "-"}, [read])
    keep_apart({"--out": f"{other}.gz"}, [read], folders=True)
    keep_apart({"--out": other, "--stats": None, "--json": "-"}, [read, "-", tmp_path / "missing"])
    other.write_text("an earlier result")
    keep_apart({"--out": other}, [read])
    keep_apart({"--out": "/dev/null", "--stats": "/dev/null"}, [read, "/dev/null"])


def test_a_digest_is_of_contents_and_of_where_they_lie(tmp_path, monkeypatch):
    found = []
    for place, content in (("a/x", "1"), ("a/x", "2"), ("b/x", "1"), ("a/x", "1")):
        folder = tmp_path / str(len(found))
        (folder / place).parent.mkdir(parents=True)
        (folder / place).write_text(content)
        found.append(outputs.digest(folder))
    assert len(set(found)) == 3 and found[0] == found[3]
    whole, listed = outputs.digest(tmp_path), outputs.files_in
    monkeypatch.setattr(outputs, "files_in", lambda folder: listed(folder)[::-1])  # a file system that lists them in another order
    assert outputs.digest(tmp_path) == whole


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_place_that_is_full_is_named(code, tmp_path):
    with pytest.raises(OSError) as caught, writing(str(tmp_path / "f.txt")):
        raise OSError(code, os.strerror(code))
    assert caught.value.filename == str(tmp_path / "f.txt") and list(tree(tmp_path)) == []
    with pytest.raises(OSError) as caught, writing(str(tmp_path / "f.txt")):
        raise OSError(code, os.strerror(code), "another.txt")  # which is the full one then
    assert caught.value.filename == "another.txt"


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    """A module, a classifier under it, and what `evaluate` says of both."""
    out = tmp_path_factory.mktemp("runs")
    done("upstream", *small.learning(), "--out", out / "gender")
    done("downstream", *small.task(adapter=out / "gender"), "--out", out / "jobs")
    for name in ("one", "two"):
        done("evaluate", out / "jobs", "--on", f"classification={small.test}", "--examples", out / f"{name}.jsonl", "--json", out / f"{name}.json")
    return out


def commands(small, runs, tmp_path):
    """Name -> (flag, argv whose output would replace an input)."""
    copy = tmp_path / "texts.txt"
    copy.write_bytes(small.corpus.read_bytes())
    run = runs / "jobs"
    return {
        "predict": ("--out", ["predict", run, copy, "--out", copy]),
        "predict on its run": ("--out", ["predict", run, copy, "--out", run / "model" / "config.json"]),
        "augment": ("--out", ["augment", "--axis", "gender", copy, "--out", copy]),
        "augment's statistics": ("--stats", ["augment", "--axis", "gender", copy, "--out", tmp_path / "new.jsonl", "--stats", copy]),
        "augment twice": ("--out", ["augment", "--axis", "gender", copy, "--out", tmp_path / "new.jsonl", "--stats", tmp_path / "new.jsonl"]),
        "evaluate": ("--json", ["evaluate", runs / "gender", "--on", f"perplexity={copy}", "--json", copy]),
        "evaluate on its module": ("--examples", ["evaluate", small.base, "--adapter", runs / "gender", "--on", f"perplexity={copy}",
                                                  "--examples", runs / "gender" / "adapter" / "adapter.safetensors"]),
        "compare": ("--json", ["compare", runs / "one.jsonl", runs / "two.jsonl", "--json", runs / "two.jsonl"]),
        "compare seeds": ("--json", ["compare", "--seeds", runs / "one.json", runs / "two.json", "--json", runs / "one.json"]),
        "report": ("--out", ["report", run, "--out", run / "config.toml"]),
        "upstream": ("--out", ["upstream", *small.learning(adapter=runs / "gender"), "--out", runs / "gender", "--overwrite"]),
        "upstream on its corpus": ("--out", ["upstream", *small.learning(corpus=[runs / "gender" / "*.toml"]), "--out", runs / "gender", "--overwrite"]),
        "downstream": ("--out", ["downstream", *small.task(adapter=runs / "gender"), "--out", runs / "gender", "--overwrite"]),
        "downstream above": ("--out", ["downstream", *small.task(model=run / "model"), "--out", run, "--overwrite"]),
        "export": ("--out", ["export", run, "--as", "merged", "--out", run, "--overwrite"]),
    }


@pytest.mark.parametrize("name", ["predict", "predict on its run", "augment", "augment's statistics", "augment twice", "evaluate", "evaluate on its module", "compare",
                                  "compare seeds", "report", "upstream", "upstream on its corpus", "downstream", "downstream above", "export"])
def test_no_command_writes_over_what_it_reads(name, small, runs, tmp_path):
    flag, argv = commands(small, runs, tmp_path)[name]
    before = tree(runs), tree(tmp_path)
    said = cli(*argv)
    assert said.code == 2 and said.err.splitlines()[-1].startswith(f"peftdebias: {flag} ") and said.err.splitlines()[-1].endswith(("so that nothing is lost", "expected two"))
    assert (tree(runs), tree(tmp_path)) == before


def test_a_shipped_axis_is_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("she is a nurse\n")
    for _ in range(2):
        done("augment", "--axis", "gender", "texts.txt", "--out", "gender")
    assert [tables(*names) for names in (("gender",), (None, None), ("gender", "shipped"), ("mine.TOML", "mine"), ("axes/mine", "names/mine"))] == [
        [], [], [], ["mine.TOML", "mine"], ["axes/mine", "names/mine"]]


def test_standard_input_counts_as_read(tmp_path):
    text = tmp_path / "texts.txt"
    text.write_text("she is a nurse\n")
    with open(text) as source:
        said = subprocess.run([sys.executable, "-m", "peftdebias", "augment", "--axis", "gender", "--out", str(text)], stdin=source, capture_output=True, text=True)
    assert said.returncode == 2 and f"--out {text}: is read, as /dev/stdin" in said.stderr and text.read_text() == "she is a nurse\n"


def test_a_report_replaces_reports_alone(runs, tmp_path):
    for name, out in (("mine.html", "mine.html"), ("metrics.json", "page.html")):
        (tmp_path / name).write_text('{"precious": 1}')
        said = cli("report", runs / "jobs", "--out", tmp_path / out)
        assert said.code == 2 and f"would replace {tmp_path / name}, which is no earlier report" in said.err and list(tree(tmp_path)) == [name]
        (tmp_path / name).unlink()


def test_results_may_lie_in_the_run_they_are_of_and_be_made_again(small, runs):
    for _ in range(2):
        done("evaluate", runs / "jobs", "--on", f"classification={small.test}", "--json", runs / "jobs" / "measures.json")
        done("predict", runs / "jobs", small.heldout, "--out", runs / "jobs" / "labels.jsonl")
        done("report", runs / "jobs", "--out", runs / "jobs" / "report.html")
        done("export", runs / "jobs", "--as", "merged", "--out", runs / "jobs" / "merged", "--overwrite")
        done("evaluate", runs / "jobs", "--on", f"classification={small.test}", "--json", runs / "jobs" / "tokenizer-test.json")


KILLED = """
import sys
from pathlib import Path
from peftdebias.outputs import writing, writing_folder
with writing(sys.argv[1]) as file, writing_folder(Path(sys.argv[2]), True, "run", lambda there: True) as folder:
    file.write("half")
    (folder / "half").write_text("half")
    print("there", flush=True)
    sys.stdin.read()
"""


def partials(folder: Path) -> list[str]:
    return sorted(path.name.rpartition("-")[0] for path in folder.rglob(".*.partial-*"))


@pytest.mark.skipif(sys.platform == "win32", reason="knows no such locks")
@pytest.mark.parametrize("by", ["who writes it anew", "who is alone above"])
def test_what_a_killed_process_left_is_removed(tmp_path, by):
    """And what another one writes still is not, whatever its number: in a container all have the same."""
    place, run = tmp_path / "runs" / "f[1].json", tmp_path / "runs" / ("x" * 240)
    place.parent.mkdir()
    (tmp_path / "recipe.json").write_text("{}")
    kept = [tmp_path / ".d.partial-x.pt2", tmp_path / ".e.old-1", tmp_path / "runs" / "f.partial-1"]
    for path in kept:
        path.write_text("x")
    writer = subprocess.Popen([sys.executable, "-c", KILLED, place, run], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    there = [".f[1].json.partial", f".{'x' * 200}.partial"]

    def anew(alive: bool = False) -> list[str]:
        if by == "who is alone above":
            with alone(tmp_path / "recipe.json", "--out x"):
                return partials(tmp_path / "runs")
        with writing(str(place)) as file:
            file.write("whole")
            if alive:  # a folder takes long to write, and one of two would be for nothing
                with pytest.raises(ConfigError, match=f"^--out {run}: another process is at work there; expected it to end first, or another folder$"), folder(run):
                    pass
                return partials(tmp_path / "runs")
            with folder(run) as made:
                (made / "a").write_text("whole")
                return partials(tmp_path / "runs")

    own = there if by == "who writes it anew" else []
    assert writer.stdout.readline() == "there\n" and partials(tmp_path / "runs") == there
    assert anew(True) == sorted(there + own[:1])
    shutil.rmtree(run, ignore_errors=True)
    writer.kill()
    writer.communicate()
    assert partials(tmp_path / "runs") == there
    assert anew() == own and partials(tmp_path / "runs") == [] and all(path.exists() for path in kept)


@pytest.mark.skipif(sys.platform == "win32", reason="knows no such locks")
@pytest.mark.parametrize("write", [lambda place: writing(str(place)), folder], ids=["file", "folder"])
def test_a_signal_before_what_is_made_is_locked_leaves_nothing(write, tmp_path, monkeypatch):
    def stopped(descriptor, operation):
        assert partials(tmp_path) == [".x.partial"]
        raise KeyboardInterrupt

    monkeypatch.setattr(outputs.fcntl, "flock", stopped)
    (tmp_path / "runs").mkdir()
    with pytest.raises(KeyboardInterrupt), write(tmp_path / "runs" / "x"):
        pass
    assert list(tree(tmp_path)) == ["runs"]


@pytest.mark.skipif(sys.platform == "win32", reason="knows no such locks")
def test_what_processes_that_are_ended_leave_is_removed_before_others_may_work_there(tmp_path, monkeypatch):
    (tmp_path / "recipe.json").write_text("{}")
    (tmp_path / "runs" / "gone").mkdir(parents=True)
    scandir = os.scandir

    def vanishing(place):
        if os.path.basename(str(place)) == "gone":  # while it is looked through, since another process tidies too
            raise FileNotFoundError(place)
        return scandir(place)

    with pytest.raises(KeyboardInterrupt), alone(tmp_path / "recipe.json", "--out x"):
        outputs.partial_of(tmp_path / "x").mkdir(parents=True)  # whose lock went with its process
        monkeypatch.setattr(os, "scandir", vanishing)
        raise KeyboardInterrupt
    monkeypatch.undo()
    assert sorted(tree(tmp_path)) == ["recipe.json", "runs", "runs/gone"]


@pytest.mark.skipif(sys.platform == "win32", reason="knows no such locks")
def test_what_was_tidied_before_its_lock_and_cannot_be_made_again_says_why(tmp_path, monkeypatch):
    partial, errors = outputs.partial_of(tmp_path / "x"), iter([None, OSError(errno.EACCES, "Permission denied")])

    def make():
        if error := next(errors):
            raise error
        partial.touch()

    monkeypatch.setattr(outputs.fcntl, "flock", lambda *lock: partial.unlink())
    with pytest.raises(outputs.NotMade, match="^Permission denied$"), outputs.held(partial, make):
        pass


def test_a_pipe_that_has_no_name_of_its_own_is_written_to():
    """What a shell hands over as >(gzip > x.gz), and /dev/stdout before a |."""
    reader, writer = os.pipe()
    with open(reader, encoding="utf-8") as end:
        with writing(f"/dev/fd/{writer}") as file:
            file.write("she\n")
        os.close(writer)
        assert end.read() == "she\n"


def test_a_link_onto_itself_is_named_as_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    outs = {"--out": tmp_path / "loop" / "x", "--json": tmp_path / "other"}
    keep_apart(outs, [])
    with pytest.raises(ConfigError, match="Too many levels of symbolic links"), writing(str(outs["--out"])) as file:
        file.write("x")
    with pytest.raises(ConfigError, match="loop: is the place of --json too"):
        keep_apart({"--out": tmp_path / "loop", "--json": tmp_path / "loop"}, [])


def test_the_standard_output_by_its_name_is_written_behind_what_is_there(tmp_path):
    (tmp_path / "a.txt").write_text("he is a king\n")
    (tmp_path / "log").write_text("kept\n")
    (tmp_path / "link").symlink_to("/dev/stdout")
    for out in ("/dev/stdout", "link"):
        with open(tmp_path / "log", "a") as log:
            subprocess.run([sys.executable, "-m", "peftdebias", "augment", "--axis", "gender", "a.txt", "--out", out], cwd=tmp_path, stdout=log, stderr=subprocess.PIPE, check=True)
    assert [line[:9] for line in (tmp_path / "log").read_text().splitlines()] == ["kept", '{"text": ', '{"text": ']
    with open(tmp_path / "gone", "w+") as gone:
        (tmp_path / "gone").unlink()
        subprocess.run([sys.executable, "-m", "peftdebias", "augment", "--axis", "gender", "a.txt", "--out", "/dev/stdout"], cwd=tmp_path, stdout=gone, stderr=subprocess.PIPE, check=True)
        gone.seek(0)
        assert gone.read().startswith('{"text": ') and sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "link", "log"]


def test_a_folder_that_cannot_be_claimed_is_taken_back_with_those_above_it(tmp_path):
    (tmp_path / "mine").mkdir()
    for failure, told in ((OSError(28, "No space left on device"), f"^--out {tmp_path}/mine/a/b: cannot be written: No space left on device$"), (ConfigError("x"), "^x$")):
        with pytest.raises(ConfigError, match=told), outputs.claiming(tmp_path / "mine" / "a" / "b"):
            assert (tmp_path / "mine" / "a" / "b").is_dir()
            raise failure
        assert (tmp_path / "mine").is_dir() and not list((tmp_path / "mine").iterdir())
