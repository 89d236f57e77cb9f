"""What peftdebias raises. Every message is one line: what, where, expected and got.

The command line prints it and exits with code 2; anything else is a bug and keeps its traceback.
"""

import json


class PeftDebiasError(Exception):
    """Base of all errors that a user can mend."""


class DataError(PeftDebiasError):
    """A text, label or word-list file that cannot be read as asked. Names file and line."""


class ConfigError(PeftDebiasError):
    """An option, TOML key or combination of them that does not make sense."""


class ModelError(PeftDebiasError):
    """A model folder, tokenizer or shape that does not fit."""


class AdapterError(PeftDebiasError):
    """An adapter that does not belong to the model, or a method that cannot do what was asked."""


def short(value: object, most: int = 60) -> str:
    """A value of JSON in a message of one line; its first `most` characters where it is longer."""
    said = json.dumps(value, ensure_ascii=False, default=str)
    return said if len(said) <= most else f"{said[:most]}..."
