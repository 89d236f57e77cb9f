"""python bench/run.py [NAME...]: checks that all providers compute the same, then times them; on a CPU.

Exit code 0; 1 where providers disagree (then nothing is timed); 2 on bad arguments. bench/gpu.py does the same on a GPU; README.md says how to add a case.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import equality, lineup, measure, rows  # noqa: E402
from bench.arguments import Parser, complain, positive, results_file, say  # noqa: E402
from bench.case import SIZES, Case, Setting  # noqa: E402
from bench.cases import CASES  # noqa: E402
from bench.profiled import ops_table  # noqa: E402


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="bench/run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("names", nargs="*", metavar="NAME", help="cases to run, or the stem of some: lora (default: all); --list shows them")
    top.add_argument("--size", default="tiny", metavar="S[,S...]", help=f"sizes of the base model: {', '.join(SIZES)} (default tiny)")
    top.add_argument("--repeats", type=positive, metavar="N", help="times that every provider is timed (default: by size, " +
                     ", ".join(f"{name} {size.repeats}" for name, size in SIZES.items()) + ")")
    top.add_argument("--batches", type=positive, metavar="N", help="batches in one pass of a step (default: by size)")
    top.add_argument("--out", type=results_file, metavar="FILE.json", help="write the rows there, and FILE.md beside it")
    top.add_argument("--compile", action="store_true", help="with torch.compile as a further baseline (slow to start on a CPU)")
    top.add_argument("--bf16", action="store_true", help="with products in bf16, ours and theirs under autocast, on a processor that multiplies it")
    top.add_argument("--memory", action="store_true", help="with peak memory, every provider of a step in a fresh process")
    top.add_argument("--profile", metavar="PROVIDER", help="in place of the times of all: those of one provider, and the ops that they go to (torch's profiler)")
    top.add_argument("--list", action="store_true", help="show the cases and leave")
    top.add_argument("--memory-of", metavar="PROVIDER", help=argparse.SUPPRESS)  # what --memory starts: one case, one size, one x; prints one number
    top.add_argument("--x", type=float, help=argparse.SUPPRESS)
    return top


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    sizes = arguments.size.split(",")
    chosen = [name for name in CASES if not arguments.names or any(name == given or name.startswith(given + "_") for given in arguments.names)]
    for kind, given, known in (("case", arguments.names, {*CASES, *(name.split("_")[0] for name in CASES)}), ("size", sizes, SIZES)):
        for name in given:
            if name not in known:
                return complain(f"no {kind} {name!r}; expected one of {', '.join(CASES if kind == 'case' else SIZES)}")
    if arguments.profile and (wrong := not_to_profile(arguments, [CASES[name] for name in chosen])):
        return complain(wrong)
    if arguments.list:
        print(listing())
        return 0
    with tempfile.TemporaryDirectory(prefix="peftdebias-bench-") as folder:
        settings = [(case, Setting(size, x, Path(folder), batches=arguments.batches, longest=min(128, SIZES[size].positions // 2)))
                    for case in map(CASES.get, chosen) for size in (sizes if case.sized else sizes[:1]) for x in case.x_values]
        if arguments.memory_of:
            case, setting = next((case, setting) for case, setting in settings if setting.x == arguments.x)
            print(json.dumps(measure.cpu_peak(case.providers[arguments.memory_of], setting)))
            return 0
        return run(settings, arguments)


def run(settings: list[tuple[Case, Setting]], arguments) -> int:
    """All equality checks, then all times."""
    taking_part = {case.name: lineup.taking_part(case, arguments.compile, say, bf16=arguments.bf16) for case, _ in settings}
    try:
        shares = [check(case, setting, taking_part[case.name]) for case, setting in settings]
    except equality.Unequal as red:
        print(red)
        return 1
    load, processors = os.getloadavg()[0], os.cpu_count()
    if load > 0.5 * processors:
        say(f"load average {load:.1f} on {processors} processors: the times will be those of a busy machine")
    if arguments.profile:
        for case, setting in settings:
            if arguments.profile in taking_part[case.name]:
                print(ops_table(case, setting, arguments.profile, arguments.repeats or setting.size.repeats) + "\n")
        return 0
    found = []
    for (case, setting), share in zip(settings, shares):
        say(f"{title(case, setting)}: timing")
        memory = memory_gauge(case, setting, arguments) if arguments.memory and case.mode == "step" else None
        found += measure.time_case(case, setting, taking_part[case.name], arguments.repeats or setting.size.repeats, shares=share, memory=memory, say=say)
    print(rows.table(found))
    if arguments.out:
        if not rows.saved(arguments.out, lambda: rows.write(arguments.out, found, f"Measured by bench/run.py on {found[0].device_name if found else 'nothing'}")):
            return 1
        say(f"result: {arguments.out} and {arguments.out.with_suffix('.md')}")
    return 0


def not_to_profile(arguments, cases: list[Case]) -> str | None:
    """Why --profile cannot be done, in words."""
    for flag, other in (("--out", arguments.out), ("--memory", arguments.memory)):
        if other:
            return f"--profile and {flag}: expected one of them"
    for case in cases:
        if arguments.profile not in case.providers:
            return f"--profile: {case.name} has no provider {arguments.profile!r}; expected one of {'; '.join(case.providers)}"
        if case.providers[arguments.profile].compiled and not arguments.compile:
            return f"--profile {arguments.profile!r}: expected --compile beside it"
        if case.providers[arguments.profile].bf16 and not arguments.bf16:
            return f"--profile {arguments.profile!r}: expected --bf16 beside it"
    return None


def check(case: Case, setting: Setting, providers: dict, results=equality.in_this_process) -> dict[str, float]:
    """equality.check with a line on standard error."""
    shares = equality.check(case, setting, providers, say, results)
    if shares:
        say(f"{title(case, setting)}: equal (largest difference {max(shares.values()):.2g} of the allowed one)")
    return shares


def memory_gauge(case: Case, setting: Setting, arguments):
    def gauge(provider: str) -> float | None:
        if case.providers[provider].compiled:
            return None  # a fresh process would count the compiler's memory
        command = [sys.executable, __file__, case.name, "--size", setting.size_name, "--batches", str(setting.number), "--x", str(setting.x),
                   "--memory-of", provider]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            say(f"{title(case, setting)}: {provider}: peak memory is not measured: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
            return None
        return json.loads(done.stdout.splitlines()[-1])

    return gauge


def title(case: Case, setting: Setting) -> str:
    return f"{case.name}, {setting.size_name}, {case.x_name} {setting.x:g}"


def listing() -> str:
    lines = []
    for case in CASES.values():
        values = ", ".join(f"{x:g}" for x in case.x_values)
        lines += [f"{case.name:<12} {case.mode:<8} {case.what}", f"{'':<22}{case.x_name} {values}; providers: {'; '.join(case.providers)}"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
