"""A kind of module here and there: `Table`, read forwards and backwards, and what several kinds have in common."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .. import methods, weights
from ..errors import AdapterError, ConfigError
from ..files import wrong_numbers
from ..methods import Method
from ..sites import EncoderConfig, linear_sites
from .folders import Fields


@dataclasses.dataclass(frozen=True)
class Table:
    """A kind of module here and there.

    ours, theirs: names of the kind. read(fields, config) -> our method as configured, without values (see `made`). write(method, config) -> their configuration.
    keys(method, config) -> {our parameter: their tensor}; several of ours may share one of theirs. split(their tensor, ours, method) -> ours;
    join([ours of one of theirs, in order]) -> theirs; shape(ours, method) -> of theirs.
    """

    ours: str
    theirs: str
    read: Callable[[Fields, EncoderConfig], Method]
    keys: Callable[[Method, EncoderConfig], dict[str, str]]
    write: Callable[[Method, EncoderConfig], dict] | None = None
    shape: Callable[[str, Method], tuple[int, ...]] = lambda name, method: tuple(method.values[name].shape)
    split: Callable[[Tensor, str, Method], Tensor] = lambda tensor, name, method: tensor.view(method.values[name].shape)
    join: Callable[[list[Tensor], tuple[int, ...]], Tensor] = lambda tensors, shape: tensors[0].view(shape)

    def take(self, method: Method, tensors: dict[str, Tensor], config: EncoderConfig, path: Path) -> Method:
        """`method`, which has no values, with their tensors in it, each used.

        Raises AdapterError that names the file and the first that is missing, unknown or of another shape; until then nothing of the configured size is made.
        """
        keys, state = self.keys(method, config), {}
        for name in tensors:
            if name not in keys.values():
                raise AdapterError(f"{path}: expected {len(set(keys.values()))} tensors of a {self.theirs} module as configured, got {name} besides")
        for ours, theirs in keys.items():
            if theirs not in tensors:
                raise AdapterError(f"{path}: expected the tensor {theirs}, found none")
            wanted, tensor = self.shape(ours, method), tensors[theirs]
            if tuple(tensor.shape) != wanted:
                raise AdapterError(f"{path}: {theirs}: expected shape {list(wanted)}, got {list(tensor.shape)}")
            if wrong := wrong_numbers(tensor):
                raise AdapterError(f"{path}: {theirs}: {wrong}")
            state[ours] = self.split(tensor, ours, method)
        return methods.restored(type(method), method.config, config, state)

    def give(self, method: Method, config: EncoderConfig) -> dict[str, Tensor]:
        """Their tensors from `method`: the inverse of take."""
        groups: dict[str, list[str]] = {}
        for ours, theirs in self.keys(method, config).items():
            groups.setdefault(theirs, []).append(ours)
        state = method.state()
        return {theirs: self.join([state[n] for n in names], self.shape(names[0], method)).contiguous() for theirs, names in groups.items()}


def names_in(fields: Fields, key: str) -> list[str]:
    """A list of names; a pattern or "all-linear" is refused."""
    value = fields.get(key, (list, str), [])
    if isinstance(value, str) or not all(isinstance(v, str) for v in value):
        raise AdapterError(f"{fields.path}: {key}: expected a list of names (patterns and \"all-linear\" are not read), got {json.dumps(value)}")
    return value


def kinds_in(fields: Fields, key: str, chosen: Callable[[str], bool], config: EncoderConfig) -> tuple[str, ...]:
    """Kinds of linears whose foreign names are chosen. Raises AdapterError unless every layer has the same."""
    stems, found = weights.foreign_names(config), {}
    for site in linear_sites(config):
        if chosen(stems[site]):
            _, layer, kind = site.split(".", 2)
            found.setdefault(kind, []).append(int(layer))
    for kind, layers in found.items():
        if len(layers) != config.layers:
            raise AdapterError(f"{fields.path}: {key}: expected the same linears in every layer, got {kind} in layers {', '.join(map(str, layers))} of {config.layers}")
    return tuple(found)


def made(fields: Fields, name: str, options: dict, config: EncoderConfig) -> Method:
    """A method of ours with these options, without values: see methods.outline. Raises AdapterError with the file where they make no sense."""
    cls = methods.method_class(name)
    try:
        return methods.outline(cls, cls.Config(**options), config)
    except (ConfigError, TypeError) as error:
        raise AdapterError(f"{fields.path}: {error}") from None


def per_site(ending: Callable[[str], str]) -> Callable[[Method, EncoderConfig], dict[str, str]]:
    """Keys of a module whose parameters sit at linears: our `SITE` or `SITE.a` -> their name of the linear + ending("" or "a")."""
    def keys(method: Method, config: EncoderConfig) -> dict[str, str]:
        stems, found = weights.foreign_names(config), {}
        for name in method.values:
            site = next(s for s in (name, name.rpartition(".")[0]) if s in stems)
            found[name] = stems[site] + ending(name.removeprefix(site).removeprefix("."))
        return found
    return keys


# Prefixes there are one table [P, L * 2 * D], for every position the key and value of layer 0, of layer 1, ...
def prefix_part(tensor: Tensor, name: str, method: Method) -> Tensor:
    """Their table -> our `layers.3.key` [P, H, W]."""
    _, layer, part = name.split(".")
    c = method.encoder_config
    return tensor.view(method.config.length, c.layers, 2, c.heads, c.head_width)[:, int(layer), ("key", "value").index(part)].contiguous()


def prefix_joined(tensors: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Keys and values of every layer [P, D] in turns -> one tensor [P, 2 L D], in `shape`."""
    return torch.stack(tensors, 1).reshape(shape)


def prefix_size(method: Method) -> tuple[int, int]:
    """(P, 2 L D)."""
    return method.config.length, 2 * method.encoder_config.layers * method.encoder_config.hidden
