"""python bench/gpu.py, from the root of a checkout on a machine with a CUDA device: equality on the device, the ceilings, then every kernel beside plain torch,
torch.compile and peft's own op, and our upstream step beside transformers + peft (32 texts of at most 128 tokens), bf16 autocast. Rows and tables go to
bench/results/, named after the device: times, shares of the roofline, what limits whom, which targets are met.

With --steps, in place of the single ops: both phases for 200 steps against the CPU's twins, the training loop with its validations (bench/curves.py) and steps under torch's
sync-debug mode, then whole steps of LoRA, adapter, prefix and full training at 128 x 128, 128 x 256 and 32 x 128, 40 % of the tokens valid and all, beside transformers + peft
eager, compiled and length-bucketed. What matters most comes first, for the run ends when its minutes are over: LoRA at every shape, then the other methods at the first, then
these at the others. Ours is compiled for LoRA at the first shape; nothing is length-bucketed where all texts are of one length. Equality is asked of every method at its
smallest shape; of our compiled step and of replays by the 200 steps, with --check of what is compiled in LoRA's case too.

What nothing is timed by comes before all that is, on a GPU in processes side by side (aside.py): equality, and torch.compile, which leaves what it made in its cache on disk.

With --check, equality alone.

Needs torch, triton, numpy, tokenizers, safetensors, tqdm; transformers and peft for the comparison; no install of peftdebias, no network.
Exit code 0; 1 where providers disagree or one fails: that case is not timed, the others are, or where the rows cannot be written in the end; 2 without a CUDA device or on bad arguments.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from bench import ROOT, curves, equality, lineup, measure, roofline, rows  # noqa: E402
from bench.arguments import Parser, above_zero, complain, positive, results_file, say, told  # noqa: E402
from bench.aside import together  # noqa: E402
from bench.case import SIZES, Case, Provider, Setting  # noqa: E402
from bench.cases import CASES  # noqa: E402
from bench.cases_steps import ROUNDED_BASE, STEP_CASES  # noqa: E402
from bench.clock import Clock  # noqa: E402
from bench.run import check, title  # noqa: E402

Plan = list[tuple[Case, Setting]]

CHECKED = {"lora_linear": 5003, "lora_linear_wide": 331, "lora_dropout": 331, "lora_write": 2, "lora_grads": 5003, "lora_grads_two": 5003, "adapter": 997, "adapter_frozen": 331, "mlm_loss": 197,
           "sparse_add": 331, "sparse_adamw": 10007, "whole_adamw": 1, "dropout": 331, "attention": 13, "attention_even": 7, "attention_dropout": 13, "attention_prefix": 13,
           "norm": 997, "norm_dropout": 331, "embed": 331, "trained_embed": 331, "gelu": 331, "trained_linear": 331, "feed_forward": 331, "trained_feed_forward": 331}
TIMED = {"lora_linear": (4096, 16384, 65536), "lora_frozen": (4096, 16384, 65536), "lora_linear_wide": (4096, 16384, 65536), "lora_frozen_wide": (4096, 16384, 65536),
         "lora_dropout": (16384,), "lora_write": (12,), "lora_grads": (4096, 16384, 65536), "lora_grads_two": (4096, 16384, 32768), "adapter": (4096, 65536), "adapter_frozen": (4096, 65536), "mlm_loss": (614, 9830),
         "attention": (32, 128), "attention_even": (32, 128), "attention_dropout": (128,), "attention_prefix": (128,),
         "sparse_add": (768, 30522), "sparse_adamw": (1_090_000,), "whole_adamw": (12,), "dropout": (16384,), "norm": (4096, 65536), "norm_dropout": (4096, 65536),
         "embed": (4096, 65536), "trained_embed": (4096, 65536),
         "gelu": (4096, 65536), "trained_linear": (4096, 65536), "feed_forward": (4096, 16384, 32768), "trained_feed_forward": (4096, 65536)}
"""case -> x, what matters most first. Checked at ragged sizes, dA and dB at so many rows that a program walks over several tiles; sequences of attention are of at most 128 tokens; 614 and 9830 are 15 % of 4096 and 65536 tokens, 1 090 000 is 1 % of BERT-base."""
DRY = {"lora_linear": 37, "lora_frozen": 37, "lora_linear_wide": 13, "lora_frozen_wide": 13, "lora_dropout": 13, "lora_write": 1, "lora_grads": 13, "lora_grads_two": 13, "adapter": 37,
       "adapter_frozen": 13, "mlm_loss": 13, "sparse_add": 7, "sparse_adamw": 301, "whole_adamw": 1, "dropout": 13, "norm": 37, "norm_dropout": 13, "embed": 13, "trained_embed": 13, "gelu": 13, "trained_linear": 13, "feed_forward": 13, "trained_feed_forward": 13, "attention": 3, "attention_even": 2,
       "attention_dropout": 3, "attention_prefix": 3}


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="bench/gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu only with --dry-run")
    top.add_argument("--dry-run", action="store_true", help="the same path with sizes so small that the figures mean nothing; no file unless --out. Where Triton does "
                     "not run its kernels are stood in for by their plain twins; TRITON_INTERPRET=1 runs the kernels themselves")
    top.add_argument("--only", metavar="NAME[,NAME...]", help="some cases: names or stems (lora); the ceilings are always measured")
    top.add_argument("--steps", action="store_true", help="loss curves against the CPU and whole training steps, in place of the single ops")
    top.add_argument("--shapes", metavar="BxS[,BxS...]", help=f"with --steps: some of {','.join(SHAPES)} (default all)")
    top.add_argument("--check", action="store_true", help="equality alone; nothing is timed and no file is written")
    top.add_argument("--size", default="base", choices=SIZES, help="the base model (default base)")
    top.add_argument("--repeats", type=positive, default=5, metavar="N", help="times that every provider is timed (default 5)")
    top.add_argument("--minutes", type=above_zero, default=8.0, metavar="M", help="budget of the whole run (default 8); compiled baselines are left out first")
    top.add_argument("--compile", action=argparse.BooleanOptionalAction, help="with torch.compile as a further baseline (default: on a GPU)")
    top.add_argument("--apart", action=argparse.BooleanOptionalAction, help="equality and torch.compile in processes of their own, side by side (default: on a GPU)")
    top.add_argument("--out", type=results_file, metavar="FILE.json", help="default bench/results/DEVICE.json, with --steps, --size, --no-compile, --only and --shapes what these say behind DEVICE")
    return top


def file_name(device: str, arguments: argparse.Namespace) -> str:
    """Of the rows: a run of some cases or shapes, of another base model or without torch.compile leaves the file of the whole run alone."""
    some = ([arguments.size] if arguments.size != "base" else []) + (["uncompiled"] if arguments.compile is False else [])
    some += [_short(asked.replace(",", "+")) for asked in (arguments.only, arguments.shapes) if asked]
    return "-".join([device, *(["steps"] if arguments.steps else []), *some]) + ".json"


def _short(name: str) -> str:
    """As long as a file's name may be; others that begin alike end otherwise."""
    return name if len(name) <= 100 else f"{name[:80]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def plan(device: torch.device, size: str, dry: bool, folder: Path, compiled: bool = True) -> tuple[Plan, Plan]:
    """(what is checked on the device, what is timed). compiled: whether what is compiled of the steps is checked too; ours is not timed unless it is."""
    def settings(name: str, values: tuple[float, ...], **fields) -> Plan:
        common = {"precision": "bf16" if device.type == "cuda" else "float32", "stand_in": dry}
        return [(CASES[name], Setting(size, x, folder, device, **common | fields)) for x in values]

    def each(table: dict) -> Plan:
        return [entry for name, x in table.items() for entry in settings(name, x if isinstance(x, tuple) else (x,))]

    ceilings, again = ceiling_plan(settings, dry)
    values, shape = ((20, 48), {"sequences": 4, "longest": 48}) if dry else ((54, 128), {"sequences": 32, "longest": 128})
    steps = settings("lora_step", values, **shape)  # 45 % valid tokens in batches padded to 128, and all valid
    to_check = [(to_be_checked(case, compiled), setting) for case, setting in steps]
    to_time = [(dataclasses.replace(case, providers={name: p for name, p in case.providers.items() if compiled or name != COMPILED_STEP}), setting) for case, setting in steps]
    return each(DRY if dry else CHECKED) + to_check, ceilings + each(DRY if dry else TIMED) + to_time + again


