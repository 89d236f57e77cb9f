"""Whole training steps, ours beside transformers + peft as a user writes them: forward, backward, clipping, AdamW.

What it adds over cases.py: for each method the two sides, with the same weights, texts and loss; that is checked before anything is timed. Upstream: lora_step,
adapter_step (transformers has no bottleneck adapters; they are put into its layers by hand, or AdapterHub's library has them: cases_hub.py), prefix_step. Downstream:
full_step, a classifier, ours plain and with a LoRA module folded into the base. Sparse fine-tuning has no other side: cases_sparse.py.

Letters: P prefix length, L layers, D hidden, H heads, W head width, K bottleneck.
"""

import contextlib
import copy
import dataclasses
import tempfile
import types
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

from peftdebias import methods, patch, training
from peftdebias.batches import Sample, pack
from peftdebias.encoder import EncoderConfig, Model
from peftdebias.lowered import BF16_PRODUCTS, rounded_beforehand
from peftdebias.tasks import MaskedLM, mlm_loss
from peftdebias.weights import load_model, save_model, to_foreign

from .case import RANK, Case, Provider, Setting, Work, autocast, output_bound, quiet
from .texts import multiple_for, pad, padding, shuffled, texts

PREFIX, BOTTLENECK, LABELS = 30, 48, ("a", "b")
OPTIONS = {"lora": {"rank": RANK}, "adapter": {"architecture": "houlsby", "bottleneck": BOTTLENECK}, "prefix": {"length": PREFIX, "positioned": True}}
WORDS = {"lora": f"LoRA r={RANK} on query and value, lora_dropout 0", "adapter": f"bottleneck adapters of {BOTTLENECK} behind both blocks",
         "prefix": f"prefix of {PREFIX}, flat, positions moved on as peft moves them",
         "sparse": "sparse fine-tuning, 1 % of the base evenly spread over all sites, l1 0.1", "full": "the whole base and a classifier of two labels"}
BY_HAND = "transformers, adapters by hand"
ROUNDED_BASE = "base in bf16"
"""Behind the name of the other side whose frozen weights, norms and residuals are bf16 too; autocast keeps these in float32."""


def model_folder(setting: Setting, labelled: bool = False) -> Path:
    """A random BERT with a masked-LM head, or a classifier, as a Hugging Face folder, made once; every provider loads it, in whatever process."""
    folder = setting.folder / f"{setting.size_name}-{setting.dropout}-{setting.seed}{'-labelled' if labelled else ''}"
    if not folder.exists():
        model = Model(setting.config, mlm=not labelled, labels=LABELS if labelled else ())
        model.initialize(model, torch.Generator().manual_seed(setting.seed))
        with tempfile.TemporaryDirectory(dir=setting.folder) as beside:
            made = Path(beside) / folder.name
            save_model(model, made)
            with contextlib.suppress(OSError):  # another process was faster, and made the same
                made.rename(folder)
    return folder


def loaded(key: tuple, load: Callable[[], nn.Module], setting: Setting) -> nn.Module:
    """What `load` gives, on the host. For a GPU a copy of what it gave for this key before: loading takes seconds there, and a run makes a hundred models."""
    if setting.device.type != "cuda":
        return load()
    if key not in _LOADED:
        _LOADED[key] = load()
    return copy.deepcopy(_LOADED[key])


_LOADED: dict[tuple, nn.Module] = {}


def module_values(name: str, config: EncoderConfig) -> dict[str, Tensor]:
    """A value for every parameter of the module by our names, none of them zero: B of LoRA at zero would leave A without a gradient to compare."""
    generator = torch.Generator().manual_seed(7)
    return {key: torch.randn(p.shape, generator=generator) * 0.05 for key, p in methods.create(name, config, options=OPTIONS[name]).parameters().items()}


def schedule(setting: Setting) -> training.Schedule:
    return training.Schedule(steps=1, lr=1e-5, precision=setting.precision)


