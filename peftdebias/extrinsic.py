"""Extrinsic measures: quality and bias of a downstream run's answers, from the files that `evaluate --on NAME=FILE` names.

    classification   accuracy, F1 and, with a group column, TPR-GAP, equalised odds and demographic parity differences
    fprd, iptts      false positive rate differences over identity terms, on the run's own kind of file and on the identity phrase templates
    bias-nli         an inference run's answers to pairs of an occupation and a gendered word
    counterfactual   how often an answer changes when the attribute words of an axis are swapped

What it adds over metrics/: reading the files, the run's columns and labels, and what a user is told when they do not fit.
"""

import dataclasses
import math
import re
from pathlib import Path

import numpy

from . import axes, corpus
from .answers import Answers, Result, answer, answer_examples, column, cut_note, encode_examples, is_plain, longest_of, needs_classifier, positive_label
from .axes import Axis
from .cda import Counterfactual, counterfactuals
from .checkpoint import Run, read_header
from .config import Evaluate
from .corpus import Example
from .errors import ConfigError, DataError, ModelError
from .metrics import Measure, counterfactual, nli
from .metrics.classification import accuracy, f1, macro_f1
from .metrics.fairness import fairness
from .metrics.fprd import TEMPLATES, fprd, frames, mentions, read_terms
from .metrics.tpr_gap import tpr_gap
from .tasks import class_probabilities, labelled_samples

IPTTS_TEXT, IPTTS_LABEL = "Text", "bin_label"
PAIRS_AT_ONCE = 8192
MOST_TOLD = 8  # classes in a note
BETWEEN = " .\n"  # between the two texts of a pair while their words are looked for or swapped: a sentence ends, so that no term and no pronoun rule reaches across


def classification(run: Run, path: str, settings: Evaluate) -> Result:
    """Accuracy, F1 and, with a group column, the gaps between groups of a downstream run; columns default to the ones it was trained with, and
    where nobody asked for groups a file of one is measured without."""
    found = answer(run, settings, f"classification={path}", path, grouped=True)
    wanted, examples, notes = column(run, settings, "positive"), found.examples, []
    if not settings.group and len(groups := {e.group for e in examples}) == 1 and (group := groups.pop()) is not None:
        notes.append(f"{path}: no gaps between groups: all examples are of the group {group!r}")
        examples = [dataclasses.replace(e, group=None) for e in examples]
    measures, more = classification_measures(found.predicted, examples, found.known, wanted, where=path, seed=settings.seed, samples=settings.samples)
    return Result(measures, found.rows("classification", positive=positive_label(found.known, wanted)), found.notes + notes + more)


def classification_measures(predicted: list[str], examples, labels: tuple[str, ...], positive: str | None = None, *, where: str, seed: int = 0,
                            samples: int = 1000) -> tuple[list[Measure], list[str]]:
    """Accuracy, F1 (macro, and of the positive label where there is one) and, where the examples have groups, TPR-GAP (of two groups), equalised odds and
    demographic parity; with notes on what was left out.

    Raises DataError that begins with `where`, the file, on what cannot be measured there.
    """
    truth, notes = [e.label for e in examples], []
    positive = positive_label(labels, positive)
    try:
        found = [accuracy(predicted, truth, seed=seed, samples=samples), macro_f1(predicted, truth, seed=seed, samples=samples)]
        if positive in truth:
            found.append(f1(predicted, truth, positive, seed=seed, samples=samples))
        elif positive is not None:
            notes.append(f"{where}: no F1 of {positive!r}, which no example has")
        groups = [e.group for e in examples]
        if any(group is not None for group in groups):
            if len({*predicted}) == 1:
                notes.append(f"{where}: every prediction is {predicted[0]}: gaps and differences between groups are 0 whatever the texts are")
            if len(number := set(groups)) > 2:
                notes.append(f"{where}: no TPR-GAP, which is of 2 groups; {len(number)} groups here")
            else:
                gap = tpr_gap(predicted, truth, groups, seed=seed, samples=samples)
                found += gap.as_measures()
                hits = {label for label, guess in zip(truth, predicted) if label == guess}
                if (never := [name for name in gap.per_class if name not in hits]) and len({*predicted}) > 1:
                    notes.append(f"TPR-GAP: 0 since no example of them was found: {', '.join(never[:MOST_TOLD])}{' and others' if len(never) > MOST_TOLD else ''}")
                if gap.left_out:
                    notes.append(f"TPR-GAP: left out, without positives of both groups: {', '.join(gap.left_out)}")
                if single := [m.name.removeprefix("tpr-gap/class/") for m in gap.classes if math.isnan(m.low)]:
                    notes.append(f"TPR-GAP: without an interval, of a single example in one group: {', '.join(single)}")
            fair = fairness(predicted, truth, groups, classes=labels, seed=seed, samples=samples, shuffles=min(200, samples))
            found += fair.measures
            if fair.left_out:
                notes.append(f"equalized-odds: left out, without examples of them, or of others, in two groups: {', '.join(fair.left_out)}")
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    return found, notes