def to_be_checked(case: Case, compiled: bool) -> Case:
    """It with all providers of its stem, or all that are not compiled."""
    return dataclasses.replace(case, providers={name: p for name, p in CASES[stem(case)].providers.items() if compiled or not p.compiled})


def ceiling_plan(settings: Callable[[str, tuple[float, ...]], Plan], dry: bool) -> tuple[Plan, Plan]:
    """(The ceilings, the larger product once more, for the end of a run): a device that has worked for minutes may be slower, or faster; the best of both is the ceiling."""
    ceilings = settings("gemm", (64,) if dry else (4096, 8192)) + settings("copy", (1,) if dry else (4096,))
    return ceilings, [(dataclasses.replace(case, name="gemm at the end"), setting) for case, setting in settings("gemm", (64 if dry else 8192,))]


SHAPES = {"128x128": (128, 128), "128x256": (128, 256), "32x128": (32, 128)}
"""name -> (texts a batch, tokens a text at most); what matters most first."""


UNEVEN = 8
"""Batches of a step whose texts differ in length: of two, the shortest and the longest of a pass, 52 % of the padded tokens are valid, of eight 41, of the whole pass 40."""


def step_plan(device: torch.device, size: str, dry: bool, folder: Path, shapes: tuple[str, ...] = tuple(SHAPES), compiled: bool = True) -> tuple[Plan, Plan]:
    """`plan` of --steps; a case holds the providers that take part in it. compiled: whether what is compiled is checked at this size too, in LoRA's case."""
    common = {"precision": "bf16" if device.type == "cuda" else "float32", "stand_in": dry}
    sizes = [(4, 48)] if dry else [SHAPES[name] for name in SHAPES if name in shapes]
    foremost, *others = STEP_CASES

    def of(name: str, shape: tuple[int, int], share: float = 0.4) -> tuple[Case, Setting]:
        sequences, longest = shape
        case, x = CASES[name], longest if share == 1 else round(share * longest)
        taking = {p: case.providers[p] for p in step_providers(case, foremost=name == foremost and shape == sizes[0], even=x >= longest)}
        return (dataclasses.replace(case, name=f"{name} {sequences}x{longest}", providers=taking),
                Setting(size, x, folder, device, sequences=sequences, longest=longest, batches=2 if dry or share == 1 else UNEVEN, **common))

    order = [(foremost, shape) for shape in sizes] + [(name, sizes[0]) for name in others] + [(name, shape) for shape in sizes[1:] for name in others]
    timed = [of(name, shape, share) for name, shape in order for share in (0.4, 1)]
    smallest = min(sizes, key=lambda shape: shape[0] * shape[1])
    to_check = [(to_be_checked(case, compiled and stem(case) == foremost), setting) for case, setting in (of(name, smallest) for name in STEP_CASES)]
    ceilings, again = ceiling_plan(lambda name, values: [(CASES[name], Setting(size, x, folder, device, **common)) for x in values], dry)
    return to_check, ceilings + timed + again


