"""W' = W + s B A, written once a forward pass for all linears whose one method gives a thin delta; every product is then a plain library GEMM, and Q, K, V are one.

What it adds over encoder.py: which linears those are, the plain twins of the two ops, and a weight that knows its pieces. It is used where there is a kernel that
writes all matrices in one launch (kernels/fused/lora_write.py: CUDA); elsewhere the unmerged product of methods/lora.py is the path, which is the same map.

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


@dataclasses.dataclass(frozen=True)
class Written:
    """weight: W' [out, in] in the dtype of the products; bias [out]; pieces: what of it has gradients."""

    weight: Tensor
    bias: Tensor
    pieces: list[Piece]

    def __call__(self, x: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """x [T, in] -> [T, last - first]: the product with rows first .. last. A piece lies inside them or outside."""
        x, weight, bias = x.to(self.weight.dtype), self.weight[first:last], self.bias[first:last].to(self.weight.dtype)
        inside = [(row - first, a, b, s) for row, a, b, s in self.pieces if first <= row < first + len(weight)]
        if not inside:
            return F.linear(x, weight, bias)
        return kernels.choose("lora_written", reference=lora_written_ref, device=x.device)(x, weight, bias, inside)


def write(hooks: Hooks, linears: dict[str, tuple[nn.Linear, tuple[str, ...]]], x: Tensor) -> dict[str, Written]:
    """Name -> Written for those of `linears` that can be written and for which dispatch.py picks that.

    linears: name -> (linear, the sites that its rows are divided among, equally). x [T, ...]: what the encoder is about to compute on, for its size, dtype, device.
    """
    op = kernels.choose("lora_write", reference=lora_write_ref, device=x.device)
    if op is lora_write_ref or not hooks.methods or x.dtype in UNWRITTEN:
        return {}
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
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
