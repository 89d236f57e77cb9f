"""AdamW of all small parameters as one flat update. Loshchilov and Hutter 2019, arXiv 1711.05101.

What it adds over torch.optim.AdamW: the parameters of a group become views of one tensor, so that a step is one launch however many they are (a sparse module has
one vector a site, 146 on BERT-base). It leaves out what the loop here does not use: amsgrad, maximize, closures. The kernels: kernels/fused/sparse.py, csrc/ops.cpp.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .ops import compiled


@torch.no_grad()
def adamw_ref(values: Tensor, gradient: Tensor, first: Tensor, second: Tensor, *, lr: float, betas: tuple[float, float], epsilon: float, decay: float, step: int) -> None:
    """One step of torch.optim.AdamW's formula on flat tensors [n], in place on values, first and second; the specification. step counts from 1."""
    b1, b2 = betas
    values.mul_(1 - lr * decay)
    first.lerp_(gradient, 1 - b1)
    second.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
    root = second.sqrt() / (1 - b2 ** step) ** 0.5
    values.addcdiv_(first, root + epsilon, value=-lr / (1 - b1 ** step))


@compiled.register("adamw")
def adamw_compiled(values: Tensor, gradient: Tensor, first: Tensor, second: Tensor, *, lr: float, betas: tuple[float, float], epsilon: float, decay: float,
                   step: int) -> None:
    """adamw_ref by csrc/ops.cpp, in one pass."""
    tensors, (b1, b2) = (values, gradient, first, second), betas
    if not compiled.takes(*tensors) or any(t.shape != values.shape or not t.is_contiguous() for t in tensors):
        return adamw_ref(*tensors, lr=lr, betas=betas, epsilon=epsilon, decay=decay, step=step)
    compiled.call("adamw", *(t.data_ptr() for t in tensors), values.numel(), lr, b1, b2, epsilon, decay, 1 - b1 ** step, 1 - b2 ** step, torch.get_num_threads())
    for tensor in (values, first, second):
        torch.autograd.graph.increment_version(tensor)


class FlatAdamW(torch.optim.Optimizer):
    """groups: as torch.optim takes them, the parameters of a group on one device and of one dtype. update: adamw_ref, or what computes it.

    Each parameter's data becomes a view of its group's flat tensor and must stay it. A parameter without a gradient is passed over, as torch does it. The state
    is torch.optim.AdamW's (step, exp_avg, exp_avg_sq by parameter) and can be loaded from it.
    """

    def __init__(self, groups: Iterable[dict], lr: float, update: Callable[..., None] = adamw_ref, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.update, self.flat = update, []
        for group in self.param_groups:
            values = torch.cat([p.detach().reshape(-1) for p in group["params"]])
            self.flat.append((values, torch.zeros_like(values), torch.zeros_like(values), torch.empty_like(values)))
            for p, view, first, second in zip(group["params"], *(self._views(group, t) for t in self.flat[-1][:3])):
                p.data = view
                self.state[p] = {"step": 0, "exp_avg": first, "exp_avg_sq": second}

    @staticmethod
    def _views(group: dict, flat: Tensor) -> list[Tensor]:
        return [part.view_as(p) for part, p in zip(flat.split([p.numel() for p in group["params"]]), group["params"])]

    @torch.no_grad()
    def step(self) -> None:
        for group, (values, first, second, gradient) in zip(self.param_groups, self.flat):
            present = [p for p in group["params"] if p.grad is not None]
            for p in present:
                self.state[p]["step"] += 1
            settings = {"lr": group["lr"], "betas": group["betas"], "epsilon": group["eps"], "decay": group["weight_decay"]}
            steps = {self.state[p]["step"] for p in present}
            if len(present) == len(group["params"]) and len(steps) == 1:
                torch.cat([p.grad.reshape(-1) for p in present], out=gradient)
                self.update(values, gradient, first, second, step=steps.pop(), **settings)
                continue
            for p in present:  # some have had fewer steps, or have no gradient now
                state = self.state[p]
                self.update(p.data.view(-1), p.grad.reshape(-1), state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1), step=state["step"], **settings)

    def load_state_dict(self, state: dict) -> None:
        """Takes a state of this class or of torch.optim.AdamW; the moments are copied into the flat tensors."""
        super().load_state_dict(state)
        for group, (_, first, second, _) in zip(self.param_groups, self.flat):
            for p, *views in zip(group["params"], self._views(group, first), self._views(group, second)):
                loaded = self.state.get(p) or {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                for view, name in zip(views, ("exp_avg", "exp_avg_sq")):
                    view.copy_(loaded[name])
                self.state[p] = {"step": int(loaded["step"]), "exp_avg": views[0], "exp_avg_sq": views[1]}
