"""Numbers, units and names as a report writes them."""

import math

from ..metrics import bare_name
from .page import Cell
from .reading import Source
from .results import LOWER_IS_BETTER, Line, is_floor

STAGES = {"upstream": "Upstream: the masked-LM", "downstream": "Downstream: the classifier", "transfer": "Transfer: the module on another task"}
BARS = "Bars are 95 % intervals, cut at what is possible"  # results.drawn_ends
GLOSSARY = {
    "crows-pairs": "share of sentence pairs in which the model prefers the more stereotyping one, in two scorings that must not be mixed; ideal 50 %",
    "stereoset": "lm: share of sensible words preferred over senseless ones, ideal 100 %; ss: share in which the stereotype is preferred, ideal 50 %; icat joins "
                 "the two, ideal 100 %",
    "seat": "effect size of the association of two groups with two sets of attributes; ideal 0",
    "seat-mean": "effect size of the association of two groups with two sets of attributes, by the mean of a sentence's vectors; ideal 0",
    "mlm-loss": "mean negative log-likelihood of a masked token, in nats; lower is better",
    "perplexity": "exponential of the masked-LM loss; lower is better",
    "accuracy": "share of texts that get their label; ideal 100 %",
    "f1": "harmonic mean of precision and recall, of one class or as the mean over classes (macro); ideal 100 %",
    "tpr-gap": "true positive rate of the first group minus that of the second, root mean square over classes (rms); ideal 0, to be read against what chance alone "
               "gives (shuffled)",
    "equalized-odds": "how far true and false positive rates lie apart between the groups; ideal 0, to be read against shuffled",
    "demographic-parity": "how far the shares of a predicted class lie apart between the groups; ideal 0, to be read against shuffled",
    "fprd": "sum over identity terms of |false positive rate of harmless texts with the term - that of all|; ideal 0, to be read against shuffled",
    "fprd-iptts": "the same on identity phrase templates",
    "bias-nli": "answers of neutral to pairs of an occupation and a gendered word; ideal 1",
    "counterfactual": "share of texts whose label changes when the words of the axis are swapped (flips), and by how much the label's probability does; ideal 0",
}


def number(value: float | None, unit: str = "%", signed: bool = False) -> str:
    """With as many digits as a reader needs; "–" for none."""
    if value is None:
        return "–"
    digits = 2 if unit in ("%", "points") else 1 if abs(value) >= 100 else 3
    if value and not round(value, digits) and abs(value) >= 1e-6:  # not 0, and not shown as if it were
        digits = 1 - math.floor(math.log10(abs(value)))
    value = round(value, digits) + 0.0  # no -0.00
    return f"{value:{'+' if signed and value else ''}.{digits}f}".replace("-", "\u2212")


def count(n: int | None) -> str:
    return "–" if n is None else f"{n:,}"


def examples(name: str, of: dict[str, dict[str, Line]]) -> str:
    """Of how many examples a measure is; the number of each system, in their order, where they differ."""
    counts = [found[name].n for found in of.values() if name in found]
    return count(counts[0]) if len(set(counts)) == 1 else " / ".join(map(count, counts))


def interval(low: float | None, high: float | None, unit: str) -> str:
    return "" if low is None or high is None else f"{number(low, unit)} to {number(high, unit)}"


def cell(line: Line | None, *small: str) -> Cell:
    """"54.10 ± 0.20" with the interval below."""
    if line is None:
        return Cell("–", small)
    text = number(line.mean, line.unit) + (f" ± {number(line.sd, line.unit)}" if line.sd else "")
    return Cell(text, tuple(s for s in (interval(line.low, line.high, line.unit), *small) if s))


def unit_of(unit: str) -> str:
    return "" if unit in ("1", "") else f", {unit}"


def stage_title(stage: str, task: str) -> str:
    title = STAGES.get(stage, stage)
    return f"{title} ({task})" if task else title


def ideal_of(line: Line) -> str:
    return number(line.ideal, line.unit) if line.ideal is not None else "lower" if bare_name(line.name) in LOWER_IS_BETTER else "chance" if is_floor(line.name) else "–"


def is_of(column: dict, stage: str, task: str) -> bool:
    """Whether a column of the paper's table is about a task at a stage."""
    return column["stage"] == stage and column["task"] in (None, task)


def titled(source: Source, stage: str, task: str, name: str) -> str:
    """What the paper's table calls a measure of a task at a stage, else its name."""
    return next((c["title"] for c in source.columns if is_of(c, stage, task) and c["measure"] == name), name)


def duration(seconds: float) -> str:
    """"1 h 02 min", "3 min 20 s", "45 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
