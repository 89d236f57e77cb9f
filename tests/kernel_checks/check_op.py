"""How the ops are called, whichever they are: eager code and torch.compile compute the same, no zeros are made for gradients that nobody has, and what autograd cannot
answer is an error."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad

from peftdebias.kernels import adamw, adapter, attention, dropout, embeddings, gelu, lora, mlm_loss, norm, sparse
from peftdebias.kernels.dropout_ref import Drop
from peftdebias.ops.attention import Spans

from .harness import DEVICE, drawn

SEED = torch.tensor([7], device=DEVICE)
DROP = Drop(0.25, SEED, 3)
SPANS = Spans.of((5, 3), (5, 3), DEVICE)
PLACES = torch.tensor([0, 5, 90], device=DEVICE)
IDS, AT = torch.tensor([3, 0, 8, 3, 3, 5, 1, 8], device=DEVICE), torch.tensor([0, 1, 2, 3, 4, 0, 1, 2], device=DEVICE)
TARGETS = torch.tensor([1, 4, 0, -100, 6, 2, 3, 5], device=DEVICE)

CASES = {
    "norm": (lambda *t: norm.norm(*t, 1e-5, DROP), ((8, 13), (8, 13), (13,), (13,)), (0, 1, 2, 3)),
    "norm, frozen": (lambda *t: norm.norm(*t, 1e-5), ((8, 13), (8, 13), (13,), (13,)), (0, 1)),
    "embed": (lambda *t: embeddings.embed(IDS, AT, *t, 1e-5, DROP), ((9, 13), (5, 13), (13,), (13,)), (0, 1, 2, 3)),
    "embed, frozen tables": (lambda *t: embeddings.embed(IDS, AT, *t, 1e-5, DROP), ((9, 13), (5, 13), (13,), (13,)), (2, 3)),
    "gelu": (gelu.gelu, ((8, 13), (13,)), (0, 1)),
    "dropout": (lambda x: dropout.dropout(x, 0.25, SEED, 3), ((8, 13),), (0,)),
    "adapter": (lambda *t: adapter.adapter(*t, "gelu"), ((8, 13), (8, 13), (7, 13), (7,), (13, 7), (13,)), range(6)),
    "adapter, frozen": (lambda *t: adapter.adapter(*t, "relu"), ((8, 13), (8, 13), (7, 13), (7,), (13, 7), (13,)), (0, 1)),
    "attention": (lambda *t: attention.attention(*t, SPANS, None, DROP), ((8, 2, 5),) * 3, (0, 1, 2)),
    "attention, prefix": (lambda q, k, v, *prefix: attention.attention(q, k, v, SPANS, prefix), (*((8, 2, 5),) * 3, *((3, 2, 5),) * 2), (0, 3, 4)),
    "lora_linear": (lambda *t: lora.lora_linear(*t, 1.5, 0.25, SEED, 3), ((8, 13), (11, 13), (11,), (3, 13), (11, 3)), (0, 3, 4)),
    "lora_written": (lambda x, w, bias, a, b, c, d: lora.lora_written(x, w, bias, [(0, a, b, 1.5), (5, c, d, 0.5)]),
                     ((8, 13), (11, 13), (11,), (3, 13), (5, 3), (2, 13), (6, 2)), (0, 2, 3, 4, 5, 6)),
    "lora_written, half frozen": (lambda x, w, bias, a, b, c, d: lora.lora_written(x, w, bias, [(0, a, b, 1.5), (5, c, d, 0.5)]),
                                  ((8, 13), (11, 13), (11,), (3, 13), (5, 3), (2, 13), (6, 2)), (5,)),
    "mlm_loss": (lambda logits: mlm_loss.mlm_loss(logits * 1, TARGETS), ((8, 7),), (0,)),
    "sparse_add": (lambda w, v: sparse.sparse_add(w, PLACES, v), ((8, 13), (3,)), (0, 1)),
}
"""op -> (function of tensors, their shapes, which of them are trained)."""
AGAIN = {"dropout", "sparse_add"}  # linear, so their gradients have gradients
ALL = pytest.mark.parametrize("name", CASES)


def case(name: str):
    """(function, its tensors, those that are trained)."""
    function, shapes, trained = CASES[name]
    tensors = [drawn(*shape, seed=i).float().requires_grad_(i in trained) for i, shape in enumerate(shapes)]
    return function, tensors, [tensors[i] for i in trained]


def pull_for(y: Tensor) -> Tensor:
    return drawn(y.numel(), seed=50).float().view(y.shape)


@ALL
def test_compiled_computes_what_eager_does(name):
    function, tensors, trained = case(name)
    found = []
    for run in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        y = run(*tensors)
        found.append((y.detach().clone(), *torch.autograd.grad(y, trained, pull_for(y))))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    with torch.no_grad():
        assert torch.equal(function(*tensors), found[0][0])


@pytest.mark.parametrize("name", [name for name in CASES if name != "embed"])  # a table's gradient is zeros where no token points
def test_no_zeros_are_made_for_what_has_no_gradient(name):
    """torch would fill them in every backward: as many bytes as the largest tensor that the op keeps."""
    function, tensors, trained = case(name)
    y = function(*tensors)
    pull = pull_for(y)
    with torch.autograd.profiler.profile() as watched:
        torch.autograd.grad(y, trained, pull)
    called = {event.name for event in watched.function_events}
    assert called and not {n for n in called if n.startswith(("aten::zero", "aten::new_zeros"))}


class Nothing(torch.autograd.Function):
    """x; its gradient is None."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, pull):
        return None


