"""The corpus pipeline: its speed beside the tokenizer's alone, its memory on files of 1 and 3 GB, and how long training waits for it.

    python bench/stream.py speed                         read, swap, tokenise and pack against encode_batch_fast on the same texts and threads
    python bench/stream.py memory --gigabytes 1 3        peak memory over all processes while batches are taken for --seconds, and while all is read and swapped
    python bench/stream.py waiting                       share of the steps' time in which an upstream run waits, for one window and for many

Prints one JSON object a line, with machine, load and commit. Speeds are medians over --repeats, the two sides in turn, in this process with `--threads`
for tokenising; ratio_of_pairs is the median over neighbours (for a machine whose speed drifts), ratio_of_cpu that of processor time. It packs without masking; `with_masks` is one run with it. The files of `memory` are the corpus
repeated, written to --folder and deleted afterwards; tokenising 3 GB takes a long time, so the batches are taken for a bounded time (--seconds; many windows), and
reading and swapping run over the whole file in a process of their own. peak_mb is what the processes themselves hold (anonymous and shared memory, each page once);
peak_pss_mb adds libraries' pages, divided by all who have them mapped: it moves when some other program ends.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from arguments import Parser, above_zero, complain, existing_file, existing_folder, positive  # noqa: E402
from peftdebias.errors import PeftDebiasError  # noqa: E402


def shared() -> Path:
    return Path(os.environ.get("PEFTDEBIAS_SHARED") or ROOT.parent / "shared")


def recipe(arguments, file: str | Path, **changes):
    from peftdebias.axes import load_axis
    from peftdebias.stream import Recipe
    from peftdebias.tokens import load_tokenizer

    options = {"seed": 0, "batch": {"batch_size": 32}, "threads": arguments.threads} | changes
    return Recipe((str(file),), load_axis("gender"), load_tokenizer(arguments.model), 256, **options)


def show(**line) -> None:
    from bench.rows import machine

    print(json.dumps(line | machine()), flush=True)


# ---------------------------------------------------------------- speed

def speed(arguments) -> None:
    from peftdebias import buckets, corpus, lines
    from peftdebias.cda_engine import expand
    from peftdebias.stream import Ended, Stream

    ready = recipe(arguments, arguments.corpus, buffer=arguments.buffer)
    members = []  # by the block, as the pipeline hands them over
    for chunk in corpus.chunks(ready.files):
        members.append(expand(chunk.texts, ready.axis).texts)
    texts, size = sum(map(len, members)), os.path.getsize(arguments.corpus)
    original = buckets.mask_flat

    def alone() -> dict:
        began, used = time.perf_counter(), time.process_time()
        for block in members:
            ready.tokenizer.backend.encode_batch_fast(block, add_special_tokens=False)
        return {"seconds": time.perf_counter() - began, "cpu": time.process_time() - used}

    def pipeline(masked: bool = False) -> dict:
        buckets.mask_flat = original if masked else lambda ids, lengths, *others, **more: (ids, lengths, lengths, lengths)
        began, used = time.perf_counter(), time.process_time()
        events = Stream(ready).run()
        while not isinstance(next(events), Ended):
            pass
        found = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - used}
        events.close()
        buckets.mask_flat = original
        return found

    found = {"encode_batch_fast": [], "pipeline": []}
    for repeat in range(arguments.repeats):
        for name, run in (("encode_batch_fast", alone), ("pipeline", pipeline))[:: 1 if repeat % 2 else -1]:
            found[name].append(run())
    pairs = list(zip(*found.values()))
    middle = {name: statistics.median(run["seconds"] for run in runs) for name, runs in found.items()}
    show(measure="speed", threads=arguments.threads, texts=texts, input_mb=round(size / 1e6, 1), block=lines.BLOCK,
         seconds={name: [round(run["seconds"], 2) for run in runs] for name, runs in found.items()}, median={name: round(s, 2) for name, s in middle.items()},
         ratio=round(middle["pipeline"] / middle["encode_batch_fast"], 3), ratio_of_pairs=round(statistics.median(b["seconds"] / a["seconds"] for a, b in pairs), 3),
         ratio_of_cpu=round(statistics.median(b["cpu"] / a["cpu"] for a, b in pairs), 3), input_mb_a_second=round(size / 1e6 / middle["pipeline"], 2),
         with_masks=round(pipeline(masked=True)["seconds"], 2), buffer=ready.buffer)


# ---------------------------------------------------------------- memory

def memory(arguments) -> None:
    for gigabytes in arguments.gigabytes:
        with tempfile.TemporaryDirectory(prefix="peftdebias-stream-", dir=arguments.folder) as folder:
            file, text = Path(folder) / "corpus.txt", Path(arguments.corpus).read_bytes()
            with open(file, "wb") as out:
                while out.tell() < gigabytes * 1e9:
                    out.write(text)
            for what in arguments.what:
                words = [sys.executable, __file__, "take", what, str(file), "--seconds", str(arguments.seconds), "--threads", str(arguments.threads), "--model", str(arguments.model)]
                process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
                peak: dict = {"pss": 0, "own": 0}
                watcher = threading.Thread(target=watch, args=(process, peak))
                watcher.start()
                try:
                    said = process.communicate()[0]
                finally:
                    process.terminate()  # where this one was stopped
                    watcher.join()
                if process.returncode < 0:  # killed, it could not say why
                    sys.exit(complain(f"{what}: expected the process that is watched to last, got it ended by signal {-process.returncode} (out of memory?)"))
                if process.returncode:
                    sys.exit(process.returncode)  # it has said why
                show(measure="memory", what=what, gigabytes=round(file.stat().st_size / 1e9, 4), peak_mb=round(peak["own"] / 1e6, 1), processes=peak["processes"], peak_pss_mb=round(peak["pss"] / 1e6, 1),
                     **json.loads(said))


def watch(process: subprocess.Popen, peak: dict) -> None:
    """The largest sums over the process and its descendants, in bytes: own memory, and PSS."""
    while process.poll() is None:
        found = [sizes(pid) for pid in family(process.pid)]
        own = [own for own, _ in found]
        if sum(own) > peak["own"]:
            peak.update(own=sum(own), processes=[round(p / 1e6, 1) for p in own])
        peak["pss"] = max(peak["pss"], sum(pss for _, pss in found))
        time.sleep(0.2)


def family(pid: int) -> list[int]:
    children = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            children.setdefault(int(status.read_text().rpartition(")")[2].split()[1]), []).append(int(status.parent.name))
        except OSError:
            pass  # it has ended
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def sizes(pid: int) -> tuple[int, int]:
    """(anonymous and shared memory, PSS) of a process, in bytes; each page divided by those who have it mapped."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0, 0
    parts = {name: 1024 * int(size) for name, size in re.findall(r"^(Pss\w*):\s+(\d+)", rollup, re.M)}
    return parts.get("Pss_Anon", 0) + parts.get("Pss_Shmem", 0), parts.get("Pss", 0)


