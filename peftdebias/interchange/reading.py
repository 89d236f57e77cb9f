"""A foreign folder as a module of ours (`read`), and as a run folder (`import_adapter`)."""

import json
import os
import warnings
from pathlib import Path

from torch import Tensor

from .. import checkpoint, weights
from ..encoder import Model
from ..errors import AdapterError, ConfigError, ModelError
from ..patch import base_checksum
from ..sites import EncoderConfig
from ..tokens import load_tokenizer
from . import adapterhub, peft
from .folders import CONFIG, Fields, Foreign


def read(folder: str | Path, config: EncoderConfig) -> Foreign:
    """The module of a peft or AdapterHub folder for a model of this shape. Raises AdapterError that names file, key, expected and got."""
    folder = Path(folder)
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise AdapterError(f"{folder}: expected a peft or AdapterHub folder with {CONFIG}, found none") from None
    except (ValueError, RecursionError, OSError) as error:  # ValueError: no UTF-8, no JSON, or an integer of thousands of digits
        raise AdapterError(f"{path}: expected JSON, got {error}") from None
    if not isinstance(values, dict):
        raise AdapterError(f"{path}: expected a JSON object, got {type(values).__name__}")
    if "peft_type" in values:
        return peft.read(Fields(path, values), folder, config)
    if "config" in values and "model_type" in values:
        return adapterhub.read(Fields(path, values), folder, config)
    raise AdapterError(f"{path}: expected peft's peft_type, or AdapterHub's config and model_type; got {', '.join(values) or 'no keys'}")


def import_adapter(folder: str | Path, model: str | Path, axis: str, out: str | Path, overwrite: bool = False) -> Path:
    """Write a run folder with the module of a peft or AdapterHub folder, bound to the base `model` by its checksum; a head that came along goes into its model/.

    axis: what the module was learnt on, and its name when attached. Raises AdapterError or ModelError where folder and model do not fit.
    """
    if not axis.strip() or "/" in axis:
        raise ConfigError(f"--axis: expected a name without /, got {axis!r}")
    loaded, _ = weights.load_model(model)
    found = read(folder, loaded.config)
    _compare_bases(folder, found.origin.get("base"), model, loaded)
    settings = {"folder": os.path.realpath(folder), "model": os.path.realpath(model) if os.path.exists(model) else str(model), "axis": axis}
    with checkpoint.writing_run(out, "import", settings, overwrite) as run:
        if found.heads:
            loaded, tokenizer = _with_heads(model, found.heads)
            weights.save_model(loaded, run.path / "model", tokenizer)
        checkpoint.save_adapter(run.path / "adapter", found.method, axis, checkpoint.describe_base(loaded), {"origin": found.origin})
    return Path(out)


def _compare_bases(folder: str | Path, named: str | None, model: str | Path, loaded: Model) -> None:
    """Warns where the folder names a base that is here and is another than the one it is to be bound to."""
    if named is None or not os.path.isdir(named) or (os.path.exists(model) and os.path.samefile(named, model)):
        return
    try:
        other = base_checksum(weights.load_model(named)[0])
    except ModelError:
        return
    if other != (own := base_checksum(loaded)):
        warnings.warn(f"{folder}: names the base {named}, with checksum {other[:12]}; bound to {model}, with {own[:12]}", stacklevel=3)


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
