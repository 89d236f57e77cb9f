"""Intrinsic measures: bias and quality of a model before any task, from the files that `evaluate --on NAME=FILE` names.

    crows-pairs, stereoset   what the masked-LM prefers, the stereotype or its counterpart
    seat                     where the encoder puts texts; needs no masked-LM head
    perplexity               what debiasing cost the masked-LM

What it adds over metrics/: reading the files, and what a user is told when they do not fit.
"""

import math

import numpy

from . import corpus
from .answers import Result, cut_note, longest_of, max_length
from .batches import Sample
from .checkpoint import Run
from .config import Evaluate
from .errors import DataError, ModelError
from .metrics import Measure, crows_pairs, seat, stereoset
from .metrics.bootstrap import interval
from .tasks import finite, masked_lm_nll, masked_samples, sentence_vectors


def _masked_lm(run: Run, settings: Evaluate, entry: str) -> None:
    if run.model.mlm is None:
        raise ModelError(f"{settings.model}: expected a model with a masked-LM head for --on {entry}, got one without "
                         "(a downstream run has a classifier instead; a head that --fresh-head trained is in its own run)")


def crows(run: Run, path: str, settings: Evaluate) -> Result:
    """Both scorings, over all pairs and by category, or of settings.bias_type alone."""
    _masked_lm(run, settings, f"crows-pairs={path}")
    pairs = crows_pairs.read_pairs(path)
    kinds = sorted({p.bias_type for p in pairs})
    if settings.bias_type is not None:
        if settings.bias_type not in kinds:
            raise DataError(f"{path}: expected --bias-type to be one of {', '.join(kinds)}, got {settings.bias_type!r}")
        pairs = [p for p in pairs if p.bias_type == settings.bias_type]
    longest = max_length(run.model, run.model.config.max_positions)
    encoded = crows_pairs.encode_pairs(run.tokenizer, pairs, longest)
    measures, examples = [], []
    for scoring, scored in crows_pairs.score_encoded(run.model, pairs, encoded, run.tokenizer.mask_id, batch_tokens=settings.batch_tokens).items():
        measures += crows_pairs.measures(scored, scoring, settings.bias_type, seed=settings.seed, samples=settings.samples)
        examples += [{"measure": f"crows-pairs/{scoring}", "bias_type": s.pair.bias_type, "sent_more": s.pair.more, "sent_less": s.pair.less,
                      "more": s.more, "less": s.less} for s in scored]
    return Result(measures, examples, cut_note(encoded, longest, path))


def stereo_set(run: Run, path: str, settings: Evaluate) -> Result:
    """LM, SS and ICAT of the intrasentence contexts, overall and by domain."""
    _masked_lm(run, settings, f"stereoset={path}")
    scored = stereoset.score_contexts(run.model, run.tokenizer, stereoset.read_contexts(path), settings.batch_tokens)
    measures = stereoset.measures([s.context.target for s in scored], [s.context.domain for s in scored], [s.scores for s in scored],
                                  seed=settings.seed, samples=settings.samples)
    examples = [{"measure": "stereoset", "target": s.context.target, "domain": s.context.domain, "context": s.context.text,
                 "words": dict(zip(stereoset.LABELS, s.context.words)), "scores": dict(zip(stereoset.LABELS, s.scores))} for s in scored]
    return Result(measures, examples, cut_note(scored, run.model.encoder.longest, path))


def association_tests(run: Run, path: str, settings: Evaluate) -> Result:
    """Effect size and p of a SEAT or WEAT file, or of all in a folder. Equal texts of several files, and texts with the same tokens, are read by the model once."""
    tests = seat.read_tests(path)
    name = "seat" if settings.sentence_vector == "first" else f"seat-{settings.sentence_vector}"
    texts = list(dict.fromkeys(text for test in tests for text in test.texts))
    longest = max_length(run.model, run.model.config.max_positions)
    encoded = run.tokenizer.encode(texts, max_length=longest)
    read = {e.ids.tobytes(): Sample(e.ids, numpy.array([0]), None, e.segments) for e in encoded}  # names that the vocabulary lacks are read alike
    vectors = sentence_vectors(run.model, list(read.values()), settings.sentence_vector, settings.batch_tokens)
    number = {ids: i for i, ids in enumerate(read)}
    place = {text: number[e.ids.tobytes()] for text, e in zip(texts, encoded)}
    measures, examples, notes = [], [], cut_note(encoded, longest, path)
    for test in tests:
        s = seat.associations(vectors[[place[text] for text in test.texts]], test)
        found = seat.measures(test, s, name=name, seed=settings.seed, samples=settings.samples)
        measures += found
        different = set(test.texts)
        if alike := len(different) - len({place[text] for text in different}):
            notes.append(f"{test.name}: {alike} of {len(different)} texts have the tokens of another: the vocabulary lacks their words, or does not know case")
        if math.isnan(found[0].value):
            notes.append(f"{test.name}: no effect size, all targets lie alike to the attributes")
        sides = [0] * len(test.sets[0]) + [1] * len(test.sets[1])
        examples += [{"measure": name, "test": test.name, "set": seat.SETS[side], "text": text, "stem": stem, "association": float(value)}
                     for side, text, stem, value in zip(sides, test.texts, seat.stems(*test.sets[:2]), s)]
    return Result(measures, examples, notes)


def perplexity(run: Run, path: str, settings: Evaluate) -> Result:
    """Masked-LM loss in nats a masked token, and its exponential, with masks fixed by the seed (15 %, 80/10/10)."""
    _masked_lm(run, settings, f"perplexity={path}")
    texts = [t.text for t in corpus.read_texts([path], settings.text)]
    longest = longest_of(run, settings)
    encoded = run.tokenizer.encode(texts, max_length=longest)
    samples = masked_samples([[e.ids] for e in encoded], run.tokenizer, numpy.random.default_rng([settings.seed, 4]))
    sums, counts = masked_lm_nll(run.model, samples, settings.batch_tokens)
    finite(sums, "losses of texts")
    if not counts.sum():
        raise DataError(f"{path}: expected words to mask, got none")
    loss = float(sums.sum() / counts.sum())
    masked, tokens = sums[counts > 0], counts[counts > 0]  # a text without a word to mask says nothing
    low, high = interval(lambda items: masked[items].sum() / tokens[items].sum(), len(tokens), seed=settings.seed, samples=settings.samples)
    examples = [{"measure": "mlm-loss", "text": t, "nll": s, "tokens": int(c)} for t, s, c in zip(texts, sums.tolist(), counts)]
    measures = [Measure("mlm-loss", loss, "nats", None, low, high, len(tokens)),
                Measure("perplexity", float(numpy.exp(loss)), "1", None, float(numpy.exp(low)), float(numpy.exp(high)), len(tokens))]
    return Result(measures, examples, cut_note(encoded, longest, path))
