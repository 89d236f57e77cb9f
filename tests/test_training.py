"""The loop and the two tasks: what is kept, when it validates, what it logs, what it clips, and what a batch and its loss are."""

import contextlib
import io
import math

import numpy
import pytest
import torch
import torch.nn.functional as F

from peftdebias import training
from peftdebias.batches import Sample, pack
from peftdebias.buckets import in_memory
from peftdebias.encoder import EncoderConfig, Model
from peftdebias.errors import ConfigError, DataError, PeftDebiasError
from peftdebias.patch import all_parameters, train_only
from peftdebias.step import Step
from peftdebias.tasks import Classification, MaskedLM, class_probabilities, label_indices, labelled_samples, masked_lm_nll, scored_batches
from peftdebias.tokens import STYLES, wordpiece
from peftdebias.training import Schedule, make_optimizer, pick_device, pick_precision, train

from .outside import one_thread  # noqa: F401

TOKENIZER = wordpiece([*STYLES["bert"].values(), *(f"w{i}" for i in range(56))])
TINY = EncoderConfig(kind="bert", layers=1, hidden=14, heads=2, feed_forward=37, vocab=61, max_positions=19)
LENGTHS = (13, 1, 7, 5)


def model_of(labels=("a", "b", "c"), mlm=False, seed=0) -> Model:
    model = Model(TINY, mlm=mlm, labels=labels)
    model.initialize(model, torch.Generator().manual_seed(seed))
    return model


class Plain:
    """Five batches an epoch of random labelled texts; validation gives the values it was told, in order. Remembers the weights at each validation."""

    metric, higher_is_better = "score", True

    def __init__(self, values=(), higher=True):
        self.values, self.higher_is_better, self.seen = list(values), higher, []

    def epoch(self, number):
        generator = numpy.random.default_rng(number)
        for _ in range(5):
            yield pack([Sample(generator.integers(5, 61, n), numpy.array([0]), generator.integers(0, 3, 1)) for n in LENGTHS])

    def loss(self, model, batch):
        return F.cross_entropy(model.class_logits(batch), batch.targets)

    def validate(self, model):
        self.seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
        return {"score": self.values[len(self.seen) - 1] if self.values else 0.0, "other": 1.0}


def run(task, model=None, **schedule):
    """(model, outcome, events) of a training."""
    model, events = model or model_of(), []
    parameters = all_parameters(model)
    train_only(model, parameters.values())
    outcome = train(model, task, parameters, Schedule(**{"steps": 20, "lr": 1e-3, "validate_every": 5} | schedule), lambda **event: events.append(event))
    return model, outcome, events


def equal(model, state) -> bool:
    return all(torch.equal(p, state[n]) for n, p in model.named_parameters())


# ---------------------------------------------------------------- what is kept

@pytest.mark.parametrize("higher,values,at", [(True, [0.0, 1.0, 9.0, 9.0, 2.0], 2), (False, [0.0, 4.0, 3.0, 5.0, 3.5], 2), (True, [9.0, 1.0, 2.0, 3.0, 4.0], 4)])
def test_the_best_state_is_kept_not_the_last_nor_the_untrained(higher, values, at):
    task = Plain(values, higher)
    model, outcome, _ = run(task)
    assert outcome.before["score"] == values[0] and outcome.best["score"] == values[at] and outcome.best_step == 5 * at  # of equals, the first
    assert equal(model, task.seen[at]) and not equal(model, task.seen[at - 1]) and not model.training
    assert all(p.grad is None for p in model.parameters())  # memory that the next training would have beside its own
    assert at == 4 or not equal(model, task.seen[4])


def test_validation_comes_at_the_start_at_intervals_and_at_the_end():
    def steps(**schedule):
        return [e["step"] for e in run(Plain(), **schedule)[2] if e["event"] == "validation"]

    assert steps(steps=12, validate_every=5) == [0, 5, 10, 12]
    assert steps(steps=10, validate_every=5) == [0, 5, 10]
    assert steps(steps=3, validate_every=1000) == [0, 3]
    assert steps(steps=12, validate_every=None) == [0, 5, 10, 12]  # an epoch is five steps


