"""FlatAdamW and WholeAdamW against torch.optim.AdamW, in float64: the formula, groups, parameters without gradients, clipping, and states that go over."""

import functools
import weakref

import pytest
import torch
from torch.nn import Parameter

from peftdebias.optimizer import AdamWOfManyRef, FlatAdamW, LargeAdamW, WholeAdamW, adamw_ref, rates_at
from peftdebias.training import Schedule, make_optimizer

SHAPES = ((3, 7), (5,), (2, 1, 2), (1,))
FLAT_AS_READ = functools.partial(FlatAdamW, as_read=True)
OURS = pytest.mark.parametrize("kind", [FlatAdamW, FLAT_AS_READ, WholeAdamW], ids=["flat", "flat, clipped as read", "whole"])
AS_READ = pytest.mark.parametrize("kind", [FLAT_AS_READ, WholeAdamW], ids=["flat", "whole"])


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def parameters() -> list[Parameter]:
    return [Parameter(drawn(*shape, seed=i)) for i, shape in enumerate(SHAPES)]


def groups(ps: list[Parameter]) -> list[dict]:
    return [{"params": ps[:2], "weight_decay": 0.1}, {"params": ps[2:], "weight_decay": 0.0}]


def both(kind=FlatAdamW):
    ours, theirs = parameters(), parameters()
    return ours, kind(groups(ours), lr=1e-2), theirs, torch.optim.AdamW(groups(theirs), lr=1e-2)


def run(ps, optimizer, count, start=0, without=(), clip=None):
    for t in range(start, start + count):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (t + 1)
        for i, p in enumerate(ps):
            p.grad = None if (t, i) in without else drawn(*p.shape, seed=100 * t + i)
        if clip is not None and t != 2:
            optimizer.clip(ps, clip) if isinstance(optimizer, FlatAdamW | WholeAdamW) else torch.nn.utils.clip_grad_norm_(ps, clip)
        optimizer.step()


def close(ours, theirs):
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-12, atol=1e-14)


@OURS
@pytest.mark.parametrize("clip", [None, 0.7, 1e3])
def test_it_is_adamw(kind, clip):
    """Clipped but in the third step, which no factor of the second's may touch."""
    ours, optimizer, theirs, other = both(kind)
    run(ours, optimizer, 20, clip=clip)
    run(theirs, other, 20, clip=clip)
    close(ours, theirs)


@AS_READ
def test_gradients_are_clipped_as_they_are_read(kind):
    """They stay as they are, the parameters' memory too."""
    ours, optimizer, *_ = both(kind)
    places = [p.data_ptr() for p in ours]
    for p in ours:
        p.grad = torch.ones_like(p)
    optimizer.clip(ours, 0.1)
    optimizer.step()
    assert all((p.grad == 1).all() for p in ours) and places == [p.data_ptr() for p in ours] and optimizer.captured() == []
    assert all(torch.allclose(optimizer.state[p]["exp_avg"], torch.full_like(p, 0.1 * 0.1 / 31 ** 0.5), rtol=1e-5) for p in ours)


def test_the_parameters_are_views_of_one_tensor_a_group_and_keep_their_values():
    ours = parameters()
    optimizer = FlatAdamW(groups(ours), lr=1e-2)
    assert all(torch.equal(p, q) for p, q in zip(ours, parameters()))
    for group, (values, *_) in zip(optimizer.param_groups, optimizer.flat):
        assert {p.untyped_storage().data_ptr() for p in group["params"]} == {values.untyped_storage().data_ptr()}


def test_one_update_a_group():
    ours, calls = parameters(), []
    optimizer = FlatAdamW(groups(ours), lr=1e-2, update=lambda values, *rest, **settings: calls.append(len(values)))
    run(ours, optimizer, 3)
    assert calls == [26, 5] * 3


@OURS
@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("without", [{(1, 0)}, {(0, 2), (1, 2), (4, 1)}, {(t, i) for t in range(6) for i in (2, 3)}])
def test_a_parameter_without_a_gradient_is_passed_over(without, clip, kind):
    ours, optimizer, theirs, other = both(kind)
    run(ours, optimizer, 6, without=without, clip=clip)
    run(theirs, other, 6, without=without, clip=clip)
    close(ours, theirs)


