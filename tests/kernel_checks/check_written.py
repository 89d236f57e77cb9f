"""An encoder whose LoRA runs on the kernels: weights written in one launch, library products, dA and dB; and the product with dropout. Against the twins."""

import pytest
import torch
import torch.nn.functional as F

from peftdebias import kernels, methods, patch
from peftdebias.batches import Sample, pack
from peftdebias.encoder import EncoderConfig, Model

from .harness import DEVICE, STEPS, compare_steps

CONFIG = EncoderConfig(kind="bert", layers=2, hidden=28, heads=2, feed_forward=37, vocab=61, max_positions=19, dropout=0.0, attention_dropout=0.0)
OPS = {"lora_write", "lora_written", "lora_linear", "dropout"}


def step(options: dict, kind: str, dtype: torch.dtype, draw: int, monkeypatch) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Logits and gradients of one upstream step with OPS of one kind and the others as their twins, and which of OPS were asked for. The same float32 numbers in any dtype."""
    called, choose = [], kernels.choose

    def chosen(op, reference, device=None, width=1):
        if op not in OPS:
            return choose(op, reference, device, width)
        called.append(op)
        with kernels.use(kind):
            return choose(op, reference, device, width)

    model, generator = Model(CONFIG, mlm=True).to(DEVICE), torch.Generator().manual_seed(draw)
    method = methods.create("lora", CONFIG, options=options)
    with torch.no_grad():
        for p in [*model.parameters(), *method.parameters().values()]:
            p.data = (torch.randn(p.shape, generator=generator) * 0.3).to(DEVICE, dtype)
    patch.attach(model, "gender", method)
    patch.train_only(model, method.parameters().values())
    texts = [torch.randint(5, 61, (n,), generator=generator).numpy() for n in (13, 1, 7)]
    batch = pack([Sample(ids, ids[:2] * 0 + range(len(ids[:2])), ids[:2]) for ids in texts]).to(DEVICE)
    model.train()
    with monkeypatch.context() as patched, kernels.use("torch"):  # or the pieces would stay apart, as a CPU has them
        patched.setattr(kernels, "choose", chosen)
        torch.manual_seed(5 + draw)
        logits = model.mlm_logits(batch)
        F.cross_entropy(logits, batch.targets).backward()
    return {"logits": logits.detach()} | {name: p.grad for name, p in method.parameters().items()}, called


@pytest.mark.parametrize("options", [{"rank": 3}, pytest.param({"rank": 1, "targets": ("query", "key", "value", "output", "up", "down")}, marks=pytest.mark.slow), {"rank": 3, "dropout": 0.4, "targets": ("value", "down")}],
                         ids=str)
def test_an_upstream_step(options, monkeypatch):
    """With dropout too: twin and kernel draw the same masks from the same seed of torch's."""
    found: list[list[str]] = []

    def fused(draw: int) -> dict[str, torch.Tensor]:
        got, called = step(options, "triton", torch.float32, draw, monkeypatch)
        found.append(called)
        return got

    plain, truth = (lambda draw, dtype=dtype: step(options, "torch", dtype, draw, monkeypatch)[0] for dtype in (torch.float32, torch.float64))
    steps = 8 if "dropout" in options else STEPS  # slow in the interpreter, and without query and key, whose ratios are spread the most
    compare_steps(fused, plain, truth, steps=steps)
    assert len(found) >= steps
    for called in found:
        assert set(called) == ({"lora_write", "lora_linear"} if "dropout" in options else {"lora_write", "lora_written"}) and called.count("lora_write") == 1
