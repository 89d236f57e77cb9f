"""Public data sets as splits: what is read, renamed, cleaned, carved and refused."""

import dataclasses
import datetime
import decimal
import json
import pickle
import random
import re
import sys

import pytest

from peftdebias import prepare
from peftdebias.corpus import Example
from peftdebias.errors import ConfigError, DataError
from peftdebias.prepare import Source, read, read_texts, splits, without_links


@pytest.mark.parametrize("text,left", [
    ("see https://a.b/c?d=e, now", "see now"), ("WWW.x.org is down", "is down"), ("@you and @me_2: hi", "and : hi"), ("a@b.c stays", "a@b.c stays"),
    ("two  spaces\tfold", "two spaces fold"), ("http://only.it", ""), ("", ""),
    ("EWWWW...can you", "EWWWW...can you"), ("Awww... paw, Awww.", "Awww... paw, Awww."), ("(www.a.b) oncewww.c.d", "( once"),
])  # fmt: skip
def test_links_and_mentions_go(text, left):
    assert without_links(text) == left


def test_the_published_layouts(tmp_path):
    (tmp_path / "GHC").mkdir()
    (tmp_path / "GHC" / "ghc_train.tsv").write_text('text\thd\tcv\tvo\n"""Quoted"" @one"\t1\t0\t0\nplain http://x.y\t0\t0\t1\nboth\t0\t1\t0\n')
    ghc = read(Source(file=("ghc/ghc_train.tsv",), text="text", label="hd,cv", clean=True), tmp_path)  # found by its last part
    assert [(e.text, e.label) for e in ghc] == [('"Quoted"', "1"), ("plain", "0"), ("both", "1")]
    rows = [{"gold_label": "-", "sentence1": "a", "sentence2": "b"}, {"gold_label": "neutral", "sentence1": "c", "sentence2": "d"}]
    (tmp_path / "multinli_1.0_train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    mnli = Source(file=("m.tsv", "multinli_1.0_train.jsonl"), text="sentence1", text_pair="sentence2", label="gold_label", drop=("-",))
    assert [(e.text, e.text_pair, e.label) for e in read(mnli, tmp_path)] == [("c", "d", "neutral")]
    with pytest.raises(DataError, match="multinli_1.0_train.jsonl: expected examples, found none but with the labels neutral, -$"):
        read(Source(file=("multinli_1.0_train.jsonl",), text="sentence1", label="gold_label", drop=("neutral", "-")), tmp_path)
    (tmp_path / "lhc.csv").write_text("TweetID,LangID,TopicID,HateLabel,text\n1,1,0,2,one\n2,1,0,0,two\n3,1,1,1,three\n")
    lhc = read(Source(file=("lhc.csv",), label="HateLabel", labels={"0": "0", "1": "0", "2": "1"}), tmp_path)
    assert [e.label for e in lhc] == ["1", "0", "0"] and lhc[2].place == f"{tmp_path}/lhc.csv:4"
    (tmp_path / "pairs.tsv").write_text("text\tother\tlabel\na http://x.y\t@you b\t1\n")
    (pair,) = read(Source(file=("pairs.tsv",), text_pair="other", label="label", clean=True), tmp_path)
    assert (pair.text, pair.text_pair) == ("a", "b")
    (tmp_path / "t.txt").write_text("one @x\n\nhttp://a.b\ntwo\n")
    assert [e.text for e in read_texts(Source(file=("t.txt",), clean=True), tmp_path)] == ["one", "two"]


def test_parquet_is_read_as_its_jsonl_would_be(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = {"hard_text": ["He sews.", "She é."], "profession": [21, 3], "gender": [0, 1], "other": [None, None]}
    parquet.write_table(pyarrow.table(table), tmp_path / "train.parquet")
    source = Source(file=("biasbios/train.csv", "biasbios/train.parquet"), text="hard_text", label="profession", group="gender")
    found = read(source, tmp_path)
    assert [(e.text, e.label, e.group) for e in found] == [("He sews.", "21", "0"), ("She é.", "3", "1")] and found[1].place == f"{tmp_path}/train.parquet:2"
    assert [e.text for e in read_texts(source, tmp_path)] == table["hard_text"]
    with pytest.raises(DataError, match="train.parquet: no column 'text'; columns: hard_text, profession, gender, other"):
        read(Source(file=("train.parquet",)), tmp_path)
    for values, words in (([b"a", b"b"], "column 'label': expected texts or numbers, got binary"), ([datetime.date(2023, 12, 6)] * 2, "got date32"), ([decimal.Decimal(1)] * 2, "got decimal128"),
                          ([["a"]] * 2, "got list"), (["a", None], "^" + re.escape(f"{tmp_path}/typed.parquet:2: empty label in column 'label'"))):
        parquet.write_table(pyarrow.table({"text": ["a", "b"], "label": values}), tmp_path / "typed.parquet")
        with pytest.raises(DataError, match=words):
            read(Source(file=("typed.parquet",), label="label"), tmp_path)
    whole = (tmp_path / "train.parquet").read_bytes()
    (tmp_path / "torn.parquet").write_bytes(b"PAR1" + b"\xff" * 40 + whole[44:])  # its pages; its footer is as it was
    for ask in (read, read_texts):
        with pytest.raises(DataError, match=f"^{tmp_path}/torn.parquet: cannot be read: "):
            ask(dataclasses.replace(source, file=("torn.parquet",)), tmp_path)
    (tmp_path / "bad.parquet").write_bytes(b"no")
    with pytest.raises(DataError, match="bad.parquet: not parquet: "):
        read(Source(file=("bad.parquet",)), tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}/bad.parquet: parquet files need the extra `parquet`: pip install 'peftdebias[parquet]'")):
        read(Source(file=("bad.parquet",)), tmp_path)


def test_a_pickle_is_refused_unread_with_a_way_out(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    (tmp_path / "train.pickle").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DataError, match=r"train.pickle: expected csv, tsv or jsonl, got a pickle, .*to_csv\('train.csv', index=False\)"):
        read(Source(file=("train.pickle",)), tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_a_file_that_is_not_there_or_there_twice_is_named(tmp_path):
    with pytest.raises(DataError, match="expected a/b.tsv or c.csv, found none"):
        prepare.find(("a/b.tsv", "c.csv"), tmp_path)
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "b.tsv").touch()
    with pytest.raises(DataError, match="expected one b.tsv, found x/b.tsv, y/b.tsv; expected a/b.tsv"):
        prepare.find(("a/b.tsv",), tmp_path)
    assert prepare.find(("y/b.tsv",), tmp_path) == tmp_path / "y" / "b.tsv"
    (tmp_path / "y" / "b [1].tsv").write_text("x")  # as browsers name what they fetch again: no pattern
    assert prepare.find(("a/b [1].tsv",), tmp_path) == tmp_path / "y" / "b [1].tsv"


def test_a_file_called_like_a_split_is_not_taken_from_another_data_set(tmp_path):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "train.csv").touch()
    with pytest.raises(DataError, match="expected bios/train.csv or bios/train.jsonl, found none .jobs/train.csv may be of another data set.$"):
        prepare.find(("bios/train.csv", "bios/train.jsonl"), tmp_path)
    for name in ("dev", "test", "valid", "validation"):
        (tmp_path / "jobs" / f"{name}.csv").touch()
        with pytest.raises(DataError, match=f"expected bios/{name}.csv, found none .jobs/{name}.csv may be of another data set.$"):
            prepare.find((f"bios/{name}.csv",), tmp_path)
    assert prepare.find(("train.csv",), tmp_path) == tmp_path / "jobs" / "train.csv"  # asked for without a folder
    (tmp_path / "deep" / "bios").mkdir(parents=True)
    (tmp_path / "deep" / "bios" / "train.jsonl").touch()
    assert prepare.find(("bios/train.csv", "bios/train.jsonl"), tmp_path) == tmp_path / "deep" / "bios" / "train.jsonl"
    (tmp_path / "StereoSet" / "data").mkdir(parents=True)
    (tmp_path / "StereoSet" / "data" / "dev.json").touch()
    assert prepare.find(("stereoset/dev.json",), tmp_path) == tmp_path / "StereoSet" / "data" / "dev.json"
    assert prepare.find(("bios/train.csv",), tmp_path / "jobs") == tmp_path / "jobs" / "train.csv"  # the folder that was named


def example(i: int, pair: str | None = None) -> Example:
    return Example(f"text {i}", pair, str(i % 2), None, f"f:{i}")


def test_splits_share_no_text():
    train, test = [example(i) for i in range(200)] + [example(7), example(3)], [example(i) for i in range(190, 230)]
    made = splits(train, None, test)
    parts = [{e.text for e in part} for part in (made.train, made.dev, made.test)]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2] and len(parts[0] | parts[1]) == 190 and 8 < len(parts[1]) < 35
    assert made.notes[0] == "train: 10 of 202 examples whose text is in the test split were left out" and made.notes[1].startswith(f"dev: {len(made.dev)} examples of train, 10 %")
    again = splits(train[::-1], [example(1), example(150)], test)
    assert {e.text for e in again.dev} == {"text 1", "text 150"} and not {"text 1", "text 150"} & {e.text for e in again.train}
    pairs = splits([example(1, "a"), example(1, "b"), example(2, "a")], [example(5, "z")], [example(1, "a")])
    assert [(e.text, e.text_pair) for e in pairs.train] == [("text 1", "b"), ("text 2", "a")]


