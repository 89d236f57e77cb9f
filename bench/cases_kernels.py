"""One op of a method a case, the loss and dropout: the fused kernels beside plain torch, torch.compile and, where it has the op, peft's own layer. Forward and backward
unless the name says less.

Activations are of the precision's dtype (bf16), parameters float32, products under autocast, a frozen W in bf16: what a user of bf16 has. Every value drawn is one
that bf16 holds, so float32, bf16 and the float64 truth start from the same numbers. `roof` counts what must be moved and multiplied at the least.

Letters: T rows, D hidden, F feed-forward, K bottleneck, R rank, M rows asked for, V vocabulary, I and O widths of a linear, k values kept.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from peftdebias import kernels
from peftdebias.kernels import dispatch
from peftdebias.kernels.dropout_ref import dropout_ref
from peftdebias.methods.adapter import adapter_ref
from peftdebias.methods.lora import lora_grads_ref, lora_linear_ref
from peftdebias.sites import sparse_add_ref
from peftdebias.tasks import mlm_loss_ref
from peftdebias.written import lora_write_ref, lora_written_ref

from .case import RANK, Case, Provider, Setting, Work, autocast, output_bound, quiet

BOTTLENECK = 48
RATE = 0.1
ACTIVATION = {"float32": torch.float32, "bf16": torch.bfloat16, "float64": torch.float64}


def fused(op: str, twin: Callable, setting: Setting) -> Callable:
    """The Triton implementation of `op`; in a dry run its twin where Triton does not run."""
    if setting.stand_in and kernels.missing(op, "triton", setting.device):
        return twin
    with kernels.use("triton"):
        return kernels.choose(op, reference=twin, device=setting.device)


def drawn(setting: Setting, parameter: bool = False, scale: float = 1.0, seed: int = 0, *, shape: tuple[int, ...]) -> Tensor:
    """Normal values that bf16 holds, of the activations' dtype, or of the parameters'."""
    dtype = torch.float32 if parameter and setting.precision == "bf16" else ACTIVATION[setting.precision]
    return (_kept if setting.device.type == "cuda" else _normal)(1000 * setting.seed + seed, shape, scale, setting.device).to(dtype, copy=True)


def _normal(seed: int, shape: tuple[int, ...], scale: float, device: torch.device) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16().to(device)


_kept = functools.lru_cache(maxsize=8)(_normal)  # a GPU's host takes longer to draw than the case to run; all providers get the same values


def bytes_of(setting: Setting) -> int:
    return {"float32": 4, "bf16": 2, "float64": 8}[setting.precision]


def full(setting: Setting, forward: Callable[..., Tensor], given: dict[str, Tensor], wanted: tuple[str, ...], words: str, **more) -> Work:
    """Forward, and backward to the tensors named in `wanted`; results are the output and those gradients."""
    for name in wanted:
        given[name] = given[name] if isinstance(given[name], Parameter) else given[name].detach().requires_grad_()
    with torch.no_grad(), autocast(setting):
        out = forward(**given)
    dy = drawn(setting, seed=99, shape=tuple(out.shape)).to(out.dtype)

    def run() -> tuple[Tensor, ...]:
        with autocast(setting):
            y = forward(**given)
        return (y.detach(), *torch.autograd.grad(y, [given[name] for name in wanted], dy))

    names = ("y", *(f"gradient of {name}" for name in wanted))
    return Work(run, lambda: dict(zip(names, run())), extra={"setting": f"{words}; {setting.precision}"}, **more)


# ---------------------------------------------------------------- lora

def widths(setting: Setting, wide: bool) -> tuple[int, int]:
    """(I, O)."""
    return setting.size.hidden, setting.size.feed_forward if wide else setting.size.hidden


def linear_tensors(setting: Setting, wide: bool) -> dict[str, Tensor]:
    (i, o), t = widths(setting, wide), int(setting.x)
    return {"x": drawn(setting, seed=1, shape=(t, i)), "weight": drawn(setting, scale=i ** -0.5, seed=2, shape=(o, i)), "bias": drawn(setting, seed=3, shape=(o,)),
            "A": drawn(setting, True, i ** -0.5, 4, shape=(RANK, i)), "B": drawn(setting, True, 0.1, 5, shape=(o, RANK))}


def linear_roof(setting: Setting, wide: bool) -> tuple:
    """(forward, dx, the pass for dA and dB)."""
    (i, o), t, e = widths(setting, wide), int(setting.x), bytes_of(setting)
    product = 2.0 * t * i * o, float(e * (t * i + t * o + i * o))
    return product, product, (4.0 * t * RANK * (i + o), float(e * t * (i + o)))


def linear(form: str, wide: bool = False, rate: float = 0.0) -> Callable[[Setting], Work]:
    """form: plain, compiled, peft, or a form of ours: written, epilogue, library (kernels/fused/lora.py); once: written, with dA and dB in one pass (lora_grads.py)."""
    def build(setting: Setting) -> Work:
        given, roof = linear_tensors(setting, wide), linear_roof(setting, wide)
        (i, o), seed = widths(setting, wide), torch.tensor([5], device=setting.device)
        words = f"x [T, {i}], W [{o}, {i}] frozen, r={RANK}, dropout {rate:g}; forward, and backward to x, A, B"
        words += "; W' lies there, a step writes those of all linears in one launch (lora_write)" if form in ("written", "once") else ""
        limits = {"written": "two library GEMMs; dA and dB take x and dY twice more", "once": "two library GEMMs; dA and dB take x and dY once more",
                  "epilogue": "its own GEMM, which a library's is hard to match; x and dY come once more for the thin products",
                  "library": "eight launches forward, with results of their own in between"}
        more = {"tokens": int(setting.x), "roof": roof, "limit": limits.get(form, "")}

        def plain(x, weight, bias, A, B):
            return lora_linear_ref(x, weight, bias, A, B, 2.0, rate, seed)

        if form == "peft":
            return full(setting, peft_layer(setting, given, rate), given, ("x", "A", "B"), words, **more)
        if form in ("written", "once"):
            whole = fused("lora_write", lora_write_ref, setting)([given["weight"]], [(0, 0, given["A"], given["B"], 2.0)], given["x"].dtype)[0]
            op = fused("lora_written", lora_written_ref, setting)

            def merged(x, weight, bias, A, B):
                with dispatch.use("lora_grads", "once" if form == "once" else "twice"):
                    return op(x, whole, bias, [(0, A, B, 2.0)])

            return full(setting, merged, given, ("x", "A", "B"), words, **more)
        if form in ("epilogue", "library"):
            op = fused("lora_linear", lora_linear_ref, setting)

            def forced(x, weight, bias, A, B):
                with dispatch.use("lora_linear", form):
                    return op(x, weight, bias, A, B, 2.0, rate, seed)

            return full(setting, forced, given, ("x", "A", "B"), words, **more)
        return full(setting, torch.compile(plain) if form == "compiled" else plain, given, ("x", "A", "B"), words, **more)

    return build


def peft_layer(setting: Setting, given: dict[str, Tensor], rate: float) -> Callable[..., Tensor]:
    """peft's own LoRA layer, as get_peft_model makes it: W in the base's dtype, A and B float32. Its A and B take their place in `given`."""
    quiet()
    import peft

    holder = nn.Sequential()
    holder.add_module("wrapped", nn.Linear(*reversed(given["weight"].shape), dtype=given["weight"].dtype))
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=rate, target_modules=["wrapped"])
    layer = peft.get_peft_model(holder, config).base_model.model.wrapped.to(setting.device)
    layer.base_layer.weight.data, layer.base_layer.bias.data = given["weight"], given["bias"]
    for slot, name in ((layer.lora_A["default"], "A"), (layer.lora_B["default"], "B")):
        given[name] = slot.weight = Parameter(given[name])

    return lambda x, **others: layer(x)


def frozen_linear(wide: bool) -> Callable[[Setting], Work]:
    """The yardstick: forward and dX of the linear alone."""
    def build(setting: Setting) -> Work:
        given = linear_tensors(setting, wide)
        work = full(setting, lambda x, weight, bias, A, B: F.linear(x, weight, bias), given, ("x",), "the linear without LoRA: forward and dX",
                    tokens=int(setting.x), roof=linear_roof(setting, wide)[:2])
        work.results = dict
        return work

    return build


def write(form: str) -> Callable[[Setting], Work]:
    """x: how many layers' Q, K and V, LoRA on query and value."""
    def build(setting: Setting) -> Work:
        d, n = setting.size.hidden, int(setting.x)
        weights = [drawn(setting, True, d ** -0.5, i, shape=(3 * d, d)) for i in range(n)]
        pieces = [(i, first, drawn(setting, True, d ** -0.5, 100 + i, shape=(RANK, d)), drawn(setting, True, 0.1, 200 + i, shape=(d, RANK)), 2.0)
                  for i in range(n) for first in (0, 2 * d)]
        op = fused("lora_write", lora_write_ref, setting) if form == "fused" else torch.compile(lora_write_ref) if form == "compiled" else lora_write_ref
        dtype = ACTIVATION[setting.precision]

        def run():
            return op(weights, pieces, dtype)

        size = float(sum(w.numel() * w.element_size() for w in weights) + 3 * n * d * d * bytes_of(setting))
        return Work(run, lambda: {f"W' {i}": w for i, w in enumerate(run())}, roof=((0.0, size),), limit="addresses out of a table before the first load",
                    extra={"setting": f"{n} matrices [{3 * d}, {d}] float32 to {setting.precision}, LoRA r={RANK} on two thirds of the rows"})

    return build


