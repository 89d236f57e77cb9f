"""How a run answers: a file's examples in, predicted labels and probabilities out. What measuring (extrinsic.py, evaluation.py) and the phases share.

What it leaves out: what a measure makes of the answers.
"""

import dataclasses
from pathlib import Path

import numpy

from . import corpus
from .checkpoint import Run
from .config import LEAST, Evaluate, Predict
from .corpus import Example
from .encoder import Model
from .errors import ConfigError, ModelError
from .lines import called
from .metrics import Measure
from .tasks import class_probabilities, label_indices, labelled_samples
from .tokens import Tokenizer

LONGEST = 256  # tokens, where neither the caller nor the run says


@dataclasses.dataclass
class Result:
    """measures; examples: a dict for each example, for --examples; notes: lines for people (what was cut, left out)."""

    measures: list[Measure]
    examples: list[dict]
    notes: list[str]


@dataclasses.dataclass
class Answers:
    """N examples of a file. known: the run's labels. probabilities: float64 [N, C labels]. predicted: the likeliest label of each. notes: what was cut."""

    examples: list[Example]
    known: tuple[str, ...]
    probabilities: numpy.ndarray
    predicted: list[str]
    notes: list[str]

    def rows(self, measure: str, **more) -> list[dict]:
        """What --examples writes: all that a measure is computed from, so that two such files can be compared. more: the same value in every row."""
        found = []
        for e, predicted, row in zip(self.examples, self.predicted, self.probabilities):
            texts = {"text": e.text} if e.text_pair is None else {"text": e.text, "text_pair": e.text_pair}
            found.append({"measure": measure, "place": e.place, **texts, "label": e.label, "group": e.group, "predicted": predicted,
                          "probabilities": dict(zip(self.known, row.tolist())), **more})
        return found


def is_plain(source: str, named: str | None, columns: tuple[str | None, str | None]) -> bool:
    """Whether a source is one text a line: standard input ("-"), or a txt file of which no column is named. columns: the text's and the second text's.

    Raises ConfigError where it is and there have to be two texts, or a column of standard input is named.
    """
    if source == "-" and named is not None:
        raise ConfigError(f"--text {named}: expected a csv, tsv or jsonl file to take it from, got standard input, where a line is a text")
    txt = Path(source).name.lower().removesuffix(".gz").endswith(".txt")
    if source != "-" and (not txt or named is not None):
        return False
    if columns[1]:
        way = f" (a txt file with tabs: --text {columns[0]})" if txt else ""
        raise ConfigError(f"{called(source)}: expected a csv, tsv or jsonl file with the columns {columns[0]} and {columns[1]}, since the run labels pairs{way}")
    return True


def check_pairs(what: str, run: Run, pairs: bool) -> None:
    """Raises ConfigError where a run that was trained on pairs is asked about single texts, or the other way round. A folder that no run trained answers both."""
    if "text" in run.config and pairs != ("text_pair" in run.config):
        trained, asked = ("text pairs", "texts alone") if "text_pair" in run.config else ("single texts", "text pairs")
        raise ConfigError(f"{what}: the run was trained on {trained}; expected such, got {asked}")


def max_length(model: Model, wanted: int) -> int:
    """The longest text that both the caller and the model allow. Raises ConfigError where the modules leave no position for a token of a text."""
    encoder = model.encoder
    if encoder.longest < LEAST:
        raise ConfigError(f"modules: expected room for a text of {LEAST} tokens, the special ones among them, got {encoder.longest}: they take {encoder.hooks.position_shift} of the model's "
                          f"{model.config.max_positions} positions")
    return min(wanted, encoder.longest)


def longest_of(run: Run, settings: Evaluate | Predict) -> int:
    """As the caller says, else as the run was trained."""
    return max_length(run.model, settings.max_length or run.config.get("max_length", LONGEST))


def cut_note(encoded, longest: int, what: str) -> list[str]:
    """One line where texts were cut, else none. encoded: what has a `cut` each, the number of tokens left out."""
    return Cuts().count(encoded).note(longest, what)


