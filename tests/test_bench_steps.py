"""The steps of bench/gpu.py and their curves: what is compared with what, in which order, and what is red. No figure is looked at."""

import contextlib
import dataclasses
import json
import types

import pytest
import torch

from .benched import CEILINGS, HAVE_BOTH, modules, planted, quick  # noqa: F401  (quick is a fixture)
from .outside import one_thread  # noqa: F401  (a fixture: small models on one thread)

bench = modules("case", "cases", "cases_steps", "gpu", "lineup", "measure")


def test_a_graph_s_most_is_its_longest_batch_run_eagerly(bench, monkeypatch, tmp_path):
    setting, asked = bench.case.Setting("micro", 20, tmp_path, batches=3, longest=48, sequences=4), []
    assert bench.cases_steps.ours("lora", "graph")(setting).most is None  # nothing is captured on a CPU
    step = types.SimpleNamespace(loss=None, eagerly=lambda batch, rate: asked.append(len(batch.ids)))
    monkeypatch.setitem(bench.cases_steps.training.STEPS, "graph", lambda *given, **how: step)
    model = bench.cases_steps.load_model(bench.cases_steps.model_folder(setting))[0]
    monkeypatch.setattr(bench.cases_steps, "loaded", lambda key, load, setting: model)
    monkeypatch.setattr(model, "to", lambda device: model)
    for module in ("training.make_optimizer", "rounded_beforehand"):
        monkeypatch.setattr(f"bench.cases_steps.{module}", lambda *given, **how: contextlib.nullcontext())
    optimizer = types.SimpleNamespace(flat=(), state={}, param_groups=[])
    monkeypatch.setattr(bench.cases_steps.training, "make_optimizer", lambda *given: optimizer)
    bench.cases_steps.ours("lora", "graph")(dataclasses.replace(setting, device=torch.device("cuda"))).most()
    assert asked == [max(sum(len(s.ids) for s in batch) for batch in bench.cases_steps.texts(setting))]


def test_what_is_compiled_answers_for_itself(bench, monkeypatch, tmp_path):
    """The tensors that are compared are those of the compiled function, not of the plain one beside it."""
    setting = bench.case.Setting("micro", 20, tmp_path, batches=2, longest=48, sequences=4, dropout=0.0)
    monkeypatch.setattr(torch, "compile", lambda function, **how: lambda *given: 3 * function(*given))
    found = {kind: bench.cases_steps.ours("lora", kind)(setting).results() for kind in ("eager", "compiled")}
    for name, expected in found["eager"].items():
        torch.testing.assert_close(found["compiled"][name], 3 * expected, rtol=2e-4, atol=1e-7)


@pytest.mark.skipif(not HAVE_BOTH, reason="transformers and peft are not installed")
def test_a_base_in_bf16_trains_without_autocast(bench, monkeypatch, tmp_path):
    """On a GPU alone, and at the foremost shape; A and B stay in float32."""
    case, setting = bench.cases.CASES["lora_step"], bench.case.Setting("micro", 20, tmp_path, precision="bf16", batches=2, longest=48, sequences=4, dropout=0.0)
    name = "transformers+peft, base in bf16"
    assert name in bench.lineup.taking_part(case, False, print, "cuda", True) and name not in bench.lineup.taking_part(case, False, print, "cpu")
    monkeypatch.setattr(bench.cases_steps, "autocast", lambda setting: pytest.fail("under autocast"))
    work = case.providers[name].build(setting)
    work.run()
    found = work.results()
    monkeypatch.undo()
    expected = case.providers["transformers+peft"].build(setting).results()
    assert 0 < abs(float(found["loss"] - expected["loss"])) < 0.02 and {t.dtype for key, t in found.items() if key != "loss"} == {torch.float32}


