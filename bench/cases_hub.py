"""The other side of adapter_step through AdapterHub's library `adapters`, which pins a transformers of its own: its providers run in the Python of a virtual environment of
its own (README.md says how to make it).

What it adds over cases_steps.py: where that library keeps our parameters. The child process (lanes.py) imports this checkout from there; it needs torch, numpy, tokenizers,
safetensors and tqdm, which the library brings.
"""

import dataclasses
import logging
from collections.abc import Callable

from torch import Tensor, nn

from .case import Case, Setting
from .cases_steps import BOTTLENECK, dresses, module_values

HUB = "transformers+adapters"
PLACES = {"attention": "attention.output", "feed_forward": "output"}


def with_library(base: nn.Module, setting: Setting) -> tuple[nn.Module, dict[str, Tensor], Callable]:
    """double_seq_bn is Houlsby's; reduction_factor is the one that `D // factor` turns into K. train_adapter leaves the masked-LM head trainable; here it is frozen, as on
    the other sides."""
    import adapters

    logging.getLogger("adapters").setLevel(logging.ERROR)
    adapters.init(base)
    base.add_adapter("bench", config=adapters.DoubleSeqBnConfig(reduction_factor=setting.config.hidden / (BOTTLENECK + 0.5), non_linearity="swish"))
    base.train_adapter("bench")
    base.cls.requires_grad_(False)
    parameters = {}
    for name, value in module_values("adapter", setting.config).items():
        _, layer, block, kind, last = name.split(".")  # layers.3.attention.down.weight
        parameters[name] = base.get_parameter(f"bert.encoder.layer.{layer}.{PLACES[block]}.adapters.bench.adapter_{'down.0' if kind == 'down' else 'up'}.{last}")
        if parameters[name].shape != value.shape:
            raise RuntimeError(f"{name}: expected shape {list(value.shape)}, got {list(parameters[name].shape)}")
        parameters[name].data.copy_(value)
    return base, parameters, lambda found: found


def through_library(case: Case, python: str) -> Case:
    """adapter_step with the library in place of the adapters by hand; every other case as it is. python: the interpreter of its virtual environment."""
    if case.name != "adapter_step":
        return case
    theirs = dresses(HUB, "adapter", python=python, module=with_library, save=lambda model, folder: model.save_adapter(str(folder), "bench", with_head=False))
    return dataclasses.replace(case, providers=theirs | {name: provider for name, provider in case.providers.items() if name.startswith("peftdebias")})
