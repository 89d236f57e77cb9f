"""Which implementation of an op runs. Imported as `peftdebias.kernels`; needs torch only, and knows nothing of peftdebias.

    attention = kernels.choose("attention", reference=attention_ref, device=x.device)

An op has up to three implementations: "torch" (the caller's plain twin, always there), "native" (csrc on a CPU) and "triton" (CUDA).
`PEFTDEBIAS_KERNELS=auto|torch|native|triton`, or `with kernels.use("torch"):`, forces one; a forced one that does not exist is an error,
`auto` takes the fastest that the device can run and falls back to the twin.
"""

import contextlib
import contextvars
import os

KINDS = ("auto", "torch", "native", "triton")
_registry: dict[tuple[str, str], object] = {}
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("peftdebias_kernels", default=None)


def register(op: str, kind: str):
    """Decorator: the function below is the `kind` ("native" or "triton") implementation of `op`."""
    if kind not in KINDS[2:]:
        raise ValueError(f"kind of kernel: expected one of {KINDS[2:]}, got {kind!r}")

    def enter(function):
        _registry[op, kind] = function
        return function

    return enter


def setting() -> str:
    """What is asked for now: the innermost `use`, else PEFTDEBIAS_KERNELS, else "auto"."""
    kind = _forced.get() or os.environ.get("PEFTDEBIAS_KERNELS", "auto")
    if kind not in KINDS:
        raise ValueError(f"PEFTDEBIAS_KERNELS: expected one of {', '.join(KINDS)}, got {kind!r}")
    return kind


@contextlib.contextmanager
def use(kind: str):
    """Force one kind of implementation inside the `with` block (per thread and task)."""
    if kind not in KINDS:
        raise ValueError(f"kernels.use: expected one of {', '.join(KINDS)}, got {kind!r}")
    token = _forced.set(kind)
    try:
        yield
    finally:
        _forced.reset(token)


def choose(op: str, reference, device=None):
    """The implementation of `op` to call now. `reference` is the caller's plain-torch twin.

    device: the torch.device the tensors live on; None is a CPU. Raises LookupError where a forced kind has no such op.
    """
    kind = setting()
    if kind == "torch":
        return reference
    if kind == "auto":
        kind = "triton" if getattr(device, "type", "cpu") == "cuda" else "native"
        return _registry.get((op, kind), reference)
    found = _registry.get((op, kind))
    if found is None:
        raise LookupError(f"{op}: no {kind} implementation here; expected one of {available(op)}")
    return found


def available(op: str) -> list[str]:
    """The kinds that `op` has here: always "torch", then what is registered."""
    return ["torch"] + [kind for kind in KINDS[2:] if (op, kind) in _registry]