def take(arguments) -> None:
    """What `memory` watches: batches for a time, as tensors; or everything read and swapped."""
    began = time.perf_counter()
    if arguments.what == "batches":
        from peftdebias.batches import from_packed
        from peftdebias.worker import Epochs

        texts, batches = 0, 0
        with Epochs(recipe(arguments, arguments.file), arguments.threads) as epochs:
            for packed in epochs.epoch(0):
                texts, batches = texts + len(from_packed(packed).lengths), batches + 1
                if time.perf_counter() - began > arguments.seconds:
                    break
        print(json.dumps({"batches": batches, "texts": texts, "windows": epochs.position["window"] + 1, "seconds": round(time.perf_counter() - began)}))
    else:
        from peftdebias.lines import Skipped
        from peftdebias.stream import Start, _expanded

        texts = sum(made[3] for made in _expanded(recipe(arguments, arguments.file), Start(), Skipped(), None))
        print(json.dumps({"texts": texts, "seconds": round(time.perf_counter() - began)}))


# ---------------------------------------------------------------- waiting

def waiting(arguments) -> None:
    for buffer in (131072, 8192):
        with tempfile.TemporaryDirectory(prefix="peftdebias-stream-") as folder:
            words = ["upstream", "--model", arguments.model, "--axis", "gender", "--corpus", arguments.corpus, "--steps", arguments.steps, "--valid-every", arguments.steps,
                     "--valid-texts", 50, "--set", "rank=4", "--shuffle-buffer", buffer, "--workers", arguments.threads, "--out", Path(folder) / "run"]
            done = subprocess.run([sys.executable, "-m", "peftdebias", *map(str, words)], capture_output=True, text=True, cwd=ROOT)
            if done.returncode:
                sys.exit(complain((done.stderr.splitlines() or ["upstream failed"])[-1].removeprefix("peftdebias: ")))
            events = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
        steps = [event for event in events if event["event"] == "step"]
        show(measure="waiting", model=Path(arguments.model).name, shuffle_buffer=buffer, workers=arguments.threads, steps=arguments.steps, seconds=events[-1]["seconds"],
             waiting_percent=round(100 * events[-1]["waiting"], 2), tokens_per_second=steps[-1]["tokens_per_second"], torch_threads=os.environ.get("OMP_NUM_THREADS", "all"))


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{speed,memory,waiting}")
    for name, run in (("speed", speed), ("memory", memory), ("waiting", waiting), ("take", take)):
        one = commands.add_parser(name)
        one.set_defaults(run=run)
        one.add_argument("--threads", type=positive, default=2)
        one.add_argument("--corpus", type=existing_file, default=str(shared() / "data" / "corpus" / "bug_upstream.txt"))
        one.add_argument("--model", type=existing_folder, default=str(shared() / "models" / "bert-tiny-mlm"))
        if name == "speed":
            one.add_argument("--repeats", type=positive, default=9)
            one.add_argument("--buffer", type=positive, default=131072)
        if name == "memory":
            one.add_argument("--gigabytes", type=above_zero, nargs="+", default=[1, 3])
            one.add_argument("--what", nargs="+", choices=("batches", "swapped"), default=["batches", "swapped"])
            one.add_argument("--folder", type=existing_folder)
        if name in ("memory", "take"):
            one.add_argument("--seconds", type=above_zero, default=120)
        if name == "waiting":
            one.add_argument("--steps", type=positive, default=1500)
        if name == "take":
            one.add_argument("what")
            one.add_argument("file")
    arguments = parser.parse_args()
    if arguments.command == "speed":  # before the tokenizer starts its threads
        os.environ |= {"RAYON_NUM_THREADS": str(arguments.threads), "TOKENIZERS_PARALLELISM": "true"}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was made is taken away
    try:
        arguments.run(arguments)
    except PeftDebiasError as error:
        sys.exit(complain(str(error)))


if __name__ == "__main__":
    main()
