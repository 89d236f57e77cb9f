"""The plain twins of attention: the padded one equals the reference, dropout and prefixes included."""

import importlib
import itertools
import math
import types

import pytest
import torch

from peftdebias import kernels
from peftdebias.batches import Spans
from peftdebias.kernels import dispatch
from peftdebias.kernels.dropout_ref import attention_keep
from peftdebias.ops import Drop, attention, attention_padded, attention_ref
from peftdebias.ops.attention import attention_varlen, forms, has_varlen

from .outside import HEAD_WIDTH, HEADS, assert_close, one_thread  # noqa: F401

attention_module = importlib.import_module("peftdebias.ops.attention")  # the package has a function of that name

SPANS = {
    "ragged": Spans.of((13, 1, 7), (13, 1, 7)),
    "equal": Spans.of((7, 7), (7, 7)),
    "fewer queries": Spans.of((2, 1, 3), (13, 1, 7)),
    "no queries in one": Spans.of((2, 0, 1), (13, 5, 7)),
    "no queries at all": Spans.of((0, 0), (13, 7)),
    "an empty text": Spans.of((3, 0, 7), (13, 0, 7)),
    "one text": Spans.of((11,), (11,)),
}


def attention_inputs(spans, prefix, dtype=torch.float64, seed=0):
    """query, key, value [., H, W] and a prefix of that many rows, all requiring gradients; None without."""
    generator = torch.Generator().manual_seed(seed)
    rows = [sum(spans.query_lengths), sum(spans.key_lengths), sum(spans.key_lengths)] + ([] if prefix is None else [prefix, prefix])
    tensors = [torch.randn(n, HEADS, HEAD_WIDTH, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for n in rows]
    return tensors[:3], None if prefix is None else tuple(tensors[3:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("prefix", [None, 0, 1, 5])
@pytest.mark.parametrize("rate", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("spans", list(SPANS.values()), ids=list(SPANS))
def test_padded_attention_equals_the_reference(spans, rate, prefix, dtype):
    """Values, and the gradients of query, key, value and prefix."""
    drop = Drop(rate, torch.tensor([5]), 3) if rate else None
    tensors, pre = attention_inputs(spans, prefix, dtype)
    leaves = [*tensors, *(pre or ())]
    expected, found = attention_ref(*tensors, spans, pre, drop), attention_padded(*tensors, spans, pre, drop)
    assert found.shape == (sum(spans.query_lengths), HEADS, HEAD_WIDTH)
    assert_close(found, expected)
    weights = torch.randn(expected.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((x * weights).sum(), leaves) for x in (expected, found)]
    for name, one, other in zip(("query", "key", "value", "prefix key", "prefix value"), gradients[1], gradients[0]):
        assert_close(one, other, name)


def test_the_reference_is_attention_within_each_text():
    """Uniform scores give means of the text's own values and the prefix; nothing leaks between texts."""
    spans, value = Spans.of((1, 2), (2, 3)), torch.tensor([1.0, 3.0, 5.0, 6.0, 7.0]).view(5, 1, 1)
    zeros = torch.zeros(3, 1, 1), torch.zeros(5, 1, 1)
    assert attention_ref(*zeros, value, spans).flatten().tolist() == [2, 6, 6]
    assert attention_ref(*zeros, value, spans, (torch.zeros(1, 1, 1), torch.full((1, 1, 1), 10.0))).flatten().tolist() == pytest.approx([14 / 3, 7, 7])


def test_attention_runs_the_implementation_that_kernels_chooses(monkeypatch):
    (query, key, value), pre = attention_inputs(SPANS["ragged"], 1, torch.float32)
    with kernels.use("torch"):
        assert torch.equal(attention(query, key, value, SPANS["ragged"], pre), attention_padded(query, key, value, SPANS["ragged"], pre))
    monkeypatch.setitem(kernels._registry, ("attention", "native"), lambda *inputs: "native")
    with kernels.use("native"):
        assert attention(query, key, value, SPANS["ragged"], pre) == "native"


@pytest.mark.parametrize("run", [attention_ref, attention_padded])
def test_dropout_of_probabilities_keeps_its_share(run):
    """Uniform probabilities 1/n over one-hot values: the output shows which were kept, scaled by 1 / (share kept)."""
    n, rate = 211, 0.3
    spans, zeros = Spans.of((n, n), (n, n)), torch.zeros(2 * n, 1, n)
    value = torch.eye(n).repeat(2, 1)[:, None, :]
    drop = Drop(rate, torch.tensor([5]), 1)
    out = run(zeros, zeros, value, spans, drop=drop)
    kept = out > 0
    assert torch.allclose(out[kept], torch.tensor(drop.scale / n), rtol=1e-5)
    assert abs(kept.double().mean() - (1 - rate)) < 4 * math.sqrt(rate * (1 - rate) / kept.numel())
    assert torch.equal(run(zeros, zeros, value, spans, drop=drop), out)
    assert not torch.equal(run(zeros, zeros, value, spans, drop=drop._replace(seed=torch.tensor([6]))), out)
    assert not torch.equal(run(zeros, zeros, value, spans, drop=drop._replace(site=2)), out)
    assert torch.allclose(run(zeros, zeros, value, spans), torch.full_like(out, 1 / n))


def test_the_mask_of_probabilities_depends_on_row_head_and_key_alone():
    """Whatever else is in the batch; rows, heads, prefix and text draw apart from each other."""
    drop = Drop(0.5, torch.tensor([5]), 1)
    keep = attention_keep(torch.arange(13), 9, 37, 3, drop)  # [H, q, P + S]
    assert torch.equal(attention_keep(torch.tensor([4, 11]), 9, 20, 2, drop), keep[:2, [4, 11], :29])
    assert torch.equal(attention_keep(torch.arange(13), 0, 37, 3, drop), keep[..., 9:])
    planes = [*keep[..., 9:18], keep[0, :, :9]]
    assert all(0.3 < (a == b).double().mean() < 0.7 for a, b in itertools.combinations(planes, 2))
    assert 0.3 < (keep[:, 1:] == keep[:, :-1]).double().mean() < 0.7


# ---------------------------------------------------------------- forms

def test_the_table_chooses_among_the_forms_that_can_serve(monkeypatch):
    """Where a Triton kernel would run; it is stood in for by a word, and nothing is launched."""
    (query, key, value), pre = attention_inputs(SPANS["ragged"], 1, torch.float32)
    monkeypatch.setitem(kernels._registry, ("attention", "triton"), lambda *inputs: "fused")
    monkeypatch.setattr(kernels, "missing", lambda op, kind, where="cuda": "")
    with kernels.use("triton"):
        assert attention(query, key, value, SPANS["ragged"], pre) == "fused"
        with dispatch.use("attention", "padded"):
            assert torch.equal(attention(query, key, value, SPANS["ragged"], pre), attention_padded(query, key, value, SPANS["ragged"], pre))
        with dispatch.use("attention", "varlen"):  # not in float32, not with a prefix
            assert attention(query, key, value, SPANS["ragged"], pre) == "fused"
        assert torch.equal(attention(query.double(), key.double(), value.double(), SPANS["ragged"]), attention_padded(query.double(), key.double(), value.double(), SPANS["ragged"]))


def test_which_forms_can_serve():
    query = torch.zeros(21, 2, 16)
    assert forms(query, SPANS["ragged"], None, None) == forms(query, SPANS["ragged"], None, Drop(0.1, torch.tensor([1]), 0)) == ("fused", "padded")
    assert forms(query[:10], SPANS["an empty text"], None, None) == ("fused",)
    assert forms(query[:10], SPANS["an empty text"], (query, query), None) == ("fused", "padded")
    assert forms(query[:0], Spans.of((), ()), None, None) == ("fused",)


def test_varlen_serves_where_every_text_asks_for_a_row(monkeypatch):
    monkeypatch.setattr(attention_module, "has_varlen", lambda: True)
    query = types.SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(3, 2, 64))
    assert forms(query, Spans.of((1, 2), (3, 2)), None, None)[-1] == "varlen" and forms(query, Spans.of((0, 3), (3, 3)), None, None) == ("fused", "padded")


@pytest.mark.skipif(not torch.cuda.is_available() or not has_varlen(), reason="needs a CUDA device and torch.nn.attention.varlen")
def test_varlen_equals_the_reference():
    spans = Spans.of((13, 1, 7), (13, 1, 7), torch.device("cuda"))
    tensors = [torch.randn(21, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    assert forms(tensors[0], spans, None, None)[-1] == "varlen"
    expected, found = attention_ref(*(x.double() for x in tensors), spans), attention_varlen(*tensors, spans)
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)
    for one, other in zip(*(torch.autograd.grad(x.double().sum(), tensors) for x in (found, expected))):
        torch.testing.assert_close(one, other, rtol=0.03, atol=0.03)
