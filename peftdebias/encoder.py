"""One encoder for BERT and RoBERTa on packed tokens, with its masked-LM and classifier heads.

What it adds over its neighbours: how a base model is put together from linears and the ops of ops/. It leaves out padding, decoding, cross-attention and relative
positions; what methods do to it is in sites.py, foreign names stay in weights.py.

Dropout: one seed a forward pass, drawn from torch's generator of the device, so torch.manual_seed decides and no host waits; the places that drop are numbered in
the order in which they act: 0 the embeddings, 3 i + 1 to 3 i + 3 layer i's probabilities, attention and feed-forward, then the classifier's two, then the linears' (sites.drop_places).

Two savings, both exact: no padding flows through anything but attention, and the last layer computes queries, output projection and feed-forward
only for the rows that the batch asks for. A third on request, exact too: `recompute` keeps the inputs of the layers alone for the backward.

Departure: a `<pad>` that a RoBERTa's text spells out is a token like others; transformers gives it the padding's position and counts the others without it.

Letters: T tokens in the batch, B sequences, D hidden, H heads, W head width, V vocabulary, M rows asked for.
Papers: Devlin et al. 2019 (BERT), Liu et al. 2019 (RoBERTa).
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Collection, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .batches import Batch, Spans
from .errors import AdapterError, ModelError, PeftDebiasError
from .ops import Drop, Forked, Normal, attention, dropout, embed, feed_forward, gelu, heads_of, linear, norm, rounded_once, scores
from .sites import ACTIVATIONS, EMBED_SITE, EncoderConfig, Hooks
from .written import Written, write

# ---------------------------------------------------------------- parameters

class Embeddings(nn.Module):
    """Tables [V, D] of tokens, [positions, D] and [segments, D], and the LayerNorm of their sum."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.word = nn.Embedding(config.vocab, config.hidden)
        self.position = nn.Embedding(config.max_positions + config.position_offset, config.hidden)
        self.segment = nn.Embedding(config.segments, config.hidden)
        self.norm = nn.LayerNorm(config.hidden, eps=config.norm_eps)


class Attention(nn.Module):
    """Q, K and V are one weight [3D, D], in that order; sites name slices of it."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden)
        self.output = nn.Linear(config.hidden, config.hidden)
        self.norm = nn.LayerNorm(config.hidden, eps=config.norm_eps)


class FeedForward(nn.Module):
    """up [F, D] -> activation -> down [D, F], and the LayerNorm behind."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.up = nn.Linear(config.hidden, config.feed_forward)
        self.down = nn.Linear(config.feed_forward, config.hidden)
        self.norm = nn.LayerNorm(config.hidden, eps=config.norm_eps)


class Layer(nn.Module):
    """Attention, then feed-forward, each with its residual and LayerNorm (Encoder runs them)."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)


class MaskedLMHead(nn.Module):
    """dense -> activation -> LayerNorm -> decoder. `decoder` is None where the word embedding serves (tied)."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden, config.hidden)
        self.norm = nn.LayerNorm(config.hidden, eps=config.norm_eps)
        self.decoder = None if config.tied else nn.Linear(config.hidden, config.vocab, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab))


class ClassifierHead(nn.Module):
    """BERT: dense (the pooler) -> tanh -> dropout -> output. RoBERTa: dropout -> dense -> tanh -> dropout -> output."""

    def __init__(self, config: EncoderConfig, labels: tuple[str, ...]):
        super().__init__()
        if isinstance(labels, str) or not isinstance(labels, Collection) or not all(isinstance(label, str) for label in labels) or len(set(labels)) < len(labels):
            raise ModelError(f"labels: expected names, each another one, got {labels!r}")
        self.labels = tuple(labels)
        self.dense = nn.Linear(config.hidden, config.hidden)
        self.output = nn.Linear(config.hidden, len(labels))


# ---------------------------------------------------------------- encoder

