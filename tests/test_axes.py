"""The shipped axes are what they claim, a user's own axis is one file, and every mistake in it is named."""

import csv
import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from peftdebias.axes import LONGEST_WORD, MOST_BARRED, Axis, is_word_character, load_axis, names, word_class
from peftdebias.cda import counterfactuals
from peftdebias.errors import ConfigError, DataError


@pytest.fixture
def load(tmp_path):
    """Load an axis from its TOML text."""

    def load(text, name="mine.toml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return load_axis(path)

    return load


# ---- shipped axes


def test_names():
    assert names() == ["age", "gender", "group", "race", "religion"]  # pronouns.toml and names.toml are tables, no axes


@pytest.mark.parametrize("name", names())
def test_every_word_stands_once(name):
    axis = load_axis(name)
    assert axis.name == name and axis.description and axis.source.endswith(f"{name}.toml")
    listed = [word for row in axis.groups for word in row] + [word for word, _ in axis.like]
    assert len(listed) == len(set(listed)) == len(axis.words)


def test_what_happens_to_untouched_texts_is_the_papers():
    assert {name: load_axis(name).keep_untouched for name in names() if name != "age"} == {"gender": False, "group": True, "race": True, "religion": True}


def test_only_gender_has_pronouns_and_it_and_age_have_pairs():
    assert [name for name in names() if load_axis(name).pronouns] == ["gender"]
    assert {len(row) for name in ("age", "gender") for row in load_axis(name).groups} == {2}
    for name in ("group", "race", "religion"):  # rows of one length: any member of a family makes the same family
        assert {len(row) for row in load_axis(name).groups} == {3}


def test_group_holds_race_and_religion():
    group = load_axis("group")
    for name in ("race", "religion"):
        part = load_axis(name)
        assert set(part.groups) <= set(group.groups)
        assert set(part.like) <= set(group.like)


def test_the_papers_words_are_covered(shared):
    theirs = json.loads((shared / "data/attribute_words/peft_debias_bias_attribute_words.json").read_text(encoding="utf-8"))
    for name, rows in theirs.items():
        listed = {word.strip(".") for row in rows for word in row}  # "mr." is the word mr
        assert listed - load_axis(name).words == set(), name


def test_other_lists_are_covered_but_for_words_left_out_on_purpose(shared):
    """gender.toml says why for each of these."""
    generic = "governor governess host hostess master mistress tailor seamstress bachelor spinster"
    names_and_plurals = {"hostesses", "governesses", "mistresses", "beau", "belle", "beaus", "belles"}
    left_out = set(generic.split()) | {word + "s" for word in generic.split()} | names_and_plurals
    misspelt = {"adultor", "adultress", "adultors", "adultresses", "godess", "godesses", "barnoesses", "mentleman", "seamstress'"}
    for file in ("extra_gendered_words.txt", "generalized_swaps.txt"):
        theirs = set((shared / "data/attribute_words" / file).read_text(encoding="utf-8").replace(".", "").split())
        assert theirs - left_out - misspelt - load_axis("gender").words == set(), file


# ---- age


@pytest.mark.parametrize(
    "text, swapped",
    [
        ("An old man, a YOUNG woman", "An young man, a OLD woman"),  # a and an are left as they are, on every axis
        ("my older sister, the oldest of us", "my younger sister, the youngest of us"),
        ("Teenagers and the pensioner's flat", "Pensioners and the teenager's flat"),
        ("an elderly man and his elder brother", "an young man and his younger brother"),
        ("a teenage girl, two youths", "a old girl, two pensioners"),
        ("Neil Young and Pliny the Elder read the Old Testament", None),  # names: young, younger, elder and old do not count as Capital
        ("a senior officer aged 24, new to the youth team in his teens", None),
        ("TEN YEARS OLD, a two-year-old, 3 weeks older, ten years   young", None),  # an age in numbers
        ("for ten years, old and young; the old years old", "for ten years, young and old; the young years old"),
    ],
)
def test_age(text, swapped):
    assert [variant.text for variant in counterfactuals(text, load_axis("age"))] == ([swapped] if swapped else [])


def test_age_tells_the_sentences_of_crows_pairs_apart(shared):
    """Of the 87 pairs on age both sentences are touched in 42 and one in 18; in 28 the swap of one is the other, word by word."""
    axis, touched, twins = load_axis("age"), Counter(), 0
    with (shared / "data/crows_pairs/crows_pairs_anonymized.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["bias_type"] == "age":
                pair = row["sent_more"], row["sent_less"]
                swapped = [[variant.text for variant in counterfactuals(text, axis)] for text in pair]
                touched[sum(map(bool, swapped))] += 1
                twins += swapped[0] == [pair[1]] or swapped[1] == [pair[0]]
    assert touched == {2: 42, 1: 18, 0: 27} and twins == 28


def test_age_comes_back_on_a_real_corpus(shared):
    """Every line comes back, but for the words that are treated like another: elderly -> young -> old."""
    axis = load_axis("age")
    like, back, lines = {word for word, _ in axis.like}, 0, 0
    for text in (shared / "data/corpus/bug_upstream.txt").read_text(encoding="utf-8").split("\n")[::4]:
        for variant in counterfactuals(text, axis):
            if not like & {swap.before.lower() for swap in variant.swaps}:
                lines += 1
                back += [again.text for again in counterfactuals(variant.text, axis)] == [text]
    assert lines == back > 500


# ---- columns


def test_columns_of_the_shipped_axes():
    """Named where a column is one identity in every row; group's first column is black here and Jewish there."""
    assert {name: load_axis(name).columns for name in names()} == {
        "age": ("young", "old"),
        "gender": ("male", "female"),
        "group": (),
        "race": ("black", "white", "asian"),
        "religion": ("jewish", "christian", "muslim"),
    }
    for name in ("age", "race", "religion"):
        assert load_axis(name).groups[0] == load_axis(name).columns
    assert load_axis("gender").groups[0] == ("he", "she") and ("male", "female") in load_axis("gender").groups


@pytest.mark.parametrize("name, column, index", [("gender", "male", 0), ("gender", "female", 1), ("gender", "2", 1), ("race", 3, 2), ("group", "1", 0)])
def test_a_column_by_name_or_number(name, column, index):
    assert load_axis(name).column(column) == index


@pytest.mark.parametrize(
    "name, column, words",
    [
        ("gender", "women", "axis 'gender': unknown column 'women': expected one of male, female, or a number from 1 to 2"),
        ("gender", "Male", "unknown column 'Male': expected one of male, female, or"),
        ("gender", 0, "unknown column '0': expected one of male, female, or a number from 1 to 2"),
        ("race", "4", "unknown column '4': expected one of black, white, asian, or a number from 1 to 3"),
        ("race", "-1", "unknown column '-1'"),
        ("race", "", "unknown column ''"),
        ("group", "black", "axis 'group': unknown column 'black': expected \\(its columns have no names\\) a number from 1 to 3"),
    ],
)
def test_an_unknown_column_lists_the_known(name, column, words):
    with pytest.raises(ConfigError, match=words):
        load_axis(name).column(column)


# ---- a user's own axis

AGE = """
name = "age"
description = "young and old"
keep_untouched = true
columns = ["young", "middle", "old"]
groups = [["young", "old"], ["boyish", "mature", "aged"]]
[like]
"youthful" = "young"
[only]
"aged" = ["lower"]
"""


def test_a_users_axis(load):
    axis = load(AGE)
    assert axis.name == "age" and axis.keep_untouched and not axis.pronouns
    assert axis.groups == (("young", "old"), ("boyish", "mature", "aged"))
    assert axis.like == (("youthful", "young"),) and axis.only == (("aged", ("lower",)),)
    assert axis.words == {"young", "old", "boyish", "mature", "aged", "youthful"}
    assert axis.columns == ("young", "middle", "old") and axis.column("old") == 2
    assert axis == load(AGE) and hash(axis) == hash(load(AGE))


def test_the_documented_example(load):
    """docs/axes.md: the file it begins with."""
    page = (Path(__file__).resolve().parent.parent / "docs" / "axes.md").read_text(encoding="utf-8")
    axis = load(page.split("```toml\n")[1].split("```")[0])
    swapped = [variant.text for variant in counterfactuals("Rich, an affluent millionaire, grew RICH.", axis)]
    assert swapped == ["Rich, an needy pauper, grew POOR."] and axis.column("poor") == 1


def test_a_path_may_be_text_and_the_name_is_the_files(load, tmp_path):
    load('keep_untouched = false\ngroups = [["niño", "niña"]]', "infancia.toml")
    assert load_axis(str(tmp_path / "infancia.toml")).name == "infancia"


def test_a_file_with_a_byte_order_mark(load):
    assert load("\ufeff" + AGE).name == "age"


def test_words_of_other_scripts_and_inner_apostrophes(load):
    axis = load('keep_untouched = true\ngroups = [["लड़का", "लड़की"], ["αδελφός", "αδελφή"], ["ma\'am", "sir"], ["w_1", "w_2"]]')
    assert {"लड़का", "αδελφός", "ma'am", "w_1"} <= axis.words


def test_word_characters():
    assert all(map(is_word_character, "aéß7٣_\u0301ा"))
    assert not any(map(is_word_character, "'\u2019- .😀\0\n"))


def test_the_two_definitions_of_a_word_character_agree_everywhere():
    word = re.compile(f"[{word_class()}]")
    assert [code for code in range(0x110000) if is_word_character(chr(code)) != bool(word.match(chr(code)))] == []


# ---- errors: what, where, expected, got


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ConfigError, match=r"unknown axis 'gendre': expected one of age, gender, group, race, religion, or the path of a \.toml file"):
        load_axis("gendre")
    for table in ("pronouns", "names"):
        with pytest.raises(ConfigError, match=f"unknown axis '{table}'"):
            load_axis(table)


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"^axis file NOWHERE\.TOML: no such file$"):
        load_axis("NOWHERE.TOML")
    with pytest.raises(DataError, match=r"axis file .*nowhere\.toml: no such file"):
        load_axis(tmp_path / "nowhere.toml")


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "latin.toml").write_bytes('groups = [["niño", "niña"]]'.encode("latin-1"))
    with pytest.raises(DataError, match="expected readable UTF-8 text"):
        load_axis(tmp_path / "latin.toml")