def test_events_are_what_the_run_folder_keeps():
    _, outcome, events = run(Plain([0, 1, 5, 2, 3]), steps=25, validate_every=10)
    assert [(e["event"], e["step"]) for e in events] == [("validation", 0), ("step", 10), ("validation", 10), ("step", 20), ("validation", 20), ("step", 25), ("validation", 25)]
    assert [e["kept"] for e in events if e["event"] == "validation" and e["step"]] == [True, True, False]
    for e in events:
        if e["event"] == "step":
            assert set(e) == {"event", "step", "loss", "lr", "tokens_per_second", "waiting"} and 0 <= e["waiting"] < 1 and 0.5 < e["loss"] < 2 and e["tokens_per_second"] > 0
            assert e["lr"] == pytest.approx(Schedule(steps=25, lr=1e-3).rate(e["step"]))
        else:
            assert e["score"] in (0, 1, 5, 2) and e["other"] == 1.0


@pytest.mark.parametrize("where", ["validate", "loss"])
def test_whatever_ends_a_training_leaves_a_model_that_answers(where):
    """No dropout, no gradients; torch's generators are as they were."""
    model, parts, state = model_of(), [], torch.get_rng_state()

    class Task(Plain):
        def stop(self, what):
            parts.append(what)
            if len(parts) > 2:
                raise KeyboardInterrupt

        def validate(self, model):
            self.stop("validate") if where == "validate" else None
            return super().validate(model)

        def loss(self, model, batch):
            self.stop("loss") if where == "loss" else None
            return super().loss(model, batch)

    with pytest.raises(KeyboardInterrupt):
        run(Task(), model)
    assert len(parts) == 3 and not model.training and all(p.grad is None for p in model.parameters()) and torch.equal(torch.get_rng_state(), state)


def test_waiting_is_the_share_of_the_steps_in_which_no_batch_was_there(monkeypatch):
    """By a clock of our own: each batch takes 3 s to come, a step 1 s, a validation 100 s."""
    now = [0.0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: now[0])

    class Task(Plain):
        def epoch(self, number):
            for batch in super().epoch(number):
                now[0] += 3
                yield batch

        def loss(self, model, batch):
            now[0] += 1
            return super().loss(model, batch)

        def validate(self, model):
            now[0] += 100
            return super().validate(model)

    for every in (5, None):
        _, outcome, events = run(Task(), steps=20, validate_every=every)
        assert outcome.waiting == 0.75 and {e["waiting"] for e in events if e["event"] == "step"} == {0.75}
        assert outcome.tokens_per_second == 20 * sum(LENGTHS) / 80 and outcome.seconds == 80 + 100 * 5  # 4 seconds a step, without the validations, of which one comes before


def test_the_logged_loss_is_the_mean_since_the_last_line():
    losses = []

    class Task(Plain):
        def loss(self, model, batch):
            losses.append(super().loss(model.eval(), batch).item())
            return super().loss(model, batch)

    events = run(Task(), steps=14)[2]
    assert [e["loss"] for e in events if e["event"] == "step"] == pytest.approx([numpy.mean(losses[:10]), numpy.mean(losses[10:])], rel=1e-5)


# ---------------------------------------------------------------- a step

def test_a_step_is_adamw_with_clipped_gradients_at_the_rate_of_the_schedule():
    """Against torch's unfused AdamW, gradients clipped by hand."""
    model, other = model_of().eval(), model_of()
    task = Plain()
    schedule = Schedule(steps=5, lr=1e-2, warmup=0.4, weight_decay=0.1, clip=0.05)
    parameters = all_parameters(model)
    one_step = Step(model, task, make_optimizer(parameters, schedule), parameters, clip=schedule.clip)
    theirs = torch.optim.AdamW([{"params": [p for p in other.parameters() if p.dim() > 1], "weight_decay": 0.1},
                                {"params": [p for p in other.parameters() if p.dim() == 1], "weight_decay": 0.0}], lr=1.0)
    for step, batch in enumerate(task.epoch(0), 1):
        one_step(batch, schedule.rate(step))
        theirs.zero_grad()
        F.cross_entropy(other.eval().class_logits(batch), batch.targets).backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in other.parameters() if p.grad is not None))
        assert norm > 0.05
        for p in other.parameters():
            if p.grad is not None:
                p.grad *= 0.05 / norm
        for group in theirs.param_groups:
            group["lr"] = [0.005, 0.01, 0.01, 0.02 / 3, 0.01 / 3][step - 1]
        theirs.step()
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)


