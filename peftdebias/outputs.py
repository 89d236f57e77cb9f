"""Where results go: files and folders that take their names when they are whole, and never the place of what is read.

What it leaves out: what is in them.
"""

import contextlib
import ctypes
import errno
import glob
import hashlib
import os
import re
import shutil
import stat
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from .errors import ConfigError

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None

SHIPPED = "shipped"  # --names without a file
STANDARD_OUTPUT = ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")  # its names
PARTIAL = re.compile(r"^\..*\.partial-[0-9a-z]+$", re.DOTALL)  # names that partial_of gives
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def writing(path: str | None) -> Iterator:
    """A text file that takes its name only when the block ends well; None or "-" is standard output. Raises ConfigError where it cannot be written."""
    if path in (None, "-"):
        yield sys.stdout
        return
    target = Path(os.path.realpath(path))  # a link stays one
    if os.path.isdir(target):
        raise ConfigError(f"{path}: expected a file to write, got a folder")
    if _is_open(path) or os.path.exists(path) and not os.path.isfile(path):  # or a device such as /dev/null, or a pipe
        with told_as(path, target), open(path, "a", encoding="utf-8") as file:  # behind what is there: of a file that is open somebody has written the beginning
            yield file
        return
    partial = partial_of(target)
    try:
        with told_as(path, partial), held(partial, partial.touch):
            with open(partial, "w", encoding="utf-8") as file:
                yield file
            partial.replace(target)
    except NotMade as error:
        raise ConfigError(f"{path}: cannot be written: {error}") from None


@contextlib.contextmanager
def told_as(place: str | Path, partial: Path) -> Iterator[None]:
    """An OSError of the block about `partial`, or what lies in it, or about a full disk without a name, tells the name that it was to have: `place`. The other is gone then."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in FULL:
            raise OSError(error.errno, error.strerror, str(place)) from None
        if isinstance(error.filename, (str, Path)) and Path(error.filename).is_relative_to(partial):
            error.filename = str(Path(place) / Path(error.filename).relative_to(partial))
        raise


def _is_open(path: str) -> bool:
    """Whether it is the name of something that this process has open, /dev/stdout or /dev/fd/63, or a link to one: what that is may have no other name."""
    for _ in range(40):  # links, as many as Linux follows
        folder, name = os.path.realpath(os.path.dirname(path)), os.path.basename(path)
        if re.fullmatch(r"/dev/fd|/proc/\d+/fd", folder):
            return True
        path = os.path.join(folder, name)
        if not os.path.islink(path):
            return False
        path = os.path.join(folder, os.readlink(path))
    return False


def vacant(folder: Path) -> bool:
    """Whether it is a folder and holds nothing, what killed processes left half-written aside."""
    return folder.is_dir() and all(PARTIAL.search(path.name) for path in folder.iterdir())


@contextlib.contextmanager
def claiming(out: Path) -> Iterator[None]:
    """Makes the folder of --out; the block writes what marks it as a command's own. Raises ConfigError where either cannot be, and takes back the folders that it made."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]  # the innermost first
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise ConfigError(f"--out {out}: cannot be written: {error.strerror}") from None
        raise


@contextlib.contextmanager
def alone(path: Path, what: str) -> Iterator[None]:
    """Inside the `with` block no other process is in such a block for `path`, a file that is there. Raises ConfigError about `what` where one is; where the system
    knows no such locks, it is not seen. What a process that was killed left half-written beside the file or below is removed, at the start and, of those that the block
    itself has ended, at the end."""
    with open(path, "rb") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _tidy(path.parent.rglob(".*.partial-*"))
            except BlockingIOError:
                raise ConfigError(f"{what}: another process is at work there; expected it to end first, or another folder") from None
            except OSError:  # a file system without locks
                pass
        try:
            yield
        finally:
            _tidy(path.parent.rglob(".*.partial-*"))


class NotMade(Exception):
    """Why a partial cannot be made."""


