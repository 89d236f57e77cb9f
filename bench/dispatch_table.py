"""python bench/dispatch_table.py bench/results/DEVICE.json ...: what bench/gpu.py measured of LoRA's forms, as the table that picks one (kernels/fused/dispatch.json).

A line of the table is one device, dtype, size and dropout or none, with the median milliseconds of forward and backward by every form that was timed there. Lines of a
device that is in the given files are replaced, those of others stay; rows of a dry run, of a CPU, and providers that are no form of ours are passed over.
Exit code 0; 2 where a file cannot be read or holds nothing of the kind, and then nothing is written.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import rows  # noqa: E402
from bench.case import RANK, SIZES  # noqa: E402
from bench.run import Parser, complain, say  # noqa: E402
from peftdebias.kernels import dispatch  # noqa: E402

CASES = {"lora_linear": ("hidden", False), "lora_linear_wide": ("feed_forward", False), "lora_dropout": ("hidden", True)}
"""case -> (which width of the base model is the output's, whether it drops)."""
PREFIX = "peftdebias, "
DTYPES = {"bf16": "bfloat16", "float32": "float32"}


def lines(found: list[rows.Row]) -> list[dict]:
    """The lines of the table that these rows give, in the order of first appearance."""
    made: dict[tuple, dict] = {}
    for row in found:
        form = row.provider.removeprefix(PREFIX)
        known = row.provider.startswith(PREFIX) and form in dispatch.FORMS["lora_linear"]
        if row.kernel_name not in CASES or row.metric_name != "time" or not known or row.extra_config.get("dry_run") or row.device_name.startswith("CPU"):
            continue
        width, drops = CASES[row.kernel_name]
        size = SIZES[row.extra_config["size"]]
        line = {"device": row.device_name, "dtype": DTYPES[row.extra_config["precision"]], "dropout": drops, "rows": int(row.x_value), "inside": size.hidden,
                "outside": getattr(size, width), "rank": RANK}
        made.setdefault(tuple(line.values()), line | {"ms": {}})["ms"][form] = round(row.y_50, 5)
    return list(made.values())


def main(argv: list[str] | None = None) -> int:
    top = Parser(prog="bench/dispatch_table.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("files", nargs="+", type=Path, metavar="FILE.json", help="rows that bench/gpu.py wrote")
    top.add_argument("--out", type=Path, default=dispatch.TABLE, metavar="FILE.json", help="the table (default: the one that peftdebias reads)")
    arguments = top.parse_args(argv)
    found = []
    for path in arguments.files:
        try:
            found += lines(rows.read(path))
        except (OSError, ValueError, TypeError, KeyError) as error:
            return complain(f"{path}: expected rows of bench/gpu.py, got {type(error).__name__}: {error}")
    if not found:
        return complain(f"{', '.join(map(str, arguments.files))}: expected measured times of {', '.join(CASES)} on a GPU, found none")
    try:
        kept = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    except ValueError as error:
        return complain(f"{arguments.out}: expected a table, got {error}")
    devices = {line["device"] for line in found}
    table = kept | {"lora_linear": [line for line in kept.get("lora_linear", []) if line["device"] not in devices] + found}
    partial = arguments.out.with_name(arguments.out.name + ".partial")
    partial.write_text(json.dumps(table, indent=1) + "\n")
    partial.replace(arguments.out)
    say(f"result: {arguments.out}: {len(found)} lines of {', '.join(sorted(devices))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
