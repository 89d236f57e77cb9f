"""What a method is, and the methods there are.

A method is a value, never a branch: loops, tasks, checkpoint and command line call this Protocol and name no method. It says which sites of the encoder
it takes hold of, owns a few parameters, and offers any of these hooks. Adding one is a file here and a line in METHODS.

    linear, delta, low_rank    lora (a product, its delta, and that as two factors)    block        adapter
    delta                      bias, sparse                                            key_value    prefix
    scale                      ia3                                                     embed        prompt
    learn, keeps               what trains itself in its own way, and what it lets rest downstream: sparse

Letters: T tokens, D hidden, H heads, W head width, P prefix length.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import numbers
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from ..errors import AdapterError, ConfigError
from ..files import wrong_numbers
from ..options import check_seed, checked, expect_whole
from ..sites import LINEARS, EncoderConfig

if TYPE_CHECKING:
    from ..batches import Batch
    from ..encoder import Model

LARGEST = 2**24  # parameters that a module may have however small its base: 64 MiB


class Method:
    """The Protocol, with hooks that do nothing. A subclass sets `Config`, fills `values` and overrides the hooks it needs.

    trains_base: upstream trains the base itself; there is nothing to attach. mergeable: writing `delta` into the weights gives the same outputs.
    foldable: training the merged weights downstream is the same training (additive deltas only). position_shift: how far text positions move.
    first_row: which row a classifier reads, "text" or "prompt".
    """

    name: ClassVar[str]
    Config: ClassVar[type]
    trains_base: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False
    foldable: ClassVar[bool] = False
    size: ClassVar[str | None] = None  # the field of Config that `budget` chooses; None: the size is fixed
    cap: ClassVar[str] = ""  # why `capped` may make it less, in words
    position_shift: int = 0
    first_row: str = "text"

    def __init__(self, config, encoder_config: EncoderConfig, generator: torch.Generator | None = None):
        self.config = config
        self.encoder_config = encoder_config
        self.training = False
        self.values: dict[str, Parameter] = {}

    # ---- what it is made of

    @classmethod
    def parameters_for(cls, config, encoder_config: EncoderConfig) -> int:
        """How many parameters a module of `config` has as it is saved: a straight line in the field `size`. Methods with a `size` say it."""
        raise ConfigError(f"budget: {cls.name} has a fixed size; expected no budget")

    @classmethod
    def size_for(cls, encoder_config: EncoderConfig, target_parameters: int, **chosen):
        """The config whose parameter count is nearest to `target_parameters`, of size 1 at least; `chosen` are its other fields.

        Raises ConfigError where the size is fixed, or chosen.
        """
        if cls.size is None:
            raise ConfigError(f"budget: {cls.name} has a fixed size; expected no budget")
        if cls.size in chosen:
            raise ConfigError(f"budget: chooses {cls.name}'s {cls.size}; expected no {cls.size} beside it")
        one = cls.Config(**chosen, **{cls.size: 1})
        first, second = (cls.parameters_for(dataclasses.replace(one, **{cls.size: n}), encoder_config) for n in (1, 2))
        return dataclasses.replace(one, **{cls.size: 1 + max(0, round((target_parameters - first) / (second - first)))})

    @classmethod
    def capped(cls, config, encoder_config: EncoderConfig, max_length: int):
        """`config` as budget chose it, made no larger than texts of max_length tokens allow; `cap` says why that may be less."""
        return config

    def count(self) -> int:
        """How many parameters it has as it is saved and used: a re-parametrised prefix flat, sparse values without their indices."""
        return sum(tensor.numel() for tensor in self.state().values() if tensor.is_floating_point())

    def file_bytes(self) -> int:
        """How many bytes its tensors take in a file."""
        return 4 * self.count()

    def sites(self, encoder_config: EncoderConfig) -> tuple[str, ...]:
        """Names of the sites and parameters (see sites.linear_sites and its neighbours) that this method takes hold of."""
        return ()

    def parameters(self) -> dict[str, Parameter]:
        """Its own parameters by name: what is trained, counted and saved."""
        return self.values

    def train(self, mode: bool = True) -> None:
        """In training mode where `mode` says so and something of it is trained."""
        self.training = mode and any(p.requires_grad for p in self.parameters().values())

    def state(self) -> dict[str, Tensor]:
        """The tensors to save, detached, on the CPU."""
        return {name: p.detach().cpu().contiguous() for name, p in self.parameters().items()}

    @torch.inference_mode(False)
    def load(self, state: dict[str, Tensor]) -> None:
        """Take saved tensors. Raises AdapterError on a name or shape that does not match, and on numbers that are none."""
        expect_tensors(f"{self.name} adapter", state)
        own = self.parameters()
        if set(own) != set(state):
            odd = sorted(set(own) ^ set(state))
            raise AdapterError(f"{self.name} adapter: expected tensors {len(own)} by name, got {len(state)}; first that differs: {odd[0]}")
        for name, parameter in own.items():
            if parameter.shape != state[name].shape:
                raise AdapterError(f"{self.name} adapter, {name}: expected shape {list(parameter.shape)}, got {list(state[name].shape)}")
            if wrong := wrong_numbers(state[name], parameter.dtype):
                raise AdapterError(f"{self.name} adapter, {name}: {wrong}")
            parameter.data = state[name].to(parameter.device, parameter.dtype).clone(memory_format=torch.contiguous_format)

    # ---- hooks

    def computes(self, site: str) -> bool:
        """Whether `linear` is this method's way to act at `site` (otherwise `delta` is)."""
        return type(self).linear is not Method.linear

    @property
    def drops(self) -> bool:
        """Whether `linear` does now what `delta` cannot say (dropout, in training): then it computes the product, and others give way to it."""
        return False

    def linear(self, site: str, x: Tensor, weight: Tensor, bias: Tensor, seed: Tensor | None = None) -> Tensor:
        """x [T, in] -> [T, out]: the product at a linear site. seed: int64 [1], what masks of dropout are made of (sites.drop_places), or None: nothing drops."""
        raise AdapterError(f"{self.name}: no product of its own at {site}")

    def delta(self, site: str) -> Tensor | tuple[Tensor, Tensor] | None:
        """What is added to the parameter `site`: dense, or (flat indices int64 [k], values [k]), or None."""
        return None

    def low_rank(self, site: str) -> tuple[Tensor, Tensor, float] | None:
        """(A [r, in], B [out, r], s) where the delta of a linear is s B A and says all that this method does there now: written.py may write it into the weight."""
        return None

    def scale(self, site: str) -> tuple[Tensor | None, Tensor | None]:
        """(input [in], output [out]) that multiply what goes into and comes out of a linear, its deltas and bias included; None leaves it."""
        return None, None

    def block(self, site: str, hidden: Tensor, residual: Tensor, norm) -> Tensor:
        """hidden [T, D], a block's output, and residual [T, D], its input -> [T, D] that takes hidden's place; norm(x, residual=None) is the block's own
        LayerNorm, of x + residual where there is one.

        The encoder goes on with norm(result + residual), so methods stack.
        """
        raise AdapterError(f"{self.name}: no block at {site}")

    def key_value(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """([P, H, W], [P, H, W]): keys and values that every text's queries see in `layer`."""
        return None

    def embed(self, hidden: Tensor, batch: Batch, positioned) -> tuple[Tensor, Batch]:
        """hidden [T, D], words, positions and segments summed, before the first LayerNorm -> the same with vectors put in, and the batch that fits.

        positioned(vectors [N, D], positions int64 [N]) -> [N, D]: the vectors as words at these positions. See batches.with_inserted.
        """
        return hidden, batch

    # ---- training and files

    def learn(self, model: Model, loop) -> object:
        """Train this method on `model`, to which it is attached, and return what the last `loop` returned.

        loop(parameters: {name: Parameter}, pull=None, rate=1.0) trains exactly these at `rate` times the learning rate, calls pull(), which adds to their gradients,
        after every backward, and leaves the best state in them.
        """
        return loop(self.parameters())

    def keeps(self, name: str) -> bool:
        """Whether the base's parameter of that name stays as it is downstream, beside this method."""
        return False

    def saved_config(self):
        """The config that goes with `state`, where saving simplifies."""
        return self.config


METHODS: dict[str, str] = {"adapter": "Adapter", "prefix": "Prefix", "prompt": "Prompt", "lora": "LoRA", "sparse": "Sparse", "ia3": "IA3", "bias": "Bias",
                           "full": "Full"}
"""name -> class, each in the module of its name."""


def method_class(name: str) -> type[Method]:
    """The class of a method by name. Raises ConfigError that lists the known ones."""
    if not isinstance(name, str) or name not in METHODS:
        raise ConfigError(f"method: expected one of {', '.join(METHODS)}, got {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{name}"), METHODS[name])