@OURS
@pytest.mark.parametrize("source", [0, 1], ids=["from its own", "from torch's"])
def test_a_state_goes_over(source, kind):
    """Three steps, state and values into a new optimizer, three more: the same as six."""
    ours, optimizer, theirs, other = both(kind)
    run(ours, optimizer, 3)
    run(theirs, other, 3)
    fresh = parameters()
    with torch.no_grad():
        for p, q in zip(fresh, ours):
            p.copy_(q)
    again = kind(groups(fresh), lr=1e-2)
    again.load_state_dict((optimizer, other)[source].state_dict())
    run(fresh, again, 3, start=3)
    run(theirs, other, 3, start=3)
    close(fresh, theirs)
    run(ours, optimizer, 3, start=3)
    close(ours, theirs)  # the source went on undisturbed


@OURS
@pytest.mark.parametrize("without", [(), {(0, 2), (1, 2), (2, 2)}], ids=["of none", "of all but one"])
def test_a_state_without_steps_of_a_parameter_begins_it_anew(without, kind):
    """torch's own lists no parameter that has had no gradient; what stood here is another training's."""
    ours, optimizer, theirs, other = both(kind)
    run(ours, optimizer, 4)
    if without:
        run(theirs, other, 3, without=without)
    optimizer.load_state_dict(other.state_dict())
    with torch.no_grad():
        for p, q in zip(ours, theirs):
            p.copy_(q)
    run(ours, optimizer, 3, start=3)
    run(theirs, other, 3, start=3)
    close(ours, theirs)


def test_the_reference_is_one_step_written_out():
    w, g, m, q = (drawn(7, seed=i) for i in range(4))
    q = q.abs()
    m1, q1 = 0.9 * m + 0.1 * g, 0.99 * q + 0.01 * g * g
    wanted = w * (1 - 0.5 * 0.1) - 0.5 / (1 - 0.9 ** 3) * m1 / ((q1 / (1 - 0.99 ** 3)).sqrt() + 1e-3)
    adamw_ref(w, g, m, q, torch.tensor(rates_at(3, 0.5, (0.9, 0.99), 0.1), dtype=w.dtype), betas=(0.9, 0.99), epsilon=1e-3)
    torch.testing.assert_close((w, m, q), (wanted, m1, q1), rtol=1e-13, atol=1e-15)


@OURS
@pytest.mark.parametrize("together", [True, False])
def test_who_saved_a_parameter_for_a_backward_hears_of_the_update(together, kind):
    """As with torch's own: a gradient from values before and after an update would be wrong and say nothing."""
    for ps, optimizer in (both(kind)[:2], both(kind)[2:]):
        loss = (ps[0] * ps[0]).sum()
        for p in ps[:None if together else 2]:
            p.grad = torch.ones_like(p)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_parameter_whose_memory_was_replaced_is_not_passed_over_in_silence():
    ours, optimizer, *_ = both(WholeAdamW)
    ours[1].data = ours[1].data.clone()
    with pytest.raises(RuntimeError, match="expected parameters that keep their memory"):
        run(ours, optimizer, 1)


@OURS
def test_moments_keep_their_memory_when_a_state_is_loaded(kind):
    """A captured step reads them there."""
    ours, optimizer, *_ = both(kind)
    run(ours, optimizer, 2)
    places = [optimizer.state[p][name].data_ptr() for p in ours for name in ("exp_avg", "exp_avg_sq")]
    optimizer.load_state_dict(optimizer.state_dict())
    assert places == [optimizer.state[p][name].data_ptr() for p in ours for name in ("exp_avg", "exp_avg_sq")]


def test_what_updates_the_same_parameters_is_made_once():
    """Its tables are sent to the device, which a step waits for."""
    ours, made = parameters(), []
    optimizer = WholeAdamW(groups(ours), lr=1e-2, many=lambda *state: made.append(len(state[0])) or AdamWOfManyRef(*state))
    run(ours, optimizer, 6, without={(t, 1) for t in range(2, 6)})
    assert made == [2, 2, 1]  # both groups, and the one of the first that has a gradient
    run(ours, optimizer, 12, start=6, without={(t, t % 4) for t in range(6, 18)})
    assert made == [2, 2, 1, 1, 1, 1]  # each of the others alone


@AS_READ
def test_a_clip_that_no_step_followed_is_forgotten_with_its_gradients(kind):
    ours, optimizer, theirs, other = both(kind)
    for p in ours:
        p.grad = torch.full_like(p, 1e3)
    optimizer.clip(ours, 0.1)
    optimizer.zero_grad()
    run(ours, optimizer, 1)
    run(theirs, other, 1)
    close(ours, theirs)


