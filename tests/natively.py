"""Where tests meet the compiled ops: on every code path, with one thread and two, held against a twin in float64."""

import contextlib
import itertools

import torch
from torch import Tensor

from peftdebias.batches import Spans
from peftdebias.ops import Drop, compiled, heads_of
from peftdebias.ops.attention_compiled import attention_compiled
from peftdebias.ops.dropout import dropout_compiled
from peftdebias.ops.gelu import gelu_compiled
from peftdebias.ops.norm import norm_compiled

LEVELS = ("portable", "AVX2", "AVX-512")[:compiled.FUNCTIONS["ops_level"]() + 1 if compiled.FUNCTIONS else 0]


@contextlib.contextmanager
def running(level: int, threads: int):
    before = torch.get_num_threads()
    compiled.FUNCTIONS["ops_limit"](level)
    torch.set_num_threads(threads)
    try:
        assert compiled.FUNCTIONS["ops_level"]() == level
        yield
    finally:
        compiled.FUNCTIONS["ops_limit"](2)
        torch.set_num_threads(before)


def ways():
    """The portable code and what the processor has of the others; with one thread and with two."""
    for (level, name), threads in itertools.product(enumerate(LEVELS), (1, 2)):
        with running(level, threads):
            yield f"{name}, {threads} threads"


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def dropping(rate: float, seed: int = 2 ** 40 + 3) -> Drop | None:
    return Drop(rate, torch.tensor([seed]), 3) if rate else None


def gradients(function, tensors: dict[str, Tensor | None], wanted: list[str], dtype=torch.float32) -> dict[str, Tensor]:
    """{"y": output, name: gradient} of function(**tensors) in `dtype`, for a drawn gradient of y."""
    given = {name: t if t is None else t.to(dtype).detach().clone(memory_format=torch.preserve_format).requires_grad_(name in wanted) for name, t in tensors.items()}
    y = function(**given)
    assert y.dtype == dtype and y.requires_grad == bool(wanted)
    found = {"y": y.detach()}
    if wanted:
        pull = drawn(*y.shape, seed=99).to(dtype)
        found |= {name: g for name, g in zip(wanted, torch.autograd.grad(y, [given[name] for name in wanted], pull, materialize_grads=True), strict=True)}
    return found


def close(found: dict[str, Tensor], expected: dict[str, Tensor], way: str = "") -> None:
    """1e-6 for values of order 1; sums over rows are larger, and so is what is allowed."""
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert found[name].shape == wanted.shape and found[name].dtype == torch.float32
        if wanted.numel():
            apart, largest = float((found[name].double() - wanted).abs().max()), float(wanted.abs().max())
            assert apart <= 1e-6 * max(1.0, largest), f"{way}, {name}: max|difference| {apart:.3g}, of values up to {largest:.3g}"


def check(compiled_op, twin, tensors: dict[str, Tensor | None], wanted: list[str]) -> None:
    expected = gradients(twin, tensors, wanted, torch.float64)
    for way in ways():
        close(gradients(compiled_op, tensors, wanted), expected, way)


HEADS = 3


def everything(dtype=torch.float32, rows: int = 300) -> list[Tensor]:
    """One pass through every op, forward and backward; with 300 rows torch's own threads, which do not survive a fork, have none of it."""
    spans = Spans.of((60, 33, 7), (60, 33, 7))
    qkv, tall = drawn(100, 3 * 96).to(dtype).requires_grad_(), drawn(rows, 100).to(dtype).requires_grad_()
    gain, bias = drawn(100).to(dtype).requires_grad_(), drawn(100, seed=1).to(dtype).requires_grad_()
    prefix = tuple(drawn(5, HEADS, 32, seed=i).to(dtype).requires_grad_() for i in (7, 8))
    made = [attention_compiled(*heads_of(qkv, 3, HEADS), spans, prefix, dropping(0.1)), norm_compiled(tall, tall * 2, gain, bias, 1e-5, dropping(0.1)),
            gelu_compiled(tall, bias), dropout_compiled(tall, *dropping(0.1))]
    found = torch.autograd.grad(sum((y * drawn(*y.shape, seed=9).to(dtype)).sum() for y in made), [qkv, tall, gain, bias, *prefix])
    return [y.detach() for y in made] + list(found)
