"""The experiments, one Case each: who does the work (providers), in which sizes, and what must be equal before anything is timed.

What it adds over case.py: the work of whole steps, of attention and the ceilings, and the registry; single ops stand in cases_kernels.py and cases_native.py. A new experiment is a
builder a provider and one entry of CASES.

Letters: T tokens, B sequences, S longest sequence, H heads, W head width, R rank.
"""

import dataclasses
import types
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

from peftdebias import methods, patch, training
from peftdebias.batches import WINDOW, Sample, Spans, pack
from peftdebias.encoder import EncoderConfig, Model
from peftdebias.ops import attention_padded, attention_ref
from peftdebias.tasks import MaskedLM
from peftdebias.weights import load_model, save_model

from .case import RANK, SIZES, Case, Provider, Setting, Size, Work, autocast, output_bound, quiet
from .cases_kernels import KERNEL_CASES
from .cases_native import NATIVE_CASES

MASK_SHARE = 0.15


# ---------------------------------------------------------------- lora_step: one upstream step

def random_lengths(count: int, mean: float, longest: int, generator: numpy.random.Generator) -> numpy.ndarray:
    """int [count]: a gamma distribution (shape 2) cut to 5..longest, its mean within a token of `mean`; all `longest` where that is the mean."""
    if mean >= longest:
        return numpy.full(count, longest)
    drawn = generator.gamma(2.0, 1.0, count)
    low, high = 0.0, 100.0 * longest
    for _ in range(60):  # the mean after the cut grows with the scale
        scale = (low + high) / 2
        low, high = (scale, high) if numpy.clip(drawn * scale, 5, longest).mean() < mean else (low, scale)
    return numpy.clip(numpy.rint(drawn * low), 5, longest).astype(int)


