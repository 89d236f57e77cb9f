"""Dropout: known answers of the generator, the mask's statistics, and the kernel bit for bit."""

import math

import pytest
import torch

from peftdebias.kernels.dropout import dropout
from peftdebias.kernels.dropout_ref import dropout_ref, keep_mask, philox_ref, threshold_of

from .harness import DEVICE, DTYPES, compare, drawn, poisoned, strided

WORD = 0xFFFFFFFF


def seeded(value: int) -> torch.Tensor:
    return torch.tensor([value], device=DEVICE)


@pytest.mark.parametrize("counter,key,words", [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD, WORD, WORD, WORD), (WORD, WORD), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
])
def test_the_generator_gives_its_authors_known_answers(counter, key, words):
    """Random123's kat_vectors, philox4x32 10."""
    assert tuple(int(w) for w in philox_ref([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])) == words


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_the_kept_share_is_within_four_sigma(rate):
    mask = keep_mask(1000, 768, rate, seeded(5), 3)
    q = threshold_of(rate) / 65536
    assert abs(q - (1 - rate)) <= 1 / 131072
    assert abs(mask.double().mean().item() - q) <= 4 * math.sqrt(q * (1 - q) / mask.numel())
    lanes = mask.view(-1, 8).double().mean(0)
    assert ((lanes - q).abs() <= 5 * math.sqrt(q * (1 - q) / (mask.numel() / 8))).all()  # eight lanes, each from a 16-bit slice of its own


def test_another_seed_or_site_is_another_mask_and_neighbours_are_independent():
    one = keep_mask(64, 96, 0.5, seeded(5), 3)
    sigma = math.sqrt(0.25 / one.numel())
    for other in (keep_mask(64, 96, 0.5, seeded(6), 3), keep_mask(64, 96, 0.5, seeded(5), 4), keep_mask(64, 96, 0.5, seeded(5 + 2**32), 3), one.roll(1, 1), one.roll(1, 0)):
        assert abs((one == other).double().mean().item() - 0.5) < 4 * sigma
    assert torch.equal(one, keep_mask(64, 96, 0.5, seeded(5), 3))


def test_a_wider_tensor_counts_on_by_rows():
    """Where D is no multiple of 8 a row begins a new block: the first columns are those of the padded width."""
    assert torch.equal(keep_mask(7, 13, 0.5, seeded(1), 0), keep_mask(7, 16, 0.5, seeded(1), 0)[:, :13])
    assert torch.equal(keep_mask(7, 16, 0.5, seeded(1), 0).flatten()[:32], keep_mask(1, 32, 0.5, seeded(1), 0).flatten())


@pytest.mark.parametrize("shape", [(1, 1), (13, 7), (37, 13), (65, 136), (0, 5)])
@pytest.mark.parametrize("seed", [0, 2**31 + 7, 2**40 + 3])
def test_the_kernel_draws_the_mask_of_the_specification(shape, seed):
    with poisoned():
        found = dropout(torch.ones(shape, device=DEVICE), 0.3, seeded(seed), 11)
    assert torch.equal(found, dropout_ref(torch.ones(shape, device=DEVICE), 0.3, seeded(seed), 11))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [lambda t: t, strided], ids=["contiguous", "strided"])
def test_forward_and_backward(dtype, layout):
    seed = seeded(9)
    compare(lambda x: dropout(x, 0.25, seed, 2), lambda x: dropout_ref(x, 0.25, seed, 2), {"x": drawn(37, 13)}, dtype=dtype, gradients=("x",), layout=layout)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [768, 3072])
def test_forward_and_backward_at_real_sizes(dtype, width):
    seed = seeded(9)
    compare(lambda x: dropout(x, 0.1, seed, 2), lambda x: dropout_ref(x, 0.1, seed, 2), {"x": drawn(300, width)}, dtype=dtype, gradients=("x",))


def test_the_backward_drops_what_the_forward_dropped():
    x = torch.ones(37, 13, device=DEVICE, requires_grad=True)
    y = dropout(x, 0.5, seeded(3), 1)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, y.detach()) and 0 < (dx == 0).sum() < dx.numel()


def test_registration():
    """torch's own checks of an op: schema, fake tensors, autograd registration; and torch.compile takes it without a break."""
    x = torch.randn(13, 7, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.peftdebias.dropout.default, (x, 0.5, seeded(3), 1))
    whole = torch.compile(lambda x, seed: dropout(x * 2, 0.5, seed, 1) + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(whole(x, seeded(3)), dropout(x * 2, 0.5, seeded(3), 1) + 1)


@pytest.mark.parametrize("change,words", [
    ({"x": torch.zeros(3)}, r"dropout, x: expected shape \[-1, -1\], got \[3\]"),
    ({"x": torch.zeros(3, 2, dtype=torch.float64)}, "dropout, x: expected one of float32, bfloat16, float16, got float64"),
    ({"seed": torch.zeros(1)}, "dropout, seed: expected one of int64, got float32"),
    ({"rate": 1.0}, "dropout: expected a rate from 0 up to but not 1, got 1.0"),
])
def test_errors(change, words):
    inputs = {"x": torch.zeros(3, 2), "rate": 0.5, "seed": torch.zeros(1, dtype=torch.int64), "site": 0} | change
    with pytest.raises(ValueError, match=words):
        dropout(**inputs)


@pytest.mark.parametrize("place", range(8))
def test_a_value_whose_bits_are_the_threshold_is_dropped(place):
    """Sixteen bits are at it once in 65 536 times: the rate is made for those of one element."""
    words = philox_ref([torch.tensor(0)] * 4, [torch.tensor(5), torch.tensor(3)])
    rate, x = 1 - (int(words[place % 4]) >> (16 * (place >= 4)) & 0xFFFF) / 65536, torch.ones(1, 8, device=DEVICE)
    y = dropout(x, rate, seeded(5), 3)
    assert torch.equal(y, dropout_ref(x, rate, seeded(5), 3)) and y[0, place] == 0