@pytest.mark.parametrize(
    "text, error, words",
    [
        ("groups = ]", DataError, r"mine\.toml: expected TOML, got .*line 1"),
        ('keep_untouched = true\ngroup = [["a", "b"]]', ConfigError, "unknown key 'group': expected one of columns, description, groups, keep"),
        ('groups = [["a", "b"]]', DataError, "key 'keep_untouched' is missing: expected true .* or false"),
        ('keep_untouched = 1\ngroups = [["a", "b"]]', DataError, "key 'keep_untouched': expected true or false, got 1"),
        ('name = " "\nkeep_untouched = true\ngroups = [["a", "b"]]', DataError, "key 'name': expected a text to call the axis by, got ' '"),
        ("keep_untouched = true", DataError, "key 'groups': expected a list of rows .*, got None"),
        ("keep_untouched = true\ngroups = []", DataError, r"key 'groups': expected a list of rows .*, got \[\]"),
        ('keep_untouched = true\ngroups = ["a", "b"]', DataError, "group 1: expected a list of words, got 'a'"),
        ('keep_untouched = true\ngroups = [["a", "b"], []]', DataError, "group 2 is empty: expected two or more words"),
        ('keep_untouched = true\ngroups = [\n["a"]]', DataError, r"mine\.toml:3: group 1 has the one word 'a': expected two or more"),
        ('keep_untouched = true\ngroups = [["a", 7]]', DataError, "group 1: expected a word in quotes, got 7"),
        ('keep_untouched = true\ngroups = [["a", ""]]', DataError, "group 1 has an empty word"),
        ('keep_untouched = true\ngroups = [["he", "she"],\n["she", "they"]]', DataError, r"mine\.toml:3: 'she' stands in groups 1 and 2: .*ambiguous"),
        ('keep_untouched = true\ngroups = [["he", "she", "he"]]', DataError, r"mine\.toml:2: group 1 repeats 'he'"),
        ('keep_untouched = true\ngroups = [["a", "old man"]]', DataError, "group 1: 'old man' can never match as a whole word, for ' ' is no part of a word"),
        ('keep_untouched = true\ngroups = [["a", "mother-in-law"]]', DataError, "'mother-in-law' can never match as a whole word, for '-'"),
        ('keep_untouched = true\ngroups = [["a", "mr."]]', DataError, r"'mr\.' can never match as a whole word, for '\.'"),
        ('keep_untouched = true\ngroups = [["a", "\'em"]]', DataError, "''em' can never match|\"'em\" can never match"),
        ('keep_untouched = true\ngroups = [["a", "Muslim"]]', DataError, "'Muslim' has a capital letter: expected lower case"),
        (f'keep_untouched = true\ngroups = [["a", "{"x" * 101}"]]', DataError, "has 101 characters: expected at most 100"),
        ('keep_untouched = true\npronouns = true\ngroups = [["he", "she"]]', DataError, r'pronouns = true: expected the rows \["him", "her"\]'),
        ('keep_untouched = true\npronouns = true\ngroups = [["him", "her"]]', DataError, r'pronouns = true: expected the rows \["him", "her"\]'),
        ('name = "a/b"\nkeep_untouched = true\ngroups = [["a", "b"]]', DataError, "key 'name': expected a name without /, got 'a/b'"),
        ('keep_untouched = true\ngroups = [["a", "b"]]\n[like]\n"a" = "b"', DataError, r"mine\.toml:4: like: 'a' stands in a group too"),
        ('keep_untouched = true\ngroups = [["a", "b"]]\n[like]\nc = "d"', DataError, "like: 'c' is to be treated like 'd': expected a word of the groups"),
        ("keep_untouched = true\ngroups = " + "[" * 5000, DataError, "expected TOML, got "),
        ('keep_untouched = true\ngroups = [["rich", "poor"]]\n[only]\nrich = ["lower"]\npoor = ["UPPER"]', DataError, r"mine\.toml:4: only: 'rich' counts in no letter case, since its row has others"),
        ('keep_untouched = true\ngroups = [["isi", "b"], ["ısı", "c"]]', DataError, r"'ısı' and 'isi' are both written 'ISI': expected words that can be told apart"),
        ('name = "a\\nb"\nkeep_untouched = true\ngroups = [["a", "b"]]', DataError, r"key 'name': expected printable characters, got 'a\\nb'"),
        ('columns = ["x\\ny", "z"]\nkeep_untouched = true\ngroups = [["a", "b"]]', DataError, r"key 'columns': expected names of printable characters, got 'x\\ny'"),
        ('keep_untouched = true\ngroups = [["a", "b"]' + "".join(f', ["c{i}", "d{i}"]' for i in range(65)) + "]\n[unless_after]\n" + "".join(f'c{i} = ["x{i}"]\n' for i in range(65)), DataError,
         r"mine\.toml:68: unless_after: expected at most 64 words, got 65"),
        ('keep_untouched = true\ngroups = [["a", "b"]]\n[unless_after]\nc = ["x"]', DataError, "unless_after: 'c' is in no group and not under like"),
        ('keep_untouched = true\ngroups = [["a", "b"]]\n[unless_after]\na = "x"', DataError, r"mine\.toml:4: unless_after: 'a': expected a list of words, got 'x'"),
        ('keep_untouched = true\ngroups = [["a", "b"]]\n[unless_after]\na = ["x y"]', DataError, r"unless_after: 'a': 'x y' can never match as a whole word"),
        ('keep_untouched = true\ngroups = [["a", "b"]]\n[unless_after]\na = ["o\'x"]', DataError, r"unless_after: 'a': expected words without an apostrophe"),
        ('keep_untouched = true\ngroups = [["a", "b"]]\n[only]\nc = ["lower"]', DataError, "only: 'c' is in no group and not under like"),
        ('keep_untouched = true\ngroups = [["a", "b"]]\n[only]\na = ["title"]', DataError, r"mine\.toml:4: only: 'a': expected a list out of lower, Capital"),
        ('keep_untouched = true\ngroups = [["a", "b"]]\n[only]\na = [["lower"]]', DataError, r"mine\.toml:4: only: 'a': expected a list out of lower, Capital, UPPER, got \[\['lower'\]\]"),
        ('keep_untouched = true\ngroups = [["a", "b"]]\n[like]\nc = ["a"]', DataError, r"mine\.toml:4: like: 'c' is to be treated like \['a'\]: expected"),
        ("keep_untouched = true\ngroups = [['a', 'b'],\n['c', 'b']]", DataError, r"mine\.toml:3: 'b' stands in groups 1 and 2"),
        ('keep_untouched = true\n[groups]\na = "b"', DataError, "key 'groups': expected a list of rows .*, got {'a': 'b'}"),
        ('keep_untouched = true\ngroups = [["a", "b"]]\ncolumns = "a, b"', DataError, "key 'columns': expected a list of names, .* got 'a, b'"),
        ('keep_untouched = true\ngroups = [["a", "b"]]\ncolumns = ["a", ""]', DataError, r"key 'columns': expected a list of names, .* got \['a', ''\]"),
        ('keep_untouched = true\ngroups = [["a", "b"]]\ncolumns = ["a", 2]', DataError, "key 'columns': expected a list of names"),
        ('keep_untouched = true\ngroups = [["a", "b"]]\ncolumns = ["x", "x"]', DataError, r"mine\.toml:3: key 'columns' repeats 'x'"),
        ('keep_untouched = true\ngroups = [["a", "b"]]\ncolumns = ["1", "2"]', DataError, r"mine\.toml:3: key 'columns': '1' is a number"),
        ('keep_untouched = true\ngroups = [["a", "b"], ["c", "d", "e"]]\ncolumns = ["x", "y"]', DataError, "expected 3 names, .* got 2: x, y"),
    ],
)
def test_mistakes_are_named(load, text, error, words):
    with pytest.raises(error, match=words) as raised:
        load(text)
    assert "axis file" in str(raised.value) and "mine.toml" in str(raised.value) and "\n" not in str(raised.value)


