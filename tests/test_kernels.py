"""Every kernel against its plain twin, in Triton's interpreter; the files of tests/kernel_checks a few to a process, their slow checks one by one.

A process runs Triton either interpreted or compiled, decided when it is first imported; so neither happens in the process of the other tests.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHECKS = sorted((ROOT / "tests" / "kernel_checks").glob("check_*.py"), key=lambda path: -path.stat().st_size)  # the longest first
PROCESSES = 4  # to start one takes as long as a short file's checks


def stems(paths):
    return "+".join(path.stem.removeprefix("check_") for path in paths)


RAGGED = [pytest.param("not slow", paths, id=stems(paths)) for paths in (CHECKS[k::PROCESSES] for k in range(PROCESSES))]
REAL = [pytest.param("slow", [path], id=f"{path.stem.removeprefix('check_')}-real", marks=pytest.mark.slow) for path in CHECKS]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize("mark, paths", RAGGED + REAL)
def test_equal_to_the_twin(mark, paths):
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PEFTDEBIAS_KERNELS": "auto"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", mark, *map(str, paths)]
    ran = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    nothing = ran.returncode == 5 and mark == "slow"  # pytest's word for: no such check there
    assert ran.returncode == 0 or nothing, ran.stdout