def no_single_pass(device: str) -> str:
    """Why the form `once` of lora_grads.py does not serve the base model's size on a device, or nothing."""
    from peftdebias.kernels.lora_grads import forms

    served = "once" in forms(torch.empty(0, 768, dtype=torch.bfloat16, device=device), 768, 2, 2 * RANK, False)
    return "" if served else "it has too little shared memory for one pass over x and dY"


def grads(form: str, pieces: int = 1) -> Callable[[Setting], Work]:
    """form: plain, compiled, or a form of ours: twice, once (kernels/fused/lora_grads.py). pieces: one, or two, which are the first and the last third of dY, as query and
    value are in a layer."""
    def build(setting: Setting) -> Work:
        (d, t, e), given = (setting.size.hidden, int(setting.x), bytes_of(setting)), linear_tensors(setting, False)
        dy = drawn(setting, seed=6, shape=(t, d if pieces == 1 else 3 * d))
        a, b = [given["A"]], [given["B"]]
        if pieces == 2:
            a.append(drawn(setting, True, d ** -0.5, 7, shape=(RANK, d))), b.append(drawn(setting, True, 0.1, 8, shape=(d, RANK)))

        def plain(x, dy, a, b):
            """(dA, dB) of each piece, in float32 as A and B are, by products of x's dtype."""
            found = [lora_grads_ref(x, dy[:, 2 * i * d:(2 * i + 1) * d], low_a.to(x.dtype), low_b.to(x.dtype), 2.0) for i, (low_a, low_b) in enumerate(zip(a, b))]
            return [tuple(gradient.to(a[0].dtype) for gradient in both) for both in found]

        if form in ("twice", "once") and fused("lora_grads", lora_grads_ref, setting) is not lora_grads_ref:
            from peftdebias.kernels.lora_grads import lora_grads_op

            def run():
                return [lora_grads_op(given["x"], dy, a, b, 2.0, 2 * d if pieces > 1 else 0, 0.0, None, 0, form)]
        else:
            op = torch.compile(plain) if form == "compiled" else plain

            def run():
                return op(given["x"], dy, a, b)

        def results():
            return dict(zip(("gradient of A", "gradient of B"), map(torch.cat, zip(*run()))))

        limits = {"once": "a tile of 16 rows: its second products wait for its first", "twice": "x and dY come from memory twice"}
        return Work(run, results, tokens=t, roof=((4.0 * t * RANK * pieces * 2 * d, float(e * t * d * (1 + pieces))),),
                    limit=limits.get(form, ""), extra={"setting": f"x [T, {d}], {pieces} of dY [T, {d}], r={RANK}; {setting.precision}"})

    return build


