"""Linears whose one method gives a thin delta s B A: the product with W is one library GEMM, Q, K, V together, whichever of them have a delta.

Two ways, the same map as the unmerged product of methods/lora.py, which is the path where neither is there.
*Written*: W' = W + s B A once a forward pass, where a kernel writes all matrices in one launch (kernels/fused/lora_write.py: CUDA).
*Apart*, on a CPU: W stays, and s (x A^T) B^T is added in place to the product's columns. Two thin products more a linear, and no second copy of the weights.

What it adds over encoder.py: which linears those are, the plain twins of the ops, and a weight that knows its pieces.

Left to the hooks: a linear with dropout, a scale, a dense delta or more than one method, one whose bias a method touches, one whose W is trained (its gradient is not
taken here), and float64. Nothing is kept between passes: what A and B hold now is what is written.

Letters: T tokens, D hidden.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels
from .kernels import dispatch
from .kernels.op import first_order
from .ops import compiled, linear
from .ops.linear import in_bf16, product, product_dtype
from .sites import Hooks

UNWRITTEN = (torch.float64,)  # no kernel takes it
Piece = tuple[int, Tensor, Tensor, float]
"""(first row, A [r, in], B [p, r], s): s B A belongs to rows first .. first + p of a weight."""


@torch.no_grad()
def lora_write_ref(weights: list[Tensor], pieces: list[tuple[int, int, Tensor, Tensor, float]], dtype: torch.dtype) -> list[Tensor]:
    """New tensors W' in `dtype`; the specification. pieces: (which of the weights, first row, A, B, s); rows that no piece names are copied."""
    written = [weight.clone() for weight in weights]
    for m, first, a, b, scale in pieces:
        written[m][first:first + len(b)] += scale * (b @ a).to(written[m].dtype)
    return [weight.to(dtype) for weight in written]


def lora_written_ref(x: Tensor, written: Tensor, bias: Tensor | None, pieces: list[Piece]) -> Tensor:
    """x W'^T + bias, where W' holds the pieces already; the specification. A and B get the gradients of the unmerged product, W' none."""
    y = F.linear(x, written.detach(), bias)
    for first, a, b, scale in pieces:
        low = scale * F.linear(F.linear(x.detach(), a), b)
        y = y + F.pad(low - low.detach(), (first, y.shape[1] - first - len(b)))  # the number 0, with gradients
    return y


def lora_apart_ref(x: Tensor, weight: Tensor, bias: Tensor | None, pieces: list[Piece]) -> Tensor:
    """x W^T + bias, and s (x A^T) B^T in each piece's columns; the specification."""
    y = F.linear(x, weight, bias)
    for first, a, b, scale in pieces:
        y = y + F.pad(scale * F.linear(F.linear(x, a), b), (first, y.shape[1] - first - len(b)))
    return y


