"""Use a debiased model inside another program: `load` gives an object that answers, `export` a .pt2 file that runs without this package.

    model = peftdebias.load("runs/nurse")           model.predict(["She is a nurse."])           model.export("nurse.pt2")

What it adds over evaluation.py: texts and answers in memory, for several threads too, and files of what padded.py makes a graph of.

Letters: B texts, S longest text, D hidden, V vocabulary, C labels.
"""

import contextlib
import dataclasses
import functools
import io
import json
import numbers
import os
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy
import torch
from torch import Tensor

from . import __version__, answers, checkpoint
from .answers import LONGEST, cut_note, max_length
from .batches import Batch, Sample, pack
from .config import ANSWERED_IN
from .encoder import Model
from .errors import ConfigError, ModelError
from .lowered import answering
from .outputs import partial_of
from .padded import Padded, export_padded
from .tasks import VECTORS, class_probabilities, finite, in_eval, labelled_samples, sentence_vectors
from .tokens import Encoded
from .training import pick_device, pick_precision

KINDS = ("predict", "fill_mask", "encode")


def load(run: str | Path, adapters: Sequence[str | Path] = (), device: str = "cpu", force: bool = False, precision: str = "float32") -> "Debiased":
    """A run folder or a plain model folder with its modules and further `adapters`, ready to answer. force: modules made for another base too, where shapes allow it.

    precision "bf16": products of answers in bf16, on a GPU or a CPU that multiplies it; see `Debiased`. Raises ModelError or AdapterError on bad folders, ConfigError where the
    device has no such precision.
    """
    place = pick_device(device)
    _one_of("load: precision", precision, ANSWERED_IN)
    precision = pick_precision(precision, place)
    return Debiased(checkpoint.load_run(run, adapters, place, force), str(run), precision)


@dataclasses.dataclass
class _Own:
    """What a model has of its own, whoever answers by it: a lock, and its rounded matrices. No part of a copy."""

    lock: threading.RLock = dataclasses.field(default_factory=threading.RLock)
    rounded: dict = dataclasses.field(default_factory=dict)


_owned: "weakref.WeakKeyDictionary[Model, _Own]" = weakref.WeakKeyDictionary()
_making = threading.Lock()


def _forked() -> None:
    """In a child of os.fork nobody holds what the parent's threads held."""
    global _making
    _making = threading.Lock()
    _owned.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _one_at_a_time(answer):
    """An answer waits for those of other threads, and for their `without` blocks: the model is one."""
    @functools.wraps(answer)
    def alone(self, *args, **kwargs):
        with self._own.lock:
            return answer(self, *args, **kwargs)
    return alone


