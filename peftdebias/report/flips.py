"""Texts whose label changes when the words of the axis are swapped, from the rows that `evaluate --examples` keeps of `--on counterfactual`."""

import difflib
import re
from pathlib import Path

from ..errors import DataError
from ..metrics import bare_name
from ..metrics.counterfactual import NAME
from .page import Example, Examples, Section
from .reading import Answered, Source, is_number, rows

KEYS = {"text": str, "counterfactual": str, "predicted": str, "predicted_counterfactual": str, "probabilities": dict, "probabilities_counterfactual": dict}
WARNING = ("These are texts of the data that was measured and may be offensive, as may what is made of them. A flip shows that words of the axis decide; whether "
           "they may is for the reader to judge.")


def flips(source: Source, most: int) -> Section | None:
    """The section, or None where no answers to counterfactuals were kept. most: how many a system shows at most."""
    blocks = []
    for stage, task in source.stages():
        for system, answers in source.of(stage, task).items():
            for answer in answers:  # one seed is enough
                if answer.examples and (found := _read(answer.examples))[1]:
                    blocks.append(_block(system, answer, task, *found, most))
                    break
    return Section("flips", "Texts whose label flips", [WARNING], blocks) if blocks else None


def _read(path: Path) -> tuple[list[tuple[float, dict]], int]:
    """((change of the label's probability, row) of those that flip, how many counterfactuals there are)."""
    found, count = [], 0
    for where, row in rows(path):
        if bare_name(str(row.get("measure"))) != NAME:  # of one file, or of each of several
            continue
        for key, kind in KEYS.items():
            if not isinstance(row.get(key), kind):
                raise DataError(f"{where}: expected {key!r} in a row of {NAME}, got {', '.join(row)}")
        label, other = row["predicted"], row["predicted_counterfactual"]
        before, after = row["probabilities"], row["probabilities_counterfactual"]
        numbers = [p.get(name) for p in (before, after) for name in (label, other)]
        if not all(map(is_number, numbers)):
            raise DataError(f"{where}: expected probabilities of {label!r} and {other!r}, got {', '.join(before)}")
        count += 1
        if label != other:
            found.append((before[label] - after[label], row))
    return found, count


def _block(system: str, answer: Answered, task: str, found: list[tuple[float, dict]], count: int, most: int) -> Examples:
    found = sorted(found, key=lambda pair: -pair[0])  # stable: those of one size in the order of the file
    many = len(found)
    shown = f" Shown: the {most} in which the probability of the first label falls most." if many > most else ""
    note = f"Seed {answer.seed}: {many} of {count} counterfactuals get another label.{shown}"
    return Examples(f"{system}{', ' + task if task else ''}: {many} of {count}", note, [_example(row) for _, row in found[:most]])


def _example(row: dict) -> Example:
    text, other = row["text"], row["counterfactual"]
    if isinstance(row.get("text_pair"), str) and isinstance(row.get("counterfactual_pair"), str):
        text, other = f"{text}\n{row['text_pair']}", f"{other}\n{row['counterfactual_pair']}"
    one, two = pieces(text, other)
    label, new = row["predicted"], row["predicted_counterfactual"]
    return Example(str(row.get("place", "")).rsplit("/", 1)[-1], one, two, (label, f"{100 * row['probabilities'][label]:.0f} %"),
                   (new, f"{100 * row['probabilities_counterfactual'][new]:.0f} %"))


def pieces(first: str, second: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Both texts in pieces, True where they differ; words are compared whole. The pieces of each end to end are the text."""
    words = [re.findall(r"\w+|\s+|[^\w\s]", text) for text in (first, second)]
    sides: tuple[list, list] = ([], [])
    for kind, a, b, c, d in difflib.SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        for side, piece in zip(sides, ("".join(words[0][a:b]), "".join(words[1][c:d]))):
            if piece:
                side.append((piece, kind != "equal"))
    return sides
