"""Sparse fine-tuning: exactly the k weights that moved most, a base that comes back bit for bit, and a module of indices and values."""

import dataclasses

import numpy
import pytest
import torch
import torch.nn.functional as F

from peftdebias import methods, patch
from peftdebias.batches import Sample, pack
from peftdebias.encoder import EncoderConfig, Model
from peftdebias.errors import AdapterError, ConfigError
from peftdebias.methods import sparse
from peftdebias.methods.sparse import Sparse, SparseConfig, largest
from peftdebias.sites import add_delta
from peftdebias.training import Schedule, train

TINY = EncoderConfig(kind="bert", layers=2, hidden=14, heads=2, feed_forward=37, vocab=61, max_positions=19, dropout=0.0, attention_dropout=0.0)


def tiny_model() -> Model:
    model = Model(TINY, mlm=True, labels=("a", "b")).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3, generator=generator)
    return model


class Task:
    """Random masked batches; the last step is best."""

    metric, higher_is_better = "age", True
    age = 0

    def epoch(self, number):
        generator = numpy.random.default_rng(number)
        for _ in range(4):
            yield pack([Sample(generator.integers(5, 61, n), numpy.arange(min(n, 2)), generator.integers(5, 61, min(n, 2))) for n in (13, 1, 7)])

    def loss(self, model, batch):
        return F.cross_entropy(model.mlm_logits(batch), batch.targets)

    def validate(self, model):
        self.age += 1
        return {"age": self.age}


def learnt(k: int = 100, steps: int = 4, l1: float = 0.1, first_rate: float = 1.0):
    """(model with the module attached as "gender", the module, what each call of the loop trained)."""
    model, seen = tiny_model(), []
    method = methods.create("sparse", TINY, options={"k": k, "l1": l1, "first_rate": first_rate})
    patch.attach(model, "gender", method)

    def loop(parameters, pull=None, rate=1.0):
        patch.train_only(model, parameters.values())
        seen.append({name: p.detach().clone() for name, p in parameters.items()})
        outcome = train(model, Task(), parameters, Schedule(steps=steps, lr=rate * 1e-2, warmup=0.0, validate_every=steps), pull=pull)
        seen[-1]["after"] = {name: p.detach().clone() for name, p in parameters.items()}
        seen[-1]["decoder"] = None if model.mlm.decoder is None else model.mlm.decoder.weight.detach().clone()
        return outcome

    method.learn(model, loop)
    return model, method, seen


@pytest.mark.parametrize("k", [1, 2, 5, 11, 12])
def test_largest_is_the_sorted_head_with_exact_k(k):
    generator = numpy.random.default_rng(k)
    moved = [generator.integers(0, 4, n).astype(float) for n in (7, 1, 0, 4)]  # many ties
    chosen = largest(moved, k)
    assert sum(map(len, chosen)) == k
    flat = numpy.sort(numpy.concatenate([m[c] for m, c in zip(moved, chosen)]))
    assert flat.tolist() == numpy.sort(numpy.concatenate(moved))[-k:].tolist()
    assert all((numpy.diff(c) > 0).all() for c in chosen)


def test_of_equal_ones_at_the_edge_the_first_count():
    assert [part.tolist() for part in largest([numpy.array([1.0, 0, 1, 2]), numpy.array([1.0, 1])], 3)] == [[0, 2, 3], []]


@pytest.mark.parametrize("k", [0, 13])
def test_largest_refuses_a_k_that_is_not_there(k):
    with pytest.raises(ConfigError, match=f"sparse k: expected 1 to 12, the weights there are, got {k}"):
        largest([numpy.zeros(12)], k)


def test_an_untrained_module_changes_nothing():
    model, batch = tiny_model(), next(Task().epoch(0))
    before = model.mlm_logits(batch)
    patch.attach(model, "gender", methods.create("sparse", TINY))
    torch.testing.assert_close(model.mlm_logits(batch), before, rtol=0, atol=1e-13)  # Q, K and V apart: another rounding


