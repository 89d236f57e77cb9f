"""A run folder as a folder of others: its plain model, its module as peft has it, or its modules in the weights; each with a card."""

import contextlib
import shutil
from pathlib import Path

from .. import checkpoint, methods, patch, weights
from ..errors import AdapterError, ConfigError, ModelError
from ..files import wrong_numbers
from ..options import expect_path
from ..outputs import FULL, files_in, keep_apart, writing_folder
from . import peft
from .card import WRITTEN, card
from .folders import CONFIG

FORMS = ("hf", "peft", "merged")


def export_adapter(run: str | Path, form: str, out: str | Path, overwrite: bool = False) -> Path:
    """Write the run folder `run` for others, with a card: form "hf" (its plain model folder), "peft" (its module) or "merged" (its module in the weights).

    Raises AdapterError, by name, where the form cannot hold what the run is.
    """
    run, out = expect_path("run", run, ModelError), expect_path("--out", out)
    if form not in FORMS:
        raise ConfigError(f"--as: expected one of {', '.join(FORMS)}, got {form!r}")
    if not checkpoint.is_run(run):
        raise ModelError(f"{run}: expected a run folder with config.toml, found none")
    modules = [checkpoint.read_header(f)["method"] for f in checkpoint.adapter_folders(run)]
    config = checkpoint.read_config(run)
    keep_apart({"--out": out}, [run, *checkpoint.files_of(run), checkpoint.base_of(run)], folders=True)
    with writing_folder(out, overwrite, "exported folder", _is_export) as folder:
        onto, base = None, config.get("model", "")
        if form == "hf":
            if modules:
                raise AdapterError(f"{run}: a model folder cannot hold its {' and '.join(modules)}; {_other_forms(modules)}")
            loaded = checkpoint.load_run(run)
            for file in sorted(files_in(run / "model")):
                place = file.relative_to(run / "model")
                try:
                    (folder / place).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, folder / place)
                except OSError as error:
                    raise OSError(error.errno, error.strerror, str(out / place) if error.errno in FULL else str(file)) from None
        elif not modules:
            raise AdapterError(f"{run}: expected a run with a module, found none; --as hf writes its model")
        else:
            loaded = checkpoint.load_run(run)
            if form == "merged":
                write_merged(folder, loaded)
            elif len(modules) > 1:
                raise AdapterError(f"{run}: a peft folder holds one module; expected one, got {' and '.join(modules)}; {_other_forms(modules)}")
            else:
                base = str((run / "model").resolve()) if (run / "model").is_dir() else base
                onto = peft.write(folder, *loaded.model.methods.values(), loaded.model, base)
        positions = loaded.model.encoder.longest
        (folder / "README.md").write_text(card(run, config, form, base, min(positions, config.get("max_length", positions)), onto), encoding="utf-8")
    return out


def write_merged(folder: Path, run: checkpoint.Run) -> None:
    """One plain model folder with all modules of `run` in its weights. Raises AdapterError, by name, on what cannot be written there with the same outputs."""
    patch.merge(run.model)
    for name, weight in run.model.named_parameters():
        if wrong := wrong_numbers(weight):
            raise AdapterError(f"{name}, with the module in it: {wrong}")
    weights.save_model(run.model, folder, run.tokenizer)


def _other_forms(modules: list[str]) -> str:
    """Which forms hold what a plain model folder cannot, in words."""
    merged = all(methods.method_class(name).mergeable for name in modules)
    alone = modules[0] if len(modules) == 1 and modules[0] in peft.NAMES else None
    forms = ["--as merged (in the weights)"] * merged + [f"--as peft (a module{peft.ASKED.get(alone, '')})"] * (alone is not None)
    return f"expected {' or '.join(forms)}" if forms else "no form of others does, the run folder alone (peftdebias.load reads it, and exports it as a .pt2 file)"


def _is_export(folder: Path) -> bool:
    """Whether it has a card of ours beside what it is about: many a model folder has a README.md."""
    with contextlib.suppress(OSError):
        return any((folder / name).exists() for name in (CONFIG, "config.json")) and WRITTEN in (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    return False