# ---------------------------------------------------------------- adapter

NAMES = ("inputs", "hidden", "down", "down_bias", "up", "up_bias")


def adapter(form: str, frozen: bool = False) -> Callable[[Setting], Work]:
    """form: plain, compiled, kept or recomputed."""
    def build(setting: Setting) -> Work:
        t, d, k, e = int(setting.x), setting.size.hidden, BOTTLENECK, bytes_of(setting)
        given = {"inputs": drawn(setting, seed=1, shape=(t, d)), "hidden": drawn(setting, seed=2, shape=(t, d)), "down": drawn(setting, True, d ** -0.5, 3, shape=(k, d)),
                 "down_bias": drawn(setting, True, 0.3, 4, shape=(k,)), "up": drawn(setting, True, k ** -0.5, 5, shape=(d, k)), "up_bias": drawn(setting, True, 0.3, 6, shape=(d,))}
        op = fused("adapter", adapter_ref, setting) if form in ("kept", "recomputed") else adapter_ref
        settings = {"recompute": True} if form == "recomputed" and op is not adapter_ref else {}

        def forward(**tensors):
            return op(*(tensors[name] for name in NAMES), "relu", 1.0, **settings)

        product = 4.0 * t * k * d
        roof = (product, 3.0 * e * t * d), (product, 2.0 * e * t * d) if frozen else (2 * product, 3.0 * e * t * d)  # dy in, dx out; x too for the parameters' gradients
        words = f"x, h [T, {d}], K={k}, ReLU; forward, and backward to x, h" + ("" if frozen else " and the parameters")
        return full(setting, torch.compile(forward) if form == "compiled" else forward, given, NAMES[:2] if frozen else NAMES, words, tokens=t,
                    roof=roof, limit="every program streams down and up from L2")

    return build


