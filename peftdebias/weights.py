"""Hugging Face model folders in and out: the border where foreign names become ours, through one reversible table.

It reads `config.json` with `model.safetensors`, sharded safetensors with an index, or `pytorch_model.bin` (weights_only), as they are found in the
wild; it writes what `transformers` loads to the same outputs. It leaves out every model type but bert and roberta.
"""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import files
from .encoder import QKV, EncoderConfig, Model, expect_model
from .errors import ConfigError, ModelError, short
from .files import read_object, wrong_numbers, write_tensors
from .options import check_seed, expect_path
from .sites import table_rows
from .tokens import Tokenizer, load_tokenizer

FILES = ("config.json", "*.safetensors", "*.bin", "*.index.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")
"""Patterns of what a model folder consists of."""

# ours -> theirs; {i} is the layer. Q, K and V of a layer are three tensors there and one here, in that order.
ENCODER_NAMES = {
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.segment": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
    "layers.{i}.attention.query": "encoder.layer.{i}.attention.self.query",
    "layers.{i}.attention.key": "encoder.layer.{i}.attention.self.key",
    "layers.{i}.attention.value": "encoder.layer.{i}.attention.self.value",
    "layers.{i}.attention.output": "encoder.layer.{i}.attention.output.dense",
    "layers.{i}.attention.norm": "encoder.layer.{i}.attention.output.LayerNorm",
    "layers.{i}.feed_forward.up": "encoder.layer.{i}.intermediate.dense",
    "layers.{i}.feed_forward.down": "encoder.layer.{i}.output.dense",
    "layers.{i}.feed_forward.norm": "encoder.layer.{i}.output.LayerNorm",
}
HEAD_NAMES = {
    "bert": {
        "mlm.dense": "cls.predictions.transform.dense",
        "mlm.norm": "cls.predictions.transform.LayerNorm",
        "mlm.decoder": "cls.predictions.decoder",
        "mlm": "cls.predictions",
        "classifier.dense": "bert.pooler.dense",
        "classifier.output": "classifier",
    },
    "roberta": {
        "mlm.dense": "lm_head.dense",
        "mlm.norm": "lm_head.layer_norm",
        "mlm.decoder": "lm_head.decoder",
        "mlm": "lm_head",
        "classifier.dense": "classifier.dense",
        "classifier.output": "classifier.out_proj",
    },
}
ARCHITECTURES = {"bert": "Bert", "roberta": "Roberta"}


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What a folder held against what the model needed: new (drawn or zeroed here) by our names, unused (in the files, not in the model) by ours or, of what is unknown, theirs."""

    folder: Path
    new: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """For people: nothing where all fits."""
        return [f"{self.folder}: {what} {', '.join(names)}" for what, names in
                (("new, not in the files:", self.new), ("in the files, not used:", self.unused)) if names]

    def missed(self) -> list[str]:
        """Of `lines` what tells that the model answers otherwise than the one that was saved: parameters made here, and left out what lies inside its encoder."""
        inside = tuple(name for name in self.unused if re.search(r"(^|\.)(encoder|embeddings|layers)\.", name))
        return dataclasses.replace(self, unused=inside).lines()


@dataclasses.dataclass
class Loaded:
    """A model with the tokenizer of its folder."""

    model: Model
    tokenizer: Tokenizer
    report: LoadReport


# ---------------------------------------------------------------- names

def foreign_names(config: EncoderConfig) -> dict[str, str]:
    """Our module name -> theirs, with prefix, for every layer; Q, K and V apart."""
    prefix = config.kind + "."
    names = {}
    for ours, theirs in ENCODER_NAMES.items():
        for i in range(config.layers) if "{i}" in ours else (0,):
            names[ours.format(i=i)] = prefix + theirs.format(i=i)
    return names | HEAD_NAMES[config.kind]


def from_foreign(tensors: dict[str, Tensor], config: EncoderConfig) -> tuple[dict[str, Tensor], list[str]]:
    """Their tensors -> (ours by name, with Q, K, V joined; names nobody here knows).

    Accepts names with and without the `bert.`/`roberta.` prefix and legacy LayerNorm names gamma and beta. Raises ModelError where Q, K and V of a layer do not
    fit together, and on a tensor that is there under two names.
    """
    back = {theirs: ours for ours, theirs in foreign_names(config).items()}
    found, unknown = {}, []
    prefix = config.kind + "."
    for name, tensor in tensors.items():
        stem, _, last = name.rpartition(".")
        last = {"gamma": "weight", "beta": "bias"}.get(last, last)
        ours = back.get(stem) or back.get(prefix + stem)
        if ours is None or last not in ("weight", "bias"):
            unknown.append(name)
        elif ours == "mlm.decoder" and last == "bias":
            found["mlm.bias"] = tensor  # some files store the bias under the decoder, some under both: as in transformers the decoder's counts
        elif ours == "mlm":
            found.setdefault("mlm.bias", tensor)
        elif (full := f"{ours}.{last}") in found:
            raise ModelError(f"{_named(full, config)}: expected one tensor, found it under two names, the second {name}")
        else:
            found[full] = tensor
    for i in range(config.layers):
        for last in ("weight", "bias"):
            names = [f"layers.{i}.attention.{kind}.{last}" for kind in QKV]
            parts = [found.pop(name, None) for name in names]
            if any(p is not None for p in parts):
                for name, part in zip(names, parts):
                    _fits(name, part, [config.hidden] * (2 if last == "weight" else 1), config)
                found[f"layers.{i}.attention.qkv.{last}"] = torch.cat(parts)
    return found, unknown


def to_foreign(tensors: dict[str, Tensor], config: EncoderConfig) -> dict[str, Tensor]:
    """The inverse of from_foreign, with prefix and today's names."""
    names, out = foreign_names(config), {}
    for name, tensor in tensors.items():
        stem, _, last = name.rpartition(".")
        if stem.endswith(".qkv"):
            for kind, part in zip(QKV, tensor.split(config.hidden)):
                out[f"{names[stem.removesuffix('qkv') + kind]}.{last}"] = part.contiguous()
        else:
            out[f"{names[stem]}.{last}"] = tensor.contiguous()
    if "mlm.decoder.weight" in tensors and "mlm.bias" in tensors:
        out[names["mlm.decoder"] + ".bias"] = tensors["mlm.bias"].clone()  # transformers ties the two biases only where it ties the weights
    return out


