"""What a command asks of its process before it works: how long OpenMP's threads wait awake, and which freed memory malloc keeps."""

import os
import platform
import subprocess
import sys

import pytest

from peftdebias import cli as command_line
from peftdebias import threads

from .small import cli

@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
@pytest.mark.parametrize("given, kept", [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False)])
def test_pages_are_kept(given, kept):
    """What a layer makes and frees; by malloc itself it is brought in anew every time."""
    asked = """
import resource, numpy
from peftdebias.pages import keep_pages
keep_pages()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    before, made = faults(), [numpy.ones(12 << 20, numpy.int8) for _ in range(9)]
    del made
print(faults() - before)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC", "GLIBC"))} | given
    found = subprocess.run([sys.executable, "-c", asked], env=environment, capture_output=True, text=True, check=True)
    assert (int(found.stdout) < 20) == kept, found.stdout  # 54 huge pages


def test_pages_are_kept_where_nothing_is_trained(small, tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(command_line, "keep_pages", lambda: called.append(True))
    for argv, times in ((["doctor", "--device", "cpu"], 0), (["predict", tmp_path / "none"], 1), (["evaluate", tmp_path / "none"], 2), (["upstream", *small.learning(out=tmp_path / "run", corpus="none")], 2)):
        cli(*argv)
        assert len(called) == times, argv


@pytest.mark.parametrize("given, expected", [({}, "1000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "passive"}, "0"), ({"GOMP_SPINCOUNT": ""}, "1000")])
def test_threads_that_wait_sleep_soon(given, expected):
    """As torch's own OpenMP says when it is loaded; whoever asks for another way gets it."""
    environment = {name: value for name, value in os.environ.items() if name not in threads.ASKED} | given | {"OMP_DISPLAY_ENV": "VERBOSE"}
    said = subprocess.run([sys.executable, "-m", "peftdebias", "doctor"], capture_output=True, text=True, env=environment)
    if "GOMP_SPINCOUNT" not in said.stderr:
        pytest.skip("torch's OpenMP is not GNU's here")
    assert said.returncode == 0 and f"GOMP_SPINCOUNT = '{expected}'" in said.stderr


def test_threads_of_a_program_that_has_torch_wait_as_they_did(monkeypatch):
    for name in threads.ASKED:
        monkeypatch.delenv(name, raising=False)
    assert "torch" in sys.modules
    threads.sleep_soon()
    assert threads.VARIABLE not in os.environ
