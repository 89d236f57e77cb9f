"""AdapterHub's folders, as recorded by make_adapterhub_fixtures.py: the same outputs, and what cannot be read is named."""

import dataclasses
import json
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from peftdebias import interchange, patch, weights
from peftdebias.batches import Sample, pack
from peftdebias.errors import AdapterError

from .outside import assert_close, one_thread  # noqa: F401

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def hub():
    return json.loads((FIXTURES / "adapterhub.json").read_text()), load_file(FIXTURES / "adapterhub.safetensors")


def part(tensors, prefix: str):
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def hub_folder(hub, name: str, folder: Path, binary: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(hub[0]["kinds"][name]["adapter_config"]))
    tensors = part(hub[1], f"{name}/adapter/")
    torch.save(tensors, folder / "pytorch_adapter.bin") if binary else save_file(tensors, folder / "adapter.safetensors")
    return folder


def hub_model(hub, kind: str, folder: Path):
    about, tensors = hub
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(about["models"][kind]))
    save_file(part(tensors, f"{kind}/model/"), folder / "model.safetensors")
    return weights.load_model(folder, dtype=torch.float64)[0]


HUB = {"seq_bn": "adapter", "double_seq_bn": "adapter", "seq_bn_gelu": "adapter", "par_bn": "adapter", "lora": "lora", "prefix": "prefix", "prefix_roberta": "prefix", "prefix_ejected": "prefix"}


@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("name", HUB)
def test_what_adapterhub_saves_is_read(name, binary, hub, tmp_path):
    about, tensors = hub
    kind = about["kinds"][name]["model"]
    model = hub_model(hub, kind, tmp_path / "model")
    found = interchange.read(hub_folder(hub, name, tmp_path / "adapter", binary), model.config)
    assert found.method.name == HUB[name] and found.origin["library"] == "adapters.1.3.0"
    patch.attach(model, "gender", found.method)
    ids = tensors[f"{kind}/ids"]
    batch = pack([Sample(ids[b, :n].numpy(), numpy.arange(n), None) for b, n in enumerate(about["lengths"])])
    expected = tensors[f"{name}/logits"]
    assert_close(model.double().mlm_logits(batch), expected)
    with model.without("gender"):
        assert (model.mlm_logits(batch) - expected).abs().max() > 1e-2


def test_lora_of_before_their_scaling_was_mended(hub, tmp_path):
    """Before adapters 1.1 alpha did nothing; their own loader sets it to r."""
    config = drawn_for(hub, "bert")
    folder = hub_folder(hub, "lora", tmp_path / "a")
    values = json.loads((folder / "adapter_config.json").read_text())
    for version, scale in (("adapters.1.3.0", 7 / 3), ("adapters.1.1.0", 7 / 3), ("adapters.1.0.1", 1), ("adapters.0.2.2", 1)):
        (folder / "adapter_config.json").write_text(json.dumps(values | {"version": version}))
        assert interchange.read(folder, config).method.config.scale == scale
    del values["config"]["alpha"], values["config"]["dropout"]
    (folder / "adapter_config.json").write_text(json.dumps(values))
    found = interchange.read(folder, config)
    assert (found.method.config.scale, found.method.config.dropout) == (8 / 3, 0) and found.origin == {"library": "adapters.1.3.0", "kind": "lora"}


def test_a_prefix_that_a_network_computes_is_refused_whatever_its_settings_say(hub, tmp_path):
    """Those of one that was ejected say no more than that it was not flat once."""
    folder = hub_folder(hub, "prefix_ejected", tmp_path / "a")
    assert json.loads((folder / "adapter_config.json").read_text())["config"]["flat"] is False
    tensors = load_file(folder / "adapter.safetensors")
    tensors |= {name.replace("control_trans", "wte.weight"): torch.zeros(5, 14) for name in tensors}
    save_file(tensors, folder / "adapter.safetensors")
    with pytest.raises(AdapterError, match=f"^{folder}/adapter.safetensors: expected a flat prefix, got the network that computes one; call eject_prefix_tuning there before saving$"):
        interchange.read(folder, drawn_for(hub, "bert"))


