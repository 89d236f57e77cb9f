"""What was run: model, systems, seeds, commands, versions, time."""

from .page import Lines, Section, Table
from .reading import RunFiles, Source, is_number
from .words import duration, number


def about(source: Source) -> Section:
    blocks = [Table("What this is about", ("", ""), list(source.facts), words=True)]
    runs = {a.run.folder: a for a in source.answered if a.run}
    if runs:
        rows = [(folder.name, a.system, str(a.run.config.get("seed")), _length(a.run), _kept(a.run), _time(a.run)) for folder, a in runs.items()]
        blocks.append(Table("Runs", ("run", "system", "seed", "length", "kept", "time"), rows, words=True))
    elif any(a.seconds for a in source.answered):
        rows = [(a.system, str(a.seed), a.stage, a.task or "–", duration(a.seconds)) for a in source.answered if a.seconds]
        blocks.append(Table("Time of each", ("system", "seed", "stage", "task", "time"), rows, words=True, folded=True))
    if source.commands:
        blocks.append(Lines("Commands", source.commands))
    if source.versions:
        blocks.append(_versions(source.versions))
    return Section("about", "What was run", [], blocks)


def _length(run: RunFiles) -> str:
    unit = "step" if run.command == "upstream" else "epoch"
    many = run.config.get(f"{unit}s")
    return "–" if many is None else f"{many} {unit}" if many == 1 else f"{many} {unit}s"


def _time(run: RunFiles) -> str:
    return duration(run.final["seconds"]) if is_number(run.final.get("seconds")) else "–"


def _kept(run: RunFiles) -> str:
    """"loss 3.280 → 3.214 at step 150": validation before and the one that was kept."""
    if not run.stretches or not run.stretches[-1].validations:
        return "–"
    last = run.stretches[-1]
    key = "loss" if "loss" in last.validations[0][1] else run.config.get("metric", "accuracy")
    kept = next((figures for step, figures in reversed(last.validations) if step == last.kept), None)
    if kept is None or key not in kept or key not in last.validations[0][1]:
        return "–"
    unit = "nats" if key == "loss" else "%"
    return f"{key} {number(last.validations[0][1][key], unit)} → {number(kept[key], unit)} at step {last.kept}"


def _versions(versions: list[tuple[str, dict]]) -> Table:
    """One column for each different set of versions."""
    different: list[tuple[list[str], dict]] = []
    for name, found in versions:
        for names, known in different:
            if known == found:
                names.append(name)
                break
        else:
            different.append(([name], found))
    keys = list(dict.fromkeys(key for _, found in different for key in found))
    head = ("", *("version" if len(different) == 1 else ", ".join(names) for names, _ in different))
    return Table("Versions and machine", head, [(key, *("–" if f.get(key) is None else str(f[key]) for _, f in different)) for key in keys], words=True, folded=True)
