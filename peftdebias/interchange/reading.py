"""A foreign folder as a module of ours (`read`), and as a run folder (`import_adapter`)."""

import os
import warnings
from pathlib import Path

from torch import Tensor

from .. import checkpoint, weights
from ..encoder import Model
from ..errors import AdapterError, ModelError
from ..files import read_object, wrong_numbers
from ..options import expect_name, expect_path
from ..patch import base_checksum
from ..sites import EncoderConfig
from ..tokens import load_tokenizer
from . import adapterhub, peft
from .folders import CONFIG, Fields, Foreign


def read(folder: str | Path, config: EncoderConfig) -> Foreign:
    """The module of a peft or AdapterHub folder for a model of this shape. Raises AdapterError that names file, key, expected and got."""
    folder = expect_path("adapter", folder, AdapterError)
    path = folder / CONFIG
    if not path.exists():
        raise AdapterError(f"{folder}: expected a peft or AdapterHub folder with {CONFIG}, found none")
    values = read_object(path, AdapterError)
    if "peft_type" in values:
        return peft.read(Fields(path, values), folder, config)
    if "config" in values and "model_type" in values:
        return adapterhub.read(Fields(path, values), folder, config)
    raise AdapterError(f"{path}: expected peft's peft_type, or AdapterHub's config and model_type; got {', '.join(values) or 'no keys'}")


def import_adapter(folder: str | Path, model: str | Path, axis: str, out: str | Path, overwrite: bool = False) -> Path:
    """Write a run folder with the module of a peft or AdapterHub folder, bound to the base `model` by its checksum; a head that came along goes into its model/.

    axis: what the module was learnt on, and its name when attached. Raises AdapterError or ModelError where folder and model do not fit.
    """
    expect_name("--axis", axis)
    out = expect_path("--out", out)
    loaded, _ = weights.load_model(model, labels=())
    found = read(folder, loaded.config)
    _compare_bases(folder, found.origin.get("base"), model, loaded)
    settings = {"folder": os.path.realpath(folder), "model": os.path.realpath(model) if os.path.exists(model) else str(model), "axis": axis}
    with checkpoint.writing_run(out, "import", settings, overwrite) as run:
        if found.heads:
            loaded, tokenizer = _with_heads(model, found.heads, folder)
            weights.save_model(loaded, run.path / "model", tokenizer)
        checkpoint.save_adapter(checkpoint.adapter_folder(run.path), found.method, axis, checkpoint.describe_base(loaded), {"origin": found.origin})
    return out


def _compare_bases(folder: str | Path, named: str | None, model: str | Path, loaded: Model) -> None:
    """Warns where the folder names a base that is here and is another than the one it is to be bound to."""
    if named is None or not os.path.isdir(named) or (os.path.exists(model) and os.path.samefile(named, model)):
        return
    try:
        other = base_checksum(weights.load_model(named, labels=())[0])
    except ModelError:
        return
    if other != (own := base_checksum(loaded)):
        warnings.warn(f"{folder}: names the base {named}, with checksum {other[:12]}; bound to {model}, with {own[:12]}", stacklevel=3)


def _with_heads(folder: str | Path, heads: dict[str, Tensor], module: str | Path):
    """(the base with the heads of `module` in place of its own, its tokenizer)."""
    labels = None
    if (output := heads.get("classifier.output.weight")) is not None:
        place = weights.find_folder(folder)
        raw = weights.read_config(place)[1]
        weights.check_single_label(raw, place)
        if len(output) < 2:
            raise AdapterError(f"{module}: a head with classifier.output.weight: expected a row a label, two or more, got {len(output)} (a regression)")
        named = raw.get("id2label")
        named = named if isinstance(named, dict) and len(named) == len(output) else {}
        labels = tuple(str(named.get(str(i), f"LABEL_{i}")) for i in range(len(output)))
    model, report = weights.load_model(folder, labels=labels)
    own = dict(model.named_parameters())
    if "mlm.decoder.weight" in heads and "mlm.decoder.weight" not in own and model.mlm is not None:  # a copy of the word embedding, trained apart
        model.untie(model.encoder.embeddings.word.weight)
        own["mlm.decoder.weight"] = model.mlm.decoder.weight
    for name, tensor in heads.items():
        if name not in own or own[name].shape != tensor.shape:
            raise AdapterError(f"{module}: a head with {name} of shape {list(tensor.shape)}; expected {f'shape {list(own[name].shape)}' if name in own else 'no such tensor'}, for {folder}")
        if wrong := wrong_numbers(tensor, own[name].dtype):
            raise AdapterError(f"{module}: a head with {name}: {wrong}")
        own[name].data.copy_(tensor)
    if missing := [n for n in report.new if n not in heads]:
        raise AdapterError(f"{folder}: expected a model with {missing[0]}: it is neither there nor beside the adapter, so whatever the classifier answered is lost")
    return model, load_tokenizer(report.folder)
