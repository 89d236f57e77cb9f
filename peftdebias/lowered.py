"""Frozen matrices in bf16 while a bf16 training runs: half their memory, and no cast of every weight in every step, as autocast does with what is float32.

What it adds over autocast: it says which tensors may. Linears that are frozen may, for their products are in bf16 anyway, and embeddings, whose rows, and the sum of position
and segment, are then rounded before the first LayerNorm (half as much error again as of float32 tables with a bf16 result); a norm's gain may not, nor a trained parameter,
nor one that a method adds to (W' = W + D starts from the float32 W). The masked-LM's decoder gets the rows of zeros that a GPU's product wants behind it (ops/scores.py), once
instead of in every step.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import Parameter

from .encoder import Model, parameter_at
from .errors import AdapterError
from .ops.linear import bf16_products, rounding_once
from .ops.scores import narrow, widen

BF16_PRODUCTS = "bf16 products"
"""What --precision bf16 is on a CPU."""


def may_be_lowered(model: Model) -> list[Parameter]:
    """The frozen float32 parameters of linears and embeddings that no method adds to and no merge replaced."""
    hooks, taken = model.encoder.hooks, set()
    for method in model.methods.values():
        for site in method.sites(model.config):
            with contextlib.suppress(AdapterError):  # a place that is no parameter: a block, a prefix
                taken.add(id(parameter_at(model, site)[1]))
    taken |= {id(parameter) for parameter, _, _ in (hooks.merged.tensors if hooks.merged else ())}
    found = [p for module in model.modules() if isinstance(module, nn.Linear | nn.Embedding) for p in module.parameters(recurse=False)]
    return [p for p in dict.fromkeys(found) if not p.requires_grad and p.dtype == torch.float32 and id(p) not in taken]


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """The context of a pass in "bf16" (torch's autocast, without which bf16 matrices and float32 biases do not go together), in BF16_PRODUCTS (vectors and matrices stay
    float32, so that a CPU's kernels take them, and are rounded for products) or in "float32" (none)."""
    if precision == BF16_PRODUCTS:
        return bf16_products()
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def rounded_beforehand(model: Model, precision: str) -> contextlib.AbstractContextManager:
    """The context of a whole training, around its passes under `autocast`: what they would all round alike is rounded once."""
    return {"bf16": lambda: lowered(model), BF16_PRODUCTS: rounding_once}.get(precision, contextlib.nullcontext)()


@contextlib.contextmanager
def answering(device: torch.device, precision: str, kept: dict | None = None) -> Iterator[None]:
    """The context of passes that train nothing, in `autocast`'s precisions. kept: as ops.linear.rounding_once has it."""
    with rounding_once(trained=True, kept=kept) if precision == BF16_PRODUCTS else contextlib.nullcontext(), autocast(device, precision):
        yield


@contextlib.contextmanager
def lowered(model: Model) -> Iterator[None]:
    """Inside the `with` block those parameters hold bf16, for passes under `autocast`; behind it the very tensors that they held, kept on the host meanwhile where the
    model is on a GPU."""
    kept = [(p, p.data.cpu()) for p in may_be_lowered(model)]
    decoder = model.mlm_decoder()[0] if model.mlm is not None else None
    try:
        for p, _ in kept:
            p.data = p.data.to(torch.bfloat16)
            if p is decoder:
                widen(p)
        yield
    finally:
        for p, before in kept:
            narrow(p)
            p.data = before.to(p.device)
