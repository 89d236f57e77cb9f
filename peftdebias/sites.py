"""The shape of a base model, the places (sites) in it where methods take hold, and what happens there (hooks).

What it adds over encoder.py: everything about methods that the encoder needs to know, so that its own arithmetic stays plain. It names no method.

Letters: T tokens in the batch, D hidden, F feed-forward, H heads, W head width, P prefix length.
"""

import contextlib
import dataclasses
import os
import threading
import weakref
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels
from .errors import AdapterError, ModelError
from .ops import Drop, Forked, dropout, linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The shape of a base model. Sizes are counts; dropout rates lie in [0, 1).

    kind: "bert" or "roberta". max_positions: texts may have that many tokens. position_offset: added to positions before they are looked up
    (RoBERTa: padding index + 1; BERT: 0); the position table has max_positions + position_offset rows. tied: the masked-LM decoder is the word embedding.
    """

    kind: str
    layers: int
    hidden: int
    heads: int
    feed_forward: int
    vocab: int
    max_positions: int
    segments: int = 2
    position_offset: int = 0
    activation: str = "gelu"
    norm_eps: float = 1e-12
    dropout: float = 0.1
    attention_dropout: float = 0.1
    classifier_dropout: float = 0.1
    pad_id: int = 0
    tied: bool = True
    initializer_range: float = 0.02

    def __post_init__(self):
        if self.kind not in ("bert", "roberta"):
            raise ModelError(f"model type: expected bert or roberta, got {self.kind!r}")
        for name in ("layers", "hidden", "heads", "feed_forward", "vocab", "max_positions", "segments", "position_offset", "pad_id"):
            value, least = getattr(self, name), {"position_offset": 0, "pad_id": -1}.get(name, 1)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ModelError(f"{name}: expected a whole number of at least {least}, got {value!r}")
        if not isinstance(self.tied, bool):
            raise ModelError(f"tied: expected true or false, got {self.tied!r}")
        for name, most in (("dropout", 1), ("attention_dropout", 1), ("classifier_dropout", 1), ("norm_eps", 1e30), ("initializer_range", 1e30)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < most:
                raise ModelError(f"{name}: expected a number from 0{' to below 1' if most == 1 else ''}, got {value!r}")
        if self.hidden % self.heads:
            raise ModelError(f"hidden size {self.hidden}: expected a multiple of the number of heads, got {self.heads} heads")
        if not isinstance(self.activation, str) or self.activation not in ACTIVATIONS:
            raise ModelError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")

    @property
    def head_width(self) -> int:
        """Columns of one head, hidden / heads."""
        return self.hidden // self.heads


# ---------------------------------------------------------------- sites

LINEARS = ("attention.query", "attention.key", "attention.value", "attention.output", "feed_forward.up", "feed_forward.down")
BLOCKS = ("attention", "feed_forward")


def linear_sites(config: EncoderConfig, kinds: tuple[str, ...] = LINEARS) -> tuple[str, ...]:
    """Names of the linears of all layers: `layers.3.attention.query`, ...; their biases are the same name + `.bias`."""
    return tuple(f"layers.{i}.{kind}" for i in range(config.layers) for kind in kinds)


def drop_places(config: EncoderConfig) -> dict[str, int]:
    """The number of every linear among the places that drop, behind the encoder's own (encoder.py): one seed a forward pass, and no two places the same mask."""
    return {site: 3 * config.layers + 3 + i for i, site in enumerate(linear_sites(config))}


def block_sites(config: EncoderConfig, kinds: tuple[str, ...] = BLOCKS) -> tuple[str, ...]:
    """Names of the places between a block's output and its LayerNorm: `layers.3.feed_forward`, ..."""
    return tuple(f"layers.{i}.{kind}" for i in range(config.layers) for kind in kinds)


def key_value_sites(config: EncoderConfig) -> tuple[str, ...]:
    """Names of the places where keys and values shared by the batch come in: `layers.3.attention.key_value`, ..."""
    return tuple(f"layers.{i}.attention.key_value" for i in range(config.layers))


EMBED_SITE = "embeddings"
TABLES = ("embeddings.word", "embeddings.position", "embeddings.segment")


