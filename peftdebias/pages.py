"""How much freed memory glibc's malloc keeps for the next allocation, in place of giving it back: what it gives back has to be brought in again page by page, and scoring without
gradients frees and allocates all that a layer makes, layer after layer. A training holds on to most of it, and has no need of this.
"""

import contextlib
import ctypes
import os

TRIM, MAPPED = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
KEPT, LARGEST = 256 << 20, 32 << 20  # bytes; malloc maps what is larger than the second by itself, and takes no more for a limit
ASKED = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")
"""Whoever has set one of these is not overruled."""


def keep_pages() -> None:
    """For this process, where its malloc is glibc's; elsewhere nothing."""
    if any(os.environ.get(name) for name in ASKED):
        return
    with contextlib.suppress(OSError, TypeError, AttributeError):  # no such library, no such function
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MAPPED, LARGEST), mallopt(TRIM, KEPT)
