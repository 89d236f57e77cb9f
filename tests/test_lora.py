"""LoRA read as a proof: nothing at the start, the dense formula, its gradients, merging, and what alone is trained."""

import copy
import dataclasses

import numpy
import pytest
import torch
import torch.nn.functional as F

from peftdebias import methods, patch
from peftdebias.batches import Sample, pack
from peftdebias.encoder import EncoderConfig, Model
from peftdebias.errors import AdapterError, ConfigError
from peftdebias.methods.lora import LoRA, LoRAConfig, lora_linear_ref
from peftdebias.sites import LINEARS, linear_shape, linear_sites

TINY = EncoderConfig(kind="bert", layers=3, hidden=21, heads=3, feed_forward=37, vocab=89, max_positions=23, dropout=0.0, attention_dropout=0.0)


def tiny_model(**changes) -> Model:
    model = Model(dataclasses.replace(TINY, **changes), mlm=True, labels=("a", "b", "c")).double().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model


def ragged_batch(lengths=(13, 1, 7), seed: int = 5):
    generator = numpy.random.default_rng(seed)
    return pack([Sample(generator.integers(5, 89, n), numpy.sort(generator.choice(n, size=min(n, 2), replace=False)), generator.integers(5, 89, min(n, 2)))
                 for n in lengths])


def trained_lora(model: Model, name: str = "gender", **options) -> LoRA:
    """Attached, with a B that is not zero."""
    method = methods.create("lora", model.config, options=options, seed=1)
    with torch.no_grad():
        for key, p in method.parameters().items():
            p.data = p.data.double()
            if key.endswith(".b"):
                p.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(key)))
    patch.attach(model, name, method)
    return method


def test_zero_b_changes_nothing():
    model, batch = tiny_model(), ragged_batch()
    before = model.mlm_logits(batch)
    patch.attach(model, "gender", methods.create("lora", model.config, options={"targets": tuple(k.split(".")[1] for k in LINEARS)}))
    model.double()
    torch.testing.assert_close(model.mlm_logits(batch), before, rtol=0, atol=1e-13)


@pytest.mark.parametrize("rank,out_width,in_width", [(1, 13, 7), (5, 37, 13), (8, 7, 37)])
def test_reference_is_the_dense_update(rank, out_width, in_width):
    x, w, b = torch.randn(11, in_width, dtype=torch.float64), torch.randn(out_width, in_width, dtype=torch.float64), torch.randn(out_width, dtype=torch.float64)
    low, up = torch.randn(rank, in_width, dtype=torch.float64), torch.randn(out_width, rank, dtype=torch.float64)
    torch.testing.assert_close(lora_linear_ref(x, w, b, low, up, 1.7), F.linear(x, w + 1.7 * up @ low, b), rtol=1e-12, atol=1e-12)


def test_reference_gradients():
    tensors = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 7), (5, 7), (5,), (2, 7), (5, 2))]
    assert torch.autograd.gradcheck(lambda x, w, b, low, up: lora_linear_ref(x, w, b, low, up, 0.6), tensors)


@pytest.mark.parametrize("targets", [("query", "value"), ("key",), ("output", "up", "down"), ("feed_forward.down", "attention.query")])
def test_attached_equals_dense_weights(targets):
    model, batch = tiny_model(), ragged_batch()
    method = trained_lora(model, targets=targets)
    attached = model.mlm_logits(batch)
    dense = tiny_model()
    with torch.no_grad():
        for site in method.sites(dense.config):
            _, parameter, rows = patch.parameter_at(dense, site)
            parameter[rows] += method.config.scale * method.values[site + ".b"] @ method.values[site + ".a"]
    torch.testing.assert_close(attached, dense.mlm_logits(batch), rtol=1e-10, atol=1e-10)


