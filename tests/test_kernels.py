"""Every kernel against its plain twin, in Triton's interpreter; each file of tests/kernel_checks in a process of its own.

A process runs Triton either interpreted or compiled, decided when it is first imported; so neither happens in the process of the other tests.
"""

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHECKS = sorted((ROOT / "tests" / "kernel_checks").glob("check_*.py"))

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def interpreted(path: Path, mark: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PEFTDEBIAS_KERNELS": "auto"}
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", mark, str(path)], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def running(request):
    """{(path, mark): Future} of all that were chosen: each is one thread's work, so as many go on as there are cores."""
    chosen = [item.callspec.params for item in request.session.items if item.path == request.path]
    pool = ThreadPoolExecutor(os.cpu_count())
    yield {(p["path"], p["mark"]): pool.submit(interpreted, p["path"], p["mark"]) for p in chosen}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("mark", ["not slow", pytest.param("slow", marks=pytest.mark.slow)], ids=["ragged", "real"])
@pytest.mark.parametrize("path", CHECKS, ids=lambda p: p.stem)
def test_equal_to_the_twin(path, mark, running):
    done = running[path, mark].result()
    nothing = done.returncode == 5 and mark == "slow"  # pytest's word for: no such check in this file
    assert done.returncode == 0 or nothing, done.stdout + done.stderr
