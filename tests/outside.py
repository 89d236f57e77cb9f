"""Where tests meet transformers and peft: the one helper for all comparisons. A test that needs an absent library is skipped.

`pair` gives a randomly drawn model of transformers and ours, read from the folder that it saved; `hidden`, `mlm_logits` and `class_logits` ask theirs with
padding and answer in our packed layout; `assert_close` holds CONTRACTS.md's tolerances. Sizes are odd, so that swapped axes fail.
"""

from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

from peftdebias.batches import Batch, Sample, pack
from peftdebias.encoder import Model

LAYERS, HEADS, HEAD_WIDTH, FEED_FORWARD, VOCAB, POSITIONS = 3, 3, 7, 41, 97, 53
HIDDEN = HEADS * HEAD_WIDTH
LABELS = ("nurse", "pilot", "poet", "smith", "tailor")
LENGTHS = (13, 1, 29, 7, 2)


def library(name: str):
    """The module `name`; the test is skipped where it is not installed."""
    return pytest.importorskip(name, reason=f"compares with {name}, which is not installed")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For files that import it: models as small as these run on one thread (two that wait for each other cost fifty times as much on a busy machine)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def little_memory():
    """Of address space the test may take 1 GiB more than there is: what asks for absurd sizes gets an error, and the machine lives on."""
    resource = pytest.importorskip("resource", reason="limits memory, which this system cannot")
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("limits memory by /proc/self/statm, which this system does not have")
    before, taken = resource.getrlimit(resource.RLIMIT_AS), int(statm.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


# ---------------------------------------------------------------- inputs

def ragged(lengths=LENGTHS, *, vocab: int = VOCAB, segments: int = 1, rows: str = "some", seed: int = 0) -> Batch:
    """Random texts without special ids (0 to 4). rows: "some" (up to three a text, none in a text of one token), "first" or "all"; targets for each."""
    random, samples = numpy.random.default_rng(seed), []
    for n in lengths:
        asked = {"first": numpy.array([0]), "all": numpy.arange(n), "some": numpy.sort(random.choice(n, min(3, n - 1), replace=False))}[rows]
        kinds = None if segments == 1 else numpy.sort(random.integers(segments, size=n))
        samples.append(Sample(random.integers(5, vocab, size=n), asked, random.integers(5, vocab, size=len(asked)), kinds))
    return pack(samples)


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter drawn, biases and norms too, large enough that each matters in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            gain = name.lower().endswith(("norm.weight", "layer_norm.weight"))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + gain)
    return module


# ---------------------------------------------------------------- models

def theirs(kind: str, head: str = "ForMaskedLM", dtype: torch.dtype = torch.float64, seed: int = 0, **changes):
    """A random transformers model, e.g. BertForMaskedLM, in eval mode. changes: fields of its config."""
    transformers = library("transformers")
    stem = {"bert": "Bert", "roberta": "Roberta"}[kind]
    sizes = dict(num_hidden_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS, intermediate_size=FEED_FORWARD, vocab_size=VOCAB,
                 max_position_embeddings=POSITIONS, type_vocab_size=2, pad_token_id=0, id2label=dict(enumerate(LABELS)),
                 label2id={label: i for i, label in enumerate(LABELS)})
    if kind == "roberta":
        sizes |= dict(max_position_embeddings=POSITIONS + 2, type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5)
    config = getattr(transformers, stem + "Config")(**sizes | changes)
    return randomize(getattr(transformers, stem + head)(config), seed).to(dtype).eval()


def pair(kind: str, folder, head: str = "ForMaskedLM", dtype: torch.dtype = torch.float64, **changes) -> tuple[object, Model]:
    """(a random transformers model, ours with the same weights through the folder that it saved), both in eval mode."""
    from peftdebias.weights import load_model

    other = theirs(kind, head, dtype, **changes)
    other.save_pretrained(folder)
    model, report = load_model(folder, dtype=dtype)
    assert report.new == ()
    return other, model


# ---------------------------------------------------------------- their answers, in our layout

def padded(other, batch: Batch) -> dict[str, Tensor]:
    """What their forward takes: [B, S] ids, mask and segments. The padding token's embedding is drawn like all others: outputs would show it if it were seen."""
    shape = len(batch.lengths), batch.max_length
    mask = torch.arange(shape[1])[None, :] < torch.tensor(batch.lengths)[:, None]
    pad = other.config.pad_token_id
    ids = torch.full(shape, pad).masked_scatter(mask, batch.ids)
    return dict(input_ids=ids, attention_mask=mask.long(), token_type_ids=torch.zeros(shape, dtype=torch.int64).masked_scatter(mask, batch.segments))


def packed(batch: Batch, states: Tensor) -> Tensor:
    """[B, S, ...] -> [T, ...]."""
    return torch.cat([states[b, :n] for b, n in enumerate(batch.lengths)])


def hidden(other, batch: Batch) -> Tensor:
    """[T, D]: their last hidden state of every token."""
    return packed(batch, getattr(other, other.base_model_prefix, other)(**padded(other, batch)).last_hidden_state)


