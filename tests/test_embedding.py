"""A debiased model inside another program: its answers, and a .pt2 file that runs without this package."""

import contextlib
import copy
import dataclasses
import errno
import json
import os
import pickle
import resource
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy
import pytest
import torch

import peftdebias
from peftdebias import checkpoint, embedding, lines, methods, patch, weights
from peftdebias.batches import Sample, pack
from peftdebias.config import Predict
from peftdebias.encoder import EncoderConfig, Model
from peftdebias.errors import AdapterError, ConfigError, DataError, ModelError
from peftdebias.evaluation import predict
from peftdebias.testbed import World

from .outside import LABELS, assert_close, one_thread, randomize  # noqa: F401
from .small import tokenizer_of

# ---------------------------------------------------------------- a run folder

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(a run with a classifier, a masked-LM head and two modules; a plain model folder; a second run's adapter folder), float32, hidden 32."""
    root, tokenizer = tmp_path_factory.mktemp("embedding"), tokenizer_of(World(seed=3))
    config = EncoderConfig(kind="bert", layers=1, hidden=32, heads=2, feed_forward=48, vocab=tokenizer.vocab_size, max_positions=64)
    model = randomize(Model(config, mlm=True, labels=LABELS))
    weights.save_model(model, root / "plain", tokenizer)
    bare = Model(config)
    bare.load_state_dict(model.state_dict(), strict=False)
    weights.save_model(bare, root / "bare", tokenizer)
    base = checkpoint.describe_base(model)
    made = [methods.create(name, config, options=options, seed=5) for name, options in (("lora", {}), ("adapter", {}), ("prompt", dict(length=3, positioned=True)))]
    for i, method in enumerate(made):
        for name, p in method.parameters().items():
            p.data += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    with checkpoint.writing_run(root / "run", "downstream", {"model": "nowhere", "max_length": 24}) as run:
        weights.save_model(model, run.path / "model", tokenizer)
        checkpoint.save_adapter(run.path / "adapter", made[0], "gender", base)
        checkpoint.save_adapter(run.path / "adapter-2", made[1], "race", base)
    checkpoint.save_adapter(root / "third", made[2], "religion", base)
    return root


WORLD = World(seed=3)
WORDS = [w for w in WORLD.vocabulary() if w.isalpha()][:40]
TEXTS = [" ".join(WORDS[:9]), WORDS[3], " ".join(reversed(WORDS[:15])), ""]


@pytest.fixture
def model(folders):
    return peftdebias.load(folders / "run")


def test_predict_is_what_the_command_line_says(model, folders, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS[:3]) + "\n")
    predict(Predict(run=str(folders / "run"), file=str(tmp_path / "texts.txt"), out=str(tmp_path / "out.jsonl")))
    said, found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()], model.predict(TEXTS[:3])
    assert [list(f) for f in found] == [list(s) for s in said] and [f["text"] for f in found] == TEXTS[:3]
    assert found[0]["probabilities"] != pytest.approx(found[1]["probabilities"], abs=1e-3)
    for f, s in zip(found, said):
        assert f["label"] == s["label"] and f["probabilities"] == pytest.approx(s["probabilities"], abs=1e-6) and sum(f["probabilities"].values()) == pytest.approx(1)
    paired = model.predict(TEXTS[:2], [TEXTS[1], TEXTS[0]])
    assert paired[0]["probabilities"] != pytest.approx(found[0]["probabilities"], abs=1e-6) and model.predict([]) == []
    assert model.predict(numpy.array(TEXTS[:3])) == found


def test_fill_mask_answers_each_mask(model):
    text = f"{WORDS[0]} [MASK] {WORDS[1]} [MASK]"
    found = model.fill_mask(text, top=4)
    run = model.run
    ids = run.tokenizer.encode([text])[0].ids
    batch = peftdebias.batches.pack([peftdebias.batches.Sample(ids, numpy.arange(len(ids)))])
    with torch.no_grad():
        expected = run.model.mlm_logits(batch).double().softmax(-1)
    assert [len(one) for one in found] == [4, 4]
    for answers, place in zip(found, numpy.flatnonzero(ids == run.tokenizer.mask_id)):
        best = expected[place].topk(4)
        assert [a["id"] for a in answers] == best.indices.tolist() and [a["probability"] for a in answers] == pytest.approx(best.values.tolist(), rel=1e-5)
        assert all(a["token"] == run.tokenizer.backend.id_to_token(a["id"]) for a in answers)
    with pytest.raises(ConfigError, match=r"expected \[MASK\] in the text .*, got none"):
        model.fill_mask(WORDS[0])
    with pytest.raises(ConfigError, match="top: expected a whole number from 1 to .*, got 0"):
        model.fill_mask("[MASK]", top=0)