def test_everything_but_the_norms_moves_then_exactly_k_values_train():
    model, method, (first, second) = learnt(k=100)
    norms = {n for n, _ in model.encoder.named_parameters() if ".norm." in n}
    names = set(first) - {"after", "decoder"}
    assert names == {n for n, _ in model.encoder.named_parameters()} - norms
    assert all(not torch.equal(first["after"][n], first[n]) for n in names)
    assert sum(v.numel() for v in method.parameters().values()) == method.count() == 100
    assert all((second[n] == 0).all() for n in method.parameters())
    assert any(not torch.equal(v, second[n]) for n, v in method.parameters().items())
    moved = torch.cat([(first["after"][n] - first[n]).abs().flatten() for n in sorted(names)])
    kept = torch.cat([((first["after"][name] - first[name])[rows]).abs().flatten()[method.indices[site]] for site in method.values
                      for name, _, rows in [patch.parameter_at(model, site)]])
    assert sorted(kept.tolist()) == pytest.approx(sorted(moved.tolist())[-100:])


def test_the_base_is_rewound_bit_for_bit_and_the_decoder_was_a_frozen_copy():
    model, _, (first, second) = learnt()
    fresh = tiny_model()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), fresh.parameters()))
    assert torch.equal(first["decoder"], fresh.encoder.embeddings.word.weight) and second["decoder"] is None and model.mlm.decoder is None


def test_the_pull_is_the_gradient_of_the_mean_distance_over_the_encoder():
    seen = []

    def loop(parameters, pull, rate=1.0):
        start = {name: p.detach().clone() for name, p in parameters.items()}
        generator = torch.Generator().manual_seed(len(seen))
        with torch.no_grad():
            for p in parameters.values():
                p += torch.randint(-1, 2, p.shape, generator=generator)
        before = {name: torch.randn(p.shape, dtype=p.dtype, generator=generator) for name, p in parameters.items()}
        for i, (name, p) in enumerate(parameters.items()):
            p.grad = before[name].clone() if i else None  # one that the loss does not reach
        pull()
        distance = 3.0 / methods.base_parameters(TINY) * sum((p - start[name]).abs().sum() for name, p in parameters.items())
        wanted = torch.autograd.grad(distance, list(parameters.values()))
        for i, ((name, p), gradient) in enumerate(zip(parameters.items(), wanted)):
            torch.testing.assert_close(p.grad, before[name] + gradient if i else gradient, rtol=0, atol=1e-15)
        seen.append(sum(p.numel() for p in parameters.values()))

    Sparse(SparseConfig(k=7, l1=3.0), TINY).learn(tiny_model(), loop)
    assert seen[1] == 7


def test_a_first_stage_that_is_stopped_leaves_the_base_as_it_was():
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loop(parameters, pull, rate=None):
        with torch.no_grad():
            for p in parameters.values():
                p += 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Sparse(SparseConfig(k=7), TINY).learn(model, loop)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("k,still", [(3, None), (5, 2)])
def test_weights_that_are_kept_though_they_did_not_move_are_told(k, still, recwarn):
    def loop(parameters, pull, rate=None):
        if rate is not None:
            with torch.no_grad():
                next(iter(parameters.values())).view(-1)[[4, 7, 9]] += 0.5

    method = Sparse(SparseConfig(k=k), TINY)
    method.learn(tiny_model(), loop)
    assert sum(map(len, method.indices.values())) == k
    assert [str(w.message).split(" in ")[0] for w in recwarn] == ([f"sparse: {still} of the {k} weights that are kept did not move"] if still else [])


def test_a_large_parameter_is_pulled_piece_by_piece(monkeypatch):
    monkeypatch.setattr(sparse, "PIECE", 5)
    p, start = torch.nn.Parameter(torch.tensor([[1.0, -2, 0, 4], [5, 6, -7, 0], [0, 1, 1, -1]])), torch.zeros(3, 4)
    p.grad = torch.ones(3, 4)
    sparse.pull(0.25, [p], [start])
    assert torch.equal(p.grad, 1 + 0.25 * p.detach().sign())


