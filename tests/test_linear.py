"""A product in pieces by oneDNN against the plain one in float64: outputs, every gradient, and when it is not taken."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from peftdebias import doctor, kernels
from peftdebias.kernels import dispatch
from peftdebias.ops import linear, openmp
from peftdebias.ops.linear import FEW, NARROW, PIECE, STEP, WIDE, _onednn_outer, _taken, form, pieces, product

from .test_lora import ragged_batch, tiny_model

MODULE = importlib.import_module("peftdebias.ops.linear")
ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available()
pytestmark = pytest.mark.skipif(not ONEDNN, reason="this torch carries no oneDNN")

ROWS = (16, 17, 63, 64, 65, 130, 256, 257, 320, 511, 512, 513, 881, 1100)


@pytest.fixture(autouse=True)
def everything_by_onednn(monkeypatch):
    monkeypatch.setattr(MODULE, "LEAST", 0.0)
    with dispatch.use("linear", "onednn"):
        yield


def tensors(rows: int, inside: int, outside: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return [torch.randn(shape, generator=generator) for shape in ((rows, inside), (outside, inside), (outside,), (rows, outside))]


def close(found: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor) -> None:
    """No further from float64 than three times as far as torch's own product, and by no more than 2e-6 of the largest value."""
    mine, theirs = ((x.double() - exact).pow(2).mean().sqrt() for x in (found, plain))
    assert found.shape == exact.shape and found.dtype == torch.float32 and mine <= 3 * theirs + 1e-9
    assert (found.double() - exact).abs().max() <= 2e-6 * max(1.0, exact.abs().max()), (found.double() - exact).abs().max()


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("rows", ROWS)
def test_product_and_gradients(rows, biased):
    x, weight, bias, dy = tensors(rows, 37, 29)
    found = []
    for function, kind in ((linear, torch.float32), (F.linear, torch.float64), (F.linear, torch.float32)):
        given = [t.to(kind, copy=True).requires_grad_() for t in (x, weight, bias)[:2 + biased]]
        y = function(*given)
        y.backward(dy.to(kind))
        found.append([y.detach(), *(t.grad for t in given)])
    for mine, exact, plain in zip(*found):
        close(mine, exact, plain)


@pytest.mark.parametrize("rows", [130, 700])
def test_as_wide_as_a_vocabulary(rows):
    x, weight, bias, dy = tensors(rows, 13, WIDE + 7)
    close(product(x, weight, bias), F.linear(x.double(), weight.double(), bias.double()), F.linear(x, weight, bias))
    close(product(dy, weight.t()), dy.double() @ weight.double(), dy @ weight)


def test_rows_that_are_parts_of_wider_ones_or_the_same_one_again():
    x, weight, bias, _ = tensors(130, 3 * 40, 29)
    weight = weight[:, :40].contiguous()
    for part in (x[:, 40:80], x[:1, :40].expand(130, 40), x[:, :40].t().contiguous().t()):
        close(product(part, weight, bias), F.linear(part.double(), weight.double(), bias.double()), F.linear(part, weight, bias))
        other = x[:, 80:]
        close(_onednn_outer(part, other), part.double().t() @ other.double(), part.t() @ other)


def test_what_is_behind_the_last_row_does_not_come_in():
    x, weight, bias, _ = tensors(140, 37, 29)
    x[130:] = float("nan")
    assert product(x[:130], weight, bias).isfinite().all() and _onednn_outer(x[:130], x[:130]).isfinite().all()


def test_pieces_cover_every_row_and_are_of_few_sizes():
    for rows in range(FEW + 1, 3 * PIECE + 200):
        parts = pieces(rows)
        starts, ends = [start for start, _ in parts], [start + size for start, size in parts]
        assert starts[0] == 0 and ends[-1] == rows and all(a <= b for a, b in zip(starts[1:], ends)), rows
        assert all(size in range(STEP, PIECE + 1, STEP) for _, size in parts) and sum(size for _, size in parts) < rows + STEP, rows


def test_what_is_saved_is_what_the_gradients_need():
    x, weight, bias, _ = tensors(130, 37, 29)
    for trained, saved in (((False, True, True), {x.data_ptr()}), ((True, False, False), {weight.data_ptr()}), ((True, True, False), {x.data_ptr(), weight.data_ptr()})):
        kept = []
        given = [t.detach().requires_grad_(flag) for t, flag in zip((x, weight, bias), trained)]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
            linear(*given)
        assert set(kept) == saved


def refused(*given) -> bool:
    """Whether the plain product does the work: its bits."""
    return torch.equal(linear(*given), F.linear(*given))


def test_everything_else_is_the_plain_product(monkeypatch):
    x, weight, bias, _ = tensors(130, 37, 29)
    calls = []
    monkeypatch.setattr(MODULE, "_call", lambda *given: calls.append(given) or torch.ops.mkldnn._linear_pointwise(*given, "none", [], ""))
    linear(x, weight, bias)
    assert calls and not calls.clear()
    assert refused(x.double(), weight.double(), bias.double()) and refused(x.bfloat16(), weight.bfloat16(), bias.bfloat16())
    assert refused(x.view(2, 65, 37), weight, bias) and refused(x[:15], weight, bias)
    for context in (torch.autocast("cpu", torch.bfloat16), kernels.use("torch"), dispatch.use("linear", "blas")):
        with context:
            assert refused(x, weight, bias)
    assert torch.equal(torch.compile(lambda *given: linear(*given), backend="eager", fullgraph=True)(x, weight, bias), F.linear(x, weight, bias))
    monkeypatch.setattr(MODULE, "LEAST", 1e7)
    assert refused(x, weight, bias) and not calls


