"""One-mask questions to a masked-LM, answered in as few products as they need: what the intrinsic measures are made of.

What it adds over tasks.py: a question is one masked place of one text, and a file asks tens of thousands of them. `masked_log_probs_ref` is the
specification, one forward pass a question. `masked_log_probs` gives the same numbers; its savings are all exact:

    contexts    equal texts masked at the same place are computed once, whatever tokens are asked there
    one length  the texts of a batch have one length: nothing is padded, masked or gathered for attention
    asked rows  the last layer and the head compute the masked places alone (encoder.py)
    in cache    on a CPU a batch is CPU_TOKENS tokens, and its scores are computed for CPU_SLICE tokens of the vocabulary at a time, at all places, and never leave
                the cache; slices are added up in float64
    one exp     log P needs the sum over the vocabulary, no logarithm a token: of a slice, 1 / (largest softmax) is its sum of exp(score - largest score)

Letters: Q questions, C contexts, B texts of a batch, n their tokens, M rows, D hidden, V vocabulary.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy
import torch
from torch import Tensor

from .batches import Batch, Sample, cumulative, pack
from .encoder import Model
from .errors import ModelError
from .ops import linear
from .tasks import VALIDATION_TOKENS, finite, in_eval

CPU_TOKENS = 4096
CPU_SLICE = 1024  # tokens of the vocabulary; a softmax in float32 rounds the more the longer it is
DEVICE_LOGITS = 2**27  # on other devices: 512 MiB of float32


@dataclasses.dataclass(frozen=True)
class MaskedToken:
    """One question to a masked-LM: ids int [n] with the mask in place, the place asked about, the token id whose log-probability is wanted."""

    ids: Sequence[int]
    place: int
    target: int


@in_eval
def masked_log_probs_ref(model: Model, questions: Sequence[MaskedToken]) -> numpy.ndarray:
    """float64 [Q], the specification: a forward pass for each question, scores of every token at every place, log-softmax in float64."""
    found = []
    for q in questions:
        ids = numpy.asarray(q.ids)
        logits = model.mlm_logits(pack([Sample(ids, numpy.arange(len(ids)))]).to(model.device))  # [n, V]
        found.append(float(logits[q.place].double().log_softmax(-1)[q.target]))
    return numpy.array(found)


@in_eval
def masked_log_probs(model: Model, questions: Sequence[MaskedToken], batch_tokens: int = VALIDATION_TOKENS) -> numpy.ndarray:
    """float64 [Q]: log-probability (nats) of each target at its place. batch_tokens: at most so many tokens (or one text) at a time.

    Questions with one context and one target get the same bits. Raises ModelError without a masked-LM head, on a text longer than the model reads and on a target that its
    vocabulary lacks.
    """
    contexts: dict[tuple[bytes, int], int] = {}
    context = numpy.array([contexts.setdefault((numpy.asarray(q.ids, numpy.int32).tobytes(), int(q.place)), len(contexts)) for q in questions], numpy.int64)
    targets = numpy.array([q.target for q in questions], numpy.int64)
    if outside := targets[(targets < 0) | (targets >= model.config.vocab)].tolist():
        raise ModelError(f"questions: expected targets from 0 to {model.config.vocab - 1}, the model's vocabulary, got {outside[0]}")
    order = numpy.argsort(context, kind="stable")  # questions by context
    starts = numpy.searchsorted(context[order], numpy.arange(len(contexts) + 1))
    found = numpy.zeros(len(questions))
    for numbers, batch in _batches(list(contexts), batch_tokens if model.device.type != "cpu" else min(batch_tokens, CPU_TOKENS)):
        counts = starts[numbers + 1] - starts[numbers]
        asked = order[numpy.repeat(starts[numbers] - numpy.cumsum(counts) + counts, counts) + numpy.arange(counts.sum())]  # the questions of these contexts
        rows = numpy.repeat(numpy.arange(len(numbers)), counts)  # int [len(asked)], ascending
        found[asked] = _answers(model, batch.to(model.device), rows, targets[asked])
    return finite(found, "log-probabilities")


def _answers(model: Model, batch: Batch, rows: numpy.ndarray, targets: numpy.ndarray) -> numpy.ndarray:
    """float64 [len(rows)]: log-probability of targets[i] at the rows[i]-th of the places that `batch` asks for."""
    hidden = model.mlm_hidden(batch)  # [M, D]
    table, bias = model.mlm_decoder()
    width = CPU_SLICE if hidden.device.type == "cpu" else max(CPU_SLICE, DEVICE_LOGITS // len(hidden))
    found, tops, sums = torch.zeros(len(rows), dtype=torch.float64, device=hidden.device), [], []
    for start in range(0, len(table), width):
        logits = linear(hidden, table[start:start + width], bias[start:start + width])  # [M, width]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        tops.append(logits.amax(-1))
        sums.append(1 / logits.softmax(-1).amax(-1).double())  # the softmax is at least 1 / width somewhere
        here = numpy.flatnonzero((targets >= start) & (targets < start + width))
        here, asked, wanted = (torch.from_numpy(part).to(hidden.device, non_blocking=True) for part in (here, rows[here], targets[here] - start))
        found[here] = logits[asked, wanted].double()
    tops = torch.stack(tops).double()  # [slices, M]
    top, sums = tops.amax(0), torch.stack(sums).masked_fill_(tops == -torch.inf, 0)  # a slice of nothing but -inf has no softmax, and adds nothing
    total = top + ((tops - top).exp() * sums).sum(0).log()  # [M]
    return (found - total[torch.from_numpy(rows).to(hidden.device, non_blocking=True)]).cpu().numpy()


def _batches(contexts: Sequence[tuple[bytes, int]], batch_tokens: int) -> Iterator[tuple[numpy.ndarray, Batch]]:
    """(numbers int [B] of the contexts in it, batch): texts of one length, with the one masked place of each asked for. contexts: (ids int32 [n] as bytes, place)."""
    lengths = numpy.array([len(ids) for ids, _ in contexts], numpy.int64) // 4
    for n in numpy.unique(lengths).tolist():
        same = numpy.flatnonzero(lengths == n)
        for start in range(0, len(same), max(1, batch_tokens // n)):
            numbers = same[start:start + max(1, batch_tokens // n)]
            ids = numpy.frombuffer(b"".join(contexts[i][0] for i in numbers), numpy.int32)
            places = numpy.array([contexts[i][1] for i in numbers], numpy.int64)
            yield numbers, of_one_length(ids, places)


def of_one_length(ids: numpy.ndarray, places: numpy.ndarray) -> Batch:
    """The Batch that `pack` makes of texts of one length, ids [B * n] end to end, each with the row places[b] asked for."""
    count, n = len(places), len(ids) // len(places)

    def tensor(array: numpy.ndarray) -> Tensor:
        return torch.from_numpy(array.astype(numpy.int64))

    return Batch(ids=tensor(ids), positions=tensor(numpy.tile(numpy.arange(n), count)), segments=tensor(numpy.zeros(len(ids))), cu_seqlens=cumulative([n] * count),
                 rows=tensor(numpy.arange(count) * n + places), targets=None, lengths=(n,) * count, row_lengths=(1,) * count, max_length=n, family=tensor(numpy.arange(count)))