@contextlib.contextmanager
def _naming(place: Path) -> Iterator[None]:
    """A ModelError raised inside says where."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{place}: {error}") from None


def _fits(ours: str, tensor: Tensor | None, shape: Sequence[int], config: EncoderConfig) -> None:
    """Raises ModelError that names the tensor, here and there, unless it has the shape that config.json asks for."""
    name = _named(ours, config)
    if tensor is None:
        raise ModelError(f"expected the tensor {name}, found none")
    if list(tensor.shape) != list(shape):
        raise ModelError(f"{name}: expected shape {list(shape)} by config.json, got {list(tensor.shape)}")


def _named(ours: str, config: EncoderConfig) -> str:
    """A tensor by its name here and there."""
    stem, _, last = ours.rpartition(".")
    return f"{ours} ({foreign_names(config).get(stem.replace('qkv', 'query'), stem)}.{last})"


# ---------------------------------------------------------------- configuration

KEYS = {"layers": "num_hidden_layers", "hidden": "hidden_size", "heads": "num_attention_heads", "feed_forward": "intermediate_size", "vocab": "vocab_size",
        "max_positions": "max_position_embeddings", "segments": "type_vocab_size", "activation": "hidden_act", "norm_eps": "layer_norm_eps", "dropout": "hidden_dropout_prob",
        "attention_dropout": "attention_probs_dropout_prob", "classifier_dropout": "classifier_dropout", "pad_id": "pad_token_id", "tied": "tie_word_embeddings",
        "initializer_range": "initializer_range"}
"""Field of EncoderConfig -> its name in config.json."""
SAME_ACTIVATIONS = {"swish": "silu", "gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "gelu_accurate": "gelu_new", "gelu_python": "gelu"}
"""Other names that config.json may have for activations of sites.py."""


def read_config(folder: Path) -> tuple[EncoderConfig, dict]:
    """(our configuration, the raw one) of a folder's config.json. Raises ModelError on another model type or a feature that is not here."""
    path = folder / "config.json"
    if not path.exists():
        raise ModelError(f"{folder}: expected a Hugging Face model folder with config.json, found none")
    raw = read_object(path, ModelError)
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ModelError(f"{path}: model_type: expected bert or roberta, got {kind!r}")
    for key, want in (("position_embedding_type", "absolute"), ("is_decoder", False), ("add_cross_attention", False)):
        if raw.get(key, want) != want:
            raise ModelError(f"{path}: {key}: expected {want!r}, got {raw[key]!r}")
    for key, kind_of in (("pad_token_id", int | None), ("max_position_embeddings", int)):  # from which other numbers are made
        if not isinstance(raw.get(key, 0), kind_of):
            raise ModelError(f"{path}: {key}: expected a whole number, got {raw[key]!r}")
    pad = raw.get("pad_token_id")
    pad = (0 if kind == "bert" else 1) if pad is None else pad
    offset = pad + 1 if kind == "roberta" else 0
    needed = {f.name for f in dataclasses.fields(EncoderConfig) if f.default is dataclasses.MISSING}
    if missing := next((key for ours, key in KEYS.items() if ours in needed and key not in raw), None):
        raise ModelError(f"{path}: expected the key {missing!r}, found none")
    given = {ours: raw[key] for ours, key in KEYS.items() if key in raw} | {"pad_id": pad, "max_positions": raw[KEYS["max_positions"]] - offset, "position_offset": offset}
    if isinstance(activation := given.get("activation"), str):
        given["activation"] = SAME_ACTIVATIONS.get(activation, activation)
    if given.get("classifier_dropout") is None:
        given["classifier_dropout"] = given.get("dropout", EncoderConfig.dropout)
    try:
        config = EncoderConfig(kind=kind, **given)
    except ModelError as error:
        name, colon, said = str(error).partition(": ")
        raise ModelError(f"{path}: {KEYS.get(name, name)}{colon}{said}") from None
    return config, raw


