"""Toy methods, one for each hook of the Protocol, for the tests of hooks and of merging; the model and the batch that they are tried on.

Each says by its `oracle` what `plain` does in the open in its place: a changed weight, a changed block output, a longer text.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.nn import Parameter

from peftdebias.batches import cumulative
from peftdebias.methods import Method
from peftdebias.sites import BLOCKS, EMBED_SITE, block_sites, key_value_sites, linear_shape, linear_sites

from .outside import HEAD_WIDTH, HEADS, HIDDEN
from .plain import config, model_of, some


class Toy(Method):
    """Takes hold of the sites that it is given and owns the values that it is given."""

    name = "toy"
    mergeable = foldable = True

    def __init__(self, sites, values):
        super().__init__(None, None)
        self.places = tuple(sites)
        self.values = {name: Parameter(value) for name, value in values.items()}

    def sites(self, encoder_config):
        return self.places


class Scale(Toy):
    """A product of its own: s * (x W^T + b), a value s [out] for each site."""

    name = "scale"
    mergeable = foldable = False

    def linear(self, site, x, weight, bias, seed=None):
        return self.values[site] * F.linear(x, weight, bias)

    @staticmethod
    def oracle(model, values):
        weights = copied(model)
        for site, s in values.items():
            change(weights, site, lambda w: w * s[:, None])
            change(weights, site + ".bias", lambda b: b * s)
        return dict(weights=weights)


class Dense(Toy):
    """A dense delta for each site."""

    name = "dense"

    def delta(self, site):
        return self.values[site]

    @staticmethod
    def oracle(model, values):
        weights = copied(model)
        for site, delta in values.items():
            change(weights, site, lambda w: w + delta)
        return dict(weights=weights)


class Sparse(Toy):
    """(indices, values) at every fifth entry from the second."""

    name = "sparse"

    def delta(self, site):
        return torch.arange(len(self.values[site])) * 5 + 1, self.values[site]

    @staticmethod
    def oracle(model, values):
        weights = copied(model)
        for site, delta in values.items():
            full = torch.zeros(part(model, site).numel(), dtype=delta.dtype)
            full[1::5][:len(delta)] = delta
            change(weights, site, lambda w: w + full.view_as(w))
        return dict(weights=weights)


class Adapter(Toy):
    """hidden + tanh(hidden A), A [D, D] for each block."""

    name = "adapter"
    mergeable = foldable = False

    def block(self, site, hidden, residual, norm):
        return self.adapt(self.values, site, hidden)

    @staticmethod
    def adapt(values, site, x):
        return x + torch.tanh(x @ values[site]) if site in values else x

    @staticmethod
    def oracle(model, values):
        return dict(adapt=lambda site, x: Adapter.adapt(values, site, x))


class Prefix(Toy):
    """Keys and values `k0`, `v0` [P, H, W] for layer 0 and so on."""

    name = "prefix"
    mergeable = foldable = False

    def key_value(self, layer):
        return (self.values[f"k{layer}"], self.values[f"v{layer}"]) if f"k{layer}" in self.values else None

    @staticmethod
    def oracle(model, values):
        return dict(prefix=lambda layer: (values[f"k{layer}"], values[f"v{layer}"]) if f"k{layer}" in values else None)


class Prompt(Toy):
    """`vectors` [P, D] before the words of every text, which moves on by P positions."""

    name = "prompt"
    mergeable = foldable = False

    @property
    def position_shift(self):
        return len(self.values["vectors"])

    def embed(self, hidden, batch, positioned):
        vectors = self.values["vectors"]
        p, lengths = len(vectors), tuple(n + len(vectors) for n in batch.lengths)
        owners = torch.arange(len(lengths)).repeat_interleave(torch.tensor(batch.row_lengths))
        vectors = positioned(vectors, torch.arange(p))
        return torch.cat([x for words in hidden.split(batch.lengths) for x in (vectors, words)]), dataclasses.replace(
            batch, rows=batch.rows + (owners + 1) * p, lengths=lengths, cu_seqlens=cumulative(lengths), max_length=max(lengths))

    @staticmethod
    def oracle(model, values):
        return dict(vectors=values["vectors"])


class Shift(Toy):
    """Texts begin three positions later."""

    name = "shift"
    mergeable = foldable = False
    position_shift = 3

    @staticmethod
    def oracle(model, values):
        return dict(shift=3)


def copied(model):
    return dict(model.encoder.named_parameters())


def slice_of(site):
    """(our parameter, its part 0, 1 or 2 of three, or None) of a site, in the words of CONTRACTS.md."""
    stem, last = (site[:-5], "bias") if site.endswith(".bias") else (site, "weight")
    head, _, kind = stem.rpartition(".")
    if kind in ("query", "key", "value"):
        return f"{head}.qkv.{last}", ("query", "key", "value").index(kind)
    return f"{stem}.{last}", None


def change(weights, site, function):
    name, third = slice_of(site)
    thirds = list(weights[name].split(HIDDEN)) if third is not None else [weights[name]]
    thirds[third or 0] = function(thirds[third or 0])
    weights[name] = torch.cat(thirds)


def part(model, site):
    name, third = slice_of(site)
    parameter = copied(model)[name]
    return parameter if third is None else parameter[third * HIDDEN:(third + 1) * HIDDEN]


def drawn(*shape, seed):
    return 0.3 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Every kind of linear, not every layer: layer 1 has query and value free, layer 2 the key.
SOME_LINEARS = ("layers.0.attention.query", "layers.0.attention.value", "layers.1.attention.key", "layers.2.attention.query", "layers.2.attention.value",
                "layers.1.attention.output", "layers.2.attention.output", "layers.0.feed_forward.up", "layers.2.feed_forward.up",
                "layers.1.feed_forward.down", "layers.2.feed_forward.down")
SMALL_PARTS = ("layers.0.attention.key.bias", "layers.2.attention.query.bias", "layers.2.attention.value.bias", "layers.1.attention.output.bias",
               "layers.2.feed_forward.up.bias", "layers.1.feed_forward.down.bias", "layers.0.attention.norm", "layers.0.attention.norm.bias",
               "layers.2.feed_forward.norm", "layers.2.feed_forward.norm.bias")
TABLES = ("embeddings.word", "embeddings.position", "embeddings.segment", "embeddings.norm", "embeddings.norm.bias")


def dense(sites, seed=0):
    model = model_of()
    return Dense(sites, {site: drawn(*part(model, site).shape, seed=seed + i) for i, site in enumerate(sites)})


def sparse(sites, seed=0):
    model = model_of()
    return Sparse(sites, {site: drawn((part(model, site).numel() - 1) // 5, seed=seed + i) for i, site in enumerate(sites)})


def adapter(seed=0, kinds=BLOCKS):
    return Adapter(block_sites(config(), kinds), {site: drawn(HIDDEN, HIDDEN, seed=seed + i) for i, site in enumerate(block_sites(config(), kinds))})


def prefix(seed=0, length=5, layers=(0, 2)):
    values = {f"{kind}{i}": drawn(length, HEADS, HEAD_WIDTH, seed=seed + 2 * i + j) for i in layers for j, kind in enumerate("kv")}
    return Prefix(key_value_sites(config()), values)


def prompt(seed=0, length=3):
    return Prompt([EMBED_SITE], {"vectors": drawn(length, HIDDEN, seed=seed)})


def scale(sites=SOME_LINEARS):
    return Scale(sites, {site: 1 + drawn(linear_shape(config(), site)[0], seed=i) for i, site in enumerate(sites)})


TOYS = {
    "linear": scale,
    "delta dense": lambda: dense(SOME_LINEARS),
    "delta sparse": lambda: sparse(SOME_LINEARS),
    "delta dense of all linears": lambda: dense(linear_sites(config())),
    "delta of biases and norms": lambda: dense(SMALL_PARTS),
    "sparse delta of biases and norms": lambda: sparse(SMALL_PARTS),
    "delta of embeddings": lambda: dense(TABLES),
    "sparse delta of embeddings": lambda: sparse(TABLES),
    "block": adapter,
    "key_value": prefix,
    "key_value of one": lambda: prefix(length=1, layers=(1,)),
    "embed": prompt,
    "position_shift": lambda: Shift((), {}),
}
MERGEABLE = {name: make for name, make in TOYS.items() if "delta" in name}


@pytest.fixture
def model():
    return model_of()


@pytest.fixture
def batch():
    return some("bert")
