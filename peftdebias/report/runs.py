"""Run folders as one source: what each is called, which differ in their seed alone, what was measured of each."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from ..checkpoint import is_run, read_config
from .reading import Answered, RunFiles, Source, command_line, measures_of, read_measures, read_run

PLAIN = {"upstream": "base", "downstream": "plain fine-tuning"}
"""What the system without debiasing is called, by stage."""
NOT_THE_SYSTEM = {"command", "seed", "out", "overwrite", "force", "adapter", "device", "cache", "workers", "fold"}  # keys that do not tell two systems apart
METHOD = {"method", "budget", "set", "fresh_head"}  # keys of upstream that make the system


def system_of(run: RunFiles) -> str:
    """What was done to the model: "lora, gender", "full, gender", or PLAIN."""
    named = [f"{method}, {axis}" for method, axis, _ in run.modules]
    if run.command == "upstream" and not run.modules:
        named = [f"{run.config.get('method', 'full')}, {Path(str(run.config.get('axis'))).stem}"]
    elif run.command == "downstream" and (base := base_run(run)) is not None:
        named = [f"{base.get('method')}, {Path(str(base.get('axis'))).stem}", *named]
    return " + ".join(named) or PLAIN[run.command]


def base_run(run: RunFiles) -> dict | None:
    """The configuration of the upstream run that trained the run's base itself, where it is still there."""
    for folder in (Path(run.config["model"]), Path(run.config["model"]).parent):
        if is_run(folder) and (config := read_config(folder)).get("command") == "upstream":
            return config
    return None


def source_of_runs(folders: list[Path]) -> Source:
    """One source of all run folders given."""
    runs = list(map(read_run, folders))
    names = _system_names(runs)
    answered = [a for run, name in zip(runs, names) for a in _answers(run, name)]
    own = list(dict.fromkeys(names))
    base = [PLAIN["upstream"]] if any(a.system == PLAIN["upstream"] for a in answered) else []
    plain = [n for n in own if n.split(" (")[0] == PLAIN["downstream"]]
    rest = list(dict.fromkeys([*own, *(a.system for a in answered)]))
    systems = list(dict.fromkeys([*base, *plain, *rest]))
    baselines = ({"upstream": base[0]} if base else {}) | ({"downstream": plain[0]} if plain else {})
    seeds = sorted({run.config["seed"] for run in runs})
    facts = [("model", ", ".join(dict.fromkeys(_model_name(run) for run in runs))),
             ("axis", ", ".join(dict.fromkeys(axis for run in runs for axis in _axes(run)))),
             ("systems", "; ".join(systems)), ("seeds", ", ".join(map(str, seeds)))]
    versions = [(run.folder.name, run.versions) for run in runs if run.versions]
    title = ", ".join(f.name for f in folders[:4]) + (f" and {len(folders) - 4} more" if len(folders) > 4 else "")
    return Source("runs", title, [f for f in facts if f[1]], list(map(command_line, runs)), versions, answered, baselines, systems)


def _model_name(run: RunFiles) -> str:
    base = base_run(run)
    return Path(str(base["model"] if base and "model" in base else run.config["model"])).name


def _axes(run: RunFiles) -> list[str]:
    if run.command == "upstream":
        return [Path(str(run.config.get("axis"))).stem]
    return [axis for _, axis, _ in run.modules]


def _setting(run: RunFiles, without: set[str] = frozenset()) -> str:
    """Settings that two runs of one system have in common, as text to compare."""
    values = {k: v for k, v in run.config.items() if k not in NOT_THE_SYSTEM | without}
    return json.dumps(values, sort_keys=True, default=str)


def _system_names(runs: list[RunFiles]) -> list[str]:
    """A name for each run: the same for runs that differ in their seed alone, with the folder's name added where two systems are called alike."""
    keys = [(run.command, system_of(run), _setting(run, {"model"} if base_run(run) and run.command == "downstream" else set()),
             json.dumps([config for _, _, config in run.modules], sort_keys=True)) for run in runs]
    alike: dict[tuple[str, str], list[tuple]] = {}
    seeds: dict[tuple, list[int]] = {}
    for run, key in zip(runs, keys):
        kinds = alike.setdefault(key[:2], [])
        if key not in kinds:
            kinds.append(key)
        seeds.setdefault(key, []).append(run.config["seed"])
    stems = {}
    for run, key in zip(runs, keys):
        stems.setdefault(key, re.sub(r"[-_]?\d+$", "", run.folder.name) or run.folder.name)
    names = []
    for run, key in zip(runs, keys):
        if len(seeds[key]) > len(set(seeds[key])):  # the same twice: each stands alone
            names.append(f"{key[1]} ({run.folder.name})")
        else:
            names.append(key[1] if len(alike[key[:2]]) == 1 else f"{key[1]} ({stems[key]})")
    return names


def _answers(run: RunFiles, system: str) -> Iterator[Answered]:
    """What was measured of a run, its own final figures and the evaluation files in its folder."""
    same, seed = _setting(run, METHOD | {"model"}), run.config["seed"]
    final = measures_of(run.final["measures"], str(run.folder / "metrics.jsonl")) if "measures" in run.final else {}
    own = run.folder / "evaluation.json"
    measures = final | (read_measures(own) if own.exists() else {})

    def answer(name: str, task: str, measures: dict, examples: Path) -> Answered:
        return Answered(name, seed, run.command, task, measures, examples if examples.exists() else None, run if name == system else None,
                        run.final.get("seconds") if name == system else None, same)

    if (base := run.folder / "evaluation-base.json").exists() and run.command == "upstream":
        yield answer(PLAIN["upstream"], "", read_measures(base), run.folder / "examples-base.jsonl")
    for name, part in _systems_within(measures, system).items():
        yield answer(name, "", part, run.folder / "examples.jsonl")
    for path in sorted(run.folder.glob("evaluation-*.json")):
        task = path.stem.removeprefix("evaluation-")
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
