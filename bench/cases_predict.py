"""Labelling texts, ours beside transformers + peft as a user writes it: the same random classifier with the same LoRA module, the same texts, labels and probabilities out.

What it adds over cases_steps.py: the two sides of inference. It leaves out the clock (predict.py).

Letters: D hidden, F feed-forward, C labels, n tokens of a text.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from peftdebias import checkpoint, corpus, methods, patch
from peftdebias.embedding import Debiased
from peftdebias.encoder import EncoderConfig, Model
from peftdebias.lowered import BF16_PRODUCTS
from peftdebias.tokens import load_tokenizer
from peftdebias.weights import save_model

from .case import RANK, SIZES, quiet
from .cases_steps import LABELS, OPTIONS, module_values

Predictor = Callable[[list[str], int], list[dict]]
"""(texts, texts a batch where it is the caller's to say) -> {"text", "label", "probabilities"} of each."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A size of the model with the vocabulary of a tokenizer's folder; the first `count` texts of a file, cut to `longest` tokens. folder: a scratch folder, shared by all."""

    size_name: str
    tokenizer: str
    file: str
    column: str | None
    count: int
    longest: int
    folder: str

    def texts(self) -> list[str]:
        """As predict reads them; fewer than `count` where the file has no more."""
        found = []
        for text in corpus.read_texts([self.file], self.column):
            found.append(text.text)
            if len(found) == self.count:
                break
        return found

    @property
    def config(self) -> EncoderConfig:
        """Weights are drawn wider than BERT's, so that answers differ from text to text."""
        size = dataclasses.replace(SIZES[self.size_name], vocab=load_tokenizer(self.tokenizer).vocab_size)
        return dataclasses.replace(size.encoder_config(0.1), initializer_range=size.hidden ** -0.5)

    def model_folder(self) -> Path:
        """The classifier as a Hugging Face folder, made once."""
        path = Path(self.folder) / "classifier"
        if not (path / "config.json").exists():
            model = Model(self.config, labels=LABELS)
            model.initialize(model, torch.Generator().manual_seed(0))
            save_model(model, path, load_tokenizer(self.tokenizer))
        return path


def forward_flops(config: EncoderConfig, lengths: Sequence[int]) -> float:
    """Of all matrix products that texts of these lengths need at the least, each labelled by its first token: the last layer computes keys and values for all tokens, the rest for one."""
    d, f, total = config.hidden, config.feed_forward, 0.0
    for n in lengths:
        total += (config.layers - 1) * (n * (8.0 * d * d + 4.0 * d * f) + 4.0 * n * n * d)
        total += 4.0 * n * d * d + 4.0 * d * d + 4.0 * d * f + 4.0 * n * d + 2.0 * d * (d + len(LABELS))
    return total


# ---------------------------------------------------------------- ours

def ours(merged: bool, precision: str = "float32") -> Callable[[Task], Predictor]:
    """peftdebias.load's predict: it makes its batches itself. precision: as lowered.autocast has it."""
    def build(task: Task) -> Predictor:
        run = checkpoint.load_run(task.model_folder())
        run.config["max_length"] = task.longest
        method = methods.create("lora", run.model.config, options=OPTIONS["lora"])
        method.load(module_values("lora", run.model.config))
        patch.attach(run.model, "bench", method)
        run.model.eval()
        if merged:
            patch.merge(run.model)
        model = Debiased(run, precision=precision)
        return lambda texts, batch: model.predict(texts)

    return build


# ---------------------------------------------------------------- theirs

def theirs(merged: bool, by_length: bool = False, bf16: bool = False) -> Callable[[Task], Predictor]:
    """Batches padded to their longest text, in the order of the texts, or sorted by length before. bf16: under torch's autocast."""
    def build(task: Task) -> Predictor:
        quiet()
        import peft
        import transformers

        base = transformers.BertForSequenceClassification.from_pretrained(task.model_folder())
        tokenizer = transformers.AutoTokenizer.from_pretrained(task.model_folder())
        model = peft.get_peft_model(base, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=["query", "value"]))
        for name, value in module_values("lora", task.config).items():
            _, layer, _, kind, letter = name.split(".")  # layers.3.attention.query.a
            model.get_parameter(f"base_model.model.bert.encoder.layer.{layer}.attention.self.{kind}.lora_{letter.upper()}.default.weight").data.copy_(value)
        model = (model.merge_and_unload() if merged else model).eval()
        labels = [model.config.id2label[i] for i in range(len(LABELS))]

        @torch.inference_mode()
        def predict(texts: list[str], batch: int) -> list[dict]:
            found: list = [None] * len(texts)
            encoded = tokenizer(texts, truncation=True, max_length=task.longest)
            order = sorted(range(len(texts)), key=lambda i: len(encoded["input_ids"][i])) if by_length else range(len(texts))
            for start in range(0, len(texts), batch):
                items = order[start:start + batch]
                padded = tokenizer.pad({key: [rows[i] for i in items] for key, rows in encoded.items()}, return_tensors="pt")
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    logits = model(**padded).logits
                for i, row in zip(items, logits.float().softmax(-1).tolist()):
                    found[i] = {"text": texts[i], "label": labels[row.index(max(row))], "probabilities": dict(zip(labels, row))}
            return found

        return predict

    return build


THEIRS, OURS = "transformers+peft, merged", "peftdebias, merged"
SORTED = f"{THEIRS}, sorted by length"
PREDICTORS = {"transformers+peft": theirs(False), THEIRS: theirs(True), SORTED: theirs(True, True), "peftdebias": ours(False), OURS: ours(True)}
"""name -> builder. The first is what all others must equal."""
IN_BF16 = {f"{THEIRS}, bf16": theirs(True, bf16=True), f"{SORTED}, bf16": theirs(True, True, bf16=True), "peftdebias, bf16": ours(False, BF16_PRODUCTS), f"{OURS}, bf16": ours(True, BF16_PRODUCTS)}
"""The same of those with products in bf16, which are near the first and not compared."""
ONE_CALL = ("transformers+peft", THEIRS, "peftdebias", OURS, f"{THEIRS}, bf16", "peftdebias, bf16", f"{OURS}, bf16")
WHOLE_FILE = (THEIRS, SORTED, "peftdebias", OURS, f"{SORTED}, bf16", "peftdebias, bf16", f"{OURS}, bf16")
