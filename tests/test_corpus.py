"""Readers: every format and its gzip, the public files with their published row counts, and the words of each error."""

import csv
import gzip
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from peftdebias import lines, records
from peftdebias.corpus import Example, Text, check_column, chunks, read_examples, read_texts
from peftdebias.errors import ConfigError, DataError
from peftdebias.lines import Copies, Skipped


def write(folder, name, content):
    path = folder / name
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


@pytest.fixture
def file(tmp_path):
    return lambda name, content: write(tmp_path, name, content)


def message(call):
    """The error's message; it must be one line. Generators are run to their end."""
    with pytest.raises(DataError) as caught:
        list(call())
    words = str(caught.value)
    assert "\n" not in words
    return words


# Texts


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize(
    "name, content",
    [
        ("a.txt", "one two\n\nthree\n"),
        ("a.csv", 'id,text\n1,one two\n\n2,""\n3,"three"\n'),
        ("a.tsv", 'id\ttext\n1\tone two\n\n2\t\n3\t"three"\n'),
        ("a.jsonl", '{"text": "one two", "id": 1}\n\n{"text": ""}\n{"text": "three"}\n'),
        ("A.TXT", "one two\n  \nthree"),
    ],
)
def test_every_format_gives_the_same_texts(file, name, content, end):
    path = file(name + end, content)
    assert [text.text for text in read_texts([path])] == ["one two", "three"]


def test_a_packed_file_may_be_called_so_in_capitals(tmp_path):
    (tmp_path / "A.TXT.GZ").write_bytes(gzip.compress(b"one\ntwo\n"))
    assert [text.text for text in read_texts([tmp_path / "A.TXT.GZ"])] == ["one", "two"]


def test_a_column_is_taken_from_the_files_that_have_one(file):
    paths = [str(file("a.txt", "one\n")), str(file("b.csv", "body\ntwo\n"))]
    check_column(paths, "body")
    assert [text.text for text in read_texts(paths, "body")] == ["one", "two"]
    with pytest.raises(ConfigError, match="--column body: expected a csv, tsv or jsonl file to take it from, got txt alone"):
        check_column(paths[:1], "body")


def test_standard_input_is_read_as_it_comes(monkeypatch):
    end, begin = os.pipe()
    with open(end) as stdin, open(begin, "wb", buffering=0) as typed:
        monkeypatch.setattr(sys, "stdin", stdin)
        typed.write(b"one\n")
        gone = threading.Timer(20, typed.close)
        gone.start()
        assert next(read_texts(["-"])).text == "one" and not typed.closed
        gone.cancel()


def test_lines_end_at_newlines_only_and_keep_their_spaces(file):
    path = file("a.txt", "\ufeff one \r\ntwo\u2028still two\x0btwo\nthree\rthree\n".encode())
    assert list(read_texts([path])) == [
        Text(" one ", f"{path}:1"),
        Text("two\u2028still two\x0btwo", f"{path}:2"),
        Text("three\rthree", f"{path}:3"),
    ]
    path = file("b.txt", "\ufeffone\r\n\n\ufefftwo\r\r\n".encode())  # a BOM in the middle is text, and one \r alone is the end's
    for unit in ("line", "document"):
        assert [text.text for text in read_texts([path], unit=unit)] == ["one", "\ufefftwo\r"]


def test_what_can_be_read_once_is_copied_and_no_copy_stays(file, monkeypatch):
    (end, begin), plain = os.pipe(), str(file("a.txt", "one\n"))
    os.write(begin, b"two\n")
    os.close(begin)
    with open(end) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(DataError, match="^<stdin>:1: bad$"), Copies() as copies:
            kept, copy = copies.seekable([plain, "-"])
            assert kept == plain and Path(copy).read_text() == "two\n"
            raise DataError(f"{copy}:1: bad")
    assert not Path(copy).parent.exists()


