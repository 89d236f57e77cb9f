"""The padded graph: `Padded`, a second, plain implementation of encoder.py on padded tensors with the attached modules inside, for torch.export.

Weights take in whatever changes only weights (LoRA, sparse, (IA)^3, biases); adapters, prefixes and prompts are part of the graph. It leaves out dropout and
training; a frozen copy of the model as it is, on the CPU.

Letters: B texts, S longest text, P vectors before each text, Q prefix length, D hidden, H heads, W head width, N = P + S, V vocabulary, C labels.
"""

import copy

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batches import Sample, pack
from .encoder import Model, parameter_at
from .errors import AdapterError
from .methods import Method
from .sites import ACTIVATIONS, BLOCKS, EMBED_SITE, LINEARS, TABLES


def export_padded(padded: "Padded") -> torch.export.ExportedProgram:
    """torch.export with batch and length left free."""
    ids = torch.zeros(3, min(7, padded.longest), dtype=torch.int64, device="cpu")  # the graph does not depend on these
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
        self.longest = model.encoder.longest
        for site in TABLES:
            self._put(site, hooks.value(site, parameter_at(model, site)[1]))
        self._put_norm("embeddings.norm", model)
        self.start = c.position_offset + hooks.position_shift
        self.first = self._put_vectors(model)
        self.blocks: dict[str, list] = {}
        for i in range(c.layers):
            for kind in LINEARS:
                self._put_linear(f"layers.{i}.{kind}", model)
            if (both := hooks.key_value(i)) is not None:
                self._put(f"layers.{i}.prefix", torch.stack(both).transpose(1, 2))  # [2, H, Q, W]
            for block in BLOCKS:
                self._put_norm(f"layers.{i}.{block}.norm", model)
                self.blocks[f"layers.{i}.{block}"] = [self._copy(method, model) for method in hooks.at(f"layers.{i}.{block}")]
        if what == "predict":
            for part in ("dense", "output"):
                self._put(f"classifier.{part}", getattr(model.classifier, part).weight)
                self._put(f"classifier.{part}.bias", getattr(model.classifier, part).bias)
        if what == "fill_mask":
            head, (table, bias) = model.mlm, model.mlm_decoder()
            for name, tensor in (("dense", head.dense.weight), ("dense.bias", head.dense.bias), ("norm", head.norm.weight), ("norm.bias", head.norm.bias),
                                 ("decoder.bias", bias)):
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
        return norm(hidden, residual).view(shape)

    def _linear(self, site: str, x: Tensor) -> Tensor:
        return F.linear(x, self._at(site), self._at(site + ".bias"))

    def _norm(self, site: str):
        weight, bias = self._at(site), self._at(site + ".bias")
        return lambda x, residual=None: F.layer_norm(x if residual is None else x + residual, weight.shape, weight, bias, self.config.norm_eps)


class _Buffers:
    """A method's `values` as torch.export wants them: read from the graph's own buffers at the moment they are asked for."""

    def __init__(self, module: Padded, stem: str):
        self.module, self.stem = module, stem

    def __getitem__(self, name: str) -> Tensor:
        return self.module._at(self.stem + name)
