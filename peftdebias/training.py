"""One loop for both phases. It knows no method, no axis and no task: it gets parameters, batches, a loss and a validation.

AdamW (Loshchilov and Hutter 2019) with a linear warm-up and decay; the state with the best validation is kept. What a step does is step.py's.
"""

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import Parameter
from tqdm import tqdm

from . import kernels
from .batches import Batch
from .encoder import Model
from .errors import ConfigError, PeftDebiasError
from .graphs import Graphed
from .kernels import dispatch
from .lowered import BF16_PRODUCTS, autocast, rounded_beforehand
from .ops.linear import no_bf16
from .optimizer import AdamWOfManyRef, FlatAdamW, LargeAdamW, WholeAdamW, adamw_ref
from .patch import Folded
from .step import Compiled, Step, expect_compiler
from .weights import known_device

LOG_EVERY = 10
TOLD_EVERY = 60.0  # seconds, where there is no terminal for a bar
STEPS = {"eager": Step, "graph": Graphed, "compiled": Compiled}
FLAT = {"native": 2 ** 24, "triton": 2 ** 22}
"""Kind of kernel -> values of a module at most, gathered into one tensor; a whole base has large tensors, which are better left where they are."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """steps in all; validate_every steps (or None: at the end of every epoch); lr is the peak; warmup a share of the steps; clip a gradient norm; precision: as
    lowered.autocast has it; step: how a step runs, one of STEPS; save_memory: the backward computes the layers again (Encoder.recompute)."""

    steps: int
    lr: float
    validate_every: int | None = None
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    precision: str = "float32"
    step: str = "eager"
    save_memory: bool = False
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of step 1..steps."""
        rise = max(1, round(self.warmup * self.steps))
        if step <= rise and self.warmup > 0:
            return self.lr * step / rise
        return self.lr * (self.steps - step + 1) / max(1, self.steps - (rise if self.warmup > 0 else 0))


@dataclasses.dataclass
class Outcome:
    """before: validation at the start; best: the one kept, and at which step; seconds: of it all; tokens_per_second, waiting: valid tokens a second, and the share of the time in
    which the next batch was waited for, both of the steps alone, validation aside."""

    before: dict[str, float]
    best: dict[str, float]
    best_step: int
    seconds: float
    tokens_per_second: float
    waiting: float


def pick_device(name: str) -> torch.device:
    """As find_device. Raises ConfigError, too, where PEFTDEBIAS_KERNELS asks for what does not run there."""
    device = find_device(name)
    if kernels.setting() == "triton" and (trouble := kernels.missing("norm", "triton", device)):
        raise ConfigError(f"PEFTDEBIAS_KERNELS=triton: expected a device on which Triton runs, got {device}: {trouble} (auto takes what is there)")
    return device


def find_device(name: str) -> torch.device:
    """As weights.known_device. Raises ConfigError, too, on PEFTDEBIAS_KERNELS or PEFTDEBIAS_LINEAR
    (ATTENTION, FEED_FORWARD, LORA_LINEAR, LORA_GRADS) that say nothing: they pick what runs on the device."""
    try:
        kernels.setting()
        for op in dispatch.FORMS:
            dispatch.asked(op)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return known_device(name)


def pick_precision(name: str, device: torch.device) -> str:
    """auto is bf16 on a GPU that multiplies it (NVIDIA's from compute capability 8.0 on), float32 elsewhere; bf16 on a CPU is BF16_PRODUCTS. Raises ConfigError on bf16 where a
    CPU does not multiply it."""
    if name == "auto":
        return "bf16" if device.type == "cuda" and _has_bf16(device) else "float32"
    if name == "bf16" and device.type != "cuda":
        if why := no_bf16():
            raise ConfigError(f"--precision bf16: expected a GPU, or a CPU that multiplies it, got {device.type}: {why}; use float32")
        return BF16_PRODUCTS
    return name


def _has_bf16(device: torch.device) -> bool:
    """Where no GPU can be asked, yes."""
    if not torch.cuda.is_available():
        return True
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def pick_step(name: str, device: torch.device, precision: str = "float32") -> str:
    """auto is a CUDA graph on a GPU, eager elsewhere. Raises ConfigError on a graph without a GPU and on BF16_PRODUCTS compiled, PeftDebiasError where torch.compile cannot be had."""
    if name == "auto":
        return "graph" if device.type == "cuda" else "eager"
    if name == "graph" and device.type != "cuda":
        raise ConfigError(f"--step graph: expected a GPU, got {device.type}; use eager or compiled")
    if name == "compiled":
        if precision == BF16_PRODUCTS:
            raise ConfigError("--step compiled: expected --precision float32 on a CPU, got bf16, which torch.compile would leave out; use eager")
        expect_compiler()
    return name


