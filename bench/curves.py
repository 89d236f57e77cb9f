"""python bench/curves.py: both phases on a device against the plain twins on the CPU, from the same weights and texts, dropout 0: loss curves, and every gradient of the
first step; then the loop that the commands run, with its validations, as the device has it by default (bf16 and a CUDA graph on a GPU). A model of bert-tiny's size with
drawn weights; upstream LoRA, adapter and prefix on masked texts, downstream the whole base; lr 2e-5, in the loop 1e-3.

    python bench/curves.py --device cuda                     200 steps, float32 and bf16, eager and as a CUDA graph; LoRA's compiled too, on one batch
    python bench/curves.py --device cpu --steps 20           the CPU's own kernels against the twins

Bounds: losses within 1e-5 over the first 50 steps and 1e-4 over 200 in float32, within 1 % in bf16; gradients as bench/run.py bounds them, in bf16 by the angle (cosine at
least 0.99). bench/gpu.py --steps runs this before it times anything. Exit code 0; 1 where a bound is passed, the loop fails or its validation rises by more than 1 %, a step
makes the host wait, or steps that were to be replayed ran eagerly.
"""

import argparse
import dataclasses
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import Parameter  # noqa: E402

import bench  # noqa: E402, F401
from bench.arguments import Parser, complain, positive, told  # noqa: E402
from bench.case import Setting, Work, output_bound  # noqa: E402
from bench.cases_steps import OPTIONS, labelled, model_folder, module_values  # noqa: E402
from bench.texts import texts  # noqa: E402
from peftdebias import kernels, methods, patch, training  # noqa: E402
from peftdebias.batches import Batch, Sample, pack  # noqa: E402
from peftdebias.encoder import Model  # noqa: E402
from peftdebias.graphs import OFF  # noqa: E402
from peftdebias.lowered import rounded_beforehand  # noqa: E402
from peftdebias.tasks import MaskedLM, class_probabilities, mlm_loss  # noqa: E402
from peftdebias.weights import load_model  # noqa: E402

LR = 2e-5
EARLY, FLOAT32, BF16, COSINE = 50, (1e-5, 1e-4), 1e-2, 0.99
PHASES = ("lora", "adapter", "prefix", "full")


def begun(setting: Setting, phase: str) -> tuple[Model, dict[str, Parameter], list[list[Sample]], Callable[[Model, Batch], Tensor]]:
    """(model in train mode on the setting's device, what is trained, batches of samples, the loss) of one of PHASES."""
    full = phase == "full"
    model, _ = load_model(model_folder(setting, full))
    if not full:
        method = methods.create(phase, model.config, options=OPTIONS[phase])
        method.load(module_values(phase, model.config))
        patch.attach(model, "bench", method)
    model.to(setting.device).train()
    parameters = dict(model.named_parameters()) if full else method.parameters()
    patch.train_only(model, parameters.values())
    loss = (lambda model, batch: mlm_loss(model.class_logits(batch), batch.targets)) if full else (lambda model, batch: MaskedLM.loss(None, model, batch))
    return model, parameters, labelled(texts(setting)) if full else texts(setting), loss


@dataclasses.dataclass(frozen=True)
class Curve:
    """losses: one a step. gradients: of the first step's loss, by name, on the CPU. off: why steps that were to be replayed ran eagerly, "" where none did."""

    losses: list[float]
    gradients: dict[str, Tensor]
    off: str = ""


def curve(setting: Setting, phase: str, steps: int, implementation: str = "auto", kind: str = "eager", say=print) -> Curve:
    """Train that long. phase: one of PHASES; implementation: of the ops, as kernels.use takes it; kind: one of training.STEPS."""
    model, parameters, samples, loss = begun(setting, phase)
    batches = [pack(batch) for batch in samples]
    with kernels.use(implementation), rounded_beforehand(model, setting.precision):
        def begin():
            optimizer = training.make_optimizer(parameters, training.Schedule(steps=steps, lr=LR))
            return training.STEPS[kind](model, types.SimpleNamespace(loss=loss), optimizer, parameters, clip=1e9, precision=setting.precision, say=say)

        step = begin()
        for _ in range(2):  # of a graph, the second is captured and replayed: these are its gradients
            step(batches[0], 0.0)  # at this rate nothing moves but the moments, with which the next step does not begin
        gradients = {name: p.grad.double().cpu() for name, p in parameters.items() if p.grad is not None and not name.endswith(".key.bias")}
        step = begin()
        losses = [step(batches[i % len(batches)], LR) for i in range(steps)]
        return Curve(torch.stack(losses).tolist(), gradients, getattr(step, "off", None) or "")