# ---------------------------------------------------------------- identity terms

def fprd_in_domain(run: Run, path: str, settings: Evaluate) -> Result:
    """FPRD on a labelled file; columns default to the ones the run was trained with."""
    entry = f"fprd={path}"
    positive = _positive(run, settings, entry)
    terms = read_terms(_terms(settings, entry))
    return _fprd(answer(run, settings, entry, path), positive, terms, "fprd", path, settings)


def iptts(run: Run, path: str, settings: Evaluate) -> Result:
    """FPRD on the identity phrase templates (columns Text and bin_label, 1 for hateful), whatever the run's own columns and labels are called."""
    entry = f"iptts={path}"
    positive = _positive(run, settings, entry)
    if column(run, settings, "text_pair"):
        raise ModelError(f"--on {entry}: expected a run on single texts, got one on pairs")
    terms = read_terms(settings.terms or terms_beside(path) or _terms(settings, entry))
    examples = corpus.read_examples(path, text=IPTTS_TEXT, label=IPTTS_LABEL)
    for e in examples:
        if e.label not in ("0", "1"):
            raise DataError(f"{e.place}: expected 0 or 1 in column '{IPTTS_LABEL}', got {e.label!r}")
    found = answer_examples(run, settings, examples, path)
    found.predicted = ["1" if label == positive else "0" for label in found.predicted]
    return _fprd(found, "1", terms, TEMPLATES, path, settings)


def check_asked(name: str, path: str, labels: tuple[str, ...], *, positive: str | None, terms: str | None, neutral: str | None) -> None:
    """Raises ConfigError where the measure `name` of a run with these labels could not be computed for want of a word of the user's. positive: as positive_label gives it."""
    if name in ("fprd", "iptts") and positive is None:
        raise ConfigError(f"positive: expected the hateful label, one of {', '.join(labels)}, got none")
    if terms is None and (name == "fprd" or name == "iptts" and terms_beside(path) is None):
        raise ConfigError(f"terms: expected a file of identity terms for {name}{', or identity.csv beside it' if name == 'iptts' else ''}, got none")
    if name == "bias-nli":
        try:
            nli.neutral_label(labels, neutral)
        except ConfigError:
            raise ConfigError(f"neutral: expected the label that means neutral, one of {', '.join(labels)}, got {neutral or 'none'}") from None


def terms_beside(path: str) -> Path | None:
    """The identity terms that the templates come with."""
    return beside if (beside := Path(path).with_name("identity.csv")).exists() else None


def _positive(run: Run, settings: Evaluate, entry: str) -> str:
    positive = positive_label(needs_classifier(run, settings, entry), column(run, settings, "positive"))
    if positive is None:
        raise ConfigError(f"--on {entry}: expected --positive with the hateful label, one of {', '.join(run.model.classifier.labels)}")
    return positive


def _terms(settings: Evaluate, entry: str) -> str:
    if settings.terms is None:
        raise ConfigError(f"--on {entry}: expected --terms FILE with the identity terms, one a line")
    return settings.terms


