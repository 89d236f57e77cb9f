"""Modules on models that are not ours: transformers' BERT and RoBERTa, and a user's own in plain torch, with the outputs of our own model."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from peftdebias import attach_to, checkpoint, foreign, methods, patch
from peftdebias.encoder import Model
from peftdebias.errors import AdapterError
from peftdebias.weights import ENCODER_NAMES, to_foreign

from .outside import assert_close, attached, drawn_model, mlm_logits, one_thread, padded, pair, ragged  # noqa: F401
from .test_padded import in_rectangle, sparse

MODULES = {
    "lora": dict(targets=("query", "key", "value", "output", "up", "down"), rank=3),
    "sparse": {},
    "ia3": dict(outputs=("key", "value", "up"), inputs=("down", "output")),
    "bias": {},
}
CASES = [(name,) for name in MODULES] + [("ia3", "lora", "sparse", "bias"), ("bias", "lora", "ia3")]


def attach_ours(model: Model, names: tuple[str, ...]) -> list:
    return [sparse(model, name) if name == "sparse" else attached(model, name, name, **MODULES[name]) for name in names]


class Block(nn.Module):
    def __init__(self, hidden: int, inner: int):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden) for _ in range(4))
        self.up, self.down = nn.Linear(hidden, inner), nn.Linear(inner, hidden)
        self.norm1, self.norm2 = nn.LayerNorm(hidden, eps=1e-12), nn.LayerNorm(hidden, eps=1e-12)


class Own(nn.Module):
    """A BERT as a user may write it: names of their own, a decoder tied to the embedding."""

    def __init__(self, c):
        super().__init__()
        self.heads, self.words = c.heads, nn.Embedding(c.vocab, c.hidden)
        self.places, self.kinds = nn.Embedding(c.max_positions, c.hidden), nn.Embedding(c.segments, c.hidden)
        self.norm, self.blocks = nn.LayerNorm(c.hidden, eps=1e-12), nn.ModuleList(Block(c.hidden, c.feed_forward) for _ in range(c.layers))
        self.decoder = nn.Linear(c.hidden, c.vocab, bias=False)
        self.decoder.weight = self.words.weight

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(self.words(ids) + self.places(torch.arange(ids.shape[1])) + self.kinds(torch.zeros_like(ids)))
        for block in self.blocks:
            q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (block.q, block.k, block.v))
            x = block.norm1(x + block.o(F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None]).transpose(1, 2).flatten(2)))
            x = block.norm2(x + block.down(F.gelu(block.up(x))))
        return x


NAMES = {"embeddings.word": "words", "embeddings.position": "places", "embeddings.segment": "kinds", "embeddings.norm": "norm",
         "layers.{i}.attention.query": "blocks.{i}.q", "layers.{i}.attention.key": "blocks.{i}.k", "layers.{i}.attention.value": "blocks.{i}.v",
         "layers.{i}.attention.output": "blocks.{i}.o", "layers.{i}.attention.norm": "blocks.{i}.norm1", "layers.{i}.feed_forward.up": "blocks.{i}.up",
         "layers.{i}.feed_forward.down": "blocks.{i}.down", "layers.{i}.feed_forward.norm": "blocks.{i}.norm2"}


def own_twin(model: Model) -> Own:
    """The user's BERT with our model's weights."""
    tensors = {n.removeprefix("encoder."): p.detach() for n, p in model.encoder.named_parameters()}
    found = {}
    for name, tensor in to_foreign(tensors, model.config).items():
        stem, _, last = name.removeprefix("bert.").rpartition(".")
        for ours, theirs in ENCODER_NAMES.items():
            for i in range(model.config.layers):
                if theirs.format(i=i) == stem:
                    found[f"{NAMES[ours].format(i=i)}.{last}"] = tensor.clone()
    own = Own(model.config)
    assert own.load_state_dict(found, strict=False).missing_keys == ["decoder.weight"]
    return own.to(model.encoder.embeddings.word.weight.dtype).eval()


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(module: nn.Module, before: dict[str, Tensor]) -> bool:
    now = module.state_dict()
    return list(now) == list(before) and all(now[name].equal(before[name]) for name in before)


# ---------------------------------------------------------------- the same outputs as our own model

@pytest.mark.parametrize("names", CASES, ids="+".join)
def test_a_users_own_model(names):
    model = drawn_model()
    own, batch = own_twin(model), ragged(rows="all")
    ids, mask = in_rectangle(batch)
    before, types = bits(own), [type(m) for m in own.modules()]
    base = own(ids, mask)
    assert_close(base[mask], model.encoder(batch))
    found = attach_ours(model, names)
    handles = [attach_to(own, method, NAMES) for method in found]
    ours, theirs = model.encoder(batch), own(ids, mask)[mask]
    assert_close(theirs, ours)
    assert (theirs - base[mask]).abs().max() > 1e-3
    assert own.words.weight is own.decoder.weight and own.words.weight.equal(before["words.weight"])  # a tied decoder keeps the base, however it is tied

    parameters = [p for handle in handles for p in handle.parameters()]
    assert len(parameters) == sum(len(m.parameters()) for m in found)
    weight = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    wanted = torch.autograd.grad((ours * weight).sum(), parameters)
    for got, expected in zip(torch.autograd.grad((own(ids, mask)[mask] * weight).sum(), parameters), wanted):
        assert_close(got, expected, "gradient")

    for handle, name in zip(handles, names):  # first in, first out: the others stay
        handle.remove()
        handle.remove()
        patch.detach(model, name)
        assert_close(own(ids, mask)[mask], model.encoder(batch))
    assert same(own, before) and own(ids, mask).equal(base) and [type(m) for m in own.modules()] == types and own.decoder.weight is own.words.weight


@pytest.mark.parametrize("names", CASES, ids="+".join)
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_transformers(kind, names, tmp_path):
    other, model = pair(kind, tmp_path)
    batch, before = ragged(), bits(other)
    plain = other(**padded(other, batch)).logits
    handles = [attach_to(other, method) for method in attach_ours(model, names)]
    assert handles[0].places[next(iter(handles[0].places))].startswith(f"{kind}.")
    assert_close(mlm_logits(other, batch), model.mlm_logits(batch))
    with model.without(names[-1]):
        handles.pop().remove()
        assert_close(mlm_logits(other, batch), model.mlm_logits(batch))
    for handle in handles:
        handle.remove()
    assert same(other, before) and other(**padded(other, batch)).logits.equal(plain)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_folder_on_transformers_model(kind, tmp_path):
    """Whose base is recognised, whatever the heights of its tables."""
    other, model = pair(kind, tmp_path / "model")
    base, method = checkpoint.describe_base(model), sparse(model, "axis")
    for p in method.parameters().values():
        p.data = p.data.float().double()  # as they are loaded
    method.indices = {site: indices.sort().values for site, indices in method.indices.items()}
    checkpoint.save_adapter(tmp_path / "adapter", method, "gender", base)
    batch = ragged()
    attach_to(other, tmp_path / "adapter")
    assert_close(mlm_logits(other, batch), model.mlm_logits(batch))


def test_a_folder_on_a_weight_that_is_made_of_several_tensors(tmp_path):
    """As a weight norm's is: direction and length."""
    model = drawn_model()
    own, method, x = own_twin(model), attached(model, "axis", "lora", targets=("up",)), torch.randn(2, model.config.hidden, dtype=torch.float64)
    checkpoint.save_adapter(tmp_path / "adapter", method, "gender", checkpoint.describe_base(model) | {"sha256": None})
    plain, delta = own.blocks[0].up(x), F.linear(x, method.delta("layers.0.feed_forward.up"))
    nn.utils.parametrizations.weight_norm(own.blocks[0].up)
    with pytest.warns(UserWarning, match="carries no checksum of its base"):
        handle = attach_to(own, tmp_path / "adapter", NAMES)
    torch.testing.assert_close(own.blocks[0].up(x), plain + delta, atol=1e-6, rtol=0)  # the file holds float32
    handle.remove()
    torch.testing.assert_close(own.blocks[0].up(x), plain)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_a_parametrization_of_the_users_own_stays(first):
    """As torch.nn.utils.parametrizations makes them. Each acts on what those before it gave."""
    model = drawn_model()
    own, method, x = own_twin(model), attached(model, "axis", "lora", targets=("up",)), torch.randn(2, model.config.hidden, dtype=torch.float64)
    up = own.blocks[0].up
    plain, delta = up.weight.detach().clone(), method.delta("layers.0.feed_forward.up")
    if first == "theirs":
        parametrize.register_parametrization(up, "weight", Doubled())
    handle = attach_to(own, method, NAMES)
    if first == "ours":
        parametrize.register_parametrization(up, "weight", Doubled())
    assert_close(up(x), F.linear(x, 2 * plain + delta if first == "theirs" else 2 * (plain + delta), up.bias))
    handle.remove()
    assert [type(part) for part in up.parametrizations.weight] == [Doubled] and up.weight.equal(2 * plain)
    assert not parametrize.is_parametrized(own.blocks[1].up)


