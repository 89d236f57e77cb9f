"""AdapterHub's `adapters`, inwards: bottlenecks (Pfeiffer, Houlsby, parallel), LoRA and the flat prefix."""

import math
import re
import warnings
from pathlib import Path

import torch

from .. import weights
from ..errors import AdapterError
from ..methods import Method
from ..sites import EncoderConfig, block_sites
from .folders import Fields, Foreign, read_tensors
from .tables import Table, made, names_in, per_site, prefix_joined, prefix_part, prefix_size

FILES = ("adapter.safetensors", "pytorch_adapter.bin")
HEADS = ("head_config.json", "model_head.safetensors", "pytorch_model_head.bin")
INERT = ("architecture", "dtype", "init_weights", "init_weights_seed")
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_new", "swish": "silu", "silu": "silu"}
BOTTLENECKS = {  # (after attention, after feed-forward, norm before, parallel) -> ours
    (False, True, True, False): "pfeiffer",
    (True, True, False, False): "houlsby",
    (False, True, False, True): "parallel",
}
UNUSED = ("dropout", "adapter_residual_before_ln", "inv_adapter_reduction_factor", "phm_dim", "phm_rank", "phm_bias", "phm_c_init", "phm_init_range", "learn_phm",
              "factorized_phm_W", "factorized_phm_rule", "shared_phm_rule", "shared_W_phm", "hypercomplex_nonlinearity")  # of no effect beside what is refused
MATRICES = {"q": "query", "k": "key", "v": "value"}


def _bottleneck(fields: Fields, config: EncoderConfig) -> Method:
    places = tuple(fields.get(key, bool, False) for key in ("mh_adapter", "output_adapter", "original_ln_before", "is_parallel"))
    if places not in BOTTLENECKS:
        raise AdapterError(f"{fields.path}: (mh_adapter, output_adapter, original_ln_before, is_parallel): "
                           f"expected those of seq_bn, double_seq_bn or par_bn, got {places}")
    fields.expect("original_ln_after", True)
    fields.expect("residual_before_ln", *((True,) if places[2] else (True, False)))
    activation = fields.get("non_linearity", str).lower()
    if activation not in ACTIVATIONS:
        raise AdapterError(f"{fields.path}: non_linearity: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    reduction = fields.number("reduction_factor")
    if not reduction > 0:
        raise AdapterError(f"{fields.path}: reduction_factor: expected more than 0, got {reduction:g}")
    if math.isinf(inner := config.hidden // reduction):
        raise AdapterError(f"{fields.path}: reduction_factor: expected one by which hidden {config.hidden} can be divided, got {reduction:g}")
    scale = fields.number("scaling", 1)
    fields.rest(*INERT, *UNUSED)
    options = {"architecture": BOTTLENECKS[places], "bottleneck": max(1, int(inner)), "activation": ACTIVATIONS[activation], "scale": scale}
    return made(fields, "adapter", options, config)


def _adapter_keys(method: Method, config: EncoderConfig) -> dict[str, str]:
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


def _lora(fields: Fields, config: EncoderConfig) -> Method:
    fields.expect("composition_mode", "add")
    matrices = names_in(fields, "attn_matrices") if fields.get("selfattn_lora", bool, True) else []
    fields.asked.add("attn_matrices")
    for name in matrices:
        if name not in MATRICES:
            raise AdapterError(f"{fields.path}: attn_matrices: expected some of {', '.join(MATRICES)}, got {name!r}")
    targets = [MATRICES[name] for name in matrices]
    targets += [kind for key, kind in (("intermediate_lora", "up"), ("output_lora", "down")) if fields.get(key, bool, False)]
    rank = fields.get("r", int)
    options = {"rank": rank, "alpha": fields.number("alpha", 8), "dropout": fields.number("dropout", 0), "targets": tuple(targets)}
    fields.rest(*INERT)
    return made(fields, "lora", options, config)


def _prefix(fields: Fields, config: EncoderConfig) -> Method:
    fields.rest(*INERT, "flat", "bottleneck_size", "cross_prefix", "dropout", "encoder_prefix", "non_linearity", "prefix_length", "shared_gating")
    return made(fields, "prefix", {"length": fields.get("prefix_length", int)}, config)


TABLES = {
    None: Table("adapter", "bottleneck", _bottleneck, _adapter_keys),
    "lora": Table("lora", "lora", _lora, per_site(lambda part: f".loras.NAME.lora_{part.upper()}")),
    "prefix_tuning": Table("prefix", "prefix_tuning", _prefix,
                           lambda method, config: dict.fromkeys(method.values, f"{config.kind}.prefix_tuning.prefix_tunings.NAME.self_prefix.control_trans"),
                           shape=lambda name, method: (prefix_size(method)[0] * prefix_size(method)[1],), split=prefix_part, join=prefix_joined),
}


def read(header: Fields, folder: Path, config: EncoderConfig) -> Foreign:
    """The module of `folder`, whose file of settings is `header`."""
    for key, wanted in (("model_type", config.kind), ("hidden_size", config.hidden)):
        header.expect(key, wanted)
    name, values, version = header.get("name", str), dict(header.get("config", dict)), str(header.values.get("version") or "")
    fields = Fields(header.path, values)
    kind = values.get("architecture")
    if not isinstance(kind, str | None) or kind not in TABLES:
        raise AdapterError(f"{header.path}: architecture: expected {', '.join(str(k) for k in TABLES if k)} or none (a bottleneck), got {kind!r}")
    if kind == "lora" and (old := re.match(r"adapters\.(\d+)\.(\d+)", version)) and tuple(map(int, old.groups())) < (1, 1):
        values["alpha"] = values.get("r")  # they did not scale then, whatever alpha said: https://github.com/adapter-hub/adapters/pull/770
    method = TABLES[kind].read(fields, config)
    path, tensors = read_tensors(folder, FILES)
    if beside := next((name for name in HEADS if (folder / name).exists()), None):
        warnings.warn(f"{folder}: {beside}: its head is not read; a classifier answers by the base's own", stacklevel=4)
    if kind == "prefix_tuning" and any(n.endswith(".self_prefix.wte.weight") for n in tensors):
        raise AdapterError(f"{path}: expected a flat prefix, got the network that computes one; call eject_prefix_tuning there before saving")  # after which flat is still false
    own = {re.sub(rf"\.(adapters|loras|prefix_tunings)\.{re.escape(name)}\.", r".\1.NAME.", n): t for n, t in tensors.items()}
    copies = [n for n in own if ".prefix_tuning.pool." in n]  # every layer lists the one table again
    for n in copies:
        copy = own.pop(n)
        if not torch.equal(copy, own.get(re.sub(r"\.encoder\.layer\..*\.pool\.", ".prefix_tuning.", n), copy)):
            raise AdapterError(f"{path}: {n}: expected the same values as in {config.kind}.prefix_tuning, got others")
    return Foreign(TABLES[kind].take(method, own, config, path), {}, {"library": version or "adapters", "kind": kind or "bottleneck"})
