"""Bottleneck adapters: a small network behind or beside the blocks of every layer.

    pfeiffer   h' = h + up(f(down(LN(x + h))))    behind the feed-forward block    Pfeiffer et al. 2021, arXiv 2005.00247; f = relu
    houlsby    h' = h + up(f(down(h)))            behind both blocks               Houlsby et al. 2019, arXiv 1902.00751; f = swish
    parallel   h' = h + s up(f(down(x)))          beside the feed-forward block    He et al. 2022, arXiv 2110.04366; f = relu, s = 4

x [T, D] is the block's input, h [T, D] its output before the residual x is added, LN the block's own LayerNorm; the encoder goes on with LN(x + h').
down is [K, D], up [D, K], both with a bias. They are AdapterHub's `seq_bn`, `double_seq_bn` and `par_bn`. Departure: up is zero at the start, so that an
untrained module changes nothing; Houlsby and Pfeiffer draw it near zero.

The room: this file (specification, module), kernels/fused/adapter.py (kernel), tests/test_adapter.py and tests/kernel_checks/check_adapter.py (proof),
bench/cases_kernels.py, bench/cases_steps.py and bench/cases_hub.py (rows).
Left out: adapters of embeddings, invertible ones, fusion of several, dropout inside, LayerNorms of their own, the base's LayerNorms (Houlsby trains them).
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from .. import kernels
from ..kernels.op import first_order
from ..errors import ConfigError
from ..ops import compiled
from ..ops.linear import product
from ..sites import ACTIVATIONS, EncoderConfig, block_sites
from . import Method, finite


def adapter_ref(inputs: Tensor, hidden: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, activation: str,
                scale: float = 1.0) -> Tensor:
    """inputs, hidden [T, D], down [K, D], down_bias [K], up [D, K], up_bias [D], activation a key of ACTIVATIONS -> [T, D]; the specification."""
    return hidden + scale * F.linear(ACTIVATIONS[activation](F.linear(inputs, down, down_bias)), up, up_bias)


# ---------------------------------------------------------------- on a CPU

SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_new": lambda df, z: torch.ops.aten.gelu_backward(df, z, approximate="tanh"),
    "relu": lambda df, z: df * (z > 0),
    "silu": torch.ops.aten.silu_backward,
}
"""activation -> (gradient of f(z), z) -> gradient of z."""


@compiled.register("adapter")
def adapter_compiled(inputs: Tensor, hidden: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, activation: str, scale: float = 1.0) -> Tensor:
    """adapter_ref by library products. Saves inputs and z = inputs down^T + c where the four are trained; else z alone, and for ReLU its signs."""
    parameters = (down, down_bias, up, up_bias)
    if inputs.dim() != 2 or torch.is_autocast_enabled("cpu") or not compiled.takes(inputs, hidden, *parameters):
        return adapter_ref(inputs, hidden, *parameters, activation, scale)
    return _Adapter.apply(inputs, hidden, *parameters, activation, scale)


class _Adapter(torch.autograd.Function):
    """y = h + s (f(z) up^T + e). With dz = s (dy up) f'(z): dx = dz down, dh = dy, ddown = dz^T x, dc = sum dz, dup = s dy^T f(z), de = s sum dy."""

    @staticmethod
    def forward(ctx, inputs, hidden, down, down_bias, up, up_bias, activation, scale):
        z = product(inputs, down, down_bias)
        y = product(ACTIVATIONS[activation](z), up, up_bias).mul_(scale).add_(hidden)
        ctx.activation, ctx.scale = activation, scale
        trained = any(ctx.needs_input_grad[2:6])
        ctx.save_for_backward(inputs if trained else None, z > 0 if activation == "relu" and not trained else z, down, up)
        return y

    @staticmethod
    def backward(ctx, dy):
        first_order("adapter")
        inputs, z, down, up = ctx.saved_tensors
        to_inputs, to_hidden, *to_parameters = ctx.needs_input_grad[:6]
        dz = SLOPES[ctx.activation](product(dy, up.t()).mul_(ctx.scale), z)
        found = [None] * 4
        if any(to_parameters):
            found = [dz.t() @ inputs, dz.sum(0), (dy.t() @ ACTIVATIONS[ctx.activation](z)).mul_(ctx.scale), dy.sum(0).mul_(ctx.scale)]
        return product(dz, down.t()) if to_inputs else None, dy if to_hidden else None, *(g if wanted else None for g, wanted in zip(found, to_parameters)), None, None