def test_a_gradient_within_the_norm_is_left_alone():
    model = model_of().eval()
    schedule = Schedule(steps=5, lr=1e-9, clip=1e6)
    parameters, batch = all_parameters(model), next(Plain().epoch(0))
    F.cross_entropy(model.class_logits(batch), batch.targets).backward()
    before = {n: p.grad.clone() for n, p in parameters.items()}
    Step(model, Plain(), make_optimizer(parameters, schedule), parameters, clip=schedule.clip)(batch, 1e-9)
    assert all(torch.equal(p.grad, before[n]) for n, p in parameters.items())


def test_matrices_decay_and_vectors_do_not():
    model = model_of()
    for group in make_optimizer(all_parameters(model), Schedule(steps=1, lr=1.0, weight_decay=0.3)).param_groups:
        assert {p.dim() > 1 for p in group["params"]} == {group["weight_decay"] == 0.3}


def test_only_what_is_named_is_trained():
    model = model_of()
    chosen = {n: p for n, p in all_parameters(model).items() if n.startswith("classifier.output")}
    train_only(model, chosen.values())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, Plain(), chosen, Schedule(steps=3, lr=1e-2))
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == set(chosen) and len(chosen) == 2


def test_the_same_seed_repeats_bit_for_bit_and_leaves_the_callers_random_state_alone():
    models = [model_of() for _ in range(3)]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (run(Plain(), model, steps=5, seed=seed)[0] for model, seed in zip(models, (1, 1, 2)))
    assert torch.equal(torch.rand(3), expected)
    assert equal(first, dict(again.named_parameters())) and not equal(first, dict(other.named_parameters()))  # dropout follows the seed


# ---------------------------------------------------------------- what goes wrong

def test_a_loss_that_is_not_finite_stops_and_says_when():
    class Task(Plain):
        def loss(self, model, batch):
            return super().loss(model, batch) * math.nan

    with pytest.raises(PeftDebiasError, match=r"^step 10: the loss is nan; expected a finite one \(a lower --lr may help\)$"):
        run(Task(), validate_every=20)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_validation_that_is_not_finite_stops(value):
    with pytest.raises(PeftDebiasError, match=rf"^step 5: score in validation is {value}; expected a finite one \(a lower --lr may help\)$"):
        run(Plain([0.0, value]))


def test_parameters_that_are_not_finite_are_never_kept():
    class Task(Plain):
        def validate(self, model):
            if self.seen:
                model.classifier.output.bias.data[1] = math.nan
            return super().validate(model)

    with pytest.raises(PeftDebiasError, match="step 5: classifier.output.bias is not finite any more"):
        run(Task())


def test_a_classifier_that_answers_with_no_numbers_stops_as_parameters_do():
    model, task = model_of(), classification()
    train_only(model, model.classifier.parameters())
    with pytest.raises(PeftDebiasError, match=r"^step 1: classifier.* is not finite any more \(a lower --lr may help\)$"):
        train(model, task, dict(model.classifier.named_parameters(prefix="classifier")), Schedule(steps=1, lr=math.inf))


def test_an_epoch_without_batches_stops():
    class Task(Plain):
        def epoch(self, number):
            return iter(())

    with pytest.raises(PeftDebiasError, match="expected at least one batch an epoch, got none"):
        run(Task())


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("screen", [io.StringIO, Terminal])
def test_the_progress_bar_is_for_terminals_only(screen):
    with contextlib.redirect_stderr(screen()) as err:
        run(Plain(), steps=20)
    said = err.getvalue()
    if screen is io.StringIO:
        assert said == ""
    else:
        assert "20/20" in said and "loss=" in said and "tokens=" in said and said.endswith("\n")


