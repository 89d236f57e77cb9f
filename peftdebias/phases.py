"""The two phases as a user runs them: configuration in, run folder out.

upstream    base frozen, a module (or, for a method that trains the base, the base) learns masked-LM on counterfactual families
downstream  modules frozen, base and head learn a labelled task; foldable modules are folded, what is saved is the base apart from them

What it adds over training.py: reading the data, building model and task, proving what stayed frozen, saving, and reporting from the reloaded files.
It names no method and no axis.
"""

import collections
import contextlib
import dataclasses
import glob
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy
import torch

from . import checkpoint, corpus, lines, methods, patch, weights
from .answers import cut_note, encode_examples, max_length, positive_label
from .augment import prepared
from .axes import Axis, load_axis
from .cda import PAPER, Intervention
from .cda_engine import expand
from .config import Downstream, Upstream
from .encoder import MaskedLMHead, Model
from .errors import ConfigError, DataError, PeftDebiasError
from .extrinsic import classification_measures
from .holdout import HeldOut, beside, choose, first_families
from .lines import Skipped
from .metrics import Measure
from .metrics.classification import accuracy, f1, macro_f1
from .options import as_plain, checked, expect
from .outputs import tables
from .patch import all_parameters, base_checksum, train_only
from .stream import Counts, Recipe
from .tasks import Classification, MaskedLM, class_probabilities, label_indices, labelled_samples
from .tokens import Tokenizer
from .training import Outcome, Schedule, pick_device, pick_precision, pick_step, train
from .worker import Epochs, default_workers

CHUNK = 4096  # texts tokenised together
FEW = 20  # held-out families, fewer than which say little
MOST_LABELS_TOLD = 8
MOST_GRADES = 20  # labels that may be fractions, as grades in halves are; more of them are measurements


@dataclasses.dataclass
class PhaseResult:
    """out: the run folder. outcome: of the training loop. measures: on the test file, from the reloaded run. notes: lines for people."""

    out: Path
    outcome: Outcome
    measures: list[Measure]
    notes: list[str]


# ---------------------------------------------------------------- upstream

@dataclasses.dataclass
class FamilyIds:
    """Tokenised families, and what their texts were: texts read, families kept, members, how many of these were cut and by how much."""

    families: list[list[numpy.ndarray]]
    texts: int = 0
    cut: int = 0

    @property
    def members(self) -> int:
        return sum(len(f) for f in self.families)


def encode_families(texts: Iterable[str], axis: Axis, tokenizer: Tokenizer, longest: int, intervention: Intervention = PAPER) -> FamilyIds:
    """Counterfactual families of the texts as token ids; the axis says whether texts without an attribute word stay, the intervention what of a family."""
    found, texts = FamilyIds([]), iter(texts)
    while chunk := list(itertools.islice(texts, CHUNK)):
        made = expand(chunk, axis, intervention)
        encoded = iter(tokenizer.encode(made.texts, max_length=longest))
        found.texts += len(chunk)
        for size in made.sizes:
            ids = [next(encoded) for _ in range(size)]
            found.cut += sum(e.cut > 0 for e in ids)
            found.families.append([e.ids for e in ids])
    return found


def _held_out(settings: Upstream, axis: Axis, intervention: Intervention, files: list[str], valid: list[str], skipped: Skipped) -> tuple[HeldOut, list[str]]:
    """(which texts of the corpus are held out, texts of the families to validate on). `skipped` hears of the corrupt lines of the validation files.

    Raises DataError where either side has no words of the axis.
    """
    def read(paths: list[str], skipped: Skipped | None = None):
        return lambda: (chunk.texts for chunk in corpus.chunks(paths, settings.column, unit=settings.unit, on_error=settings.on_error, skipped=skipped))

    if valid:
        names = ", ".join(settings.corpus), ", ".join(settings.valid)
        texts = first_families(read(valid, skipped), axis, intervention, settings.valid_texts, names[1])
        return beside(read(files), texts, axis, intervention, *names), texts
    return choose(read(files), axis, intervention, settings.valid_share, settings.valid_texts, ", ".join(settings.corpus))


