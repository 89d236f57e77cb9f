"""Run folders and results of a recipe as files, made in no time: what the tests of reports read. Figures are made up and follow from the seed."""

import json
import random
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tomli_w

from peftdebias import config

HOSTILE = "<script>alert(1)</script>\"'&amp; $x_1^2$ \u202egnp.\u202c <img src=http://evil.invalid/p.png onerror=alert(2)>{{ 7 * 7 }}\x07"
CLASSES = ("guard", "nurse", "surgeon", "teacher")
TERMS = ("deaf", "old", "young")


def measure(name: str, value: float | None, unit: str = "%", ideal: float | None = 0.0, half: float = 2.0, n: int = 500) -> dict:
    known = value is not None
    return {"name": name, "value": value, "unit": unit, "ideal": ideal, "low": value - half if known else None, "high": value + half if known else None, "n": n}


def task_measures(random, gap: float = 10.0, classes=CLASSES) -> list[dict]:
    """What a downstream run reports with a group column."""
    return [measure("accuracy", 70 + random.random(), ideal=100.0), measure("f1/macro", 60 + random.random(), ideal=100.0), measure("tpr-gap/rms", gap + random.random(), "points"),
            measure("tpr-gap/rms-shuffled", 3.0, "points", None), *(measure(f"tpr-gap/class/{c}", random.uniform(-gap, gap), "points", n=40) for c in classes)]


def flip_row(text="he is a nurse", counterfactual="she is a nurse", before="guard", after="nurse", p=0.8, place="data/test.jsonl:3", source=0, q=None) -> dict:
    q = q if q is not None else 0.3 if before != after else p - 0.05
    return {"measure": "counterfactual", "place": place, "source": source, "axis": "gender", "text": text, "counterfactual": counterfactual, "predicted": before,
            "predicted_counterfactual": after, "probabilities": {before: p, after: 1 - p} if before != after else {before: p},
            "probabilities_counterfactual": {before: q, after: 1 - q} if before != after else {before: q}}