def test_without_a_terminal_there_is_a_line_now_and_then(monkeypatch):
    monkeypatch.setattr(training, "TOLD_EVERY", 0.0)
    for screen, lines in ((io.StringIO, ["training: step 10 of 35, loss ", "training: step 20 of 35, loss ", "training: step 30 of 35, loss "]), (Terminal, [])):
        with contextlib.redirect_stderr(screen()) as err:
            run(Plain(), steps=35)
        said = [line for line in err.getvalue().splitlines() if "of 35" in line]
        assert len(said) == len(lines) and all(line.startswith(start) and line.endswith(" 0.0 minutes left") for line, start in zip(said, lines))


@pytest.mark.parametrize("compiled,expected,left", [(1, (110.0, 50.0, 0.0), "0.3"), (0, (10.0, 50.0, 0.0), "0.3"), (10, (1010.0, 500 / 1010, 0.0), "33.7")])
def test_the_speed_is_that_of_steps_that_were_not_compiled(compiled, expected, left, monkeypatch):
    """Ten steps of a second and 50 tokens, of which the first wait 100 s for the compiler, twenty more to come; where all have waited, that is the speed."""
    now, told = [0.0], []
    monkeypatch.setattr(training.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(training, "TOLD_EVERY", 0.0)
    with training._bar(30, "") as bar, contextlib.redirect_stderr(io.StringIO()) as err:
        progress = training._Progress(30, lambda **event: told.append(event), bar, "")
        for step in range(1, 11):
            took = 101.0 if step <= compiled else 1.0
            now[0] += took
            progress.after(step, torch.tensor(1.0), 0.1, 50, preparing=took if step <= compiled else 0.0)
    assert progress.figures() == expected and [event["tokens_per_second"] for event in told] == [round(expected[1])] and err.getvalue().endswith(f" {left} minutes left\n")


def test_the_time_left_holds_the_validations_to_come(monkeypatch):
    """Ten steps of a second and ten seconds of validation; twenty steps are left."""
    now = [0.0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(training, "TOLD_EVERY", 0.0)
    with training._bar(30, "") as bar, contextlib.redirect_stderr(io.StringIO()) as err:
        progress = training._Progress(30, lambda **event: None, bar, "")
        with progress.aside():
            now[0] += 10
        for step in range(1, 11):
            now[0] += 1
            progress.after(step, torch.tensor(1.0), 0.1, 50)
    assert err.getvalue().endswith(" 0.7 minutes left\n")


def test_steps_that_a_gpu_still_works_at_are_no_validation(monkeypatch):
    """Fourteen steps of a second, of which the host has handed over the last four when the validation of two seconds begins: the device is pretended."""
    now, behind = [0.0], [0]

    def synchronize(device):
        now[0] += behind[0]
        behind[0] = 0

    monkeypatch.setattr(training.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with training._bar(14, "") as bar:
        progress = training._Progress(30, lambda **event: None, bar, "", torch.device("cuda"))
        for step in range(1, 15):
            behind[0] += 1
            if step == 10:
                synchronize(None)  # the loss is asked for
            progress.after(step, torch.tensor(1.0), 0.1, 50)
        with progress.aside():
            synchronize(None)
            now[0] += 2
        assert progress.figures() == (16.0, 50.0, 0.0)


def test_a_training_tells_its_progress_where_it_runs(monkeypatch):
    handed, kept = [], training._Progress
    monkeypatch.setattr(training, "_Progress", lambda *given: handed.append(given[-1]) or kept(*given))
    run(Plain([1.0] * 9))
    assert handed == [torch.device("cpu")]


def test_the_progress_bar_is_closed_before_an_error_is_told():
    class Task(Plain):
        def loss(self, model, batch):
            return super().loss(model, batch) * math.inf

    with contextlib.redirect_stderr(Terminal()) as err:
        try:
            run(Task())
        except PeftDebiasError as error:
            kept = error  # its traceback keeps the loop's frame alive, as in cli.main
            assert err.getvalue().endswith("\n") and kept


# ---------------------------------------------------------------- schedule, device

def test_the_rate_rises_to_the_peak_and_falls_to_one_last_step():
    schedule = Schedule(steps=100, lr=2.0, warmup=0.1)
    rates = [schedule.rate(s) for s in range(1, 101)]
    assert rates[:10] == pytest.approx([0.2 * s for s in range(1, 11)]) and max(rates) == 2.0 and rates[-1] == pytest.approx(2.0 / 90)
    assert numpy.diff(rates[10:]) == pytest.approx(-2.0 / 90)
    assert [Schedule(steps=1, lr=3.0, warmup=w).rate(1) for w in (0, 0.1, 1)] == [3.0, 3.0, 3.0]
    assert Schedule(steps=4, lr=1.0, warmup=1.0).rate(4) == 1.0
    assert Schedule(steps=20, lr=1.0).rate(1) == 0.5 == Schedule(steps=16, lr=1.0).rate(1)  # a tenth, rounded: 2 steps


def test_devices_and_precisions_that_are_not_here(monkeypatch):
    assert pick_device("cpu").type == "cpu" and pick_precision("auto", torch.device("cpu")) == "float32" and pick_precision("auto", torch.device("cuda")) == "bf16"
    for name in ("gpu", "meta", "mps", "", "cuda:x"):
        with pytest.raises(ConfigError, match=f"--device: expected cpu, cuda, cuda:1, ... or auto, got '{name}'"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="--device cuda: expected a CUDA device that is here, found none"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(ConfigError, match="--device cuda:1: expected a CUDA device that is here, found 1"):
        pick_device("cuda:1")


@pytest.mark.parametrize("capability,precision", [((7, 5), "float32"), ((8, 0), "bf16"), ((12, 0), "bf16")])
def test_bf16_is_taken_by_itself_where_the_gpu_multiplies_it(capability, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or capability >= (8, 0))
    assert pick_precision("auto", torch.device("cuda:1")) == precision and pick_precision("bf16", torch.device("cuda:1")) == "bf16"


# ---------------------------------------------------------------- tasks: masked-LM

def texts(lengths, seed=0):
    generator = numpy.random.default_rng(seed)
    return [numpy.concatenate(([TOKENIZER.cls_id], generator.integers(5, 61, n - 2), [TOKENIZER.sep_id])).astype(numpy.int32) for n in lengths]


def families(sizes=(2, 1, 3, 2, 2, 4, 1, 2), seed=0):
    return [texts([8 + i] * size, seed=(seed, i)) for i, size in enumerate(sizes)]


def masked_lm(seed=0, **batch):
    return MaskedLM(in_memory(families(), TOKENIZER, seed=seed, batch=batch or {"batch_size": 5}), families((2, 2), seed=9), TOKENIZER, seed=seed)


@pytest.mark.parametrize("batch", [{"batch_size": 1}, {"batch_size": 5}, {"batch_tokens": 40}])
def test_a_family_is_never_parted_and_comes_once_an_epoch(batch):
    sizes = [len(f) for f in families()]
    for number in range(3):
        seen = []
        for one in masked_lm(**batch).epoch(number):
            members = numpy.bincount(one.family.numpy(), minlength=len(sizes))
            assert all(found in (0, size) for found, size in zip(members, sizes))
            assert (numpy.diff(numpy.flatnonzero(numpy.diff(one.family.numpy()) != 0)) >= 1).all()  # side by side
            assert len(one.lengths) <= batch.get("batch_size", 99) or len(set(one.family.tolist())) == 1
            assert sum(one.lengths) <= batch.get("batch_tokens", 9999) or len(set(one.family.tolist())) == 1
            seen += set(one.family.tolist())
        assert sorted(seen) == list(range(len(sizes)))
    assert [s.family for s in masked_lm().held_out] == [0, 0, 1, 1]


def ids_of(task, number):
    return [b.ids.tolist() for b in task.epoch(number)]


def test_order_and_masks_follow_the_seed_and_the_epoch():
    assert ids_of(masked_lm(), 0) == ids_of(masked_lm(), 0)
    assert ids_of(masked_lm(), 0) != ids_of(masked_lm(), 1) and ids_of(masked_lm(), 0) != ids_of(masked_lm(seed=1), 0)
    alone = MaskedLM(in_memory(families((3,)), TOKENIZER, seed=0, batch={"batch_size": 3}), families((1,)), TOKENIZER, seed=0)  # no order to differ in
    assert ids_of(alone, 0) == ids_of(alone, 0) != ids_of(alone, 1)
    fixed = [s.ids.tolist() for s in masked_lm().held_out]
    assert fixed == [s.ids.tolist() for s in masked_lm().held_out] != [s.ids.tolist() for s in masked_lm(seed=1).held_out]


def test_validation_does_not_move():
    task, model = masked_lm(), model_of(labels=(), mlm=True).train()
    first = task.validate(model)
    list(task.epoch(0)), torch.rand(7)
    assert task.validate(model) == first and model.training  # no dropout, the same masks, the mode put back


def test_the_losses_are_means_over_masked_tokens():
    task, model = masked_lm(), model_of(labels=(), mlm=True).eval()
    batch = next(task.epoch(0))
    with torch.no_grad():
        expected = F.cross_entropy(model.mlm_logits(batch), batch.targets)
        torch.testing.assert_close(task.loss(model, batch), expected)
        found = [F.cross_entropy(model.mlm_logits(pack([s])), torch.as_tensor(s.targets).long(), reduction="sum").item() for s in task.held_out]
    sums, counts = masked_lm_nll(model, task.held_out, batch_tokens=1)
    assert sums == pytest.approx(found, rel=1e-5) and counts.tolist() == [len(s.targets) for s in task.held_out]
    assert task.validate(model)["loss"] == pytest.approx(sum(found) / counts.sum(), rel=1e-5)


def test_a_batch_of_unknown_words_only_costs_nothing():
    unknown = numpy.array([TOKENIZER.cls_id, TOKENIZER.unk_id, TOKENIZER.sep_id])
    batches, model = in_memory([[unknown, unknown]], TOKENIZER, seed=0, batch={"batch_size": 2}), model_of(labels=(), mlm=True)
    task = MaskedLM(batches, families((1,)), TOKENIZER, seed=0)
    loss = task.loss(model, next(task.epoch(0)))
    loss.backward()
    assert loss.item() == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())
    with pytest.raises(DataError, match="validation texts: expected words to mask, got none but special and unknown tokens"):
        MaskedLM(batches, [[unknown]], TOKENIZER, seed=0)


# ---------------------------------------------------------------- tasks: classification

def classification(weights=None, n=11, seed=0, **batch):
    generator = numpy.random.default_rng(1)
    samples = [Sample(ids, numpy.array([0]), generator.integers(0, 3, 1)) for ids in texts(generator.integers(3, 15, n))]
    return Classification(samples, samples[:5], lambda p, t: {"right": float((p == t).sum())}, "right", seed=seed, batch=batch or {"batch_size": 4}, weights=weights)


def test_class_weights_are_a_weighted_mean():
    task, model = classification(weights=[1.0, 10.0, 0.5]), model_of().eval()
    for batch in task.epoch(0):
        nll = -model.class_logits(batch).log_softmax(-1)[range(len(batch.targets)), batch.targets]
        w = torch.tensor([1.0, 10.0, 0.5])[batch.targets]
        torch.testing.assert_close(task.loss(model, batch), (w * nll).sum() / w.sum())
        torch.testing.assert_close(task.loss(model, batch), torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 10.0, 0.5]))(model.class_logits(batch), batch.targets))
        torch.testing.assert_close(classification().loss(model, batch), nll.mean())
        assert len(set(batch.targets.tolist())) > 1 and not torch.isclose(task.loss(model, batch), nll.mean())


