"""What every method must hold, whatever it is: one table of methods and options, each proof run on all of them.

Neutral at the start where it says so, gradients to its own parameters only, files bit for bit, the base bitwise back after detach, merged or refused by
name, `without`, the size nearest to a budget. What a method computes is proved in its own file.
"""

import dataclasses
import itertools
import types
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from peftdebias import methods, patch
from peftdebias.encoder import Model
from peftdebias.errors import AdapterError, ConfigError
from peftdebias.methods import METHODS, base_parameters, create, method_class
from peftdebias.sites import LINEARS, EncoderConfig

from .outside import assert_close, assert_spelled_out, attached, batch_for, changed_weights, drawn_model, one_thread

ALL = tuple(kind.split(".")[1] for kind in LINEARS)
CASES = {
    "lora": ("lora", {}),
    "lora everywhere": ("lora", {"rank": 3, "alpha": 5.0, "targets": ALL, "rank_stabilized": True, "dropout": 0.5}),
    "adapter": ("adapter", {"bottleneck": 5}),
    "adapter houlsby": ("adapter", {"architecture": "houlsby", "bottleneck": 5}),
    "adapter parallel": ("adapter", {"architecture": "parallel", "bottleneck": 5, "activation": "gelu"}),
    "prefix": ("prefix", {"length": 5}),
    "prefix positioned": ("prefix", {"length": 5, "positioned": True}),
    "prefix reparametrised": ("prefix", {"length": 5, "reparametrised": True, "inner": 11}),
    "prompt": ("prompt", {"length": 5}),
    "prompt positioned": ("prompt", {"length": 5, "positioned": True, "first_row": "prompt"}),
    "ia3": ("ia3", {}),
    "ia3 of peft": ("ia3", {"inputs": ("attention.output", "feed_forward.down")}),
    "bias": ("bias", {}),
}
NEUTRAL = {"lora", "adapter", "ia3", "bias"}
MERGEABLE = {"lora": True, "bias": True, "ia3": False}  # name -> foldable too
SIZES = {"lora": "rank", "adapter": "bottleneck", "prefix": "length", "prompt": "length"}
every = pytest.mark.parametrize("method,options", CASES.values(), ids=CASES)
SHAPE = drawn_model().config


def outputs(model: Model) -> list[torch.Tensor]:
    return [model.mlm_logits(batch_for(model, "mlm")), model.class_logits(batch_for(model, "class"))]


def close(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)