@contextlib.contextmanager
def _own_modes() -> Iterator[None]:
    """What a caller set for its own tensors ends here: inference_mode, no_grad, autocast."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@_own_modes()
def upstream(settings: Upstream, say: Callable[[str], None] = lambda line: None) -> PhaseResult:
    """Learn a debiasing module. Writes the run folder that checkpoint.py describes; `say` hears the notes before the training begins.

    Raises PeftDebiasError on bad input and leaves nothing behind then.
    """
    expect(Upstream, settings)
    device = pick_device(settings.device)
    precision, step = pick_precision(settings.precision, device), pick_step(settings.step, device)
    axis, intervention = prepared(settings)
    about = {"axis_sha256": load_axis(settings.axis).digest()}  # before the training, in whose hours the file may change or go
    cls = methods.method_class(settings.method)
    options = checked(cls.Config, settings.set or {}, f"--set, {cls.name}: ")
    with checkpoint.writing_run(settings.out, "upstream", _saved(settings), settings.overwrite, device, precision=precision, step=step) as run, contextlib.ExitStack() as stack:
        loaded = _load_base(settings, mlm=None if settings.fresh_head else True, labels=())
        model, tokenizer = loaded.model, loaded.tokenizer
        if settings.fresh_head:
            _fresh_head(model, settings)
        checkpoint.attach_adapters(model, settings.adapter, settings.force)
        method = methods.create(settings.method, model.config, budget=settings.budget, options=options, seed=settings.seed, max_length=settings.max_length)
        short = methods.short_note(settings.budget, method, options)
        base = checkpoint.describe_base(model)
        if cls.trains_base:
            if model.methods:
                raise ConfigError(f"--method {cls.name}: trains the base itself; expected no --adapter beside it")
        else:
            patch.attach(model, axis.name if axis.name not in model.methods else axis.name + "-new", method)
        longest = max_length(model, settings.max_length)
        texts = _Corpus(settings, axis, intervention, tokenizer, longest, stack)
        notes = [*loaded.report.lines(), *short, *texts.notes(), *texts.held_out_notes]
        model.to(device)
        notes += [f"device: {device}, {precision}", *_compiling(step)]
        task = MaskedLM(texts.epochs.epoch, texts.held_out.families, tokenizer, seed=settings.seed)
        schedule = _schedule(settings, settings.steps, settings.valid_every, precision, step)
        _tell(say, notes)
        if settings.fresh_head:
            _train_head(model, task, dataclasses.replace(schedule, steps=settings.fresh_head), run.event, say)

        def loop(parameters: dict, pull=None, rate: float = 1.0) -> Outcome:
            train_only(model, parameters.values())
            notes.append(size_note(cls.name, parameters, model))
            say(notes[-1])
            return train(model, task, parameters, dataclasses.replace(schedule, lr=rate * schedule.lr), run.event, label=f"upstream {axis.name}", pull=pull)

        outcome = method.learn(model, loop)
        model.to("cpu")
        if cls.trains_base or settings.fresh_head:
            weights.save_model(model, run.path / "model", tokenizer)
        if not cls.trains_base:
            _assert_frozen("base", base["sha256"], base_checksum(model))
            checkpoint.save_adapter(checkpoint.adapter_folder(run.path), method, axis.name, base, about)
        more = [note for note in texts.notes() if note not in notes]  # of a pass over the corpus that has gone on meanwhile
        _tell(say, more)
        notes += more
        run.event(event="final", step=outcome.best_step, seconds=round(outcome.seconds, 1), waiting=round(outcome.waiting, 4), corpus=texts.counts(), **outcome.best)
    return PhaseResult(Path(settings.out), outcome, [], notes)


class _Corpus:
    """The texts of an upstream run, opened: `epochs` of batches, the `held_out` families that choose the best step, and what is to be said of both."""

    def __init__(self, settings: Upstream, axis: Axis, intervention: Intervention, tokenizer: Tokenizer, longest: int, stack: contextlib.ExitStack):
        self.axis, self.longest = axis, longest
        self._copies = stack.enter_context(lines.Copies())
        files, valid = (self._copies.seekable(lines.find(paths)) for paths in (settings.corpus, settings.valid))
        corpus.check_column(files + valid, settings.column)
        skipped = Skipped()
        rule, held_out = _held_out(settings, axis, intervention, files, valid, skipped)
        self.held_out = encode_families(held_out, axis, tokenizer, longest, intervention)
        recipe = Recipe(tuple(files), axis, tokenizer, longest, settings.seed, settings.batch, column=settings.column, unit=settings.unit, on_error=settings.on_error,
                        intervention=intervention, held_out=rule, buffer=settings.shuffle_buffer, cache=settings.cache,
                        attribute_weight=settings.attribute_weight)
        self.epochs = stack.enter_context(Epochs(recipe, default_workers(recipe.files) if settings.workers is None else settings.workers))
        self.epochs.ready()
        self._apart = len(self.held_out.families) if valid else None
        self.held_out_notes = []
        if len(self.held_out.families) < FEW:
            self.held_out_notes.append(f"held out: only {len(self.held_out.families)} families to choose the best step by; more come with --valid-share or a --valid file")
        if self.held_out.cut:
            self.held_out_notes.append(f"held out: {_cut(self.held_out.cut, self.held_out.members, longest)}")
        self.held_out_notes += map(self._copies.named, skipped.report("held out"))

    def notes(self) -> list[str]:
        """What is known of the corpus by now: all of it where it was read to its end before the training began."""
        return [self._copies.named(note) for note in _corpus_notes(self.epochs.counts, self._apart, self.axis.name, self.longest)]

    def counts(self) -> dict:
        """What was read, for the run's log."""
        found = {k: v for k, v in dataclasses.asdict(self.epochs.counts).items() if k != "notes"}
        return found | {"first_skipped": [self._copies.named(line) for line in found["first_skipped"]]}