def test_the_pull_changes_what_is_learnt():
    plain, pulled = (learnt(l1=l1)[2][0]["after"] for l1 in (0.0, 1e3))
    assert any(not torch.equal(plain[name], pulled[name]) for name in plain)


def test_the_first_stage_alone_goes_at_its_own_rate():
    """One step of Adam moves a value by its learning rate, whatever the gradient's size."""
    _, method, (first, second) = learnt(steps=1, first_rate=0.1)
    moved = max((first["after"][n] - first[n]).abs().max().item() for n in first["after"])
    assert moved == pytest.approx(1e-3, rel=1e-3)
    assert max((second["after"][n] - second[n]).abs().max().item() for n in second["after"]) == pytest.approx(1e-2, rel=1e-3)


@pytest.mark.parametrize("rate", [0.0, -1.0, 1.5, float("nan")])
def test_a_rate_that_is_no_share_is_refused(rate):
    with pytest.raises(ConfigError, match=f"sparse first_rate: expected more than 0, up to 1, got {rate}"):
        SparseConfig(first_rate=rate)


def test_numbers_and_pulls_that_there_are_not_are_refused():
    most = Sparse.most(TINY)
    assert most == methods.base_parameters(TINY) - 2 * TINY.hidden * (1 + 2 * TINY.layers)  # all but the norms
    assert methods.create("sparse", TINY, options={"k": most}).config.k == methods.create("sparse", TINY, budget=0.999).config.k == most
    for options, words in (({"k": 0}, "sparse k: expected at least 1, got 0"), ({"k": most + 1}, f"sparse k: expected at most {most}, the weights there are, got {most + 1}"),
                           ({"l1": -0.5}, "sparse l1: expected a finite number of at least 0, got -0.5")):
        with pytest.raises(ConfigError, match=words):
            methods.create("sparse", TINY, options=options)
    assert SparseConfig(l1=0.0, first_rate=1.0).l1 == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_are_added_in_the_dtype_of_the_weight(dtype):
    found = add_delta(torch.ones(2, 3, dtype=dtype), (torch.tensor([1, 5]), torch.tensor([0.5, -2.0])))
    assert found.dtype == dtype and found.tolist() == [[1, 1.5, 1], [1, 1, -1]]


def test_the_encoder_s_norms_alone_rest_downstream():
    method = methods.create("sparse", TINY)
    names = [name for name, _ in tiny_model().named_parameters()]
    assert {name for name in names if method.keeps(name)} == {name for name in names if name.startswith("encoder.") and ".norm." in name} != set()
    assert not method.keeps("mlm.norm.weight")


def test_attached_equals_the_changed_weights_and_merges_folds_and_comes_off():
    model, method, _ = learnt()
    batch, attached = next(Task().epoch(3)), None
    firsts = dataclasses.replace(batch, rows=batch.cu_seqlens[:-1].long(), row_lengths=(1,) * len(batch.lengths), firsts=True)
    attached, classes = model.mlm_logits(batch), model.class_logits(firsts)
    changed = tiny_model()
    decoder = changed.encoder.embeddings.word.weight.detach().clone()
    with torch.no_grad():
        for site, values in method.values.items():
            _, parameter, rows = patch.parameter_at(changed, site)
            part = parameter[rows].flatten()
            part[method.indices[site]] += values
            parameter[rows] = part.view_as(parameter[rows])
    with changed.frozen_decoder():
        changed.mlm.decoder.weight.data = decoder
        torch.testing.assert_close(attached, changed.mlm_logits(batch), rtol=1e-10, atol=1e-12)
    patch.merge(model)
    torch.testing.assert_close(model.mlm_logits(batch), attached, rtol=1e-10, atol=1e-12)
    patch.unmerge(model)
    folded = patch.fold(model)
    assert folded.names == ("gender",)
    torch.testing.assert_close(model.class_logits(firsts), classes, rtol=1e-10, atol=1e-12)
    folded.unfold()
    patch.detach(model, "gender")
    torch.testing.assert_close(model.mlm_logits(batch), tiny_model().mlm_logits(batch), rtol=1e-10, atol=1e-12)


