"""Hugging Face `peft`, both ways: LoRA, prefix, prompt and (IA)^3, with the classifier that it saves beside them."""

import json
import re
from pathlib import Path

from .. import weights
from ..config import LEAST
from ..encoder import Model
from ..errors import AdapterError
from ..files import write_tensors
from ..methods import Method
from ..sites import EncoderConfig
from .folders import CONFIG, Fields, Foreign, read_tensors
from .tables import Table, kinds_in, made, names_in, per_site, prefix_joined, prefix_part, prefix_size

FILES = ("adapter_model.safetensors", "adapter_model.bin")
INERT = ("auto_mapping", "base_model_name_or_path", "inference_mode", "modules_to_save", "peft_type", "peft_version", "revision", "task_type")


def _read_lora(fields: Fields, config: EncoderConfig) -> Method:
    targets = names_in(fields, "target_modules")
    fields.expect("layers_to_transform", list(range(config.layers)))
    fields.expect("bias", "none")
    fields.expect("init_lora_weights", True, False, "gaussian", "eva", "orthogonal")  # others change the base as they begin
    options = {
        "rank": fields.get("r", int), "alpha": fields.number("lora_alpha", 8), "rank_stabilized": fields.get("use_rslora", bool, False),
        "dropout": fields.number("lora_dropout", 0), "targets": kinds_in(fields, "target_modules", lambda stem: _ends(stem, targets), config)}
    fields.rest(*INERT, "corda_config", "ensure_weight_tying", "eva_config", "loftq_config", "lora_ga_config", "megatron_core", "qalora_group_size")
    return made(fields, "lora", options, config)


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


