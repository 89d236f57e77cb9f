"""A source as sections of a page, in their order. A section without data is left out."""

from .about import about
from .flips import flips
from .page import Section
from .plots import one_by_one, trade_off
from .reading import Source
from .results import Compared
from .tables import against_paper, tables
from .training import training


def sections_of(source: Source, ident: str, most_examples: int, every: Compared) -> list[Section]:
    """All of them; ident begins the ids of the page's elements. every: what `results.compared` gives."""
    made = [about(source), against_paper(source, ident), *tables(source, every), trade_off(source, ident),
            one_by_one(source, ident, "classes", "/class/", "True positive rate gaps, class by class",
                        "How much more often a class is found for the first group (the one called f, female, w or woman, else the first of the alphabet) than for the second. 0 is ideal."),
            one_by_one(source, ident, "terms", "/term/", "False positive rates, by identity term",
                        "How often harmless texts that mention a term are taken for hateful. Ideally all terms have the rate of all texts, and that is 0."),
            training(source, ident), flips(source, most_examples)]
    return [Section(f"{ident}-{s.id}", s.title, s.paragraphs, s.blocks, s.notes) for s in made if s is not None]