def test_a_table_asked_for_by_keyword_has_its_delta():
    model = drawn_model()
    own, method, ids = own_twin(model), sparse(model, "axis"), torch.arange(5, 97)
    handle = attach_to(own, method, NAMES)
    rows = own.words(ids)
    assert own.words(input=ids).equal(rows) and not rows.equal(own.words.weight[ids])
    handle.remove()
    assert own.words(input=ids).equal(own.words.weight[ids])


def test_what_was_taken_off_has_nothing_to_say_of_a_host_that_is_sharded_later(monkeypatch):
    model = drawn_model()
    own = own_twin(model)
    first, second = (attach_to(own, methods.create(name, model.config), NAMES) for name in ("bias", "lora"))
    first.remove()
    monkeypatch.setattr(foreign, "_sharded", lambda hosts: True)
    first.remove()
    with pytest.raises(AdapterError, match="^remove: FSDP has sharded the host"):
        second.remove()


def test_a_module_that_stands_at_some_of_the_places_already_is_attached_twice():
    model = drawn_model()
    own, method = own_twin(model), methods.create("lora", model.config)
    attach_to(own, method, NAMES)
    refused("^lora: attached twice; expected each module once$", own, method, NAMES | {"layers.0.attention.query": "blocks.0.o"})
    assert not parametrize.is_parametrized(own.blocks[0].o)


