"""What a library costs before it computes anything: milliseconds of its import, packages and MiB that it brings. For compare.py."""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import time

import numpy

from . import bars

REPEATS = 7


def start_up(hub: str | None = None) -> list[str]:
    """Lines with the milliseconds of `python -c "import ..."`: medians; the commands take turns, and what peftdebias adds is the median over the turns. hub: see lanes.case_of."""
    kinds = {"import torch": sys.executable, "import torch, peftdebias": sys.executable}
    if all(importlib.util.find_spec(n) for n in ("transformers", "peft")):
        kinds["import torch, transformers, peft"] = sys.executable
    if hub:
        kinds["import torch, transformers, adapters"] = hub
    spent: dict[str, list[float]] = {code: [] for code in kinds}
    for _ in range(REPEATS):
        for code, python in kinds.items():
            began = time.perf_counter()
            subprocess.run([python, "-c", code], check=True, capture_output=True)
            spent[code].append(1000 * (time.perf_counter() - began))
    added = [ours - torch for ours, torch in zip(spent["import torch, peftdebias"], spent["import torch"])]
    low, middle, high = (float(numpy.quantile(added, q)) for q in (0.2, 0.5, 0.8))
    return [*(f"`{code}`: {numpy.median(values):.0f} ms" for code, values in spent.items()),
            f"peftdebias adds {middle:.0f} ms ({low:.0f} to {high:.0f}) to torch{bars.verdict(middle, bars.IMPORT_MS, ' ms')}"]


COMMON = ("torch", "triton")


def sizes(hub: str | None = None) -> list[str]:
    """Lines with what each side brings, PyTorch among it, of those that are installed here, and of AdapterHub's environment."""
    sides = [("peftdebias", ("peftdebias",), sys.executable), ("transformers+peft", ("transformers", "peft", "torch"), sys.executable)]
    sides += [("transformers+adapters", ("transformers", "adapters", "torch"), hub)] if hub else []
    lines = []
    for side, roots, python in sides:
        # Asked in a fresh process: setuptools and torch's compiler put more on the path of this one.
        done = subprocess.run([python, "-c", "import json, sys; print(json.dumps(sys.path[1:]))"], check=True, capture_output=True, text=True)
        mib = installed(roots, json.loads(done.stdout))
        if set(roots) <= set(mib):
            rest = sum(size for name, size in mib.items() if name not in COMMON)
            lines.append(f"{side}: {len(mib)} packages, {sum(mib.values()):.0f} MiB, {rest:.0f} without {' and '.join(c for c in COMMON if c in mib)}")
    return lines


def installed(roots: tuple[str, ...], path: list[str]) -> dict[str, float]:
    """package -> MiB, of packages with all that they require. path: where packages lie."""
    found, waiting = {}, [*roots]
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        distribution = None if name in found else next(iter(importlib.metadata.distributions(name=name, path=path)), None)
        if distribution is None:
            continue
        found[name] = 0.0
        waiting += [re.match(r"[A-Za-z0-9._-]+", line)[0] for line in distribution.requires or [] if "extra ==" not in line]
        for file in distribution.files or ():
            with contextlib.suppress(OSError):
                found[name] += os.path.getsize(file.locate()) / 2 ** 20
    return found
