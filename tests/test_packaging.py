"""The wheel: built from a copy of the tree, installed in a clean venv outside the checkout, and used from another folder.

The venv sees the dependencies that are already installed here (a .pth file), so nothing is fetched; it does not see the
checkout, nor an editable install of it, because .pth files are not followed from a .pth file.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def run(*command, cwd: Path) -> str:
    """Runs a command without the Python variables of this process; returns what it printed, fails with it otherwise."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, text=True, encoding="utf-8", capture_output=True)
    assert done.returncode == 0, f"{command} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def version() -> str:
    """`__version__` as peftdebias/__init__.py assigns it, read without importing."""
    for node in ast.parse((ROOT / "peftdebias" / "__init__.py").read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__version__":
            return ast.literal_eval(node.value)
    raise AssertionError("peftdebias/__init__.py assigns no __version__")


def normal(requirement: str) -> str:
    """`tomli_w==1.2.0; ...` -> `tomli-w`"""
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built in a copy: a build leaves files in the tree it runs in, and takes over stale ones that lie there."""
    tree, out = tmp_path_factory.mktemp("tree") / "src", tmp_path_factory.mktemp("dist")
    tree.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "peftdebias", "kernels", "recipes", "csrc"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, tree / name)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation", "-w", out, tree, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory) -> Path:
    """A folder outside the checkout whose venv/ holds the wheel; the dependencies are seen through a .pth file."""
    folder = tmp_path_factory.mktemp("elsewhere")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv/bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel, cwd=folder)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    seen = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    Path(site, "dependencies.pth").write_text("\n".join(seen) + "\n", "utf-8")
    return folder


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {"peftdebias/py.typed"}
    for folder, place in ((ROOT / "peftdebias", "peftdebias"), (ROOT / "kernels/fused", "peftdebias/kernels"), (ROOT / "recipes", "peftdebias/recipes")):
        wanted |= {f"{place}/{path.relative_to(folder).as_posix()}" for suffix in ("py", "toml", "jinja", "json") for path in folder.rglob(f"*.{suffix}")}
    missing = sorted(wanted - names)
    assert not missing, f"not in the wheel (is their package listed in pyproject.toml?): {missing}"
    assert any(re.fullmatch(r"peftdebias/axes/\w+\.toml", name) for name in names)
    strays = {name.split("/")[0] for name in names} - {"peftdebias", f"peftdebias-{version()}.dist-info"}
    assert not strays, f"top-level names in the wheel beside peftdebias: {strays}"
    assert wheel.name.startswith(f"peftdebias-{version()}-")
    assert f"peftdebias-{version()}.dist-info/licenses/LICENSE" in names


def test_the_source_archive_holds_the_whole_project(tmp_path):
    """What README's commands need, tests and benchmarks among it; nothing that git would not hold."""
    tree = tmp_path / "src"
    for folder in ("bench", "csrc", "docs", "kernels", "peftdebias", "recipes", "tests"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.so"))
    for file in (".gitignore", "CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "Makefile", "README.md", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / file, tree / file)
    before = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    name = run(sys.executable, "-c", f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))", cwd=tree).split()[-1]
    with tarfile.open(tmp_path / name) as archive:
        held = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert before - held == set(), "add it to MANIFEST.in"
    assert {path for path in held - before if "egg-info/" not in path} == {"PKG-INFO", "setup.cfg"}


def test_the_installed_wheel_works_elsewhere(clean):
    probe = """
import importlib.metadata, importlib.resources, importlib.util, json, sys
import peftdebias
loaded = set(sys.modules)
import peftdebias.kernels
for name in peftdebias.__all__:
    getattr(peftdebias, name)
print(json.dumps({
    "file": peftdebias.__file__,
    "kernels": peftdebias.kernels.__file__,
    "version": [peftdebias.__version__, importlib.metadata.version("peftdebias")],
    "heavy": sorted({"torch", "numpy", "triton", "transformers", "peft"} & loaded),
    "not needed, after touching every public name": sorted({"transformers", "peft", "triton", "torch._dynamo"} & set(sys.modules)),
    "top-level kernels": importlib.util.find_spec("kernels") is not None,
    "axes": sorted(entry.name for entry in importlib.resources.files("peftdebias.axes").iterdir() if entry.name.endswith(".toml")),
    "typed": importlib.resources.files("peftdebias").joinpath("py.typed").is_file(),
}))
"""
    got = json.loads(run(clean / "venv/bin/python", "-c", probe, cwd=clean))
    for name in ("file", "kernels"):
        assert Path(got[name]).is_relative_to(clean / "venv"), f"imported from {got[name]}, not from the wheel"
    assert got["version"] == [version()] * 2
    assert got["heavy"] == [], "import peftdebias must be light"
    assert got["not needed, after touching every public name"] == []
    assert not got["top-level kernels"]
    assert got["axes"] == sorted(path.name for path in (ROOT / "peftdebias/axes").glob("*.toml")) != []
    assert got["typed"]


def test_the_command_works_elsewhere(clean):
    said = run(clean / "venv/bin/peftdebias", "--help", cwd=clean)
    for verb in ("demo", "augment", "upstream", "downstream", "evaluate", "predict"):
        assert re.search(rf"\b{verb}\b", said), f"--help does not name {verb}:\n{said}"
    assert run(clean / "venv/bin/python", "-m", "peftdebias", "--help", cwd=clean)


def test_every_dependency_is_pinned():
    project = PROJECT["project"]
    asked = {normal(line) for group in (project["dependencies"], *project["optional-dependencies"].values()) for line in group}
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if line and not line.startswith("#")]
    loose = [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.+]+(; .+)?", line)]
    assert not loose, f"constraints.txt pins with name==version, got {loose}"
    unpinned = asked - {normal(line) for line in lines}
    assert not unpinned, f"no pin in constraints.txt for {sorted(unpinned)}"


def test_the_version_stands_in_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", version())
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "peftdebias.__version__"}
    assert re.search(rf"^version: {re.escape(version())}$", (ROOT / "CITATION.cff").read_text("utf-8"), re.M), "CITATION.cff has another version"
