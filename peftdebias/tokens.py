"""Text to token ids, and the masking of masked-LM training.

What it adds over the tokenizers library: finding a folder's tokenizer in any of its three forms, special tokens put in here (so that a cut text keeps
them and is counted), and masking. It leaves out padding.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from .errors import ConfigError, ModelError
from .options import expect_path

STYLES = {
    "bert": {"cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]", "pad": "[PAD]", "unk": "[UNK]"},
    "roberta": {"cls": "<s>", "sep": "</s>", "mask": "<mask>", "pad": "<pad>", "unk": "<unk>"},
}
WEAK = "unless there"  # an added token of which a file knows the id alone; a tokenizer that has it knows its flags
ADDED = ("single_word", "lstrip", "rstrip", "normalized", "special")  # flags of an added token
MASK_SHARE = 0.15
AT_ONCE = 8192  # texts that `encode` gives to the library together: what the library says of a text takes ten times what is kept of it


@dataclasses.dataclass(frozen=True)
class Encoded:
    """ids int32 [n] with special tokens; segments int32 [n], or None where all are 0; cut: tokens that did not fit."""

    ids: numpy.ndarray
    segments: numpy.ndarray | None
    cut: int


class Tokenizer:
    """A tokenizer and the ids of its special tokens. style: "bert" ([CLS] a [SEP] b [SEP], segments 0 and 1 where the model has two) or "roberta" (<s> a </s></s> b </s>)."""

    def __init__(self, backend: tokenizers.Tokenizer, style: str | None = None, settings: dict | None = None):
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.settings = dict(settings or {})
        self.segments = 2  # that the model knows; with one, pairs have no second
        self.style = style or ("roberta" if backend.token_to_id("<mask>") is not None else "bert")
        ids = {}
        for role, default in STYLES[self.style].items():
            given = self.settings.get(f"{role}_token", default)
            given = _content(given or default)
            ids[role] = backend.token_to_id(given)
            if ids[role] is None and role != "unk":
                raise ModelError(f"tokenizer: expected a {role} token {given!r} in the vocabulary, got none")
        self.cls_id, self.sep_id, self.mask_id, self.pad_id, self.unk_id = (ids[r] for r in ("cls", "sep", "mask", "pad", "unk"))
        self.special_ids = numpy.array(sorted({i for i in ids.values() if i is not None}))
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1  # one more than the highest id

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None, max_length: int = 512) -> list[Encoded]:
        """Each text (with its pair) as ids. What exceeds max_length tokens is cut from the longer of the two, and counted in `cut`.

        Raises ConfigError on a max_length that has no room for the special tokens, on one text in place of several, and on pairs of another number.
        """
        for what, given in (("texts", texts), ("pairs", pairs)):
            if isinstance(given, str):
                raise ConfigError(f"{what}: expected a list of texts, got one text: [{given[:20]!r}]")
        texts, pairs = list(texts), None if pairs is None else list(pairs)
        if pairs is not None and len(pairs) != len(texts):
            raise ConfigError(f"pairs: expected {len(texts)}, one for each text, got {len(pairs)}")
        found = []
        for part in (slice(start, start + AT_ONCE) for start in range(0, len(texts), AT_ONCE)):
            first = [e.ids for e in self.encodings(texts[part])]
            second = [None] * len(first) if pairs is None else [e.ids for e in self.encodings(pairs[part])]
            found += [self._assemble(a, b, max_length) for a, b in zip(first, second)]
        return found

    def encode_flat(self, texts: Sequence[str], max_length: int = 512) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
        """What `encode` gives for texts without pairs, end to end: (ids int32 [T], tokens of each text int32 [B], of them left out int32 [B])."""
        return self.framed(*self.joined(self.encodings(texts)), max_length)

    def encodings(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        """The first part of encode_flat: nearly all of its work, done without the GIL. Raises ConfigError where the library cannot start its threads."""
        try:
            return self.backend.encode_batch_fast(texts, add_special_tokens=False)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of Rust: no Exception, and nowhere to import it from
                raise
            raise ConfigError(f"tokenizers: {' '.join(str(error).split())}; fewer threads: RAYON_NUM_THREADS=1") from None

    @staticmethod
    def joined(encodings: Sequence[tokenizers.Encoding]) -> tuple[numpy.ndarray, numpy.ndarray]:
        """(their ids end to end int32 [T], how many of each int32 [B])."""
        rows = [e.ids for e in encodings]
        found = numpy.fromiter(map(len, rows), numpy.int32, len(rows))
        return numpy.fromiter(itertools.chain.from_iterable(rows), numpy.int32, int(found.sum(dtype=numpy.int64))), found

    def framed(self, tokens: numpy.ndarray, found: numpy.ndarray, max_length: int) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
        """What encode_flat gives, of what `joined` gives: texts cut where they are too long, the special tokens put in."""
        room = max_length - 2
        if room < 0:
            raise ConfigError(f"max_length {max_length}: expected at least 2, the special tokens of a text")
        kept = numpy.minimum(found, room)
        if (found > room).any():
            tokens = tokens[numpy.arange(len(tokens)) - numpy.repeat(numpy.cumsum(found, dtype=numpy.int64) - found, found) < room]
        lengths = kept + 2
        ends = numpy.cumsum(lengths, dtype=numpy.int64)
        ids = numpy.empty(int(ends[-1]) if len(ends) else 0, numpy.int32)
        inside = numpy.ones(len(ids), bool)
        for places, special in ((ends - lengths, self.cls_id), (ends - 1, self.sep_id)):
            ids[places], inside[places] = special, False
        ids[inside] = tokens
        return ids, lengths, found - kept

    @functools.cached_property
    def is_special(self) -> numpy.ndarray:
        """bool [vocab_size]: ids that masking leaves alone."""
        table = numpy.zeros(self.vocab_size, bool)
        table[self.special_ids] = True
        return table

    @property
    def between(self) -> int:
        """Special tokens between the texts of a pair."""
        return 2 if self.style == "roberta" else 1

    def _assemble(self, a: list[int], b: list[int] | None, max_length: int) -> Encoded:
        middle = [] if b is None else [self.sep_id] * self.between
        room = max_length - 2 - len(middle)
        if room < 0:
            raise ConfigError(f"max_length {max_length}: expected at least {2 + len(middle)}, the special tokens of a text")
        length = len(a) + len(b or ())
        if b is None:
            a = a[:room]
        elif length > room:  # the longer first, then both alike; an odd token is the longer's, as in the tokenizers library
            short = min(len(a), len(b), room // 2)
            keep = (short, room - short) if len(a) <= len(b) else (room - short, short)
            a, b = a[:keep[0]], b[:keep[1]]
        head = [self.cls_id, *a]
        tail = [self.sep_id] if b is None else [*b, self.sep_id]
        ids = head + middle + tail
        segments = None
        if b is not None and self.style == "bert" and self.segments > 1:
            segments = numpy.array([0] * (len(head) + 1) + [1] * len(tail), dtype=numpy.int32)
        return Encoded(numpy.array(ids, dtype=numpy.int32), segments, max(0, length - room))

    def save(self, folder: Path, longest: int | None = None) -> None:
        """Write tokenizer.json and tokenizer_config.json as transformers reads them. longest: tokens that the model has positions for, more than which truncation leaves nowhere."""
        (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")  # its own writer gives no OSError on a disk that is full
        names = {f"{role}_token": self.settings.get(f"{role}_token") or token for role, token in STYLES[self.style].items()}
        names["tokenizer_class"] = "RobertaTokenizer" if self.style == "roberta" else "BertTokenizer"
        if "added_tokens_decoder" in self.settings:  # all of them: transformers then asks nobody else
            names["added_tokens_decoder"] = {str(i): {flag: getattr(token, flag) for flag in ("content", *ADDED)} for i, token in self.backend.get_added_tokens_decoder().items()}
        if longest is not None:
            names["model_max_length"] = min(self.settings.get("model_max_length") or longest, longest)
        (folder / "tokenizer_config.json").write_text(json.dumps({**self.settings, **names}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model folder: tokenizer.json, else vocab.txt, else vocab.json + merges.txt.

    What tokenizer_config.json says (`do_lower_case`, `strip_accents`, `tokenize_chinese_chars`, RoBERTa's `add_prefix_space`) holds, as in transformers, whatever
    tokenizer.json has; a vocab.txt is lower-cased where it says nothing. Raises ModelError that names what is missing.
    """
    folder = expect_path("tokenizer", folder, ModelError)
    try:
        settings = _settings(folder)
        if (folder / "tokenizer.json").exists():
            backend = _as_configured(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), settings)
            return Tokenizer(_with_added(backend, settings), settings=settings)
        if (folder / "vocab.txt").exists():
            return wordpiece(_lines(folder / "vocab.txt"), settings)
        if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            return _byte_bpe(folder, settings)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from None
    except OSError as error:
        raise ModelError(f"{error.filename or folder}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # the tokenizers library raises bare Exception on a malformed file
        raise ModelError(f"{folder}: tokenizer cannot be read: {error}") from None
    raise ModelError(f"{folder}: expected tokenizer.json, vocab.txt, or vocab.json with merges.txt; found none")


def _settings(folder: Path) -> dict:
    """tokenizer_config.json; unless it lists the added tokens, special_tokens_map.json and added_tokens.json hold too, as in transformers."""
    found, mapped, added = (json.loads(path.read_text(encoding="utf-8")) if (path := folder / name).exists() else {}
                            for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"))
    if "added_tokens_decoder" in found:
        return found
    typed = lambda token: {"__type": "AddedToken", **token} if isinstance(token, dict) else token  # noqa: E731  as tokenizer_config.json says it
    found |= {key: [typed(token) for token in value] if isinstance(value, list) else typed(value) for key, value in mapped.items()}
    special = {token.content for token in _special(found)}
    return found | ({"added_tokens_decoder": {str(i): {"content": t, "special": t in special, "normalized": t not in special, WEAK: True} for t, i in added.items()}} if added else {})


def _content(token: str | dict) -> str:
    return token["content"] if isinstance(token, dict) else token


def _special(settings: dict) -> list[tokenizers.AddedToken]:
    """The special tokens that settings name, those of the roles and others."""
    others = [token for key in ("additional_special_tokens", "extra_special_tokens") if isinstance(named := settings.get(key), list) for token in named]
    found: dict[str, tokenizers.AddedToken] = {}
    for token in [*(settings.get(f"{role}_token") for role in STYLES["bert"]), *others]:
        if token:
            found.setdefault(_content(token), _added(token if isinstance(token, dict) else {"content": token}, special=True))
    return list(found.values())


def _added(token: dict, **flags: bool) -> tokenizers.AddedToken:
    """As settings have it; flags: beside or in place of theirs."""
    return tokenizers.AddedToken(token["content"], **{flag: bool(token[flag]) for flag in ADDED if flag in token} | flags)


def _with_added(backend: tokenizers.Tokenizer, settings: dict) -> tokenizers.Tokenizer:
    """With the tokens that settings add, those found whole in a text, as their list has them. Raises ModelError where one has another id than it says."""
    listed = {int(i): token for i, token in (settings.get("added_tokens_decoder") or {}).items()}
    there = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for place, token in sorted(listed.items()):
        wanted, known = _added(token), there.get(token["content"])
        if known is None or (WEAK not in token and any(getattr(known, flag) != getattr(wanted, flag) for flag in ADDED)):
            (backend.add_special_tokens if wanted.special else backend.add_tokens)([wanted])
        if (found := backend.token_to_id(token["content"])) != place:
            raise ModelError(f"tokenizer: added token {token['content']!r}: expected the id {place} by its list, got {found} after the vocabulary")
    there = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_special_tokens([token for token in _special(settings) if token.content not in there and backend.token_to_id(token.content) is not None])
    return backend


CONFIGURED = {
    "normalizer": (normalizers.BertNormalizer, {"do_lower_case": "lowercase", "strip_accents": "strip_accents", "tokenize_chinese_chars": "handle_chinese_chars"}),
    "pre_tokenizer": (pre_tokenizers.ByteLevel, {"add_prefix_space": "add_prefix_space"}),
}
"""Part of a tokenizer -> its kind, and their setting -> what it is called there."""


def _as_configured(backend: tokenizers.Tokenizer, settings: dict) -> tokenizers.Tokenizer:
    for name, (kind, keys) in CONFIGURED.items():
        part = getattr(backend, name)
        changes = {ours: settings[key] for key, ours in keys.items() if key in settings and isinstance(part, kind) and settings[key] != getattr(part, ours)}
        for ours, value in changes.items():
            setattr(part, ours, value)
        if changes:
            setattr(backend, name, part)
    return backend


def _lines(path: Path) -> list[str]:
    """A token a line; only newlines end one (str.splitlines would part tokens that hold other separators, and shift all ids after them)."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def wordpiece(vocabulary: Iterable[str], settings: dict | None = None) -> Tokenizer:
    """BERT's WordPiece tokenizer over a list of tokens, ids in order; `do_lower_case` and `strip_accents` from settings."""
    settings = dict(settings or {})
    lower = settings.get("do_lower_case", True)
    ids = {token: i for i, token in enumerate(vocabulary)}
    backend = tokenizers.Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lower, strip_accents=settings.get("strip_accents"),
                                                    handle_chinese_chars=settings.get("tokenize_chinese_chars", True))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens([t for role, t in STYLES["bert"].items() if t in ids and not settings.get(f"{role}_token")])
    tokenizer = Tokenizer(_with_added(backend, settings), "bert", settings)
    sep, cls = (backend.id_to_token(i) for i in (tokenizer.sep_id, tokenizer.cls_id))
    backend.post_processor = tokenizers.processors.BertProcessing((sep, tokenizer.sep_id), (cls, tokenizer.cls_id))
    return tokenizer


def _byte_bpe(folder: Path, settings: dict) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=settings.get("add_prefix_space", False))
    backend.decoder = decoders.ByteLevel()
    special = [t for role, t in STYLES["roberta"].items() if role != "mask" and backend.token_to_id(t) is not None and not settings.get(f"{role}_token")]
    # RoBERTa's mask takes the space before it, so that " <mask>" is one token, unless the settings have it otherwise.
    mask = settings.get("mask_token")
    backend.add_special_tokens([*special, _added(mask, special=True) if isinstance(mask, dict) else tokenizers.AddedToken(mask or "<mask>", lstrip=True, special=True)])
    tokenizer = Tokenizer(_with_added(backend, settings), "roberta", settings)
    sep, cls = (backend.id_to_token(i) for i in (tokenizer.sep_id, tokenizer.cls_id))
    backend.post_processor = tokenizers.processors.RobertaProcessing((sep, tokenizer.sep_id), (cls, tokenizer.cls_id))
    return tokenizer


