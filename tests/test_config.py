"""Settings: every field is a flag with help, the pinned flags are there, a flag wins over the TOML file over the default, and what is wrong is named with its file."""

import argparse
import dataclasses
import itertools
import typing
from pathlib import Path

import numpy
import pytest
import tomli_w

import peftdebias
from peftdebias import cli, config, options, recipe
from peftdebias.axes import load_axis
from peftdebias.config import Augment, Compare, Demo, Downstream, Evaluate, Predict, Upstream
from peftdebias.errors import ConfigError

COMMANDS = [settings for _, settings, _ in cli.COMMANDS.values()]
FIELDS = [(cls, field) for cls in COMMANDS for field in dataclasses.fields(cls)]
UPSTREAM = {"model": "m", "axis": "gender", "corpus": ("c.txt",), "out": "o"}
DOWNSTREAM = {"model": "m", "train": "a", "dev": "b", "text": "t", "label": "l", "out": "o"}

# Issue 2's command line, word for word: others script against it.
PINNED = """
upstream   --model --axis --method --corpus --out --budget --set --steps --batch-size --batch-tokens --lr --seed --adapter --config
downstream --model --adapter --train --dev --test --text --text-pair --label --group --class-weights --epochs --out --config
evaluate   DIR_OR_RUN --adapter --on --json --examples --config
augment    FILE --axis --out --config
predict    RUN FILE --text --out --config
demo       --out --config
"""