def texts(setting: Setting) -> list[list[Sample]]:
    """The batches of one pass, length-bucketed; every provider gets these texts and masks.

    Lengths are drawn for WINDOW batches and sorted, as batches.plan does in training; of the sorted batches, evenly spaced ones are taken, the shortest and
    the longest among them.
    """
    random, size = numpy.random.default_rng(setting.seed), setting.size
    special = min(1000, size.vocab // 10)  # ids below are the special ones; the last of them is the mask
    number = setting.number
    lengths = numpy.sort(random_lengths(WINDOW * setting.sequences, setting.x, setting.longest, random)).reshape(WINDOW, setting.sequences)
    found = []
    for place in numpy.linspace(0, WINDOW - 1, number).round().astype(int) if number > 1 else [WINDOW // 2]:
        batch = []
        for n in lengths[place]:
            ids = random.integers(special, size.vocab, n)
            rows = numpy.sort(random.choice(n, max(1, round(MASK_SHARE * n)), replace=False))
            targets = ids[rows].copy()
            ids[rows] = special - 1
            batch.append(Sample(ids, rows, targets))
        found.append(batch)
    return found


def shuffled(batches: list[list[Sample]], seed: int) -> list[list[Sample]]:
    """The same texts in a random order, in batches of the same size."""
    flat = [sample for batch in batches for sample in batch]
    flat = [flat[i] for i in numpy.random.default_rng([seed, 1]).permutation(len(flat))]
    return [flat[i:i + len(batches[0])] for i in range(0, len(flat), len(batches[0]))]


def padding(batches: list[list[Sample]]) -> float:
    """Share of padding when every batch is padded to its longest text."""
    filled = sum(len(batch) * max(len(s.ids) for s in batch) for batch in batches)
    return 1 - sum(len(s.ids) for batch in batches for s in batch) / filled


def model_folder(setting: Setting) -> Path:
    """A random BERT with a masked-LM head as a Hugging Face folder, made once; every provider loads it."""
    folder = setting.folder / f"{setting.size_name}-{setting.dropout}-{setting.seed}"
    if not (folder / "config.json").exists():
        model = Model(setting.config, mlm=True)
        model.initialize(model, torch.Generator().manual_seed(setting.seed))
        save_model(model, folder)
    return folder


def lora_values(config: EncoderConfig) -> dict[str, Tensor]:
    """A and B of every site by our names. B is not zero, or A would have no gradient to compare."""
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(p.shape, generator=generator) * 0.05 for name, p in methods.create("lora", config, options={"rank": RANK}).parameters().items()}


def schedule(setting: Setting) -> training.Schedule:
    return training.Schedule(steps=1, lr=1e-5, precision=setting.precision)


def facts(setting: Setting, batches: list[list[Sample]]) -> dict:
    """What a reader of the row must know of the batches."""
    flat = [s for batch in batches for s in batch]
    mean, longest = sum(len(s.ids) for s in flat) / len(flat), max(len(s.ids) for s in flat)
    size = setting.size
    random, bucketed = padding(shuffled(batches, setting.seed)), padding(batches)
    words = (f"{size.layers} layers x {size.hidden}, vocabulary {size.vocab}; LoRA r={RANK} on query and value, lora_dropout 0; "
             f"dropout {setting.dropout:g} (hidden and attention); AdamW, gradient clipping; {setting.precision}; "
             f"{len(batches)} batches of {setting.sequences} texts, mean {mean:.1f} and at most {longest} tokens, "
             f"padding {random:.0%} in random order and {bucketed:.0%} length-bucketed")
    return {"setting": words, "sequences": setting.sequences, "batches": len(batches), "mean_length": mean, "longest": longest, "rank": RANK,
            "masked": sum(len(s.rows) for s in flat), "dropout": setting.dropout, "padding_random": random, "padding_bucketed": bucketed}


def ours_step(setting: Setting) -> Work:
    """peftdebias: packed, length-bucketed batches, the head and the last layer on masked rows; `_step` of its own training loop."""
    model, _ = load_model(model_folder(setting))
    method = methods.create("lora", model.config, options={"rank": RANK})
    method.load(lora_values(model.config))
    patch.attach(model, "bench", method)
    model.to(setting.device)
    parameters = method.parameters()
    patch.train_only(model, parameters.values())
    plan = schedule(setting)
    optimizer = training.make_optimizer(parameters, plan)
    batches = texts(setting)
    packed = [pack(batch) for batch in batches]
    task = types.SimpleNamespace(loss=lambda model, batch: MaskedLM.loss(None, model, batch))
    masked = sum(len(batch.targets) for batch in packed)

    def run() -> None:
        for batch in packed:  # a new object each time: index tensors that a Batch makes on first use count as part of the step
            training._step(model, task, dataclasses.replace(batch).to(setting.device), optimizer, plan.lr, parameters, plan)

    def results() -> dict[str, Tensor]:
        losses = [lambda b=b: task.loss(model, b.to(setting.device)) for b in packed]
        return _mean_loss_and_gradients(model, parameters, losses, [len(b.targets) / masked for b in packed])

    model.train()
    return Work(run, results, steps=len(packed), tokens=sum(len(b.ids) for b in packed), extra=facts(setting, batches))


def _mean_loss_and_gradients(model: nn.Module, parameters: dict[str, Tensor], losses: list[Callable[[], Tensor]], shares: list[float]) -> dict[str, Tensor]:
    """The mean loss over all masked tokens of the pass and its gradients, without dropout; the same however texts are put into batches."""
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    for loss, share in zip(losses, shares):
        value = loss()
        (value * share).backward()
        total += value.detach().double().cpu() * share
    found = {"loss": total} | {f"gradient of {name}": p.grad.detach().clone() for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    model.train()
    return found


def their_step(setting: Setting, bucketed: bool = False, compiled: bool = False) -> Work:
    """transformers + peft as a user writes it: batches padded to their longest text, labels -100 where nothing is asked, logits of every token."""
    quiet()
    import peft
    import transformers

    base = transformers.BertForMaskedLM.from_pretrained(model_folder(setting))
    model = peft.get_peft_model(base, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=["query", "value"]))
    parameters = {}
    for ours, value in lora_values(setting.config).items():
        _, layer, _, kind, letter = ours.split(".")  # layers.3.attention.query.a
        name = f"base_model.model.bert.encoder.layer.{layer}.attention.self.{kind}.lora_{letter.upper()}.default.weight"
        parameters[ours] = model.get_parameter(name)
        parameters[ours].data.copy_(value)
    if {id(p) for p in model.parameters() if p.requires_grad} != {id(p) for p in parameters.values()}:
        raise RuntimeError("peft trains other parameters than A and B")
    model.to(setting.device)
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(parameters.values(), lr=schedule(setting).lr, weight_decay=0.0, fused=True)
    batches = texts(setting) if bucketed else shuffled(texts(setting), setting.seed)
    padded = [pad(batch, setting.device) for batch in batches]
    counts = [sum(len(s.rows) for s in batch) for batch in batches]

    def loss(batch: dict[str, Tensor]) -> Tensor:
        moved = {name: tensor.to(setting.device, non_blocking=True) for name, tensor in batch.items()}
        with autocast(setting):
            return forward(**moved).loss

    def run() -> None:
        for batch in padded:
            value = loss(batch)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()

    def results() -> dict[str, Tensor]:
        return _mean_loss_and_gradients(model, parameters, [lambda b=b: loss(b) for b in padded], [n / sum(counts) for n in counts])

    model.train()
    return Work(run, results, steps=len(padded), tokens=sum(len(s.ids) for batch in batches for s in batch), extra=facts(setting, texts(setting)))


def pad(batch: list[Sample], device: torch.device) -> dict[str, Tensor]:
    """[B, S] ids, mask and labels as transformers' collator makes them; in pinned memory for a GPU."""
    shape = len(batch), max(len(s.ids) for s in batch)
    made = {"input_ids": torch.zeros(shape, dtype=torch.int64), "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, -100, dtype=torch.int64)}
    for b, sample in enumerate(batch):
        made["input_ids"][b, :len(sample.ids)] = torch.from_numpy(sample.ids)
        made["attention_mask"][b, :len(sample.ids)] = 1
        made["labels"][b, torch.from_numpy(sample.rows)] = torch.from_numpy(sample.targets)
    return {name: tensor.pin_memory() for name, tensor in made.items()} if device.type == "cuda" else made


# ---------------------------------------------------------------- attention: one layer's, on ragged sequences

def attention_work(setting: Setting, function: Callable) -> Work:
    """Forward and backward on `setting.x` sequences. The index tensors of Spans are made before: all layers of a batch share them."""
    size, random = setting.size, numpy.random.default_rng(setting.seed)
    lengths = tuple(random_lengths(int(setting.x), min(54, size.positions), min(setting.longest, size.positions), random).tolist())
    spans, tokens = Spans(lengths, lengths, setting.device), sum(lengths)
    generator = torch.Generator().manual_seed(setting.seed)
    q, k, v, dy = (torch.randn(tokens, size.heads, size.hidden // size.heads, generator=generator).to(setting.device) for _ in range(4))
    for tensor in (q, k, v):
        tensor.requires_grad_()

    def run() -> tuple[Tensor, ...]:
        with autocast(setting):
            y = function(q, k, v, spans)
        return (y.detach(), *torch.autograd.grad(y, (q, k, v), dy.to(y.dtype)))

    words = f"{size.heads} heads x {size.hidden // size.heads}, lengths drawn as for lora_step, no dropout, {setting.precision}; forward and backward"
    names = ("y", "gradient of query", "gradient of key", "gradient of value")
    return Work(run, lambda: dict(zip(names, run())), tokens=tokens, extra={"setting": words, "lengths": lengths})


# ---------------------------------------------------------------- ceilings: what the machine can do at best

def gemm(setting: Setting) -> Work:
    """Square matrix product, in bf16 where the precision is bf16."""
    n, dtype = int(setting.x), torch.bfloat16 if setting.precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, generator=torch.Generator().manual_seed(i)).to(setting.device, dtype) for i in (0, 1))
    out = torch.empty_like(a)
    return Work(lambda: torch.mm(a, b, out=out), dict, flops=2.0 * n ** 3, extra={"setting": f"n x n by n x n, {str(dtype).removeprefix('torch.')}"})


def copy(setting: Setting) -> Work:
    """One tensor into another; bytes read and bytes written both count."""
    source = torch.zeros(int(setting.x * 2 ** 20) // 4, device=setting.device)
    target = torch.empty_like(source)
    return Work(lambda: target.copy_(source), dict, bytes=2.0 * source.numel() * 4, extra={"setting": "float32; bytes read and bytes written both count"})


# ---------------------------------------------------------------- the registry

THEIRS = ("transformers", "peft")

CASES = {case.name: case for case in (
    Case("gemm", "forward", "ceiling: square matrix product", {"torch": Provider(gemm)}, "n", (1024, 2048), output_bound, sized=False),
    Case("copy", "forward", "ceiling: memory bandwidth", {"torch": Provider(copy)}, "MiB", (256,), output_bound, sized=False),
    Case("lora_step", "step", "one upstream step (masked-LM, LoRA): forward, backward, clipping, AdamW", {
        "transformers+peft": Provider(their_step, THEIRS),
        "transformers+peft, compiled": Provider(lambda setting: their_step(setting, compiled=True), THEIRS, compiled=True),
        "transformers+peft, length-bucketed": Provider(lambda setting: their_step(setting, bucketed=True), THEIRS),
        "peftdebias": Provider(ours_step),
    }, "mean_length", (54,), output_bound),
    Case("attention", "full", "attention inside ragged sequences: forward and backward", {
        "attention_ref": Provider(lambda setting: attention_work(setting, attention_ref)),
        "attention_padded": Provider(lambda setting: attention_work(setting, attention_padded)),
    }, "sequences", (4, 16), output_bound),
    *KERNEL_CASES.values(),
    *NATIVE_CASES.values(),
)}
"""name -> Case; the order is that of the tables."""