@dataclasses.dataclass
class Cuts:
    """How many texts there were, how many of them were cut, and by how many tokens in all."""

    texts: int = 0
    cut: int = 0
    tokens: int = 0

    def count(self, encoded) -> "Cuts":
        """With these as well."""
        for one in encoded:
            self.texts, self.cut, self.tokens = self.texts + 1, self.cut + (one.cut > 0), self.tokens + one.cut
        return self

    def note(self, longest: int, what: str) -> list[str]:
        """As cut_note."""
        return [f"{what}: {self.cut} of {self.texts} texts are longer than {longest} tokens and were cut ({self.tokens} tokens left out)"] if self.cut else []


def encode_examples(tokenizer: Tokenizer, examples, longest: int) -> list:
    """Examples as token ids, pairs where they have a second text. Raises ConfigError where `longest` leaves no room for a token of a pair."""
    pairs = [e.text_pair for e in examples] if examples and examples[0].text_pair is not None else None
    if pairs is not None and longest < (least := LEAST + tokenizer.between):
        raise ConfigError(f"--max-length: expected at least {least} for pairs, the special tokens and one more, got {longest}")
    return tokenizer.encode([e.text for e in examples], pairs, longest)


def positive_label(labels: tuple[str, ...], wanted: str | None) -> str | None:
    """The label F1 is of: the one asked for, else 1, 1.0, true or yes (in any case) of two labels, else None. Raises ConfigError on an unknown one, and on "macro", whose F1
    would have the name of the mean over all."""
    if wanted == "macro":
        raise ConfigError("--positive: expected a label of another name than 'macro': f1/macro is the mean over all labels")
    if wanted is not None and wanted not in labels:
        raise ConfigError(f"--positive: expected one of {', '.join(labels)}, got {wanted!r}")
    if wanted is not None or len(labels) != 2:
        return wanted
    return next((label for label in labels if label.lower() in corpus.TRUE), None)


def column(run: Run, settings: Evaluate, name: str) -> str | None:
    """A column, or the positive label: as the caller says, else as the run was trained."""
    return getattr(settings, name) or run.config.get(name)


def needs_classifier(run: Run, settings: Evaluate, entry: str) -> tuple[str, ...]:
    """The run's labels. Raises ModelError where it has none."""
    if run.model.classifier is None:
        raise ModelError(f"{settings.model}: expected a model with a classifier for --on {entry}, got one without (`downstream` trains one)")
    return run.model.classifier.labels


def answer(run: Run, settings: Evaluate, entry: str, path: str, *, grouped: bool = False) -> Answers:
    """Answers to a labelled file whose columns default to the ones the run was trained with. Raises DataError on a label that is not the run's."""
    known = needs_classifier(run, settings, entry)
    if not column(run, settings, "text") or not column(run, settings, "label"):
        raise ConfigError(f"--on {entry}: expected --text COL and --label COL")
    examples = corpus.read_examples(path, text=column(run, settings, "text"), label=column(run, settings, "label").split(","),
                                    text_pair=column(run, settings, "text_pair"), group=column(run, settings, "group") if grouped else None)
    label_indices([e.label for e in examples], known, [e.place for e in examples])
    return answer_examples(run, settings, examples, path)


def answer_examples(run: Run, settings: Evaluate, examples: list[Example], what: str) -> Answers:
    """Answers to examples that were read; `what` names them in the note on texts that were cut."""
    check_pairs(settings.model, run, bool(examples) and examples[0].text_pair is not None)
    longest, known = longest_of(run, settings), run.model.classifier.labels
    encoded = encode_examples(run.tokenizer, examples, longest)
    probabilities = class_probabilities(run.model, labelled_samples(encoded), settings.batch_tokens)
    return Answers(examples, known, probabilities, [known[i] for i in probabilities.argmax(1)], cut_note(encoded, longest, what))
