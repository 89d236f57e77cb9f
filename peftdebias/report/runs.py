"""Run folders as one source: what each is called, which differ in their seed alone, what was measured of each."""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..answers import LONGEST
from ..config import Evaluate
from ..options import flag
from .reading import Answered, RunFiles, Source, command_line, evaluate_line, measures_of, read_asked, read_measures, read_run

PLAIN = {"upstream": "base", "downstream": "plain fine-tuning"}
"""What the system without debiasing is called, by stage."""
NOT_THE_SYSTEM = {"command", "seed", "out", "overwrite", "force", "adapter", "device", "cache", "workers", "fold"}  # keys that do not tell two systems apart
METHOD = {"method", "budget", "set", "fresh_head"}  # keys of upstream that make the system
BASE = ("evaluation-base.json", "examples-base.jsonl")  # in an upstream run, of its base without the module


def system_of(run: RunFiles) -> str:
    """What was done to the model: "lora, gender", "full, gender", or PLAIN."""
    named = [f"{method}, {axis}" for method, axis, _ in run.modules]
    if run.command == "upstream" and not run.modules:
        named = [f"{run.config.get('method', 'full')}, {Path(str(run.config.get('axis'))).stem}"]
    if (base := base_run(run)) is not None:
        named = [f"{base.get('method')}, {Path(str(base.get('axis'))).stem}", *named]
    elif run.command == "downstream" and not named and "model" in run.origins:
        named = [f"{PLAIN['downstream']} of {Path(run.config['model']).name}"]
    return " + ".join(named) or PLAIN[run.command]


def base_run(run: RunFiles) -> dict | None:
    """The configuration of the upstream run that trained the run's base itself, if one did."""
    config = run.origins.get("model")
    return config if config and config.get("command") == "upstream" else None


def source_of_runs(folders: list[Path]) -> Source:
    """One source of all run folders given."""
    runs = list(map(read_run, folders))
    names = _system_names(runs)
    bases, against = _bases(runs)
    answered = bases + [a for run, name, same in zip(runs, names, against) for a in _answers(run, name, same)]
    own = list(dict.fromkeys(names))
    base = [a.system for a in bases]
    plain = [n for n in own if n.split(" (")[0] == PLAIN["downstream"]]
    rest = list(dict.fromkeys([*own, *(a.system for a in answered)]))
    systems = list(dict.fromkeys([*base, *plain, *rest]))
    baselines = ({"upstream": base[0]} if base else {}) | ({"downstream": plain[0]} if plain else {})
    seeds = sorted({run.config["seed"] for run in runs})
    facts = [("model", ", ".join(dict.fromkeys(Path(_model(run)).name for run in runs))),
             ("axis", ", ".join(dict.fromkeys(axis for run in runs for axis in _axes(run)))),
             ("systems", "; ".join(systems)), ("seeds", ", ".join(map(str, seeds)))]
    if chosen := [run.folder.name for run in runs if run.command == "downstream" and run.final.get("on") == "dev"]:
        facts.append(("without a test file", f"{', '.join(chosen)}: their own figures are of the dev file, which the epoch was chosen by"))
    evaluations = [(run, task, path, *read_asked(path)) for run in runs for task, path in _evaluations(run)]
    facts.append(("measured unlike", "; ".join(_unlike(evaluations))))
    commands = [*map(command_line, runs), *dict.fromkeys(evaluate_line(settings) for *_, settings, _ in evaluations if settings)]
    versions = [(run.folder.name, run.versions) for run in runs if run.versions]
    title = ", ".join(f.name for f in folders[:4]) + (f" and {len(folders) - 4} more" if len(folders) > 4 else "")
    return Source("runs", title, [f for f in facts if f[1]], commands, versions, answered, baselines, systems)


def _model(run: RunFiles) -> str:
    """The model that all began from: where the run's own was trained upstream, that one's."""
    base = base_run(run)
    return str(base["model"] if base and "model" in base else run.config["model"])


def _axes(run: RunFiles) -> list[str]:
    if run.command == "upstream":
        return [Path(str(run.config.get("axis"))).stem]
    return [axis for _, axis, _ in run.modules]


def _setting(run: RunFiles, without: set[str] = frozenset()) -> str:
    """Settings that two runs of one system have in common, as text to compare."""
    values = {k: v for k, v in run.config.items() if k not in NOT_THE_SYSTEM | without}
    return json.dumps(values, sort_keys=True, default=str)