def test_a_published_dev_split_loses_the_texts_of_test():
    made = splits([example(i) for i in range(9)], [example(5), example(20), example(21)], [example(20), example(30)])
    assert [e.text for e in made.dev] == ["text 5", "text 21"]
    assert [e.text for e in made.train] == [f"text {i}" for i in range(9) if i != 5] and [e.text for e in made.test] == ["text 20", "text 30"]
    assert made.notes == ["dev: 1 of 3 examples whose text is in the test split were left out", "train: 1 of 9 examples whose text is in the dev split were left out"]
    with pytest.raises(DataError, match=r"^dev: expected examples, got none \(1 of 1 examples whose text is in the test split were left out\)$"):
        splits([example(1), example(3)], [example(2)], [example(2), example(3)])


def test_examples_without_text_are_in_no_split():
    blank = Example("", None, "0", None, "f:b")
    made = splits([blank, example(1), blank], [example(2), blank], [blank, example(3)])
    assert [[e.text for e in part] for part in (made.train, made.dev, made.test)] == [["text 1"], ["text 2"], ["text 3"]]
    assert made.notes == [f"{name}: {n} examples without text, or of nothing but what is cleaned away, were left out" for name, n in (("train", "2 of 3"), ("dev", "1 of 2"), ("test", "1 of 2"))]
    pairs = splits([example(1, " "), example(1, "a")], [example(2, "b")], [example(3, "c"), example(3, "")])
    assert [e.text_pair for e in pairs.train + pairs.test] == ["a", "c"]