def test_training_moves_the_module_alone():
    model = drawn_model()
    own, (ids, mask) = own_twin(model), in_rectangle(ragged(rows="all"))
    method = methods.create("lora", model.config, options=dict(rank=2))
    for p in method.parameters().values():
        p.data = p.data.double()
    handle, before = attach_to(own.requires_grad_(False), method, NAMES), own_twin(model).state_dict()
    start = own(ids, mask)
    assert_close(start[mask], model.encoder(ragged(rows="all")))  # zero B: nothing has changed yet
    optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        own(ids, mask).square().sum().backward()
        optimizer.step()
    assert all(p.grad is None for p in own.parameters()) and not own(ids, mask).equal(start)
    handle.remove()
    assert same(own, before) and own(ids, mask).equal(start)


def test_a_host_inside_a_larger_module_and_a_folder(tmp_path):
    """float32: the folder's checksum is of the base as it is stored."""
    model = drawn_model().float()
    own, batch = own_twin(model), ragged(rows="all")
    own.subwords = nn.Linear(2, 2)  # ends as another's name does, and is none of it
    base, method = checkpoint.describe_base(model), attach_ours(model, ("lora",))[0]
    for p in method.parameters().values():
        p.data = p.data.float()
    checkpoint.save_adapter(str(tmp_path / "run" / "adapter"), method, "gender", base)
    whole, (ids, mask) = nn.ModuleDict({"encoder": own, "head": nn.Linear(3, 2)}), in_rectangle(batch)
    names = NAMES | {"embeddings.norm": "encoder.norm"}  # "norm" alone may stand in many places
    handle = attach_to(whole, tmp_path / "run", names)
    assert handle.places["layers.1.attention.query"] == "encoder.blocks.1.q"
    assert_close(own(ids, mask)[mask], model.encoder(batch))
    for same in (tmp_path / "run", tmp_path / "run" / "adapter"):
        with pytest.raises(AdapterError, match="run/adapter: attached twice; expected each module once"):
            attach_to(whole, same, names)
    with pytest.raises(AdapterError, match="lora: attached twice; expected each module once"):
        attach_to(whole, handle.method, names)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    again = attach_to(whole, tmp_path / "other", names)  # the base is still recognised under what is attached
    again.remove()
    handle.remove()
    attach_to(whole, tmp_path / "run", names).remove()
    with torch.no_grad():
        own.blocks[0].q.weight[0, 0] += 1
    with pytest.raises(AdapterError, match="made for the base with checksum"):
        attach_to(whole, tmp_path / "run", names)
    with pytest.warns(UserWarning, match="made for the base with checksum .*; going on by force"):
        attach_to(whole, tmp_path / "run", names, force=True).remove()
    with pytest.raises(AdapterError, match="expected [0-9a-f]{12}, the model given, in bfloat16"):
        attach_to(whole.bfloat16(), tmp_path / "run", names)
    with pytest.raises(AdapterError, match="^layers.0.attention.query: expected one module named blocks.0.z, found none"):
        attach_to(whole, tmp_path / "run", names | {"layers.{i}.attention.query": "blocks.{i}.z"})
    for site, name, words in (("layers.0.attention.value", "blocks.0.up", "expected shape [21, 21], got [41, 21]"), ("embeddings.word", "blocks.0", "expected a tensor, found none"),
                              ("embeddings.word", "blocks.0.norm1", "expected a matrix, got shape [21]"), ("layers.1.attention.norm", "kinds", "expected shape [21], got [2, 21]")):
        with pytest.raises(AdapterError, match=re.escape(f"{site} (encoder.{name}.weight): {words}") + "$"):
            attach_to(whole, tmp_path / "run", names | {site: name})
    bias, own.blocks[1].o.bias = own.blocks[1].o.bias, None
    with pytest.raises(AdapterError, match=r"^layers.1.attention.output.bias \(encoder.blocks.1.o.bias\): expected a tensor, found none$"):
        attach_to(whole, tmp_path / "run", names)
    own.blocks[1].o.bias = bias
    up = own.blocks[1].up
    for empty in (nn.LazyLinear(41), nn.Linear(21, 41, device="meta")):
        own.blocks[1].up = empty
        with pytest.raises(AdapterError, match=r"^layers.1.feed_forward.up \(encoder.blocks.1.up.weight\): expected a tensor with values, .* got one without \(lazy, or on the device meta\)$"):
            attach_to(whole, tmp_path / "run", names)
    own.blocks[1].up = up
    shutil.copytree(tmp_path / "run" / "adapter", tmp_path / "run" / "adapter-2")
    with pytest.raises(AdapterError, match="/run: a run with several modules; expected one, as .*/run/adapter is$"):
        attach_to(whole, tmp_path / "run", names)


