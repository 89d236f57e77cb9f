"""What `peftdebias doctor` says is what `kernels.choose` does."""

import importlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from peftdebias import doctor, kernels, native

from .small import cli, done

linear, scores = (importlib.import_module(f"peftdebias.ops.{name}") for name in ("linear", "scores"))


def test_every_op_is_listed_with_what_choose_would_take(monkeypatch):
    monkeypatch.setitem(kernels._registry, ("attention", "native"), len)
    for kind in ("auto", "torch", "native"):
        with kernels.use(kind):
            listed = {op: (implementation, why) for op, implementation, why in doctor.examine("cpu").ops}
            assert set(kernels.TRITON) | {"attention", "counterfactuals"} <= set(listed)
            for op in set(listed) - {"counterfactuals"}:
                implementation, why = listed[op]
                try:
                    expected = "torch" if kernels.choose(op, reference=print, device=torch.device("cpu")) is print else "native"
                except LookupError as error:
                    expected = "none"
                    assert str(error) == why
                assert implementation == expected and why
            assert listed["attention"][0] == ("torch" if kind == "torch" else "native")


def test_a_cuda_device_would_get_triton(monkeypatch):
    """The decision alone, on a machine without one; nothing is launched."""
    monkeypatch.setattr(kernels, "_load", lambda file: kernels._registry.update({(op, "triton"): print for op, f in kernels.TRITON.items() if f == file}))
    monkeypatch.setattr(kernels, "no_triton", lambda: "")
    before, cuda = dict(kernels._registry), torch.device("cuda")
    try:
        for op in kernels.TRITON:
            assert kernels.decide(op, cuda) == ("triton", "the fastest on cuda") and kernels.choose(op, reference=len, device=cuda) is print
        assert kernels.decide("another op", cuda) == ("torch", "no triton kernel for this op; plain torch does its work")
    finally:
        kernels._registry.clear()
        kernels._registry.update(before)


def test_rows_that_no_kernel_takes_are_left_to_the_twins(monkeypatch):
    monkeypatch.setattr(kernels, "missing", lambda op, kind, device="cuda": "")
    monkeypatch.setattr(kernels, "_registry", {(op, kind): kind for op in kernels.TRITON for kind in ("native", "triton")})
    for op, most in kernels.WIDEST.items():
        chosen = [kernels.choose(op, reference="twin", device="cuda", width=width) for width in (1, most, most + 1)]
        assert chosen == ["triton", "triton", "twin"] and kernels.choose(op, reference="twin", width=most + 1) == "native"
        assert kernels.decide(op, "cuda", True)[1] == f"the kernel takes at most {most} columns; plain torch does its work"
        with kernels.use("triton"):  # by name: it says itself what it cannot take
            assert kernels.choose(op, reference="twin", device="cuda", width=most + 1) == "triton"
    assert kernels.choose("gelu", reference="twin", device="cuda", width=10 ** 6) == "triton"


def test_without_triton_the_twins_do_the_work(monkeypatch):
    monkeypatch.setattr(kernels, "no_triton", lambda: "triton is not installed")
    assert kernels.decide("lora_linear", torch.device("cuda")) == ("torch", "triton is not installed; plain torch does its work")
    assert kernels.choose("lora_linear", reference=len, device=torch.device("cuda")) is len
    with kernels.use("triton"), pytest.raises(LookupError, match="lora_linear: triton is not installed; no triton implementation here"):
        kernels.choose("lora_linear", reference=len, device=torch.device("cuda"))


@pytest.fixture
def old_gpu(monkeypatch):
    """Says of a CUDA device, which is not here, what capability it has."""
    def set_to(*capability: int, hip: str | None = None):
        kernels._too_old.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
        monkeypatch.setattr(torch.version, "hip", hip)

    monkeypatch.setattr(kernels, "no_triton", lambda: "")
    yield set_to
    kernels._too_old.cache_clear()


def test_on_a_gpu_that_the_kernels_are_not_for_the_twins_do_the_work(old_gpu):
    cuda = torch.device("cuda:1")
    for capability, hip, why in (((7, 5), None, "the kernels need compute capability 8.0, cuda:1 has 7.5"),
                                 ((9, 4), "7.0", "the kernels are written for NVIDIA's GPUs, and this torch is for AMD's")):
        old_gpu(*capability, hip=hip)
        assert doctor._tried(cuda).endswith(f" is installed; {why}")
        assert kernels.decide("gelu", cuda) == ("torch", f"{why}; plain torch does its work")
        assert kernels.choose("gelu", reference=len, device=cuda) is len and kernels.missing("gelu", "triton", "cuda:1") == why
        with kernels.use("triton"), pytest.raises(kernels.NoKernel, match=f"gelu: {why}; no triton implementation here"):
            kernels.choose("gelu", reference=len, device=cuda)
    for capability in ((8, 0), (8, 6), (12, 0)):
        old_gpu(*capability)
        assert kernels.unsuited(1) == "" == kernels.unsuited(None)
    old_gpu(7, 0)
    assert kernels.unsuited(None).endswith("cuda:2 has 7.0")  # the device that "cuda" means now


def test_the_command():
    said = done("doctor", "--device", "cpu").out
    assert f"torch {torch.__version__}" in said and said.splitlines()[-1] == "result: above"
    row = next(line for line in said.splitlines() if line.startswith("lora_linear "))
    assert row.split()[1] == "torch"


@pytest.mark.parametrize("kind,product,first", [("auto", "blas", "turned: in blocks of 4096 tokens, as MKL on "), ("torch", "blas", "linear: kernels are torch"),
                                                ("auto", "onednn", "linear: its form is onednn")])