def mask_tokens(ids: numpy.ndarray, tokenizer: Tokenizer, generator: numpy.random.Generator,
                share: float = MASK_SHARE) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """BERT's masking (Devlin et al. 2019, 3.1): (ids to read [n], rows [m] ascending, targets [m]).

    max(1, round(share * n)) of the n tokens that are not special are chosen without replacement; of these 80 % become the mask token, 10 % a random token,
    10 % stay. A text of special tokens only gets no rows.
    """
    places = numpy.flatnonzero(~numpy.isin(ids, tokenizer.special_ids))
    if len(places) == 0:
        return ids, places, ids[places]
    rows = numpy.sort(generator.choice(places, size=max(1, round(share * len(places))), replace=False))
    masked, kind = ids.copy(), generator.random(len(rows))
    masked[rows[kind < 0.8]] = tokenizer.mask_id
    drawn = (kind >= 0.8) & (kind < 0.9)
    masked[rows[drawn]] = generator.integers(tokenizer.vocab_size, size=int(drawn.sum()))
    return masked, rows, ids[rows]


def mask_weights(tokenizer: Tokenizer, words: Iterable[str], weight: float) -> numpy.ndarray:
    """float64 [vocab_size]: `weight` for each id that is a word of `words` by itself, in lower case, capitalised or in capitals, 1 for all others.

    A word that the tokenizer cuts into pieces has no such id. Behind a space, where RoBERTa's words stand, it has one of its own.
    """
    shaped = sorted({shape(word) for word in words for shape in (str.lower, str.capitalize, str.upper)})
    rows = [e.ids for e in tokenizer.encodings([*shaped, *(f" {word}" for word in shaped)])]
    weights = numpy.ones(tokenizer.vocab_size)
    weights[[row[0] for row in rows if len(row) == 1]] = weight
    weights[tokenizer.special_ids] = 1
    return weights


