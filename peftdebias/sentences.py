"""Sentences of a text, by a small rule that a reader can follow.

What it adds over corpus.py: where one sentence ends. It leaves out other languages' marks and anything learnt from data.

A sentence ends
1. at an empty line, and
2. at white space after . ! ? or an ellipsis (closing quotes and brackets may stand between), where the next character, opening quotes and brackets
   aside, is a capital, a digit or a letter without case; but not after a full stop
   - of an abbreviation (Mr. Mrs. Dr. St. vs. ...: `ABBREVIATIONS`; No. Vol. Fig. ... before a digit only: `NUMBERED`),
   - of an initial, one capital on its own (J. Smith), or of letters parted by points (U.S. Army, e.g. this), a pronoun I aside.
Numbers need no rule: in 3.5 no space follows. What the rule gets wrong: a sentence that ends with an abbreviation or an initial ("in the U.S. He ...")
stays joined to the next, which masked-LM does not mind; so do sentences that begin with a small letter.
"""

import re

ABBREVIATIONS = frozenset(
    "mr mrs ms mx dr prof rev hon fr sr jr st mt gen col maj capt cpt lt sgt cmdr adm gov sen rep pres supt messrs mme mlle "
    "ed eds vs cf al approx est inc ltd co corp bros dept univ jan feb mar apr jun jul aug sept sep oct nov dec".split()
)
NUMBERED = frozenset("no nos vol vols fig figs eq sec ch pp art".split())

# Each way begins where its stops or its white space begin: a run of thousands of either is read once, not once from each of its characters.
_END = re.compile(r"(?<![.!?\u2026])[.!?\u2026]+[\"'\u2019\u201d\u00bb)\]}]*\s+(?=[\"'\u2018\u201c\u00ab(\[{]*(\w))|(?<!\s)\s*\n[^\S\n]*\n\s*")
_WORD_BEFORE = re.compile(r"[^\W\d_]+(?:\.[^\W\d_]+)*$")


def split(text: str) -> list[str]:
    """The sentences in order, without white space around them; none of a blank text."""
    found, start = [], 0
    for end in _END.finditer(text):
        after = end[1]
        if after is None or end[0].count("\n") > 1 or (_begins(after) and not (text[end.start()] == "." and _continues(text, end.start(), after))):
            found.append(text[start : end.end()].strip())
            start = end.end()
    found.append(text[start:].strip())
    return [sentence for sentence in found if sentence]


def _begins(character: str) -> bool:
    return not character.islower() and character != "_"


def _continues(text: str, stop: int, after: str) -> bool:
    """Whether the full stop at `stop`, with `after` the next letter or digit, belongs to the word before it."""
    word = _WORD_BEFORE.search(text, max(0, stop - 20), stop)
    if word is None or text[stop + 1 : stop + 2] == ".":  # an ellipsis is no abbreviation
        return False
    low = word[0].lower()
    if low in NUMBERED:
        return after.isdigit()
    return low in ABBREVIATIONS or "." in low or (len(word[0]) == 1 and word[0].isupper() and word[0] != "I")
