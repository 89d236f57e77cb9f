"""The whole method on the small world of testbed.py: pretrain a tiny BERT, debias it upstream, classify downstream, measure before and after.

Every step is the public command on files in the demo's folder, so each can be run again by hand; only the pretraining (plain masked-LM, no
counterfactuals) is done here.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from . import phases, weights
from .buckets import in_memory
from .config import Demo, Downstream, Evaluate, Upstream
from .encoder import EncoderConfig, Model
from .errors import ConfigError
from .evaluation import evaluate
from .metrics import Measure
from .outputs import alone, claiming, vacant
from .patch import all_parameters, train_only
from .tasks import MaskedLM
from .testbed import World, write
from .tokens import STYLES, Tokenizer, wordpiece
from .training import Schedule, train

LAYERS, HIDDEN, HEADS = 2, 128, 4
PRETRAINING_STEPS, UPSTREAM_STEPS, EPOCHS = 1200, 600, 3
LEARNING_RATES = {"pretraining": 1e-3, "upstream": 3e-3, "downstream": 5e-4}
MARK = "demo.json"
RUNS = ("gender", "plain", "debiased")
"""The run folders that a demo leaves."""
MADE = ("world", "base", *RUNS, "report.html", "metrics.json")
"""All that a demo, or the report of one, leaves beside its mark."""
SCORING = "crows-pairs/bias-bench/all"


def world_tokenizer(world: World) -> Tokenizer:
    """WordPiece over the world's own words, every one a token."""
    return wordpiece([*STYLES["bert"].values(), *world.vocabulary()])


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A base to pretrain: its size, how wide its first weights are drawn (standard deviation), and its training."""

    hidden: int
    steps: int
    lr: float
    initializer_range: float = 0.02


def pretrain(corpus: Path, tokenizer: Tokenizer, folder: Path, seed: int, tiny: Tiny) -> None:
    """A tiny BERT trained by plain masked-LM on corpus.txt, saved as a Hugging Face folder. Its first 200 texts choose the best epoch and are in no figure; short as a world's
    texts are, about a quarter of them stand among those that are trained on too."""
    config = EncoderConfig(kind="bert", layers=LAYERS, hidden=tiny.hidden, heads=HEADS, feed_forward=4 * tiny.hidden, vocab=tokenizer.vocab_size, max_positions=128,
                           dropout=0.0, attention_dropout=0.0, classifier_dropout=0.0, initializer_range=tiny.initializer_range)
    model = Model(config, mlm=True)
    model.initialize(model, torch.Generator().manual_seed(seed))
    texts = corpus.read_text(encoding="utf-8").splitlines()
    encoded = [[e.ids] for e in tokenizer.encode(texts, max_length=config.max_positions)]
    task = MaskedLM(in_memory(encoded[200:], tokenizer, seed=seed, batch={"batch_size": 64}), encoded[:200], tokenizer, seed=seed)
    trained = all_parameters(model)
    train_only(model, trained.values())
    train(model, task, trained, Schedule(steps=tiny.steps, lr=tiny.lr, weight_decay=0.01, seed=seed), label="pretraining")
    weights.save_model(model, folder, tokenizer)


def stereotype_preference(measures: list[Measure]) -> float:
    """|share of matched pairs in which the stereotype is preferred - 0.5|, from CrowS-Pairs' bias-bench scoring; 0 is ideal, range 0 to 0.5."""
    share = next(m for m in measures if m.name == SCORING)
    return abs(share.value / 100 - 0.5)


def demo(settings: Demo, say: Callable[[str], None] = lambda line: None) -> str:
    """Run it all in settings.out and return the table; `say` hears of each step. An earlier demo there is replaced, whatever else is there is not: ConfigError, as where
    another process is at work."""
    out = Path(settings.out)
    world = World(text_link=settings.strength, label_link=settings.label_strength, seed=settings.seed)
    about = {"strength": settings.strength, "label_strength": settings.label_strength, "seed": settings.seed}
    earlier = (out / MARK).exists()
    if not earlier and out.exists() and not vacant(out):
        raise ConfigError(f"--out {out}: exists and is no earlier demo; expected a new folder")
    with claiming(out):
        if not earlier:
            with contextlib.suppress(FileExistsError):  # another one has begun there meanwhile, and says so below
                open(out / MARK, "x").close()
    with alone(out / MARK, f"--out {out}"):
        _write_mark(out, about, None)
        if earlier:
            say(f"{out}: an earlier demo, replaced")
            for path in (out / name for name in MADE):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        rows = _run(settings, world, out, say)
        _write_mark(out, about, rows)
    return render(rows, out)


