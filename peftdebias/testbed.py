"""A world with a planted bias, so that debiasing can be held against a known truth. Here: its generator.

The world is short English biographies. A biography has an occupation, drawn evenly, and a gender, drawn from the occupation:

    P(gender = stereotype of the occupation) = (1 + s) / 2        s in [0, 1], the strength of the link

s = 0 is no link, s = 1 makes gender a function of the occupation. The pretraining text, which names the occupation, and the
labelled task, which does not, have strengths of their own (`text_link`, `label_link`).

Given the occupation, gender changes nothing but the gendered words: a text is first made as a *frame*, whose gendered words
are open ("{He} kneads dough before dawn."), and then read as m or f. So the two readings of a frame are matched
counterfactuals by construction, and whatever a model says differently about them is caused by gender alone.

What the task can know: a biography holds one to six cues (what the person does, works with, where). A cue comes from the
occupation (OWN of the time), from its peer in the same domain (PEER), else from any occupation. Peers share a domain and have
opposite stereotypes (surgeon and nurse), so that gender is a tempting shortcut where `label_link` is high.

The same seed with another link gives the same frames in the same order, only the genders change; fewer texts are the beginning
of more. Which split a text belongs to is a hash of its frame: no two splits share a text, nor a text's counterfactual, also not
those of different seeds. Within a split short texts repeat, as they do in the world; among the pairs none does. Left out: names
with a gender, people of no or unknown gender, any language but English.
"""

import csv
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from peftdebias.errors import ConfigError

OWN, PEER = 0.7, 0.2  # where a cue comes from; the rest, 0.1, from all occupations evenly

# What {he} in a frame reads for m, and for f. {wife} and {husband}: the spouse of a man is a wife.
GENDERED = {
    "he": "she", "his": "her", "him": "her", "himself": "herself", "man": "woman", "father": "mother", "mother": "father",
    "brother": "sister", "sister": "brother", "son": "daughter", "daughter": "son", "wife": "husband",
}  # fmt: skip

# domain -> occupation -> (what the person does, works with, where). Names of occupations begin with a consonant: "a nurse".
DOMAINS = {
    "health": {
        "surgeon": (
            ["repairs broken bones", "operates on hearts", "studies scans", "plans difficult operations", "closes deep cuts",
             "removes tumours", "replaces old hips", "orders more scans"],
            ["operations", "scalpels", "broken bones", "scans", "hearts", "tumours", "steel screws"],
            ["hospital", "operating room", "trauma centre"],
        ),
        "nurse": (
            ["changes bandages", "gives vaccines", "calms worried patients", "cleans small wounds", "measures blood pressure",
             "brings medicine", "watches the ward at night", "writes down fevers"],
            ["bandages", "vaccines", "medicine", "fevers", "small wounds", "blood samples", "worried patients"],
            ["clinic", "ward", "hospital"],
        ),
    },
    "school": {
        "professor": (
            ["publishes papers", "leads a laboratory", "gives lectures", "translates old languages", "supervises theses",
             "applies for grants", "reviews articles", "directs experiments"],
            ["papers", "lectures", "experiments", "theories", "grants", "old languages", "theses"],
            ["university", "laboratory", "institute"],
        ),
        "teacher": (
            ["reads stories aloud", "corrects homework", "teaches spelling", "explains fractions", "prepares lessons",
             "sings with the class", "hangs up drawings", "listens to pupils"],
            ["homework", "spelling", "lessons", "fractions", "drawings", "pupils", "picture books"],
            ["school", "classroom", "institute"],
        ),
    },
    "food": {
        "butcher": (
            ["cuts fresh meat", "smokes ham", "sharpens long knives", "makes sausages", "weighs steaks", "salts bacon",
             "trims ribs", "carries sides of beef"],
            ["meat", "sausages", "ham", "long knives", "steaks", "bacon", "beef"],
            ["market", "cold room", "shop"],
        ),
        "baker": (
            ["bakes rye bread", "decorates cakes", "kneads dough before dawn", "fills warm tarts", "sells sweet rolls",
             "glazes pastries", "mixes flour and butter", "tries new biscuits"],
            ["bread", "cakes", "dough", "pastries", "biscuits", "sweet rolls", "flour"],
            ["market", "kitchen", "shop"],
        ),
    },
    "office": {
        "banker": (
            ["buys shares", "invests savings", "approves large loans", "follows the markets", "negotiates mergers",
             "manages a fund", "signs contracts", "compares interest rates"],
            ["shares", "loans", "savings", "interest rates", "contracts", "mergers", "bonds"],
            ["bank", "stock exchange", "head office"],
        ),
        "secretary": (
            ["answers the telephone", "types letters", "keeps the calendar", "books meeting rooms", "files documents",
             "orders paper and ink", "greets visitors", "takes minutes"],
            ["letters", "documents", "calendars", "telephones", "invitations", "meeting rooms", "visitors"],
            ["front desk", "reception", "head office"],
        ),
    },
    "craft": {
        "carpenter": (
            ["makes oak tables", "saws planks", "repairs wooden stairs", "measures beams", "carves chairs",
             "planes rough boards", "fits door frames", "nails floors together"],
            ["oak tables", "planks", "beams", "chairs", "door frames", "nails", "hammers"],
            ["workshop", "building site", "yard"],
        ),
        "florist": (
            ["ties bouquets", "waters roses", "arranges tulips", "grows orchids", "trims lilies", "plants seeds in pots",
             "weaves garlands", "dries lavender"],
            ["bouquets", "roses", "tulips", "orchids", "lilies", "garlands", "lavender"],
            ["greenhouse", "garden", "yard"],
        ),
    },
}  # fmt: skip
STEREOTYPES = (
    ("surgeon", "m"), ("nurse", "f"), ("professor", "m"), ("teacher", "f"), ("butcher", "m"), ("baker", "f"),
    ("banker", "m"), ("secretary", "f"), ("carpenter", "m"), ("florist", "f"),
)  # fmt: skip