def base_parameters(config: EncoderConfig) -> int:
    """What `budget` is a share of: embeddings and layers; no pooler, no heads, tied weights once."""
    d, f = config.hidden, config.feed_forward
    embeddings = (config.vocab + config.max_positions + config.position_offset + config.segments + 2) * d
    layer = 4 * d * (d + 1) + d * (f + 1) + f * (d + 1) + 4 * d
    return embeddings + config.layers * layer


def finite(what: str, value: float, least: float = -math.inf) -> None:
    """Raises ConfigError about `what` on a number that is not finite or less than `least`."""
    if not (math.isfinite(value) and value >= least):
        raise ConfigError(f"{what}: expected a finite number{f' of at least {least:g}' if math.isfinite(least) else ''}, got {value}")


def expect_tensors(what: str, state: dict[str, Tensor]) -> None:
    """Raises AdapterError about `what` on anything but tensors by name."""
    odd = None if isinstance(state, Mapping) else type(state).__name__
    odd = odd or next((f"{type(tensor).__name__} for {name!r}" for name, tensor in state.items() if not (isinstance(name, str) and isinstance(tensor, Tensor))), None)
    if odd:
        raise AdapterError(f"{what}: expected tensors by name, got {odd}")


def linear_kinds(chosen: tuple[str, ...], what: str) -> tuple[str, ...]:
    """Linears of a layer by full name, in the order of sites.LINEARS: "query" or "attention.query" -> "attention.query". Raises ConfigError about `what`."""
    known = {kind.split(".")[1]: kind for kind in LINEARS} | {kind: kind for kind in LINEARS}
    for name in chosen:
        if name not in known:
            raise ConfigError(f"{what}: expected some of {', '.join(k.split('.')[1] for k in LINEARS)}, got {name!r}")
    return tuple(kind for kind in LINEARS if kind in {known[name] for name in chosen})


