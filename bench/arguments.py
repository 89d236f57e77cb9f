"""What the scripts ask of their arguments: one line to standard error for a bad one, `bench: ...`, and exit code 2."""

import argparse
import contextlib
import os
import sys
from pathlib import Path


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"bench: {message.removeprefix('argument ')}\n")


def existing_file(word: str) -> Path:
    """A `type` of add_argument: a file that is there."""
    if not Path(word).is_file():
        raise argparse.ArgumentTypeError(f"{word}: {'expected a file, got a folder' if Path(word).is_dir() else 'no such file'}")
    return Path(word)


def existing_folder(word: str) -> Path:
    if not Path(word).is_dir():
        raise argparse.ArgumentTypeError(f"{word}: no such folder")
    return Path(word)


def results_file(word: str) -> Path:
    """A `type` of add_argument: where rows are to be written, FILE.json in a folder that is there or can be made. Whether one can be written there is tried, and
    nothing of that stays: it shall not be found out when all is measured."""
    path = Path(word)
    if path.suffix != ".json":
        raise argparse.ArgumentTypeError(f"{word}: expected a file name that ends in .json")
    made = [folder for folder in path.absolute().parents if not os.path.exists(folder)]  # the innermost first
    if os.path.isdir(path) or not path.absolute().parents[len(made)].is_dir():
        raise argparse.ArgumentTypeError(f"{word}: expected a file in a folder, {'got a folder' if os.path.isdir(path) else 'a file is in its way'}")
    if beside := next((there for there in map(path.with_suffix, (".md", ".svg", ".partial.json", ".partial.md")) if os.path.isdir(there)), None):
        raise argparse.ArgumentTypeError(f"{word}: expected a file in a folder, got a folder {beside.name} beside it, where its tables or its drawing go")
    tried = path.with_name(f".{path.stem}.partial.json.partial-{os.getpid():016d}")  # as long as any name that is written
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tried.write_bytes(bytes(2 ** 16))
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{word}: cannot be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            tried.unlink()
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
    return path


def positive(word: str) -> int:
    """A `type` of add_argument: a whole number, at least 1."""
    try:
        number = int(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {word!r}") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def above_zero(word: str) -> float:
    """A `type` of add_argument: a number above 0."""
    try:
        number = float(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {word!r}") from None
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected more than 0, got {word}")
    return number


def told(error: Exception) -> str:
    """What it is and its first line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['?'])[0]}"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def complain(line: str) -> int:
    say(f"bench: {line}")
    return 2
