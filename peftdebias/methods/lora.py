"""LoRA: a low-rank update of chosen linears. Hu et al. 2021, arXiv 2106.09685, equation 3.

    y = x W^T + b + (alpha / r) (x A^T) B^T

x [T, in], W [out, in] frozen, A [r, in] drawn, B [out, r] zero at the start: an untrained module changes nothing. With s = alpha / r the same map is
y = x (W + s B A)^T + b: mergeable and foldable.

The room: this file (specification, module), tests/test_lora.py (proof), bench/cases.py (rows).
Left out: dropout on x, rank-stabilised scaling, embeddings.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from ..errors import ConfigError
from ..sites import LINEARS, EncoderConfig, linear_shape, linear_sites
from . import Method


def lora_linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """x [T, in], weight [out, in], bias [out], a [r, in], b [out, r] -> [T, out]; the specification."""
    return F.linear(x, weight, bias) + scale * F.linear(F.linear(x, a), b)


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """rank: r >= 1. alpha: s = alpha / rank; None is 2 * rank. targets: which linears of every layer, of encoder.LINEARS or their last part."""

    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ("query", "value")

    def __post_init__(self):
        if self.rank < 1:
            raise ConfigError(f"lora rank: expected at least 1, got {self.rank}")
        known = {kind.split(".")[1]: kind for kind in LINEARS} | {kind: kind for kind in LINEARS}
        # "output" and "down" are told apart by their last part; both spellings end as the full one.
        for target in self.targets:
            if target not in known:
                raise ConfigError(f"lora targets: expected some of {', '.join(k.split('.')[1] for k in LINEARS)}, got {target!r}")
        if not self.targets:
            raise ConfigError("lora targets: expected at least one linear, got none")
        object.__setattr__(self, "targets", tuple(kind for kind in LINEARS if kind in {known[t] for t in self.targets}))

    @property
    def scale(self) -> float:
        return 2.0 if self.alpha is None else self.alpha / self.rank


class LoRA(Method):
    """A and B for every target; parameters `layers.3.attention.query.a` [r, in] and `.b` [out, r]."""

    name = "lora"
    Config = LoRAConfig
    mergeable = True
    foldable = True
    sized = True

    def __init__(self, config: LoRAConfig, encoder_config: EncoderConfig, generator: torch.Generator | None = None):
        super().__init__(config, encoder_config, generator)
        for site in self.sites(encoder_config):
            out_width, in_width = linear_shape(encoder_config, site)
            bound = 1.0 / math.sqrt(in_width)  # Kaiming uniform with a = sqrt(5), as the authors' code draws A
            self.values[site + ".a"] = Parameter(torch.empty(config.rank, in_width).uniform_(-bound, bound, generator=generator))
            self.values[site + ".b"] = Parameter(torch.zeros(out_width, config.rank))

    @classmethod
    def size_for(cls, encoder_config: EncoderConfig, target_parameters: int, **chosen) -> LoRAConfig:
        if "rank" in chosen:
            raise ConfigError("budget: chooses lora's rank; expected no rank beside it")
        one = cls.Config(rank=1, **chosen)
        per_rank = sum(sum(linear_shape(encoder_config, site)) for site in linear_sites(encoder_config, one.targets))
        return dataclasses.replace(one, rank=max(1, round(target_parameters / per_rank)))

    def sites(self, encoder_config: EncoderConfig) -> tuple[str, ...]:
        return linear_sites(encoder_config, self.config.targets)

    def linear(self, site: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return lora_linear_ref(x, weight, bias, self.values[site + ".a"], self.values[site + ".b"], self.config.scale)

    def delta(self, site: str) -> Tensor:
        """s B A, [out, in]."""
        return self.config.scale * (self.values[site + ".b"] @ self.values[site + ".a"])
