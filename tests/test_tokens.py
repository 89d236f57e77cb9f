"""Every form of tokenizer file gives the ids that transformers gives; cutting keeps the special tokens and is counted; masking keeps its shares."""

import errno
import json

import numpy as np
import pytest
import tokenizers

from peftdebias.errors import ConfigError, ModelError
from peftdebias.tokens import STYLES, Tokenizer, load_tokenizer, mask_flat, mask_tokens, mask_weights, wordpiece

from . import outside

TEXTS = [
    "She told the nurse's brother that he'd been re-elected, twice!",
    "HE said: \"No.\"",
    "naïve café Ångström ÉCOLE İstanbul",
    "東京 is a city; русский текст too.",
    "  tabs\tand\u00a0spaces\u2028and lines\r\nend  ",
    "supercalifragilisticexpialidocious " + "x" * 101,
    "emoji 🙂 and \u200bzero width",
    "an [UNK]nown <mask> and [MASK] in the text",
    "",
]
PAIRS = ["He is a doctor.", "Why?", "", "東京", "A second sentence, rather longer than the first one was.", "b", "c d", "e", ""]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d", "##e", "he", "she", "."]


@pytest.fixture(scope="module")
def bert(shared):
    """bert-tiny-mlm: tokenizer.json, uncased."""
    return load_tokenizer(shared / "models" / "bert-tiny-mlm")


@pytest.fixture(scope="module")
def roberta(shared, tmp_path_factory):
    """RoBERTa's own tokenizer.json."""
    folder = tmp_path_factory.mktemp("roberta")
    (folder / "tokenizer.json").write_bytes((shared / "data" / "tokenizers" / "roberta-base.json").read_bytes())
    return load_tokenizer(folder)


@pytest.fixture
def toy():
    return wordpiece(WORDS)


def write_vocab_txt(folder, tokenizer, **settings):
    vocab = tokenizer.backend.get_vocab()
    (folder / "vocab.txt").write_text("".join(token + "\n" for token in sorted(vocab, key=vocab.get)), encoding="utf-8")
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_byte_bpe(folder, shared, **settings):
    model = json.loads((shared / "data" / "tokenizers" / "roberta-base.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(model["merges"]) + "\n", encoding="utf-8")
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def ids(encoded):
    return [e.ids.tolist() for e in encoded]


def segments(encoded):
    return [[0] * len(e.ids) if e.segments is None else e.segments.tolist() for e in encoded]


# ---------------------------------------------------------------- files


def test_ids_have_special_tokens_at_their_ends(bert, roberta):
    (one,) = bert.encode(["he is a nurse."])
    assert one.ids.tolist() == [101, 2002, 2003, 1037, 6821, 1012, 102] and one.ids.dtype == np.int32
    assert one.segments is None and one.cut == 0
    assert roberta.encode(["Hello world"])[0].ids.tolist() == [0, 31414, 232, 2]
    assert (bert.style, roberta.style) == ("bert", "roberta")
    assert (bert.cls_id, bert.sep_id, bert.mask_id, bert.pad_id, bert.unk_id, bert.vocab_size) == (101, 102, 103, 0, 100, 30522)
    assert (roberta.cls_id, roberta.sep_id, roberta.mask_id, roberta.pad_id, roberta.unk_id, roberta.vocab_size) == (0, 2, 50264, 1, 3, 50265)


@pytest.mark.parametrize("settings", [{}, {"do_lower_case": True}])
def test_vocab_txt_gives_the_ids_of_tokenizer_json(bert, tmp_path, settings):
    other = load_tokenizer(write_vocab_txt(tmp_path, bert, **settings))
    assert ids(other.encode(TEXTS)) == ids(bert.encode(TEXTS))
    assert other.vocab_size == bert.vocab_size and set(other.special_ids) == set(bert.special_ids) == {0, 100, 101, 102, 103}


def test_lower_casing_of_a_vocab_txt_is_read_from_tokenizer_config_json(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS, "He", "HE", "é", "É"]))
    config = tmp_path / "tokenizer_config.json"
    text = ["he He HE é É"]
    assert ids(load_tokenizer(tmp_path).encode(text)) == [[2, 10, 10, 10, 1, 1, 3]]  # é loses its accent and is unknown as e
    config.write_text('{"do_lower_case": false}')
    assert ids(load_tokenizer(tmp_path).encode(text)) == [[2, 10, 13, 14, 15, 16, 3]]
    config.write_text('{"do_lower_case": true, "strip_accents": false}')
    assert ids(load_tokenizer(tmp_path).encode(text)) == [[2, 10, 10, 10, 15, 15, 3]]


