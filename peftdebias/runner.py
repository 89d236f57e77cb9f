"""Run a recipe: `run`, for the command line and the Python API. All systems, seeds, phases and measures, taken up again where it was stopped.

    OUT/recipe.json      what was asked for; another recipe, scale or model is refused there, as are other files than those of OUT/read.json
    OUT/data/            the prepared splits                       OUT/runs/UNIT/       run folders
    OUT/rows/UNIT.json   measures of a unit that is done           OUT/examples/UNIT.jsonl
    OUT/results.json     all of it, for `report`                   OUT/results.md       the paper's table beside the paper's own numbers

A unit is a phase of one system under one seed with its measures. What it adds over phases.py: which runs, in which order. It names no method.
"""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from . import checkpoint, evaluation, extrinsic, methods, phases, prepare, recipe as recipes, weights
from .augment import prepared
from .axes import load_axis
from .config import Downstream, Evaluate, Run, Upstream
from .errors import ConfigError, DataError, PeftDebiasError
from .files import read_object
from .labelled import read_labelled
from .metrics import bare_of_system, nli
from .options import build, checked, expect, parse_settings, texts_of
from .outputs import alone, claiming, digest, tables, vacant, write_text
from .prepare import Splits
from .recipe import Column, Recipe, System, Task
from .recipe_table import figures, markdown
from .training import pick_device

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Unit:
    """task: None is the upstream phase."""

    system: System
    task: Task | None
    seed: int

    @property
    def stage(self) -> str:
        return "upstream" if self.task is None else self.task.stage

    @property
    def place(self) -> tuple[str, str | None]:
        """(stage, task), as a [[column]] says whose it is."""
        return self.stage, None if self.task is None else self.task.name

    @property
    def name(self) -> str:
        return f"{recipes.unit_name(None if self.task is None else self.task.name, self.system.name)}-{self.seed}"


@dataclasses.dataclass
class Results:
    """table: results.json. markdown: results.md. out: the folder."""

    table: dict
    markdown: str
    out: Path


def run(settings: Run, say: Say = lambda line: None) -> Results:
    """Does what is left of the recipe and writes the table. Raises PeftDebiasError on bad input; what was done before stays."""
    expect(Run, settings)
    recipe = recipes.load(settings.recipe)
    runner = _Runner(recipe, settings, say)
    with alone(runner.out / "recipe.json", f"--out {runner.out}"):
        return _run(runner)


def _run(runner: "_Runner") -> Results:
    recipe, settings, say, units, looked = runner.recipe, runner.settings, runner.say, runner.units(), set()
    say(f"{recipe.title}: {len(units)} units, {len(runner.rows(units))} of them done before; scale {settings.scale:g}")
    try:
        runner.prepare([unit for unit in units if not runner.row(unit).exists()])
        for number, unit in enumerate(units, 1):
            if runner.row(unit).exists():
                continue
            began = time.perf_counter()
            try:
                runner.do(unit)
            except PeftDebiasError as error:
                raise type(error)(f"{unit.name}: {error}") from None
            say(f"{number} of {len(units)}: {unit.name}, {time.perf_counter() - began:.0f} s")
            table = runner.write(units)
            if unit.place not in looked:  # early: a recipe may name other measures for its table at any time
                looked.add(unit.place)
                for line in _empty(table, [column for column in table["columns"] if (column["stage"], column["task"]) in (unit.place, (unit.stage, None))], " so far"):
                    say(line)
    except KeyboardInterrupt:
        say(f"{runner.out}: what is done is kept; the same command goes on from there")
        raise
    except BaseException:
        runner.give_back()
        raise
    table = runner.write(units)
    for line in _empty(table, table["columns"]):
        say(line)
    return Results(table, (runner.out / "results.md").read_text(encoding="utf-8"), runner.out)


def _empty(table: dict, columns: list[dict], when: str = "") -> list[str]:
    """A line for each of these columns whose measure no unit has, with the measures there are that begin alike."""
    lines = []
    for column in columns:
        if not any(figures(table, column, system) for system in table["systems"]):
            there = [m["name"] for row in table["rows"] if row["stage"] == column["stage"] and column["task"] in (None, row["task"]) for m in row["measures"]]
            if column["measure"] in there:
                lines.append(f"[[column]] {column['title']}: {column['measure']} could be computed for no unit{when}")
                continue
            alike = list(dict.fromkeys(name for name in there if _begin(name) == _begin(column["measure"])))
            expected = f"; expected {', '.join(alike[:8])}{', ...' if len(alike) > 8 else ''}" if alike else ""
            lines.append(f"[[column]] {column['title']}: no unit has {column['measure']}{when}{expected}")
    return lines