class Encoder(nn.Module):
    """Embeddings and layers on packed tokens, with the hooks of attached methods."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.hooks = Hooks()
        self.written: dict[str, Written] = {}  # while a forward pass runs: weights that hold a method's delta
        self.seed: Tensor | None = None  # int64 [1], of the masks of this forward pass and its head
        self.recompute = False  # in the backward, what lies inside a layer, in place of keeping it
        self.at_most: int | None = None  # tokens of a text, where that is to be less than there is room for
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))

    def forward(self, batch: Batch, all_rows: bool = False) -> Tensor:
        """Hidden states of the rows asked for, [M, D]; with `all_rows` of every token, [T, D].

        batch: ids and positions int64 [T], ids in [0, V), positions in [0, batch.max_length); see batches.Batch. Raises ModelError on a longer text.
        """
        if not isinstance(batch, Batch):
            raise ModelError(f"expected a Batch, as batches.pack(samples) makes one, got {type(batch).__name__}")
        if batch.ids.device != (place := self.embeddings.word.weight.device):
            raise ModelError(f"expected a batch on {place}, where the model is, got one on {batch.ids.device}: batch.to(model.device)")
        self.seed = torch.randint(2 ** 62, (1,), device=batch.ids.device) if self.training else None
        hidden, batch = self._embed(batch)
        linears = self._linears
        self.written = {}  # what a pass that failed left; both would need room
        self.written = write(self.hooks, linears, hidden)
        layer = self._recomputed if self.recompute and torch.is_grad_enabled() else self._layer
        with rounded_once(hidden, self._rounded_whole(linears, all_rows) if torch.is_grad_enabled() and not self.recompute else []):
            given = hidden, hidden, None
            del hidden  # a layer's input goes when its output is there
            for i in range(self.config.layers):
                last = i == self.config.layers - 1 and not all_rows
                given = layer(i, given, self.hooks.key_value(i), batch.row_spans if last else batch.spans, batch.rows if last else None)
        self.written = {}
        return given[0]

    @property
    def longest(self) -> int:
        """Tokens of the longest text that there are positions for, beside what the methods put before it; no more than `at_most`, where that is set."""
        room = self.config.max_positions - self.hooks.position_shift
        return room if self.at_most is None else min(room, self.at_most)

    @property
    def _linears(self) -> dict[str, tuple[nn.Linear, tuple[str, ...]]]:
        """Name -> (linear, its sites), as written.write takes them."""
        found = {}
        for i, layer in enumerate(self.layers):
            found[f"layers.{i}.attention.qkv"] = layer.attention.qkv, tuple(f"layers.{i}.attention.{kind}" for kind in ("query", "key", "value"))
            for site, part in (("attention.output", layer.attention.output), ("feed_forward.up", layer.feed_forward.up), ("feed_forward.down", layer.feed_forward.down)):
                found[f"layers.{i}.{site}"] = part, (f"layers.{i}.{site}",)
        return found

    def _rounded_whole(self, linears: dict[str, tuple[nn.Linear, tuple[str, ...]]], all_rows: bool) -> list[Tensor]:
        """The weights and biases that a forward pass in 16 bits rounds as they are: no method adds to them, no slice of them is taken, and GELU takes no bias of them."""
        found = []
        for name, (part, sites) in linears.items():
            sliced = name == f"layers.{self.config.layers - 1}.attention.qkv" and not all_rows
            if not sliced and all(map(self._bare, sites)):
                found += [part.weight] if name.endswith("feed_forward.up") and self.config.activation == "gelu" else [part.weight, part.bias]
        return found

    def _embed(self, batch: Batch) -> tuple[Tensor, Batch]:
        config, table, hooks = self.config, self.embeddings, self.hooks
        if batch.max_length > self.longest:
            raise ModelError(f"text of {batch.max_length} tokens: expected at most {self.longest}")
        positions = hooks.value("embeddings.position", table.position.weight)
        segments = hooks.value("embeddings.segment", table.segment.weight)

        # Every segment's every position has a row of its own, so that a token looks up two rows and not three.
        start, longest = config.position_offset + hooks.position_shift, batch.max_length
        placed = (segments[:, None] + positions[start:start + longest]).flatten(0, 1)
        word, places, drop = hooks.value("embeddings.word", table.word.weight), batch.segments * longest + batch.positions, self.drop(0, config.dropout)
        if not hooks.at(EMBED_SITE):
            gain, bias = hooks.value("embeddings.norm", table.norm.weight), hooks.value("embeddings.norm.bias", table.norm.bias)
            return embed(batch.ids, places, word, placed, gain, bias, table.norm.eps, drop), batch
        hidden = F.embedding(batch.ids, word) + F.embedding(places, placed)
        # From the last to the first, each put before every text: they stand in the order in which they were attached.
        for method in reversed(hooks.at(EMBED_SITE)):
            start = config.position_offset + hooks.shift_before(method)

            def positioned(vectors: Tensor, places: Tensor, start: int = start) -> Tensor:
                return vectors + F.embedding(places + start, positions) + segments[0]

            hidden, batch = method.embed(hidden, batch, positioned)
        return dropout(self._norm("embeddings.norm", table.norm)(hidden), drop), batch

    def _recomputed(self, i: int, given: Forked, prefix: tuple[Tensor, Tensor] | None, spans: Spans, rows: Tensor | None) -> Forked:
        """_layer, of which nothing but its inputs is kept: the backward runs it again with the same seed, written weights and implementations, and so to the same bits."""
        hidden, residual, _ = given  # what the norm behind them keeps is computed again with its layer
        if torch.compiler.is_compiling():  # the compiler has both passes before it
            for name in ("query_places", "key_places", "key_mask"):  # made here: what it recomputes may leave nothing behind
                getattr(spans, name)
            return *checkpoint(lambda *states: self._layer(i, (*states, None), prefix, spans, rows)[:2], hidden, residual, use_reentrant=False), None
        kept, asked = (self.seed, self.written), contextvars.copy_context()  # a GPU's backward has a thread of its own, which knows of no `kernels.use` or `dispatch.use`

        def layer(*states: Tensor) -> tuple[Tensor, Tensor]:
            before, (self.seed, self.written) = (self.seed, self.written), kept
            try:
                return asked.run(self._layer, i, (*states, None), prefix, spans, rows)[:2]
            finally:
                self.seed, self.written = before

        # All masks come from the seed, so torch's generator, which a CUDA graph's capture cannot set back, is left alone.
        return *checkpoint(layer, hidden, residual, use_reentrant=False, preserve_rng_state=False), None

    def _layer(self, i: int, given: Forked, prefix: tuple[Tensor, Tensor] | None, spans: Spans, rows: Tensor | None) -> Forked:
        """given: hidden states [T, D] for the products, the same for the residual, and what the norm behind them keeps; returned are such, of [M, D] where rows int64 [M] are
        asked for. prefix: keys and values [P, H, W] that every text's queries see."""
        layer, config, site, (hidden, residual, normal) = self.layers[i], self.config, f"layers.{i}", given
        residual = residual if rows is None else residual.index_select(0, rows)
        query, key, value = self._query_key_value(i, hidden if rows is None else residual, hidden, normal)
        context = attention(query, key, value, spans, prefix, self.drop(3 * i + 1, config.attention_dropout))
        hidden = self._linear(f"{site}.attention.output", context.flatten(1), layer.attention.output)
        hidden, residual, normal = self.hooks.block(f"{site}.attention", hidden, residual, self._norm(f"{site}.attention.norm", layer.attention.norm),
                                                    self.drop(3 * i + 2, config.dropout))
        hidden = self._feed_forward(i, hidden, normal)
        return self.hooks.block(f"{site}.feed_forward", hidden, residual, self._norm(f"{site}.feed_forward.norm", layer.feed_forward.norm),
                                self.drop(3 * i + 3, config.dropout))

    def _feed_forward(self, i: int, hidden: Tensor, normal: Normal | None) -> Tensor:
        """hidden [M, D], of which a norm keeps `normal`, -> [M, D]. A bare linear leaves its bias to GELU; two of them are one op with it."""
        part, up_site, down_site = self.layers[i].feed_forward, f"layers.{i}.feed_forward.up", f"layers.{i}.feed_forward.down"
        up, down = part.up, part.down
        if self.config.activation != "gelu":
            return self._linear(down_site, ACTIVATIONS[self.config.activation](self._linear(up_site, hidden, up)), down)
        if self._bare(up_site) and self._bare(down_site):
            return feed_forward(hidden, up.weight, up.bias, down.weight, down.bias, normal)
        x, shift = (linear(hidden, up.weight), up.bias) if self._bare(up_site) else (self._linear(up_site, hidden, up), None)
        return self._linear(down_site, gelu(x, shift), down)

    def _bare(self, site: str) -> bool:
        """Whether no method touches the linear there."""
        return not (site in self.written or self.hooks.at(site) or self.hooks.at(site + ".bias"))

    def _query_key_value(self, i: int, asked: Tensor, hidden: Tensor, normal: Normal | None) -> list[Tensor]:
        """asked [M, D], hidden [T, D], of which a norm keeps `normal`, -> query [M, H, W], key and value [T, H, W]; as few products as the methods there allow."""
        qkv, width = self.layers[i].attention.qkv, self.config.hidden
        sites = [f"layers.{i}.attention.{kind}" for kind in ("query", "key", "value")]
        split = (-1, self.config.heads, self.config.head_width)
        written = self.written.get(f"layers.{i}.attention.qkv")
        if written is not None and asked is hidden:
            return heads_of(written(hidden), 3, self.config.heads)
        if written is not None:
            return [written(asked, 0, width).reshape(split), *heads_of(written(hidden, width), 2, self.config.heads)]
        if any(self.hooks.at(s) or self.hooks.at(s + ".bias") for s in sites):
            parts = zip(sites, (asked, hidden, hidden), qkv.weight.split(width), qkv.bias.split(width))
            return [self.hooks.linear(s, x, w, b, self.seed).view(split) for s, x, w, b in parts]
        if asked is hidden:
            return heads_of(linear(hidden, qkv.weight, qkv.bias, normal), 3, self.config.heads)
        query = linear(asked, qkv.weight[:width], qkv.bias[:width])
        return [query.reshape(split), *heads_of(linear(hidden, qkv.weight[width:], qkv.bias[width:], normal), 2, self.config.heads)]

    def _linear(self, site: str, x: Tensor, part: nn.Linear) -> Tensor:
        return self.written[site](x) if site in self.written else self.hooks.linear(site, x, part.weight, part.bias, self.seed)

    def _norm(self, site: str, layer_norm: nn.LayerNorm) -> Callable:
        def apply(x: Tensor, residual: Tensor | None = None, drop: Drop | None = None, fork: bool = False) -> Tensor | tuple:
            return norm(x, residual, self.hooks.value(site, layer_norm.weight), self.hooks.value(site + ".bias", layer_norm.bias), layer_norm.eps, drop, fork)
        return apply

    def drop(self, place: int, rate: float) -> Drop | None:
        """Dropout at a numbered place (see the file's first lines); None in eval mode and at rate 0."""
        return Drop(rate, self.seed, place) if self.training and rate > 0 else None


