"""Jobs in processes of their own, several at a time: what has to be done before anything is timed, and what one job breaks (a device's context, an interpreter) is its own.

What it adds over process.py, whose processes live on and are spoken to by lines of JSON: one call, one answer, gone. It leaves out what the jobs are.

Not by multiprocessing: there a function's module has a second name, `__mp_main__`, which gets into the keys of torch.compile's cache, and nobody else finds what such a
process left in it.
"""

import importlib
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def together(calls: Sequence[tuple[str, tuple, float]], workers: int, most: float) -> list:
    """What each ("module:function", arguments, seconds) returns, in their order, at most `workers` at a time; arguments and answers go through pickle. None for a call that
    had not begun after its seconds. One that has begun is waited for, until `most` seconds have passed. A RuntimeError for one whose process ended without an answer, or did
    not end."""
    started = time.monotonic()

    def one(call: tuple[str, tuple, float]):
        job, arguments, seconds = call
        spent = time.monotonic() - started
        return _alone((job, arguments), max(1, (os.cpu_count() or 1) // workers), most - spent) if spent < min(seconds, most) else None

    with ThreadPoolExecutor(workers) as threads:
        return list(threads.map(one, calls))


def _alone(call: tuple[str, tuple], compilers: int, seconds: float):
    """compilers: processes that torch.compile may start for it."""
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": str(compilers)}
    try:
        done = subprocess.run([sys.executable, __file__], input=pickle.dumps(call), stdout=subprocess.PIPE, env=environment, timeout=seconds)
        return pickle.loads(done.stdout) if done.returncode == 0 else RuntimeError(f"its process ended with code {done.returncode}")
    except subprocess.TimeoutExpired:
        return RuntimeError(f"its process did not end in the {seconds:.0f} s that it had")
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        return RuntimeError(f"its process gave no answer: {error}")


def main() -> None:
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import torch  # noqa: F401  first, as in the scripts: the order of imports is in those keys as well

    job, arguments = pickle.load(sys.stdin.buffer)
    module, _, name = job.partition(":")
    out.write(pickle.dumps(getattr(importlib.import_module(module), name)(*arguments)))
    out.close()


if __name__ == "__main__":
    main()
