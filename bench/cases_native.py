"""One CPU op a case: the compiled ops of csrc/ops.cpp beside torch's own and beside their plain twins. Forward and backward unless the name says less; float32.

What it adds over cases_kernels.py, whose kernels run on a GPU: providers that call the library in peftdebias/_native. The first provider is what a user of torch
writes; its dropout draws another mask, so it is timed and not compared. The twins stand for the path without the compiled library.

Letters: T rows, D hidden, F feed-forward, B sequences, H heads, W head width, M rows asked for, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from peftdebias import kernels
from peftdebias.batches import Spans
from peftdebias.kernels import dispatch
from peftdebias.ops import Drop, attention_padded, gelu_ref, heads_of, linear, norm_ref
from peftdebias.ops.dropout import dropout_ref
from peftdebias.ops.linear import bf16_products
from peftdebias.ops.scores import _Turned
from peftdebias.optimizer import FlatAdamW, adamw_ref
from peftdebias.tasks import mlm_loss_ref
from peftdebias.written import lora_apart_ref

from .case import RANK, Case, Provider, Setting, Work, output_bound
from .cases_kernels import RATE, drawn, full

DROP = Drop(RATE, torch.tensor([5]), 3)
EPSILON = 1e-12


def compiled(op: str, twin: Callable) -> Callable:
    with kernels.use("native"):
        return kernels.choose(op, reference=twin)


def _builder(make: Callable[[Setting], tuple[dict[str, Callable], dict[str, Tensor], tuple[str, ...], str]]) -> Callable[[str], Callable[[Setting], Work]]:
    """make(setting) -> (form -> function of the tensors, the tensors, which get gradients, words)."""
    def of(form: str) -> Callable[[Setting], Work]:
        def build(setting: Setting) -> Work:
            forms, given, wanted, words = make(setting)
            return full(setting, forms[form], given, wanted, words, tokens=int(setting.x))
        return build
    return of


def _dropout(setting: Setting):
    forms = {"library": lambda x: F.dropout(x, RATE), "twin": lambda x: dropout_ref(x, *DROP), "compiled": lambda x: compiled("dropout", dropout_ref)(x, *DROP)}
    return forms, {"x": drawn(setting, shape=(int(setting.x), setting.size.hidden))}, ("x",), f"x [T, {setting.size.hidden}], rate {RATE:g}; forward and backward"


def _norm(drops: bool, frozen: bool):
    def make(setting: Setting):
        t, d, drop = int(setting.x), setting.size.hidden, DROP if drops else None
        given = {"hidden": drawn(setting, seed=1, shape=(t, d)), "residual": drawn(setting, seed=2, shape=(t, d)), "gain": drawn(setting, seed=3, shape=(d,)),
                 "bias": drawn(setting, seed=4, shape=(d,))}
        forms = {"library": lambda hidden, residual, gain, bias: F.layer_norm(F.dropout(hidden, RATE if drops else 0.0) + residual, (d,), gain, bias, EPSILON),
                 "twin": lambda **tensors: norm_ref(**tensors, epsilon=EPSILON, drop=drop),
                 "compiled": lambda **tensors: compiled("norm", norm_ref)(**tensors, epsilon=EPSILON, drop=drop)}
        words = f"LayerNorm of {'dropout' if drops else 'hidden'} + residual, [T, {d}], gain and bias {'frozen' if frozen else 'trained'}"
        return forms, given, ("hidden", "residual") if frozen else tuple(given), words
    return make


def _gelu(setting: Setting):
    t, f = int(setting.x), setting.size.feed_forward
    forms = {"library": lambda x, bias: F.gelu(x + bias), "twin": gelu_ref, "compiled": compiled("gelu", gelu_ref)}
    return forms, {"x": drawn(setting, seed=1, shape=(t, f)), "bias": drawn(setting, seed=2, shape=(f,))}, ("x",), f"x [T, {f}] + bias, the bias frozen; forward and backward"


def attention(form: str, drops: bool = True) -> Callable[[Setting], Work]:
    """x: texts of 5 to about 130 tokens, 54 on average. Query, key and value are slices of one product, as in the encoder."""
    def build(setting: Setting) -> Work:
        size, lengths = setting.size, tuple(min(setting.longest, 4 + round(100 * (i + 0.5) / setting.x)) for i in range(int(setting.x)))
        spans, heads, drop = Spans.of(lengths, lengths), size.heads, DROP if drops else None
        for made in (spans.query_places, spans.key_places, spans.key_mask):  # all layers of a batch share them
            del made
        shape = (sum(lengths), heads, size.hidden // heads)

        def library(x):
            batch, longest = len(lengths), max(lengths)
            padded = x.new_zeros(batch * longest, x.shape[1]).index_copy(0, spans.key_places, x).view(batch, longest, 3, heads, -1).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(*padded, attn_mask=spans.key_mask[:, None, None, :], dropout_p=RATE if drops else 0.0)
            return y.transpose(1, 2).reshape(batch * longest, -1).index_select(0, spans.query_places)

        forms = {"library": library, "twin": lambda x: attention_padded(*(part.reshape(shape) for part in x.split(size.hidden, 1)), spans, None, drop).flatten(1),
                 "compiled": lambda x: compiled("attention", attention_padded)(*heads_of(x, 3, heads), spans, None, drop).flatten(1)}
        words = (f"{heads} heads x {size.hidden // heads}, {len(lengths)} texts of {lengths[0]} to {lengths[-1]} tokens, {f'rate {RATE:g}' if drops else 'no dropout'}; "
                 "forward and backward")
        return full(setting, forms[form], {"x": drawn(setting, shape=(sum(lengths), 3 * size.hidden))}, ("x",), words, tokens=sum(lengths))
    return build


def _loss(setting: Setting):
    m, v = int(setting.x), setting.size.vocab
    targets = torch.randint(0, v, (m,), generator=torch.Generator().manual_seed(2))
    forms = {"library": lambda logits: F.cross_entropy(logits * 1, targets), "compiled": lambda logits: compiled("mlm_loss", mlm_loss_ref)(logits * 1, targets)}
    return forms, {"logits": drawn(setting, scale=3.0, shape=(m, v))}, ("logits",), f"logits [M, {v}], made by a product with 1; forward and backward"


def _linear(outside: str, trained: bool) -> Callable:
    def make(setting: Setting):
        t, d, o = int(setting.x), setting.size.hidden, getattr(setting.size, outside)
        given = {"x": drawn(setting, seed=1, shape=(t, d)), "weight": drawn(setting, scale=d ** -0.5, seed=2, shape=(o, d)), "bias": drawn(setting, seed=3, shape=(o,))}

        def by(form: str):
            def run(**tensors):
                with dispatch.use("linear", form):
                    return linear(**tensors)
            return run

        def rounded(**tensors):
            with bf16_products():
                return linear(**tensors)

        words = f"x [T, {d}] W^T + bias, W [{o}, {d}] {'trained' if trained else 'frozen'}; forward and backward, both by torch's BLAS or by oneDNN"
        return {"blas": by("blas"), "onednn": by("onednn"), "bf16": rounded}, given, tuple(given) if trained else ("x",), words
    return make


def _scores(setting: Setting):
    m, d, v = int(setting.x), setting.size.hidden, setting.size.vocab
    given = {"x": drawn(setting, seed=1, shape=(m, d)), "weight": drawn(setting, scale=d ** -0.5, seed=2, shape=(v, d)), "bias": drawn(setting, seed=3, shape=(v,))}
    # torch 2.11's `apply` takes no keywords
    return {"library": F.linear, "turned": lambda x, weight, bias: _Turned.apply(x, weight, bias)}, given, ("x",), f"x [M, {d}] W^T + bias, W [{v}, {d}] frozen, by torch's BLAS; forward and backward"


def _lora(setting: Setting):
    t, d = int(setting.x), setting.size.hidden
    given = {"x": drawn(setting, seed=1, shape=(t, d)), "weight": drawn(setting, scale=d ** -0.5, seed=2, shape=(3 * d, d)), "bias": drawn(setting, seed=3, shape=(3 * d,))}
    given |= {name: drawn(setting, scale=scale, seed=4 + i, shape=shape)
              for i, (name, scale, shape) in enumerate((("qa", d ** -0.5, (RANK, d)), ("qb", 0.1, (d, RANK)), ("va", d ** -0.5, (RANK, d)), ("vb", 0.1, (d, RANK))))}

    def unmerged(x, weight, bias, qa, qb, va, vb):
        q, k, v = (F.linear(x, w, b) for w, b in zip(weight.split(d), bias.split(d)))
        return torch.cat([q + 2.0 * F.linear(F.linear(x, qa), qb), k, v + 2.0 * F.linear(F.linear(x, va), vb)], 1)

    def apart(x, weight, bias, qa, qb, va, vb):
        return compiled("lora_apart", lora_apart_ref)(x, weight, bias, [(0, qa, qb, 2.0), (2 * d, va, vb, 2.0)])

    forms = {"library": unmerged, "compiled": apart}
    return forms, given, ("x", "qa", "qb", "va", "vb"), f"query, key and value of x [T, {d}] with LoRA r={RANK} on query and value, W frozen; forward and backward"


def adamw(form: str) -> Callable[[Setting], Work]:
    """x: values in all, in 48 tensors as BERT-base's LoRA has them."""
    def build(setting: Setting) -> Work:
        sizes = [len(part) for part in torch.arange(int(setting.x)).tensor_split(48)]

        def made():
            parameters = [Parameter(drawn(setting, seed=i, shape=(n,))) for i, n in enumerate(sizes)]
            for i, p in enumerate(parameters):
                p.grad = drawn(setting, scale=0.01, seed=1000 + i, shape=p.shape)
            if form == "library":
                return parameters, torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, fused=True)
            return parameters, FlatAdamW([{"params": parameters}], 1e-3, adamw_ref if form == "twin" else compiled("adamw", adamw_ref))

        _, optimizer = made()

        def results() -> dict[str, Tensor]:
            parameters, fresh = made()
            for _ in range(3):
                fresh.step()
            return {"values": torch.cat([p.detach() for p in parameters])}

        return Work(optimizer.step, results, extra={"setting": f"{int(setting.x)} values in {len(sizes)} tensors, float32"})
    return build


