"""PEFTDebias from scratch: small modules that undo one axis of social bias in BERT and RoBERTa.

The public names below are loaded on first use; `import peftdebias` itself loads neither torch nor anything else that is heavy.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "Axis": "axes", "load_axis": "axes",
    "counterfactuals": "cda", "families": "cda",
    "load_tokenizer": "tokens",
    "EncoderConfig": "encoder", "Model": "encoder",
    "load_model": "weights", "save_model": "weights",
    "METHODS": "methods", "Method": "methods", "create": "methods",
    "attach": "patch", "detach": "patch", "merge": "patch", "unmerge": "patch",
    "upstream": "phases", "downstream": "phases", "evaluate": "evaluation", "predict": "evaluation", "compare": "comparison", "run": "runner",
    "load_run": "checkpoint",
    "attach_to": "foreign", "load": "embedding", "Debiased": "embedding",
    "export_adapter": "interchange", "import_adapter": "interchange",
    "PeftDebiasError": "errors",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