def test_standard_input_that_is_closed_and_a_temporary_folder_that_is_full_are_told(file, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    for read in (lambda: list(read_texts(["-"])), lambda: Copies().__enter__().seekable(["-"])):
        with pytest.raises(DataError, match="^<stdin>: expected texts, got none: it is closed$"):
            read()
    os.mkfifo(tmp_path / "pipe.txt")
    code = """
import resource, signal, sys, threading
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
from peftdebias.lines import Copies
threading.Thread(target=lambda: open(sys.argv[1], "wb", buffering=0).write(2000 * b"x")).start()
with Copies() as copies:
    copies.seekable(sys.argv[1:])
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "pipe.txt"], env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == f"peftdebias.errors.DataError: temporary folder {tmp_path}: cannot be written: File too large; TMPDIR names another", done.stderr


def test_texts_stream_over_several_files_and_name_their_places(file):
    first, second = file("a.txt", "\na\n"), file("b.csv", 'body,text\n"x\ny",b\nz,c\n')
    assert list(read_texts([first, second])) == [
        Text("a", f"{first}:2"),
        Text("b", f"{second}:2"),  # the record starts at line 2 and ends at line 3
        Text("c", f"{second}:4"),
    ]
    bad = file("c.txt", b"good\n\xff\n")
    texts = read_texts([bad])
    assert next(texts).text == "good"  # nothing beyond the line was read
    with pytest.raises(DataError, match="c.txt:2"):
        next(texts)


def test_a_missing_file_is_known_before_anything_is_read(file, tmp_path):
    good = file("a.txt", "a\n")
    with pytest.raises(DataError, match="no such file"):
        read_texts([good, tmp_path / "b.txt"])  # at the call, not at the first text


# Examples


def test_examples_of_csv_with_quotes_and_line_breaks(file):
    path = file("a.csv", 'text,job,sex\n"She said ""no"", twice.\r\nThen left.",nurse, f \nHe.,pilot,m\n')
    assert read_examples(path, text="text", label="job", group="sex") == [
        Example('She said "no", twice.\nThen left.', None, "nurse", "f", f"{path}:2"),
        Example("He.", None, "pilot", "m", f"{path}:4"),
    ]


def test_tsv_undoes_whole_quoted_fields_and_leaves_stray_quotes(file):
    rows = ['"He said ""hi"""', 'He said "hi"', '"open', 'end"', '""""', '"a" and "b"', '"', "plain"]
    path = file("a.tsv", "text\tlabel\n" + "".join(f"{row}\t1\n" for row in rows))
    texts = [example.text for example in read_examples(path, text="text", label="label")]
    assert texts == ['He said "hi"', 'He said "hi"', '"open', 'end"', '"', '"a" and "b"', '"', "plain"]


@pytest.mark.parametrize("name, tab", [("a.tsv", "\t"), ("a.csv", ","), ("a.txt", "\t")])
def test_columns_by_number_mean_no_header(file, name, tab):
    path = file(name, tab.join("0 premise hypothesis\n".split(" ")) + tab.join("2 p h\n".split(" ")))
    examples = read_examples(path, text="1", text_pair="2", label="0")
    assert [(e.text, e.text_pair, e.label) for e in examples] == [("premise", "hypothesis", "0"), ("p", "h", "2")]


def test_columns_by_number_that_the_header_has_are_names(file):
    path = file("a.tsv", "1\t0\nx\ty\n")
    assert [(e.text, e.label) for e in read_examples(path, text="0", label="1")] == [("y", "x")]


def test_labels_of_json_are_strings(file):
    values = ["a", 3, 2.0, 0.5, True, False, " b "]
    path = file("a.jsonl", "".join(json.dumps({"t": "x", "l": value}) + "\n" for value in values))
    assert [e.label for e in read_examples(path, text="t", label="l")] == ["a", "3", "2", "0.5", "true", "false", "b"]


def test_a_label_in_several_columns_is_any_of_them(file):
    path = file("a.tsv", "text\thd\tcv\na\t0\t0\nb\t1\t0\nc\t0\tTrue\nd\t1\t1.0\n")
    assert [e.label for e in read_examples(path, text="text", label=["hd", "cv"])] == ["0", "1", "1", "1"]
    assert [e.label for e in read_examples(path, text="text", label=["hd"])] == ["0", "1", "0", "1"]
    assert [e.label for e in read_examples(path, text="text")] == [None] * 4


def test_spaces_around_a_column_s_name_and_in_a_blank_line_mean_nothing(file):
    for name, content in (("a.csv", " text ,l\none,1\n  \ntwo,2\n"), ("a.tsv", " text \tl\none\t1\n  \ntwo\t2\n")):
        assert [(e.text, e.label) for e in read_examples(file(name, content), text="text", label="l")] == [("one", "1"), ("two", "2")]


@pytest.mark.parametrize("name, content", [("a.tsv", "text\tl\na\t1\n\t\nb\t2\n"), ("a.csv", "text,l\na,1\n,\nb,2\n"), ("b.csv", 'text\na\n""\n\nb\n'), ("b.tsv", 'text\na\n""\n\nb\n')])
def test_a_row_with_an_empty_text_is_a_row(file, name, content):
    assert [e.text for e in read_examples(file(name, content), text="text")] == ["a", "", "b"]
    path = file(f"numbers-{name}", content.partition("\n")[2].replace("a", '""', 1).replace("1", "", 1))  # without a header, and the first one is such a row
    assert [e.text for e in read_examples(path, text="0")] == ["", "", "b"]


def test_huge_fields_are_read(file):
    long = "x" * 300_000
    assert read_examples(file("a.csv", f'text,l\n"{long}",1\n'), text="text", label="l")[0].text == long


# Errors: what, where, expected and got


def test_errors_of_files(tmp_path, file):
    assert message(lambda: read_texts([tmp_path / "no.txt"])) == f"{tmp_path / 'no.txt'}: no such file"
    assert message(lambda: read_texts([tmp_path])) == f"{tmp_path}: expected a file, got a folder"
    other = file("bios.xlsx", "x")
    assert message(lambda: read_texts([other])) == f"{other}: expected a file named .txt, .csv, .tsv, .jsonl, or one of these with .gz, got '.xlsx'"
    for name in ("BIOS.pkl", "bios.pickle.gz"):
        pickle = file(name, "x")
        assert message(lambda: read_texts([pickle])).startswith(f"{pickle}: expected csv, tsv or jsonl, got a pickle, which can run any program when it is read; export it once ")
    os.mkfifo(tmp_path / "pipe")  # `<(...)` of a shell: what it holds is not read to find out
    assert message(lambda: read_texts([tmp_path / "pipe"])).endswith("got ''; of standard input lines of text are read, by augment and upstream as -, by predict without FILE")
    for name, content in [("a.txt", ""), ("b.txt", "\n \n"), ("a.csv", "text\n"), ("a.jsonl", ""), ("a.tsv", "text\tl\n")]:
        path = file(name, content)
        assert message(lambda: read_texts([path])) == f"no text in {path}"
    path = file("c.tsv", "text\tl\n\t1\n")
    assert message(lambda: read_examples(path, text="text", label="l")) == f"no text in {path}"


def test_errors_of_encoding(file):
    path = file("a.txt", b"ok\ncaf\xe9\n")
    assert message(lambda: read_texts([path])) == f"{path}:2: expected utf-8, got 0xe9 at byte 4 of the line"
    for name in ("b.txt", "b.jsonl"):  # a byte order mark is no byte of the line
        path = file(name, b"\xef\xbb\xbfcaf\xe9\n")
        assert message(lambda: read_texts([path])) == f"{path}:1: expected utf-8, got 0xe9 at byte 4 of the line"
    for kind, content in (("utf-16", "text\nok\n".encode("utf-16")), ("utf-16", "\ufeffok".encode("utf-16-be")), ("gzip", gzip.compress(b"he is"))):
        path = file("a.csv", content)
        assert message(lambda: read_texts([path])).startswith(f"{path}:1: expected utf-8, got {kind} (")
    path = file("c.txt", b"ok\n\xff\xfe\n")  # such bytes tell of a file where it begins with them
    assert message(lambda: read_texts([path])) == f"{path}:2: expected utf-8, got 0xff at byte 1 of the line"
    path = file("a.jsonl", '{"text": "a\\ud800"}\n')
    assert message(lambda: read_texts([path])) == f"{path}:1: column 'text' holds half a surrogate pair at character 1"


def test_errors_of_gzip(tmp_path, file):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(b"no gzip")
    assert message(lambda: read_texts([path])).startswith(f"{path}:1: cannot be read: Not a gzipped file")
    path.write_bytes(gzip.compress(b"line\n" * 1000)[:-9])
    assert "cannot be read to its end: Compressed file ended" in message(lambda: read_texts([path]))


@pytest.mark.parametrize("name, content", [("a.csv", "id,body\n1,x\n"), ("a.tsv", "id\tbody\n1\tx\n"), ("a.jsonl", '{"id": 1, "body": "x"}')])
def test_errors_of_columns_list_the_columns(file, name, content):
    path = file(name, content)
    assert message(lambda: read_texts([path])) == f"{path}:1: no column 'text'; columns: id, body"
    assert message(lambda: read_examples(path, text="body", label="hate")) == f"{path}:1: no column 'hate'; columns: id, body"


def test_a_table_parted_by_another_mark_is_told(file):
    for name, content, mark in [("a.csv", "text;label\n", ";"), ("a.csv", "label\ttext\n", "\t"), ("a.tsv", "label,text\n", ","), ("b.tsv", '"text" | label\n', "|")]:
        path = file(name, content + "x\n")
        assert message(lambda: read_texts([path])).endswith(f" (one, parted by {mark!r}: expected commas in a csv, tabs in a tsv)"), name
    for header, columns in (("body;label", "body;label"), ("text;label,body", "text;label, body")):
        path = file("c.csv", f"{header}\nx\n")
        assert message(lambda: read_texts([path])) == f"{path}:1: no column 'text'; columns: {columns}"


def test_errors_of_column_numbers_and_double_columns(file):
    path = file("a.tsv", "a\tb\n")
    for column in (2, 5):
        assert message(lambda: read_examples(path, text=str(column))) == f"{path}:1: no column {column}; a line has 2 fields, the first is number 0"
    path = file("b.tsv", "a\tb\ta\n1\t2\t3\n")
    assert message(lambda: read_examples(path, text="a")) == f"{path}:1: expected one column 'a', got 2"


@pytest.mark.parametrize("name, tab", [("a.csv", ","), ("a.tsv", "\t")])
def test_errors_of_rows(file, name, tab):
    path = file(name, tab.join("ab") + "\n\n" + tab.join("xy") + "\n" + tab.join("xyz") + "\n")
    assert message(lambda: read_examples(path, text="a")) == f"{path}:4: expected 2 fields, got 3"
    path = file(name, tab.join("ab") + "\nx\n")
    assert message(lambda: read_examples(path, text="a")) == f"{path}:2: expected 2 fields, got 1"


def test_errors_of_csv_name_the_line_where_the_record_starts(file):
    path = file("a.csv", 'a,b\nx,y\nx,"open\nand\non\n')
    assert message(lambda: read_examples(path, text="a")) == f"{path}:3: not csv: unexpected end of data (lines 3 to 5: a quote opens there)"
    path = file("b.csv", 'a,b\nx,"open\nand\non",y,z\n')
    assert message(lambda: read_examples(path, text="a")) == f"{path}:2: expected 2 fields, got 4 (lines 2 to 4: a quote opens there)"


def test_errors_of_json(file):
    path = file("a.jsonl", '{"text": "x"}\n{"text": \n')
    assert message(lambda: read_texts([path])).startswith(f"{path}:2: not JSON: Expecting value: line 1 column")
    path = file("b.jsonl", '["text"]\n')
    assert message(lambda: read_texts([path])) == f"{path}:1: expected a JSON object, got a list"
    path = file("c.jsonl", '{"text": 5}\n')
    assert message(lambda: read_texts([path])) == f"{path}:1: expected a text in column 'text', got a number"


def test_errors_of_labels(file):
    path = file("a.csv", "text,l,m\na,1,1\nb, ,1\n")
    assert message(lambda: read_examples(path, text="text", label="l")) == f"{path}:3: empty label in column 'l'"
    assert message(lambda: read_examples(path, text="text", group="l")) == f"{path}:3: empty group in column 'l'"
    for value in ("null", "NaN"):
        path = file("a.jsonl", '{"text": "a", "l": %s}' % value)
        assert message(lambda: read_examples(path, text="text", label="l")) == f"{path}:1: empty label in column 'l'"
    path = file("c.jsonl", '{"text": "a", "l": -1e400}')
    assert message(lambda: read_examples(path, text="text", label="l")) == f"{path}:1: expected a label in column 'l', got -inf"
    path = file("b.jsonl", '{"text": "a", "l": [1]}')
    assert message(lambda: read_examples(path, text="text", label="l")) == f"{path}:1: expected a label in column 'l', got a list"
    path = file("b.csv", "text,l,m\na,1,2\n")
    assert message(lambda: read_examples(path, text="text", label=["l", "m"])) == (
        f"{path}:2: expected 0 or 1 in column 'm' of a label in several columns, got '2'"
    )


# Real files: row counts of DATA.md


@pytest.mark.parametrize(
    "path, rows, columns",
    [
        ("ghc/ghc_train.tsv", 22_036, {"text": "text", "label": ["hd", "cv"]}),
        ("ghc/ghc_test.tsv", 5_510, {"text": "text", "label": ["hd", "cv"]}),
        ("stormfront/ws_train.tsv", 7_896, {"text": "text", "label": "is_hate"}),
        ("stormfront/ws_dev.tsv", 978, {"text": "text", "label": "is_hate"}),
        ("stormfront/ws_test.tsv", 1_998, {"text": "text", "label": "is_hate"}),
        ("iptts/iptts77k_test.csv", 76_564, {"text": "Text", "label": "bin_label"}),
        ("nli/SICK_train.txt", 4_500, {"text": "sentence_A", "text_pair": "sentence_B", "label": "entailment_judgment"}),
        ("nli/SICK_trial.txt", 500, {"text": "sentence_A", "text_pair": "sentence_B", "label": "entailment_judgment"}),
        ("nli/SICK_test.txt", 4_927, {"text": "sentence_A", "text_pair": "sentence_B", "label": "entailment_judgment"}),
        ("nli/textfooler_mnli.tsv", 1_000, {"text": "1", "text_pair": "2", "label": "0"}),
        ("nli/textfooler_mnli_matched.tsv", 1_000, {"text": "1", "text_pair": "2", "label": "0"}),
        ("biasbios/sample_28x10.csv", 280, {"text": "hard_text", "label": "profession", "group": "gender"}),
        ("biasbios/accountant_complete.csv", 1_000, {"text": "hard_text", "label": "profession", "group": "gender"}),
        ("crows_pairs/crows_pairs_anonymized.csv", 1_508, {"text": "sent_more", "text_pair": "sent_less", "label": "bias_type"}),
        ("bug_professions/dev.jsonl", 4_991, {"text": "hard_text", "label": "profession", "group": "gender"}),
    ],
)
def test_public_files(shared, path, rows, columns):
    examples = read_examples(shared / "data" / path, **columns)
    assert len(examples) == rows
    labels = Counter(example.label for example in examples)
    assert len(labels) <= 28 and min(map(len, labels)) > 0


def test_public_quotes_are_undone(shared):
    path = shared / "data/ghc/ghc_train.tsv"  # every quoted field of GHC is whole, so the csv module reads it as well
    with open(path, encoding="utf-8", newline="") as stream:
        expected = [row[0] for row in csv.reader(stream, delimiter="\t")][1:]
    texts = [e.text for e in read_examples(path, text="text")]
    assert texts == expected
    assert texts[0].startswith('"He most') and texts[0].endswith('psychopath."')
    texts = [e.text for e in read_examples(shared / "data/stormfront/ws_test.tsv", text="text")]
    assert 'Restaurant " ? "' in texts


def test_public_corpus_streams(shared):
    assert sum(1 for _ in read_texts([shared / "data/corpus/bug_upstream.txt"])) == 90_599


def test_upstream_text_holds_no_source_of_the_dev_and_test_sentences(shared):
    """bug_professions' texts are BUG sentences with the profession's mention as "person": none of dev's and test's may be learnt from upstream."""
    rows = {split: read_examples(shared / "data" / "bug_professions" / f"{split}.jsonl", text="hard_text", label="profession") for split in ("train", "dev", "test")}
    mention = re.compile(rf"\b(?:{'|'.join(sorted({e.label for e in rows['train']}))})\b", re.IGNORECASE)
    masked = set()
    for line in read_texts([shared / "data" / "corpus" / "bug_upstream.txt"]):
        masked.update(line.text[:m.start()] + "person" + line.text[m.end():] for m in mention.finditer(line.text))
    found = {split: sum(e.text in masked for e in examples) for split, examples in rows.items()}
    assert found["dev"] == found["test"] == 0
    assert found["train"] > 0.9 * len(rows["train"])  # the check does find the sources of the training sentences


# Patterns, units, corrupt records, chunks


def test_a_pattern_is_its_files_in_alphabetical_order(tmp_path, file):
    for name in ("b.txt", "a.txt", "c.jsonl"):
        file(name, f'{{"text": "{name}"}}\n')
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "e.txt").write_text("deep\n")
    assert [t.place for t in read_texts([tmp_path / "c.jsonl", tmp_path / "*.txt"])] == [f"{tmp_path}/{name}:1" for name in ("c.jsonl", "a.txt", "b.txt")]
    (tmp_path / "d" / "deeper").mkdir()
    (tmp_path / "d" / "deeper" / "e.txt").write_text("deeper\n")
    assert [t.place for t in read_texts([tmp_path / "**" / "[e]*.txt"])] == [f"{tmp_path}/d/deeper/e.txt:1", f"{tmp_path}/d/e.txt:1"]
    assert message(lambda: read_texts([tmp_path / "*.csv"])) == f"{tmp_path}/*.csv: expected files that fit this pattern, found none"
    file("x[1].txt", "its own name\n")
    assert [t.text for t in read_texts([tmp_path / "x[1].txt"])] == ["its own name"]


def test_units(file):
    path = file("a.txt", "One. Two!\n\n \nDr. Who went. He\nleft.\r\n\n\nEnd")
    assert [t.text for t in read_texts([path])] == ["One. Two!", "Dr. Who went. He", "left.", "End"]
    assert [(t.text, t.place) for t in read_texts([path], unit="sentence")] == [
        ("One.", f"{path}:1"), ("Two!", f"{path}:1"), ("Dr. Who went.", f"{path}:4"), ("He", f"{path}:4"), ("left.", f"{path}:5"), ("End", f"{path}:8")]
    assert [(t.text, t.place) for t in read_texts([path], unit="document")] == [
        ("One. Two!", f"{path}:1"), ("Dr. Who went. He\nleft.", f"{path}:4"), ("End", f"{path}:8")]
    table = file("a.csv", 'text\n"A b. C d."\n')
    assert [t.text for t in read_texts([table], unit="sentence")] == ["A b.", "C d."]
    with pytest.raises(ConfigError, match="--unit document: expected txt files, whose documents end at blank lines, got csv"):
        read_texts([table], unit="document")


CORRUPT = {
    "a.txt": (b"one\n\xff\ntwo\ncaf\xe9\n", "line", ["one", "two"], [(2, "expected utf-8, got 0xff at byte 1 of the line"), (4, "expected utf-8, got 0xe9 at byte 4")]),
    "d.txt": (b"one\n\xff\ntwo\n\nthree", "document", ["one\ntwo", "three"], [(2, "expected utf-8")]),
    "a.csv": (b'text,n\none,1\n"a\n\xff\nb",2\ntwo,2\nx\n"y"z,3\nthree,\xff\nfour,4\n"open,5\n', "line", ["one", "two", "four"],
              [(4, "expected utf-8"), (7, "expected 2 fields, got 1"), (8, "not csv"), (9, "expected utf-8"), (11, "not csv: unexpected end of data")]),
    "b.csv": (b'text\none\n"a\xff"x\ntwo\n', "line", ["one", "two"], [(3, "expected utf-8")]),
    "a.tsv": (b"text\tn\none\t1\ntwo\n\xff\t2\nthree\t3\n", "line", ["one", "three"], [(3, "expected 2 fields, got 1"), (4, "expected utf-8")]),
    "a.jsonl": (b'{"text": "one"}\n{"text": \n["x"]\n{"t": 1}\n{"text": 5}\n{"text": "\\ud800"}\n\xff\n{"text": "two"}\n', "line", ["one", "two"],
                [(2, "not JSON"), (3, "expected a JSON object, got a list"), (4, "no column 'text'; columns: t"), (5, "expected a text in column 'text', got a number"),
                 (6, "column 'text' holds half a surrogate pair"), (7, "expected utf-8")]),
}  # fmt: skip


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("name", CORRUPT)
def test_what_is_corrupt_is_left_out_counted_and_named_or_stops(name, end, file):
    content, unit, kept, bad = CORRUPT[name]
    path, skipped = file(name + end, content), Skipped()
    assert [t.text for t in read_texts([path], unit=unit, on_error="skip", skipped=skipped)] == kept
    assert skipped.count == len(bad) and len(skipped.first) == min(5, len(bad))
    for said, (line, words) in zip(skipped.first, bad):
        assert said.startswith(f"{path}:{line}: {words}"), said
    assert message(lambda: read_texts([path], unit=unit)) == skipped.first[0]


def test_what_was_left_out_is_reported_in_a_few_lines():
    skipped = Skipped()
    assert skipped.report("corpus") == []
    for number in range(7):
        skipped.add(f"f:{number}: bad")
    assert skipped.report("corpus") == ["corpus: 7 corrupt lines or records were left out; the first 5:", *(f"  f:{n}: bad" for n in range(5))]
    assert Skipped(1, ["f:1: bad"]).report("c") == ["c: 1 corrupt lines or records were left out:", "  f:1: bad"]


def test_a_file_of_which_nothing_is_left_names_a_line_of_its_own(file):
    """However many lines of earlier files were left out before."""
    files = [file("a.txt", b"he is\n" + b"\xff\n" * 7), file("b.txt", b"\xff\n\xfe\n")]
    assert message(lambda: list(read_texts(files, on_error="skip"))) == f"no text in {files[1]} but 2 corrupt lines or records, such as {files[1]}:2: expected utf-8, got 0xfe at byte 1 of the line"


def test_what_no_skipping_mends_stops(tmp_path, file):
    def skip(path, **options):
        return message(lambda: read_texts([path], on_error="skip", **options))

    assert skip(tmp_path / "none.txt") == f"{tmp_path}/none.txt: no such file"
    broken = tmp_path / "a.txt.gz"
    broken.write_bytes(gzip.compress(b"line\n" * 1000)[:-9])
    assert "cannot be read to its end: Compressed file ended" in skip(broken)
    assert skip(file("a.csv", "body\nx\n")) == f"{tmp_path}/a.csv:1: no column 'text'; columns: body"
    path = file("a.jsonl", '{"body": 1}\n' * 3)  # no record has the column
    assert skip(path) == f"no text in {path} but 3 corrupt lines or records, such as {path}:3: no column 'text'; columns: body"


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 18])
@pytest.mark.parametrize("unit", ["line", "sentence"])
def test_blocks_may_end_anywhere(block, unit, file, monkeypatch):
    content = "\ufeffone. Two\r\n\n\nthr\u00e9e\n" + "long " * 30 + "\nX. Y. Z\n \n  last"
    path = file("a.txt", content)
    assert all(b"".join(raw for raw, *_ in lines.blocks(path, size=size)) == content.encode() for size in range(1, 60))
    expected = list(read_texts([path], unit=unit))
    monkeypatch.setattr(lines.blocks, "__defaults__", (0, 0, block))  # BLOCK was read when the function was made
    assert list(read_texts([path], unit=unit)) == expected and expected[0].place == f"{path}:1" and expected[-1].place == f"{path}:8"


@pytest.mark.parametrize("kind, unit", [("a.txt", "document"), *((kind, unit) for kind in ("a.txt", "a.csv", "a.tsv", "a.jsonl") for unit in ("line", "sentence"))])
def test_reading_begins_again_at_every_place(kind, unit, file):
    made = {"a.txt": "A. B c. D\n\nx\r\n\nE. F\ny\n", "a.csv": 'text,n\n"A. B\nc. D",1\n"E. F",2\nx,3\n', "a.tsv": "text\tn\nA. B c. D\t1\n\nE. F\t2\n", "a.jsonl": '{"text": "A. B c. D"}\n{"text": "x"}\n'}
    path = str(file(kind, "\ufeff" + made[kind]))
    everything = [(chunk.start(i), text, place) for chunk in chunks([path, path], unit=unit) for i, (text, place) in enumerate(zip(chunk.texts, chunk.places()))]
    assert len({start for start, _, _ in everything}) == len(everything) > 2
    for at, (start, _, _) in enumerate(everything):
        again = [(chunk.start(i), text, place) for chunk in chunks([path, path], unit=unit, start=start) for i, (text, place) in enumerate(zip(chunk.texts, chunk.places()))]
        assert again == everything[at:]


@pytest.mark.parametrize("later", ["", '900,"she, said"\n'])
def test_a_byte_that_is_none_inside_a_quoted_field_costs_its_record_alone(later, tmp_path):
    path = tmp_path / "torn.csv"
    rows = b"".join(b"%d,she is number %d\n" % (i, i) for i in range(3, 100))
    path.write_bytes(b'id,text\n1,he is one\n2,"he is\n\xff bad"\n' + rows + later.encode())
    said: list[str] = []
    found = [record.values[0] for record in records.read(path, "csv", ["text"], said.append)]
    assert found == ["he is one", *(f"she is number {i}" for i in range(3, 100)), *(["she, said"] if later else [])]
    assert said == [f"{path}:4: expected utf-8, got 0xff at byte 1 of the line"]
    with pytest.raises(DataError, match=r"torn.csv:4: expected utf-8, got 0xff"):
        list(records.read(path, "csv", ["text"]))


@pytest.mark.parametrize("name, content", [("a.tsv", "\t\ntext\tl\na\t1\n\t\nb\t2\n\t\t\n\t\n"), ("a.csv", ',\ntext,l\na,1\n""\nb,2\n,,\n,\n')])
def test_rows_that_a_spreadsheet_leaves_blank_are_none_where_a_label_is_asked_for(file, name, content):
    assert [(e.text, e.label) for e in read_examples(file(name, content), text="text", label="l")] == [("a", "1"), ("b", "2")]
    assert [text.text for text in read_texts([file(name, content)])] == ["a", "b"]
