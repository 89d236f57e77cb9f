"""Signals that stop a command: nothing half-written is left, no import broken off, none is lost; a program around it keeps its own."""

import importlib
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from peftdebias import cli as command_line
from peftdebias.signals import Stopped, stoppable

from .small import Said, cli, tree

GIVEN = {"SIGINT": signal.default_int_handler, "SIGTERM": signal.SIG_DFL, "SIGHUP": signal.SIG_DFL}
CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}


@pytest.fixture(params=GIVEN)
def name(request):
    """Of a signal; all are handled as in a fresh process: behind a shell's & or nohup some are ignored."""
    before = {each: signal.signal(getattr(signal, each), handler) for each, handler in GIVEN.items()}
    yield request.param
    assert {each: signal.getsignal(getattr(signal, each)) for each in GIVEN} == GIVEN
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL and signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    for each, handler in before.items():
        signal.signal(getattr(signal, each), handler)


@pytest.mark.parametrize("name", ["SIGTERM"], indirect=True)
def test_a_signal_leaves_nothing_half_written(name, small, tmp_path):
    """Of the other two handler, code and word are held below, and SIGINT's end at a process's."""
    out = tmp_path / "run"
    command = subprocess.Popen([sys.executable, "-m", "peftdebias", "upstream", *small.learning(steps=3000, valid_every=3000, out=out)], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    heard = iter(command.stderr.readline, "")
    assert any(line.startswith("trained: ") for line in heard) and list(tmp_path.iterdir())  # the folder that is not whole yet
    command.send_signal(getattr(signal, name))
    said = command.stderr.read()
    assert command.wait(60) == CODES[name] and said.splitlines()[-1] == "peftdebias: stopped; nothing of the training is kept" and tree(tmp_path) == {}


def test_a_signal_while_the_arguments_are_read_stops_too(name, monkeypatch):
    number = getattr(signal, name)

    def reading():
        assert signal.getsignal(number) != GIVEN[name]
        signal.raise_signal(number)

    monkeypatch.setattr(command_line, "parser", reading)
    assert cli("doctor") == Said(CODES[name], "", "peftdebias: stopped\n")


def test_in_a_thread_of_another_program_signals_are_left_alone(small, tmp_path):
    before, said = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(target=lambda: said.append(cli("methods", "--model", small.base)))
    thread.start()
    thread.join()
    assert said[0].code == 0 and cli("methods", "--model", small.base).code == 0 and signal.getsignal(signal.SIGTERM) is before


IN_AN_IMPORT = """
import os, signal, sys
from peftdebias.cli import main

class Striking:
    def find_spec(self, name, path=None, target=None):
        if name == "torch._dynamo.utils":  # which torch imports when an optimizer makes its first step
            print("struck", file=sys.stderr)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Striking())
code = main(sys.argv[1:])
print("torch._dynamo.utils" in sys.modules, file=sys.stderr)
sys.exit(code)
"""


def test_a_signal_while_torch_imports_more_of_itself_waits_for_it(small, tmp_path):
    out = tmp_path / "runs" / "run"
    ran = subprocess.run([sys.executable, "-c", IN_AN_IMPORT, "upstream", *small.learning(steps=3000, valid_every=3000, out=out)], capture_output=True, text=True,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert ran.returncode == 130 and ran.stderr.splitlines()[-3:] == ["struck", "peftdebias: stopped; nothing of the training is kept", "True"] and tree(tmp_path) == {}


def module(folder, monkeypatch, body: str) -> str:
    """The name of a new module that an import finds."""
    monkeypatch.syspath_prepend(folder)
    (folder / f"signalled_{folder.name}.py").write_text(f"import signal\nfrom peftdebias.signals import Stopped, stoppable\ndone = []\n{body}")
    return f"signalled_{folder.name}"


def test_a_signal_inside_of_an_import_is_answered_behind_it(name, tmp_path, monkeypatch):
    """The first of several."""
    numbers = [int(getattr(signal, each)) for each in (name, *GIVEN)]
    body = f"for number in {numbers}:\n    signal.raise_signal(number)\n    done.append(number)\n"
    with pytest.raises(Stopped) as stop, stoppable():
        done = importlib.import_module(module(tmp_path, monkeypatch, body)).done
        time.sleep(60)
    assert done == numbers and stop.value.number == getattr(signal, name)


def test_an_import_that_is_over_when_the_command_is_stops_nothing(name, tmp_path, monkeypatch):
    monkeypatch.setattr("peftdebias.signals.SOON", 60)  # however slow the machine is; the fixture looks for a timer that still runs
    with stoppable():
        importlib.import_module(module(tmp_path, monkeypatch, f"signal.raise_signal(signal.{name})"))
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0


def test_a_command_inside_of_an_import_is_stopped_at_once(name, tmp_path, monkeypatch):
    body = f"try:\n    with stoppable():\n        signal.raise_signal(signal.{name})\n        done.append('not stopped')\nexcept Stopped as stop:\n    done.append(stop.number)\n"
    assert importlib.import_module(module(tmp_path, monkeypatch, body)).done == [getattr(signal, name)]


def test_with_somebody_s_alarm_nothing_waits(name, tmp_path, monkeypatch):
    alarm = lambda *signalled: None  # noqa: E731
    before = signal.signal(signal.SIGALRM, alarm)
    try:
        with pytest.raises(Stopped), stoppable():
            importlib.import_module(module(tmp_path, monkeypatch, f"signal.raise_signal(signal.{name})"))
        assert signal.getsignal(signal.SIGALRM) is alarm
    finally:
        signal.signal(signal.SIGALRM, before)


class Dropping:
    """Whose end is signalled, or another error: both are raised where Python drops them."""

    def __init__(self, number: int | None):
        self.number = number

    def __del__(self):
        if self.number is None:
            raise ValueError("dropped")
        signal.raise_signal(self.number)
        [None for _ in range(3)]  # where the handler is run


def test_what_python_dropped_is_raised_again(name, monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: heard.append(type(what.exc_value)))
    hook = sys.unraisablehook
    with pytest.raises(Stopped) as stop, stoppable():
        Dropping(None)
        Dropping(getattr(signal, name))
        time.sleep(60)
    assert stop.value.number == getattr(signal, name) and sys.unraisablehook is hook and heard == [ValueError]


def test_what_c_makes_another_error_of_stops_all_the_same(name):
    class Storage:
        def __len__(self):
            return 1

        def __getitem__(self, index):
            signal.raise_signal(getattr(signal, name))
            return float(index)

    with pytest.raises(Stopped) as stop, stoppable():
        torch.asarray(Storage())  # as safetensors does with a file's
    assert stop.value.number == getattr(signal, name) and "could not determine the shape" in str(stop.value.__cause__)


def test_once_is_enough(name):
    tidied = []
    with pytest.raises(Stopped) as stop, stoppable():
        try:
            signal.raise_signal(getattr(signal, name))
        finally:
            for other in GIVEN:
                signal.raise_signal(getattr(signal, other))
            tidied.append(name)
    assert tidied == [name] and stop.value.number == getattr(signal, name)


def test_once_is_enough_where_one_waits_for_an_import(name, tmp_path, monkeypatch):
    monkeypatch.setattr("peftdebias.signals.SOON", 0.05)
    tidied = []
    with pytest.raises(Stopped) as stop, stoppable():
        try:
            importlib.import_module(module(tmp_path, monkeypatch, f"signal.raise_signal(signal.{name})"))
            for other in GIVEN:
                signal.raise_signal(getattr(signal, other))
        finally:
            time.sleep(0.1)
            tidied.append(name)
    assert tidied == [name] and stop.value.number == getattr(signal, name) and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_of_two_at_once_one_stops_and_nothing_is_said_of_the_other(name, monkeypatch):
    both, heard = {getattr(signal, name), signal.SIGHUP, signal.SIGTERM}, []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: heard.append(what.exc_value))
    with pytest.raises(Stopped) as stop, stoppable():
        signal.pthread_sigmask(signal.SIG_BLOCK, both)
        for number in both:
            signal.raise_signal(number)
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
        finally:
            [None for _ in range(3)]  # where the other handler is run
    assert stop.value.number == min(both) and heard == []


def test_what_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable():
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