def test_a_bottleneck_whose_scaling_is_not_told_has_none(hub, tmp_path):
    folder = hub_folder(hub, "seq_bn", tmp_path / "a")
    values = json.loads((folder / "adapter_config.json").read_text())
    for scaling, scale in ((2.5, 2.5), (None, 1.0), (..., 1.0)):
        values["config"]["scaling"] = scaling
        (folder / "adapter_config.json").write_text(json.dumps(values | {"config": {key: value for key, value in values["config"].items() if value is not ...}}))
        assert interchange.read(folder, drawn_for(hub, "bert")).method.config.scale == scale


def test_where_no_norm_comes_first_its_residual_is_the_same_before_and_behind_it(hub, tmp_path):
    """par_bn and double_seq_bn; seq_bn, whose input passes a norm, is refused below."""
    for name in ("par_bn", "double_seq_bn"):
        folder = hub_folder(hub, name, tmp_path / name)
        values = json.loads((folder / "adapter_config.json").read_text())
        for before in (True, False):
            values["config"]["residual_before_ln"] = before
            (folder / "adapter_config.json").write_text(json.dumps(values))
            assert interchange.read(folder, drawn_for(hub, "bert")).method.name == "adapter"


def drawn_for(hub, kind: str):
    c = hub[0]["models"][kind]
    return weights.EncoderConfig(kind=kind, layers=c["num_hidden_layers"], hidden=c["hidden_size"], heads=c["num_attention_heads"], feed_forward=c["intermediate_size"],
                                 vocab=c["vocab_size"], max_positions=c["max_position_embeddings"])