def step_providers(case: Case, foremost: bool, even: bool) -> list[str]:
    """The names of those that are timed. foremost: this is what matters most, and ours is compiled as well. even: all texts are of one length."""
    def wanted(name: str) -> bool:
        ours = name.startswith(roofline.OURS)
        return not (ours and case.providers[name].compiled and not foremost) and not (even and name.endswith("length-bucketed")) and (foremost or not name.endswith(ROUNDED_BASE))

    return [name for name in case.providers if wanted(name)]


def stem(case: Case) -> str:
    """Its name in CASES: those of --steps have their shape behind it."""
    return case.name.split()[0]


CEILINGS = {"gemm", "copy"}
DIFFERS = "it differs from what is not compiled"
COMPILED_STEP = "peftdebias, compiled"
"""The provider of LoRA's case, and the name under which it is red by itself."""


def chosen(entries: Plan, only: str | None) -> Plan:
    names = only.split(",") if only else []
    return [(case, setting) for case, setting in entries if not names or stem(case) in CEILINGS or any(stem(case) == n or case.name.startswith(n + "_") for n in names)]


def affordable(case: Case, providers: dict[str, Provider], trouble: Callable[[str], str | None], say: Callable[[str], None] = say) -> dict[str, Provider]:
    """Without the compiled ones that cannot be had here. trouble: name -> why, which `say` hears; None: it was not meant to be here; empty: it can."""
    against = {name: trouble(name) for name, p in providers.items() if p.compiled}
    for name, why in against.items():
        if why:
            say(f"{case.name}: {name} is not measured: {why}")
    return {name: p for name, p in providers.items() if against.get(name, "") == ""}