def mask_flat(ids: numpy.ndarray, lengths: numpy.ndarray, tokenizer: Tokenizer, generator: numpy.random.Generator,
              weights: numpy.ndarray | None = None) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """mask_tokens for texts end to end, text by text with the same draws: (ids to read [T], rows [M], targets [M], rows of each text [B]).

    weights (mask_weights): as many tokens of a text, but drawn one after the other with a chance in proportion to the weight of their id.
    """
    places = numpy.flatnonzero(~tokenizer.is_special[ids])
    starts = numpy.searchsorted(places, numpy.concatenate(([0], numpy.cumsum(lengths))))
    chosen, kinds, drawn, counts = [], [], [], []
    for start, n in zip(starts.tolist(), numpy.diff(starts).tolist()):
        count = max(1, round(MASK_SHARE * n)) if n else 0
        counts.append(count)
        if count:
            own = places[start:start + n]
            chance = None if weights is None else weights[ids[own]] / weights[ids[own]].sum()
            chosen.append(generator.choice(own, size=count, replace=False, p=chance))
            kinds.append(kind := generator.random(count))
            if other := sum(0.8 <= value < 0.9 for value in kind.tolist()):
                drawn.append(generator.integers(tokenizer.vocab_size, size=other))
    rows = numpy.sort(numpy.concatenate([numpy.zeros(0, numpy.int64), *chosen]))  # texts follow each other, so each text's rows are sorted
    kind, masked = numpy.concatenate([numpy.zeros(0), *kinds]), ids.copy()
    masked[rows[kind < 0.8]] = tokenizer.mask_id
    masked[rows[(kind >= 0.8) & (kind < 0.9)]] = numpy.concatenate([numpy.zeros(0, numpy.int64), *drawn])
    return masked, rows, ids[rows], numpy.array(counts, numpy.int32)