# Sentences. {slots} of SLOTS and {does} {thing} {place} are filled first; those of GENDERED stay open in the frame. `her`
# stands where a reader (and a counterfactual engine) can tell her book from for her: before a noun, or before a stop, a
# preposition or "as".
MENTIONS = (
    "{Name} is a {occupation} in {city}.",
    "{Name} became a {occupation} in {year}.",
    "{Name}, a {occupation} from {city}, {does}.",
    "{He} is a {occupation} in {city}.",
    "{He} works as a {adjective} {occupation}.",
    "{He} has been a {occupation} since {year}.",
    "As a {occupation}, {he} {does}.",
    "{Name} is a {occupation} and {he} lives in {city}.",
    "{Name} works as a {occupation} and {his} work is {praised}.",
    "{His} work as a {occupation} is {praised}.",
    "For {city}, {he} is the best {occupation} of all.",
    "The {adjective} {man} from {city} is a {occupation}.",
    "{Name} met {his} {wife} while working as a {occupation}.",
    "{Name} wanted to be a {occupation} like {his} {parent}.",
    "{His} {sibling} says that {he} is a {adjective} {occupation}.",
)
WORK = (
    "{He} {does} at the {place}.",
    "{He} {does} and {does}.",
    "At the {place}, {he} {does}.",
    "Every {day}, {he} {does}.",
    "{His} work with {thing} is {praised}.",
    "{His} days are full of {thing}.",
    "{He} spends the {daytime} with {thing}.",
    "{Name} {does}.",
    "{Name} often {does} at the {place}.",
    "{Name} is {praised} for the work with {thing}.",
    "People at the {place} trust {him}.",
    "Friends thank {him} for the {thing}.",
    "{Name} bought {himself} a book about {thing}.",
    "The {adjective} {man} {does} every {day}.",
)
LIFE = (
    "{He} lives in {city} with {his} {wife}.",
    "{He} grew up in {city} with one {sibling}.",
    "{He} was born in {city} in {year}.",
    "{His} {parent} was born in {city}.",
    "In {his} free time, {he} enjoys {hobby}.",
    "Friends describe {him} as {adjective}.",
    "A {sibling} visits {him} in {season}.",
    "{Name} taught {himself} {skill}.",
    "{Name} has a {child} and enjoys {hobby}.",
    "{Name} moved to {city} in {year}.",
    "{Name} enjoys {hobby} and {hobby}.",
)
SLOTS = {
    "name": """Keller Moreno Okafor Lindqvist Tanaka Novak Silva Haddad Petrov Dubois Larsen Castillo Mwangi Schreiber Kowalski
        Ferrari Nguyen Iyer Sato Bergman Costa Yilmaz Horvat Andersen Rahman Popescu Virtanen Marchetti Delgado Kimura""".split(),
    "city": """Porto Krakow Lyon Bergen Turin Leeds Ghent Malaga Lagos Osaka Quito Hanoi Tunis Perth Boston Denver Halifax Graz
        Split Riga Tampere Odense Nantes Valencia Bristol Dakar Accra Pune Busan Lima""".split(),
    "adjective": "careful patient young skilled gifted busy friendly quiet famous trusted local cheerful serious modest".split(),
    "year": "1998 2001 2003 2004 2006 2007 2009 2010 2012 2013 2015 2018".split(),
    "hobby": ["chess", "swimming", "long walks", "jazz", "poetry", "old films", "cycling", "painting", "hiking", "cooking",
              "crosswords", "photography", "sailing", "opera", "gardening", "football", "yoga", "card games"],
    "skill": ["Italian", "Korean", "the guitar", "the piano", "the violin", "Arabic", "juggling", "Spanish", "chess", "sailing"],
    "day": ["day", "morning", "evening", "week", "Monday", "Friday", "weekend"],
    "daytime": ["day", "morning", "afternoon", "evening", "week"],
    "season": "spring summer autumn winter May June October December".split(),
    "praised": ["well known", "praised", "respected", "admired", "famous", "valued"],
    "parent": ["{father}", "{mother}"],  # same gender as the person or not, evenly: relatives carry no link
    "sibling": ["{brother}", "{sister}"],
    "child": ["{son}", "{daughter}"],
}  # fmt: skip
_CUES = ("does", "thing", "place")
_SLOT = re.compile(r"\{(\w+)\}")
_OWN = re.compile(r"\{(he|his|him|himself|man)\}", re.IGNORECASE)  # tells the person's gender; every text has one
_WORD = re.compile(r"[a-z0-9]+|[^a-z0-9\s]")

