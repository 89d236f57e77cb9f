"""The texts that every provider of a step gets, and how they are put into batches. Letters: B sequences, S longest sequence."""

import numpy
import torch
from torch import Tensor

from peftdebias.batches import WINDOW, Sample
from peftdebias.tokens import MASK_SHARE

from .case import Setting


def random_lengths(count: int, mean: float, longest: int, generator: numpy.random.Generator) -> numpy.ndarray:
    """int [count]: a gamma distribution (shape 2) cut to 5..longest, its mean within a token of `mean`; all `longest` where that is the mean."""
    if mean >= longest:
        return numpy.full(count, longest)
    drawn = generator.gamma(2.0, 1.0, count)
    low, high = 0.0, 100.0 * longest
    for _ in range(60):  # the mean after the cut grows with the scale
        scale = (low + high) / 2
        low, high = (scale, high) if numpy.clip(drawn * scale, 5, longest).mean() < mean else (low, scale)
    return numpy.clip(numpy.rint(drawn * low), 5, longest).astype(int)


def texts(setting: Setting) -> list[list[Sample]]:
    """The batches of one pass, length-bucketed; every provider gets these texts and masks.

    Lengths are drawn for WINDOW batches and sorted, as batches.plan does in training; of the sorted batches, evenly spaced ones are taken, the shortest and
    the longest among them. The longest comes first: behind it no provider's memory grows, and torch.compile meets the fewest kinds of sizes. The others come in random order.
    """
    random, size = numpy.random.default_rng(setting.seed), setting.size
    special = min(1000, size.vocab // 10)  # ids below are the special ones; the last of them is the mask
    number = setting.number
    lengths = numpy.sort(random_lengths(WINDOW * setting.sequences, setting.x, setting.longest, random)).reshape(WINDOW, setting.sequences)
    found = []
    for place in numpy.linspace(0, WINDOW - 1, number).round().astype(int) if number > 1 else [WINDOW // 2]:
        batch = []
        for n in lengths[place]:
            ids = random.integers(special, size.vocab, n)
            rows = numpy.sort(random.choice(n, max(1, round(MASK_SHARE * n)), replace=False))
            targets = ids[rows].copy()
            ids[rows] = special - 1
            batch.append(Sample(ids, rows, targets))
        found.append(batch)
    *others, longest = found
    return [longest, *(others[i] for i in random.permutation(len(others)))]


def shuffled(batches: list[list[Sample]], seed: int) -> list[list[Sample]]:
    """The same texts in a random order, in batches of the same size."""
    flat = [sample for batch in batches for sample in batch]
    flat = [flat[i] for i in numpy.random.default_rng([seed, 1]).permutation(len(flat))]
    return [flat[i:i + len(batches[0])] for i in range(0, len(flat), len(batches[0]))]


def multiple_for(device: torch.device) -> int:
    """Of what the other side pads to multiples: of 8 on a GPU, as transformers' guides have it."""
    return 8 if device.type == "cuda" else 1


def _padded(batch: list[Sample], multiple: int) -> int:
    return -(-max(len(s.ids) for s in batch) // multiple) * multiple


def padding(batches: list[list[Sample]], multiple: int = 1) -> float:
    """Share of padding when every batch is padded to its longest text, or the next multiple."""
    filled = sum(len(batch) * _padded(batch, multiple) for batch in batches)
    return 1 - sum(len(s.ids) for batch in batches for s in batch) / filled


def pad(batch: list[Sample], device: torch.device) -> dict[str, Tensor]:
    """[B, S] ids, mask and labels as transformers' collator makes them; for a GPU in pinned memory."""
    shape = len(batch), _padded(batch, multiple_for(device))
    made = {"input_ids": torch.zeros(shape, dtype=torch.int64), "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, -100, dtype=torch.int64)}
    for b, sample in enumerate(batch):
        made["input_ids"][b, :len(sample.ids)] = torch.from_numpy(sample.ids)
        made["attention_mask"][b, :len(sample.ids)] = 1
        made["labels"][b, torch.from_numpy(sample.rows)] = torch.from_numpy(sample.targets)
    return {name: tensor.pin_memory() for name, tensor in made.items()} if device.type == "cuda" else made