def test_only_newlines_part_the_tokens_of_a_vocab_txt(tmp_path):
    """Some vocabularies hold U+2028 or U+0085 as tokens; ids after them must not move."""
    (tmp_path / "vocab.txt").write_bytes("\n".join(["[PAD]", "[UNK]", "\u2028", "\x85", "[CLS]", "[SEP]", "[MASK]", "he"]).encode())
    assert ids(load_tokenizer(tmp_path).encode(["he"])) == [[4, 7, 5]]
    (tmp_path / "vocab.txt").write_bytes("\r\n".join([*WORDS, ""]).encode())
    tokenizer = load_tokenizer(tmp_path)
    assert (ids(tokenizer.encode(["she"])), tokenizer.vocab_size) == ([[2, 11, 3]], 13)


def test_vocab_json_and_merges_give_the_ids_of_tokenizer_json(shared, roberta, tmp_path):
    other = load_tokenizer(write_byte_bpe(tmp_path, shared))
    assert ids(other.encode(TEXTS)) == ids(roberta.encode(TEXTS))
    assert other.vocab_size == roberta.vocab_size and other.style == "roberta"
    assert other.encode(["a <mask>."])[0].ids.tolist() == [0, 102, 50264, 4, 2]  # the mask takes the space before it
    spaced = load_tokenizer(write_byte_bpe(tmp_path, shared, add_prefix_space=True))
    assert spaced.encode(["Hello world"])[0].ids.tolist() == [0, 20920, 232, 2]