def make_optimizer(parameters: dict[str, Parameter], schedule: Schedule) -> FlatAdamW | WholeAdamW | LargeAdamW:
    """Fused AdamW; matrices decay, biases, norms and other vectors do not. Float32 values are updated in one launch a group where there is a kernel for it: up to FLAT of them
    in one flat tensor."""
    matrices = [p for p in parameters.values() if p.dim() > 1]
    vectors = [p for p in parameters.values() if p.dim() <= 1]
    groups = [{"params": ps, "weight_decay": decay} for ps, decay in ((matrices, schedule.weight_decay), (vectors, 0.0)) if ps]
    device, values = next((p.device for p in parameters.values()), None), sum(p.numel() for p in parameters.values())
    if groups and all(p.dtype == torch.float32 and p.device == device for p in parameters.values()):
        update, kind = kernels.choose("adamw", reference=adamw_ref, device=device), kernels.decide("adamw", device)[0]
        if values <= FLAT.get(kind, 0):
            return FlatAdamW(groups, schedule.lr, update, as_read=kind == "triton")
        if kind == "triton" and all(p.is_contiguous() for p in parameters.values()):
            return WholeAdamW(groups, schedule.lr, kernels.choose("adamw_of_many", reference=AdamWOfManyRef, device=device))
    return LargeAdamW(groups, schedule.lr)


def _expect_precision(schedule: Schedule, device: torch.device) -> None:
    """Raises ConfigError on what no step would do, and would not say."""
    if schedule.precision not in ("float32", "bf16", BF16_PRODUCTS):
        raise ConfigError(f"precision: expected float32, bf16 or {BF16_PRODUCTS}, got {schedule.precision!r}")
    if schedule.precision == BF16_PRODUCTS and (device.type != "cpu" or schedule.step != "eager"):
        raise ConfigError(f"precision {BF16_PRODUCTS}: expected a CPU and an eager step, got {device.type} and {schedule.step}")


def _seed(device: torch.device, seed: int) -> None:
    """The generators that training draws from, which `train` gives back as they were; those of other GPUs stay as they are."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def train(model: Model, task, parameters: dict[str, Parameter], schedule: Schedule, log: Callable[..., None] = lambda **event: None,
          folded: Folded | None = None, label: str = "", pull: Callable[[], None] | None = None) -> Outcome:
    """Train `parameters` (all that requires gradients) on task.epoch(0), task.epoch(1), ... and leave the best state in them.

    task: see tasks.MaskedLM. folded: deltas in the base that weight decay must not touch. log: gets every event as keywords. label: names the progress bar.
    pull: adds a gradient of its own to the parameters' after every backward; no loss that is logged has a term for it.
    Repeats bit for bit on the same machine with the same number of threads, where no other thread draws from torch's generators meanwhile. Raises PeftDebiasError when the loss is not finite,
    ConfigError on a precision that is none, or none of this device and step.
    """
    device, began = model.device, time.perf_counter()
    _expect_precision(schedule, device)
    optimizer = make_optimizer(parameters, schedule)
    decay_of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    with _at_rest(model, optimizer), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), rounded_beforehand(model, schedule.precision), \
            model.recomputing(schedule.save_memory), _bar(schedule.steps, label) as bar:
        _seed(device, schedule.seed)
        before = _scores(model, task, schedule)
        log(event="validation", step=0, **before)
        model.train()

        def note(line: str) -> None:
            log(event="note", line=line)
            tqdm.write(line, file=sys.stderr)

        one_step = STEPS[schedule.step](model, task, optimizer, parameters, clip=schedule.clip, precision=schedule.precision, pull=pull, say=note)
        best, progress = _Best(task, parameters, log), _Progress(schedule.steps, log, bar, label, device)
        step = epoch = 0
        while step < schedule.steps:
            for batch in progress.waiting_for(task.epoch(epoch)):
                step += 1
                rate = schedule.rate(step)
                loss = one_step(batch, rate)
                if folded is not None:
                    folded.after_step({key: rate * decay for key, decay in decay_of.items()})
                progress.after(step, loss, rate, sum(batch.lengths), one_step.preparing)
                if step == schedule.steps or schedule.validate_every and step % schedule.validate_every == 0:
                    with progress.aside():
                        best.offer(step, _scores(model, task, schedule))
                if step == schedule.steps:
                    break
            if schedule.validate_every is None and step < schedule.steps:
                with progress.aside():
                    best.offer(step, _scores(model, task, schedule))
            epoch += 1
        _, tokens_per_second, waiting = progress.figures()
    best.restore()
    return Outcome(before, best.scores, best.step, time.perf_counter() - began, tokens_per_second, waiting)


@contextlib.contextmanager
def _at_rest(model: Model, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Behind it, however it ends, the model answers (without dropout), and no gradient stands that a training after this one would have beside its own."""
    try:
        yield
    finally:
        optimizer.zero_grad(set_to_none=True)
        model.eval()


