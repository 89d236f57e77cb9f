"""The command line: one sub-command a verb, each a dataclass of config.py and a function that takes it.

Errors that a user can mend, and files that the system refuses, leave one line and exit code 2; anything else is a bug and keeps its traceback. Results
go to standard output (utf-8) or to files, everything else for people to standard error.
"""

import argparse
import contextlib
import dataclasses
import importlib
import io
import os
import sys
import warnings
from collections.abc import Callable

from . import __version__, config, options
from .errors import ConfigError, PeftDebiasError
from .outputs import FULL, STANDARD_OUTPUT
from .signals import Stopped, stoppable
from .pages import keep_pages
from .threads import sleep_soon

EXAMPLES = {
    "demo": "peftdebias demo --out runs/demo",
    "testbed": "peftdebias testbed --text-strengths 0.8 --label-strengths 0 0.5 1 --methods lora adapter --seeds 0 1 2 --out runs/testbed",
    "augment": "peftdebias augment --axis gender corpus.txt --out counterfactuals.jsonl",
    "export": "peftdebias export runs/gender --as peft --out for-peft",
    "import": "peftdebias import their-adapter --model bert-base-uncased --axis gender --out runs/theirs",
    "upstream": "peftdebias upstream --model bert-base-uncased --axis gender --method lora --corpus corpus.txt --budget 0.01 --out runs/gender",
    "downstream": "peftdebias downstream --model bert-base-uncased --adapter runs/gender --train train.csv --dev dev.csv --test test.csv \\\n"
                  "    --text hard_text --label profession --group gender --out runs/bios",
    "evaluate": "peftdebias evaluate bert-base-uncased --adapter runs/gender --on crows-pairs=crows_pairs_anonymized.csv --on perplexity=heldout.txt",
    "compare": "peftdebias compare base.jsonl debiased.jsonl\n  peftdebias compare --seeds base-0.json base-1.json --against debiased-0.json debiased-1.json",
    "run": "peftdebias run ghc --model bert-base-uncased --data data --out runs/ghc --scale 0.1",
    "report": "peftdebias report runs/gender runs/plain runs/bios --out report.html",
    "predict": "peftdebias predict runs/bios texts.csv --text hard_text --out labels.jsonl",
    "methods": "peftdebias methods --model bert-base-uncased --budget 0.01",
    "doctor": "peftdebias doctor",
}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, as all of ours are; flags are written out, so that a new one breaks nobody's script."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:  # said by the command that does not know them, whose help lists those it knows
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def print_help(self, file=None):  # argparse's drops what it cannot write, and says nothing
        (file or sys.stdout or sys.stderr).write(self.format_help())

    def exit(self, status: int = 0, message: str | None = None):
        if status == 0 and sys.stdout is not None:
            sys.stdout.flush()
        super().exit(status, message)

    def error(self, message: str):
        self.exit(2, f"peftdebias: {message} (see `{self.prog} --help`)\n")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 on bad input, 130, 143 or 129 where a signal stopped it (SIGINT, SIGTERM, SIGHUP), which leaves nothing half-written, 141 where nobody read on."""
    settings = None
    try:
        with stoppable(), warnings.catch_warnings():
            if isinstance(getattr(sys.stdout, "buffer", None), io.RawIOBase):  # PYTHONUNBUFFERED: a write there may take a part and drop the rest
                sys.stdout = open(sys.stdout.fileno(), "w", buffering=1, encoding="utf-8", closefd=False)
            arguments = vars(parser().parse_args(argv))
            command, settings, module = COMMANDS[arguments.pop("command")]
            sleep_soon()
            if module == SCORING:
                keep_pages()
            closed = sys.stdout is None
            sys.stdout, sys.stderr = (stream or open(os.devnull, "w", encoding="utf-8") for stream in (sys.stdout, sys.stderr))  # None where the caller closed it
            if hasattr(sys.stdout, "reconfigure"):
                sys.stdout.reconfigure(encoding="utf-8")
            warnings.showwarning = lambda message, *where: say(f"warning: {message}")
            given = options.resolve(settings, arguments)
            if closed and (refused := _nowhere(given)):
                raise ConfigError(refused)
            importlib.import_module(f".{module}", __package__)
            command(given)
        sys.stdout.flush()
        return 0
    except PeftDebiasError as error:
        return _ended(" ".join(str(error).splitlines()))
    except LookupError as error:
        from .kernels import NoKernel, setting

        if not isinstance(error, NoKernel):
            raise
        return _ended(f"PEFTDEBIAS_KERNELS={setting()}: {error}")
    except BrokenPipeError:  # the reader of our output went away, `| head` say
        return 141
    except OSError as error:
        if error.filename is None and error.errno not in FULL:
            raise
        return _ended(f"{'the results cannot be written' if error.filename is None else error.filename}: {error.strerror}")
    except KeyboardInterrupt as stop:
        _ended("stopped" + ("; nothing of the training is kept" if settings in (config.Upstream, config.Downstream) else ""))
        return 128 + stop.number if isinstance(stop, Stopped) else 130
    except (MemoryError, RuntimeError) as error:
        why = _no_memory(error)
        if why is None:
            raise
        return _ended(f"out of memory: {why}{_less(settings)}")
    finally:
        for stream in (sys.stdout, sys.stderr):
            _let_go(stream)


def _nowhere(settings) -> str:
    """What is wrong with a standard output that the caller closed, where the result, or what else is asked for there, has no other place; empty where all has one."""
    flag = next((name for name in ("out", "json") if hasattr(settings, name)), None)
    if flag is not None and getattr(settings, flag) not in (None, "-"):
        flag = next((name for name in ("examples", "stats") if getattr(settings, name, None) == "-"), None)
        if flag is None:
            return ""
    return "standard output: expected it open, for the result, got it closed" + (f"; name a file with --{flag}" if flag else "")


def _ended(why: str) -> int:
    """Says it, where somebody can hear; the exit code of what can be mended."""
    with contextlib.suppress(OSError):  # the terminal may be gone, the disk of its log full
        print(f"peftdebias: {why}", file=sys.stderr, flush=True)
    return 2


def _let_go(stream) -> None:
    """What a standard stream holds and has no place for goes nowhere: at its end Python would try once more, complain, and change the exit code."""
    try:
        if stream is not None:
            stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _no_memory(error: Exception) -> str | None:
    """What an error says of memory that is not there, in one line: Python's, or torch's on a GPU or a CPU. None where it is another error."""
    said = (str(error).strip().splitlines() or ["the machine has none left"])[0]
    if isinstance(error, MemoryError):
        return said
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return ". ".join(said.split(". ")[1:3]).rstrip(".") or said  # how much was asked for, how much the device has
    if "could not create a primitive" in said:  # oneDNN, where its code finds no room
        return said
    return said[said.index("DefaultCPUAllocator"):] if "DefaultCPUAllocator" in said else None


def _less(settings: type | None) -> str:
    """Which of the command's options lower what it needs. None: it is not known yet."""
    names = {field.name for field in dataclasses.fields(settings)} if settings else set()
    there = [flag for name, flag in (("batch_size", "--batch-size"), ("batch_tokens", "--batch-tokens"), ("max_length", "--max-length")) if name in names]
    less = f"; less in {' or '.join(there)} takes less" if there else ""
    return f"{less}, and so does --save-memory" if "save_memory" in names else less


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="peftdebias", description="Debias BERT and RoBERTa with small modules: learn them upstream on counterfactual "
                                  "text, freeze them downstream. `peftdebias COMMAND --help` explains each command.")
    top.add_argument("--version", action="version", version=f"peftdebias {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, settings, _) in COMMANDS.items():
        epilog = f"example:\n  {EXAMPLES[name]}"
        if name == "evaluate":
            epilog = "names for --on:\n" + "".join(f"  {key:<16}{text}\n" for key, text in config.MEASURES.items()) + "\n" + epilog
        one = commands.add_parser(name, help=settings.__doc__.split(":")[0].split(".")[0], description=settings.__doc__, epilog=epilog,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
        options.add_flags(one, settings, config.Training)
    return top


# ---------------------------------------------------------------- commands

def upstream(settings: config.Upstream) -> None:
    from . import phases

    show(settings)
    result = phases.upstream(settings, say)
    outcome = result.outcome
    print(f"validation loss {outcome.before['loss']:.4f} -> {outcome.best['loss']:.4f} nats a masked token at step {outcome.best_step}; "
          f"{outcome.seconds:.0f} s, {outcome.tokens_per_second:,.0f} tokens/s, {100 * outcome.waiting:.1f} % of the steps' time waiting for batches")
    if outcome.best["loss"] > outcome.before["loss"]:
        print(f"no step had a lower validation loss than before training: what is saved is that of step {outcome.best_step}; more --steps or another --lr may help")
    print(f"result: {result.out}")


def downstream(settings: config.Downstream) -> None:
    from . import phases

    show(settings)
    result = phases.downstream(settings, say)
    outcome = result.outcome
    print(f"best {settings.metric} on dev {outcome.best[settings.metric]:.2f} % at step {outcome.best_step}; {outcome.seconds:.0f} s, "
          f"{outcome.tokens_per_second:,.0f} tokens/s")
    print(f"on {settings.test or settings.dev}, from the saved files:")
    print(table(result.measures))
    print(f"result: {result.out}")


def evaluate(settings: config.Evaluate) -> None:
    from . import evaluation

    show(settings)
    for line in evaluation.unused(settings):
        say(line)
    result = evaluation.evaluate(settings)
    for line in result.notes:
        say(line)
    places = [p for p in (settings.json, settings.examples) if p]
    tell = _beside(places)
    tell(table(result.measures))
    tell(f"result: {' and '.join(map(called, places)) if places else 'above (--json FILE keeps it)'}")


def compare(settings: config.Compare) -> None:
    from . import comparison

    show(settings)
    found = comparison.compare(settings)
    for line in found.notes:
        say(line)
    tell = _beside([settings.json])
    if found.differences:
        tell(differences(found.differences))
    if found.spreads and not found.differences:
        tell(spreads(found.spreads))
    tell(f"result: {called(settings.json) if settings.json else 'above (--json FILE keeps it)'}")


def run(settings: config.Run) -> None:
    from .runner import run as do

    show(settings)
    done = do(settings, say)
    print(done.markdown)
    print(f"result: {done.out}")


def report(settings: config.Report) -> None:
    from .report import report as run

    show(settings)
    print(f"result: {' and '.join(map(str, run(settings)))}")


def predict(settings: config.Predict) -> None:
    from . import evaluation

    show(settings)
    if settings.file is None:
        wait_for_input()
    for line in evaluation.predict(settings):
        say(line)
    say(f"result: {called(settings.out)}")


def augment(settings: config.Augment) -> None:
    from .augment import augment as run

    show(settings)
    if not settings.files:
        wait_for_input()
    for line in run(settings).report():
        say(line)
    say(f"result: {called(settings.out)}")


def methods(settings: config.Methods) -> None:
    from . import weights
    from .checkpoint import base_of
    from .methods import overview

    show(settings)
    base, _ = weights.read_config(weights.find_folder(base_of(settings.model)))
    rows = overview(base, settings.budget, settings.max_length)
    print(columns([("method", "size", "parameters", "share", "file, KiB", "mergeable", "foldable"), *rows]))
    print("result: above")


def doctor(settings: config.Doctor) -> None:
    from .doctor import examine

    show(settings)
    found = examine(settings.device)
    print("\n".join(found.facts))
    print(columns([("op", "implementation", "why"), *found.ops], left=True))
    print("result: above")


def export(settings: config.Export) -> None:
    from .interchange import export_adapter

    show(settings)
    out = export_adapter(settings.run, settings.as_, settings.out, settings.overwrite)
    print(f"result: {out}")


def import_(settings: config.Import) -> None:
    from .interchange import import_adapter

    show(settings)
    out = import_adapter(settings.folder, settings.model, settings.axis, settings.out, settings.overwrite)
    if (out / "model").is_dir():
        print(f"the head beside the module came along: {settings.model} with it is {out / 'model'}")
    print(f"result: {out}")


def demo(settings: config.Demo) -> None:
    from .demo import RUNS, demo as run
    from .report import available, report as write_report

    show(settings)
    print(run(settings, say))
    runs = [os.path.join(settings.out, name) for name in RUNS]
    if available():
        html, _ = write_report(config.Report(paths=tuple(runs), out=os.path.join(settings.out, "report.html")))
        print(f"report: {html}")
    else:
        print(f"report: pip install 'peftdebias[report]', then peftdebias report {' '.join(runs)}")
    print(f"result: {settings.out}")


def testbed(settings: config.Testbed) -> None:
    from .planted import testbed as run

    show(settings)
    print(run(settings, say))
    print(f"result: {settings.out}")


COMMANDS = {
    "demo": (demo, config.Demo, "demo"),
    "testbed": (testbed, config.Testbed, "planted"),
    "augment": (augment, config.Augment, "augment"),
    "export": (export, config.Export, "interchange"),
    "import": (import_, config.Import, "interchange"),
    "upstream": (upstream, config.Upstream, "phases"),
    "downstream": (downstream, config.Downstream, "phases"),
    "evaluate": (evaluate, config.Evaluate, "evaluation"),
    "compare": (compare, config.Compare, "comparison"),
    "run": (run, config.Run, "runner"),
    "report": (report, config.Report, "report"),
    "predict": (predict, config.Predict, "evaluation"),
    "methods": (methods, config.Methods, "weights"),
    "doctor": (doctor, config.Doctor, "doctor"),
}
"""verb -> (function, its settings, the module that does the work)."""
SCORING = "evaluation"
"""The module of those that score and train nothing."""


# ---------------------------------------------------------------- what people see

def show(settings) -> None:
    """What was resolved, on standard error."""
    values = " ".join(f"{key}={value}" for key, value in options.as_plain(settings).items() if value not in ([], {}))
    say(f"{type(settings).__name__.lower()}: {values}")


def called(path: str | None) -> str:
    """A place of results, as people are told of it."""
    return "standard output" if path in (None, "-") else path


def _beside(places: list[str | None]) -> Callable[[str], None]:
    """How a table is told: on standard output, or where that is one of the places of the files, for people alone."""
    return say if any(place in STANDARD_OUTPUT for place in places) else print


def say(line: str) -> None:
    """A line for people; work does not end where nobody can read it."""
    try:
        print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        pass


def wait_for_input() -> None:
    """Tell whoever sits at a terminal that it is their turn. Raises ConfigError where standard input is closed."""
    if sys.stdin is None:
        raise ConfigError("standard input: expected texts, got none: it is closed; name a FILE")
    if sys.stdin.isatty():
        say("reading standard input, one text a line; Ctrl-D ends it")


def table(measures) -> str:
    """Measures in columns: name, value, 95 % interval, ideal, how many examples."""
    rows = [("measure", "value", "95 % interval", "ideal", "n")]
    rows += [(m.name, f"{number(m.value)} {m.unit if m.unit != '1' else ''}".rstrip(), between(m.low, m.high), number(m.ideal), str(m.n)) for m in measures]
    return columns(rows)


def differences(found) -> str:
    """Differences of two systems in columns, each with its interval."""
    rows = [("measure", "first", "second", "difference", "95 % interval", "p", "test", "n")]
    rows += [(d.name, number(d.first), number(d.second), f"{d.value:+.4g} {d.unit if d.unit != '1' else ''}".rstrip(), between(d.low, d.high),
              f"{d.p:.3f}" if d.p >= 0.001 else "< 0.001", d.test, str(d.n)) for d in found]
    return columns(rows)


def spreads(found) -> str:
    """Means over seeds in columns, with the standard deviation of single seeds and the interval of the mean."""
    rows = [("measure", "mean", "sd over seeds", "95 % interval", "ideal", "seeds")]
    rows += [(s.name, f"{number(s.mean)} {s.unit if s.unit != '1' else ''}".rstrip(), number(s.sd), between(s.low, s.high), number(s.ideal), str(s.n))
             for s in found]
    return columns(rows)


def between(low, high) -> str:
    return "-" if number(low) == number(high) == "-" else f"{number(low)} to {number(high)}"


def number(value) -> str:
    return "-" if value is None or value != value else f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def columns(rows: list[tuple[str, ...]], left: bool = False) -> str:
    """Rows of cells under each other: the first column to the left, the others to the right, or with `left` (words) to the left too."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(w) if i == 0 or left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip() for row in rows)
