"""One unit of the testbed: one system, in the world of one seed, with a link of one strength planted in one place.

    place "text"     the pretraining text carries the link. method none: a tiny BERT is pretrained on it and measured; else: the method, learnt upstream on that base
    place "labels"   the task carries the link. method none: plain fine-tuning; else: the same under the frozen module. Both start from a base of place "text"

A unit keeps its figures in unit.json, written last and whole: a unit that has one is done. Test texts are the same at every strength and carry no link
(genders even in every occupation, texts in matched pairs), so figures of different strengths can be compared.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .. import methods, phases
from ..checkpoint import Run, load_run, versions
from ..config import Downstream, Evaluate, Upstream
from ..demo import Tiny, pretrain, stereotype_preference, world_tokenizer
from ..errors import ConfigError
from ..evaluation import evaluate_run
from ..metrics import Measure, crows_pairs
from ..metrics.bootstrap import mean_interval
from ..metrics.causal import gender_effect
from ..outputs import write_text
from ..tasks import class_probabilities, labelled_samples
from ..testbed import World

NONE = "none"
BUDGET = 0.01
LONGEST = 64  # tokens; the world's texts are shorter, and a prompt of 1 % needs room
HIDDEN, SPREAD = 64, 0.08  # of the base. Drawn as narrowly as BERT is (0.02), it would learn the link only after thousands of steps
RATES = {"pretraining": 4e-3, "downstream": 2e-3, "full": 5e-3, "adapter": 1e-2, "prefix": 1e-1, "prompt": 5e-2, "lora": 1e-2, "sparse": 6e-2, "ia3": 1e-1, "bias": 5e-2}  # every method has one
OPTIONS = {"sparse": {"l1": 10.0, "first_rate": 0.05}}  # others as they are; the rate is the k values', at which the whole base would be lost
KEPT = ("accuracy", "tpr-gap/rms", "tpr-gap/rms-shuffled")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Numbers of texts, pairs, examples and steps."""

    corpus: int = 20_000
    heldout: int = 1_000
    pairs: int = 500
    train: int = 3_000
    dev: int = 300
    test: int = 1_500
    pretraining: int = 3_000
    upstream: int = 1_200
    batch: int = 64
    task_batch: int = 32
    epochs: int = 4

    @classmethod
    def scaled(cls, scale: float) -> "Sizes":
        """All but the batches and the epochs times `scale`, but no fewer than it takes to run: every occupation in both genders in every file."""
        least = {"corpus": 400, "heldout": 20, "pairs": 20, "train": 200, "dev": 60, "test": 300, "pretraining": 2, "upstream": 2}
        return dataclasses.replace(cls(), **{name: max(n, round(scale * getattr(cls, name))) for name, n in least.items()})


@dataclasses.dataclass(frozen=True)
class Unit:
    place: str  # "text" or "labels"
    strength: float
    seed: int
    method: str = NONE

    def __str__(self) -> str:
        return f"{self.place} {self.strength:g}, seed {self.seed}, {self.method}"

    def folder(self, out: Path) -> Path:
        short = f"{self.strength:g}"  # of up to six digits; two strengths have two folders
        return out / "units" / f"{self.place}-{short if float(short) == self.strength else repr(self.strength)}" / f"seed-{self.seed}" / self.method


