"""Files in, plain data out: what a report is made of, before anything is computed or drawn.

    RUN/    config.toml, versions.json, metrics.jsonl of `upstream` or `downstream`, and what lies beside them:
            evaluation.json, examples.jsonl              `evaluate RUN --json`, `--examples`
            evaluation-base.json, examples-base.jsonl    the same of the base without the module (upstream runs)
            evaluation-NAME.json, examples-NAME.jsonl    of the run on other data, shown apart under NAME
    RESULT/ results.json of a recipe: the figures of many systems and seeds, with the paper's beside them (recipe.py)

Every figure ends up in an `Answered`, one system under one seed at one stage, wherever it came from. All runs that are given together are one `Source`,
since they are there to be compared; a result folder is a `Source` of its own. What is not there is left empty, never made up.
"""

import dataclasses
import json
import shlex
from collections.abc import Iterator
from pathlib import Path

from ..checkpoint import adapter_folders, made_of, read_config, read_header, told_origins
from ..config import Downstream, Evaluate, Upstream
from ..errors import DataError, short
from ..lines import Lines, place
from ..options import flag

SETTINGS = {"upstream": Upstream, "downstream": Downstream}


@dataclasses.dataclass(frozen=True)
class Stretch:
    """One training within a run (a method of two stages has two). steps, validations: (step, figures), in order; kept: the step whose state was kept."""

    steps: list[tuple[int, dict]]
    validations: list[tuple[int, dict]]
    kept: int | None


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """A run folder. modules: (method, axis, configuration) of each in the order attached. final: its last event, {} where it has none. origins: see checkpoint.made_of."""

    folder: Path
    command: str
    config: dict
    versions: dict
    modules: list[tuple[str, str, dict]]
    stretches: list[Stretch]
    final: dict
    origins: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Answered:
    """One system under one seed at one stage, on one task ("" where there is but one). measures: name -> a row of `evaluate --json`; a value may be None.
    examples: the files of `evaluate --examples`; what: (key that equal settings share, for a comparison)."""

    system: str
    seed: int
    stage: str
    task: str
    measures: dict[str, dict]
    examples: Path | None = None
    run: RunFiles | None = None
    seconds: float | None = None
    same: str = ""


@dataclasses.dataclass(frozen=True)
class Source:
    """What one part of a report is about. answered: everything measured; baselines: stage -> the system that the others are compared with.
    facts: (what, value) for people; columns, paper: of a recipe, as results.json has them."""

    kind: str
    title: str
    facts: list[tuple[str, str]]
    commands: list[str]
    versions: list[tuple[str, dict]]
    answered: list[Answered]
    baselines: dict[str, str]
    systems: list[str]
    columns: list[dict] = dataclasses.field(default_factory=list)
    paper: list[dict] = dataclasses.field(default_factory=list)

    def stages(self) -> list[tuple[str, str]]:
        """The (stage, task)s that there are, in order of appearance."""
        return list(dict.fromkeys((a.stage, a.task) for a in self.answered))

    def of(self, stage: str, task: str) -> dict[str, list[Answered]]:
        """system -> its answers over seeds, the systems in the source's order, each by seed."""
        found = {name: sorted((a for a in self.answered if (a.system, a.stage, a.task) == (name, stage, task)), key=lambda a: a.seed) for name in self.systems}
        return {name: answers for name, answers in found.items() if answers}


# ---------------------------------------------------------------- files