def of_case(case: Case, providers: dict[str, dict[str, Provider]]) -> dict[str, Provider]:
    """Those of a case that take part in this run. providers: by the stem of the case."""
    return {name: p for name, p in providers[stem(case)].items() if name in case.providers}


def checked(entries: Plan, providers: dict[str, dict[str, Provider]], clock: Clock, red: dict[str, str]) -> dict[tuple[str, float], dict[str, float]]:
    """{(stem of the case, x): shares of what is allowed}, in float32, and in bf16 for the kernels. red: stem -> what is wrong with it; gets what is found here."""
    shares = {}
    for case, setting in entries:
        if stem(case) in red:
            continue
        taking = affordable(case, of_case(case, providers), lambda name: clock.reason())
        with _noting(case, setting, red, stem(case)):
            shares[stem(case), setting.x] = check(case, setting, taking)
            if case.rounded:
                found = equality.check_rounded(case, setting, taking)
                if found:
                    say(f"{title(case, setting)}: equal in bf16 (largest error {max(found.values()):.2g} of the allowed one)")
    return shares


@contextlib.contextmanager
def _noting(case: Case, setting: Setting, red: dict[str, str], name: str):
    """What goes wrong in one case is noted under that name, and the run goes on: a device that is lent for minutes shall show all of it."""
    try:
        yield
    except equality.Unequal as unequal:
        red[name] = str(unequal)
    except Exception as error:  # a launch that the device refuses, memory that is not there, a library that fails
        traceback.print_exc()
        red[name] = f"{title(case, setting)}: {told(error)}"
    if name in red:
        say(red[name])


def unlike_the_cpu(device: torch.device, dry: bool, folder: Path, stems: Iterable[str]) -> dict[str, str]:
    """{stem: what of its 200 steps differs from the twins on the CPU, and what in a step waits for the device} of those where something does."""
    red = {}
    for name in stems:
        phases = (name.removesuffix("_step"),)
        lines = curves.check(device, folder, 3 if dry else 200, "micro" if dry else "tiny", phases=phases, say=say)
        lines += [f"a step waits for the device: {line}" for line in (curves.waits(device, folder, phases) if device.type == "cuda" else ())]
        if lines:
            red[name] = "\n".join(lines)
    return red


def compiled_at(entries: Plan, providers: dict[str, dict[str, Provider]]) -> list[tuple[str, float, str]]:
    """(case, x, provider) of all that is timed compiled: a step at every x, a single op at its last."""
    last = {case.name: setting.x for case, setting in entries}
    return [(case.name, setting.x, name) for case, setting in entries if case.mode == "step" or setting.x == last[case.name]
            for name, provider in of_case(case, providers).items() if provider.compiled]


