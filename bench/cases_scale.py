"""Work whose time and memory are to grow with one thing: one upstream step of LoRA, or one epoch of a corpus made into batches. The models and texts are drawn.

What it adds over cases_steps.py: every size is free, and nobody is compared with. It leaves out the clock, the fit and the drawing (scale.py).

Letters: T tokens, n tokens of a text.
"""

import dataclasses
import types
from collections.abc import Callable
from pathlib import Path

import numpy
import torch

from peftdebias import methods, patch, training
from peftdebias.axes import load_axis
from peftdebias.batches import Sample, pack
from peftdebias.encoder import EncoderConfig, Model
from peftdebias.stream import Ended, Recipe, Stream
from peftdebias.tasks import mlm_loss
from peftdebias.testbed import World, write
from peftdebias.tokens import STYLES, wordpiece

from .case import Work
from .texts import MASK_SHARE

SAVING = "peftdebias, --save-memory"


@dataclasses.dataclass(frozen=True)
class Shape:
    """A step: the model (heads are 64 wide where that divides its width), LoRA's rank, the texts of a batch, and how many LoRA modules are composed, of which the last is trained."""

    layers: int = 4
    hidden: int = 256
    rank: int = 8
    sequences: int = 16
    length: int = 64
    modules: int = 1
    vocab: int = 8192
    corpus: int = 0  # texts; a step has none

    @property
    def words(self) -> str:
        return (f"{self.layers} layers x {self.hidden}, feed-forward {4 * self.hidden}, vocabulary {self.vocab}; LoRA r={self.rank} on query and value; {self.sequences} texts of "
                f"{self.length} tokens, {MASK_SHARE:.0%} masked; dropout 0.1; float32")


@dataclasses.dataclass(frozen=True)
class Growth:
    """shape: x -> Shape. expected: why the exponent is what it is, in words. both: with --save-memory beside it."""

    values: tuple[int, ...]
    shape: Callable[[int], Shape]
    expected: str
    both: bool = False


TOKENS = 2048  # of a batch whose texts grow longer
GROWTHS = {
    "tokens": Growth((256, 512, 1024, 2048, 4096), lambda x: Shape(sequences=x // 64), "every product is linear in the tokens of a batch"),
    "length": Growth((32, 64, 128, 256, 512), lambda x: Shape(sequences=TOKENS // x, length=x), f"{TOKENS} tokens a batch: attention alone grows, in time as n; no probabilities are kept, so memory stays"),
    "layers": Growth((1, 2, 4, 8, 12), lambda x: Shape(layers=x), "a layer costs as much as the one before it; the last, on the rows asked for, less, and the head is an offset", both=True),
    "width": Growth((64, 128, 256, 512, 768), lambda x: Shape(hidden=x), "products grow with the square, activations linearly"),
    "rank": Growth((1, 4, 16, 64, 256), lambda x: Shape(rank=x), "the two thin products of a linear are small beside it up to ranks near its width"),
    "modules": Growth((1, 2, 4, 8), lambda x: Shape(modules=x), "modules on the same linears add their deltas to its weight before the product"),
    "corpus": Growth((1000, 2000, 4000, 8000, 16000), lambda x: Shape(corpus=x), "texts are read, swapped, tokenised and packed as a stream, in windows of 2048 texts: memory grows far less than the corpus"),
}
"""What grows -> Growth."""
SMALL = {"tokens": (64, 128), "length": (32, 64), "layers": (1, 2), "width": (64, 128), "rank": (1, 2), "modules": (1, 2), "corpus": (40, 80)}
"""Values for the tests."""


def build(shape: Shape, save_memory: bool, folder: Path) -> Work:
    """run: one step, or one epoch. held: for a step a function, MiB that its forward pass keeps for the backward."""
    return epoch_of(shape, folder) if shape.corpus else step_of(shape, save_memory)


def step_of(shape: Shape, save_memory: bool) -> Work:
    heads = shape.hidden // 64 if shape.hidden % 64 == 0 else 1
    config = EncoderConfig(kind="bert", layers=shape.layers, hidden=shape.hidden, heads=heads, feed_forward=4 * shape.hidden, vocab=shape.vocab, max_positions=512)
    model, generator = Model(config, mlm=True), torch.Generator().manual_seed(0)
    model.initialize(model, generator)
    for i in range(shape.modules):
        method = methods.create("lora", config, options={"rank": shape.rank}, seed=i)
        for parameter in method.parameters().values():
            parameter.data.normal_(0.0, 0.02, generator=generator)
        patch.attach(model, f"axis-{i}", method)
    parameters = method.parameters()
    patch.train_only(model, parameters.values())
    model.encoder.recompute = save_memory
    model.train()
    random, samples = numpy.random.default_rng(0), []
    for _ in range(shape.sequences):
        rows = numpy.sort(random.choice(shape.length, max(1, round(MASK_SHARE * shape.length)), replace=False))
        samples.append(Sample(random.integers(5, shape.vocab, shape.length), rows, random.integers(5, shape.vocab, len(rows))))
    batch = pack(samples)
    task = types.SimpleNamespace(loss=lambda model, batch: mlm_loss(model.mlm_logits(batch), batch.targets))
    step = training.Step(model, task, training.make_optimizer(parameters, training.Schedule(steps=1, lr=1e-5)), parameters)
    parameters_at = {p.untyped_storage().data_ptr() for p in patch.all_parameters(model).values()}

    def kept() -> float:
        sizes = {}

        def keep(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            task.loss(model, batch)
        return sum(size for place, size in sizes.items() if place not in parameters_at) / 2 ** 20

    return Work(lambda: step(dataclasses.replace(batch), 1e-5), dict, tokens=len(batch.ids), held=kept)


def epoch_of(shape: Shape, folder: Path) -> Work:
    world = World(seed=0)
    path = write(world, folder / str(shape.corpus), corpus=shape.corpus, heldout=1, train=1, dev=1, test=1, pairs=1)["corpus"]
    recipe = Recipe((str(path),), load_axis("gender"), wordpiece([*STYLES["bert"].values(), *world.vocabulary()]), 64, seed=0, batch={"batch_size": 32}, buffer=2048)

    def run() -> None:
        events = Stream(recipe).run()
        while not isinstance(next(events), Ended):
            pass

    return Work(run, dict)
