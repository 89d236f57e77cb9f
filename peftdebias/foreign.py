"""LoRA, sparse, (IA)^3 and bias modules on a user's own BERT or RoBERTa, found by module name; transformers is not imported.

    W' = (W + deltas) * inputs * outputs[:, None]        b' = (b + deltas) * outputs

What it adds over patch.py: the host is any nn.Module. Weights and biases are parametrised (torch.nn.utils.parametrize): whoever reads `query.weight` there gets
W'. The host's own tensors are never written to, so taking a module off leaves the original bits. Embedding tables get their delta in a forward hook, on the
rows looked up: a decoder tied to the table keeps the base, as in our own model.

It leaves out methods that do more than change weights (adapters, prefixes, prompts), LoRA's dropout (it is off here), and hosts whose Q, K and V are one tensor.
While a module is attached, the host's state_dict names its changed tensors `parametrizations.weight.original`: save after `remove`.
"""

import functools
import os
import re
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from . import checkpoint
from .encoder import EncoderConfig, Model
from .errors import AdapterError
from .methods import METHODS, Method, method_class
from .options import expect_path
from .sites import TABLES, add_delta, linear_shape, table_rows
from .weights import ENCODER_NAMES, NoInit, from_foreign

class Changed(nn.Module):
    """The parametrization of one weight or bias: (method, site) pairs in `parts`; deltas of all first, then scales of all, as sites.Hooks does.

    order: the names of the host's parameters before the first of them was changed, since an optimizer's state goes by it.
    """

    def __init__(self, kind: str, order: list[str]):
        super().__init__()
        self.kind, self.order = kind, order
        self.parts: list[tuple[Method, str]] = []

    def forward(self, tensor: Tensor) -> Tensor:
        """[out, in] or [out] -> the same shape."""
        for method, site in self.parts:
            tensor = add_delta(tensor, method.delta(site + ".bias" if self.kind == "bias" else site))
        for method, site in self.parts:
            inputs, outputs = method.scale(site)
            if inputs is not None and self.kind == "weight":
                tensor = tensor * inputs.to(tensor.dtype)
            if outputs is not None:
                tensor = tensor * outputs.to(tensor.dtype).view(-1, *[1] * (tensor.dim() - 1))
        return tensor


class Attached:
    """What attach_to gives back. method: its own parameters are `parameters()`. places: our site -> their module's name."""

    def __init__(self, method: Method, places: dict[str, str]):
        self.method, self.places = method, places
        self._undo: list = []
        self._hosts: list[nn.Module] = []

    def parameters(self) -> list[nn.Parameter]:
        """For the optimizer; the host's own parameters are left as they are, frozen or not."""
        return list(self.method.parameters().values())

    def remove(self) -> None:
        """Take the module off: the host has its own tensors again, bit for bit, and what else is attached stays. A second call does nothing.

        Raises AdapterError where FSDP has sharded the host since: it knows the tensors by where they lie while the module is attached.
        """
        if self._undo and _sharded(self._hosts):
            raise AdapterError("remove: FSDP has sharded the host, and knows its tensors by where they lie now; the module stays attached: expected a full state dict of the host, in whose names "
                               "`parametrizations.` and `.original` are left out")
        while self._undo:
            self._undo.pop()()