def parser_of(command: str) -> argparse.ArgumentParser:
    (commands,) = (a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    return commands.choices[command]


@pytest.mark.parametrize("line", PINNED.strip().splitlines(), ids=lambda line: line.split()[0])
def test_the_pinned_flags_are_there(line):
    command, *names = line.split()
    actions = parser_of(command)._actions
    assert set(names) <= {name for a in actions for name in a.option_strings or (a.metavar,)}


@pytest.mark.parametrize("cls,field", FIELDS, ids=[f"{c.__name__}.{f.name}" for c, f in FIELDS])
def test_every_field_is_a_flag_with_help_and_says_its_default(cls, field):
    (action,) = (a for a in parser_of(cls.__name__.lower())._actions if a.dest == field.name)
    assert (action.option_strings == []) if field.metadata["positional"] else (options.flag(field.name) in action.option_strings)
    assert len(field.metadata["help"]) > 10 and not field.metadata["help"].endswith(".")
    if field.default is dataclasses.MISSING:
        assert action.help.endswith("(required)")
    elif field.default is True:
        assert action.help.endswith(f"(default: --{field.name})") and f"--no-{field.name}" in action.option_strings
    elif isinstance(field.default, (int, float, str)) and field.default is not False:
        assert action.help.endswith(f"(default: {field.default:g})" if isinstance(field.default, float) else f"(default: {field.default})")


def test_help_names_every_measure_and_shows_an_example():
    text = parser_of("evaluate").format_help()
    assert all(name in text for name in config.MEASURES)
    for name in cli.COMMANDS:
        assert f"peftdebias {name}" in parser_of(name).format_help().split("example:")[1]
    assert all(name in cli.parser().format_help() for name in cli.COMMANDS)


def test_measures_and_what_computes_them_have_the_same_names():
    from peftdebias import evaluation

    assert set(config.MEASURES) == set(evaluation.ON)


# ---------------------------------------------------------------- order of force

@pytest.fixture
def toml(tmp_path):
    def write(text: str):
        (tmp_path / "c.toml").write_text(text)
        return str(tmp_path / "c.toml")
    return write


def test_the_papers_schedule_is_the_default():
    """PAPER.md: upstream 10 000 steps, validated every 1000, at 5e-5 (the scripts') or, in a recipe, 1e-5 (the paper's); downstream 10 epochs at 2e-5; batches of 32."""
    defaults = {cls: {f.name: f.default for f in dataclasses.fields(cls)} for cls in (Upstream, Downstream, recipe.Learning, recipe.Task)}
    assert [defaults[cls][key] for cls, key in itertools.product((Upstream, recipe.Learning), ("steps", "valid_every", "lr"))] == [10000, 1000, 5e-5, 10000, 1000, 1e-5]
    assert [defaults[cls][key] for cls, key in itertools.product((Downstream, recipe.Task), ("epochs", "lr", "metric"))] == [10, 2e-5, "accuracy"] * 2
    assert (defaults[Upstream]["valid_share"], defaults[Upstream]["valid_texts"], defaults[Upstream]["attribute_weight"]) == (0.02, 500, 1.0)
    assert all(defaults[cls]["batch_size"] == 32 for cls in (recipe.Learning, recipe.Task)) and Upstream(**UPSTREAM).batch == {"batch_size": 32}
    assert all(d["max_length"] == 256 for d in defaults.values()) and all(defaults[cls]["warmup"] == 0.1 and defaults[cls]["clip"] == 1.0 for cls in (Upstream, Downstream))


def test_a_flag_wins_over_the_file_over_the_default(toml):
    path = toml('model = "from file"\naxis = "race"\ncorpus = ["a.txt", "b.txt"]\nout = "o"\nsteps = 7\nvalid-every = 3\nlr = 1\n[set]\nrank = 2\n')
    found = options.resolve(Upstream, {"config": path, "axis": "gender"})
    assert (found.axis, found.model, found.steps, found.valid_every, found.seed) == ("gender", "from file", 7, 3, 0)
    assert found.lr == 1.0 and type(found.lr) is float  # a whole number serves as a number
    assert found.corpus == ("a.txt", "b.txt") and found.set == {"rank": 2}
    assert options.resolve(Upstream, {"config": path, "set": ["rank=4", "targets=key"]}).set == {"rank": 4, "targets": "key"}
    assert options.resolve(Upstream, {"config": [path], "set": ["alpha=4"]}).set == {"rank": 2, "alpha": 4}  # key by key
    assert options.resolve(Upstream, {"config": path, "method": "prefix", "set": ["length=4"]}).set == {"length": 4}  # the file's are another method's
    assert options.resolve(Upstream, {"config": path, "method": "lora", "set": ["alpha=4"]}).set == {"rank": 2, "alpha": 4}  # the default's, which the file means
    with pytest.raises(ConfigError, match=f"^--config: expected one file, got 2: {path}, {path}$"):
        options.resolve(Upstream, {"config": [path, path]})


@pytest.mark.parametrize("cls,rest,name", [(cls, rest, field.name) for cls, rest in ((Upstream, UPSTREAM), (Downstream, DOWNSTREAM), (config.Compare, {}))
                                           for field in dataclasses.fields(cls) if isinstance(field.default, bool)])
def test_a_flag_turns_off_what_the_file_turns_on(cls, rest, name, toml):
    command, path = cls.__name__.lower(), toml(tomli_w.dumps(rest | {name: True}))
    for typed, expected in (([], True), ([f"--no-{options.flag(name)[2:]}"], False), ([options.flag(name)], True)):
        given = vars(cli.parser().parse_args([command, "--config", path, *typed]))
        assert given.pop("command") == command and getattr(options.resolve(cls, given), name) is expected


def test_one_value_serves_as_a_list_of_one(toml):
    assert options.resolve(Upstream, {"config": toml('model="m"\naxis="a"\ncorpus="c.txt"\nout="o"')}).corpus == ("c.txt",)


@pytest.mark.parametrize("cls,values", [
    (Upstream, UPSTREAM | {"set": {"rank": 2, "targets": ("query", "key")}, "budget": 0.01, "adapter": ("x", "y")}),
    (Upstream, UPSTREAM | {"from_": "male"}), (Downstream, DOWNSTREAM | {"fold": False, "class_weights": "a=1,b=2"}), (Evaluate, {"model": "m", "on": ("perplexity=f",)}),
    (Predict, {"run": "r", "file": "f"}), (Augment, {"axis": "gender", "files": ("a",)}), (Demo, {}),
])  # fmt: skip
def test_what_is_saved_can_be_read_back(cls, values, toml):
    settings = cls(**values)
    saved = tomli_w.dumps({"command": cls.__name__.lower()} | options.as_plain(settings))
    found = options.resolve(cls, {"config": toml(saved)})
    assert options.as_plain(found) == options.as_plain(settings)  # lists for the tuples inside --set
    assert not [name for name in options.as_plain(settings) if name.endswith("_")]


def test_required_values_may_all_come_from_the_file(toml):
    given = vars(cli.parser().parse_args(["evaluate", "--config", toml('model = "m"\non = "perplexity=f"\n')]))
    assert given.pop("command") == "evaluate" and options.resolve(Evaluate, given) == Evaluate(model="m", on=("perplexity=f",))


# ---------------------------------------------------------------- --set

@pytest.mark.parametrize("pairs,expected", [
    (["rank=8"], {"rank": 8}), (["alpha=2.5"], {"alpha": 2.5}), (["targets=query,value"], {"targets": ("query", "value")}), (["a=true"], {"a": True}),
    (["name=x y"], {"name": "x y"}), (["p=a=b"], {"p": "a=b"}), (["q='8'"], {"q": "8"}), (["two-words=1", "b=2"], {"two_words": 1, "b": 2}), (["e="], {"e": ""}),
])  # fmt: skip
def test_settings_of_a_method(pairs, expected):
    assert options.parse_settings(pairs) == expected


def test_settings_of_one_text_keep_commas_and_numbers():
    pairs = ["FT.class-weights=0=1,1=10", "positive=1", "metric='f1'", "sick.epochs=2", "targets=a,b"]
    assert options.parse_settings(pairs, options.texts_of(Downstream)) == {
        "FT.class_weights": "0=1,1=10", "positive": "1", "metric": "f1", "sick.epochs": 2, "targets": ("a", "b")}


@pytest.mark.parametrize("bad", ["rank", "=8", ""])
def test_a_setting_without_key_or_value_is_named(bad):
    with pytest.raises(ConfigError, match=f"--set: expected KEY=VALUE, got '{bad}'"):
        options.parse_settings([bad])


def test_checked_takes_any_dataclass():
    from peftdebias.methods.lora import LoRAConfig

    assert options.checked(LoRAConfig, {"rank": 2, "alpha": 3, "targets": "query"}, "") == {"rank": 2, "alpha": 3.0, "targets": ("query",)}
    for values, words in (({"rank": "x"}, "--set: rank: expected a whole number, got 'x'"), ({"rank": 2.5}, "expected a whole number, got 2.5"),
                          ({"rank": True}, "expected a whole number, got True"), ({"rnak": 2}, "unknown key 'rnak'; expected one of rank, alpha, targets")):
        with pytest.raises(ConfigError, match=words):
            options.checked(LoRAConfig, values, "--set: ")


def test_what_is_none_in_a_table_is_left_out():
    assert options.as_plain(Upstream(model="m", axis="a", corpus=("c",), out="o", set={"k": None, "l1": 2.0}))["set"] == {"l1": 2.0}


# ---------------------------------------------------------------- what is wrong

REST = 'model="m"\naxis="a"\ncorpus="c"\nout="o"\n'


@pytest.mark.parametrize("text,words", [
    (REST + "stepz = 3", "unknown key 'stepz'; expected one of "), (REST + 'steps = "3"', "steps: expected a whole number, got '3'"),
    (REST + "steps = 3.0", "steps: expected a whole number, got 3.0"), (REST + "steps = true", "steps: expected a whole number, got True"),
    ("valid-every = 3\nvalid_every = 4", "valid_every: expected once, got it twice"), ("from = 'a'\nfrom_ = 'b'", "from_: expected once, got it twice"),
    (REST + 'lr = "high"', "lr: expected a number, got 'high'"), (REST + "overwrite = 1", "overwrite: expected true or false, got 1"),
    ("corpus = [1, 2]", r"corpus: expected a list of texts, got \(1, 2\)"), ("corpus = 5", r"corpus: expected a list of texts, got \(5,\)"), ("model = 5", "model: expected a text, got 5"),
    ('set = "rank"', "set: expected a table of options, got 'rank'"), ("set = 3", "set: expected a table of options, got 3"),
    (f'steps = "{"x" * 98}"', "steps: expected a whole number, got 'x{98}'$"), (f'steps = "{"x" * 99}"', "steps: expected a whole number, got str$"),
    ('precision = "fp8"', "precision: expected one of auto, float32, bf16, got 'fp8'"), (REST + f"lr = 1{'0' * 400}", "lr: expected a number, got int$"),
])  # fmt: skip
def test_what_the_file_gets_wrong_is_named_with_the_file(text, words, toml):
    path = toml(text)
    with pytest.raises(ConfigError, match=f"^{path}: {words}"):
        options.resolve(Upstream, {"config": path})


def test_a_file_that_is_no_toml_or_is_not_there(toml, tmp_path):
    with pytest.raises(ConfigError, match=r"--config .*c.toml: expected TOML, got .*line 2"):
        options.resolve(Upstream, {"config": toml("a = 1\nb 2")})
    with pytest.raises(ConfigError, match="no such file"):
        options.resolve(Upstream, {"config": str(tmp_path / "none.toml")})
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        options.resolve(Upstream, {"config": str(tmp_path)})
    with pytest.raises(ConfigError, match="^--config: expected FILE.toml, got an empty text$"):
        options.resolve(Upstream, {"config": ""})
    (tmp_path / "marked.toml").write_text("\ufeff" + REST, encoding="utf-8")  # as some editors save it
    assert options.resolve(Upstream, {"config": str(tmp_path / "marked.toml")}).out == "o"
    (tmp_path / "latin.toml").write_bytes("model = 'é'".encode("latin-1"))
    (tmp_path / "long.toml").write_text(f"steps = {'1' * 5000}")
    (tmp_path / "deep.toml").write_text(f"steps = {'[' * 5000}")
    for name in ("latin", "long", "deep"):
        with pytest.raises(ConfigError, match=f"^--config {tmp_path}/{name}.toml: expected TOML, got "):
            options.resolve(Upstream, {"config": str(tmp_path / f"{name}.toml")})
        with pytest.raises(ConfigError, match=f"^{tmp_path}/{name}.toml: expected TOML, got "):
            recipe.load(str(tmp_path / f"{name}.toml"))
    assert options.parse_settings([f"a={'1' * 5000}", f"b={'[' * 5000}"]) == {"a": "1" * 5000, "b": "[" * 5000}


def test_a_configuration_of_another_command_is_refused(toml):
    with pytest.raises(ConfigError, match="expected the configuration of `downstream`, got one of `upstream`"):
        options.resolve(Downstream, {"config": toml('command = "upstream"\n')})


def test_all_that_is_missing_is_named_as_it_is_typed():
    with pytest.raises(ConfigError, match=r"^missing: --axis, --model, --corpus, --out \(see `peftdebias upstream --help`\)$"):
        options.resolve(Upstream, {})
    with pytest.raises(ConfigError, match="^missing: RUN "):
        options.resolve(Predict, {})


@pytest.mark.parametrize("cls,rest,changes,words", [
    (Upstream, UPSTREAM, {"batch_size": 8, "batch_tokens": 9}, "--batch-size and --batch-tokens: expected one of them, got both"),
    (Upstream, UPSTREAM, {"batch_size": 0}, "--batch-size: expected at least 1, got 0"),
    (Upstream, UPSTREAM, {"batch_tokens": -1}, "--batch-tokens: expected at least 1, got -1"),
    (Upstream, UPSTREAM, {"steps": 0}, "--steps: expected at least 1, got 0"),
    (Upstream, UPSTREAM, {"valid_every": 0}, "--valid-every: expected at least 1"),
    (Upstream, UPSTREAM, {"valid_texts": 0}, "--valid-texts: expected at least 1"),
    (Upstream, UPSTREAM, {"valid_share": 1.0}, "--valid-share: expected a share between 0 and 1"),
    (Upstream, UPSTREAM, {"attribute_weight": 0.5}, "--attribute-weight: expected a number from 1 to 1000, got 0.5"),
    (Upstream, UPSTREAM, {"attribute_weight": float("nan")}, "--attribute-weight: expected a number from 1 to 1000, got nan"),
    (Upstream, UPSTREAM, {"corpus": ()}, "--corpus: expected at least one file, got none"),
    (Upstream, UPSTREAM, {"lr": 0.0}, "--lr: expected more than 0, got 0"),
    (Upstream, UPSTREAM, {"lr": float("nan")}, "--lr: expected more than 0, got nan"),
    (Upstream, UPSTREAM, {"clip": -1.0}, "--clip: expected more than 0"),
    (Upstream, UPSTREAM, {"seed": -1}, "--seed: expected a whole number from 0 to 9223372036854775807, got -1"),
    (Upstream, UPSTREAM, {"weight_decay": -0.1}, "--weight-decay: expected at least 0"),
    (Upstream, UPSTREAM, {"warmup": 1.5}, "--warmup: expected a share from 0 to 1"),
    (Upstream, UPSTREAM, {"max_length": 2}, "--max-length: expected at least 3"),
    (Downstream, DOWNSTREAM, {"epochs": 0}, "--epochs: expected at least 1"),
    (Evaluate, {"model": "m"}, {"samples": 39}, "--samples: expected at least 40, got 39"),
    (Compare, {"files": ("a", "b")}, {"samples": 39}, "--samples: expected at least 40, got 39"),
    (Evaluate, {"model": "m"}, {"model": ""}, "Evaluate: model: expected DIR_OR_RUN, got an empty text"),
    (Upstream, UPSTREAM, {"out": ""}, "Upstream: out: expected RUN, got an empty text"),
    (Upstream, UPSTREAM, {"corpus": ("a.txt", "")}, "Upstream: corpus: expected FILE, got an empty text"),
    (Downstream, DOWNSTREAM, {"group": ""}, "Downstream: group: expected COL, got an empty text"),
    (Downstream, DOWNSTREAM, {"text_pair": ""}, "Downstream: text_pair: expected COL, got an empty text"),
    (Downstream, DOWNSTREAM, {"class_weights": ""}, "Downstream: class_weights: expected A=W,..., got an empty text"),
    (Evaluate, {"model": "m"}, {"positive": ""}, "Evaluate: positive: expected LABEL, got an empty text"),
    (Augment, {"axis": "gender", "files": ("a.txt",)}, {"from_": ""}, "Augment: from: expected COLUMN, got an empty text"),
    (Upstream, UPSTREAM, {"corpus": ("a.txt", "b\0")}, r"Upstream: corpus: expected a path, got 'b\\x00': embedded null byte"),
    (Evaluate, {"model": "m"}, {"seed": -2}, "--seed: expected a whole number from 0"),
    (Upstream, UPSTREAM, {"steps": "3"}, "Upstream: steps: expected a whole number, got '3'"),
    (Upstream, UPSTREAM, {"steps": 2.5}, "Upstream: steps: expected a whole number, got 2.5"),
    (Upstream, UPSTREAM, {"steps": True}, "Upstream: steps: expected a whole number, got True"),
    (Upstream, UPSTREAM, {"steps": None}, "Upstream: steps: expected a whole number, got None"),
    (Upstream, UPSTREAM, {"valid_every": 1.5}, "Upstream: valid_every: expected a whole number, got 1.5"),
    (Upstream, UPSTREAM, {"lr": "1e-3"}, "Upstream: lr: expected a number, got '1e-3'"),
    (Upstream, UPSTREAM, {"corpus": (3,)}, r"Upstream: corpus: expected a list of texts, got \(3,\)"),
    (Upstream, UPSTREAM, {"axis": load_axis("gender")}, "Upstream: axis: expected a text, got Axis$"),
    (Upstream, UPSTREAM, {"set": 3}, "Upstream: set: expected a table of options, got 3"),
    (Upstream, UPSTREAM, {"step": "quick"}, "Upstream: step: expected one of auto, eager, graph, compiled, got 'quick'"),
    (Downstream, DOWNSTREAM, {"epochs": 1.5}, "Downstream: epochs: expected a whole number, got 1.5"),
    (Downstream, DOWNSTREAM, {"label": ["profession"]}, r"Downstream: label: expected a text, got \['profession'\]"),
    (Downstream, DOWNSTREAM, {"fold": "no"}, "Downstream: fold: expected true or false, got 'no'"),
    (Evaluate, {"model": "m"}, {"seed": 2**63}, "--seed: expected a whole number from 0 to .*, got 9223372036854775808"),
    (Upstream, UPSTREAM, {"lr": float("inf")}, "--lr: expected a finite number, got inf"),
    (Upstream, UPSTREAM, {"weight_decay": float("inf")}, "--weight-decay: expected a finite number, got inf"),
    (Predict, {"run": "r"}, {"batch_tokens": 0}, "--batch-tokens: expected at least 1"),
    (Predict, {"run": "r"}, {"max_length": -5}, "--max-length: expected at least 3"),
    (Upstream, UPSTREAM, {"weight_decay": float("nan")}, "--weight-decay: expected at least 0, got nan"),
    (Augment, {"axis": "gender"}, {"threads": 1025}, "--threads: expected at most 1024, got 1025"),
    (Upstream, UPSTREAM, {"workers": 1025}, "--workers: expected at most 1024, got 1025"), (Upstream, UPSTREAM, {"workers": -1}, "--workers: expected at least 0, got -1"),
    (Upstream, UPSTREAM, {"shuffle_buffer": 0}, "--shuffle-buffer: expected at least 1, got 0"), (Upstream, UPSTREAM, {"fresh_head": 0}, "--fresh-head: expected at least 1, got 0"),
    (Downstream, DOWNSTREAM, {"text_pair": "t"}, "--text, --text-pair, --label: expected columns of their own, got t twice"),
    (Evaluate, {"model": "m"}, {"max_pairs": -1}, "--max-pairs: expected at least 0, got -1"), (Evaluate, {"model": "m"}, {"samples": 39}, "--samples: expected at least 40, got 39"),
    (config.Testbed, {}, {"scale": 100.5}, "--scale: expected more than 0, up to 100, got 100.5"),
    (config.Testbed, {}, {"attribute_weight": 1001.0}, "--attribute-weight: expected a number from 1 to 1000"),
    (Augment, {"axis": "gender"}, {"shard": "0/2"}, "--shard: expected I/N with I from 1 to N, got '0/2'"),
    (Augment, {"axis": "gender"}, {"shard": "\u00b9/2"}, "--shard: expected I/N with I from 1 to N, got '\u00b9/2'"),
    (config.Report, {"paths": ("r",)}, {"examples": -1}, "--examples: expected at least 0, got -1"),
    (Demo, {}, {"strength": 1.2}, "--strength: expected a strength from 0 to 1, got 1.2"),
    (Demo, {}, {"label_strength": -1.0}, "--label-strength: expected a strength"),
])  # fmt: skip
def test_values_that_make_no_sense_are_named_by_their_flag(cls, rest, changes, words):
    with pytest.raises(ConfigError, match=words):
        cls(**rest | changes)
    assert cls(**rest)  # the rest was fine


@pytest.mark.parametrize("cls,rest,values", [
    (Upstream, UPSTREAM, {"warmup": 1.0, "workers": 1024, "attribute_weight": 1000.0, "seed": 2**63 - 1, "shuffle_buffer": 1, "max_length": 3, "fresh_head": 1}),
    (Upstream, UPSTREAM, {"warmup": 0.0, "workers": 0, "attribute_weight": 1.0, "seed": 0, "max_variants": 1}), (Downstream, DOWNSTREAM, {"epochs": 1, "text_pair": "u"}),
    (Augment, {"axis": "gender"}, {"threads": 1024, "shard": "3/3"}), (Evaluate, {"model": "m"}, {"samples": 40, "max_pairs": 0}), (Compare, {}, {"samples": 40}),
    (config.Testbed, {}, {"scale": 100.0, "text_strengths": ("0", "1")}), (Demo, {}, {"strength": 1.0, "label_strength": 0.0}),
])  # fmt: skip
def test_the_ends_of_what_is_allowed_are_allowed(cls, rest, values):
    made = cls(**rest | values)
    assert {name: getattr(made, name) for name in values} == values


def test_batches_are_32_texts_unless_asked_otherwise():
    assert Upstream(**UPSTREAM).batch == {"batch_size": 32}
    assert Upstream(**UPSTREAM, batch_size=4).batch == {"batch_size": 4}
    assert Upstream(**UPSTREAM, batch_tokens=99).batch == {"batch_tokens": 99}


def test_annotations_are_ones_that_checked_understands():
    for cls in COMMANDS:
        assert {options._plain(hint) for hint in typing.get_type_hints(cls).values()} <= set(options.KINDS)


def test_values_of_python_are_made_what_the_fields_say():
    made = Upstream(**UPSTREAM | {"model": Path("m"), "corpus": Path("a.txt"), "out": Path("o"), "cache": Path("c"), "set": ("rank=4",), "steps": numpy.int64(3), "lr": 1, "valid": [Path("v")]})
    assert (made.model, made.corpus, made.out, made.cache, made.set, made.steps, made.lr, made.valid) == ("m", ("a.txt",), "o", "c", {"rank": 4}, 3, 1.0, ("v",))
    assert type(made.steps) is int and type(made.lr) is float and Downstream(**DOWNSTREAM | {"adapter": "runs/gender"}).adapter == ("runs/gender",)
    assert type(dataclasses.replace(made, set={"rank": numpy.int64(3)}).set["rank"]) is int
    assert dataclasses.replace(made, lr=2).lr == 2.0 and made == Upstream(**dataclasses.asdict(made))


@pytest.mark.parametrize("name,cls", [("upstream", Upstream), ("downstream", Downstream), ("evaluate", Evaluate), ("predict", Predict), ("run", config.Run), ("compare", config.Compare)])
def test_a_command_of_python_takes_its_own_settings_alone(name, cls):
    for given in (None, {"model": "m"}, Demo()):
        with pytest.raises(ConfigError, match=rf"^{name}: expected its settings, peftdebias.config.{cls.__name__}\(...\), got {type(given).__name__}$"):
            getattr(peftdebias, name)(given)