# ---------------------------------------------------------------- what is refused, in one line

def refused(words: str, *args) -> None:
    with pytest.raises(AdapterError, match=words) as raised:
        attach_to(*args)
    assert "\n" not in str(raised.value)


def test_a_host_without_values_is_named_and_left_alone():
    model = drawn_model()
    host, method = own_twin(model), methods.create("lora", model.config)
    host.blocks[1].to("meta")  # as accelerate leaves layers that it keeps elsewhere
    with pytest.raises(AdapterError, match="^lora: expected a model with values, got one of which a part is on the device meta; give it its values .* first$"):
        attach_to(host, method, NAMES)
    assert all(p.device.type == "cpu" for p in method.parameters().values()) and not any(parametrize.is_parametrized(m) for m in host.modules())


def test_inside_of_inference_mode(tmp_path):
    """A host and a folder attached there, and a host from outside, whose module can be trained behind it."""
    model, (ids, mask) = drawn_model().float(), in_rectangle(ragged(rows="all"))
    base, method = checkpoint.describe_base(model), attached(model, "lora", "lora", **MODULES["lora"])
    for p in method.parameters().values():
        p.data = p.data.float()
    checkpoint.save_adapter(tmp_path / "adapter", method, "gender", base)
    outside = own_twin(model)
    with torch.inference_mode():
        inside = own_twin(model)
        handles = [attach_to(own, tmp_path / "adapter", NAMES) for own in (inside, outside)]
        assert inside(ids, mask).equal(outside(ids, mask))
        handles[0].remove()
    outside(ids, mask).sum().backward()
    assert all(p.grad is not None for p in handles[1].parameters())


