"""The loss's kernels against mlm_loss_ref: value and gradient at ragged sizes and a vocabulary's, each dtype; and what writing over the logits may not do."""

import math

import pytest
import torch

from peftdebias.batches import IGNORED
from peftdebias.kernels import mlm_loss as fused
from peftdebias.ops.scores import _Scores
from peftdebias.tasks import mlm_loss_ref

from .harness import DEVICE, DTYPES, Guarded, compare, drawn, poisoned, strided

FIRST_DTYPE = [pytest.param(dtype, marks=pytest.mark.slow if dtype != torch.float32 else ()) for dtype in DTYPES]


def given(m: int, v: int, scale: float = 3.0) -> dict[str, torch.Tensor]:
    targets = torch.randint(0, v, (m,), generator=torch.Generator().manual_seed(m)).to(DEVICE)
    return {"logits": drawn(m, v, seed=1, scale=scale), "targets": targets}


def kernel(logits, targets, weights=None):
    """The op on a copy, since the harness wants its inputs back; [1], since it draws a gradient by shape."""
    return fused.mlm_loss(logits.clone(), targets, weights)[None]


def plain(logits, targets, weights=None):
    """The twin with sums in float32, as autocast runs it: cross-entropy in bf16 would round the loss of every row."""
    return mlm_loss_ref(logits.float(), targets, weights)[None]


def twin(logits, targets, weights=None):
    return mlm_loss_ref(logits.double(), targets, weights)[None]


@pytest.mark.parametrize("m,v,dtype", [pytest.param(m, v, dtype, marks=pytest.mark.slow if dtype != {37: torch.float32, 513: torch.bfloat16}.get(v, dtype) else ())
                                       for m, v in ((13, 37), (7, 2), (1, 1), (13, 513)) for dtype in DTYPES])
def test_ragged_sizes_in_each_dtype(m, v, dtype):
    compare(kernel, twin, given(m, v), plain=plain, dtype=dtype, gradients=("logits",), float32=("output",))


@pytest.mark.parametrize("dtype", FIRST_DTYPE)
def test_more_blocks_than_one(monkeypatch, dtype):
    monkeypatch.setattr(fused, "WIDEST", 32)
    compare(kernel, twin, given(7, 117), plain=plain, dtype=dtype, gradients=("logits",), float32=("output",))


@pytest.mark.parametrize("dtype", FIRST_DTYPE)
@pytest.mark.parametrize("weights", [(1.0, 10.0, 0.0, 6.7), pytest.param((1.0, 1.0, 1.0, 1.0), marks=pytest.mark.slow)])
def test_class_weights(weights, dtype):
    compare(kernel, twin, given(13, 4) | {"weights": torch.tensor(weights, dtype=torch.float64, device=DEVICE)}, plain=plain, dtype=dtype, gradients=("logits",),
            float32=("output", "weights"))


def test_class_weights_that_are_not_contiguous():
    t, weights = given(13, 4), torch.tensor((1.0, 10.0, 0.5, 6.7), device=DEVICE)
    assert torch.equal(*(fused.mlm_loss(t["logits"].float(), t["targets"], layout(weights)) for layout in (torch.clone, strided)))


def test_not_contiguous():
    compare(lambda logits, targets: fused.mlm_loss(logits, targets)[None], twin, given(13, 37), plain=plain, dtype=torch.float32, gradients=("logits",), layout=strided)


def test_rows_that_share_their_memory():
    """One row for all: each writes its gradient to a place of its own."""
    row, targets = drawn(37, seed=3).float().requires_grad_(), torch.tensor([3, 36, 3, 0], device=DEVICE)
    compared = row.detach().double().requires_grad_()
    (found,) = torch.autograd.grad(fused.mlm_loss(row.expand(4, -1), targets), row)
    (wanted,) = torch.autograd.grad(mlm_loss_ref(compared.expand(4, -1), targets), compared)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scale", [1e-3, pytest.param(40.0, marks=pytest.mark.slow), 1e4])
def test_flat_and_steep_rows(scale):
    """Differences of 1e4 between logits: without subtracting the largest, exp would be infinite."""
    compare(kernel, twin, given(13, 37, scale), plain=plain, dtype=torch.float32, gradients=("logits",))


def test_logits_of_minus_infinity_take_no_part():
    logits, targets = drawn(5, 37, seed=2).float(), torch.tensor([36, 1, 2, 3, 4], device=DEVICE)
    logits[:, 5:20] = -float("inf")
    wanted = mlm_loss_ref(logits.double(), targets)
    leaf = logits.clone().requires_grad_()
    loss = fused.mlm_loss(leaf, targets)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert abs(loss.double() - wanted) < 1e-6 and (gradient[:, 5:20] == 0).all() and gradient.isfinite().all()