def _write_lora(method: Method, config: EncoderConfig) -> dict:
    c = method.config
    alpha = c.scale * (c.rank**0.5 if c.rank_stabilized else c.rank) if c.alpha is None else c.alpha
    return {"r": c.rank, "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha, "use_rslora": c.rank_stabilized, "lora_dropout": c.dropout,
            "target_modules": _targets(c.targets, config), "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True}


def _read_ia3(fields: Fields, config: EncoderConfig) -> Method:
    targets, inner = names_in(fields, "target_modules"), names_in(fields, "feedforward_modules")
    options = {
        "outputs": kinds_in(fields, "target_modules", lambda stem: _ends(stem, targets) and not stem.endswith(tuple(inner)), config),
        "inputs": kinds_in(fields, "feedforward_modules", lambda stem: _ends(stem, targets) and stem.endswith(tuple(inner)), config)}
    fields.rest(*INERT, "init_ia3_weights")
    return made(fields, "ia3", options, config)


def _write_ia3(method: Method, config: EncoderConfig) -> dict:
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
    length = fields.get("num_virtual_tokens", int)
    if length > (most := config.max_positions - LEAST):
        raise AdapterError(f"{fields.path}: num_virtual_tokens: expected at most {most}, which leave a text {LEAST} of the model's {config.max_positions} positions, got {length}")
    return length


def _shape_there(method: Method, config: EncoderConfig) -> dict:
    return {"num_virtual_tokens": method.config.length, "num_layers": config.layers, "token_dim": config.hidden, "num_attention_heads": config.heads,
            "num_transformer_submodules": 1}


ASKED = {"prefix": " made with --set positioned=true", "prompt": " made with --set positioned=true --set first_row=prompt"}
"""How a module has to be made that peft's folders can hold."""


def _read_prefix(fields: Fields, config: EncoderConfig) -> Method:
    length = _prompt_learning(fields, config)
    fields.rest(*INERT, "encoder_hidden_size", "init_weights", "prefix_projection")  # their files hold the flat prefix, projected or not
    return made(fields, "prefix", {"length": length, "positioned": True}, config)


def _write_prefix(method: Method, config: EncoderConfig) -> dict:
    if not method.config.positioned:
        raise AdapterError("prefix: its texts keep their positions, and peft moves them on by the prefix's length; expected one" + ASKED["prefix"])
    return _shape_there(method, config) | {"encoder_hidden_size": config.hidden, "prefix_projection": False}


def _read_prompt(fields: Fields, config: EncoderConfig) -> Method:
    length = _prompt_learning(fields, config)
    fields.rest(*INERT, "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path")
    return made(fields, "prompt", {"length": length, "positioned": True, "first_row": "prompt"}, config)


def _write_prompt(method: Method, config: EncoderConfig) -> dict:
    c = method.config
    if not c.positioned or c.first_row != "prompt":
        raise AdapterError("prompt: peft's vectors take the first positions and its classifier reads the first of them; expected one" + ASKED["prompt"])
    return _shape_there(method, config) | {"prompt_tuning_init": "RANDOM"}


TABLES = {table.theirs: table for table in (
    Table("lora", "LORA", _read_lora, per_site(lambda part: {"a": ".lora_A.weight", "b": ".lora_B.weight"}[part]), _write_lora),
    Table("ia3", "IA3", _read_ia3, per_site(lambda part: ".ia3_l"), _write_ia3, shape=_ia3_shape),
    Table("prefix", "PREFIX_TUNING", _read_prefix, lambda method, config: dict.fromkeys(method.values, "prompt_embeddings"), _write_prefix,
          shape=lambda name, method: prefix_size(method), split=prefix_part, join=prefix_joined),
    Table("prompt", "PROMPT_TUNING", _read_prompt, lambda method, config: {"vectors": "prompt_embeddings"}, _write_prompt),
)}
NAMES = tuple(table.ours for table in TABLES.values())
SITED = ("LORA", "IA3")  # their names begin with base_model.model., the others' with base_model.


def read(fields: Fields, folder: Path, config: EncoderConfig) -> Foreign:
    """The module and heads of `folder`, whose configuration is `fields`."""
    kind = fields.get("peft_type", str)
    if kind not in TABLES:
        raise AdapterError(f"{fields.path}: peft_type: expected one of {', '.join(TABLES)}, got {kind!r}")
    method = TABLES[kind].read(fields, config)
    path, tensors = read_tensors(folder, FILES)
    prefix = config.kind + "."  # absent where peft wrapped the encoder without a head
    names = [re.sub(r"^(?=encoder\.)", prefix, re.sub(r"^base_model\.(model\.)?", "", name)) for name in tensors]
    bare = dict(zip(names, tensors.values()))
    if twice := next((name for name in bare if names.count(name) > 1), None):
        raise AdapterError(f"{path}: expected each tensor under one name, got {twice} under {names.count(twice)}")
    heads, unknown = weights.from_foreign({n: t for n, t in bare.items() if _is_head(n, config)}, config)
    if unknown:
        raise AdapterError(f"{path}: expected modules of the encoder and whole heads, got {unknown[0]}")
    if "classifier.output.weight" in heads and (task := fields.values.get("task_type")) not in (None, "SEQ_CLS", "FEATURE_EXTRACTION"):
        raise AdapterError(f"{fields.path}: task_type: expected SEQ_CLS or none beside a classifier, which would answer texts, got {task!r}")
    own = {name: tensor for name, tensor in bare.items() if not _is_head(name, config)}
    return Foreign(TABLES[kind].take(method, own, config, path), heads, _origin(fields, kind))


def _origin(fields: Fields, kind: str) -> dict[str, str]:
    base = fields.values.get("base_model_name_or_path")
    return {"library": f"peft {fields.values.get('peft_version') or ''}".strip(), "kind": kind} | ({"base": base} if isinstance(base, str) and base else {})


def _is_head(name: str, config: EncoderConfig) -> bool:
    return any(name.startswith(stem + ".") for stem in weights.HEAD_NAMES[config.kind].values())


def write(folder: Path, method: Method, model: Model, base: str | None = None) -> str:
    """A peft folder with `method` and, as their classifiers have it, the model's classifier. Returns the class of transformers that it is loaded onto. Raises AdapterError, by
    name, on what peft has no words for."""
    table = next((t for t in TABLES.values() if t.ours == method.name), None)
    if table is None:
        merged = "; --as merged writes it into the weights" if method.mergeable else ""
        raise AdapterError(f"{method.name}: peft has no such module; expected one of {', '.join(NAMES)}{merged}")
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
    write_tensors(tensors, folder / FILES[0])
    (folder / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return {"SEQ_CLS": "AutoModelForSequenceClassification", "FEATURE_EXTRACTION": "AutoModel", None: "AutoModelForMaskedLM"}[task]
