"""How often a kernel's loop asks a bank of shared memory twice, read from its PTX without a GPU.

Shared memory has 32 banks of 4 bytes; in one pass each gives one word. What a warp reads or writes by one instruction takes as many passes as the most words that it wants of
one bank (CUDA C++ programming guide, shared memory). Addresses are whole-number arithmetic on the thread's number, so they can be worked out, here for the 32 threads of a
program's first warp, each of them taken to take part; what depends on memory, or on an instruction that is not in WHOLE, is unknown. No branch is followed, so a loop is seen in its
first round. Counted are ld.shared, st.shared, ldmatrix and stmatrix; cp.async and wgmma, which go to shared memory by themselves, are not.
"""

import collections
import dataclasses
import re

WARP, BANKS, WORD = 32, 32, 4
ARGUMENT = 4096
"""What a kernel's 32-bit arguments are taken to be, a multiple of all tiles; pointers are 0."""


@dataclasses.dataclass(frozen=True)
class Passes:
    """taken: passes over shared memory of one warp in one round of the longest loop; least: those without a conflict; unknown: instructions whose addresses are not known."""

    taken: int = 0
    least: int = 0
    unknown: int = 0

    def __str__(self) -> str:
        return f"{self.taken}/{self.least}" + (f" and {self.unknown}?" if self.unknown else "")


def passes(ptx: str) -> Passes:
    """Of the longest loop; of the whole program where there is none."""
    lines = ptx.splitlines()
    first, last = _longest_loop(lines)
    warp, taken, least, unknown = _Warp(), 0, 0, 0
    for number, line in enumerate(lines):
        asked = warp.run(line)
        if asked is not None and first <= number <= last:
            taken, least, unknown = taken + asked[0], least + asked[1], unknown + (asked[1] == 0)
    return Passes(taken, least, unknown)


def _longest_loop(lines: list[str]) -> tuple[int, int]:
    """(line of its label, line of the branch back to it)."""
    labels = {m[1]: n for n, line in enumerate(lines) if (m := re.match(r"\s*(\$\w+):", line))}
    loops = [(labels[m[1]], n) for n, line in enumerate(lines) if (m := re.search(r"\bbra(?:\.uni)?\s+(\$\w+)", line)) and labels.get(m[1], n) < n]
    return max(loops, key=lambda loop: loop[1] - loop[0], default=(0, len(lines)))


# ---------------------------------------------------------------- what an instruction asks for

