"""What every test file may use: the fixture `shared`, the marks `slow` and `gpu` (described in pyproject.toml), and no network."""

import os
from pathlib import Path

import pytest

# Set before anything imports transformers or tokenizers: tests never ask a hub, and a forked tokenizer does not warn.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Toy-sized tensors: threads cost more than they bring, much more on a machine that others use too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models: ../shared beside the checkout, or $PEFTDEBIAS_SHARED. Without it the test is skipped."""
    folder = Path(os.environ.get("PEFTDEBIAS_SHARED") or ROOT.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"needs the real data and models in {folder} (PEFTDEBIAS_SHARED names another folder)")
    return folder


def pytest_collection_modifyitems(items):
    """Skips tests marked `gpu` where torch sees no CUDA device. Who waits for the kernels' checks comes last: till then they run beside the others."""
    items.sort(key=lambda item: item.path.name == "test_kernels.py")
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


CHECKS = pytest.StashKey()


def pytest_collection_finish(session):
    """Begins the kernels' checks, where some were chosen."""
    items = [item for item in session.items if item.path.name == "test_kernels.py" and item.originalname == "test_equal_to_the_twin"]
    items = [item for item in items if not any(mark.args[0] for mark in item.iter_markers("skipif"))]
    if items and not session.config.option.collectonly:
        session.config.stash[CHECKS] = items[0].module.Checks([(item.callspec.params["path"], item.callspec.params["mark"]) for item in items])


def pytest_sessionfinish(session):
    if CHECKS in session.config.stash:
        session.config.stash[CHECKS].end()


@pytest.fixture(scope="session")
def checks(request):
    """test_kernels.Checks, begun."""
    return request.config.stash[CHECKS]
