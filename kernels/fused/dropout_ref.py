"""The specification of dropout.py in plain torch: the bits, the mask, the op. It needs no Triton; the plain twins of other ops that drop build on it.

What the bits are stands in dropout.py. csrc and Triton draw the same mask from the same seed and site.
"""

import torch
from torch import Tensor

LANES = 8  # elements that one Philox call serves


def threshold_of(rate: float) -> int:
    """16-bit threshold: an element is kept where its bits are less. rate in [0, 1); at least one of 65536 values is kept."""
    if not 0 <= rate < 1:
        raise ValueError(f"dropout: expected a rate from 0 up to but not 1, got {rate}")
    return max(1, round((1 - rate) * 65536))


def philox_ref(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 on int64 tensors that hold 32-bit words: four words of counter, two of key -> four words."""
    word = 0xFFFFFFFF

    def product(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:  # (high, low) 32 bits of x * factor; no product here passes 2^48
        low, high = x * (factor & 0xFFFF), x * (factor >> 16)
        return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & word

    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        (h0, l0), (h2, l2) = product(c0, 0xD2511F53), product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = h2 ^ c1 ^ k0, l2, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    return c0, c1, c2, c3


def keep_mask(rows: int, columns: int, rate: float, seed: Tensor, site: int) -> Tensor:
    """bool [rows, columns]: what is kept. seed int64 [1]."""
    blocks, word = -(-columns // LANES), 0xFFFFFFFF
    n = torch.arange(rows * blocks, device=seed.device)
    zero = torch.zeros_like(n)
    words = torch.stack(philox_ref((n & word, n >> 32, zero + ((seed >> 32) & word), zero), (zero + (seed & word), zero + site)), -1)  # [rows * blocks, 4]
    bits = torch.cat([words & 0xFFFF, words >> 16], -1)  # [rows * blocks, 8], an element a lane
    return (bits < threshold_of(rate)).view(rows, blocks * LANES)[:, :columns]


def dropout_ref(x: Tensor, rate: float, seed: Tensor, site: int) -> Tensor:
    """x [T, D] -> [T, D]; the specification. Differentiable, any dtype."""
    return torch.where(keep_mask(*x.shape, rate, seed, site), x * (65536 / threshold_of(rate)), 0.0)
