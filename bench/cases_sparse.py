"""sparse_step: both stages of sparse fine-tuning, each a whole upstream step. No other library has it: stage 1 is held against its own floor, stage 2 against stage 1.

What it adds over cases_steps.py: the parameters and the pull of each stage, as Sparse.learn hands them to the training loop. The k weights of stage 2 are evenly spaced over all
sites: those that training picks depend on texts. Before timing, the gradients of stage 2's values must equal the gradients of stage 1 at their places, with the same values
in both.
"""

import contextlib
import dataclasses
import types
from collections.abc import Callable

import numpy
import torch
from torch import Tensor

from peftdebias import methods, patch, training
from peftdebias.batches import pack
from peftdebias.encoder import Model, parameter_at
from peftdebias.methods import Method
from peftdebias.sites import parameter_size
from peftdebias.tasks import MaskedLM
from peftdebias.weights import load_model

from .case import Case, Provider, Setting, Work, output_bound
from .cases_steps import facts, mean_loss_and_gradients, model_folder, needed_flops, save_adapter, schedule, state_bytes, without_key_bias
from .texts import texts


class Reached(Exception):
    """The stage that is to be measured: Sparse.learn is left there."""


def evenly_spaced(method: Method) -> dict[str, Tensor]:
    """site -> flat indices int64, ascending; k of them in all."""
    sites = method.sites(method.encoder_config)
    ends = numpy.cumsum([parameter_size(method.encoder_config, site) for site in sites])
    chosen = numpy.linspace(0, ends[-1] - 1, method.config.k).round().astype(numpy.int64)
    parts = numpy.split(chosen, numpy.searchsorted(chosen, ends[:-1]))
    return {site: torch.from_numpy(part - start) for site, part, start in zip(sites, parts, [0, *ends[:-1]]) if len(part)}


def stage(number: int) -> Callable[[Setting], Work]:
    """number: 1 trains every weight but the LayerNorms, 2 the k."""
    def build(setting: Setting) -> Work:
        model, _ = load_model(model_folder(setting))
        method = methods.create("sparse", model.config)
        patch.attach(model, "bench", method)
        model.to(setting.device)
        places, asked = evenly_spaced(method), []

        def loop(parameters: dict, pull=None, rate: float = 1.0):
            asked.append((parameters, pull))
            if len(asked) == number:
                raise Reached
            with torch.no_grad():  # the weights that move most are those at the places
                for site, there in places.items():
                    flat(model, site)[there] += 1

        with contextlib.suppress(Reached):
            method.learn(model, loop)
        parameters, pull = asked[-1]
        held = contextlib.ExitStack()
        if number == 1:
            held.enter_context(model.frozen_decoder())
        patch.train_only(model, parameters.values())
        plan, batches = schedule(setting), texts(setting)
        task = types.SimpleNamespace(loss=lambda model, batch: MaskedLM.loss(None, model, batch))
        optimizer = training.make_optimizer(parameters, plan)
        step = training.STEPS["eager"](model, task, optimizer, parameters, clip=plan.clip, precision=plan.precision, pull=pull)
        packed = [pack(batch) for batch in batches]
        count = sum(len(batch.targets) for batch in packed)

        def results() -> dict[str, Tensor]:
            generator = torch.Generator().manual_seed(7)
            values = {site: 0.05 * torch.randn(len(there), generator=generator).to(setting.device) for site, there in places.items()}
            losses = [lambda b=b: task.loss(model, b.to(setting.device)) for b in packed]
            with moved(model, places, values) if number == 1 else taken(parameters, values):
                found = mean_loss_and_gradients(model, parameters, losses, [len(b.targets) / count for b in packed])
            if number == 1:
                dense = {id(p): found.pop(f"gradient of {name}") for name, p in parameters.items()}
                found |= {f"gradient of {site}": dense[id(p)][rows].flatten()[places[site]] for site in places for _, p, rows in [parameter_at(model, site)]}
            return without_key_bias(found)

        def run() -> None:
            for batch in packed:
                step(dataclasses.replace(batch), plan.lr)

        model.train()
        return Work(run, results, steps=len(packed), tokens=sum(len(b.ids) for b in packed), flops=needed_flops(setting, "sparse"), extra=facts(setting, batches, "sparse"),
                    held=held, state=state_bytes(optimizer), save=(lambda folder: save_adapter(folder, model, method)) if number == 2 else None)

    return build


def flat(model: Model, site: str) -> Tensor:
    """The parameter of a site as a vector that shares its memory."""
    _, parameter, rows = parameter_at(model, site)
    return parameter.detach()[rows].view(-1)


@contextlib.contextmanager
def moved(model: Model, places: dict[str, Tensor], values: dict[str, Tensor]):
    """The base with `values` added at their places; afterwards as it was, bit for bit."""
    kept = {site: flat(model, site)[there].clone() for site, there in places.items()}
    for site, there in places.items():
        flat(model, site)[there] += values[site]
    try:
        yield
    finally:
        for site, there in places.items():
            flat(model, site)[there] = kept[site]


@contextlib.contextmanager
def taken(parameters: dict[str, Tensor], values: dict[str, Tensor]):
    """The module with `values` for its own; afterwards as it was."""
    kept = {site: p.detach().clone() for site, p in parameters.items()}
    for site, p in parameters.items():
        p.data.copy_(values[site])
    try:
        yield
    finally:
        for site, p in parameters.items():
            p.data.copy_(kept[site])


FIRST, SECOND = "peftdebias, stage 1", "peftdebias, stage 2"
SPARSE_CASES = {"sparse_step": Case("sparse_step", "step", "one upstream step of sparse fine-tuning: all weights pulled towards the start; then k of them",
                                    {FIRST: Provider(stage(1)), SECOND: Provider(stage(2))}, "mean_length", (54,), output_bound)}
"""name -> Case. Apart from STEP_CASES: there is no other side."""
