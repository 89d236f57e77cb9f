"""The compiled part, peftdebias._native (csrc/): found, checked and loaded with ctypes. Without it the Python and torch twins do the work.

With `PEFTDEBIAS_KERNELS=torch` it is loaded all the same and not used; `native` demands it; `auto` (the default) takes it where it is there and says once where it is not.
"""

import ctypes
import functools
import importlib.util
import os
import warnings

from peftdebias.errors import ConfigError

KINDS = ("auto", "torch", "native", "triton")  # as kernels.KINDS, which imports torch
ABI = 3  # of csrc/; raised in cda.h and here together


def library() -> ctypes.CDLL | None:
    """The compiled library, or None where it is not wanted or not usable (a warning says why, once). Calls into it release the GIL.

    Raises ConfigError where PEFTDEBIAS_KERNELS says nothing, or asks by native for what is not there.
    """
    wanted = asked()
    if wanted not in KINDS:
        raise ConfigError(f"PEFTDEBIAS_KERNELS: expected one of {', '.join(KINDS)}, got {wanted!r}")
    if wanted == "torch":
        return None
    found, trouble = load()
    if found is None and wanted == "native":
        raise ConfigError(f"PEFTDEBIAS_KERNELS=native: {trouble}")
    if found is None:
        say_once(trouble)
    return found


def asked() -> str:
    """PEFTDEBIAS_KERNELS, whatever it says."""
    return os.environ.get("PEFTDEBIAS_KERNELS", "auto")


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """(the library or None, what is wrong with it)."""
    again = "install again where a C++17 compiler is: pip install --force-reinstall --no-deps peftdebias (or -e . in a checkout)"
    spec = importlib.util.find_spec("peftdebias._native")
    if spec is None or not spec.origin:
        return None, f"peftdebias._native is not built, plain Python does its work, far slower; to have it, {again}"
    try:
        found = ctypes.CDLL(spec.origin)
        version = found.peftdebias_cda_abi()
    except (OSError, AttributeError) as error:
        return None, f"{spec.origin}: cannot be loaded, plain Python does its work, far slower ({error}); to mend it, {again}"
    if version != ABI:
        return None, f"{spec.origin}: expected version {ABI}, got {version}, plain Python does its work, far slower; to mend it, {again}"
    return found, ""


@functools.cache
def say_once(trouble: str) -> None:
    """Warns of it, once a process."""
    warnings.warn(trouble, RuntimeWarning, stacklevel=3)
