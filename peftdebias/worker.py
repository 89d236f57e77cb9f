"""The batches of a recipe from a background process, and what a task asks for: epochs.

What it adds over stream.py: one process that reads, swaps, tokenises, shuffles, masks and packs while the model trains, without torch. Its batches are the
same bits as those made in the training process. It leaves out tensors.

The process is started with `sys.executable -c`, not multiprocessing: a user's script needs no `if __name__ == "__main__"`. It gets the recipe (pickled) and
then commands, one JSON object a line, on its standard input; the end of that input ends it, so it does not outlive the training process. On its standard
output it sends frames: two sizes (uint32), a head (JSON) and a body, the arrays whose lengths the head has. Every command has a number that its frames
carry: frames of an older command are thrown away. It has a session of its own, so Ctrl-C reaches the training process alone, which then ends it.
"""

import contextlib
import dataclasses
import json
import os
import pickle
import struct
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator

import numpy

from . import cache, errors
from .buckets import Packed
from .errors import ConfigError, PeftDebiasError
from .options import expect_whole
from .outputs import FULL
from .stream import Counts, Ended, Filled, Given, Recipe, Stream, check_position

PIPE = 1 << 20  # bytes of frames that wait in the pipe, where the system lets that be said: 100 batches of 32 short texts
BUFFER = 1 << 16  # bytes read and written together
PATIENCE = 5.0  # seconds in which the process ends by itself
SMALL = 8 << 20  # bytes of corpus below which starting a process costs more than it brings
KINDS = {field.name: numpy.dtype("<i8" if field.name in ("rows", "family") else "<i4") for field in dataclasses.fields(Packed)}
KINDS = dict(sorted(KINDS.items(), key=lambda item: -item[1].itemsize))  # in a body's order, so that every array lies on a multiple of its item's size


def default_workers(files: tuple[str, ...]) -> int:
    """0 for a small corpus or a single core, else the background process with up to two threads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if cores == 1 or sum(os.path.getsize(file) for file in files) < SMALL else min(2, cores)


class Epochs:
    """Batches epoch by epoch. workers: 0 makes them in this process, N in a background one with N threads; the batches are the same.

    counts: of the pass that has read most so far. position: behind the last batch given. A context manager; `close` ends the process.
    """

    def __init__(self, recipe: Recipe, workers: int = 0):
        if not isinstance(recipe, Recipe):
            raise ConfigError(f"epochs: expected a Recipe, got {type(recipe).__name__}")
        expect_whole("workers", workers, 0)
        self._files = recipe.files
        self._source = Background(recipe, int(workers)) if workers else Stream(recipe)
        self._events: Iterator | None = None
        self._begins: int | None = None  # the epoch whose beginning comes next
        self._first: Filled | None = None  # read by `ready`
        self._closed = False
        self.counts, self.position = Counts(), None

    def ready(self) -> Counts:
        """Waits until the first window is full; whatever is wrong in it is raised now."""
        self._restart(0)
        self._first = next(self._events, None)
        if self._first is not None:
            self.counts = self._first.counts
        return self.counts

    def epoch(self, number: int) -> Iterator[Packed]:
        """The batches of an epoch. They go on without a break where the epoch before was taken to its end, else they begin anew, and a pass under way raises ConfigError."""
        expect_whole("epoch", number, 0)
        number = int(number)  # one of numpy's is none in JSON
        if self._begins != number:
            self._restart(number)
        yield from self._batches()

    def resume(self, position: dict) -> Iterator[Packed]:
        """The batches of position's epoch that come behind it. Raises ConfigError on what is no position."""
        self._restart(check_position(position, self._files)["epoch"], position)
        yield from self._batches()

    def _batches(self) -> Iterator[Packed]:
        event, self._first, self._begins, events = self._first, None, None, self._events
        while (event := event or next(events, None)) is not None:
            if isinstance(event, Given):
                self.position = event.position
                yield event.packed
                if self._events is not events:
                    raise ConfigError("epochs: a pass was begun while this one was under way; expected one at a time")
            elif isinstance(event, Filled):
                if not self.counts.whole:
                    self.counts = max(self.counts, event.counts, key=lambda counts: (counts.whole, counts.texts))
            else:
                self._begins = event.epoch + 1
                return
            event = None

    def _restart(self, epoch: int, position: dict | None = None) -> None:
        if self._closed:
            raise ConfigError("epochs: closed; expected new ones, which begin anew")
        if self._events is not None:
            self._events.close()
        self._events, self._begins, self._first = self._source.run(epoch, position), epoch, None

    def close(self) -> None:
        self._closed, self._begins = True, None
        if self._events is not None:
            self._events.close()
        if isinstance(self._source, Background):
            self._source.close()

    def __enter__(self) -> "Epochs":
        return self

    def __exit__(self, *error) -> None:
        self.close()