# ---------------------------------------------------------------- loss, sparse, dropout

def loss(form: str) -> Callable[[Setting], Work]:
    def build(setting: Setting) -> Work:
        m, v = int(setting.x), setting.size.vocab
        given = drawn(setting, scale=3.0, seed=1, shape=(m, v))
        targets = torch.randint(0, v, (m,), generator=torch.Generator().manual_seed(2)).to(setting.device)
        op = fused("mlm_loss", mlm_loss_ref, setting) if form == "fused" else torch.compile(mlm_loss_ref) if form == "compiled" else mlm_loss_ref
        logits = given.clone().requires_grad_()  # the fused backward writes over it

        def run(tensor: Tensor = logits) -> tuple[Tensor, Tensor]:
            with autocast(setting):
                value = op(tensor, targets)
            return value.detach(), *torch.autograd.grad(value, tensor)

        size = float(bytes_of(setting) * m * v)
        return Work(run, lambda: dict(zip(("loss", "gradient of logits"), run(given.clone().requires_grad_()))), tokens=m, roof=((0.0, size), (0.0, 2 * size)),
                    limit="one exponential an element and pass", extra={"setting": f"logits [M, {v}]; {setting.precision}; forward and backward"})

    return build


def add(form: str) -> Callable[[Setting], Work]:
    """x: rows of the weight; a hundredth of it has a value."""
    def build(setting: Setting) -> Work:
        n, d = int(setting.x), setting.size.hidden
        k = max(1, n * d // 100)
        places = torch.randperm(n * d, generator=torch.Generator().manual_seed(1))[:k].sort().values.to(setting.device)
        given = {"weight": drawn(setting, True, seed=1, shape=(n, d)), "values": drawn(setting, True, seed=2, shape=(k,))}
        op = fused("sparse_add", sparse_add_ref, setting) if form == "fused" else torch.compile(sparse_add_ref) if form == "compiled" else sparse_add_ref
        e = given["weight"].element_size()
        return full(setting, lambda weight, values: op(weight, places, values), given, ("values",), f"W [{n}, {d}], k={k}; forward, and backward to the values",
                    roof=((0.0, float(2 * e * n * d + (8 + e) * k)), (0.0, float((8 + 2 * e) * k))), limit="a bisection of the indices before each stretch's last writes")

    return build


def dropout(form: str) -> Callable[[Setting], Work]:
    def build(setting: Setting) -> Work:
        t, d, seed = int(setting.x), setting.size.hidden, torch.tensor([5], device=setting.device)
        forward = {"reference": lambda x: dropout_ref(x, RATE, seed, 3), "library": lambda x: F.dropout(x, RATE),
                   "fused": lambda x: fused("dropout", dropout_ref, setting)(x, RATE, seed, 3)}[form]
        size = 2.0 * bytes_of(setting) * t * d
        return full(setting, forward, {"x": drawn(setting, seed=1, shape=(t, d))}, ("x",), f"x [T, {d}], rate {RATE:g}; forward and backward", tokens=t,
                    roof=((0.0, size), (0.0, size)), limit="ten rounds of Philox for eight elements")

    return build


# ---------------------------------------------------------------- the registry

def op_case(name: str, what: str, x_name: str, x_values: tuple[float, ...], providers: dict[str, Provider], mode: str = "full") -> Case:
    return Case(name, mode, what, providers, x_name, x_values, output_bound, rounded=True)


def three(builder: Callable[[str], Callable[[Setting], Work]], *ops: str) -> dict[str, Provider]:
    return {"plain torch": Provider(builder("plain")), "plain torch, compiled": Provider(builder("compiled"), compiled=True),
            "peftdebias": Provider(builder("fused"), kernels=ops)}


def _linear(wide: bool) -> dict[str, Provider]:
    return {"peft": Provider(linear("peft", wide), ("peft",)), "plain torch": Provider(linear("plain", wide)),
            "plain torch, compiled": Provider(linear("compiled", wide), compiled=True),
            "peftdebias, written": Provider(linear("written", wide), kernels=("lora_write", "lora_written")),
            "peftdebias, epilogue": Provider(linear("epilogue", wide), kernels=("lora_linear",)),
            "peftdebias, library": Provider(linear("library", wide), kernels=("lora_linear",))} | (
                {} if wide else {"peftdebias, written, one pass": Provider(linear("once"), kernels=("lora_write", "lora_written"), precisions=("bf16",), refuses=no_single_pass)})


def _grads(pieces: int) -> dict[str, Provider]:
    return {"plain torch": Provider(grads("plain", pieces)), "plain torch, compiled": Provider(grads("compiled", pieces), compiled=True),
            "peftdebias, twice": Provider(grads("twice", pieces), kernels=("lora_grads",)),
            "peftdebias, once": Provider(grads("once", pieces), kernels=("lora_grads",), precisions=("bf16",), refuses=no_single_pass)}


def _adapter(frozen: bool) -> dict[str, Provider]:
    made = {"plain torch": Provider(adapter("plain", frozen)), "plain torch, compiled": Provider(adapter("compiled", frozen), compiled=True),
            "peftdebias": Provider(adapter("kept", frozen), kernels=("adapter",))}
    return made if frozen else made | {"peftdebias, z recomputed": Provider(adapter("recomputed"), kernels=("adapter",))}


KERNEL_CASES = {case.name: case for case in (
    op_case("lora_linear", "one linear with LoRA: forward, and backward to x, A and B", "rows", (256, 2048), _linear(False)),
    op_case("lora_linear_wide", "the same, hidden to feed-forward", "rows", (256, 2048), _linear(True)),
    Case("lora_frozen", "full", "yardstick: that linear alone, forward and dX", {"torch": Provider(frozen_linear(False))}, "rows", (256, 2048), output_bound),
    Case("lora_frozen_wide", "full", "yardstick: that linear alone, forward and dX", {"torch": Provider(frozen_linear(True))}, "rows", (256, 2048), output_bound),
    op_case("lora_dropout", f"one linear with LoRA and lora_dropout {RATE:g}", "rows", (256, 2048), {
        "peft": Provider(linear("peft", rate=RATE), ("peft",), compared=False), "plain torch, our mask": Provider(linear("plain", rate=RATE)),
        "peftdebias, epilogue": Provider(linear("epilogue", rate=RATE), kernels=("lora_linear",)),
        "peftdebias, library": Provider(linear("library", rate=RATE), kernels=("lora_linear",))}),
    op_case("lora_write", "W' = W + s B A of all layers' Q, K, V", "layers", (4,), three(write, "lora_write"), "forward"),
    op_case("lora_grads", "dA and dB from x and dY", "rows", (256, 2048), _grads(1), "backward"),
    op_case("lora_grads_two", "the same of query and value together", "rows", (256, 2048), _grads(2), "backward"),
    op_case("adapter", "bottleneck adapter and its residual, trained", "rows", (256, 2048), _adapter(False)),
    op_case("adapter_frozen", "the same with frozen parameters", "rows", (256, 2048), _adapter(True)),
    op_case("mlm_loss", "cross-entropy of the rows asked for", "rows", (64, 256), three(loss, "mlm_loss")),
    op_case("sparse_add", "values of a sparse module put into a weight", "weight_rows", (768,), three(add, "sparse_add")),
    op_case("dropout", "dropout from a counter", "rows", (256, 2048), {
        "F.dropout": Provider(dropout("library"), compared=False), "plain torch, our mask": Provider(dropout("reference")), "peftdebias": Provider(dropout("fused"), kernels=("dropout",))}),
)}