def read_json(path: Path):
    """A JSON file. Raises DataError that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected JSON, got {getattr(error, 'strerror', None) or error}") from None


def read_measures(path: Path) -> dict[str, dict]:
    """name -> row, of a file of `evaluate --json`."""
    found = read_json(path)
    return measures_of(found.get("measures") if isinstance(found, dict) else None, str(path))


def read_asked(path: Path) -> tuple[dict, dict]:
    """(the settings of `evaluate`, sha256 of each file that was measured on), of a file of its `--json`; empty where it does not say."""
    found = read_json(path)
    settings, files = (found.get(key) for key in ("settings", "files")) if isinstance(found, dict) else (None, None)
    told = isinstance(settings, dict) and isinstance(files, dict) and isinstance(settings.get("on"), list) and all(isinstance(v, str) for v in (*settings["on"], *files.values()))
    return (settings, files) if told else ({}, {})


def measures_of(rows, where: str) -> dict[str, dict]:
    """name -> row, what is not finite as None. Raises DataError where a row is no measure."""
    found = {}
    if not isinstance(rows, list):
        raise DataError(f"{where}: expected a list of measures, got {short(rows)}")
    for row in rows:
        numbers = {key: row.get(key) for key in ("value", "ideal", "low", "high", "n")} if isinstance(row, dict) else {}
        named = bool(numbers) and isinstance(row.get("name"), str) and isinstance(row.get("unit"), str)
        if not (named and all(n is None or type(n) in (int, float) for n in numbers.values())):
            raise DataError(f"{where}: expected measures with name, value, unit, ideal, low, high and n, got {short(row)}")
        found[row["name"]] = {"name": row["name"], "unit": row["unit"]} | {key: n if is_number(n) else None for key, n in numbers.items()}
    return found


def is_number(value) -> bool:
    """Whether it is one, finite and of a size that can be computed with."""
    return type(value) in (int, float) and abs(value) < 1e300


def rows(path: Path) -> Iterator[tuple[str, dict]]:
    """(place, object) of every line of a jsonl file. Raises DataError on a line that is none."""
    source = Lines(path)
    try:
        for line in source:
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if not isinstance(row, dict):
                    raise DataError(f"{place(path, source.count)}: expected a JSON object, got {line[:40]!r}")
                yield place(path, source.count), row
    finally:
        source.close()


# ---------------------------------------------------------------- a run folder

def read_run(folder: Path) -> RunFiles:
    """Config, versions, modules and training of a run folder. Raises PeftDebiasError that names what does not fit."""
    config = read_config(folder)
    command = config.get("command")
    if command not in SETTINGS:
        raise DataError(f"{folder / 'config.toml'}: expected a run of {' or '.join(SETTINGS)}, got {command!r}")
    for key, kind in (("model", str), ("seed", int)):
        if not isinstance(config.get(key), kind):
            raise DataError(f"{folder / 'config.toml'}: expected {key}, got {config.get(key)!r}")
    versions = read_json(folder / "versions.json") if (folder / "versions.json").exists() else {}
    if not isinstance(versions, dict):
        raise DataError(f"{folder / 'versions.json'}: expected a JSON object, got {short(versions)}")
    origins = told_origins(versions) or made_of(config)
    versions.pop("made_of", None)
    headers = [read_header(one) for one in adapter_folders(folder)]
    stretches, final = read_training(folder / "metrics.jsonl")
    return RunFiles(folder, command, config, versions, [(str(h["method"]), str(h["axis"]), h["config"]) for h in headers], stretches, final, origins)


def read_training(path: Path) -> tuple[list[Stretch], dict]:
    """(the trainings that metrics.jsonl tells of, the final event). Where steps begin again, another training does."""
    stretches, final, last = [], {}, None
    for where, event in rows(path) if path.exists() else ():
        kind, step = event.get("event"), event.get("step")
        if kind in ("step", "validation") and not is_number(step):
            raise DataError(f"{where}: expected an event with a step, got {short(event)}")
        if kind == "final":
            final = event
        elif kind in ("step", "validation"):
            if last is None or step < last:
                stretches.append(Stretch([], [], None))
            last = step
            figures = {k: v for k, v in event.items() if is_number(v) and k != "step"}
            (stretches[-1].steps if kind == "step" else stretches[-1].validations).append((step, figures))
            if event.get("kept") is True:
                stretches[-1] = dataclasses.replace(stretches[-1], kept=step)
    return stretches, final


def _spelled(value) -> str:
    """As options.parse_settings reads it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def command_line(run: RunFiles) -> str:
    """The command that makes the run again."""
    return _typed(run.command, SETTINGS[run.command], run.config)


def evaluate_line(settings: dict) -> str:
    """The command that measures again."""
    return _typed("evaluate", Evaluate, settings)


def _typed(command: str, cls: type, config: dict) -> str:
    """A command with what its configuration says beside the defaults."""
    words, fields = ["peftdebias", command], {f.name.rstrip("_"): f for f in dataclasses.fields(cls)}
    for key, value in config.items():
        field, name = fields.get(key), flag(key)
        default = dataclasses.MISSING if field is None else list(field.default) if isinstance(field.default, tuple) else field.default
        if key in ("command", "overwrite") or value == default:
            continue
        if isinstance(value, dict):
            words += [w for k, v in value.items() for w in (name, f"{k}={','.join(map(_spelled, v if isinstance(v, list) else [v]))}")]
        elif isinstance(value, bool):
            words.append(name if value else name.replace("--", "--no-", 1))
        elif isinstance(value, list):
            words += [name, *map(str, value)] if field is not None and field.metadata["many"] == "words" else [w for v in value for w in (name, str(v))]
        else:
            words += [str(value)] if field is not None and field.metadata["positional"] else [name, str(value)]
    return shlex.join(words)