def _train_head(model: Model, task: MaskedLM, schedule: Schedule, log: Callable[..., None], say: Callable[[str], None]) -> None:
    """Train the masked-LM head alone, as one of the base, whatever module is trained then."""
    head = {f"mlm.{name}": p for name, p in model.mlm.named_parameters()}
    train_only(model, head.values())
    _tell(say, [size_note("a new masked-LM head", head, model)])
    with model.without(*model.methods):
        train(model, task, head, schedule, log, label="masked-LM head")


def _fresh_head(model: Model, settings: Upstream) -> None:
    """Give `model` a new masked-LM head, tied to its word embedding. Raises ConfigError where it has one."""
    if model.mlm is not None:
        raise ConfigError(f"--fresh-head: {settings.model} has a masked-LM head; expected a model without one")
    model.mlm = MaskedLMHead(model.config)
    model.initialize(model.mlm, torch.Generator().manual_seed(settings.seed))
    model.eval()


def _corpus_notes(counts: Counts, held_out: int | None, axis: str, longest: int) -> list[str]:
    """What the corpus is, as far as it was read. held_out: families of a validation file; None: the corpus's own, as counted."""
    aside = f"{counts.held_out if held_out is None else held_out} families held out"
    if held_out is not None and counts.held_out:
        aside += f", {counts.held_out} that are among these left out"
    touched = f"{counts.texts} texts, {counts.touched} with words of the axis {axis}; {counts.families} families of {counts.members} texts"
    notes = list(counts.notes)
    if counts.whole:
        notes.append(f"corpus: {touched} to train on, {aside}")
    else:
        notes.append(f"corpus, as far as it was read: {touched}, {aside}")
    if counts.cut:
        notes.append(f"corpus: {_cut(counts.cut, counts.members, longest)}")
    return notes + Skipped(counts.skipped, counts.first_skipped).report("corpus")