def test_a_share_of_train_is_the_same_each_time():
    train, test = [example(i) for i in range(300)], [example(1000)]
    small = splits(train, [example(2000)], test, train_share=0.1)
    assert len(small.train) == 30 and small.train == splits(train, [example(2000)], test, train_share=0.1).train and small.notes[-1] == "train: 30 examples, 10 % of it"
    assert small.train == [train[i] for i in sorted(random.Random(0).sample(range(300), 30))]  # the same for all systems and seeds, and from year to year
    with pytest.raises(DataError, match=r"^train: expected examples, got none \(1 of 1 examples whose text is in the test split were left out\)$"):
        splits([example(1)], [example(2)], [example(1)], train_share=0.1)


def test_the_smallest_share_of_train_is_one_example():
    made = splits([example(0), example(1)], [example(2)], [example(3)], train_share=0.01)
    assert len(made.train) == 1 and made.notes == ["train: 1 examples, 1 % of it"]


def test_space_around_a_text_does_not_decide_its_side():
    assert [prepare.in_dev(f" text {i}\n", 0.5) for i in range(50)] == [prepare.in_dev(f"text {i}", 0.5) for i in range(50)]


def test_texts_that_differ_in_outer_space_are_one():
    train, test = [("he is ", None), ("a", "b "), ("c", None)], [(" he is", None), ("a ", "b")]
    train, test = ([Example(text, pair, "1", None, f"f:{i}") for i, (text, pair) in enumerate(texts)] for texts in (train, test))
    made = splits(train, [example(0)], test)
    assert [e.text for e in made.train] == ["c"] and len(made.test) == 2


@pytest.mark.parametrize("share,part", [(1.0, ""), (0.05, " (5 % of the training split)")])
def test_a_label_that_is_not_trained_on_is_named(share, part):
    with pytest.raises(DataError, match=re.escape(f"f:1: label '1' is on no text to train on{part}; expected one of 0") + "$"):
        prepare.check_labels([example(0)], [example(0), example(1)], share)


def test_what_is_written_is_what_the_phases_read(tmp_path):
    from peftdebias.corpus import read_examples

    rows = [Example('a "b"\u2028c', "d", "1", "f", "p:1"), Example("é", "", "0", "m", "p:2")]
    prepare.write(rows, tmp_path / "t.jsonl")
    back = read_examples(tmp_path / "t.jsonl", text="text", text_pair="text_pair", label="label", group="group")
    assert [(e.text, e.text_pair, e.label, e.group) for e in back] == [(e.text, e.text_pair, e.label, e.group) for e in rows]


def test_a_label_that_the_source_does_not_list_is_named_where_it_stands(tmp_path):
    (tmp_path / "lhc.csv").write_text("text,HateLabel\none,0\ntwo,7\n")
    with pytest.raises(DataError, match=f"^{tmp_path}/lhc.csv:3: label '7': expected one of 0, 1, 2$"):
        read(Source(file=("lhc.csv",), label="HateLabel", labels={"0": "0", "1": "0", "2": "1"}), tmp_path)
