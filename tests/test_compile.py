"""Every kernel makes machine code without a device, and none of it spills; with whichever Triton is installed.

In a process of its own, without TRITON_INTERPRET: see tests/test_kernels.py.
"""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CLEAN = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=CLEAN | environment, capture_output=True, text=True)


def test_the_first_kernel_of_every_file_compiles_and_a_spill_is_seen(tmp_path):
    """For sm_90; the whole report is the slow test below. A kernel that gets fewer registers than it needs is found out."""
    code = """
import dataclasses, importlib
from bench.compile_report import compile_one, files
for file in files():
    for spec in importlib.import_module(f"peftdebias.kernels.{file}").specs(90)[:1]:
        made = compile_one(file, spec, 90)
        assert not made.red and made.registers and not made.local, made
        print(file, made.wide)
many = next(s for s in importlib.import_module("peftdebias.kernels.adamw").specs(90) if s.name == "adamw of many")
print("many", compile_one("adamw", many, 90).wide)
once = next(s for s in importlib.import_module("peftdebias.kernels.lora_grads").specs(90) if s.name == "once, bf16, 2 of 768")
made = compile_one("lora_grads", once, 90)
assert not made.red and made.passes.taken == made.passes.least > 0 and not made.passes.unknown, made  # no bank conflicts
from peftdebias.kernels.tiles import like
assert [like(arch) for arch in (80, 86, 87, 89, 90, 100, 103, 110, 120, 121)] == [80, 86, 86, 86, 90, 100, 103, 110, 86, 86]
assert not [s.name for s in importlib.import_module("peftdebias.kernels.lora_grads").specs(86) if s.name.startswith("once")]  # no shared memory for it
for arch, file, name in ((86, "attention", "forward, bf16, W 64, dropout, prefix, 512 by 512"), (120, "embeddings", "forward alone, fp32, D 768")):
    tight = next(s for s in importlib.import_module(f"peftdebias.kernels.{file}").specs(like(arch)) if s.name == name)
    assert not compile_one(file, tight, arch).red
large = dataclasses.replace(once, num_stages=2)  # which sm_80 has the shared memory for
assert [compile_one("lora_grads", large, arch).red for arch in (80, 86)] == ["", "too much shared memory"]
spec = next(s for s in importlib.import_module("peftdebias.kernels.lora_grads").specs(90) if s.name == "partial, bf16, r 8")
cramped = dataclasses.replace(spec, maxnreg=32)
assert compile_one("lora_grads", cramped, 90).red == "spills"
broken = dataclasses.replace(spec, constants=spec.constants | {"BK": 100})
assert compile_one("lora_grads", broken, 90).red == "does not compile"
"""
    ran = python("-c", code, TRITON_CACHE_DIR=str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    wide = {name: int(count) for name, count in map(str.split, ran.stdout.splitlines())}
    assert {"adamw", "adapter", "attention", "dropout", "embeddings", "feed_forward", "gelu", "linear_trained", "lora", "lora_grads", "lora_write", "mlm_loss", "norm", "sparse", "many"} == set(wide)
    # What comes out of a table of addresses is read in 16 bytes at a time as well: 4 of 8 values a thread in `many`, each of two; lora_write's W is 16 values a thread.
    assert wide["adamw"] == wide["many"] == 8 and wide["lora_write"] >= 4 and min(wide.values()) > 0


@pytest.mark.slow
def test_no_kernel_spills(tmp_path):
    ran = python("bench/compile_report.py", TRITON_CACHE_DIR=str(tmp_path))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " 0 red" in ran.stdout


def test_bad_arguments(monkeypatch, capsys):
    """Refused before Triton is imported."""
    monkeypatch.syspath_prepend(ROOT)
    report = importlib.import_module("bench.compile_report")
    with pytest.raises(SystemExit) as stopped:
        report.main(["--arch", "75"])
    assert stopped.value.code == 2 and "--arch" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert report.main([]) == 2
    assert capsys.readouterr() == ("", "bench/compile_report.py: TRITON_INTERPRET is set: expected a process without it\n")
