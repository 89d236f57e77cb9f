"""Records what AdapterHub's `adapters` computes, for test_adapterhub.py: tests/fixtures/adapterhub.json and .safetensors (run by hand, not by pytest).

    python3 -m venv /tmp/ah && /tmp/ah/bin/pip install torch==2.13.0 transformers==4.57.6 adapters==1.3.0
    /tmp/ah/bin/python tests/make_adapterhub_fixtures.py

That library needs an older transformers than the tests do. For every kind of adapter: a seeded random BERT (or RoBERTa) of odd sizes, the adapter's weights
drawn large enough to matter, its files as the library saves them, two texts of different lengths, and the masked-LM logits of their tokens in float64.
"""

import json
import tempfile
from pathlib import Path

import adapters
import torch
import transformers
from safetensors.torch import save_file

FIXTURES = Path(__file__).resolve().parent / "fixtures"
SIZES = dict(num_hidden_layers=2, hidden_size=14, num_attention_heads=2, intermediate_size=19, vocab_size=37, max_position_embeddings=23, hidden_act="gelu")
LENGTHS = (8, 3)
KINDS = {
    "seq_bn": ("bert", adapters.SeqBnConfig(reduction_factor=3)),
    "double_seq_bn": ("bert", adapters.DoubleSeqBnConfig(reduction_factor=3)),
    "seq_bn_gelu": ("roberta", adapters.SeqBnConfig(reduction_factor=2, non_linearity="gelu", scaling=1.5)),
    "par_bn": ("bert", adapters.ParBnConfig(reduction_factor=3)),
    "lora": ("bert", adapters.LoRAConfig(r=3, alpha=7, attn_matrices=["q", "k"], intermediate_lora=True, output_lora=True)),
    "prefix": ("bert", adapters.PrefixTuningConfig(flat=True, prefix_length=5)),
    "prefix_roberta": ("roberta", adapters.PrefixTuningConfig(flat=True, prefix_length=5)),
    "prefix_ejected": ("bert", adapters.PrefixTuningConfig(flat=False, prefix_length=5, bottleneck_size=6)),
}


def draw(parameters, seed: int) -> None:
    """Every value float32, so that float32 files lose nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in parameters:
            gain = name.lower().endswith(("norm.weight", "layer_norm.weight"))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + gain)


def record(kind: str) -> tuple[transformers.PreTrainedModel, torch.Tensor]:
    """(the model, ids [B, S] padded) of a model type."""
    if kind == "bert":
        model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, type_vocab_size=2, pad_token_id=0))
    else:
        model = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SIZES, type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5))
    draw(model.named_parameters(), 1)
    ids = torch.randint(5, SIZES["vocab_size"], (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(2))
    for b, n in enumerate(LENGTHS):
        ids[b, n:] = model.config.pad_token_id
    return model, ids


def main() -> None:
    tensors, about = {}, {"adapters": adapters.__version__, "transformers": transformers.__version__, "lengths": LENGTHS, "models": {}, "kinds": {}}
    models = {kind: record(kind) for kind in ("bert", "roberta")}
    for kind, (model, ids) in models.items():
        about["models"][kind] = model.config.to_diff_dict()
        tensors |= {f"{kind}/model/{name}": p.detach().clone() for name, p in model.named_parameters()} | {f"{kind}/ids": ids}
        adapters.init(model)
    for seed, (name, (kind, config)) in enumerate(KINDS.items()):
        model, ids = models[kind]
        model.add_adapter(name, config=config)
        draw([(n, p) for n, p in sorted(model.named_parameters()) if name in n.split(".")], 10 + seed)
        model.set_active_adapters(name)
        if name.endswith("_ejected"):
            model.eject_prefix_tuning(name)
        with tempfile.TemporaryDirectory() as folder:
            model.save_adapter(folder, name)
            about["kinds"][name] = {"model": kind, "adapter_config": json.loads((Path(folder) / "adapter_config.json").read_text())}
            saved = torch.load(Path(folder) / "pytorch_adapter.bin", weights_only=True)
        tensors |= {f"{name}/adapter/{key}": t.clone() for key, t in saved.items()}
        model.double().eval()
        with torch.no_grad():
            mask = (torch.arange(ids.shape[1]) < torch.tensor(LENGTHS)[:, None]).long()
            logits = model(input_ids=ids, attention_mask=mask).logits
        tensors[f"{name}/logits"] = torch.cat([logits[b, :n] for b, n in enumerate(LENGTHS)])
        model.float()
        model.set_active_adapters(None)
    FIXTURES.mkdir(exist_ok=True)
    save_file({k: t.contiguous() for k, t in tensors.items()}, FIXTURES / "adapterhub.safetensors")
    (FIXTURES / "adapterhub.json").write_text(json.dumps(about, sort_keys=True) + "\n")
    for path in sorted(FIXTURES.iterdir()):
        print(path.name, path.stat().st_size)


if __name__ == "__main__":
    main()