def facts(setting: Setting, batches: list[list[Sample]], name: str) -> dict:
    """What a reader of the row must know of the batches."""
    flat = [s for batch in (labelled(batches) if name == "full" else batches) for s in batch]
    mean, longest = sum(len(s.ids) for s in flat) / len(flat), max(len(s.ids) for s in flat)
    size = setting.size
    random, bucketed = (padding(found, multiple_for(setting.device)) for found in (shuffled(batches, setting.seed), batches))
    words = (f"{size.layers} layers x {size.hidden}, vocabulary {size.vocab}; {WORDS[name]}; dropout {setting.dropout:g} (hidden and attention); AdamW, gradient "
             f"clipping; {setting.precision}; {len(batches)} batches of {setting.sequences} texts, mean {mean:.1f} and at most {longest} tokens, "
             f"padding {random:.0%} in random order and {bucketed:.0%} length-bucketed")
    return {"setting": words, "sequences": setting.sequences, "batches": len(batches), "mean_length": mean, "longest": longest, "dropout": setting.dropout,
            "padding_random": random, "padding_bucketed": bucketed, "asked" if name == "full" else "masked": sum(len(s.rows) for s in flat)} | ({"rank": RANK} if name == "lora" else {})


def labelled(batches: list[list[Sample]]) -> list[list[Sample]]:
    """The same texts, each with a label; its first token is asked for."""
    return [[dataclasses.replace(s, rows=numpy.array([0]), targets=s.ids[-1:] % len(LABELS)) for s in batch] for batch in batches]


def needed_flops(setting: Setting, name: str) -> float:
    """Of all matrix products that one pass needs at the least: forward, the gradient of what is frozen by its input alone, of what is trained by both; the last layer's
    queries, output and feed-forward and the head on the rows asked for; the first layer sends a gradient to the embeddings where these are trained. Of the modules the
    adapter's own products count (3 % on BERT-base); LoRA's are fewer than 1 %."""
    c, full, dense, total = setting.config, name == "full", name in ("full", "sparse"), 0.0
    d, f = c.hidden, c.feed_forward
    for batch in (labelled(texts(setting)) if full else texts(setting)):
        tokens, asked = sum(len(s.ids) for s in batch), sum(len(s.rows) for s in batch)
        pairs = [sum((len(s.ids) if i < c.layers - 1 else len(s.rows)) * (len(s.ids) + (PREFIX if name == "prefix" else 0)) for s in batch) for i in range(c.layers)]
        for i in range(c.layers):
            rows_here = tokens if i < c.layers - 1 else asked
            query, key_value, rest = 2.0 * rows_here * d * d, 4.0 * tokens * d * d, 2.0 * rows_here * d * (d + 2 * f)
            linear, attention = query + key_value + rest, 4.0 * pairs[i] * d
            below = dense or i > 0  # somebody below wants the gradient of this layer's input
            total += linear + attention  # forward
            total += rest + (query + key_value if below else 0.0) + 2 * attention  # by the inputs
            if name == "adapter":
                total += 24.0 * rows_here * d * BOTTLENECK  # two blocks, down and up, each forward and by both
                total -= 0.0 if below else 2.0 * rows_here * d * (d + BOTTLENECK) + 2 * attention  # nothing below the lowest adapter is trained
            total += linear if dense else 0.0  # by the weights
        total += 2.0 * asked * d * (d + c.vocab) * 2 if not full else 3 * 2.0 * asked * d * d
    return total


# ---------------------------------------------------------------- ours