def run_folder(folder: Path, command: str, seed: int = 0, *, method: str | None = "lora", axis: str = "gender", final=(), evaluations=None, examples=None, config=None) -> Path:
    """config.toml, versions.json, metrics.jsonl and adapter.json as the phases write them. evaluations: suffix -> measures; examples: suffix -> rows."""
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    own = {"command": command, "model": "/models/tiny", "seed": seed, "out": str(folder), "lr": 1e-3}
    own |= {"axis": axis, "corpus": ["corpus.txt"], "method": method or "full", "steps": 40} if command == "upstream" else {
        "train": "train.csv", "dev": "dev.csv", "test": "test.csv", "text": "text", "label": "job", "metric": "accuracy", "epochs": 2}
    (folder / "config.toml").write_text(tomli_w.dumps(own | (config or {})), encoding="utf-8")
    (folder / "versions.json").write_text(json.dumps({"peftdebias": "0.1.0", "torch": "2.13.0", "device": "a machine", "commit": None}))
    key, start = ("loss", 3.3) if command == "upstream" else ("accuracy", 5.0)
    events = [{"event": "validation", "step": 0, key: start}]
    for step in (10, 20, 30, 40):
        events.append({"event": "step", "step": step, "loss": 3.5 - step / 100 + rng.random() / 10, "lr": 1e-3})
        if step % 20 == 0:
            events.append({"event": "validation", "step": step, "kept": step == 40, key: start + (step if key == "accuracy" else -step / 100)})
    events.append({"event": "final", "step": 40, "seconds": 75.0} | ({"on": "test", "measures": list(final)} if command == "downstream" else {}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    if method and method != "full":
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter.json").write_text(json.dumps({"format": 1, "method": method, "axis": axis, "config": {"rank": 2}, "base": {}}))
    for suffix, measures in (evaluations or {}).items():
        (folder / f"evaluation{suffix}.json").write_text(json.dumps({"measures": measures}))
    for suffix, rows in (examples or {}).items():
        (folder / f"examples{suffix}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return folder


def task_runs(root: Path, seeds=(0, 1, 2)) -> list[Path]:
    """Plain fine-tuning and a frozen LoRA under each seed."""
    found = []
    for seed in seeds:
        rng = random.Random(seed)
        found += [run_folder(root / f"plain-{seed}", "downstream", seed, method=None, final=task_measures(rng, 20.0)),
                  run_folder(root / f"lora-{seed}", "downstream", seed, final=task_measures(rng, 10.0))]
    return found


FEW = ("BERT", "FT", "LoRA")
SYSTEMS = ("BERT", "FT", "Full-Debias", "Adapter", "Prompt", "LoRA", "SFT")


def results(systems=SYSTEMS, **changes) -> dict:
    """results.json of up to 7 systems and 3 seeds. Upstream the untrained BERT has one row; FT has none there, BERT none downstream."""
    rng, rows = random.Random(0), []
    for system in systems:
        for seed in range(3):
            if system != "FT" and (system != "BERT" or seed == 0):
                rows.append({"system": system, "seed": seed, "stage": "upstream", "task": None, "run": None, "examples": None, "seconds": 30.0,
                             "measures": [measure("stereoset/lm/overall", 60 + rng.random(), ideal=100.0), measure("crows-pairs/bias-bench/race-color", 55 + rng.random(), ideal=50.0)]})
            if system != "BERT":
                rows.append({"system": system, "seed": seed, "stage": "downstream", "task": "ghc", "run": None, "examples": None, "seconds": 60.0, "measures": [
                    measure("f1/1", 58 + rng.random(), ideal=100.0), measure("fprd", 1 + rng.random(), "1", half=0.2), measure("fprd/fpr", 9 + rng.random()),
                    *(measure(f"fprd/term/{term}", 10 + 5 * rng.random()) for term in TERMS)]})
    columns = [{"stage": "upstream", "task": None, "title": "StereoSet LM", "measure": "stereoset/lm/overall", "unit": "%", "ideal": 100.0},
               {"stage": "upstream", "task": None, "title": "CrowS-Pairs", "measure": "crows-pairs/bias-bench/race-color", "unit": "%", "ideal": 50.0},
               {"stage": "downstream", "task": "ghc", "title": "F1", "measure": "f1/1", "unit": "%", "ideal": 100.0},
               {"stage": "downstream", "task": "ghc", "title": "FPRD", "measure": "fprd", "unit": "1", "ideal": 0.0}]
    paper = [{"system": "BERT", "stage": "upstream", "task": None, "title": "CrowS-Pairs", "value": 62.33}, {"system": "LoRA", "stage": "upstream", "task": None, "title": "CrowS-Pairs", "value": 56.12},
             {"system": "LoRA", "stage": "downstream", "task": "ghc", "title": "FPRD", "value": 0.73}]
    return {"format": 1, "kind": "recipe", "recipe": "ghc", "title": "Hate speech, race", "axis": "group", "model": "tiny", "data": "/data", "scale": 0.05, "seeds": [0, 1, 2],
            "seconds": 4000.0, "versions": {"torch": "2.13.0", "device": "a machine"}, "systems": list(systems), "base": "BERT", "baseline": "FT", "columns": columns, "paper": paper,
            "rows": rows} | changes


def result_folder(folder: Path, table=None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results() if table is None else table), encoding="utf-8")
    return folder


def hostile_runs(root: Path) -> list[Path]:
    """A data set that wants to be more than text: in labels, texts, class and term names, places, the axis and folder names."""
    name = "".join(c for c in HOSTILE if c not in "/\x07")
    rng = random.Random(0)
    rows = [flip_row(HOSTILE + " he", HOSTILE + " she", HOSTILE, "b" + HOSTILE, place=f"data/{name}:1")]
    more = [measure("fprd", 1.0, "1"), measure("fprd/fpr", 9.0), *(measure(f"fprd/term/{t}{HOSTILE}", 12.0) for t in "ab"), measure(f"{HOSTILE})/class/x", 1.0)]
    return [run_folder(root / f"p{name}", "downstream", 0, method=None, final=task_measures(rng, classes=[HOSTILE, "_x", "$a$"]) + more, config={"train": HOSTILE.strip("\x07")}),
            run_folder(root / f"q{name}", "downstream", 0, axis=HOSTILE, final=task_measures(rng, classes=[HOSTILE, "_x", "$a$"]) + more, examples={"": rows},
                       evaluations={f"-{name}": [measure("accuracy", 50.0, ideal=100.0), measure(HOSTILE, 3.0, HOSTILE)]})]


def hostile_results() -> dict:
    """The same of a recipe: in its title, data, stages, tasks, systems, columns and measures."""
    text = json.dumps(results(FEW, title=HOSTILE, data=HOSTILE)).replace('"downstream"', json.dumps("d" + HOSTILE)).replace('"ghc"', json.dumps("t" + HOSTILE))
    table = json.loads(text.replace('"LoRA"', json.dumps("LoRA" + HOSTILE)).replace('"F1"', json.dumps("F1" + HOSTILE)))
    table["rows"][0]["measures"].append(measure(HOSTILE, 3.0, HOSTILE))
    return table


# ---------------------------------------------------------------- what was written

class Elements(HTMLParser):
    """tags: (name, attributes) of every element; texts: of every <name>, the text inside."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append((tag, []))

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        for _, pieces in self.open:
            pieces.append(data)

    def handle_endtag(self, tag):
        while self.open:
            name, pieces = self.open.pop()
            self.texts.append((name, "".join(pieces)))
            if name == tag:
                return

    def all(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


def written(folder, *paths, **flags):
    """(the page, metrics.json) of a report."""
    from peftdebias.report import report  # whoever calls this has the extra

    out = folder / "report.html"
    report(config.Report(paths=tuple(map(str, paths)), out=str(out), **flags))
    return out.read_text(encoding="utf-8"), json.loads((folder / "metrics.json").read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def titles(text: str) -> list[str]:
    return [t for t in Elements(text).all("h2")]


def of(data: dict, system: str, name: str, stage: str = "downstream", source: int = 0) -> dict:
    (found,) = (m for r in data["sources"][source]["results"] if (r["system"], r["stage"]) == (system, stage) for m in r["measures"] if m["name"] == name)
    return found
