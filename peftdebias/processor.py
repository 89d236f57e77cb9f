"""The processor as Linux describes it, its maker, family and name, and the version of a package: what results keep beside them. What is fast on one processor is not on another,
and products round otherwise."""

import functools
import importlib.metadata
import platform

FILE = "/proc/cpuinfo"


@functools.cache
def described() -> dict[str, str]:
    """The fields of the first processor in /proc/cpuinfo, by the names that they have there; empty where there is none."""
    found: dict[str, str] = {}
    try:
        with open(FILE, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if not line.strip():
                    break
                name, _, value = line.partition(":")
                found[name.strip()] = value.strip()
    except OSError:
        pass
    return found


def vendor() -> str:
    """The maker as Linux names it (GenuineIntel, AuthenticAMD), or nothing."""
    return described().get("vendor_id", "")


def family() -> int | None:
    """The number that a maker gives to processors of one design (of AMD: 25 for Zen 3 and 4, 26 for Zen 5)."""
    number = described().get("cpu family", "")
    return int(number) if number.isdigit() else None


def named() -> str:
    """Name, family and model: a virtual machine's name often stands for several designs. Elsewhere than on Linux what Python knows."""
    found = described()
    if "model name" not in found:
        return platform.processor() or platform.machine()
    numbers = [f"{word} {found[key]}" for word, key in (("family", "cpu family"), ("model", "model")) if key in found]
    return ", ".join([found["model name"], " ".join(numbers)] if numbers else [found["model name"]])


def installed(package: str) -> str | None:
    """Its version; None where it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
