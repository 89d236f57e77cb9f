"""What every test file may use: the fixtures `shared`, `small` (a small model and its files), `place` (a recipe over them) and `little_memory`, the marks `slow` and
`gpu` (described in pyproject.toml), and no network."""

import fnmatch
import os
from pathlib import Path

import pytest

# Set before anything imports transformers or tokenizers: tests never ask a hub, and a forked tokenizer does not warn.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Toy-sized tensors: threads cost more than they bring, much more on a machine that others use too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from .outside import little_memory  # noqa: E402, F401
from .small import small  # noqa: E402, F401
from .small_recipe import place  # noqa: E402, F401

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models: ../shared beside the checkout, or $PEFTDEBIAS_SHARED. Without it the test is skipped."""
    folder = Path(os.environ.get("PEFTDEBIAS_SHARED") or ROOT.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"needs the real data and models in {folder} (PEFTDEBIAS_SHARED names another folder)")
    return folder


@pytest.fixture(scope="session", autouse=True)
def tidy(request):
    """Whatever a test writes lies in its own tmp_path: a folder that is new in the checkout, and that git does not ignore, is an error of the last test."""
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()] if (ROOT / ".gitignore").exists() else []
    ignored += [".*", "__pycache__", os.path.basename(request.config.getoption("basetemp") or "")]

    def folders():
        return {entry.name for entry in os.scandir(ROOT) if entry.is_dir() and not any(fnmatch.fnmatch(entry.name, pattern) for pattern in ignored)}

    before = folders()
    yield
    left = folders() - before
    assert not left, f"the tests left {', '.join(sorted(left))} in {ROOT}"


def pytest_collection_modifyitems(items):
    """Skips tests marked `gpu` where torch sees no CUDA device. The kernels' checks, the longest of all, come first: processes that run side by side then end together."""
    items.sort(key=lambda item: item.path.name != "test_kernels.py")
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
