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
from ..errors import ConfigError
from ..sites import ACTIVATIONS, EncoderConfig, block_sites
from . import Method


def adapter_ref(inputs: Tensor, hidden: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, activation: str,
                scale: float = 1.0) -> Tensor:
    """inputs, hidden [T, D], down [K, D], down_bias [K], up [D, K], up_bias [D], activation a key of ACTIVATIONS -> [T, D]; the specification."""
    return hidden + scale * F.linear(ACTIVATIONS[activation](F.linear(inputs, down, down_bias)), up, up_bias)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """blocks: where it stands. reads(hidden, residual, norm): what goes down. activation, scale: f and s, unless chosen otherwise."""

    blocks: tuple[str, ...]
    reads: Callable[[Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor]
    activation: str
    scale: float = 1.0


ARCHITECTURES = {
    "pfeiffer": Architecture(("feed_forward",), lambda hidden, residual, norm: norm(hidden + residual), "relu"),
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
            self.values[f"{site}.down.weight"] = Parameter(torch.empty(inner, width).normal_(0, encoder_config.initializer_range, generator=generator))
            self.values[f"{site}.down.bias"] = Parameter(torch.zeros(inner))
            self.values[f"{site}.up.weight"] = Parameter(torch.zeros(width, inner))
            self.values[f"{site}.up.bias"] = Parameter(torch.zeros(width))

    @classmethod
    def parameters_for(cls, config: AdapterConfig, encoder_config: EncoderConfig) -> int:
        width, inner = encoder_config.hidden, config.bottleneck
        return len(block_sites(encoder_config, ARCHITECTURES[config.architecture].blocks)) * (2 * width * inner + inner + width)

    def sites(self, encoder_config: EncoderConfig) -> tuple[str, ...]:
        return block_sites(encoder_config, ARCHITECTURES[self.config.architecture].blocks)

    def block(self, site: str, hidden: Tensor, residual: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
        inputs = ARCHITECTURES[self.config.architecture].reads(hidden, residual, norm)
        tensors = (self.values[f"{site}.{name}"] for name in ("down.weight", "down.bias", "up.weight", "up.bias"))
        plain = hidden.dtype == torch.float64  # no kernel takes it
        op = adapter_ref if plain else kernels.choose("adapter", reference=adapter_ref, device=hidden.device)
        return op(inputs, hidden, *tensors, self.config.activation, self.config.scale)