# ---------------------------------------------------------------- the registry

def _case(name: str, op: str, what: str, builder, x_name: str, x_values: tuple[float, ...], compared: bool = True, twin: bool = True, **more) -> Case:
    providers = {"torch": Provider(builder("library"), compared=compared)} | ({"plain twin": Provider(builder("twin"))} if twin else {})
    return Case(name, more.pop("mode", "full"), what, providers | {"peftdebias": Provider(builder("compiled"), native=(op,))}, x_name, x_values, output_bound, **more)


NATIVE_CASES = {case.name: case for case in (
    _case("native_dropout", "dropout", "dropout on a CPU", _builder(_dropout), "rows", (860, 2048), compared=False),
    _case("native_norm", "norm", "dropout + residual + LayerNorm on a CPU, frozen gain and bias", _builder(_norm(True, True)), "rows", (860, 2048), compared=False),
    _case("native_norm_trained", "norm", "the same, gain and bias trained", _builder(_norm(True, False)), "rows", (860,), compared=False),
    _case("native_norm_eval", "norm", "residual + LayerNorm, without dropout", _builder(_norm(False, True)), "rows", (860, 2048), twin=False),
    _case("native_gelu", "gelu", "bias + GELU on a CPU", _builder(_gelu), "rows", (860, 2048), twin=False),
    _case("native_attention", "attention", "attention inside ragged texts on a CPU, with dropout", attention, "texts", (16,), compared=False),
    _case("native_attention_eval", "attention", "the same without dropout", lambda form: attention(form, drops=False), "texts", (16,), twin=False),
    _case("native_adamw", "adamw", "AdamW of a module's values on a CPU", adamw, "values", (300_000,), sized=False, mode="forward"),
    _case("native_mlm_loss", "mlm_loss", "cross-entropy of the rows asked for on a CPU", _builder(_loss), "rows", (128,), twin=False),
    _case("native_lora", "lora_apart", "query, key and value with LoRA on a CPU", _builder(_lora), "rows", (128, 860), twin=False),
)}
NATIVE_CASES |= {name: Case(name, "full", what, {"torch's BLAS": Provider(builder("blas")), "oneDNN": Provider(builder("onednn")),
                                                "oneDNN, bf16": Provider(builder("bf16"), bf16=True, compared=False)}, "rows", (128, 860), output_bound) for name, what, builder in (
    ("linear", "a linear on a CPU, frozen, by two libraries", _builder(_linear("feed_forward", False))),
    ("linear_trained", "the same, its weight trained", _builder(_linear("feed_forward", True))),
    ("linear_vocab", "the masked-LM's decoder by two libraries", _builder(_linear("vocab", False))),
)}
NATIVE_CASES["scores"] = Case("scores", "full", "the masked-LM's decoder on few rows by torch's BLAS: x W^T, and blocks of W x^T turned back",
                              {"x W^T": Provider(_builder(_scores)("library")), "turned": Provider(_builder(_scores)("turned"))}, "rows", (16, 137, 304), output_bound)
"""name -> Case; they take part on a CPU, where the compiled library is."""
