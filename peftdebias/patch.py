"""Put methods on a model and take them off: attach, detach, freeze, merge, fold.

Two words, two things. *merge* is for use: the deltas are written into the weights, outputs stay the same, and unmerge puts the kept tensors back bit for
bit. *fold* is for training the base under a frozen delta D: W' = W + D has the same gradient as W, so training W' is the same training, provided that
weight decay acts on W' - D; afterwards `unfold` leaves W' - D in the base and the method beside it.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn import Parameter

from .encoder import Model, expect_model, parameter_at
from .errors import AdapterError
from .methods import Method
from .options import expect_name
from .sites import EMBED_SITE, TABLES, Merged, add_delta, block_sites, key_value_sites

_expect_model = functools.partial(expect_model, raised=AdapterError)


def encoder_parameters(model: Model) -> dict[str, Parameter]:
    """The encoder's own parameters by our names; no heads, no methods."""
    return dict(model.encoder.named_parameters())


def attach(model: Model, name: str, method: Method) -> None:
    """Attach `method` as `name` (the axis it was learnt on, say). Outputs change as its hooks say; the base's parameters stay as they are, the method's move to its device
    and dtype, and stay so when it is detached (16 bits round them).

    Raises AdapterError on a name in use or one with a "/", a method that is attached already, a base that is no module (Full-Debias), a method made for a base of other sizes, or a site that the model does not have.
    """
    if isinstance(name, Method):
        raise AdapterError(f"attach: expected a model, a name and a method, in this order, got a method for the name: {name.name}")
    _expect_model(model, f"attach {name!r}", " (attach_to takes others)")
    expect_name("attach", name, AdapterError)
    if not isinstance(method, Method):
        raise AdapterError(f"attach {name!r}: expected a method, as methods.create() makes one, got {type(method).__name__}")
    if name in model.methods:
        raise AdapterError(f"attach: {name!r} is attached already; expected another name")
    if there := next((other for other, attached in model.methods.items() if attached is method), None):
        raise AdapterError(f"attach {name!r}: expected a method of its own, got the one that is attached as {there!r}")
    if method.trains_base:
        raise AdapterError(f"attach: {method.name} is a base model, not a module; expected it as --model")
    if model.encoder.hooks.merged:
        raise AdapterError(f"attach {name!r}: expected an unmerged model; unmerge it first")
    sites, config = method.sites(model.config), model.config
    if (made := getattr(method, "encoder_config", None)) is not None:
        heights = ("vocab", "max_positions", "position_offset", "segments") if set(TABLES) & set(sites) else ()
        for size in ("layers", "hidden", "heads", "feed_forward", *heights):
            if getattr(made, size) != getattr(config, size):
                raise AdapterError(f"attach {name!r}: {method.name} was made for {size} {getattr(made, size)}; expected {getattr(config, size)}, as the model has")
    places = {*block_sites(config), *key_value_sites(config), EMBED_SITE}
    for site in sites:
        if site not in places:
            parameter_at(model, site)
    device, dtype = model.device, model.encoder.embeddings.word.weight.dtype
    with torch.inference_mode(False):  # what is attached inside of it can be trained later
        for parameter in method.parameters().values():
            parameter.data = parameter.data.to(device, dtype)
    model.encoder.hooks.add(name, method, sites)
    method.train(model.training)


def detach(model: Model, name: str) -> Method:
    """Take `name` off and give its method back; the base is bitwise what it was before attach. Raises AdapterError on another name."""
    _expect_model(model, f"detach {name!r}")
    hooks = model.encoder.hooks
    if hooks.merged and hooks.known("detach", name) in hooks.merged.names:
        unmerge(model)
    method = hooks.methods[hooks.known("detach", name)]
    hooks.remove(name)
    return method


def train_only(model: Model, parameters: Iterable[Parameter]) -> None:
    """These parameters require gradients, all others of the model and its methods do not; a frozen weight costs nothing in backward."""
    wanted = {id(p) for p in parameters}
    for parameter in all_parameters(model).values():
        parameter.requires_grad_(id(parameter) in wanted)
    for method in model.methods.values():
        method.train(model.training)


def all_parameters(model: Model) -> dict[str, Parameter]:
    """Every parameter by name: `encoder.*`, `mlm.*`, `classifier.*`, and `methods.NAME.*` of what is attached."""
    named = dict(model.named_parameters())
    for name, method in model.methods.items():
        named |= {f"methods.{name}.{key}": p for key, p in method.parameters().items()}
    return named