def timed(entries: Plan, providers: dict[str, dict[str, Provider]], shares: dict, repeats: int, clock: Clock, red: dict[str, str],
          trouble: Callable[[tuple[str, float, str]], str | None], say: Callable[[str], None] = say, keep: Callable[[list[rows.Row]], None] = lambda found: None) -> list[rows.Row]:
    """Rows of every case that is not red; one that fails becomes red, and is measured at other x and shapes all the same. trouble: of what is compiled, as `affordable` asks. say: hears what is left out.
    keep: gets all that there is after every case."""
    found, barred, longest = [], {*red}, 0.0
    for case, setting in entries:
        if barred & {stem(case), case.name}:
            continue
        if why := clock.full(longest):
            say(f"{title(case, setting)}: not measured: {why}")
            continue
        begun = clock.left(1)
        say(f"{title(case, setting)}: timing")
        share = shares.get((stem(case), setting.x)) or next((s for (name, _), s in shares.items() if name == stem(case)), None)

        def against(name: str) -> str | None:
            differs = DIFFERS if (share or {}).get(name, 0.0) > 1 else ""
            return case.mode == "step" and red.get(name) or differs or trouble((case.name, setting.x, name))

        taking = affordable(case, of_case(case, providers), against, say)
        wrong, here = [red[case.name]] if case.name in red else [], {}  # at another x
        with _noting(case, setting, here, case.name):
            found += measure.time_case(case, setting, taking, repeats, shares=share, say=say, failed=wrong.append)
        longest = max(longest, begun - clock.left(1))
        if wrong := [*wrong, *here.values()]:
            red[case.name] = "\n".join(wrong)
        if found:
            keep(found)
    return found


# ---------------------------------------------------------------- after all that is timed

def busy(entries: Plan, providers: dict[str, dict[str, Provider]], found: list[rows.Row], clock: Clock) -> None:
    """Puts `busy_ms` (measure.py) into the rows of the two providers that a step's targets compare. What fails there, or finds no time left, has none, which is said."""
    for ours in roofline.fastest(found):
        (case, setting), = [(case, setting) for case, setting in entries if (case.name, setting.x) == (ours.kernel_name, ours.x_value)]
        for name in (case.baseline, ours.provider):
            its = [row for row in found if (row.kernel_name, row.x_value, row.provider) == (case.name, setting.x, name)]
            if not its:
                continue
            if not clock.before(clock.late):
                return say(f"{title(case, setting)}: {name}: no busy_ms, nor of what follows: the run has used {clock.late:.0%} of its time")
            try:
                lineup.let_go()
                ms = measure.busy_ms(case, setting, of_case(case, providers)[name])
            except Exception as error:  # a machine may keep its counters to itself
                say(f"{title(case, setting)}: {name}: no busy_ms: {told(error)}")
                continue
            for row in its if ms else ():
                row.extra_config["busy_ms"] = round(ms, 5)


# ---------------------------------------------------------------- before anything is timed

STEP_NEEDS, OP_NEEDS = 20 * 2 ** 30, 8 * 2 ** 30
"""Bytes on the device that a process is given room for: a step of transformers at 128 x 256 takes 19 GiB at its peak, an op with its gradients a few."""


class Run:
    """What one call of this script checks and times; a process of its own makes it anew from the same arguments. say: hears which providers take no part."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, say: Callable[[str], None] = say):
        self.arguments, self.folder, self.device = arguments, folder, torch.device(arguments.device)
        torch.set_float32_matmul_precision("highest")  # equality is asked in float32, not in TF32; bf16 products are not touched by it
        common = self.device, "micro" if arguments.dry_run else arguments.size, arguments.dry_run, folder
        # Before a timing nobody waits for torch.compile of a step in eval mode: with --steps curves.py compares what is compiled, on its small model; without, theirs alone is timed so.
        compiled = arguments.check or self.device.type != "cuda"
        planned = step_plan(*common, tuple(shapes_of(arguments)), compiled) if arguments.steps else plan(*common, compiled)
        self.to_check, self.to_time = (chosen(entries, arguments.only) for entries in planned)
        self.compiled = self.device.type == "cuda" if arguments.compile is None else arguments.compile
        cases = {stem(case): CASES[stem(case)] for case, _ in self.to_check + self.to_time}
        self.providers = {name: lineup.taking_part(case, self.compiled, say, self.device.type, arguments.dry_run) for name, case in cases.items()}

    def equality(self, clock: Clock, stems: Iterable[str] | None = None) -> tuple[dict[str, str], dict[tuple[str, float], dict[str, float]]]:
        """(stem -> what is wrong with it, shares as `checked` gives them) of these stems, or all."""
        stems = dict.fromkeys(stem(case) for case, _ in self.to_check) if stems is None else stems
        red = unlike_the_cpu(self.device, self.arguments.dry_run, self.folder, stems) if self.arguments.steps else {}
        if self.arguments.steps and self.compiled and self.device.type == "cuda" and f"{curves.PHASES[0]}_step" in stems:
            if lines := curves.compiled(self.device, self.folder, say=say):
                red[COMPILED_STEP] = "\n".join(lines)
        return red, checked([entry for entry in self.to_check if stem(entry[0]) in stems], self.providers, clock, red)


def check_job(arguments: argparse.Namespace, folder: Path, name: str, clock: Clock, threads: int) -> tuple:
    """Run.equality of one stem, with so many of the processor's threads."""
    torch.set_num_threads(threads)
    return Run(arguments, folder, lambda line: None).equality(clock, [name])


