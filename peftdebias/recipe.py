"""A recipe: what one row of the paper's tables needs, as a TOML file; here it is read and checked, nothing is run (runner.py does).

    title, axis, seeds, base        base: what the untrained base is called in the table of the masked-LM
    [upstream]                      the text (a prepare.Source, or train_of = the name of a task), the schedule, measures of the masked-LM
    [[task]]                        name, stage (downstream, or transfer: a task whose text the modules have not seen), sources train, dev, test,
                                    the schedule, measures of the classifier
    [[system]]                      name, method (none: plain fine-tuning), budget or set; the paper's six where there is no [[system]]
    [[column]]                      of the table at the end: stage, task, title, measure, and the paper's own figure of each system

A measure is an entry of `evaluate --on`: NAME=FILE with a file of the data folder, or NAME alone, which is measured on the task's test split.
"""

import contextlib
import dataclasses
import math
import re
import tomllib
from pathlib import Path

from . import methods, prepare
from .config import LEAST, METRICS
from .errors import ConfigError, DataError
from .options import KINDS, at_least, checked
from .prepare import Source

STAGES = ("downstream", "transfer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class System:
    """name: of its row in the tables. method: None trains no module. upstream, downstream: settings of its own in either phase."""

    name: str
    method: str | None = None
    budget: float | None = None
    set: dict | None = None
    upstream: dict | None = None
    downstream: dict | None = None


SYSTEMS = (System(name="FT"), System(name="Full-Debias", method="full"), System(name="Adapter", method="adapter", budget=0.01),
           System(name="Prompt", method="prefix", budget=0.01), System(name="LoRA", method="lora", budget=0.01), System(name="SFT", method="sparse", budget=0.01))
"""The paper's six. Its "Prompt" is the flat prefix; every module has about 1 % of the base's parameters."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learning:
    """[upstream]: schedule and measures. train_of: the task whose training split is the text; None where the table names a file."""

    steps: int = 10000
    valid_every: int = 1000
    lr: float = 1e-5
    batch_size: int = 32
    max_length: int = 256
    train_of: str | None = None
    measures: tuple[str, ...] = ()

    def __post_init__(self):
        at_least(1, self, "steps", "valid_every", called=str)
        _check_schedule(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """[[task]] without its sources. measures_without_examples: whose scores by example are not kept (77 000 templates, say)."""

    name: str
    stage: str = "downstream"
    dev_share: float = 0.1
    positive: str | None = None
    class_weights: str | None = None
    metric: str = dataclasses.field(default="accuracy", metadata={"choices": METRICS})
    epochs: int = 10
    lr: float = 2e-5
    batch_size: int = 32
    max_length: int = 256
    measures: tuple[str, ...] = ("classification",)
    measures_without_examples: tuple[str, ...] = ()
    terms: str | None = None
    neutral: str | None = None
    max_pairs: int = 20000

    def __post_init__(self):
        at_least(1, self, "epochs", called=str)
        at_least(0, self, "max_pairs", called=str)
        _check_schedule(self)
        if not 0 < self.dev_share < 1:
            raise ConfigError(f"dev_share: expected more than 0 and less than 1, got {self.dev_share}")

    @property
    def entries(self) -> tuple[str, ...]:
        """All of its measures."""
        return *self.measures, *self.measures_without_examples


def _check_schedule(part: Learning | Task) -> None:
    at_least(1, part, "batch_size", called=str)
    at_least(LEAST, part, "max_length", called=str)
    if not 0 < part.lr < math.inf:
        raise ConfigError(f"lr: expected a finite number above 0, got {part.lr}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the table. task: None is the only task of that stage. paper: system -> the paper's figure."""

    stage: str
    title: str
    measure: str
    task: str | None = None
    paper: dict | None = None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """sources: "upstream" -> its text, or None with train_of; (task, split) -> Source."""

    path: str
    title: str
    axis: str
    seeds: int
    base: str
    systems: tuple[System, ...]
    upstream: Learning
    text: Source | None
    tasks: tuple[Task, ...]
    sources: dict[tuple[str, str], Source]
    columns: tuple[Column, ...]

    @property
    def name(self) -> str:
        return Path(self.path).stem


def unit_name(task: str | None, system: str) -> str:
    """What a system's files are called after, in the upstream phase (task None) or on a task, before the seed."""
    return f"{'upstream' if task is None else task}-{system.lower().replace(' ', '-')}"


def what_decides(told: dict | None, data: Path) -> dict | None:
    """A recipe with its sources, as OUT/recipe.json keeps it, without keys that recipes had once, and with the file in the folder `data` that a source means in place of the names under
    which it is looked for."""
    def of(kind: type, table):
        if not isinstance(table, dict):
            return table
        known = {field.name: table[field.name] for field in dataclasses.fields(kind) if field.name in table}
        with contextlib.suppress(DataError, KeyError, TypeError):  # not there, of a kind without a file, or no names
            known["file"] = str(prepare.find(known["file"], data))
        return known

    if not isinstance(told, dict):
        return told
    found = told | {key: of(kind, told.get(key)) for key, kind in (("upstream", Learning), ("text", Source))}
    for key in ("path", "seeds"):  # how the file is called, and how many seeds, which --seeds may change too: no unit is another one by them
        found.pop(key, None)
    if isinstance(told.get("tasks"), list):
        found["tasks"] = [of(Task, task) for task in told["tasks"]]
    if isinstance(told.get("sources"), dict):
        found["sources"] = {key: of(Source, source) for key, source in told["sources"].items()}
    return found


def differing(before: dict | None, now: dict) -> str:
    """" (tasks differ)", say: what of two recipes as `what_decides` gives them is not the same; "" where that cannot be told."""
    parts = [key for key in now if before.get(key) != now[key]] if isinstance(before, dict) else []
    return f" ({', '.join(parts)} differ{'s' if len(parts) == 1 else ''})" if parts else ""


def find(name: str) -> Path:
    """The recipe file called `name`, or the shipped one. Raises ConfigError that lists those."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = {p.stem: p for p in sorted(_shipped().glob("*.toml"))}
    if name in shipped:
        return shipped[name]
    raise ConfigError(f"{name}: expected a recipe file or one of {', '.join(shipped)}, found none")


def _shipped() -> Path:
    import importlib.util

    spec = importlib.util.find_spec("peftdebias.recipes")
    return Path(spec.origin).parent


def load(name: str) -> Recipe:
    """Read and check a recipe. Raises ConfigError that names the file and the key."""
    path = find(name)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no TOML, or an integer of thousands of digits
        raise ConfigError(f"{path}: expected TOML, got {error}") from None
    return _Reader(str(path)).recipe(table)


class _Reader:
    def __init__(self, path: str):
        self.path = path

    def fail(self, message: str):
        raise ConfigError(f"{self.path}: {message}")

    def table(self, cls: type, values, where: str):
        """An instance of `cls` from a table of the file."""
        if not isinstance(values, dict):
            self.fail(f"{where}: expected a table, got {values!r}")
        ready = checked(cls, values, f"{self.path}: {where}: ")
        for field in dataclasses.fields(cls):
            if field.default is dataclasses.MISSING and field.name not in ready:
                self.fail(f"{where}: missing: {field.name}")
            if "" in (value if isinstance(value := ready.get(field.name), tuple) else (value,)):
                self.fail(f"{where}: {field.name}: expected a text, got an empty one")
        try:
            return cls(**ready)
        except ConfigError as error:
            self.fail(f"{where}: {error}")

    def tables(self, table: dict, key: str) -> list:
        found = table.pop(key, [])
        if not isinstance(found, list):
            self.fail(f"{key}: expected [[{key}]] tables, got {found!r}")
        return found

    def recipe(self, table: dict) -> Recipe:
        systems = tuple(self.table(System, one, "[[system]]") for one in self.tables(table, "system")) or SYSTEMS
        columns = tuple(self.table(Column, one, "[[column]]") for one in self.tables(table, "column"))
        tasks, sources = [], {}
        for values in self.tables(table, "task"):
            if not isinstance(values, dict):
                self.fail(f"[[task]]: expected a table, got {values!r}")
            values = dict(values)
            name = str(values.get("name", "?"))
            for split in ("train", "dev", "test"):
                if split in values:
                    sources[name, split] = self.table(Source, values.pop(split), f"[[task]] {name}, {split}")
            tasks.append(self.table(Task, values, f"[[task]] {name}"))
        upstream, text = self.upstream(table.pop("upstream", None))
        plain = {key: table.pop(key, default) for key, default in (("title", None), ("axis", None), ("seeds", 3), ("base", "BERT"))}
        if table:
            self.fail(f"unknown key {next(iter(table))!r}; expected title, axis, seeds, base, [upstream], [[task]], [[system]], [[column]]")
        for key, kind in (("title", str), ("axis", str), ("base", str), ("seeds", int)):
            if not isinstance(plain[key], kind) or isinstance(plain[key], bool):
                self.fail(f"{key}: expected {KINDS[kind]}, got {plain[key]!r}")
        if plain["seeds"] < 1:
            self.fail(f"seeds: expected at least 1, got {plain['seeds']}")
        found = Recipe(self.path, **plain, systems=systems, upstream=upstream, text=text, tasks=tuple(tasks), sources=sources, columns=columns)
        self.check(found)
        return found

    def upstream(self, values) -> tuple[Learning, Source | None]:
        if not isinstance(values, dict):
            self.fail("expected a table [upstream], found none")
        keys = {f.name for f in dataclasses.fields(Source)}
        own = {key: value for key, value in values.items() if key in keys}
        learning = self.table(Learning, {key: value for key, value in values.items() if key not in keys}, "[upstream]")
        if (learning.train_of is None) == (not own):
            self.fail("[upstream]: expected either file or train_of")
        return learning, self.table(Source, own, "[upstream]") if own else None

    def check_names(self, recipe: Recipe) -> None:
        """Files, flags and tables tell systems and tasks by their names alone."""
        tasks, systems = [task.name for task in recipe.tasks], [system.name for system in recipe.systems]
        for name in (*tasks, *systems):
            if not re.fullmatch(r"\w[\w .+()-]*", name):
                self.fail(f"name: expected letters, digits, spaces and . _ + ( ) -, a letter or digit first, got {name!r}")
        for told in ([*tasks, *systems, recipe.base, "upstream"], [unit_name(task, system) for task in (None, *tasks) for system in systems]):
            seen: dict[str, str] = {}
            for name in told:
                key = re.sub("[ _]", "-", name.lower())
                if key in seen:
                    self.fail(f"name: expected systems, tasks, the base and upstream to have names that tell them apart, also as task-system, got {seen[key]!r} and {name!r}")
                seen[key] = name

    def check(self, recipe: Recipe) -> None:
        names = [task.name for task in recipe.tasks]
        for what, found in (("[[task]]", names), ("[[system]]", [s.name for s in recipe.systems])):
            if len(set(found)) < len(found) or not found:
                self.fail(f"{what}: expected one or more, each with a name of its own, got {', '.join(found) or 'none'}")
        self.check_names(recipe)
        for task in recipe.tasks:
            if task.stage not in STAGES:
                self.fail(f"[[task]] {task.name}: stage: expected one of {', '.join(STAGES)}, got {task.stage!r}")
            for split in ("train", "test"):
                source = recipe.sources.get((task.name, split))
                if source is None or source.label is None:
                    self.fail(f"[[task]] {task.name}: expected a source `{split}` with a label")
        if recipe.upstream.train_of is not None and recipe.upstream.train_of not in names:
            self.fail(f"[upstream]: train_of: expected one of {', '.join(names)}, got {recipe.upstream.train_of!r}")
        for system in recipe.systems:
            if system.method is not None:
                try:
                    methods.method_class(system.method)
                except ConfigError as error:
                    self.fail(f"[[system]] {system.name}: {error}")
        for column in recipe.columns:
            if column.stage not in ("upstream", *STAGES):
                self.fail(f"[[column]] {column.title}: stage: expected one of upstream, {', '.join(STAGES)}, got {column.stage!r}")
            own = [task.name for task in recipe.tasks if task.stage == column.stage]
            if column.task not in (own if len(own) > 1 else [None, *own]):  # the one that is meant is told, or the only one
                self.fail(f"[[column]] {column.title}: task: expected {'one of ' + ', '.join(own) if own else 'none in this stage'}, got {column.task or 'none'!r}")
            for name, value in (column.paper or {}).items():
                if type(value) not in (int, float) or not abs(value) < 1e300 or name not in (recipe.base, *(s.name for s in recipe.systems)):
                    self.fail(f"[[column]] {column.title}: paper: expected a number for each of {recipe.base}, {', '.join(s.name for s in recipe.systems)}, got {name} = {value!r}")