@dataclasses.dataclass(eq=False, repr=False)  # torch.compile makes one without its values, which comparing or printing would ask for
class Written:
    """weight: W' [out, in] in the dtype of the products, or W itself where the pieces stay `apart`; bias [out]; pieces: what of it has gradients."""

    weight: Tensor
    bias: Tensor
    pieces: list[Piece]
    apart: bool = False

    def __call__(self, x: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """x [T, in] -> [T, last - first]: the product with rows first .. last. A piece lies inside them or outside."""
        x, weight, bias = x.to(self.weight.dtype), self.weight[first:last], self.bias[first:last].to(self.weight.dtype)
        inside = [(row - first, a, b, s) for row, a, b, s in self.pieces if first <= row < first + len(weight)]
        if not inside:
            return linear(x, weight, bias)
        if self.apart:
            return kernels.choose("lora_apart", reference=lora_apart_ref, device=x.device)(x, weight, bias, inside)
        return kernels.choose("lora_written", reference=lora_written_ref, device=x.device)(x, weight, bias, inside)


def write(hooks: Hooks, linears: dict[str, tuple[nn.Linear, tuple[str, ...]]], x: Tensor) -> dict[str, Written]:
    """Name -> Written for those of `linears` that can be written and for which dispatch.py picks that.

    linears: name -> (linear, the sites that its rows are divided among, equally). x [T, ...]: what the encoder is about to compute on, for its size, dtype, device.
    """
    if not hooks.methods or x.dtype in UNWRITTEN:
        return {}
    there = kernels.decide("lora_write", x.device)[0] is not None  # None: asked for by name a kind that has none
    op = kernels.choose("lora_write", reference=lora_write_ref, device=x.device) if there else lora_write_ref
    if op is lora_write_ref:
        if kernels.decide("lora_apart", x.device)[0] != "native" or torch.is_autocast_enabled(x.device.type):
            return {}
        return {name: Written(linear.weight, linear.bias, pieces, apart=True) for name, (linear, sites) in linears.items() if (pieces := pieces_of(hooks, linear, sites))}
    dtype = product_dtype(x)
    found = {name: pieces for name, (linear, sites) in linears.items() if (pieces := pieces_of(hooks, linear, sites)) and _pays(linear, pieces, dtype, x)}
    if not found:
        return {}
    flat = [(m, *piece) for m, pieces in enumerate(found.values()) for piece in pieces]
    weights = op([linears[name][0].weight for name in found], flat, dtype)
    return {name: Written(weight, linears[name][0].bias, pieces) for (name, pieces), weight in zip(found.items(), weights)}


def pieces_of(hooks: Hooks, linear: nn.Linear, sites: tuple[str, ...]) -> list[Piece]:
    """The thin deltas of a linear; empty where there is none, or something that W' cannot say (see the file's first lines)."""
    if linear.weight.requires_grad and torch.is_grad_enabled():
        return []
    height, pieces = linear.weight.shape[0] // len(sites), []
    for i, site in enumerate(sites):
        if hooks.at(site + ".bias"):
            return []
        methods = hooks.at(site)
        thin = [method.low_rank(site) for method in methods]
        if len(methods) > 1 or None in thin:
            return []
        pieces += [(i * height, a, b, scale) for a, b, scale in thin]
    return pieces


def _pays(linear: nn.Linear, pieces: list[Piece], dtype: torch.dtype, x: Tensor) -> bool:
    _, a, b, _ = pieces[0]
    return dispatch.pick("lora_linear", dispatch.FORMS["lora_linear"], device=x.device, dtype=dtype, dropout=False, rows=x.shape[0], inside=linear.weight.shape[1],
                         outside=len(b), rank=len(a)) == "written"


# ---------------------------------------------------------------- apart, on a CPU

@compiled.register("lora_apart")
def lora_apart(x: Tensor, weight: Tensor, bias: Tensor | None, pieces: list[Piece]) -> Tensor:
    """lora_apart_ref by library products alone, the thin ones of all pieces together. Saves x and x A^T where A or B is trained, else neither."""
    a, b = [piece[1] for piece in pieces], [piece[2] for piece in pieces]
    if x.dim() != 2 or weight.requires_grad or torch.is_autocast_enabled("cpu") or not compiled.takes(x, weight, bias, *a, *b):
        return lora_apart_ref(x, weight, bias, pieces)
    return _Apart.apply(x, weight, bias, [piece[0] for piece in pieces], [piece[3] for piece in pieces], *a, *b)


class _Apart(torch.autograd.Function):
    """y = x W^T + bias, its columns of piece i += s_i u_i B_i^T with u = x A^T, A all pieces' [R, in] and u_i their own columns of u.

    With v_i = s_i dy_i B_i: dx = dy W + v A, dA = v^T x, dB_i = s_i dy_i^T u_i.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, firsts, scales, *thin):
        a, b = torch.cat(thin[:len(firsts)]), thin[len(firsts):]
        ctx.bf16 = in_bf16(x, weight, bias)
        y, u = product(x, weight, bias, ctx.bf16), product(x, a)
        for first, scale, up, low in zip(firsts, scales, b, u.split([up.shape[1] for up in b], 1)):
            y[:, first:first + len(up)].addmm_(low, up.t(), alpha=scale)
        trained = any(ctx.needs_input_grad[5:])
        ctx.firsts, ctx.scales = firsts, scales
        ctx.save_for_backward(x if trained else None, u if trained else None, weight, a, *b)
        return y

    @staticmethod
    def backward(ctx, dy):
        first_order("lora_apart")
        x, u, weight, a, *b = ctx.saved_tensors
        to_x, _, to_bias, _, _, *to_thin = ctx.needs_input_grad
        ranks, trained = [up.shape[1] for up in b], any(to_thin)
        v, db = dy.new_empty(len(dy), len(a)), []
        for i, (first, scale, up, low) in enumerate(zip(ctx.firsts, ctx.scales, b, v.split(ranks, 1))):
            mine = dy[:, first:first + len(up)]
            low.copy_(((scale * up).t() @ mine.t()).t())
            db.append((u.split(ranks, 1)[i].t() @ mine).t().mul_(scale) if trained else None)
        dx = product(dy, weight.t(), bf16=ctx.bf16).addmm_(v, a) if to_x else None
        da = (v.t() @ x).split(ranks) if trained else [None] * len(b)
        return dx, None, dy.sum(0) if to_bias else None, None, None, *da, *db
