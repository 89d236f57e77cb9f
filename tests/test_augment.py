"""`peftdebias augment`: files in, rows out, as the plain twin makes them; shards, statistics, corrupt lines, and what it refuses."""

import gzip
import json
import sys

import pytest

from peftdebias import augment, cda, native
from peftdebias.axes import load_axis
from peftdebias.cda import Intervention

from .small import cli, done, tree

def rows_by_hand(texts, axis="gender"):
    return [json.loads(json.dumps(row)) for family in cda.families(texts, load_axis(axis)) for row in cda.rows(family)]


def test_augment_writes_one_variant_a_row(small, tmp_path, monkeypatch):
    texts = small.corpus.read_text().splitlines()
    expected = rows_by_hand(texts)
    said = done("augment", "--axis", "gender", small.corpus)
    assert said.rows == expected and all(list(r) == ["text", "counterfactual", "swaps", "source"] for r in said.rows)
    for row in said.rows:
        text, moved = row["text"], 0
        for swap in row["swaps"]:
            assert list(swap) == ["start", "end", "from", "to"] and row["text"][swap["start"]:swap["end"]] == swap["from"]
            text = text[:swap["start"] + moved] + swap["to"] + text[swap["end"] + moved:]
            moved += len(swap["to"]) - len(swap["from"])
        assert text == row["counterfactual"] and texts[row["source"]] == row["text"]
    swaps = sum(len(row["swaps"]) for row in expected)
    told = said.err.splitlines()[1:]
    assert told[0] == f"{len(texts)} texts, {len(expected)} (100.0 %) with words of the axis gender; {len(expected)} counterfactuals, {swaps} swaps"
    assert told[-1] == "result: standard output"
    with open(small.corpus) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert done("augment", "--axis", "gender").out == said.out
    done("augment", small.corpus, "--axis", "gender", "--out", tmp_path / "o.jsonl")
    assert (tmp_path / "o.jsonl").read_text(encoding="utf-8") == said.out


