"""Measure a model, and use it: `evaluate` and `predict`, for the command line and the Python API.

What it adds over metrics: which file each measure reads, and how a model answers. ON lists what `--on NAME=FILE` can be.
"""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy

from . import checkpoint, corpus
from .checkpoint import Run
from .config import Evaluate, Predict
from .encoder import Model
from .errors import ConfigError, DataError, ModelError
from .metrics import Measure, crows_pairs
from .metrics.bootstrap import interval
from .metrics.classification import accuracy, f1, macro_f1
from .metrics.tpr_gap import tpr_gap
from .tasks import class_probabilities, label_indices, labelled_samples, masked_lm_nll, masked_samples
from .tokens import Tokenizer
from .training import pick_device

TRUE_LABELS = ("1", "true", "yes")


@dataclasses.dataclass
class Result:
    """measures; examples: a dict for each example, for --examples; notes: lines for people (what was cut, left out)."""

    measures: list[Measure]
    examples: list[dict]
    notes: list[str]


def max_length(model: Model, wanted: int) -> int:
    """The longest text that both the caller and the model allow."""
    return min(wanted, model.config.max_positions)


def cut_note(encoded, longest: int, what: str) -> list[str]:
    """One line where texts were cut, else none."""
    cut = [e.cut for e in encoded if e.cut]
    return [f"{what}: {len(cut)} of {len(encoded)} texts are longer than {longest} tokens and were cut ({sum(cut)} tokens left out)"] if cut else []


# ---------------------------------------------------------------- what can be measured

def _crows_pairs(run: Run, path: str, settings: Evaluate) -> Result:
    pairs = [p for p in crows_pairs.read_pairs(path)]
    if settings.bias_type is not None and settings.bias_type in {p.bias_type for p in pairs}:
        pairs = [p for p in pairs if p.bias_type == settings.bias_type]
    measures, examples = [], []
    for scoring in crows_pairs.SCORINGS:
        scored = crows_pairs.score_pairs(run.model, run.tokenizer, pairs, scoring, settings.batch_tokens)
        measures += crows_pairs.measures(scored, scoring, settings.bias_type, seed=settings.seed, samples=settings.samples)
        examples += [{"measure": f"crows-pairs/{scoring}", "bias_type": s.pair.bias_type, "sent_more": s.pair.more, "sent_less": s.pair.less,
                      "more": s.more, "less": s.less} for s in scored]
    return Result(measures, examples, [])


def _perplexity(run: Run, path: str, settings: Evaluate) -> Result:
    """Masked-LM loss in nats a masked token, and its exponential, with masks fixed by the seed (15 %, 80/10/10)."""
    texts = [t.text for t in corpus.read_texts([path], settings.text)]
    longest = max_length(run.model, settings.max_length)
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


def _classification(run: Run, path: str, settings: Evaluate) -> Result:
    """Accuracy, F1 and, with a group column, TPR-GAP of a downstream run; columns default to the ones it was trained with."""
    def column(name: str) -> str | None:
        return getattr(settings, name) or run.config.get(name)

    if run.model.classifier is None:
        raise ModelError(f"{settings.model}: expected a model with a classifier for classification={path}, got one without")
    if not column("text") or not column("label"):
        raise ConfigError(f"classification={path}: expected --text COL and --label COL")
    examples = corpus.read_examples(path, text=column("text"), label=column("label").split(","), text_pair=column("text_pair"), group=column("group"))
    encoded = encode_examples(run.tokenizer, examples, max_length(run.model, settings.max_length))
    known = run.model.classifier.labels
    label_indices([e.label for e in examples], known, [e.place for e in examples])
    probabilities = class_probabilities(run.model, labelled_samples(encoded), settings.batch_tokens)
    predicted = [known[i] for i in probabilities.argmax(1)]
    measures, notes = classification_measures(predicted, examples, known, column("positive"), seed=settings.seed, samples=settings.samples)
    rows = [{"measure": "classification", "text": e.text, "label": e.label, "group": e.group, "predicted": p,
             "probabilities": dict(zip(known, row.tolist()))} for e, p, row in zip(examples, predicted, probabilities)]
    return Result(measures, rows, cut_note(encoded, max_length(run.model, settings.max_length), path) + notes)


ON: dict[str, Callable[[Run, str, Evaluate], Result]] = {"crows-pairs": _crows_pairs, "perplexity": _perplexity, "classification": _classification}
"""What computes each name of config.MEASURES."""


def encode_examples(tokenizer: Tokenizer, examples, longest: int) -> list:
    """Examples as token ids, pairs where they have a second text."""
    pairs = [e.text_pair for e in examples] if examples and examples[0].text_pair is not None else None
    return tokenizer.encode([e.text for e in examples], pairs, longest)


