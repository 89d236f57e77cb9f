"""LoRA, part one of four: W' = W + s B A for all wrapped matrices in one launch, so that every product afterwards is a plain library GEMM.

Contract. lora_write(weights, pieces, dtype) computes lora_write_ref of peftdebias/written.py. weights: matrices W [out, in], contiguous, one dtype (fp32, bf16
or fp16). pieces: (matrix, first row, A [r, in], B [p, r], s): rows first .. first + p of that matrix get s B A added; A and B contiguous, one dtype; the pieces of a
matrix do not overlap, and r may differ from piece to piece. Rows without a piece are copied. Returns the matrices in `dtype`, views of one new buffer: W stays as it is,
the fp32 source of the next step, so that nothing is ever subtracted and no rounding piles up. fp32 arithmetic, one rounding at the end. No gradients: who uses a W'
in a product takes dA and dB from that product (lora_grads.py).

How. A program owns a tile [BO, BI] of one matrix. Which, says a table on the device: `tiles` int32 [N, 3] (segment, row tile, column tile), `segments` int64 [S, 7]
(addresses of W, A, B; offset into the buffer; rows, in, r), `scales` fp32 [S]; a segment is a run of rows with one piece, or none. The tables are made on the host once
for the same addresses and sizes, and kept: the last 16, and for good what a CUDA graph was captured with, whose replays read them. The product is r outer products on the
FMA units: exact fp32, and with r = 8 less work than the memory takes time for.
What limits it: reading W and writing W' (of BERT-base's query, key and value, 21 M values, 85 MB in fp32 and 42 MB in bf16); from some r on the FMA units.

Letters: R rank, BO rows and BI columns of a tile.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import register
from .op import op
from .tiles import DTYPES, Spec, address, capturing, ceil_div, expect, on

TILE = (8, 256)  # BO, BI
TRITON_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
COPIED = -1  # in `places`: no piece


@triton.jit
def write_kernel(tiles, segments, scales, written, W_TYPE: tl.constexpr, A_TYPE: tl.constexpr, ALIGNED: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr):
    """One tile of one matrix. tiles int32 [N, 3], segments int64 [S, 7], scales fp32 [S], written [sum of all out * in]; see the file's first lines.

    ALIGNED: all addresses are multiples of 16 bytes and all row widths of 16 elements, so that loads may be wide.
    """
    tile = tiles + 3 * tl.program_id(0)
    segment = tl.load(tile)
    record = segments + 7 * segment.to(tl.int64)
    source, a, b = address(record, W_TYPE, ALIGNED), address(record + 1, A_TYPE, ALIGNED), address(record + 2, A_TYPE, False)
    offset, height, width, rank = tl.load(record + 3), tl.load(record + 4), tl.load(record + 5), tl.load(record + 6)
    if ALIGNED:
        offset, width = tl.multiple_of(offset, 16), tl.multiple_of(width, 16)
    rows = tl.load(tile + 1).to(tl.int64) * BO + tl.arange(0, BO)
    columns = tl.load(tile + 2).to(tl.int64) * BI + tl.arange(0, BI)
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    places = rows[:, None] * width + columns[None, :]
    value = tl.load(source + places, mask=inside, other=0.0).to(tl.float32)
    change = tl.zeros((BO, BI), tl.float32)
    for k in range(0, rank):  # 0 where the rows are only copied
        left = tl.load(b + rows * rank + k, mask=rows < height, other=0.0).to(tl.float32)
        right = tl.load(a + k * width + columns, mask=columns < width, other=0.0).to(tl.float32)
        change += left[:, None] * right[None, :]
    value += tl.load(scales + segment) * change
    tl.store(written + offset + places, value.to(written.dtype.element_ty), mask=inside)


def specs(arch: int) -> list[Spec]:
    found = []
    for source, result in (("fp32", "bf16"), ("fp32", "fp32"), ("bf16", "bf16")):
        types = {"W_TYPE": tl.float32 if source == "fp32" else tl.bfloat16, "A_TYPE": tl.float32, "ALIGNED": True, "BO": TILE[0], "BI": TILE[1]}
        found.append(Spec(f"write, {source} to {result}", write_kernel, {"tiles": "*i32", "segments": "*i64", "scales": "*fp32", "written": f"*{result}"}, types))
    return found


# ---------------------------------------------------------------- tables

Segment = tuple[int, int, int, int, int, int, int, float]
"""Addresses of W, A, B (0: none), offset, rows, in, r, s."""


def segments_of(weights: list[Tensor], a: list[Tensor], b: list[Tensor], scales: list[float], places: list[int]) -> tuple[Segment, ...]:
    """The rows of every matrix cut into runs with one piece or none. places: (matrix, first row) of every piece, one after the other."""
    found, offset = [], 0
    for m, weight in enumerate(weights):
        out, width = weight.shape
        mine = sorted((places[2 * i + 1], i) for i in range(len(a)) if places[2 * i] == m)
        row = 0

        def run(rows: int, i: int) -> Segment:
            low = (a[i].data_ptr(), b[i].data_ptr()) if i != COPIED else (0, 0)
            return (weight.data_ptr() + row * width * weight.element_size(), *low, offset + row * width, rows, width, 0 if i == COPIED else a[i].shape[0],
                    0.0 if i == COPIED else scales[i])

        for first, i in mine:
            if first > row:
                found.append(run(first - row, COPIED))
                row = first
            found.append(run(b[i].shape[0], i))
            row += b[i].shape[0]
        if row < out:
            found.append(run(out - row, COPIED))
        offset += out * width
    return tuple(found)


@functools.lru_cache(maxsize=16)
def tables(segments: tuple[Segment, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(tiles, segments, scales) on the device. The same addresses and sizes give the same tables, so a training run copies them once."""
    tiles = [(s, i, j) for s, (*_, rows, width, _, _) in enumerate(segments) for i in range(ceil_div(rows, TILE[0])) for j in range(ceil_div(width, TILE[1]))]
    return (torch.tensor(tiles, dtype=torch.int32, device="cpu").to(device), torch.tensor([s[:7] for s in segments], dtype=torch.int64, device="cpu").to(device),
            torch.tensor([s[7] for s in segments], dtype=torch.float32, device="cpu").to(device))


