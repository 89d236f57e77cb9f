"""The two phases as a user runs them: configuration in, run folder out.

upstream    base frozen, a module (or, for a method that trains the base, the base) learns masked-LM on counterfactual families
downstream  modules frozen, base and head learn a labelled task; foldable modules are folded, what is saved is the base apart from them

What it adds over training.py, and over unlabelled.py and labelled.py, which read the data: building model and task, proving what stayed frozen, saving, and
reporting from the reloaded files. It names no method and no axis.
"""

import contextlib
import dataclasses
import glob
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import torch

from . import checkpoint, methods, patch, weights
from .answers import cut_note, encode_examples, max_length
from .augment import prepared
from .axes import load_axis
from .config import Downstream, Upstream
from .encoder import MaskedLMHead, Model
from .errors import ConfigError, PeftDebiasError
from .extrinsic import classification_measures
from .unlabelled import TrainingCorpus
from .labelled import read_labelled
from .metrics import Measure
from .metrics.classification import accuracy, f1, macro_f1
from .options import as_plain, checked, expect
from .outputs import tables
from .patch import all_parameters, base_checksum, train_only
from .tasks import Classification, MaskedLM, class_probabilities, labelled_samples
from .training import Outcome, Schedule, pick_device, pick_precision, pick_step, train


@dataclasses.dataclass
class PhaseResult:
    """out: the run folder. outcome: of the training loop. measures: on the test file, from the reloaded run. notes: lines for people."""

    out: Path
    outcome: Outcome
    measures: list[Measure]
    notes: list[str]


# ---------------------------------------------------------------- upstream

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
    precision = pick_precision(settings.precision, device)
    step = pick_step(settings.step, device, precision)
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
        texts = TrainingCorpus(settings, axis, intervention, tokenizer, longest, stack)
        notes = [*loaded.report.lines(), *short, *texts.notes(), *texts.held_out_notes]
        model.to(device)
        notes += [f"device: {device}, {precision}", *_compiling(step)]
        task = MaskedLM(texts.epochs.epoch, texts.held_out.families, tokenizer, seed=settings.seed)
        schedule = _schedule(settings, settings.steps, settings.valid_every, precision, step)
        _tell(say, notes)
        spent = []  # seconds of every training
        if settings.fresh_head:
            spent.append(_train_head(model, task, dataclasses.replace(schedule, steps=settings.fresh_head), run.event, say).seconds)

        def loop(parameters: dict, pull=None, rate: float = 1.0) -> Outcome:
            train_only(model, parameters.values())
            notes.append(size_note(cls.name, parameters, model))
            say(notes[-1])
            found = train(model, task, parameters, dataclasses.replace(schedule, lr=rate * schedule.lr), run.event, label=f"upstream {axis.name}", pull=pull)
            spent.append(found.seconds)
            return found

        outcome = dataclasses.replace(method.learn(model, loop), seconds=sum(spent))
        model.to("cpu")
        if cls.trains_base or settings.fresh_head:
            weights.save_model(model, run.path / "model", tokenizer)
        if not cls.trains_base:
            _assert_frozen("base", base["sha256"], base_checksum(model))
            checkpoint.save_adapter(checkpoint.adapter_folder(run.path), method, axis.name, base, about)
        if len(spent) > 1:
            notes.append(f"seconds: of {len(spent)} trainings; tokens a second and the share of waiting are the last one's")
            say(notes[-1])
        more = [note for note in texts.notes() if note not in notes]  # of a pass over the corpus that has gone on meanwhile
        _tell(say, more)
        notes += more
        run.event(event="final", step=outcome.best_step, seconds=round(outcome.seconds, 1), waiting=round(outcome.waiting, 4), corpus=texts.counts(), **outcome.best)
    return PhaseResult(Path(settings.out), outcome, [], notes)


def _train_head(model: Model, task: MaskedLM, schedule: Schedule, log: Callable[..., None], say: Callable[[str], None]) -> Outcome:
    """Train the masked-LM head alone, as one of the base, whatever module is trained then."""
    head = {f"mlm.{name}": p for name, p in model.mlm.named_parameters()}
    train_only(model, head.values())
    _tell(say, [size_note("a new masked-LM head", head, model)])
    with model.without(*model.methods):
        return train(model, task, head, schedule, log, label="masked-LM head")


def _fresh_head(model: Model, settings: Upstream) -> None:
    """Give `model` a new masked-LM head, tied to its word embedding. Raises ConfigError where it has one."""
    if model.mlm is not None:
        raise ConfigError(f"--fresh-head: {settings.model} has a masked-LM head; expected a model without one")
    with torch.device("cpu"), weights.NoInit():  # whatever torch's default device is
        model.mlm = MaskedLMHead(model.config).to(model.encoder.embeddings.word.weight.dtype)
    model.initialize(model.mlm, torch.Generator().manual_seed(settings.seed))
    model.eval()


# ---------------------------------------------------------------- downstream

@_own_modes()
def downstream(settings: Downstream, say: Callable[[str], None] = lambda line: None) -> PhaseResult:
    """Train a classifier under frozen modules. Writes the run folder, reloads it, and reports what the reloaded files give; `say` hears the notes.

    Raises PeftDebiasError on bad input and leaves nothing behind then.
    """
    expect(Downstream, settings)
    device = pick_device(settings.device)
    precision = pick_precision(settings.precision, device)
    step = pick_step(settings.step, device, precision)
    with checkpoint.writing_run(settings.out, "downstream", _saved(settings), settings.overwrite, device, precision=precision, step=step) as run:
        read = read_labelled(settings)
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


def _validation(labels: tuple[str, ...], positive: str | None):
    """What Classification calls on predicted and true indices: accuracy, macro-F1 and the positive label's F1, in %."""
    def measure(predicted: numpy.ndarray, truth: numpy.ndarray) -> dict[str, float]:
        found = {"accuracy": accuracy(predicted, truth, samples=1).value, "macro-f1": macro_f1(predicted, truth, samples=1).value}
        if positive is not None and labels.index(positive) in truth:
            found["f1"] = f1(predicted, truth, labels.index(positive), samples=1).value
        return found
    return measure


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
        given = {folder.resolve() for adapter in map(Path, settings.adapter) for folder in (adapter, *checkpoint.adapter_folders(adapter))}
        if not {folder.resolve() for folder in checkpoint.adapter_folders(run)} <= given:
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
    """The configuration as the run keeps it: folders, files and patterns by absolute path, so that it can be found again from anywhere; not whether a
    folder was replaced, which whoever repeats the run has to say again."""
    values = as_plain(settings)
    del values["overwrite"]
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