def linear_shape(config: EncoderConfig, site: str) -> tuple[int, int]:
    """(out, in) of the linear at `site`."""
    if site.endswith("feed_forward.up"):
        return config.feed_forward, config.hidden
    if site.endswith("feed_forward.down"):
        return config.hidden, config.feed_forward
    return config.hidden, config.hidden


def table_rows(config: EncoderConfig) -> dict[str, int]:
    """How many rows each of TABLES has."""
    return dict(zip(TABLES, (config.vocab, config.max_positions + config.position_offset, config.segments)))


def parameter_size(config: EncoderConfig, site: str) -> int:
    """How many values the parameter of a linear, its bias, or an embedding table has."""
    if site in TABLES:
        return table_rows(config)[site] * config.hidden
    out_width, in_width = linear_shape(config, site.removesuffix(".bias"))
    return out_width if site.endswith(".bias") else out_width * in_width


@dataclasses.dataclass
class Merged:
    """Deltas that patch.merge wrote into the base: which methods, and each touched parameter with the tensor it held and the one it holds.

    placed: whether the merged tensors are in now (inside a `without` of one of the methods they are not).
    """

    names: set[str]
    tensors: list[tuple[nn.Parameter, Tensor, Tensor]]
    placed: bool = False

    def place(self, merged: bool) -> None:
        """Put the merged or the kept tensors in; nothing is computed, so the kept ones come back bit for bit."""
        self.placed = merged
        for parameter, kept, written in self.tensors:
            parameter.data = written if merged else kept


_main = threading.main_thread().ident
_all: "weakref.WeakSet[Hooks]" = weakref.WeakSet()