@pytest.mark.parametrize("name,changes,words", [
    ("seq_bn", {"ln_after": True}, "ln_after: expected none .there is no such thing here., got true"),
    ("seq_bn", {"use_gating": True}, "use_gating: expected none"), ("seq_bn", {"inv_adapter": "nice"}, "inv_adapter: expected none .*, got \"nice\""),
    ("seq_bn", {"phm_layer": True}, "phm_layer: expected none"), ("seq_bn", {"leave_out": [1]}, "leave_out: expected none"),
    ("seq_bn", {"scaling": "learned"}, "scaling: expected int or float, got 'learned'"),
    ("seq_bn", {"residual_before_ln": False}, "residual_before_ln: expected true, got false"),
    ("seq_bn", {"non_linearity": "leakyrelu"}, "non_linearity: expected one of relu, gelu, .*, got 'leakyrelu'"),
    ("seq_bn", {"reduction_factor": {"default": 2}}, "reduction_factor: expected int or float, got {'default': 2}"),
    ("seq_bn", {"reduction_factor": 0}, "reduction_factor: expected more than 0, got 0"),
    ("seq_bn", {"reduction_factor": 2}, r"output.adapters.NAME.adapter_down.0.weight: expected shape \[7, 14\], got \[4, 14\]"),
    ("seq_bn", {"mh_adapter": True}, "expected those of seq_bn, double_seq_bn or par_bn, got .True, True, True, False."),
    ("seq_bn", {"architecture": "loreft"}, "architecture: expected lora, prefix_tuning or none .a bottleneck., got 'loreft'"),
    ("lora", {"composition_mode": "scale"}, "composition_mode: expected \"add\", got \"scale\""), ("lora", {"use_dora": True}, "use_dora: expected none"),
    ("lora", {"attn_matrices": ["q", "o"]}, "attn_matrices: expected some of q, k, v, got 'o'"),
    ("lora", {"output_lora": False}, "expected 12 tensors of a lora module as configured, got .*output.dense.loras.NAME.lora_A besides"),
    ("lora", {"selfattn_lora": False}, "tensors of a lora module as configured, got .*loras.NAME.lora_A besides"),
    ("seq_bn", {"reduction_factor": 100}, r"adapter_down.0.weight: expected shape \[1, 14\], got \[4, 14\]"),
    ("seq_bn", {"architecture": ["lora"]}, "architecture: expected lora, prefix_tuning or none .a bottleneck., got .'lora'."),
])  # fmt: skip
def test_what_adapterhub_says_and_we_cannot_is_refused(name, changes, words, hub, tmp_path):
    folder = hub_folder(hub, name, tmp_path / "a")
    values = json.loads((folder / "adapter_config.json").read_text())
    values["config"] |= changes
    (folder / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(AdapterError, match=words) as error:
        interchange.read(folder, drawn_for(hub, "bert"))
    assert str(error.value).startswith(str(folder)) and "\n" not in str(error.value)


@pytest.mark.parametrize("name,changes,words", [
    ("seq_bn", {"reduction_factor": 1e-9}, r"adapter.safetensors: bert.*adapter_down.0.weight: expected shape \[13999999999, 14\], got \[4, 14\]"),
    ("seq_bn", {"reduction_factor": 1e-30}, "adapter_config.json: adapter: expected sizes that a tensor can have, got AdapterConfig"),
    ("seq_bn", {"reduction_factor": 1e-320}, "adapter_config.json: reduction_factor: expected one by which hidden 14 can be divided, got 9.99989e-321"),
    ("seq_bn", {"reduction_factor": float("inf")}, "adapter_config.json: reduction_factor: expected a finite number, got inf"),
    ("lora", {"r": 10**9}, r"adapter.safetensors: bert.*lora_A: expected shape \[1000000000, 14\], got \[3, 14\]"),
    ("prefix", {"prefix_length": 10**9}, r"adapter.safetensors: bert.*control_trans: expected shape \[56000000000\], got \[280\]"),
])  # fmt: skip
def test_absurd_sizes_are_refused_before_anything_is_made(name, changes, words, hub, tmp_path, little_memory):
    folder = hub_folder(hub, name, tmp_path / "a")
    values = json.loads((folder / "adapter_config.json").read_text())
    values["config"] |= changes
    (folder / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(AdapterError, match=words) as error:
        interchange.read(folder, drawn_for(hub, "bert"))
    assert str(error.value).startswith(str(folder)) and "\n" not in str(error.value)


def test_copies_of_a_prefix_are_of_one_value(hub, tmp_path):
    folder = hub_folder(hub, "prefix", tmp_path / "a")
    path = folder / "adapter.safetensors"
    tensors = load_file(path)
    (name,) = [n for n in tensors if "prefix_tunings" in n and ".pool." not in n]
    copy = name.replace(".prefix_tuning.", ".encoder.layer.0.attention.self.prefix_tuning.pool.")
    save_file(tensors | {copy: tensors[name].clone()}, path)
    assert interchange.read(folder, drawn_for(hub, "bert")).method.name == "prefix"
    save_file(tensors | {copy: tensors[name] + 1}, path)
    with pytest.raises(AdapterError, match="pool.*: expected the same values as in bert.prefix_tuning, got others"):
        interchange.read(folder, drawn_for(hub, "bert"))


def test_adapterhub_for_another_base(hub, tmp_path):
    folder = hub_folder(hub, "lora", tmp_path / "a")
    for config, words in ((drawn_for(hub, "roberta"), "model_type: expected \"roberta\", got \"bert\""),
                          (dataclasses.replace(drawn_for(hub, "bert"), hidden=28), "hidden_size: expected 28, got 14")):
        with pytest.raises(AdapterError, match=words):
            interchange.read(folder, config)


def test_a_head_that_came_along_is_said_to_be_left(hub, tmp_path):
    folder = hub_folder(hub, "lora", tmp_path / "a")
    (folder / "head_config.json").write_text("{}")
    with pytest.warns(UserWarning, match=f"^{folder}: head_config.json: its head is not read; a classifier answers by the base's own$"):
        interchange.read(folder, drawn_for(hub, "bert"))