DECIDED = {"upstream": ("seed", "out", "model", "adapter", "corpus", "column", "method"),
           "downstream": ("seed", "out", "model", "adapter", "train", "dev", "test", "text", "text_pair", "label", "group")}
"""Settings of a phase that follow from the recipe, the system and the seed: what is measured, and under which name, goes by them."""


def _free(phase: str, settings: dict, where: str) -> dict:
    """The settings themselves. Raises ConfigError on one of DECIDED."""
    if decided := next((name for name in settings if name in DECIDED[phase]), None):
        raise ConfigError(f"{where}: expected a setting that a recipe leaves free, got {decided}, which follows from its data, systems and seeds")
    return settings


def _begin(measure: str) -> str:
    """How a measure's name begins, whichever system and file it is of: an entry of evaluation.GIVES."""
    return bare_of_system(measure).split("/")[0]


def _whole_path(path: str | Path) -> str:
    """The same from whatever folder it is asked for; a link stays one."""
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


class _Runner:
    def __init__(self, recipe: Recipe, settings: Run, say: Say):
        self.recipe, self.settings, self.say, self.out, self.data = recipe, settings, say, Path(settings.out), Path(settings.data)
        self.whole: set[Path] = set()  # prepared files
        if not self.data.is_dir():
            raise ConfigError(f"--data {self.data}: expected a folder, found none")
        self.systems = self._chosen()
        self.overrides = {phase: self._overrides(phase, getattr(settings, phase)) for phase in ("upstream", "downstream")}
        self._check_measures()
        self._claim()
        for folder in ("data", "runs", "rows", "examples"):
            (self.out / folder).mkdir(exist_ok=True)

    # ---- what is asked for

    def _chosen(self) -> tuple[System, ...]:
        names = {system.name.lower(): system for system in self.recipe.systems}
        for name in self.settings.systems:
            if name.lower() not in names:
                raise ConfigError(f"--systems {name}: expected one of {', '.join(s.name for s in self.recipe.systems)}")
        wanted = {name.lower() for name in self.settings.systems} or set(names)
        return tuple(system for name, system in names.items() if name in wanted)

    def _overrides(self, phase: str, entries: tuple[str, ...]) -> dict[str, dict]:
        """{system or, downstream, task ("" for all): {field: value}} of --upstream or --downstream."""
        cls, found = {"upstream": Upstream, "downstream": Downstream}[phase], {}
        names = [system.name for system in self.recipe.systems] + [task.name for task in self.recipe.tasks if phase == "downstream"]
        known = {name.lower().replace("-", "_"): name for name in names}
        for key, value in parse_settings(list(entries), texts_of(cls), f"--{phase}").items():
            owner, _, field = key.rpartition(".")
            if owner and owner.lower() not in known:
                raise ConfigError(f"--{phase} {key}: expected NAME.KEY=VALUE with NAME one of {', '.join(names)}")
            found.setdefault(known.get(owner.lower(), ""), {}).update(_free(phase, checked(cls, {field: value}, f"--{phase} {key}: "), f"--{phase} {key}"))
        return found

    def _check_measures(self) -> None:
        """Everything that the recipe reads is there before anything is trained."""
        for entry in self.recipe.upstream.measures:
            self._on(entry, None)
        for task in self.recipe.tasks:
            for entry in task.entries:
                name, _, path = self._on(entry, Path("test")).partition("=")
                if name == "bias-nli":
                    nli.read_pairs(path)
        self._named()
        for column in self.recipe.columns:
            self._check_column(column)

    def _named(self) -> list[Path]:
        """Where in the data folder everything lies that the recipe names. Raises DataError on what is not there."""
        found = [prepare.find(source.file, self.data) for source in (self.recipe.text, *self.recipe.sources.values()) if source is not None]
        entries = [*self.recipe.upstream.measures, *(entry for task in self.recipe.tasks for entry in task.entries)]
        found += [Path(self._on(entry, None).partition("=")[2]) for entry in entries if "=" in entry]
        return found + [prepare.find((task.terms,), self.data) for task in self.recipe.tasks if task.terms]

    def _check_column(self, column: Column) -> None:
        tasks = [task for task in self.recipe.tasks if task.stage == column.stage and column.task in (None, task.name)]
        entries = self.recipe.upstream.measures if column.stage == "upstream" else [entry for task in tasks for entry in task.entries]
        first = [begin for entry in entries for begin in evaluation.GIVES[entry.partition("=")[0]]]
        if _begin(column.measure) not in first:
            raise ConfigError(f"{self.recipe.path}: [[column]] {column.title}: measure: expected {', '.join(dict.fromkeys(first)) or 'none'} or what begins so, which are "
                              f"measured there, got {column.measure!r}")

    def prepare(self, units: list[Unit]) -> None:
        """Everything that these units read, before the first of them trains, and whether the labels tell what is asked of them."""
        if not units:
            return
        load_axis(self.recipe.axis)
        self._same_files()
        pick_device(self.settings.device)
        encoder = weights.read_config(weights.find_folder(self.settings.model))[0]
        for unit in {unit.system.name: unit for unit in units if unit.task is None and unit.system.method is not None}.values():
            settings = self._upstream_settings(unit)
            prepared(settings)
            try:
                methods.check(settings.method, encoder, budget=settings.budget, options=settings.set, max_length=settings.max_length)
            except ConfigError as error:
                raise ConfigError(f"{self.recipe.path}: [[system]] {unit.system.name}: {error}") from None
        seen = set()
        for unit in units:
            if unit.task is not None:
                settings = self._downstream_settings(unit)
                same = repr(dataclasses.replace(settings, model="base", adapter=(), out="run", seed=0))
                if same not in seen:
                    self._check_labels(unit.task, settings)
                seen.add(same)

    def _same_files(self) -> None:
        """Notes the sha256 of the files that are read, the model's, of the data folder what is named, and the user's axes and first names, or sees that they are what they were,
        from whatever folder the command is given."""
        model = sorted(path for path in weights.find_folder(self.settings.model).iterdir() if path.suffix in (".json", ".txt", ".safetensors", ".bin"))
        tables = [*self._tables(), *self._terms_beside()]
        called = {_whole_path(path): path for path in [*self._named(), *model, *tables]}
        now = {whole: digest(path) for whole, path in called.items()}
        path = self.out / "read.json"  # not recipe.json, which is locked as the file that it is
        noted = {_whole_path(name): value for name, value in read_object(path, ConfigError).items()} if path.exists() else {}
        before = {whole: now[whole] for whole in map(_whole_path, tables)} | noted if path.exists() else now  # an earlier version noted none of these
        if changed := next((name for name in (*now, *before) if now.get(name) != before.get(name)), None):
            raise ConfigError(f"--out {self.out}: holds results with another {called.get(changed, changed)} than there is now; expected the same as before or another folder")
        if before.keys() != noted.keys():
            write_text(path, json.dumps(now, indent=2) + "\n")

    def _terms_beside(self) -> list[Path]:
        """The identity terms that templates come with, where the recipe names no others."""
        templates = [self._on(entry, None).partition("=")[2] for task in self.recipe.tasks if not task.terms for entry in task.entries if entry.startswith("iptts=")]
        return [terms for path in templates if (terms := extrinsic.terms_beside(path))]

    def _tables(self) -> list[Path]:
        """Axes and tables of first names that are files of the user's."""
        asked = [{"axis": self.recipe.axis}, *(self._own(Upstream, system, "upstream") for system in self.recipe.systems), *self.overrides["upstream"].values()]
        return [Path(name) for one in asked for name in tables(one.get("axis"), one.get("names")) if os.path.isfile(name)]

    def _check_labels(self, task: Task, settings: Downstream) -> None:
        try:
            read = read_labelled(settings)
            for entry in task.entries:
                name, _, path = self._on(entry, Path(settings.test)).partition("=")
                extrinsic.check_asked(name, path, read.labels, positive=read.positive, terms=task.terms, neutral=task.neutral)
        except PeftDebiasError as error:
            said = str(error)
            for name in ("train", "dev", "test"):  # by the file that is the user's, not the one made of it
                source = self.recipe.sources.get((task.name, name)) or self.recipe.sources[task.name, "train"]
                said = said.replace(getattr(settings, name), str(prepare.find(source.file, self.data)))
            raise type(error)(f"{self.recipe.path}: [[task]] {task.name}: {said}") from None

    def _on(self, entry: str, test: Path | None) -> str:
        """A measure of the recipe as `--on` takes it."""
        name, equals, file = entry.partition("=")
        if name not in evaluation.ON:
            raise ConfigError(f"{self.recipe.path}: measure {entry}: expected one of {', '.join(evaluation.ON)}, got {name!r}")
        if not equals and test is None:
            raise ConfigError(f"{self.recipe.path}: [upstream] measure {entry}: expected {name}=FILE")
        if equals and not file:
            raise ConfigError(f"{self.recipe.path}: measure {entry}: expected {name}=FILE, got no file")
        return f"{name}={prepare.find((file,), self.data) if equals else test}"

    def _claim(self) -> None:
        """Makes OUT, or sees that it holds the same recipe; what its table shows may change."""
        model = os.path.realpath(self.settings.model) if os.path.exists(self.settings.model) else self.settings.model  # a name of the hub is one in every folder
        asked = {"recipe": dataclasses.asdict(dataclasses.replace(self.recipe, path=self.recipe.name, title="", columns=(), sources={})) | {
                     "sources": {"/".join(key): dataclasses.asdict(source) for key, source in self.recipe.sources.items()}},
                 "scale": self.settings.scale, "model": model, "data": os.path.realpath(self.data),
                 "upstream": self.overrides["upstream"], "downstream": self.overrides["downstream"]}
        asked = json.loads(json.dumps(asked))
        path = self.out / "recipe.json"
        self.made, self.claimed = not self.out.exists(), not path.exists()
        if path.exists():
            there = read_object(path, ConfigError)
            for key in asked:
                before, now = (recipes.what_decides(one.get(key), self.data) if key == "recipe" else one.get(key) for one in (there, asked))
                if before != now and not (key == "model" and before == os.path.realpath(self.settings.model)):  # what an earlier version made of a name of the hub
                    what = f"another recipe{recipes.differing(before, now)}" if key == "recipe" else f"{key} {there.get(key)}"
                    raise ConfigError(f"--out {self.out}: holds results with {what}; expected the same as before or another folder")
        elif self.out.exists() and not vacant(self.out):
            raise ConfigError(f"--out {self.out}: exists and holds no results of a recipe; expected a new folder")
        else:
            with claiming(self.out):
                write_text(path, json.dumps(asked, indent=2) + "\n")

    def give_back(self) -> None:
        """Leaves nothing behind where nothing was done; a folder that was claimed before stays."""
        if self.claimed and not any(any((self.out / folder).iterdir()) for folder in ("rows", "runs")):
            for path in self.out.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if self.made:
                self.out.rmdir()

    def units(self) -> list[Unit]:
        """In the order in which they are done: seed by seed, so that a table half done is fair to all systems. The base itself has no seeds upstream."""
        found = []
        for seed in range(self.settings.seeds or self.recipe.seeds):
            for system in self.systems:
                if system.method is not None or seed == 0:
                    found.append(Unit(system, None, seed))
                found += [Unit(system, task, seed) for task in self.recipe.tasks]
        return found

    # ---- where things lie

    def rows(self, units: list[Unit]) -> list[dict]:
        """Those of the units that are done. Raises DataError on a file that is not whole; without it its unit is done again."""
        return [read_object(self.row(unit), DataError) for unit in units if self.row(unit).exists()]

    def row(self, unit: Unit) -> Path:
        return self.out / "rows" / f"{unit.name}.json"

    def run_of(self, unit: Unit) -> Path:
        return self.out / "runs" / unit.name

    def start(self, unit: Unit) -> tuple[str, tuple[str, ...]]:
        """(base, modules) that a unit's system brings after the upstream phase."""
        learnt = str(self.run_of(Unit(unit.system, None, unit.seed)))
        if unit.system.method is None:
            return self.settings.model, ()
        return (learnt, ()) if methods.method_class(unit.system.method).trains_base else (self.settings.model, (learnt,))

    # ---- the work

    def do(self, unit: Unit) -> None:
        began = time.perf_counter()
        if unit.task is None:
            self._upstream(unit)
        else:
            self._downstream(unit)
        trained = self.run_of(unit) if self.run_of(unit).exists() else None
        measures, examples = self._measure(unit)
        row = {"system": self._label(unit), "seed": unit.seed, "stage": unit.stage, "task": None if unit.task is None else unit.task.name,
               "run": trained and str(trained.relative_to(self.out)), "measures": measures, "examples": examples and str(examples.relative_to(self.out)),
               "seconds": round(time.perf_counter() - began, 1), "versions": checkpoint.versions(pick_device(self.settings.device))}
        write_text(self.row(unit), json.dumps(row, indent=2) + "\n")

    def _label(self, unit: Unit) -> str:
        return self.recipe.base if unit.task is None and unit.system.method is None else unit.system.name

    def _own(self, cls: type, system: System, phase: str) -> dict:
        """What the recipe says of a system in a phase. Raises ConfigError on what is no setting."""
        where = f"{self.recipe.path}: [[system]] {system.name}: {phase}"
        return _free(phase, checked(cls, getattr(system, phase) or {}, f"{where}: "), where)

    def _settings(self, cls: type, unit: Unit, phase: str, values: dict):
        values = values | self._own(cls, unit.system, phase)
        for owner in ("", unit.task.name if unit.task else "", unit.system.name):
            values |= self.overrides[phase].get(owner, {})
        return build(cls, {key: value for key, value in values.items() if value is not None})

    def _upstream(self, unit: Unit) -> None:
        if unit.system.method is not None and not self.run_of(unit).exists():
            phases.upstream(self._upstream_settings(unit), self._said(unit))

    def _upstream_settings(self, unit: Unit) -> Upstream:
        learning, scale = self.recipe.upstream, self.settings.scale
        values = {"model": self.settings.model, "axis": self.recipe.axis, "corpus": (str(self._text()),), "column": "text", "out": str(self.run_of(unit)),
                  "method": unit.system.method, "budget": unit.system.budget, "set": unit.system.set, "seed": unit.seed, "lr": learning.lr,
                  "steps": max(1, round(learning.steps * scale)), "valid_every": max(1, round(learning.valid_every * scale)),
                  "batch_size": learning.batch_size, "max_length": learning.max_length, "device": self.settings.device}
        return self._settings(Upstream, unit, "upstream", values)

    def _downstream(self, unit: Unit) -> None:
        if not self.run_of(unit).exists():
            phases.downstream(self._downstream_settings(unit), self._said(unit))

    def _downstream_settings(self, unit: Unit) -> Downstream:
        task, (model, modules), files = unit.task, self.start(unit), self._splits(unit.task)
        first = self.recipe.sources[task.name, "train"]
        values = {"model": model, "adapter": modules, **{name: str(path) for name, path in files.items()}, "text": "text", "label": "label",
                  "text_pair": first.text_pair and "text_pair", "group": first.group and "group", "out": str(self.run_of(unit)), "seed": unit.seed, "lr": task.lr,
                  "positive": task.positive, "class_weights": task.class_weights, "metric": task.metric,
                  "epochs": max(1, round(task.epochs * self.settings.scale)), "batch_size": task.batch_size, "max_length": task.max_length, "device": self.settings.device}
        return self._settings(Downstream, unit, "downstream", values)

    def _said(self, unit: Unit) -> Say:
        return lambda line: self.say(f"  {unit.name}: {line}")

    def _measure(self, unit: Unit) -> tuple[list[dict], Path | None]:
        if unit.task is None:
            (model, modules), test, kept, more = self.start(unit), None, self.recipe.upstream.measures, ()
            options = {"max_length": self.recipe.upstream.max_length}
        else:
            task, modules = unit.task, ()
            model, test, kept, more = str(self.run_of(unit)), self._splits(task)["test"], task.measures, task.measures_without_examples
            options = {"axis": self.recipe.axis, "terms": task.terms and str(prepare.find((task.terms,), self.data)), "neutral": task.neutral, "max_pairs": task.max_pairs}
        found, examples = [], self.out / "examples" / f"{unit.name}.jsonl"
        for entries, keep in ((kept, True), (more, False)):
            if entries:
                asked = Evaluate(model=model, adapter=modules, on=tuple(self._on(entry, test) for entry in entries), device=self.settings.device,
                                 examples=str(examples) if keep else None, **{key: value for key, value in options.items() if value is not None})
                result = evaluation.evaluate(asked)
                found += [m.as_json() for m in result.measures]
                for note in result.notes:
                    self._said(unit)(note)
        return found, examples if kept else None

    # ---- data

    def _parted(self, task: Task, read: dict, train_share: float = 1.0) -> Splits:
        try:
            return prepare.splits(read["train"], read.get("dev"), read["test"], dev_share=task.dev_share, train_share=train_share)
        except DataError as error:
            raise DataError(f"{self.recipe.path}: [[task]] {task.name}: {error}") from None

    def _splits(self, task: Task) -> dict[str, Path]:
        """The prepared files of a task, made once."""
        files = {name: self.out / "data" / f"{task.name}-{name}.jsonl" for name in ("train", "dev", "test")}
        if not all([self._stands(path) for path in files.values()]):
            sources = {name: source for name in files if (source := self.recipe.sources.get((task.name, name)))}
            self.say(f"  {task.name}: " + ", ".join(f"{name} {prepare.find(source.file, self.data)}" for name, source in sources.items()))
            read = {name: prepare.read(source, self.data) for name, source in sources.items()}
            share = min(1.0, task.epochs * self.settings.scale)
            parts = self._parted(task, read, share)
            for name in ("dev", "test"):
                prepare.check_labels(parts.train, getattr(parts, name), share)
            for note in parts.notes:
                self.say(f"  {task.name}: {note}")
            for name, path in files.items():
                self._write_prepared(getattr(parts, name), path)
        return files

    def _stands(self, path: Path) -> bool:
        """Whether a prepared file is there, as it was made; looked at once a run. It is said of one that is not."""
        if path in self.whole:
            return True
        made = path.with_suffix(".sha256")
        if path.exists() and made.exists() and made.read_text(encoding="utf-8", errors="replace").strip() != digest(path):
            self.say(f"  {path}: is not as it was made; made again")
        elif path.exists():
            self.whole.add(path)
        return path in self.whole

    @staticmethod
    def _write_prepared(examples: list, path: Path) -> None:
        prepare.write(examples, path)
        write_text(path.with_suffix(".sha256"), f"{digest(path)}\n")

    def _text(self) -> Path:
        """The text of the upstream phase: a file of its own, or a task's whole training split, whatever the scale."""
        path = self.out / "data" / "upstream.jsonl"
        if not self._stands(path):
            if (source := self.recipe.text) is not None:
                found = prepare.read_texts(source, self.data)
            else:
                task = next(t for t in self.recipe.tasks if t.name == self.recipe.upstream.train_of)
                read = {name: prepare.read(s, self.data) for name in ("train", "dev", "test") if (s := self.recipe.sources.get((task.name, name)))}
                found = self._parted(task, read).train
            self._write_prepared([dataclasses.replace(e, text_pair=None, label=None, group=None) for e in found], path)
        return path

    # ---- the table

    def write(self, units: list[Unit]) -> dict:
        """results.json and results.md of what is done so far."""
        rows = self.rows(units)
        names = [self.recipe.base, *(system.name for system in self.systems)]
        of = {m["name"]: m for row in rows for m in row["measures"]}
        columns = [dataclasses.asdict(c) | {"unit": of.get(c.measure, {}).get("unit"), "ideal": of.get(c.measure, {}).get("ideal")} for c in self.recipe.columns]
        table = {"format": 1, "kind": "recipe", "recipe": self.recipe.name, "title": self.recipe.title, "axis": self.recipe.axis, "model": self.settings.model,
                 "data": self.settings.data, "scale": self.settings.scale, "settings": self.overrides, "seeds": sorted({unit.seed for unit in units}),
                 "units": len(units), "seconds": round(sum(row["seconds"] for row in rows), 1), "versions": checkpoint.all_versions([row.get("versions") or checkpoint.versions(pick_device(self.settings.device)) for row in rows or [{}]]),
                 "systems": names, "base": self.recipe.base, "baseline": next((system.name for system in self.systems if system.method is None), None), "columns": columns,
                 "paper": [{"system": name, "stage": c.stage, "task": c.task, "title": c.title, "value": value} for c in self.recipe.columns for name, value in (c.paper or {}).items() if name in names],
                 "rows": rows}
        for name, text in (("results.json", json.dumps(table, indent=1) + "\n"), ("results.md", markdown(table))):
            write_text(self.out / name, text)
        return table
