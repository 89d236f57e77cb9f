"""Where tests meet transformers and peft: the one helper for all comparisons. A test that needs an absent library is skipped.

`pair` gives a randomly drawn model of transformers and ours, read from the folder that it saved; `hidden`, `mlm_logits` and `class_logits` ask theirs with
padding and answer in our packed layout; `assert_close` holds CONTRACTS.md's tolerances. Sizes are odd, so that swapped axes fail.
"""

import numpy
import pytest
import torch
from torch import Tensor

from peftdebias.batches import Batch, Sample, pack
from peftdebias.encoder import Model

LAYERS, HEADS, HEAD_WIDTH, FEED_FORWARD, VOCAB, POSITIONS = 3, 3, 7, 41, 97, 53
HIDDEN = HEADS * HEAD_WIDTH
LABELS = ("nurse", "pilot", "poet", "smith", "tailor")
LENGTHS = (13, 1, 29, 7, 2)


def library(name: str):
    """The module `name`; the test is skipped where it is not installed."""
    return pytest.importorskip(name, reason=f"compares with {name}, which is not installed")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For files that import it: models as small as these run on one thread (two that wait for each other cost fifty times as much on a busy machine)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------- inputs

def ragged(lengths=LENGTHS, *, vocab: int = VOCAB, segments: int = 1, rows: str = "some", seed: int = 0) -> Batch:
    """Random texts without special ids (0 to 4). rows: "some" (up to three a text, none in a text of one token), "first" or "all"; targets for each."""
    random, samples = numpy.random.default_rng(seed), []
    for n in lengths:
        asked = {"first": numpy.array([0]), "all": numpy.arange(n), "some": numpy.sort(random.choice(n, min(3, n - 1), replace=False))}[rows]
        kinds = None if segments == 1 else numpy.sort(random.integers(segments, size=n))
        samples.append(Sample(random.integers(5, vocab, size=n), asked, random.integers(5, vocab, size=len(asked)), kinds))
    return pack(samples)


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter drawn, biases and norms too, large enough that each matters in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            gain = name.lower().endswith(("norm.weight", "layer_norm.weight"))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + gain)
    return module


# ---------------------------------------------------------------- models

def theirs(kind: str, head: str = "ForMaskedLM", dtype: torch.dtype = torch.float64, seed: int = 0, **changes):
    """A random transformers model, e.g. BertForMaskedLM, in eval mode. changes: fields of its config."""
    transformers = library("transformers")
    stem = {"bert": "Bert", "roberta": "Roberta"}[kind]
    sizes = dict(num_hidden_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS, intermediate_size=FEED_FORWARD, vocab_size=VOCAB,
                 max_position_embeddings=POSITIONS, type_vocab_size=2, pad_token_id=0, id2label=dict(enumerate(LABELS)),
                 label2id={label: i for i, label in enumerate(LABELS)})
    if kind == "roberta":
        sizes |= dict(max_position_embeddings=POSITIONS + 2, type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5)
    config = getattr(transformers, stem + "Config")(**sizes | changes)
    return randomize(getattr(transformers, stem + head)(config), seed).to(dtype).eval()


def pair(kind: str, folder, head: str = "ForMaskedLM", dtype: torch.dtype = torch.float64, **changes) -> tuple[object, Model]:
    """(a random transformers model, ours with the same weights through the folder that it saved), both in eval mode."""
    from peftdebias.weights import load_model

    other = theirs(kind, head, dtype, **changes)
    other.save_pretrained(folder)
    model, report = load_model(folder, dtype=dtype)
    assert report.new == ()
    return other, model


# ---------------------------------------------------------------- their answers, in our layout

def padded(other, batch: Batch) -> dict[str, Tensor]:
    """What their forward takes: [B, S] ids, mask and segments. The padding token's embedding is drawn like all others: outputs would show it if it were seen."""
    shape = len(batch.lengths), batch.max_length
    mask = torch.arange(shape[1])[None, :] < torch.tensor(batch.lengths)[:, None]
    pad = other.config.pad_token_id
    ids = torch.full(shape, pad).masked_scatter(mask, batch.ids)
    return dict(input_ids=ids, attention_mask=mask.long(), token_type_ids=torch.zeros(shape, dtype=torch.int64).masked_scatter(mask, batch.segments))


def packed(batch: Batch, states: Tensor) -> Tensor:
    """[B, S, ...] -> [T, ...]."""
    return torch.cat([states[b, :n] for b, n in enumerate(batch.lengths)])


def hidden(other, batch: Batch) -> Tensor:
    """[T, D]: their last hidden state of every token."""
    return packed(batch, getattr(other, other.base_model_prefix, other)(**padded(other, batch)).last_hidden_state)


def mlm_logits(other, batch: Batch) -> Tensor:
    """[M, V] at the rows asked for."""
    return packed(batch, other(**padded(other, batch)).logits)[batch.rows]


def class_logits(other, batch: Batch) -> Tensor:
    """[B, C]."""
    return other(**padded(other, batch)).logits


# ---------------------------------------------------------------- tolerances

def assert_close(ours: Tensor, expected: Tensor, what: str = "outputs", logits: bool = False) -> None:
    """CONTRACTS.md: float64 1e-10; float32 2e-6 * max(1, max|x|) for hidden states, 2e-6 * max|logit| for logits."""
    assert ours.shape == expected.shape and ours.dtype == expected.dtype, f"{what}: {ours.shape} {ours.dtype}, expected {expected.shape} {expected.dtype}"
    largest = expected.abs().max().item() if expected.numel() else 0.0
    bound = 1e-10 if ours.dtype == torch.float64 else 2e-6 * (largest if logits else max(1.0, largest))
    apart = (ours - expected).abs().max().item() if expected.numel() else 0.0
    assert apart <= bound, f"{what}: max|difference| {apart:.2e}, expected at most {bound:.2e}"  # also false for nan
