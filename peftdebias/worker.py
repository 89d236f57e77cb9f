"""The batches of a recipe from a background process, and what a task asks for: epochs.

What it adds over stream.py: one process that reads, swaps, tokenises, shuffles, masks and packs while the model trains, without torch. Its batches are the
same bits as those made in the training process. It leaves out tensors.

The process is started with `sys.executable -c`, not multiprocessing: a user's script needs no `if __name__ == "__main__"`. It gets the recipe (pickled) and
then commands, one JSON object a line, on its standard input; the end of that input ends it, so it does not outlive the training process. On its standard
output it sends frames: a head (JSON) with the shapes of the arrays that follow. Every command has a number that its frames carry: frames of an older
command are thrown away. It has a session of its own, so Ctrl-C reaches the training process alone, which then ends it.
"""

import collections
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
from .errors import PeftDebiasError
from .stream import Counts, Ended, Filled, Given, Recipe, Stream

AHEAD = 16  # batches that wait in the training process
PATIENCE = 5.0  # seconds in which the process ends by itself
SMALL = 8 << 20  # bytes of corpus below which starting a process costs more than it brings
KINDS = {field.name: numpy.dtype("<i8" if field.name in ("rows", "family") else "<i4") for field in dataclasses.fields(Packed)}


def default_workers(files: tuple[str, ...]) -> int:
    """0 for a small corpus or a single core, else the background process with up to two threads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if cores == 1 or sum(os.path.getsize(file) for file in files) < SMALL else min(2, cores)


class Epochs:
    """Batches epoch by epoch. workers: 0 makes them in this process, N in a background one with N threads; the batches are the same.

    counts: of the pass that has read most so far. position: behind the last batch given. A context manager; `close` ends the process.
    """

    def __init__(self, recipe: Recipe, workers: int = 0):
        self._source = Background(recipe, workers) if workers else Stream(recipe)
        self._events: Iterator | None = None
        self._begins: int | None = None  # the epoch whose beginning comes next
        self._first: Filled | None = None  # read by `ready`
        self.counts, self.position = Counts(), None

    def ready(self) -> Counts:
        """Waits until the first window is full; whatever is wrong in it is raised now."""
        self._restart(0)
        self._first = next(self._events, None)
        if self._first is not None:
            self.counts = self._first.counts
        return self.counts

    def epoch(self, number: int) -> Iterator[Packed]:
        """The batches of an epoch. They go on without a break where the epoch before was taken to its end, else they begin anew."""
        if self._begins != number:
            self._restart(number)
        yield from self._batches()

    def resume(self, position: dict) -> Iterator[Packed]:
        """The batches of position's epoch that come behind it."""
        self._restart(position["epoch"], position)
        yield from self._batches()

    def _batches(self) -> Iterator[Packed]:
        event, self._first, self._begins = self._first, None, None
        while (event := event or next(self._events, None)) is not None:
            if isinstance(event, Given):
                self.position = event.position
                yield event.packed
            elif isinstance(event, Filled):
                if not self.counts.whole:
                    self.counts = max(self.counts, event.counts, key=lambda counts: (counts.whole, counts.texts))
            else:
                self._begins = event.epoch + 1
                return
            event = None

    def _restart(self, epoch: int, position: dict | None = None) -> None:
        if self._events is not None:
            self._events.close()
        self._events, self._begins, self._first = self._source.run(epoch, position), epoch, None

    def close(self) -> None:
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
    """stream.Stream in a process of its own. `run` as there, one at a time; what the process raises is raised here with the same words."""

    def __init__(self, recipe: Recipe, threads: int):
        environment = os.environ | {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false",
                                    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        code = f"import sys; sys.path[:] = {sys.path!r}; from peftdebias.worker import main; main()"
        self.process = subprocess.Popen([sys.executable, "-P", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True)
        self._state = threading.Condition()
        self._frames: collections.deque = collections.deque()
        self._command = 0  # number of the newest
        self._closed = False
        self._sent = threading.Event()
        recipe = pickle.dumps(dataclasses.replace(recipe, threads=threads))
        self._thread = threading.Thread(target=self._read, args=(recipe,), name="peftdebias-worker", daemon=True)
        self._thread.start()

    def run(self, epoch: int = 0, position: dict | None = None) -> Iterator[Filled | Given | Ended]:
        self._sent.wait()
        with self._state:
            self._command += 1
            mine = self._command
            self._frames.clear()
            self._state.notify_all()
        try:
            self.process.stdin.write(json.dumps({"command": mine, "epoch": epoch, "position": position}).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it is gone; the frames say why
        return self._given(mine)

    def _given(self, mine: int) -> Iterator[Filled | Given | Ended]:
        while True:
            with self._state:
                while not self._frames and self._command == mine and not self._closed:
                    self._state.wait()
                if self._command != mine or self._closed:
                    return
                frame = self._frames[0]
                if not isinstance(frame, Exception) and frame is not None:  # these two stay
                    self._frames.popleft()
                self._state.notify_all()
            if frame is None:
                return
            if isinstance(frame, Exception):
                raise frame
            yield frame

    def close(self) -> None:
        """Ends the process and waits for it."""
        with self._state:
            self._closed = True
            self._state.notify_all()
        try:
            self.process.stdin.close()
        except OSError:
            pass
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._thread.join()
        self.process.stdout.close()

    def _read(self, recipe: bytes) -> None:
        """The thread: sends the recipe, then reads frames into a short queue."""
        try:
            self.process.stdin.write(struct.pack("<Q", len(recipe)) + recipe)
            self.process.stdin.flush()
        except OSError:
            pass
        self._sent.set()
        try:
            while (head := _read_head(self.process.stdout)) is not None:
                self._put(head["command"], _event(head, self.process.stdout))
            error = self._died()
        except Exception as problem:  # a frame cut short
            error = self._died() if self.process.poll() is not None else problem
        self._put(None, error)

    def _put(self, command: int | None, frame) -> None:
        with self._state:
            while len(self._frames) >= AHEAD and command in (self._command, None) and not self._closed:
                self._state.wait()
            if command in (self._command, None):
                self._frames.append(frame)
                self._state.notify_all()

    def _died(self) -> PeftDebiasError:
        code = self.process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return PeftDebiasError(f"the background process that makes batches {how}; expected it to last as long as the training (memory may be short; --workers 0 does without it)")


def _event(head: dict, stream):
    kind = head["kind"]
    if kind == "given":
        arrays = {name: numpy.frombuffer(_read_whole(stream, length * KINDS[name].itemsize), KINDS[name]) for name, length in zip(KINDS, head["lengths"])}
        return Given(Packed(**arrays), head["position"])
    if kind == "filled":
        return Filled(head["epoch"], Counts(**head["counts"]))
    if kind == "ended":
        return Ended(head["epoch"])
    if kind == "error":
        return getattr(errors, head["error"])(head["message"])
    if kind == "bug":
        return RuntimeError(f"in the background process:\n{head['message']}")
    return None  # no batches


def _read_whole(stream, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _read_head(stream) -> dict | None:
    """None at the end."""
    size = stream.read(4)
    return json.loads(_read_whole(stream, *struct.unpack("<I", size))) if len(size) == 4 else None


# ---------------------------------------------------------------- the other side

def main() -> None:
    """The background process."""
    frames = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints does not print into the frames
    stream = Stream(pickle.loads(_read_whole(sys.stdin.buffer, *struct.unpack("<Q", _read_whole(sys.stdin.buffer, 8)))))
    commands = _Commands()
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
    except Exception:
        send("bug", message=traceback.format_exc())


def _send(frames, head: dict, arrays) -> None:
    data = json.dumps(head).encode()
    frames.write(b"".join((struct.pack("<I", len(data)), data, *(array.tobytes() for array in arrays))))
    frames.flush()