class Model(nn.Module):
    """An encoder with the heads that its files or its task gave it.

    mlm: MaskedLMHead or None. classifier: ClassifierHead or None. Methods are attached by patch.attach and found in `methods`.
    carried: tensors of the files, by our names, that no head here uses (a pooler); weights.py saves them again.
    """

    def __init__(self, config: EncoderConfig, mlm: bool = False, labels: tuple[str, ...] = ()):
        super().__init__()
        if not isinstance(config, EncoderConfig):
            raise ModelError(f"Model: expected an EncoderConfig, got {type(config).__name__}")
        self.encoder = Encoder(config)
        self.mlm = MaskedLMHead(config) if mlm else None
        self.classifier = ClassifierHead(config, labels) if labels else None
        self.carried: dict[str, Tensor] = {}

    @property
    def config(self) -> EncoderConfig:
        """Sizes and rates of the encoder, as its config.json has them."""
        return self.encoder.config

    @property
    def methods(self) -> dict:
        """The attached methods by name, in order; read only."""
        return dict(self.encoder.hooks.methods)

    @property
    def device(self) -> torch.device:
        """Where its parameters are, and batches are expected."""
        return self.encoder.embeddings.word.weight.device

    def mlm_logits(self, batch: Batch) -> Tensor:
        """[M, V]: scores of every token at the rows asked for. Raises ModelError without a masked-LM head."""
        return scores(self.mlm_hidden(batch), *self.mlm_decoder())

    def mlm_hidden(self, batch: Batch) -> Tensor:
        """[M, D]: what the masked-LM's decoder is multiplied with, at the rows asked for. Raises ModelError without a masked-LM head."""
        if self.mlm is None:
            raise ModelError("masked-LM scores: expected a model with a masked-LM head, got one without")
        head = self.mlm
        hidden, dense = self.encoder(batch), head.dense
        if self.config.kind == "roberta" or self.config.activation == "gelu":  # RoBERTa's head is GELU whatever its layers use
            hidden = gelu(linear(hidden, dense.weight), dense.bias)
        else:
            hidden = ACTIVATIONS[self.config.activation](linear(hidden, dense.weight, dense.bias))
        return norm(hidden, None, head.norm.weight, head.norm.bias, head.norm.eps)

    def mlm_decoder(self) -> tuple[Tensor, Tensor]:
        """([V, D], [V]): the decoder's weight and bias."""
        # Tied or not, the decoder is the base's: a delta of the embedding acts on the input side only.
        encoder, decoder = self.encoder, self.mlm.decoder
        return encoder.hooks.base(encoder.embeddings.word.weight) if decoder is None else decoder.weight, self.mlm.bias

    def class_logits(self, batch: Batch) -> Tensor:
        """[B, C]: scores of every label from the row asked for of each text, its first token. Raises ModelError without a classifier, and on a batch that asks for others."""
        if self.classifier is None:
            raise ModelError("classification: expected a model with a classifier, got one without (train one with `peftdebias downstream`)")
        if isinstance(batch, Batch) and not batch.firsts and batch.lengths:
            if set(batch.row_lengths) != {1} or not torch.equal(batch.rows, batch.cu_seqlens[:-1].long()):
                raise ModelError("class_logits: expected a batch whose only rows are the texts' first, Sample(ids, numpy.array([0])) each")
            batch = dataclasses.replace(batch, firsts=True)  # made by hand
        head, hidden = self.classifier, self.encoder(batch)
        first, second = (self.encoder.drop(3 * self.config.layers + n, self.config.classifier_dropout) for n in (1, 2))
        if self.config.kind == "roberta":
            hidden, first = dropout(hidden, first), second
        return head.output(dropout(torch.tanh(head.dense(hidden)), first))

    def initialize(self, part: nn.Module, generator: torch.Generator | None = None) -> None:
        """Fresh weights for `part` as BERT draws them: normal(0, initializer_range), zero biases, unit gains."""
        for name, parameter in part.named_parameters():
            with torch.no_grad():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, self.config.initializer_range, generator=generator)
                else:
                    parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)

    def untie(self, table: Tensor) -> None:
        """Gives the masked-LM a decoder of its own: a frozen copy of `table` [V, D]."""
        self.mlm.decoder = nn.Linear(*reversed(table.shape), bias=False, device="meta")
        self.mlm.decoder.weight = nn.Parameter(table.detach().clone(), requires_grad=False)

    @contextlib.contextmanager
    def frozen_decoder(self) -> Iterator[None]:
        """Inside the `with` block a tied masked-LM decoder is a frozen copy of the word embedding, which can then be trained apart from it."""
        if self.mlm is None or self.mlm.decoder is not None:
            yield
            return
        self.untie(self.encoder.embeddings.word.weight)
        try:
            yield
        finally:
            self.mlm.decoder = None

    @contextlib.contextmanager
    def recomputing(self, on: bool = True) -> Iterator[None]:
        """Inside the `with` block a training pass keeps the inputs of the layers alone, and its backward computes the rest again."""
        before, self.encoder.recompute = self.encoder.recompute, on
        try:
            yield
        finally:
            self.encoder.recompute = before

    @contextlib.contextmanager
    def without(self, *names: str) -> Iterator["Model"]:
        """Inside the `with` block the named methods are off, for every thread; merged ones too, by the base tensors that merge kept. Raises AdapterError on another name."""
        hooks = self.encoder.hooks
        with hooks.without({hooks.known("without", name) for name in names}):
            yield self

    def train(self, mode: bool = True) -> "Model":
        """As nn.Module.train; methods that are frozen stay in eval mode, so that their dropout is off."""
        super().train(mode)
        for method in self.methods.values():
            method.train(mode)
        return self

    def load_state_dict(self, *args, **kwargs):
        """As nn.Module.load_state_dict; of the base and its heads, not of methods. Raises AdapterError on a merged model, whose unmerge would put back other weights."""
        if self.encoder.hooks.merged:
            raise AdapterError("load_state_dict: expected an unmerged model; unmerge it first")
        return super().load_state_dict(*args, **kwargs)

    def _apply(self, fn, recurse: bool = True) -> "Model":
        super()._apply(fn, recurse)
        for method in self.methods.values():
            for parameter in method.parameters().values():
                parameter.data, gradient = fn(parameter.data), parameter.grad
                if gradient is not None:
                    parameter.grad = fn(gradient)
        if merged := self.encoder.hooks.merged:
            merged.tensors = [(parameter, fn(kept), fn(written)) for parameter, kept, written in merged.tensors]
            merged.place(merged.placed)
        return self


