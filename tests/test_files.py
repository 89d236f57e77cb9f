"""Files that others wrote: shards, pickles and single files give the same bits; code in them does not run; what is damaged or missing is named."""

import errno
import json
import os
import pickle

import pytest
import safetensors.torch
import torch

from peftdebias import files
from peftdebias.errors import ModelError
from peftdebias.files import write_tensors, wrong_numbers
from peftdebias.weights import load_model, read_tensors, save_model

from .outside import one_thread
from .stored import assert_same, bert, edit_config, message, model_of, saved, store, stored_decoder, tensors_of


def in_shards(folder, tensors, write, stem, suffix, count=3):
    """The tensors over `count` files with an index; the single file goes."""
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {name: f"{stem}-{i % count + 1:05}-of-{count:05}.{suffix}" for i, name in enumerate(names)}
    for file in sorted(set(where.values())):
        write({name: tensors[name] for name in names if where[name] == file}, folder / file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_sharded_files_with_an_index(saved):
    folder, model, tensors = saved
    in_shards(folder, tensors, safetensors.torch.save_file, "model", "safetensors")
    assert_same(tensors_of(load_model(folder)[0]), tensors_of(model))
    gone = folder / "model-00002-of-00003.safetensors"
    gone.unlink()
    assert message(lambda: load_model(folder)) == f"{folder}: expected model-00002-of-00003.safetensors, found none"
    for broken, words in (("{", "expected JSON, got "), ("[]", "expected a JSON object, got list"), *((broken, "expected a weight_map of tensors to names of files beside it, got ") for broken in (
            '{"weight_map": [1]}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "{}", '{"weight_map": {"a": "../model.safetensors"}}'))):
        (folder / "model.safetensors.index.json").write_text(broken)
        assert message(lambda: load_model(folder)).startswith(f"{folder}/model.safetensors.index.json: {words}")


def test_an_index_that_lists_what_its_files_lack_is_refused(bert):
    folder, _, tensors = bert
    in_shards(folder, tensors, safetensors.torch.save_file, "model", "safetensors")
    listing = folder / "model.safetensors.index.json"
    index = json.loads(listing.read_text())
    index["weight_map"]["bert.pooler.dense.weight"] = "model-00001-of-00003.safetensors"
    listing.write_text(json.dumps(index))
    assert message(lambda: load_model(folder)) == f"{folder}/model-00001-of-00003.safetensors: expected the tensor bert.pooler.dense.weight by model.safetensors.index.json, found none"


def test_sharded_pickles_with_an_index(saved):
    folder, model, tensors = saved
    in_shards(folder, tensors, torch.save, "pytorch_model", "bin")
    assert_same(tensors_of(load_model(folder)[0]), tensors_of(model))


def test_a_plain_pickle_of_tensors(saved):
    folder, model, tensors = saved
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert_same(tensors_of(load_model(folder)[0]), tensors_of(model))
    torch.save(stored_decoder(tensors), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)  # as files of 2019 are
    assert_same(tensors_of(load_model(folder)[0]), tensors_of(model))


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_wants_to_run_code_is_refused(bert, zipped):
    folder, _, tensors = bert
    (folder / "model.safetensors").unlink()
    trap = folder / "trap"
    torch.save(tensors | {"x": Malicious(trap)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert message(lambda: load_model(folder)) == \
        f"{folder}/pytorch_model.bin: expected plain tensors, got UnpicklingError (unpickling anything else is refused)"
    assert not trap.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert trap.exists()  # the file was one


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_bare_pickle_is_refused(bert):
    folder, *_ = bert
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(folder / "trap")))
    assert "expected plain tensors" in message(lambda: load_model(folder))
    assert not (folder / "trap").exists()


def test_loading_draws_nothing_from_the_generator_of_others(bert):
    before = torch.get_rng_state()
    load_model(bert[0], labels=("a", "b"))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_is_made_on_the_cpu_whatever_torch_s_default_device_is(bert):
    folder, model, _ = bert
    with torch.device("meta"):
        found = load_model(folder)[0]
    assert_same(tensors_of(found), tensors_of(model))


def test_a_configuration_that_does_not_say_that_words_are_tied_ties_them(bert):
    folder, *_ = bert
    for tied, new in ((None, 0), (True, 0), (False, 1)):
        edit_config(folder, tie_word_embeddings=tied)
        model, report = load_model(folder)
        assert model.mlm.decoder is None and model.config.tied and len(report.new) == new


def test_a_model_without_a_masked_lm_head_is_saved_as_one_that_ties_its_words(tmp_path):
    """A decoder that somebody gives it later is the table, in transformers too."""
    save_model(model_of(mlm=False, labels=("a", "b")), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is True
    for names in ({}, None):  # labels without names
        edit_config(tmp_path, id2label=names)
        assert load_model(tmp_path)[0].classifier.labels == ("LABEL_0", "LABEL_1")


def test_a_part_of_a_layer_that_nobody_knows_is_told_by_the_name_it_has(bert):
    folder, _, tensors = bert
    store(folder, tensors | {"bert.encoder.layer.0.output.dense.weight_scale": torch.ones(1)})
    assert load_model(folder)[1].unused == ("bert.encoder.layer.0.output.dense.weight_scale",)


def test_safetensors_are_preferred(saved):
    folder, model, tensors = saved
    torch.save({name: t * 0 for name, t in tensors.items()}, folder / "pytorch_model.bin")
    assert_same(tensors_of(load_model(folder)[0]), tensors_of(model))
    in_shards(folder, tensors, safetensors.torch.save_file, "model", "safetensors")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "pytorch_model.bin")}))
    assert_same(tensors_of(load_model(folder)[0]), tensors_of(model))
    doubled = {name: t * 2 for name, t in tensors.items()}
    store(folder, doubled)  # as in transformers, one whole file comes before shards
    assert_same(read_tensors(folder), doubled)


@pytest.mark.parametrize("file, content, words", [
    ("model.safetensors", b"", "cannot be read: "), ("model.safetensors", b"{}" * 99, "cannot be read: "),
    ("pytorch_model.bin", b"", "cannot be read: "), ("pytorch_model.bin", b"not a pickle", "expected plain tensors, got UnpicklingError"),
    ("pytorch_model.bin", b"PK\x03\x04" + b"\0" * 99, "cannot be read: "),
])
def test_a_damaged_file_is_an_error(bert, file, content, words):
    folder, *_ = bert
    (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(content)
    assert f"{folder}/{file}: {words}" in message(lambda: load_model(folder))


def test_missing_files_are_named(bert):
    folder, *_ = bert
    (folder / "model.safetensors").unlink()
    assert message(lambda: load_model(folder)) == \
        f"{folder}: expected model.safetensors, model.safetensors.index.json or pytorch_model.bin, found none"
    (folder / "config.json").unlink()
    assert message(lambda: load_model(folder)) == f"{folder}: expected a Hugging Face model folder with config.json, found none"


def test_numbers_are_judged_as_what_they_become():
    large = torch.tensor([1.0, 1e300], dtype=torch.float64)
    assert wrong_numbers(large) == "" and wrong_numbers(large, torch.float32) == "expected finite numbers, got 1 of 2 that are NaN or infinite in float32"
    assert wrong_numbers(large / 0, torch.float64) == "expected finite numbers, got 2 of 2 that are NaN or infinite"


@pytest.mark.parametrize("tensor", [torch.empty(2**40, 0), torch.zeros(1).expand(2**20, 2**20), torch.zeros(1, dtype=torch.float64).expand(800)],
                         ids=["empty", "strides of 0", "of few values, more bytes than the file"])
def test_a_small_file_holds_no_shape_that_no_memory_does(tensor, tmp_path):
    torch.save({"a": tensor}, tmp_path / "a.bin")
    with pytest.raises(ModelError, match=rf"a.bin: a: expected no more than the file's .* bytes, got shape \{list(tensor.shape)} of "):
        files.read_tensors(tmp_path / "a.bin", ModelError)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning", "ignore:TypedStorage is deprecated:UserWarning")
def test_what_is_neither_a_plain_tensor_nor_shallow_json_is_refused(tmp_path):
    for found in ({"a": torch.eye(3).to_sparse()}, {"a": torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8)},
                  {"a": torch.eye(3, device="meta")}, {1: torch.eye(3)}, [torch.eye(3)]):
        torch.save(found, tmp_path / "a.bin")
        with pytest.raises(ModelError, match="a.bin: expected tensors by name, got something else$"):
            files.read_tensors(tmp_path / "a.bin", ModelError)
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(ModelError, match="a.json: expected JSON, got "):
        files.read_object(tmp_path / "a.json", ModelError)


def test_an_object_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert files.read_object(tmp_path / "a.json", ModelError) == {"a": 1}


def test_a_folder_in_the_place_of_weights_is_named(bert):
    folder, *_ = bert
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    assert message(lambda: load_model(folder)) == f"{folder}/model.safetensors: expected a file, got a folder"


def test_a_file_that_cannot_be_written_whole_is_named(tmp_path):
    """As on a full disk: the system's own error, by the file, and not the library's."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError) as error:
            write_tensors({"a": torch.zeros(4096)}, tmp_path / "a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.errno == errno.EFBIG and error.value.filename == str(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError):
        write_tensors({}, tmp_path / "none" / "a.safetensors")


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_tensors_have_the_rights_of_any_new_file(umask, tmp_path):
    """Those that colleagues share a folder by; the safetensors library would leave them to the owner alone."""
    before = os.umask(umask)
    try:
        (tmp_path / "other").touch()
        for _ in range(2):
            write_tensors({"a": torch.ones(3)}, tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert safetensors.torch.load_file(tmp_path / "a.safetensors")["a"].tolist() == [1, 1, 1]
