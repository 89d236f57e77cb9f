"""A provider in a process of its own, with the interpreter that it asks for: what compare.py talks to.

What it adds over measure.py: the process and what it answers. As a script it is the other end, and imports no more of this checkout than AdapterHub's environment can.

    SPEC = {"case": ..., "provider": ..., "hub": interpreter or null, "setting": fields of Setting}
    lanes.py SPEC serve          a line about the work, then one for every line of standard input: pass -> seconds, saved -> MiB, file -> KiB or null
    lanes.py SPEC peak           MiB above the loaded weights, as measure.cpu_peak has it
    lanes.py SPEC results FILE   the tensors that must be equal, into a safetensors file
"""

import dataclasses
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from bench import equality, measure, rows  # noqa: E402
from bench.arguments import say  # noqa: E402
from bench.case import Case, Provider, Setting, Work  # noqa: E402
from bench.cases_hub import through_library  # noqa: E402
from bench.cases_sparse import SPARSE_CASES  # noqa: E402
from bench.cases_steps import STEP_CASES, model_folder  # noqa: E402
from bench.process import Process, serve  # noqa: E402

COMPARED = STEP_CASES | SPARSE_CASES
"""name -> Case, of whole steps."""
LIBRARIES = ("transformers", "peft", "adapters")


def case_of(name: str, hub: str | None) -> Case:
    """hub: the interpreter of AdapterHub's environment, if there is one."""
    return through_library(COMPARED[name], hub) if hub else COMPARED[name]


# ---------------------------------------------------------------- this end

def command(case: Case, provider: str, setting: Setting, *what: str) -> list[str]:
    python = case.providers[provider].python
    fields = dataclasses.asdict(setting) | {"folder": str(setting.folder), "device": str(setting.device)}
    return [python or sys.executable, __file__, json.dumps({"case": case.name, "provider": provider, "hub": python, "setting": fields}), *what]


def lane(case: Case, provider: str, setting: Setting) -> Process:
    """A provider's process, ready: one pass is done. about: steps, tokens, extra, versions. Raises RuntimeError when it ends."""
    return Process(provider, command(case, provider, setting, "serve"))


def peak_mib(case: Case, provider: str, setting: Setting) -> float | None:
    """None where Linux does not say it, and, with a line, where the process ended (out of memory?)."""
    done = subprocess.run(command(case, provider, setting, "peak"), capture_output=True, text=True)
    if done.returncode:
        say(f"{case.name}: {provider}: peak memory is not measured: its process ended with {done.returncode}")
        return None
    return json.loads(done.stdout.splitlines()[-1])


def results(name: str, provider: Provider, setting: Setting, case: Case) -> dict[str, Tensor]:
    """What must be equal, from the interpreter that the provider asks for. Raises RuntimeError with the last line of its process where that fails."""
    if provider.python is None:
        return equality.in_this_process(name, provider, setting)
    model_folder(setting)  # the weights are made on this side
    with tempfile.TemporaryDirectory(prefix="peftdebias-bench-") as folder:
        file = Path(folder) / "results.safetensors"
        done = subprocess.run(command(case, name, setting, "results", str(file)), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name}: {(done.stderr.strip().splitlines() or ['its process said nothing'])[-1]}")
        return safetensors.torch.load_file(file)


# ---------------------------------------------------------------- the other end

def main(argv: list[str]) -> int:
    spec, what = json.loads(argv[0]), argv[1]
    setting = Setting(**spec["setting"] | {"folder": Path(spec["setting"]["folder"]), "device": torch.device(spec["setting"]["device"])})
    provider = case_of(spec["case"], spec["hub"]).providers[spec["provider"]]
    if what == "peak":
        print(json.dumps(measure.cpu_peak(provider, setting)))
    elif what == "results":
        found = equality.in_this_process(spec["provider"], provider, setting)
        safetensors.torch.save_file({name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}, argv[2])
    else:
        serve(lambda: _start(provider, setting))
    return 0


def _start(provider: Provider, setting: Setting) -> tuple[dict, Callable[[str], object]]:
    work = provider.build(setting)
    work.run()
    about = {"steps": work.steps, "tokens": work.tokens, "extra": work.extra, "torch": torch.__version__, "triton": rows.version("triton"),
             "versions": {name: version for name in LIBRARIES if (version := rows.version(name))}}
    answers = {"pass": lambda: measure.seconds(work, 1, setting.device), "saved": lambda: saved_mib(work), "file": lambda: file_kib(work)}
    return about, lambda line: answers[line]()


def file_kib(work: Work) -> float | None:
    """KiB of what is kept of the trained module, tensors and configuration without a README; None where there is none."""
    if work.save is None:
        return None
    with tempfile.TemporaryDirectory(prefix="peftdebias-bench-") as folder:
        work.save(Path(folder) / "adapter")
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file() and file.suffix != ".md") / 1024


def saved_mib(work: Work) -> float:
    """MiB of the tensors that autograd keeps during one pass, each storage once, those of parameters apart; the most in any step."""
    steps: list[dict] = [{}]

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            steps[-1][tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    original = torch.Tensor.backward
    parameters = {p.untyped_storage().data_ptr() for p in gc.get_objects() if type(p) is torch.nn.Parameter}

    def backward(self, *arguments, **settings):
        original(self, *arguments, **settings)
        steps.append({})

    torch.Tensor.backward = backward
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            work.run()
    finally:
        torch.Tensor.backward = original
    return max(sum(size for place, size in step.items() if place not in parameters) for step in steps) / 2 ** 20


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