_CAPTURED: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
"""address of the segments' table -> the tables."""


# ---------------------------------------------------------------- launcher and the public function

@op("lora_write", fake=lambda weights, a, b, scales, places, dtype: weights[0].new_empty(sum(w.numel() for w in weights), dtype=dtype))
def _write(weights: list[Tensor], a: list[Tensor], b: list[Tensor], scales: list[float], places: list[int], dtype: torch.dtype) -> Tensor:
    device = weights[0].device
    written = torch.empty(sum(w.numel() for w in weights), dtype=dtype, device=device)
    segments = segments_of(weights, a, b, scales, places)
    aligned = all(n % 16 == 0 for s in segments for n in (s[0], s[1], s[3], s[5]))
    if written.numel():
        tiles, table, factors = made = tables(segments, device)
        if capturing(device):  # replays read them for as long as the process lives: a few dozen KiB a model
            _CAPTURED[table.data_ptr()] = made
        with on(written):
            write_kernel[(len(tiles),)](tiles, table, factors, written, W_TYPE=TRITON_TYPES[weights[0].dtype], A_TYPE=TRITON_TYPES[a[0].dtype], ALIGNED=aligned,
                                        BO=TILE[0], BI=TILE[1], enable_fp_fusion=True)
    return written


@register("lora_write", "triton")
def lora_write(weights: list[Tensor], pieces: list[tuple[int, int, Tensor, Tensor, float]], dtype: torch.dtype) -> list[Tensor]:
    """lora_write_ref in one launch. Raises ValueError on shapes, dtypes, devices or layouts that do not fit, naming the tensor."""
    if not weights or not pieces:
        raise ValueError(f"lora_write: expected at least one matrix and one piece, got {len(weights)} and {len(pieces)}")
    if dtype not in DTYPES:
        raise ValueError(f"lora_write, dtype: expected one of {', '.join(str(d) for d in DTYPES)}, got {dtype}")
    device = weights[0].device
    for m, weight in enumerate(weights):
        _whole(f"W of matrix {m}", weight, (-1, -1), weights[0].dtype, device)
    taken: list[list[range]] = [[] for _ in weights]
    for i, (m, first, a, b, _) in enumerate(pieces):
        _whole(f"A of piece {i}", a, (-1, weights[m].shape[1]), pieces[0][2].dtype, device)
        _whole(f"B of piece {i}", b, (-1, a.shape[0]), pieces[0][2].dtype, device)
        rows = range(first, first + b.shape[0])
        if first < 0 or rows.stop > weights[m].shape[0] or any(rows.start < other.stop and other.start < rows.stop for other in taken[m]):
            raise ValueError(f"lora_write, piece {i}: expected rows of matrix {m} ({weights[m].shape[0]}) that no other piece has, got {first} to {rows.stop}")
        taken[m].append(rows)
    with torch.no_grad():
        flat = _write(weights, [p[2] for p in pieces], [p[3] for p in pieces], [float(p[4]) for p in pieces], [n for p in pieces for n in p[:2]], dtype)
    return [part.view(w.shape) for part, w in zip(flat.split([w.numel() for w in weights]), weights)]


def _whole(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    expect("lora_write", name, tensor, shape, (dtype,) if dtype in DTYPES else tuple(DTYPES), device)
    if not tensor.is_contiguous():
        raise ValueError(f"lora_write, {name}: expected a contiguous tensor, got strides {list(tensor.stride())} for shape {list(tensor.shape)}")