def test_every_text_comes_once_an_epoch_in_an_order_of_the_seed():
    task = classification()
    seen = [f for number in range(2) for f in [sorted(tuple(s) for b in task.epoch(number) for s in torch.split(b.ids, b.lengths))]]
    assert [len(s) for s in seen] == [11, 11] and all(len(b.lengths) <= 4 for b in task.epoch(0))
    assert ids_of(classification(), 0) == ids_of(classification(), 0) != ids_of(classification(seed=1), 0)
    assert ids_of(classification(), 0) != ids_of(classification(), 1)


@pytest.mark.parametrize("batch", [{"batch_size": 4}, {"batch_tokens": 21}])
def test_as_many_steps_as_the_epochs_have_batches(batch):
    """Every order of the texts makes batches of its own from a budget of tokens."""
    task = classification(n=400, **batch)
    counts = [len(list(task.epoch(number))) for number in range(10)]
    assert (len(set(counts)) > 1) == ("batch_tokens" in batch)
    assert [task.steps(n) for n in (1, 3, 10)] == [sum(counts[:n]) for n in (1, 3, 10)]


def test_probabilities_come_back_in_the_order_of_the_texts():
    task, model = classification(), model_of().train()
    found = class_probabilities(model, task.samples, batch_tokens=20)
    one_by_one = numpy.concatenate([class_probabilities(model, [s]) for s in task.samples])
    assert found == pytest.approx(one_by_one, abs=1e-6) and found.sum(1) == pytest.approx(numpy.ones(11)) and model.training
    assert task.validate(model) == {"right": float((found[:5].argmax(1) == [s.targets[0] for s in task.held_out]).sum())}


