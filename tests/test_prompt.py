"""Prompts read as a proof: vectors put before each text's words, rows that move with the text, positions, the cap, and equality with peft. What holds for
every method: test_methods.py."""

import dataclasses

import pytest
import torch

from peftdebias.batches import with_inserted
from peftdebias.errors import ConfigError, ModelError
from peftdebias.methods import LARGEST, base_parameters, check, create, short_note
from peftdebias.ops import Drop

from .outside import (HIDDEN, LENGTHS, POSITIONS, assert_close, assert_equals_peft, assert_spelled_out, attached, batch_for, drawn_model, one_thread, ragged,
                      spelled_out, with_peft)


def as_words(model, vectors, start=0):
    """Vectors with the positions from `start` on and segment 0, as the base gives them to words."""
    table, c = model.encoder.embeddings, model.config
    return vectors + table.position.weight[c.position_offset + start:][:len(vectors)] + table.segment.weight[0]


@pytest.mark.parametrize("head", ["mlm", "class"])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("positioned", [False, True])
@pytest.mark.parametrize("first_row", ["text", "prompt"])
def test_it_is_vectors_before_each_text(first_row, positioned, kind, head):
    model = drawn_model(kind)
    vectors = attached(model, "gender", "prompt", length=5, positioned=positioned, first_row=first_row).values["vectors"]
    assert_spelled_out(model, batch_for(model, head), head, prompt=as_words(model, vectors) if positioned else vectors, shift=5 if positioned else 0,
                       first_row=first_row)


@pytest.mark.parametrize("first_row", ["text", "prompt"])
def test_two_stand_end_to_end_in_the_order_of_attachment(first_row):
    """The second, positioned, has the positions from 0 on, as it learnt; what is read is the text's first token, or the first vector of all."""
    model = drawn_model()
    one, two = attached(model, "gender", "prompt", 1, length=5, first_row=first_row), attached(model, "race", "prompt", 2, length=2, positioned=True)
    joined = torch.cat([one.values["vectors"], as_words(model, two.values["vectors"])])
    for head in ("mlm", "class"):
        assert_spelled_out(model, batch_for(model, head), head, prompt=joined, shift=2, first_row=first_row)
    batch = batch_for(model, "class")
    with model.without("gender"):
        assert_close(model.class_logits(batch), spelled_out(drawn_model(), batch, "class", prompt=as_words(model, two.values["vectors"]), shift=2))


def test_two_positioned_ones_share_the_positions_out():
    model = drawn_model()
    one, two = (attached(model, name, "prompt", seed, length=n, positioned=True) for name, seed, n in (("gender", 1, 5), ("race", 2, 2)))
    joined = as_words(model, torch.cat([one.values["vectors"], two.values["vectors"]]))
    assert_spelled_out(model, batch_for(model, "mlm"), "mlm", prompt=joined, shift=7)


@pytest.mark.parametrize("outer,inner,place", [("text", "text", 7), ("text", "prompt", 5), ("prompt", "text", 0), ("prompt", "prompt", 0)])
def test_where_a_classifier_reads_behind_two_prompts(outer, inner, place):
    """The row that is read moves to a prompt's first vector where the prompt says so; where more is asked for, a mean over the text say, every row is the text's own."""
    for rows in ("first", "all"):
        batch = ragged(rows=rows)
        assert batch.firsts == (rows == "first")
        for count, first_row in ((2, inner), (5, outer)):  # put in from the last to the first
            _, batch = with_inserted(batch, count, first_row == "prompt")
        starts = batch.cu_seqlens[:-1].tolist()
        expected = [start + place for start in starts] if rows == "first" else [start + i + 7 for start, n in zip(starts, LENGTHS) for i in range(n)]
        assert batch.rows.tolist() == expected and batch.lengths == tuple(n + 7 for n in LENGTHS) and batch.max_length == max(LENGTHS) + 7


def test_vectors_are_gathered_before_each_text():
    batch = ragged((2, 3), rows="first")
    order, after = with_inserted(batch, 2)
    assert order.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8]  # of [v0 v1 | v0 v1 | t0 t1 | u0 u1 u2]
    assert after.rows.tolist() == [2, 6] and after.cu_seqlens.tolist() == [0, 4, 9] and after.row_lengths == batch.row_lengths


def test_a_batch_made_by_hand_is_read_where_the_prompt_says():
    model = drawn_model()
    attached(model, "gender", "prompt", length=5, first_row="prompt")
    batch = batch_for(model, "class")
    assert torch.equal(model.class_logits(dataclasses.replace(batch, firsts=False)), model.class_logits(batch))