def test_a_loaded_base_is_copied_for_a_gpu(bench, tmp_path):
    steps = bench.cases_steps
    made, on = [], {device: bench.case.Setting("micro", 20, tmp_path, torch.device(device)) for device in ("cuda", "cpu")}

    def load():
        made.append(steps.load_model(steps.model_folder(on["cpu"]))[0])
        return made[-1]

    a, b = (steps.loaded((tmp_path, "ours"), load, on["cuda"]) for _ in range(2))
    assert len(made) == 1 and len({id(m) for m in (a, b, made[0])}) == 3
    values = [dict(m.named_parameters()) for m in (a, b, made[0])]
    assert values[0].keys() == values[1].keys() == values[2].keys() and len({p.data_ptr() for v in values for p in v.values()}) == 3 * len(values[0])
    assert all(torch.equal(values[0][name], p) for name, p in values[2].items())
    assert steps.loaded((tmp_path, "ours"), load, on["cpu"]) is made[1]


def test_steps_begin_with_what_matters_most(bench, tmp_path):
    def names(entries):
        return [(case.name, setting.x) for case, setting in entries]

    to_check, timed = bench.gpu.step_plan(torch.device("cpu"), "base", False, tmp_path)
    assert [case.name for case, _ in timed[:3]] == ["gemm", "gemm", "copy"]
    assert names(timed[-1:]) == [("gemm at the end", 8192)]
    steps = timed[3:-1]
    assert names(steps[:8]) == [("lora_step 128x128", 51), ("lora_step 128x128", 128), ("lora_step 128x256", 102), ("lora_step 128x256", 256), ("lora_step 32x128", 51),
                                ("lora_step 32x128", 128), ("adapter_step 128x128", 51), ("adapter_step 128x128", 128)]
    assert len(steps) == len(set(names(steps))) == 4 * 3 * 2
    for case, setting in steps:
        method, shape = case.name.split()
        known, first = bench.cases.CASES[method].providers, shape == "128x128"
        left = {f"{case.baseline}, length-bucketed"} if setting.x == setting.longest else set()
        left |= {"peftdebias, compiled", f"{case.baseline}, base in bf16"} if method != "lora_step" or not first else set()
        assert list(case.providers) == [name for name in known if name not in left] and f"{setting.sequences}x{setting.longest}" == shape
    assert names(to_check) == [(f"{method}_step 32x128", 51) for method in ("lora", "adapter", "prefix", "full")]  # the smallest
    assert [any(p.compiled for p in case.providers.values()) for case, _ in to_check] == [True, False, False, False]
    to_check, _ = bench.gpu.step_plan(torch.device("cpu"), "base", False, tmp_path, compiled=False)
    assert not any(p.compiled for case, _ in to_check for p in case.providers.values())
    to_check, timed = bench.gpu.step_plan(torch.device("cpu"), "base", False, tmp_path, ("32x128", "128x256"))
    assert [name for name, _ in names(timed[3:])][:6:2] == ["lora_step 128x256", "lora_step 32x128", "adapter_step 128x256"]
    only = bench.gpu.chosen(timed, "full_step")
    assert names(only[3:-1]) == [("full_step 128x256", 102), ("full_step 128x256", 256), ("full_step 32x128", 51), ("full_step 32x128", 128)]
    providers = {case.name: case.providers for case, _ in timed}
    assert bench.gpu.compiled_at(timed, {name: case.providers for name, case in bench.cases.CASES.items()})[:5] == [
        ("lora_step 128x256", 102, "transformers+peft, compiled"), ("lora_step 128x256", 102, "peftdebias, compiled"), ("lora_step 128x256", 256, "transformers+peft, compiled"),
        ("lora_step 128x256", 256, "peftdebias, compiled"), ("lora_step 32x128", 51, "transformers+peft, compiled")] and "peftdebias, compiled" not in providers["lora_step 32x128"]
    for compiled in (True, False):  # of a step; a single op is compared compiled as well
        to_check, timed = bench.gpu.plan(torch.device("cpu"), "base", False, tmp_path, compiled)  # a single op at its last size
        assert {case.name for case, _ in to_check if any(p.compiled for p in case.providers.values())} >= {"gelu"}
        assert [(setting.x, any(p.compiled for p in case.providers.values())) for case, setting in to_check if case.name == "lora_step"] == [(54, compiled), (128, compiled)]
        keys = bench.gpu.compiled_at(timed, {name: case.providers for name, case in bench.cases.CASES.items()})
        assert [key for key in keys if key[0] == "gelu"] == [("gelu", 65536, "plain torch, compiled")]
        assert {(x, name) for case, x, name in keys if case == "lora_step"} == {(x, name) for x in (54, 128) for name in ("transformers+peft, compiled", *["peftdebias, compiled"] * compiled)}


