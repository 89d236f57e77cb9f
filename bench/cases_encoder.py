"""One op of the encoder a case: norm, embeddings, GELU, a trained linear and the feed-forward block, the fused kernels beside plain torch and torch.compile. Forward and backward
unless the name says less.

What it adds over cases_kernels.py, whose tensors, precision and registry these are: no method's module. Letters: those of that file.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from peftdebias.kernels import dispatch
from peftdebias.kernels.dropout_ref import Drop, dropout_ref
from peftdebias.ops import embed_ref, feed_forward_ref, gelu_ref, norm_ref

from .case import Provider, Setting, Work, autocast
from .cases_kernels import ACTIVATION, RATE, bytes_of, drawn, full, fused, op_case, three

# ---------------------------------------------------------------- norm, embeddings, gelu

def norm(form: str, rate: float = 0.0) -> Callable[[Setting], Work]:
    """form: plain or compiled (torch's own ops, dropout among them), twin (our mask) or fused. With dropout gain and bias are frozen, as beside LoRA."""
    def build(setting: Setting) -> Work:
        t, d, e, epsilon = int(setting.x), setting.size.hidden, bytes_of(setting), 1e-12
        given = {"hidden": drawn(setting, seed=1, shape=(t, d)), "residual": drawn(setting, seed=2, shape=(t, d)),
                 "gain": drawn(setting, True, seed=3, shape=(d,)), "bias": drawn(setting, True, seed=4, shape=(d,))}
        drop = Drop(rate, torch.tensor([5], device=setting.device), 3) if rate else None
        op = fused("norm", norm_ref, setting) if form == "fused" else norm_ref

        def forward(hidden, residual, gain, bias):
            if rate and form in ("plain", "compiled"):
                return F.layer_norm(F.dropout(hidden, rate) + residual, gain.shape, gain, bias, epsilon)
            return op(hidden, residual, gain, bias, epsilon, drop)

        size = float(e * t * d)
        words = f"hidden, residual [T, {d}]{f', rate {rate:g}' if rate else ''}; forward, and backward to them{'' if rate else ', gain and bias'}"
        return full(setting, torch.compile(forward) if form == "compiled" else forward, given, ("hidden", "residual") if rate else tuple(given), words, tokens=t,
                    roof=((0.0, 4 * size), (0.0, (4 if rate else 3) * size)),
                    limit=f"rows wait for their sums{', and ten rounds of Philox for eight elements' if rate else ''}")

    return build


def embed(form: str, tables: bool = False) -> Callable[[Setting], Work]:
    """form: plain or compiled (torch's own ops, dropout among them), twin (our mask) or fused. The tables are frozen, of the activations' dtype, and the forward alone runs; or
    `tables`, gain and bias are trained. The places are those of two segments."""
    def build(setting: Setting) -> Work:
        t, d, v, n, epsilon, dtype = int(setting.x), setting.size.hidden, setting.size.vocab, 2 * setting.longest, 1e-12, ACTIVATION[setting.precision]
        generator = torch.Generator().manual_seed(6)
        ids, places = (torch.randint(0, rows, (t,), generator=generator) for rows in (v, n))
        looked_up = float(d * (len(ids.unique()) + len(places.unique())))
        ids, places = ids.to(setting.device), places.to(setting.device)
        given = {"word": drawn(setting, tables, seed=1, shape=(v, d)), "placed": drawn(setting, tables, seed=2, shape=(n, d)),
                 "gain": drawn(setting, True, seed=3, shape=(d,)), "bias": drawn(setting, True, seed=4, shape=(d,))}
        drop, op = Drop(RATE, torch.tensor([5], device=setting.device), 3), fused("embed", embed_ref, setting) if form == "fused" else embed_ref

        def forward(word, placed, gain, bias):
            if form == "fused":
                return op(ids, places, word, placed, gain, bias, epsilon, drop)
            hidden, residual = F.embedding(ids, word), F.embedding(places, placed)
            if form == "twin":  # rounds where the kernel does, which keeps what it normalised in 16 bits
                return dropout_ref(norm_ref(hidden.to(dtype), residual.to(dtype), gain, bias, epsilon), *drop)
            return F.dropout(F.layer_norm(hidden + residual, gain.shape, gain, bias, epsilon), RATE)

        e, wide, forward = float(bytes_of(setting) * t * d), given["word"].element_size(), torch.compile(forward) if form == "compiled" else forward
        words = f"T ids and places, word [{v}, {d}], placed [{n}, {d}] in {str(given['word'].dtype).removeprefix('torch.')}, rate {RATE:g}; forward"
        once, limit = wide * looked_up + e + 16.0 * t, "rows lie anywhere in a table, and ten rounds of Philox for eight elements"
        if tables:
            roof = (0.0, once + e + 4.0 * t), (0.0, 2 * e + 4.0 * t + float(wide * d * (v + n)))
            return full(setting, forward, given, tuple(given), words + ", and backward to all four", tokens=t, roof=roof,
                        limit=limit + "; torch's sums over the tokens of an id sort the ids, and read what was written for them")

        def run() -> Tensor:
            with torch.no_grad(), autocast(setting):
                return forward(**given)

        return Work(run, lambda: {"y": run()}, tokens=t, roof=((0.0, once),), limit=limit, extra={"setting": f"{words}; {setting.precision}"})

    return build


def gelu(form: str) -> Callable[[Setting], Work]:
    def build(setting: Setting) -> Work:
        t, f = int(setting.x), setting.size.feed_forward
        given = {"x": drawn(setting, seed=1, shape=(t, f)), "bias": drawn(setting, True, seed=2, shape=(f,))}
        op = fused("gelu", gelu_ref, setting) if form == "fused" else torch.compile(gelu_ref) if form == "compiled" else gelu_ref
        size = float(bytes_of(setting) * t * f)
        return full(setting, op, given, ("x", "bias"), f"x [T, {f}]; forward, and backward to x and the bias", tokens=t,
                    roof=((0.0, 2 * size), (0.0, 3 * size)), limit="an error function an element, and an exponential in the backward")

    return build


# ---------------------------------------------------------------- linears with trained weights, the feed-forward block

def trained(form: str, block: bool = False) -> Callable[[Setting], Work]:
    """A linear of a base that is trained, hidden to hidden; or the whole feed-forward block, two linears and GELU between them. form: plain, compiled, fused; of the block library
    or fused (kernels/fused/feed_forward.py)."""
    def build(setting: Setting) -> Work:
        t, d, e = int(setting.x), setting.size.hidden, bytes_of(setting)
        inner = setting.size.feed_forward if block else d
        linears = (("up", inner, d), ("down", d, inner)) if block else (("weight", d, d),)
        given, biases = {"x": drawn(setting, seed=1, shape=(t, d))}, ("up_bias", "down_bias") if block else ("bias",)
        for n, ((name, o, i), bias) in enumerate(zip(linears, biases)):
            given |= {name: drawn(setting, True, i ** -0.5, 3 + n, shape=(o, i)), bias: drawn(setting, True, seed=5 + n, shape=(o,))}
        op, twin = ("feed_forward", feed_forward_ref) if block else ("linear_trained", F.linear)
        forward = torch.compile(twin) if form == "compiled" else twin if form == "plain" else in_form(form, fused(op, twin, setting)) if block else fused(op, twin, setting)
        product = 2.0 * t * d * inner, float(e * t * (d + inner)) + 4.0 * d * inner
        wide = float(e * t * inner)
        words = f"x [T, {d}], {', '.join(f'W [{o}, {i}]' for _, o, i in linears)} and biases in float32{', GELU between them' if block else ''}; forward, and backward to all"
        return full(setting, forward, given, tuple(given), words, tokens=t, roof=(product,) * (3 * len(linears)) + (((0.0, 2 * wide), (0.0, 3 * wide)) if block and form != "fused" else ()),
                    limit="library GEMMs, of which dW sums over T")

    return build


def in_form(form: str, block: Callable) -> Callable:
    """feed_forward in a form by name."""
    def run(**given):
        with dispatch.use("feed_forward", form):
            return block(**given)
    return run


def feed_forward(form: str) -> Callable[[Setting], Work]:
    """The feed-forward block of a frozen base. form: plain, compiled, or one of ours: library, fused (kernels/fused/feed_forward.py)."""
    def build(setting: Setting) -> Work:
        t, d, inner, e = int(setting.x), setting.size.hidden, setting.size.feed_forward, bytes_of(setting)
        given = {"x": drawn(setting, seed=1, shape=(t, d)), "up": drawn(setting, scale=d ** -0.5, seed=3, shape=(inner, d)), "up_bias": drawn(setting, seed=5, shape=(inner,)),
                 "down": drawn(setting, scale=inner ** -0.5, seed=4, shape=(d, inner)), "down_bias": drawn(setting, seed=6, shape=(d,))}
        forward = {"plain": lambda: feed_forward_ref, "compiled": lambda: torch.compile(feed_forward_ref)}.get(form, lambda: in_form(form, fused("feed_forward", feed_forward_ref, setting)))()
        product, wide = (2.0 * t * d * inner, float(e * (t * (d + inner) + d * inner))), float(e * t * inner)
        words = f"x [T, {d}], W [{inner}, {d}] and W [{d}, {inner}] with biases, frozen, GELU between them; forward, and backward to x"
        return full(setting, forward, given, ("x",), words, tokens=t, roof=(product,) * 4 + (() if form == "fused" else ((0.0, 2 * wide), (0.0, 3 * wide))),
                    limit="two GEMMs of its own, which a library's is hard to match" if form == "fused" else "library GEMMs, and GELU's passes over [T, inner]")

    return build


# ---------------------------------------------------------------- the registry

def _block(builder: Callable[[str], Callable[[Setting], Work]]) -> dict[str, Provider]:
    """Both forms of kernels/fused/feed_forward.py."""
    own = {f"peftdebias, {form}": Provider(builder(form), kernels=("feed_forward",)) for form in dispatch.FORMS["feed_forward"]}
    return {"plain torch": Provider(builder("plain")), "plain torch, compiled": Provider(builder("compiled"), compiled=True), **own}


def _masked(builder: Callable[[str], Callable[[Setting], Work]], op: str) -> dict[str, Provider]:
    """torch's own ops, whose dropout draws another mask, and what draws ours."""
    return {"plain torch": Provider(builder("plain"), compared=False), "plain torch, compiled": Provider(builder("compiled"), compiled=True, compared=False),
            "plain torch, our mask": Provider(builder("twin")), "peftdebias": Provider(builder("fused"), kernels=(op,))}


ENCODER_CASES = {case.name: case for case in (
    op_case("norm", "residual and LayerNorm, trained", "rows", (256, 2048), three(norm, "norm")),
    op_case("norm_dropout", f"dropout {RATE:g}, residual and LayerNorm, frozen", "rows", (256, 2048), _masked(lambda form: norm(form, RATE), "norm")),
    op_case("embed", f"two look-ups, LayerNorm and dropout {RATE:g}, frozen", "rows", (256, 2048), _masked(embed, "embed"), "forward"),
    op_case("trained_embed", "the same, tables and norm trained", "rows", (256, 2048), _masked(lambda form: embed(form, True), "embed")),
    op_case("gelu", "bias and GELU", "rows", (256, 2048), three(gelu, "gelu")),
    op_case("trained_linear", "a linear whose W and bias are trained", "rows", (256, 2048), three(trained, "linear_trained")),
    op_case("feed_forward", "a feed-forward block that is frozen", "rows", (256, 2048), _block(feed_forward)),
    op_case("trained_feed_forward", "a feed-forward block that is trained", "rows", (256, 2048), _block(lambda form: trained(form, True))),
)}
