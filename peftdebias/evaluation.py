"""Measure a model, and use it: `evaluate` and `predict`, for the command line and the Python API.

What it adds over intrinsic.py (measures of an encoder and its masked-LM) and extrinsic.py (of downstream runs): ON, which lists what `--on NAME=FILE` can be,
several modules in one table, and the output files.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from . import checkpoint, corpus, extrinsic, intrinsic, patch
from .answers import Cuts, Result, check_pairs, encode_examples, is_plain, longest_of
from .checkpoint import Run
from .config import Evaluate, Predict
from .corpus import Example
from .errors import AdapterError, ConfigError, DataError, ModelError
from .lines import called
from .lowered import answering
from .options import as_plain, expect, flag
from .outputs import digest, files_in, keep_apart, tables, writing
from .tasks import class_probabilities, labelled_samples
from .training import pick_device, pick_precision


ON: dict[str, Callable[[Run, str, Evaluate], Result]] = {
    "crows-pairs": intrinsic.crows,
    "stereoset": intrinsic.stereo_set,
    "seat": intrinsic.association_tests,
    "perplexity": intrinsic.perplexity,
    "classification": extrinsic.classification,
    "fprd": extrinsic.fprd_in_domain,
    "iptts": extrinsic.iptts,
    "bias-nli": extrinsic.bias_nli,
    "counterfactual": extrinsic.counterfactual_flips,
}
"""What computes each name of config.MEASURES."""

GIVES: dict[str, tuple[str, ...]] = {
    "crows-pairs": ("crows-pairs",),
    "stereoset": ("stereoset",),
    "seat": ("seat", "seat-mean"),
    "perplexity": ("mlm-loss", "perplexity"),
    "classification": ("accuracy", "f1", "tpr-gap", "equalized-odds", "demographic-parity"),
    "fprd": ("fprd",),
    "iptts": ("fprd-iptts",),
    "bias-nli": ("bias-nli",),
    "counterfactual": ("counterfactual",),
}
"""How the names of its figures begin, up to the first /."""


def parse_on(entries: tuple[str, ...]) -> list[tuple[str, str]]:
    """["crows-pairs=FILE"] -> [(name, file)]. Raises ConfigError that lists the names, DataError on a file that is not there."""
    parsed = []
    for entry in entries:
        name, equals, path = entry.partition("=")
        if name not in ON:
            raise ConfigError(f"--on {entry}: expected NAME=FILE with NAME one of {', '.join(ON)}, got {name!r}")
        if not equals or not path:
            raise ConfigError(f"--on {entry}: expected {name}=FILE, got no file")
        if not Path(path).exists():
            raise DataError(f"{path}: no such file (from --on {entry})")
        if any(name == other and os.path.samefile(path, there) for other, there in parsed):
            raise ConfigError(f"--on {entry}: given twice; expected it once")
        parsed.append((name, path))
    return parsed


def systems(names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Which modules to switch off for each system that is measured: {prefix of its measures' names: off}.

    One module or none: the model as it is. Several: besides it the base without them, and each module alone, so that what one axis's module does to the
    other axis's measures stands in the same table.
    """
    if len(names) < 2:
        return {"": ()}
    return {"": (), "base/": names} | {f"only-{name}/": tuple(n for n in names if n != name) for name in names}


def _of(option: str) -> tuple[str, ...]:
    """The measures that take an option; () of one that is not theirs alone."""
    return next(f.metadata["of"] for f in dataclasses.fields(Evaluate) if f.name == option)


def unused(settings: Evaluate) -> list[str]:
    """A line for every option that says something to measures of which none is asked for."""
    asked = {entry.partition("=")[0] for entry in settings.on}
    return [f"{flag(f.name)}: no effect here: it is an option of {', '.join(of)}" for f in dataclasses.fields(settings)
            if (of := _of(f.name)) and not asked & set(of) and getattr(settings, f.name) != f.default]


def evaluate_run(run: Run, settings: Evaluate) -> Result:
    """All that settings.on asks for, on a loaded run; see `systems` for one with several modules. All systems read the same tokens, as many as all modules leave room for."""
    total, encoder = Result([], [], []), run.model.encoder
    before, encoder.at_most = encoder.at_most, encoder.longest
    try:
        for prefix, off in systems(tuple(run.model.methods)).items():
            with run.model.without(*off):
                results = [(path, ON[name](run, path, settings)) for name, path in parse_on(settings.on)]
                for path, found in results:
                    of = _of_file(path, found, results)
                    total.measures += [dataclasses.replace(m, name=prefix + m.name + of) for m in found.measures]
                    total.examples += [row | {"measure": prefix + row["measure"] + of} for row in found.examples]
                    total.notes += [note for note in found.notes if note not in total.notes]
    finally:
        encoder.at_most = before
    return total


def _of_file(path: str, found: Result, results: list[tuple[str, Result]]) -> str:
    """" (heldout.txt)" where another file has measures of the same names, the whole path where that one is called alike; metrics.bare_name takes it off."""
    own = {m.name for m in found.measures}
    others = [there for there, result in results if result is not found and any(m.name in own for m in result.measures)]
    if not others:
        return ""
    alike = any(Path(there).name == Path(path).name for there in others)
    return f" ({os.path.realpath(path) if alike else Path(path).name})"


