"""Adapter files, run folders, and writing them whole or not at all.

    RUN/config.toml     every setting as asked for  RUN/metrics.jsonl   one line an event (of a training: an imported run has none)
    RUN/versions.json   packages, commit, device;   RUN/adapter/        adapter.json, adapter.safetensors; further modules in adapter-2, adapter-3, ...
                        precision and step taken, the runs it was made of
    RUN/model/          Hugging Face layout; only where the base or a head was trained

What it adds over weights.py (models) and methods (modules): which file belongs to which base, and how both come back together. Everything is
safetensors, JSON or TOML.
"""

import contextlib
import dataclasses
import errno
import glob
import json
import os
import platform
import re
import subprocess
import tomllib
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import tomli_w
import torch

from . import __version__, methods, patch, processor, weights
from .encoder import Model, expect_model
from .errors import AdapterError, ConfigError, ModelError
from .files import read_object, read_tensors, write_tensors
from .methods import Method
from .options import checked, expect_name, expect_path
from .outputs import NotMade, digest, files_in, held, keep_apart, partial_of, tables, told_as, vacant, write_text, writing_folder
from .tokens import Tokenizer

FORMAT = 1
WRITERS = ("upstream", "downstream", "import")
"""The commands that write runs."""
RUN_FILES = ("config.toml", "versions.json", "metrics.jsonl", "adapter.json")
SIZES = {"type": "kind", "layers": "layers", "hidden": "hidden", "vocab": "vocab"}
"""What a header says of the base's sizes -> the field of its EncoderConfig."""
SOURCES = ("model", "corpus", "valid", "adapter", "train", "dev", "test", "cache")
"""The keys of a run's configuration that name files, folders and patterns."""
PACKAGES = ("tokenizers", "safetensors", "numpy", "triton")


# ---------------------------------------------------------------- adapters

def describe_base(model: Model) -> dict:
    """What an adapter belongs to: type, layers, hidden, vocab, and the sha256 of the encoder without heads. Raises ModelError on what is no Model."""
    expect_model(model, "describe_base")
    return _sizes(model) | {"sha256": patch.base_checksum(model)}


def _sizes(model: Model) -> dict:
    return {name: getattr(model.config, own) for name, own in SIZES.items()}


@dataclasses.dataclass
class Adapter:
    """A module from a file. axis: what it was learnt on. about: the rest of adapter.json."""

    method: Method
    axis: str
    base: dict
    folder: Path
    about: dict


def save_adapter(folder: str | Path, method: Method, axis: str, base: dict, about: dict | None = None) -> None:
    """Write adapter.json and adapter.safetensors, in the place of those that are there, of which none is ever beside one of the others; numbers are float32. axis: what it was
    learnt on, its name when attached. base: describe_base of the model it belongs to. about: what else adapter.json says.

    Raises AdapterError on what no folder could give back, OSError where it cannot be written; nothing is written then.
    """
    if not isinstance(method, Method) or method.trains_base:
        raise AdapterError(f"save_adapter: expected a method with tensors of its own, got {method.name if isinstance(method, Method) else type(method).__name__}")
    expect_name("save_adapter: axis", axis, AdapterError)
    if not isinstance(base, dict) or not set(SIZES) <= set(base):
        raise AdapterError(f"save_adapter: base: expected what describe_base says of the model, got {base!r}")
    if not isinstance(base.get("sha256"), (str, type(None))):
        raise AdapterError(f"save_adapter: base: sha256: expected a text, got {base['sha256']!r}")
    content = {"format": FORMAT, "method": method.name, "axis": axis, "config": dataclasses.asdict(method.saved_config()), "base": base}
    if not isinstance(about, (dict, type(None))) or set(content) & set(about or {}):
        raise AdapterError(f"save_adapter: about: expected a dict without {', '.join(content)}, got {about!r}")
    try:
        text = json.dumps(content | (about or {}), indent=2) + "\n"
    except (TypeError, ValueError) as error:
        raise AdapterError(f"save_adapter: expected what JSON can hold, got {error}") from None
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in method.state().items()}
    try:
        methods.outline(type(method), method.saved_config(), method.encoder_config).load(state)
    except AdapterError as error:
        raise AdapterError(f"save_adapter: {error}") from None
    folder = expect_path("save_adapter", folder, AdapterError)
    folder.mkdir(parents=True, exist_ok=True)
    header, tensors = folder / "adapter.json", folder / "adapter.safetensors"
    partial = partial_of(tensors)
    try:
        with told_as(tensors, partial):
            partial.touch()  # what forbids it says so itself, with its number
            with held(partial, partial.touch):
                write_tensors(state, partial)
                header.unlink(missing_ok=True)
                partial.replace(tensors)
                write_text(header, text)
    except NotMade as error:
        raise OSError(errno.EIO, error.args[0], str(tensors)) from None


