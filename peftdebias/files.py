"""Tensors by name and JSON objects: files that others wrote read with care, never code, one line for whatever is wrong with them; files of tensors written.

What it adds over safetensors, torch.load and json: `raised`, the kind of error that names the file. It leaves out whose names they are, and which shapes are wanted.
"""

import contextlib
import json
import math
import os
import re
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from .errors import PeftDebiasError, short

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_tensors(path: Path, raised: type[PeftDebiasError]) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of one that torch.save wrote (by weights_only), by name, on the CPU. Raises on anything more or less."""
    if path.is_dir():
        raise raised(f"{path}: expected a file, got a folder")
    try:
        path.open("rb").close()  # safetensors says of a file that may not be read that it is not there
        tensors = safetensors.torch.load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, TypeError) as error:
        said = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise raised(f"{path}: cannot be read: {said}") from None
    except Exception as error:  # pickle.UnpicklingError: the file wants to run code
        raise raised(f"{path}: expected plain tensors, got {type(error).__name__} (unpickling anything else is refused)") from None
    if not isinstance(tensors, dict) or not all(isinstance(n, str) and _is_plain(t) for n, t in tensors.items()):
        raise raised(f"{path}: expected tensors by name, got something else")
    for name, tensor in tensors.items():  # strides of 0, or an empty dimension, let a small file hold a shape that no memory does
        if (size := math.prod(max(1, n) for n in tensor.shape) * tensor.element_size()) > path.stat().st_size:
            raise raised(f"{path}: {name}: expected no more than the file's {path.stat().st_size:,} bytes, got shape {list(tensor.shape)} of {size:,}")
    return dict(tensors)


def read_parts(listing: Path, raised: type[PeftDebiasError]) -> dict[str, Tensor]:
    """The tensors of the files beside an index of Hugging Face's, {"weight_map": {tensor: file}}. Raises where one that it lists is not there."""
    places = read_object(listing, raised).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) and name == Path(name).name for name in places.values()):
        raise raised(f"{listing}: expected a weight_map of tensors to names of files beside it, got {short(places)}")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        path = listing.parent / name
        if not path.exists():
            raise raised(f"{listing.parent}: expected {name}, found none")
        part = read_tensors(path, raised)
        if lost := next((tensor for tensor, file in places.items() if file == name and tensor not in part), None):
            raise raised(f"{path}: expected the tensor {lost} by {listing.name}, found none")
        tensors |= part
    return tensors


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """A .safetensors file, with the rights of any new file. Raises OSError with the file's name, of a full disk say."""
    path.touch()
    mode = path.stat().st_mode & 0o777
    try:
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})  # for its owner alone, whatever the umask
        with contextlib.suppress(OSError):  # a file system without rights
            path.chmod(mode)
    except SafetensorError as error:
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from None
        raise


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized


def wrong_numbers(tensor: Tensor, dtype: torch.dtype | None = None) -> str:
    """What is wrong with numbers that no answer can be made from, as they are or, if given, as `dtype`; empty where they are floating-point and finite."""
    if tensor.dtype not in FLOATS:
        return f"expected floating-point numbers, got {_name(tensor.dtype)}"
    finite = torch.isfinite(tensor if dtype is None else tensor.to(dtype))
    if finite.all():
        return ""
    return f"expected finite numbers, got {int((~finite).sum())} of {tensor.numel()} that are NaN or infinite" + (f" in {_name(dtype)}" if dtype not in (None, tensor.dtype) else "")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def read_object(path: Path, raised: type[PeftDebiasError]) -> dict:
    """The JSON object of a file, which may begin with a byte order mark. Raises on anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise raised(f"{path}: no such file") from None
    except OSError as error:
        raise raised(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, or an integer of thousands of digits
        raise raised(f"{path}: expected JSON, got {str(error) or type(error).__name__}") from None
    if not isinstance(values, dict):
        raise raised(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values
