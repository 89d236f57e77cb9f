"""Full-Debias: the base itself is trained upstream. No module: its run folder is a base model, and what follows starts from that.

Agarwal et al. 2023, section 4 ("Full-Debias"); counterfactual augmentation of all weights goes back to Zmigrod et al. 2019.

The room: this file; phases.py, which saves the base; tests/test_phases.py and tests/test_every_method.py (proof).
"""

import dataclasses

from ..encoder import Model
from . import Method


@dataclasses.dataclass(frozen=True)
class FullConfig:
    """Nothing to choose."""


class Full(Method):
    """Owns no parameters and takes hold of no site; `trains_base` says the rest."""

    name = "full"
    Config = FullConfig
    trains_base = True

    def learn(self, model: Model, loop) -> object:
        return loop({name: p for name, p in model.named_parameters() if not name.startswith("classifier.")})