def same(found, expected) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def bits(model: Model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_the_table_has_every_method_of_these_rooms():
    assert {name for name, _ in CASES.values()} | {"sparse", "full"} == set(METHODS)  # what these two hold is what training chose: test_every_method.py
    assert {name for name in METHODS if method_class(name).name != name} == set()


# ---------------------------------------------------------------- on and off

@every
def test_untrained_it_changes_nothing_where_its_file_says_so(method, options):
    model = drawn_model()
    before = outputs(model)
    attached(model, "gender", method, untrained=True, **options)
    if method in NEUTRAL:
        close(outputs(model), before)
    else:
        assert all((one - other).abs().max() > 1e-4 for one, other in zip(outputs(model), before))


@every
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_detached_the_model_is_bitwise_what_it_was(kind, method, options):
    model = drawn_model(kind)
    before, tensors = outputs(model), bits(model)
    module = attached(model, "gender", method, **options)
    assert all((one - other).abs().max() > 1e-3 for one, other in zip(outputs(model), before))
    assert patch.detach(model, "gender") is module
    assert same(outputs(model), before)
    assert all(torch.equal(p, tensors[name]) for name, p in model.named_parameters())


@every
def test_without_is_the_model_without_it(method, options):
    """Two of a kind: what is on with the other off is what is there with the other never attached, bit for bit."""
    both = drawn_model()
    for seed, name in enumerate(("gender", "race"), 1):
        attached(both, name, method, seed, **options)
    together = outputs(both)
    for seed, (name, other) in enumerate((("gender", "race"), ("race", "gender")), 1):
        alone = drawn_model()
        attached(alone, name, method, seed, **options)
        with both.without(other):
            assert same(outputs(both), outputs(alone))
    with both.without("gender", "race"):
        assert same(outputs(both), outputs(drawn_model()))
    assert same(outputs(both), together)
    assert all((one - other).abs().max() > 1e-3 for one, other in zip(together, outputs(alone)))


@every
def test_rows_asked_for_equal_all_rows(method, options):
    model = drawn_model()
    module = attached(model, "gender", method, **options)
    batch = batch_for(model, "mlm")
    everything = model.encoder(batch, all_rows=True)
    inserted = (len(everything) - len(batch.ids)) // len(batch.lengths)
    assert inserted == (options["length"] if method == "prompt" else 0) and module.position_shift in (0, options.get("length"))
    owners = torch.repeat_interleave(torch.arange(len(batch.lengths)), torch.tensor(batch.row_lengths))
    assert_close(model.encoder(batch), everything[batch.rows + (owners + 1) * inserted])


# ---------------------------------------------------------------- training

@every
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_all_of_its_parameters_are_trained_and_no_others(kind, method, options):
    model = drawn_model(kind)
    attached(model, "race", "lora")
    module = attached(model, "gender", method, **options)
    patch.train_only(model, module.parameters().values())
    batch = batch_for(model, "mlm")
    F.cross_entropy(model.mlm_logits(batch), batch.targets).backward()
    gradients = {name: p.grad for name, p in patch.all_parameters(model).items() if p.grad is not None}
    assert set(gradients) == {f"methods.gender.{name}" for name in module.parameters()}
    for name, gradient in gradients.items():
        of_no_effect = name.endswith("key.bias") and method == "bias"  # see methods/bias.py
        assert (gradient.abs().max() < 1e-14) if of_no_effect else (gradient.abs().max() > 1e-6), name


@every
def test_a_step_of_training_changes_the_module_alone(method, options):
    model = drawn_model()
    module = attached(model, "gender", method, **options)
    tensors, start = bits(model), {name: p.detach().clone() for name, p in module.parameters().items()}
    patch.train_only(model, module.parameters().values())
    batch = batch_for(model, "mlm")
    model.train()
    F.cross_entropy(model.mlm_logits(batch), batch.targets).backward()
    torch.optim.AdamW([p for p in patch.all_parameters(model).values() if p.requires_grad], lr=1e-2).step()
    assert all(torch.equal(p, tensors[name]) for name, p in model.named_parameters())
    assert not any(torch.equal(p, start[name]) for name, p in module.parameters().items())


def test_same_seed_same_module():
    for method, options in CASES.values():
        one, two, three = (create(method, SHAPE, options=options, seed=s).state() for s in (4, 4, 5))
        assert list(one) == list(two) and all(torch.equal(one[n], two[n]) for n in one)
        assert method in ("ia3", "bias") or any(not torch.equal(one[n], three[n]) for n in one)


# ---------------------------------------------------------------- files

@every
def test_saved_loaded_and_saved_again_it_is_the_same_file(method, options, tmp_path):
    model = drawn_model()
    module = attached(model, "gender", method, **options)
    expected = outputs(model)
    safetensors.torch.save_file(module.state(), tmp_path / "one.safetensors")
    config = type(module.config)(**dataclasses.asdict(module.saved_config()))
    assert config == module.saved_config()
    other = type(module)(config, model.config)
    for parameter in other.parameters().values():
        parameter.data = parameter.data.double()
    other.load(safetensors.torch.load_file(tmp_path / "one.safetensors"))
    safetensors.torch.save_file(other.state(), tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    patch.detach(model, "gender")
    patch.attach(model, "gender", other)
    assert same(outputs(model), expected)
    assert other.count() == module.count() == sum(tensor.numel() for tensor in module.state().values())


@every
def test_a_file_that_does_not_fit_is_refused_by_name(method, options):
    module = create(method, SHAPE, options=options)
    module = type(module)(module.saved_config(), SHAPE)
    state = module.state()
    last = list(state)[-1]
    with pytest.raises(AdapterError, match=f"{method} adapter: expected tensors {len(state)} by name, got {len(state) - 1}; first that differs: {last}"):
        module.load({name: tensor for name, tensor in state.items() if name != last})
    with pytest.raises(AdapterError, match=rf"{method} adapter, {last}: expected shape \[.*\], got \[13\]"):
        module.load(state | {last: torch.zeros(13)})
    for given, got in ((None, "NoneType"), (list(state), "list"), (state | {last: None}, f"NoneType for '{last}'"), (state | {3: state[last]}, "Tensor for 3")):
        with pytest.raises(AdapterError, match=f"^{method} adapter: expected tensors by name, got {got}$"):
            module.load(given)
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state().items())


# ---------------------------------------------------------------- merging

@every
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_merged_it_gives_the_same_outputs_or_is_refused_by_name(kind, method, options):
    model = drawn_model(kind)
    module = attached(model, "gender", method, **options)
    attachedly, tensors = outputs(model), bits(model)
    assert (module.mergeable, module.foldable) == (method in MERGEABLE, MERGEABLE.get(method, False))
    if not module.mergeable:
        with pytest.raises(AdapterError, match=f"merge 'gender': {method} cannot be written into the weights with the same outputs"):
            patch.merge(model)
        assert same(outputs(model), attachedly)
        return
    patch.merge(model)
    assert not any(model.encoder.hooks.at(site) for site in module.sites(model.config))
    close(outputs(model), attachedly)
    with model.without("gender"):
        assert same(outputs(model), outputs(drawn_model(kind)))
    patch.unmerge(model)
    assert same(outputs(model), attachedly)
    assert all(torch.equal(p, tensors[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("order", list(itertools.permutations(("lora", "ia3", "bias"))), ids=" ".join)
def test_mergeable_methods_merge_together_in_any_order(order):
    """The deltas first, then what scales them, whatever came first."""
    model = drawn_model()
    for seed, method in enumerate(order, 1):
        attached(model, method, method, seed, **({"targets": ALL} if method == "lora" else {}))
    expected, tensors = outputs(model), bits(model)
    patch.merge(model)
    close(outputs(model), expected)
    patch.unmerge(model)
    assert all(torch.equal(p, tensors[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("staying,options", [("lora", {"targets": ("key",)}), ("lora", {"targets": ("down",)}), ("bias", {})])
def test_what_is_scaled_is_not_merged_alone(staying, options):
    """l * (x (W + D)^T + b + d) is not l * (x W^T + b) with D and d added."""
    model = drawn_model()
    attached(model, "gender", "ia3")
    attached(model, "race", staying, **options)
    expected = outputs(model)
    with pytest.raises(AdapterError, match="merge 'gender': it scales layers.0.*, where another method acts; expected that one to be merged too"):
        patch.merge(model, "gender")
    assert same(outputs(model), expected)
    patch.merge(model, "race")  # the other way round is exact
    close(outputs(model), expected)


def test_a_bias_where_inputs_are_scaled_may_stay():
    model = drawn_model()
    attached(model, "gender", "ia3", outputs=(), inputs=("output", "down"))
    attached(model, "race", "bias")
    expected = outputs(model)
    patch.merge(model, "gender")
    close(outputs(model), expected)


# ---------------------------------------------------------------- composing

@pytest.mark.parametrize("head", ["mlm", "class"])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_all_kinds_at_once(kind, head):
    """Each as it would act alone on what the others give; the gradients of all of them too."""
    model = drawn_model(kind)
    lora, adapter = attached(model, "a", "lora", 1, targets=("key", "down")), attached(model, "b", "adapter", 2, bottleneck=5)
    prefix, prompt = attached(model, "c", "prefix", 3, length=4), attached(model, "d", "prompt", 4, length=3)
    ia3, bias, shifted = attached(model, "e", "ia3", 5), attached(model, "f", "bias", 6), attached(model, "g", "prefix", 7, length=2, positioned=True)

    def linear(site, x, weight, bias):
        if site.endswith("down"):
            x = x * ia3.values[site]
        y = x @ weight.T + bias
        return y * ia3.values[site] if site.endswith(("key", "value")) else y

    def block(site, hidden, residual, norm):
        v = {name.removeprefix(site + "."): p for name, p in adapter.values.items()}
        if site.endswith("feed_forward"):
            hidden = hidden + F.relu(norm(hidden + residual) @ v["down.weight"].T + v["down.bias"]) @ v["up.weight"].T + v["up.bias"]
        return hidden

    def prefixes(i):
        return [torch.cat([m.values[f"layers.{i}.{part}"] for m in (prefix, shifted)]) for part in ("key", "value")]

    deltas = {site: 2 * lora.values[site + ".b"] @ lora.values[site + ".a"] for site in lora.sites(model.config)} | bias.values
    assert_spelled_out(model, batch_for(model, head), head, weights=changed_weights(model, deltas), linear=linear, block=block, prefix=prefixes,
                       prompt=prompt.values["vectors"], shift=2)


@pytest.mark.parametrize("names", [("a",), ("b",), ("c", "d"), ("a", "c", "e")])
def test_any_of_many_kinds_can_be_off(names):
    kinds = dict(a="lora", b="adapter", c="prefix", d="prompt", e="ia3")
    model, fewer = drawn_model(), drawn_model()
    for seed, (name, method) in enumerate(kinds.items(), 1):
        attached(model, name, method, seed)
        if name not in names:
            attached(fewer, name, method, seed)
    with model.without(*names):
        assert same(outputs(model), outputs(fewer))


# ---------------------------------------------------------------- sizes

SHAPES = {"toy": SHAPE, "bert-base": EncoderConfig(kind="bert", layers=12, hidden=768, heads=12, feed_forward=3072, vocab=30522, max_positions=512)}
SIZED = {name: case for name, case in CASES.items() if case[0] in SIZES}


@pytest.mark.parametrize("name", SIZED)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("budget", [0.0007, 0.01, 0.013, 0.11])
def test_no_other_size_is_nearer_to_the_budget(name, shape, budget):
    """Every size from 1 to twice the chosen one and some; the cap of prompts is another test's."""
    method, options = SIZED[name]
    config, cls, size = SHAPES[shape], method_class(method), SIZES[method]
    chosen = {key: value for key, value in options.items() if key != size}
    target = round(budget * base_parameters(config))
    found = getattr(cls.size_for(config, target, **chosen), size)
    apart = [abs(cls.parameters_for(cls.Config(**chosen, **{size: n}), config) - target) for n in range(1, 2 * found + 9)]
    assert apart[found - 1] == min(apart)


@every
def test_the_count_is_what_is_saved(method, options):
    module = create(method, SHAPE, options=options)
    assert module.count() == sum(tensor.numel() for tensor in module.state().values())
    if method in SIZES:
        assert module.count() == module.parameters_for(module.config, SHAPE)


def test_the_base_that_a_budget_is_a_share_of():
    for kind in ("bert", "roberta"):  # whose first two positions no text has
        model = drawn_model(kind)
        assert base_parameters(model.config) == sum(p.numel() for p in model.encoder.parameters())


def test_what_a_method_is_where_nobody_says():
    """The defaults that the methods' files and `peftdebias methods` tell of."""
    made = {name: method_class(name).Config() for name in METHODS}
    assert (made["lora"].rank, made["lora"].alpha, made["lora"].targets, made["lora"].dropout) == (8, None, ("attention.query", "attention.value"), 0.0)
    assert (made["adapter"].architecture, made["adapter"].bottleneck, made["adapter"].activation, made["adapter"].scale) == ("pfeiffer", 16, "relu", 1.0)
    assert (made["prefix"].length, made["prefix"].reparametrised, made["prefix"].inner, made["prefix"].positioned) == (30, False, 512, False)
    assert (made["prompt"].length, made["prompt"].positioned, made["prompt"].first_row) == (20, False, "text")
    assert (made["ia3"].outputs, made["ia3"].inputs) == (("attention.key", "attention.value"), ("feed_forward.down",))
    assert (made["sparse"].k, made["sparse"].l1, made["sparse"].first_rate) == (None, 0.1, 1.0)


def test_what_is_drawn_has_the_spread_that_its_file_says():
    config = dataclasses.replace(SHAPES["bert-base"], initializer_range=0.05)
    flat, mlp, prompt, lora = (create(name, config, options=options).values for name, options in (
        ("prefix", {"length": 20}), ("prefix", {"length": 20, "reparametrised": True, "inner": 100}), ("prompt", {"length": 100}), ("lora", {"rank": 50})))
    a = next(value for name, value in lora.items() if value.shape == (50, 768))
    assert a.abs().max() <= 768 ** -0.5
    for drawn, spread in ((flat["layers.3.value"], 0.05), (flat["layers.0.key"], 0.05), (prompt["vectors"], 0.05), (a, 768 ** -0.5 / 3 ** 0.5), (mlp["embedding"], 1.0),
                          (mlp["down.weight"], 768 ** -0.5 / 3 ** 0.5), (mlp["up.weight"], 100 ** -0.5 / 3 ** 0.5)):  # uniform in +-b: b / sqrt(3)
        n = drawn.numel()
        assert abs(drawn.std().item() / spread - 1) < 4 / (2 * n) ** 0.5 and abs(drawn.mean().item()) < 4 * spread / n ** 0.5


def test_one_per_cent_of_bert_base():
    """The sizes that PAPER.md's comparison comes to; prompt is capped, and says by its count how far it got."""
    base = SHAPES["bert-base"]
    modules = {name: create(name, base, budget=0.01) for name in SIZES}
    assert {name: getattr(m.config, SIZES[name]) for name, m in modules.items()} == {"lora": 30, "adapter": 59, "prefix": 59, "prompt": 256}
    reached = {name: round(100 * m.count() / base_parameters(base), 2) for name, m in modules.items()}
    assert reached == {"lora": 1.02, "adapter": 1.01, "prefix": 1.0, "prompt": 0.18}


def test_the_documented_method(tmp_path, monkeypatch):
    """docs/design.md: a file and a line make a method that is made, checked, saved and merged like any other."""
    page = (Path(__file__).resolve().parent.parent / "docs" / "design.md").read_text(encoding="utf-8")
    (tmp_path / "gain.py").write_text(page.split("```python\n")[1].split("```")[0])
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    monkeypatch.setitem(METHODS, "gain", "Gain")
    model = drawn_model()
    before, method = outputs(model), create("gain", model.config, options={"linears": ["feed_forward.up", "attention.value"]})
    patch.attach(model, "x", method)
    close(outputs(model), before)
    assert method.count() == model.config.layers * (model.config.feed_forward + model.config.hidden)
    again = methods.restored(type(method), method.config, model.config, {name: 1.5 * tensor for name, tensor in method.state().items()})
    patch.detach(model, "x")
    patch.attach(model, "x", again)
    unmerged = outputs(model)
    patch.merge(model)
    close(outputs(model), unmerged)
    assert (unmerged[0] - before[0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", METHODS)
def test_fixed_sizes_are_named_and_chosen_ones_too(name):
    size = method_class(name).size
    assert (size is None) == (name in ("ia3", "bias", "full"))
    if size is None:
        with pytest.raises(ConfigError, match=f"budget: {name} has a fixed size; expected no budget"):
            create(name, SHAPE, budget=0.01)
    else:
        with pytest.raises(ConfigError, match=f"budget: chooses {name}'s {size}; expected no {size} beside it"):
            create(name, SHAPE, budget=0.01, options={size: 3})


def test_what_works_as_a_number_or_a_table_is_taken():
    made = methods.create("lora", SHAPE, options=types.MappingProxyType({"rank": 2}), seed=numpy.int64(3))
    other = methods.create("lora", SHAPE, options={"rank": 2}, seed=3)
    assert made.config == other.config and all(torch.equal(one, two) for one, two in zip(made.values.values(), other.values.values()))
    assert methods.create("lora", SHAPE, budget=numpy.float32(0.05)).config == methods.create("lora", SHAPE, budget=0.05).config


@pytest.mark.parametrize("name,options,budget,words", [
    ("qlora", {}, None, f"method: expected one of {', '.join(METHODS)}, got 'qlora'"),
    ("lora", {}, 1.5, "budget: expected a share between 0 and 1, got 1.5"),
    ("lora", {}, "0.1", "budget: expected a share between 0 and 1, got '0.1'"),
    ("lora", ["rank"], None, "create 'lora': options: expected a dict of LoRAConfig's fields, got list"),
    ("bias", {"rank": 3}, None, "bias options: unknown key 'rank'; expected none"),
    ("lora", {"rank": 1.5}, None, "lora options: rank: expected a whole number, got 1.5"),
    ("lora", {"alpha": -3}, None, "lora alpha: expected a finite number of more than 0, got -3"),
    ("lora", {"alpha": float("inf")}, None, "lora alpha: expected a finite number of more than 0, got inf"),
    ("adapter", {"scale": float("nan")}, None, "adapter scale: expected a finite number, got nan"),
    ("sparse", {"l1": float("nan")}, None, "sparse l1: expected a finite number of at least 0, got nan"),
    ("sparse", {"k": 10**12}, None, "sparse k: expected at most [0-9]+, the weights there are, got 1000000000000"),
    ("lora", {"rank": 10**9}, None, "lora: expected a module of at most 16,777,216 parameters, got [0-9,]+, by LoRAConfig.rank=1000000000"),
    ("prefix", {"length": 10**7}, None, "prefix: expected a module of at most"),
    ("prefix", {"reparametrised": True, "inner": 10**9}, None, "prefix: expected a module of at most"),
    ("prompt", {"length": 10**8}, None, "prompt: expected a module of at most"),
    ("adapter", {"bottleneck": 10**8}, None, "adapter: expected a module of at most"),
])
def test_errors(name, options, budget, words, little_memory):
    with pytest.raises(ConfigError, match=words):
        methods.create(name, SHAPE, options=options, budget=budget)


def test_options_may_be_what_a_config_holds():
    """None where that is the default, and numpy's numbers."""
    lora = methods.create("lora", SHAPE, options={"rank": numpy.int64(2), "alpha": None})
    assert methods.create("lora", SHAPE, options=dataclasses.asdict(lora.config)).config == lora.config and lora.config.rank == 2
    assert methods.create("sparse", SHAPE, options={"k": None}).count() > 0
    assert methods.create("sparse", SHAPE, budget=0.999).count() == method_class("sparse").most(SHAPE)
    with pytest.raises(ConfigError, match="create 'lora': seed: expected a whole number from 0"):
        methods.create("lora", SHAPE, seed=2**70)


def test_making_and_restoring_draw_from_no_generator_of_torchs():
    torch.manual_seed(0)
    expected = torch.rand(1)
    for name in METHODS:
        torch.manual_seed(0)
        made = methods.create(name, SHAPE, budget=None if method_class(name).size is None else 0.05)
        if not made.trains_base and name != "sparse":
            methods.restored(type(made), made.config, SHAPE, made.state())
        assert torch.equal(torch.rand(1), expected), name


@pytest.mark.parametrize("name,options,length,words", [
    (["lora"], None, 256, "method: expected one of"), ("lora", {5: 1}, 256, "create 'lora': options: expected a dict of LoRAConfig's fields, got dict"),
    ("prompt", None, None, "create 'prompt': max_length: expected a whole number of at least 1, got None"),
    ("prompt", None, 0, "create 'prompt': max_length: expected a whole number of at least 1, got 0"),
])  # fmt: skip
def test_what_is_no_name_or_length_is_named(name, options, length, words):
    with pytest.raises(ConfigError, match=words):
        methods.create(name, SHAPE, options=options, max_length=length)


def test_a_length_of_numpys_is_kept_as_pythons():
    assert type(methods.create("prompt", SHAPE, budget=0.2, max_length=numpy.int64(5)).config.length) is int


def test_what_has_no_sizes_is_named():
    with pytest.raises(ConfigError, match="create 'lora': expected an EncoderConfig, as model.config is, got NoneType"):
        methods.create("lora", None)


@pytest.mark.parametrize("name", [n for n in METHODS if n != "full"])
@pytest.mark.parametrize("size", ["layers", "hidden", "heads", "feed_forward", "vocab", "max_positions", "segments", "position_offset"])
def test_a_module_of_another_base_does_not_attach(name, size):
    """Its own sites decide: a table that it does not touch may have another height."""
    value = 1 if size == "heads" else 2 * getattr(SHAPE, size) or 2
    other = dataclasses.replace(SHAPE, **{size: value})
    model, tables = Model(SHAPE), size in ("vocab", "max_positions", "segments", "position_offset")
    method = methods.create(name, other)
    if tables and name != "sparse":
        patch.attach(model, "gender", method)
        assert list(model.methods) == ["gender"]
        return
    with pytest.raises(AdapterError, match=f"^attach 'gender': {name} was made for {size} {value}; expected {getattr(SHAPE, size)}, as the model has$"):
        patch.attach(model, "gender", method)
    assert model.methods == {}


def test_what_is_no_method_does_not_attach():
    with pytest.raises(AdapterError, match=r"^attach 'gender': expected a method, as methods.create\(\) makes one, got str$"):
        patch.attach(Model(SHAPE), "gender", "lora")


def test_a_module_may_be_as_large_as_its_base(monkeypatch):
    monkeypatch.setattr(methods, "LARGEST", 0)
    assert methods.create("lora", drawn_model().config, options={"rank": 1}).count() > 0


def test_numbers_that_are_too_large_for_the_module_are_refused():
    module = methods.create("lora", drawn_model().config)
    state = {name: tensor.double() for name, tensor in module.state().items()}
    next(iter(state.values()))[0, 0] = 1e300
    with pytest.raises(AdapterError, match="expected finite numbers, got 1 of .* that are NaN or infinite in float32"):
        module.load(state)


def test_gradients_of_a_module_go_with_the_model():
    model = drawn_model()
    parameters = attached(model, "gender", "lora").parameters().values()
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    model.float()
    assert {p.dtype for p in parameters} == {p.grad.dtype for p in parameters} == {torch.float32}