def _origins(made_of: dict) -> list:
    """How the runs that one begins from were made, seeds and folders aside: in the place of a base that was trained itself stands how that was made, and a module learnt on it
    names it no more."""
    model, modules = made_of.get("model"), made_of.get("adapter", [])

    def way(config: dict, trained_base: bool) -> dict:
        before = config.get("made_of", {})
        aside = NOT_THE_SYSTEM | {"made_of"} | ({"model"} if trained_base or "model" in before else set())
        return {key: value for key, value in config.items() if key not in aside} | {"beside": len(config.get("adapter", [])), "origins": _origins(before)}

    return [*([way(model, False)] if model else []), *(way(module, model is not None) for module in modules)]


def _system_names(runs: list[RunFiles]) -> list[str]:
    """A name for each run: the same for runs that differ in their seed alone, with the folder's name added where two systems are called alike."""
    keys = [(run.command, system_of(run), _setting(run, {"model"} if base_run(run) else set()),
             json.dumps([[config for _, _, config in run.modules], _origins(run.origins)], sort_keys=True, default=str)) for run in runs]
    seeds: dict[tuple, list[int]] = {}
    for run, key in zip(runs, keys):
        seeds.setdefault(key, []).append(run.config["seed"])
    twice = {key for key, found in seeds.items() if len(found) > len(set(found))}  # no seeds of one system: each run stands alone
    systems = [(*key, str(run.folder) if key in twice else "") for run, key in zip(runs, keys)]
    names = {}
    for called in dict.fromkeys(key[:2] for key in keys):
        folders: dict[tuple, Path] = {}
        for run, system in zip(runs, systems):
            if system[:2] == called:
                folders.setdefault(system, run.folder)
        labels = _labels(list(folders.values()), [not system[-1] for system in folders])
        names |= {system: called[1] + (f" ({label})" if len(folders) > 1 else "") for system, label in zip(folders, labels)}
    return [names[system] for system in systems]


def _labels(folders: list[Path], of_seeds: list[bool]) -> list[str]:
    """The name of each folder, of several seeds without the number at its end; with that, and with as many folders above it as it takes, where two were called alike."""
    paths = [Path(os.path.abspath(folder)).parts for folder in folders]
    labels = [re.sub(r"[-_]?\d+$", "", parts[-1]) or parts[-1] if seeds else parts[-1] for parts, seeds in zip(paths, of_seeds)]
    for depth in range(1, max(map(len, paths)) + 1):
        if len(set(labels)) == len(labels):
            break
        labels = ["/".join(parts[-depth:]) for parts in paths]
    return labels


def _bases(runs: list[RunFiles]) -> tuple[list[Answered], list[str]]:
    """(the untrained bases that were measured beside upstream runs, for each run the key `same` that it shares with what it is compared with).

    Files of one model that agree where they overlap are one base, measured once: it has no seeds, and several runs beside it are no several measurements.
    """
    found: list[tuple[str, RunFiles, dict[str, dict]]] = []
    against: list[str] = []
    for run in runs:
        model, path = str(run.config["model"]), run.folder / BASE[0]
        if run.command != "upstream" or not path.exists():
            against.append("" if run.command == "upstream" else f"{_model(run)} {_setting(run, METHOD | {'model'})}")
            continue
        measures = read_measures(path)
        at = next((i for i, (other, _, there) in enumerate(found) if other == model and _agree(measures, there)), len(found))
        if at == len(found):
            found.append((model, run, {}))
        found[at][2].update(measures | found[at][2])
        if not (found[at][1].folder / BASE[1]).exists() and (run.folder / BASE[1]).exists():
            found[at] = (model, run, found[at][2])
        against.append(f"base {at}")
    of = {model: f"base {i}" for i, (model, _, _) in reversed(list(enumerate(found)))}
    against = [same or of.get(str(run.config["model"]), "no base") for run, same in zip(runs, against)]
    models = [model for model, _, _ in found]
    labels = _labels([Path(m) for m in models] if len(set(models)) == len(models) else [run.folder for _, run, _ in found], [False] * len(found)) if len(found) > 1 else []
    names = [f"{PLAIN['upstream']} ({label})" for label in labels] or [PLAIN["upstream"]]
    return [Answered(name, run.config["seed"], "upstream", "", measures, run.folder / BASE[1] if (run.folder / BASE[1]).exists() else None, same=f"base {i}")
            for i, (name, (_, run, measures)) in enumerate(zip(names, found))], against


