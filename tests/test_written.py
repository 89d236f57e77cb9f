"""Weights written once a pass: the same map and the same gradients as the unmerged product, for the linears where that can be said."""

import pytest
import torch
import torch.nn.functional as F

from peftdebias import encoder, kernels, methods, patch
from peftdebias import written as written_file
from peftdebias.kernels import dispatch
from peftdebias.methods.lora import lora_linear_ref
from peftdebias.ops import compiled
from peftdebias.written import lora_apart, lora_apart_ref, lora_write_ref, lora_written_ref

from .kernel_checks.harness import compare_steps
from .test_lora import TINY, ragged_batch, tiny_model, trained_lora


def test_the_written_product_is_the_unmerged_one():
    """Query and value of a weight of three: outputs, and the gradients of x, bias, A and B."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, qa, qb, va, vb = (torch.randn(*s, dtype=torch.float64, generator=generator, requires_grad=True)
                                       for s in ((11, 7), (15, 7), (15,), (2, 7), (5, 2), (3, 7), (5, 3)))
    pieces = [(0, qa, qb, 0.6), (10, va, vb, 1.7)]
    (written,) = lora_write_ref([weight.detach()], [(0, *p) for p in pieces], torch.float64)
    torch.testing.assert_close(written[10:], weight[10:] + 1.7 * vb @ va, rtol=1e-13, atol=1e-13)
    assert torch.equal(written[5:10], weight[5:10])
    found = lora_written_ref(x, written, bias, pieces)
    parts = zip(weight.split(5), bias.split(5), (pieces[0], None, pieces[1]))
    expected = torch.cat([F.linear(x, w, b) if p is None else lora_linear_ref(x, w, b, *p[1:]) for w, b, p in parts], -1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    pull, wanted = torch.randn(11, 15, dtype=torch.float64, generator=generator), (x, bias, qa, qb, va, vb)
    for ours, theirs in zip(torch.autograd.grad(found, wanted, pull), torch.autograd.grad(expected, wanted, pull), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert torch.autograd.grad(lora_written_ref(x, written.requires_grad_(), bias, pieces).sum(), written, allow_unused=True) == (None,)


@pytest.fixture
def written(monkeypatch):
    """Puts the plain twins in the kernels' place, where the encoder takes them for kernels; says how often each was called, and on how many matrices."""
    calls, choose = [], kernels.choose
    twins = {"lora_write": (lambda weights, *rest: calls.append(("write", len(weights))) or lora_write_ref(weights, *rest)),
             "lora_written": (lambda x, *rest: calls.append(("product", len(x))) or lora_written_ref(x, *rest))}
    monkeypatch.setattr(kernels, "choose", lambda op, reference, device=None: twins.get(op) or choose(op, reference, device))
    monkeypatch.setattr("peftdebias.written.UNWRITTEN", ())
    with kernels.use("torch"):  # or the pieces would stay apart, on a CPU
        yield calls


@pytest.mark.parametrize("targets,matrices,products", [
    (("query", "value"), 3, 4),  # one a layer, two in the last: the query of the rows asked for, keys and values of all
    (("key",), 3, 3), (("output", "up", "down"), 9, 9), (("query", "key", "value", "output", "up", "down"), 12, 13)])
def test_an_encoder_with_written_weights(written, targets, matrices, products):
    """Outputs and gradients equal those of the unmerged path; one call writes all matrices."""
    batch, models = ragged_batch(), [tiny_model(), tiny_model()]
    both = [trained_lora(model, targets=targets, rank=2) for model in models]
    losses = []
    for model, method, unmerged in zip(models, both, (False, True)):
        patch.train_only(model, method.parameters().values())
        with kernels.use("torch"):
            if unmerged:
                model.encoder.hooks.methods["gender"].low_rank = lambda site: None
            losses.append(F.cross_entropy(model.mlm_logits(batch), batch.targets))
            losses[-1].backward()
    torch.testing.assert_close(*losses, rtol=1e-11, atol=1e-11)
    for name, p in both[0].parameters().items():
        torch.testing.assert_close(p.grad, both[1].parameters()[name].grad, rtol=1e-10, atol=1e-12)
    assert [c for c in written if c[0] == "write"] == [("write", matrices)] and len([c for c in written if c[0] == "product"]) == products
    assert not models[0].encoder.written