def foreign_config(model: Model, tokenizer: Tokenizer | None = None) -> dict:
    """config.json for `model`, as transformers reads it; with the ids that the tokenizer gives a text's ends, which only generation asks for. Raises ModelError where positions
    begin elsewhere than the reader of such a file will have them begin."""
    c = model.config
    if c.position_offset != (there := c.pad_id + 1 if c.kind == "roberta" else 0):
        raise ModelError(f"position_offset: expected {there}, {'pad_id + 1' if c.kind == 'roberta' else 'as in every BERT'}, got {c.position_offset}")
    head = "ForSequenceClassification" if model.classifier else "ForMaskedLM" if model.mlm else "Model"
    raw = {
        **{key: getattr(c, ours) for ours, key in KEYS.items()}, "architectures": [ARCHITECTURES[c.kind] + head], "model_type": c.kind,
        "max_position_embeddings": c.max_positions + c.position_offset, "tie_word_embeddings": model.mlm is None or model.mlm.decoder is None,
        "dtype": str(model.encoder.embeddings.word.weight.dtype).removeprefix("torch."),
    }
    if c.kind == "roberta":
        raw |= {"bos_token_id": 0 if tokenizer is None else tokenizer.cls_id, "eos_token_id": 2 if tokenizer is None else tokenizer.sep_id}
    if model.classifier:
        raw["id2label"] = {str(i): label for i, label in enumerate(model.classifier.labels)}
        raw["label2id"] = {label: i for i, label in enumerate(model.classifier.labels)}
    return raw


# ---------------------------------------------------------------- folders