def test_only_a_and_b_are_trained():
    model, batch = tiny_model(), ragged_batch()
    method = trained_lora(model)
    patch.train_only(model, method.parameters().values())
    F.cross_entropy(model.mlm_logits(batch), batch.targets).backward()
    with_gradient = {name for name, p in patch.all_parameters(model).items() if p.grad is not None}
    assert with_gradient == {f"methods.gender.{site}.{x}" for site in linear_sites(TINY, ("attention.query", "attention.value")) for x in "ab"}


def test_nothing_is_computed_below_the_lowest_trained_site():
    model, batch = tiny_model(), ragged_batch()
    method = trained_lora(model)
    top = [p for name, p in method.parameters().items() if name.startswith("layers.2.")]
    patch.train_only(model, top)
    seen = []
    original = model.encoder._layer
    model.encoder._layer = lambda i, hidden, *rest: seen.append((i, hidden.requires_grad)) or original(i, hidden, *rest)
    F.cross_entropy(model.mlm_logits(batch), batch.targets).backward()
    assert seen == [(0, False), (1, False), (2, False)]
    assert all(p.grad is not None for p in top)


def test_merge_keeps_outputs_and_unmerge_gives_the_bits_back():
    model, batch = tiny_model(), ragged_batch()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plain = model.mlm_logits(batch)
    trained_lora(model)
    attached = model.mlm_logits(batch)
    patch.merge(model)
    torch.testing.assert_close(model.mlm_logits(batch), attached, rtol=1e-10, atol=1e-10)
    with model.without("gender"):
        assert torch.equal(model.mlm_logits(batch), plain)
    torch.testing.assert_close(model.mlm_logits(batch), attached, rtol=1e-10, atol=1e-10)
    patch.unmerge(model)
    assert torch.equal(model.mlm_logits(batch), attached)
    patch.detach(model, "gender")
    assert torch.equal(model.mlm_logits(batch), plain)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_two_axes_add_up():
    model, batch = tiny_model(), ragged_batch()
    first, second = trained_lora(model, "gender", rank=2), trained_lora(model, "race", rank=5, targets=("query", "down"))
    both = model.mlm_logits(batch)
    dense = tiny_model()
    with torch.no_grad():
        for method in (first, second):
            for site in method.sites(dense.config):
                _, parameter, rows = patch.parameter_at(dense, site)
                parameter[rows] += method.delta(site)
    torch.testing.assert_close(both, dense.mlm_logits(batch), rtol=1e-10, atol=1e-10)
    with model.without("gender"):
        alone = model.mlm_logits(batch)
    patch.detach(model, "gender")
    assert torch.equal(model.mlm_logits(batch), alone)


def test_state_survives_save_and_load_bit_for_bit():
    model = tiny_model()
    state = trained_lora(model).state()
    other = methods.create("lora", TINY, seed=9)
    for p in other.parameters().values():
        p.data = p.data.double()
    other.load(copy.deepcopy(state))
    assert all(torch.equal(state[name], tensor) for name, tensor in other.state().items())


def test_same_seed_same_module():
    one, two, three = (methods.create("lora", TINY, seed=s).state() for s in (4, 4, 5))
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert not torch.equal(one["layers.0.attention.query.a"], three["layers.0.attention.query.a"])


@pytest.mark.parametrize("budget", [0.003, 0.01, 0.1])
def test_budget_is_the_nearest_rank(budget):
    method = methods.create("lora", TINY, budget=budget)
    base = sum(p.numel() for p in Model(TINY).encoder.parameters())
    assert methods.base_parameters(TINY) == base
    count = lambda m: sum(p.numel() for p in m.parameters().values())  # noqa: E731
    per_rank = sum(sum(linear_shape(TINY, s)) for s in method.sites(TINY))
    assert count(method) == method.config.rank * per_rank
    if method.config.rank > 1:
        assert abs(count(method) - budget * base) <= per_rank / 2 + 1
    else:
        assert budget * base <= 1.5 * per_rank + 1


