"""python bench/dispatch_table.py bench/results/DEVICE.json ...: what bench/gpu.py measured of the forms of LoRA, of its gradients, of attention and of the feed-forward block, as the
table that picks one (kernels/fused/dispatch.json).

A line of the table is one device, dtype, size and dropout or none, with the median milliseconds of forward and backward (of LoRA's gradients: their own), by the device's clock, by every form that was timed
there; of a form that is in several of the files, or was in the table, the last one's. What the given files did not measure stays; rows of a dry run, of a CPU, those that
hold the host's work (no CUDA graph), and providers that are no form of ours are passed over.
Exit code 0; 2 where a file cannot be read or holds nothing of the kind, and then nothing is written.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import rows  # noqa: E402
from bench.arguments import Parser, complain, results_file, say  # noqa: E402
from bench.case import RANK, SIZES  # noqa: E402
from bench.cases_attention import ATTENTION_CASES  # noqa: E402
from bench.cases_attention import FORMS as ATTENTION_FORMS  # noqa: E402
from peftdebias.kernels import dispatch  # noqa: E402
from peftdebias.outputs import write_text  # noqa: E402

CASES = {"lora_linear": ("lora_linear", "hidden", False), "lora_linear_wide": ("lora_linear", "feed_forward", False), "lora_dropout": ("lora_linear", "hidden", True),
         "lora_grads": ("lora_grads", "hidden", False), "lora_grads_two": ("lora_grads", "hidden", False),
         "feed_forward": ("feed_forward", "feed_forward", False)}
"""case -> (op, which width of the base model is the output's, whether it drops)."""
PIECES = {"lora_grads_two": 2}
"""How many pieces of one product a case has, where more than one."""
PREFIX = "peftdebias, "
DTYPES = {"bf16": "bfloat16", "float32": "float32"}


def lines(found: list[rows.Row]) -> dict[str, dict[tuple, dict]]:
    """op -> {what a line is about: the line of the table that these rows give}, in the order of first appearance."""
    made: dict[str, dict[tuple, dict]] = {}
    for row in found:
        op, form, sizes = _measured(row)
        if row.metric_name != "time" or form not in dispatch.FORMS.get(op, ()) or row.extra_config.get("dry_run") or row.device_name.startswith("CPU"):
            continue
        if row.extra_config.get("timed") == "eager":
            continue
        dropout = CASES[row.kernel_name][2] if row.kernel_name in CASES else row.extra_config["dropout"] > 0
        line = {"device": row.device_name, "dtype": DTYPES[row.extra_config["precision"]], "dropout": dropout} | sizes
        made.setdefault(op, {}).setdefault(tuple(line.values()), line | {"ms": {}})["ms"][form] = round(row.y_50, 5)
    return made


def _measured(row: rows.Row) -> tuple[str, str, dict[str, int]]:
    """(op, form, sizes) of a row; no op where it is of none that has forms."""
    if row.kernel_name in ATTENTION_CASES:
        return "attention", ATTENTION_FORMS.get(row.provider, ""), row.extra_config["sizes"]
    if row.kernel_name not in CASES or not row.provider.startswith(PREFIX):
        return "", "", {}
    (op, side, _), size, pieces = CASES[row.kernel_name], SIZES[row.extra_config["size"]], PIECES.get(row.kernel_name, 1)
    sizes = {"rows": int(row.x_value), "inside": size.hidden, "outside": pieces * getattr(size, side)} | ({} if op == "feed_forward" else {"rank": pieces * RANK})
    return op, row.provider.removeprefix(PREFIX), sizes


def _about(line: dict) -> dict:
    """What was measured, without how long it took."""
    return {name: value for name, value in line.items() if name != "ms"}


def main(argv: list[str] | None = None) -> int:
    top = Parser(prog="bench/dispatch_table.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("files", nargs="+", type=Path, metavar="FILE.json", help="rows that bench/gpu.py wrote")
    top.add_argument("--out", type=results_file, default=dispatch.TABLE, metavar="FILE.json", help="the table (default: the one that peftdebias reads)")
    arguments = top.parse_args(argv)
    made: dict[str, dict[tuple, dict]] = {}
    for path in arguments.files:
        try:
            for op, new in lines(rows.read(path)).items():
                for about, line in new.items():
                    made.setdefault(op, {}).setdefault(about, line)["ms"].update(line["ms"])
        except OSError as error:
            return complain(f"{path}: {(error.strerror or str(error)).lower()}")
        except (ValueError, TypeError, KeyError, AttributeError):
            return complain(f"{path}: expected rows of bench/gpu.py, got something else")
    found = {op: list(of.values()) for op, of in made.items()}
    if not found:
        return complain(f"{', '.join(map(str, arguments.files))}: expected measured times of {', '.join([*CASES, *ATTENTION_CASES])} on a GPU, found none")
    try:
        kept = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        of_before = [(op, line, _about(line)) for op, table in kept.items() for line in table]
    except ValueError as error:
        return complain(f"{arguments.out}: expected a table, got {error}")
    except (TypeError, AttributeError):
        return complain(f"{arguments.out}: expected a table, got something else")
    for op, line, about in of_before:
        if again := next((new for new in found.get(op, []) if _about(new) == about), None):
            again["ms"] = {form: ms for form, ms in line["ms"].items() if form in dispatch.FORMS[op]} | again["ms"]
    table = kept | {op: [line for line in kept.get(op, []) if _about(line) not in map(_about, of)] + of for op, of in found.items()}
    if not rows.saved(arguments.out, lambda: arguments.out.parent.mkdir(parents=True, exist_ok=True), lambda: write_text(arguments.out, json.dumps(table, indent=1) + "\n")):
        return 2
    every = [line for of in found.values() for line in of]
    say(f"result: {arguments.out}: {len(every)} lines of {', '.join(sorted({line['device'] for line in every}))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