def checksum(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, dtypes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def base_checksum(model: Model) -> str:
    """checksum of the encoder without heads, and without what is merged into it: what an adapter belongs to."""
    return checksum({name: model.encoder.hooks.base(parameter) for name, parameter in encoder_parameters(model).items()})


# ---------------------------------------------------------------- merge

def _deltas(method: Method, sites: tuple[str, ...]) -> Iterator[tuple[str, Tensor | tuple[Tensor, Tensor]]]:
    for site in sites:
        delta = method.delta(site)
        if delta is not None:
            yield site, delta


@torch.no_grad()
def _small(model: Model, method: Method) -> bool:
    """Whether its deltas are small enough to be taken off again, LARGEST."""
    for site, delta in _deltas(method, method.sites(model.config)):
        _, parameter, rows = parameter_at(model, site)
        values = delta[1] if isinstance(delta, tuple) else delta
        if parameter.dtype != torch.float64 and values.numel() and vector_norm(values, math.inf) > LARGEST * max(1.0, vector_norm(parameter[rows], math.inf)):
            return False
    return True


def merge(model: Model, *names: str) -> None:
    """Write the deltas and scales of the named methods (default: all) into the base. Outputs equal within rounding; the base tensors are kept for unmerge. Does nothing
    where no method is attached.

    Raises AdapterError on a method that is not mergeable, on one that scales a site where another method stays, and inside of `with model.without(...)`.
    """
    _expect_model(model, "merge")
    hooks = model.encoder.hooks
    if hooks.merged:
        raise AdapterError("merge: expected an unmerged model; unmerge it first")
    if hooks.turned_off:
        raise AdapterError("merge: expected to be outside of `with model.without(...)`")
    names = tuple(dict.fromkeys(hooks.known("merge", name) for name in names)) or tuple(hooks.methods)
    if not names:
        return
    for name in names:
        method = hooks.methods[name]
        if not method.mergeable or (type(method).delta is Method.delta and type(method).scale is Method.scale):
            raise AdapterError(f"merge {name!r}: {hooks.methods[name].name} cannot be written into the weights with the same outputs")
    written: dict[str, tuple[Parameter, Tensor, Tensor]] = {}

    def value(site: str) -> Tensor:
        key, parameter, rows = parameter_at(model, site)
        return written.setdefault(key, (parameter, parameter.data, parameter.data.clone()))[2][rows]

    with torch.inference_mode(False), torch.no_grad():  # what is written can be trained beside later
        for name in names:
            for site, delta in _deltas(hooks.methods[name], hooks.methods[name].sites(model.config)):
                value(site).copy_(add_delta(value(site), delta))
        for name in names:
            method = hooks.methods[name]
            for site in method.sites(model.config):
                inputs, outputs = method.scale(site)
                if inputs is None and outputs is None:
                    continue
                beside = hooks.at(site) + (hooks.at(site + ".bias") if outputs is not None else [])
                if any(m not in [hooks.methods[n] for n in names] for m in beside):
                    raise AdapterError(f"merge {name!r}: it scales {site}, where another method acts; expected that one to be merged too")
                if inputs is not None:
                    value(site).mul_(inputs)
                if outputs is not None:
                    value(site).mul_(outputs[:, None])
                    value(site + ".bias").mul_(outputs)
    hooks.merged = Merged(set(names), list(written.values()))
    hooks.settle()


def unmerge(model: Model) -> None:
    """Put the kept base tensors back, bit for bit; the methods act again. Does nothing on an unmerged model. Raises AdapterError inside of `with model.without(...)`."""
    _expect_model(model, "unmerge")
    hooks = model.encoder.hooks
    if hooks.merged:
        if hooks.turned_off:
            raise AdapterError("unmerge: expected to be outside of `with model.without(...)`")
        hooks.merged.place(False)
        hooks.merged = None
        hooks.settle()


# ---------------------------------------------------------------- fold

@dataclasses.dataclass
class Folded:
    """Frozen deltas written into a base that is being trained. anchors: (parameter, rows, D), D dense like parameter[rows], of trained parameters. kept: the
    others and what they were, since in floats (w + d) - d need not be w."""

    model: Model
    names: tuple[str, ...]
    anchors: list[tuple[Parameter, slice, Tensor]]
    kept: list[tuple[Parameter, Tensor]]

    @torch.no_grad()
    def after_step(self, rate_times_decay: dict[int, float]) -> None:
        """Make decoupled weight decay act on W' - D: the optimizer did W' <- W' (1 - lr wd) - lr u; the missing lr wd D is added.

        rate_times_decay: id(parameter) -> lr * wd of the step just done.
        """
        for parameter, rows, delta in self.anchors:
            amount = rate_times_decay.get(id(parameter), 0.0)
            if amount:
                parameter[rows].add_(delta, alpha=amount)

    @torch.no_grad()
    def unfold(self) -> None:
        """Leave W' - D in what was trained, and the rest as it was bit for bit; let the methods act again."""
        for parameter, rows, delta in self.anchors:
            parameter[rows].sub_(delta)
        for parameter, value in self.kept:
            parameter.copy_(value)
        hooks = self.model.encoder.hooks
        hooks.folded -= set(self.names)
        hooks.settle()


LARGEST = 16
"""Times the largest weight of a tensor, or 1 where that is less: as much as a delta that is folded has at most. A larger one, of a module that diverged, would leave the weights few
of their digits, (w + d) - d; float64 has enough."""


def fold(model: Model) -> Folded:
    """Fold every attached method that is foldable, up to LARGEST; the others keep acting through their hooks. What is to be trained must require gradients
    by now (train_only). See Folded; what it saves: `bench/compare.py full`."""
    hooks = model.encoder.hooks
    names = tuple(name for name, method in hooks.methods.items() if method.foldable and name not in hooks.off and _small(model, method))
    anchors: list[tuple[Parameter, slice, Tensor]] = []
    kept: dict[str, tuple[Parameter, Tensor]] = {}
    with torch.no_grad():
        for name in names:
            for site, delta in _deltas(hooks.methods[name], hooks.methods[name].sites(model.config)):
                key, parameter, rows = parameter_at(model, site)
                dense = add_delta(torch.zeros_like(parameter[rows]), delta)
                if parameter.requires_grad:
                    anchors.append((parameter, rows, dense))
                elif key not in kept:
                    kept[key] = parameter, parameter.data.clone()
                parameter[rows].add_(dense)
    hooks.folded |= set(names)
    hooks.settle()
    return Folded(model, names, anchors, list(kept.values()))