def test_as_much_as_is_allowed_is_read(load):
    words = [f"c{i}" for i in range(MOST_BARRED)]
    groups = ", ".join(f'["{word}", "d{word}"]' for word in words)
    axis = load(f'keep_untouched = true\ngroups = [["a", "{"x" * LONGEST_WORD}"], {groups}]\n[unless_after]\n' + "".join(f'{word} = ["x{word}"]\n' for word in words))
    assert len(axis.unless_after) == MOST_BARRED and len(axis.groups[0][1]) == LONGEST_WORD


def test_a_letter_without_one_capital_stays_in_capitals():
    axis = Axis("streets", (("stra\u00dfe", "weg"),), True)
    assert [v.text for v in counterfactuals("STRA\u00dfE und STRASSE", axis)] == ["WEG und STRASSE"]


def test_pronouns_may_count_in_some_letter_cases(tmp_path):
    (tmp_path / "small.toml").write_text('keep_untouched = true\npronouns = true\ngroups = [["him", "her"], ["his", "hers"]]\n[only]\nher = ["lower"]\n')
    axis = load_axis(str(tmp_path / "small.toml"))
    assert [v.text for v in counterfactuals("Her friend saw her.", axis)] == ["Her friend saw him."]


@pytest.mark.parametrize("line, words", [
    ('  ["cheap", "poor"],', r"mine\.toml:6: 'poor' stands in groups 1 and 2"),
    ('  ["cheap", "dear"],\n]\n[like]\n"needy" = "broke"\n[only]\n"rich" = ["lower"]\n[unless_after]\n"needy" = ["the"', r"mine\.toml:9: like: 'needy' is to be treated like 'broke'"),
    ('  ["cheap", "dear"],\n]\n[like]\n"needy" = "poor"\n[only]\n"needy" = ["upper"]\n[unless_after]\n"needy" = ["the"', r"mine\.toml:11: only: 'needy': expected a list out of"),
    ('  ["cheap", "dear"],\n]\n[unless_after]\n"poor" = ["Oil"', r"mine\.toml:9: unless_after: 'poor': 'Oil' has a capital letter"),
])
def test_the_line_that_is_named_is_that_of_the_mistake(line, words, tmp_path):
    (tmp_path / "mine.toml").write_text(f'keep_untouched = true\ncolumns = ["rich", "poor"]\n\ngroups = [\n  ["rich", "poor"],\n{line}\n]\n')
    with pytest.raises((DataError, ConfigError), match=words):
        load_axis(str(tmp_path / "mine.toml"))