def test_state_is_indices_and_values_and_survives():
    _, method, _ = learnt()
    state = method.state()
    assert {t.dtype for n, t in state.items() if n.endswith(".indices")} == {torch.int32}
    other = Sparse(method.config, TINY)
    other.load(state)
    again = other.state()
    assert set(again) == set(state) and all(torch.equal(again[n], t) for n, t in state.items())
    assert not {t.data_ptr() for t in again.values()} & {t.data_ptr() for t in state.values()}  # to be trained, whatever becomes of the tensors it was given


def test_budget_is_k():
    assert methods.create("sparse", TINY, budget=0.01).config.k == round(0.01 * methods.base_parameters(TINY)) == methods.create("sparse", TINY).config.k
    for vocab in range(61, 66):
        config = dataclasses.replace(TINY, vocab=vocab)
        assert methods.create("sparse", config).config.k == round(0.01 * methods.base_parameters(config))
    with pytest.raises(ConfigError, match="budget: chooses sparse's k; expected no k beside it"):
        methods.create("sparse", TINY, budget=0.01, options={"k": 5})


WORD, UP = "embeddings.word.indices", "layers.1.feed_forward.up.indices"


@pytest.mark.parametrize("change,words", [
    (lambda s: s | {"embeddings.norm.values": torch.zeros(1), "embeddings.norm.indices": torch.zeros(1, dtype=torch.int32)}, "embeddings.norm: expected values and indices"),
    (lambda s: {n: t for n, t in s.items() if n != "embeddings.word.indices"}, "embeddings.word: expected values and indices of one length"),
    (lambda s: s | {"embeddings.word.indices": s["embeddings.word.indices"] + 61 * 14}, "embeddings.word: expected indices from 0 to 853"),
    (lambda s: s | {WORD: torch.cat([s[WORD][:-1], torch.tensor([61 * 14], dtype=torch.int32)])}, "embeddings.word: expected indices from 0 to 853"),
    (lambda s: s | {WORD: torch.cat([torch.tensor([-1], dtype=torch.int32), s[WORD][1:]])}, "embeddings.word: expected indices from 0 to 853, got -1"),
    (lambda s: s | {"embeddings.word.indices": s["embeddings.word.indices"].to(torch.int16)}, "embeddings.word: expected indices in int32 or int64, got int16"),
    (lambda s: {n: t[None] if n.startswith("embeddings.word.") else t for n, t in s.items()}, "embeddings.word: expected values and indices of one length"),
    (lambda s: s | {"embeddings.word": torch.zeros(1)}, "expected 100 values, got 100 in"),
    (lambda s: {n: t for n, t in s.items() if not n.startswith("embeddings.word.")}, "expected 100 values, got"),
    (lambda s: s | {"embeddings.word.values": s["embeddings.word.values"] * float("nan")}, "embeddings.word: expected finite numbers, got"),
    (lambda s: s | {"embeddings.word.values": s["embeddings.word.values"].int()}, "embeddings.word: expected floating-point numbers, got int32"),
    (lambda s: s | {UP: s[UP].flip(0)}, "layers.1.feed_forward.up: expected ascending indices, each once"),
    (lambda s: s | {UP: s[UP][0].expand_as(s[UP])}, "layers.1.feed_forward.up: expected ascending indices, each once"),
])
def test_files_that_do_not_fit_are_named(change, words):
    _, method, _ = learnt()
    with pytest.raises(AdapterError, match=words):
        Sparse(method.config, TINY).load(change(method.state()))


def test_a_file_has_an_index_beside_every_value():
    module = methods.create("sparse", TINY, options={"k": 9})
    module.load({"embeddings.word.values": torch.ones(9), "embeddings.word.indices": torch.arange(9, dtype=torch.int32),
                 "embeddings.segment.values": torch.ones(0), "embeddings.segment.indices": torch.arange(0, dtype=torch.int32)})
    assert module.file_bytes() == sum(t.numel() * t.element_size() for t in module.state().values())