def read_header(folder: Path) -> dict:
    """adapter.json, checked. Raises AdapterError that names the file."""
    path = folder / "adapter.json"
    if not path.exists():
        theirs = " (that is peft's or AdapterHub's: `peftdebias import` reads it)" if (folder / "adapter_config.json").exists() else ""
        raise AdapterError(f"{folder}: expected an adapter or run folder with adapter.json, found none{theirs}")
    header = read_object(path, AdapterError)
    if header.get("format") != FORMAT:
        raise AdapterError(f"{path}: expected format {FORMAT}, got {header.get('format')!r}")
    missing = [key for key in ("method", "axis", "config", "base") if key not in header]
    if missing:
        raise AdapterError(f"{path}: expected the key {missing[0]!r}, found none")
    for key in ("config", "base"):
        if not isinstance(header[key], dict):
            raise AdapterError(f"{path}: {key}: expected a JSON object, got {header[key]!r}")
    if not isinstance(header["base"].get("sha256"), (str, type(None))):
        raise AdapterError(f"{path}: base: sha256: expected a text, got {header['base']['sha256']!r}")
    for key in ("method", "axis"):
        if not isinstance(header[key], str):
            raise AdapterError(f"{path}: {key}: expected a text, got {header[key]!r}")
    return header


def load_adapter(folder: str | Path, model: Model, force: bool = False) -> Adapter:
    """The module of a run or adapter folder, for `model`. Raises AdapterError where it was made for another base, naming both.

    force: a warning in place of that error; tensors whose shapes do not fit are still refused.
    """
    folder = expect_path("load_adapter", folder, AdapterError)
    expect_model(model, "load_adapter", raised=AdapterError)
    if not folder.exists():
        raise AdapterError(f"adapter {str(folder)!r}: no such folder")
    given, folder = folder, module_folder(folder)
    if folder == given and (folder / "config.toml").exists() and not (folder / "adapter.json").exists():
        raise AdapterError(f"{folder}: a run without a module (its base was trained); expected it in the place of the base model")
    header = read_header(folder)
    try:
        cls = methods.method_class(header["method"])
        config = cls.Config(**checked(cls.Config, header["config"], "config: "))
        methods.outline(cls, config, model.config)
    except ConfigError as error:
        raise AdapterError(f"{folder / 'adapter.json'}: {error}") from None
    check_base(folder, header["base"], model, force)
    path = folder / "adapter.safetensors"
    if not path.exists():
        raise AdapterError(f"{folder}: expected adapter.safetensors, found none")
    state = read_tensors(path, AdapterError)
    try:
        method = methods.restored(cls, config, model.config, state)
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from None
    rest = {k: v for k, v in header.items() if k not in ("format", "method", "axis", "config", "base")}
    return Adapter(method, header["axis"], header["base"], folder, rest)


def check_base(folder: Path, base: dict, model: Model, force: bool = False) -> None:
    """Raises AdapterError where `base` is not this model's, or warns with `force`; warns where it carries no checksum."""
    own = _sizes(model)
    theirs, wrong = {key: base.get(key) for key in own}, None
    if theirs != own:
        wrong = f"{folder}: made for {_named(theirs)}; expected {_named(own)}, the model given"
    elif not base.get("sha256"):
        warnings.warn(f"{folder}: carries no checksum of its base; whether it belongs to this model cannot be checked", stacklevel=3)
    elif base["sha256"] != (found := patch.base_checksum(model)):
        dtype = str(model.encoder.embeddings.word.weight.dtype).removeprefix("torch.")
        wrong = f"{folder}: made for the base with checksum {base['sha256'][:12]}; expected {found[:12]}, the model given" + (f", in {dtype}" if dtype != "float32" else "")
    if wrong and not force:
        raise AdapterError(f"{wrong} (--force, in Python force=True, goes on where shapes allow it)")
    if wrong:
        warnings.warn(f"{wrong}; going on by force", stacklevel=3)