@pytest.mark.parametrize("changes,words", [
    (dict(groups=()), "key 'groups': expected a list of rows"), (dict(groups=(("rich",),)), "group 1 has the one word 'rich'"),
    (dict(groups=(("Rich", "poor"),)), "group 1: 'Rich' has a capital letter"), (dict(groups=(("rich", "rich"),)), "group 1 repeats 'rich'"),
    (dict(groups=(("rich", "poor"), ("old", "rich"))), "'rich' stands in groups 1 and 2"), (dict(like=(("x", "y"),)), "like: 'x' is to be treated like 'y'"),
    (dict(columns=("a",)), "key 'columns': expected 2 names"), (dict(groups=(("rich", 3),)), "group 1: expected a word in quotes, got 3"),
    (dict(only=(("x", ("lower",)),)), "only: 'x' is in no group"), (dict(unless_after=(("x", ("oil",)),)), "unless_after: 'x' is in no group"),
    (dict(only=3), "key 'only': expected pairs of a word and what is said of it, got 3"), (dict(like=(("q",),)), "key 'like': expected pairs of a word and what is said of it, got (('q',),)"),
    (dict(only=(("rich", 3),)), "only: 'rich': expected a list out of lower, Capital, UPPER, got 3"), (dict(unless_after=(("rich", 3),)), "unless_after: 'rich': expected a list of words, got 3"),
    (dict(columns=3), "key 'columns': expected a list of names, one for each identity, got 3"), (dict(keep_untouched=None), "key 'keep_untouched': expected true or false, got None"),
    (dict(source=3), "key 'source': expected a text, got 3"),
    (dict(groups=(("old", "young"), ("rich", "poor", "middling")), only=(("poor", ("lower", "UPPER")), ("middling", ("Capital",)))), "only: 'rich' counts in no letter case, since its row has others"),
])  # fmt: skip
def test_an_axis_made_by_hand_is_looked_at_too(changes, words):
    with pytest.raises(DataError, match=re.escape(f"axis 'wealth': {words}")):
        Axis(**dict(name="wealth", groups=(("rich", "poor"),), keep_untouched=True) | changes)


