"""sparse_add against sparse_add_ref."""

import pytest
import torch

from peftdebias.kernels import sparse as fused
from peftdebias.sites import sparse_add_ref

from .harness import DEVICE, DTYPES, Guarded, compare, drawn, strided


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


def test_ops_are_registered_soundly():
    tensors = given((5, 7), 3)
    args = tensors["weight"].float().requires_grad_(), tensors["indices"], tensors["values"].float().requires_grad_()
    torch.library.opcheck(torch.ops.peftdebias.sparse_add.default, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
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
