"""results.json of a recipe as the paper's table: ours beside its own figures, and differences to the baseline with their intervals."""

from pathlib import Path

from .metrics.compare import over_seeds, seed_difference
from .metrics.tally import Difference


def column_title(column: dict, columns: list[dict]) -> str:
    """What stands above a column of results.json: its title, with its task where another of `columns`, those of one table, is called alike."""
    alike = sum(c["title"] == column["title"] for c in columns) > 1
    return f"{column['title']} ({column['task']})" if alike and column["task"] else column["title"]


def figures(table: dict, column: dict, system: str) -> dict[int, float]:
    """seed -> the figure of a system in a column of results.json."""
    found = {}
    for row in table["rows"]:
        if row["system"] == system and row["stage"] == column["stage"] and column["task"] in (None, row["task"]):
            for m in row["measures"]:
                if m["name"] == column["measure"] and m["value"] is not None:
                    found[row["seed"]] = m["value"]
    return found


def change(table: dict, column: dict, system: str) -> Difference | None:
    """A system's figure minus the base's (upstream) or plain fine-tuning's, paired by seed; None where that has no interval."""
    against = table["base"] if column["stage"] == "upstream" else table["baseline"]
    own, base = figures(table, column, system), figures(table, column, against) if against else {}
    if len(base) == 1 and column["stage"] == "upstream":
        base = dict.fromkeys(own, *base.values())  # the untrained base is the same under every seed
    seeds = sorted(set(own) & set(base))
    if system == against or len(seeds) < 2:
        return None
    return seed_difference([base[s] for s in seeds], [own[s] for s in seeds], name=column["measure"], unit=column["unit"] or "1", ideal=column["ideal"])


def markdown(table: dict) -> str:
    """The table of the paper, ours beside its own, and the differences to the baseline with their intervals."""
    paper = {(p["system"], p["stage"], p["task"], p["title"]): p["value"] for p in table["paper"]}
    columns, seeds = table["columns"], len(table["seeds"])
    in_brackets = "; in brackets the paper's own figure (BERT-base, the whole schedule)" if paper else ""
    asked = "; ".join(f"{phase}: " + ", ".join(f"{system + ' ' if system else ''}{key} {value}" for system, values in own.items() for key, value in values.items())
                      for phase, own in table["settings"].items() if own)
    versions = table["versions"]
    lines = [f"# {table['title']}", "",
             f"Scale {table['scale']:g} of the {'paper' if paper else 'recipe'}'s schedule{'; ' + asked if asked else ''}; base {Path(table['model']).name}; {seeds} seed{'s' * (seeds != 1)}; {len(table['rows'])} of {table['units']} units done in "
             f"{table['seconds'] / 60:.0f} minutes of work ({versions['device']}, {versions['threads']} threads, torch {versions['torch']}, commit {versions['commit']}).", "",
             f"{'Mean ± standard deviation over the seeds' if seeds > 1 else 'Figures of one seed, without a spread; intervals over the examples are in the rows'}{in_brackets}.", ""]

    def rows_of(cell) -> list[str]:
        head = ["system", *(column_title(c, columns) + (f" (ideal {c['ideal']:g})" if c["ideal"] is not None else "") for c in columns)]
        found = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for system in table["systems"]:
            cells = [cell(column, system) for column in columns]
            if any(c != "" for c in cells):
                found.append(f"| {system} | " + " | ".join(cells) + " |")
        return found

    def figure(column: dict, system: str) -> str:
        values = figures(table, column, system)
        theirs = paper.get((system, column["stage"], column["task"], column["title"]))
        most = max(len(figures(table, c, system)) for c in columns if c["stage"] == column["stage"])
        few = [f"({len(values)} of {most} seeds)"] if values and len(values) < most else []
        return " ".join(([str(over_seeds(list(values.values())))] if values else []) + few + ([f"[{theirs:.2f}]"] if theirs is not None else []))

    def difference(column: dict, system: str) -> str:
        found = change(table, column, system)
        return "" if found is None else f"{found.value:+.3g} ({found.low:.3g} to {found.high:.3g})" + (f", {found.n} seeds" if found.n < seeds else "")

    lines += rows_of(figure)
    found = rows_of(difference)
    if len(found) > 2:  # more than its head
        against = [f"{table['base']} (upstream)"] + ([f"{table['baseline']} (tasks)"] if table["baseline"] else [])
        lines += ["", f"Differences to {' and '.join(against)}, paired by seed, with 95 % intervals (t over the seeds that both have):", ""] + found
    return "\n".join(lines + ["", "The benchmarks have positive predictive power only: they can show bias, never its absence. Gender is treated as binary, and the word lists are narrow.", ""])