def test_trained_by_transformers_trainer(tmp_path):
    """With the callback of docs/embedding.md each step has the gradients of its own texts, clipped; without it they would add up."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    host, model = pair("bert", tmp_path)
    host, steps = host.float().eval().requires_grad_(False), []
    handle = attach_to(host, methods.create("bias", model.config))
    optimizer = torch.optim.SGD(handle.parameters(), lr=1e-6)

    def size() -> float:
        return float(torch.cat([p.grad.flatten() for p in handle.parameters()]).norm())

    class OfTheModule(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **more):
            found = size()
            torch.nn.utils.clip_grad_norm_(handle.parameters(), args.max_grad_norm)
            steps.append((found, size()))

        def on_optimizer_step(self, args, state, control, optimizer, **more):
            optimizer.zero_grad()

    for part in host.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    texts = [{"input_ids": torch.arange(4, 9), "labels": torch.arange(4, 9)}] * 4
    settings = transformers.TrainingArguments(str(tmp_path / "out"), max_steps=4, per_device_train_batch_size=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
                                              max_grad_norm=1e-3)
    transformers.Trainer(host, settings, train_dataset=texts, optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)), callbacks=[OfTheModule()]).train()
    assert len(steps) == 4 and all(abs(found / steps[0][0] - 1) < 1e-3 and abs(clipped - 1e-3) < 1e-5 for found, clipped in steps), steps


@pytest.mark.parametrize("name", ["adapter", "prefix", "prompt", "full"])
def test_methods_that_do_more_than_change_weights(name, tmp_path):
    model = drawn_model()
    method = methods.create(name, model.config)
    refused(f"^{name}: does more than change weights", own_twin(model), method, NAMES)
    if name != "full":
        checkpoint.save_adapter(tmp_path, method, "gender", checkpoint.describe_base(model))
        refused(f"^{name}: does more than change weights", own_twin(model), tmp_path, NAMES)


def test_a_method_that_is_a_product_alone_is_refused():
    class Product(methods.Method):
        name = "product"

        def linear(self, site, x, weight, bias, seed=None):
            return F.linear(x, 2 * weight, bias)

    model = drawn_model()
    refused("^product: does more than change weights, so it acts in this package's own model only; expected one of lora, sparse, ia3, bias$", own_twin(model),
            Product(None, model.config), NAMES)


def test_missing_modules_biases_and_shapes(tmp_path):
    model = drawn_model()
    own, lora = own_twin(model), methods.create("lora", model.config)
    before = bits(own)
    refused("layers.0.attention.query: expected one module named encoder.layer.0.attention.self.query, found none", own, lora)
    refused("layers.0.attention.value: expected one module named blocks.0.w, found none", own, lora, NAMES | {"layers.{i}.attention.value": "blocks.{i}.w"})
    refused(r"layers.0.attention.value \(blocks.0.up.weight\): expected shape \[21, 21\], got \[41, 21\]", own, lora, NAMES | {"layers.0.attention.value": "blocks.0.up"})
    refused("expected one module named blocks.0.q, found a.blocks.0.q and b.blocks.0.q; name it in `names`", nn.ModuleDict({"a": own, "b": own_twin(model)}), lora, NAMES)
    refused("^names: expected some of embeddings.word, .*, with a number for {i} where one layer is meant, got 'layers.{i}.attention.querry'$", own, lora,
            {"layers.{i}.attention.querry": "blocks.{i}.q"})
    refused("^names: expected some of .*, got 3$", own, lora, {3: "blocks.{i}.q"})
    refused("^layers.1.attention.query: expected a module of its own, found blocks.0.q, which is layers.0.attention.query too", own, lora, NAMES | {"layers.{i}.attention.query": "blocks.0.q"})
    refused("^names: layers.{i}.attention.query: expected their module's name, got 3$", own, lora, {"layers.{i}.attention.query": 3})
    refused("sparse: expected a module that changes at least one weight", own, methods.create("sparse", model.config), NAMES)
    refused("no such folder", own, tmp_path / "none", NAMES)
    for given, got in (("", "an empty text$"), ("a\0", r"'a\\x00': "), ("x" * 5000, "'xxx.*': File name too long$")):
        refused(f"^adapter: expected a path, got {got}", own, given, NAMES)
    assert same(own, before)
    own.blocks[1].o.bias = None
    refused(r"layers.1.attention.output.bias \(blocks.1.o.bias\): expected a tensor, found none", own, methods.create("bias", model.config), NAMES)
    attach_to(own, methods.create("ia3", model.config, options=dict(outputs=("output",))), NAMES)  # scales a weight without bias all the same
    assert not parametrize.is_parametrized(own.blocks[0].down, "bias")  # whose input alone is scaled


def test_a_module_of_two_names():
    """Two sites that are one module are told; a host in which the whole lies twice is one all the same, by its first name."""
    model = drawn_model()
    own, lora = own_twin(model), methods.create("lora", model.config)
    handle = attach_to(nn.ModuleDict({"a": own, "b": own}), lora, NAMES)
    assert set(handle.places.values()) == {f"a.blocks.{i}.{kind}" for i in range(len(own.blocks)) for kind in "qv"}
    handle.remove()
    own.blocks[0].v = own.blocks[0].q
    for host, prefix in ((own, ""), (nn.ModuleDict({"a": own}), "a.")):
        refused(f"^layers.0.attention.value: expected a module of its own, found {prefix}blocks.0.v, which is layers.0.attention.query too", host, lora, NAMES)


class Scripted(nn.Module):
    """A linear for each of LoRA's sites, as TorchScript knows them: by names without a dot."""

    def __init__(self, layers: int, width: int):
        super().__init__()
        for i in range(layers):
            for kind in "qv":
                setattr(self, f"{kind}{i}", nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.q0(x)


def test_torchscript_is_refused_in_one_line():
    config, names = drawn_model().config, {"layers.{i}.attention.query": "q{i}", "layers.{i}.attention.value": "v{i}"}
    lora, own = methods.create("lora", config), Scripted(config.layers, config.hidden)
    for host, prefix in ((torch.jit.script(own), ""), (nn.ModuleDict({"a": torch.jit.script(own)}), "a.")):
        refused(f"^layers.0.attention.query: expected a module whose weights torch can parametrise, got {prefix}q0, which is TorchScript; attach before torch.jit$", host, lora, names)
    attach_to(nn.ModuleDict({"a": own, "beside": torch.jit.script(nn.Linear(2, 2))}), lora, names).remove()


class Elsewhere(nn.Parameter):
    """A parameter that says to lie on another device."""

    device = torch.device("cuda:1")


def test_what_a_host_cannot_be_leaves_it_as_it_was(tmp_path):
    """A bias that is no parameter, values that a small change is lost in, two devices; a layer's number that is missing, of a folder too."""
    model = drawn_model()
    own, ia3, lora = own_twin(model), methods.create("ia3", model.config, options=dict(outputs=("value",))), methods.create("lora", model.config)
    value = own.blocks[1].v
    bias = value._parameters.pop("bias")
    value.bias = bias.detach()
    before = bits(own)
    refused(r"layers.1.attention.value.bias \(blocks.1.v.bias\): expected a parameter, got what Linear computes or hands on", own, ia3, NAMES)
    assert same(own, before) and not any(parametrize.is_parametrized(m) for m in own.modules())
    whole, value.weight = value.weight, nn.Parameter(value.weight.to(torch.int8), requires_grad=False)
    refused(r"layers.1.attention.value \(blocks.1.v.weight\): expected floating point values, got int8, in which a change of less than 1 is lost", own, lora, NAMES)
    value.weight = Elsewhere(whole)
    refused("^lora: expected a model on one device, got blocks.0.q on cpu and blocks.1.v on cuda:1$", own, lora, NAMES)
    whole = own_twin(model)
    checkpoint.save_adapter(tmp_path / "lora", methods.create("lora", model.config), "gender", checkpoint.describe_base(model))
    refused("lora: made for bert of 3 layers, .*; expected bert of 1 layers", whole, tmp_path / "lora", NAMES | {"layers.{i}.attention.query": "blocks.0.q"})
    assert not any(parametrize.is_parametrized(m) for m in whole.modules())


def test_transformers_is_not_imported():
    code = "import sys, peftdebias; peftdebias.attach_to; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_was_compiled_before_sees_a_table_that_changes(tmp_path):
    """torch.compile does not look at hooks: a sparse module with values in the embeddings alone."""
    other, ours = pair("bert", tmp_path)
    batch = ragged(segments=ours.config.segments)
    method = sparse(ours, "axis")
    for site, values in method.values.items():
        if not site.startswith("embeddings."):
            values.data.zero_()
    patch.detach(ours, "axis")
    compiled = torch.compile(other, backend="eager")
    before = mlm_logits(compiled, batch)
    tables = {site: values for site, values in method.values.items() if site.startswith("embeddings.")}
    method.values, method.indices = tables, {site: method.indices[site] for site in tables}
    method.sites = lambda config: tuple(tables)
    handle = attach_to(other, method)
    assert_close(mlm_logits(compiled, batch), mlm_logits(other, batch))
    assert (mlm_logits(compiled, batch) - before).abs().max() > 1e-3
    handle.remove()
    assert_close(mlm_logits(compiled, batch), before)


def test_a_layer_that_peft_has_wrapped_is_named(tmp_path):
    peft = pytest.importorskip("peft")
    other, ours = pair("bert", tmp_path)
    method = attached(ours, "axis", "lora", targets=("query",))
    wrapped = peft.get_peft_model(other, peft.LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(AdapterError, match=r"layers.0.attention.query \(.*\.weight\): expected a parameter, got what Linear computes or hands on"):
        attach_to(wrapped, method)


# ---------------------------------------------------------------- FSDP

FSDP = """
import sys, torch, torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from peftdebias import attach_to
from peftdebias.errors import AdapterError
from tests.outside import attached, drawn_model, ragged
from tests.test_foreign import NAMES, in_rectangle, own_twin

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh, kind = dist.init_device_mesh("cpu", (1,)), sys.argv[1]
model = drawn_model()
own, (ids, mask) = own_twin(model), in_rectangle(ragged(rows="all"))
module = attached(model, "lora", "lora", rank=3)

def wrapped(host):
    return fully_shard(host, mesh=mesh) if kind == "second" else FullyShardedDataParallel(host, device_id=torch.device("cpu"), use_orig_params=kind == "first, parameters kept")

def refused(what):
    try:
        what()
    except AdapterError as error:
        return str(error)

handle = attach_to(own, module, NAMES)
expected = own(ids, mask)
host = wrapped(own)
whole = "remove: FSDP has sharded the host"
assert refused(handle.remove).startswith(whole)
found = host(ids, mask)
assert (found - expected).abs().max() < 1e-12 and refused(handle.remove).startswith(whole)  # the tensors are there as a whole meanwhile
late = "layers.0.attention.query: expected a module whose tensors are whole, got one that FSDP has sharded; attach before it is wrapped"
assert refused(lambda: attach_to(host, module, NAMES)) == late
found.sum().backward()
assert all(p.grad is not None for p in handle.parameters()) and refused(handle.remove).startswith(whole)
assert (host(ids, mask) - expected).abs().max() < 1e-12
assert refused(lambda: attach_to(host, module, NAMES)) == refused(lambda: attach_to(own, module, NAMES)) == late
fresh, inner = own_twin(model), own_twin(model)
assert refused(lambda: attach_to(wrapped(fresh), module, NAMES)) == late
inner.blocks[0] = wrapped(inner.blocks[0])
assert refused(lambda: attach_to(inner, module, NAMES)) == late

beside = torch.nn.ModuleDict({"body": own_twin(model), "head": torch.nn.Linear(3, 3)})  # where FSDP has another part alone
beside["head"] = wrapped(beside["head"])
beside["body"].parametrizations = ["a name of one's own"]
other = attach_to(beside, module, NAMES)
assert (beside["body"](ids, mask) - expected).abs().max() < 1e-12
other.remove()
if kind == "second":
    import re
    whole = get_model_state_dict(own, options=StateDictOptions(full_state_dict=True))
    whole = {re.sub(r"parametrizations\\.(\\w+)\\.original$", r"\\1", name): tensor for name, tensor in whole.items()}
    fresh = own_twin(model)
    assert fresh.load_state_dict(whole).missing_keys == []
    attach_to(fresh, module, NAMES)
    assert fresh(ids, mask).equal(expected)
dist.destroy_process_group()
print("sharded")
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("kind", ["first", "first, parameters kept", "second"])
def test_fsdp_keeps_what_is_attached_and_both_ends_are_said(kind):
    done = subprocess.run([sys.executable, "-c", FSDP, kind], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0 and done.stdout == "sharded\n", done.stderr[-2000:]
