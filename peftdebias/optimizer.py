"""AdamW whose step can be captured in a CUDA graph. Loshchilov and Hutter 2019, arXiv 1711.05101.

What it adds over torch.optim.AdamW: a step of one launch a group. FlatAdamW, for a module: the parameters of a group are views of one tensor (a sparse module has one
vector a site, 146 on BERT-base). WholeAdamW, for a base on a GPU: they stay where they are. Gradients clipped as the step reads them, on a GPU. And the two halves of a step,
`advance` (the host's: which step, which rate) and `apply` (the device's), the same for all classes here. It leaves out what the loop here does not use: amsgrad, maximize,
closures. The kernels: kernels/fused/adamw.py, csrc/ops.cpp.
"""

import collections
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .batches import send
from .ops import compiled


def rates_at(step: int, lr: float, betas: tuple[float, float], decay: float) -> list[float]:
    """What of the formula changes from step to step: (1 - lr decay, lr / (1 - b1^t), sqrt(1 - b2^t)). step counts from 1."""
    return [1 - lr * decay, lr / (1 - betas[0] ** step), (1 - betas[1] ** step) ** 0.5]


@torch.no_grad()
def adamw_ref(values: Tensor, gradient: Tensor, first: Tensor, second: Tensor, rates: Tensor, factor: Tensor | None = None, *,
              betas: tuple[float, float], epsilon: float) -> None:
    """One step of torch.optim.AdamW's formula on flat tensors [n], in place on values, first and second; the specification. rates [3]: see rates_at. factor [] or None:
    what the gradient is multiplied by first."""
    (b1, b2), (kept, rate, root) = betas, rates.unbind()
    gradient = gradient if factor is None else gradient * factor
    values.mul_(kept)
    first.lerp_(gradient, 1 - b1)
    second.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
    values.sub_(first / (second.sqrt() / root + epsilon) * rate)


@compiled.register("adamw")
def adamw_compiled(values: Tensor, gradient: Tensor, first: Tensor, second: Tensor, rates: Tensor, factor: Tensor | None = None, *,
                   betas: tuple[float, float], epsilon: float) -> None:
    """adamw_ref without a factor by csrc/ops.cpp, in one pass."""
    tensors = (values, gradient, first, second)
    if factor is not None or not compiled.takes(*tensors, rates) or rates.shape != (3,) or not rates.is_contiguous() or any(t.shape != values.shape or not t.is_contiguous() for t in tensors):
        return adamw_ref(*tensors, rates, factor, betas=betas, epsilon=epsilon)
    compiled.call("adamw", *(t.data_ptr() for t in (*tensors, rates)), values.numel(), *betas, epsilon, torch.get_num_threads())
    for tensor in (values, first, second):
        torch.autograd.graph.increment_version(tensor)


MADE = 8  # sets of parameters whose tables WholeAdamW keeps beside those of its groups


class AdamWOfManyRef:
    """adamw_ref on tensors of any shapes, of gradients times a factor [] or None; the specification. values, first, second: as many tensors of each, alike."""

    def __init__(self, values: list[Tensor], first: list[Tensor], second: list[Tensor]):
        self.tensors = values, first, second

    def __call__(self, gradients: list[Tensor], rates: Tensor, factor: Tensor | None, *, betas: tuple[float, float], epsilon: float) -> None:
        for value, gradient, first, second in zip(self.tensors[0], gradients, *self.tensors[1:]):
            adamw_ref(value, gradient, first, second, rates, factor, betas=betas, epsilon=epsilon)

    def captured(self) -> list[Tensor]:
        """What a CUDA graph reads that holds these steps, beside the tensors: nothing."""
        return []