def find_folder(name: str | Path) -> Path:
    """A model folder: the path itself, RUN/model of a run folder, or a name in the local Hugging Face cache. Raises ModelError that says how to fetch it."""
    path = expect_path("model", name, ModelError)
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.stat(path / "config.json")
    except OSError as error:
        raise ModelError(f"model {str(name)[:100]!r}: cannot be read: {error.strerror}") from None
    if (path / "model" / "config.json").exists() and not (path / "config.json").exists():
        if not (path / "config.toml").exists():  # it tells of modules, without which the base answers otherwise
            raise ModelError(f"{path}: expected a run folder with config.toml, found none beside model (which as it stands is {path / 'model'})")
        return path / "model"
    if path.is_dir():
        return path
    if path.is_file():
        raise ModelError(f"model {str(name)!r}: expected a folder, got a file")
    cache = _cache()
    stored = cache / ("models--" + str(name).replace("/", "--"))
    reference = stored / "refs" / "main"
    snapshots = sorted((stored / "snapshots").glob("*/config.json"))
    if os.path.exists(reference) and (stored / "snapshots" / reference.read_text().strip() / "config.json").exists():
        return stored / "snapshots" / reference.read_text().strip()
    if snapshots:
        return snapshots[-1].parent
    if path.is_absolute() or str(name).startswith((".", "~", "$")) or path.is_symlink() or len(path.parts) > 2 or (len(path.parts) == 2 and path.parent.is_dir()):  # no name of a hub
        raise ModelError(f"model {str(name)!r}: no such folder")
    raise ModelError(f"model {str(name)!r}: no such folder, and not in the Hugging Face cache {cache}; fetch it with `hf download {name}`")


def _cache() -> Path:
    """Where `hf download` puts models, by the variables that huggingface_hub reads."""
    if named := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(os.path.expandvars(os.path.expanduser(named)))
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.path.expandvars(os.path.expanduser(home))) / "hub"


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder by their names there. Raises ModelError that names the files it looked for, or the one it could not read."""
    whole, bins = folder / "model.safetensors", folder / "pytorch_model.bin"
    if whole.exists():
        return files.read_tensors(whole, ModelError)
    for listing in (folder / "model.safetensors.index.json", folder / "pytorch_model.bin.index.json"):
        if listing.exists():
            return files.read_parts(listing, ModelError)
    if not bins.exists():
        raise ModelError(f"{folder}: expected model.safetensors, model.safetensors.index.json or pytorch_model.bin, found none")
    return files.read_tensors(bins, ModelError)


class NoInit(TorchFunctionMode):
    """Inside the `with` block torch.nn.init leaves tensors as they are: the files fill them. (The meta device would import torch._dynamo: 2 s.)"""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return function(*args, **(kwargs or {}))


def known_device(name: str | torch.device) -> torch.device:
    """auto is a GPU where there is one. Raises ConfigError on a name torch does not know or a GPU that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name) if isinstance(name, (str, torch.device)) else None
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device: expected cpu, cuda, cuda:1, ... or auto, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: expected a CUDA device that is here, found {torch.cuda.device_count() or 'none'}")
    return device