@pytest.mark.skipif(not HAVE_BOTH, reason="compares with transformers and peft, which are not installed")
def test_a_method_that_is_not_equal_is_timed_at_no_shape(bench, quick, monkeypatch, capsys, tmp_path):  # noqa: F811
    planted(bench, monkeypatch, "adapter_step", lambda r: {**r, "loss": r["loss"] + 1})
    monkeypatch.setattr(bench.gpu, "unlike_the_cpu", lambda *_: {})
    out = tmp_path / "rows.json"
    assert bench.gpu.main(["--device", "cpu", "--dry-run", "--steps", "--repeats", "1", "--only", "lora_step,adapter_step", "--out", str(out)]) == 1
    assert "adapter_step 4x48, micro, mean_length 19: peftdebias differs from transformers, adapters by hand" in capsys.readouterr().out
    rows = json.loads(out.read_text())
    assert {row["kernel_name"] for row in rows} == {*CEILINGS, "lora_step 4x48"}
    providers = {x: {row["provider"] for row in rows if row["kernel_name"] == "lora_step 4x48" and row["x_value"] == x} for x in (19, 48)}
    assert providers[19] - providers[48] == {"transformers+peft, length-bucketed"} and "peftdebias, CUDA graph" in providers[48]


def test_both_phases_against_the_twins_and_in_the_loop_with_its_validations(bench, tmp_path, monkeypatch):
    curves, said = bench.gpu.curves, []
    assert curves.check(torch.device("cpu"), tmp_path, 3, "micro", phases=("lora", "full"), say=said.append) == []
    assert [line.split(":")[0] for line in said[1::2]] == ["lora, float32, eager, the loop of training.py", "full, float32, eager, the loop of training.py"]
    setting = bench.case.Setting("micro", 40, tmp_path, torch.device("cpu"), "bf16", dropout=0.0, sequences=4, longest=64, batches=2)
    assert curves.whole(setting, "adapter", 2, "eager", say=said.append) == []
    monkeypatch.setattr(curves.training, "autocast", lambda *_: contextlib.nullcontext())
    (red,) = curves.whole(setting, "adapter", 2, "eager", say=said.append)
    assert red.startswith("adapter, bf16, eager, the loop of training.py: RuntimeError: ")


def test_curves_that_part_are_red(bench):
    curves, nan = bench.gpu.curves, float("nan")
    first = {"a": torch.tensor([1.0, 0.0], dtype=torch.float64)}
    wanted = curves.Curve(60 * [1.0], first)

    def red(losses, gradients=first, precision="float32"):
        return curves.trouble(curves.Curve(losses, gradients), wanted, precision)[0]

    def turned(cosine):
        return {"a": torch.tensor([cosine, (1 - cosine ** 2) ** 0.5], dtype=torch.float64)}

    assert red(60 * [1.0]) == red(60 * [1.005], turned(0.995), "bf16") == []
    assert red(55 * [1.0] + 5 * [1.001]) == red(55 * [1.0] + [1.001] + 4 * [1.0]) == ["loss over all steps: off by 0.001, allowed 0.0001"]
    assert red(60 * [1.00005]) == ["loss over the first 50 steps: off by 5e-05, allowed 1e-05"] and len(red(60 * [nan])) == 2
    assert red(60 * [1.0], {}) == ["gradients: expected those of 1 parameters, got 0", "gradient of a: nan of what is allowed"]
    assert red(60 * [1.0], {"a": nan * first["a"]}) == ["gradient of a: nan of what is allowed"]
    assert red(60 * [1.0], turned(0.98), "bf16") == ["gradient of a: 2 of what is allowed"]