def _forked() -> None:
    """In a child of os.fork the blocks of the parent's other threads end: nobody is there to end them. Those of the main thread stay: a pool forks its later workers from a thread
    of its own. What another thread was about to settle is settled."""
    for hooks in list(_all):
        hooks.turned_off = [block for block in hooks.turned_off if block[0] in (_main, threading.get_ident())]
        hooks.settle()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class Hooks:
    """The methods attached to one encoder, by name, in the order they were attached; those in `off` are passed over.

    An encoder without methods asks once per site and pays a dictionary look-up.
    """

    def __init__(self):
        self.methods: dict[str, object] = {}
        self.off: set[str] = set()
        self.merged: Merged | None = None
        self.turned_off: list[tuple[int, set[str]]] = []  # (thread, names) of each open `without`
        self.folded: set[str] = set()
        self._at: dict[str, list] = {}
        self._hosts: dict[str, set[str]] = {}
        _all.add(self)

    def __setstate__(self, state: dict) -> None:
        """A copy's methods are on: the `without` blocks that are open are the original's, and only those end there."""
        self.__dict__.update(state, turned_off=[])
        _all.add(self)
        self.settle()

    def add(self, name: str, method, sites: tuple[str, ...]) -> None:
        self.methods[name] = method
        self._hosts[name] = set(sites)
        self.refresh()

    def remove(self, name: str) -> None:
        del self.methods[name], self._hosts[name]
        self.off.discard(name)
        self.refresh()

    def settle(self) -> None:
        """Must follow any change of `turned_off`, `merged` and `folded`: what is merged is in the weights unless one of it is turned off, and then only the others act by their hooks."""
        out = set().union(*(names for _, names in self.turned_off))
        if self.merged is not None:
            self.merged.place(not self.merged.names & out)
        self.off = out | self.folded | (self.merged.names if self.merged is not None and self.merged.placed else set())
        self.refresh()

    @contextlib.contextmanager
    def without(self, names: set[str]) -> Iterator[None]:
        """Inside the `with` block these are off, for every thread."""
        block = threading.get_ident(), names
        self.turned_off.append(block)
        self.settle()
        try:
            yield
        finally:
            self.turned_off = [other for other in self.turned_off if other is not block]
            self.settle()

    def known(self, what: str, name: object) -> str:
        """`name`, which is attached. Raises AdapterError about `what` on another."""
        if not isinstance(name, str) or name not in self.methods:
            raise AdapterError(f"{what}: expected an attached method ({', '.join(self.methods) or 'there is none'}), got {name!r}")
        return name

    def refresh(self) -> None:
        """Must follow any change of `off`."""
        self._at = {}
        for name, method in self.methods.items():
            if name not in self.off:
                for site in self._hosts[name]:
                    self._at.setdefault(site, []).append(method)

    def at(self, site: str) -> list:
        return self._at.get(site, [])

    def value(self, site: str, tensor: Tensor) -> Tensor:
        """A parameter with the deltas of all methods at `site` added."""
        for method in self.at(site):
            tensor = add_delta(tensor, method.delta(site))
        return tensor

    def linear(self, site: str, x: Tensor, weight: Tensor, bias: Tensor, seed: Tensor | None = None) -> Tensor:
        """x [T, in] -> [T, out] through the methods at `site`: deltas go into the weight, scales multiply input and output, at most one method computes the
        product itself. seed: int64 [1], of the masks of this forward pass; None drops nothing.

        Of the methods that define `linear`, the one without a `delta` (or whose delta does not say it now: `drops`), else the last, computes the product;
        the others add their deltas.
        """
        bias = self.value(site + ".bias", bias)
        methods = self.at(site)
        own = [m for m in methods if m.computes(site)]
        bare = [m for m in own if m.drops or m.delta(site) is None] if len(own) > 1 else own
        if len(bare) > 1:
            raise AdapterError(f"{site}: {bare[0].name} and {bare[1].name} both compute this product; expected at most one without a delta")
        product = (bare or own or [None])[-1]
        for method in methods:
            if method is not product:
                weight = add_delta(weight, method.delta(site))
        scales = [m.scale(site) for m in methods]
        for scale, _ in scales:
            x = x if scale is None else (x * scale).to(x.dtype)
        x = linear(x, weight, bias) if product is None else product.linear(site, x, weight, bias, seed)
        for _, scale in scales:
            x = x if scale is None else (x * scale).to(x.dtype)
        return x

    def block(self, site: str, hidden: Tensor, residual: Tensor, norm: Callable, drop: Drop | None = None) -> Forked:
        """hidden, residual [T, D] -> norm(dropout(hidden) + residual) for a product and for the next residual; what is dropped first is handed through the methods at `site`,
        one after the other.

        norm(x, residual=None, drop=None, fork=False), as ops.norm without its parameters.
        """
        methods = self.at(site)
        if methods:
            hidden, drop = dropout(hidden, drop), None
        for method in methods:
            hidden = method.block(site, hidden, residual, norm)
        return norm(hidden, residual, drop, True)

    def key_value(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """([P, H, W], [P, H, W]), the prefixes of all methods end to end, or None."""
        every = [method.key_value(layer) for method in self.at(f"layers.{layer}.attention.key_value")]
        found = [kv for kv in every if kv is not None]
        if len(found) < 2:
            return found[0] if found else None
        return torch.cat([k for k, _ in found]), torch.cat([v for _, v in found])

    def base(self, parameter: nn.Parameter) -> Tensor:
        """A base parameter without deltas, merged or not."""
        merged = self.merged.tensors if self.merged and self.merged.placed else []
        return next((kept for p, kept, _ in merged if p is parameter), parameter)

    @property
    def position_shift(self) -> int:
        """How far the text's positions move: the shifts of all methods that are on."""
        return self.shift_before(None)

    def shift_before(self, method) -> int:
        """The shifts of the methods attached before `method`."""
        on = [m for name, m in self.methods.items() if name not in self.off]
        return sum(m.position_shift for m in (on[:on.index(method)] if method in on else on))


def add_delta(tensor: Tensor, delta: Tensor | tuple[Tensor, Tensor] | None) -> Tensor:
    """tensor + delta, out of place. delta: dense of the same shape, or (flat indices int64 [k], ascending and each once, values [k]), or None."""
    if delta is None:
        return tensor
    if isinstance(delta, tuple):
        plain = tensor.dtype == torch.float64  # no kernel takes it
        return (sparse_add_ref if plain else kernels.choose("sparse_add", reference=sparse_add_ref, device=tensor.device))(tensor, *delta)
    return tensor + delta.to(tensor.dtype)


def sparse_add_ref(weight: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """weight of any shape with values [k] added at flat indices int64 [k]; the specification. The kernel: kernels/fused/sparse.py."""
    return weight.flatten().index_add(0, indices, values.to(weight.dtype)).view_as(weight)
