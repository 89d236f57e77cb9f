"""Bias training (BitFit): every bias of the encoder, and nothing else. Ben Zaken et al. 2022, arXiv 2106.10199.

    b' = b + d        d [out] for every linear, d [D] for every LayerNorm, all zero at the start: an untrained module changes nothing

Departure: the paper trains b itself; here the base keeps b and the module holds the difference, which trains the same and can be taken off. Additive, so it
merges and folds. Its size is fixed. The key's d has no effect beside its own gradient's rounding: q d^T is the same for all keys, and softmax does not see
it (with a prefix, whose keys get none, it does). It is here because the paper counts it.

The room: this file (the specification is the line above, through sites.add_delta), tests/test_bias.py (proof).
Left out: the heads' biases, which belong to the task; the paper's subset (query and second feed-forward biases alone).
"""

import dataclasses

import torch
from torch import Tensor
from torch.nn import Parameter

from ..sites import BLOCKS, EncoderConfig, linear_shape, linear_sites
from . import Method


@dataclasses.dataclass(frozen=True)
class BiasConfig:
    """Nothing to choose."""


class Bias(Method):
    """One vector `layers.3.attention.query.bias` [out] a linear, `layers.3.attention.norm.bias` [D] a LayerNorm, `embeddings.norm.bias` [D]."""

    name = "bias"
    Config = BiasConfig
    mergeable = True
    foldable = True

    def __init__(self, config: BiasConfig, encoder_config: EncoderConfig, generator: torch.Generator | None = None):
        super().__init__(config, encoder_config, generator)
        widths = {site: linear_shape(encoder_config, site)[0] for site in linear_sites(encoder_config)}
        norms = ["embeddings.norm", *(f"layers.{i}.{block}.norm" for i in range(encoder_config.layers) for block in BLOCKS)]
        self.values = {f"{site}.bias": Parameter(torch.zeros(n, dtype=torch.float32)) for site, n in (dict.fromkeys(norms, encoder_config.hidden) | widths).items()}

    def sites(self, encoder_config: EncoderConfig) -> tuple[str, ...]:
        return tuple(self.values)

    def delta(self, site: str) -> Tensor:
        return self.values[site]