def test_many_are_updated_one_by_one():
    values, first, second, gradients = ([drawn(*shape, seed=10 * k + i).abs() for i, shape in enumerate(SHAPES)] for k in range(4))
    alone = [[t.clone() for t in ts] for ts in (values, first, second)]
    rates, settings = torch.tensor(rates_at(3, 0.5, (0.9, 0.99), 0.1), dtype=torch.float64), {"betas": (0.9, 0.99), "epsilon": 1e-3}
    AdamWOfManyRef(values, first, second)(gradients, rates, torch.tensor(0.5), **settings)
    for value, one, two, gradient in zip(*alone, gradients):
        adamw_ref(value, gradient / 2, one, two, rates, **settings)
    assert all(torch.equal(a, b) for mine, theirs in zip((values, first, second), alone) for a, b in zip(mine, theirs))


def test_clipped_as_read_gradients_are_gathered_once_a_step(monkeypatch):
    """Two groups: as they are clipped, or by a step without a clip; and by every step anew."""
    ours, optimizer, *_ = both(FLAT_AS_READ)
    gathered, cat = [], torch.cat
    monkeypatch.setattr(torch, "cat", lambda *given, **more: gathered.append(1) or cat(*given, **more))
    for clips, steps, wanted in ((1, 1, 2), (0, 1, 2), (2, 1, 2), (1, 2, 4)):
        for p in ours:
            p.grad = torch.ones_like(p)
        gathered.clear()
        for _ in range(clips):
            optimizer.clip(ours, 0.1)
        for _ in range(steps):
            optimizer.step()
        assert len(gathered) == wanted


@AS_READ
@pytest.mark.parametrize("change", [lambda p: p.grad.mul_(2), lambda p: setattr(p, "grad", p.grad * 2), lambda p: setattr(p, "grad", None)], ids=["in place", "replaced", "gone"])
def test_a_gradient_that_changes_between_clip_and_step_is_seen(change, kind):
    ours, optimizer, theirs, other = both(kind)
    for ps, one, clip in ((ours, optimizer, optimizer.clip), (theirs, other, torch.nn.utils.clip_grad_norm_)):
        for t in range(3):
            for i, p in enumerate(ps):
                p.grad = drawn(*p.shape, seed=10 * t + i)
            clip(ps, 0.7)
            if t == 1:
                change(ps[1])
            one.step()
    close(ours, theirs)


@AS_READ
@pytest.mark.parametrize("done", [lambda optimizer: optimizer.step(), lambda optimizer: optimizer.zero_grad()], ids=["step", "zero_grad"])
def test_a_clip_keeps_no_gradient_for_longer_than_its_step(done, kind):
    ours, optimizer, *_ = both(kind)
    for p in ours:
        p.grad = torch.ones_like(p)
    kept = weakref.ref(ours[0].grad)
    optimizer.clip(ours, 0.1)
    done(optimizer)
    for p in ours:
        p.grad = None
    assert kept() is None and optimizer.factor is None


def test_on_a_cpu_gradients_are_clipped_before_a_step():
    """To the bits of torch's own."""
    ours, theirs = ([Parameter(p.detach().float()) for p in parameters()] for _ in range(2))
    optimizer = make_optimizer({str(i): p for i, p in enumerate(ours)}, Schedule(steps=1, lr=1e-2))
    for ps, clip in ((ours, optimizer.clip), (theirs, torch.nn.utils.clip_grad_norm_)):
        for i, p in enumerate(ps):
            p.grad = drawn(*p.shape, seed=i).float()
        clip(ps, 0.1)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(ours, theirs))


def test_torch_s_own_follows_the_rate_and_clips():
    """LargeAdamW, which a base of more than FLAT values is trained with on a CPU."""
    ours, theirs = parameters(), parameters()
    optimizer, other = LargeAdamW(groups(ours), lr=1.0), torch.optim.AdamW(groups(theirs), lr=1.0)
    for t, rate in enumerate((1e-2, 3e-2, 1e-3)):
        optimizer.set_rate(rate)
        for group in other.param_groups:
            group["lr"] = rate
        for i, (p, q) in enumerate(zip(ours, theirs)):
            p.grad, q.grad = (drawn(*p.shape, seed=100 * t + i) for _ in range(2))
        optimizer.clip(ours, 0.7), torch.nn.utils.clip_grad_norm_(theirs, 0.7)
        optimizer.step(), other.step()
    close(ours, theirs)
