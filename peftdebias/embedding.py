"""Use a debiased model inside another program: `load` gives an object that answers, `export` a .pt2 file that runs without this package.

    model = peftdebias.load("runs/nurse")           model.predict(["She is a nurse."])           model.export("nurse.pt2")

What it adds over evaluation.py: texts and answers in memory, and `Padded`, a second, plain implementation of encoder.py on padded tensors with the attached
modules inside, for torch.export. Weights take in whatever changes only weights (LoRA, sparse, (IA)^3, biases); adapters, prefixes and prompts are part of the
graph. It leaves out dropout and training.

Letters: B texts, S longest text, P vectors before each text, Q prefix length, D hidden, H heads, W head width, V vocabulary, C labels.
"""

import contextlib
import copy
import functools
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
import torch.nn.functional as F
from torch import Tensor, nn

from . import __version__, answers, checkpoint
from .batches import Batch, Sample, pack
from .encoder import Model, parameter_at
from .errors import AdapterError, ConfigError, ModelError
from .evaluation import LONGEST, cut_note, max_length
from .methods import Method
from .outputs import partial_of
from .sites import ACTIVATIONS, EMBED_SITE
from .tasks import class_probabilities, in_eval, labelled_samples, scored_batches
from .tokens import Encoded
from .training import pick_device

KINDS = ("predict", "fill_mask", "encode")
POOLINGS = ("first", "mean")


def load(run: str | Path, adapters: Sequence[str | Path] = (), device: str = "cpu", force: bool = False) -> "Debiased":
    """A run folder or a plain model folder with its modules and further `adapters`, ready to answer. force: modules made for another base too, where shapes allow it.

    Raises ModelError or AdapterError on bad folders.
    """
    return Debiased(checkpoint.load_run(run, adapters, pick_device(device), force), str(run))


_locks: "weakref.WeakKeyDictionary[Model, threading.RLock]" = weakref.WeakKeyDictionary()
_making = threading.Lock()


def _forked() -> None:
    """In a child of os.fork nobody holds what the parent's threads held."""
    global _making
    _making = threading.Lock()
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _one_at_a_time(answer):
    """An answer waits for those of other threads, and for their `without` blocks: the model is one."""
    @functools.wraps(answer)
    def alone(self, *args, **kwargs):
        with self._lock:
            return answer(self, *args, **kwargs)
    return alone


class Debiased:
    """A model with its tokenizer and modules. run: checkpoint.Run; `run.model` is the Model itself, `methods` the names that `without` takes.

    Threads may share it: answers are computed one after another, each by all of torch's threads. A `without` block is its thread's alone; others wait for its end.
    """

    def __init__(self, run: checkpoint.Run, name: str = "model"):
        self.run, self.name = run, name

    @property
    def _lock(self) -> threading.RLock:
        """The model's own, whoever else answers by it: no part of a copy."""
        with _making:
            return _locks.setdefault(self.run.model, threading.RLock())

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the attached modules: the axes they were learnt on."""
        return tuple(self.run.model.methods)

    @contextlib.contextmanager
    def without(self, *names: str) -> Iterator["Debiased"]:
        """Inside the `with` block the named modules are off, for `export` too; answers to other threads wait until it ends. Raises AdapterError on another name."""
        with self._lock, self.run.model.without(*names):
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
        return [{"text": text, "label": labels[int(row.argmax())], "probabilities": dict(zip(labels, map(float, row)))}
                for text, row in zip(texts, class_probabilities(self.run.model, labelled_samples(encoded)))]

    @_one_at_a_time
    def fill_mask(self, text: str, top: int = 5) -> list[list[dict]]:
        """For each mask token in `text`, from left to right, the `top` likeliest tokens: {"token", "id", "probability"}, best first.

        Several masks are answered apart, each with the others masked. Raises ModelError without a masked-LM head, ConfigError on a text without a mask token.
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
        found = _mask_logits(self.run.model, pack([Sample(ids, rows)])).double().softmax(-1)[:, :vocabulary].topk(top)  # rows beyond are padding of the table
        return [[{"token": tokenizer.backend.decode([i], skip_special_tokens=False), "id": i, "probability": p} for i, p in zip(*row)]
                for row in zip(found.indices.tolist(), found.values.tolist())]

    @_one_at_a_time
    def encode(self, texts: Sequence[str], pooling: str = "first") -> Tensor:
        """[N, D], on the CPU: the last hidden state of each text's first token ("first", what a classifier reads), or the mean over its tokens, special ones
        too ("mean"). Vectors of prompts are not among them."""
        _one_of("pooling", pooling, POOLINGS)
        encoded = self._encoded(self._texts("texts", texts))
        return _pooled(self.run.model, [Sample(e.ids, numpy.arange(1 if pooling == "first" else len(e.ids)), None, e.segments) for e in encoded])

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
        _one_of("pooling", pooling, POOLINGS)
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
        partial = path.with_name(partial_of(path).name + ".pt2")  # torch warns of another ending
        try:
            torch.export.save(program, partial, extra_files={"peftdebias.json": json.dumps(about), "tokenizer.json": tokenizer.backend.to_str()})
            partial.rename(path)
        except OSError as error:
            raise ConfigError(f"export {path}: cannot be written: {error.strerror}") from None
        finally:
            partial.unlink(missing_ok=True)
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
        if pairs is not None and len(pairs) != len(texts):
            raise ConfigError(f"pairs: expected {len(texts)}, one for each text, got {len(pairs)}")
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