def _named(base: dict) -> str:
    return f"{base['type']} of {base['layers']} layers, hidden {base['hidden']}, vocabulary {base['vocab']}"


def _expect_apart(folders: list[Path]) -> None:
    """Raises AdapterError on a module that is there twice: one folder, or a downstream run's own copy of a module and what it is a copy of. Told before it is held against its base,
    which a copy's has been trained away from."""
    seen: dict[tuple[str, str], Path] = {}
    for own in folders if len(folders) > 1 else ():
        if all((own / name).is_file() for name in ("adapter.json", "adapter.safetensors")):
            try:
                key = read_header(own)["axis"], digest(own / "adapter.safetensors")
            except OSError:  # told where it is loaded
                continue
            other = seen.setdefault(key, own)
            if other is not own:
                raise AdapterError(f"{own}: attached twice; expected each module once" + ("" if other.resolve() == own.resolve() else f" ({other} is the same)"))


def attach_adapters(model: Model, folders: tuple[str, ...], force: bool = False) -> list[Adapter]:
    """Load and attach each folder's module, all of a run's, under its axis (the second of an axis as `axis-2`), in order."""
    given = [expect_path("adapter", folder, AdapterError) for folder in folders]
    places = [one for folder in given for one in adapter_folders(folder) or [folder]]
    _expect_apart(places)
    adapters = [load_adapter(one, model, force) for one in places]
    for adapter in adapters:
        name, count = adapter.axis, 1
        while name in model.methods:
            count += 1
            name = f"{adapter.axis}-{count}"
        patch.attach(model, name, adapter.method)
    return adapters


# ---------------------------------------------------------------- run folders

def adapter_folder(run: Path, number: int = 1) -> Path:
    """RUN/adapter, RUN/adapter-2, ...: where the first, second, ... module of a run lies."""
    return run / ("adapter" if number == 1 else f"adapter-{number}")


def module_folder(folder: Path) -> Path:
    """The first module's folder of a run, else the folder itself."""
    own = adapter_folder(folder)
    return own if own.is_dir() else folder


def adapter_folders(run: Path) -> list[Path]:
    """RUN/adapter, RUN/adapter-2, ... as far as they exist. Raises AdapterError where a run's configuration tells of more: without them it answers otherwise."""
    found: list[Path] = []
    while (folder := adapter_folder(run, len(found) + 1)).is_dir():
        found.append(folder)
    if is_run(run) and len(found) < (told := _modules_told(read_config(run))):
        raise AdapterError(f"{folder}: expected a module, since {run / 'config.toml'} tells of {told}, found none")
    return found


def _modules_told(config: dict) -> int:
    """How many modules a run of this configuration has at least."""
    if config.get("command") == "upstream":
        name = str(config.get("method"))
        return int(name in methods.METHODS and not methods.method_class(name).trains_base)
    given = config.get("adapter", [])
    return (len(given) if isinstance(given, list) else 1) if config.get("command") == "downstream" else int(config.get("command") == "import")


class RunFolder:
    """A run being written: files go to a hidden folder beside it, which takes its name when all is there."""

    def __init__(self, path: Path):
        self.path = path

    def event(self, **values) -> None:
        """Append a line to metrics.jsonl."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


@contextlib.contextmanager
def writing_run(out: str | Path, command: str, values: dict, overwrite: bool = False, device: torch.device | None = None, **chosen: str) -> Iterator[RunFolder]:
    """A RunFolder that becomes `out` when the block ends well and vanishes when it does not.

    values: the configuration, for config.toml. device and chosen (what `auto` came to, precision="bf16", say) go into versions.json, and what `made_of` says of values.
    Raises ConfigError where `out` exists and is not to be replaced, holds what the run is made from, or cannot be written.
    """
    if overwrite and is_run(out):
        keep_apart({"--out": out}, _sources(values), folders=True)
    with writing_folder(Path(out), overwrite, "run folder", _replaceable) as partial:
        config = tomli_w.dumps({"command": command} | values)
        try:
            (partial / "config.toml").write_text(config, encoding="utf-8")
        except UnicodeEncodeError as error:
            line = config[config.rfind("\n", 0, error.start) + 1:].partition("\n")[0]
            raise ConfigError(f"{line!a}: expected names in UTF-8 (in the locale C, PYTHONUTF8=1 reads them as such)") from None
        (partial / "versions.json").write_text(json.dumps(versions(device) | chosen | ({"made_of": origins} if (origins := made_of(values)) else {}), indent=2) + "\n", encoding="utf-8")
        yield RunFolder(partial)


def _replaceable(there: Path) -> bool:
    """Whether it is empty, or has both files that `writing_run` begins with, of one of WRITERS: a config.toml alone may be anybody's."""
    with contextlib.suppress(ModelError):
        return vacant(there) or ((there / "versions.json").is_file() and read_config(there)["command"] in WRITERS)
    return False


