"""Wide products of a CPU in bf16: against float64 of what is rounded, which products are, and a training by them from the command line."""

import copy
import importlib
import json
import types

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch.nn import Parameter

import peftdebias
from peftdebias import kernels, patch, processor
from peftdebias.errors import ConfigError
from peftdebias.kernels import dispatch
from peftdebias.lowered import BF16_PRODUCTS, answering, rounded_beforehand
from peftdebias.ops import linear, openmp, scores
from peftdebias.ops.linear import LEAST_BF16, STEP, bf16_products, no_bf16, product, rounding_once
from peftdebias.training import Schedule, pick_precision, pick_step, train

from .outside import FEED_FORWARD, HIDDEN
from .small import cli, tree
from .steps import FULL, batch_for, made

MODULE = importlib.import_module("peftdebias.ops.linear")
ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
KINDS = [pytest.param("auto", marks=pytest.mark.skipif(not ONEDNN, reason="no bf16 by oneDNN here")), "torch"]


@pytest.fixture
def all_of_them(monkeypatch):
    """However small; where OpenMP gives fewer threads, or cannot be asked, none is in bf16."""
    if why := openmp.too_few():
        pytest.skip(why)
    monkeypatch.setattr(MODULE, "LEAST", 0.0)
    monkeypatch.setattr(MODULE, "LEAST_BF16", 1)


def tensors(rows: int, inside: int = 37, outside: int = 29) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return [torch.randn(shape, generator=generator) for shape in ((rows, inside), (outside, inside), (outside,), (rows, outside))]


def rounded(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().double()


def once_rounded(found: torch.Tensor, exact: torch.Tensor, added=0.0) -> None:
    """A product in float64, rounded to bf16 (half a unit in the eighth place; sums in float32), and what is added in float32."""
    assert found.dtype == torch.float32 and found.shape == exact.shape
    assert ((found.double() - added - exact).abs() <= 2.0 ** -8 * exact.abs() + 2e-5 * max(1.0, exact.abs().max())).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("rows", [16, 65, 257, 881])
def test_product_and_gradients(rows, biased, kind, all_of_them):
    x, weight, bias, dy = tensors(rows)
    given = [t.requires_grad_() for t in (x, weight, bias)[:2 + biased]]
    with kernels.use(kind), bf16_products():
        y = linear(*given)
        one = product(x.detach(), weight.detach(), bias.detach() if biased else None, bf16=True)
    with kernels.use(kind):
        y.backward(dy)  # as the forward, though nobody asks for it here
    once_rounded(y.detach(), rounded(x) @ rounded(weight).t(), bias.detach().double() if biased else 0)
    assert torch.equal(one, y.detach()) and not torch.equal(y, F.linear(*given))
    once_rounded(x.grad, rounded(dy) @ rounded(weight))
    rest = rows // STEP * STEP if kind == "auto" else rows  # rows behind, too few for a piece, are added in float32
    once_rounded(weight.grad, rounded(dy[:rest]).t() @ rounded(x[:rest]), rounded(dy[rest:]).t() @ rounded(x[rest:]))
    assert not biased or torch.equal(bias.grad, dy.sum(0))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_rounded(kind, all_of_them):
    x, weight, bias, _ = tensors(130)
    for trained, shapes in (((False, True, True), [x.shape]), ((True, False, False), [weight.shape])):
        kept = []
        given = [t.detach().requires_grad_(flag) for t, flag in zip((x, weight, bias), trained)]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), kernels.use(kind), bf16_products():
            linear(*given)
        assert [t.shape for t in kept] == shapes and all(t.dtype == torch.bfloat16 for t in kept)


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_matrix_is_rounded_once(kind, all_of_them):
    x, weight, bias, _ = tensors(32)
    weight = Parameter(weight, False)

    def kept(weight: torch.Tensor, x: torch.Tensor = x) -> torch.Tensor:
        found = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t), kernels.use(kind), bf16_products():
            y = linear(x.requires_grad_(), weight, bias[:len(weight)])
        once_rounded(y.detach(), rounded(x.detach()) @ rounded(weight.detach()).t(), bias[:len(weight)].double())
        return found[-1]

    def once(*weights: torch.Tensor, **more) -> bool:
        memory = [kept(weight, **more) for weight in weights]
        return len({each.untyped_storage().data_ptr() for each in memory}) == 1

    with rounding_once():
        assert once(weight, weight) and not once(weight, Parameter(weight.clone(), False))
        assert once(weight, weight[3:20], weight[20:], weight.view_as(weight)) and once(*[weight[:, 2:30]] * 2, x=x[:, 2:30].detach())
        assert not once(*[weight.clone()] * 2)  # no parameter: of a merge, say, another one in every pass
        before = kept(weight)
        weight.mul_(3)
        assert kept(weight).data_ptr() != before.data_ptr()
        before, weight.data = kept(weight), weight.data * 2  # what a merge puts in its place
        assert kept(weight).data_ptr() != before.data_ptr()
        assert not once(*[weight.requires_grad_()] * 2)
        with torch.inference_mode():
            unversioned = Parameter(weight.clone(), False)
        assert not once(*[unversioned] * 2)
        flat = torch.cat([x.flatten().detach(), weight.detach().flatten()])
        inside = Parameter(flat[x.numel():].view(weight.shape), False)  # as what was trained in one flat tensor
        assert once(inside, inside[5:])
        turned = Parameter(torch.empty(weight.shape[::-1]).t().copy_(weight), False)
        assert not once(*[turned] * 2)
    assert not once(*[weight.requires_grad_(False)] * 2)
    with rounding_once():
        with torch.inference_mode(), kernels.use(kind), bf16_products():  # a validation
            linear(x, weight, bias)
        assert once(weight, weight)