def expect_floats(dtype: torch.dtype) -> None:
    """Raises ConfigError on what is no kind of number for parameters."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"dtype: expected a floating-point torch.dtype, got {dtype!r}")


@torch.inference_mode(False)  # what is read inside of it can be trained later
def load_model(folder: str | Path, *, mlm: bool | None = None, labels: tuple[str, ...] | None = None, dtype: torch.dtype = torch.float32,
               seed: int = 0) -> tuple[Model, LoadReport]:
    """A model from a folder or cached name.

    mlm: True needs the masked-LM head (ModelError where the files have none), False leaves it out, None takes it where it is.
    labels: the classifier wanted; None takes the stored one, which then must be whole, () none. A stored output layer is used where its labels are the same, else
    drawn anew from `seed`; a stored pooler always serves. dtype: of all parameters. Raises ModelError on missing tensors, on shapes that do not match, and on
    numbers that are none in `dtype`, by name, ConfigError on what is no seed or no kind of number.
    """
    folder = find_folder(folder)
    expect_floats(dtype)
    check_seed(seed, "seed")
    config, raw = read_config(folder)
    tensors = read_tensors(folder)
    _same_layers(tensors, config, folder)
    with _naming(folder):
        found, unknown = from_foreign(tensors, config)
        _same_sizes(found, config)
    stored_labels = _stored_labels(raw, found, folder)
    if not stored_labels:
        unknown += [name for name in tensors if name.startswith(HEAD_NAMES[config.kind]["classifier.output"] + ".")]
    if labels is None and stored_labels:
        _answers(raw, found, config, folder)
    labels = stored_labels if labels is None else tuple(labels) if isinstance(labels, list) else labels
    if labels != stored_labels or not labels:
        found = {name: t for name, t in found.items() if not name.startswith("classifier.output.")}
    has_mlm = "mlm.dense.weight" in found
    if mlm and not has_mlm:
        raise ModelError(f"{folder}: expected a masked-LM head (cls.predictions or lm_head), found none; upstream training needs one (--fresh-head N trains a new one)")
    mlm = has_mlm if mlm is None else mlm
    decoder, word = found.pop("mlm.decoder.weight", None), found.get("embeddings.word.weight")
    # What the files hold wins over `tie_word_embeddings`, as in transformers; without a stored decoder, for which transformers would draw one, it is tied.
    same = decoder is None or (word is not None and decoder.shape == word.shape and torch.equal(decoder, word))
    config = dataclasses.replace(config, tied=decoder is None or (same and config.tied))
    if decoder is not None and mlm and not config.tied:
        found["mlm.decoder.weight"] = decoder
    with torch.device("cpu"), NoInit():  # whatever torch's default device is
        model = Model(config, mlm=mlm, labels=labels)
    model = model.to(dtype).eval()
    generator, new = torch.Generator().manual_seed(int(seed)), []
    if mlm and decoder is None and not raw.get("tie_word_embeddings", True):
        new.append("mlm.decoder (tied to the words instead, though config.json does not tie it)")
    for part, module in (("mlm", model.mlm), ("classifier", model.classifier)):
        if module is not None:
            model.initialize(module, generator)
    for name, parameter in model.named_parameters():
        ours = name.removeprefix("encoder.")
        tensor = found.pop(ours, None)
        if tensor is None and name.startswith(("classifier.", "mlm.bias")):
            new.append(ours)
            continue
        with _naming(folder), torch.no_grad():
            _fits(ours, tensor, parameter.shape, config)
            if wrong := wrong_numbers(tensor, dtype):
                raise ModelError(f"{_named(ours, config)}: {wrong}")
            parameter.copy_(tensor)
    # A pooler that no head uses now is carried along, so that saving loses nothing a later classifier starts from.
    model.carried = {name: found.pop(name).to(dtype) for name in list(found) if name.startswith("classifier.dense.")}
    unused = sorted(found) + [n for n in sorted(unknown) if not n.endswith("position_ids")]
    return model, LoadReport(folder, tuple(new), tuple(unused))


def _same_layers(tensors: dict[str, Tensor], config: EncoderConfig, folder: Path) -> None:
    """Raises ModelError where config.json asks for more or fewer layers than the files hold."""
    layers = {int(found[1]) for name in tensors if (found := re.match(rf"(?:{config.kind}\.)?encoder\.layer\.(\d+)\.", name))}
    if config.layers != len(layers):
        raise ModelError(f"{folder / 'config.json'}: num_hidden_layers: expected {len(layers)}, the layers in the files, got {config.layers}")


def _same_sizes(found: dict[str, Tensor], config: EncoderConfig) -> None:
    """Raises ModelError where config.json asks for other widths or tables than the files hold, before anything of that size is made."""
    shapes = {f"{table}.weight": [rows, config.hidden] for table, rows in table_rows(config).items()} | {"layers.0.feed_forward.up.weight": [config.feed_forward, config.hidden]}
    for ours, shape in shapes.items():
        _fits(ours, found.get(ours), shape, config)


NO_CLASSIFIER = ("ForTokenClassification", "ForMultipleChoice", "ForQuestionAnswering", "ForNextSentencePrediction")


def _stored_labels(raw: dict, found: dict[str, Tensor], folder: Path) -> tuple[str, ...]:
    """The labels of the stored classifier of texts; () where there is none, as in the model of another task whose output layer has the same name."""
    output, kinds = found.get("classifier.output.weight"), raw.get("architectures")
    if output is None or isinstance(kinds, list) and any(str(kind).endswith(NO_CLASSIFIER) for kind in kinds):
        return ()
    names = raw.get("id2label") or {str(i): f"LABEL_{i}" for i in range(output.shape[0])}
    if not isinstance(names, dict) or set(names) != {str(i) for i in range(output.shape[0])}:
        said = f"names the labels {', '.join(names)}" if isinstance(names, dict) else f"is {short(names)}"
        raise ModelError(f"{folder}: id2label {said}; expected 0 to {output.shape[0] - 1}, the rows of the classifier")
    labels = tuple(str(names[str(i)]) for i in range(len(names)))
    if len(set(labels)) < len(labels):
        raise ModelError(f"{folder}: id2label: expected a label of its own for every row of the classifier, got {short(names)}")
    return labels


def check_single_label(raw: dict, folder: Path) -> None:
    """Raises ModelError where a classifier's answers are no probabilities of labels of which a text has one."""
    if (kind := raw.get("problem_type")) not in (None, "single_label_classification"):
        raise ModelError(f"{folder / 'config.json'}: problem_type: expected single_label_classification or none, got {kind!r}")