@pytest.mark.parametrize("options,budget,words", [
    ({"rank": 0}, None, "lora rank: expected at least 1, got 0"),
    ({"targets": ("quary",)}, None, "lora targets: expected some of query, key, value, output, up, down, got 'quary'"),
    ({"ranks": 3}, None, "lora option 'ranks': expected one of rank, alpha, targets"),
    ({"rank": 3}, 0.01, "budget: chooses lora's rank; expected no rank beside it"),
    ({}, 1.5, "budget: expected a share between 0 and 1, got 1.5"),
])
def test_errors(options, budget, words):
    with pytest.raises(ConfigError, match=words):
        methods.create("lora", TINY, options=options, budget=budget)


def test_other_methods_and_fixed_sizes_are_named():
    with pytest.raises(ConfigError, match="method: expected one of lora, full, got 'qlora'"):
        methods.create("qlora", TINY)
    with pytest.raises(ConfigError, match="budget: full has a fixed size"):
        methods.create("full", TINY, budget=0.01)
    with pytest.raises(AdapterError, match="full is a base model, not a module; expected it as --model"):
        patch.attach(tiny_model(), "gender", methods.create("full", TINY))


def test_load_names_the_shape_that_differs():
    method = methods.create("lora", TINY)
    state = method.state() | {"layers.1.attention.value.b": torch.zeros(21, 7)}
    with pytest.raises(AdapterError, match=r"layers.1.attention.value.b: expected shape \[21, 8\], got \[21, 7\]"):
        method.load(state)
    with pytest.raises(AdapterError, match="expected tensors 12 by name, got 11; first that differs: layers.1.attention.value.b"):
        method.load({k: v for k, v in state.items() if k != "layers.1.attention.value.b"})


def test_single_target_and_scale():
    assert LoRAConfig(rank=4, alpha=6).scale == 1.5
    assert LoRAConfig(rank=4).scale == 2.0
    assert LoRAConfig(targets=("value", "query")).targets == ("attention.query", "attention.value")


def test_equals_peft():
    """Same A and B: outputs and the gradients of A and B."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    from peftdebias.weights import to_foreign

    model, batch = tiny_model(), ragged_batch()
    method = trained_lora(model, rank=5, alpha=7)
    patch.train_only(model, method.parameters().values())
    F.cross_entropy(model.mlm_logits(batch), batch.targets).backward()

    c = TINY
    theirs = transformers.BertForMaskedLM(transformers.BertConfig(
        vocab_size=c.vocab, hidden_size=c.hidden, num_hidden_layers=c.layers, num_attention_heads=c.heads, intermediate_size=c.feed_forward,
        max_position_embeddings=c.max_positions, hidden_dropout_prob=0, attention_probs_dropout_prob=0)).double().eval()
    ours = {n.removeprefix("encoder."): p.detach() for n, p in model.named_parameters() if not n.startswith("classifier")}
    missing = theirs.load_state_dict(to_foreign(ours, c), strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=5, lora_alpha=7, lora_dropout=0.0, target_modules=["query", "value"]))
    pairs = []
    for name, p in wrapped.named_parameters():
        if "lora_" in name:
            layer, kind = name.split(".layer.")[1].split(".")[0], name.split(".attention.self.")[1].split(".")[0]
            own = method.values[f"layers.{layer}.attention.{kind}.{'a' if 'lora_A' in name else 'b'}"]
            p.data = own.detach().clone()
            pairs.append((p, own))
    assert len(pairs) == 12

    longest = batch.max_length
    ids, mask = torch.zeros(3, longest, dtype=torch.long), torch.zeros(3, longest, dtype=torch.long)
    starts = batch.cu_seqlens.tolist()
    for i, n in enumerate(batch.lengths):
        ids[i, :n], mask[i, :n] = batch.ids[starts[i]:starts[i + 1]], 1
    logits = wrapped(input_ids=ids, attention_mask=mask).logits[mask.bool()][batch.rows]
    torch.testing.assert_close(model.mlm_logits(batch), logits, rtol=1e-10, atol=1e-10)
    F.cross_entropy(logits, batch.targets).backward()
    for theirs_p, own in pairs:
        torch.testing.assert_close(own.grad, theirs_p.grad, rtol=1e-9, atol=1e-12)