def test_the_gradient_lies_where_the_logits_lay():
    tensors = given(13, 37)
    guard = Guarded(tensors["logits"].float())
    logits = guard.view.requires_grad_()
    loss = fused.mlm_loss(logits, tensors["targets"])
    with poisoned():
        (gradient,) = torch.autograd.grad(3 * loss, logits)
    assert gradient.data_ptr() == logits.data_ptr()
    guard.check("logits", unchanged=False)
    truth = tensors["logits"].float().double().requires_grad_()
    (wanted,) = torch.autograd.grad(3 * mlm_loss_ref(truth, tensors["targets"]), truth)
    assert (gradient - wanted).abs().max() < 1e-7


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_an_ignored_row_with_an_infinite_hidden_state_gets_no_gradient(bad):
    """Of the wider scores too, whose right part the loss does not write."""
    x, weight, bias, targets = drawn(6, 32, seed=1), drawn(97, 32, seed=2), drawn(97, seed=3), torch.arange(6, device=DEVICE)
    x[2, 0], targets[2] = bad, IGNORED
    x, weight, bias = (t.bfloat16() for t in (x, weight, bias))
    found = []
    for product in (_Scores.apply, torch.nn.functional.linear):
        leaf = x.clone().requires_grad_()
        found.append(torch.autograd.grad(fused.mlm_loss(product(leaf, weight, bias), targets), leaf)[0])
    assert not found[0][2].any() and torch.allclose(*found, rtol=2e-2, atol=1e-4)


def test_a_second_backward_is_refused_not_answered_wrongly():
    tensors = given(5, 7)
    logits = tensors["logits"].float().requires_grad_()
    loss = fused.mlm_loss(logits * 1, tensors["targets"])
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_another_reader_of_the_logits_is_refused_not_answered_wrongly():
    tensors = given(5, 7)
    leaf = tensors["logits"].float().requires_grad_()
    logits = leaf * 1
    other = (logits * logits).sum()  # keeps the logits for its own backward
    fused.mlm_loss(logits, tensors["targets"]).backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_forward_leaves_the_logits_alone():
    tensors = given(5, 7)
    guard = Guarded(tensors["logits"].bfloat16())
    fused.mlm_loss(guard.view, tensors["targets"])
    guard.check("logits")


def test_no_rows():
    logits = torch.zeros(0, 7, device=DEVICE, requires_grad=True)
    targets = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    with poisoned():
        loss = fused.mlm_loss(logits * 1, targets)
        loss.backward()
    assert loss == mlm_loss_ref(logits, targets) == 0 and logits.grad.shape == (0, 7)


@pytest.mark.parametrize("target", [-101, -1, 7, 2 ** 40])
@pytest.mark.parametrize("weights", [None, [1.0] * 7])
def test_a_target_that_is_not_there_gives_nan(target, weights):
    targets = torch.tensor([1, target, 3], device=DEVICE)
    weights = None if weights is None else torch.tensor(weights, device=DEVICE)
    assert fused.mlm_loss(drawn(3, 7).float(), targets, weights).isnan()


@pytest.mark.parametrize("dtype", FIRST_DTYPE)
@pytest.mark.parametrize("weights", [None, (1.0, 10.0, 0.0, 6.7)])
def test_ignored_rows_count_for_nothing(weights, dtype):
    """Their gradient is 0, even where the logits are no numbers; the mean is over the others."""
    tensors = given(13, 4) | ({} if weights is None else {"weights": torch.tensor(weights, dtype=torch.float64, device=DEVICE)})
    tensors["targets"][[0, 5, 12]] = IGNORED
    compare(kernel, twin, tensors, plain=plain, dtype=dtype, gradients=("logits",), float32=("output", "weights"))
    logits = tensors["logits"].float()
    logits[5] = float("nan")
    logits = logits.requires_grad_()
    loss = fused.mlm_loss(logits * 1, tensors["targets"], None)
    loss.backward()
    others = [i for i in range(13) if i not in (0, 5, 12)]
    assert not logits.grad[[0, 5, 12]].any() and logits.grad[others].isfinite().all()
    torch.testing.assert_close(loss, mlm_loss_ref(logits[others], tensors["targets"][others]))


def test_all_rows_ignored():
    logits, targets = torch.zeros(3, 7, device=DEVICE, requires_grad=True), torch.full((3,), IGNORED, device=DEVICE)
    loss = fused.mlm_loss(logits * 1, targets)
    loss.backward()
    assert loss == mlm_loss_ref(logits, targets) == 0 and not logits.grad.any()


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 45])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_the_mean_of_rows_around_a_block_is_exact(rows, weighted, ignored, monkeypatch):
    """Losses of whole numbers, of which a sum in float32 loses some; their number and their weights; between numbers that belong to nobody."""
    monkeypatch.setattr(fused, "ROWS", 16)
    at, given = torch.arange(rows, device=DEVICE), {"losses": torch.ones(rows, device=DEVICE), "targets": torch.arange(rows, device=DEVICE) % 4}
    weights = torch.tensor([1.0, 10.0, 0.25, 2.0 ** 24], device=DEVICE) if weighted else None
    given["losses"][:1] = 2.0 ** 24
    skipped = (at > rows) if ignored == "none" else (at % 3 == 1) if ignored == "some" else at >= 0
    given["targets"][skipped], given["losses"][skipped] = IGNORED, 0.0
    guards = {name: Guarded(tensor, around=2.0 if name == "losses" else 1) for name, tensor in given.items()}
    losses, targets = (guard.view for guard in guards.values())
    loss, share = torch.empty((), device=DEVICE), torch.empty((), device=DEVICE)
    fused._mean[1,](losses, targets, weights, loss, share, rows, 4, WEIGHTED=weighted, ROWS=fused.ROWS)
    kept = targets[~skipped]
    wanted = weights[kept].double().sum().float() if weighted else torch.tensor(float(max(1, len(kept))), device=DEVICE)
    assert torch.equal(share, wanted)
    torch.testing.assert_close(loss, (losses.double().sum() / wanted.double()).float(), rtol=0, atol=0, equal_nan=True)
    assert loss.isnan() == (weighted and not len(kept))


