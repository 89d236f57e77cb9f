"""Where a sentence ends: the rule's cases one by one."""

import time

import pytest

from peftdebias.sentences import split


@pytest.mark.parametrize("text", [
    "She left. | He stayed.", "Did she? | Yes! | He did...", "It cost 3.5 dollars. | 2 more came.", "Dr. Smith and Mrs. J. R. Brown met at St. Mary's vs. Leeds.",
    "See No. 5 and Fig. 2 first. | Then go.", "He said no. | Then he left.", "The U.S. Army and e.g. Bob stayed.", "So do I. | She does not.",
    "\"Go,\" he said. | \"No!\" she said \u201cNever.\u201d | \u201cWhy?\u201d", "(She left.) | [He stayed.]", "He left . | She stayed .", "etc. and so on. | End",
    "It ended... | Then it began.", "what? no capital. no end", "One line\nof two. | Done", "A heading\n\n| and an empty line.", "from the U.S.\n\n| He left.", "\u00c9t\u00e9. | \u00c0 vous.",
    "\u0416\u0434\u0430. | \u041e\u043d.", "no end", "Wait.What", "Mr.",
    "It was plan b. | Then it ended.", "So it was. _he_ said", "They met Mr... | Then they left.", "It ended.\nand went on. | Then",
    "A firm? | A co? | It is.", "{She left.} | {He stayed.}", "A heading\n \t\n| and a line of space.", "Mx. Lee left. | He stayed.",
])  # fmt: skip
def test_sentences(text):
    """A bar stands where a sentence ends."""
    assert split(text.replace("| ", "")) == [part.strip() for part in text.split("|")]


def test_blank_texts_have_none():
    assert split("") == split(" \n\n ") == []


def test_long_runs_are_read_once():
    """Of stops, as tables of contents have them, and of space: not once more from each of their characters."""
    start = time.process_time()
    for text in (f"a{'.' * 30_000}b.", f"a{' ' * 60_000}b."):
        assert split(text) == [text]
    assert time.process_time() - start < 2  # 0.01 s here, else 10


def test_nothing_but_space_is_lost():
    text = "He (Dr. No) said: \"3.5 p.m. is fine.\"  Then\n\n\nhe left!  \t Why?"
    assert "".join("".join(split(text)).split()) == "".join(text.split())
