"""torch.func and forward mode, for who studies a model by them: kernels have a backward and nothing else, so the twins compute there, by themselves."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from peftdebias import kernels, methods, patch
from peftdebias.ops import compiled
from peftdebias.tasks import mlm_loss

from .outside import one_thread, ragged  # noqa: F401
from .plain import model_of


class Loss(nn.Module):
    """Of a masked-LM with LoRA on query and value, dropout on."""

    def __init__(self):
        super().__init__()
        self.model = model_of(dtype=torch.float32, dropout=0.1, attention_dropout=0.1).train()
        patch.attach(self.model, "gender", methods.create("lora", self.model.config, options={"rank": 2}))
        self.batch = ragged()

    def forward(self):
        torch.manual_seed(3)
        return mlm_loss(self.model.mlm_logits(self.batch), self.batch.targets)


@pytest.fixture(scope="module")
def asked():
    """(loss of these parameters, the parameters by name, a direction, the derivative along it by an ordinary backward through whatever kernels are there)."""
    loss = Loss()
    trained = {name: p for name, p in loss.named_parameters() if p.requires_grad}
    parameters = {name: p.detach().clone() for name, p in trained.items()}
    along = {name: torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.1 for i, (name, p) in enumerate(parameters.items())}
    gradients = torch.autograd.grad(loss(), list(trained.values()), allow_unused=True)
    found = {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(parameters.items(), gradients)}
    return lambda p: torch.func.functional_call(loss, p, ()), parameters, along, found


def derivative(gradients, along):
    return sum((gradients[name].double() * along[name].double()).sum() for name in along)


def test_functions_of_torch_func(asked):
    function, parameters, along, wanted = asked
    gradients, loss = torch.func.grad_and_value(function)(parameters)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5, msg=lambda words, name=name: f"{name}: {words}")
    value, tangent = torch.func.jvp(function, (parameters,), (along,))
    torch.testing.assert_close(value, loss)
    torch.testing.assert_close(tangent.double(), derivative(wanted, along), rtol=1e-3, atol=1e-5)


def test_forward_mode(asked):
    function, parameters, along, wanted = asked
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(function({name: forward_ad.make_dual(p, along[name]) for name, p in parameters.items()})).tangent
    torch.testing.assert_close(tangent.double(), derivative(wanted, along), rtol=1e-3, atol=1e-5)


def test_what_is_picked():
    """The twin by itself; what is asked for by name stays asked for."""
    x = torch.zeros(2, 3)
    found = []

    def function(x):
        found.append((kernels.decide("gelu")[0], compiled.takes(x)))
        with kernels.use("torch"):
            found.append(kernels.decide("gelu"))
        return x.sum()

    torch.func.grad(function)(x)
    assert found == [("torch", False), ("torch", "asked for by name")] and not kernels.transformed()
    with forward_ad.dual_level():
        assert kernels.transformed() and "torch.func" in kernels.decide("gelu", torch.device("cuda"))[1]
    assert compiled.takes(x)
