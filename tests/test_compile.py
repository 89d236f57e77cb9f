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
alone = next(s for s in importlib.import_module("peftdebias.kernels.attention").specs(90) if s.name == "backward, d alone, fp32, W 64, dropout, prefix, 512 by 512")
assert alone.maxnreg == 128 and not compile_one("attention", alone, 90).red  # without a bound triton 3.6 takes 80 registers, and spills
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


def test_batches_of_other_counts_are_served_by_the_same_code():
    """Triton makes code anew for every whole-number argument that is 1 or becomes a multiple of 16. Of counts that change from batch to batch that would be a stall and no gain.
    Every launch is recorded instead of run; what one differs in from another must be a constant, a dtype or an option. And specs compile what launches ask for: no count as a
    multiple of 16, and every form that a truth chooses."""
    code = """
import collections, importlib
import torch
from triton.runtime.jit import JITFunction
from bench.compile_report import files
from peftdebias import kernels
from peftdebias.batches import Spans
from peftdebias.kernels import dispatch
from peftdebias.kernels.dropout_ref import Drop
from peftdebias.tasks import mlm_loss_ref

forms, launched = set(), set()
for spec in (s for file in files() for s in importlib.import_module(f"peftdebias.kernels.{file}").specs(90)):
    apart = {p.name for p in spec.kernel.params if p.do_not_specialize}
    assert not apart & {*spec.aligned, *spec.constants} and apart <= set(spec.signature), (spec.name, apart)
    forms |= {(spec.kernel.fn.__module__, spec.kernel.fn.__name__, name, value) for name, value in spec.constants.items() if isinstance(value, bool)}

kernels.interpreted, asked = (lambda: True), collections.defaultdict(dict)

def record(kernel, *args, grid, warmup, **options):
    given = dict(zip(kernel.arg_names, args))
    given |= {name: options.pop(name) for name in kernel.arg_names if name in options}
    fixed, numbers = [sorted(options.items())], {}
    for p in kernel.params:
        value = given[p.name]
        if isinstance(value, torch.Tensor):
            fixed.append((p.name, value.dtype, value.data_ptr() % 16))
        elif p.is_constexpr or value is None:
            fixed.append((p.name, value))
            if isinstance(value, bool):
                launched.add((kernel.fn.__module__, kernel.fn.__name__, p.name, value))
        elif isinstance(value, int) and not p.do_not_specialize:
            numbers[p.name] = 1 if value == 1 else "a multiple of 16" if value % 16 == 0 else "any"
    asked[kernel.fn.__module__, kernel.fn.__name__, str(fixed)].setdefault(str(numbers), numbers)

JITFunction.run = record
D, drop, leaf = 64, Drop(0.1, torch.tensor([3]), 1), lambda *shape, dtype=torch.bfloat16: torch.ones(*shape, dtype=dtype, requires_grad=True)

def op(name, reference=None):
    return kernels.choose(name, reference)

def both(y, *wanted):
    torch.autograd.grad(y, wanted, torch.ones_like(y))

def all_ops(T, lengths):
    x, gain, bias, a, b, deep = leaf(T, D), leaf(D), leaf(D), leaf(8, D), leaf(D, 8), leaf(T, 4 * D)
    for dropped in (drop, None):
        both(op("norm")(x, x, gain, bias, 1e-5, dropped), x, gain, bias)
        both(op("norm")(x, None, gain.detach(), bias.detach(), 1e-5, dropped), x)
    places = torch.zeros(T, dtype=torch.int64)
    both(op("embed")(places, places, leaf(50, D).detach(), leaf(512 if T % 16 else 40, D).detach(), gain, bias, 1e-5, drop), gain, bias)
    both(op("dropout")(x, *drop), x)
    shift = leaf(4 * D)
    both(op("gelu")(deep, shift), deep, shift)
    both(op("gelu")(deep), deep)
    weight = leaf(D, D).detach()
    for form, grads in (("epilogue", "twice"), ("epilogue", "once")):
        with dispatch.use("lora_linear", form), dispatch.use("lora_grads", grads):
            both(op("lora_linear")(x, weight, None, a, b, 2.0, *drop), x, a, b)
    wide, low = leaf(T, 128), leaf(8, 128)
    for n in (1, 2):
        pieces = [(128 * i, low, leaf(128, 8), 2.0) for i in range(n)]
        for form in ("twice", "once"):
            with dispatch.use("lora_grads", form):
                both(op("lora_written")(wide, leaf(128 * n, 128).detach(), None, pieces), low)
    up, down = leaf(4 * D, D), leaf(D, 4 * D)
    with dispatch.use("feed_forward", "fused"):
        both(op("feed_forward")(x, up, shift, down, bias), x, up, shift, down, bias)
    both(op("adapter")(x, x, leaf(48, D), leaf(48), leaf(D, 48), bias, "relu"), x, bias)
    scores = leaf(T, 97)
    both(op("mlm_loss")(scores, torch.zeros(T, dtype=torch.int64)), scores)
    spans, rows = Spans.of(lengths, lengths), sum(lengths)
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v, prefix = *(leaf(rows, 2, 64, dtype=dtype) for _ in "qkv"), (leaf(30, 2, 64), leaf(30, 2, 64))
        both(op("attention")(q, k, v, spans, prefix, drop), q, k, v, *prefix)
        both(op("attention")(q.detach(), k.detach(), v.detach(), spans, prefix, drop), *prefix)  # the lowest layer
        both(op("attention")(q, k, v, spans), q, k, v)

with kernels.use("triton"):
    for T, lengths in ((1, [70, 58]), (37, [300, 1]), (48, [440, 10]), (4100, [4321]), (25600, [6400])):
        all_ops(T, lengths)
many = {key: list(found.values()) for key, found in asked.items() if len(found) > 1}
assert not many, "\\n".join(f"{file}.{name}: {found}" for (file, name, _), found in many.items())
assert launched <= forms, launched - forms
print(*sorted({f"{file}.{name}" for file, name, _ in asked}))
"""
    ran = python("-c", code)
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.split()) >= 25, ran.stdout


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