def attach_to(module: nn.Module, method: Method | str | Path, names: dict[str, str] | None = None, force: bool = False) -> Attached:
    """Attach a method, or the module of an adapter or run folder, to `module`; several may be attached, one after another.

    names: our site -> their module name, over the names that transformers has; `{i}` stands for the layer on both sides ("layers.{i}.attention.query":
    "blocks.{i}.q"). A name may leave out what comes before it: `encoder.layer.0.output.dense` is found inside `bert` or deeper. A folder is checked against
    the base that it was made for, in the dtype of its files, which needs every tensor of the encoder; force: a warning where that is another. A Method needs only
    its own sites. Its parameters move to the device of `module`. Raises AdapterError on a method that does more than change weights, a name for a site that there
    is not, a module or bias that is missing or stands there twice, or for two sites, a shape that does not match, values that are no floating point, modules on several devices
    or on the device meta, one that FSDP has sharded, and what is attached there already. Where it raises, the host is as it was.
    """
    if not isinstance(module, nn.Module):
        raise AdapterError(f"attach_to: expected a torch.nn.Module, got {type(module).__name__}")
    if not isinstance(method, (Method, str, os.PathLike)):
        raise AdapterError(f"attach_to: expected a method or the folder of one, got {type(method).__name__}")
    if not isinstance(names, (Mapping, type(None))):
        raise AdapterError(f"attach_to: names: expected a dict, our site to their module's name, got {type(names).__name__}")
    find, source = _Finder(module, names or {}), method
    if not isinstance(method, Method):
        folder = expect_path("adapter", method, AdapterError)
        source = os.path.realpath(checkpoint.module_folder(folder))
        with torch.inference_mode(False):  # what is attached inside of it can be trained later
            method = _load(folder, find, force)
    _only_weights(type(method))
    places: dict[str, str] = {}
    changes: dict[tuple[str, str], nn.Module] = {}  # (site, "weight" or "bias") -> their module
    for full in method.sites(method.encoder_config):
        site, bare = full.removesuffix(".bias"), not full.endswith(".bias")
        scaled = bare and any(scale is not None for scale in method.scale(site))
        if method.delta(full) is None and not scaled:
            continue
        places[full], host = find(site)
        if other := next((s for (s, _), there in changes.items() if there is host and s != site), None):
            raise AdapterError(f"{site}: expected a module of its own, found {places[full]}, which is {other} too ({{i}} in `names` is the layer's number)")
        _check(full, places[full], host, method.encoder_config)
        changes[site, "weight" if bare else "bias"] = host
        if scaled and method.scale(site)[1] is not None and getattr(host, "bias", None) is not None:
            _check(f"{site}.bias", places[full], host, method.encoder_config)
            changes[site, "bias"] = host
    if not changes:
        raise AdapterError(f"{method.name}: expected a module that changes at least one weight, got one that changes none (it has not learnt yet)")
    if any(source in _attached.get(host, ()) for host in changes.values()):
        raise AdapterError(f"{source if isinstance(source, str) else method.name}: attached twice; expected each module once")
    if any(host.weight.is_meta or getattr(host, kind).is_meta for (_, kind), host in changes.items()):
        raise AdapterError(f"{method.name}: expected a model with values, got one of which a part is on the device meta; give it its values (to_empty, load_state_dict) first")
    device = _one_device(method.name, {name: find.modules[name].weight for name in places.values()})
    with torch.inference_mode(False):
        for parameter in method.parameters().values():
            parameter.data = parameter.data.to(device)
    attached = Attached(method, places)
    attached._hosts = list({id(host): host for host in changes.values()}.values())
    try:
        for (site, kind), host in changes.items():
            attached._undo.append(_hook_rows(host, method, site) if site in TABLES else _change(host, kind, method, site))
    except BaseException:
        attached.remove()
        raise
    for host in attached._hosts:
        for one in {method, source}:
            sources = _attached.setdefault(host, [])
            sources.append(one)
            attached._undo.append(functools.partial(sources.remove, one))
    return attached


_attached: "weakref.WeakKeyDictionary[nn.Module, list[Method | str]]" = weakref.WeakKeyDictionary()
"""What changes a module: methods, and the folders that they came from."""


def _one_device(whose: str, tensors: Mapping[str, Tensor]) -> torch.device:
    """Where these lie, by their names in the host. Raises AdapterError where not all are on one device."""
    (name, one), *others = ((name, tensor.device) for name, tensor in tensors.items())
    for other, device in others:
        if device != one:
            raise AdapterError(f"{whose}: expected a model on one device, got {name} on {one} and {other} on {device}")
    return one


def _hook_rows(host: nn.Module, method: Method, site: str):
    """Adds the delta's rows to what the embedding gives; returns the undoing."""
    def add_rows(host: nn.Module, args: tuple, named: dict, output: Tensor) -> Tensor:
        delta = add_delta(torch.zeros_like(host.weight), method.delta(site))
        return output + F.embedding(args[0] if args else named["input"], delta)
    handle = host.register_forward_hook(add_rows, with_kwargs=True)
    _forget_compiled()

    def undo() -> None:
        handle.remove()
        _forget_compiled()
    return undo


def _sharded(hosts: list[nn.Module], above: nn.Module | None = None) -> bool:
    """Whether torch's FSDP, of either kind, has one of these modules, which lie in `above`, in hand. Nothing is imported for it: who wraps has done so.

    The first kind wraps, and leaves views or flattened parameters where parameters were. The second keeps the modules as they are, and between a forward pass and its backward their
    parameters too, but lists what it was called on.
    """
    fsdp, composable, tensors = (sys.modules.get(f"torch.distributed.{name}") for name in ("fsdp", "_composable_state", "tensor"))
    first, second = getattr(fsdp, "FullyShardedDataParallel", ()), getattr(fsdp, "FSDPModule", ())
    wrappers = [m for m in ([] if above is None else above.modules()) if isinstance(m, first)]
    wrappers += [m for m in list(getattr(composable, "_module_state_mapping", ())) if isinstance(m, second)]
    within = {id(part) for m in wrappers for part in m.modules()}

    def taken(host: nn.Module) -> bool:
        changed = list(host.parametrizations.values()) if parametrize.is_parametrized(host) else []
        own = [p for place in (host, *changed) for p in place._parameters.values() if p is not None]
        return any("original" in vars(place) for place in changed) or any(getattr(p, "_fsdp_flattened", False) or isinstance(p, getattr(tensors, "DTensor", ())) for p in own)

    return any(id(host) in within or taken(host) for host in hosts)


