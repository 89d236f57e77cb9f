"""The sparse kernels: sparse_add against sparse_add_ref, adamw against torch.optim.AdamW in float64, and the optimizer that uses it."""

import pytest
import torch

from peftdebias import kernels
from peftdebias.kernels import sparse as fused
from peftdebias.optimizer import FlatAdamW, LargeAdamW, rates_at
from peftdebias.sites import sparse_add_ref

from .harness import DEVICE, DTYPES, Guarded, compare, drawn, poisoned, strided


def given(shape: tuple[int, ...], k: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """A weight and k different places in it, ascending, the first and the last among them where there are two."""
    size = torch.Size(shape).numel()
    places = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:k]
    if k >= 2:
        places = torch.cat([torch.tensor([0, size - 1]), places[(places != 0) & (places != size - 1)][:k - 2]])
    return {"weight": drawn(*shape, seed=1), "indices": places.sort().values.to(DEVICE), "values": drawn(len(places), seed=2)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape,k", [((13, 37), 7), ((481,), 481), ((7, 1), 1), ((5, 13), 0), ((13, 7, 3), 64)])
def test_add_in_each_dtype(shape, k, dtype):
    compare(fused.sparse_add, sparse_add_ref, given(shape, k), dtype=dtype, gradients=("weight", "values"))


@pytest.mark.parametrize("copied,placed", [(16, 16), (32, 2), (512, 16)])
def test_add_over_many_stretches(copied, placed, monkeypatch):
    """Stretches with none, one and many of the indices; several rounds of placing in one."""
    monkeypatch.setattr(fused, "STRETCH", copied)
    monkeypatch.setattr(fused, "TOGETHER", placed)
    for k in (1, 2, 40, 200, 481):
        compare(fused.sparse_add, sparse_add_ref, given((13, 37), k), dtype=torch.float32, gradients=("weight", "values"), values=1)  # every number is rounded once, in both
    crowd = given((13, 37), 2)
    crowd |= {"indices": torch.arange(100, 150, device=DEVICE), "values": drawn(50, seed=2)}
    compare(fused.sparse_add, sparse_add_ref, crowd, dtype=torch.float32, gradients=("weight", "values"))


def test_values_in_float32_are_added_before_rounding():
    compare(fused.sparse_add, lambda **t: sparse_add_ref(**t), given((13, 37), 64), plain=lambda weight, indices, values: sparse_add_ref(weight, indices, values.to(weight.dtype)),
            dtype=torch.bfloat16, float32=("values",), gradients=("weight", "values"))


def test_add_not_contiguous():
    compare(fused.sparse_add, sparse_add_ref, given((13, 37), 7), dtype=torch.float32, gradients=("weight", "values"), layout=strided)


def test_places_outside_are_not_followed(monkeypatch):
    """The result lies in the middle of a larger buffer, so a write beside it is seen."""
    tensors, guards = given((5, 7), 4), []
    indices = torch.tensor([-2, 3, 35, 60], device=DEVICE)

    def guarded(weight):
        guards.append(Guarded(torch.zeros_like(weight)))
        return guards[0].view

    monkeypatch.setattr(fused.torch, "empty_like", guarded)
    found = fused.sparse_add(tensors["weight"].float(), indices, tensors["values"].float())
    guards[0].check("result", unchanged=False)
    wanted = tensors["weight"].float().flatten()
    wanted[3] += tensors["values"].float()[1]
    assert torch.equal(found.flatten(), wanted)


@pytest.mark.parametrize("change,words", [
    ({"weight": torch.zeros(5, 7, dtype=torch.float64)}, "sparse_add, weight: expected one of float32, bfloat16, float16, got float64"),
    ({"indices": torch.zeros(3, dtype=torch.int32)}, "sparse_add, indices: expected one of int64, got int32"),
    ({"values": torch.zeros(4)}, r"sparse_add, values: expected shape \[3\], got \[4\]"),
])
def test_add_refuses_by_name(change, words):
    tensors = {n: t.float() if t.is_floating_point() else t for n, t in given((5, 7), 3).items()} | {n: t.to(DEVICE) for n, t in change.items()}
    with pytest.raises(ValueError, match=words):
        fused.sparse_add(**tensors)


# ---------------------------------------------------------------- adamw

SETTINGS = {"betas": (0.9, 0.999), "epsilon": 1e-8}
LR, DECAY = 3e-3, 0.1


def rates(step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(rates_at(step, LR, SETTINGS["betas"], DECAY), dtype=dtype, device=DEVICE)


def steps(update):
    """A function of w and five gradients, all [n], that gives w and both moments after five steps of `update`."""
    def run(w, **gradients):
        w, m, q = w.clone(), torch.zeros_like(w), torch.zeros_like(w)
        for t, g in enumerate(gradients.values(), 1):
            update(w, g, m, q, rates(t, w.dtype), **SETTINGS)
        return {"w": w, "m": m, "q": q}
    return run


def library(w, **gradients):
    """The same by torch.optim.AdamW."""
    w = w.clone().requires_grad_()
    optimizer = torch.optim.AdamW([w], lr=LR, betas=SETTINGS["betas"], eps=SETTINGS["epsilon"], weight_decay=DECAY)
    for w.grad in gradients.values():
        optimizer.step()
    return {"w": w, "m": optimizer.state[w]["exp_avg"], "q": optimizer.state[w]["exp_avg_sq"]}


@pytest.mark.parametrize("n", [1, 13, 1024, 3001])
def test_adamw_errs_no_more_than_twice_torchs(n):
    """Gradients over five orders of magnitude."""
    given = {"w": drawn(n, seed=1)} | {f"g{t}": drawn(n, seed=10 + t, scale=10.0 ** -t) for t in range(1, 6)}
    compare(steps(fused.adamw), library, given, dtype=torch.float32)


def test_adamw_writes_inside_its_tensors_and_leaves_the_gradient():
    guards = [Guarded(drawn(13, seed=i).abs().float()) for i in range(4)]
    fused.adamw(*(g.view for g in guards), rates(1), **SETTINGS)
    for name, guard in zip(("values", "gradient", "first", "second"), guards):
        guard.check(name, unchanged=name == "gradient")


@pytest.mark.parametrize("change,words", [
    ({"gradient": torch.zeros(4)}, r"adamw, gradient: expected shape \[5\], got \[4\]"),
    ({"first": torch.zeros(5, dtype=torch.bfloat16)}, "adamw, first: expected one of float32, got bfloat16"),
    ({"second": torch.zeros(10)[::2]}, "adamw, second: expected a contiguous tensor, got stride 2"),
    ({"rates": torch.zeros(2)}, r"adamw, rates: expected shape \[3\], got \[2\]"),
])
def test_adamw_refuses_by_name(change, words):
    tensors = {n: torch.zeros(5) for n in ("values", "gradient", "first", "second")} | {"rates": rates(1)} | change
    with pytest.raises(ValueError, match=words):
        fused.adamw(**{n: t.to(DEVICE) for n, t in tensors.items()}, **SETTINGS)


def test_the_optimizer_takes_it_when_triton_is_asked_for():
    from peftdebias.training import Schedule, make_optimizer

    def trained(kind: str) -> tuple[type, list[torch.Tensor]]:
        parameters = {f"p{i}": torch.nn.Parameter(drawn(*shape, seed=i).float()) for i, shape in enumerate([(3, 7), (5,), (2, 2)])}
        with kernels.use(kind):
            optimizer = make_optimizer(parameters, Schedule(steps=3, lr=1e-2, weight_decay=0.1))
        for t in range(3):
            for i, p in enumerate(parameters.values()):
                p.grad = drawn(*p.shape, seed=10 * t + i).float()
            with poisoned():
                optimizer.step()
        return type(optimizer), [p.detach() for p in parameters.values()]

    (flat, found), (library, wanted) = trained("triton"), trained("torch")
    assert flat is FlatAdamW and library is LargeAdamW
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_ops_are_registered_soundly():
    tensors = given((5, 7), 3)
    args = tensors["weight"].float().requires_grad_(), tensors["indices"], tensors["values"].float().requires_grad_()
    torch.library.opcheck(torch.ops.peftdebias.sparse_add.default, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    flat = [drawn(5, seed=i).abs().float() for i in range(4)]
    torch.library.opcheck(torch.ops.peftdebias.adamw.default, (*flat, rates(1), 0.9, 0.999, 1e-8), test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(lambda w, v: fused.sparse_add(w * 2, tensors["indices"], v), backend="aot_eager", fullgraph=True)
    out = compiled(args[0], args[2])
    found = torch.autograd.grad(out.square().sum(), (args[0], args[2]))
    plain = sparse_add_ref(args[0] * 2, tensors["indices"], args[2])
    wanted = torch.autograd.grad(plain.square().sum(), (args[0], args[2]))
    torch.testing.assert_close((out, *found), (plain, *wanted))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_sizes(dtype):
    for shape in ((768, 768), (3072, 768)):
        size = shape[0] * shape[1]
        compare(fused.sparse_add, sparse_add_ref, given(shape, size // 100), dtype=dtype, gradients=("weight", "values"))