def test_augment_keeps_untouched_texts_where_the_axis_says_so_and_reads_columns(tmp_path):
    (tmp_path / "a.csv").write_text("id,body\n1,nothing here\n2,“a black coat”\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"body": "white"}\n')
    said = done("augment", "--axis", "race", tmp_path / "a.csv", tmp_path / "b.jsonl", "--column", "body")
    assert said.rows == rows_by_hand(["nothing here", "“a black coat”", "white"], "race") and said.rows[0] == {"text": "nothing here", "counterfactual": None, "swaps": [], "source": 0}
    assert "“a black coat”" in said.out  # as written, not as \u escapes
    assert said.err.splitlines()[1].startswith("3 texts, 2 (66.7 %) with words of the axis race; ")


TEXTS = ["He met her.", "nothing", "a \"king\" \\ and his wife", "", "she’s é his", "x is black", "the queen", "nobody at all", "men and boys"]


@pytest.fixture
def files(tmp_path):
    """The same texts in every format that is read."""
    full = [text for text in TEXTS if text]
    (tmp_path / "a.txt").write_bytes("\r\n".join(TEXTS).encode())
    (tmp_path / "b.csv").write_text("text\n" + "".join('"' + text.replace('"', '""') + '"\n' for text in full), encoding="utf-8")
    (tmp_path / "c.tsv").write_text("text\tn\n" + "".join(f"{text}\t1\n" for text in full), encoding="utf-8")
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in full))
    for path in list(tmp_path.iterdir()):
        (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    return tmp_path


def test_every_format_gives_the_same(files):
    expected = rows_by_hand([text for text in TEXTS if text])
    assert len(expected) == 5
    for path in sorted(files.iterdir()):
        assert done("augment", "--axis", "gender", path).rows == expected, path
    together = done("augment", "--axis", "gender", files / "*.txt", files / "d.jsonl").rows
    assert [row["source"] for row in together] == [row["source"] + shift for shift in (0, 8) for row in expected]


@pytest.mark.parametrize("shards", [1, 2, 3, 20])
def test_shards_end_to_end_are_the_whole(files, shards):
    corpus = [files / "a.txt", files / "b.csv.gz", files / "c.tsv"]
    for flags in (["--axis", "gender"], ["--axis", "group"], ["--axis", "gender", "--format", "lines", "--unit", "sentence"]):
        whole = done("augment", *flags, *corpus).out
        assert "".join(done("augment", *flags, *corpus, "--shard", f"{i}/{shards}").out for i in range(1, shards + 1)) == whole != ""


def test_a_shard_counts_its_own_texts(files, tmp_path):
    found = []
    for part in (1, 2, 3):
        said = done("augment", "--axis", "gender", files / "a.txt", files / "c.tsv", "--shard", f"{part}/3", "--stats", tmp_path / "s.json", "--out", tmp_path / "o.jsonl")
        found.append(json.loads((tmp_path / "s.json").read_text()))
        assert f"{found[-1]['texts']} texts, {found[-1]['touched']} (" in said.err
    done("augment", "--axis", "gender", files / "a.txt", files / "c.tsv", "--stats", tmp_path / "s.json", "--out", tmp_path / "o.jsonl")
    whole = json.loads((tmp_path / "s.json").read_text())
    assert [sum(one[key] for one in found) for key in ("texts", "touched", "variants", "swaps")] == [whole[key] for key in ("texts", "touched", "variants", "swaps")]
    assert all(one["touched_share"] == one["touched"] / one["texts"] for one in found) and max(one["texts"] for one in found) <= whole["texts"] // 3 + 1
    said = done("augment", "--axis", "gender", files / "a.txt", "--shard", "1/99", "--stats", tmp_path / "s.json", "--out", tmp_path / "o.jsonl")
    none = json.loads((tmp_path / "s.json").read_text())  # more shards than texts: some are empty, and no error
    assert "0 texts, 0 (0.0 %) with words of the axis gender; 0 counterfactuals, 0 swaps" in said.err and (none["texts"], none["touched_share"]) == (0, 0.0)


def test_interventions(tmp_path):
    (tmp_path / "a.txt").write_text("James told his wife that she is black.\nnobody\n")
    text = ["James told his wife that she is black."]

    def changed(*flags, axis="gender"):
        return [row["counterfactual"] for row in done("augment", "--axis", axis, tmp_path / "a.txt", *flags).rows]

    assert changed() == ["James told her husband that he is black."]
    assert changed("--from", "female") == changed("--from", "2") == ["James told his husband that he is black."]
    said = done("augment", "--axis", "gender", tmp_path / "a.txt", "--from", "1", "--keep", "originals").err
    assert "2 texts, 1 (50.0 %) with words of the axis gender in the column male; " in said
    assert changed("--occurrences", "one") == [f"James told {a} {b} that {c} is black." for a, b, c in (("her", "wife", "she"), ("his", "husband", "she"), ("his", "wife", "he"))]
    assert changed("--names") == ["Mary told her husband that he is black."]
    assert changed("--keep", "originals") == [None]
    every = [variant.text for variant in cda.counterfactuals(text[0], load_axis("race"))]
    some = [variant.text for variant in cda.counterfactuals(text[0], load_axis("race"), Intervention(max_variants=1))]
    assert changed(axis="race") == [*every, None] and changed("--max-variants", 1, axis="race") == [*some, None] and 1 == len(some) < len(every)
    (tmp_path / "mine.toml").write_text('columns = ["male", "female"]\ngroups = [["james", "zoë"]]\n', encoding="utf-8")
    assert changed("--names", tmp_path / "mine.toml") == ["Zoë told her husband that he is black."]


def test_lines_are_texts_for_other_tools(files):
    out = done("augment", "--axis", "gender", "--format", "lines", files / "a.txt").out.splitlines()
    assert out[:4] == ["He met her.", "She met him.", "a \"king\" \\ and his wife", "a \"queen\" \\ and her husband"] and len(out) == 10
    assert done("augment", "--axis", "gender", "--format", "lines", "--keep", "counterfactuals", files / "a.txt").out.splitlines() == out[1::2]
    for text in ("he\nshe", "he\r"):
        (files / "two.jsonl").write_text(json.dumps({"text": text}) + "\n")
        said = cli("augment", "--axis", "gender", "--format", "lines", files / "two.jsonl", "--out", files / "o.txt")
        assert said.code == 2 and "two.jsonl:1: expected a text without line breaks for --format lines" in said.err and not (files / "o.txt").exists()
    for data, line in ((b"he\r\nhe is\r\r\n", 2), (b"\xef\xbb\xbfhe\r\r", 1), (b"\r\r\n \r\r\n\xff\r\r\nshe\r\r\r\n", 4)):
        (files / "two.txt").write_bytes(data)
        said = cli("augment", "--axis", "gender", "--format", "lines", "--on-error", "skip", files / "two.txt", "--out", files / "o.txt")
        assert said.code == 2 and f"two.txt:{line}: expected a text without line breaks for --format lines" in said.err and not (files / "o.txt").exists()
    (files / "two.txt").write_bytes(b"\xef\xbb\xbf \r\r\nhe\rshe\r\n\xffhe\r\r\n\r\r")  # of these only one is a text
    assert done("augment", "--axis", "gender", "--format", "lines", "--on-error", "skip", files / "two.txt").out == "he\rshe\nshe\rhe\n"
    (files / "two.jsonl").write_text(json.dumps({"text": "he\rshe"}) + "\n")  # which no reader parts
    assert done("augment", "--axis", "gender", "--format", "lines", files / "two.jsonl").out == "he\rshe\nshe\rhe\n"


def test_statistics(files):
    done("augment", "--axis", "gender", files / "a.txt", "--out", files / "o.jsonl", "--stats", files / "s.json", "--threads", 3)
    found = json.loads((files / "s.json").read_text())
    assert {name: found[name] for name in ("axis", "texts", "touched", "variants", "swaps", "skipped", "groups")} == {
        "axis": "gender", "texts": 8, "touched": 5, "variants": 5, "swaps": 10, "skipped": 0, "groups": {"male": 6, "female": 4}}
    assert found["touched_share"] == 5 / 8 and found["words"]["his"] == 2 and sum(found["words"].values()) == 10
    assert found["bytes"] == (files / "a.txt").stat().st_size and found["engine"] in ("native", "python")


def test_the_engine_has_the_threads_that_are_asked_for(files, monkeypatch):
    asked, made = [], augment.engine
    monkeypatch.setattr(augment, "engine", lambda *arguments: asked.append(arguments[2]) or made(*arguments))
    for flags in ((), ("--threads", 3)):
        done("augment", "--axis", "gender", files / "a.txt", *flags)
    assert asked == [1, 3]


@pytest.mark.parametrize("name, content", [("a.txt", "h\u00e9 is a king\n"), ("a.csv", "text\nh\u00e9 is a king\n")])
def test_bytes_are_bytes(name, content, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8")
    done("augment", "--axis", "gender", tmp_path / name, "--out", tmp_path / "o.jsonl", "--stats", tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text())["bytes"] == len(content.removeprefix("text\n").encode()) - (name == "a.csv")  # of a table its texts, no line ends


def test_what_is_found_is_told_by_column(tmp_path):
    """A word that is like another counts to that one's column; columns without names have numbers from 1."""
    (tmp_path / "a.txt").write_text("Ms. Jones met a king.\nThe queen and a Jewish woman\n")

    def stats(*flags):
        said = done("augment", *flags, tmp_path / "a.txt", "--stats", tmp_path / "s.json", "--out", tmp_path / "o.jsonl").err
        return json.loads((tmp_path / "s.json").read_text())["groups"], said

    assert stats("--axis", "gender")[0] == {"male": 1, "female": 3}
    found, said = stats("--axis", "group", "--from", "1")
    assert found == {"1": 1, "2": 0, "3": 0} and "2 texts, 1 (50.0 %) with words of the axis group in the column 1; " in said and "words of the axis group: jewish 1\n" in said
    told = json.loads((tmp_path / "s.json").read_text())
    assert (told["touched"], told["touched_share"], told["variants"]) == (1, 0.5, 2)  # a share of texts, whatever each becomes


def test_the_ten_words_that_were_found_most_are_named(tmp_path):
    words = [row[0] for row in load_axis("group").groups[:12]]
    (tmp_path / "a.txt").write_text(" ".join(words + words[-1:]) + "\n")
    said = done("augment", "--axis", "group", tmp_path / "a.txt").err
    assert f"words of the axis group: {words[-1]} 2, " + ", ".join(f"{word} 1" for word in words[:9]) + "\n" in said


def test_a_text_without_words_of_the_axis_is_an_error_that_counts(tmp_path):
    (tmp_path / "a.txt").write_text("rain\nsnow\n")
    for files, many in ((["a.txt"], 2), (["a.txt", "a.txt"], 4)):
        said = cli("augment", "--axis", "gender", *(tmp_path / name for name in files), "--out", tmp_path / "o.jsonl")
        assert said.code == 2 and list(tree(tmp_path)) == ["a.txt"]
        assert said.err.splitlines()[-1] == f"peftdebias: {', '.join(f'{tmp_path}/{name}' for name in files)}: expected words of the axis gender, found none in {many} texts"


def test_a_column_of_lines_is_refused(files):
    said = cli("augment", "--axis", "gender", files / "a.txt", "--column", "body")
    assert said.code == 2 and f"--column body: expected a csv, tsv or jsonl file to take it from, got txt alone ({files}/a.txt)" in said.err


def test_a_table_of_words_is_not_written_over(files):
    mine = files / "mine.toml"
    mine.write_text('keep_untouched = true\ncolumns = ["male", "female"]\ngroups = [["king", "queen"]]\n')
    (files / "names.toml").write_text('columns = ["male", "female"]\ngroups = [["james", "zoe"]]\n')
    before = tree(files)
    for out, flag in ((mine, "--out"), (files / "names.toml", "--stats")):
        said = cli("augment", "--axis", mine, "--names", files / "names.toml", files / "a.txt", flag, out)
        assert said.code == 2 and f"{flag} {out}: is read, as {out}" in said.err and tree(files) == before


def test_a_corrupt_line_is_named_wherever_its_block_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(augment, "BLOCK", 8)
    (tmp_path / "a.txt").write_bytes(b"he\nshe\n\nhis\nher\n\xff\nhe\n")
    said = cli("augment", "--axis", "gender", tmp_path / "a.txt")
    assert said.code == 2 and "a.txt:6: expected utf-8, got 0xff at byte 1 of the line" in said.err
    (tmp_path / "b.txt").write_bytes("he is\n\ufeffshe is\n".encode())
    assert [row["text"] for row in done("augment", "--axis", "gender", tmp_path / "b.txt").rows] == ["he is", "\ufeffshe is"]


def test_corrupt_lines_stop_or_are_counted_and_named(tmp_path):
    bad = b"he\n" + b"she \xff\n" * 7 + b"his\n\n\xe9"
    (tmp_path / "a.txt").write_bytes(bad)
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "he"}\n{"text": 3}\nnot\n{"text": "her"}\n')
    said = cli("augment", "--axis", "gender", tmp_path / "a.txt", "--out", tmp_path / "o.jsonl")
    assert said.code == 2 and said.err.splitlines()[-1].endswith("a.txt:2: expected utf-8, got 0xff at byte 5 of the line") and not (tmp_path / "o.jsonl").exists()
    said = done("augment", "--axis", "gender", tmp_path / "a.txt", tmp_path / "b.jsonl", "--on-error", "skip")
    assert [row["text"] for row in said.rows] == ["he", "his", "he", "her"] and [row["source"] for row in said.rows] == [0, 1, 2, 3]
    told = said.err.splitlines()[1:7]
    assert told[0] == "corpus: 10 corrupt lines or records were left out; the first 5:"
    assert [line.split("a.txt:")[1].split(":")[0] for line in told[1:]] == ["2", "3", "4", "5", "6"]
    (tmp_path / "c.txt").write_bytes(b"\xff\n\xfe\n")
    said = cli("augment", "--axis", "gender", tmp_path / "c.txt", "--on-error", "skip", "--out", tmp_path / "o.jsonl")
    assert said.code == 2 and "no text in" in said.err and f"but 2 corrupt lines or records, such as {tmp_path}/c.txt:2: " in said.err and not (tmp_path / "o.jsonl").exists()
    said = cli("augment", "--axis", "gender", tmp_path / "a.txt", tmp_path / "c.txt", "--on-error", "skip")
    assert said.code == 2 and f"no text in {tmp_path}/c.txt but 2 corrupt lines or records, such as {tmp_path}/c.txt:2: " in said.err


def test_the_twin_writes_the_same(files, monkeypatch):
    flags = ("augment", "--axis", "gender", "--names", "--on-error", "skip", *sorted(files.iterdir()))
    compiled = done(*flags)
    assert "(native engine)" in compiled.err or native.library() is None
    monkeypatch.setenv("PEFTDEBIAS_KERNELS", "torch")
    plain = done(*flags)
    assert plain.out == compiled.out and "(python engine)" in plain.err


@pytest.mark.parametrize("flags, why", [
    (["--shard", "0/2"], "--shard: expected I/N with I from 1 to N, got '0/2'"), (["--shard", "3/2"], "got '3/2'"), (["--shard", "1"], "got '1'"),
    (["--shard", "1/2", "-"], "--shard: expected files, which are read twice, got <stdin>"),
    (["--from", "neuter"], "axis 'gender': unknown column 'neuter': expected one of male, female, or a number from 1 to 2"),
    (["--max-variants", "0"], "--max-variants: expected at least 1, got 0"), (["--threads", "0"], "--threads: expected at least 1, got 0"),
    (["--names", "nowhere.toml"], "names file nowhere.toml: no such file"), (["no-*.txt"], "no-*.txt: expected files that fit this pattern, found none"),
    (["--unit", "document", "b.csv"], "b.csv: --unit document: expected txt files"), (["--names", "."], "names file .: expected a file, got a folder"),
    (["--names", ""], "names: expected FILE, got an empty text"),
    (["-", "-"], "FILE: expected standard input, -, once, since it is read once; got it 2 times"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_refusals(files, monkeypatch, flags, why):
    monkeypatch.chdir(files)
    monkeypatch.setattr(sys, "stdin", open(files / "a.txt"))
    before = tree(files)
    said = cli("augment", "--axis", "gender", *flags, *([] if flags[-1] in ("-", "no-*.txt", "b.csv") else ["a.txt"]), "--out", "o.jsonl")
    assert said.code == 2 and why in said.err.splitlines()[-1] and tree(files) == before


def test_counterfactuals_and_their_statistics_are_not_both_written_to_standard_output(files):
    said = cli("augment", "--axis", "gender", files / "a.txt", "--stats", "-")
    assert said.code == 2 and not said.out and said.err.endswith("peftdebias: --stats -: standard output is the place of --out too; expected two\n")


@pytest.mark.parametrize("unit", ["line", "sentence"])
def test_a_byte_order_mark_is_no_part_of_the_first_text(unit, tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffHe sings.\nShe sang.\n".encode())
    rows = done("augment", "--axis", "gender", "--unit", unit, tmp_path / "a.txt").rows
    assert [(r["text"], r["counterfactual"]) for r in rows] == [("He sings.", "She sings."), ("She sang.", "He sang.")]


@pytest.mark.parametrize("axis, column, called", [("gender", "female", "female"), ("group", "2", "2")])
def test_words_of_another_column_alone_are_told_from_none(small, tmp_path, axis, column, called):
    path = tmp_path / "c.txt"
    path.write_text({"gender": "he is a nurse\nhis dog\n", "group": "a black coat\n"}[axis])
    for command in (["augment"], ["upstream", "--model", small.base, "--out", tmp_path / "run", "--corpus"]):
        said = cli(*command, path, "--axis", axis, "--from", column)
        assert said.code == 2 and f"{path}: expected words of the axis {axis} in the column {called}, found none in " in said.err.splitlines()[-1]
