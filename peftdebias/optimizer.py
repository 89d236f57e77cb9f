"""AdamW whose step can be captured in a CUDA graph. Loshchilov and Hutter 2019, arXiv 1711.05101.

What it adds over torch.optim.AdamW: FlatAdamW, in which the parameters of a group are views of one tensor, so that a step is one launch however many they are (a
sparse module has one vector a site, 146 on BERT-base); and the two halves of a step, `advance` (the host's: which step, which rate) and `apply` (the device's), the
same for both classes. It leaves out what the loop here does not use: amsgrad, maximize, closures. The kernels:
kernels/fused/sparse.py, csrc/ops.cpp.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .batches import send
from .ops import compiled


def rates_at(step: int, lr: float, betas: tuple[float, float], decay: float) -> list[float]:
    """What of the formula changes from step to step: (1 - lr decay, lr / (1 - b1^t), sqrt(1 - b2^t)). step counts from 1."""
    return [1 - lr * decay, lr / (1 - betas[0] ** step), (1 - betas[1] ** step) ** 0.5]


@torch.no_grad()
def adamw_ref(values: Tensor, gradient: Tensor, first: Tensor, second: Tensor, rates: Tensor, *, betas: tuple[float, float], epsilon: float) -> None:
    """One step of torch.optim.AdamW's formula on flat tensors [n], in place on values, first and second; the specification. rates [3]: see rates_at."""
    (b1, b2), (kept, rate, root) = betas, rates.unbind()
    values.mul_(kept)
    first.lerp_(gradient, 1 - b1)
    second.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
    values.sub_(first / (second.sqrt() / root + epsilon) * rate)


@compiled.register("adamw")
def adamw_compiled(values: Tensor, gradient: Tensor, first: Tensor, second: Tensor, rates: Tensor, *, betas: tuple[float, float], epsilon: float) -> None:
    """adamw_ref by csrc/ops.cpp, in one pass."""
    tensors = (values, gradient, first, second)
    if not compiled.takes(*tensors, rates) or any(t.shape != values.shape or not t.is_contiguous() for t in tensors):
        return adamw_ref(*tensors, rates, betas=betas, epsilon=epsilon)
    compiled.call("adamw", *(t.data_ptr() for t in (*tensors, rates)), values.numel(), *betas, epsilon, torch.get_num_threads())
    for tensor in (values, first, second):
        torch.autograd.graph.increment_version(tensor)


class FlatAdamW(torch.optim.Optimizer):
    """groups: as torch.optim takes them, the parameters of a group on one device and of one dtype. update: adamw_ref, or what computes it.

    Each parameter's data becomes a view of its group's flat tensor and must stay it. A parameter without a gradient is passed over, as torch does it. The state
    is torch.optim.AdamW's (step, exp_avg, exp_avg_sq by parameter) and can be loaded from it.
    """

    def __init__(self, groups: Iterable[dict], lr: float, update: Callable[..., None] = adamw_ref, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.update, self.flat, self.rates = update, [], []
        for group in self.param_groups:
            values = torch.cat([p.detach().reshape(-1) for p in group["params"]])
            self.flat.append((values, torch.zeros_like(values), torch.zeros_like(values), torch.empty_like(values)))
            self.rates.append(values.new_zeros(3))
            for p, view, first, second in zip(group["params"], *(self._views(group, t) for t in self.flat[-1][:3])):
                p.data = view
                self.state[p] = {"step": 0, "exp_avg": first, "exp_avg_sq": second}

    @staticmethod
    def _views(group: dict, flat: Tensor) -> list[Tensor]:
        return [part.view_as(p) for part, p in zip(flat.split([p.numel() for p in group["params"]]), group["params"])]

    def set_rate(self, lr: float) -> None:
        """The learning rate of the steps to come."""
        for group in self.param_groups:
            group["lr"] = lr

    @property
    def together(self) -> bool:
        """Whether every parameter has a gradient and as many steps as the others of its group: then a step is `advance`, `apply`."""
        return all(p.grad is not None for group in self.param_groups for p in group["params"]) and all(
            len({self.state[p]["step"] for p in group["params"]}) <= 1 for group in self.param_groups)

    def advance(self) -> None:
        """The host's half of a step: counts it, and sends its rates to the device."""
        for group, rates in zip(self.param_groups, self.rates):
            for p in group["params"]:
                self.state[p]["step"] += 1
            if group["params"]:
                rates.copy_(self._rates(group, self.state[group["params"][0]]["step"], rates))

    @torch.no_grad()
    def apply(self) -> None:
        """The device's half."""
        for group, (values, first, second, gradient), rates in zip(self.param_groups, self.flat, self.rates):
            torch.cat([p.grad.reshape(-1) for p in group["params"]], out=gradient)
            self.update(values, gradient, first, second, rates, betas=group["betas"], epsilon=group["eps"])
            torch.autograd.graph.increment_version(group["params"])  # views by `data`: who saved one for a backward hears of it, as with torch's own

    @torch.no_grad()
    def step(self) -> None:
        if self.together:
            self.advance()
            self.apply()
            return
        for group, like in zip(self.param_groups, self.rates):
            for p in group["params"]:  # some have had fewer steps, or have no gradient now
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] += 1
                self.update(p.data.view(-1), p.grad.reshape(-1), state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1), self._rates(group, state["step"], like),
                            betas=group["betas"], epsilon=group["eps"])
                torch.autograd.graph.increment_version(p)

    @staticmethod
    def _rates(group: dict, step: int, like: Tensor) -> Tensor:
        return send(torch.tensor(rates_at(step, group["lr"], group["betas"], group["weight_decay"]), dtype=like.dtype), like.device)

    def load_state_dict(self, state: dict) -> None:
        """Takes a state of this class or of torch.optim.AdamW; the moments are copied into the flat tensors."""
        super().load_state_dict(state)
        for group, (_, first, second, _) in zip(self.param_groups, self.flat):
            for p, *views in zip(group["params"], self._views(group, first), self._views(group, second)):
                loaded = self.state.get(p) or {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                for view, name in zip(views, ("exp_avg", "exp_avg_sq")):
                    view.copy_(loaded[name])
                self.state[p] = {"step": int(loaded["step"]), "exp_avg": views[0], "exp_avg_sq": views[1]}


class LargeAdamW(torch.optim.AdamW):
    """torch's fused AdamW behind the same calls, for a whole base: its tensors are large, so few launches update them anyway. On a GPU step and rate live there."""

    def __init__(self, groups: Iterable[dict], lr: float):
        groups = list(groups)
        device = next((p.device for group in groups for p in group["params"]), torch.device("cpu"))
        there = device.type == "cuda"
        super().__init__(groups, lr=torch.tensor(lr, device=device) if there else lr, fused=True, capturable=there)

    def set_rate(self, lr: float) -> None:
        """The learning rate of the steps to come."""
        for group in self.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    @property
    def together(self) -> bool:
        return True

    def advance(self) -> None:
        """Nothing: the step is counted on the device."""

    def apply(self) -> None:
        self.step()
