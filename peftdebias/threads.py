"""How long OpenMP's threads look out for each other before they sleep: said before torch is loaded, which is when its OpenMP asks.

GNU's, which torch has on Linux, looks 300,000 times, some milliseconds. A thread that waits so keeps its processor from whatever else wants it: from the thread it waits
for, where the machine has other work, and a training step then takes many times as long.
"""

import os
import sys

VARIABLE = "GOMP_SPINCOUNT"
ASKED = ("OMP_WAIT_POLICY", VARIABLE)
"""Whoever has set one of these is not overruled."""
SPINS = 1000  # some 25 us


def sleep_soon() -> None:
    """For this process and those that it starts, unless its environment says otherwise or torch is loaded already."""
    if "torch" not in sys.modules and not any(os.environ.get(name) for name in ASKED):
        os.environ[VARIABLE] = str(SPINS)