def test_labels_become_indices_and_an_unseen_one_is_named_with_its_place():
    assert label_indices(["b", "a", "b"], ("a", "b"), ["f:2", "f:3", "f:4"]) == [1, 0, 1]
    with pytest.raises(DataError, match="^f:3: label 'c' was not seen in training; expected one of a, b$"):
        label_indices(["b", "c"], ("a", "b"), ["f:2", "f:3"])
    with pytest.raises(DataError, match="expected one of 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...$"):
        label_indices(["x"], [str(i) for i in range(12)], ["f:1"])


def test_a_labelled_sample_asks_for_the_first_token():
    samples = labelled_samples(TOKENIZER.encode(["w1 w2", "w3"], ["w4", "w5 w6"]), [2, 0])
    assert [s.rows.tolist() for s in samples] == [[0], [0]] and [s.targets.tolist() for s in samples] == [[2], [0]]
    assert samples[0].segments.tolist() == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("variable", ["PEFTDEBIAS_KERNELS", "PEFTDEBIAS_LINEAR", "PEFTDEBIAS_ATTENTION", "PEFTDEBIAS_LORA_LINEAR", "PEFTDEBIAS_LORA_GRADS", "PEFTDEBIAS_FEED_FORWARD"])
def test_a_word_in_the_environment_that_says_nothing_is_named_before_anything_runs(variable, monkeypatch):
    monkeypatch.setenv(variable, "quick")
    with pytest.raises(ConfigError, match=f"{variable}: expected one of .*, got 'quick'"):
        pick_device("cpu")


