"""python bench/compile_report.py: every kernel compiled for GPUs that need not be here, with the registers, local memory (spills) and shared memory it takes.

    python bench/compile_report.py --arch 90 --only lora

Beside these: how many of its instructions that read memory read 16 bytes a thread, which is what a GPU wants; where a kernel knows nothing of an address or a width there are none.
And the passes over shared memory that a warp takes in one round of the longest loop, with bank conflicts and without (bank_conflicts.py): 200/200 has none.

What is compiled is what the kernel files list in `specs(arch)`: their default tiles, in float32 and bf16, most in fp16 too. The numbers come from the machine code itself, read
by the cuobjdump that triton carries. They are facts about the code, not about its speed.
Exit code 0; 1 where a kernel uses local memory, asks for more shared memory than there is or does not compile; 2 on bad arguments, or where there is no triton.
"""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bench  # noqa: E402, F401
from bench.arguments import Parser  # noqa: E402
from bench.bank_conflicts import Passes, passes  # noqa: E402
from peftdebias import kernels  # noqa: E402

ARCHES = (80, 86, 89, 90, 100, 120)
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Bytes of shared memory that one program may have (CUDA C++ programming guide, technical specifications per compute capability)."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """registers a thread; local: bytes of local memory a thread (spills); shared: bytes a program; wide: instructions that load 16 bytes a thread; passes: over
    shared memory; failure: why it did not compile."""

    file: str
    name: str
    arch: int
    registers: int = 0
    local: int = 0
    shared: int = 0
    threads: int = 0
    wide: int = 0
    passes: Passes = Passes()
    failure: str = ""

    @property
    def red(self) -> str:
        """What is wrong, in a word or two; empty where nothing is."""
        if self.failure:
            return "does not compile"
        if self.local:
            return "spills"
        return "too much shared memory" if self.shared > SHARED_LIMIT[self.arch] else ""


def files() -> list[str]:
    """The kernel files that there are."""
    return sorted(set(kernels.TRITON.values()))


def known_to_triton(arch: int) -> str:
    """Why the installed Triton cannot make code for sm_`arch`; empty where it can: the simplest kernel here is tried."""
    from peftdebias.kernels.dropout import specs
    from peftdebias.kernels.tiles import like

    return compile_one("dropout", specs(like(arch))[0], arch).failure


def compile_one(file: str, spec, arch: int) -> Compiled:
    """One kernel for sm_`arch`; no device is asked."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(spec.kernel.arg_names)
    signature = {name: "constexpr" if name in spec.constants else spec.signature[name] for name in names}
    aligned = {name for name, kind in spec.signature.items() if kind.startswith("*")} | set(spec.aligned)
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    constants = {(names.index(name),): value for name, value in spec.constants.items()}
    source = ASTSource(spec.kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, "enable_fp_fusion": True} | ({"maxnreg": spec.maxnreg} if spec.maxnreg else {})
    try:
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        registers, local = resources(made.asm["cubin"])
    except Exception as error:  # whatever the compiler throws is a finding of this report
        return Compiled(file, spec.name, arch, failure=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}")
    return Compiled(file, spec.name, arch, registers, local, made.metadata.shared, 32 * spec.num_warps, wide_loads(made.asm["ptx"]), passes(made.asm["ptx"]))


def compile_file(file: str, arch: int) -> list[Compiled]:
    """Every kernel of a file for sm_`arch`."""
    from peftdebias.kernels.tiles import like

    return [compile_one(file, spec, arch) for spec in importlib.import_module(f"peftdebias.kernels.{file}").specs(like(arch))]


def wide_loads(code: str) -> int:
    """Of PTX: loads of four times 32 or twice 64 bits, and asynchronous copies of 16 bytes to shared memory."""
    return len(re.findall(r"ld\.global\S*\.v(?:4\.\w32|2\.\w64)\b|cp\.async\.c[ag]\.shared\S*\.global[^;]*, (?:0x10|16)\b", code))


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) a thread, as cuobjdump reads them from the machine code. STACK is the frame that spilled registers live in."""
    tool = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def table(found: list[Compiled]) -> str:
    rows = [("kernel", "sm", "registers", "local, B", "shared, B", "threads", "16-byte loads", "shared passes", "")]
    rows += [(f"{c.file}: {c.name}", str(c.arch), *((str(n) for n in (c.registers, c.local, c.shared, c.threads, c.wide, c.passes)) if not c.failure else ("-",) * 6), c.red) for c in found]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(w) if i in (0, 8) else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip() for row in rows)


def main(argv: list[str] | None = None) -> int:
    top = Parser(prog="bench/compile_report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--arch", type=int, choices=ARCHES, action="append", help="compute capability without its point (default: all that triton can)")
    top.add_argument("--only", choices=files(), action="append", help="a kernel file (default: all)")
    arguments = top.parse_args(argv)
    trouble = kernels.no_triton() or ("TRITON_INTERPRET is set: expected a process without it" if kernels.interpreted() else "")
    if trouble:
        print(f"bench/compile_report.py: {trouble}", file=sys.stderr)
        return 2
    with own_cache():
        return report(arguments.arch, arguments.only or files())


@contextlib.contextmanager
def own_cache():
    """Compiled anew, and nothing left behind; TRITON_CACHE_DIR where that is set."""
    if "TRITON_CACHE_DIR" in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="peftdebias-compile-") as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            yield
        finally:
            del os.environ["TRITON_CACHE_DIR"]


def report(arches: list[int] | None, only: list[str]) -> int:
    """Prints the table; the exit code. arches: None for all that the installed Triton makes code for."""
    import triton

    wanted = []
    for arch in arches or ARCHES:
        if why := known_to_triton(arch):
            print(f"sm_{arch}: triton {triton.__version__} makes no code for it: {why}", file=sys.stderr)
            if arches:
                return 2
            continue
        wanted += [(file, arch) for file in only]
    with ProcessPoolExecutor() as pool:
        found = [made for some in pool.map(compile_file, *zip(*wanted)) for made in some]
    red = [c for c in found if c.red]
    print(f"triton {triton.__version__}, enable_fp_fusion on; {len(found)} compilations, {len(red)} red\n\n{table(found)}")
    for c in red:
        if c.failure:
            print(f"{c.file}: {c.name}, sm_{c.arch}: {c.failure}")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