def _sources(values: dict) -> Iterator[str]:
    """What a run of this configuration is made from, by path."""
    yield from tables(values.get("axis"), values.get("names"))
    for key in (*SOURCES, "folder"):
        for one in [values[key]] if isinstance(values.get(key), str) else values.get(key, ()):
            yield from glob.glob(one, recursive=True) if glob.has_magic(one) and not os.path.exists(one) else [one]


def files_of(*folders: str | Path) -> list[Path]:
    """The files that run, adapter and model folders consist of; what else lies in them is somebody's own."""
    found = []
    for folder in map(Path, folders):
        found += [path for name in (*RUN_FILES, *weights.FILES) for path in folder.glob(name)]
        found += [path for part in (folder / "model", *folder.glob("adapter*")) for path in files_in(part)]
    return found


def read_config(run: Path) -> dict:
    """config.toml of a run. Raises ModelError where there is none."""
    path = run / "config.toml"
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{run}: expected a run folder with config.toml, found none") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # ValueError: no UTF-8, no TOML
        raise ModelError(f"{path}: expected TOML, got {error}") from None
    if not isinstance(found.get("command"), str):
        raise ModelError(f"{path}: expected the configuration of a run, got one without a command")
    for key, kind, what in (("model", str, "a text"), ("max_length", int, "a whole number")):
        if key in found and type(found[key]) is not kind:
            raise ModelError(f"{path}: {key}: expected {what}, got {found[key]!r}")
    if not (isinstance(folders := found.get("adapter", []), list) and all(isinstance(folder, str) for folder in folders)):
        raise ModelError(f"{path}: adapter: expected a list of texts, got {folders!r}")
    return found


def is_run(path: str | Path) -> bool:
    """Whether the folder is one that `upstream`, `downstream` or `import` wrote: it has a config.toml, which in a model folder may be somebody's own."""
    if os.path.exists(os.path.join(path, "config.json")):  # False where a Path would raise: of a name too long, or with a zero byte
        with contextlib.suppress(ModelError):
            return read_config(Path(path))["command"] in WRITERS
        return False
    return os.path.exists(os.path.join(path, "config.toml"))


@dataclasses.dataclass
class Run:
    """A model with its tokenizer and attached modules, ready to use. config: the run's own, empty for a plain model folder. sources: the folder of each module."""

    model: Model
    tokenizer: Tokenizer
    config: dict
    report: weights.LoadReport
    sources: dict[str, Path] = dataclasses.field(default_factory=dict)


def load_run(path: str | Path, adapters: tuple[str, ...] | None = (), device: str | torch.device = "cpu", force: bool = False,
             dtype: torch.dtype = torch.float32, **options) -> Run:
    """A run folder (its base, head and modules) or a plain model folder, plus further `adapters`; in eval mode.

    force: as in load_adapter. dtype: of all parameters at the end. options: of weights.load_model. An upstream run of a module keeps no base: it is loaded from where the run found it;
    modules that it was learnt beside are not part of it either, and a warning names those that `adapters` leaves out.
    Raises ModelError on a folder that holds no such model, AdapterError on a module that does not belong to it, ConfigError on what are no folders, no device or no kind of number.
    """
    path, device, config = expect_path("model", path, ModelError), weights.known_device(device), {}
    weights.expect_floats(dtype)
    if isinstance(adapters, (str, os.PathLike)):
        raise ConfigError(f"adapters: expected a list of folders, got one path: [{str(adapters)!r}]")
    if not isinstance(adapters, (Iterable, type(None))):
        raise ConfigError(f"adapters: expected a list of folders, got {type(adapters).__name__}")
    own: list[Path] = []
    if not is_run(path):
        loaded = weights.load(path, **options)
    else:
        config, own = read_config(path), adapter_folders(path)
        if (path / "model").is_dir() or "model" not in config or config.get("command") == "downstream":
            loaded = weights.load(path / "model", **options)
        else:
            try:
                loaded = weights.load(config["model"], **options)
            except ModelError as error:
                raise ModelError(f"{path}: a module, whose base was {config['model']}: {error}") from None
    attached = attach_adapters(loaded.model, (*own, *(adapters or ())), force)
    there = {os.path.realpath(adapter.folder) for adapter in attached}
    named = config.get("adapter", []) if config.get("command") == "upstream" else []
    fewer = len(attached) - len(own) < len(named)  # of a folder that was moved since nothing else is known
    beside = [one for one in named if os.path.realpath(module_folder(Path(one))) not in there and (fewer or os.path.exists(one))]
    for line in (*loaded.report.missed(), *(f"{path}: its module was learnt beside {one}, which is not among those attached" for one in beside)):
        warnings.warn(line, stacklevel=2)
    sources = dict(zip(loaded.model.methods, (adapter.folder for adapter in attached)))
    with torch.inference_mode(False):  # as load_model reads it
        model = loaded.model.to(device, dtype).eval()
    return Run(model, loaded.tokenizer, config, loaded.report, sources)


