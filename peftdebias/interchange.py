"""Adapter folders of others in and out: Hugging Face `peft` both ways, AdapterHub's `adapters` inwards. Neither library is imported.

    peft         adapter_config.json with "peft_type", adapter_model.safetensors or .bin      LoRA, prefix, prompt, (IA)^3
    AdapterHub   adapter_config.json with "config", adapter.safetensors or pytorch_adapter.bin    Pfeiffer, Houlsby, parallel, LoRA, flat prefix

What it adds over checkpoint.py: foreign names stay at this border, in one table per kind of module that is read forwards and backwards. What theirs and ours
do alike is carried over exactly; what one side cannot say is refused by name. In files of others the tensors must be all of those that their configuration
asks for, no more and no less. Left out: writing AdapterHub's, their fusion, stacks, gates and learnt scalings.

Letters: D hidden, H heads, W head width, L layers, P prefix length, K bottleneck, r rank.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import Linear, Parameter

from . import __version__, checkpoint, methods, patch, weights
from .encoder import Model
from .errors import AdapterError, ConfigError, ModelError
from .methods import Method
from .sites import EncoderConfig, block_sites, linear_sites
from .tokens import load_tokenizer

CONFIG = "adapter_config.json"
PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
HUB_FILES = ("adapter.safetensors", "pytorch_adapter.bin")
LIMITS = "The benchmarks have positive predictive power only: they can show bias, never its absence. Gender is treated as binary, and the word lists are narrow."


@dataclasses.dataclass
class Foreign:
    """What a folder of others holds. heads: tensors of classifier or masked-LM heads that came along, by our names. origin: the library, its version and kind."""

    method: Method
    heads: dict[str, Tensor]
    origin: dict[str, str]


# ---------------------------------------------------------------- their configuration

class Fields:
    """A JSON object of others, asked key by key; what was never asked for and says something is refused at the end (`rest`)."""

    def __init__(self, path: Path, values: dict):
        self.path, self.values, self.asked = path, values, set()

    def get(self, key: str, kind: type | tuple, default=None):
        """The value of `key`; `default` where it is absent or null. Raises AdapterError where it is neither given nor of `kind`."""
        self.asked.add(key)
        value = self.values.get(key)
        value = default if value is None else value
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if value is None or not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise AdapterError(f"{self.path}: {key}: expected {' or '.join(k.__name__ for k in kinds)}, got {value!r}")
        return value

    def expect(self, key: str, *wanted) -> None:
        """Raises AdapterError unless `key` is absent, null or one of `wanted`."""
        self.asked.add(key)
        value = self.values.get(key)
        if value is not None and not any(type(value) is type(w) and value == w for w in wanted):
            raise AdapterError(f"{self.path}: {key}: expected {' or '.join(json.dumps(w) for w in wanted)}, got {json.dumps(value)}")

    def rest(self, *ignored: str) -> None:
        """Raises AdapterError on a key that nobody asked for, is not `ignored`, and holds more than null, false, "none" or nothing."""
        for key, value in self.values.items():
            if key not in self.asked and key not in ignored and value not in (None, False, "none", {}, []):
                raise AdapterError(f"{self.path}: {key}: expected none (there is no such thing here), got {json.dumps(value)}")


def _names(fields: Fields, key: str) -> list[str]:
    """A list of names; a pattern or "all-linear" is refused."""
    value = fields.get(key, (list, str), [])
    if isinstance(value, str) or not all(isinstance(v, str) for v in value):
        raise AdapterError(f"{fields.path}: {key}: expected a list of names (patterns and \"all-linear\" are not read), got {json.dumps(value)}")
    return value


def _kinds(fields: Fields, key: str, chosen: Callable[[str], bool], config: EncoderConfig) -> tuple[str, ...]:
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


def _made(fields: Fields, name: str, options: dict, config: EncoderConfig) -> Method:
    """A method of ours with these options. Raises AdapterError with the file where they make no sense."""
    cls = methods.method_class(name)
    try:
        return cls(cls.Config(**options), config)
    except (ConfigError, TypeError) as error:
        raise AdapterError(f"{fields.path}: {error}") from None


# ---------------------------------------------------------------- one table per kind

@dataclasses.dataclass(frozen=True)
class Table:
    """A kind of module here and there.

    ours, theirs: names of the kind. read(fields, config) -> our method, its values not yet filled. write(method, config) -> their configuration.
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

    def take(self, method: Method, tensors: dict[str, Tensor], config: EncoderConfig, path: Path) -> None:
        """Fill `method` from their tensors, each used. Raises AdapterError that names the file and the first that is missing, unknown or of another shape."""
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
            if not tensor.is_floating_point():
                raise AdapterError(f"{path}: {theirs}: expected floating-point numbers, got {str(tensor.dtype).removeprefix('torch.')}")
            state[ours] = self.split(tensor, ours, method)
        method.load(state)

    def give(self, method: Method, config: EncoderConfig) -> dict[str, Tensor]:
        """Their tensors from `method`: the inverse of take."""
        groups: dict[str, list[str]] = {}
        for ours, theirs in self.keys(method, config).items():
            groups.setdefault(theirs, []).append(ours)
        state = method.state()
        return {theirs: self.join([state[n] for n in names], self.shape(names[0], method)).contiguous() for theirs, names in groups.items()}