class Debiased:
    """A model with its tokenizer and modules. run: checkpoint.Run; `run.model` is the Model itself, `methods` the names that `without` takes.

    Threads may share it: answers are computed one after another, each by all of torch's threads. A `without` block is its thread's alone; others wait for its end.

    precision: as lowered.autocast has it; `export` writes float32 whatever it is. On a CPU the matrices rounded to bf16 are kept, two bytes a number, and made again where somebody
    wrote to the parameters, not where to a few numbers of their `data` alone.
    """

    def __init__(self, run: checkpoint.Run, name: str = "model", precision: str = "float32"):
        self.run, self.name, self.precision = run, name, precision

    @property
    def _own(self) -> _Own:
        with _making:
            return _owned.setdefault(self.run.model, _Own())

    def _answering(self) -> contextlib.AbstractContextManager:
        """The context of a pass, in the precision asked for."""
        return answering(self.run.model.device, self.precision, self._own.rounded)

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the attached modules: the axes they were learnt on."""
        return tuple(self.run.model.methods)

    @contextlib.contextmanager
    def without(self, *names: str) -> Iterator["Debiased"]:
        """Inside the `with` block the named modules are off, for `export` too; answers to other threads wait until it ends. Raises AdapterError on another name."""
        with self._own.lock, self.run.model.without(*names):
            yield self

    @_one_at_a_time
    def predict(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[dict]:
        """{"text", "label", "probabilities": {label: p}} for each text (with its pair). Raises ModelError without a classifier."""
        self._head("predict")
        texts, pairs = self._texts("texts", texts), None if pairs is None else self._texts("pairs", pairs)
        if not (encoded := self._encoded(texts, pairs)):
            return []
        answers.check_pairs(self.name, self.run, pairs is not None)
        labels = self.run.model.classifier.labels
        with self._answering():
            found = class_probabilities(self.run.model, labelled_samples(encoded))
        return [{"text": text, "label": labels[int(row.argmax())], "probabilities": dict(zip(labels, map(float, row)))} for text, row in zip(texts, found)]

    @_one_at_a_time
    def fill_mask(self, text: str, top: int = 5) -> list[list[dict]]:
        """For each mask token in `text`, from left to right, the `top` likeliest tokens: {"token", "id", "probability"}, best first.

        Several masks are answered apart, each with the others masked. Raises ModelError without a masked-LM head or where its scores are NaN or infinite, ConfigError on a text
        without a mask token.
        """
        self._head("fill_mask")
        if not isinstance(text, str):
            raise ConfigError(f"fill_mask: expected one text, got {type(text).__name__}")
        tokenizer = self.run.tokenizer
        mask, vocabulary = tokenizer.backend.id_to_token(tokenizer.mask_id), tokenizer.vocab_size
        if not isinstance(top, numbers.Integral) or isinstance(top, bool) or not 1 <= top <= vocabulary:
            raise ConfigError(f"fill_mask: top: expected a whole number from 1 to {vocabulary}, the tokens there are, got {top!r}")
        ids = self._encoded(self._texts("fill_mask", [text]))[0].ids
        rows = numpy.flatnonzero(ids == tokenizer.mask_id)
        if not len(rows):
            raise ConfigError(f"fill_mask: expected {mask} in the text (within its first {self._longest} tokens), got none")
        with self._answering():
            logits = _mask_logits(self.run.model, pack([Sample(ids, rows)]))
        found = logits.double().softmax(-1)[:, :vocabulary].topk(top)  # rows beyond are padding of the table
        finite(found.values.numpy(), "probabilities of tokens")
        return [[{"token": tokenizer.backend.decode([i], skip_special_tokens=False), "id": i, "probability": p} for i, p in zip(*row)]
                for row in zip(found.indices.tolist(), found.values.tolist())]

    @_one_at_a_time
    def encode(self, texts: Sequence[str], pooling: str = "first") -> Tensor:
        """[B, D], on the CPU: the last hidden state of each text's first token ("first", what a classifier reads), or the mean over its tokens, special ones
        too ("mean"). Vectors of prompts are not among them. Raises ModelError where a number of them is NaN or infinite."""
        _one_of("pooling", pooling, VECTORS)
        encoded = self._encoded(self._texts("texts", texts))
        with self._answering():
            found = sentence_vectors(self.run.model, labelled_samples(encoded), pooling)
        return torch.from_numpy(found).to(self.run.model.encoder.embeddings.word.weight.dtype)

    @_one_at_a_time
    def export(self, path: str | Path, what: str = "predict", *, pooling: str = "first", pairs: bool | None = None) -> Path:
        """Write a .pt2 file that `torch.export.load(path).module()` runs without this package. Returns the path.

        Called with ids int64 [B, S] and mask int64 or bool [B, S] (0 where nothing is; on either side), B and S free, it answers "predict" with logits [B, C],
        "fill_mask" with logits [B, S, V], "encode" with [B, D] by `pooling`. The file's extra files hold `peftdebias.json` (labels, special ids, longest text)
        and `tokenizer.json`. pairs: ids hold text pairs, so that a BERT reads segment 1 after the first separator; None is as the run was trained.
        Raises ModelError without the head, AdapterError on a module that the graph cannot hold.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise ConfigError(f"export: expected the name of a file, got {type(path).__name__}")
        path, model, tokenizer = Path(path), self.run.model, self.run.tokenizer
        _one_of("export: what", what, KINDS)
        _one_of("export: pairs", pairs, (None, True, False))
        _one_of("pooling", pooling, VECTORS)
        if path.suffix != ".pt2":
            raise ConfigError(f"export {path}: expected a file name that ends in .pt2")
        if not path.parent.is_dir() or path.is_dir():
            raise ConfigError(f"export {path}: cannot be written: expected a file in a folder that is there")
        self._head(what)
        pairs = bool(self.run.config.get("text_pair")) if pairs is None else pairs
        about = {"peftdebias": __version__, "what": what, "inputs": {"ids": ["B", "S"], "mask": ["B", "S"]}, "longest": self._longest,
                 "special_ids": {role: getattr(tokenizer, role + "_id") for role in ("cls", "sep", "mask", "pad", "unk")}, "pairs": pairs,
                 "modules": {name: method.name for name, method in model.methods.items() if name not in self._off()}}
        about |= {"labels": model.classifier.labels} if what == "predict" else {"pooling": pooling} if what == "encode" else {}
        with torch.no_grad():
            padded = Padded(model, what, pooling=pooling, separator=tokenizer.sep_id if pairs and model.config.segments > 1 else None).eval()
        program = export_padded(padded)
        made, partial = io.BytesIO(), partial_of(path)  # torch's own writer gives no OSError on a disk that is full, and may end the process
        torch.export.save(program, made, extra_files={"peftdebias.json": json.dumps(about), "tokenizer.json": tokenizer.backend.to_str()})
        try:
            partial.write_bytes(made.getbuffer())
            partial.rename(path)
        except OSError as error:
            raise ConfigError(f"export {path}: cannot be written: {error.strerror}") from None
        finally:
            with contextlib.suppress(OSError):  # a file system that is read-only says so of what is not there, too
                partial.unlink()
        return path

    # ---- inside

    @property
    def _longest(self) -> int:
        return max_length(self.run.model, self.run.config.get("max_length", LONGEST))

    def _off(self) -> set[str]:
        hooks = self.run.model.encoder.hooks
        return hooks.off - (hooks.merged.names if hooks.merged and hooks.merged.placed else set())

    def _head(self, what: str) -> None:
        if what == "predict" and self.run.model.classifier is None:
            raise ModelError(f"{self.name}: predict: expected a downstream run with a classifier, got a model without")
        if what == "fill_mask" and self.run.model.mlm is None:
            raise ModelError(f"{self.name}: fill_mask: expected a model with a masked-LM head, got one without (a downstream run has a classifier instead)")

    @staticmethod
    def _texts(what: str, given: Iterable[str]) -> list[str]:
        """Any sequence or iterator of texts as a list. Raises ConfigError on what is no text."""
        if isinstance(given, str):
            raise ConfigError(f"{what}: expected a list of texts, got one text: [{given[:20]!r}]")
        try:
            texts = list(given)
        except TypeError:
            raise ConfigError(f"{what}: expected a list of texts, got {type(given).__name__}") from None
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise ConfigError(f"{what}[{number}]: expected a text, got {type(text).__name__}")
            if not text.isascii() and (half := next((c for c in text if "\ud800" <= c <= "\udfff"), None)):
                raise ConfigError(f"{what}[{number}]: expected text that utf-8 can hold, got half a surrogate pair, {half!r}")
        return texts

    def _encoded(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[Encoded]:
        encoded = self.run.tokenizer.encode(texts, pairs, self._longest)
        for line in cut_note(encoded, self._longest, self.name):
            warnings.warn(line, stacklevel=4)  # where the answer was asked for
        return encoded


def _one_of(what: str, value, known: Sequence) -> None:
    if not any(type(value) is type(one) and value == one for one in known):
        raise ConfigError(f"{what}: expected one of {', '.join(map(str, known))}, got {value!r}")


@in_eval
def _mask_logits(model: Model, batch: Batch) -> Tensor:
    """[M, V] on the CPU."""
    return model.mlm_logits(batch.to(model.device)).cpu()