def _agree(one: dict[str, dict], other: dict[str, dict]) -> bool:
    """Whether measures of both have the same values, within what another machine's rounding makes of them."""
    shared = [(one[name], other[name]) for name in one if name in other]
    return all(a["n"] == b["n"] and (a["value"] == b["value"] or None not in (a["value"], b["value"]) and math.isclose(a["value"], b["value"], rel_tol=1e-3)) for a, b in shared)


def _evaluations(run: RunFiles) -> list[tuple[str, Path]]:
    """(NAME, evaluation-NAME.json) of a run's folder; evaluation.json, whose NAME is "", comes first."""
    return sorted((path.stem.removeprefix("evaluation").removeprefix("-"), path) for path in run.folder.glob("evaluation*.json") if re.match(r"evaluation(-.*)?\.json", path.name))


def _unlike(evaluations: list[tuple[RunFiles, str, Path, dict, dict]]) -> list[str]:
    """A line for everything in which the settings or the files differ of evaluations that stand beside each other."""
    found: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for run, task, path, settings, files in evaluations:
        stands = "" if path.name == BASE[0] and run.command == "upstream" else task
        for what, value in _decides(settings, files, _own(run, settings)):
            found.setdefault((run.command, stands, what), {}).setdefault(json.dumps(value), []).append(f"{path.parent.name}/{path.name}")
    return [f"{what}: {' unlike '.join(', '.join(paths) for paths in sides.values())}" for (_, _, what), sides in found.items() if len(sides) > 1]


def _own(run: RunFiles, settings: dict) -> dict:
    """What options that were not given stand for in an evaluation that lies with a run: the run's own settings, where it was the run that was loaded."""
    loaded = os.path.basename(os.path.realpath(str(settings.get("model")))) == run.folder.resolve().name
    config = {"max_length": LONGEST} | (run.config if loaded else {}) | {"axis": axes[0] if len(axes := _axes(run)) == 1 else None}
    return {field.name: config.get(field.name) for field in dataclasses.fields(Evaluate) if field.default is None}


def _decides(settings: dict, files: dict, own: dict) -> Iterator[tuple[str, object]]:
    """(what figures depend on, its value) for each option of a measure that was asked for, and each measure's file by what is in it. own: of options that were not given."""
    on = [entry.partition("=")[::2] for entry in settings.get("on", [])]
    for name in dict.fromkeys(name for name, _ in on):
        places = [Path(path) for other, path in on if other == name]
        if sums := sorted(found for file, found in files.items() if any(Path(file).is_relative_to(place) for place in places)):  # a pipe has none
            yield f"--on {name}", sums
    for field in dataclasses.fields(Evaluate) if on else ():
        if field.name in ("samples", "seed") or {name for name, _ in on} & set(field.metadata["of"]):
            value = settings.get(field.name, own.get(field.name, field.default))
            yield flag(field.name), files.get(str(Path(value)), value) if isinstance(value, str) else value


def _answers(run: RunFiles, system: str, same: str) -> Iterator[Answered]:
    """What was measured of a run, its own final figures and the evaluation files in its folder."""
    seed = run.config["seed"]
    final = measures_of(run.final["measures"], str(run.folder / "metrics.jsonl")) if "measures" in run.final else {}
    evaluations = dict(_evaluations(run))
    measures = final | (read_measures(evaluations.pop("")) if "" in evaluations else {})

    def answer(name: str, task: str, measures: dict, examples: Path) -> Answered:
        whole = name == system  # rows of the parts of several modules have names of their own
        return Answered(name, seed, run.command, task, measures, examples if whole and examples.exists() else None, run if whole else None,
                        run.final.get("seconds") if whole else None, same)

    for name, part in _systems_within(measures, system).items():
        yield answer(name, "", part, run.folder / "examples.jsonl")
    for task, path in evaluations.items():
        if task != "base" or run.command != "upstream":
            for name, part in _systems_within(read_measures(path), system).items():
                if part:
                    yield answer(name, task, part, run.folder / f"examples-{task}.jsonl")


def _systems_within(measures: dict[str, dict], system: str) -> dict[str, dict]:
    """An evaluation with several modules measures the base and each module alone beside them: {system: its measures}."""
    found: dict[str, dict] = {system: {}}
    for name, row in measures.items():
        prefix, slash, rest = name.partition("/")
        if slash and prefix == "base":
            found.setdefault(f"{system}: all switched off", {})[rest] = row | {"name": rest}
        elif slash and prefix.startswith("only-"):
            found.setdefault(f"{system}: {prefix.removeprefix('only-')} alone", {})[rest] = row | {"name": rest}
        else:
            found[system][name] = row
    return found
