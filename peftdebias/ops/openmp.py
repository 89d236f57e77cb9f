"""Whether OpenMP, by which torch's libraries share their work among threads on a CPU, gives them the threads that they ask for.

oneDNN fixes the number when it makes the code of a product. Where a team has fewer threads then, the parts of those that are missing are never computed, and nothing
says so: the result holds what its memory held. MKL and torch's own loops look at the team that they got.
"""

import ctypes
import functools
import re

import torch

_LIBRARY = re.compile(r"(?:^|/)lib(?:gomp|iomp5|omp)\b[^/]*$")


def too_few() -> str:
    """Why a team may have fewer threads here than torch.get_num_threads(), in words; empty where it has them all. What is asked may change while a process runs."""
    found = _runtimes()
    if not found:
        return "whether OpenMP gives all threads cannot be read here"
    for runtime in found:
        if runtime.omp_get_dynamic():
            return "OpenMP may give fewer threads than asked for (OMP_DYNAMIC)"
        if (limit := runtime.omp_get_thread_limit()) < torch.get_num_threads():
            return f"OpenMP gives at most {limit} of {torch.get_num_threads()} threads (OMP_THREAD_LIMIT)"
        if runtime.omp_get_max_active_levels() < 1:
            return "OpenMP gives one thread alone (OMP_MAX_ACTIVE_LEVELS)"
    return ""


@functools.cache
def _runtimes() -> list[ctypes.CDLL]:
    """The OpenMP libraries that this process has loaded, torch's among them."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as lines:
            paths = {line.rstrip("\n").partition("/")[2] for line in lines}
        return [ctypes.CDLL(f"/{path}") for path in sorted(paths) if _LIBRARY.search(path)]
    except OSError:  # no Linux, or a library whose file was replaced since
        return []