@torch.inference_mode(False)  # what is made inside of it can be trained later
def create(name: str, encoder_config: EncoderConfig, *, budget: float | None = None, options: dict | None = None, seed: int = 0,
           max_length: int = 256) -> Method:
    """A new method. options: fields of its Config. budget: share of base_parameters that its size should come nearest to, with room left for texts of
    max_length tokens; the share reached is method.count() / base_parameters(encoder_config).

    Raises ConfigError on an unknown field or one of another type, a budget together with the field it would choose, and a module larger than the base, unless
    it has no more than LARGEST parameters.
    """
    cls, config = _configured(name, encoder_config, budget, options, seed, max_length)
    return _made(cls, config, encoder_config, torch.Generator().manual_seed(int(seed)))


def check(name: str, encoder_config: EncoderConfig, *, budget: float | None = None, options: dict | None = None, max_length: int = 256) -> None:
    """Raises what `create` would, and makes nothing."""
    _configured(name, encoder_config, budget, options, 0, max_length)


def _configured(name: str, encoder_config: EncoderConfig, budget: float | None, options: dict | None, seed: int, max_length: int) -> tuple[type[Method], object]:
    if not isinstance(encoder_config, EncoderConfig):
        raise ConfigError(f"create {name!r}: expected an EncoderConfig, as model.config is, got {type(encoder_config).__name__}")
    cls = method_class(name)
    check_seed(seed, f"create {name!r}: seed")
    expect_whole(f"create {name!r}: max_length", max_length, 1)
    if not isinstance(options, (Mapping, type(None))) or not all(isinstance(key, str) for key in options or ()):
        raise ConfigError(f"create {name!r}: options: expected a dict of {cls.Config.__name__}'s fields, got {type(options).__name__}")
    options = {key: value.item() if isinstance(value, numpy.generic) else value for key, value in (options or {}).items()}
    unset = {f.name for f in dataclasses.fields(cls.Config) if f.default is None and options.get(f.name, "") is None}
    options = checked(cls.Config, {key: value for key, value in options.items() if key not in unset}, f"{name} options: ")
    if budget is None:
        config = cls.Config(**options)
    elif isinstance(budget, numbers.Real) and 0 < budget < 1:
        config = cls.capped(cls.size_for(encoder_config, round(budget * base_parameters(encoder_config)), **options), encoder_config, int(max_length))
    else:
        raise ConfigError(f"budget: expected a share between 0 and 1, got {budget!r}")
    if not cls.trains_base:
        limit, wanted = max(base_parameters(encoder_config), LARGEST), sum(p.numel() for p in outline(cls, config, encoder_config).parameters().values())
        if wanted > limit:
            raise ConfigError(f"{name}: expected a module of at most {limit:,} parameters, got {wanted:,}, by {config}")
    return cls, config