def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of what an optimizer of ours has made already, torch's classes make it in their first step; FlatAdamW's gradients lie in one tensor too, whose pages are there from now on."""
    flat = getattr(optimizer, "flat", ())
    if flat:
        optimizer.gradient.zero_()
    made = [t for of_group in flat for t in of_group[1:]] or [t for of_one in optimizer.state.values() for t in of_one.values() if torch.is_tensor(t)]
    return sum(t.numel() * t.element_size() for t in made)


def ours(name: str, kind: str = "eager", folded: bool = False, precision: str | None = None) -> Callable[[Setting], Work]:
    """Packed, length-bucketed batches, the head and the last layer on the rows asked for; the step of our own training loop. kind: one of training.STEPS. precision: in place of
    the setting's."""
    def build(setting: Setting) -> Work:
        setting = dataclasses.replace(setting, precision=precision or setting.precision)
        full = name == "full"
        folder = model_folder(setting, full)
        model = loaded((folder, "ours"), lambda: load_model(folder)[0], setting)
        compensation = None
        if not full or folded:
            module = "lora" if full else name
            method = methods.create(module, model.config, options=OPTIONS[module])
            method.load(module_values(module, model.config))
            patch.attach(model, "bench", method)
        model.to(setting.device)
        parameters = {n: p for n, p in model.named_parameters()} if full else method.parameters()
        patch.train_only(model, parameters.values())
        if folded:
            compensation = patch.fold(model)
        batches, plan = texts(setting), schedule(setting)
        packed = [pack(batch) for batch in (labelled(batches) if full else batches)]
        loss = (lambda model, batch: mlm_loss(model.class_logits(batch), batch.targets)) if full else (lambda model, batch: MaskedLM.loss(None, model, batch))
        task, optimizer = types.SimpleNamespace(loss=loss), training.make_optimizer(parameters, plan)
        decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        step = training.STEPS[kind](model, task, optimizer, parameters, clip=plan.clip, precision=plan.precision)
        count = sum(len(batch.targets) for batch in packed)

        def rounded_loss(batch) -> Tensor:
            with autocast(setting):
                if kind == "compiled":  # the function that is timed, in the shapes that it is timed in
                    return step.loss(model, step.shaped(batch).to(setting.device))
                return loss(model, batch.to(setting.device))

        def results() -> dict[str, Tensor]:
            losses = [lambda b=b: rounded_loss(b) for b in packed]
            found = mean_loss_and_gradients(model, parameters, losses, [len(b.targets) / count for b in packed])
            return as_theirs(found, model.config) if full else found

        def run() -> None:
            for batch in packed:  # a new object each time: what a Batch makes on first use counts as part of the step
                step(dataclasses.replace(batch), plan.lr)
                if compensation is not None:
                    compensation.after_step({key: plan.lr * decay for key, decay in decays.items()})
            expect_replayed(step, setting.device)

        work = Work(run, results, steps=len(packed), tokens=sum(len(b.ids) for b in packed), flops=needed_flops(setting, name), extra=facts(setting, batches, name),
                    state=state_bytes(optimizer), save=None if full else (lambda folder: save_adapter(folder, model, method)))
        if kind == "graph" and setting.device.type == "cuda":
            def most() -> None:
                step.eagerly(max(packed, key=lambda batch: len(batch.ids)), plan.lr)
                expect_replayed(step, setting.device)  # without memory for both it has given the graphs up

            work.most = most
        work.held = contextlib.ExitStack()
        work.held.enter_context(rounded_beforehand(model, setting.precision))
        model.train()
        return work

    return build


def expect_replayed(step: training.Step, device: torch.device) -> None:
    """Raises RuntimeError where a step that was to be replayed as a CUDA graph runs eagerly on a GPU: its time would stand under the graph's name."""
    if device.type == "cuda" and getattr(step, "off", None):
        raise RuntimeError(f"CUDA graphs are off: {step.off}")


def save_adapter(folder: Path, model: Model, method: methods.Method) -> None:
    from peftdebias import checkpoint  # needs a package that AdapterHub's environment lacks

    checkpoint.save_adapter(folder, method, "bench", checkpoint.describe_base(model))


def as_theirs(found: dict[str, Tensor], config: EncoderConfig) -> dict[str, Tensor]:
    """Gradients of a whole model under transformers' names."""
    gradients = {key.removeprefix("gradient of ").removeprefix("encoder."): value for key, value in found.items() if key != "loss"}
    return without_key_bias({"loss": found["loss"]} | {f"gradient of {key}": value for key, value in to_foreign(gradients, config).items()})


def mean_loss_and_gradients(model: nn.Module, parameters: dict[str, Tensor], losses: list[Callable[[], Tensor]], shares: list[float]) -> dict[str, Tensor]:
    """The mean loss over all targets of the pass and its gradients, without dropout; the same however texts are put into batches."""
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    for loss, share in zip(losses, shares):
        value = loss()
        (value * share).backward()
        total += value.detach().double().cpu() * share
    found = {"loss": total} | {f"gradient of {name}": p.grad.detach().clone() for name, p in parameters.items() if p.grad is not None}
    for p in parameters.values():
        p.grad = None
    model.train()
    return found


