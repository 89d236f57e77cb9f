"""How many pronouns come back when a corpus is swapped twice: python bench/pronouns.py FILE [--half quoted|built|all]

male -> female -> male for his and him, female -> male -> female for her and hers. The rules of axes/pronouns.toml were built on the first, third, fifth ...
line of bug_upstream.txt (and on other corpora); the figures quoted are those of its second, fourth, sixth ... line.
`told apart` is stricter than `came back`: of the places where the counterfactual would read her, the share in which the table finds his or him again. It
also counts a his that became hers (a friend of his), as if it had become her.
"""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.arguments import Parser, existing_file  # noqa: E402
from peftdebias.axes import Axis, load_axis  # noqa: E402
from peftdebias.cda import counterfactuals  # noqa: E402
from peftdebias.pronouns import deciding_rule  # noqa: E402

PRONOUNS = ("his", "him", "her", "hers")
HALVES = {"quoted": slice(1, None, 2), "built": slice(0, None, 2), "all": slice(None)}


def round_trips(texts, axis: Axis) -> Counter:
    """Counts (pronoun, what it became, what that became): ("him", "her", "him") is one that came back; and ("told apart", pronoun, found)."""
    counts = Counter()
    for text in texts:
        for variant in counterfactuals(text, axis):
            back = {swap.start: swap.after for variant_back in counterfactuals(variant.text, axis) for swap in variant_back.swaps}
            shift = 0  # how much further right the counterfactual is than the text
            for swap in variant.swaps:
                start, before, after = swap.start + shift, swap.before.lower(), swap.after.lower()
                shift += len(swap.after) - len(swap.before)
                if before in PRONOUNS:
                    counts[before, after, back.get(start, after).lower()] += 1
                    if before in ("his", "him"):
                        reading = variant.text[:start] + "her" + variant.text[start + len(after) :]
                        counts["told apart", before, deciding_rule(reading, start, start + 3, "her").becomes["her"]] += 1
    return counts


def share(counts: Counter, pronoun: str) -> tuple[int, int]:
    """(came back, all uses) of one pronoun."""
    uses = {key: n for key, n in counts.items() if key[0] == pronoun}
    return sum(n for key, n in uses.items() if key[2] == pronoun), sum(uses.values())


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=existing_file)
    parser.add_argument("--half", choices=HALVES, default="quoted", help="quoted: every second line from the second on (default)")
    arguments = parser.parse_args()
    lines = arguments.file.read_text(encoding="utf-8").split("\n")[HALVES[arguments.half]]
    counts = round_trips(lines, load_axis("gender"))
    print(f"{arguments.file}, {arguments.half}: {len(lines)} lines")
    print(f"{'pronoun':8}{'uses':>8}{'came back':>11}{'share':>10}{'told apart':>12}  became")
    for pronoun in PRONOUNS:
        back, uses = share(counts, pronoun)
        became = Counter()
        for key, n in counts.items():
            if key[0] == pronoun:
                became[key[1]] += n
        apart = f"{counts['told apart', pronoun, pronoun] / uses:.2%}" if uses and pronoun in ("his", "him") else ""
        listed = ", ".join(f"{word} {n}" for word, n in became.most_common())
        print(f"{pronoun:8}{uses:8}{back:11}{back / max(uses, 1):10.2%}{apart:>12}  {listed}")


if __name__ == "__main__":
    main()
