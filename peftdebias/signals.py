"""Signals that stop a command: Ctrl-C, kill, a scheduler, a container that ends, a terminal that is gone.

What it leaves out: what is tidied then; that is the business of whoever writes.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
SOON = 0.02  # seconds


class Stopped(KeyboardInterrupt):
    """By a signal. number: which."""

    def __init__(self, number: int):
        self.number = number


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Inside the `with` block signals that stop raise Stopped, the first of them, where they would have raised KeyboardInterrupt or ended the process; ignored ones (nohup)
    stay so, and in another thread than the first nothing changes.

    Not inside of an import, but soon behind it: C that imports numpy, torch or triton loses what is raised there, is left half made by it, or ends the process.
    What is raised where Python has to drop it, in a __del__, is raised again, and where C makes another error of it (torch.asarray in safetensors), it is Stopped
    that leaves the block.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if _imports(frame) > outside and can_wait:
            soon()
            return
        for each in (*given, signal.SIGALRM) if can_wait else given:
            signal.signal(each, _unheard)  # once is enough: the next would break off the tidying
        raised.append(came[0])
        raise Stopped(came[0])

    def soon() -> None:
        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, SOON)

    def dropped(what) -> None:
        if isinstance(what.exc_value, Stopped) and can_wait:
            soon()
        else:
            unraisable(what)

    came: list[int] = []  # of which the first counts
    raised: list[int] = []
    given = {number: handler for number in STOPPING if (handler := signal.getsignal(number)) in (signal.SIG_DFL, signal.default_int_handler)}
    can_wait = hasattr(signal, "setitimer") and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL  # nobody else's alarm
    outside, unraisable = _imports(sys._getframe()), sys.unraisablehook
    sys.unraisablehook = dropped
    for number in given:
        signal.signal(number, stop)
    try:
        yield
    except Exception as error:
        if raised:
            raise Stopped(raised[0]) from error
        raise
    finally:
        if can_wait:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
        for number, handler in given.items():
            signal.signal(number, handler)
        sys.unraisablehook = unraisable


def _unheard(number: int, frame: FrameType | None) -> None:
    """Not SIG_IGN, which programs that are started would keep, and of which Python complains where two signals came at once."""


def _imports(frame: FrameType | None) -> int:
    """How many frames of the import system are under way in `frame` and its callers."""
    found = 0
    while frame is not None:
        found += frame.f_code.co_filename.startswith("<frozen importlib")
        frame = frame.f_back
    return found