def positive_label(labels: tuple[str, ...], wanted: str | None) -> str | None:
    """The label F1 is of: the one asked for, else 1, true or yes of two labels, else None. Raises ConfigError on an unknown one."""
    if wanted is not None and wanted not in labels:
        raise ConfigError(f"--positive: expected one of {', '.join(labels)}, got {wanted!r}")
    if wanted is not None or len(labels) != 2:
        return wanted
    return next((label for label in labels if label.lower() in TRUE_LABELS), None)


def classification_measures(predicted: list[str], examples, labels: tuple[str, ...], positive: str | None = None, *, seed: int = 0,
                            samples: int = 1000) -> tuple[list[Measure], list[str]]:
    """Accuracy, F1 (macro, and of the positive label where there is one) and, where the examples have groups, TPR-GAP; with notes on what was left out."""
    truth = [e.label for e in examples]
    positive = positive_label(labels, positive)
    found = [accuracy(predicted, truth, seed=seed, samples=samples), macro_f1(predicted, truth, seed=seed, samples=samples)]
    notes: list[str] = []
    if positive is not None:
        found.append(f1(predicted, truth, positive, seed=seed, samples=samples))
    if any(e.group is not None for e in examples):
        gap = tpr_gap(predicted, truth, [e.group for e in examples], seed=seed, samples=samples)
        found += gap.as_measures()
        if gap.left_out:
            notes.append(f"TPR-GAP: left out, without positives of both groups: {', '.join(gap.left_out)}")
    return found, notes


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


def evaluate_run(run: Run, settings: Evaluate) -> Result:
    """All that settings.on asks for, on a loaded run."""
    total = Result([], [], [])
    for name, path in parse_on(settings.on):
        found = ON[name](run, path, settings)
        total.measures += found.measures
        total.examples += found.examples
        total.notes += found.notes
    return total


def evaluate(settings: Evaluate) -> Result:
    """Load, measure, and write the files that settings name. Raises PeftDebiasError on bad input."""
    if not settings.on:
        raise ConfigError(f"--on: expected at least one NAME=FILE with NAME one of {', '.join(ON)}, got none")
    parse_on(settings.on)
    run = checkpoint.load_run(settings.model, settings.adapter, pick_device(settings.device))
    result = evaluate_run(run, settings)
    if settings.json:
        with writing(settings.json) as file:
            json.dump({"measures": [m.as_json() for m in result.measures]}, file, indent=2)
            file.write("\n")
    if settings.examples:
        with writing(settings.examples) as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in result.examples)
    return result


# ---------------------------------------------------------------- predict

def predict(settings: Predict) -> list[str]:
    """Label the texts of settings.file (or standard input) and write {"text", "label", "probabilities"} a line. Returns notes. Raises PeftDebiasError."""
    run = checkpoint.load_run(settings.run, device=pick_device(settings.device))
    if run.model.classifier is None:
        raise ModelError(f"{settings.run}: expected a downstream run with a classifier, got a model without")
    if settings.file is None:
        lines = [line.rstrip("\r\n") for line in sys.stdin]
        texts, pairs = [line for line in lines if line.strip()], None
    elif settings.text is None and settings.text_pair is None:
        texts, pairs = [t.text for t in corpus.read_texts([settings.file])], None
    else:
        column = settings.text or run.config.get("text")
        if column is None:
            raise ConfigError(f"{settings.file}: expected --text COL, got none")
        examples = corpus.read_examples(settings.file, text=column, text_pair=settings.text_pair)
        texts = [e.text for e in examples]
        pairs = [e.text_pair for e in examples] if settings.text_pair else None
    if not texts:
        raise DataError(f"{settings.file or 'standard input'}: expected at least one text, got none")
    longest = max_length(run.model, settings.max_length)
    encoded = run.tokenizer.encode(texts, pairs, longest)
    probabilities = class_probabilities(run.model, labelled_samples(encoded), settings.batch_tokens)
    labels = run.model.classifier.labels
    with writing(settings.out) as file:
        for text, row in zip(texts, probabilities):
            line = {"text": text, "label": labels[int(row.argmax())], "probabilities": {label: round(float(p), 6) for label, p in zip(labels, row)}}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return cut_note(encoded, longest, settings.file or "standard input")


@contextlib.contextmanager
def writing(path: str | None) -> Iterator:
    """A text file that takes its name only when the block ends well; None or "-" is standard output. Raises ConfigError where it cannot be written."""
    if path in (None, "-"):
        yield sys.stdout
        return
    target = Path(path)
    if target.exists() and not target.is_file():  # a device such as /dev/null
        with open(target, "w", encoding="utf-8") as file:
            yield file
        return
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        file = open(partial, "w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        with file:
            yield file
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