def test_scores_round_trained_matrices_once_too_and_keep_them_for_their_caller(all_of_them):
    x, weight, bias, _ = tensors(32)
    weight, kept = Parameter(weight), {}

    def answer(precision: str = BF16_PRODUCTS) -> torch.Tensor:
        with torch.no_grad(), kernels.use("torch"), answering(torch.device("cpu"), precision, kept):
            return linear(x, weight, bias)

    def expected() -> torch.Tensor:
        return F.linear(x.bfloat16(), weight.detach().bfloat16()).float() + bias

    assert torch.equal(answer(), expected())
    ((_, found, *_),) = kept.values()
    found.zero_()
    assert torch.equal(answer(), bias.expand(32, -1))  # by the one that is kept
    with torch.no_grad():
        weight.add_(1)
    assert torch.equal(answer(), expected()) and torch.equal(answer("float32"), F.linear(x, weight, bias))
    weight.grad = torch.ones_like(weight)
    before = weight._version
    torch.optim.SGD([weight], lr=1e-2, fused=True).step()
    assert weight._version == before and torch.equal(answer(), expected())  # a step that counts no writes


def test_what_a_training_rounds_beforehand():
    """With bf16 matrices, which a CPU's kernels would not take, or matrices that its products round; in float32 nothing."""
    model = made("lora").model
    for precision, lowers, keeps in (("float32", False, False), (BF16_PRODUCTS, False, True), ("bf16", True, False)):
        with rounded_beforehand(model, precision):
            assert any(p.dtype == torch.bfloat16 for p in model.parameters()) == lowers and (MODULE._KEPT.get() is not None) == keeps
        assert all(p.dtype == torch.float32 for p in model.parameters()) and MODULE._KEPT.get() is None


def in_float32(*given) -> bool:
    return torch.equal(linear(*given), F.linear(*given))


def test_thin_and_small_products_and_other_tensors_stay_as_they_are(monkeypatch):
    rows = -(-MODULE.LEAST // (2 * LEAST_BF16 ** 2))
    x, weight, bias, _ = tensors(int(rows), LEAST_BF16, LEAST_BF16)
    monkeypatch.setattr(openmp, "too_few", lambda: "")
    with dispatch.use("linear", "blas"), kernels.use("torch"), bf16_products():
        assert not in_float32(x, weight, bias)
        assert in_float32(x[:-1], weight, bias) and in_float32(torch.cat([x, x]), weight[1:], bias[1:]) and in_float32(torch.cat([x, x])[:, 1:], weight[:, 1:], bias)
        assert in_float32(x.double(), weight.double(), bias.double()) and in_float32(x.view(2, -1, LEAST_BF16), weight, bias)
        assert torch.equal(torch.compile(lambda *given: linear(*given), backend="eager", fullgraph=True)(x, weight, bias), F.linear(x, weight, bias))
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x, weight, bias).dtype == torch.bfloat16
        monkeypatch.setattr(MODULE, "LEAST", 0.0)
        assert not in_float32(x[:16], weight, bias) and in_float32(x[:15], weight, bias)
        monkeypatch.setattr(openmp, "too_few", lambda: "OpenMP may give fewer threads")
        assert in_float32(x, weight, bias)
    monkeypatch.undo()
    with dispatch.use("linear", "blas"):
        assert in_float32(x, weight, bias)