@contextlib.contextmanager
def held(partial: Path, make: Callable[[], object]) -> Iterator[None]:
    """`make` makes a partial, which `_tidy` leaves alone while the block runs: it is locked, where the system knows such locks. What is there of it when the block ends is
    removed, and at the start what killed processes left of the same result. Raises NotMade."""
    descriptor = None
    try:
        try:
            _tidy(_partials(partial))
            while True:
                make()
                if fcntl is None:
                    break
                descriptor = os.open(partial, os.O_RDONLY)
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                if os.path.exists(partial):
                    break
                os.close(descriptor)  # somebody tidied before it was locked
                descriptor = None
        except OSError as error:
            raise NotMade(error.strerror) from None
        yield
    finally:
        with contextlib.suppress(OSError):  # of a folder that may not be read
            _remove(partial)
        if descriptor is not None:
            os.close(descriptor)


def _partials(partial: Path) -> Iterator[Path]:
    """All of the same result."""
    return partial.parent.glob(glob.escape(partial.name.rpartition("-")[0]) + "-*")


def _tidy(found: Iterable[Path]) -> bool:
    """Remove those of these partials that nobody writes any more: whom the lock was of is gone, on whatever machine. Whether somebody writes another, where the system knows
    such locks."""
    if fcntl is None:
        return False
    written, partials = False, []
    with contextlib.suppress(OSError):  # of a folder that goes meanwhile
        partials += found
    for left in partials:
        if not PARTIAL.search(left.name):
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(left)
            except BlockingIOError:
                written = True
            finally:
                os.close(descriptor)
    return written


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """The text as a file, whole or not at all."""
    with writing(str(path)) as file:
        file.write(text)


@contextlib.contextmanager
def writing_folder(out: Path, overwrite: bool, what: str, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """A folder that becomes `out` when the block ends well and vanishes when it does not, as do the folders made for it.

    what: the kind of folder that is replaced, in words; replaceable: whether one that is there is of that kind. Raises ConfigError where `out` exists and is
    not to be replaced, where another process is writing it, or where it cannot be written.
    """
    def check() -> None:
        if os.path.exists(out) and not overwrite:  # not Path.exists: in a folder that may not be read it raises
            raise ConfigError(f"--out {out}: exists; expected a new folder (or --overwrite)")
        if os.path.exists(out) and not replaceable(out):
            raise ConfigError(f"--out {out}: exists and is no {what}; it is not replaced")

    check()
    target = Path(os.path.realpath(out))  # a link stays one
    partial = partial_of(target)
    if _tidy(_partials(partial)):
        raise ConfigError(f"--out {out}: another process is at work there; expected it to end first, or another folder")
    if _back(target, re.escape(partial.name.rpartition(".")[0]) + r"\.old-[0-9a-f]{12}"):
        check()
    old = partial.with_name(partial.name.replace(".partial-", ".old-"))
    made = [folder for folder in partial.parents if not os.path.exists(folder)]  # by us, the innermost first
    try:
        with told_as(out, partial), held(partial, lambda: partial.mkdir(parents=True)):
            yield partial
            check()  # somebody may have come first
            if not (target.exists() and _exchanged(partial, target)):
                if target.exists():
                    target.rename(old)
                partial.rename(target)
    except NotMade as error:
        raise ConfigError(f"--out {out}: cannot be written: {error}") from None
    finally:
        if os.path.exists(old) and not os.path.exists(target):  # stopped between the two
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):  # with the result in it, it stays
                folder.rmdir()


def _back(target: Path, old: str) -> bool:
    """Whether a folder came back that a process had put aside, by a name like `old`, when it was killed before the new one took its place; where one is there, what was put
    aside is removed."""
    beside = []
    with contextlib.suppress(OSError):  # of a folder that is not there yet, or may not be read
        beside += target.parent.iterdir()
    for left in beside:
        if re.fullmatch(old, left.name):
            if not os.path.exists(target):
                left.rename(target)
                return True
            shutil.rmtree(left, ignore_errors=True)
    return False