def _rounds(addresses: list[int], bytes_each: int) -> int:
    """Passes for so many bytes from each address; equal words count once."""
    words = {(address + at) // WORD for address in addresses for at in range(0, max(bytes_each, WORD), WORD)}
    return max(collections.Counter(word % BANKS for word in words).values())


def _asked(name: str, addresses: list[int]) -> tuple[int, int]:
    """(passes, the least) of one instruction. A warp's threads go together as far as 128 bytes reach: 32 of 4 bytes, 8 of 16; a matrix of ldmatrix is 8 rows of 16 bytes."""
    if "matrix" in name:
        groups, bytes_each = int(re.search(r"\.x(\d)", name)[1]), 16
        return sum(_rounds(addresses[8 * n:8 * n + 8], bytes_each) for n in range(groups)), groups
    vector = re.search(r"\.v(\d)", name)
    bytes_each = int(re.search(r"\.[bfsu](\d+)$", name)[1]) // 8 * (int(vector[1]) if vector else 1)
    together = min(WARP, WARP * WORD // bytes_each)
    return sum(_rounds(addresses[n:n + together], bytes_each) for n in range(0, WARP, together)), WARP // together


# ---------------------------------------------------------------- a warp's whole numbers

def _lop3(a: int, b: int, c: int, table: int) -> int:
    return sum(((table >> (4 * (a >> bit & 1) + 2 * (b >> bit & 1) + (c >> bit & 1))) & 1) << bit for bit in range(32))


def _div(a: int, b: int) -> int:
    """Towards 0."""
    return abs(a) // abs(b) * (-1 if (a < 0) != (b < 0) else 1)


WHOLE = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "mad": lambda a, b, c: a * b + c, "min": min, "max": max, "neg": lambda a: -a,
    "div": _div, "rem": lambda a, b: a - b * _div(a, b), "shl": lambda a, b: a << min(b, 64), "shr": lambda a, b: a >> min(b, 64),
    "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b, "not": lambda a: ~a, "lop3": _lop3, "bfe": lambda a, at, bits: a >> at & (1 << bits) - 1,
    "bfe.s32": lambda a, at, bits: (a >> at & (1 << bits) - 1 ^ 1 << bits - 1) - (1 << bits - 1),
    "mov": lambda a: a, "cvt": lambda a: a, "cvta": lambda a: a, "selp": lambda a, b, p: a if p else b}
COMPARED = {"lt": int.__lt__, "le": int.__le__, "gt": int.__gt__, "ge": int.__ge__, "eq": int.__eq__, "ne": int.__ne__}


class _Warp:
    """The registers of 32 threads: 32 numbers each, or None where they are not known."""

    def __init__(self):
        self.registers: dict[str, list[int] | None] = {"%tid.x": list(range(WARP))}

    def run(self, line: str) -> tuple[int, int] | None:
        """One line. Of a read or write of shared memory: (passes, the least), (0, 0) where its addresses are not known; of all else None."""
        found = re.match(r"\s*(?:@!?%\w+\s+)?([a-z]\S+)\s+(.*?);", line)
        if not found:
            return None
        name, words = found[1], re.split(r",\s*(?![^{\[]*[}\]])", found[2])
        kind = name.split(".")[0]
        if kind in ("ldmatrix", "stmatrix") or name.startswith(("ld.shared", "st.shared")):
            addresses = self._addresses(found[2])
            self._forget(found[2].partition("[")[0])
            return (0, 0) if addresses is None else _asked(name, addresses)
        if kind == "ld" and ".param" in name:
            self.registers[words[0]] = [0 if name.endswith("64") else ARGUMENT] * WARP
        else:
            self._compute(kind, name, words)
        return None

    def _addresses(self, text: str) -> list[int] | None:
        base, _, more = re.search(r"\[\s*(.*?)\s*\]", text)[1].replace(" ", "").partition("+")
        start, more = self._value(base), self._value(more or "0")
        return None if start is None or more is None else [a + b for a, b in zip(start, more)]

    def _value(self, word: str) -> list[int] | None:
        if word in self.registers:
            return self.registers[word]
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", word):
            return [int(word, 0)] * WARP
        return [0] * WARP if word == "global_smem" or word.startswith(("%ctaid", "%tid")) else None

    def _compute(self, kind: str, name: str, words: list[str]) -> None:
        function = COMPARED.get(name.split(".")[1]) if kind == "setp" else WHOLE.get(name, WHOLE.get(kind))
        given, type_ = [self._value(word) for word in words[1:]], name.rsplit(".", 1)[-1]
        if function is None or type_[0] in "fp" and kind != "setp" or ".hi" in name or None in given:
            self._forget(words[0].partition("[")[0])  # an address that is written to stays what it is
            return
        if kind in ("shr", "setp", "cvt", "div", "rem", "min", "max") and name.split(".")[-1].startswith("s32"):
            given = [[(n + 2 ** 31) % 2 ** 32 - 2 ** 31 for n in some] for some in given]
        try:
            made = [int(function(*some)) for some in zip(*given)]
        except (ArithmeticError, TypeError):  # by an argument that is taken as 0; of more operands than are known here
            self._forget(words[0])
            return
        bits = "" if kind == "setp" or ".wide" in name else (name.split(".")[1] if kind == "cvt" else type_)[1:]
        self.registers[words[0]] = [n % 2 ** int(bits) for n in made] if bits in ("16", "32") else made

    def _forget(self, text: str) -> None:
        self.registers.update(dict.fromkeys(re.findall(r"%\w+", text)))