class _Progress:
    """What a training tells while it runs: mean loss, valid tokens a second and the share of the time in which it waited for a batch, validation and steps that were compiled
    or captured aside."""

    def __init__(self, steps: int, log: Callable[..., None], bar: tqdm, label: str, device: torch.device = torch.device("cpu")):
        self.steps, self.log, self.bar, self.label, self.device = steps, log, bar, label, device
        self.losses: list[Tensor] = []
        self.tokens = self.counted = 0  # of steps that were not compiled
        self.compiled_tokens = self.compiled_steps = 0
        self.waited = self.validated = self.compiling = 0.0  # seconds
        self.told = self.started = time.perf_counter()
        bar.unpause()

    def waiting_for(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches of an epoch. Raises PeftDebiasError where there is none."""
        batches, found = iter(batches), False
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                break
            found = True
            yield batch
        if not found:
            raise PeftDebiasError("training: expected at least one batch an epoch, got none")

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Time that is no step's; steps that a GPU still works at end before it begins."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        began = time.perf_counter()
        yield
        self.validated += time.perf_counter() - began

    def figures(self) -> tuple[float, float, float]:
        """(seconds of it all, tokens a second, share of waiting) up to now."""
        seconds = time.perf_counter() - self.started
        counted, tokens, _ = self._counted(seconds)
        return seconds, tokens / counted, self.waited / counted

    def _counted(self, seconds: float) -> tuple[float, int, int]:
        """(seconds, tokens, steps) that the speed is made of, `seconds` after the start: those that were compiled too while there are no others."""
        if not self.counted:
            return seconds - self.validated, self.compiled_tokens, self.compiled_steps
        return seconds - self.validated - self.compiling, self.tokens, self.counted

    def after(self, step: int, loss: Tensor, rate: float, tokens: int, preparing: float = 0.0) -> None:
        """Counts a step; preparing: as Step has it. Raises PeftDebiasError where the loss is not finite, which is asked of the device every LOG_EVERY steps."""
        self.losses.append(loss)
        if preparing:
            self.compiling += preparing
            self.compiled_tokens += tokens
            self.compiled_steps += 1
        else:
            self.tokens += tokens
            self.counted += 1
        self.bar.update()
        if step % LOG_EVERY and step != self.steps:
            return
        mean = float(torch.stack(self.losses).mean())
        if not math.isfinite(mean):
            raise PeftDebiasError(f"step {step}: the loss is {mean}; expected a finite one (a lower --lr may help)")
        self.losses = []
        seconds, speed, waiting = self.figures()
        self.log(event="step", step=step, loss=mean, lr=rate, tokens_per_second=round(speed), waiting=round(waiting, 4))
        self.bar.set_postfix(loss=f"{mean:.4f}", tokens=f"{speed:.0f}/s", waiting=f"{100 * waiting:.1f}%")
        if self.bar.disable and self.started + seconds - self.told >= TOLD_EVERY and step < self.steps:
            self.told = self.started + seconds
            counted, _, steps = self._counted(seconds)
            left = (counted + self.validated) / steps * (self.steps - step) / 60
            print(f"{self.label or 'training'}: step {step} of {self.steps}, loss {mean:.4f}, {left:.1f} minutes left", file=sys.stderr, flush=True)


class _Best:
    """The parameters that validation liked most, kept on the CPU."""

    def __init__(self, task, parameters: dict[str, Parameter], log: Callable[..., None]):
        self.task, self.parameters, self.log = task, parameters, log
        self.scores: dict[str, float] = {}
        self.step = 0
        self.kept: dict[str, Tensor] = {}

    def offer(self, step: int, scores: dict[str, float]) -> None:
        """Keeps the parameters where no earlier ones had such scores. Raises PeftDebiasError where scores or parameters are not finite."""
        found = scores[self.task.metric]
        if not math.isfinite(found):
            raise PeftDebiasError(f"step {step}: {self.task.metric} in validation is {found}; expected a finite one (a lower --lr may help)")
        for name, parameter in self.parameters.items():
            if not parameter.isfinite().all():
                raise PeftDebiasError(f"step {step}: {name} is not finite any more (a lower --lr may help)")
        sign = 1 if self.task.higher_is_better else -1
        better = not self.scores or sign * found > sign * self.scores[self.task.metric]
        self.log(event="validation", step=step, kept=better, **scores)
        if better:
            self.scores, self.step = scores, step
            self.kept = {name: p.detach().cpu().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def restore(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(self.kept[name])


def _bar(steps: int, label: str) -> tqdm:
    """Steps done and time left, on standard error; no bar when that is no terminal (`train` prints a line every TOLD_EVERY then)."""
    return tqdm(total=steps, desc=label, unit="step", disable=None, dynamic_ncols=True)


def _scores(model: Model, task, schedule: Schedule) -> dict[str, float]:
    """The task's validation, in the precision of the steps."""
    with autocast(model.device, schedule.precision):
        return task.validate(model)
