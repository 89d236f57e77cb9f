"""One-mask questions: the packed answers are those of one forward pass a question, whatever the batches; equal contexts are computed once; small probabilities."""

import numpy
import pytest
import torch

from peftdebias import questions
from peftdebias.batches import Sample, pack
from peftdebias.encoder import Model
from peftdebias.errors import ModelError
from peftdebias.methods.prefix import PrefixConfig, Prefix
from peftdebias.patch import attach
from peftdebias.questions import MaskedToken, masked_log_probs, masked_log_probs_ref
from peftdebias.tasks import sentence_vectors

from .outside import POSITIONS, VOCAB, one_thread  # noqa: F401
from .plain import KINDS, config, model_of, plain, some


def asked(count=60, seed=0) -> list[MaskedToken]:
    """Questions about texts of 1 to 13 tokens; some share their context, some are asked twice."""
    random, found = numpy.random.default_rng(seed), []
    texts = [random.integers(5, VOCAB, size=n) for n in (13, 1, 7, 7, 2, 13, 7)]
    for _ in range(count):
        ids = texts[random.integers(len(texts))]
        found.append(MaskedToken(ids, int(random.integers(len(ids))), int(random.integers(VOCAB))))
    return [*found, *found[:5]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_tokens", [1, 20, 8192])
@pytest.mark.parametrize("width", [1, 10, 1024])
def test_answers_are_those_of_one_pass_a_question(kind, batch_tokens, width, monkeypatch):
    monkeypatch.setattr(questions, "CPU_SLICE", width)
    model = model_of(kind)
    expected = masked_log_probs_ref(model, asked())
    assert masked_log_probs(model, asked(), batch_tokens) == pytest.approx(expected, abs=1e-10) and len(set(expected.round(9))) > 40


def test_the_specification_is_the_encoder_in_plain_words():
    model, q = model_of(), asked(1)[0]
    batch = questions.of_one_length(numpy.asarray(q.ids), numpy.array([q.place]))
    hidden = plain(model, batch)[q.place].detach()
    head = model.mlm
    scores = head.norm(torch.nn.functional.gelu(head.dense(hidden))) @ model.encoder.embeddings.word.weight.T + head.bias
    assert masked_log_probs_ref(model, [q])[0] == pytest.approx((scores[q.target] - scores.exp().sum().log()).item(), abs=1e-10)


def test_float32_rounds_no_more_than_the_slow_way():
    exact = masked_log_probs_ref(model_of(), asked())
    single = model_of(dtype=torch.float32)
    ours, slow = (numpy.abs(found - exact).max() for found in (masked_log_probs(single, asked()), masked_log_probs_ref(single, asked())))
    assert ours <= 2 * slow + 1e-7
    half = model_of(dtype=torch.bfloat16)  # its scores have few digits, their sum has not
    assert masked_log_probs(half, asked(9)) == pytest.approx(masked_log_probs_ref(half, asked(9)), abs=1e-6)


def test_sums_over_a_large_vocabulary_do_not_round_away_its_tail(monkeypatch):
    """Scores are the bias alone: one token has a score of 13 or 17.4, 30 000 others about 0. Slices are what keeps this exact.

    The sum's lane that holds exp(17.4) loses all that it should add to it, each less than half that number's last place: of a slice 1024 / 30011 of what it loses of the
    whole vocabulary, however many lanes a processor has. At 13 each is rounded up or down, and where that ends is chance: even the whole vocabulary's sum may be lucky.
    """
    model = model_of(dtype=torch.float32, vocab=30011)
    with torch.no_grad():
        model.mlm.norm.weight.zero_()
        model.mlm.norm.bias.zero_()
        model.mlm.bias.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    some = [MaskedToken(q.ids, q.place, target) for q in asked(9) for target in (7, 8, 30010)]

    def error(score: float) -> float:
        with torch.no_grad():
            model.mlm.bias[7] = score
        return float(numpy.abs(masked_log_probs(model, some) - masked_log_probs_ref(model, some)).max())

    assert error(13.0) < 1e-6
    sliced = error(17.4)
    monkeypatch.setattr(questions, "CPU_SLICE", 2**20)
    assert error(17.4) > 20 * sliced


def test_equal_contexts_are_computed_once_and_equal_questions_get_the_same_bits(monkeypatch):
    """And a batch has no more tokens than it is told, or one text."""
    model, rows, sizes = model_of(dtype=torch.float32), [], []
    forward = model.mlm_hidden
    monkeypatch.setattr(model, "mlm_hidden", lambda batch: rows.append(len(batch.rows)) or sizes.append(len(batch.ids)) or forward(batch))
    found = masked_log_probs(model, asked(), 20)
    assert sum(rows) == len({(tuple(q.ids), q.place) for q in asked()}) < 60
    assert max(sizes) <= 20
    contexts = [(numpy.full(7, 5 + i, numpy.int32).tobytes(), 0) for i in range(5)] + [(numpy.full(21, 5, numpy.int32).tobytes(), 0)]
    assert [(numbers.tolist(), len(batch.ids)) for numbers, batch in questions._batches(contexts, 20)] == [([0, 1], 14), ([2, 3], 14), ([4], 7), ([5], 21)]  # as many as go into it
    assert found[:5].tolist() == found[-5:].tolist()


def test_a_batch_of_one_length_is_what_pack_makes_of_its_texts():
    ids, places = numpy.arange(5, 17).reshape(3, 4), numpy.array([1, 0, 3])
    found, expected = questions.of_one_length(ids.flatten().astype(numpy.int32), places), pack([Sample(row, place[None], family=i) for i, (row, place) in enumerate(zip(ids, places))])
    for name, other in vars(expected).items():
        one = getattr(found, name)
        assert torch.equal(one, other) and one.dtype == other.dtype if isinstance(other, torch.Tensor) else one == other, name


def test_a_model_that_trains_drops_nothing_while_it_answers_and_what_overflows_is_told():
    model, expected = model_of(dropout=0.5), masked_log_probs_ref(model_of(), asked(3))
    model.train()
    assert masked_log_probs_ref(model, asked(3)).tolist() == expected.tolist() and model.training
    assert masked_log_probs(model, asked(3)) == pytest.approx(expected, abs=1e-10) and model.training
    with torch.no_grad():
        model.mlm.bias[7] = float("nan")
    with pytest.raises(ModelError, match="log-probabilities: expected finite numbers, got"):
        masked_log_probs(model, asked(3))


def test_under_a_module_too():
    """A prefix stands before every text: its keys have other lengths than the texts."""
    model = model_of()
    attach(model, "gender", Prefix(PrefixConfig(length=3), model.config))
    for parameter in model.methods["gender"].parameters().values():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = masked_log_probs(model, asked(), 20)
    assert found == pytest.approx(masked_log_probs_ref(model, asked()), abs=1e-10)
    assert numpy.abs(found - masked_log_probs(model_of(), asked())).max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_below_the_smallest_number_have_a_logarithm(dtype):
    model = model_of(dtype=dtype)
    with torch.no_grad():
        model.mlm.bias[7] = -2000.0
    (found,) = masked_log_probs(model, [MaskedToken([5, 6, 8], 1, 7)])
    assert -2100 < found < -1900 and found == pytest.approx(masked_log_probs_ref(model, [MaskedToken([5, 6, 8], 1, 7)])[0], rel=1e-6)


@pytest.mark.parametrize("width", [2, 10, 1024])
def test_tokens_that_may_never_be_said(width, monkeypatch):
    """A score of -inf, alone and of all tokens of a slice; the others' probabilities are a sum without them. Where it is asked for, the answer is no number, and that is told."""
    monkeypatch.setattr(questions, "CPU_SLICE", width)
    model = model_of()
    with torch.no_grad():
        model.mlm.bias[torch.tensor([0, 7, *range(10, 22)])] = -torch.inf
    some = [q for q in asked() if q.target not in (0, 7) and not 10 <= q.target < 22]
    assert len(some) > 20 and masked_log_probs(model, some) == pytest.approx(masked_log_probs_ref(model, some), abs=1e-10)
    with pytest.raises(ModelError, match="log-probabilities: expected finite numbers, got 1 of 1 that are NaN or infinite"):
        masked_log_probs(model, [MaskedToken([5, 6], 0, 15)])
    with torch.no_grad():
        model.mlm.bias.fill_(-torch.inf)
    with pytest.raises(ModelError, match="log-probabilities: expected finite numbers"):
        masked_log_probs(model, some)


@pytest.mark.parametrize("target", [-1, VOCAB, 2 ** 40])
def test_a_target_outside_the_vocabulary_is_told(target):
    with pytest.raises(ModelError, match=f"^questions: expected targets from 0 to {VOCAB - 1}, the model's vocabulary, got {target}$"):
        masked_log_probs(model_of(), [MaskedToken([5, 6], 0, 5), MaskedToken([5, 6], 0, target)])


def test_no_questions_no_head_and_texts_that_are_too_long():
    assert masked_log_probs(model_of(), []).shape == (0,)
    with pytest.raises(ModelError, match="expected a model with a masked-LM head"):
        masked_log_probs(Model(config()), asked(1))
    with pytest.raises(ModelError, match=f"text of {POSITIONS + 1} tokens: expected at most {POSITIONS}"):
        masked_log_probs(model_of(), [MaskedToken([5] * (POSITIONS + 1), 0, 5)])


def test_sentence_vectors_are_the_first_tokens_or_the_mean():
    model, batch = model_of("bert"), some("bert")
    hidden = plain(model, batch).split(batch.lengths)
    samples = [Sample(ids.numpy(), numpy.array([0]), None, kinds.numpy()) for ids, kinds in zip(batch.ids.split(batch.lengths), batch.segments.split(batch.lengths))]
    for pooling, expected in (("first", [h[0] for h in hidden]), ("mean", [h.mean(0) for h in hidden])):
        found = sentence_vectors(model, samples, pooling, 20)
        assert found.dtype == numpy.float64 and numpy.abs(found - torch.stack(expected).detach().numpy()).max() < 1e-10
    with pytest.raises(ValueError, match="expected one of first, mean, got 'last'"):
        sentence_vectors(model, samples, "last")