def test_a_validation_that_rises_in_the_loop_is_red(bench, monkeypatch, tmp_path):
    curves, found = bench.gpu.curves, types.SimpleNamespace(before={"loss": 1.0}, best={"loss": 1.02})
    monkeypatch.setattr(curves, "begun", lambda setting, phase: (None, {}, [[]], None)), monkeypatch.setattr(curves.training, "train", lambda *_, **__: found)
    setting = bench.case.Setting("micro", 40, tmp_path)
    assert curves.whole(setting, "lora", 2, "eager", say=lambda line: None) == [
        "lora, float32, eager, the loop of training.py: validation 1.0000 before, 1.0200 at best in 2 steps"]
    found.best["loss"] = 1.009
    assert curves.whole(setting, "lora", 2, "eager", say=lambda line: None) == []


def test_curves_are_held_against_the_twins_on_the_cpu(bench, monkeypatch, tmp_path):
    asked, curves = [], bench.gpu.curves
    monkeypatch.setattr(curves, "curve", lambda setting, phase, steps, implementation, *_, **__: (asked.append((setting.device.type, implementation)), curves.Curve([1.0], {}))[1])
    monkeypatch.setattr(curves, "whole", lambda *_: [])
    assert curves.check(torch.device("cpu"), tmp_path, 1, "micro", phases=("lora",), say=lambda line: None) == [] and asked == [("cpu", "torch"), ("cpu", "auto")]


def test_the_base_of_the_curves_is_updated_as_a_whole_base_is(bench):
    """On a device the 200 steps of `full` are what shows WholeAdamW in captured steps: its model must be larger than what is gathered into one tensor."""
    with torch.device("meta"):
        model = bench.gpu.curves.Model(bench.case.SIZES["tiny"].encoder_config(0.0), labels=("a", "b"))
    assert sum(p.numel() for p in model.parameters()) > bench.gpu.curves.training.FLAT["triton"]


@pytest.mark.skipif(not HAVE_BOTH, reason="compares with transformers and peft, which are not installed")
def test_a_method_whose_losses_leave_those_of_the_cpu_is_not_timed(bench, quick, monkeypatch, capsys, tmp_path):  # noqa: F811
    monkeypatch.setattr(bench.gpu.curves, "check", lambda *_, phases, **__: ["lora, float32, eager: loss over all steps: off by 1"] if phases == ("lora",) else [])
    out = tmp_path / "rows.json"
    assert bench.gpu.main(["--device", "cpu", "--dry-run", "--steps", "--repeats", "1", "--only", "lora_step,prefix_step", "--out", str(out)]) == 1
    assert "- lora, float32, eager: loss over all steps: off by 1" in capsys.readouterr().out
    assert {row["kernel_name"] for row in json.loads(out.read_text())} == {*CEILINGS, "prefix_step 4x48"}