def _fprd(found: Answers, positive: str, terms: list[str], name: str, path: str, settings: Evaluate) -> Result:
    texts = [e.text if e.text_pair is None else e.text + BETWEEN + e.text_pair for e in found.examples]
    mentioned, clusters = mentions(texts, terms), frames(texts, terms) if name == TEMPLATES else None
    try:
        measured = fprd(found.predicted, [e.label for e in found.examples], positive, mentioned, terms, clusters=clusters, name=name, seed=settings.seed, samples=settings.samples)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    notes = [f"{path}: terms left out, which no text without the label {positive!r} mentions: {', '.join(measured.left_out)}"] if measured.left_out else []
    rows = [row | {"terms": [terms[z] for z in numpy.flatnonzero(mentioned[i])]} for i, row in enumerate(found.rows(name, positive=positive))]
    return Result(measured.measures, rows, found.notes + notes)


# ---------------------------------------------------------------- inference

def bias_nli(run: Run, path: str, settings: Evaluate) -> Result:
    """Net neutral, fraction neutral and thresholds on pairs made from the word lists in the folder `path`, PAIRS_AT_ONCE of them at a time."""
    entry = f"bias-nli={path}"
    known = needs_classifier(run, settings, entry)
    if run.config.get("text") and not run.config.get("text_pair"):
        raise ModelError(f"--on {entry}: expected a run on pairs of texts (--text-pair), got one on single texts")
    neutral = nli.neutral_label(known, settings.neutral)
    pairs = nli.read_pairs(path)
    numbers = pairs.numbers(settings.max_pairs or None, settings.seed)
    longest, cut, parts, rows, occupations = longest_of(run, settings), [], [], [], []
    for start in range(0, len(numbers), PAIRS_AT_ONCE):
        chunk = [pairs.pair(i) for i in numbers[start:start + PAIRS_AT_ONCE]]
        encoded = run.tokenizer.encode([p.premise for p in chunk], [p.hypothesis for p in chunk], longest)
        cut += [e for e in encoded if e.cut]
        probabilities = class_probabilities(run.model, labelled_samples(encoded), settings.batch_tokens)
        parts.append(probabilities)
        occupations += [p.occupation for p in chunk]
        if settings.examples:  # millions of rows are made only where somebody asked for them
            rows += [{"measure": "bias-nli", "text": p.premise, "text_pair": p.hypothesis, "occupation": p.occupation, "gendered": p.gendered, "neutral": neutral,
                      "predicted": known[int(row.argmax())], "probabilities": dict(zip(known, row.tolist()))} for p, row in zip(chunk, probabilities)]
    probabilities, place = numpy.concatenate(parts), known.index(neutral)
    measures = nli.measures(probabilities[:, place], probabilities.argmax(1) == place, occupations, seed=settings.seed, samples=settings.samples)
    sample = "" if len(numbers) == len(pairs) else f", a sample with seed {settings.seed} (--max-pairs 0 takes all)"
    notes = [f"{path}: {len(numbers)} of {len(pairs)} pairs{sample}; {len(set(occupations))} occupations; neutral is the label {neutral!r}"]
    return Result(measures, rows, notes + ([f"{path}: {len(cut)} pairs are longer than {longest} tokens and were cut"] if cut else []))


# ---------------------------------------------------------------- counterfactuals

