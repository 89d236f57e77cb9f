"""The fields of a frozen dataclass as flags, as keys of TOML and as checked values.

What it adds over config.py, which says what can be set: how that is written and read. It knows no command.
"""

import argparse
import dataclasses
import errno
import numbers
import os
import sys
import tomllib
import types
import typing
from collections.abc import Callable
from pathlib import Path

from .errors import ConfigError, PeftDebiasError
from .outputs import SHIPPED


def option(help: str, default=dataclasses.MISSING, *, many: str = "", metavar: str | None = None, choices: tuple[str, ...] = (), positional: bool = False,
           of: tuple[str, ...] = (), instead: str = "", under: str = ""):
    """A field with its help. many: "words" takes several after one flag, "repeat" takes one flag each; such fields are tuples. "maybe": the flag
    alone means SHIPPED. positional: no flag. of: the names whose option it is, with which its help then begins.
    instead: the field in whose place it stands; a flag for one of the two takes the other of a TOML file away. under: of a table, the field whose choice its keys belong to;
    keys typed stand beside those of a TOML file, unless another choice is typed too."""
    metadata = {"help": f"{', '.join(of)}: {help}" if of else help, "of": of, "instead": instead, "under": under, "many": many, "metavar": metavar,
                "choices": choices, "positional": positional}
    return dataclasses.field(default=default, metadata=metadata) if default is not dataclasses.MISSING else dataclasses.field(metadata=metadata)


SEEDS = 2**63 - 1  # the largest that every generator takes


@typing.dataclass_transform(kw_only_default=True, frozen_default=True)
def settings(cls: type) -> type:
    """Class decorator: a frozen dataclass whose values, from wherever they come, are made what its fields say (`checked`) before its own checks in `__post_init__`."""
    check = getattr(cls, "__post_init__", lambda self: None)

    def __post_init__(self):
        settle(self)
        check(self)

    cls.__post_init__ = __post_init__
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


def settle(self, *but: str) -> None:
    """Makes the values of a frozen dataclass what its fields say (`checked`), those of the fields `but` aside."""
    given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in but}
    for name, value in checked(type(self), given, f"{type(self).__name__}: ").items():
        object.__setattr__(self, name, value)


def expect(cls: type, given) -> None:
    """Raises ConfigError where a command is called from Python with anything else than its settings."""
    if not isinstance(given, cls):
        raise ConfigError(f"{cls.__name__.lower()}: expected its settings, {cls.__module__}.{cls.__name__}(...), got {type(given).__name__}")


def expect_path(what: str, given, raised: type[PeftDebiasError] = ConfigError) -> Path:
    """`given` as a Path. Raises about `what` on anything but the name of a file or folder: an empty text, which as a Path is the working folder, and what no system takes for one, too."""
    name = os.fspath(given) if isinstance(given, (str, os.PathLike)) else given
    if not isinstance(name, str) or not name:
        raise raised(f"{what}: expected a path, got {'an empty text' if name == '' else type(given).__name__}")
    try:
        os.lstat(name)
    except (OSError, ValueError) as error:  # ValueError: a zero byte, half a surrogate pair
        if getattr(error, "errno", errno.ENAMETOOLONG) == errno.ENAMETOOLONG:
            raise raised(f"{what}: expected a path, got {name[:60]!r}: {getattr(error, 'strerror', None) or error}") from None
    return Path(name)


def expect_name(what: str, given, raised: type[PeftDebiasError] = ConfigError) -> None:
    """Raises about `what` on anything but a name that a module or an axis may have: a text that is not blank, without the / that parts the names of measures and of tensors."""
    if not isinstance(given, str) or not given.strip() or "/" in given:
        raise raised(f"{what}: expected a name without /, got {given!r}")