def test_a_method_is_held_against_the_cpu_for_200_steps_and_waits_for_nothing(bench, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(bench.gpu.curves, "check", lambda device, folder, steps, size, phases, say: asked.append((steps, size, phases))
                        or [f"{phases[0]} parts"] * (phases[0] == "lora"))
    monkeypatch.setattr(bench.gpu.curves, "waits", lambda device, folder, phases: ["item()"] * (phases[0] == "full"))
    red = bench.gpu.unlike_the_cpu(torch.device("cuda"), False, tmp_path, ["lora_step", "full_step", "prefix_step"])
    assert red == {"lora_step": "lora parts", "full_step": "a step waits for the device: item()"} and asked == [(200, "tiny", (phase,)) for phase in ("lora", "full", "prefix")]
    bench.gpu.unlike_the_cpu(torch.device("cpu"), True, tmp_path, ["full_step"])
    assert asked[-1] == (3, "micro", ("full",))


def test_on_a_gpu_curves_are_of_both_precisions_and_both_kinds_of_step(bench, monkeypatch, tmp_path):
    """What parts is red, and so is what fails in the loop."""
    curves, asked, loops = bench.gpu.curves, [], []

    def curve(setting, phase, steps, implementation, kind="eager", say=None):
        asked.append((setting.device.type, setting.precision, kind, implementation, setting.batches))
        return curves.Curve([1.5 if (setting.precision, kind) == ("bf16", "graph") else 1.0], {})

    monkeypatch.setattr(curves, "curve", curve)
    monkeypatch.setattr(curves, "whole", lambda setting, phase, steps, kind, *rest: loops.append((setting.precision, kind, steps)) or ["it fails"])
    red = curves.check(torch.device("cuda"), tmp_path, 200, phases=("lora",), say=lambda line: None)
    assert asked == [("cpu", "float32", "eager", "torch", 8), *(("cuda", precision, kind, "auto", 8) for precision in ("float32", "bf16") for kind in ("eager", "graph"))]
    assert loops == [("bf16", "graph", 40)]
    assert red == [*(f"lora, bf16, graph: loss over {what} steps: off by 0.5, allowed 0.01" for what in ("the first 50", "all")), "it fails"]


def test_a_curve_goes_through_the_batches_by_the_ops_that_it_is_asked_for(bench, monkeypatch, tmp_path):
    from peftdebias import kernels

    curves, seen = bench.gpu.curves, []
    loss = curves.MaskedLM.loss
    monkeypatch.setattr(curves.MaskedLM, "loss", lambda self, model, batch: (seen.append((kernels.setting(), int(batch.ids.sum()))), loss(self, model, batch))[1])
    setting = bench.case.Setting("micro", 20, tmp_path, dropout=0.0, sequences=4, longest=48, batches=3)
    found = curves.curve(setting, "lora", 4, "torch", say=lambda line: None)
    sums = [sum(int(s.ids.sum()) for s in batch) for batch in curves.texts(setting)]
    assert seen == [("torch", sums[i]) for i in (0, 0, 0, 1, 2, 0)] and len(found.losses) == 4 and len(set(sums)) == 3


def test_steps_that_were_to_be_replayed_and_ran_eagerly_are_red(bench, monkeypatch, tmp_path):
    """Their losses and times are no graph's. On a CPU there is none, which is the plainest way to have none."""
    curves, why = bench.gpu.curves, "expected a CUDA device, the model is on cpu"
    setting = bench.case.Setting("micro", 20, tmp_path, dropout=0.0, sequences=4, longest=48, batches=3)
    found, eager = (curves.curve(setting, "lora", 2, "torch", kind, lambda line: None) for kind in ("graph", "eager"))
    assert (found.off, eager.off) == (why, "") and found.losses == eager.losses and found.gradients.keys() == eager.gradients.keys() and found.gradients
    assert curves.whole(setting, "lora", 2, "graph", "torch", say=lambda line: None) == [
        f"lora, float32, graph, the loop of training.py: CUDA graphs: off, every step runs eagerly: {why}"]
    monkeypatch.setattr(curves, "curve", lambda setting, *rest, **more: curves.Curve([1.0], {}, "no room" if setting.precision == "bf16" and "graph" in rest else ""))
    monkeypatch.setattr(curves, "whole", lambda *_: [])
    assert curves.check(torch.device("cuda"), tmp_path, 1, phases=("lora",), say=lambda line: None) == ["lora, bf16, graph: no CUDA graph: no room"]
    asked, step = [], types.SimpleNamespace(off="no room")
    with monkeypatch.context() as patched:
        patched.setattr(bench.cases_steps, "expect_replayed", lambda step, device: asked.append((step.off, device.type)))
        bench.cases_steps.ours("lora", "graph")(setting).run()
    assert asked == [(why, "cpu")]
    bench.cases_steps.expect_replayed(step, torch.device("cpu"))
    bench.cases_steps.expect_replayed(object(), torch.device("cuda"))
    with pytest.raises(RuntimeError, match="^CUDA graphs are off: no room$"):
        bench.cases_steps.expect_replayed(step, torch.device("cuda"))


def test_both_kinds_of_step_are_watched_for_waits(bench, monkeypatch, tmp_path):
    """The device is pretended; what a step's work holds is held while it runs."""
    curves, modes, ran = bench.gpu.curves, [], []

    class Step:
        def __init__(self, kind):
            held = self.held = [1]

            def run():  # as a Work's: it does not hold what holds it
                ran.append((kind, modes[-1], bool(held)))
                if kind == "graph" and modes[-1] == "error":
                    raise RuntimeError("called a synchronizing CUDA operation\nat x")

            self.run = run

        def __del__(self):
            self.held.clear()

    monkeypatch.setattr(bench.cases_steps, "ours", lambda phase, kind: lambda setting: Step(kind))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    assert curves.waits(torch.device("cpu"), tmp_path, ("lora",)) == ["lora, graph: called a synchronizing CUDA operation"]
    assert ran == [("eager", "default", True), ("eager", "error", True), *(("graph", "default", True),) * 3, ("graph", "error", True)] and modes[-1] == "default"


def test_curves_without_a_device_end_in_one_line(bench, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.gpu.curves.main(["--device", "cuda"]) == 2 and capsys.readouterr() == ("", "bench: --device cuda: expected a CUDA device, found none\n")


@pytest.mark.parametrize("red", [[], ["lora, float32, eager: loss over all steps: off by 1"]])
def test_curves_that_part_end_with_exit_code_1(bench, monkeypatch, capsys, red):
    asked = []
    monkeypatch.setattr(bench.gpu.curves, "check", lambda *a: asked.append(a) or red)
    code = bench.gpu.curves.main(["--device", "cpu", "--steps", "7", "--size", "micro", "--kernels", "torch", "--phases", "full", "lora"])
    assert code == len(red) and capsys.readouterr().out == "".join(f"RED {line}\n" for line in red) and asked[0][2:] == (7, "micro", "torch", ("full", "lora"))


def test_a_compiled_step_that_parts_or_fails_is_left_out_alone(bench, monkeypatch, tmp_path, capsys):
    """It is LoRA's, compared on one batch; the other providers of its case are timed."""
    curves, asked = bench.gpu.curves, []

    def curve(setting, phase, steps, implementation, kind="eager", say=None):
        asked.append((setting.device.type, setting.precision, phase, kind, implementation, setting.batches))
        if fails and kind == "compiled":
            raise RuntimeError("no compiler\nhere")
        return curves.Curve([1.5 if kind == "compiled" else 1.0], {})

    monkeypatch.setattr(curves, "curve", curve)
    fails = False
    red = curves.compiled(torch.device("cuda"), tmp_path, say=lambda line: None)
    assert asked == [("cpu", "float32", "lora", "eager", "torch", 1), ("cuda", "float32", "lora", "compiled", "auto", 1)] and len(red) == 2 and "off by 0.5" in red[0]
    fails = True
    assert curves.compiled(torch.device("cuda"), tmp_path, say=lambda line: None) == ["lora, float32, compiled: RuntimeError: no compiler"]
    run = bench.gpu.Run(bench.gpu.parser().parse_args(["--device", "cpu", "--dry-run", "--steps", "--only", "lora_step,full_step", "--compile"]), tmp_path)
    monkeypatch.setattr(bench.gpu, "unlike_the_cpu", lambda *given: {}), monkeypatch.setattr(bench.gpu, "checked", lambda entries, providers, clock, red: {})
    run.device = torch.device("cuda")
    name = bench.gpu.COMPILED_STEP
    assert run.equality(bench.gpu.Clock(8, True))[0] == {name: "lora, float32, compiled: RuntimeError: no compiler"}
    assert run.equality(bench.gpu.Clock(8, True), ["full_step"])[0] == {} and name in bench.cases.CASES["lora_step"].providers
    timed = []
    monkeypatch.setattr(bench.measure, "time_case", lambda case, setting, taking, *rest, **more: timed.append((case.name, name in taking, len(taking) > 3)) or [])
    entries = [entry for entry in run.to_time if entry[0].name == "lora_step 4x48"][:1]
    for red, there in (({}, True), ({name: "no compiler"}, False)):
        bench.gpu.timed(entries, run.providers, {}, 1, bench.gpu.Clock(8, True), red, lambda key: "")
        assert timed.pop() == ("lora_step 4x48", there, True)
    assert f"{name} is not measured: no compiler" in capsys.readouterr().err
