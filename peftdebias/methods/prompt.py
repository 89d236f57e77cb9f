"""Prompt tuning: vectors put before every text, as if they were words. Lester et al. 2021, arXiv 2104.08691.

    [v_1 ... v_P ; text] -> encoder        v [P, D]

The vectors stand where word embeddings stand, before the first LayerNorm. They carry no position and no segment, the text keeps its positions, and a
classifier reads the text's first token: what is read with and without the module is the same place. Departure: the paper's (T5) and peft's vectors are
words like others, with positions 0 to P - 1, the text after them, and peft's classifier reads the first of them: `positioned`, `first_row`.

The room: this file (module; the specification is batches.with_inserted and the line of `embed` that gathers), tests/test_prompt.py (proof).
Left out: vectors that begin as words of the vocabulary or of a text (they are drawn as BERT draws its words), prompts of several tasks.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter

from ..batches import Batch, with_inserted
from ..errors import ConfigError
from ..sites import EMBED_SITE, EncoderConfig
from . import Method


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """length: P >= 1. positioned: the vectors take positions 0 to P - 1 and segment 0, the text follows.

    first_row: where a classifier reads, at the "text"'s first token or the "prompt"'s, this module's, first vector, also behind another's;
    masked tokens and means over a text are the text's own in either case.
    """

    length: int = 20
    positioned: bool = False
    first_row: str = "text"

    def __post_init__(self):
        if self.length < 1:
            raise ConfigError(f"prompt length: expected at least 1, got {self.length}")
        if self.first_row not in ("text", "prompt"):
            raise ConfigError(f"prompt first_row: expected text or prompt, got {self.first_row!r}")


class Prompt(Method):
    """One parameter, `vectors` [P, D]."""

    name = "prompt"
    Config = PromptConfig
    size = "length"
    cap = "beside texts of --max-length tokens the base has no positions for more"

    def __init__(self, config: PromptConfig, encoder_config: EncoderConfig, generator: torch.Generator | None = None):
        super().__init__(config, encoder_config, generator)
        self.values["vectors"] = Parameter(torch.empty(config.length, encoder_config.hidden, dtype=torch.float32).normal_(0, encoder_config.initializer_range, generator=generator))
        self.position_shift = config.length if config.positioned else 0
        self.first_row = config.first_row

    @classmethod
    def parameters_for(cls, config: PromptConfig, encoder_config: EncoderConfig) -> int:
        return config.length * encoder_config.hidden

    @classmethod
    def capped(cls, config: PromptConfig, encoder_config: EncoderConfig, max_length: int) -> PromptConfig:
        """No more than max_positions - max_length vectors, one at least: together with a text they are never more tokens than the base was trained on."""
        return dataclasses.replace(config, length=max(1, min(config.length, encoder_config.max_positions - max_length)))

    def sites(self, encoder_config: EncoderConfig) -> tuple[str, ...]:
        return (EMBED_SITE,)

    def embed(self, hidden: Tensor, batch: Batch, positioned: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Batch]:
        vectors = self.values["vectors"]
        if self.config.positioned:
            vectors = positioned(vectors, torch.arange(len(vectors), device=vectors.device))
        order, batch = with_inserted(batch, len(vectors), first_row=self.first_row == "prompt")
        texts = batch.cu_seqlens.shape[0] - 1
        return torch.cat([vectors.repeat(texts, 1).to(hidden.dtype), hidden]).index_select(0, order), batch  # [B P + T, D] -> [T + B P, D]