def short_note(budget: float | None, method: Method, options: dict) -> list[str]:
    """One line where `method`, made by `create` with that budget and these options, was capped, else none."""
    if budget is None:
        return []
    size, encoder, chosen = method.size, method.encoder_config, {key: value for key, value in options.items() if value is not None}
    wanted, found = (getattr(config, size) for config in (method.size_for(encoder, round(budget * base_parameters(encoder)), **chosen), method.config))
    return [f"--budget: {budget:g} of the base comes to {method.name} {size} {wanted}, {found} taken: {method.cap}"] if found != wanted else []


def _made(cls: type[Method], config, encoder_config: EncoderConfig, generator: torch.Generator) -> Method:
    """On the CPU, whatever torch's default device is, from no other draws than the generator's."""
    with torch.device("cpu"):
        return cls(config, encoder_config, generator)


class _Undrawn(TorchFunctionMode):
    """Inside the `with` block normal_ and uniform_ leave tensors as they are: on "meta" there is nothing to fill, and torch would import its compiler to say so (2 s)."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return args[0] if function in (Tensor.normal_, Tensor.uniform_) else function(*args, **(kwargs or {}))


def outline(cls: type[Method], config, encoder_config: EncoderConfig) -> Method:
    """A method of `config` with shapes and no values, on torch's "meta" device: whatever sizes it asks for, it takes no memory.

    Raises ConfigError on sizes that no tensor can have.
    """
    try:
        with torch.device("meta"), _Undrawn():
            return cls(config, encoder_config)
    except (RuntimeError, OverflowError, TypeError):
        raise ConfigError(f"{cls.name}: expected sizes that a tensor can have, got {config}") from None


@torch.inference_mode(False)
def restored(cls: type[Method], config, encoder_config: EncoderConfig, state: dict[str, Tensor]) -> Method:
    """A method of `config` with the saved tensors `state` in it. Raises ConfigError or AdapterError, before anything of its size is made, where they do not fit:
    a configuration from elsewhere may ask for more than memory holds."""
    outline(cls, config, encoder_config).load(state)
    method = _made(cls, config, encoder_config, torch.Generator())
    method.load(state)
    return method


def overview(encoder_config: EncoderConfig, budget: float, max_length: int = 256) -> list[tuple[str, ...]]:
    """A row for every method: name, size chosen by `budget` (a fixed one says so), parameters, share of the base, KiB of its tensors, mergeable, foldable."""
    rows, total = [], base_parameters(encoder_config)
    for name in METHODS:
        cls = method_class(name)
        flags = tuple("yes" if flag else "no" for flag in (cls.mergeable, cls.foldable))
        if cls.trains_base:
            rows.append((name, "the base itself", f"{total:,}", "100.00 %", f"{total * 4 / 1024:,.0f}", "-", "-"))
            continue
        method = create(name, encoder_config, budget=None if cls.size is None else budget, max_length=max_length)
        size = "fixed" if cls.size is None else f"{cls.size} {getattr(method.config, cls.size)}"
        rows.append((name, size, f"{method.count():,}", f"{100 * method.count() / total:.2f} %", f"{method.file_bytes() / 1024:,.0f}", *flags))
    return rows
