"""Every kernel against its plain twin, in Triton's interpreter; each file of tests/kernel_checks in a process of its own.

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

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize("mark", ["not slow", pytest.param("slow", marks=pytest.mark.slow)], ids=["ragged", "real"])
@pytest.mark.parametrize("path", CHECKS, ids=lambda p: p.stem)
def test_equal_to_the_twin(path, mark):
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PEFTDEBIAS_KERNELS": "auto"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", mark, str(path)]
    ran = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    nothing = ran.returncode == 5 and mark == "slow"  # pytest's word for: no such check in this file
    assert ran.returncode == 0 or nothing, ran.stdout
