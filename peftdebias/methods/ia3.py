"""(IA)^3: keys, values and the feed-forward's inner activations rescaled by learnt vectors. Liu et al. 2022, arXiv 2205.05638, section 3.3.

    k = l_k * (x W_k^T + b_k)     v = l_v * (x W_v^T + b_v)     y = (l_ff * inner) W_down^T + b_down

l_k, l_v [D], l_ff [F], all one at the start: an untrained module changes nothing. It merges (rows of W and its bias, or columns of W, scaled: same
outputs) but does not fold: training the scaled weight is another training. Its size is fixed. In bf16 the products are scaled in float32 and rounded.

The room: this file (specification, module), tests/test_ia3.py (proof). peft's default for BERT scales the input of attention.output too: `inputs`.
Left out: the paper's pre-training of the vectors, its losses (unlikelihood, length normalisation), and its T0 base.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from ..errors import ConfigError
from ..sites import EncoderConfig, linear_shape, linear_sites
from . import Method, linear_kinds


def ia3_linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None, inputs: Tensor | None = None, outputs: Tensor | None = None) -> Tensor:
    """x [T, in], weight [out, in], bias [out], inputs [in], outputs [out] -> [T, out]; the specification of what sites.Hooks does with `scale`."""
    y = F.linear(x if inputs is None else x * inputs, weight, bias)
    return y if outputs is None else y * outputs


@dataclasses.dataclass(frozen=True)
class IA3Config:
    """outputs: linears whose output is rescaled; inputs: linears whose input is. Of sites.LINEARS or their last part, none in both."""

    outputs: tuple[str, ...] = ("key", "value")
    inputs: tuple[str, ...] = ("down",)

    def __post_init__(self):
        for name in ("outputs", "inputs"):
            object.__setattr__(self, name, linear_kinds(getattr(self, name), f"ia3 {name}"))
        if not (self.outputs or self.inputs):
            raise ConfigError("ia3 outputs and inputs: expected at least one linear, got none")
        if both := set(self.outputs) & set(self.inputs):
            raise ConfigError(f"ia3 outputs and inputs: expected each linear in one of them, got {min(both)} in both")


class IA3(Method):
    """One vector for every linear, `layers.3.attention.key` [out] or `layers.3.feed_forward.down` [in]."""

    name = "ia3"
    Config = IA3Config
    mergeable = True

    def __init__(self, config: IA3Config, encoder_config: EncoderConfig, generator: torch.Generator | None = None):
        super().__init__(config, encoder_config, generator)
        for site in self.sites(encoder_config):
            out_width, in_width = linear_shape(encoder_config, site)
            self.values[site] = Parameter(torch.ones(in_width if self._is_input(site) else out_width, dtype=torch.float32))

    def sites(self, encoder_config: EncoderConfig) -> tuple[str, ...]:
        return linear_sites(encoder_config, (*self.config.outputs, *self.config.inputs))

    def scale(self, site: str) -> tuple[Tensor | None, Tensor | None]:
        return (self.values[site], None) if self._is_input(site) else (None, self.values[site])

    def _is_input(self, site: str) -> bool:
        return site.split(".", 2)[2] in self.config.inputs
