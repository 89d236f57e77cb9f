"""`peftdebias testbed`: plant a bias of known strength, measure it before and after each method, over several seeds.

    OUT/testbed.json    every figure with seeds, spread and intervals; settings, versions, seconds        OUT/table.md     the same as tables
    OUT/testbed.svg, .png   planted against measured, before and after each method (needs matplotlib)     OUT/units/...    what each unit left (units.py)

What it adds over units.py (one unit) and summary.py (what they say together): which units there are, in which order, several at a time, and going on where
it was stopped.
"""

import concurrent.futures
import concurrent.futures.process
import dataclasses
import json
import multiprocessing
import os
import threading
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from .. import checkpoint, methods
from ..config import Testbed
from ..errors import ConfigError, PeftDebiasError
from ..files import read_object
from ..options import expect
from ..outputs import alone, claiming, partial_of, vacant, write_text
from . import summary
from .units import NONE, RATES, Plan, Sizes, Unit

MARK = "testbed.json"


def units_of(settings: Testbed) -> list[Unit]:
    """Every unit once, seed after seed, each behind what it needs; where it stops, whole seeds are done. The classifiers' bases are those of the last text strength."""
    names = list(dict.fromkeys((NONE, *(settings.methods or (name for name in methods.METHODS if name in RATES)))))
    chosen, text, labels = (settings.numbers(f"{which}_strengths") for which in ("method", "text", "label"))
    units = []
    for seed in settings.numbers("seeds"):
        units += [Unit("text", strength, seed, method) for strength in text for method in (names if not chosen or strength in (*chosen, text[-1]) else [NONE])]
        units += [Unit("labels", strength, seed, method) for strength in labels for method in (names if not chosen or strength in chosen else [NONE])]
    return units


def testbed(settings: Testbed, say: Callable[[str], None] = lambda line: None) -> str:
    """Compute what is not there yet, write the folder, and return the table. Raises ConfigError where the folder is something else's or of other settings."""
    expect(Testbed, settings)
    for name in settings.methods:
        if name != NONE and methods.method_class(name) and name not in RATES:
            raise ConfigError(f"--methods {name}: expected a method with a learning rate in this world, some of {', '.join(name for name in methods.METHODS if name in RATES)}, got one without")
    out = Path(settings.out)
    sizes = Sizes.scaled(settings.scale)
    plan = Plan(out, settings.numbers("text_strengths")[-1], dataclasses.replace(sizes, upstream=settings.upstream_steps or sizes.upstream),
                settings.attribute_weight)
    if os.path.exists(out) and not ((out / MARK).exists() or vacant(out)):
        raise ConfigError(f"--out {out}: exists and is no earlier testbed; expected a new folder")
    units = units_of(settings)
    numbers = {name: settings.numbers(name) for name in ("text_strengths", "label_strengths", "method_strengths", "seeds")}
    about = {"settings": dataclasses.asdict(settings) | numbers, "versions": checkpoint.versions()}
    with claiming(out):
        if not (out / MARK).exists():
            write_text(out / MARK, json.dumps(about | {"rows": None}, indent=1) + "\n")
    with alone(out / MARK, f"--out {out}"):
        results = {unit: plan.result(unit) for unit in units}
        todo = [unit for unit in units if results[unit] is None]
        before = read_object(out / MARK, ConfigError).get("versions", about["versions"])  # of units that do not say themselves what they were made by
        if len(todo) < len(units):
            say(f"{out}: {len(units) - len(todo)} of {len(units)} units are there")

        def done(unit: Unit, found: dict) -> None:
            results[unit] = found
            say(f"{sum(r is not None for r in results.values())} of {len(units)}: {unit}, {found['seconds']:.1f} s")

        run_all(plan, todo, settings.jobs, done)
        rows = summary.rows(units, results)
        about["versions"] = checkpoint.all_versions(r.get("versions", before) for r in results.values())
        found = about | {"rows": rows, "monotone": summary.monotone(rows), "units": len(units)}
        found |= {key: round(sum(r[key] for r in results.values()), 1) for key in ("seconds", "cpu_seconds")}
        table = summary.markdown(found)
        write_text(out / "table.md", table)
        for note in _draw(found, out):
            say(note)
        write_text(out / MARK, json.dumps(found, indent=1) + "\n")  # last: what takes the place of a file that is locked is not
    return table


def run_all(plan: Plan, todo: list[Unit], jobs: int, done: Callable[[Unit, dict], None]) -> None:
    """Run the units of `todo`, up to `jobs` at a time, none before what it needs; `done` hears of each. One that fails lets those under way end, and raises.

    Raises PeftDebiasError where the system kills a process.
    """
    if jobs == 1:
        for unit in todo:
            done(unit, plan.run(unit))
        return
    waiting, running, others = list(todo), {}, set(multiprocessing.active_children())
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_alone) as pool:
        try:
            while waiting or running:
                unfinished = {*waiting, *running.values()}
                for unit in [u for u in waiting if not unfinished & set(plan.needs(u))][:jobs - len(running)]:
                    waiting.remove(unit)
                    running[pool.submit(plan.run, unit)] = unit
                for future in concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED).done:
                    unit = running.pop(future)
                    try:
                        done(unit, future.result())
                    except concurrent.futures.process.BrokenProcessPool:
                        raise PeftDebiasError(f"--jobs {jobs}: a process was killed (out of memory?) while {unit} ran; the same command goes on from there") from None
        except KeyboardInterrupt:  # stopped: what is under way is made again the next time
            for process in {*multiprocessing.active_children()} - others:
                process.terminate()
            raise


def _alone() -> None:
    """In a process of the pool: tqdm's lock is its own, no semaphore that stays behind where it is ended. It ends with the process that started it: a killed one
    (SIGKILL, out of memory) can tell it nothing, and its queue, which the processes of the pool hold open among them, never ends."""
    tqdm.set_lock(threading.RLock())
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _draw(found: dict, out: Path) -> list[str]:
    """testbed.svg and testbed.png; or one line on what is missing."""
    from ..report.planted import draw

    try:
        figure = draw(found)
    except ModuleNotFoundError as error:
        return [f"no drawing: it needs {error.name} (pip install 'peftdebias[report]')"]
    for kind in ("svg", "png"):
        place = out / f"testbed.{kind}"
        partial = partial_of(place)
        try:
            figure.savefig(partial, dpi=150, format=kind)
            partial.replace(place)
        finally:
            partial.unlink(missing_ok=True)
    return []