def test_rows_of_the_table_that_are_no_tokens_are_no_answers(model):
    tokenizer = model.run.tokenizer
    tokenizer.vocab_size -= 5
    with torch.no_grad():
        model.run.model.mlm.bias[tokenizer.vocab_size:] += 100
    assert max(answer["id"] for answer in model.fill_mask("[MASK]", top=4)[0]) < tokenizer.vocab_size


def test_a_special_token_is_answered_by_its_name(model):
    with torch.no_grad():
        model.run.model.mlm.bias[model.run.tokenizer.sep_id] += 100
    assert model.fill_mask("[MASK]", top=1)[0][0]["token"] == "[SEP]"


def test_encode_is_the_first_token_or_the_mean(model):
    first, mean = model.encode(TEXTS), model.encode(TEXTS, pooling="mean")
    assert first.shape == mean.shape == (4, 32) and not first.equal(mean) and not first.requires_grad
    for i, text in enumerate(TEXTS):  # alone as in company
        assert_close(model.encode([text])[0], first[i])
        assert_close(model.encode([text], pooling="mean")[0], mean[i])
    with pytest.raises(ConfigError, match="pooling: expected one of first, mean, got 'last'"):
        model.encode(TEXTS, pooling="last")
    with pytest.raises(ConfigError, match="expected a list of texts, got one text"):
        model.encode("text")


def test_vectors_have_the_dtype_of_the_model(folders):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert embedding.Debiased(checkpoint.load_run(folders / "plain", dtype=dtype)).encode(TEXTS).dtype == dtype


def test_numbers_that_overflow_are_no_answer(model):
    with torch.no_grad():
        model.run.model.encoder.layers[0].feed_forward.down.bias[0] = torch.inf
    for ask in (lambda: model.encode(TEXTS), lambda: model.encode(TEXTS, "mean"), lambda: model.fill_mask("[MASK]"), lambda: model.predict(TEXTS)):
        with pytest.raises(ModelError, match=r"expected finite numbers, got \d+ of \d+ that are NaN or infinite: the model's own overflow$"):
            ask()


def test_modules_go_off_and_more_come_in(model, folders):
    assert model.methods == ("gender", "race")
    both = model.encode(TEXTS)
    with model.without("gender", "race") as plain:
        assert_close(plain.encode(TEXTS), peftdebias.load(folders / "plain").encode(TEXTS))
    with model.without("race"):
        assert not model.encode(TEXTS).equal(both)
    assert model.encode(TEXTS).equal(both)
    more = peftdebias.load(folders / "run", [folders / "third"])
    assert more.methods == ("gender", "race", "religion") and not more.encode(TEXTS).equal(both)
    for name in ("age", ["gender"]):
        with pytest.raises(AdapterError, match="expected an attached method \\(gender, race\\)"), model.without(name):
            pass
    for reading in (peftdebias.load, checkpoint.load_run):
        with pytest.raises(ConfigError, match="adapters: expected a list of folders, got one path: "):
            reading(folders / "run", folders / "third")


@pytest.mark.parametrize("texts,words", [
    ([None], r"texts\[0\]: expected a text, got NoneType"), (["a", 3], r"texts\[1\]: expected a text, got int"),
    (["a\ud800"], r"texts\[0\]: expected text that utf-8 can hold, got half a surrogate pair, '\\ud800'"),
])
def test_what_is_no_text_is_named(texts, words, model):
    for ask in (model.predict, model.encode, lambda given: model.predict(["a"] * len(given), given)):
        with pytest.raises(ConfigError, match=f"^{words.replace('texts', '(texts|pairs)')}$"):
            ask(texts)
    with pytest.raises(ConfigError, match="^texts: expected a list of texts, got NoneType$"):
        model.predict(None)
    with pytest.raises(ConfigError, match="^fill_mask: expected one text, got list$"):
        model.fill_mask(["The [MASK]"])