def mlm_logits(other, batch: Batch) -> Tensor:
    """[M, V] at the rows asked for."""
    return packed(batch, other(**padded(other, batch)).logits)[batch.rows]


def class_logits(other, batch: Batch) -> Tensor:
    """[B, C]."""
    return other(**padded(other, batch)).logits


# ---------------------------------------------------------------- tolerances

def assert_close(ours: Tensor, expected: Tensor, what: str = "outputs", logits: bool = False) -> None:
    """CONTRACTS.md: float64 1e-10; float32 2e-6 * max(1, max|x|) for hidden states, 2e-6 * max|logit| for logits."""
    assert ours.shape == expected.shape and ours.dtype == expected.dtype, f"{what}: {ours.shape} {ours.dtype}, expected {expected.shape} {expected.dtype}"
    largest = expected.abs().max().item() if expected.numel() else 0.0
    bound = 1e-10 if ours.dtype == torch.float64 else 2e-6 * (largest if logits else max(1.0, largest))
    apart = (ours - expected).abs().max().item() if expected.numel() else 0.0
    assert apart <= bound, f"{what}: max|difference| {apart:.2e}, expected at most {bound:.2e}"  # also false for nan


# ---------------------------------------------------------------- the encoder in plain words

def drawn_model(kind: str = "bert", seed: int = 0, **changes) -> Model:
    """Ours with both heads, drawn at random, in float64 and eval mode."""
    from peftdebias.sites import EncoderConfig

    sizes = dict(layers=LAYERS, hidden=HIDDEN, heads=HEADS, feed_forward=FEED_FORWARD, vocab=VOCAB, max_positions=POSITIONS)
    sizes |= dict(segments=1, position_offset=2) if kind == "roberta" else dict(segments=2)
    return randomize(Model(EncoderConfig(kind=kind, **sizes | changes), mlm=True, labels=LABELS), seed).double().eval()


def batch_for(model: Model, head: str, **options) -> Batch:
    """What the head asks: "mlm" some rows of every text but the short ones, "class" the first of each."""
    return ragged(segments=model.config.segments, rows="first" if head == "class" else "some", **options)


def attached(model: Model, name: str, method: str, seed: int = 1, untrained: bool = False, **options):
    """A new module attached as `name`, in float64; every parameter moved away from where it starts, unless `untrained`."""
    from peftdebias import methods, patch

    module, generator = methods.create(method, model.config, options=options, seed=seed), torch.Generator().manual_seed(seed)
    for parameter in module.parameters().values():
        parameter.data = parameter.data.double()
        if not untrained:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    patch.attach(model, name, module)
    return module


