"""What runs here: versions, the device, and for every op which implementation would be used and why. `peftdebias doctor` prints it.

It decides nothing: the answers are those of `kernels.decide` and `kernels.dispatch`, asked as the modules ask them. On a CUDA device, or where kernels are forced
into Triton's interpreter, one kernel is run and its bits are compared, since compilers fail when they are used and not when they are imported.
"""

import dataclasses
import importlib
import os
import platform

import torch

from . import __version__, kernels, native
from .kernels import dispatch
from .kernels.dropout_ref import dropout_ref
from .ops.attention import has_varlen
from .ops.linear import form as linear_form
from .ops.linear import no_bf16
from .ops.scores import form as scores_form
from .processor import installed
from .training import find_device

CALLERS = ("encoder", "training", "tasks", "methods.lora", "methods.adapter", "methods.sparse")
"""The modules that call ops; what registers an implementation of one is imported by them."""


@dataclasses.dataclass(frozen=True)
class Findings:
    """facts: lines. ops: (op, implementation, why), one an op."""

    facts: list[str]
    ops: list[tuple[str, str, str]]


def examine(device_name: str = "auto") -> Findings:
    """Raises ConfigError on a device that is not here, or a PEFTDEBIAS_KERNELS that says nothing."""
    device = find_device(device_name)
    for module in CALLERS:
        importlib.import_module(f"peftdebias.{module}")
    ops, forms = [(op, *_answer(op, device)) for op in names()], _forms(device)
    return Findings([*_machine(device), f"kernels       PEFTDEBIAS_KERNELS={kernels.setting()}; Triton {kernels.no_triton() or _tried(device)}", *forms], [*ops, _engine()])


def names() -> list[str]:
    """Every op that has, or could have, more than its plain twin."""
    return sorted({"attention", *kernels.TRITON, *kernels.registered()})


def _answer(op: str, device: torch.device) -> tuple[str, str]:
    kind, why = kernels.decide(op, device)
    if kind == "torch" and kernels.setting() == "auto" and device.type != "cuda" and native.load()[0] is None:
        why = "no compiled library here (the last line says why); plain torch does its work"
    return kind or "none", why


def _machine(device: torch.device) -> list[str]:
    versions = f"peftdebias {__version__}, Python {platform.python_version()}, torch {torch.__version__}, triton {installed('triton') or 'none'}"
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        where = f"{device}: {about.name}, compute capability {about.major}.{about.minor}, {about.total_memory / 2 ** 30:.0f} GiB, CUDA {torch.version.cuda}"
    else:
        where = f"cpu: {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; CUDA devices: {torch.cuda.device_count() or 'none'}"
    return [f"versions      {versions}", f"device        {where}"]


def _tried(device: torch.device) -> str:
    """One kernel run on the device against its plain twin, or why none was."""
    if device.type != "cuda" and not kernels.interpreted():
        return f"{installed('triton') or 'of an unknown version'} is installed; it compiles for CUDA devices and does not run on {device.type}"
    if device.type == "cuda" and (why := kernels.unsuited(device.index)):
        return f"{installed('triton') or 'of an unknown version'} is installed; {why}"
    from .kernels.dropout import dropout

    seed, x = torch.tensor([3], device=device), torch.ones(37, 13, device=device)
    try:
        equal = torch.equal(dropout(x, 0.5, seed, 1), dropout_ref(x, 0.5, seed, 1))
    except Exception as error:  # a compiler that is missing, a driver that is too old: whatever it says is the finding
        return f"fails on {device}: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]} (PEFTDEBIAS_KERNELS=torch goes without it)"
    return f"runs on {device}{' by its interpreter' if kernels.interpreted() else ''}, and a kernel {'gives the bits of' if equal else 'DIFFERS FROM'} its plain twin"


def _forms(device: torch.device) -> list[str]:
    """By which library a CPU multiplies, how it computes a vocabulary's scores, whether it multiplies bf16; which forms of lora_linear, lora_grads, attention and feed_forward are picked at the size
    of BERT-base, where a kernel is."""
    lines = []
    if device.type == "cpu":
        lines = ["linear        form {}: {}".format(*linear_form()), "scores        form {}: {}".format(*scores_form()),
                 f"bf16          {'refused: ' + why if (why := no_bf16()) else 'by --precision bf16, for wide products'}"]
    if kernels.decide("lora_linear", device)[0] != "triton":
        return lines + _without_effect(device)
    how = {"device": device, "dtype": torch.bfloat16}
    for dropout, candidates in ((False, dispatch.FORMS["lora_linear"]), (True, ("epilogue", "library"))):
        form, why = dispatch.decide("lora_linear", candidates, dropout=dropout, rows=4096, inside=768, outside=768, rank=8, **how)
        lines.append(f"lora_linear   form {form} with{'' if dropout else 'out'} dropout: {why}")
    from .kernels.lora_grads import forms  # Triton is there

    candidates = forms(torch.empty(0, 768, dtype=torch.bfloat16, device=device), 768, 2, 16, False)  # query's and value's together
    form, why = dispatch.decide("lora_grads", candidates, dropout=False, rows=4096, inside=768, outside=1536, rank=16, **how)
    lines.append(f"lora_grads    form {form} without dropout: {why}")
    for dropout in (False, True):
        candidates = ("fused", "padded") if dropout or not has_varlen() else dispatch.FORMS["attention"]
        form, why = dispatch.decide("attention", candidates, dropout=dropout, rows=4096, sequences=32, longest=128, prefix=0, width=768, **how)
        lines.append(f"attention     form {form} with{'' if dropout else 'out'} dropout: {why}")
    form, why = dispatch.decide("feed_forward", dispatch.FORMS["feed_forward"], dropout=False, rows=4096, inside=768, outside=3072, **how)
    lines.append(f"feed_forward  form {form}: {why}")
    return lines


def _without_effect(device: torch.device) -> list[str]:
    """Forms asked for by name that no kernel here has."""
    told = []
    for op in dispatch.FORMS:
        if op in kernels.TRITON and (form := dispatch.asked(op)):
            told.append(f"{op:<13} form {form} asked for by name, without effect: only its Triton kernel has forms, and {kernels.decide(op, device)[0] or 'none'} runs here")
    return told


def _engine() -> tuple[str, str, str]:
    found, trouble = native.load()
    if native.asked() == "torch":
        return "counterfactuals", "python", "asked for by name"
    return "counterfactuals", "native" if found else "python", "compiled" if found else trouble