# ---------------------------------------------------------------- theirs

def with_lora(base: nn.Module, setting: Setting) -> tuple[nn.Module, dict[str, Tensor], Callable]:
    import peft

    model = peft.get_peft_model(base, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=["query", "value"]))
    parameters = {}
    for name, value in module_values("lora", setting.config).items():
        _, layer, _, kind, letter = name.split(".")  # layers.3.attention.query.a
        parameters[name] = model.get_parameter(f"base_model.model.bert.encoder.layer.{layer}.attention.self.{kind}.lora_{letter.upper()}.default.weight")
        parameters[name].data.copy_(value)
    return model, parameters, lambda found: found


class Bottleneck(nn.Module):
    """x + up(silu(down(x))), as Houlsby et al. 2019 have it, the way one writes it."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(nn.functional.silu(self.down(x)))


def with_adapter(base: nn.Module, setting: Setting) -> tuple[nn.Module, dict[str, Tensor], Callable]:
    for p in base.parameters():
        p.requires_grad_(False)
    values, parameters = module_values("adapter", setting.config), {}
    for i, layer in enumerate(base.bert.encoder.layer):
        for block, place in (("attention", layer.attention.output), ("feed_forward", layer.output)):
            adapter = Bottleneck(setting.config.hidden, BOTTLENECK)
            for key, p in adapter.named_parameters():
                parameters[f"layers.{i}.{block}.{key}"] = p
                p.data.copy_(values[f"layers.{i}.{block}.{key}"])
            place.dropout = nn.Sequential(place.dropout, adapter)
    return base, parameters, lambda found: found


def with_prefix(base: nn.Module, setting: Setting) -> tuple[nn.Module, dict[str, Tensor], Callable]:
    """FEATURE_EXTRACTION: the one task type with which peft trains a masked-LM's prefix."""
    import peft

    config = setting.config
    model = peft.get_peft_model(base, peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=PREFIX))
    values = module_values("prefix", config)
    table = model.get_parameter("prompt_encoder.default.embedding.weight")  # [P, 2 L D]
    table.data.copy_(torch.stack([values[f"layers.{i}.{part}"].flatten(1) for i in range(config.layers) for part in ("key", "value")], 1).flatten(1))

    def named(found: dict[str, Tensor]) -> dict[str, Tensor]:
        parts = found.pop("gradient of prefixes").view(PREFIX, config.layers, 2, config.heads, config.head_width)
        return found | {f"gradient of layers.{i}.{part}": parts[:, i, j] for i in range(config.layers) for j, part in enumerate(("key", "value"))}

    return model, {"prefixes": table}, named


def whole(base: nn.Module, setting: Setting) -> tuple[nn.Module, dict[str, Tensor], Callable]:
    return base, dict(base.named_parameters()), without_key_bias