def test_a_cpu_says_how_it_multiplies(kind, product, first, monkeypatch):
    if product == "onednn" and not linear._there():
        pytest.skip("this torch carries no oneDNN")
    monkeypatch.setattr(scores, "_mkl_on_amd", lambda: True)
    monkeypatch.setenv("PEFTDEBIAS_LINEAR", product)
    with kernels.use(kind):
        said = cli("doctor", "--device", "cpu").out
    assert f"\nlinear        form {product}: asked for by name\nscores        form {first}" in said and "\nbf16          " in said and "without effect" not in said


def test_where_nothing_is_compiled_every_op_says_so():
    code = "from peftdebias import native; native.load = lambda: (None, 'it is gone'); from peftdebias.cli import main; main(['doctor', '--device', 'cpu'])"
    said = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=os.environ | {"PEFTDEBIAS_KERNELS": "auto"}, capture_output=True, text=True).stdout
    rows = {line.split()[0]: line for line in said[said.index("adamw"):said.index("result:")].splitlines()}
    assert "it is gone" in rows.pop("counterfactuals") and len(rows) > 10
    assert all(" torch " in row and "no compiled library here (the last line says why)" in row for row in rows.values())


def test_what_was_asked_for_by_name_is_why(monkeypatch):
    """And not that nothing else is there."""
    monkeypatch.setattr(native, "load", lambda: (None, "it is gone"))
    for kind, of_op, of_engine in (("auto", "no compiled library here (the last line says why); plain torch does its work", "it is gone"),
                                   ("torch", "asked for by name", "asked for by name")):
        monkeypatch.setenv("PEFTDEBIAS_KERNELS", kind)
        with kernels.use(kind):
            assert doctor._answer("a new op", torch.device("cpu")) == ("torch", of_op) and doctor._engine() == ("counterfactuals", "python", of_engine)


def test_a_form_asked_for_where_no_kernel_has_it_is_named(monkeypatch):
    monkeypatch.setenv("PEFTDEBIAS_ATTENTION", "fused")
    with kernels.use("torch"):
        said = cli("doctor", "--device", "cpu").out
    assert "\nattention     form fused asked for by name, without effect: only its Triton kernel has forms, and torch runs here\n" in said
    assert said.count("without effect") == 1


@pytest.mark.parametrize("device,environment,words", [
    ("gpu", {}, "peftdebias: --device: expected cpu, cuda, cuda:1, ... or auto, got 'gpu'"),
    ("cpu", {"PEFTDEBIAS_KERNELS": "fast"}, "peftdebias: PEFTDEBIAS_KERNELS: expected one of auto, torch, native, triton, got 'fast'"),
    ("cpu", {"PEFTDEBIAS_ATTENTION": "fast"}, "peftdebias: PEFTDEBIAS_ATTENTION: expected one of fused, padded, varlen for attention, got 'fast'"),
])
def test_errors(device, environment, words, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    got = cli("doctor", "--device", device)
    assert got.code == 2 and got.err.splitlines()[-1] == words


@pytest.mark.parametrize("kernel,words", [
    (lambda *given: (_ for _ in ()).throw(RuntimeError("lowering\nno compiler found\n")),
     "fails on cpu: RuntimeError: no compiler found (PEFTDEBIAS_KERNELS=torch goes without it)"),
    (lambda x, *given: x, "runs on cpu by its interpreter, and a kernel DIFFERS FROM its plain twin"),
])
def test_a_kernel_that_fails_or_differs_is_told(kernel, words, monkeypatch):
    monkeypatch.setattr(kernels, "interpreted", lambda: True)
    monkeypatch.setitem(sys.modules, "peftdebias.kernels.dropout", SimpleNamespace(dropout=kernel))
    assert doctor._tried(torch.device("cpu")) == words


def test_the_machine_is_described(monkeypatch):
    """A GPU that is not here; a package that is not there."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="NVIDIA X", major=9, minor=0, total_memory=139 * 2**30))
    assert doctor._machine(torch.device("cuda:1"))[1] == f"device        cuda:1: NVIDIA X, compute capability 9.0, 139 GiB, CUDA {torch.version.cuda}"
    assert doctor.installed("torch") and doctor.installed("peftdebias-no-such") is None
    monkeypatch.setattr(kernels, "no_triton", lambda: "is not installed")
    assert any(line.startswith("kernels ") and line.endswith("; Triton is not installed") for line in doctor.examine("cpu").facts)


@pytest.mark.skipif(kernels.no_triton() != "", reason="triton is not installed")
def test_a_kernel_is_run_where_triton_can():
    """In the interpreter, in a process of its own; the dispatcher's forms are shown where kernels are used."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PEFTDEBIAS_KERNELS": "triton", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-m", "peftdebias", "doctor", "--device", "cpu"], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "Triton runs on cpu by its interpreter, and a kernel gives the bits of its plain twin" in ran.stdout
    assert "lora_linear   form written without dropout: the default: not measured on cpu" in ran.stdout
    assert "lora_grads    form twice without dropout: the default: not measured on cpu" in ran.stdout
    assert "attention     form fused with dropout: the default: not measured on cpu" in ran.stdout
    assert "feed_forward  form library: the default: not measured on cpu" in ran.stdout


def test_importing_the_kernels_does_not_import_triton():
    """And nothing of peftdebias needs it: every module, in a process where it cannot be found."""
    code = ("import sys, importlib.abc\n"
            "class No(importlib.abc.MetaPathFinder):\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            "        if name.split('.')[0] == 'triton': raise ModuleNotFoundError(name)\n"
            "sys.meta_path.insert(0, No())\n"
            "import peftdebias.phases, peftdebias.evaluation, peftdebias.embedding, peftdebias.kernels, peftdebias.kernels.dispatch\n"
            "assert 'triton' not in sys.modules\n")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