def _run(settings: Demo, world: World, out: Path, say: Callable[[str], None]) -> list[dict]:
    """The four steps in a folder that is ours; the rows of the table."""
    files = write(world, out / "world")
    tokenizer = world_tokenizer(world)
    base = out / "base"
    say(f"1 of 4: pretraining a BERT of {LAYERS} layers, hidden {HIDDEN}, on 20,000 biographies (plain masked-LM, {PRETRAINING_STEPS} steps)")
    pretrain(files["corpus"], tokenizer, base, settings.seed, Tiny(HIDDEN, PRETRAINING_STEPS, LEARNING_RATES["pretraining"]))
    upstream = Upstream(model=str(base), axis="gender", method="lora", corpus=(str(files["corpus"]),), out=str(out / "gender"), budget=0.01, steps=UPSTREAM_STEPS,
                        valid_every=100, lr=LEARNING_RATES["upstream"], batch_size=64, max_length=128, seed=settings.seed)
    say(f"2 of 4: upstream, LoRA of 1 % of the base on counterfactual pairs ({UPSTREAM_STEPS} steps)")
    phases.upstream(upstream)
    say("3 of 4: measuring the masked-LM before and after")
    rows = []
    for name, adapters, kept in (("base", (), "-base"), ("base + LoRA", (upstream.out,), "")):
        measures = evaluate(Evaluate(model=str(base), adapter=adapters, on=(f"crows-pairs={files['pairs']}", f"perplexity={files['heldout']}"), max_length=128,
                                     seed=settings.seed, json=str(out / "gender" / f"evaluation{kept}.json"),
                                     examples=str(out / "gender" / f"examples{kept}.jsonl"))).measures
        loss = next(m for m in measures if m.name == "mlm-loss")
        rows.append({"system": name, "mlm_loss": loss.value, "stereotype_preference": stereotype_preference(measures)})
    say(f"4 of 4: downstream, classifying occupations with plain fine-tuning and under the frozen LoRA ({EPOCHS} epochs each)")
    for name, folder, adapters in (("plain fine-tuning", "plain", ()), ("LoRA, frozen", "debiased", (upstream.out,))):
        result = phases.downstream(Downstream(model=str(base), adapter=adapters, train=str(files["train"]), dev=str(files["dev"]), test=str(files["test"]),
                                              text="hard_text", label="profession", group="gender", epochs=EPOCHS, lr=LEARNING_RATES["downstream"],
                                              max_length=128, out=str(out / folder), seed=settings.seed))
        evaluate(Evaluate(model=str(result.out), on=(f"classification={files['test']}", f"counterfactual={files['test']}"), axis="gender", seed=settings.seed,
                          json=str(result.out / "evaluation.json"), examples=str(result.out / "examples.jsonl")))
        found = {m.name: m for m in result.measures}
        rows.append({"system": name, "accuracy": found["accuracy"].value, "tpr_gap": found["tpr-gap/rms"].value, "floor": found["tpr-gap/rms-shuffled"].value,
                     "intervals": {key: [found[key].low, found[key].high] for key in ("accuracy", "tpr-gap/rms")}})
    return rows


def _write_mark(out: Path, about: dict, rows: list[dict] | None) -> None:
    """demo.json: what the folder is, and the table once there is one."""
    (out / MARK).write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n", encoding="utf-8")  # in its place: it is locked as the file that it is


def render(rows: list[dict], out: Path) -> str:
    """The table for people, and where the files lie."""
    first, second = rows[:2], rows[2:]
    lines = [f"{'masked-LM (upstream)':<24}{'MLM loss, nats':>16}{'stereotype preference':>24}"]
    lines += [f"  {r['system']:<22}{r['mlm_loss']:>16.3f}{r['stereotype_preference']:>24.3f}" for r in first]
    lines += ["", f"{'classifier (downstream)':<24}{'accuracy, %':>16}{'TPR-GAP rms, points':>24}{'of which chance':>18}"]
    lines += [f"  {r['system']:<22}{r['accuracy']:>16.1f}{r['tpr_gap']:>24.1f}{r['floor']:>18.1f}" for r in second]
    lines += ["", "MLM loss on held-out text balanced between the genders; stereotype preference 0 is ideal, 0.5 the most; TPR-GAP 0 is ideal, and chance",
              "alone gives what stands beside it. One seed of a made-up world: it shows that everything works, not how well the method does.",
              f"files: {out}/world (texts), {out}/base (model), {out}/gender (LoRA), {out}/plain and {out}/debiased (classifiers)"]
    return "\n".join(lines)
