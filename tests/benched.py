"""Where tests meet bench/: its modules by name, the fields of a row, a case of one provider each that is spoilt or made for the test."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CEILINGS = {"gemm", "copy", "gemm at the end"}  # what every run of gpu.py times beside the cases
HAVE_BOTH = all(importlib.util.find_spec(name) for name in ("transformers", "peft"))
FIELDS = ["kernel_name", "provider", "mode", "metric_name", "metric_unit", "x_name", "x_value", "y_50", "y_20", "y_80", "extra_config", "device_name", "torch_version",
          "triton_version", "commit", "timestamp"]


def modules(*names: str):
    """The fixture `bench` of a test file: these modules of bench/ by name; the checkout's root is on the path while they are imported."""
    @pytest.fixture(scope="module", name="bench")
    def bench():
        sys.path.insert(0, str(ROOT))
        try:
            return type("bench", (), {name: importlib.import_module(f"bench.{name}") for name in names})
        finally:
            sys.path.remove(str(ROOT))

    return bench


@pytest.fixture
def quick(bench, monkeypatch):
    """Samples of any duration count."""
    monkeypatch.setattr(bench.measure, "SAMPLE_SECONDS", 0.0)


def planted(bench, monkeypatch, name: str, change, provider_name: str | None = None):
    """Puts a case in the registry of which one provider, ours if none is named, gives results that `change` spoilt."""
    case = bench.cases.CASES[name]
    last = provider_name or ("peftdebias" if "peftdebias" in case.providers else list(case.providers)[-1])
    provider = case.providers[last]

    def build(setting):
        work = provider.build(setting)
        return dataclasses.replace(work, results=lambda: change(work.results()))

    spoilt = dataclasses.replace(case, providers={**case.providers, last: dataclasses.replace(provider, build=build)})
    monkeypatch.setitem(bench.cases.CASES, name, spoilt)


def one_case(bench, mode, **works):
    return bench.case.Case("k", mode, "what", {name: bench.case.Provider(lambda setting, work=work: work) for name, work in works.items()}, "rows", (1,), bench.case.output_bound)