def test_texts_keep_their_dtype_beside_wider_vectors():
    method, batch = create("prompt", drawn_model().config, options={"length": 5}), ragged()
    assert method.embed(torch.zeros(sum(LENGTHS), HIDDEN, dtype=torch.bfloat16), batch, None)[0].dtype == torch.bfloat16


def test_vectors_and_text_are_dropped_as_words_are(monkeypatch):
    model, batch = drawn_model(dropout=0.5), batch_for(drawn_model(), "mlm")
    attached(model, "gender", "prompt", length=5)
    plain, encoder, hidden = model.encoder(batch), model.encoder, []
    monkeypatch.setattr(encoder, "drop", lambda place, rate: Drop(rate, encoder.seed, place) if place == 0 else None)
    monkeypatch.setattr(encoder, "_layer", lambda i, given, *rest: hidden.append(given[0]) or given)
    model.train()
    encoder(batch)
    share = (hidden[0] == 0).double().mean()
    assert 0.4 < share < 0.6 and len(hidden[0]) == sum(LENGTHS) + 5 * len(LENGTHS) and plain.isfinite().all()


def test_names_and_shapes():
    assert {name: tuple(p.shape) for name, p in create("prompt", drawn_model().config, options={"length": 5}).parameters().items()} == {"vectors": (5, HIDDEN)}


def test_positions_are_taken_only_when_asked_for():
    model = drawn_model()
    attached(model, "gender", "prompt", length=5)
    longest = batch_for(model, "class", lengths=(POSITIONS,))
    assert model.class_logits(longest).isfinite().all()
    attached(model, "race", "prompt", 2, length=3, positioned=True)
    with pytest.raises(ModelError, match=f"text of {POSITIONS} tokens: expected at most {POSITIONS - 3}"):
        model.class_logits(longest)


@pytest.mark.parametrize("max_length,length", [(10, 26), (28, 25), (33, 20), (POSITIONS - 1, 1), (POSITIONS, 1), (256, 1)])
def test_budget_leaves_room_for_the_texts(max_length, length):
    """Half of the base asked for as vectors: 26 of them where texts are short, else what max_positions leaves, and one at least."""
    config = dataclasses.replace(drawn_model().config, max_positions=POSITIONS)
    budget = 26 * HIDDEN / base_parameters(config)
    method = create("prompt", config, budget=budget, max_length=max_length)
    assert method.config.length == length and method.count() == length * HIDDEN
    said = short_note(budget, method, {})
    assert said == ([] if length == 26 else [f"--budget: {budget:g} of the base comes to prompt length 26, {length} taken: {method.cap}"])
    assert short_note(None, method, {}) == []


def test_a_module_may_be_as_large_as_the_largest_and_no_larger():
    config = dataclasses.replace(drawn_model().config, hidden=16, heads=2)
    check("prompt", config, options={"length": LARGEST // 16})
    with pytest.raises(ConfigError, match="prompt: expected a module of at most 16,777,216 parameters, got 16,777,232, by "):
        check("prompt", config, options={"length": LARGEST // 16 + 1})


@pytest.mark.parametrize("options,words", [
    ({"length": 0}, "prompt length: expected at least 1, got 0"),
    ({"first_row": "cls"}, "prompt first_row: expected text or prompt, got 'cls'"),
])
def test_errors(options, words):
    with pytest.raises(ConfigError, match=words):
        create("prompt", drawn_model().config, options=options)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_equals_peft(kind):
    """As a sequence classifier: theirs gives the vectors positions and reads the first of them."""
    model = drawn_model(kind)
    method = attached(model, "gender", "prompt", length=5, positioned=True, first_row="prompt")
    wrapped = with_peft(model, "class", "PromptTuningConfig", num_virtual_tokens=5, task_type="SEQ_CLS")
    pairs = {"vectors": (wrapped.prompt_encoder["default"].embedding.weight, lambda own: own, (method.values["vectors"],))}
    assert_equals_peft(model, wrapped, pairs, "class", batch_for(model, "class"))


def test_no_row_is_gathered_twice():
    """The backward of a gather adds up what a row was given for each of its places: on a GPU by atomics, in an order that no seed decides."""
    order, _ = with_inserted(ragged(), 3)
    assert sorted(order.tolist()) == list(range(len(order)))
