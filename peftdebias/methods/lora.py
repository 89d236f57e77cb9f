"""LoRA: a low-rank update of chosen linears. Hu et al. 2021, arXiv 2106.09685, equation 3.

    y = x W^T + b + s (dropout(x) A^T) B^T        s = alpha / r, or alpha / sqrt(r) where rank-stabilised (Kalajdzievski 2023, arXiv 2312.03732)

x [T, in], W [out, in] frozen, A [r, in] drawn, B [out, r] zero at the start: an untrained module changes nothing. Without dropout the same map is
y = x (W + s B A)^T + b: mergeable and foldable. Dropout acts while the module is trained, and only then; a frozen module never drops.

The room: this file (specification, module), written.py (W' = W + s B A once a pass, or the pieces beside one product), kernels/fused/lora_write.py, lora_thin.py, lora.py and lora_grads.py (Triton), tests/test_lora.py,
tests/test_written.py and tests/kernel_checks/check_lora.py (proof), bench/cases_kernels.py, cases_native.py and cases_steps.py (rows).
Left out: embeddings, biases trained beside it (methods/bias.py is a module of its own), ranks that differ from site to site.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from .. import kernels
from ..errors import ConfigError
from ..kernels.dropout_ref import dropout_ref
from ..ops import linear
from ..sites import EncoderConfig, drop_places, linear_shape, linear_sites
from . import Method, linear_kinds


def lora_linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, rate: float = 0.0, seed: Tensor | None = None,
                    site: int = 0) -> Tensor:
    """x [T, in], weight [out, in], bias [out], a [r, in], b [out, r] -> [T, out]; the specification. rate, seed, site: dropout of the update's x
    (kernels/fused/dropout.py says which bits)."""
    z = dropout_ref(x, rate, seed, site) if rate else x
    return linear(x, weight, bias) + scale * F.linear(F.linear(z, a), b)


def lora_grads_ref(x: Tensor, dy: Tensor, a: Tensor, b: Tensor, scale: float, rate: float = 0.0, seed: Tensor | None = None, site: int = 0) -> tuple[Tensor, Tensor]:
    """(dA [r, in], dB [out, r]) of lora_linear_ref for its output's gradient dy [T, out]."""
    z = dropout_ref(x, rate, seed, site) if rate else x
    return scale * ((dy @ b).t() @ z), scale * (dy.t() @ F.linear(z, a))


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """rank: r >= 1. targets: which linears of every layer, of sites.LINEARS or their last part. dropout: in [0, 1), on the update's x.

    alpha: more than 0; None is 2 * rank, so that s = 2; rank-stabilised it is 16, whatever the rank: s falls as 1 / sqrt(r) only if alpha stays.
    """

    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ("query", "value")
    rank_stabilized: bool = False
    dropout: float = 0.0

    def __post_init__(self):
        if self.rank < 1:
            raise ConfigError(f"lora rank: expected at least 1, got {self.rank}")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ConfigError(f"lora alpha: expected a finite number of more than 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora dropout: expected a share from 0 up to but not 1, got {self.dropout}")
        if not self.targets:
            raise ConfigError("lora targets: expected at least one linear, got none")
        object.__setattr__(self, "targets", linear_kinds(self.targets, "lora targets"))

    @property
    def scale(self) -> float:
        """s."""
        if self.rank_stabilized:
            return (16.0 if self.alpha is None else self.alpha) / math.sqrt(self.rank)
        return 2.0 if self.alpha is None else self.alpha / self.rank


class LoRA(Method):
    """A and B for every target; parameters `layers.3.attention.query.a` [r, in] and `.b` [out, r]."""

    name = "lora"
    Config = LoRAConfig
    mergeable = True
    foldable = True
    size = "rank"

    def __init__(self, config: LoRAConfig, encoder_config: EncoderConfig, generator: torch.Generator | None = None):
        super().__init__(config, encoder_config, generator)
        self.places = drop_places(encoder_config)
        for site in self.sites(encoder_config):
            out_width, in_width = linear_shape(encoder_config, site)
            bound = 1.0 / math.sqrt(in_width)  # Kaiming uniform with a = sqrt(5), as the authors' code draws A
            self.values[site + ".a"] = Parameter(torch.empty(config.rank, in_width, dtype=torch.float32).uniform_(-bound, bound, generator=generator))
            self.values[site + ".b"] = Parameter(torch.zeros(out_width, config.rank, dtype=torch.float32))

    @classmethod
    def parameters_for(cls, config: LoRAConfig, encoder_config: EncoderConfig) -> int:
        return config.rank * sum(sum(linear_shape(encoder_config, site)) for site in linear_sites(encoder_config, config.targets))

    def sites(self, encoder_config: EncoderConfig) -> tuple[str, ...]:
        return linear_sites(encoder_config, self.config.targets)

    @property
    def drops(self) -> bool:
        return self.training and self.config.dropout > 0 and any(p.requires_grad for p in self.values.values())  # a frozen module is as it is

    def linear(self, site: str, x: Tensor, weight: Tensor, bias: Tensor, seed: Tensor | None = None) -> Tensor:
        product = lora_linear_ref if x.dtype == torch.float64 else kernels.choose("lora_linear", reference=lora_linear_ref, device=x.device)
        thin = self.values[site + ".a"], self.values[site + ".b"], self.config.scale
        drop = (self.config.dropout, seed, self.places[site]) if self.drops and seed is not None else ()
        return product(x, weight, bias, *thin, *drop)

    def low_rank(self, site: str) -> tuple[Tensor, Tensor, float] | None:
        return None if self.drops else (self.values[site + ".a"], self.values[site + ".b"], self.config.scale)

    def delta(self, site: str) -> Tensor:
        """s B A, [out, in]."""
        return self.config.scale * (self.values[site + ".b"] @ self.values[site + ".a"])
