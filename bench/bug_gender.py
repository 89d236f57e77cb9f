"""The gender axis on real text: LoRA upstream on BUG sentences, CrowS-Pairs before and after, professions downstream, several seeds.

    python bench/bug_gender.py ../shared runs/bug-gender --seeds 0 1 2

Runs the public commands (printed as they run), skips what is already there, and prints one table with mean, spread and every seed's value.
"""

import statistics
from pathlib import Path

from arguments import Parser, existing_folder
from commands import final, measures, peftdebias

UPSTREAM = "--axis gender --method lora --budget 0.01 --steps 1000 --valid-every 250 --lr 1e-3"
DOWNSTREAM = "--text hard_text --label profession --group gender --epochs 2 --lr 5e-4"


def row(name: str, values: list[float], digits: int = 2) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"| {name} | {statistics.mean(values):.{digits}f}{spread} | {', '.join(f'{v:.{digits}f}' for v in values)} |"


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("shared", type=existing_folder)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    a = parser.parse_args()
    model, data = a.shared / "models" / "bert-tiny-mlm", a.shared / "data"
    on = f"--bias-type gender --on crows-pairs={data}/crows_pairs/crows_pairs_anonymized.csv --on perplexity={data}/corpus/wikitext2_valid.txt"
    splits = " ".join(f"--{s} {data}/bug_professions/{s}.jsonl" for s in ("train", "dev", "test"))
    needed = [model, *(data / name for name in ("crows_pairs/crows_pairs_anonymized.csv", "corpus/wikitext2_valid.txt", "corpus/bug_upstream.txt")),
              *(data / "bug_professions" / f"{s}.jsonl" for s in ("train", "dev", "test"))]
    if missing := next((path for path in needed if not path.exists()), None):
        parser.error(f"shared: {missing}: no such file")
    a.out.mkdir(parents=True, exist_ok=True)
    if not (a.out / "base.json").exists():
        peftdebias(f"evaluate {model} {on} --json {a.out}/base.json")
    for seed in a.seeds:
        run = a.out / f"gender-{seed}"
        if not run.exists():
            peftdebias(f"upstream --model {model} --corpus {data}/corpus/bug_upstream.txt {UPSTREAM} --seed {seed} --out {run}")
        if not (a.out / f"gender-{seed}.json").exists():
            peftdebias(f"evaluate {model} --adapter {run} {on} --json {a.out}/gender-{seed}.json")
        for name, extra in (("plain", ""), ("lora", f"--adapter {run}")):
            if not (a.out / f"{name}-{seed}").exists():
                peftdebias(f"downstream --model {model} {extra} {splits} {DOWNSTREAM} --seed {seed} --out {a.out}/{name}-{seed}")
    base = measures(a.out / "base.json")
    after = [measures(a.out / f"gender-{s}.json") for s in a.seeds]
    print(f"\n| masked-LM | mean ± sd | seeds {', '.join(map(str, a.seeds))} |\n|---|---|---|")
    for key in ("crows-pairs/bias-bench/gender", "crows-pairs/nangia/gender", "perplexity"):
        print(row(f"{key}, base", [base[key]]))
        print(row(f"{key}, base + LoRA", [m[key] for m in after]))
    print(f"\n| downstream | mean ± sd | seeds {', '.join(map(str, a.seeds))} |\n|---|---|---|")
    for key in ("accuracy", "tpr-gap/rms", "tpr-gap/rms-shuffled", "seconds"):
        for name in ("plain", "lora"):
            print(row(f"{key}, {name}", [final(a.out / f"{name}-{s}")[key] for s in a.seeds]))


if __name__ == "__main__":
    main()
