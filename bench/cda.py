"""How fast counterfactuals are made: python bench/cda.py ../shared/data/corpus/bug_upstream.txt [--megabytes 200] [--repeats 7]

First that the engine writes what its plain Python twin writes, on the whole file; no time is taken where it does not. Then, axis gender, medians in MB of
input a second:

    engine   the file repeated to --megabytes, from memory into memory (texts and counterfactuals), on one thread and on two
    augment  `peftdebias augment FILE --out /dev/null`: a whole process, start to end, jsonl with swaps
    twin     the plain Python twin on the first 10 MB; and a copy of the same memory, the bound of everything

Prints one JSON object a line, with machine, load and commit.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.arguments import Parser, existing_file, positive  # noqa: E402
from bench.rows import machine  # noqa: E402
from peftdebias import native  # noqa: E402
from peftdebias.axes import load_axis  # noqa: E402
from peftdebias.cda import PAPER  # noqa: E402
from peftdebias.cda_engine import BLOCK, NativeEngine, PythonEngine  # noqa: E402


def blocks(data: bytes, size: int = BLOCK) -> list[bytes]:
    """Whole lines, about `size` bytes each."""
    found, start = [], 0
    while start < len(data):
        stop = data.find(b"\n", min(len(data), start + size)) + 1 or len(data)
        found.append(data[start:stop])
        start = stop
    return found


def rates(function, size: int, repeats: int) -> list[float]:
    """MB a second of each repeat, in ascending order."""
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        found.append(size / 1e6 / (time.perf_counter() - begin))
    return sorted(found)


def show(what: str, found: list[float], **more) -> float:
    median = statistics.median(found)
    print(json.dumps({"what": what, "MB/s": round(median, 1), "lowest": round(found[0], 1), "highest": round(found[-1], 1), **more, **machine()}), flush=True)
    return median


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=existing_file)
    parser.add_argument("--megabytes", type=positive, default=200)
    parser.add_argument("--repeats", type=positive, default=7)
    a = parser.parse_args()
    library, axis = native.library(), load_axis("gender")
    if library is None:
        sys.exit("bench/cda.py: there is no compiled engine here")
    data = a.file.read_bytes().removesuffix(b"\n") + b"\n"
    written = NativeEngine(axis, PAPER, 2, library).write_lines(data)
    if not written.counts.touched:
        parser.error(f"{a.file}: expected texts with words of the axis gender, found none")
    fast, plain = b"".join(written.chunks), b"".join(PythonEngine(axis).write_lines(data).chunks)
    if fast != plain:
        sys.exit(f"{a.file}: the engine and its twin write different rows")
    print(f"{a.file}: engine and twin write the same {len(fast):,} bytes", flush=True)

    long = data * (a.megabytes * 1_000_000 // len(data) + 1)
    parts = blocks(long)
    medians = {}
    for threads in (1, 2):
        made = NativeEngine(axis, PAPER, threads, library)
        found = rates(lambda: [made.write_lines(part, "members") for part in parts], len(long), a.repeats)
        medians[threads] = show("engine", found, threads=threads, **({"times one thread": round(statistics.median(found) / medians[1], 2)} if threads > 1 else {}))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "long.txt"
        file.write_bytes(long)
        command = [sys.executable, "-m", "peftdebias", "augment", "--axis", "gender", str(file), "--out", os.devnull]
        for threads in (1, 2):
            found = rates(lambda: subprocess.run([*command, "--threads", str(threads)], check=True, stderr=subprocess.DEVNULL), len(long), a.repeats)
            show("augment, whole process", found, threads=threads)
    ten = data[:10_000_000].rpartition(b"\n")[0]
    twin = show("twin", rates(lambda: PythonEngine(axis).write_lines(ten, "lines"), len(ten), 3))
    copy = show("copy of memory", rates(lambda: bytearray(long), len(long), a.repeats))
    print(f"one thread of the engine: {medians[1] / twin:.0f} times its twin, {100 * medians[1] / copy:.1f} % of a copy")


if __name__ == "__main__":
    main()