def spelled_out(model: Model, batch: Batch, head: str, *, weights=None, linear=None, block=None, prefix=None, prompt=None, shift: int = 0,
                first_row: str = "text") -> Tensor:
    """Logits of the head ("mlm" [M, V] or "class" [B, C]), text after text and line after line: no packing, no rows, no hooks, no fused weight.

    weights: by our names, in place of the model's own. linear(site, x, W, b), block(site, hidden, residual, norm): in place of x W^T + b and of hidden.
    prefix(layer): keys and values [P, H, W] before each text's own. prompt [P, D]: rows before each text's words, position and segment included if they
    have any. shift: of the text's positions. first_row: "prompt" answers with the prompt's first row where the texts' first tokens are all that is asked for.
    """
    c, p = model.config, dict(model.named_parameters()) | {f"encoder.{name}": tensor for name, tensor in (weights or {}).items()}
    activation = torch.nn.functional.gelu  # what all models of the tests have

    def product(site: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return x @ weight.T + bias if linear is None else linear(site, x, weight, bias)

    def module(site: str, x: Tensor) -> Tensor:
        return product(site, x, p[f"encoder.{site}.weight"], p[f"encoder.{site}.bias"])

    def norm_of(name: str):
        def norm(x: Tensor) -> Tensor:
            centred = x - x.mean(-1, keepdim=True)
            return centred / (centred.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]
        return norm

    def joined(name: str, hidden: Tensor, residual: Tensor) -> Tensor:
        norm = norm_of(f"encoder.{name}.norm")
        return norm((hidden if block is None else block(name, hidden, residual, norm)) + residual)

    answers, starts, before = [], batch.cu_seqlens.tolist(), 0 if prompt is None else len(prompt)
    for b, rows in enumerate(batch.rows.split(batch.row_lengths)):
        text = slice(starts[b], starts[b + 1])
        places = torch.arange(batch.lengths[b]) + c.position_offset + shift
        x = (p["encoder.embeddings.word.weight"][batch.ids[text]] + p["encoder.embeddings.position.weight"][places]
             + p["encoder.embeddings.segment.weight"][batch.segments[text]])
        x = norm_of("encoder.embeddings.norm")(x if prompt is None else torch.cat([prompt, x]))
        for i in range(c.layers):
            site = f"layers.{i}.attention"
            fused = zip(p[f"encoder.{site}.qkv.weight"].split(c.hidden), p[f"encoder.{site}.qkv.bias"].split(c.hidden))
            query, key, value = (product(f"{site}.{kind}", x, *both).view(-1, c.heads, c.head_width) for kind, both in zip(("query", "key", "value"), fused))
            if prefix is not None:
                key, value = (torch.cat(both) for both in zip(prefix(i), (key, value)))
            heads = [(query[:, h] @ key[:, h].T / c.head_width**0.5).softmax(-1) @ value[:, h] for h in range(c.heads)]
            x = joined(site, module(f"{site}.output", torch.cat(heads, -1)), x)
            site = f"layers.{i}.feed_forward"
            x = joined(site, module(f"{site}.down", activation(module(f"{site}.up", x))), x)
        answers += [x[0 if first_row == "prompt" and batch.rows.tolist() == starts[:-1] else row - starts[b] + before] for row in rows.tolist()]
    x = torch.stack(answers)
    if head == "class":
        return torch.tanh(x @ p["classifier.dense.weight"].T + p["classifier.dense.bias"]) @ p["classifier.output.weight"].T + p["classifier.output.bias"]
    return norm_of("mlm.norm")(activation(x @ p["mlm.dense.weight"].T + p["mlm.dense.bias"])) @ p["encoder.embeddings.word.weight"].T + p["mlm.bias"]


def assert_spelled_out(model: Model, batch: Batch, head: str, **changes) -> None:
    """The model with what is attached to it gives the logits of `spelled_out` with these changes, and every module parameter the same gradient."""
    owned = {f"{name}.{key}": p for name, method in model.methods.items() for key, p in method.parameters().items()}
    ours, expected = getattr(model, f"{head}_logits")(batch), spelled_out(model, batch, head, **changes)
    assert_close(ours, expected)
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    pairs = zip(*(torch.autograd.grad((logits * weights).sum(), list(owned.values())) for logits in (ours, expected)))
    for name, (found, wanted) in zip(owned, pairs):
        assert_close(found, wanted, f"gradient of {name}")


def changed_weights(model: Model, deltas: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's weights by our names with a delta added at each site (`layers.0.attention.key`, `layers.0.attention.norm.bias`), differentiable."""
    found = dict(model.encoder.named_parameters())
    for site, delta in deltas.items():
        stem, last = (site[:-5], "bias") if site.endswith(".bias") else (site, "weight")
        head, _, kind = stem.rpartition(".")
        third = ("query", "key", "value").index(kind) if kind in ("query", "key", "value") else None
        name = f"{stem if third is None else head + '.qkv'}.{last}"
        parts = [found[name]] if third is None else list(found[name].split(model.config.hidden))
        parts[third or 0] = parts[third or 0] + delta
        found[name] = torch.cat(parts)
    return found


# ---------------------------------------------------------------- peft

def twin(model: Model, head: str):
    """The transformers model with our model's weights, for masked-LM or classification."""
    from peftdebias.weights import to_foreign

    unlike = theirs(model.config.kind, {"mlm": "ForMaskedLM", "class": "ForSequenceClassification"}[head], layer_norm_eps=model.config.norm_eps)
    own = {name.removeprefix("encoder."): p.detach() for name, p in model.named_parameters()
           if name.startswith(("encoder.", {"mlm": "mlm.", "class": "classifier."}[head]))}
    lacking = unlike.load_state_dict(to_foreign(own, model.config), strict=False)
    assert not lacking.unexpected_keys and all(".decoder." in name for name in lacking.missing_keys), lacking  # a tied decoder is no tensor of its own
    return unlike


def with_peft(model: Model, head: str, config: str, **fields):
    """`twin` wrapped by peft with a new config of theirs, "LoraConfig" say, in float64 and eval mode."""
    peft = library("peft")
    return peft.get_peft_model(twin(model, head), getattr(peft, config)(**fields)).double().eval()


def our_site(model: Model, name: str) -> str:
    """`base_model.model.bert.encoder.layer.0.attention.self.key.lora_A...` -> `layers.0.attention.key`."""
    from peftdebias.weights import foreign_names

    return next(ours for ours, stem in foreign_names(model.config).items() if f".{stem}." in name)


def assert_equals_peft(model: Model, wrapped, pairs: dict[str, tuple], head: str, batch: Batch) -> None:
    """Same numbers in both, then the same logits and gradients. pairs: name -> (their parameter, our tensors -> theirs, our parameters)."""
    trained = {id(p) for name, p in wrapped.named_parameters() if p.requires_grad and "modules_to_save" not in name}
    assert trained == {id(parameter) for parameter, _, _ in pairs.values()}, "expected a partner for every parameter that peft trains"
    with torch.no_grad():
        for parameter, arrange, own in pairs.values():
            parameter.copy_(arrange(*own))
    ours = getattr(model, f"{head}_logits")(batch)
    expected = class_logits(wrapped, batch) if head == "class" else mlm_logits(wrapped, batch)
    assert_close(ours, expected)
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    (ours * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, (parameter, arrange, own) in pairs.items():
        assert_close(arrange(*(p.grad for p in own)), parameter.grad, f"gradient of {name}")
