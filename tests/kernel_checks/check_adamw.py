"""AdamW's kernels against torch.optim.AdamW in float64, of one flat tensor and of many, and the optimizers that use them."""

import pytest
import torch

from peftdebias import kernels
from peftdebias.kernels import adamw as fused
from peftdebias.optimizer import AdamWOfManyRef, FlatAdamW, LargeAdamW, WholeAdamW, rates_at
from peftdebias.training import FLAT, Schedule, make_optimizer

from .harness import DEVICE, Guarded, compare, drawn, poisoned, strided

SETTINGS = {"betas": (0.9, 0.999), "epsilon": 1e-8}
LR, DECAY = 3e-3, 0.1


def rates(step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(rates_at(step, LR, SETTINGS["betas"], DECAY), dtype=dtype, device=DEVICE)


def steps(update, factor: float | None):
    """A function of w and five gradients, all [n], that gives w and both moments after five steps of `update`."""
    def run(w, **gradients):
        w, m, q = w.clone(), torch.zeros_like(w), torch.zeros_like(w)
        for t, g in enumerate(gradients.values(), 1):
            update(w, g, m, q, rates(t, w.dtype), None if factor is None else w.new_tensor(factor), **SETTINGS)
        return {"w": w, "m": m, "q": q}
    return run


def library(factor: float | None):
    """The same by torch.optim.AdamW."""
    def run(w, **gradients):
        w = w.clone().requires_grad_()
        optimizer = torch.optim.AdamW([w], lr=LR, betas=SETTINGS["betas"], eps=SETTINGS["epsilon"], weight_decay=DECAY)
        for gradient in gradients.values():
            w.grad = gradient if factor is None else gradient * gradient.new_tensor(factor)
            optimizer.step()
        return {"w": w, "m": optimizer.state[w]["exp_avg"], "q": optimizer.state[w]["exp_avg_sq"]}
    return run


@pytest.mark.parametrize("n", [1, 13, fused.COUNT - 1, fused.COUNT, 3001])
@pytest.mark.parametrize("factor", [None, 1.0, 0.25])
def test_adamw_errs_no_more_than_twice_torchs(n, factor):
    """Gradients over five orders of magnitude."""
    given = {"w": drawn(n, seed=1)} | {f"g{t}": drawn(n, seed=10 + t, scale=10.0 ** -t) for t in range(1, 6)}
    compare(steps(fused.adamw, factor), library(factor), given, dtype=torch.float32)


@pytest.mark.parametrize("n", [13, fused.COUNT - 1])
def test_adamw_writes_inside_its_tensors_and_leaves_the_gradient(n):
    """Around them lie numbers, of which an update beyond the ends would make others; NaN would stay NaN."""
    guards = [Guarded(drawn(n, seed=i).abs().float(), around=7.0 + i) for i in range(4)]
    fused.adamw(*(g.view for g in guards), rates(1), torch.tensor(0.5, device=DEVICE), **SETTINGS)
    for name, guard in zip(("values", "gradient", "first", "second"), guards):
        guard.check(name, unchanged=name == "gradient")


@pytest.mark.parametrize("change,words", [
    ({"gradient": torch.zeros(4)}, r"adamw, gradient: expected shape \[5\], got \[4\]"),
    ({"first": torch.zeros(5, dtype=torch.bfloat16)}, "adamw, first: expected one of float32, got bfloat16"),
    ({"second": torch.zeros(10)[::2]}, "adamw, second: expected a contiguous tensor, got stride 2"),
    ({"rates": torch.zeros(2)}, r"adamw, rates: expected shape \[3\], got \[2\]"),
    ({"factor": torch.zeros(1)}, r"adamw, factor: expected shape \[\], got \[1\]"),
    ({"factor": torch.zeros((), dtype=torch.float64)}, "adamw, factor: expected one of float32, got float64"),
])
def test_adamw_refuses_by_name(change, words):
    tensors = {n: torch.zeros(5) for n in ("values", "gradient", "first", "second")} | {"rates": rates(1)} | change
    with pytest.raises(ValueError, match=words):
        fused.adamw(**{n: t.to(DEVICE) for n, t in tensors.items()}, **SETTINGS)


def test_the_optimizers_take_them_when_triton_is_asked_for(monkeypatch):
    def trained(kind: str) -> tuple[type, list[torch.Tensor]]:
        parameters = {f"p{i}": torch.nn.Parameter(drawn(*shape, seed=i).float()) for i, shape in enumerate([(3, 7), (5,), (2, 2)])}
        with kernels.use(kind):
            optimizer = make_optimizer(parameters, Schedule(steps=3, lr=1e-2, weight_decay=0.1))
        for t in range(3):
            for i, p in enumerate(parameters.values()):
                p.grad = drawn(*p.shape, seed=10 * t + i).float()
            with poisoned():
                optimizer.step()
        return type(optimizer), [p.detach() for p in parameters.values()]

    (library, wanted), (flat, found) = trained("torch"), trained("triton")
    monkeypatch.setitem(FLAT, "triton", 10)
    (whole, also) = trained("triton")
    assert (flat, whole, library) == (FlatAdamW, WholeAdamW, LargeAdamW)
    for a, b, c in zip(found, wanted, also):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(c, b, rtol=1e-6, atol=1e-7)


def test_it_is_registered_soundly():
    flat = [drawn(5, seed=i).abs().float() for i in range(4)]
    for factor in (None, torch.tensor(0.5, device=DEVICE)):
        torch.library.opcheck(torch.ops.peftdebias.adamw.default, (*flat, rates(1), factor, 0.9, 0.999, 1e-8), test_utils=("test_schema", "test_faketensor"))


# ---------------------------------------------------------------- many tensors

SHAPES = ((13, 37), (1,), (3, 7, 5), (2 * fused.COUNT + 1,), (0,), (fused.COUNT,), (fused.COUNT - 1,))


def many_steps(of_many, factor: float | None):
    """A function of the tensors w0, w1, ... and two gradients of each, that gives them and their moments after two steps."""
    def run(**given):
        values = [given[f"w{i}"].clone() for i in range(len(SHAPES))]
        first, second = [torch.zeros_like(w) for w in values], [torch.zeros_like(w) for w in values]
        update = of_many(values, first, second)
        for t in (1, 2):
            update([given[f"g{t}{i}"] for i in range(len(SHAPES))], rates(t, values[0].dtype), None if factor is None else values[0].new_tensor(factor), **SETTINGS)
        return {f"{n}{i}": t for n, ts in zip("wmq", (values, first, second)) for i, t in enumerate(ts) if t.numel()}
    return run


@pytest.mark.parametrize("factor,layout", [pytest.param(factor, layout, id=f"{words}-{factor}", marks=pytest.mark.slow if (layout is strided) == (factor != 1.0) else ())
                                           for words, layout in (("plain", lambda t: t), ("strided gradients", strided)) for factor in (None, 1.0, 0.3)])
def test_many_err_no_more_than_twice_what_torch_does(factor, layout):
    """Sizes around a program's, one and none; gradients wherever they lie, here after an odd number of elements."""
    given = {f"w{i}": drawn(*shape, seed=i) for i, shape in enumerate(SHAPES)}
    given |= {f"g{t}{i}": drawn(*shape, seed=10 * t + i, scale=10.0 ** -i) for t in (1, 2) for i, shape in enumerate(SHAPES)}
    of_many = lambda *state: lambda gradients, *rest, update=fused.AdamWOfMany(*state), **more: update([layout(g) for g in gradients], *rest, **more)  # noqa: E731
    compare(many_steps(of_many, factor), many_steps(AdamWOfManyRef, factor), given, dtype=torch.float32)


def test_addresses_that_no_vector_load_takes(monkeypatch):
    """A gradient one element into its memory: the kernel must not read it in vectors of four."""
    values, gradients = ([drawn(41, seed=10 * n + i).float() for i in range(3)] for n in (0, 1))
    gradients[1] = torch.cat([gradients[1].new_zeros(1), gradients[1]])[1:]
    assert gradients[1].data_ptr() % 16 and gradients[1].is_contiguous()
    found, told, run = [], [], fused.many_kernel

    class Recorder:  # the interpreter has no vectors: what the kernel is told is looked at
        def __getitem__(self, grid):
            return lambda *given, **more: told.append(more["ALIGNED"]) or run[grid](*given, **more)

    monkeypatch.setattr(fused, "many_kernel", Recorder())
    for of_many in (fused.AdamWOfMany, AdamWOfManyRef):
        state = [v.clone() for v in values], [torch.zeros_like(v) for v in values], [torch.zeros_like(v) for v in values]
        of_many(*state)(gradients, rates(1), None, **SETTINGS)
        found.append(state)
    for mine, theirs in zip(*found):
        torch.testing.assert_close(mine, theirs)
    fused.AdamWOfMany(*state)([g.clone() for g in gradients], rates(1), None, **SETTINGS)
    assert told == [False, True]


def test_many_write_inside_their_tensors_and_leave_the_gradients():
    guards = [[Guarded(drawn(*shape, seed=10 * k + i).abs().float(), around=7.0 + k) for i, shape in enumerate(SHAPES)] for k in range(4)]
    values, gradients, first, second = ([g.view for g in kind] for kind in guards)
    fused.AdamWOfMany(values, first, second)(gradients, rates(1), torch.tensor(0.5, device=DEVICE), **SETTINGS)
    for name, kind in zip(("values", "gradient", "first", "second"), guards):
        for guard in kind:
            guard.check(name, unchanged=name == "gradient")


def test_the_table_is_sent_when_an_address_has_changed():
    values, first, second = ([torch.zeros(5, device=DEVICE) for _ in range(2)] for _ in range(3))
    update, gradients = fused.AdamWOfMany(values, first, second), [torch.ones(5, device=DEVICE) for _ in range(2)]
    tables = []
    for given in (gradients, gradients, [gradients[0], 2 * gradients[1]], gradients):
        update(given, rates(1), None, **SETTINGS)
        tables.append(update.known[1])
    assert tables[0] is tables[1] and tables[1] is not tables[2] is not tables[3] and torch.equal(tables[0], tables[3])
    assert torch.equal(first[0], first[0][:1].expand(5)) and (first[1] > first[0]).all()


def test_a_captured_step_reads_a_table_of_its_own_that_is_filled_when_the_capture_is_over(monkeypatch):
    """Nothing is sent while a capture goes on, and what eager steps do between replays leaves the graph's table alone."""
    values, first, second, eager, graphs, more = ([torch.zeros(5, device=DEVICE) for _ in range(2)] for _ in range(6))
    update, launched, run = fused.AdamWOfMany(values, first, second), [], fused.many_kernel

    class Recorder:
        def __getitem__(self, grid):
            return lambda tiles, sizes, places, *rest, **more: launched.append(places)

    def captured(gradients) -> list[torch.Tensor]:
        with monkeypatch.context() as patch:
            patch.setattr(fused, "capturing", lambda device: True)
            patch.setattr(fused, "many_kernel", Recorder())
            patch.setattr(torch.Tensor, "copy_", lambda *_: pytest.fail("a copy in a capture"))
            patch.setattr(torch.Tensor, "to", lambda *_, **__: pytest.fail("a copy in a capture"))
            update(gradients, rates_before, None, **SETTINGS)
            if gradients is graphs:
                with pytest.raises(RuntimeError, match="adamw_of_many: expected one step a capture"):
                    update(gradients[::-1], rates_before, None, **SETTINGS)
        return update.captured()

    rates_before = rates(1)
    update(eager, rates_before, None, **SETTINGS)
    same, = captured(eager)
    ready = update.spare  # memory that is allocated in a capture is written by the graph's other kernels too
    own, = captured(graphs)
    assert same is launched[0] is update.known[1] and own is launched[1] is ready is not update.spare and update.captured() == []
    other, = captured(more)  # of another shape
    assert other is not own and [row[1] for row in other.tolist()] == [g.data_ptr() for g in more]
    assert own.tolist() == [[t.data_ptr() for t in four] for four in zip(values, graphs, first, second)]
    update(graphs[::-1], rates_before, None, **SETTINGS)
    assert own.tolist()[0][1] == graphs[0].data_ptr() and same.tolist()[0][1] == eager[0].data_ptr() and fused.many_kernel is run


@pytest.mark.parametrize("change,words", [
    (dict(values=[torch.zeros(5)]), "adamw_of_many: expected as many tensors of each kind, at least one, got 1, 2 and 2"),
    (dict(first=[torch.zeros(5), torch.zeros(4)]), r"adamw_of_many, first 1: expected shape \[3\], got \[4\]"),
    (dict(second=[torch.zeros(5, dtype=torch.float64), torch.zeros(3)]), "adamw_of_many, second 0: expected one of float32, got float64"),
    (dict(values=[torch.zeros(10)[::2], torch.zeros(3)]), r"adamw_of_many, values 0: expected a contiguous tensor, got strides \[2\]"),
    (dict(gradients=[torch.zeros(5)]), "adamw_of_many: expected 2 gradients, got 1"),
    (dict(gradients=[torch.zeros(5), torch.zeros(5)]), r"adamw_of_many, gradient 1: expected shape \[3\], got \[5\]"),
    (dict(rates=torch.zeros(2)), r"adamw_of_many, rates: expected shape \[3\], got \[2\]"),
    (dict(factor=torch.zeros(1)), r"adamw_of_many, factor: expected shape \[\], got \[1\]"),
])
def test_many_refuse_by_name(change, words):
    given = {n: [torch.zeros(5), torch.zeros(3)] for n in ("values", "first", "second", "gradients")} | {"rates": torch.zeros(3), "factor": torch.ones(())} | change
    given = {n: [t.to(DEVICE) for t in ts] if isinstance(ts, list) else ts.to(DEVICE) for n, ts in given.items()}
    with pytest.raises(ValueError, match=words):
        fused.AdamWOfMany(given["values"], given["first"], given["second"])(given["gradients"], given["rates"], given["factor"], **SETTINGS)


@pytest.mark.parametrize("form", [FlatAdamW, WholeAdamW])
def test_what_they_train_goes_where_torchs_goes(form):
    """Clipped as it is read, with decay on the matrices alone; and a gradient that is missing in one step."""
    def trained(kind: str) -> list[torch.Tensor]:
        parameters = {f"p{i}": torch.nn.Parameter(drawn(*shape, seed=i).float()) for i, shape in enumerate([(30, 70), (50,), (20, 20)])}
        with kernels.use(kind), pytest.MonkeyPatch.context() as patch:
            patch.setitem(FLAT, "triton", 10 if form is WholeAdamW else FLAT["triton"])
            optimizer = make_optimizer(parameters, Schedule(steps=3, lr=1e-2, weight_decay=0.1))
        assert kind == "torch" or type(optimizer) is form and optimizer.as_read
        for t in range(4):
            for i, p in enumerate(parameters.values()):
                p.grad = None if (t, i) == (2, 1) else drawn(*p.shape, seed=10 * t + i).float() * (0.001 if t == 1 else 1.0)
            optimizer.clip(list(parameters.values()), 1.0)
            with poisoned():
                optimizer.step()
        return [p.detach() for p in parameters.values()]

    for mine, theirs in zip(trained("triton"), trained("torch")):
        torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=1e-7)


def test_the_decay_of_the_moments_is_that_of_float64():
    """1 - 0.999 in float32, taken in the kernel, would be off by 1e-5 of itself."""
    values, gradients, first, second = torch.ones(5, device=DEVICE), torch.ones(5, device=DEVICE), torch.zeros(5, device=DEVICE), torch.zeros(5, device=DEVICE)
    fused.adamw(values, gradients, first, second, torch.tensor([1.0, 1e-3, 1.0], device=DEVICE), None, betas=(0.9, 0.999), epsilon=1e-8)
    torch.testing.assert_close(second, torch.full_like(second, 1e-3), rtol=1e-6, atol=0)