def made_of(values: dict) -> dict:
    """The configurations of the runs that one of this configuration begins from, where there are any: {"model": of its base's, "adapter": [of each module's]}; they may be
    moved later. Each has under "made_of" what its own run began from, where that tells. A config.toml beside a model that is none of a run's is another's."""
    def config_of(path: str) -> dict | None:
        own = Path(path)
        for folder in (own, own.parent) if re.fullmatch(r"model|adapter(-\d+)?", own.name) else (own,):
            with contextlib.suppress(ModelError):
                if (config := read_config(folder))["command"] in WRITERS:
                    return config | _origins_of(folder)
        return None

    model = config_of(values["model"]) if "model" in values else None
    found = [config for path in values.get("adapter", ()) if (config := config_of(path))]
    return ({"model": model} if model else {}) | ({"adapter": found} if found else {})


def _origins_of(run: Path) -> dict:
    """{"made_of"} of a run's versions.json, {} where that does not tell."""
    with contextlib.suppress(ModelError):
        return {"made_of": found} if (found := told_origins(read_object(run / "versions.json", ModelError))) else {}
    return {}


def told_origins(versions: dict) -> dict:
    """What a run's versions.json, which anybody may have written, tells under "made_of"; {} where that is not what `made_of` gives."""
    def sound(found) -> bool:
        if not isinstance(found, dict) or not isinstance(modules := found.get("adapter", []), list):
            return False
        configs = [*([found["model"]] if "model" in found else []), *modules]
        return all(isinstance(config, dict) and isinstance(config.get("adapter", []), list) and sound(config.get("made_of", {})) for config in configs)

    found = versions.get("made_of")
    return found if sound(found) else {}


def base_of(path: str | Path) -> str | Path:
    """The model of a run that has none of its own, a module's base; else the path itself."""
    config = read_config(Path(path)) if is_run(path) and not (Path(path) / "model").is_dir() else {}
    return config.get("model", path)


def versions(device: torch.device | None = None) -> dict:
    """What a result depends on besides its configuration: packages, this project's commit where it runs from a checkout, the device (None: that which `auto` is here)."""
    found = {"peftdebias": __version__, "python": platform.python_version(), "platform": platform.platform()}
    found["torch"] = torch.__version__  # says of what build it is, where its package may not
    found |= {package: processor.installed(package) for package in PACKAGES}
    cuda = torch.cuda.is_available() if device is None else device.type == "cuda"
    return found | {"commit": _commit(), "device": torch.cuda.get_device_name(device) if cuda else processor.named(), "threads": torch.get_num_threads()}


def all_versions(of_parts: Iterable[dict]) -> dict:
    """What parts that one table holds were made by: each entry of their `versions`, or where they differ all of them as a text, in the parts' order. A part may be such a
    table itself."""
    found: dict[str, list] = {}
    for versions in of_parts:
        for name, value in versions.items():
            found.setdefault(name, []).extend(one for one in (value.split(", ") if isinstance(value, str) else [value]) if one not in found[name])
    return {name: values[0] if len(values) == 1 else ", ".join(map(str, values)) for name, values in found.items()}


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        said = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip() or None
