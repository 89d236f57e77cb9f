"""Prefix tuning: keys and values, learnt for every layer, that each text's queries see besides its own. Li and Liang 2021, arXiv 2101.00190.

    softmax(q [P_k ; k]^T / sqrt(W)) [P_v ; v]        P_k, P_v [P, H, W] in every layer

Flat: P_k and P_v are the parameters (what Liu et al. 2022, arXiv 2110.07602, call P-tuning v2; the "Prompt" of Agarwal et al. 2023). Re-parametrised: all layers'
come from one E [P, D] through an MLP, tanh(E W1^T + b1) W2^T + b2 with W1 [N, D], W2 [2 L D, N], evaluated once a step on these P rows, never on a copy for
each text; as files hold it, it is flat. The text's positions stay, unless `positioned`: peft's prefix takes the first P positions.

Drawn: flat as BERT draws its weights (peft: normal(0, 1), which begins as noise as large as keys and values); E normal(0, 1) and W1, W2 uniform within
1 / sqrt(inputs), as the authors' code does.

The room: this file (specification, module), tests/test_prefix.py (proof); attention itself is ops.attention_ref.
Left out: prefixes of encoder-decoders, prefixes drawn from words, dropout of the prefix.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from ..errors import ConfigError
from ..sites import EncoderConfig, key_value_sites
from . import Method


def prefix_mlp_ref(embedding: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, heads: int, head_width: int) -> Tensor:
    """embedding [P, D], down [N, D], down_bias [N], up [2 L D, N], up_bias [2 L D] -> [L, 2, P, H, W], keys and values of each layer; the specification."""
    flat = F.linear(torch.tanh(F.linear(embedding, down, down_bias)), up, up_bias)  # [P, 2 L D]
    return flat.view(len(embedding), -1, 2, heads, head_width).permute(1, 2, 0, 3, 4)


@dataclasses.dataclass(frozen=True)
class PrefixConfig:
    """length: P >= 1. reparametrised: train E and the MLP. inner: N >= 1, the MLP's width. positioned: the text's positions begin at P."""

    length: int = 30
    reparametrised: bool = False
    inner: int = 512
    positioned: bool = False

    def __post_init__(self):
        for name in ("length", "inner"):
            if getattr(self, name) < 1:
                raise ConfigError(f"prefix {name}: expected at least 1, got {getattr(self, name)}")


class Prefix(Method):
    """Flat: `layers.3.key` and `layers.3.value` [P, H, W]. Re-parametrised: `embedding`, `down.weight`, `down.bias`, `up.weight`, `up.bias`; flat in files."""

    name = "prefix"
    Config = PrefixConfig
    size = "length"

    def __init__(self, config: PrefixConfig, encoder_config: EncoderConfig, generator: torch.Generator | None = None):
        super().__init__(config, encoder_config, generator)
        c, p, n = encoder_config, config.length, config.inner
        self.position_shift = p if config.positioned else 0
        self._step: Tensor | None = None  # what the MLP gave, from the first layer of a forward to its last
        if not config.reparametrised:
            for i in range(c.layers):
                for part in ("key", "value"):
                    self.values[f"layers.{i}.{part}"] = Parameter(torch.empty(p, c.heads, c.head_width, dtype=torch.float32).normal_(0, c.initializer_range, generator=generator))
            return
        self.values["embedding"] = Parameter(torch.empty(p, c.hidden, dtype=torch.float32).normal_(0, 1, generator=generator))
        for name, out_width, in_width in (("down", n, c.hidden), ("up", 2 * c.layers * c.hidden, n)):
            bound = in_width**-0.5
            self.values[f"{name}.weight"] = Parameter(torch.empty(out_width, in_width, dtype=torch.float32).uniform_(-bound, bound, generator=generator))
            self.values[f"{name}.bias"] = Parameter(torch.zeros(out_width, dtype=torch.float32))

    @classmethod
    def parameters_for(cls, config: PrefixConfig, encoder_config: EncoderConfig) -> int:
        return config.length * 2 * encoder_config.layers * encoder_config.hidden  # flat: the MLP is gone when it is used

    def sites(self, encoder_config: EncoderConfig) -> tuple[str, ...]:
        return key_value_sites(encoder_config)

    def key_value(self, layer: int) -> tuple[Tensor, Tensor]:
        if not self.config.reparametrised:
            return self.values[f"layers.{layer}.key"], self.values[f"layers.{layer}.value"]
        if layer == 0:  # a forward asks layer after layer: the MLP runs at the first, for all
            self._step = self._flat()
        key, value = (self._flat() if self._step is None else self._step)[layer]
        if layer == self.encoder_config.layers - 1:
            self._step = None
        return key, value

    def _flat(self) -> Tensor:
        """[L, 2, P, H, W] from the MLP."""
        tensors = (self.values[name] for name in ("embedding", "down.weight", "down.bias", "up.weight", "up.bias"))
        return prefix_mlp_ref(*tensors, self.encoder_config.heads, self.encoder_config.head_width)

    def state(self) -> dict[str, Tensor]:
        """Flat, whatever is trained; it goes with saved_config."""
        if not self.config.reparametrised:
            return super().state()
        with torch.no_grad():
            flat = self._flat().cpu()
        return {f"layers.{i}.{part}": tensor.contiguous() for i, both in enumerate(flat) for part, tensor in zip(("key", "value"), both)}

    def saved_config(self) -> PrefixConfig:
        return dataclasses.replace(self.config, reparametrised=False)