# ---------------------------------------------------------------- the module

@dataclasses.dataclass(frozen=True)
class Architecture:
    """blocks: where it stands. reads(hidden, residual, norm): what goes down. activation, scale: f and s, unless chosen otherwise."""

    blocks: tuple[str, ...]
    reads: Callable[[Tensor, Tensor, Callable[..., Tensor]], Tensor]
    activation: str
    scale: float = 1.0


ARCHITECTURES = {
    "pfeiffer": Architecture(("feed_forward",), lambda hidden, residual, norm: norm(hidden, residual), "relu"),
    "houlsby": Architecture(("attention", "feed_forward"), lambda hidden, residual, norm: hidden, "silu"),
    "parallel": Architecture(("feed_forward",), lambda hidden, residual, norm: residual, "relu", scale=4.0),
}


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """architecture: a key of ARCHITECTURES. bottleneck: K >= 1. activation: a key of sites.ACTIVATIONS; it and scale are the architecture's own where None."""

    architecture: str = "pfeiffer"
    bottleneck: int = 16
    activation: str | None = None
    scale: float | None = None

    def __post_init__(self):
        if self.architecture not in ARCHITECTURES:
            raise ConfigError(f"adapter architecture: expected one of {', '.join(ARCHITECTURES)}, got {self.architecture!r}")
        if self.bottleneck < 1:
            raise ConfigError(f"adapter bottleneck: expected at least 1, got {self.bottleneck}")
        for name in ("activation", "scale"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(ARCHITECTURES[self.architecture], name))
        finite("adapter scale", self.scale)
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"adapter activation: expected one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")


class Adapter(Method):
    """Parameters `layers.3.feed_forward.down.weight` [K, D], `.down.bias` [K], `.up.weight` [D, K], `.up.bias` [D] for every block it stands at."""

    name = "adapter"
    Config = AdapterConfig
    size = "bottleneck"

    def __init__(self, config: AdapterConfig, encoder_config: EncoderConfig, generator: torch.Generator | None = None):
        super().__init__(config, encoder_config, generator)
        width, inner = encoder_config.hidden, config.bottleneck
        for site in self.sites(encoder_config):
            self.values[f"{site}.down.weight"] = Parameter(torch.empty(inner, width, dtype=torch.float32).normal_(0, encoder_config.initializer_range, generator=generator))
            self.values[f"{site}.down.bias"] = Parameter(torch.zeros(inner, dtype=torch.float32))
            self.values[f"{site}.up.weight"] = Parameter(torch.zeros(width, inner, dtype=torch.float32))
            self.values[f"{site}.up.bias"] = Parameter(torch.zeros(width, dtype=torch.float32))

    @classmethod
    def parameters_for(cls, config: AdapterConfig, encoder_config: EncoderConfig) -> int:
        width, inner = encoder_config.hidden, config.bottleneck
        return len(block_sites(encoder_config, ARCHITECTURES[config.architecture].blocks)) * (2 * width * inner + inner + width)

    def sites(self, encoder_config: EncoderConfig) -> tuple[str, ...]:
        return block_sites(encoder_config, ARCHITECTURES[self.config.architecture].blocks)

    def block(self, site: str, hidden: Tensor, residual: Tensor, norm: Callable[..., Tensor]) -> Tensor:
        inputs = ARCHITECTURES[self.config.architecture].reads(hidden, residual, norm)
        tensors = (self.values[f"{site}.{name}"] for name in ("down.weight", "down.bias", "up.weight", "up.bias"))
        plain = hidden.dtype == torch.float64  # no kernel takes it
        op = adapter_ref if plain else kernels.choose("adapter", reference=adapter_ref, device=hidden.device)
        return op(inputs, hidden, *tensors, self.config.activation, self.config.scale)
