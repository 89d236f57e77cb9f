"""Which providers of a case take part, and what becomes of one that cannot go on.

What it adds over case.py: libraries, kernels and memory that are not there. It leaves out what they are compared and timed by (equality.py, measure.py).
"""

import contextlib
import gc
import importlib.util
from collections.abc import Callable

import torch

from peftdebias import kernels
from peftdebias.ops.linear import no_bf16

from .case import Case, Provider


class Unequal(Exception):
    """Providers disagree; the message names every tensor that does and by how much."""


def taking_part(case: Case, compiled: bool, say: Callable[[str], None], device: str = "cpu", stand_in: bool = False, bf16: bool = False) -> dict[str, Provider]:
    """The providers of this run; says which are left out for want of a library, or because a kernel does not run on the device. stand_in: those stay."""
    found = {}
    for name, provider in case.providers.items():
        if provider.bf16 and not bf16 or provider.only_on not in ("", device):
            continue
        missing = [library for library in provider.needs if importlib.util.find_spec(library) is None]
        trouble = [why for op in provider.kernels if (why := kernels.missing(op, "triton", device))]
        lacking = [why for op in provider.native if (why := kernels.missing(op, "native") or (device != "cpu" and f"csrc does not run on {device}"))]
        lacking += [f"--precision bf16: {why}" for why in (provider.bf16 and no_bf16(),) if why]
        lacking += [why for why in (not missing and not trouble and provider.refuses(device),) if why]
        if lacking:
            say(f"{case.name}: {name} is not measured: {lacking[0]}")
            continue
        if missing:
            say(f"{case.name}: {name} is not measured: {' and '.join(missing)} not installed (pip install -e '.[bench]')")
            continue
        if trouble:
            say(f"{case.name}: {f'plain twins stand in for {name}' if stand_in else f'{name} is not measured'}: {trouble[0]}")
        if (stand_in or not trouble) and (compiled or not provider.compiled):
            found[name] = provider
    return found


@contextlib.contextmanager
def may_fail(case: Case, name: str, providers: dict[str, Provider], say: Callable[[str], None], failed: Callable[[str], None] | None = None):
    """torch.compile needs a compiler and may not know a model: then that provider is not measured, and the others go on. So they do where another fails and `failed` is there
    to hear of it."""
    try:
        yield
    except Unequal:
        raise
    except Exception as error:
        compiled = providers[name].compiled
        if not compiled and failed is None:
            raise
        del providers[name]
        line = f"{case.name}: {name} is not measured: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        say(line)
        if not compiled:
            failed(line)


@contextlib.contextmanager
def memory_may_end(case: Case, name: str, device: torch.device, say: Callable[[str], None]):
    """Where a device has too little memory for a provider, that one is not measured, and the others go on."""
    try:
        yield
    except torch.OutOfMemoryError:
        there = f" ({torch.cuda.get_device_properties(device).total_memory / 2 ** 30:.0f} GiB are there)" if device.type == "cuda" else ""
        say(f"{case.name}: {name} is not measured: out of memory{there}")


def let_go() -> None:
    """Gives back what a provider that failed held. Its error holds on to that inside of a `with` that takes the error, and in a cycle behind it."""
    gc.collect()
    torch.cuda.empty_cache()


def forget_compiled(providers: dict[str, Provider]) -> None:
    """torch.compile keeps a few versions of a function, over all that was built from it, and runs it eagerly beyond them: every case begins with none."""
    if any(p.compiled for p in providers.values()):
        torch.compiler.reset()