def test_tokenizer_json_is_preferred(bert, shared, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    assert load_tokenizer(tmp_path).vocab_size == 13
    (tmp_path / "tokenizer.json").write_bytes((shared / "models" / "bert-tiny-mlm" / "tokenizer.json").read_bytes())
    assert load_tokenizer(tmp_path).vocab_size == 30522


def test_padding_and_cutting_stored_in_a_tokenizer_json_are_off(toy, tmp_path):
    """Published files switch them on: MiniLM's cuts at 128 and pads to that."""
    toy.backend.enable_truncation(3)
    toy.backend.enable_padding(length=7)
    toy.backend.save(str(tmp_path / "tokenizer.json"))
    assert [len(e.ids) for e in load_tokenizer(tmp_path).encode(["a b c d", "a"])] == [6, 3]


def test_saving_and_loading_give_the_same_ids(bert, roberta, tmp_path):
    for tokenizer in (bert, roberta, wordpiece(WORDS, {"do_lower_case": False})):
        tokenizer.save(tmp_path)
        again = load_tokenizer(tmp_path)
        assert ids(again.encode(TEXTS, PAIRS)) == ids(tokenizer.encode(TEXTS, PAIRS))
        assert (again.style, list(again.special_ids)) == (tokenizer.style, list(tokenizer.special_ids))
        first = [(tmp_path / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")]
        again.save(tmp_path)
        assert first == [(tmp_path / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")]


def test_a_disk_that_is_full_is_the_systems_own_error(toy, tmp_path):
    """The library's own writer raises a plain Exception, which nobody takes for that."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError) as error:
            toy.save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.errno == errno.EFBIG


def test_what_is_saved_frames_texts_where_the_library_alone_reads_it(toy, tmp_path):
    toy.save(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert [backend.encode("he she").ids, backend.encode("he", "she .").ids] == ids([*toy.encode(["he she"]), *toy.encode(["he"], ["she ."])])


def test_the_longest_text_is_the_tokenizers_or_the_models(tmp_path):
    for own, expected in ((None, 512), (128, 128), (10**30, 512)):
        wordpiece(WORDS, {} if own is None else {"model_max_length": own}).save(tmp_path, 512)
        assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == expected


def test_errors_say_what_was_expected(tmp_path):
    with pytest.raises(ModelError, match=r"expected tokenizer.json, vocab.txt, or vocab.json with merges.txt; found none"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")  # without merges.txt
    with pytest.raises(ModelError, match="found none"):
        load_tokenizer(tmp_path)
    for role in ("mask", "pad"):
        (tmp_path / "vocab.txt").write_text("".join(token + "\n" for one, token in STYLES["bert"].items() if one != role) + "he\n")
        with pytest.raises(ModelError, match=rf"{tmp_path}: tokenizer: expected a {role} token '\[{role.upper()}\]' in the vocabulary, got none"):
            load_tokenizer(tmp_path)
    for broken in (b"{", b"\xff", b"[]"):
        (tmp_path / "tokenizer.json").write_bytes(broken)
        with pytest.raises(ModelError, match=f"{tmp_path}: tokenizer cannot be read: ") as caught:
            load_tokenizer(tmp_path)
        assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- against transformers


@pytest.fixture(scope="module", params=["bert json", "bert txt", "bert cased txt", "roberta json", "roberta bpe", "bert saved", "roberta saved"])
def both(request, bert, roberta, shared, tmp_path_factory):
    """(ours, theirs, texts) of one folder."""
    transformers, folder, texts = outside.library("transformers"), tmp_path_factory.mktemp("both"), TEXTS
    kind, _, form = request.param.partition(" ")
    if form == "json":
        source = shared / "models" / "bert-tiny-mlm" / "tokenizer.json" if kind == "bert" else shared / "data" / "tokenizers" / "roberta-base.json"
        (folder / "tokenizer.json").write_bytes(source.read_bytes())
    elif form == "saved":
        {"bert": bert, "roberta": roberta}[kind].save(folder)
    elif kind == "bert":
        write_vocab_txt(folder, bert, **({"do_lower_case": False} if form == "cased txt" else {"do_lower_case": True}))
    else:
        write_byte_bpe(folder, shared)
        texts = [text.replace(" <mask>", "<mask>") for text in texts]  # transformers 5 leaves that space apart here; 4 and tokenizer.json do as we do
    return load_tokenizer(folder), {"bert": transformers.BertTokenizer, "roberta": transformers.RobertaTokenizer}[kind].from_pretrained(folder), texts


@pytest.mark.parametrize("at_once", [4, 8192])
def test_texts_and_pairs_equal_transformers(at_once, both, monkeypatch):
    monkeypatch.setattr("peftdebias.tokens.AT_ONCE", at_once)
    ours, theirs, texts = both
    assert ids(ours.encode(texts)) == theirs(texts)["input_ids"] and ours.encode([]) == ours.encode([], []) == []
    expected = theirs(texts, PAIRS, return_token_type_ids=ours.style == "bert")
    assert ids(ours.encode(texts, PAIRS)) == expected["input_ids"]
    assert segments(ours.encode(texts, PAIRS)) == expected.get("token_type_ids", [[0] * len(i) for i in expected["input_ids"]])
    assert (ours.mask_id, ours.pad_id, ours.cls_id, ours.sep_id) == (theirs.mask_token_id, theirs.pad_token_id, theirs.cls_token_id, theirs.sep_token_id)


def test_cutting_equals_transformers(both):
    ours, theirs, texts = both
    for longest in (4, 5, 6, 7, 10, 13, 17):
        cut = dict(truncation="longest_first", max_length=longest)
        assert ids(ours.encode(texts, max_length=longest)) == theirs(texts, **cut)["input_ids"], longest
        assert ids(ours.encode(texts, PAIRS, longest)) == theirs(texts, PAIRS, **cut)["input_ids"], longest
        assert ids(ours.encode(PAIRS, texts, longest)) == theirs(PAIRS, texts, **cut)["input_ids"], longest
        assert ids(ours.encode(texts, texts, longest)) == theirs(texts, texts, **cut)["input_ids"], longest


# ---------------------------------------------------------------- cutting


def test_a_cut_text_keeps_its_special_tokens_and_is_counted(toy):
    long, short = toy.encode(["a b c d he she .", "a"], max_length=5)
    assert (long.ids.tolist(), long.cut) == ([2, 5, 6, 7, 3], 4)
    assert (short.ids.tolist(), short.cut) == ([2, 5, 3], 0)
    assert toy.encode(["a b c"], max_length=5)[0].cut == 0  # fits exactly
    assert toy.encode(["a b"], max_length=2)[0].ids.tolist() == [2, 3]


@pytest.mark.parametrize("first, second, kept", [(9, 3, (5, 3)), (3, 9, (3, 5)), (9, 9, (4, 4)), (9, 4, (4, 4)), (0, 11, (0, 8)), (5, 3, (5, 3))])
def test_of_a_pair_the_longer_is_cut_first(toy, first, second, kept):
    (one,) = toy.encode([" ".join("a" * first)], [" ".join("b" * second)], max_length=11)
    assert one.ids.tolist() == [2] + [5] * kept[0] + [3] + [6] * kept[1] + [3]
    assert one.segments.tolist() == [0] * (kept[0] + 2) + [1] * (kept[1] + 1)
    assert one.cut == first + second - sum(kept)


def test_no_room_for_the_special_tokens_is_an_error(toy):
    with pytest.raises(ConfigError, match="max_length 1: expected at least 2, the special tokens of a text"):
        toy.encode(["a"], max_length=1)
    with pytest.raises(ConfigError, match="max_length 2: expected at least 3"):
        toy.encode(["a"], ["b"], max_length=2)


def test_roberta_pairs_have_two_separators_and_need_room_for_them(roberta):
    (one,) = roberta.encode(["Hello world world"], ["Hello"], max_length=7)
    assert (one.ids.tolist(), one.segments, one.cut) == ([0, 31414, 232, 2, 2, 31414, 2], None, 1)
    with pytest.raises(ConfigError, match="max_length 3: expected at least 4"):
        roberta.encode(["a"], ["b"], max_length=3)


# ---------------------------------------------------------------- masking

BIG = wordpiece([*WORDS, *(f"w{i}" for i in range(988))])  # 1001 tokens: a random one is rarely the old one


def masked(n, seed=0, tokenizer=BIG, share=0.15):
    """(ids of n plain tokens between special ones, ids to read, rows, targets)."""
    random = np.random.default_rng(seed)
    text = np.concatenate([[2], random.integers(5, 1001, n), [3]]).astype(np.int32)
    return text, *mask_tokens(text, tokenizer, random, share)


def within(count, n, share):
    """Within four standard deviations of a binomial."""
    return abs(count - n * share) < 4 * np.sqrt(n * share * (1 - share))


def test_targets_are_what_stood_at_the_rows_and_nothing_else_changes():
    text, read, rows, targets = masked(997)
    before = text.copy()
    assert targets.tolist() == text[rows].tolist() and read.dtype == text.dtype
    others = np.setdiff1d(np.arange(len(text)), rows)
    assert (read[others] == text[others]).all()
    assert (text == before).all() and (read != text).any()
    assert (np.diff(rows) > 0).all()  # ascending, without replacement


def test_of_the_chosen_80_percent_are_masked_10_random_10_kept():
    text, read, rows, _ = masked(200_003)
    n = len(rows)
    assert n == round(0.15 * 200_003)
    kept, hidden = read[rows] == text[rows], read[rows] == BIG.mask_id
    assert within(hidden.sum(), n, 0.8 + 0.1 / 1001)  # a random token may be the mask
    assert within(kept.sum(), n, 0.1 + 0.1 / 1001)
    drawn = read[rows][~hidden & ~kept]
    assert within((drawn < 501).sum(), len(drawn), 500 / 1000)  # from the whole vocabulary alike
    assert drawn.max() > 990 and drawn.min() < 10
    assert within((rows < 100_002).sum(), n, 0.5)  # anywhere in the text


def test_special_tokens_are_never_chosen():
    text = np.array([2, 7, 3, 0, 1, 4, 8, 9, 3, 0, 0], dtype=np.int32)
    chosen = set()
    for seed in range(97):
        chosen |= set(mask_tokens(text, BIG, np.random.default_rng(seed))[1].tolist())
    assert chosen == {1, 6, 7}


@pytest.mark.parametrize("n, share, expected", [(1, 0.15, 1), (3, 0.15, 1), (13, 0.15, 2), (20, 0.15, 3), (37, 0.15, 6), (37, 0.5, 18), (7, 1.0, 7)])
def test_how_many_are_chosen(n, share, expected):
    assert len(masked(n, share=share)[2]) == expected


def test_15_percent_are_chosen_where_nobody_says_how_many():
    chosen = [len(mask_tokens(np.arange(5, 5 + n, dtype=np.int32), BIG, np.random.default_rng(0))[1]) for n in (100, 900, 7)]
    ids = np.arange(5, 905, dtype=np.int32)
    assert chosen == [15, 135, 1] and mask_flat(ids, np.array([900]), BIG, np.random.default_rng(0))[3].tolist() == [135]


def test_a_text_of_special_tokens_only_gets_no_rows():
    text = np.array([2, 3], dtype=np.int32)
    read, rows, targets = mask_tokens(text, BIG, np.random.default_rng(0))
    assert read.tolist() == [2, 3] and len(rows) == len(targets) == 0


def test_a_seed_repeats_and_another_differs():
    one, same, other = masked(211), masked(211), masked(211, seed=1)
    assert all((a == b).all() for a, b in zip(one, same))
    assert one[2].tolist() != other[2].tolist()


def test_special_tokens_by_other_names_come_from_the_settings():
    backend = wordpiece(["<p>", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[PAD]", "<m>", "a"]).backend
    tokenizer = Tokenizer(backend, "bert", {"mask_token": "<m>", "pad_token": {"content": "<p>"}, "sep_token": None})
    assert (tokenizer.mask_id, tokenizer.pad_id, tokenizer.sep_id) == (6, 0, 3)
    with pytest.raises(ModelError, match="expected a cls token '<c>' in the vocabulary, got none"):
        Tokenizer(backend, "bert", {"cls_token": "<c>"})


# Many texts end to end


@pytest.mark.parametrize("length", [2, 3, 7, 512])
def test_texts_end_to_end_are_those_one_by_one(bert, roberta, length):
    for tokenizer in (bert, roberta):
        for texts in (TEXTS, [""], TEXTS[:1], []):
            one_by_one = tokenizer.encode(texts, max_length=length)
            flat, lengths, cut = tokenizer.encode_flat(texts, length)
            assert (flat.dtype, lengths.dtype) == (np.int32, np.int32)
            assert flat.tolist() == [i for e in one_by_one for i in e.ids.tolist()]
            assert lengths.tolist() == [len(e.ids) for e in one_by_one] and cut.tolist() == [e.cut for e in one_by_one]
    with pytest.raises(ConfigError, match="max_length 1: expected at least 2, the special tokens of a text"):
        bert.encode_flat(["a"], 1)


@pytest.mark.parametrize("seed", range(5))
def test_masking_end_to_end_draws_what_masking_one_by_one_draws(seed):
    chosen = np.random.default_rng(seed)
    texts = [np.concatenate(([BIG.cls_id], chosen.integers(5, BIG.vocab_size, n), [BIG.sep_id])).astype(np.int32) for n in chosen.integers(0, 150, 40)]
    texts[3] = np.array([BIG.cls_id, BIG.unk_id, BIG.sep_id], np.int32)  # nothing to mask
    one, other = np.random.default_rng([seed, 1]), np.random.default_rng([seed, 1])
    expected = [mask_tokens(text, BIG, one) for text in texts]
    ids, rows, targets, counts = mask_flat(np.concatenate(texts), np.array([len(t) for t in texts]), BIG, other)
    starts = np.cumsum([0, *map(len, texts)])
    assert ids.tolist() == [i for masked, _, _ in expected for i in masked.tolist()]
    assert rows.tolist() == [r + start for (_, found, _), start in zip(expected, starts) for r in found.tolist()]
    assert targets.tolist() == [t for _, _, found in expected for t in found.tolist()] and counts.tolist() == [len(found) for _, found, _ in expected]
    assert one.random() == other.random()  # and no draw more


def test_a_weighted_token_is_chosen_as_much_likelier_as_its_weight_says():
    """One of 7 words is chosen: with weight w it is the favoured one in w / (w + 6) of the texts, and the number of words masked stays."""
    n, weight = 20_000, 10.0
    weights = np.ones(BIG.vocab_size)
    weights[500] = weight
    text = np.array([BIG.cls_id, 11, 12, 500, 13, 14, 15, 16, BIG.sep_id], np.int32)
    _, rows, targets, counts = mask_flat(np.tile(text, n), np.full(n, len(text)), BIG, np.random.default_rng(3), weights=weights)
    assert (counts == 1).all() and len(rows) == n and set(targets.tolist()) == {11, 12, 13, 14, 15, 16, 500}
    assert within((targets == 500).sum(), n, weight / (weight + 6))
    assert within((targets == 12).sum(), n, 1 / (weight + 6))


def test_weights_are_those_of_words_that_are_one_token(bert, roberta):
    cased = wordpiece([*STYLES["bert"].values(), "he", "He", "HE", "hE", "nurse"], {"do_lower_case": False})
    assert mask_weights(cased, ["he"], 5.0).tolist() == [1.0] * 5 + [5.0, 5.0, 5.0, 1.0, 1.0]
    tokenizer = wordpiece([*STYLES["bert"].values(), "he", "she", "nurse", "grand", "##mother"])
    weights = mask_weights(tokenizer, ["He", "she", "grandmother", "absent"], 5.0)
    word = {i: w for w, i in tokenizer.backend.get_vocab().items()}
    assert {word[i] for i in np.flatnonzero(weights == 5)} == {"he", "she"} and set(weights.tolist()) == {1.0, 5.0}
    backend = roberta.backend
    favoured = set(np.flatnonzero(mask_weights(roberta, ["he"], 5.0) == 5).tolist())
    assert favoured and all(backend.decode([i]).strip().lower() == "he" for i in favoured)


def test_no_text_is_masked_to_nothing():
    ids, rows, targets, counts = mask_flat(np.zeros(0, np.int32), np.zeros(0, np.int32), BIG, np.random.default_rng(0))
    assert len(ids) == len(rows) == len(targets) == len(counts) == 0


@pytest.mark.parametrize("settings", [{"do_lower_case": False}, {"strip_accents": False}, {"tokenize_chinese_chars": False}, {"do_lower_case": True}, {}])
def test_tokenizer_config_json_holds_as_in_transformers(settings, bert, tmp_path):
    bert.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in ("do_lower_case", "strip_accents", "tokenize_chinese_chars")}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(kept | {"do_lower_case": True} | settings))
    other = outside.library("transformers").AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    assert [e.ids.tolist() for e in ours.encode(TEXTS)] == [other(text)["input_ids"] for text in TEXTS]
    ours.save(tmp_path)
    assert [e.ids.tolist() for e in load_tokenizer(tmp_path).encode(TEXTS)] == [e.ids.tolist() for e in ours.encode(TEXTS)]


def test_a_space_before_the_first_word_is_put_where_tokenizer_config_json_says_so(roberta, tmp_path):
    roberta.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"add_prefix_space": True}))
    other = outside.library("transformers").AutoTokenizer.from_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).encode(["he said"])[0].ids.tolist() == other("he said")["input_ids"] != roberta.encode(["he said"])[0].ids.tolist()


# ---------------------------------------------------------------- tokens that were added

NEW = {"content": "[PERSON]", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}


@pytest.mark.parametrize("kind,files", [
    ("bert", {"added_tokens.json": {"[PERSON]": 30522, "<ent>": 30523}}),
    ("bert", {"added_tokens.json": {"[PERSON]": 30522}, "special_tokens_map.json": {"additional_special_tokens": ["[PERSON]", "[unused3]"]}}),
    ("bert", {"tokenizer_config.json": {"added_tokens_decoder": {"30522": NEW}}}),
    ("bert", {"special_tokens_map.json": {"cls_token": "[unused1]", "mask_token": {"content": "[unused9]", "lstrip": True, "normalized": False}}}),
    ("bert", {"special_tokens_map.json": {"cls_token": "[unused1]"}, "tokenizer_config.json": {"cls_token": "[unused2]"}}),
    ("bert", {"tokenizer_config.json": {"added_tokens_decoder": {"30523": NEW | {"content": "[NO]"}, "30522": NEW}}, "special_tokens_map.json": {"cls_token": "[unused1]"},
              "added_tokens.json": {"<ent>": 30523}}),
    ("roberta", {"added_tokens.json": {"<ent>": 50265}}),
])  # fmt: skip
def test_added_and_special_tokens_are_those_of_transformers(kind, files, bert, roberta, shared, tmp_path):
    """Of a folder without tokenizer.json, and of what is saved of it."""
    library = outside.library("transformers")
    write_vocab_txt(tmp_path, bert) if kind == "bert" else write_byte_bpe(tmp_path, shared)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    texts = ["He said [PERSON] met a <ent>nurse</ent>.<ent> twice", "a [unused3]b [unused1] [unused2]", "[CLS] [unused9] [MASK]"]
    theirs = {"bert": library.BertTokenizer, "roberta": library.RobertaTokenizer}[kind]
    ours, expected = load_tokenizer(tmp_path), theirs.from_pretrained(tmp_path)
    assert ids(ours.encode(texts)) == [expected(text)["input_ids"] for text in texts] != ids({"bert": bert, "roberta": roberta}[kind].encode(texts))
    saved = tmp_path / "saved"
    saved.mkdir()
    ours.save(saved)
    again = theirs.from_pretrained(saved)
    assert ids(load_tokenizer(saved).encode(texts)) == [again(text)["input_ids"] for text in texts] == ids(ours.encode(texts))
    assert (again.cls_token, again.mask_token) == (expected.cls_token, expected.mask_token)


@pytest.mark.parametrize("files", [
    {"added_tokens.json": {"NEW": 30522}},  # whose flags tokenizer.json alone knows
    {"tokenizer_config.json": {"added_tokens_decoder": {"30522": {"content": "NEW", "special": False}}}},
    {"tokenizer_config.json": {"added_tokens_decoder": {"30522": {"content": "NEW", "special": True}}}},
])
def test_flags_of_an_added_token_that_tokenizer_json_has(files, bert, tmp_path):
    library = outside.library("transformers")
    raw = json.loads(bert.backend.to_str())
    raw["added_tokens"].append({"id": 30522, "content": "NEW", "single_word": True, "lstrip": False, "rstrip": False, "normalized": False, "special": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    expected, texts = library.BertTokenizer.from_pretrained(tmp_path), ["a new b", "aNEWb", "a NEW b"]
    assert ids(load_tokenizer(tmp_path).encode(texts)) == [expected(text)["input_ids"] for text in texts]


@pytest.mark.parametrize("normalized", [True, False])
def test_flags_of_the_mask_beside_a_vocab_txt(normalized, bert, tmp_path):
    library = outside.library("transformers")
    write_vocab_txt(tmp_path, bert)
    mask = {"__type": "AddedToken", "content": "[MASK]", "lstrip": False, "rstrip": False, "normalized": normalized, "single_word": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"mask_token": mask}))
    expected = library.BertTokenizer.from_pretrained(tmp_path)
    texts = ["a [MASK] b", "a [mask] b"]
    found = ids(load_tokenizer(tmp_path).encode(texts))
    assert found == [expected(text)["input_ids"] for text in texts] and (found[0] == found[1]) == normalized


@pytest.mark.parametrize("stored", ["vocab.json", "tokenizer.json"])
@pytest.mark.parametrize("lstrip", [True, False])
@pytest.mark.parametrize("where", ["mask_token", "added_tokens_decoder"])
def test_whether_the_mask_takes_the_space_before_it_is_as_transformers_reads_it(where, lstrip, stored, roberta, shared, tmp_path):
    library = outside.library("transformers")
    mask = {"content": "<mask>", "lstrip": lstrip, "rstrip": False, "normalized": False, "single_word": False}
    settings = {"mask_token": mask | {"__type": "AddedToken"}} if where == "mask_token" else {"added_tokens_decoder": {"50264": mask | {"special": True}}}
    if stored == "vocab.json":
        write_byte_bpe(tmp_path, shared, **settings)
    else:
        raw = json.loads(roberta.backend.to_str())
        next(token for token in raw["added_tokens"] if token["content"] == "<mask>")["lstrip"] = lstrip == (where == "mask_token")  # a list is held against it
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    expected = library.RobertaTokenizer.from_pretrained(tmp_path)("a <mask> b")["input_ids"]
    assert ids(load_tokenizer(tmp_path).encode(["a <mask> b"])) == [expected] and len(expected) == (5 if lstrip else 6)


def test_an_added_token_with_another_id_is_refused(bert, tmp_path):
    write_vocab_txt(tmp_path, bert)
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": null}')
    assert load_tokenizer(tmp_path).encode(["he"])[0].ids.tolist() == bert.encode(["he"])[0].ids.tolist()
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "added_tokens.json").write_text('{"[PERSON]": 30600}')
    with pytest.raises(ModelError, match=rf"{tmp_path}: tokenizer: added token '\[PERSON\]': expected the id 30600 by its list, got 30522 after the vocabulary"):
        load_tokenizer(tmp_path)


def test_a_special_token_that_the_vocabulary_lacks_is_not_put_in(tmp_path):
    """Its id would have no row in the model's table."""
    (tmp_path / "vocab.txt").write_text("".join(token + "\n" for token in (*STYLES["bert"].values(), "he")))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"additional_special_tokens": ["[NEW]", "he"]}))
    assert load_tokenizer(tmp_path).vocab_size == 6 and max(load_tokenizer(tmp_path).encode(["he [NEW]"])[0].ids) == 5
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"mask_token": "[NEW]"}))
    with pytest.raises(ModelError, match=r"expected a mask token '\[NEW\]' in the vocabulary, got none"):
        load_tokenizer(tmp_path)


