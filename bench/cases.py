"""The experiments, one Case each: who does the work (providers), in which sizes, and what must be equal before anything is timed.

What it adds over case.py: the ceilings and the registry; single ops stand in cases_kernels.py, cases_encoder.py, cases_adamw.py, cases_attention.py and cases_native.py, whole
steps in cases_steps.py and cases_sparse.py. A new experiment is a builder a provider and one entry of CASES.

Letters: T tokens, B sequences, S longest sequence, H heads, W head width, R rank.
"""

import torch

from .case import Case, Provider, Setting, Work, output_bound
from .cases_adamw import ADAMW_CASES
from .cases_attention import ATTENTION_CASES
from .cases_encoder import ENCODER_CASES
from .cases_kernels import KERNEL_CASES
from .cases_native import NATIVE_CASES
from .cases_sparse import SPARSE_CASES
from .cases_steps import STEP_CASES


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
    *SPARSE_CASES.values(),
    *ATTENTION_CASES.values(),
    *KERNEL_CASES.values(),
    *ENCODER_CASES.values(),
    *ADAMW_CASES.values(),
    *NATIVE_CASES.values(),
)}
"""name -> Case; the order is that of the tables."""