def _cut(cut: int, members: int, longest: int) -> str:
    return f"{cut} of {members} texts (counterfactuals counted) are longer than {longest} tokens and were cut"


# ---------------------------------------------------------------- downstream

@dataclasses.dataclass(frozen=True)
class Splits:
    """What a downstream phase learns from and is measured on. paths, splits (examples), targets (indices of labels): by "train", "dev" and, where given, "test"; last: the
    one measured at the end. positive: the label that F1 is of. class_weights: in the order of `labels`."""

    paths: dict[str, str]
    splits: dict[str, list]
    labels: tuple[str, ...]
    targets: dict[str, list[int]]
    positive: str | None
    class_weights: list[float] | None
    last: str

    def lines(self) -> list[str]:
        """How many examples there are, of each label."""
        found = []
        for name, path in self.paths.items():
            counts = collections.Counter(e.label for e in self.splits[name])
            of_each = [f"{counts[label]:,} with the label {label}" for label in self.labels] if len(self.labels) <= MOST_LABELS_TOLD else [f"{len(self.labels)} labels"]
            found.append(f"{name}: {path}, {len(self.splits[name]):,} examples, {', '.join(of_each)}")
        return found


def read_splits(settings: Downstream) -> Splits:
    """Read, and checked as far as that goes without a model. Raises DataError or ConfigError."""
    paths = {name: path for name, path in (("train", settings.train), ("dev", settings.dev), ("test", settings.test)) if path}
    splits = {name: _read(settings, path) for name, path in paths.items()}
    labels = tuple(sorted({e.label for e in splits["train"]}, key=_natural))
    if len(labels) < 2:
        raise DataError(f"{settings.train}: expected at least two labels in the column {settings.label}, got {labels[0]!r} alone")
    numbers = [_number(label) for label in labels]
    if len(labels) > MOST_GRADES and all(map(math.isfinite, numbers)) and not all(map(float.is_integer, numbers)):
        raise DataError(f"{settings.train}: expected classes in the column {settings.label}, got {len(labels)} numbers such as {labels[1]}; what is trained is no regression")
    targets = {name: label_indices([e.label for e in examples], labels, [e.place for e in examples]) for name, examples in splits.items()}
    positive = positive_label(labels, settings.positive)
    class_weights = parse_class_weights(settings.class_weights, labels)
    if settings.metric == "f1":
        if positive is None:
            raise ConfigError(f"--metric f1: expected --positive with one of {', '.join(labels)}")
        for name, path in paths.items():
            if positive not in {e.label for e in splits[name]}:
                raise DataError(f"{path}: expected examples with the label {positive!r} for --metric f1, found none")
    last = "test" if settings.test else "dev"
    # What cannot be measured at the end is said now.
    classification_measures([e.label for e in splits[last]], splits[last], labels, positive, where=paths[last], samples=1)
    return Splits(paths, splits, labels, targets, positive, class_weights, last)


