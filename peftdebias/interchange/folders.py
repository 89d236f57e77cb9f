"""The two files of a foreign adapter folder: the configuration key by key (`Fields`), the tensors by name."""

import dataclasses
import json
import math
from pathlib import Path

from torch import Tensor

from .. import files
from ..errors import AdapterError
from ..methods import Method

CONFIG = "adapter_config.json"
NONE = "none (there is no such thing here)"


@dataclasses.dataclass
class Foreign:
    """What a folder of others holds. heads: tensors of classifier or masked-LM heads that came along, by our names. origin: the library, its version and kind."""

    method: Method
    heads: dict[str, Tensor]
    origin: dict[str, str]


class Fields:
    """A JSON object of others, asked key by key; what was never asked for and says something is refused at the end (`rest`)."""

    def __init__(self, path: Path, values: dict):
        self.path, self.values, self.asked = path, values, set()

    def get(self, key: str, kind: type | tuple, default=None):
        """The value of `key`; `default` where it is absent or null. Raises AdapterError where it is neither given nor of `kind`."""
        self.asked.add(key)
        value = self.values.get(key)
        value = default if value is None else value
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if value is None or not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise AdapterError(f"{self.path}: {key}: expected {' or '.join(k.__name__ for k in kinds)}, got {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number. Raises AdapterError on anything else (Python's JSON reads NaN, Infinity, and integers beyond any float)."""
        value = self.get(key, (int, float), default)
        try:
            if math.isfinite(found := float(value)):
                return found
        except OverflowError:
            pass
        raise AdapterError(f"{self.path}: {key}: expected a finite number, got {value}")

    def expect(self, key: str, *wanted) -> None:
        """Raises AdapterError unless `key` is absent, null or one of `wanted`."""
        self.asked.add(key)
        value = self.values.get(key)
        if value is not None and not any(type(value) is type(w) and value == w for w in wanted):
            raise AdapterError(f"{self.path}: {key}: expected {' or '.join(json.dumps(w) for w in wanted) or NONE}, got {json.dumps(value)}")

    def rest(self, *ignored: str) -> None:
        """Raises AdapterError on a key that nobody asked for, is not `ignored`, and holds more than null, false, "none" or nothing."""
        for key, value in self.values.items():
            if key not in self.asked and key not in ignored and value not in (None, False, "none", {}, []):
                raise AdapterError(f"{self.path}: {key}: expected {NONE}, got {json.dumps(value)}")


def read_tensors(folder: Path, names: tuple[str, ...]) -> tuple[Path, dict[str, Tensor]]:
    """(the first of these files that is there, its tensors by name). Raises AdapterError where there is none, or it holds more or less than plain tensors."""
    path = next((folder / name for name in names if (folder / name).exists()), None)
    if path is None:
        raise AdapterError(f"{folder}: expected {' or '.join(names)}, found none")
    return path, files.read_tensors(path, AdapterError)
