"""Public data sets in the layouts in which they are downloaded, made into the files that the phases read.

    published file -> rows -> labels renamed, links and mentions out -> no text of the test split in train, dev carved out -> {"text", "label", ...} jsonl

What it adds over corpus.py: parquet (extra `parquet`), a pickle refused with a way out, labels as a recipe names them, splits that share no text. It leaves
out what is trained on the files.
"""

import contextlib
import dataclasses
import glob
import json
import random
import re
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import corpus
from .corpus import Example
from .errors import ConfigError, DataError
from .lines import refuse_pickle
from .outputs import writing

SPLITS = ("train", "dev", "test", "valid", "validation")
"""What files of many data sets are called, so that the name alone tells of none."""
_LINK = re.compile(r"(?:https?://|(?<!w)www\.(?=\w))\S+", re.IGNORECASE)  # no "Awww...", but what is glued to the word before it
_MENTION = re.compile(r"(?<!\w)@\w+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A published file and what its columns mean.

    file: names it may have, the first that is there counts. labels: their label -> ours; where given, all that there are. drop: rows with these labels are no examples
    (MultiNLI's "-", on which the annotators did not agree). clean: without links and mentions of users.
    """

    file: tuple[str, ...]
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    group: str | None = None
    labels: dict | None = None
    drop: tuple[str, ...] = ()
    clean: bool = False

    def __post_init__(self):
        if not self.file:
            raise ConfigError("file: expected at least one name, got none")


def find(names: Sequence[str], data: Path) -> Path:
    """The first of the names that is in the folder `data`: by its path there, else by its last part alone, in the folder or below it. Files that are called like
    a split of any data set ("train.csv") are taken from the folder itself, or from below a folder that the name has too ("biasbios/train.csv").

    Raises DataError where none is, or where two files below have that last part.
    """
    for name in names:
        if (data / name).exists():
            return data / name
    passed: list[Path] = []
    for name in names:
        folder = Path(name).parent.name.lower() if Path(name).name.split(".")[0] in SPLITS else ""
        every = sorted(data.rglob(glob.escape(Path(name).name)))
        below = [path for path in every if not folder or path.parent == data or folder in [part.lower() for part in path.relative_to(data).parts[:-1]]]
        passed += [path for path in every if path not in below]
        if len(below) > 1:
            raise DataError(f"{data}: expected one {Path(name).name}, found {', '.join(str(p.relative_to(data)) for p in below[:3])}; expected {name}")
        if below:
            return below[0]
    other = f" ({passed[0].relative_to(data)} may be of another data set)" if passed else ""
    raise DataError(f"{data}: expected {' or '.join(names)}, found none{other}")


def without_links(text: str) -> str:
    """The text without URLs and @mentions, white space folded (PAPER: GHC)."""
    return " ".join(_MENTION.sub(" ", _LINK.sub(" ", text)).split())


def read(source: Source, data: Path) -> list[Example]:
    """The examples of a source. Raises DataError on a file that cannot be read."""
    path, labels = find(source.file, data), source.label.split(",") if source.label else None
    columns = {"text": source.text or "text", "text_pair": source.text_pair, "group": source.group, "label": labels}
    with _readable(path, [*(labels or []), *(name for name in (columns["text"], source.text_pair, source.group) if name)]) as copy:
        found = [dataclasses.replace(e, place=e.place.replace(str(copy), str(path), 1)) for e in corpus.read_examples(copy, **columns)]
    names, kept = source.labels or {}, []
    for e in found:
        if e.label in source.drop:
            continue
        if names and e.label not in names:
            raise DataError(f"{e.place}: label {e.label!r}: expected one of {', '.join(names)}")
        changes = {"label": names.get(e.label, e.label)}
        if source.clean:
            changes |= {"text": without_links(e.text), "text_pair": e.text_pair and without_links(e.text_pair)}
        kept.append(dataclasses.replace(e, **changes))
    if not kept:
        raise DataError(f"{path}: expected examples, found none but with the labels {', '.join(source.drop)}")
    return kept


def check_labels(known: Sequence[Example], examples: Sequence[Example], share: float = 1.0) -> None:
    """Raises DataError at the first of `examples` whose label none of `known`, which are trained on, has. share: how much of the training split `known` is."""
    part = f" ({100 * share:.3g} % of the training split)" if share < 1 else ""
    labels = {e.label for e in known}
    for e in examples:
        if e.label not in labels:
            raise DataError(f"{e.place}: label {e.label!r} is on no text to train on{part}; expected one of {', '.join(sorted(map(str, labels))[:10])}")


def read_texts(source: Source, data: Path) -> list[Example]:
    """The texts of a source alone, blank ones left out. Raises DataError on a file that cannot be read."""
    path = find(source.file, data)
    with _readable(path, [source.text or "text"]) as copy:
        texts = [(t.text, t.place.replace(str(copy), str(path), 1)) for t in corpus.read_texts([copy], source.text)]
    found = [(without_links(text) if source.clean else text, place) for text, place in texts]
    return [Example(text, None, None, None, place) for text, place in found if text]


@contextlib.contextmanager
def _readable(path: Path, columns: Sequence[str]) -> Iterator[Path]:
    """The file itself where corpus.py reads it; a parquet file's columns as jsonl, gone when the block ends. Raises DataError on a pickle."""
    refuse_pickle(path)
    if path.suffix != ".parquet":
        yield path
        return
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ConfigError(f"{path}: parquet files need the extra `parquet`: pip install 'peftdebias[parquet]'") from None
    try:
        table = parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not parquet: {error}") from None
    for name in columns:
        if name not in table.schema_arrow.names:
            raise DataError(f"{path}: no column '{name}'; columns: {', '.join(table.schema_arrow.names)}")
    with tempfile.TemporaryDirectory(prefix="peftdebias-") as folder:
        copy = Path(folder) / "table.jsonl"
        with open(copy, "w", encoding="utf-8") as out:
            for batch in _rows(path, table, columns):
                for row in batch:
                    if wrong := next((name for name, value in row.items() if not isinstance(value, (str, bool, int, float, type(None)))), None):
                        raise DataError(f"{path}: column '{wrong}': expected texts or numbers, got {table.schema_arrow.field(wrong).type}")
                    out.write(json.dumps(row, ensure_ascii=False) + "\n")
        try:
            yield copy
        except DataError as error:
            raise DataError(str(error).replace(str(copy), str(path))) from None


def _rows(path: Path, table, columns: Sequence[str]) -> Iterator[list[dict]]:
    """The rows of a parquet file, batch after batch. Raises DataError where its pages are damaged: those are read here, the footer was before."""
    import pyarrow

    try:
        for batch in table.iter_batches(columns=list(columns)):
            yield batch.to_pylist()
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


@dataclasses.dataclass
class Splits:
    """train, dev, test: examples. notes: what was left out or carved, lines for people."""

    train: list[Example]
    dev: list[Example]
    test: list[Example]
    notes: list[str]


def in_dev(text: str, share: float) -> bool:
    """Whether a text of train is for development: by its CRC-32, whatever space stands around it."""
    return zlib.crc32(text.strip().encode("utf-8", "surrogatepass")) < share * 2 ** 32


def splits(train: list[Example], dev: list[Example] | None, test: list[Example], *, dev_share: float = 0.1, train_share: float = 1.0) -> Splits:
    """Splits that share no text, each without the examples that have none: dev loses the texts of test, train those of both; where there is no dev, a share of
    train's texts, chosen by hash, becomes it.

    train_share < 1 keeps that share of train, drawn with seed 0. Raises DataError where a split has no example.
    """
    def key(e: Example) -> str:
        return e.text.strip() if e.text_pair is None else f"{e.text.strip()}\t{e.text_pair.strip()}"

    notes = []

    def without(name: str, examples: list[Example], unwanted, what: str) -> list[Example]:
        kept = [e for e in examples if not unwanted(e)]
        if len(kept) < len(examples):
            notes.append(f"{name}: {len(examples) - len(kept)} of {len(examples)} examples {what} were left out")
        return kept

    def of(split: list[Example]):
        texts = {key(e) for e in split}
        return lambda e: key(e) in texts

    train, dev, test = (part and without(name, part, _is_blank, "without text, or of nothing but what is cleaned away,")
                        for name, part in (("train", train), ("dev", dev), ("test", test)))
    in_test = of(test)
    kept = without("train", train, in_test, "whose text is in the test split")
    if dev is None:
        dev = [e for e in kept if in_dev(key(e), dev_share)]
        kept = [e for e in kept if not in_dev(key(e), dev_share)]
        notes.append(f"dev: {len(dev)} examples of train, {100 * dev_share:g} % of its texts chosen by hash")
    else:
        dev = without("dev", dev, in_test, "whose text is in the test split")
        kept = without("train", kept, of(dev), "whose text is in the dev split")
    if train_share < 1 and kept:
        number = max(1, round(train_share * len(kept)))
        kept = [kept[i] for i in sorted(random.Random(0).sample(range(len(kept)), number))]
        notes.append(f"train: {number} examples, {100 * train_share:.3g} % of it")
    for name, part in (("train", kept), ("dev", dev), ("test", test)):
        if not part:
            why = "; ".join(note.removeprefix(f"{name}: ") for note in notes if note.startswith(f"{name}: "))
            raise DataError(f"{name}: expected examples, got none{f' ({why})' if why else ''}")
    return Splits(kept, dev, test, notes)


def _is_blank(e: Example) -> bool:
    return not e.text.strip() or e.text_pair is not None and not e.text_pair.strip()


def write(examples: Sequence[Example], path: Path) -> None:
    """{"text", "text_pair"?, "label"?, "group"?} a line, whole or not at all."""
    with writing(str(path)) as file:
        for e in examples:
            row = {name: getattr(e, name) for name in ("text", "text_pair", "label", "group") if getattr(e, name) is not None}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