def test_scores_on_a_cpu_come_in_small_batches(monkeypatch):
    """Whatever is asked for; every sample once, and no fewer tokens than what was asked for allows."""
    model, samples = model_of(), [Sample(numpy.arange(5, 5 + n), numpy.array([0])) for n in (3, 9, 4, 5, 9)]
    monkeypatch.setattr("peftdebias.tasks.CPU_TOKENS", 12)
    for asked, most in ((8192, 12), (9, 9)):
        found = list(scored_batches(model, samples, asked))
        assert sorted(i for items, _ in found for i in items) == [*range(5)]
        assert max(len(batch.ids) for _, batch in found) == most
        assert all(batch.lengths == tuple(len(samples[i].ids) for i in items) for items, batch in found)


def test_the_validation_loss_is_the_mean_over_the_masked_tokens():
    """Not over the texts, whatever their lengths."""
    task = MaskedLM(lambda number: iter(()), [[numpy.arange(5, 5 + n)] for n in (17, 3, 11)], TOKENIZER, seed=0)
    model = model_of(mlm=True)
    sums, counts = masked_lm_nll(model, task.held_out)
    assert len(set(counts)) > 1 and task.validate(model)["loss"] == pytest.approx(sums.sum() / counts.sum(), rel=1e-12)


def test_a_model_in_eval_mode_is_trained_with_dropout():
    modes = []

    class Task(Plain):
        def loss(self, model, batch):
            modes.append(model.training)
            return super().loss(model, batch)

    run(Task(), model_of().eval(), steps=2)
    assert modes == [True, True]