@pytest.mark.parametrize("trained,asked", [({"text": "a"}, [TEXTS[1]]), ({"text": "a", "text_pair": "b"}, None)])
def test_a_run_answers_what_it_was_trained_on(trained, asked, model):
    model.run.config |= trained
    with pytest.raises(ConfigError, match="^.*run: the run was trained on (single texts; expected such, got text pairs|text pairs; expected such, got texts alone)$"):
        model.predict([TEXTS[0]], asked)
    assert model.predict([TEXTS[0]], [TEXTS[1]] if asked is None else None)


def test_any_iterable_of_texts_will_do(model):
    expected = model.encode(TEXTS[:2])
    for texts in (numpy.array(TEXTS[:2]), (t for t in TEXTS[:2]), tuple(TEXTS[:2])):
        assert model.encode(texts).equal(expected)
    assert len(model.predict((t for t in TEXTS[:2]), iter(TEXTS[1:3]))) == 2


def test_a_child_process_waits_for_nobody(model):
    """Its parent's threads are not there to end their blocks."""
    with model.without("gender"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads
        expected, taken = model.encode(TEXTS), threading.Event()

        def hold():
            with copy.copy(model).without("race"):  # the same model by another name
                taken.set()

        other = threading.Thread(target=hold)
        other.start()
        assert not taken.wait(0.2)
        if (child := os.fork()) == 0:
            os._exit(0 if model._own.lock.acquire(timeout=20) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and model.encode(TEXTS).equal(expected)
    other.join()


def test_in_a_child_process_the_blocks_of_other_threads_have_ended(model):
    """It would leave a module off for good; a block of the thread that forks goes on and ends there."""
    on, taken, done = model.encode(TEXTS), threading.Event(), threading.Event()
    with model.without("race"):
        own = model.encode(TEXTS)

    def hold():
        with model.run.model.without("gender"):
            taken.set()
            done.wait(20)

    def answers():
        with model.run.model.without("race"):
            if (child := os.fork()) == 0:
                code = 1
                try:
                    code = int(not model.encode(TEXTS).equal(own) or model.run.model.encoder.hooks.off != {"race"})
                finally:
                    os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    other = threading.Thread(target=hold)
    other.start()
    try:
        assert taken.wait(20) and not model.encode(TEXTS).equal(on)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads
            assert answers() == 0
    finally:
        done.set()
        other.join()
    assert model.encode(TEXTS).equal(on)


def test_a_block_of_the_main_thread_holds_in_all_workers_of_a_pool(model):
    """Which forks the later ones from a thread of its own."""
    with model.without("gender"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        codes = []

        def fork():
            if (child := os.fork()) == 0:
                os._exit(0 if model.run.model.encoder.hooks.off == {"gender"} else 1)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

        other = threading.Thread(target=fork)
        other.start()
        other.join()
    assert codes == [0]


def test_an_answer_leaves_every_part_in_the_mode_it_had(model):
    inside, method = model.run.model, model.run.model.methods["gender"]
    inside.train()
    inside.encoder.eval()
    method.training = True
    before = [part.training for part in inside.modules()]
    try:
        seen = model.encode(TEXTS)
        assert [part.training for part in inside.modules()] == before and True in before and False in before and method.training
    finally:
        inside.eval()
    assert not method.training and model.encode(TEXTS).equal(seen)  # answered without dropout all the same


def test_what_is_loaded_under_inference_mode_can_be_trained_and_rounded(folders):
    with torch.inference_mode():
        model = peftdebias.load(folders / "plain", [folders / "third"])
        made = methods.create("lora", model.run.model.config)
    parameters = [*model.run.model.parameters(), *model.run.model.methods["religion"].parameters().values(), *made.parameters().values()]
    assert not any(parameter.is_inference() for parameter in parameters)
    model.run.model.half()
    assert model.encode(TEXTS).isfinite().all()


def test_a_module_learnt_beside_others_is_loaded_with_a_word_on_those_that_are_left_out(folders, tmp_path):
    config = peftdebias.load(folders / "plain").run.model.config
    base = checkpoint.describe_base(peftdebias.load(folders / "plain").run.model)
    checkpoint.save_adapter(tmp_path / "second", methods.create("lora", config, seed=2), "age", base)
    beside = [str(folders / "third"), str(tmp_path / "second")]
    with checkpoint.writing_run(tmp_path / "up", "upstream", {"model": str(folders / "plain"), "adapter": beside}) as run:
        checkpoint.save_adapter(run.path / "adapter", methods.create("lora", config), "gender", base)
    for given in ([], beside[:1], beside[1:], beside):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert peftdebias.load(tmp_path / "up", given).methods[0] == "gender"
        assert [str(w.message) for w in seen] == [f"{tmp_path}/up: its module was learnt beside {one}, which is not among those attached" for one in beside if one not in given]
    (tmp_path / "second").rename(tmp_path / "moved")  # attached from there it cannot be told from another, but that one is missing can
    for given in (beside[:1], [beside[0], str(tmp_path / "moved")]):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            peftdebias.load(tmp_path / "up", given)
        assert [str(w.message) for w in seen] == [f"{tmp_path}/up: its module was learnt beside {beside[1]}, which is not among those attached"] * (2 - len(given))


def test_threads_share_a_model(model):
    """Each thread's answers are those of its own block, whatever the others do meanwhile, and afterwards all modules are on."""
    on = model.encode(TEXTS)
    with model.without("gender"):
        off = model.encode(TEXTS)
    start, wrong = threading.Barrier(4), []

    def ask(number: int) -> None:
        start.wait()
        for _ in range(8):
            with model.without("gender") if number % 2 else contextlib.nullcontext():
                for _ in range(2):
                    wrong.extend([number] * (not model.encode(TEXTS).equal(off if number % 2 else on)))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and model.encode(TEXTS).equal(on) and not model.run.model.encoder.hooks.off


def test_another_thread_waits_for_the_end_of_a_block(model):
    on, found = model.encode(TEXTS), []
    waiting = threading.Thread(target=lambda: found.append(model.encode(TEXTS)))
    with model.without("gender"):
        waiting.start()
        waiting.join(0.3)
        assert not found and not model.encode(TEXTS).equal(on)  # its own thread goes on
    waiting.join()
    assert found[0].equal(on)


@pytest.mark.parametrize("ask", ["predict", "fill_mask", "export"])
def test_every_answer_waits_for_the_end_of_a_block(ask, model, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "export_padded", lambda padded: (_ for _ in ()).throw(ZeroDivisionError))  # it takes its time
    ended, calls = [], {"predict": lambda: model.predict(TEXTS[:1]), "fill_mask": lambda: model.fill_mask("[MASK]"), "export": lambda: model.export(tmp_path / "x.pt2")}

    def call():
        with contextlib.suppress(ZeroDivisionError):
            calls[ask]()
        ended.append(ask)

    waiting = threading.Thread(target=call)
    with model.without("gender"):
        waiting.start()
        waiting.join(0.3)
        assert not ended
    waiting.join()
    assert ended == [ask]


def test_a_copy_of_a_model_answers_alike(model):
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.encode(TEXTS).equal(model.encode(TEXTS)) and twin.methods == model.methods and twin.name == model.name


def test_merged_modules_are_on_outside_of_a_without_block(folders):
    model = peftdebias.load(folders / "plain", [folders / "run" / "adapter"])
    peftdebias.merge(model.run.model)
    assert model._off() == set()
    with model.without("gender"):
        assert model._off() == {"gender"}


@pytest.mark.parametrize("merged", [False, True])
def test_a_copy_made_inside_of_a_without_block_has_its_modules_on(merged, folders):
    model, name = peftdebias.load(folders / "plain", [folders / "run" / "adapter"]), "gender"
    if merged:
        peftdebias.merge(model.run.model)
    on = model.encode(TEXTS)
    with model.without(name):
        off = model.encode(TEXTS)
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        assert model.encode(TEXTS).equal(off)
    assert not on.equal(off) and model.encode(TEXTS).equal(on)
    for twin in twins:
        assert twin.encode(TEXTS).equal(on)
        with twin.without(name):
            assert twin.encode(TEXTS).equal(off)
        (peftdebias.unmerge if merged else peftdebias.merge)(twin.run.model)
        assert_close(twin.encode(TEXTS), on)


def test_a_head_that_is_not_there_is_named_in_one_line(folders, tmp_path):
    bare = peftdebias.load(folders / "bare")
    assert bare.encode(TEXTS).shape == (4, 32)
    for ask, words in ((lambda: bare.predict(TEXTS), "bare: predict: expected a downstream run with a classifier, got a model without"),
                       (lambda: bare.fill_mask("[MASK]"), "bare: fill_mask: expected a model with a masked-LM head, got one without"),
                       (lambda: bare.export(tmp_path / "x.pt2"), "predict: expected a downstream run"),
                       (lambda: bare.export(tmp_path / "x.pt2", "fill_mask"), "fill_mask: expected a model with a masked-LM head"),
                       (lambda: bare.export(tmp_path / "x.pt2", "guess"), "export: what: expected one of predict, fill_mask, encode, got 'guess'"),
                       (lambda: bare.export(tmp_path / "x.onnx", "encode"), "expected a file name that ends in .pt2"),
                       (lambda: bare.export(tmp_path / "no" / "x.pt2", "encode"), "cannot be written: expected a file in a folder that is there"),
                       (lambda: bare.predict(TEXTS, ["one"]), "predict: expected a downstream run")):
        with pytest.raises((ModelError, ConfigError), match=words) as raised:
            ask()
        assert "\n" not in str(raised.value)
    with pytest.raises(ConfigError, match="pairs: expected 4, one for each text, got 1"):
        peftdebias.load(folders / "run").predict(TEXTS, ["one"])
    with pytest.warns(UserWarning, match="cut"):
        peftdebias.load(folders / "run").encode([" ".join(WORDS)])
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- a file that runs without this package

RUNS_ALONE = """
import json, sys
sys.modules["peftdebias"] = None  # whoever imports it gets an ImportError
import torch
answers = {}
for path in sys.argv[3:]:
    extra = {"peftdebias.json": "", "tokenizer.json": ""}
    graph = torch.export.load(path, extra_files=extra).module()
    about, asked = json.loads(extra["peftdebias.json"]), torch.load(sys.argv[1])
    answers[about["what"]] = [graph(ids, mask) for ids, mask in asked]
    answers[about["what"] + " about"] = about | {"tokenizer": json.loads(extra["tokenizer.json"])["model"]["type"]}
    try:
        graph(torch.zeros(1, 100, dtype=torch.int64), torch.ones(1, 100, dtype=torch.int64))
    except Exception as error:
        answers["too long"] = str(error)
torch.save(answers, sys.argv[2])
"""


def test_an_exported_file_runs_without_this_package(folders, tmp_path):
    """Two modules of the run (LoRA merged, an adapter in the graph) and a positioned prompt; texts, lengths and batch sizes that export never saw."""
    model = peftdebias.load(folders / "run", [folders / "third"])
    before = {name: p.clone() for name, p in patch.all_parameters(model.run.model).items()}
    for what in ("predict", "fill_mask", "encode"):
        assert model.export(tmp_path / f"{what}.pt2", what) == tmp_path / f"{what}.pt2"
    assert {p.name for p in tmp_path.iterdir()} == {"predict.pt2", "fill_mask.pt2", "encode.pt2"}
    assert all(p.equal(before[name]) and p.grad is None for name, p in patch.all_parameters(model.run.model).items())
    tokenizer, asked = model.run.tokenizer, []
    for texts, dtype in ((TEXTS, torch.int64), (TEXTS[:1], torch.bool), ([""], torch.int64), (TEXTS * 3, torch.int64)):
        encoded = [torch.from_numpy(e.ids).long() for e in tokenizer.encode(texts)]
        longest = max(map(len, encoded))
        asked.append((torch.stack([torch.cat([e, torch.full((longest - len(e),), tokenizer.pad_id)]) for e in encoded]),
                      (torch.arange(longest)[None] < torch.tensor([len(e) for e in encoded])[:, None]).to(dtype)))
    asked.append((asked[2][0][:, :1], asked[2][1][:, :1]))  # one text of one token
    torch.save(asked, tmp_path / "asked.pt")
    (tmp_path / "alone.py").write_text(RUNS_ALONE)
    done = subprocess.run([sys.executable, "-I", "alone.py", "asked.pt", "answers.pt", "predict.pt2", "fill_mask.pt2", "encode.pt2"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = torch.load(tmp_path / "answers.pt")

    assert answers["predict about"]["labels"] == list(LABELS) and answers["predict about"]["modules"] == {"gender": "lora", "race": "adapter", "religion": "prompt"}
    assert answers["fill_mask about"]["special_ids"]["mask"] == tokenizer.mask_id and answers["encode about"]["pooling"] == "first"
    assert answers["encode about"]["longest"] == 24 and answers["encode about"]["tokenizer"] == "WordPiece" and "61" in answers["too long"]
    assert_close(answers["encode"][0], model.encode(TEXTS))
    for (ids, mask), *found in zip(asked, *(answers[what] for what in ("predict", "fill_mask", "encode"))):
        samples = [peftdebias.batches.Sample(row[m.bool()].numpy(), numpy.arange(int(m.sum()))) for row, m in zip(ids, mask)]
        every = peftdebias.batches.pack(samples)
        first = dataclasses.replace(every, rows=every.cu_seqlens[:-1].long(), row_lengths=(1,) * len(samples), firsts=True)
        with torch.no_grad():
            assert_close(found[0], model.run.model.class_logits(first), "predict", logits=True)
            assert_close(found[1][mask.bool()], model.run.model.mlm_logits(every), "fill_mask", logits=True)
            assert_close(found[2], model.run.model.encoder(first), "encode")


def exported(model, path, *inputs, **options) -> tuple[torch.Tensor, dict]:
    """(what the file answers, its peftdebias.json)."""
    extra = {"peftdebias.json": ""}
    graph = torch.export.load(model.export(path, **options), extra_files=extra).module()
    return graph(*inputs), json.loads(extra["peftdebias.json"])


def test_a_run_of_pairs_exports_a_graph_of_pairs(model, tmp_path):
    """Unless it is told otherwise; modules that are off are not in it."""
    model.run.config |= {"text_pair": "b"}
    (one,) = model.run.tokenizer.encode(TEXTS[:1], TEXTS[1:2])
    ids = torch.from_numpy(one.ids).long()[None]
    probabilities = list(model.predict(TEXTS[:1], TEXTS[1:2])[0]["probabilities"].values())
    found, about = exported(model, tmp_path / "pairs.pt2", ids, torch.ones_like(ids))
    assert about["pairs"] is True and found.softmax(-1)[0].tolist() == pytest.approx(probabilities, abs=1e-6)
    with model.without("gender"):
        other, about = exported(model, tmp_path / "single.pt2", ids, torch.ones_like(ids), what="encode", pooling="mean", pairs=False)
        assert_close(other[0], model.run.model.encoder(pack([Sample(one.ids, numpy.arange(len(one.ids)))])).mean(0).detach())
    assert about["pairs"] is False and about["modules"] == {"race": "adapter"} and about["pooling"] == "mean"


def test_a_roberta_reads_pairs_without_segments(model, tmp_path):
    """Of which it has one."""
    config = EncoderConfig(kind="roberta", layers=1, hidden=32, heads=2, feed_forward=48, vocab=model.run.tokenizer.vocab_size, max_positions=64, segments=1, position_offset=2)
    run = dataclasses.replace(model.run, model=randomize(Model(config)).eval())
    (one,) = run.tokenizer.encode(TEXTS[:1], TEXTS[1:2])
    ids = torch.from_numpy(one.ids).long()[None]
    found, _ = exported(embedding.Debiased(run), tmp_path / "x.pt2", ids, torch.ones_like(ids), what="encode", pairs=True)
    assert_close(found, run.model.encoder(pack([Sample(one.ids, numpy.array([0]))])).detach())


def test_a_file_that_cannot_be_written_leaves_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "export_padded", lambda padded: None)
    monkeypatch.setattr(torch.export, "save", lambda program, file, extra_files: file.write(b"x" * 9000))
    (tmp_path / "folder.pt2").mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # as on a full disk, what is written ends here
    try:
        for name, words in (("x.pt2", "File too large"), ("folder.pt2", "expected a file in a folder that is there")):
            with pytest.raises(ConfigError, match=f"^export {tmp_path}/{name}: cannot be written: {words}$"):
                model.export(tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ["folder.pt2"]


def test_a_file_system_that_is_read_only_is_said_in_a_line(model, tmp_path, monkeypatch):
    """It refuses to remove what is not there, too."""
    def refused(self, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(embedding, "export_padded", lambda padded: None)
    monkeypatch.setattr(torch.export, "save", lambda program, file, extra_files: file.write(b"x"))
    monkeypatch.setattr(Path, "write_bytes", refused)
    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(ConfigError, match=f"^export {tmp_path}/x.pt2: cannot be written: Read-only file system$"):
        model.export(tmp_path / "x.pt2")


def test_modules_made_for_another_base_come_in_by_force(folders, tmp_path):
    model = randomize(Model(peftdebias.load(folders / "plain").run.model.config, mlm=True, labels=LABELS), seed=7)
    weights.save_model(model, tmp_path / "other", peftdebias.load(folders / "plain").run.tokenizer)
    with pytest.raises(AdapterError, match="made for the base with checksum"):
        peftdebias.load(tmp_path / "other", [folders / "third"])
    with pytest.warns(UserWarning, match="going on by force"):
        assert peftdebias.load(tmp_path / "other", [folders / "third"], force=True).methods == ("religion",)


def test_arguments_of_other_kinds_are_named(model, tmp_path):
    run = model.run.model
    for call, words in (
        (lambda: peftdebias.merge(model), "merge: expected a model of this package, as load(...).run.model is, got Debiased"),
        (lambda: peftdebias.unmerge(None), "unmerge: expected a model of this package, as load(...).run.model is, got NoneType"),
        (lambda: peftdebias.detach(model, "gender"), "detach 'gender': expected a model of this package, as load(...).run.model is, got Debiased"),
        (lambda: model.fill_mask("[MASK]", top="3"), "top: expected a whole number from 1 to"),
        (lambda: model.fill_mask("[MASK]", top=model.run.tokenizer.vocab_size + 1), "the tokens there are, got"),
        (lambda: model.fill_mask("[MASK]", top=True), "top: expected a whole number from 1 to"),
        (lambda: model.export(None), "export: expected the name of a file, got NoneType"),
        (lambda: model.export(tmp_path / "x.pt2", "encode", pairs="yes"), "export: pairs: expected one of None, True, False, got 'yes'"),
        (lambda: peftdebias.attach_to("model", "r"), "attach_to: expected a torch.nn.Module, got str"),
        (lambda: peftdebias.attach_to(torch.nn.Linear(2, 2), 3), "attach_to: expected a method or the folder of one, got int"),
        (lambda: peftdebias.attach_to(torch.nn.Linear(2, 2), "r", 5), "attach_to: names: expected a dict, our site to their module's name, got int"),
        (lambda: peftdebias.attach_to(torch.nn.Linear(2, 2), __file__), "expected a folder, got a file"),
        (lambda: run.encoder(torch.zeros(3)), "expected a Batch, as batches.pack(samples) makes one, got Tensor"),
        (lambda: pack(["abc"]), "pack: expected a list of Sample, got str at 0"),
        (lambda: pack(None), "pack: expected a list of Sample, got NoneType at 0"),
        (lambda: pack([Sample(numpy.arange(2), numpy.array([2]))]), "pack: sample 0: expected rows from 0 to 1, ascending, got 2"),
    ):
        with pytest.raises(peftdebias.PeftDebiasError) as caught:
            call()
        assert words in str(caught.value)


NO_PATHS = {"None": (None, "NoneType"), "3": (3, "int"), "bytes": (b"x", "bytes"), "[]": ([], "list"), "empty": ("", "an empty text"), "zero byte": ("a\0", "'a\\x00': embedded null"),
            "long": ("x" * 5000, f"'{'x' * 60}': File name too long")}
PATHS = {
    "load": ("model", ModelError, lambda folders, given: peftdebias.load(given)), "load_run": ("model", ModelError, lambda folders, given: peftdebias.load_run(given)),
    "load, adapters": ("adapter", AdapterError, lambda folders, given: peftdebias.load(folders / "run", [given])),
    "load_model": ("model", ModelError, lambda folders, given: peftdebias.load_model(given)), "load_tokenizer": ("tokenizer", ModelError, lambda folders, given: peftdebias.load_tokenizer(given)),
    "save_model": ("save_model", ModelError, lambda folders, given: peftdebias.save_model(peftdebias.load_model(folders / "bare")[0], given)),
    "export_adapter, run": ("run", ModelError, lambda folders, given: peftdebias.export_adapter(given, "hf", "out")),
    "export_adapter, out": ("--out", ConfigError, lambda folders, given: peftdebias.export_adapter(folders / "run", "hf", given)),
    "import_adapter, folder": ("adapter", AdapterError, lambda folders, given: peftdebias.import_adapter(given, folders / "bare", "gender", "out")),
    "import_adapter, model": ("model", ModelError, lambda folders, given: peftdebias.import_adapter("theirs", given, "gender", "out")),
    "import_adapter, out": ("--out", ConfigError, lambda folders, given: peftdebias.import_adapter("theirs", folders / "bare", "gender", given)),
    "find": ("files", DataError, lambda folders, given: lines.find([given])),
}
"""What takes a path -> what its message calls it, the error, the call."""


@pytest.mark.parametrize("given,got", NO_PATHS.values(), ids=NO_PATHS)
@pytest.mark.parametrize("what,error,call", PATHS.values(), ids=PATHS)
def test_what_is_no_path_is_one_line(what, error, call, given, got, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as caught:
        call(folders, given)
    assert str(caught.value).startswith(f"{what}: expected a path, got {got}") and "\n" not in str(caught.value) and not list(tmp_path.iterdir())


SEED, FLOATS, DEVICE = "seed: expected a whole number from 0 to 9223372036854775807, got ", "dtype: expected a floating-point torch.dtype, got ", "--device: expected cpu, cuda, cuda:1, ... or auto, got "
OTHERS = {
    **{f"device={given!r}": (lambda folders, given=given: peftdebias.load_run(folders / "plain", device=given), ConfigError, f"{DEVICE}{given!r}") for given in ("gpu", "", 1, None)},
    **{f"dtype={given!r}": (lambda folders, given=given: peftdebias.load_model(folders / "plain", dtype=given), ConfigError, f"{FLOATS}{given!r}")
       for given in (torch.int8, torch.complex64, "", [], 1.5)},
    **{f"seed={given!r}": (lambda folders, given=given: peftdebias.load_model(folders / "plain", seed=given), ConfigError, f"{SEED}{given!r}") for given in (None, "", 2**70, 1.5)},
    "load_model, labels": (lambda folders: peftdebias.load_model(folders / "plain", labels=1), ModelError, "labels: expected names, each another one, got 1"),
    "save_model": (lambda folders: peftdebias.save_model(3, "out"), ModelError, "save_model: expected a model of this package, as load(...).run.model is, got int"),
    "save_model, tokenizer": (lambda folders: peftdebias.save_model(peftdebias.load_model(folders / "bare")[0], "out", tokenizer="x"), ModelError,
                              "save_model: expected a tokenizer, as load_tokenizer gives one, got str"),
    "describe_base": (lambda folders: checkpoint.describe_base(None), ModelError, "describe_base: expected a model of this package, as load(...).run.model is, got NoneType"),
    "import_adapter, axis": (lambda folders: peftdebias.import_adapter("theirs", folders / "bare", None, "out"), ConfigError, "--axis: expected a name without /, got None"),
    "find, None": (lambda folders: lines.find(None), DataError, "files: expected a path, got NoneType"), "find, 3": (lambda folders: lines.find(3), DataError, "files: expected a path, got int"),
}
"""A call with an argument of another kind -> the error, and its words."""


@pytest.mark.parametrize("call,error,words", OTHERS.values(), ids=OTHERS)
def test_an_argument_of_another_kind_is_one_line(call, error, words, folders, tmp_path, monkeypatch):
    """And nothing is written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as caught:
        call(folders)
    assert str(caught.value) == words and not list(tmp_path.iterdir())


def test_labels_in_a_list_are_the_stored_ones(folders):
    for labels in (LABELS, list(LABELS)):
        model, report = peftdebias.load_model(folders / "plain", labels=labels)
        assert model.classifier.labels == tuple(LABELS) and not report.new


def test_texts_that_are_cut_are_told_where_they_were_given(model):
    with pytest.warns(UserWarning, match="are longer than") as told:
        model.encode(["he " * 600])
    assert [Path(one.filename).name for one in told] == [Path(__file__).name]