@pytest.mark.parametrize("name,words", [("a/b", "expected a name without /"), ("", "expected a text to call the axis by"), (" ", "expected a text to call the axis by"), ("a\nb", "expected printable characters")])
def test_an_axis_made_by_hand_has_a_name_that_a_file_s_may_have(name, words):
    with pytest.raises(DataError, match=re.escape(f"axis {name!r}: key 'name': {words}, got {name!r}")):
        Axis(name, (("rich", "poor"),), True)
    assert counterfactuals("rich", Axis("wealth", (("rich", "poor"),), True))[0].text == "poor"
    with pytest.raises(DataError, match="^axis None: key 'name': expected a text, got None$"):
        Axis(None, (("rich", "poor"),), True)
    for given, got in ((3, "int"), ("", "an empty text"), ("a\0", r"'a\\x00': ")):
        with pytest.raises(DataError, match=f"^names file: expected a path, got {got}"):
            load_axis("gender").with_names(given)
    with pytest.raises(DataError, match="^axis file a\0.toml: expected readable UTF-8 text, got embedded null "):
        load_axis("a\0.toml")


def test_a_digest_is_of_the_words_and_of_what_is_done_with_them():
    axis = Axis("wealth", (("rich", "poor"),), True)
    same = [dataclasses.replace(axis, **change) for change in ({"name": "money"}, {"source": "f"}, {"description": "d"}, {"keep_untouched": False}, {"columns": ("a", "b")})]
    other = [dataclasses.replace(axis, **change) for change in (
        {"groups": (("rich", "needy"),)}, {"pronouns": True}, {"like": (("wealthy", "rich"),)}, {"only": (("rich", ("lower",)),)}, {"unless_after": (("rich", ("oil",)),)})]
    assert {one.digest() for one in same} == {axis.digest()} and len({axis.digest(), *(one.digest() for one in other)}) == 6