@dataclasses.dataclass(frozen=True)
class Plan:
    """What all units share. out: the folder. start: strength in the text of the bases that the tasks start from. sizes: see Sizes. attribute_weight:
    upstream's; where a gendered word is masked the counterfactual has something to say, and nowhere else."""

    out: Path
    start: float
    sizes: Sizes
    attribute_weight: float = 10.0

    def made_of(self, unit: Unit) -> dict:
        """All that a unit's figures follow from, besides the unit itself and the program: numbers of texts and steps, learning rates, the base's shape."""
        sizes, rates = ["corpus", "heldout", "pairs", "pretraining"], ["pretraining"]
        if unit.method != NONE:
            sizes, rates = [*sizes, "upstream", "batch"], [*rates, unit.method]
        if unit.place == "labels":
            sizes, rates = [*sizes, "train", "dev", "test", "epochs", "task_batch"], [*rates, "downstream"]
        made = {"sizes": {name: getattr(self.sizes, name) for name in sizes}, "rates": {name: RATES[name] for name in rates}, "hidden": HIDDEN, "drawn": SPREAD}
        made |= {"attribute_weight": self.attribute_weight, "options": OPTIONS.get(unit.method)} if unit.method != NONE else {}
        return made | ({"start": self.start} if unit.place == "labels" else {})

    def needs(self, unit: Unit) -> list[Unit]:
        """What must be there before."""
        if unit.place == "text":
            return [] if unit.method == NONE else [dataclasses.replace(unit, method=NONE)]
        learnt = Unit("text", self.start, unit.seed, unit.method)
        return [learnt] if unit.method == NONE else [dataclasses.replace(unit, method=NONE), learnt]

    def result(self, unit: Unit) -> dict | None:
        """What the unit left, or None. Raises ConfigError where it was made of something else, or is no longer JSON."""
        path = unit.folder(self.out) / "unit.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            made = dict(found["made_of"])
            figures = [(figure["unit"], figure["ideal"], figure["value"] or 0) for figure in found["figures"].values()]
            sum([found["parameters"], found["seconds"], found["cpu_seconds"], *(value for *_, value in figures)])  # numbers, or it raises
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ConfigError(f"{path}: expected the figures of a unit, got something else; delete it and it is made again") from None
        if made != self.made_of(unit):
            mine = self.made_of(unit)
            odd = next(key for key in {**made, **mine} if made.get(key) != mine.get(key))
            raise ConfigError(f"--out {self.out}: holds units of other settings; expected {odd} {mine.get(odd)}, got {made.get(odd)} in {path} (another --out, or the "
                              "settings of before)")
        return found

    def run(self, unit: Unit) -> dict:
        """Compute the unit and keep it: {unit, made_of, figures: {name: Measure as JSON}, parameters, seconds, cpu_seconds, versions}.

        On one thread, so that it repeats bit for bit. A unit that was stopped half-way is made from the start.
        """
        folder, threads = unit.folder(self.out), torch.get_num_threads()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        torch.set_num_threads(1)
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            measures, parameters = COMPUTE[unit.place](self, unit, folder)
        finally:
            torch.set_num_threads(threads)
        found = {"unit": dataclasses.asdict(unit), "made_of": self.made_of(unit), "figures": {m.name: m.as_json() for m in measures}, "parameters": parameters,
                 "seconds": round(time.perf_counter() - wall, 2), "cpu_seconds": round(time.process_time() - cpu, 2), "versions": versions()}
        write_text(folder / "unit.json", json.dumps(found, indent=1) + "\n")
        return found

    def world(self, unit: Unit) -> World:
        return World(text_link=unit.strength if unit.place == "text" else self.start, label_link=unit.strength if unit.place == "labels" else 0.0, seed=unit.seed)


def trains_base(method: str) -> bool:
    return method != NONE and methods.method_class(method).trains_base


# ---------------------------------------------------------------- the link in the text

def text_unit(plan: Plan, unit: Unit, folder: Path) -> tuple[list[Measure], int]:
    """The masked-LM's figures, and how many parameters were trained."""
    world, files, sizes = plan.world(unit), dataclasses.replace(unit, method=NONE).folder(plan.out), plan.sizes
    corpus, heldout, base = files / "corpus.txt", files / "heldout.txt", files / "model"
    if unit.method == NONE:
        _write(corpus, world.pretraining_texts(sizes.corpus))
        _write(heldout, world.balanced_texts(sizes.heldout))
        pretrain(corpus, world_tokenizer(world), base, unit.seed, Tiny(HIDDEN, sizes.pretraining, RATES["pretraining"], SPREAD))
        run = load_run(base)
        trained = methods.base_parameters(run.model.config)
    else:
        whole, fixed = trains_base(unit.method), methods.method_class(unit.method).size is None
        phases.upstream(Upstream(model=str(base), axis="gender", method=unit.method, corpus=(str(corpus),), workers=0, out=str(folder / "run"), budget=None if fixed else BUDGET,
                                 steps=sizes.upstream, valid_every=sizes.upstream, lr=RATES[unit.method], batch_size=sizes.batch, max_length=LONGEST,
                                 attribute_weight=plan.attribute_weight, set=OPTIONS.get(unit.method), seed=unit.seed, cache=str(plan.out / "cache")))
        run = load_run(folder / "run") if whole else load_run(base, (str(folder / "run"),))
        trained = methods.base_parameters(run.model.config) if whole else next(iter(run.model.methods.values())).count()
    return masked_lm_measures(run, world, heldout, sizes.pairs, unit.seed), trained