# ---------------------------------------------------------------- this side

class Background:
    """stream.Stream in a process of its own. `run` as there, one at a time; what the process raises is raised here with the same words.

    Frames are read where they are asked for, and what the process is ahead waits in the kernel's pipe: a thread here that reads would take the GIL from the
    step. Whatever breaks off a frame or a command (Ctrl-C) leaves a pipe whose next byte means nothing; the next run then starts another process.
    """

    def __init__(self, recipe: Recipe, threads: int):
        self._recipe = pickle.dumps(dataclasses.replace(recipe, threads=threads))
        self._environment = os.environ | {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false",
                                          "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._command = 0  # number of the newest
        self._closed = False
        self._start()

    def _start(self) -> None:
        if not sys.executable:
            raise ConfigError("--workers: the background process cannot be started: sys.executable names no Python here; --workers 0 needs none")
        code = f"import sys; sys.path[:] = {sys.path!r}; from peftdebias.worker import main; main()"
        try:
            self.process = subprocess.Popen([sys.executable, "-P", "-c", code], bufsize=BUFFER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self._environment,
                                            start_new_session=True)
        except OSError as error:  # no more processes or files for this user
            raise ConfigError(f"--workers: the background process cannot be started: {error.strerror}; --workers 0 needs none") from None
        self._fresh = True  # it has no recipe yet: it takes none before it has started, and is not waited for here
        self._torn = False  # a frame or a command was begun
        with contextlib.suppress(ImportError, AttributeError, OSError):  # not Linux, or more than the user may have
            import fcntl
            fcntl.fcntl(self.process.stdout, fcntl.F_SETPIPE_SZ, PIPE)

    def run(self, epoch: int = 0, position: dict | None = None) -> Iterator[Filled | Given | Ended]:
        if self._torn:
            self._end()
            self._start()
        self._command += 1
        words = json.dumps({"command": self._command, "epoch": epoch, "position": position}).encode() + b"\n"
        self._torn = True
        with contextlib.suppress(OSError):  # it is gone; the frames say why
            if self._fresh:
                self.process.stdin.write(len(self._recipe).to_bytes(8, "little") + self._recipe)
            self.process.stdin.write(words)
            self.process.stdin.flush()
        self._fresh = self._torn = False
        return self._given(self._command)

    def _given(self, mine: int) -> Iterator[Filled | Given | Ended]:
        while self._command == mine and not self._closed:
            self._torn = True
            found = _read_frame(self.process.stdout)
            self._torn = False
            if found is None:
                if self._closed:
                    return
                raise self._died()
            head, body = found
            if head["command"] != mine:
                continue
            event = _event(head, body)
            if event is None:
                return
            if isinstance(event, Exception):
                raise event
            yield event

    def close(self) -> None:
        """Ends the process and waits for it."""
        self._closed = True
        self._end()

    def _end(self) -> None:
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def _died(self) -> PeftDebiasError:
        code = self.process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return PeftDebiasError(f"the background process that makes batches {how}; expected it to last as long as the training (memory may be short; --workers 0 does without it)")


def _event(head: dict, body: memoryview):
    kind = head["kind"]
    if kind == "given":
        arrays, at = {}, 0
        for name, length in zip(KINDS, head["lengths"]):
            arrays[name] = numpy.frombuffer(body, KINDS[name], length, at)
            at += arrays[name].nbytes
        return Given(Packed(**arrays), head["position"])
    if kind == "filled":
        return Filled(head["epoch"], Counts(**head["counts"]))
    if kind == "ended":
        return Ended(head["epoch"])
    if kind == "error":
        return getattr(errors, head["error"])(head["message"])
    if kind == "system":
        return OSError(*head["said"])
    if kind == "memory":
        return MemoryError(*head["said"])
    if kind == "bug":
        return RuntimeError(f"in the background process:\n{head['message']}")
    return None  # no batches


def _read_frame(stream) -> tuple[dict, memoryview] | None:
    """(head, body); None at the end, even one in the middle of a frame."""
    sizes = stream.read(8)
    if len(sizes) < 8:
        return None
    head, body = struct.unpack("<II", sizes)
    data = stream.read(head + body)
    return (json.loads(data[:head]), memoryview(data)[head:]) if len(data) == head + body else None


# ---------------------------------------------------------------- the other side

def main() -> None:
    """The background process."""
    frames = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints does not print into the frames
    size = int.from_bytes(sys.stdin.buffer.read(8), "little")
    recipe = sys.stdin.buffer.read(size)
    if not size or len(recipe) < size:  # the training process ended, or broke off, while it was being sent
        _leave()
    stream, commands = Stream(pickle.loads(recipe)), _Commands()
    warnings.simplefilter("ignore")  # the training process has said the same
    try:
        while True:
            command = commands.wait()
            _answer(stream, command, commands.newer, lambda kind, arrays=(), **head: _send(frames, {"command": command["command"], "kind": kind} | head, arrays))
    except BrokenPipeError:  # nobody listens any more
        _leave()


def _leave() -> None:
    """Ends the process at once, whatever its threads do."""
    cache.sweep()
    os._exit(0)


class _Commands:
    """Reads the standard input in a thread; its end ends the process, whatever it is doing."""

    def __init__(self):
        self._state, self._newest, self._taken = threading.Condition(), None, None
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin.buffer:
            if not line.endswith(b"\n"):  # broken off
                break
            with self._state:
                self._newest = json.loads(line)
                self._state.notify_all()
        _leave()

    def wait(self) -> dict:
        with self._state:
            while self._newest is self._taken:
                self._state.wait()
            self._taken = self._newest
            return self._taken

    def newer(self) -> bool:
        return self._newest is not self._taken


def _answer(stream: Stream, command: dict, newer: Callable[[], bool], send: Callable) -> None:
    try:
        events = stream.run(command["epoch"], command["position"])
        try:
            for event in events:
                if newer():
                    return
                if isinstance(event, Given):
                    arrays = [numpy.ascontiguousarray(getattr(event.packed, name), kind) for name, kind in KINDS.items()]
                    send("given", arrays, lengths=[len(array) for array in arrays], position=event.position)
                elif isinstance(event, Filled):
                    send("filled", epoch=event.epoch, counts=dataclasses.asdict(event.counts))
                else:
                    send("ended", epoch=event.epoch)
        finally:
            events.close()
        send("empty")
    except BrokenPipeError:
        raise
    except PeftDebiasError as error:
        known = next(cls.__name__ for cls in type(error).__mro__ if getattr(errors, cls.__name__, None) is cls)
        send("error", error=known, message=str(error))
    except MemoryError as error:
        send("memory", said=[str(error)] if str(error) else [])
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None and (error.filename is not None or error.errno in FULL):
            send("system", said=[error.errno, error.strerror, *([] if error.filename is None else [str(error.filename)])])
            return
        send("bug", message=traceback.format_exc())


def _send(frames, head: dict, arrays) -> None:
    data = json.dumps(head).encode()
    data += b" " * (-len(data) % 8)  # the body begins where any item may lie
    frames.write(b"".join((struct.pack("<II", len(data), sum(array.nbytes for array in arrays)), data, *(array.tobytes() for array in arrays))))
    frames.flush()