def evaluate(settings: Evaluate) -> Result:
    """Load, measure, and write the files that settings name. Raises PeftDebiasError on bad input."""
    expect(Evaluate, settings)
    if not settings.on:
        raise ConfigError(f"--on: expected at least one NAME=FILE with NAME one of {', '.join(ON)}, got none")
    asked = parse_on(settings.on)
    measured = [path for _, path in asked]
    if {name for name, _ in asked} & set(_of("text")) == {"perplexity"}:  # else the column may be another measure's
        corpus.check_column([path for name, path in asked if name == "perplexity"], settings.text, "--text")
    keep_apart({"--json": settings.json, "--examples": settings.examples},
               [*measured, *(file for path in measured for file in _data(path)), *checkpoint.files_of(settings.model, *settings.adapter), settings.terms, *tables(settings.axis)])
    with contextlib.ExitStack() as opened:
        made_from = _made_from(settings, asked) if settings.json else {}  # before there is a file of ours among them
        files = {name: opened.enter_context(writing(path)) for name in ("json", "examples") if (path := getattr(settings, name))}
        run = checkpoint.load_run(settings.model, settings.adapter, pick_device(settings.device), settings.force)
        result = evaluate_run(run, settings)
        if len(run.sources) > 1:
            result.notes[:0] = [f"module {name}: {folder}" for name, folder in run.sources.items()]
        if "json" in files:
            files["json"].write(json.dumps({"measures": [m.as_json() for m in result.measures]} | made_from, indent=2) + "\n")
        if "examples" in files:
            files["examples"].writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in result.examples)
    return result


def _data(path: str) -> list[Path]:
    """The file, or those of a folder; results, .json, may lie in it. A pipe can be read once and is none."""
    return [Path(path)] if Path(path).is_file() else sorted(file for file in files_in(path) if file.suffix != ".json")


def _made_from(settings: Evaluate, asked: list[tuple[str, str]]) -> dict:
    """{"settings", "files": path -> sha256 of each file that figures are of}. The terms that templates come with are among the files, and the setting where there is one such file."""
    beside = dict.fromkeys(str(terms) for name, path in asked if name == "iptts" and (terms := extrinsic.terms_beside(path)))
    terms = [settings.terms] if settings.terms else list(beside)
    named = [path for path in (*(path for _, path in asked), *terms, *tables(settings.axis)) if path]
    alone = terms[0] if len(terms) == 1 else None
    return {"settings": as_plain(dataclasses.replace(settings, terms=alone)), "files": {str(file): digest(file) for path in named for file in _data(path)}}


# ---------------------------------------------------------------- predict

STRETCH = 16384
"""Texts that are read, sorted by length and labelled together, so that memory does not grow with the file."""


def predict(settings: Predict) -> list[str]:
    """Label the texts of settings.file (or standard input) and write {"text", "label", "probabilities"} a line. Returns notes. Raises PeftDebiasError."""
    expect(Predict, settings)
    device = pick_device(settings.device)
    precision = pick_precision(settings.precision, device)
    keep_apart({"--out": settings.out or "-"}, [settings.file or "-", *checkpoint.files_of(settings.run)])
    with writing(settings.out) as file:
        run = checkpoint.load_run(settings.run, device=device)
        if run.model.classifier is None:
            raise ModelError(f"{settings.run}: expected a downstream run with a classifier, got a model without")
        _merge(run)
        longest, labels, cuts, (plain, examples) = longest_of(run, settings), run.model.classifier.labels, Cuts(), _to_label(run, settings)
        rows = lines = 0
        hidden = True if file is sys.stdout and sys.stdout.isatty() else None  # among the lines themselves; None: where standard error is no terminal
        with answering(device, precision), tqdm(desc="predict", unit=" texts", disable=hidden, dynamic_ncols=True) as bar:
            while stretch := list(itertools.islice(examples, STRETCH)):
                encoded = encode_examples(run.tokenizer, stretch, longest)
                cuts.count(encoded)
                for example, row in zip(stretch, class_probabilities(run.model, labelled_samples(encoded), settings.batch_tokens)):
                    line = {"text": example.text, "label": labels[int(row.argmax())], "probabilities": {label: round(float(p), 6) for label, p in zip(labels, row)}}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                bar.update(len(stretch))
                rows, lines = rows + len(stretch), int(stretch[-1].place.rpartition(":")[2])
    source = called(settings.file or "-")
    return cuts.note(longest, source) + [f"{source}: {lines - rows} blank lines have no row"] * (plain and lines > rows)


def _merge(run: Run) -> None:
    """Write the modules into the weights, which then answer sooner, where they can be."""
    if names := [name for name, method in run.model.methods.items() if method.mergeable]:
        with contextlib.suppress(AdapterError):  # one scales what another that stays acts on
            patch.merge(run.model, *names)


def _to_label(run: Run, settings: Predict) -> tuple[bool, Iterator[Example]]:
    """(whether every line is a text, what is to be labelled, streaming). Columns default to the run's own; a txt file and standard input have none, unless --text names one."""
    source, text, pair = settings.file or "-", settings.text or run.config.get("text"), settings.text_pair or run.config.get("text_pair")
    plain = is_plain(source, settings.text, (text, pair))
    check_pairs(settings.run, run, bool(pair))
    if plain:
        return plain, (Example(t.text, None, None, None, t.place) for t in corpus.read_texts([source]))
    return plain, corpus.examples(source, text=text or "text", text_pair=pair)