def expect_whole(what: str, value, least: int, more: str = "") -> None:
    """Raises ConfigError about `what` on anything but a whole number of at least `least`. more: said behind that."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{what}: expected a whole number of at least {least}{more}, got {value!r}")


def flag(name: str) -> str:
    """`batch_size` -> `--batch-size`; `as_`, which may not be called as it is typed, -> `--as`."""
    return "--" + name.rstrip("_").replace("_", "-")


def add_flags(parser: argparse.ArgumentParser, cls: type, last: type | None = None) -> None:
    """A flag for every field of `cls`, `--config` besides; fields that the dataclass `last` has come last. Defaults stay out, and nothing is required here: only what is
    typed arrives, TOML fills up."""
    hints = typing.get_type_hints(cls)
    shared = set() if last is None else {f.name for f in dataclasses.fields(last)}
    for field in sorted(dataclasses.fields(cls), key=lambda f: (f.default is not dataclasses.MISSING, f.name in shared)):
        meta, kind = field.metadata, _plain(hints[field.name])
        kwargs: dict = {"default": argparse.SUPPRESS, "help": (meta["help"] + _shown(field)).replace("%", "%%")}
        if kind is bool:
            kwargs["action"] = argparse.BooleanOptionalAction  # --no-NAME too: a flag wins over a TOML file that says true
        else:
            kwargs["metavar"] = meta["metavar"] or (None if meta["choices"] else {int: "N", float: "X"}.get(kind, "TEXT"))
            if meta["choices"]:
                kwargs["choices"] = meta["choices"]
            elif kind in (int, float):
                kwargs["type"] = kind
            if meta["many"] == "repeat":
                kwargs["action"] = "append"
            elif meta["many"] == "maybe":
                kwargs |= {"nargs": "?", "const": SHIPPED}
            elif meta["many"] == "words":
                kwargs["nargs"] = "*" if meta["positional"] else "+"
        if meta["positional"]:
            parser.add_argument(field.name, **{"nargs": "?"} | kwargs)
        else:
            parser.add_argument(flag(field.name), dest=field.name, **kwargs)
    parser.add_argument("--config", metavar="FILE.toml", action="append", default=argparse.SUPPRESS,
                        help="TOML file with the same names as the flags, a run's config.toml too; a flag wins over it, KEY=VALUE over that key of its table")


def _shown(field: dataclasses.Field) -> str:
    """What a field's help says of its default."""
    if field.default is dataclasses.MISSING:
        return " (required)"
    if field.default is None or field.default is False or field.default == ():
        return ""
    if field.default is True:
        return f" (default: {flag(field.name)})"
    if isinstance(field.default, tuple):
        return f" (default: {' '.join(field.default)})"
    return f" (default: {field.default:g})" if isinstance(field.default, float) else f" (default: {field.default})"


def resolve(cls: type, given: dict):
    """An instance of `cls` from typed flags and, under "config", a TOML file. Raises ConfigError on unknown keys, wrong types and values, and what is missing."""
    given = {key: value for key, value in given.items() if value is not None and value != []}
    path = given.pop("config", None)
    if isinstance(path, list):  # typed flags
        if len(path) > 1:
            raise ConfigError(f"--config: expected one file, got {len(path)}: {', '.join(path)}")
        (path,) = path
    values = {} if path is None else _read_toml(cls, path)
    for field in dataclasses.fields(cls):
        pair = {field.name, field.metadata["instead"]} if field.metadata["instead"] else set()
        if len(pair & set(given)) == 1:
            values = {key: value for key, value in values.items() if key not in pair}
    typed = checked(cls, given)
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    for field in dataclasses.fields(cls):
        if (under := field.metadata["under"]) and field.name in typed and typed.get(under, there := values.get(under, defaults[under])) == there:
            typed[field.name] = (values.get(field.name) or {}) | typed[field.name]
    try:
        return build(cls, values | typed)
    except ConfigError as error:
        key = next((key for key in values.keys() - typed.keys() if str(error).startswith(f"{flag(key)}: ")), None)
        if key is None:
            raise
        raise ConfigError(f"{path}: {key.rstrip('_')}{str(error).removeprefix(flag(key))}") from None  # nobody typed that flag


def build(cls: type, values: dict):
    """An instance of `cls` from values that `checked` has seen. Raises ConfigError on what is missing."""
    missing = [f.metadata["metavar"] if f.metadata["positional"] else flag(f.name)
               for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in values]
    if missing:
        raise ConfigError(f"missing: {', '.join(missing)} (see `peftdebias {cls.__name__.lower()} --help`)")
    return cls(**values)


PLACES = ("DIR", "DIR_OR_RUN", "FILE", "RUN", "PATH", "RECIPE", "NAME|FILE")  # metavars of files and folders
NAMED = ("COL", "COLUMN", "LABEL", "A=W,...")  # ... and of what else an empty text cannot be; no more than "" is left of an unset shell variable
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", tuple: "a list of texts", dict: "a table of options"}