def test_one_text_in_place_of_several_and_pairs_of_another_number_are_refused(toy):
    for arguments, words in ((("he",), r"texts: expected a list of texts, got one text: \['he'\]"), ((["he"], "she"), r"pairs: expected a list of texts, got one text: \['she'\]"),
                             ((["he", "she"], ["a"]), "pairs: expected 2, one for each text, got 1")):
        with pytest.raises(ConfigError, match=words):
            toy.encode(*arguments)
    assert [e.ids.tolist() for e in toy.encode(iter(["he", "she"]), iter(["a", "b"]))] == [e.ids.tolist() for e in toy.encode(["he", "she"], ["a", "b"])]


def test_threads_that_cannot_start_are_told(toy):
    """What the library raises then is no Exception."""
    class PanicException(BaseException):
        pass

    class Without:
        def encode_batch_fast(self, texts, add_special_tokens):
            raise PanicException("The global thread pool has not been initialized.:\nResource temporarily unavailable")

    tokenizer = Tokenizer(toy.backend)
    tokenizer.backend = Without()
    with pytest.raises(ConfigError, match="^tokenizers: The global thread pool has not been initialized.: Resource temporarily unavailable; fewer threads: RAYON_NUM_THREADS=1$"):
        tokenizer.encode(["a"])


def test_a_word_of_more_than_100_characters_is_unknown():
    tokenizer = wordpiece([*STYLES["bert"].values(), "a", "##a"])
    assert [len(e.ids) for e in tokenizer.encode(["a" * 100, "a" * 101])] == [102, 3]


def test_chinese_characters_stand_alone_unless_the_settings_have_it_otherwise():
    words = [*STYLES["bert"].values(), "東", "京", "東京"]
    assert [wordpiece(words, {"tokenize_chinese_chars": apart}).encode(["東京"])[0].ids.tolist()[1:-1] for apart in (True, False)] == [[5, 6], [7]]