def without_key_bias(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """A key's bias moves all scores of a query alike, which a softmax does not see: its gradient is 0, and what is found is rounding."""
    return {key: value for key, value in found.items() if not key.endswith(".key.bias")}


WITH = {"lora": with_lora, "adapter": with_adapter, "prefix": with_prefix, "full": whole}
SAVE = {name: lambda model, folder: model.save_pretrained(folder) for name in ("lora", "prefix")}


def theirs(name: str, bucketed: bool = False, compiled: bool = False, module: Callable | None = None, save: Callable | None = None,
           precision: str | None = None, base: torch.dtype | None = None) -> Callable[[Setting], Work]:
    """transformers, and peft where it has the method, as a user writes it: batches padded to their longest text, labels -100 where nothing is asked, logits of every
    token. module, save: in place of those of WITH and SAVE; precision: of the setting's. base: the dtype in which the frozen base is loaded, without autocast then, in place of
    float32 under autocast."""
    module, save = module or WITH[name], save or SAVE.get(name)

    def build(setting: Setting) -> Work:
        quiet()
        import transformers

        setting = dataclasses.replace(setting, precision=precision or setting.precision)
        full = name == "full"
        head = transformers.BertForSequenceClassification if full else transformers.BertForMaskedLM
        folder = model_folder(setting, full)
        model, parameters, named = module(loaded((folder, "theirs", base), lambda: head.from_pretrained(folder, **({"dtype": base} if base else {})), setting), setting)
        if {id(p) for p in model.parameters() if p.requires_grad} != {id(p) for p in parameters.values()}:
            raise RuntimeError(f"{name}: other parameters are trained than those that are compared")
        model.to(setting.device)
        forward = torch.compile(model) if compiled else model
        optimizer = torch.optim.AdamW(parameters.values(), lr=schedule(setting).lr, weight_decay=0.0, fused=True)
        batches = texts(setting) if bucketed else shuffled(texts(setting), setting.seed)
        padded = [pad(batch, setting.device) for batch in (labelled(batches) if full else batches)]
        if full:
            for batch in padded:
                batch["labels"] = batch["labels"][:, 0].contiguous()
        counts = [len(batch) if full else sum(len(s.rows) for s in batch) for batch in batches]

        def loss(batch: dict[str, Tensor]) -> Tensor:
            moved = {key: tensor.to(setting.device, non_blocking=True) for key, tensor in batch.items()}
            with contextlib.nullcontext() if base else autocast(setting):
                return forward(**moved).loss

        def run() -> None:
            for batch in padded:
                loss(batch).backward()
                nn.utils.clip_grad_norm_(parameters.values(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)  # here, as transformers' Trainer has it: beside the next forward they need not be

        def results() -> dict[str, Tensor]:
            return named(mean_loss_and_gradients(model, parameters, [lambda b=b: loss(b) for b in padded], [n / sum(counts) for n in counts]))

        model.train()
        return Work(run, results, steps=len(padded), tokens=sum(len(s.ids) for batch in batches for s in batch), extra=facts(setting, texts(setting), name),
                    save=save and (lambda folder: save(model, folder)))

    return build


# ---------------------------------------------------------------- the cases

def dresses(them: str, name: str, needs: tuple[str, ...] = (), python: str | None = None, **side) -> dict[str, Provider]:
    """The other side as written, under torch.compile, length-bucketed, and the first and last under autocast in bf16. side: module and save of `theirs`."""
    return {them: Provider(theirs(name, **side), needs, python=python),
            f"{them}, compiled": Provider(theirs(name, compiled=True, **side), needs, compiled=True, python=python),
            f"{them}, length-bucketed": Provider(theirs(name, bucketed=True, **side), needs, python=python),
            f"{them}, bf16": Provider(theirs(name, precision="bf16", **side), needs, bf16=True, compared=False, python=python),
            f"{them}, length-bucketed, bf16": Provider(theirs(name, bucketed=True, precision="bf16", **side), needs, bf16=True, compared=False, python=python)}


def _case(name: str, what: str, them: str, needs: tuple[str, ...]) -> Case:
    own = {"peftdebias, compiled": Provider(ours(name, "compiled"), compiled=True), "peftdebias, CUDA graph": Provider(ours(name, "graph"), kernels=("attention", "norm"), compared=False),  # curves.py compares its replays
           "peftdebias, bf16": Provider(ours(name, precision=BF16_PRODUCTS), bf16=True, compared=False)}
    dress = dresses(them, name, needs)
    if name == "lora":
        dress |= {f"{them}, {ROUNDED_BASE}": Provider(theirs(name, base=torch.bfloat16), needs, compared=False, precisions=("bf16",), only_on="cuda")}
    if name == "full":
        own |= {"peftdebias, frozen module folded": Provider(ours(name, folded=True), compared=False)}
    return Case(f"{name}_step", "step", what, {**dress, "peftdebias": Provider(ours(name)), **own}, "mean_length", (54,), output_bound)


PEFT = ("transformers", "peft")
STEP_CASES = {case.name: case for case in (
    _case("lora", "one upstream step (masked-LM, LoRA): forward, backward, clipping, AdamW", "transformers+peft", PEFT),
    _case("adapter", "one upstream step (masked-LM, bottleneck adapters)", BY_HAND, PEFT[:1]),
    _case("prefix", "one upstream step (masked-LM, prefix)", "transformers+peft", PEFT),
    _case("full", "one downstream step: the whole base and a classifier", "transformers", PEFT[:1]),
)}
"""name -> Case."""
