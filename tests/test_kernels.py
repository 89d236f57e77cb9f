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


class Checks:
    """The chosen checks, begun with the first test of the session and beside the others: each is one thread's work, and together they take longer than all else."""

    def __init__(self, chosen: list[tuple[Path, str]]):
        self.pool = ThreadPoolExecutor(os.cpu_count() or 1)
        self.processes: list[subprocess.Popen] = []
        longest = sorted(chosen, key=lambda key: -key[0].stat().st_size)  # by their files: so the last to be begun is short
        self.found = {key: self.pool.submit(self._run, *key) for key in longest}

    def _run(self, path: Path, mark: str) -> tuple[int, str]:
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PEFTDEBIAS_KERNELS": "auto"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", mark, str(path)]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.processes.append(process)
        said = process.communicate()[0]
        return process.returncode, said

    def end(self) -> None:
        """Whoever stopped the session does not wait for them."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        for process in self.processes:
            process.terminate()


@pytest.mark.parametrize("mark", ["not slow", pytest.param("slow", marks=pytest.mark.slow)], ids=["ragged", "real"])
@pytest.mark.parametrize("path", CHECKS, ids=lambda p: p.stem)
def test_equal_to_the_twin(path, mark, checks):
    code, said = checks.found[path, mark].result()
    nothing = code == 5 and mark == "slow"  # pytest's word for: no such check in this file
    assert code == 0 or nothing, said
