"""What the scripts on real data share: running the public commands, and reading what they wrote."""

import json
import shlex
import subprocess
import sys
from pathlib import Path


def peftdebias(words: str) -> None:
    """One command of the package, shown and run; a failing one ends the script with its exit code."""
    print(f"$ peftdebias {words}", flush=True)
    done = subprocess.run([sys.executable, "-m", "peftdebias", *shlex.split(words)], stdout=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(done.returncode)


def measures(path: Path) -> dict[str, float]:
    return {m["name"]: m["value"] for m in json.loads(path.read_text())["measures"]}


def final(run: Path) -> dict[str, float]:
    """The measures that a downstream run ended with, and its training time."""
    event = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return {m["name"]: m["value"] for m in event["measures"]} | {"seconds": event["seconds"]}
