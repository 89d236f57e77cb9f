"""The specification of dropout.py in plain torch: the bits, the mask, the op. It needs no Triton; the plain twins of other ops that drop build on it.

What the bits are stands in dropout.py. csrc and Triton draw the same mask from the same seed and site.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LANES = 8  # elements that one Philox call serves


class Drop(NamedTuple):
    """Dropout at one place of a model: rate in [0, 1); seed int64 [1] on the tensors' device; site in [0, 2^31), which place."""

    rate: float
    seed: Tensor
    site: int

    @property
    def scale(self) -> float:
        """1 / q, q the share of elements that is kept on average: what a kept element is multiplied by."""
        return 65536 / threshold_of(self.rate)


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


def _keep(first: Tensor, second: Tensor, fourth: Tensor, rate: float, seed: Tensor, site: int) -> Tensor:
    """bool [n, LANES]: what is kept, an element a lane, of the counters (first, second, the seed's high half, fourth), each int64 [n]."""
    word, zero = 0xFFFFFFFF, torch.zeros_like(first)
    words = torch.stack(philox_ref((first, second, zero + ((seed >> 32) & word), fourth), (zero + (seed & word), zero + site)), -1)  # [n, 4]
    return torch.cat([words & 0xFFFF, words >> 16], -1) < threshold_of(rate)


def keep_mask(rows: int, columns: int, rate: float, seed: Tensor, site: int) -> Tensor:
    """bool [rows, columns]: what is kept. seed int64 [1]."""
    blocks = -(-columns // LANES)
    n = torch.arange(rows * blocks, device=seed.device)
    return _keep(n & 0xFFFFFFFF, n >> 32, torch.zeros_like(n), rate, seed, site).view(rows, blocks * LANES)[:, :columns]


def attention_keep(queries: Tensor, shared: int, keys: int, heads: int, drop: Drop) -> Tensor:
    """bool [H, q, shared + keys]: which probabilities are kept. queries int64 [q]: the packed query rows; shared: keys of a prefix, before a sequence's own `keys`.

    The counter of a key's block: (its place // 8, counted from 0 in the prefix or in the sequence; the query's row; the seed's high half; 1 + 2 head, one more
    for a prefix). So the bits depend on nothing but the row, the head and the key's place, whatever else is in the batch.
    """
    def block(count: int, fourth: int) -> Tensor:
        blocks = -(-count // LANES)
        head, row, place = torch.meshgrid(torch.arange(heads, device=queries.device), queries, torch.arange(blocks, device=queries.device), indexing="ij")
        kept = _keep(place.flatten(), row.flatten(), fourth + 2 * head.flatten(), drop.rate, drop.seed, drop.site)
        return kept.view(heads, len(queries), blocks * LANES)[..., :count]

    return torch.cat([block(shared, 2), block(keys, 1)], -1)


def dropout_ref(x: Tensor, rate: float, seed: Tensor, site: int) -> Tensor:
    """x [T, D] -> [T, D]; the specification. Differentiable, any dtype."""
    return torch.where(keep_mask(*x.shape, rate, seed, site), x * (65536 / threshold_of(rate)), 0.0)
