"""The two tasks: masked-LM on counterfactual families (upstream), classification (downstream); and the same scored without training.

A task gives the loop batches, a loss and a validation; it knows no method and no axis. Scores without gradients live here too, because measures build on
them: `masked_lm_nll`, `class_probabilities`, `sentence_vectors`. Questions of one mask are questions.py's.

Letters: B texts, M rows asked for, C labels.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .batches import IGNORED, Batch, Sample, from_packed, pack, plan
from .buckets import Packed
from .encoder import Model
from .errors import DataError, ModelError
from .kernels.op import first_order
from .ops import compiled
from .tokens import Encoded, Tokenizer, mask_tokens

VALIDATION_TOKENS = 8192
CPU_TOKENS = 2048
"""At most so many in a batch on a CPU, whatever is asked for: the products run no faster with more, and what a layer makes of them stays small enough for the allocator
to hand the same pages out again."""


# ---------------------------------------------------------------- scores without gradients

def in_eval(function):
    """Runs a function whose first argument is a Model in eval mode and without gradients, then puts back the mode of every part."""
    def run(model: Model, *args, **kwargs):
        training = [part for part in (*model.modules(), *model.methods.values()) if part.training]
        for part in training:
            part.training = False
        try:
            with torch.no_grad():
                return function(model, *args, **kwargs)
        finally:
            for part in training:
                part.training = True
    run.__doc__, run.__name__ = function.__doc__, function.__name__
    return run


def scored_batches(model: Model, samples: Sequence[Sample], batch_tokens: int = VALIDATION_TOKENS) -> Iterator[tuple[list[int], Batch]]:
    """(which samples, their batch on the model's device), sorted by length."""
    limit = min(batch_tokens, CPU_TOKENS) if model.device.type == "cpu" else batch_tokens
    for items in plan([len(s.ids) for s in samples], batch_tokens=limit):
        yield items, pack([samples[i] for i in items]).to(model.device)


def _token_nll(model: Model, batch: Batch) -> Tensor:
    """float64 [M]: negative log-likelihood of each target, in nats."""
    logits = model.mlm_logits(batch)  # [M, V]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.logsumexp(-1).double() - logits.gather(1, batch.targets[:, None])[:, 0].double()


@in_eval
def masked_lm_nll(model: Model, samples: Sequence[Sample], batch_tokens: int = VALIDATION_TOKENS) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(float64 [B] summed negative log-likelihood of each sample's targets in nats, int [B] how many targets)."""
    sums, counts = numpy.zeros(len(samples)), numpy.array([len(s.rows) for s in samples])
    for items, batch in scored_batches(model, samples, batch_tokens):
        nll = _token_nll(model, batch).cpu().numpy()
        sums[items] = [part.sum() for part in numpy.split(nll, numpy.cumsum(batch.row_lengths)[:-1])]
    return sums, counts


@in_eval
def class_probabilities(model: Model, samples: Sequence[Sample], batch_tokens: int = VALIDATION_TOKENS, whatever: bool = False) -> numpy.ndarray:
    """float64 [B, C]: probability of each label. Raises ModelError where one is no number; whatever: it is given."""
    found = numpy.zeros((len(samples), len(model.classifier.labels)))
    for items, batch in scored_batches(model, samples, batch_tokens):
        found[items] = model.class_logits(batch).double().softmax(-1).cpu().numpy()
    return found if whatever else finite(found, "probabilities")


def finite(found: numpy.ndarray, what: str) -> numpy.ndarray:
    """`found` itself. Raises ModelError where a number of it is NaN or infinite: no figure can be made of it."""
    if not numpy.isfinite(found).all():
        raise ModelError(f"{what}: expected finite numbers, got {numpy.count_nonzero(~numpy.isfinite(found))} of {found.size} that are NaN or infinite: the model's own overflow")
    return found


VECTORS = ("first", "mean")


@in_eval
def sentence_vectors(model: Model, samples: Sequence[Sample], pooling: str = "first", batch_tokens: int = VALIDATION_TOKENS) -> numpy.ndarray:
    """float64 [B, D]: of each text the last layer's vector of its first token ([CLS], <s>), or the mean over all its tokens, special ones included.

    pooling: one of VECTORS. The rows that the samples ask for do not matter.
    """
    if pooling not in VECTORS:
        raise ValueError(f"pooling: expected one of {', '.join(VECTORS)}, got {pooling!r}")
    samples = [Sample(s.ids, FIRST_TOKEN if pooling == "first" else numpy.arange(len(s.ids)), None, s.segments) for s in samples]
    found = numpy.zeros((len(samples), model.config.hidden))
    for items, batch in scored_batches(model, samples, batch_tokens):
        hidden = model.encoder(batch).double()  # [M, D]
        found[items] = torch.stack([part.mean(0) for part in hidden.split(batch.row_lengths)]).cpu().numpy()
    return finite(found, "vectors of texts")


# ---------------------------------------------------------------- samples

def masked_samples(families: Iterable[Sequence[numpy.ndarray]], tokenizer: Tokenizer, generator: numpy.random.Generator) -> list[Sample]:
    """Each text of each family masked by tokens.mask_tokens; rows and targets are what was masked."""
    samples = []
    for family, members in enumerate(families):
        for ids in members:
            masked, rows, targets = mask_tokens(ids, tokenizer, generator)
            samples.append(Sample(masked, rows, targets, family=family))
    return samples


FIRST_TOKEN = numpy.array([0])


def labelled_samples(encoded: Sequence[Encoded], labels: Sequence[int] | None = None) -> list[Sample]:
    """Each text with its first token asked for, and its label as target where given."""
    return [Sample(e.ids, FIRST_TOKEN, None if labels is None else numpy.array([labels[i]]), e.segments, i) for i, e in enumerate(encoded)]


def label_indices(labels: Sequence[str], known: Sequence[str], places: Sequence[str]) -> list[int]:
    """Index of each label in `known`. Raises DataError at the place of one that was not seen in training."""
    index = {label: i for i, label in enumerate(known)}
    for label, place in zip(labels, places):
        if label not in index:
            shown = ", ".join(list(known)[:10]) + (", ..." if len(known) > 10 else "")
            raise DataError(f"{place}: label {label!r} was not seen in training; expected one of {shown}")
    return [index[label] for label in labels]


# ---------------------------------------------------------------- tasks

def mlm_loss_ref(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """logits [M, V], targets int64 [M] in [0, V) or batches.IGNORED, weights [V] or None -> [], nats: cross-entropy, the mean over the rows weighted by their
    targets' weights; the specification. Ignored rows count for nothing; where there are no others it is 0, with `weights` NaN (0 / 0). It serves a vocabulary and a
    classifier's labels alike; the kernel: kernels/fused/mlm_loss.py."""
    if weights is None:
        return F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED) / (targets != IGNORED).sum().clamp(min=1)
    return F.cross_entropy(logits, targets, weight=weights.to(logits.dtype), ignore_index=IGNORED)


@compiled.register("mlm_loss")
def mlm_loss_compiled(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """mlm_loss_ref by csrc/ops.cpp. Saves the logits and two numbers a row; the backward writes over the logits, and autograd is told so."""
    fits = logits.dim() == 2 and targets.shape == logits.shape[:1] and (weights is None or weights.shape == logits.shape[1:])
    if not fits or targets.dtype != torch.int64 or not targets.is_cpu or not compiled.takes(logits, weights):
        return mlm_loss_ref(logits, targets, weights)
    return _Loss.apply(logits.contiguous(), targets.contiguous(), weights)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, weights):
        rows, vocabulary = logits.shape
        sums, nll, counted = compiled.empty(2, rows), compiled.empty(rows), targets != IGNORED
        targets = torch.where(counted, targets, 0)
        compiled.call("loss_forward", logits.data_ptr(), targets.data_ptr(), sums.data_ptr(), sums[1].data_ptr(), nll.data_ptr(), rows, vocabulary, torch.get_num_threads())
        if weights is None:
            factors = counted.float() / counted.sum().clamp(min=1)
        else:
            factors = weights.index_select(0, targets) * counted
            factors = factors / factors.sum()
        ctx.save_for_backward(logits, targets, sums, torch.where(counted, factors, 0))  # 0 / 0 where all are ignored and weighted
        nll = torch.where(counted, nll, 0)  # an ignored row's may be infinite, and 0 times that no number
        return (nll.double() @ factors.double()).float()

    @staticmethod
    def backward(ctx, pull):
        first_order("mlm_loss")
        logits, targets, sums, factors = ctx.saved_tensors
        logits, factors = logits.detach(), factors * pull
        compiled.call("loss_backward", logits.data_ptr(), targets.data_ptr(), sums.data_ptr(), sums[1].data_ptr(), factors.data_ptr(), logits.data_ptr(), *logits.shape,
                      torch.get_num_threads())
        torch.autograd.graph.increment_version(logits)
        return logits, None, None


def mlm_loss(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """mlm_loss_ref by the implementation that `kernels` chooses for the tensors' device; no kernel takes float64. A kernel's backward overwrites the logits."""
    plain = logits.dtype == torch.float64
    return (mlm_loss_ref if plain else kernels.choose("mlm_loss", reference=mlm_loss_ref, device=logits.device))(logits, targets, weights)


class MaskedLM:
    """Masked-LM on families (a text and its counterfactuals, never parted). Validation masks are fixed by the seed; the lowest loss is best.

    batches: number of an epoch -> its masked batches (worker.Epochs.epoch, buckets.in_memory). held_out: families of token ids.
    """

    metric = "loss"
    higher_is_better = False

    def __init__(self, batches: Callable[[int], Iterator[Packed]], held_out: Sequence[Sequence[numpy.ndarray]], tokenizer: Tokenizer, *, seed: int):
        self.batches = batches
        self.held_out = masked_samples(held_out, tokenizer, numpy.random.default_rng([seed, 1]))
        if not any(len(s.rows) for s in self.held_out):
            raise DataError("validation texts: expected words to mask, got none but special and unknown tokens")

    def epoch(self, number: int) -> Iterator[Batch]:
        """Every family once, in the order and with the masks that the epoch's number gives."""
        return map(from_packed, self.batches(number))

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """Mean cross-entropy in nats over the masked tokens of the batch; 0 where it has none (unknown tokens only)."""
        return mlm_loss(model.mlm_logits(batch), batch.targets)

    def validate(self, model: Model) -> dict[str, float]:
        """{"loss": mean over the held-out masked tokens, in nats}."""
        sums, counts = masked_lm_nll(model, self.held_out)
        return {"loss": float(sums.sum() / counts.sum())}


class Classification:
    """Labelled texts; the best value of `measure` on the held-out ones is best.

    measure: (predicted int [N], labels int [N]) -> {name: value}; `metric` names the value that counts. weights: [C] of the labels in the loss, a weighted mean.
    """

    higher_is_better = True

    def __init__(self, samples: Sequence[Sample], held_out: Sequence[Sample], measure, metric: str, *, seed: int, batch: dict, weights: Sequence[float] | None = None):
        self.samples, self.held_out, self.measure, self.metric = samples, held_out, measure, metric
        self.seed, self.batch = seed, batch
        self.weights = None if weights is None else torch.tensor(weights, dtype=torch.float32, device="cpu")

    def epoch(self, number: int) -> Iterator[Batch]:
        """Every text once, in the order that (seed, number) give."""
        for items in self._plan(number):
            yield pack([self.samples[i] for i in items])

    def steps(self, epochs: int) -> int:
        """Batches of the first so many epochs; with a budget of tokens each order makes as many as it makes."""
        return sum(len(self._plan(number)) for number in range(epochs))

    def _plan(self, number: int) -> list[list[int]]:
        return plan([len(s.ids) for s in self.samples], seed=(self.seed, 0, number), **self.batch)

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """Cross-entropy in nats, the mean over the batch weighted by the labels' weights."""
        logits = model.class_logits(batch)
        if self.weights is not None and self.weights.device != logits.device:
            self.weights = self.weights.to(logits.device)
        return mlm_loss(logits, batch.targets, self.weights)

    def validate(self, model: Model) -> dict[str, float]:
        """The measures on the held-out texts."""
        predicted = class_probabilities(model, self.held_out, whatever=True).argmax(1)
        return self.measure(predicted, numpy.array([int(s.targets[0]) for s in self.held_out]))