def test_what_cannot_be_written_is_left_to_the_hooks(written):
    """Dropout, a second method, a trained base, a method of the bias; each with the outputs it has without written weights."""
    batch = ragged_batch()

    def touched(prepare) -> list:
        model = tiny_model()
        prepare(model)
        written.clear()
        torch.manual_seed(0)
        with torch.no_grad():  # or the base's own gradients keep everything from being written
            model.encoder(batch)
        return written.copy()

    def dropping(model):
        patch.train_only(model, trained_lora(model, dropout=0.4).parameters().values())
        model.train()

    def two(model):
        trained_lora(model), trained_lora(model, "race", targets=("query", "key"))

    def bias(model):
        trained_lora(model, targets=("value",)), patch.attach(model, "race", methods.create("bias", TINY))

    assert touched(dropping) == [] == touched(two) == touched(bias)
    model = tiny_model()
    trained_lora(model)
    patch.train_only(model, model.encoder.parameters())
    written.clear()
    model.encoder(batch)
    assert not written
    with torch.no_grad():
        model.encoder(batch)
    assert written  # nobody asks for W's gradient


def test_without_and_merged_leave_nothing_to_write(written):
    model, batch = tiny_model(), ragged_batch()
    trained_lora(model)
    with model.without("gender"):
        model.encoder(batch)
    patch.merge(model)
    model.encoder(batch)
    assert not written


def test_what_a_pass_that_failed_left_is_gone_when_the_next_one_writes(written, monkeypatch):
    """Both would have to find room, and a pass often fails for want of it."""
    model, batch = tiny_model().requires_grad_(False), ragged_batch()
    trained_lora(model)
    kept, there = encoder.write, []
    monkeypatch.setattr(encoder, "write", lambda *args: there.append(dict(model.encoder.written)) or kept(*args))
    with monkeypatch.context() as failing, pytest.raises(MemoryError):
        failing.setattr(encoder.Encoder, "_layer", lambda *args: (_ for _ in ()).throw(MemoryError()))
        model.encoder(batch)
    assert model.encoder.written
    model.encoder(batch)
    assert there == [{}, {}] and model.encoder.written == {}


def test_whether_it_pays_is_asked_of_the_first_pieces_sizes(monkeypatch):
    asked = {}
    monkeypatch.setattr(dispatch, "pick", lambda op, forms, **sizes: asked.update(sizes) or "written")
    linear, x = torch.nn.Linear(7, 15), torch.zeros(11, 7)
    assert written_file._pays(linear, [(0, torch.zeros(2, 7), torch.zeros(5, 2), 0.6), (10, torch.zeros(3, 7), torch.zeros(5, 3), 1.7)], torch.bfloat16, x)
    assert asked == {"device": x.device, "dtype": torch.bfloat16, "dropout": False, "rows": 11, "inside": 7, "outside": 5, "rank": 2}


# ---------------------------------------------------------------- apart, on a CPU

native = pytest.mark.skipif(not compiled.FUNCTIONS, reason="no compiled ops")


def apart_inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (11, 7), "weight": (15, 7), "bias": (15,), "qa": (2, 7), "qb": (5, 2), "va": (3, 7), "vb": (5, 3)}
    return {name: torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for name, shape in shapes.items()}


def apart(op, x, weight, bias, qa, qb, va, vb):
    return op(x, weight, bias, [(0, qa, qb, 0.6), (10, va, vb, 1.7)])


def test_the_pieces_apart_are_the_written_product():
    given = apart_inputs()
    (written,) = lora_write_ref([given["weight"]], [(0, 0, given["qa"], given["qb"], 0.6), (0, 10, given["va"], given["vb"], 1.7)], torch.float64)
    torch.testing.assert_close(apart(lora_apart_ref, **given), F.linear(given["x"], written, given["bias"]), rtol=1e-12, atol=1e-12)


