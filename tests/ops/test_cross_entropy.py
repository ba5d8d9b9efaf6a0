"""The chunked loss equals the one with all logits, gradients included, and holds few of them."""

import pytest
import torch
import torch.nn.functional as F

from moe_llm.ops import reference
from moe_llm.ops.cross_entropy import linear_cross_entropy

TOKENS, HIDDEN, VOCABULARY = 37, 16, 101


def make_inputs(dtype, ignored=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    labels[torch.rand(TOKENS, generator=generator) < ignored] = -100
    return hidden, weight, labels


def relative(actual, expected):
    return ((actual.double() - expected.double()).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


@pytest.mark.parametrize("ignored", [0.0, 0.3])
@pytest.mark.parametrize("chunk_tokens", [1, 8, 37, 1000, None])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_equals_reference(dtype, tolerance, chunk_tokens, ignored):
    hidden, weight, labels = make_inputs(dtype, ignored)
    loss, count = linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk_tokens)
    expected, expected_count = reference.linear_cross_entropy(hidden, weight, labels)
    assert count == expected_count
    assert loss.dtype == expected.dtype
    assert relative(loss, expected) < min(tolerance, 1e-6)
    grads = torch.autograd.grad(loss / count, (hidden, weight))
    for grad, other in zip(grads, torch.autograd.grad(expected / count, (hidden, weight)), strict=True):
        assert grad.dtype == dtype
        assert relative(grad, other) < tolerance


def test_gradients_by_finite_differences():
    hidden, weight, labels = make_inputs(torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels, chunk_tokens=5)[0], (hidden, weight)
    )


def test_other_ignore_index_and_strides():
    hidden, weight, labels = make_inputs(torch.float32)
    labels = torch.where(labels == -100, 7, labels)
    strided = hidden.detach().t().contiguous().t()
    loss, count = linear_cross_entropy(strided, weight.detach(), labels, ignore_index=7)
    expected = F.cross_entropy(hidden @ weight.t(), labels, ignore_index=7, reduction="sum")
    assert relative(loss, expected) < 1e-6
    assert count == (labels != 7).sum()


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_side_gets_no_gradient(frozen):
    hidden, weight, labels = make_inputs(torch.float32)
    expected, _ = reference.linear_cross_entropy(hidden, weight, labels)
    expected = torch.autograd.grad(expected, (hidden, weight))
    (hidden, weight)[frozen].requires_grad_(False)
    loss, _ = linear_cross_entropy(hidden, weight, labels)
    (grad,) = torch.autograd.grad(loss, (hidden, weight)[1 - frozen])
    assert relative(grad, expected[1 - frozen]) < 1e-6


def test_without_targets_loss_and_gradients_are_zero():
    hidden, weight, labels = make_inputs(torch.float32, ignored=2.0)
    loss, count = linear_cross_entropy(hidden, weight, labels)
    assert loss == 0
    assert count == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, (hidden, weight)))


def test_weight_shared_with_the_embedding_gets_both_gradients():
    _, weight, labels = make_inputs(torch.float32)
    tokens = torch.arange(TOKENS)
    loss, _ = linear_cross_entropy(F.embedding(tokens, weight), weight, labels)
    expected, _ = reference.linear_cross_entropy(F.embedding(tokens, weight), weight, labels)
    (grad,) = torch.autograd.grad(loss, weight)
    assert relative(grad, torch.autograd.grad(expected, weight)[0]) < 1e-6


def test_large_logits_stay_finite():
    hidden, weight, labels = make_inputs(torch.float32)
    loss, _ = linear_cross_entropy(hidden * 1e4, weight, labels)
    expected, _ = reference.linear_cross_entropy(hidden * 1e4, weight, labels)
    assert relative(loss, expected) < 1e-6
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, (hidden, weight)))


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("no_grad", [False, True])
def test_never_holds_all_logits(no_grad):
    hidden, weight, labels = make_inputs(torch.float32)
    with LargestTensor() as largest, torch.set_grad_enabled(not no_grad):
        loss, _ = linear_cross_entropy(hidden, weight, labels, chunk_tokens=4)
    assert largest.elements <= max(4 * VOCABULARY, VOCABULARY * HIDDEN)
    with LargestTensor() as control:
        reference.linear_cross_entropy(hidden, weight, labels)
    assert control.elements == TOKENS * VOCABULARY
    assert loss.requires_grad is not no_grad


def test_without_gradients_no_gradient_is_computed():
    hidden, weight, labels = make_inputs(torch.float32)
    products = []

    class CountProducts(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "mm" in str(func):
                products.append(func)
            return func(*args, **(kwargs or {}))

    with CountProducts(), torch.no_grad():
        linear_cross_entropy(hidden, weight, labels, chunk_tokens=100)
    assert len(products) == 1


def test_bf16_weight_gradient_is_summed_in_fp32():
    """700 equal summands: a bf16 sum stops growing at 256 times the summand, an fp32 sum does not."""
    hidden, weight, labels = make_inputs(torch.bfloat16, ignored=0.0)
    one, _ = linear_cross_entropy(hidden[:1], weight, labels[:1])
    (expected,) = torch.autograd.grad(one * 700, weight)

    def many(**options):
        repeated = hidden[:1].expand(700, HIDDEN), weight, labels[:1].expand(700)
        return torch.autograd.grad(linear_cross_entropy(*repeated, chunk_tokens=1, **options)[0], weight)[0]

    assert relative(many(), expected) < 1e-2
    assert relative(many(accumulate_dtype=torch.bfloat16), expected) > 0.3