def _exchanged(one: Path, other: Path) -> bool:
    """Whether each now has the other's name: at once, so that a reader finds the old folder or the new one. False where the system or its file system cannot."""
    try:
        function = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return function(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def partial_of(path: Path) -> Path:
    """Where `path` is written until it is whole: hidden, beside it, by another name at every call, since processes of two machines or containers may have one number."""
    return path.with_name(f".{_cut(path.name)}.partial-{uuid.uuid4().hex[:12]}")


def _cut(name: str) -> str:
    """With what partial_of adds it is still a name that file systems take (255 bytes)."""
    return os.fsdecode(os.fsencode(name)[:200])


def keep_apart(outs: dict[str, str | Path | None], inputs: Iterable[str | Path | None], folders: bool = False) -> None:
    """Raises ConfigError where a file to write is one that is read, or is called .gz, or two of them are one; with `folders`, where a folder to write is or holds what is read.

    outs: what asks for it ("--out") -> where it goes; None is nowhere, "-" standard output. inputs: files and folders that are read; None is none, "-" standard
    input. A file that is there already is replaced, if nothing reads it.
    """
    streamed = [flag for flag, out in outs.items() if str(out) in STANDARD_OUTPUT]
    if len(streamed) > 1:
        raise ConfigError(f"{streamed[1]} {outs[streamed[1]]}: standard output is the place of {streamed[0]} too; expected two")
    outs = {flag: Path(out) for flag, out in outs.items() if out not in (None, "-")}
    there = [path for name in inputs if name is not None and os.path.exists(path := Path("/dev/stdin" if str(name) == "-" else name))]
    for flag in streamed:
        if (path := next(filter(_is_standard_output, there), None)) is not None:  # it would be read on for as long as it is written
            raise ConfigError(f"{flag}: standard output is {path}, which is read; expected another place")
    for flag, out in outs.items():
        if out.suffix.lower() == ".gz" and not folders:
            raise ConfigError(f"{flag} {out}: expected a name without .gz: what is written is not compressed")
        at_stake = os.path.exists(out)
        if at_stake and not (out.is_dir() if folders else out.is_file()):  # a device such as /dev/null keeps nothing
            continue
        for path in there if at_stake else ():
            if os.path.samefile(out, path) or path.resolve().is_relative_to(out.resolve()):
                raise ConfigError(f"{flag} {out}: is read, as {path}; expected another place, so that nothing is lost")
        if twin := next((other for other, place in outs.items() if other != flag and os.path.realpath(place) == os.path.realpath(out)), None):
            raise ConfigError(f"{flag} {out}: is the place of {twin} too; expected two")


def _is_standard_output(path: Path) -> bool:
    """Whether it is the file that standard output was sent to."""
    try:
        ours = os.fstat(sys.stdout.fileno())
        return stat.S_ISREG(ours.st_mode) and os.path.samestat(ours, os.stat(path))
    except (OSError, ValueError, AttributeError):  # no descriptor, closed, none
        return False


def tables(axis: str | None, names: str | None = None) -> list[str]:
    """Those that are files of the user's: an axis as axes.load_axis tells it, by a folder or by .toml; a table of first names unless it is the shipped one."""
    own = axis is not None and (axis.lower().endswith(".toml") or Path(axis).name != axis)
    return [axis] * own + [names] * (names not in (None, SHIPPED))


def files_in(folder: str | Path) -> list[Path]:
    """Every file in a folder and below."""
    return [path for path in Path(folder).rglob("*") if path.is_file()]


def digest(path: Path) -> str:
    """sha256 of a file, or of the names and contents of the files in a folder and below."""
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256("".join(f"{each.relative_to(path)} {digest(each)}\n" for each in sorted(files_in(path))).encode()).hexdigest()
