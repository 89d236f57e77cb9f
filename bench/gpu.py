"""python bench/gpu.py, from the root of a checkout on a machine with a CUDA device: ceilings, equality on the device, then our upstream step beside
transformers + peft, 32 texts of at most 128 tokens, bf16 autocast. Rows and tables go to bench/results/, named after the device.

Needs torch, numpy, tokenizers, safetensors, tqdm; transformers and peft for the comparison; no install of peftdebias, no network.
Exit code 0; 1 where providers disagree (then nothing is timed); 2 without a CUDA device or on bad arguments.
"""

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from bench import ROOT, measure, rows  # noqa: E402
from bench.cases import CASES, SIZES, Case, Setting  # noqa: E402
from bench.run import Parser, check, complain, say, title  # noqa: E402


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="bench/gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu only with --dry-run")
    top.add_argument("--dry-run", action="store_true", help="the same path with sizes so small that the figures mean nothing; no file unless --out")
    top.add_argument("--size", default="base", choices=SIZES, help="the base model (default base)")
    top.add_argument("--repeats", type=int, default=15, metavar="N", help="times that every provider is timed (default 15)")
    top.add_argument("--compile", action=argparse.BooleanOptionalAction, help="with torch.compile as a further baseline (default: on a GPU)")
    top.add_argument("--out", type=Path, metavar="FILE.json", help="default bench/results/DEVICE.json")
    return top


def plan(device: torch.device, size: str, dry: bool, folder: Path) -> tuple[list[tuple[Case, Setting]], list[tuple[Case, Setting]]]:
    """(what is checked on the device, what is timed)."""
    def settings(name: str, values: tuple[float, ...], **fields) -> list[tuple[Case, Setting]]:
        return [(CASES[name], Setting(size, x, folder, device, **{"precision": "bf16" if device.type == "cuda" else "float32"} | fields)) for x in values]

    if dry:
        ceilings = settings("gemm", (64,)) + settings("copy", (1,))
        steps = settings("lora_step", (20, 48), sequences=4, longest=48)
        others = settings("lora_linear", (37,)) + settings("attention", (3,), longest=48)
    else:
        ceilings = settings("gemm", (4096, 8192)) + settings("copy", (4096,))
        steps = settings("lora_step", (54, 128), sequences=32, longest=128)  # 42 % valid tokens in a batch padded to 128, and all valid
        others = settings("lora_linear", (2048,)) + settings("attention", (16,))
    return steps + others, ceilings + steps


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.repeats < 1:
        return complain(f"--repeats: expected at least 1, got {arguments.repeats}")
    if arguments.out and (arguments.out.suffix != ".json" or arguments.out.is_dir()):
        return complain(f"--out {arguments.out}: expected a file name that ends in .json")
    if arguments.device == "cpu" and not arguments.dry_run:
        return complain("--device cpu: expected --dry-run beside it (bench/run.py measures a CPU)")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        say("no CUDA device here: not measured")
        return 2
    device = torch.device(arguments.device)
    torch.set_float32_matmul_precision("highest")  # equality is asked in float32, not in TF32; bf16 products are not touched by it
    with tempfile.TemporaryDirectory(prefix="peftdebias-bench-") as folder:
        checked, timed = plan(device, "micro" if arguments.dry_run else arguments.size, arguments.dry_run, Path(folder))
        compiled = device.type == "cuda" if arguments.compile is None else arguments.compile
        providers = {case.name: measure.taking_part(case, compiled, say) for case, _ in checked + timed}
        try:
            shares = {(case.name, setting.x): check(case, setting, providers[case.name]) for case, setting in checked}
        except measure.Unequal as red:
            print(red)
            return 1
        found = []
        for case, setting in timed:
            say(f"{title(case, setting)}: timing")
            found += measure.time_case(case, setting, providers[case.name], arguments.repeats, shares=shares.get((case.name, setting.x)), say=say)
    if arguments.dry_run:
        found = [dataclasses.replace(row, extra_config={**row.extra_config, "dry_run": True}) for row in found]
    heading = "Dry run of bench/gpu.py: the figures mean nothing" if arguments.dry_run else f"Measured by bench/gpu.py on {found[0].device_name}"
    print(f"# {heading}\n\n{rows.table(found)}")
    out = arguments.out or (None if arguments.dry_run else ROOT / "bench" / "results" / f"{rows.slug(device)}.json")
    if out:
        rows.write(out, found, heading)
        say(f"result: {out} and {out.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
