"""Which form of an op runs, where it has several that compute the same: picked by what was measured on this very device, else by a default.

    form = dispatch.pick("lora_linear", ("epilogue", "library"), device=x.device, dtype=x.dtype, dropout=True, rows=4096, inside=768, outside=768, rank=8)

The measurements are rows of dispatch.json, written by bench/dispatch_table.py on the device that it names; it holds no estimate, and a device that is not in
there gets the default. `with dispatch.use("lora_linear", "epilogue"):`, or PEFTDEBIAS_LORA_LINEAR=epilogue, forces a form wherever it can serve.
"""

import contextlib
import contextvars
import functools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from . import constant

TABLE = Path(__file__).with_name("dispatch.json")
FORMS = {"linear": ("blas", "onednn"), "lora_linear": ("written", "epilogue", "library"), "lora_grads": ("twice", "once"), "attention": ("fused", "padded", "varlen"),
         "feed_forward": ("library", "fused")}
"""op -> its forms (lora.py, lora_grads.py, feed_forward.py and, in peftdebias/ops, attention.py and linear.py say what they are); the first that can serve is the default."""

_forced: contextvars.ContextVar[dict[str, str]] = contextvars.ContextVar("peftdebias_forms", default={})


@contextlib.contextmanager
def use(op: str, form: str):
    """Force one form of `op` inside the `with` block (per thread and task), wherever it can serve; a backward keeps what its forward was asked for."""
    _known(op, form, "dispatch.use")
    token = _forced.set({**_forced.get(), op: form})
    try:
        yield
    finally:
        _forced.reset(token)


def pick(op: str, candidates: Sequence[str], *, device: torch.device, dtype: torch.dtype, dropout: bool, **sizes: int) -> str:
    """One of `candidates`, the forms that can serve here; `decide` without its reason."""
    return decide(op, candidates, device=device, dtype=dtype, dropout=dropout, **sizes)[0]


def decide(op: str, candidates: Sequence[str], *, device: torch.device, dtype: torch.dtype, dropout: bool, **sizes: int) -> tuple[str, str]:
    """(form, why). sizes: what the op's measured rows name. lora_linear: rows T, inside and outside the widths of the linear, rank.
    lora_grads: the same, outside and rank of all pieces together. attention: rows T, sequences B,
    longest S, prefix P, width H W. feed_forward: rows T, inside and outside the widths of its first linear, as measured in a frozen base. Of the measured rows with this device, dtype and dropout the nearest in size decides (sum of |log2| of the ratios), by the least
    time among the candidates; while torch.compile traces, the default."""
    if form := asked(op):
        if form in candidates:
            return form, "asked for by name"
    if torch.compiler.is_compiling():
        return _default(op, candidates), "the default: a compiled graph serves many sizes"
    return _measured(op, tuple(candidates), _name(device), str(dtype).removeprefix("torch."), dropout, **sizes)


def _default(op: str, candidates: Sequence[str]) -> str:
    return next(form for form in FORMS[op] if form in candidates)


@functools.lru_cache(maxsize=4096)
def _measured(op: str, candidates: tuple[str, ...], device: str, dtype: str, dropout: bool, **sizes: int) -> tuple[str, str]:
    mine = [r for r in table().get(op, ()) if r["device"] == device and r["dtype"] == dtype and r["dropout"] == dropout and any(c in r["ms"] for c in candidates)]
    if not mine:
        return _default(op, candidates), f"the default: not measured on {device}"
    near = min(mine, key=lambda r: sum(abs(math.log2(max(1, r[k]) / max(1, n))) for k, n in sizes.items()))
    best = min((c for c in candidates if c in near["ms"]), key=near["ms"].__getitem__)
    return best, f"the fastest when measured here at {', '.join(f'{name} {near[name]}' for name in sizes)}"


@constant
def asked(op: str) -> str | None:
    """The form asked for by `use`, or by the environment variable of the op (PEFTDEBIAS_LORA_LINEAR), or None."""
    variable = f"PEFTDEBIAS_{op.upper()}"
    form = _forced.get().get(op) or os.environ.get(variable)
    if form:
        _known(op, form, variable)
    return form or None


@functools.cache
def table() -> dict[str, list[dict]]:
    """op -> measured rows: device, dtype, dropout, the op's sizes, ms {form: median milliseconds of forward + backward; of lora_grads, which is
    a backward, its own}."""
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _known(op: str, form: str, what: str) -> None:
    if form not in FORMS.get(op, ()):
        raise ValueError(f"{what}: expected one of {', '.join(FORMS.get(op, ())) or 'no form'} for {op}, got {form!r}")
