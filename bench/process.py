"""A provider in a process of its own, spoken to by lines: `Process` is this end, `serve` the other. What it leaves out: what is asked and answered."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable


class Ended(RuntimeError):
    """A provider's process, by itself or by a signal."""


class Process:
    """Started and ready: `about` is what it said first. Raises Ended when it ends."""

    def __init__(self, name: str, command: list[str]):
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._read()

    def ask(self, line: str):
        with contextlib.suppress(BrokenPipeError):  # it has ended: nothing is read either
            print(line, file=self.process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _read(self):
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise Ended(f"{self.name}: its process {f'was killed by signal {-code} (out of memory?)' if code < 0 else f'ended with code {code}'}")
        return json.loads(line)


def serve(start: Callable[[], tuple[object, Callable[[str], object]]]) -> None:
    """start() -> (what to say first, line -> answer); answers every line of standard input with one of JSON. What libraries print goes to standard error: it is no answer."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    about, answer = start()
    print(json.dumps(about), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(line.strip())), file=out, flush=True)
