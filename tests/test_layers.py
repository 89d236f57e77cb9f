"""Data flows one way: a module imports only from modules to its left in ORDER.

Read from the source with `ast`, so imports inside functions and under TYPE_CHECKING count as well as those at the top. A
new module fails here until it is given a place in ORDER: choosing the place is the point. What this cannot see is a name
put together at run time (`import_module("peftdebias." + name)`).
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = """
    errors outputs files native processor threads pages signals options config axes sentences lines records corpus pronouns cda cda_engine augment holdout tokens buckets splice cache stream worker batches kernels ops sites written encoder weights methods patch tasks questions metrics checkpoint foreign interchange lowered optimizer shapes step graphs training answers extrinsic intrinsic evaluation comparison padded embedding unlabelled labelled phases testbed demo doctor prepare recipe recipe_table runner report planted cli
""".split()
FRONT_DOOR = {"__init__", "__main__"}  # peftdebias/__init__.py and __main__.py may import any module


def sources() -> dict[str, Path]:
    """Dotted module name -> file, for the package and for kernels/fused, which is imported as peftdebias.kernels."""
    found = {}
    for top, folder in (("peftdebias", ROOT / "peftdebias"), ("peftdebias.kernels", ROOT / "kernels" / "fused")):
        for path in sorted(folder.rglob("*.py")):
            found[".".join([top, *path.relative_to(folder).with_suffix("").parts])] = path
    return found


def room(module: str) -> str:
    """`peftdebias.methods.lora` -> `methods`; the front door itself is ''."""
    return (module.split(".") + [""])[1]


def imports(module: str, source: str):
    """Yields (line, dotted name) for every import in `source`; `from a import b` yields a.b, relative names resolved."""
    package = module.split(".")[:-1]  # sources() keeps the `__init__` in a package's name, so this is right for it too
    for node in ast.walk(ast.parse(source, module)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__"):
                name = node.args[0].value
                dots = len(name) - len(name.lstrip("."))
                yield node.lineno, ".".join([*package[: len(package) - dots + 1], name.lstrip(".")]) if dots else name


def violations(module: str, source: str) -> list[str]:
    """One line for each import of `source`, living at `module`, that goes against ORDER."""
    here = room(module)
    if here in FRONT_DOOR:
        return []
    if here not in ORDER:
        return [f"{module}: `{here}` has no place in the order; give it one in tests/test_layers.py"]
    wrong = []
    for line, name in imports(module, source):
        there, where = room(name), f"{module}:{line}"
        if name.split(".")[0] != "peftdebias":
            if here == "kernels" and name.split(".")[0] not in {"torch", "triton", *sys.stdlib_module_names}:
                wrong.append(f"{where}: kernels import torch and triton only, got {name}")
        elif name == "peftdebias.__version__" or there == here:
            continue
        elif here == "kernels":
            wrong.append(f"{where}: kernels import nothing of ours, got {name}")
        elif there not in ORDER:
            wrong.append(f"{where}: import from a module in the order, got {name}")
        elif ORDER.index(there) > ORDER.index(here):
            wrong.append(f"{where}: `{here}` may not import `{there}`, which stands to its right ({name})")
    return wrong


def test_imports_go_one_way():
    found = sources()
    assert found, f"no source under {ROOT}"
    wrong = [line for module, path in found.items() for line in violations(module, path.read_text("utf-8"))]
    assert not wrong, "\n" + "\n".join(wrong)


def test_the_order_is_the_documented_one():
    documented = (ROOT / "docs" / "design.md").read_text("utf-8").split("```")[1].split()
    assert documented == ORDER


BAD = {
    "absolute": ("peftdebias.encoder", "from peftdebias.training import fit", "`encoder` may not import `training`"),
    "plain": ("peftdebias.encoder", "import peftdebias.training", "`encoder` may not import `training`"),
    "plain with alias": ("peftdebias.cda", "import os, peftdebias.tokens as t", "`cda` may not import `tokens`"),
    "from the package": ("peftdebias.config", "from peftdebias import errors, cda", "`config` may not import `cda`"),
    "relative": ("peftdebias.corpus", "from . import errors, cli", "`corpus` may not import `cli`"),
    "relative module": ("peftdebias.corpus", "from .cda import swap", "`corpus` may not import `cda`"),
    "from inside a package": ("peftdebias.methods.lora", "from ..training import fit", "`methods` may not import `training`"),
    "from a package's init": ("peftdebias.methods.__init__", "from ..patch import wrap", "`methods` may not import `patch`"),
    "into a package": ("peftdebias.methods.lora", "from peftdebias.metrics.tpr_gap import gap", "`methods` may not import `metrics`"),
    "lazy": ("peftdebias.encoder", "def f():\n    from .weights import load", "peftdebias.encoder:2: `encoder` may not import `weights`"),
    "for types": ("peftdebias.axes.__init__", "if TYPE_CHECKING:\n    from ..cda import Swap", "`axes` may not import `cda`"),
    "by name": ("peftdebias.tokens", "import importlib\nimportlib.import_module('peftdebias.cli')", "`tokens` may not import `cli`"),
    "by relative name": ("peftdebias.tokens", "from importlib import import_module\nimport_module('.cli', 'peftdebias')", "`tokens` may not import `cli`"),
    "kernels, ours": ("peftdebias.kernels.lora", "from peftdebias.errors import ModelError", "kernels import nothing of ours"),
    "kernels, ours, relative": ("peftdebias.kernels.lora", "from ..config import Config", "kernels import nothing of ours"),
    "kernels, others": ("peftdebias.kernels.lora", "import numpy", "torch and triton only"),
    "unknown target": ("peftdebias.cli", "from .helpers import x", "import from a module in the order"),
    "front door": ("peftdebias.training", "from peftdebias import Encoder", "import from a module in the order"),
    "front door whole": ("peftdebias.training", "import peftdebias", "import from a module in the order"),
    "unknown module": ("peftdebias.helpers", "", "`helpers` has no place in the order"),
    "unknown package": ("peftdebias.utils.io", "", "`utils` has no place in the order"),
}


@pytest.mark.parametrize(("module", "source", "words"), BAD.values(), ids=BAD)
def test_a_wrong_import_is_caught(module, source, words):
    wrong = violations(module, source)
    assert len(wrong) == 1 and words in wrong[0], wrong


GOOD = {
    "to the left": ("peftdebias.training", "from peftdebias.errors import DataError\nfrom . import config\nimport peftdebias.encoder"),
    "siblings": ("peftdebias.methods.lora", "from . import Method\nfrom .full import Full\nfrom peftdebias.methods import METHODS"),
    "a package's own": ("peftdebias.metrics.__init__", "from .tpr_gap import tpr_gap\nfrom . import crows_pairs"),
    "version": ("peftdebias.cli", "from . import __version__\nfrom peftdebias import __version__ as v"),
    "kernels": ("peftdebias.kernels.lora", "import math\nimport torch.nn.functional as F\nimport triton.language as tl\nfrom . import choose"),
    "not ours": ("peftdebias.errors", "import numpy\nfrom peftdebias_plugins import training\nimport_module('training')"),
    "front door": ("peftdebias.__init__", "from .cli import main\nfrom peftdebias import training"),
    "run as a module": ("peftdebias.__main__", "from peftdebias.cli import main"),
}


@pytest.mark.parametrize(("module", "source"), GOOD.values(), ids=GOOD)
def test_a_right_import_passes(module, source):
    assert violations(module, source) == []