class Trained:
    """A phase as training.train takes it: upstream with MaskedLM's own validation, downstream with the loss in place of a measure."""

    metric, higher_is_better = "loss", False

    def __init__(self, samples: list[list[Sample]], loss: Callable[[Model, Batch], Tensor], full: bool):
        self.samples, self.held_out, self.loss, self.full = samples, samples[0], loss, full

    def epoch(self, number: int) -> list[Batch]:
        return [pack(batch) for batch in self.samples]

    def validate(self, model: Model) -> dict[str, float]:
        if not self.full:
            return MaskedLM.validate(self, model)
        found = class_probabilities(model, self.held_out)
        return {"loss": float(-numpy.log([row[int(s.targets[0])] for row, s in zip(found, self.held_out)]).mean())}


def whole(setting: Setting, phase: str, steps: int, kind: str, implementation: str = "auto", say=print) -> list[str]:
    """Trains a phase in the loop that the commands run, validations before the first step and among the others. What failed, in a line; nothing where it went through and its
    best validation is not above the first by more than bf16's own 1 %."""
    words = f"{phase}, {setting.precision}, {kind}, the loop of training.py"
    try:
        model, parameters, samples, loss = begun(setting, phase)
        with kernels.use(implementation):
            plan = training.Schedule(steps=steps, lr=1e-3, validate_every=max(1, steps // 2), precision=setting.precision, step=kind)
            notes: list[str] = []
            found = training.train(model, Trained(samples, loss, phase == "full"), parameters, plan, log=lambda **event: notes.append(event.get("line", "")))
    except Exception as error:  # whatever it is, it is what a user would meet
        return [f"{words}: {told(error)}"]
    say(f"{words}: validation {found.before['loss']:.4f} to {found.best['loss']:.4f} in {steps} steps")
    risen = found.best["loss"] > found.before["loss"] * (1 + BF16)
    red = [f"{words}: validation {found.before['loss']:.4f} before, {found.best['loss']:.4f} at best in {steps} steps"] * risen
    return red + [f"{words}: {line}" for line in notes if line.startswith(OFF)]


def trouble(found: Curve, wanted: Curve, precision: str) -> tuple[list[str], str]:
    """(what passes a bound, what was found, in words)."""
    red, gaps = [], [abs(a - b) / (abs(b) if precision == "bf16" else 1) for a, b in zip(found.losses, wanted.losses)]
    early, late = max(gaps[:EARLY]), max(gaps)
    for what, gap, bound in (("over the first 50 steps", early, BF16 if precision == "bf16" else FLOAT32[0]), ("over all steps", late, BF16 if precision == "bf16" else FLOAT32[1])):
        if not gap <= bound:
            red.append(f"loss {what}: off by {gap:.3g}, allowed {bound:g}")
    if found.gradients.keys() != wanted.gradients.keys():
        red.append(f"gradients: expected those of {len(wanted.gradients)} parameters, got {len(found.gradients)}")
    worst = 0.0
    for name, expected in wanted.gradients.items():
        got = found.gradients.get(name, torch.full_like(expected, torch.nan))
        if precision == "bf16":
            share = (1 - float(torch.cosine_similarity(got.flatten(), expected.flatten(), 0))) / (1 - COSINE)
        else:
            share = float((got - expected).abs().max()) / output_bound("gradient", expected)
        worst = max(worst, share)
        if not share <= 1:
            red.append(f"gradient of {name}: {share:.3g} of what is allowed")
    kind = "relative" if precision == "bf16" else "absolute"
    off = f"off by {early:.2g} over {min(EARLY, len(gaps))} steps and {late:.2g} over {len(gaps)} ({kind})"
    return red, f"losses {wanted.losses[0]:.4f} to {wanted.losses[-1]:.4f}, {off}; gradients {worst:.2g} of the allowed"


def held_against(found: Curve, wanted: Curve, precision: str, what: str, where: str, say) -> list[str]:
    """`trouble` as lines that begin with `what`; says what was found, and `where`."""
    bad, words = trouble(found, wanted, precision)
    say(f"{what}, {where} against the twins on the CPU: {words}")
    return [f"{what}: {line}" for line in bad + [f"no CUDA graph: {found.off}"] * bool(found.off)]


def check(device: torch.device, folder: Path, steps: int = 200, size: str = "tiny", implementation: str = "auto", phases: tuple[str, ...] = PHASES, say=print) -> list[str]:
    """Every phase, precision and kind of step that the device has. Returns what passes a bound; says what was found."""
    cuda = device.type == "cuda"
    red = []
    for phase in phases:
        common = dict(dropout=0.0, sequences=16, longest=64 if size == "micro" else 128, batches=8)
        wanted = curve(Setting(size, 40, folder, torch.device("cpu"), "float32", **common), phase, steps, "torch", say=say)
        for precision, kind in [(precision, kind) for precision in ("float32", "bf16") for kind in ("eager", "graph")] if cuda else [("float32", "eager")]:
            found = curve(Setting(size, 40, folder, device, precision, **common), phase, steps, implementation, kind, say)
            red += held_against(found, wanted, precision, f"{phase}, {precision}, {kind}", f"{steps} steps on {device.type}", say)
        setting = Setting(size, 40, folder, device, "bf16" if cuda else "float32", **common)
        red += whole(setting, phase, max(2, steps // 5), "graph" if cuda else "eager", implementation, say)
    return red


def compiled(device: torch.device, folder: Path, steps: int = 200, size: str = "tiny", implementation: str = "auto", say=print) -> list[str]:
    """`check` of LoRA's step under torch.compile, in float32 and on one batch, whose shape is compiled once; that it fails is found too."""
    phase, common = PHASES[0], dict(dropout=0.0, sequences=16, longest=64 if size == "micro" else 128, batches=1)
    wanted = curve(Setting(size, 40, folder, torch.device("cpu"), "float32", **common), phase, steps, "torch", say=say)
    try:
        found = curve(Setting(size, 40, folder, device, "float32", **common), phase, steps, implementation, "compiled", say)
    except Exception as error:  # a compiler that is missing, or does not know an op
        return [f"{phase}, float32, compiled: {told(error)}"]
    return held_against(found, wanted, "float32", f"{phase}, float32, compiled", f"{steps} steps on {device.type}", say)


def waits(device: torch.device, folder: Path, phases: tuple[str, ...] = PHASES) -> list[str]:
    """Steps of every phase under torch's sync-debug mode: what in them made the host wait for the device, or kept them from being replayed."""
    found = []
    for phase in phases:
        setting = Setting("tiny", 40, folder, device, "bf16", batches=4)
        for kind in ("eager", "graph"):
            torch.cuda.synchronize()
            try:
                torch.cuda.set_sync_debug_mode("default")
                work = _warm(setting, phase, kind)
                torch.cuda.set_sync_debug_mode("error")
                work.run()
            except RuntimeError as error:
                found.append(f"{phase}, {kind}: {str(error).strip().splitlines()[0]}")
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return found


def _warm(setting: Setting, phase: str, kind: str) -> Work:
    """Steps of `phase` that have run before (compiled, autotuned, loaded, captured), ready to be run again; they hold what they read, so they are kept while they run."""
    from bench.cases_steps import ours

    work = ours(phase, kind)(setting)
    for _ in range(3 if kind == "graph" else 1):  # a shape runs eagerly, is captured, is replayed
        work.run()
    torch.cuda.synchronize()
    return work


def main(argv: list[str] | None = None) -> int:
    top = Parser(prog="bench/curves.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    top.add_argument("--steps", type=positive, default=200)
    top.add_argument("--size", default="tiny", choices=("micro", "tiny"))
    top.add_argument("--kernels", default="auto", choices=kernels.KINDS, help="of the device's side (default auto)")
    top.add_argument("--phases", nargs="+", default=PHASES, choices=PHASES)
    arguments = top.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        return complain("--device cuda: expected a CUDA device, found none")
    device = torch.device(arguments.device)
    with tempfile.TemporaryDirectory(prefix="peftdebias-curves-") as folder:
        red = check(device, Path(folder), arguments.steps, arguments.size, arguments.kernels, tuple(arguments.phases))
        if device.type == "cuda" and PHASES[0] in arguments.phases:
            red += compiled(device, Path(folder), arguments.steps, arguments.size, arguments.kernels)
        red += [f"waits for the device: {line}" for line in waits(device, Path(folder), tuple(arguments.phases))] if device.type == "cuda" else []
    for line in red:
        print(f"RED {line}")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
