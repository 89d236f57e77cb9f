"""A small world on files, a random BERT of 2 layers and hidden 32, and the command line in one process: what the tests of runs stand on.

The fixture `small` writes them once in each process of the tests; nothing in there is changed by a test.
"""

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
from pathlib import Path

import pytest
import torch

from peftdebias import weights
from peftdebias.encoder import EncoderConfig, Model
from peftdebias.testbed import World, write
from peftdebias.tokens import STYLES, Tokenizer, wordpiece

POSITIONS = 64


@dataclasses.dataclass(frozen=True)
class Small:
    """corpus, heldout: texts. train, dev, test: labelled (hard_text, profession, gender). pairs: CrowS-Pairs. binary, paired: see `write_more`."""

    root: Path
    base: Path
    corpus: Path
    heldout: Path
    train: Path
    dev: Path
    test: Path
    pairs: Path
    binary: Path
    paired: Path

    def task(self, **changes) -> list[str]:
        """The flags of a short downstream run on the world's task."""
        flags = {"model": self.base, "train": self.train, "dev": self.dev, "test": self.test, "text": "hard_text", "label": "profession", "group": "gender",
                 "epochs": 2, "lr": 1e-3} | changes
        return flags_of(flags)

    def learning(self, **changes) -> list[str]:
        """The flags of a short upstream run."""
        flags = {"model": self.base, "axis": "gender", "corpus": self.corpus, "set": "rank=2", "steps": 6, "valid_every": 2, "lr": 1e-2, "batch_size": 16} | changes
        return flags_of(flags)


def flags_of(values: dict) -> list[str]:
    """{"batch_size": 16} -> ["--batch-size", "16"]; None leaves a flag out, True gives it without a value, a list repeats it."""
    found = []
    for name, value in values.items():
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                found += ["--" + name.replace("_", "-")] + ([] if one is True else [str(one)])
    return found


def tokenizer_of(world: World) -> Tokenizer:
    return wordpiece([*STYLES["bert"].values(), *world.vocabulary()])


def save_bert(folder: Path, tokenizer: Tokenizer, *, hidden: int = 32, layers: int = 2, seed: int = 0, mlm: bool = True) -> Path:
    """A random BERT as a Hugging Face folder. Its weights are large, so that answers differ from text to text."""
    config = EncoderConfig(kind="bert", layers=layers, hidden=hidden, heads=2, feed_forward=48, vocab=tokenizer.vocab_size, max_positions=POSITIONS, initializer_range=0.2)
    model = Model(config, mlm=mlm)
    model.initialize(model, torch.Generator().manual_seed(seed))
    return weights.save_model(model, folder, tokenizer)


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Small:
    root, world = tmp_path_factory.mktemp("small"), World(seed=3)
    files = write(world, root / "world", corpus=150, heldout=20, train=96, dev=40, test=60, pairs=12)
    base = save_bert(root / "base", tokenizer_of(world))
    rows = [json.loads(line) for line in files["train"].read_text().splitlines()]
    binary, paired = root / "world" / "binary.csv", root / "world" / "paired.tsv"
    with open(binary, "w", encoding="utf-8", newline="") as file:  # a label of two, 1 rare
        table = csv.writer(file)
        table.writerows([["text", "is_health"], *([r["hard_text"], int(r["profession"] in ("nurse", "surgeon"))] for r in rows)])
    paired.write_text("first\tsecond\tsame\n" + "".join(f"{a['hard_text']}\t{b['hard_text']}\t{'yes' if a['gender'] == b['gender'] else 'no'}\n"
                                                       for a, b in zip(rows, rows[1:])), encoding="utf-8")
    return Small(root, base, **{name: files[name] for name in ("corpus", "heldout", "train", "dev", "test", "pairs")}, binary=binary, paired=paired)


# ---------------------------------------------------------------- the command line in this process

@dataclasses.dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[dict]:
        """Standard output as jsonl."""
        return [json.loads(line) for line in self.out.splitlines()]


def cli(*argv) -> Said:
    """`peftdebias ARGV`: its exit code and what it printed."""
    from peftdebias.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(a) for a in argv])
        except SystemExit as stop:
            code = stop.code
    return Said(code, out.getvalue(), err.getvalue())


def done(*argv) -> Said:
    """The same; it must succeed."""
    said = cli(*argv)
    assert said.code == 0, said.err
    return said


def learn(small: Small, tmp_path: Path, text: str, **changes) -> Said:
    """Two steps upstream on `text`, into the folder run; `changes` to the options."""
    path = tmp_path / "c.txt"
    path.write_text(text)
    return cli("upstream", *small.learning(out=tmp_path / "run", corpus=path, steps=2, **changes))


# ---------------------------------------------------------------- files

def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tree(folder: Path) -> dict[str, str]:
    """Every path under `folder`, hidden ones too: of files their checksum."""
    return {str(p.relative_to(folder)): sha256(p) if p.is_file() else "" for p in sorted(folder.rglob("*"))}


def lines(path: Path) -> list[dict]:
    """A jsonl file; a number that is no JSON (NaN, Infinity) is an error."""
    def refuse(name):
        raise AssertionError(f"{path}: {name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


def without_times(path) -> list[dict]:
    return [{k: v for k, v in event.items() if k not in ("seconds", "tokens_per_second", "waiting")} for event in lines(path)]