@native
@pytest.mark.parametrize("wanted", [["x", "bias", "qa", "qb", "va", "vb"], ["qa", "vb"], ["x"], ["bias"], ["qa"], ["vb"]], ids=" ".join)
def test_the_product_with_pieces_apart(wanted):
    """The output and the gradients asked for, against the twin in float64; W has none here, and one that is trained is the twin's."""
    found, expected = {}, {}
    for op, dtype, into in ((lora_apart, torch.float32, found), (lora_apart_ref, torch.float64, expected)):
        given = {name: t.requires_grad_(name in wanted) for name, t in apart_inputs(dtype).items()}
        y = apart(op, **given)
        into |= {"y": y} | dict(zip(wanted, torch.autograd.grad(y, [given[name] for name in wanted], apart_inputs(dtype)["x"].new_ones(15).cumsum(0).expand(11, 15) / 7)))
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=2e-6, atol=2e-6, msg=lambda text: f"{name}: {text}")
    given = {name: t.requires_grad_() for name, t in apart_inputs(torch.float32).items()}
    assert apart(lora_apart, **given).grad_fn.name() != "_ApartBackward"


@native
def test_under_autocast_the_product_with_pieces_apart_is_the_twins():
    given = {name: t.requires_grad_(name != "weight") for name, t in apart_inputs(torch.float32).items()}
    with torch.autocast("cpu"):
        found, expected = apart(lora_apart, **given), apart(lora_apart_ref, **given)
    assert torch.equal(found, expected) and found.dtype == expected.dtype and found.grad_fn.name() == expected.grad_fn.name()


@native
def test_forced_native_takes_the_pieces_apart():
    model, batch = tiny_model(), ragged_batch()
    method = trained_lora(model)
    model.float()
    for p in method.parameters().values():
        p.data = p.data.float()
    patch.train_only(model, method.parameters().values())
    with kernels.use("torch"):
        expected = model.mlm_logits(batch)
    with kernels.use("native"):
        torch.testing.assert_close(model.mlm_logits(batch), expected, rtol=1e-4, atol=1e-4)


@native
def test_what_the_product_with_pieces_apart_saves():
    """x and the thin product where A or B is trained; nothing of the tokens' size where they are frozen."""
    for trained, sizes in ((True, {(11, 7), (11, 5)}), (False, set())):
        given = {name: t.requires_grad_(name == "x" or (trained and name in ("qa", "vb"))) for name, t in apart_inputs(torch.float32).items()}
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
            apart(lora_apart, **given)
        assert {shape for shape in saved if shape[0] == 11} == sizes


@native
@pytest.mark.parametrize("targets", [("query", "value"), ("key",), ("output", "up", "down"), ("query", "key", "value", "output", "up", "down")])
def test_an_encoder_with_pieces_apart(targets, monkeypatch):
    """The logits and the gradients are no further from the unmerged path in float64 than twice what that path in float32 is; Q, K and V are one product."""
    products, plain_linear = [], F.linear

    def step(kind: str, dtype: torch.dtype, draw: int) -> dict[str, torch.Tensor]:
        model, batch = tiny_model(draw), ragged_batch(seed=5 + draw)
        method = trained_lora(model, draw=draw, targets=targets, rank=2)
        for p in [*model.parameters(), *method.parameters().values()]:
            p.data = p.data.float().to(dtype)  # the same numbers in either
        patch.train_only(model, method.parameters().values())
        with kernels.use(kind):
            logits = model.mlm_logits(batch)
            F.cross_entropy(logits, batch.targets).backward()
        return {"logits": logits.detach()} | {name: p.grad for name, p in method.parameters().items()}

    def apart_here(draw: int) -> dict[str, torch.Tensor]:
        products.clear()
        with monkeypatch.context() as patched:
            patched.setattr(F, "linear", lambda x, w, b=None: products.append(tuple(w.shape)) or plain_linear(x, w, b))
            found = step("auto", torch.float32, draw)
        assert products.count((63, 21)) == 2  # the last layer's query is of the rows asked for alone
        return found

    compare_steps(apart_here, lambda draw: step("torch", torch.float32, draw), lambda draw: step("torch", torch.float64, draw))
