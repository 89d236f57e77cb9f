"""For tests of training steps: a small model with a module, its step, and batches for it."""

from types import SimpleNamespace

import torch

from peftdebias import methods, patch
from peftdebias.step import Step
from peftdebias.tasks import mlm_loss
from peftdebias.training import Schedule, make_optimizer

from .outside import FEED_FORWARD, HIDDEN, LAYERS, ragged
from .plain import model_of

MODULES = {"lora": {"rank": 2, "dropout": 0.1}, "adapter": {"bottleneck": 3}, "prefix": {"length": 3}, "prompt": {"length": 3}, "bias": {}, "ia3": {}}


class Masked:
    def loss(self, model, batch):
        return mlm_loss(model.mlm_logits(batch), batch.targets)


class Labels:
    """Whole-base training: the first row of each text decides."""

    def loss(self, model, batch):
        return mlm_loss(model.class_logits(batch), batch.targets)


class Squares:
    """Of a module's parameters: compiled in no time."""

    def loss(self, model, batch):
        return sum(p.square().sum() for p in model.methods["gender"].values.values())


def made(name: str | None, dtype=torch.float32, cls=Step, options: dict | None = None, layers: int = LAYERS, hidden: int = HIDDEN, feed_forward: int = FEED_FORWARD,
         loss=None, **settings) -> Step:
    """A step of a small model in train mode; every parameter of the module drawn, so that each has a gradient. None trains the base. options: beside MODULES'. loss: in place of
    the task's."""
    model = model_of(dtype=dtype, layers=layers, hidden=hidden, feed_forward=feed_forward)
    if name is not None:
        method, generator = methods.create(name, model.config, options=MODULES.get(name, {}) | (options or {}), seed=0), torch.Generator().manual_seed(1)
        if name == "sparse":
            method.load(spread(method))
        for parameter in method.parameters().values():
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.1).to(dtype)
        patch.attach(model, "gender", method)
    parameters = {n: p for n, p in patch.all_parameters(model).items() if n.startswith("methods.") == (name is not None)}
    patch.train_only(model, parameters.values())
    model.train()
    task = SimpleNamespace(loss=loss) if loss else Masked() if name else Labels()
    return cls(model, task, make_optimizer(parameters, Schedule(steps=3, lr=1e-2)), parameters, clip=1e9, **settings)


def spread(method) -> dict[str, torch.Tensor]:
    """Values and indices for a sparse module, a few in every linear."""
    sites = [site for site in method.sites(method.encoder_config) if site.startswith("layers.") and not site.endswith(".bias")]
    counts = [len(range(i, method.config.k, len(sites))) for i in range(len(sites))]
    return {f"{site}.{part}": tensor for site, n in zip(sites, counts) for part, tensor in (("values", torch.ones(n)), ("indices", torch.arange(n, dtype=torch.int32) * 7))}


RAGGED, FULL = (13, 1, 7), (19, 17, 19, 9)  # 64 tokens: a shape that they fill


def batch_for(name: str | None, seed: int = 0, lengths=RAGGED):
    batch = ragged(lengths, rows="some" if name else "first", seed=seed)
    if name is None:
        batch.targets.remainder_(3)
    return batch
