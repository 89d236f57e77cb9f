"""Benchmarks of this checkout; no part of the installed package.

Importing `bench` makes the `peftdebias` of this checkout importable, installed or not: a GPU machine may have torch and transformers, but no network and no
setuptools. Packaging maps `peftdebias.kernels` to kernels/fused (pyproject.toml); where nothing is installed, or another checkout is, the same is done here.
"""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is made here; no provider asks a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def use_checkout() -> None:
    """Put this checkout first on the path, and its kernels/fused under the name peftdebias.kernels unless an editable install of it does that already."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    folder, found = ROOT / "kernels" / "fused", importlib.util.find_spec("peftdebias.kernels")
    if found is None or Path(found.origin).resolve().parent != folder:
        import peftdebias

        spec = importlib.util.spec_from_file_location("peftdebias.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)])
        module = sys.modules["peftdebias.kernels"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        peftdebias.kernels = module


use_checkout()
