"""results.json of a recipe: many systems and seeds, and the paper's own figures, as a `Source`.

    {"format": 1, "kind": "recipe", "recipe", "title", "axis", "model", "data", "scale", "settings", "seeds", "units", "seconds", "versions", "systems": [name],
     "base", "baseline": the systems that others are compared with, upstream and on the tasks,
     "columns": [{"stage", "task", "title", "measure", "unit", "ideal"}],     the paper's table; task null: whichever the stage has
     "paper":   [{"system", "stage", "task", "title", "value"}],              its figures, by column title
     "rows":    [{"system", "seed", "stage", "task", "run", "measures", "examples", "seconds", "versions"}]}

The untrained base has one row, whatever the seeds. `run` and `examples` are paths from the folder, or null; a run's training is drawn where it is there.
"""

from pathlib import Path

from ..checkpoint import is_run
from ..errors import DataError, short
from .reading import Answered, Source, command_line, is_number, measures_of, read_json, read_run
from .words import duration

FORMAT = 1
BASELINES = {"base": "BERT", "baseline": "FT"}  # where results.json does not say
KEYS = {"": {"title": str, "systems": list, "columns": list, "paper": list, "rows": list, "seeds": list},
        "columns": {"stage": str, "title": str, "measure": str},
        "paper": {"system": str, "stage": str, "title": str},
        "rows": {"system": str, "seed": int, "stage": str, "measures": list}}


def source_of_recipe(folder: Path) -> Source:
    """results.json in `folder`. Raises DataError that names what does not fit."""
    path = folder / "results.json"
    found = _checked(path)
    answered = [_answer(folder, path, i, row) for i, row in enumerate(found["rows"])]
    seen: dict[tuple, int] = {}
    for i, a in enumerate(answered):
        key = (a.system, a.seed, a.stage, a.task)
        if key in seen:
            raise DataError(f"{path}: rows[{i}]: expected one row a system, seed, stage and task, got {a.system}, seed {a.seed}, {a.stage} {a.task} "
                            f"as in rows[{seen[key]}]")
        seen[key] = i
    named = {stage: found.get(key := "base" if stage == "upstream" else "baseline", BASELINES[key]) for stage in dict.fromkeys(a.stage for a in answered)}
    baselines = {stage: name for stage, name in named.items() if name in found["systems"]}
    facts = [(key, _fact(found[key])) for key in ("recipe", "model", "axis", "data", "scale", "settings", "seeds", "systems") if found.get(key) not in (None, [], "", {})]
    if is_number(found.get("units")) and found["units"] != len(answered):
        facts.append(("done", f"{len(answered)} of {found['units']:,} units"))
    if is_number(found.get("seconds")):
        facts.append(("time", duration(found["seconds"])))
    versions = [("", found["versions"])] if isinstance(found.get("versions"), dict) and found["versions"] else []
    commands = list(dict.fromkeys(command_line(a.run) for a in answered if a.run))
    columns = [c | {"task": c.get("task"), "unit": c.get("unit") or "1", "ideal": c.get("ideal")} for c in found["columns"]]
    paper = [p | {"task": p.get("task"), "value": p.get("value")} for p in found["paper"]]
    return Source("recipe", found["title"], facts, commands, versions, answered, baselines, [str(s) for s in found["systems"]], columns, paper)


def _fact(value) -> str:
    """Lists with commas, tables as "upstream: lr 0.001; downstream: epochs 1"."""
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_pairs(rest)}" if isinstance(rest, dict) else f"{key} {rest}" for key, rest in value.items() if rest not in ({}, None))
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _pairs(values: dict) -> str:
    return ", ".join(f"{key}: {_pairs(rest)}".lstrip(": ") if isinstance(rest, dict) else f"{key} {rest}" for key, rest in values.items())


def _checked(path: Path) -> dict:
    found = read_json(path)
    if not isinstance(found, dict) or found.get("kind") != "recipe":
        raise DataError(f"{path}: expected the results of a recipe, an object with kind \"recipe\", got {short(found)}")
    if found.get("format") != FORMAT:
        raise DataError(f"{path}: expected format {FORMAT}, got {found.get('format')!r}")
    _has(found, KEYS[""], str(path))
    for name in ("columns", "paper", "rows"):
        for i, row in enumerate(found[name]):
            _has(row, KEYS[name], f"{path}: {name}[{i}]")
            for key in ("ideal", "value"):
                if not (row.get(key) is None or is_number(row[key])):
                    raise DataError(f"{path}: {name}[{i}]: expected {key!r} to be a number or null, got {short(row[key])}")
            if not isinstance(row.get("task"), (str, type(None))):
                raise DataError(f"{path}: {name}[{i}]: expected 'task' to be a text or null, got {short(row['task'])}")
            if "system" in row and row["system"] not in found["systems"]:
                raise DataError(f"{path}: {name}[{i}]: expected system to be one of {', '.join(map(str, found['systems']))}, got {row['system']!r}")
    return found


def _has(row, keys: dict[str, type], where: str) -> None:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, got {short(row)}")
    for key, kind in keys.items():
        if not isinstance(row.get(key), kind):
            raise DataError(f"{where}: expected {key!r} to be {'a text' if kind is str else 'a list' if kind is list else 'a whole number'}, got {short(row.get(key))}")


def _answer(folder: Path, path: Path, i: int, row: dict) -> Answered:
    where = f"{path}: rows[{i}]"
    run, examples = (folder / row[key] if isinstance(row.get(key), str) else None for key in ("run", "examples"))
    if examples is not None and not examples.is_file():
        raise DataError(f"{where}: {examples}: no such file")
    seconds = row.get("seconds") if is_number(row.get("seconds")) else None
    return Answered(row["system"], row["seed"], row["stage"], str(row.get("task") or ""), measures_of(row["measures"], where), examples,
                    read_run(run) if run is not None and is_run(run) else None, seconds)