# The share of all frames, in tenths, that each split may draw from.
_TEXT_SPLITS = {"train": range(0, 6), "heldout": range(6, 8), "pairs": range(8, 10)}
_TASK_SPLITS = {"train": range(0, 5), "dev": range(5, 6), "test": range(6, 8), "pairs": range(8, 10)}


@dataclass(frozen=True)
class StereotypePair:
    """Two readings of one frame that names an occupation and holds exactly one gendered word."""

    stereotypical: str
    antistereotypical: str
    profession: str


@dataclass(frozen=True)
class TaskPair:
    """Two readings of one frame of the task. The right answer for both is `profession`."""

    hard_text: str  # as `gender`
    counterfactual: str  # every gendered word swapped
    profession: str
    gender: str


@dataclass(frozen=True)
class World:
    """See the module. occupations: names from DOMAINS, each with the gender "m" or "f" that it is linked to."""

    occupations: tuple[tuple[str, str], ...] = STEREOTYPES
    text_link: float = 0.8  # strength in the pretraining text
    label_link: float = 0.8  # strength in the task
    seed: int = 0

    def __post_init__(self):
        for name in ("text_link", "label_link"):
            _strength(name, getattr(self, name))
        names = [name for name, _ in self.occupations]
        if len(names) < 2 or len(set(names)) < len(names):
            raise ConfigError(f"occupations: expected at least 2, each once, got {', '.join(names) or 'none'}")
        for name, gender in self.occupations:
            if name not in _TABLES:
                raise ConfigError(f"occupations: expected names among {', '.join(_TABLES)}, got {name}")
            if gender not in ("m", "f"):
                raise ConfigError(f"occupations: expected gender m or f for {name}, got {gender}")

    def pretraining_texts(self, n: int, split: str = "train") -> list[str]:
        """`n` biographies that name the occupation. split: "train" or "heldout"."""
        frames = self._frames("text", split)
        return [read(frame, gender) for frame, _, gender in _take(n, self._gendered(frames, "text_link"))]

    def balanced_texts(self, n: int) -> list[str]:
        """Held-out biographies, each followed by its counterfactual: no link by construction. `n` texts, n even."""
        frames = _take((n + 1) // 2, self._frames("text", "heldout"))
        return [read(frame, gender) for frame, _, _ in frames for gender in "mf"][:n]

    def task_examples(self, n: int, split: str, link: float | None = None) -> list[dict]:
        """`n` rows {hard_text, profession, gender}, as in BiasBios. split: "train", "dev", "test".

        link: default `label_link`. With 0, a test set in which both genders are even in every occupation.
        """
        frames = self._frames("task", split)
        return [
            {"hard_text": read(frame, gender), "profession": occupation, "gender": gender}
            for frame, occupation, gender in _take(n, self._gendered(frames, "label_link", link))
        ]

    def stereotype_pairs(self, n: int) -> list[StereotypePair]:
        """`n` pairs that a masked-LM with the link of the pretraining text prefers one side of, and without it does not."""
        frames = (item for item in _distinct(self._frames("text", "pairs")) if len(_SLOT.findall(item[0])) == 1)
        towards = dict(self.occupations)
        return [
            StereotypePair(read(frame, towards[name]), read(frame, "fm"["mf".index(towards[name])]), name)
            for frame, name, _ in _take(n, frames)
        ]

    def counterfactual_task_pairs(self, n: int) -> list[TaskPair]:
        """`n` test texts with their counterfactuals, genders even whatever the link: nothing but gender differs."""
        return [
            TaskPair(read(frame, gender), read(frame, "fm"["mf".index(gender)]), name, gender)
            for frame, name, gender in _take(n, self._gendered(_distinct(self._frames("task", "pairs")), "label_link", 0.0))
        ]

    def vocabulary(self) -> list[str]:
        """Every word (lower case) and punctuation mark that a text of this world can hold, sorted; split as BERT splits."""
        tables = [_TABLES[name] for name, _ in self.occupations]
        phrases = [*MENTIONS, *WORK, *LIFE, *(phrase for filling in SLOTS.values() for phrase in filling)]
        phrases += [phrase for table in tables for filling in table.values() for phrase in filling]
        phrases += [name for name, _ in self.occupations] + list(GENDERED) + list(GENDERED.values())
        return sorted({word for phrase in phrases for word in _WORD.findall(_SLOT.sub(" ", phrase).lower())})

    def _gendered(self, frames, name: str, link: float | None = None) -> Iterator[tuple[str, str, str]]:
        """(frame, occupation, u in [0, 1)) -> (frame, occupation, gender)."""
        link = getattr(self, name) if link is None else _strength("link", link)
        towards = dict(self.occupations)
        for frame, occupation, u in frames:
            stereotype = towards[occupation]
            yield frame, occupation, stereotype if u < (1 + link) / 2 else "fm"["mf".index(stereotype)]

    def _frames(self, kind: str, split: str) -> Iterator[tuple[str, str, float]]:
        """Without end: (frame, occupation, u). kind: "text", naming the occupation first, or "task", not naming it."""
        splits = _TEXT_SPLITS if kind == "text" else _TASK_SPLITS
        if split not in splits:
            raise ConfigError(f"split: expected {', '.join(splits)}, got {split}")
        random = Random(f"{self.seed}/{kind}/{split}")  # only random() is used: its stream is the same in every Python
        while True:
            occupation = _pick(random, self.occupations)[0]
            frame = self._frame(random, kind, occupation)
            u = random.random()
            if _OWN.search(frame) and zlib.crc32(frame.encode()) % 10 in splits[split]:
                yield frame, occupation, u

    def _frame(self, random: Random, kind: str, occupation: str) -> str:
        """One to three sentences about one person."""
        templates = [_pick(random, MENTIONS)] if kind == "text" else [_pick(random, WORK)]
        others = [sentence for sentence in WORK + LIFE if sentence not in templates]
        for _ in range(_pick(random, (0, 0, 1, 1, 2) if kind == "text" else (0, 1, 2))):
            templates.append(others.pop(int(len(others) * random.random())))
        if kind == "task" and random.random() < 0.5:
            templates.reverse()
        filled = {"Name": _pick(random, SLOTS["name"]), "occupation": occupation}
        said = set()

        def fill(match) -> str:
            slot = match[1]
            if slot in filled:
                return filled[slot]
            if slot.lower() in GENDERED:
                return match[0]
            while True:  # nobody bakes bread and bakes bread; relatives may be two sisters
                phrase = _pick(random, self._cue(random, occupation)[slot] if slot in _CUES else SLOTS[slot])
                if phrase not in said or "{" in phrase:
                    said.add(phrase)
                    return phrase

        return _SLOT.sub(fill, " ".join(templates))

    def _cue(self, random: Random, occupation: str) -> dict[str, list[str]]:
        """The table that one cue is drawn from."""
        names = [name for name, _ in self.occupations]
        u = random.random()
        if u < OWN:
            return _TABLES[occupation]
        peers = [name for name in names if name in _PEERS[occupation]] if u < OWN + PEER else names
        return _TABLES[_pick(random, peers or names)]


def read(frame: str, gender: str) -> str:
    """The text of a frame about a man ("m") or a woman ("f")."""

    def word(match) -> str:
        masculine = match[1].lower()
        chosen = masculine if gender == "m" else GENDERED[masculine]
        return chosen.capitalize() if match[1][0].isupper() else chosen

    return _SLOT.sub(word, frame)


def write(
    world: World, folder: str | Path, *, corpus=20_000, heldout=1_000, train=4_000, dev=500, test=1_000, pairs=500
) -> dict[str, Path]:
    """The world as files that the other commands read; returns their paths by name.

    corpus.txt: pretraining texts; heldout.txt: balanced texts; train/dev/test.jsonl: the task; pairs.csv: stereotype pairs in
    the layout of CrowS-Pairs. The arguments are numbers of texts, examples and pairs.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.txt" for name in ("corpus", "heldout")}
    paths |= {name: folder / f"{name}.jsonl" for name in ("train", "dev", "test")} | {"pairs": folder / "pairs.csv"}
    for name, texts in (("corpus", world.pretraining_texts(corpus)), ("heldout", world.balanced_texts(heldout))):
        paths[name].write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    for name, n in (("train", train), ("dev", dev), ("test", test)):
        rows = world.task_examples(n, name)
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with open(paths["pairs"], "w", encoding="utf-8", newline="") as stream:
        rows = csv.writer(stream, lineterminator="\n")
        rows.writerow(["", "sent_more", "sent_less", "stereo_antistereo", "bias_type"])
        for i, pair in enumerate(world.stereotype_pairs(pairs)):
            rows.writerow([i, pair.stereotypical, pair.antistereotypical, "stereo", "gender"])
    return paths


def _pick(random: Random, choices):
    return choices[int(random.random() * len(choices))]


def _take(n: int, items: Iterator) -> list:
    return [item for _, item in zip(range(n), items)]


def _distinct(frames: Iterator[tuple[str, str, float]]) -> Iterator[tuple[str, str, float]]:
    seen = set()
    for item in frames:
        if item[0] not in seen:
            seen.add(item[0])
            yield item


def _strength(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ConfigError(f"{name}: expected a strength from 0 to 1, got {value}")
    return value


_TABLES = {name: dict(zip(_CUES, table)) for jobs in DOMAINS.values() for name, table in jobs.items()}
_PEERS = {name: set(jobs) - {name} for jobs in DOMAINS.values() for name in jobs}