def checked(cls: type, values: dict, where: str = "") -> dict:
    """`values` as the fields of the dataclass `cls` want them; what --set, flags and TOML write alike. `where` begins the messages.

    A whole number serves as a number, one value as a list of one, a path as its text, None where a field may be unset. Raises ConfigError on an unknown key or
    another type.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    ready = {}
    for name, value in values.items():
        key = name.replace("-", "_")
        key = key + "_" if key + "_" in fields else key
        if key not in fields:
            known = ", ".join(field.rstrip("_") for field in fields)
            raise ConfigError(f"{where}unknown key {name!r}; expected {'one of ' + known if known else 'none'}")
        if key in ready:  # with - and with _
            raise ConfigError(f"{where}{name}: expected once, got it twice")
        kind, name = _plain(hints[key]), name.rstrip("_")
        if value is None and type(None) in typing.get_args(hints[key]):
            ready[key] = None
            continue
        if kind is dict:
            value = parse_settings(value, called=f"{where}{name}" if where else "--set") if isinstance(value, (list, tuple)) else value
            value = {key: _unwrapped(one) for key, one in value.items()} if isinstance(value, dict) else value
        elif kind is tuple:
            value = tuple(map(_unwrapped, value)) if isinstance(value, (list, tuple)) else (_unwrapped(value),)
        else:
            value = _unwrapped(value)
            value = float(value) if kind is float and type(value) is int and abs(value) <= sys.float_info.max else value
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)) or (kind is tuple and not all(isinstance(v, str) for v in value)):
            raise ConfigError(f"{where}{name}: expected {KINDS.get(kind) or f'an instance of {kind.__name__}'}, got {_short(value)}")
        metavar, every = fields[key].metadata.get("metavar"), value if kind is tuple else (value,)
        if metavar in (*PLACES, *NAMED) and "" in every:
            raise ConfigError(f"{where}{name}: expected {metavar}, got an empty text")
        for one in every if metavar in PLACES else ():
            expect_path(f"{where}{name}", one)
        if (choices := fields[key].metadata.get("choices")) and value not in choices:
            raise ConfigError(f"{where}{name}: expected one of {', '.join(choices)}, got {value!r}")
        ready[key] = value
    return ready


def _unwrapped(value):
    """A path as its text, a number of numpy's as Python's."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, (bool, int)) else value


def _short(value) -> str:
    """A value in a message of one line: what it is, where it is long."""
    said = repr(value)
    return said if len(said) <= 100 and "\n" not in said else type(value).__name__


def parse_settings(pairs: list[str], texts: frozenset[str] = frozenset(), called: str = "--set") -> dict:
    """["rank=8", "targets=query,value"] -> {"rank": 8, "targets": ("query", "value")}; numbers and true/false as in TOML, the rest is text. texts: keys, behind a
    NAME. too, whose value is one text, commas and all. called: what they were given as, for messages."""
    settings = {}
    for pair in pairs:
        key, equals, text = str(pair).partition("=")
        if not equals or not key:
            raise ConfigError(f"{called}: expected KEY=VALUE, got {pair!r}")
        key, parts = key.replace("-", "_"), tuple(_literal(part) for part in text.split(","))
        if key.rpartition(".")[2] in texts:
            settings[key] = whole if isinstance(whole := _literal(text), str) else text
        else:
            settings[key] = parts[0] if len(parts) == 1 else parts
    return settings


def texts_of(cls: type) -> frozenset[str]:
    """The fields of a dataclass whose value is one text, as they are typed."""
    return frozenset(name.rstrip("_") for name, hint in typing.get_type_hints(cls).items() if _plain(hint) is str)


def as_plain(config) -> dict:
    """The resolved values for TOML: tuples as lists, what is None left out."""
    def plain(value):
        if isinstance(value, (tuple, list)):
            return [plain(v) for v in value]
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if v is not None}
        return value

    values = {f.name.rstrip("_"): plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return {k: v for k, v in values.items() if v is not None}


def _literal(text: str):
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except (ValueError, RecursionError):  # ValueError: no TOML, or an integer of thousands of digits
        return text


def _read_toml(cls: type, path: str) -> dict:
    if not path:  # as a Path it would be the working folder
        raise ConfigError("--config: expected FILE.toml, got an empty text")
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # ValueError: no UTF-8, no TOML, or an integer of thousands of digits
        raise ConfigError(f"--config {path}: expected TOML, got {error}") from None
    command = cls.__name__.lower()
    if (of := values.pop("command", command)) != command:  # a run's config.toml names its command
        raise ConfigError(f"--config {path}: expected the configuration of `{command}`, got one of `{of}`")
    return checked(cls, values, f"{path}: ")


def at_least(least: int, of, *names: str, called: Callable[[str], str] = flag) -> None:
    """Raises ConfigError on a named field of the settings `of` that is set and less. called: what the message calls a field."""
    for name in names:
        value = getattr(of, name)
        if value is not None and not value >= least:
            raise ConfigError(f"{called(name)}: expected at least {least}, got {value}")


def at_most(most: int, of, *names: str) -> None:
    """Raises ConfigError on a named field of the settings `of` that is set and more."""
    for name in names:
        value = getattr(of, name)
        if value is not None and not value <= most:
            raise ConfigError(f"{flag(name)}: expected at most {most}, got {value}")


def check_seed(seed: int, called: str = "--seed") -> None:
    """Raises ConfigError on what no generator takes. called: what the message calls it."""
    if not isinstance(seed, numbers.Integral) or not 0 <= seed <= SEEDS:
        raise ConfigError(f"{called}: expected a whole number from 0 to {SEEDS}, got {seed!r}")


def _plain(hint) -> type:
    """int | None -> int, tuple[str, ...] -> tuple (all our tuples are of text)."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    return typing.get_origin(hint) or hint
