"""Measure a model, and use it: `evaluate` and `predict`, for the command line and the Python API.

What it adds over metrics: which file each measure of a masked-LM reads. ON lists what `--on NAME=FILE` can be; extrinsic.py has the measures of
downstream runs.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy

from . import checkpoint, corpus, extrinsic
from .answers import LONGEST, Result, cut_note, encode_examples, longest_of, max_length, positive_label
from .checkpoint import Run
from .config import Evaluate, Predict
from .corpus import writing
from .errors import ConfigError, DataError, ModelError
from .extrinsic import classification_measures
from .metrics import Measure, crows_pairs
from .metrics.bootstrap import interval
from .tasks import class_probabilities, labelled_samples, masked_lm_nll, masked_samples
from .training import pick_device

__all__ = ["LONGEST", "ON", "Result", "classification_measures", "cut_note", "encode_examples", "evaluate", "evaluate_run", "max_length", "parse_on",
           "positive_label", "predict", "systems"]


def _masked_lm(run: Run, settings: Evaluate, entry: str) -> None:
    if run.model.mlm is None:
        raise ModelError(f"{settings.model}: expected a model with a masked-LM head for --on {entry}, got one without "
                         "(a downstream run has a classifier instead; a head that --fresh-head trained is in its own run)")


# ---------------------------------------------------------------- what can be measured

def _crows_pairs(run: Run, path: str, settings: Evaluate) -> Result:
    _masked_lm(run, settings, f"crows-pairs={path}")
    pairs = crows_pairs.read_pairs(path)
    kinds = sorted({p.bias_type for p in pairs})
    if settings.bias_type is not None:
        if settings.bias_type not in kinds:
            raise DataError(f"{path}: expected --bias-type to be one of {', '.join(kinds)}, got {settings.bias_type!r}")
        pairs = [p for p in pairs if p.bias_type == settings.bias_type]
    longest = max_length(run.model, run.model.config.max_positions)
    notes = cut_note(run.tokenizer.encode([s for p in pairs for s in (p.more, p.less)], max_length=longest), longest, path)
    measures, examples = [], []
    for scoring in crows_pairs.SCORINGS:
        scored = crows_pairs.score_pairs(run.model, run.tokenizer, pairs, scoring, settings.batch_tokens)
        measures += crows_pairs.measures(scored, scoring, settings.bias_type, seed=settings.seed, samples=settings.samples)
        examples += [{"measure": f"crows-pairs/{scoring}", "bias_type": s.pair.bias_type, "sent_more": s.pair.more, "sent_less": s.pair.less,
                      "more": s.more, "less": s.less} for s in scored]
    return Result(measures, examples, notes)


def _perplexity(run: Run, path: str, settings: Evaluate) -> Result:
    """Masked-LM loss in nats a masked token, and its exponential, with masks fixed by the seed (15 %, 80/10/10)."""
    _masked_lm(run, settings, f"perplexity={path}")
    texts = [t.text for t in corpus.read_texts([path], settings.text)]
    longest = longest_of(run, settings)
    encoded = run.tokenizer.encode(texts, max_length=longest)
    samples = masked_samples([e.ids for e in encoded], run.tokenizer, numpy.random.default_rng([settings.seed, 4]))
    sums, counts = masked_lm_nll(run.model, samples, settings.batch_tokens)
    if not counts.sum():
        raise DataError(f"{path}: expected words to mask, got none")
    loss = float(sums.sum() / counts.sum())
    low, high = interval(lambda items: sums[items].sum() / max(1, counts[items].sum()), len(samples), seed=settings.seed, samples=settings.samples)
    examples = [{"measure": "mlm-loss", "text": t, "nll": s, "tokens": int(c)} for t, s, c in zip(texts, sums.tolist(), counts)]
    measures = [Measure("mlm-loss", loss, "nats", None, low, high, len(samples)),
                Measure("perplexity", float(numpy.exp(loss)), "1", None, float(numpy.exp(low)), float(numpy.exp(high)), len(samples))]
    return Result(measures, examples, cut_note(encoded, longest, path))


ON: dict[str, Callable[[Run, str, Evaluate], Result]] = {
    "crows-pairs": _crows_pairs,
    "perplexity": _perplexity,
    "classification": extrinsic.classification,
    "fprd": extrinsic.fprd_in_domain,
    "iptts": extrinsic.iptts,
    "bias-nli": extrinsic.bias_nli,
    "counterfactual": extrinsic.counterfactual_flips,
}
"""What computes each name of config.MEASURES."""


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


def evaluate_run(run: Run, settings: Evaluate) -> Result:
    """All that settings.on asks for, on a loaded run; see `systems` for one with several modules."""
    total = Result([], [], [])
    for prefix, off in systems(tuple(run.model.methods)).items():
        with run.model.without(*off):
            for name, path in parse_on(settings.on):
                found = ON[name](run, path, settings)
                total.measures += [dataclasses.replace(m, name=prefix + m.name) for m in found.measures]
                total.examples += [row | {"measure": prefix + row["measure"]} for row in found.examples]
                total.notes += [note for note in found.notes if note not in total.notes]
    return total


def evaluate(settings: Evaluate) -> Result:
    """Load, measure, and write the files that settings name. Raises PeftDebiasError on bad input."""
    if not settings.on:
        raise ConfigError(f"--on: expected at least one NAME=FILE with NAME one of {', '.join(ON)}, got none")
    parse_on(settings.on)
    with contextlib.ExitStack() as opened:
        files = {name: opened.enter_context(writing(path)) for name in ("json", "examples") if (path := getattr(settings, name))}
        run = checkpoint.load_run(settings.model, settings.adapter, pick_device(settings.device), settings.force)
        result = evaluate_run(run, settings)
        if "json" in files:
            files["json"].write(json.dumps({"measures": [m.as_json() for m in result.measures]}, indent=2) + "\n")
        if "examples" in files:
            files["examples"].writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in result.examples)
    return result


# ---------------------------------------------------------------- predict

def predict(settings: Predict) -> list[str]:
    """Label the texts of settings.file (or standard input) and write {"text", "label", "probabilities"} a line. Returns notes. Raises PeftDebiasError."""
    device = pick_device(settings.device)
    with writing(settings.out) as file:
        run = checkpoint.load_run(settings.run, device=device)
        if run.model.classifier is None:
            raise ModelError(f"{settings.run}: expected a downstream run with a classifier, got a model without")
        texts, pairs = _to_label(run, settings)
        longest, labels = longest_of(run, settings), run.model.classifier.labels
        encoded = run.tokenizer.encode(texts, pairs, longest)
        for text, row in zip(texts, class_probabilities(run.model, labelled_samples(encoded), settings.batch_tokens)):
            line = {"text": text, "label": labels[int(row.argmax())], "probabilities": {label: round(float(p), 6) for label, p in zip(labels, row)}}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return cut_note(encoded, longest, settings.file or "standard input")


def _to_label(run: Run, settings: Predict) -> tuple[list[str], list[str] | None]:
    """(texts, second texts or None). Columns default to the run's own; a txt file and standard input have none, unless --text names one."""
    source, text, pair = settings.file or "-", settings.text or run.config.get("text"), settings.text_pair or run.config.get("text_pair")
    plain = source == "-" or (Path(source).name.lower().removesuffix(".gz").endswith(".txt") and settings.text is None)
    if plain and pair:
        raise ConfigError(f"{settings.file or 'standard input'}: expected a csv, tsv or jsonl file with the columns {text} and {pair}, since the run labels pairs")
    if plain:
        return [t.text for t in corpus.read_texts([source])], None
    examples = corpus.read_examples(source, text=text or "text", text_pair=pair)
    return [e.text for e in examples], [e.text_pair for e in examples] if pair else None