def _per_site(ending: Callable[[str], str]) -> Callable[[Method, EncoderConfig], dict[str, str]]:
    """Keys of a module whose parameters sit at linears: our `SITE` or `SITE.a` -> their name of the linear + ending("" or "a")."""
    def keys(method: Method, config: EncoderConfig) -> dict[str, str]:
        stems, found = weights.foreign_names(config), {}
        for name in method.values:
            site = next(s for s in (name, name.rpartition(".")[0]) if s in stems)
            found[name] = stems[site] + ending(name.removeprefix(site).removeprefix("."))
        return found
    return keys


# Prefixes there are one table [P, L * 2 * D], for every position the key and value of layer 0, of layer 1, ...
def _prefix_part(tensor: Tensor, name: str, method: Method) -> Tensor:
    """Their table -> our `layers.3.key` [P, H, W]."""
    _, layer, part = name.split(".")
    c = method.encoder_config
    return tensor.view(method.config.length, c.layers, 2, c.heads, c.head_width)[:, int(layer), ("key", "value").index(part)].contiguous()


def _prefix_joined(tensors: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    return torch.stack(tensors, 1).reshape(shape)


def _prefix_size(method: Method) -> tuple[int, int]:
    return method.config.length, 2 * method.encoder_config.layers * method.encoder_config.hidden


# ---------------------------------------------------------------- peft

PEFT_INERT = ("auto_mapping", "base_model_name_or_path", "inference_mode", "modules_to_save", "peft_type", "peft_version", "revision", "task_type")


def _read_peft_lora(fields: Fields, config: EncoderConfig) -> Method:
    targets = _names(fields, "target_modules")
    fields.expect("layers_to_transform")
    fields.expect("bias", "none")
    fields.expect("init_lora_weights", True, False, "gaussian", "eva", "orthogonal")  # others change the base as they begin
    options = {
        "rank": fields.get("r", int), "alpha": float(fields.get("lora_alpha", (int, float), 8)), "rank_stabilized": fields.get("use_rslora", bool, False),
        "dropout": float(fields.get("lora_dropout", (int, float), 0.0)), "targets": _kinds(fields, "target_modules", lambda stem: _ends(stem, targets), config)}
    fields.rest(*PEFT_INERT, "corda_config", "ensure_weight_tying", "eva_config", "loftq_config", "lora_ga_config", "megatron_core", "qalora_group_size")
    return _made(fields, "lora", options, config)


def _ends(stem: str, targets: list[str]) -> bool:
    """As peft matches a list."""
    return any(stem == t or stem.endswith("." + t) for t in targets)


def _targets(kinds: tuple[str, ...], config: EncoderConfig) -> list[str]:
    """The shortest of their names that mean these linears and no other: feed_forward.down ends as attention.output does, so alone it is named layer by layer."""
    theirs = {kind: weights.ENCODER_NAMES[f"layers.{{i}}.{kind}"] for kind in kinds}
    found = [name.removeprefix("encoder.layer.{i}.") for kind, name in theirs.items() if kind != "feed_forward.down"]
    if "feed_forward.down" in theirs:
        found += [theirs["feed_forward.down"].removeprefix("encoder.").format(i=i) for i in range(config.layers)]
    return found


def _write_peft_lora(method: Method, config: EncoderConfig) -> dict:
    c = method.config
    alpha = c.scale * (c.rank**0.5 if c.rank_stabilized else c.rank) if c.alpha is None else c.alpha
    return {"r": c.rank, "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha, "use_rslora": c.rank_stabilized, "lora_dropout": c.dropout,
            "target_modules": _targets(c.targets, config), "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True}


def _read_peft_ia3(fields: Fields, config: EncoderConfig) -> Method:
    targets, inner = _names(fields, "target_modules"), _names(fields, "feedforward_modules")
    options = {
        "outputs": _kinds(fields, "target_modules", lambda stem: _ends(stem, targets) and not stem.endswith(tuple(inner)), config),
        "inputs": _kinds(fields, "feedforward_modules", lambda stem: _ends(stem, targets) and stem.endswith(tuple(inner)), config)}
    fields.rest(*PEFT_INERT, "init_ia3_weights")
    return _made(fields, "ia3", options, config)


def _write_peft_ia3(method: Method, config: EncoderConfig) -> dict:
    c = method.config
    return {"target_modules": _targets((*c.outputs, *c.inputs), config), "feedforward_modules": _targets(c.inputs, config), "fan_in_fan_out": False,
            "init_ia3_weights": True}


def _ia3_shape(name: str, method: Method) -> tuple[int, ...]:
    inputs, _ = method.scale(name)
    size = method.values[name].numel()
    return (size, 1) if inputs is None else (1, size)


def _prompt_learning(fields: Fields, config: EncoderConfig) -> int:
    """P, when the shape that goes with it is the model's."""
    for key, wanted in (("num_layers", config.layers), ("token_dim", config.hidden), ("num_attention_heads", config.heads), ("num_transformer_submodules", 1)):
        fields.expect(key, wanted)
    return fields.get("num_virtual_tokens", int)


def _shape_there(method: Method, config: EncoderConfig) -> dict:
    return {"num_virtual_tokens": method.config.length, "num_layers": config.layers, "token_dim": config.hidden, "num_attention_heads": config.heads,
            "num_transformer_submodules": 1}


def _read_peft_prefix(fields: Fields, config: EncoderConfig) -> Method:
    length = _prompt_learning(fields, config)
    fields.rest(*PEFT_INERT, "encoder_hidden_size", "init_weights", "prefix_projection")  # their files hold the flat prefix, projected or not
    return _made(fields, "prefix", {"length": length, "positioned": True}, config)


def _write_peft_prefix(method: Method, config: EncoderConfig) -> dict:
    if not method.config.positioned:
        raise AdapterError("prefix: its texts keep their positions, and peft moves them on by the prefix's length; expected one made with --set positioned=true")
    return _shape_there(method, config) | {"encoder_hidden_size": config.hidden, "prefix_projection": False}


def _read_peft_prompt(fields: Fields, config: EncoderConfig) -> Method:
    length = _prompt_learning(fields, config)
    fields.rest(*PEFT_INERT, "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path")
    return _made(fields, "prompt", {"length": length, "positioned": True, "first_row": "prompt"}, config)


def _write_peft_prompt(method: Method, config: EncoderConfig) -> dict:
    c = method.config
    if not c.positioned or c.first_row != "prompt":
        raise AdapterError("prompt: peft's vectors take the first positions and its classifier reads the first of them; "
                           "expected one made with --set positioned=true --set first_row=prompt")
    return _shape_there(method, config) | {"prompt_tuning_init": "RANDOM"}


PEFT = {table.theirs: table for table in (
    Table("lora", "LORA", _read_peft_lora, _per_site(lambda part: {"a": ".lora_A.weight", "b": ".lora_B.weight"}[part]), _write_peft_lora),
    Table("ia3", "IA3", _read_peft_ia3, _per_site(lambda part: ".ia3_l"), _write_peft_ia3, shape=_ia3_shape),
    Table("prefix", "PREFIX_TUNING", _read_peft_prefix, lambda method, config: dict.fromkeys(method.state(), "prompt_embeddings"), _write_peft_prefix,
          shape=lambda name, method: _prefix_size(method), split=_prefix_part, join=_prefix_joined),
    Table("prompt", "PROMPT_TUNING", _read_peft_prompt, lambda method, config: {"vectors": "prompt_embeddings"}, _write_peft_prompt),
)}
SITED = ("LORA", "IA3")  # their names begin with base_model.model., the others' with base_model.


def _read_peft(fields: Fields, folder: Path, config: EncoderConfig) -> Foreign:
    kind = fields.get("peft_type", str)
    if kind not in PEFT:
        raise AdapterError(f"{fields.path}: peft_type: expected one of {', '.join(PEFT)}, got {kind!r}")
    method = PEFT[kind].read(fields, config)
    path, tensors = _read_tensors(folder, PEFT_FILES)
    bare = {re.sub(r"^base_model\.(model\.)?", "", name): tensor for name, tensor in tensors.items()}
    heads, unknown = weights.from_foreign({n: t for n, t in bare.items() if _is_head(n, config)}, config)
    if unknown:
        raise AdapterError(f"{path}: expected modules of the encoder and whole heads, got {unknown[0]}")
    prefix = config.kind + "."  # absent where peft wrapped the encoder without a head
    own = {n if n.startswith(prefix) or not n.startswith("encoder.") else prefix + n: t for n, t in bare.items() if not _is_head(n, config)}
    PEFT[kind].take(method, own, config, path)
    return Foreign(method, heads, {"library": f"peft {fields.values.get('peft_version') or ''}".strip(), "kind": kind})


def _is_head(name: str, config: EncoderConfig) -> bool:
    return any(name.startswith(stem + ".") for stem in weights.HEAD_NAMES[config.kind].values())


# ---------------------------------------------------------------- AdapterHub

HUB_INERT = ("architecture", "dtype", "init_weights", "init_weights_seed")
HUB_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_new", "swish": "silu", "silu": "silu"}
HUB_BOTTLENECKS = {  # (after attention, after feed-forward, norm before, parallel) -> ours
    (False, True, True, False): "pfeiffer",
    (True, True, False, False): "houlsby",
    (False, True, False, True): "parallel",
}
HUB_UNUSED = ("dropout", "adapter_residual_before_ln", "inv_adapter_reduction_factor", "phm_dim", "phm_rank", "phm_bias", "phm_c_init", "phm_init_range", "learn_phm",
              "factorized_phm_W", "factorized_phm_rule", "shared_phm_rule", "shared_W_phm", "hypercomplex_nonlinearity")  # of no effect beside what is refused
HUB_MATRICES = {"q": "query", "k": "key", "v": "value"}


def _hub_bottleneck(fields: Fields, config: EncoderConfig) -> Method:
    places = tuple(fields.get(key, bool, False) for key in ("mh_adapter", "output_adapter", "original_ln_before", "is_parallel"))
    if places not in HUB_BOTTLENECKS:
        raise AdapterError(f"{fields.path}: (mh_adapter, output_adapter, original_ln_before, is_parallel): "
                           f"expected those of seq_bn, double_seq_bn or par_bn, got {places}")
    fields.expect("original_ln_after", True)
    fields.expect("residual_before_ln", *((True,) if places[2] else (True, False)))
    activation = fields.get("non_linearity", str).lower()
    if activation not in HUB_ACTIVATIONS:
        raise AdapterError(f"{fields.path}: non_linearity: expected one of {', '.join(HUB_ACTIVATIONS)}, got {activation!r}")
    reduction = fields.get("reduction_factor", (int, float))
    if not reduction > 0:
        raise AdapterError(f"{fields.path}: reduction_factor: expected more than 0, got {reduction}")
    scale = float(fields.get("scaling", (int, float), 1.0))
    fields.rest(*HUB_INERT, *HUB_UNUSED)
    options = {"architecture": HUB_BOTTLENECKS[places], "bottleneck": max(1, int(config.hidden // reduction)), "activation": HUB_ACTIVATIONS[activation], "scale": scale}
    return _made(fields, "adapter", options, config)


def _hub_adapter_keys(method: Method, config: EncoderConfig) -> dict[str, str]:
    """`layers.3.feed_forward.down.weight` -> `...layer.3.output.adapters.NAME.adapter_down.0.weight`."""
    stems, found = weights.foreign_names(config), {}
    ends = {"attention": "attention.output", "feed_forward": "feed_forward.down"}
    for site in block_sites(config):
        layer, _, block = site.rpartition(".")
        stem = stems[f"{layer}.{ends[block]}"].removesuffix(".dense")
        for ours, theirs in (("down", "adapter_down.0"), ("up", "adapter_up")):
            for last in ("weight", "bias"):
                found[f"{site}.{ours}.{last}"] = f"{stem}.adapters.NAME.{theirs}.{last}"
    return {ours: theirs for ours, theirs in found.items() if ours in method.values}


def _hub_lora(fields: Fields, config: EncoderConfig) -> Method:
    fields.expect("composition_mode", "add")
    matrices = _names(fields, "attn_matrices") if fields.get("selfattn_lora", bool, True) else []
    fields.asked.add("attn_matrices")
    for name in matrices:
        if name not in HUB_MATRICES:
            raise AdapterError(f"{fields.path}: attn_matrices: expected some of {', '.join(HUB_MATRICES)}, got {name!r}")
    targets = [HUB_MATRICES[name] for name in matrices]
    targets += [kind for key, kind in (("intermediate_lora", "up"), ("output_lora", "down")) if fields.get(key, bool, False)]
    rank = fields.get("r", int)
    options = {"rank": rank, "alpha": float(fields.get("alpha", (int, float), 8)), "dropout": float(fields.get("dropout", (int, float), 0.0)), "targets": tuple(targets)}
    fields.rest(*HUB_INERT)
    return _made(fields, "lora", options, config)


def _hub_prefix(fields: Fields, config: EncoderConfig) -> Method:
    if not fields.get("flat", bool, False):
        raise AdapterError(f"{fields.path}: flat: expected true, got false; call eject_prefix_tuning there before saving")
    fields.rest(*HUB_INERT, "bottleneck_size", "cross_prefix", "dropout", "encoder_prefix", "non_linearity", "prefix_length", "shared_gating")
    return _made(fields, "prefix", {"length": fields.get("prefix_length", int)}, config)


HUB = {
    None: Table("adapter", "bottleneck", _hub_bottleneck, _hub_adapter_keys),
    "lora": Table("lora", "lora", _hub_lora, _per_site(lambda part: f".loras.NAME.lora_{part.upper()}")),
    "prefix_tuning": Table("prefix", "prefix_tuning", _hub_prefix,
                           lambda method, config: dict.fromkeys(method.state(), f"{config.kind}.prefix_tuning.prefix_tunings.NAME.self_prefix.control_trans"),
                           shape=lambda name, method: (_prefix_size(method)[0] * _prefix_size(method)[1],), split=_prefix_part, join=_prefix_joined),
}


def _read_hub(header: Fields, folder: Path, config: EncoderConfig) -> Foreign:
    for key, wanted in (("model_type", config.kind), ("hidden_size", config.hidden)):
        header.expect(key, wanted)
    name, values, version = header.get("name", str), dict(header.get("config", dict)), str(header.values.get("version") or "")
    fields = Fields(header.path, values)
    kind = values.get("architecture")
    if kind not in HUB:
        raise AdapterError(f"{header.path}: architecture: expected {', '.join(str(k) for k in HUB if k)} or none (a bottleneck), got {kind!r}")
    if kind == "lora" and (old := re.match(r"adapters\.(\d+)\.(\d+)", version)) and tuple(map(int, old.groups())) < (1, 1):
        values["alpha"] = values.get("r")  # they did not scale then, whatever alpha said: https://github.com/adapter-hub/adapters/pull/770
    method = HUB[kind].read(fields, config)
    path, tensors = _read_tensors(folder, HUB_FILES)
    own = {re.sub(rf"\.(adapters|loras|prefix_tunings)\.{re.escape(name)}\.", r".\1.NAME.", n): t for n, t in tensors.items()}
    copies = [n for n in own if ".prefix_tuning.pool." in n]  # every layer lists the one table again
    for n in copies:
        copy = own.pop(n)
        if not torch.equal(copy, own.get(re.sub(r"\.encoder\.layer\..*\.pool\.", ".prefix_tuning.", n), copy)):
            raise AdapterError(f"{path}: {n}: expected the same values as in {config.kind}.prefix_tuning, got others")
    HUB[kind].take(method, own, config, path)
    return Foreign(method, {}, {"library": version or "adapters", "kind": kind or "bottleneck"})


# ---------------------------------------------------------------- reading

def _read_tensors(folder: Path, names: tuple[str, ...]) -> tuple[Path, dict[str, Tensor]]:
    path = next((folder / name for name in names if (folder / name).exists()), None)
    if path is None:
        raise AdapterError(f"{folder}: expected {' or '.join(names)}, found none")
    try:
        tensors = safetensors.torch.load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, TypeError) as error:
        raise AdapterError(f"{path}: cannot be read: {(str(error).splitlines() or [type(error).__name__])[0]}") from None
    except Exception as error:  # pickle.UnpicklingError: the file wants to run code
        raise AdapterError(f"{path}: expected plain tensors, got {type(error).__name__} (unpickling anything else is refused)") from None
    if not isinstance(tensors, dict) or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in tensors.items()):
        raise AdapterError(f"{path}: expected tensors by name, got something else")
    return path, dict(tensors)


def read(folder: str | Path, config: EncoderConfig) -> Foreign:
    """The module of a peft or AdapterHub folder for a model of this shape. Raises AdapterError that names file, key, expected and got."""
    folder = Path(folder)
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise AdapterError(f"{folder}: expected a peft or AdapterHub folder with {CONFIG}, found none") from None
    except (UnicodeDecodeError, json.JSONDecodeError, OSError) as error:
        raise AdapterError(f"{path}: expected JSON, got {error}") from None
    if not isinstance(values, dict):
        raise AdapterError(f"{path}: expected a JSON object, got {type(values).__name__}")
    if "peft_type" in values:
        return _read_peft(Fields(path, values), folder, config)
    if "config" in values and "model_type" in values:
        return _read_hub(Fields(path, values), folder, config)
    raise AdapterError(f"{path}: expected peft's peft_type, or AdapterHub's config and model_type; got {', '.join(values) or 'no keys'}")


def import_adapter(folder: str | Path, model: str | Path, axis: str, out: str | Path, overwrite: bool = False) -> Path:
    """Write a run folder with the module of a peft or AdapterHub folder, bound to the base `model` by its checksum; a head that came along goes into its model/.

    axis: what the module was learnt on, and its name when attached. Raises AdapterError or ModelError where folder and model do not fit.
    """
    loaded, _ = weights.load_model(model)
    found = read(folder, loaded.config)
    settings = {"folder": os.path.realpath(folder), "model": os.path.realpath(model) if os.path.exists(model) else str(model), "axis": axis}
    with checkpoint.writing_run(out, "import", settings, overwrite) as run:
        if found.heads:
            loaded, tokenizer = _with_heads(model, found.heads)
            weights.save_model(loaded, run.path / "model", tokenizer)
        checkpoint.save_adapter(run.path / "adapter", found.method, axis, checkpoint.describe_base(loaded), {"origin": found.origin})
    return Path(out)


def _with_heads(folder: str | Path, heads: dict[str, Tensor]):
    """(the base with these heads in place of its own, its tokenizer)."""
    labels = None
    if (output := heads.get("classifier.output.weight")) is not None:
        named = weights.read_config(weights.find_folder(folder))[1].get("id2label") or {}
        labels = tuple(str(named.get(str(i), f"LABEL_{i}") if len(named) == len(output) else f"LABEL_{i}") for i in range(len(output)))
    model, report = weights.load_model(folder, labels=labels)
    own = dict(model.named_parameters())
    for name, tensor in heads.items():
        if name not in own or own[name].shape != tensor.shape:
            raise AdapterError(f"{folder}: the head's {name} came with shape {list(tensor.shape)}; expected {list(own[name].shape) if name in own else 'no such tensor'}")
        own[name].data.copy_(tensor)
    if missing := [n for n in report.new if n not in heads]:
        raise AdapterError(f"{folder}: expected a model with {missing[0]}: it is neither there nor beside the adapter, so whatever the classifier answered is lost")
    return model, load_tokenizer(report.folder)


# ---------------------------------------------------------------- writing

def write_peft(folder: Path, method: Method, model: Model, base: str | None = None) -> None:
    """A peft folder with `method` and, as their classifiers have it, the model's classifier. Raises AdapterError, by name, on what peft has no words for."""
    table = next((t for t in PEFT.values() if t.ours == method.name), None)
    if table is None:
        merged = "; --as merged writes it into the weights" if method.mergeable else ""
        raise AdapterError(f"{method.name}: peft has no such module; expected one of {', '.join(t.ours for t in PEFT.values())}{merged}")
    saved = method
    if method.saved_config() != method.config:  # a re-parametrised prefix is flat in files, theirs too
        saved = type(method)(method.saved_config(), method.encoder_config)
        saved.load(method.state())
    as_classifier = model.classifier is not None and model.mlm is None
    task = "SEQ_CLS" if as_classifier else None if table.theirs in SITED else "FEATURE_EXTRACTION"
    values = {"peft_type": table.theirs, "task_type": task, "base_model_name_or_path": base, "inference_mode": True,
              "modules_to_save": ["classifier", "score"] if as_classifier else None} | table.write(saved, model.config)
    tensors = table.give(saved, model.config)
    stem = "base_model.model." if table.theirs in SITED else ""
    tensors = {stem + name: tensor for name, tensor in tensors.items()}
    if as_classifier:
        head = {n: p.detach().cpu() for n, p in model.named_parameters() if n.startswith("classifier.")}
        theirs = weights.to_foreign(head, model.config)
        tensors |= {f"base_model.{'model.' if stem else ''}{n}": t for n, t in theirs.items() if n.startswith("classifier.")}
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, folder / PEFT_FILES[0], metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_merged(folder: Path, run: checkpoint.Run) -> None:
    """One plain model folder with all modules of `run` in its weights. Raises AdapterError, by name, on what cannot be written there with the same outputs."""
    model = run.model
    patch.merge(model)
    word = model.encoder.embeddings.word.weight
    kept = model.encoder.hooks.base(word)
    if model.mlm is not None and model.mlm.decoder is None and kept is not word:  # the masked-LM decoder stays the base's
        model.mlm.decoder = Linear(*reversed(word.shape), bias=False, device="meta")
        model.mlm.decoder.weight = Parameter(kept.detach().clone(), requires_grad=False)
    weights.save_model(model, folder, run.tokenizer)


FORMS = ("hf", "peft", "merged")


def export_adapter(run: str | Path, form: str, out: str | Path, overwrite: bool = False) -> Path:
    """Write the run folder `run` for others, with a card: form "hf" (its plain model folder), "peft" (its module) or "merged" (its module in the weights).

    Raises AdapterError, by name, where the form cannot hold what the run is.
    """
    run = Path(run)
    if form not in FORMS:
        raise ConfigError(f"--as: expected one of {', '.join(FORMS)}, got {form!r}")
    if not checkpoint.is_run(run):
        raise ModelError(f"{run}: expected a run folder with config.toml, found none")
    modules = [checkpoint.read_header(f)["method"] for f in checkpoint.adapter_folders(run)]
    config = checkpoint.read_config(run)
    with _writing(Path(out), overwrite) as folder:
        if form == "hf":
            if modules:
                raise AdapterError(f"{run}: a model folder cannot hold its {' and '.join(modules)}; expected --as merged (in the weights) or --as peft (a module)")
            shutil.copytree(run / "model", folder, dirs_exist_ok=True)
        elif not modules:
            raise AdapterError(f"{run}: expected a run with a module, found none; --as hf writes its model")
        else:
            loaded = checkpoint.load_run(run)
            if form == "merged":
                write_merged(folder, loaded)
            elif len(modules) > 1:
                raise AdapterError(f"{run}: a peft folder holds one module; expected one, got {' and '.join(modules)} (--as merged takes several)")
            else:
                write_peft(folder, *loaded.model.methods.values(), loaded.model, str((run / "model").resolve()) if (run / "model").is_dir() else config["model"])
        (folder / "README.md").write_text(card(run, config, form), encoding="utf-8")
    return Path(out)


@contextlib.contextmanager
def _writing(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder that becomes `out` when the block ends well and vanishes when it does not."""
    if os.path.exists(out) and not overwrite:
        raise ConfigError(f"--out {out}: exists; expected a new folder (or --overwrite)")
    if os.path.exists(out) and not ((out / "README.md").exists() and any((out / n).exists() for n in (CONFIG, "config.json"))):
        raise ConfigError(f"--out {out}: exists and is no exported folder; it is not replaced")
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise ConfigError(f"--out {out}: cannot be written: {error.strerror}") from None
        yield partial
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# ---------------------------------------------------------------- the card

def card(run: Path, config: dict, form: str) -> str:
    """README.md of an exported folder: axis, method, base, data, figures of the run's last event, limits."""
    headers = [checkpoint.read_header(f) for f in checkpoint.adapter_folders(run)]
    axes = sorted({h["axis"] for h in headers} | ({config["axis"]} if "axis" in config else set()))
    what = [f"{h['method']} ({', '.join(f'{k} {v}' for k, v in h['config'].items() if v is not None)}), learnt on the axis {h['axis']}"
            + (f", read from a folder of {h['origin']['library']}" if "origin" in h else "") for h in headers]
    began = f"Written by peftdebias {__version__} from a run of `{config.get('command', '')}`"
    base = "".join(f" ({b['type']}, {b['layers']} layers, hidden {b['hidden']}, sha256 {(b.get('sha256') or 'unknown')[:12]})" for b in [h["base"] for h in headers[:1]])
    lines = ["---", f"library_name: {'peft' if form == 'peft' else 'transformers'}", f"base_model: {json.dumps(config.get('model', ''))}",
             "tags: [peftdebias, debiasing]", "---", "", f"# Debiasing: {', '.join(axes) or 'none'}", "",
             began + (", its modules merged into the weights." if form == "merged" else "."), "",
             *(f"- module: {w}" for w in what), *([] if what else [f"- method: {config.get('method', 'full fine-tuning')}, the whole base"])]
    lines.append(f"- base: {config.get('model', '')}{base}")
    data = [Path(f).name for key in ("corpus", "train", "dev", "test") for f in ([config[key]] if isinstance(config.get(key), str) else config.get(key, []))]
    lines += [f"- data: {', '.join(data) or 'not recorded'}", "", "## Figures", "", *(_figures(run) or ["None recorded."]), "", "## Limits", "", LIMITS, ""]
    return "\n".join(lines)


def _figures(run: Path) -> list[str]:
    """A line for every figure of the last event in metrics.jsonl."""
    try:
        events = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        last = next(e for e in reversed(events) if e.get("event") == "final")
    except (FileNotFoundError, json.JSONDecodeError, StopIteration):
        return []
    found = [f"- {m['name']}: {m['value']} {m.get('unit', '')}".rstrip() for m in last.get("measures", [])]
    return found or [f"- {key}: {value}" for key, value in last.items() if key not in ("event", "seconds") and isinstance(value, (int, float))]
