"""Every method at 1 % of the base on real text, one seed: that all of them work, and how long they take. Not a comparison: 500 steps, one epoch.

    python bench/all_methods.py ../shared runs/all-methods

Gender: upstream on BUG, downstream on bug_professions. Group: upstream on GHC's own texts, downstream on GHC with class weight 10. Runs the public
commands (printed as they run), skips what is already there, and prints a table.
"""

import json
import random
from pathlib import Path

from arguments import Parser, existing_folder
from commands import final, measures, peftdebias

METHODS = ("full", "adapter", "prefix", "prompt", "lora", "sparse", "ia3", "bias")
SIZED = ("adapter", "prefix", "prompt", "lora", "sparse")
UPSTREAM = "--steps 500 --valid-every 250 --lr 1e-3 --seed 0"


def carve_dev(source: Path, folder: Path) -> tuple[Path, Path]:
    """GHC has no dev split: every tenth line of its training file, drawn with seed 0, becomes one."""
    head, *lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    chosen = set(random.Random(0).sample(range(len(lines)), len(lines) // 10))
    paths = folder / "ghc_train.tsv", folder / "ghc_dev.tsv"
    for path, part in zip(paths, (False, True)):
        path.write_text(head + "".join(line for i, line in enumerate(lines) if (i in chosen) == part), encoding="utf-8")
    return paths


def losses(run: Path) -> tuple[float, float, float]:
    """(validation loss before, best, seconds) of an upstream run; sparse fine-tuning has two stages, both counted."""
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return events[0]["loss"], events[-1]["loss"], events[-1]["seconds"]


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("shared", type=existing_folder)
    parser.add_argument("out", type=Path)
    parser.add_argument("--axes", nargs="+", default=("gender", "group"), choices=("gender", "group"))
    parser.add_argument("--methods", nargs="+", default=("none", *METHODS), choices=("none", *METHODS))
    a = parser.parse_args()
    model, data = a.shared / "models" / "bert-tiny-mlm", a.shared / "data"
    if not (data / "ghc" / "ghc_train.tsv").is_file():
        parser.error(f"shared: {data / 'ghc' / 'ghc_train.tsv'}: no such file")
    a.out.mkdir(parents=True, exist_ok=True)
    train, dev = carve_dev(data / "ghc" / "ghc_train.tsv", a.out)
    crows = f"--on crows-pairs={data}/crows_pairs/crows_pairs_anonymized.csv"
    axes = {
        "gender": (f"--corpus {data}/corpus/bug_upstream.txt", "gender", " ".join(f"--{s} {data}/bug_professions/{s}.jsonl" for s in ("train", "dev", "test"))
                   + " --text hard_text --label profession --group gender --epochs 1 --lr 5e-4", ("accuracy", "tpr-gap/rms")),
        "group": (f"--corpus {train} --column text", "race-color", f"--train {train} --dev {dev} --test {data}/ghc/ghc_test.tsv"
                  " --text text --label hd,cv --class-weights 0=1,1=10 --metric f1 --epochs 1 --lr 5e-4", ("accuracy", "f1/1")),
    }
    for axis in a.axes:
        corpus, category, task, wanted = axes[axis]
        rows = []
        for method in (None if name == "none" else name for name in a.methods):
            run, label = a.out / f"{axis}-{method}", method or "none (base, plain fine-tuning)"
            base = f"--model {run}" if method == "full" else f"--model {model}"
            module = f"--adapter {run}" if method not in (None, "full") else ""
            if method and not run.exists():
                budget = "--budget 0.01" if method in SIZED else ""
                peftdebias(f"upstream --model {model} --axis {axis} --method {method} {corpus} {budget} {UPSTREAM} --out {run}")
            if not Path(f"{run}.json").exists():
                peftdebias(f"evaluate {run if method == 'full' else model} {module} {crows} --bias-type {category} --json {run}.json")
            if not Path(f"{run}-task").exists():
                peftdebias(f"downstream {base} {module} {task} --seed 0 --out {run}-task")
            before, after, seconds = losses(run) if method else (None, None, None)
            found, ended = measures(Path(f"{run}.json")), final(Path(f"{run}-task"))
            rows.append([label, "-" if method is None else f"{before:.3f} -> {after:.3f}", f"{found[f'crows-pairs/bias-bench/{category}']:.1f}",
                         *(f"{ended[name]:.1f}" for name in wanted), "-" if method is None else f"{seconds:.0f}", f"{ended['seconds']:.0f}"])
        head = ["method", "MLM loss, held out", f"CrowS ({category}), %", *wanted, "upstream, s", "downstream, s"]
        print(f"\naxis {axis}\n\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
        print("\n".join("| " + " | ".join(row) + " |" for row in rows))


if __name__ == "__main__":
    main()
