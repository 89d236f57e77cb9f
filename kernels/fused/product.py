"""The product of two matrices, tile by tile, for kernels that put something of their own before or behind it: lora.py, feed_forward.py. It computes no op.

What limits it: a library's product is hard to match. The loop over the depth leaves one product on its way while the next tiles come, so it must hold nothing else: no conversion,
no second product that waits. Two programs share a multiprocessor, and one multiplies while the other begins or ends.

Letters: T rows of the left factor, K its columns, N columns of the result, BM, BN, BK rows, columns and depth of a tile.
"""

import torch
import triton
import triton.language as tl

from .tiles import dot


@triton.jit
def place(T, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, column tile) of this program: GROUP row tiles go through all columns together, so that both factors stay in L2."""
    down, across = tl.cdiv(T, BM), tl.cdiv(N, BN)
    program = tl.program_id(0)
    first = program // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    inside = program % (GROUP * across)
    return first + inside % height, inside // height


@triton.jit
def wide(left, weight, total, rows, columns, left_stride, K, N, TURNED: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """total fp32 [BM, BN] + a tile of left [T, K] times weight [K, N], or TURNED weight [N, K]^T. left points at the tile's first row, weight at its first column; rows bool [BM]
    and columns [BN]: which are there. EVEN: K is a multiple of BK. Places within a tile are int32: W has fewer than 2^31 elements."""
    r, n = tl.arange(0, BM), tl.arange(0, BN)
    for k in range(0, K, BK):
        depth, across, down = k + tl.arange(0, BK), rows[:, None], columns[None, :]
        if not EVEN:
            across, down = across & (depth < K)[None, :], down & (depth < K)[:, None]
        value = tl.load(left + (r[:, None] * left_stride + depth[None, :]), mask=across, other=0.0)
        if TURNED:
            w = tl.load(weight + (n[None, :] * K + depth[:, None]), mask=down, other=0.0)  # [BK, BN]
        else:
            w = tl.load(weight + (depth[:, None] * N + n[None, :]), mask=down, other=0.0)
        total = dot(value, w, total)
    return total


@triton.jit
def quarters(total):
    """total [BM, BN] -> its four tiles [BM, BN / 4], from left to right: what comes behind a product holds one at a time."""
    left, right = _halves(total)
    first, second = _halves(left)
    third, fourth = _halves(right)
    return first, second, third, fourth


@triton.jit
def _halves(total):
    return tl.split(tl.permute(tl.reshape(total, (total.shape[0], 2, total.shape[1] // 2)), (0, 2, 1)))


def is_regular(depth: int, columns: int, stride: int) -> bool:
    """Whether the left factor [T, depth], `stride` from row to row, W and the result [T, columns] can be read in whole vectors and tiles."""
    return depth % 64 == 0 and columns % 16 == 0 and stride % 16 == 0


def tiles_for(dtype: torch.dtype, regular: bool) -> dict[str, int]:
    """BM, BN, BK, GROUP and how the compiler schedules. regular: see `is_regular`; what is not is read one by one, by addresses that take registers."""
    if dtype == torch.float32:
        return {"BM": 32, "BN": 64 if regular else 32, "BK": 32, "GROUP": 8, "num_warps": 8, "num_stages": 2}
    if not regular:
        return {"BM": 64, "BN": 64, "BK": 32, "GROUP": 8, "num_warps": 8, "num_stages": 2}
    return {"BM": 128, "BN": 128, "BK": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3}