QKV = {"query": 0, "key": 1, "value": 2}


def parameter_at(model: Model, site: str) -> tuple[str, nn.Parameter, slice]:
    """(name, parameter, rows of it) behind a site: `layers.0.attention.query` is the first third of `layers.0.attention.qkv.weight`.

    A site is a linear, embedding or norm (its weight) or any of those + `.bias`. Raises AdapterError on a name without a parameter.
    """
    stem, kind = (site.removesuffix(".bias"), "bias") if site.endswith(".bias") else (site, "weight")
    head, _, last = stem.rpartition(".")
    rows = slice(None)
    if last in QKV and head.endswith(".attention"):
        width = model.config.hidden
        rows, stem = slice(QKV[last] * width, (QKV[last] + 1) * width), f"{head}.qkv"
    name = f"{stem}.{kind}"
    found = dict(model.encoder.named_parameters()).get(name)
    if found is None:
        raise AdapterError(f"site {site!r}: no such linear, embedding or norm in this model")
    return name, found, rows


def expect_model(model: Model, what: str, besides: str = "", raised: type[PeftDebiasError] = ModelError) -> None:
    """Raises about `what` on anything else than a Model. besides: said behind that."""
    if not isinstance(getattr(model, "_orig_mod", model), Model):  # torch.compile wraps one
        raise raised(f"{what}: expected a model of this package, as load(...).run.model is, got {type(model).__name__}{besides}")
