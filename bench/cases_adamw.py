"""AdamW alone: of a module's values in one flat tensor, and of a whole base with its gradients' clipping; beside torch's fused AdamW.

What it adds over cases_kernels.py: optimizers. A CUDA graph holds what of a step is the device's; the rates come from the host.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter

from peftdebias.encoder import Model
from peftdebias.optimizer import AdamWOfManyRef, FlatAdamW, WholeAdamW, adamw_ref

from .case import Provider, Setting, Work
from .cases_kernels import drawn, fused, op_case

LR = 1e-3


def parameters_of(setting: Setting, shapes: list[torch.Size]) -> list[Parameter]:
    """Parameters of these shapes, each with a gradient."""
    parameters = [Parameter(drawn(setting, True, seed=i, shape=shape)) for i, shape in enumerate(shapes)]
    for i, p in enumerate(parameters):
        p.grad = drawn(setting, True, 0.01, 1000 + i, shape=p.shape)
    return parameters


def library(setting: Setting, groups: list[dict]) -> torch.optim.AdamW:
    one_kernel = setting.precision != "float64"
    return torch.optim.AdamW(groups, lr=LR, weight_decay=0.0, fused=one_kernel, capturable=one_kernel and setting.device.type == "cuda")


def adamw(form: str) -> Callable[[Setting], Work]:
    """x: values in all, in 146 vectors as BERT-base's sparse module has them. form: torch, flat (adamw_ref) or fused."""
    def build(setting: Setting) -> Work:
        shapes = [torch.Size([len(part)]) for part in torch.arange(int(setting.x)).tensor_split(146)]

        def made():
            groups = [{"params": parameters_of(setting, shapes)}]
            return groups, library(setting, groups) if form == "torch" else FlatAdamW(groups, LR, adamw_ref if form == "flat" else fused("adamw", adamw_ref, setting))

        _, optimizer = made()

        def results() -> dict[str, Tensor]:
            (group,), fresh = made()
            for _ in range(3):
                fresh.step()
            return {"values": torch.cat([p.detach() for p in group["params"]])}

        return Work(optimizer.step, results, roof=((0.0, 7.0 * 4 * setting.x),), limit="the gradients are gathered into one tensor first",
                    capture=None if form == "torch" else optimizer.apply, extra={"setting": f"{int(setting.x)} values in {len(shapes)} vectors, float32"})

    return build


def whole_adamw(form: str) -> Callable[[Setting], Work]:
    """x: layers of a base, whose gradients are clipped and whose weights are updated. form: torch, plain (AdamWOfManyRef) or fused."""
    def build(setting: Setting) -> Work:
        with torch.device("meta"):
            shapes = [p.shape for p in Model(dataclasses.replace(setting.config, layers=int(setting.x))).parameters()]

        def made():
            parameters = parameters_of(setting, shapes)
            groups = [{"params": [p for p in parameters if (p.dim() > 1) == matrices], "weight_decay": 0.1 * matrices} for matrices in (True, False)]
            if form == "torch":
                return parameters, library(setting, groups), torch.nn.utils.clip_grad_norm_
            optimizer = WholeAdamW(groups, LR, AdamWOfManyRef if form == "plain" else fused("adamw_of_many", AdamWOfManyRef, setting))
            return parameters, optimizer, optimizer.clip

        parameters, optimizer, clip = made()

        def results() -> dict[str, Tensor]:
            own, fresh, clip_own = made()
            for _ in range(3):
                clip_own(own, 1.0)
                fresh.step()
            return {"values": torch.cat([p.detach().flatten() for p in own])}

        values = sum(shape.numel() for shape in shapes)
        return Work(lambda: (clip(parameters, 1.0), optimizer.step()), results, roof=((0.0, 4.0 * values), (0.0, 28.0 * values)),
                    limit="the norm of all gradients is there before the first is used", capture=None if form == "torch" else lambda: (clip(parameters, 1.0), optimizer.apply()),
                    extra={"setting": f"{values} values in {len(shapes)} tensors, float32, their gradients' norm at most 1"})

    return build


ADAMW_CASES = {case.name: case for case in (
    op_case("sparse_adamw", "AdamW of a sparse module's values", "values", (100_000,), {
        "torch.optim.AdamW, fused": Provider(adamw("torch")), "flat, plain torch": Provider(adamw("flat")), "peftdebias": Provider(adamw("fused"), kernels=("adamw",))}, "forward"),
    op_case("whole_adamw", "clipping and AdamW of a whole base", "layers", (2,), {
        "torch, fused": Provider(whole_adamw("torch")), "plain torch": Provider(whole_adamw("plain")), "peftdebias": Provider(whole_adamw("fused"), kernels=("adamw_of_many",))},
        "forward"),
)}