def _answers(raw: dict, found: dict[str, Tensor], config: EncoderConfig, folder: Path) -> None:
    """Raises ModelError unless the stored classifier is whole and gives one label a text."""
    check_single_label(raw, folder)
    if (rows := len(found["classifier.output.weight"])) < 2:
        raise ModelError(f"{folder}: {_named('classifier.output.weight', config)}: expected a row a label, two or more, got {rows} (a regression)")
    for ours in ("classifier.dense.weight", "classifier.dense.bias", "classifier.output.bias"):
        if ours not in found:
            raise ModelError(f"{folder}: expected the tensor {_named(ours, config)} beside the classifier's {_named('classifier.output.weight', config)}, found none")


def load(folder: str | Path, **options) -> Loaded:
    """load_model with the folder's tokenizer. Raises ModelError where the tokenizer's ids exceed the model's vocabulary, naming both."""
    model, report = load_model(folder, **options)
    tokenizer = load_tokenizer(report.folder)
    if tokenizer.vocab_size > model.config.vocab:
        raise ModelError(f"{report.folder}: tokenizer has {tokenizer.vocab_size} tokens; expected at most the model's vocabulary of {model.config.vocab}")
    tokenizer.segments = model.config.segments
    return Loaded(model, tokenizer, report)


def save_model(model: Model, folder: str | Path, tokenizer: Tokenizer | None = None) -> Path:
    """Write a folder that transformers loads to the same outputs; attached methods are not part of it unless they are merged (export merges them), nor is a RoBERTa's pooler,
    which none of its heads reads. Returns the folder. Raises OSError where it cannot be written, ModelError on positions that no config.json can tell, and on what is no model,
    folder or tokenizer."""
    expect_model(model, "save_model")
    model = getattr(model, "_orig_mod", model)
    folder = expect_path("save_model", folder, ModelError)
    if not isinstance(tokenizer, (Tokenizer, type(None))):
        raise ModelError(f"save_model: expected a tokenizer, as load_tokenizer gives one, got {type(tokenizer).__name__}")
    config, word = foreign_config(model, tokenizer), model.encoder.embeddings.word.weight
    folder.mkdir(parents=True, exist_ok=True)
    ours = {name.removeprefix("encoder."): p.detach().cpu() for name, p in model.named_parameters()}
    if config["tie_word_embeddings"] and model.mlm is not None and (kept := model.encoder.hooks.base(word)) is not word:  # a module is merged into it: the decoder stays the base's
        ours["mlm.decoder.weight"], config["tie_word_embeddings"] = kept.detach().cpu(), False
    if model.classifier is None:
        ours |= model.carried
    write_tensors(to_foreign(ours, model.config), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save(folder, model.config.max_positions)
    return folder
