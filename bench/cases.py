"""The experiments, one Case each: who does the work (providers), in which sizes, and what must be equal before anything is timed.

What it adds over case.py: the work of attention and the ceilings, and the registry; single ops stand in cases_kernels.py and cases_native.py, whole steps in cases_steps.py. A new
experiment is a builder a provider and one entry of CASES.

Letters: T tokens, B sequences, S longest sequence, H heads, W head width, R rank.
"""

from collections.abc import Callable

import numpy
import torch
from torch import Tensor

from peftdebias.batches import Spans
from peftdebias.ops import attention_padded, attention_ref

from .case import Case, Provider, Setting, Work, autocast, output_bound
from .cases_kernels import KERNEL_CASES
from .cases_native import NATIVE_CASES
from .cases_steps import STEP_CASES
from .texts import random_lengths


# ---------------------------------------------------------------- attention: one layer's, on ragged sequences

def attention_work(setting: Setting, function: Callable) -> Work:
    """Forward and backward on `setting.x` sequences. The index tensors of Spans are made before: all layers of a batch share them."""
    size, random = setting.size, numpy.random.default_rng(setting.seed)
    lengths = tuple(random_lengths(int(setting.x), min(54, size.positions), min(setting.longest, size.positions), random).tolist())
    spans, tokens = Spans.of(lengths, lengths, setting.device), sum(lengths)
    generator = torch.Generator().manual_seed(setting.seed)
    q, k, v, dy = (torch.randn(tokens, size.heads, size.hidden // size.heads, generator=generator).to(setting.device) for _ in range(4))
    for tensor in (q, k, v):
        tensor.requires_grad_()

    def run() -> tuple[Tensor, ...]:
        with autocast(setting):
            y = function(q, k, v, spans)
        return (y.detach(), *torch.autograd.grad(y, (q, k, v), dy.to(y.dtype)))

    words = f"{size.heads} heads x {size.hidden // size.heads}, lengths drawn as for lora_step, no dropout, {setting.precision}; forward and backward"
    names = ("y", "gradient of query", "gradient of key", "gradient of value")
    return Work(run, lambda: dict(zip(names, run())), tokens=tokens, extra={"setting": words, "lengths": lengths})


# ---------------------------------------------------------------- ceilings: what the machine can do at best

def gemm(setting: Setting) -> Work:
    """Square matrix product, in bf16 where the precision is bf16."""
    n, dtype = int(setting.x), torch.bfloat16 if setting.precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, generator=torch.Generator().manual_seed(i)).to(setting.device, dtype) for i in (0, 1))
    out = torch.empty_like(a)
    return Work(lambda: torch.mm(a, b, out=out), dict, flops=2.0 * n ** 3, extra={"setting": f"n x n by n x n, {str(dtype).removeprefix('torch.')}"})


def copy(setting: Setting) -> Work:
    """One tensor into another; bytes read and bytes written both count."""
    source = torch.zeros(int(setting.x * 2 ** 20) // 4, device=setting.device)
    target = torch.empty_like(source)
    return Work(lambda: target.copy_(source), dict, bytes=2.0 * source.numel() * 4, extra={"setting": "float32; bytes read and bytes written both count"})


# ---------------------------------------------------------------- the registry

CASES = {case.name: case for case in (
    Case("gemm", "forward", "ceiling: square matrix product", {"torch": Provider(gemm)}, "n", (1024, 2048), output_bound, sized=False),
    Case("copy", "forward", "ceiling: memory bandwidth", {"torch": Provider(copy)}, "MiB", (256,), output_bound, sized=False),
    *STEP_CASES.values(),
    Case("attention", "full", "attention inside ragged sequences: forward and backward", {
        "attention_ref": Provider(lambda setting: attention_work(setting, attention_ref)),
        "attention_padded": Provider(lambda setting: attention_work(setting, attention_padded)),
    }, "sequences", (4, 16), output_bound),
    *KERNEL_CASES.values(),
    *NATIVE_CASES.values(),
)}
"""name -> Case; the order is that of the tables."""