def counterfactual_flips(run: Run, path: str, settings: Evaluate) -> Result:
    """Answers to the texts with words of the axis, and to their counterfactuals; a txt file has a text a line, of a table the text columns are read alone."""
    entry = f"counterfactual={path}"
    known = needs_classifier(run, settings, entry)
    axis = _axis(run, settings, entry)
    others = [str(folder) for folder in run.sources.values() if (header := read_header(folder))["axis"] == axis.name and header.get("axis_sha256", axis.digest()) != axis.digest()]
    examples = _texts(run, path, settings)
    families = [(i, found) for i, e in enumerate(examples) if (found := _variants(e, axis))]
    if not families:
        raise DataError(f"{path}: expected texts with words of the axis {axis.name}, found none in {len(examples)} texts")
    originals = [examples[i] for i, _ in families]
    changed = [variant for _, found in families for variant in found]
    of = [row for row, (_, found) in enumerate(families) for _ in found]
    longest = longest_of(run, settings)
    encoded = encode_examples(run.tokenizer, [*originals, *changed], longest)
    probabilities = class_probabilities(run.model, labelled_samples(encoded), settings.batch_tokens)
    before, after = probabilities[: len(originals)][of], probabilities[len(originals):]
    first, second = before.argmax(1), after.argmax(1)
    each = numpy.arange(len(of))
    measures = counterfactual.measures(first != second, after[each, first] - before[each, first], of, seed=settings.seed, samples=settings.samples)
    notes = [f"{path}: {len(families)} of {len(examples)} texts have words of the axis {axis.name}; {len(of)} counterfactuals"]
    ids = [(e.ids.tobytes(), None if e.segments is None else e.segments.tobytes()) for e in encoded]
    if alike := sum(ids[row] == ids[len(originals) + n] for n, row in enumerate(of)):
        notes.append(f"{path}: {alike} of {len(of)} counterfactuals have the tokens of their text, which counts as no flip: the words lie behind the cut, or the vocabulary lacks them")
    rows = []
    if settings.examples:
        for n, (row, variant) in enumerate(zip(of, changed)):
            e = originals[row]
            texts = {"text": e.text, "counterfactual": variant.text}
            if e.text_pair is not None:
                texts |= {"text_pair": e.text_pair, "counterfactual_pair": variant.text_pair}
            rows.append({"measure": counterfactual.NAME, "place": e.place, "source": families[row][0], "axis": axis.name, **texts,
                         "predicted": known[first[n]], "predicted_counterfactual": known[second[n]],
                         "probabilities": dict(zip(known, before[n].tolist())), "probabilities_counterfactual": dict(zip(known, after[n].tolist()))})
    return Result(measures, rows, cut_note(encoded, longest, f"{path} and counterfactuals") + notes
                  + [f"--axis {settings.axis}: other words of the same name than those that {folder} was learnt on" for folder in others])


def _axis(run: Run, settings: Evaluate, entry: str) -> Axis:
    """As the caller says, else the shipped one that all of the run's modules were learnt on. Raises ConfigError where that does not tell."""
    if settings.axis:
        return axes.load_axis(settings.axis)
    learnt = {re.sub(r"-\d+$", "", name) for name in run.model.methods}  # the second module of an axis is called axis-2
    if len(learnt) == 1 and (name := learnt.pop()) in axes.names():
        axis = axes.load_axis(name)
        if any(read_header(folder).get("axis_sha256", axis.digest()) != axis.digest() for folder in run.sources.values()):
            raise ConfigError(f"--on {entry}: expected --axis NAME|FILE, since {settings.model} has a module learnt on other words than those of the shipped axis {name}")
        return axis
    have = f"modules on {', '.join(run.model.methods)}" if run.model.methods else "no module"
    raise ConfigError(f"--on {entry}: expected --axis NAME|FILE, since {settings.model} has {have}")


def _texts(run: Run, path: str, settings: Evaluate) -> list[Example]:
    text, pair = column(run, settings, "text"), column(run, settings, "text_pair")
    if is_plain(path, settings.text, (text, pair)):
        return [Example(t.text, None, None, None, t.place) for t in corpus.read_texts([path])]
    return corpus.read_examples(path, text=text or "text", text_pair=pair)


def _variants(example: Example, axis: Axis) -> list[Example]:
    """The counterfactuals of an example; both texts of a pair change together, so that one identity takes another's place in both."""
    if example.text_pair is None:
        return [Example(found.text, None, None, None, example.place) for found in counterfactuals(example.text, axis)]
    both = example.text + BETWEEN + example.text_pair
    return [Example(*_parted(found, len(example.text)), None, None, example.place) for found in counterfactuals(both, axis)]


def _parted(found: Counterfactual, end: int) -> tuple[str, str]:
    """(first text, second text) of a counterfactual of both; end: where the first one ended before it was changed."""
    end += sum(len(swap.after) - (swap.end - swap.start) for swap in found.swaps if swap.end <= end)
    return found.text[:end], found.text[end + len(BETWEEN):]