@_own_modes()
def downstream(settings: Downstream, say: Callable[[str], None] = lambda line: None) -> PhaseResult:
    """Train a classifier under frozen modules. Writes the run folder, reloads it, and reports what the reloaded files give; `say` hears the notes.

    Raises PeftDebiasError on bad input and leaves nothing behind then.
    """
    expect(Downstream, settings)
    device = pick_device(settings.device)
    precision, step = pick_precision(settings.precision, device), pick_step(settings.step, device)
    with checkpoint.writing_run(settings.out, "downstream", _saved(settings), settings.overwrite, device, precision=precision, step=step) as run:
        read = read_splits(settings)
        paths, splits, labels, targets, positive, last = read.paths, read.splits, read.labels, read.targets, read.positive, read.last
        loaded = _load_base(settings, mlm=False, labels=labels)
        model, tokenizer = loaded.model, loaded.tokenizer
        notes = [*read.lines(), *loaded.report.lines()]
        adapters = checkpoint.attach_adapters(model, settings.adapter, settings.force)
        frozen = {name: patch.checksum(m.state()) for name, m in model.methods.items()}
        longest = max_length(model, settings.max_length)
        _tell(say, notes)  # now, as tokenising many takes its time
        told = len(notes)
        encoded = {name: encode_examples(tokenizer, examples, longest) for name, examples in splits.items()}
        for name, path in paths.items():
            notes += cut_note(encoded[name], longest, path)
        model.to(device)
        trained = {n: p for n, p in all_parameters(model).items() if not n.startswith("methods.") and not any(m.keeps(n) for m in model.methods.values())}
        still = {n: p for n, p in all_parameters(model).items() if not n.startswith("methods.") and n not in trained}
        stood = patch.checksum(still)
        train_only(model, trained.values())
        notes += [size_note("base and classifier", trained, model), f"device: {device}, {precision}", *_compiling(step)]
        samples = {name: labelled_samples(encoded[name], targets[name]) for name in splits}
        task = Classification(samples["train"], samples["dev"], _validation(labels, positive), settings.metric, seed=settings.seed, batch=settings.batch,
                              weights=read.class_weights)
        folded = patch.fold(model) if settings.fold else None
        _tell(say, notes[told:])
        outcome = train(model, task, trained, _schedule(settings, task.steps(settings.epochs), None, precision, step), run.event, folded, "downstream")
        if folded is not None:
            folded.unfold()
        model.to("cpu")
        for name, method in model.methods.items():
            _assert_frozen(f"module {name}", frozen[name], patch.checksum(method.state()))
        _assert_frozen("untrained part of the base", stood, patch.checksum(still))
        weights.save_model(model, run.path / "model", tokenizer)
        base = checkpoint.describe_base(model)
        for number, adapter in enumerate(adapters, 1):
            checkpoint.save_adapter(checkpoint.adapter_folder(run.path, number), adapter.method, adapter.axis, base, {"learnt_on": adapter.base} | adapter.about)
        reloaded = checkpoint.load_run(run.path, device=device).model
        predicted = [labels[i] for i in class_probabilities(reloaded, samples[last]).argmax(1)]
        measures, more = classification_measures(predicted, splits[last], labels, positive, where=paths[last], seed=settings.seed)
        _tell(say, more)
        run.event(event="final", step=outcome.best_step, seconds=round(outcome.seconds, 1), on=last, measures=[m.as_json() for m in measures])
    return PhaseResult(Path(settings.out), outcome, measures, notes + more)


def _read(settings: Downstream, path: str):
    return corpus.read_examples(path, text=settings.text, label=settings.label.split(","), text_pair=settings.text_pair, group=settings.group)


def _number(label: str) -> float:
    """NaN where it is none."""
    try:
        return float(label)
    except ValueError:
        return math.nan


def _natural(label: str) -> tuple:
    """Numbers in their order, before words."""
    try:
        return 0, int(label), label  # "1" and "01" are two labels
    except ValueError:
        return 1, 0, label


def _validation(labels: tuple[str, ...], positive: str | None):
    """What Classification calls on predicted and true indices: accuracy, macro-F1 and the positive label's F1, in %."""
    def measure(predicted: numpy.ndarray, truth: numpy.ndarray) -> dict[str, float]:
        found = {"accuracy": accuracy(predicted, truth, samples=1).value, "macro-f1": macro_f1(predicted, truth, samples=1).value}
        if positive is not None and labels.index(positive) in truth:
            found["f1"] = f1(predicted, truth, labels.index(positive), samples=1).value
        return found
    return measure