def masked_lm_measures(run: Run, world: World, heldout: Path, pairs: int, seed: int) -> list[Measure]:
    """stereotype-preference (share, ideal 0, range 0 to 0.5) and, behind it, stereotype-log-odds (nats, ideal 0): mean of log P(stereotype) - log P(other) of
    the one word in which a pair differs; mlm-loss and perplexity on `heldout`.

    The preference counts signs: half the log-odds leave it nearly where it was. Both are needed.
    """
    pairs = [crows_pairs.Pair(p.stereotypical, p.antistereotypical, "gender") for p in world.stereotype_pairs(pairs)]
    scored = crows_pairs.score_pairs(run.model, run.tokenizer, pairs, "bias-bench")
    share = crows_pairs.measures(scored, "bias-bench", seed=seed)[0]
    odds = [s.more - s.less for s in scored]
    low, high = (bound / 100 - 0.5 for bound in (share.low, share.high))
    folded = (0.0 if low < 0 < high else min(abs(low), abs(high)), max(abs(low), abs(high)))
    lm = evaluate_run(run, Evaluate(model="base", on=(f"perplexity={heldout}",), max_length=LONGEST, samples=200, seed=seed)).measures
    return [share, Measure("stereotype-preference", stereotype_preference([share]), "1", 0.0, *folded, share.n),
            Measure("stereotype-log-odds", sum(odds) / len(odds), "nats", 0.0, *mean_interval(odds, seed=seed), len(odds)), *lm]


# ---------------------------------------------------------------- the link in the labels

def labels_unit(plan: Plan, unit: Unit, folder: Path) -> tuple[list[Measure], int]:
    """The classifier's figures, and how many parameters the frozen module has. The classifier itself is not kept."""
    world, files, sizes = plan.world(unit), dataclasses.replace(unit, method=NONE).folder(plan.out), plan.sizes
    paths = {name: files / f"{name}.jsonl" for name in ("train", "dev", "test")}
    if unit.method == NONE:
        for name, path in paths.items():  # what is learnt and chosen on carries the link, what is measured on does not
            _write(path, [json.dumps(row) for row in world.task_examples(getattr(sizes, name), name, link=0.0 if name == "test" else None)])
    base, module = Unit("text", plan.start, unit.seed).folder(plan.out) / "model", Unit("text", plan.start, unit.seed, unit.method).folder(plan.out) / "run"
    model, adapters = (module, ()) if trains_base(unit.method) else (base, () if unit.method == NONE else (str(module),))
    result = phases.downstream(Downstream(model=str(model), adapter=adapters, train=str(paths["train"]), dev=str(paths["dev"]), test=str(paths["test"]),
                                          text="hard_text", label="profession", group="gender", epochs=sizes.epochs, lr=RATES["downstream"], batch_size=sizes.task_batch,
                                          max_length=LONGEST, out=str(folder / "run"), seed=unit.seed))
    run = load_run(folder / "run")
    measures = [m for m in result.measures if m.name in KEPT] + causal_measures(run, world, sizes.pairs, unit.seed)
    count = sum(method.count() for method in run.model.methods.values())
    shutil.rmtree(folder / "run")
    return measures, count


def causal_measures(run: Run, world: World, pairs: int, seed: int) -> list[Measure]:
    """metrics.causal on the world's matched pairs of the task."""
    pairs = world.counterfactual_task_pairs(pairs)

    def answers(texts: list[str]):
        return class_probabilities(run.model, labelled_samples(run.tokenizer.encode(texts, max_length=LONGEST)))

    first, second = answers([p.hard_text for p in pairs]), answers([p.counterfactual for p in pairs])
    return gender_effect(first, second, [p.gender for p in pairs], run.model.classifier.labels, dict(world.occupations), seed=seed)


COMPUTE: dict[str, Callable[[Plan, Unit, Path], tuple[list[Measure], int]]] = {"text": text_unit, "labels": labels_unit}


def _write(path: Path, lines: list[str]) -> None:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