def test_a_whole_model_by_both(monkeypatch):
    model, batch, calls, call = tiny_model().float(), ragged_batch(), [], MODULE._call
    monkeypatch.setattr(MODULE, "_call", lambda *given: calls.append(1) or call(*given))
    with torch.no_grad():
        one = model.mlm_logits(batch)
        assert calls and not calls.clear()
        with dispatch.use("linear", "blas"):
            other = model.mlm_logits(batch)
    assert not calls and one.shape == other.shape and (one - other).abs().max() <= 2e-6 * max(1.0, other.abs().max())


def test_doctor_says_which_and_why(monkeypatch):
    assert form() == ("onednn", "asked for by name")
    assert any("linear" in line and "onednn: asked for by name" in line for line in doctor.examine("cpu").facts)
    monkeypatch.setattr(MODULE, "_there", lambda: False)
    MODULE._faster.cache_clear()
    assert form() == ("blas", "this torch carries no oneDNN for this processor")
    MODULE._faster.cache_clear()


@pytest.mark.parametrize("level,maker,expected", [("AVX512", "AuthenticAMD", "onednn"), ("AVX512", "GenuineIntel", "blas"), ("AVX2", "AuthenticAMD", "blas")])
def test_by_the_processor(level, maker, expected, monkeypatch):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: level)
    monkeypatch.setattr(MODULE, "vendor", lambda: maker)
    monkeypatch.setattr("torch.backends.mkl.is_available", lambda: True)
    MODULE._faster.cache_clear()
    assert MODULE._faster()[0] == expected and maker in MODULE._faster()[1]
    MODULE._faster.cache_clear()


@pytest.mark.parametrize("maker,family,narrow", [("AuthenticAMD", 25, False), ("AuthenticAMD", 26, True), ("HygonGenuine", 25, True)])
def test_where_avx512_is_no_faster_a_narrow_weight_is_the_blas(maker, family, narrow, monkeypatch):
    """Of AMD's family 25; by name all are asked for."""
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr("torch.backends.mkl.is_available", lambda: True)
    monkeypatch.setattr(MODULE, "vendor", lambda: maker)
    monkeypatch.setattr(MODULE, "family", lambda: family)
    monkeypatch.setattr(MODULE, "LEAST", 0)
    x = torch.ones(16, NARROW)
    with dispatch.use("linear", "onednn"):
        assert _taken(x, torch.ones(8, NARROW), None)
    monkeypatch.setattr(dispatch, "asked", lambda op: None)
    MODULE._faster.cache_clear()
    taken = [_taken(x[:, :inner], torch.ones(outer, inner), None) for outer, inner in ((NARROW, NARROW), (NARROW - 1, NARROW), (NARROW, NARROW - 1), (WIDE, 8), (WIDE - 1, 8))]
    assert taken == [True, narrow, narrow, True, narrow] and ("fewer than 512" in form()[1]) == (not narrow)
    MODULE._faster.cache_clear()


# ---------------------------------------------------------------- fewer threads than asked for

def test_where_openmp_may_give_fewer_threads_it_is_the_blas():
    """oneDNN would leave a part of its product undone, and say nothing. What a program asks of OpenMP is seen at once."""
    runtimes = openmp._runtimes()
    assert runtimes and openmp.too_few() == "" and form()[0] == "onednn"
    levels = [runtime.omp_get_max_active_levels() for runtime in runtimes]
    try:
        for runtime in runtimes:
            runtime.omp_set_dynamic(1)
        assert form() == ("blas", "OpenMP may give fewer threads than asked for (OMP_DYNAMIC), and oneDNN would leave a part of its product undone")
        for runtime in runtimes:
            runtime.omp_set_dynamic(0)
            runtime.omp_set_max_active_levels(0)
        assert form()[1].startswith("OpenMP gives one thread alone")
    finally:
        for runtime, most in zip(runtimes, levels):
            runtime.omp_set_dynamic(0)
            runtime.omp_set_max_active_levels(most)
    assert form()[0] == "onednn"


PRODUCT = """
import torch
from peftdebias.ops import linear
from peftdebias.ops.linear import form
x, weight = (torch.randn(n, 256, generator=torch.Generator().manual_seed(n)) for n in (700, 512))
assert (linear(x, weight).double() - x.double() @ weight.double().t()).abs().max() < 1e-3
print(torch.get_num_threads(), *form())
"""


@pytest.mark.parametrize("variable", ["OMP_THREAD_LIMIT=1", "OMP_DYNAMIC=TRUE", "OMP_MAX_ACTIVE_LEVELS=0"])
def test_products_are_whole_where_fewer_threads_work(variable):
    name, _, value = variable.partition("=")
    ran = subprocess.run([sys.executable, "-c", PRODUCT], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "2", "PEFTDEBIAS_LINEAR": "onednn", name: value})
    assert ran.returncode == 0 and ran.stdout.startswith("2 blas OpenMP ") and f"({name})" in ran.stdout, ran