def _forget_compiled() -> None:
    """What torch.compile made of the host before: it does not see that hooks come and go."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _change(host: nn.Module, kind: str, method: Method, site: str):
    """Makes `host`'s weight or bias W'; returns the undoing."""
    own = [(name, p) for name, there in getattr(host, "parametrizations", {}).items() for p in there if isinstance(p, Changed)]
    changed = next((p for name, p in own if name == kind), None)
    if changed is None:
        changed = Changed(kind, own[0][1].order if own else list(host._parameters))
        parametrize.register_parametrization(host, kind, changed)
    part = (method, site)
    changed.parts.append(part)

    def undo() -> None:
        changed.parts = [p for p in changed.parts if p is not part]
        if not changed.parts and len(there := host.parametrizations[kind]) > 1:  # someone else's parametrization stays
            del there[next(i for i, p in enumerate(there) if p is changed)]
        elif not changed.parts:
            parametrize.remove_parametrizations(host, kind, leave_parametrized=False)
            for name in changed.order:
                if name in host._parameters:
                    host._parameters[name] = host._parameters.pop(name)
    return undo


def _changes_weights(cls: type[Method]) -> bool:
    """Whether that is all that a method of this class does."""
    more = cls.trains_base or any(getattr(cls, hook) is not getattr(Method, hook) for hook in ("block", "key_value", "embed"))
    return not more and (cls.delta is not Method.delta or cls.scale is not Method.scale)


def _only_weights(cls: type[Method]) -> None:
    if not _changes_weights(cls):
        others = ", ".join(name for name in METHODS if _changes_weights(method_class(name)))
        raise AdapterError(f"{cls.name}: does more than change weights, so it acts in this package's own model only; expected one of {others}")


def _check(site: str, theirs: str, host: nn.Module, config: EncoderConfig) -> None:
    """The tensor behind `site` is there, can be changed, and has its shape."""
    stem, kind = _parts(site)
    tensor = _tensor(site, theirs, host)
    if stem not in TABLES and kind not in host._parameters and not parametrize.is_parametrized(host, kind):
        raise AdapterError(f"{site} ({theirs}.{kind}): expected a parameter, got what {type(host).__name__} computes or hands on (a layer of peft's? attach before peft wraps it)")
    _check_shape(site, theirs, tensor, config)
    if not tensor.is_floating_point():
        raise AdapterError(f"{site} ({theirs}.{kind}): expected floating point values, got {str(tensor.dtype).removeprefix('torch.')}, in which a change of less than 1 is lost (a quantised layer?)")


def _parts(site: str) -> tuple[str, str]:
    """(a module's site, which of its tensors is meant)."""
    return (site.removesuffix(".bias"), "bias") if site.endswith(".bias") else (site, "weight")


def _tensor(site: str, theirs: str, host: nn.Module) -> Tensor:
    """The tensor behind `site`. Raises AdapterError where there is none."""
    kind = _parts(site)[1]
    tensor = getattr(host, kind, None)
    if not isinstance(tensor, Tensor):
        raise AdapterError(f"{site} ({theirs}.{kind}): expected a tensor, found none")
    return tensor


def _filled(site: str, theirs: str, host: nn.Module) -> Tensor:
    """The tensor behind `site`, whose values the base is known by."""
    tensor = _tensor(site, theirs, host)
    if is_lazy(tensor) or tensor.is_meta:
        raise AdapterError(f"{site} ({theirs}.{_parts(site)[1]}): expected a tensor with values, by which the base is known, got one without (lazy, or on the device meta)")
    return tensor


def _check_shape(site: str, theirs: str, tensor: Tensor, config: EncoderConfig) -> None:
    """Raises AdapterError where the tensor behind `site` has not the shape that the module's base has there."""
    stem, kind = _parts(site)
    if stem in TABLES:
        shape = [table_rows(config)[stem], config.hidden]
    else:
        shape = [config.hidden] if stem.endswith("norm") else list(linear_shape(config, stem))[:1 if kind == "bias" else 2]
    if list(tensor.shape) != shape:
        raise AdapterError(f"{site} ({theirs}.{kind}): expected shape {shape}, got {list(tensor.shape)}")


class _Finder:
    """find(site) -> (their name, their module). names: as attach_to takes them."""

    def __init__(self, module: nn.Module, names: dict[str, str]):
        for site in names:
            if not isinstance(site, str) or re.sub(r"^layers\.\d+\.", "layers.{i}.", site) not in ENCODER_NAMES:
                raise AdapterError(f"names: expected some of {', '.join(ENCODER_NAMES)}, with a number for {{i}} where one layer is meant, got {site!r}")
            if not isinstance(names[site], str):
                raise AdapterError(f"names: {site}: expected their module's name, got {names[site]!r}")
        self.module, self.modules, self.names = module, dict(module.named_modules(remove_duplicate=False)), ENCODER_NAMES | names

    def wanted(self, site: str) -> str | None:
        layer = re.match(r"layers\.(\d+)\.", site)
        pattern = site if layer is None else site.replace(layer[0], "layers.{i}.", 1)
        named = self.names.get(site) or self.names.get(pattern)
        return named if named is None or layer is None else named.replace("{i}", layer[1])

    def all(self, site: str) -> list[str]:
        wanted = self.wanted(site)
        if wanted in self.modules:
            return [wanted]
        found = [] if wanted is None else [name for name in self.modules if name.endswith("." + wanted)]
        return list({id(self.modules[name]): name for name in reversed(found)}.values())[::-1]  # each module by its first name

    def __call__(self, site: str) -> tuple[str, nn.Module]:
        found = self.all(site)
        if any(isinstance(self.modules[name], torch.jit.ScriptModule) for name in found):
            raise AdapterError(f"{site}: expected a module whose weights torch can parametrise, got {found[0]}, which is TorchScript; attach before torch.jit")
        if _sharded([self.modules[name] for name in found], self.module) or (not found and any("_fsdp_wrapped_module" in name for name in self.modules)):
            raise AdapterError(f"{site}: expected a module whose tensors are whole, got one that FSDP has sharded; attach before it is wrapped")
        if len(found) != 1:
            got = f"{' and '.join(found[:2])}; name it in `names`" if found else "none"
            raise AdapterError(f"{site}: expected one module named {self.wanted(site) or 'in `names`'}, found {got}")
        return found[0], self.modules[found[0]]


def _load(folder: Path, find: _Finder, force: bool) -> Method:
    """The method of a folder, checked against the base by its checksum, for which our encoder is filled with the host's tensors."""
    own = checkpoint.module_folder(folder)
    if not folder.is_dir():
        raise AdapterError(f"adapter {str(folder)!r}: {'expected a folder, got a file' if folder.exists() else 'no such folder'}")
    if len(checkpoint.adapter_folders(folder)) > 1:
        raise AdapterError(f"{folder}: a run with several modules; expected one, as {own} is")
    header = checkpoint.read_header(own)
    _only_weights(method_class(header["method"]))
    find("layers.0.attention.query")  # what is missing is named by its site
    layers, queries = 0, set()
    while (found := find.all(f"layers.{layers}.attention.query")) and queries.isdisjoint(found):
        queries.update(found)
        layers += 1
    sizing = {site: find(site) for site in (*TABLES, "layers.0.feed_forward.up")}
    word, position, segment, up = (_filled(site, *found) for site, found in sizing.items())
    for (site, (name, _)), tensor in zip(sizing.items(), (word, position, segment, up)):
        if tensor.dim() != 2:
            raise AdapterError(f"{site} ({name}.weight): expected a matrix, got shape {list(tensor.shape)}")
    config = EncoderConfig(kind=header["base"].get("type", "bert"), layers=layers, hidden=word.shape[1], heads=1, feed_forward=up.shape[0], vocab=word.shape[0],
                           max_positions=position.shape[0], segments=segment.shape[0])  # heads: no method here asks
    theirs = {}
    for ours, name in ENCODER_NAMES.items():
        for i in range(layers) if "{i}" in ours else (0,):
            where, host = find(site := ours.format(i=i))
            for kind in ("weight",) if ours in TABLES else ("weight", "bias"):
                full = site if kind == "weight" else f"{site}.bias"
                _check_shape(full, where, _filled(full, where, host), config)
                of = host.parametrizations[kind] if parametrize.is_parametrized(host, kind) else None
                plain = of.original if hasattr(of, "original") else getattr(host, kind)  # what is made of several tensors, a weight norm's, has no original
                theirs[f"{name.format(i=i)}.{kind}"] = plain.detach()
    tensors = from_foreign(theirs, config)[0]
    with torch.device("cpu"), NoInit():  # whatever torch's default device is
        model = Model(config)
    for name, parameter in model.encoder.named_parameters():
        parameter.data = tensors[name]
    return checkpoint.load_adapter(own, model, force).method