@in_eval
def _pooled(model: Model, samples: Sequence[Sample]) -> Tensor:
    """[N, D] on the CPU: the mean over the rows that each sample asks for."""
    found = torch.zeros(len(samples), model.config.hidden, dtype=model.encoder.embeddings.word.weight.dtype)
    for items, batch in scored_batches(model, samples):
        for i, rows in zip(items, model.encoder(batch).cpu().split(batch.row_lengths)):
            found[i] = rows.mean(0)
    return found


# ---------------------------------------------------------------- the padded graph

def export_padded(padded: "Padded") -> torch.export.ExportedProgram:
    """torch.export with batch and length left free."""
    ids = torch.zeros(3, min(7, padded.longest), dtype=torch.int64)  # the graph does not depend on these
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=padded.longest)
    return torch.export.export(padded, (ids, torch.ones_like(ids)), dynamic_shapes={"ids": {0: batch, 1: length}, "mask": {0: batch, 1: length}})


class Padded(nn.Module):
    """`model` as it is now, on the CPU: encoder and one head on ids [B, S], mask [B, S]; see Debiased.export for what comes out.

    Everything that methods do is asked of their hooks here, once, except `block`, which runs in the graph. separator: id after whose first place segments are 1.
    """

    def __init__(self, model: Model, what: str, *, pooling: str = "first", separator: int | None = None):
        super().__init__()
        self.config, self.what, self.pooling, self.separator = model.config, what, pooling, separator
        c, hooks = model.config, model.encoder.hooks
        self.longest = c.max_positions - hooks.position_shift
        for site in ("embeddings.word", "embeddings.position", "embeddings.segment"):
            self._put(site, hooks.value(site, parameter_at(model, site)[1]))
        self._put_norm("embeddings.norm", model)
        self.start = c.position_offset + hooks.position_shift
        self.first = self._put_vectors(model)
        self.blocks: dict[str, list] = {}
        for i in range(c.layers):
            for kind in ("attention.query", "attention.key", "attention.value", "attention.output", "feed_forward.up", "feed_forward.down"):
                self._put_linear(f"layers.{i}.{kind}", model)
            if (both := hooks.key_value(i)) is not None:
                self._put(f"layers.{i}.prefix", torch.stack(both).transpose(1, 2))  # [2, H, Q, W]
            for block in ("attention", "feed_forward"):
                self._put_norm(f"layers.{i}.{block}.norm", model)
                self.blocks[f"layers.{i}.{block}"] = [self._copy(method, model) for method in hooks.at(f"layers.{i}.{block}")]
        if what == "predict":
            for part in ("dense", "output"):
                self._put(f"classifier.{part}", getattr(model.classifier, part).weight)
                self._put(f"classifier.{part}.bias", getattr(model.classifier, part).bias)
        if what == "fill_mask":
            head = model.mlm
            table = hooks.base(model.encoder.embeddings.word.weight) if head.decoder is None else head.decoder.weight
            for name, tensor in (("dense", head.dense.weight), ("dense.bias", head.dense.bias), ("norm", head.norm.weight), ("norm.bias", head.norm.bias),
                                 ("decoder.bias", head.bias)):
                self._put(f"mlm.{name}", tensor)
            self.decoder = "embeddings.word" if table is hooks.value("embeddings.word", model.encoder.embeddings.word.weight) else "mlm.decoder"
            if self.decoder == "mlm.decoder":  # else one tensor serves twice, in the file too
                self._put("mlm.decoder", table)

    # ---- what is asked of the model, once

    def _put(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(name.replace(".", "_"), tensor.detach().cpu().clone().contiguous())

    def _at(self, name: str) -> Tensor | None:
        return getattr(self, name.replace(".", "_"), None)

    def _put_linear(self, site: str, model: Model) -> None:
        """Deltas of all methods into the weight, then scales of all, as sites.Hooks does."""
        hooks, (_, weight, rows), (_, bias, _) = model.encoder.hooks, parameter_at(model, site), parameter_at(model, site + ".bias")
        weight, bias = hooks.value(site, weight[rows]), hooks.value(site + ".bias", bias[rows])
        for method in hooks.at(site):
            if method.computes(site) and method.delta(site) is None:
                raise AdapterError(f"export: {method.name} computes the product at {site} itself; expected a method that says it as a delta or scale")
            inputs, outputs = method.scale(site)
            weight = weight if inputs is None else weight * inputs
            weight, bias = (weight, bias) if outputs is None else (weight * outputs[:, None], bias * outputs)
        self._put(site, weight)
        self._put(site + ".bias", bias)

    def _put_norm(self, site: str, model: Model) -> None:
        for name in (site, site + ".bias"):
            self._put(name, model.encoder.hooks.value(name, parameter_at(model, name)[1]))

    def _put_vectors(self, model: Model) -> int:
        """`vectors` [P, D], what `embed` of all methods puts before a text; returns the row of [vectors; text] that is read as the text's first."""
        hooks, c = model.encoder.hooks, model.config
        positions, segments = (hooks.value(f"embeddings.{t}", getattr(model.encoder.embeddings, t).weight) for t in ("position", "segment"))
        probe = torch.ones(1, c.hidden, device=model.device, dtype=positions.dtype)
        hidden, batch = probe, pack([Sample(numpy.array([0]), numpy.array([0]))]).to(model.device)
        for method in reversed(hooks.at(EMBED_SITE)):
            start = c.position_offset + hooks.shift_before(method)
            hidden, batch = method.embed(hidden, batch, lambda vectors, places, start=start: vectors + F.embedding(places + start, positions) + segments[0])
            if len(hidden) != batch.lengths[0] or not torch.equal(hidden[-1:], probe):
                raise AdapterError(f"export: {method.name} changes the embedded text itself; expected a method that puts vectors before it")
        self._put("vectors", hidden[:-1])
        return int(batch.rows[0])

    def _copy(self, method: Method, model: Model) -> Method:
        """The method with its parameters among the graph's buffers."""
        own, stem = copy.copy(method), f"methods.{list(model.methods.values()).index(method)}."
        for name, parameter in method.values.items():
            if self._at(stem + name) is None:
                self._put(stem + name, parameter)
        own.training, own.values = False, _Buffers(self, stem)
        return own

    # ---- the graph

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids int64 [B, S], mask int64 or bool [B, S] -> as `what` says."""
        there = mask.ne(0)  # [B, S]
        hidden, before = self._encode(ids, there), len(self.vectors)
        if self.what == "predict" or (self.what == "encode" and self.pooling == "first"):
            beginning = self._first(there)
            x = (hidden[:, before:] * beginning.to(hidden.dtype)[:, :, None]).sum(1) if self.first == before else hidden[:, self.first]  # [B, D]
            if self.what == "encode":
                return x
            return self._linear("classifier.output", torch.tanh(self._linear("classifier.dense", x)))
        x = hidden[:, before:]
        if self.what == "encode":
            weight = there.to(x.dtype)[:, :, None]
            return (x * weight).sum(1) / weight.sum(1)
        activation = F.gelu if self.config.kind == "roberta" else ACTIVATIONS[self.config.activation]
        return F.linear(self._norm("mlm.norm")(activation(self._linear("mlm.dense", x))), self._at(self.decoder), self._at("mlm.decoder.bias"))

    def _first(self, there: Tensor) -> Tensor:
        """bool [B, S]: the first token of each text."""
        return there & there.long().cumsum(1).eq(1)

    def _encode(self, ids: Tensor, there: Tensor) -> Tensor:
        """[B, P + S, D]; each text after the vectors."""
        positions = (there.long().cumsum(1) - 1).clamp(min=0) + self.start
        segments = torch.zeros_like(ids)
        if self.separator is not None:
            ends = (ids.eq(self.separator) & there).long()
            segments = (ends.cumsum(1) - ends).clamp(max=1) * there
        hidden = F.embedding(ids, self.embeddings_word) + F.embedding(positions, self.embeddings_position) + F.embedding(segments, self.embeddings_segment)
        seen = there
        if len(self.vectors):
            hidden = torch.cat([self.vectors.expand(ids.shape[0], -1, -1), hidden], 1)
            seen = torch.cat([torch.ones_like(there[:, :1]).expand(-1, len(self.vectors)), there], 1)
        hidden = self._norm("embeddings.norm")(hidden)
        for i in range(self.config.layers):
            hidden = self._layer(f"layers.{i}", hidden, seen)
        return hidden

    def _layer(self, site: str, x: Tensor, seen: Tensor) -> Tensor:
        """x [B, N, D], seen bool [B, N]: which keys are real."""
        c, (batch, length, _) = self.config, x.shape
        query, key, value = (self._linear(f"{site}.attention.{kind}", x).view(batch, length, c.heads, c.head_width).transpose(1, 2)
                             for kind in ("query", "key", "value"))  # [B, H, N, W]
        if (prefix := self._at(f"{site}.prefix")) is not None:
            key, value = (torch.cat([p.expand(batch, -1, -1, -1), own], 2) for p, own in zip(prefix.unbind(0), (key, value)))
            seen = torch.cat([torch.ones_like(seen[:, :1]).expand(-1, prefix.shape[2]), seen], 1)
        unseen = torch.zeros_like(seen, dtype=x.dtype).masked_fill(~seen, torch.finfo(x.dtype).min)[:, None, None, :]  # finite: a row of nothing gives no nan
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=unseen).transpose(1, 2).reshape(batch, length, c.hidden)
        x = self._block(f"{site}.attention", self._linear(f"{site}.attention.output", context), x)
        inner = ACTIVATIONS[c.activation](self._linear(f"{site}.feed_forward.up", x))
        return self._block(f"{site}.feed_forward", self._linear(f"{site}.feed_forward.down", inner), x)

    def _block(self, site: str, hidden: Tensor, residual: Tensor) -> Tensor:
        """norm(hidden + residual), hidden first handed through the methods there, which see [B N, D] as in the packed encoder."""
        norm, shape = self._norm(f"{site}.norm"), residual.shape
        hidden, residual = hidden.reshape(-1, shape[-1]), residual.reshape(-1, shape[-1])
        for method in self.blocks[site]:
            hidden = method.block(site, hidden, residual, norm)
        return norm(hidden + residual).view(shape)

    def _linear(self, site: str, x: Tensor) -> Tensor:
        return F.linear(x, self._at(site), self._at(site + ".bias"))

    def _norm(self, site: str):
        weight, bias = self._at(site), self._at(site + ".bias")
        return lambda x: F.layer_norm(x, weight.shape, weight, bias, self.config.norm_eps)


class _Buffers:
    """A method's `values` as torch.export wants them: read from the graph's own buffers at the moment they are asked for."""

    def __init__(self, module: Padded, stem: str):
        self.module, self.stem = module, stem

    def __getitem__(self, name: str) -> Tensor:
        return self.module._at(self.stem + name)