class _AdamW(torch.optim.Optimizer):
    """What FlatAdamW and WholeAdamW share: steps, rates and clipping. A parameter without a gradient is passed over, as torch does it. The state is torch.optim.AdamW's (step,
    exp_avg, exp_avg_sq by parameter) and can be loaded from it. as_read: a step's updates clip the gradients as they read them, by a factor []."""

    def __init__(self, groups: Iterable[dict], lr: float, betas: tuple[float, float], eps: float, as_read: bool):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.as_read, self.factor = as_read, None
        self.rates = [group["params"][0].new_zeros(3, requires_grad=False) for group in self.param_groups]

    def set_rate(self, lr: float) -> None:
        """The learning rate of the steps to come."""
        for group in self.param_groups:
            group["lr"] = lr

    @torch.no_grad()
    def clip(self, parameters: list[Tensor], most: float) -> None:
        """Before a step: the gradients' norm is `most` at most, as by torch.nn.utils.clip_grad_norm_. as_read: they stay as they are, and the next step scales them as it reads
        them; `parameters` are then all that are here."""
        if self.as_read:
            self.factor = (most / (self._norm(parameters) + 1e-6)).clamp(max=1.0)
        else:
            torch.nn.utils.clip_grad_norm_(parameters, most)

    def _norm(self, parameters: list[Tensor]) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def _factor(self) -> Tensor | None:
        """What this step, and none after it, multiplies gradients by."""
        factor, self.factor = self.factor, None
        return factor

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; what was to be clipped is gone."""
        self.factor = None
        super().zero_grad(set_to_none)

    def captured(self) -> list[Tensor]:
        """To be called when the capture of a step is over: makes its replays ready, and gives what they read, for whoever keeps the graph to keep."""
        return []

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
    def step(self) -> None:
        if self.together:
            self.advance()
            self.apply()
        else:
            self.apart()

    @staticmethod
    def _rates(group: dict, step: int, like: Tensor) -> Tensor:
        return send(torch.tensor(rates_at(step, group["lr"], group["betas"], group["weight_decay"]), dtype=like.dtype, device="cpu"), like.device)


class FlatAdamW(_AdamW):
    """groups: as torch.optim takes them, parameters of one dtype, all on one device. update: adamw_ref, or what computes it. as_read: see _AdamW; the gradients are gathered
    as they are clipped, and not once more by the step.

    Each parameter's data becomes a view of its group's flat tensor and must stay it.
    """

    def __init__(self, groups: Iterable[dict], lr: float, update: Callable[..., None] = adamw_ref, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, *,
                 as_read: bool = False):
        super().__init__(groups, lr, betas, eps, as_read)
        self.update, self.flat, self.gathered = update, [], None
        values = [torch.cat([p.detach().reshape(-1) for p in group["params"]]) for group in self.param_groups]
        self.gradient = values[0].new_empty(sum(map(len, values)))  # of all groups, so that it has one norm
        for group, own, gradient in zip(self.param_groups, values, self.gradient.split([len(own) for own in values])):
            self.flat.append((own, torch.zeros_like(own), torch.zeros_like(own), gradient))
            for p, view, first, second in zip(group["params"], *(self._views(group, t) for t in self.flat[-1][:3])):
                p.data = view
                self.state[p] = {"step": 0, "exp_avg": first, "exp_avg_sq": second}

    @staticmethod
    def _views(group: dict, flat: Tensor) -> list[Tensor]:
        return [part.view_as(p) for part, p in zip(flat.split([p.numel() for p in group["params"]]), group["params"])]

    def _gather(self) -> None:
        """All gradients into the flat tensor, unless they are those that lie there already, unchanged."""
        now = [(p.grad, p.grad._version) for group in self.param_groups for p in group["params"]] if self.as_read else None
        if self.gathered is None or any(a is not b or known != version for (a, known), (b, version) in zip(self.gathered, now)):
            for group, (*_, gradient) in zip(self.param_groups, self.flat):
                torch.cat([p.grad.reshape(-1) for p in group["params"]], out=gradient)
        self.gathered = now

    def _norm(self, parameters: list[Tensor]) -> Tensor:
        if any(p.grad is None for group in self.param_groups for p in group["params"]):
            return super()._norm(parameters)
        self._gather()
        return torch.linalg.vector_norm(self.gradient)

    def _factor(self) -> Tensor | None:
        self.gathered = None
        return super()._factor()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As _AdamW's."""
        self.gathered = None  # it holds them
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def apply(self) -> None:
        """The device's half."""
        self._gather()
        factor = self._factor()
        for group, (values, first, second, gradient), rates in zip(self.param_groups, self.flat, self.rates):
            self.update(values, gradient, first, second, rates, factor, betas=group["betas"], epsilon=group["eps"])
            torch.autograd.graph.increment_version(group["params"])  # views by `data`: who saved one for a backward hears of it, as with torch's own

    def apart(self) -> None:
        """A step in which some have no gradient, or have had fewer steps than others."""
        factor = self._factor()
        for group, like in zip(self.param_groups, self.rates):
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] += 1
                self.update(p.data.view(-1), p.grad.reshape(-1), state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1), self._rates(group, state["step"], like),
                            factor, betas=group["betas"], epsilon=group["eps"])
                torch.autograd.graph.increment_version(p)

    def load_state_dict(self, state: dict) -> None:
        """Takes a state of these classes or of torch.optim.AdamW; the moments are copied into the flat tensors."""
        super().load_state_dict(state)
        for group, (_, first, second, _) in zip(self.param_groups, self.flat):
            for p, *views in zip(group["params"], self._views(group, first), self._views(group, second)):
                loaded = self.state.get(p) or {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                for view, name in zip(views, ("exp_avg", "exp_avg_sq")):
                    view.copy_(loaded[name])
                self.state[p] = {"step": int(loaded["step"]), "exp_avg": views[0], "exp_avg_sq": views[1]}


class WholeAdamW(_AdamW):
    """groups: as torch.optim takes them, contiguous parameters of one dtype, all on one device, which must keep their memory. many: AdamWOfManyRef, or what computes it."""

    def __init__(self, groups: Iterable[dict], lr: float, many: Callable = AdamWOfManyRef, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        super().__init__(groups, lr, betas, eps, as_read=True)
        self.many, self.made = many, {}
        self.places = {id(p): p.data_ptr() for group in self.param_groups for p in group["params"]}
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        self.updates = [self._update_of(group["params"]) for group in self.param_groups]

    def _update_of(self, parameters: list[Tensor]) -> Callable:
        """Made once for the same parameters, as its tables are sent to the device then, which waits for it. The groups' own, made first, stay; of others the oldest goes."""
        key, groups = tuple(map(id, parameters)), len(self.param_groups)
        if key not in self.made:
            if len(self.made) >= groups + MADE:
                del self.made[list(self.made)[groups]]
            self.made[key] = self.many([p.data for p in parameters], *([self.state[p][name] for p in parameters] for name in ("exp_avg", "exp_avg_sq")))
        return self.made[key]

    def _gradients(self, parameters: list[Tensor]) -> list[Tensor]:
        """Raises RuntimeError where a parameter has other memory than it had at the start: it would not be trained, and nobody would know."""
        if any(p.data_ptr() != self.places[id(p)] for p in parameters):
            raise RuntimeError("AdamW of a whole base: expected parameters that keep their memory, got one whose `data` was replaced")
        return [p.grad for p in parameters]

    def captured(self) -> list[Tensor]:
        return [table for update in self.updates for table in update.captured()]

    @torch.no_grad()
    def apply(self) -> None:
        """The device's half."""
        factor = self._factor()
        for group, update, rates in zip(self.param_groups, self.updates, self.rates):
            update(self._gradients(group["params"]), rates, factor, betas=group["betas"], epsilon=group["eps"])
            torch.autograd.graph.increment_version(group["params"])  # written through their addresses: who saved one for a backward hears of it, as with torch's own

    def apart(self) -> None:
        """As FlatAdamW's."""
        factor = self._factor()
        for group, like in zip(self.param_groups, self.rates):
            alike = collections.defaultdict(list)  # those that have a gradient now, by how many steps they have had
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["step"] += 1
                    alike[self.state[p]["step"]].append(p)
            for count, some in alike.items():
                self._update_of(some)(self._gradients(some), self._rates(group, count, like), factor, betas=group["betas"], epsilon=group["eps"])
                torch.autograd.graph.increment_version(some)

    def load_state_dict(self, state: dict) -> None:
        """Takes a state of these classes or of torch.optim.AdamW; the moments are copied into those that are here."""
        own = {p: {name: moments[name] for name in ("exp_avg", "exp_avg_sq")} for p, moments in self.state.items()}
        super().load_state_dict(state)
        for p, moments in own.items():
            loaded = self.state.get(p) or {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            for name, moment in moments.items():
                moment.copy_(loaded[name])
            self.state[p] = {"step": int(loaded["step"])} | moments


class LargeAdamW(torch.optim.AdamW):
    """torch's fused AdamW behind the same calls, where no kernel of ours is for it. On a GPU step and rate live there."""

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

    def clip(self, parameters: list[Tensor], most: float) -> None:
        """As _AdamW's."""
        torch.nn.utils.clip_grad_norm_(parameters, most)

    def captured(self) -> list[Tensor]:
        """As _AdamW's."""
        return []

    @property
    def together(self) -> bool:
        return True

    def advance(self) -> None:
        """Nothing: the step is counted on the device."""

    def apply(self) -> None:
        self.step()