@ALL
def test_no_gradient_gives_none(name):
    function, tensors, trained = case(name)
    y = function(*tensors)
    found = torch.autograd.grad(Nothing.apply(y), trained, pull_for(y), allow_unused=True)
    assert found == (None,) * len(trained)


@ALL
def test_a_second_backward_needs_the_graph_kept(name):
    function, tensors, trained = case(name)
    y = function(*tensors)
    torch.autograd.grad(y, trained, pull_for(y))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, trained, pull_for(y))


@pytest.mark.parametrize("name", [name for name in CASES if name != "mlm_loss"])  # whose second backward is refused (check_mlm_loss.py)
def test_a_kept_graph_gives_the_same_gradients_again(name):
    function, tensors, trained = case(name)
    y = function(*tensors)
    first, again = (torch.autograd.grad(y, trained, pull_for(y), retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@ALL
def test_a_gradients_gradient_is_right_or_refused(name):
    """Where the pull has no gradient too: then what is missing would be seen nowhere."""
    function, tensors, trained = case(name)
    y = function(*tensors)
    pull = pull_for(y).requires_grad_(name in AGAIN)
    if name in AGAIN:
        (gradient,) = torch.autograd.grad(y, trained[0], pull, create_graph=True)
        (found,) = torch.autograd.grad(gradient, pull, torch.ones_like(gradient))
        assert torch.equal(found, function(*(torch.ones_like(t) if t is trained[0] else torch.zeros_like(t) for t in tensors)))
    else:
        with pytest.raises(RuntimeError, match="expected a backward without create_graph, as its gradient has none of its own"):
            torch.autograd.grad(y, trained, pull, create_graph=True)


@ALL
def test_forward_mode_is_refused(name):
    """What a launch makes would have no tangent, as a constant has none."""
    function, tensors, trained = case(name)
    plain = [t.detach() for t in tensors]
    with pytest.raises(NotImplementedError, match="expected no forward mode"), forward_ad.dual_level():
        function(*(forward_ad.make_dual(t, t) for t in plain))
    with pytest.raises(NotImplementedError, match="expected no forward mode"):
        torch.func.jvp(function, tuple(plain), tuple(plain))


def test_what_is_overwritten_counts_as_a_new_version():
    state = [torch.zeros(5, device=DEVICE) for _ in range(4)]
    before = [t._version for t in state]
    adamw.adamw(*state, torch.ones(3, device=DEVICE), betas=(0.9, 0.999), epsilon=1e-8)
    assert [t._version - n for t, n in zip(state, before)] == [1, 0, 1, 1]  # values, gradient, moments


def test_who_watches_every_op_sees_the_registered_ones():
    """Fake tensors have no values that a launcher could read; eager code has no registered op in its graph."""
    x, bias = drawn(8, 13).float().requires_grad_(), drawn(13).float()
    y = gelu.gelu(x, bias)
    assert y.grad_fn.name() == "gelu_forwardBackward"
    with FakeTensorMode() as mode:
        given = mode.from_tensor(x), mode.from_tensor(bias)
        fake = gelu.gelu(*given)
        assert isinstance(fake, FakeTensor) and fake.shape == (8, 13)
        (gradient,) = torch.autograd.grad(fake.sum(), given[0])
        assert isinstance(gradient, FakeTensor) and gradient.shape == (8, 13)
