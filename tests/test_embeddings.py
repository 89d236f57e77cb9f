"""The plain twin of an encoder's embeddings is what it says, and a CPU's compiled form is the ops it is made of, bit for bit."""

import pytest
import torch
import torch.nn.functional as F

from peftdebias import kernels
from peftdebias.kernels.dropout_ref import dropout_ref
from peftdebias.ops import Drop, dropout, embed, embed_ref, norm

DROP = Drop(0.3, torch.tensor([5]), 2)
IDS, PLACES = torch.tensor([3, 0, 10, 3, 7]), torch.tensor([0, 1, 2, 3, 3])


def tensors(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """word [11, 7], placed [4, 7], gain and bias [7]."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for shape in ((11, 7), (4, 7), (7,), (7,))]


def test_the_reference_is_the_norm_of_two_rows_dropped():
    word, placed, gain, bias = tensors()
    x = torch.stack([word[i] + placed[j] for i, j in zip(IDS, PLACES)])
    y = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-3).sqrt() * gain + bias
    torch.testing.assert_close(embed_ref(IDS, PLACES, word, placed, gain, bias, 1e-3), y)
    torch.testing.assert_close(embed_ref(IDS, PLACES, word, placed, gain, bias, 1e-3, DROP), dropout_ref(y, *DROP))


def test_gradients_of_the_reference():
    assert torch.autograd.gradcheck(lambda *x: embed_ref(IDS, PLACES, *x, 1e-5, DROP), tensors())


@pytest.mark.parametrize("kind", ["auto", "torch"])
@pytest.mark.parametrize("drop", [None, DROP], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_it_is_one_op_after_the_other(kind, drop, dtype):
    def gradients(f):
        given = tensors(dtype)
        y = f(*given)
        return y, *torch.autograd.grad(y, given, torch.arange(7).to(dtype).expand(5, 7))

    with kernels.use(kind):
        found = gradients(lambda *x: embed(IDS, PLACES, *x, 1e-5, drop))
        expected = gradients(lambda word, placed, *x: dropout(norm(F.embedding(IDS, word), F.embedding(PLACES, placed), *x, 1e-5), drop))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("ids,places", [(torch.tensor([11]), PLACES[:1]), (torch.tensor([-1]), PLACES[:1]), (IDS[:1], torch.tensor([4]))])
def test_a_number_of_no_row_is_an_error_on_a_cpu(ids, places):
    with pytest.raises(IndexError):
        embed(ids, places, *tensors(torch.float32), 1e-5)