def test_a_vocabulary_is_not_turned_round(monkeypatch, all_of_them):
    """Where MKL on a processor of AMD would be given blocks of it."""
    room = importlib.import_module("peftdebias.ops.scores")
    monkeypatch.setattr(room, "_turns", lambda *given: True)
    x, weight, bias, _ = tensors(20)
    assert torch.equal(scores(x, weight, bias), room.turned(x, weight, bias))
    with kernels.use("torch"), bf16_products():
        once_rounded(scores(x, weight, bias), rounded(x) @ rounded(weight).t(), bias.double())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["lora", "adapter", "prefix", None])
def test_a_step_is_the_float32_step_with_its_products_rounded(name, kind, all_of_them):
    found = []
    for precision in ("float32", BF16_PRODUCTS):
        step = made(name, precision=precision)
        torch.manual_seed(3)
        with kernels.use(kind):
            loss = step.gradients(batch_for(name))
        assert all(p.dtype == torch.float32 for p in step.model.parameters())
        found.append((float(loss), torch.cat([p.grad.flatten() for p in step.parameters if p.grad is not None])))
        assert found[-1][1].dtype == torch.float32
    assert found[1][0] == pytest.approx(found[0][0], rel=2e-2) and found[1][0] != found[0][0]
    assert F.cosine_similarity(found[0][1], found[1][1], 0) > 0.98


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["lora", "adapter", None])
def test_layers_computed_again_are_the_same_bits(name, kind, all_of_them):
    """In the backward, where nobody asks for bf16 any more."""
    found = []
    for again in (False, True):
        step = made(name, precision=BF16_PRODUCTS)
        torch.manual_seed(3)
        with kernels.use(kind), step.model.recomputing(again), rounding_once():
            loss = step.gradients(batch_for(name))
        found.append([loss, *(p.grad for p in step.parameters if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 1 and all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.skipif(not ONEDNN, reason="no bf16 by oneDNN here")
def test_all_of_a_base_is_multiplied_so_and_of_a_module_nothing(all_of_them, monkeypatch):
    """LoRA's own products go beside those of its linears, which are whole where nothing is dropped, else each by itself; forward and backward."""
    monkeypatch.setattr(MODULE, "LEAST_BF16", 8)
    products, call = [], MODULE._call
    monkeypatch.setattr(MODULE, "_call", lambda x, weight, bias: products.append((x.dtype, tuple(weight.shape))) or call(x, weight, bias))
    for rate, linears in ((0.0, {(3 * HIDDEN, HIDDEN), (HIDDEN, 3 * HIDDEN)}), (0.1, {(HIDDEN, HIDDEN)})):
        step = made("lora", precision=BF16_PRODUCTS, options={"dropout": rate})
        with dispatch.use("linear", "onednn"):
            step.gradients(batch_for("lora", lengths=FULL))
        assert linears | {(HIDDEN, FEED_FORWARD), (FEED_FORWARD, HIDDEN)} <= {shape for dtype, shape in products if dtype == torch.bfloat16}
        assert all((dtype == torch.bfloat16) == (min(shape) >= 8) for dtype, shape in products)
        products.clear()


# ---------------------------------------------------------------- asked for by a user

def test_a_processor_that_does_not_multiply_it(small, tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(openmp, "too_few", lambda: "")
    for there in ("_there", "_multiplies_bf16"):
        monkeypatch.setattr(MODULE, there, lambda: True)
    for flags, expected in (("avx512f avx512_bf16", BF16_PRODUCTS), ("amx_tile amx_bf16", BF16_PRODUCTS), ("avx2 fma avx512f amx_tile", None), ("", None)):
        monkeypatch.setattr(MODULE, "described", lambda: {"flags": flags})
        if expected:
            assert no_bf16() == "" and pick_precision("bf16", cpu) == expected and pick_precision("auto", cpu) == "float32"
            continue
        with pytest.raises(ConfigError, match="^--precision bf16: expected a GPU, or a CPU that multiplies it, got cpu: a processor without AVX-512 BF16 and AMX; use float32$"):
            pick_precision("bf16", cpu)
    said = cli("upstream", *small.learning(out=tmp_path / "run", device="cpu", precision="bf16"))
    assert said.code == 2 and said.err.splitlines()[-1].startswith("peftdebias: --precision bf16: expected a GPU, or a CPU that multiplies it, got cpu: ") and tree(tmp_path) == {}
    assert "\nbf16          refused: a processor without AVX-512 BF16 and AMX\n" in cli("doctor", "--device", "cpu").out
    monkeypatch.setattr(MODULE, "described", lambda: {"flags": "avx512_bf16"})
    monkeypatch.setattr(openmp, "too_few", lambda: "OpenMP may give fewer threads than asked for (OMP_DYNAMIC)")
    with pytest.raises(ConfigError, match=r"got cpu: OpenMP may give fewer threads than asked for \(OMP_DYNAMIC\); use float32$"):
        pick_precision("bf16", cpu)
    monkeypatch.setattr(MODULE, "_multiplies_bf16", lambda: False)
    with pytest.raises(ConfigError, match=r"got cpu: oneDNN is told to do without \(ONEDNN_MAX_CPU_ISA\); use float32$"):
        pick_precision("bf16", cpu)
    monkeypatch.setattr(MODULE, "_there", lambda: False)
    with pytest.raises(ConfigError, match="got cpu: this torch carries no oneDNN"):
        pick_precision("bf16", cpu)
    with pytest.raises(ConfigError, match="--step compiled: expected --precision float32 on a CPU, got bf16"):
        pick_step("compiled", cpu, BF16_PRODUCTS)
    assert pick_step("eager", cpu, BF16_PRODUCTS) == pick_step("auto", cpu, BF16_PRODUCTS) == "eager"


@pytest.mark.parametrize("changes,words", [({"precision": "fp16"}, "precision: expected float32, bf16 or bf16 products, got 'fp16'"),
                                           ({"step": "compiled"}, "precision bf16 products: expected a CPU and an eager step, got cpu and compiled"),
                                           ({"device": "cuda"}, "precision bf16 products: expected a CPU and an eager step, got cuda and eager")])
def test_a_training_in_python_is_told_what_it_would_not_get(changes, words):
    changes = dict(changes)
    device = torch.device(changes.pop("device", "cpu"))
    with pytest.raises(ConfigError, match=f"^{words}$"):
        train(types.SimpleNamespace(device=device), None, {}, Schedule(**{"steps": 1, "lr": 1.0, "precision": BF16_PRODUCTS} | changes))


@pytest.mark.skipif(not ONEDNN, reason="no bf16 by oneDNN here")
def test_both_phases_from_the_command_line(small, tmp_path, all_of_them, monkeypatch):
    monkeypatch.setattr(MODULE, "described", lambda: processor.described() | {"flags": "avx512_bf16"})
    losses = {}
    for precision in ("float32", "bf16"):
        runs = {phase: tmp_path / f"{phase}-{precision}" for phase in ("up", "down")}
        said = cli("upstream", *small.learning(out=runs["up"], device="cpu", precision=precision))
        assert said.code == 0 and f"device: cpu, {'bf16 products' if precision == 'bf16' else precision}\n" in said.err
        assert cli("downstream", *small.task(out=runs["down"], adapter=runs["up"], epochs=1, device="cpu", precision=precision)).code == 0
        for phase, run in runs.items():
            assert json.loads((run / "versions.json").read_text())["precision"] == ("bf16 products" if precision == "bf16" else "float32")
            events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            losses[phase, precision] = [event["loss"] for event in events if event["event"] == "step"]
    for phase in ("up", "down"):
        assert losses[phase, "bf16"] == pytest.approx(losses[phase, "float32"], rel=2e-2) and losses[phase, "bf16"] != losses[phase, "float32"]
    said = cli("upstream", *small.learning(out=tmp_path / "no", device="cpu", precision="bf16", step="compiled"))
    assert said.code == 2 and said.err.splitlines()[-1].startswith("peftdebias: --step compiled: expected --precision float32 on a CPU") and not (tmp_path / "no").exists()


@pytest.mark.skipif(not ONEDNN, reason="no bf16 by oneDNN here")
def test_answers_by_them(small, tmp_path, all_of_them, monkeypatch):
    monkeypatch.setattr(MODULE, "described", lambda: processor.described() | {"flags": "avx512_bf16"})
    run, texts = tmp_path / "run", ["She is a nurse.", "The doctor said that he is here.", "Nurse."]
    assert cli("upstream", *small.learning(out=tmp_path / "up", device="cpu")).code == 0
    assert cli("downstream", *small.task(out=run, adapter=tmp_path / "up", epochs=1, device="cpu")).code == 0
    (tmp_path / "texts.txt").write_text("\n".join(texts))

    def probabilities(rows: list[dict]) -> list[list[float]]:
        return [list(row["probabilities"].values()) for row in rows]

    def said(*options: str) -> list[list[float]]:
        assert (found := cli("predict", run, tmp_path / "texts.txt", "--device", "cpu", *options)).code == 0
        return probabilities([json.loads(line) for line in found.out.splitlines()])

    exact, models = said(), {precision: peftdebias.load(run, precision=precision) for precision in ("float32", "bf16")}
    assert said("--precision", "float32") == exact
    merged = {precision: peftdebias.load(run, precision=precision) for precision in models}
    for precision, answers in merged.items():
        patch.merge(answers.run.model)  # as the command does
        assert numpy.allclose(probabilities(answers.predict(texts)), said("--precision", precision), atol=1e-6)  # written with six digits
    near, model = said("--precision", "bf16"), models["bf16"]
    assert near != exact and numpy.allclose(near, exact, atol=2e-2)
    filled = [peftdebias.load(tmp_path / "up", precision=precision).fill_mask("[MASK] is a nurse " * 5, top=1)[0][0]["probability"] for precision in models]
    assert filled[0] != filled[1] and filled[0] == pytest.approx(filled[1], abs=2e-2)
    vectors = [m.encode(texts, "mean") for m in models.values()]
    assert not models["float32"]._own.rounded and len(model._own.rounded) > 1
    assert all(v.dtype == torch.float32 for v in vectors) and not torch.equal(*vectors) and torch.allclose(*vectors, atol=5e-2)
    merged = merged["bf16"]
    on = merged.encode(texts)
    with model.without("gender"), merged.without("gender"):
        assert torch.equal(merged.encode(texts), model.encode(texts)) and not torch.equal(merged.encode(texts), on)
    assert torch.equal(merged.encode(texts), on) and torch.allclose(on, model.encode(texts), atol=5e-2)
    assert torch.equal(copy.deepcopy(merged).encode(texts), on)
    ids = model.run.tokenizer.encode(texts[:1])[0].ids
    exported = torch.export.load(model.export(tmp_path / "run.pt2", "encode")).module()(torch.tensor(ids[None]), torch.ones(1, len(ids), dtype=torch.int64))
    assert torch.allclose(exported, models["float32"].encode(texts[:1]), atol=1e-5)  # float32 as well
    with pytest.raises(ConfigError, match="^load: precision: expected one of float32, bf16, got 'fp16'$"):
        peftdebias.load(run, precision="fp16")
    monkeypatch.setattr(MODULE, "described", lambda: {"flags": ""})
    with pytest.raises(ConfigError, match="^--precision bf16: expected a GPU, or a CPU that multiplies it, got cpu: a processor without"):
        peftdebias.load(run, precision="bf16")
    refused = cli("predict", run, tmp_path / "texts.txt", "--device", "cpu", "--precision", "bf16", "--out", tmp_path / "out.jsonl")
    assert refused.code == 2 and "\npeftdebias: --precision bf16: expected a GPU" in refused.err and not (tmp_path / "out.jsonl").exists()