@pytest.mark.parametrize("rows", [pytest.param(13, marks=pytest.mark.slow), 23, pytest.param(40, marks=pytest.mark.slow)])
def test_more_rows_than_one_block(rows, monkeypatch):
    """With weights, and some that count for nothing."""
    monkeypatch.setattr(fused, "ROWS", 16)
    for weights in (None, torch.tensor((1.0, 10.0, 0.5, 6.7), dtype=torch.float64, device=DEVICE)):
        tensors = given(rows, 4) | ({} if weights is None else {"weights": weights})
        tensors["targets"][[0, 5, rows - 1]] = IGNORED
        compare(kernel, twin, tensors, plain=plain, dtype=torch.float32, gradients=("logits",), float32=("output", "weights"))


@pytest.mark.parametrize("rows,weight,target", [(0, 1.0, 0), (3, 0.0, 2), (3, 1.0, IGNORED)], ids=["no rows", "weights of 0", "all ignored"])
def test_weights_whose_sum_is_0_give_nan(rows, weight, target):
    logits, targets = torch.zeros(rows, 7, device=DEVICE), torch.full((rows,), target, device=DEVICE)
    with poisoned():
        found = fused.mlm_loss(logits, targets, torch.full((7,), weight, device=DEVICE))
    assert found.isnan() and mlm_loss_ref(logits, targets, torch.full((7,), weight, device=DEVICE)).isnan()


def test_loss_repeats_bit_for_bit():
    tensors = given(117, 37)
    first, again = (fused.mlm_loss(tensors["logits"].bfloat16(), tensors["targets"]) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("change,words", [
    ({"logits": torch.zeros(5)}, r"mlm_loss, logits: expected shape \[-1, -1\], got \[5\]"),
    ({"logits": torch.zeros(5, 7, dtype=torch.float64)}, "mlm_loss, logits: expected one of float32, bfloat16, float16, got float64"),
    ({"targets": torch.zeros(4, dtype=torch.int64)}, r"mlm_loss, targets: expected shape \[5\], got \[4\]"),
    ({"targets": torch.zeros(5, dtype=torch.int32)}, "mlm_loss, targets: expected one of int64, got int32"),
    ({"weights": torch.zeros(6)}, r"mlm_loss, weights: expected shape \[7\], got \[6\]"),
])
def test_refused_by_name(change, words):
    tensors = {"logits": torch.zeros(5, 7), "targets": torch.zeros(5, dtype=torch.int64)} | change
    with pytest.raises(ValueError, match=words):
        fused.mlm_loss(**{n: t.to(DEVICE) for n, t in tensors.items()})


def test_torch_compile_does_not_break_on_it():
    tensors = given(13, 37)
    leaf, weights = tensors["logits"].float().requires_grad_(), torch.rand(37, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    torch.library.opcheck(torch.ops.peftdebias.mlm_loss_forward.default, (leaf, tensors["targets"], weights),
                          test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    compiled = torch.compile(lambda x: fused.mlm_loss(x * 2, tensors["targets"], weights), backend="aot_eager", fullgraph=True)
    plain_loss = mlm_loss_ref(leaf * 2, tensors["targets"], weights)
    (wanted,) = torch.autograd.grad(plain_loss, leaf)
    loss = compiled(leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(loss, plain_loss)
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_real_vocabulary(dtype):
    compare(kernel, twin, given(7, 30522), plain=plain, dtype=dtype, gradients=("logits",), float32=("output",))


def test_a_first_block_of_minus_infinity_alone(monkeypatch):
    monkeypatch.setattr(fused, "WIDEST", 16)
    logits, targets = drawn(5, 37, seed=2).float(), torch.tensor([36, 31, 22, 33, 34], device=DEVICE)
    logits[:, :16] = -math.inf
    leaf = logits.clone().requires_grad_()
    loss = fused.mlm_loss(leaf, targets)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert abs(loss.double() - mlm_loss_ref(logits.double(), targets)) < 1e-6 and (gradient[:, :16] == 0).all() and gradient.isfinite().all()