def parse_class_weights(text: str | None, labels: tuple[str, ...]) -> list[float] | None:
    """"0=1,1=10" -> [1.0, 10.0] in the order of `labels`; 1 where not named. Raises ConfigError on an unknown label, one named twice, and a weight that is no positive number or none that
    float32 can add up."""
    if not text:
        return None
    found: dict[str, float] = {}
    for part in text.split(","):
        label, _, weight = part.rpartition("=")
        if label not in labels:
            raise ConfigError(f"--class-weights {part}: expected LABEL=WEIGHT with LABEL one of {', '.join(labels)}, got {label!r}")
        if label in found:
            raise ConfigError(f"--class-weights {part}: expected each label once, got {label!r} twice")
        try:
            found[label] = float(weight)
        except ValueError:
            found[label] = math.nan
        if not 1e-30 <= found[label] <= 1e30:
            raise ConfigError(f"--class-weights {part}: expected a positive number, 1e-30 to 1e30, got {weight!r}")
    return [found.get(label, 1.0) for label in labels]


# ---------------------------------------------------------------- both

def _tell(say: Callable[[str], None], lines: list[str]) -> None:
    for line in lines:
        say(line)


def _load_base(settings: Upstream | Downstream, **options) -> weights.Loaded:
    """The base named by --model. Raises ConfigError on a run whose module would be left behind unsaid."""
    run = Path(settings.model)
    if checkpoint.is_run(run):
        if not (run / "model").is_dir():
            raise ConfigError(f"--model {run}: a run with a module alone; expected the base it was learnt on as --model, and the run as --adapter")
        if checkpoint.adapter_folders(run) and run.resolve() not in {Path(a).resolve() for a in settings.adapter}:
            raise ConfigError(f"--model {run}: its base works with the module beside it; expected --adapter {run} too, or --model {run / 'model'} to do without")
    return weights.load(settings.model, seed=settings.seed, **options)


def size_note(what: str, trained: dict, model: Model) -> str:
    """How many parameters are trained, as a number and a share of the base."""
    count, total = sum(p.numel() for p in trained.values()), methods.base_parameters(model.config)
    return f"trained: {what}, {count:,} parameters in {len(trained)} tensors, {100 * count / total:.2f} % of the base's {total:,}; everything else is frozen"


def _compiling(step: str) -> list[str]:
    return ["step: compiled; two or three steps, most of them among the first, wait for the compiler, half a minute or more each"] if step == "compiled" else []


def _schedule(settings: Upstream | Downstream, steps: int, validate_every: int | None, precision: str, step: str) -> Schedule:
    return Schedule(steps=steps, lr=settings.lr, validate_every=validate_every, warmup=settings.warmup, weight_decay=settings.weight_decay,
                    clip=settings.clip, precision=precision, step=step, save_memory=settings.save_memory, seed=settings.seed)


def _saved(settings: Upstream | Downstream) -> dict:
    """The configuration as the run keeps it: folders, files and patterns by absolute path, so that it can be found again from anywhere."""
    values = as_plain(settings)
    for key in checkpoint.SOURCES:
        if key in values:
            values[key] = [_absolute(v) for v in values[key]] if isinstance(values[key], list) else _absolute(values[key])
    for key in ("axis", "names"):
        if values.get(key) in tables(values.get("axis"), values.get("names")):
            values[key] = _absolute(values[key])
    if values.get("cache"):
        values["cache"] = os.path.realpath(values["cache"])  # which may be made by this run
    return values


def _absolute(path: str) -> str:
    if os.path.exists(path):
        return os.path.realpath(path)
    return os.path.join(glob.escape(os.getcwd()), path) if glob.has_magic(path) else path  # the folder's own name is no pattern


def _assert_frozen(what: str, before: str, after: str) -> None:
    if before != after:
        raise PeftDebiasError(f"{what}: expected to stay frozen bit for bit (sha256 {before[:12]}), got {after[:12]}; please report this")