def compile_job(arguments: argparse.Namespace, folder: Path, name: str, provider: str, values: Sequence[float]) -> list[str]:
    """Runs a compiled provider of a case at these x, so that torch.compile finds all of it in its cache on disk from then on; of each x what went wrong, or nothing. One behind
    the other: a batch of theirs is padded to one shape at every x, and all but the first find what that one compiled. It has as many threads as the process that times: their number is
    part of what the cache goes by. Which of several ways is the fastest it leaves to that one, as here others use the device too."""
    from torch._inductor import config

    config.autotune_local_cache = False
    run, found = Run(arguments, folder, lambda line: None), []
    for x in values:
        (case, setting), = [(case, setting) for case, setting in run.to_time if (case.name, setting.x) == (name, x)]
        its = run.providers[stem(case)][provider]
        lineup.forget_compiled({provider: its})  # as before it is timed: what is compiled for one x is not made to serve the next
        lineup.let_go()
        try:
            measure.warmed_up(case, its.build(setting), setting.device)
            found.append("")
        except Exception as error:
            found.append(told(error))
    return found


def beforehand(run: Run, clock: Clock) -> tuple[dict[str, str], dict, dict[tuple[str, float, str], str]]:
    """(red, shares) of all checks and, by what `compiled_at` names, what became of it: each in a process of its own, as many at a time as the device's memory has room for."""
    memory = torch.cuda.get_device_properties(run.device).total_memory if run.device.type == "cuda" else 0
    room = max(1, min(8, (os.cpu_count() or 1) // 2, memory // (STEP_NEEDS if run.arguments.steps else OP_NEEDS)))
    stems = sorted({stem(case): None for case, _ in run.to_check}, key=lambda name: CASES[name].mode != "step")  # what takes longest begins first
    keys, jobs = [] if run.arguments.check else compiled_at(run.to_time, run.providers), {}
    for name, x, provider in keys:
        jobs.setdefault((name, provider), []).append(x)
    workers = max(1, min(room, len(stems) + len(jobs)))
    given, threads = (run.arguments, run.folder), max(1, torch.get_num_threads() // workers)
    say(f"{len(stems)} checks and {len(jobs)} times torch.compile, {workers} at a time")
    unhurried, left = run.arguments.check or room == 1, clock.left
    checks, most = (clock.late, clock.late) if unhurried else (clock.early, clock.patient)
    found = together([("bench.gpu:check_job", (*given, name, clock, threads), left(checks)) for name in stems]
                     + [("bench.gpu:compile_job", (*given, *job, values), left(clock.early)) for job, values in jobs.items()], workers, left(most))
    red, shares, unready = {}, {}, clock.reason() or "it had no time"
    for name, answer in zip(stems, found):
        wrong, of_stem = answer if isinstance(answer, tuple) else ({name: f"{name}: not checked: {answer or unready}"}, {})
        red |= wrong
        shares |= of_stem
    ahead = {(name, x, provider): why for ((name, provider), values), answer in zip(jobs.items(), found[len(stems):])
             for x, why in zip(values, answer if isinstance(answer, list) else len(values) * [str(answer or unready)])}
    return red, shares, ahead


def shapes_of(arguments: argparse.Namespace) -> list[str]:
    return arguments.shapes.split(",") if arguments.shapes else [*SHAPES]


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    known = {*CASES, *(name.split("_")[0] for name in CASES)}
    for name in arguments.only.split(",") if arguments.only else ():
        if name not in known:
            return complain(f"--only: no case {name!r}; expected some of {', '.join(CASES)}")
    for name in shapes_of(arguments):
        if name not in SHAPES:
            return complain(f"--shapes: no shape {name!r}; expected some of {', '.join(SHAPES)}")
    if arguments.shapes and not arguments.steps:
        return complain("--shapes: expected --steps beside it")
    if arguments.device == "cpu" and not arguments.dry_run:
        return complain("--device cpu: expected --dry-run beside it (bench/run.py measures a CPU)")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        say("no CUDA device here: not measured")
        return 2
    clock, lacking, by_host, red = Clock(arguments.minutes, arguments.steps), [], [], {}
    heading = "Dry run of bench/gpu.py: the figures mean nothing" if arguments.dry_run else f"Measured by bench/gpu.py on {rows.device_name(torch.device(arguments.device))}"
    try:
        out = arguments.out or (None if arguments.dry_run or arguments.check else results_file(str(ROOT / "bench" / "results" / file_name(rows.slug(torch.device(arguments.device)), arguments))))
    except argparse.ArgumentTypeError as error:
        return complain(str(error))
    partial = out and out.with_suffix(".partial.json")

    def heard(line: str) -> None:
        lacking.extend([line] if "not measured: " in line else [])
        by_host.extend([line] if measure.NO_GRAPH in line else [])
        say(line)

    def summed(found: list[rows.Row], *more: str) -> tuple[list[rows.Row], str, dict[str, Sequence[str]]]:
        """What is written: the rows, the heading and what the rows say together."""
        found = roofline.with_shares(found)
        if arguments.dry_run:
            found = [dataclasses.replace(row, extra_config={**row.extra_config, "dry_run": True}) for row in found]
        notes = {"Targets": roofline.targets(found), f"Below {roofline.GOOD:.0f} % of the roofline": roofline.limits(found), "Red: not equal, or failed": [*red.values()],
                 "Not measured": [*lacking, *more]} | ({"Timed with the host's work": by_host} if by_host else {})
        return found, heading, notes

    def keep(found: list[rows.Row]) -> None:
        if partial:
            rows.saved(partial, lambda: rows.write(partial, *summed(found, "the rest: the run did not come to its end")))

    with tempfile.TemporaryDirectory(prefix="peftdebias-bench-") as folder:
        run = Run(arguments, Path(folder), heard)
        asked = set(arguments.only.split(",") if arguments.only else ()) - (set() if arguments.check else CEILINGS)
        if asked and all(stem(case) in CEILINGS for case, _ in (run.to_check if arguments.check else run.to_time)):
            return complain(f"--only {arguments.only}: expected a case that is {'checked' if arguments.check else 'timed'} here, got none")
        if run.device.type == "cuda" if arguments.apart is None else arguments.apart:
            wrong, shares, ahead = beforehand(run, clock)
            trouble = ahead.get
        else:
            wrong, shares = run.equality(clock)
            wanted = compiled_at(run.to_time, run.providers)
            trouble = lambda key: clock.reason() if key in wanted else None  # noqa: E731
        red.update(wrong)
        found = [] if arguments.check else timed(run.to_time, run.providers, shares, arguments.repeats, clock, red, trouble, heard, keep)
        if run.device.type == "cuda":
            busy(run.to_time, run.providers, found, clock)
    if arguments.check:
        apart = [f"{name}, {x:g}: {provider} is not measured: {DIFFERS}" for (name, x), its in shares.items() for provider, share in its.items() if share > 1]
        print("\n".join([*red.values(), *apart]) or f"{len(run.to_check)} checks, all equal")
        return 1 if red else 0
    if not found and not red:
        return complain(f"--minutes {arguments.minutes:g}: too little for any figure")
    if not found:
        print("\n".join(red.values()))
        return 1
    found, heading, notes = summed(found)
    print(f"# {heading}\n\n{rows.table(found, notes)}")
    if out:
        if not rows.saved(out, lambda: rows.write(out, found, heading, notes)):
            return 1  # the partial stays
        for path in (partial, partial.with_suffix(".md")):
            path.unlink(missing_ok=True)
        say(f"result: {out} and {out.with_suffix('.md')}")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
