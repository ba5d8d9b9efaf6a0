"""Gathers there and back equal the reference's scattered additions, gradients included."""

import pytest
import torch

from moe_llm.ops import reference
from moe_llm.ops.permutation import combine, permute, sort_by_expert

HIDDEN = 24
# both sum in fp32 and round once; to bf16 by one unit in the last place apart, where a sum lies halfway
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7}


def make_routing(tokens, experts, top_k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, experts, generator=generator).topk(top_k).indices


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(37, 8, 2), (1, 4, 1), (5, 64, 6), (0, 8, 2), (9, 3, 3)])
def test_sorting_equals_reference(tokens, experts, top_k):
    expert_TK = make_routing(tokens, experts, top_k)
    actual = sort_by_expert(expert_TK, experts)
    for tensor, expected in zip(actual, reference.sort_by_expert(expert_TK, experts), strict=True):
        assert torch.equal(tensor, expected)


def test_sorting_is_stable_and_invertible():
    expert_TK = make_routing(200, 8, 2)
    token_index_N, order_N, slot_TK, counts_E = sort_by_expert(expert_TK, 8)
    assert torch.equal(order_N[slot_TK.flatten()], torch.arange(400))
    start = 0
    for expert, count in enumerate(counts_E.tolist()):
        rows = token_index_N[start : start + count]
        assert (rows.diff() > 0).all()
        assert torch.equal(rows, (expert_TK == expert).any(1).nonzero()[:, 0])
        start += count


def assert_close(actual, expected):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    difference = (actual.double() - expected.double()).abs().max() if expected.numel() else 0.0
    assert difference <= TOLERANCE[expected.dtype] * (expected.abs().max() if expected.numel() else 1.0)


def direction_like(tensor):
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3)).to(tensor.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_slots", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(37, 8, 2), (1, 4, 1), (12, 64, 6), (0, 8, 2)])
def test_permute_equals_reference(tokens, experts, top_k, with_slots, dtype):
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    token_index_N, _, slot_TK, _ = sort_by_expert(make_routing(tokens, experts, top_k), experts)
    rows = permute(x, token_index_N, slot_TK if with_slots else None)
    wide = x.detach().float().requires_grad_()
    expected = reference.permute(wide, token_index_N)
    assert torch.equal(rows, expected.to(dtype))
    direction = direction_like(rows)
    (grad,) = torch.autograd.grad(rows, x, direction)
    (expected_grad,) = torch.autograd.grad(expected, wide, direction.float())
    assert_close(grad, expected_grad.to(dtype))


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_slots", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(37, 8, 2), (1, 4, 1), (12, 64, 6), (0, 8, 2)])
def test_combine_equals_reference(tokens, experts, top_k, with_slots, dtype, weighted):
    generator = torch.Generator().manual_seed(1)
    token_index_N, _, slot_TK, _ = sort_by_expert(make_routing(tokens, experts, top_k), experts)
    y = torch.randn(tokens * top_k, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.rand(tokens * top_k, generator=generator).requires_grad_() if weighted else None
    leaves = [tensor for tensor in (y, weight) if tensor is not None]
    out = combine(y, weight, token_index_N, tokens, slot_TK if with_slots else None)
    expected = reference.combine(y, weight, token_index_N, tokens)
    assert_close(out, expected)
    direction = direction_like(out)
    grads = torch.autograd.grad(out, leaves, direction)
    for grad, other in zip(grads, torch.autograd.grad(expected, leaves, direction), strict=True):
        assert_close(grad.to(dtype), other.to(dtype))


def test_combine_keeps_the_precision_of_the_weights_in_bf16():
    """Weights are not rounded to bf16: 1 - 2^-12 would become 1 and a sum of opposites vanish."""
    y = torch.tensor([[1024.0], [-1024.0]], dtype=torch.bfloat16).expand(2, 8).contiguous()
    weight = torch.tensor([1.0, 1.0 - 2**-12])
    out = combine(y, weight, torch.tensor([0, 0]), 1, torch.tensor([[0, 1]]))
    assert torch.equal(out, torch.full((1, 8), 0.25, dtype=torch.bfloat16))


def test_tokens_without_rows_get_zero():
    y = torch.randn(3, HIDDEN, requires_grad=True)
    weight = torch.rand(3, requires_grad=True)
    out = combine(y, weight, torch.tensor([4, 1, 4]), 6)
    assert (out[[0, 2, 3, 5]] == 0).all()
    torch.testing.assert_close(out[4], (y * weight[:, None])[[0, 2]].sum(0))
    grads = torch.autograd.grad(out.sum(), (y, weight))
    torch.testing.assert_close(grads, ((weight[:, None]).expand_as(y), y.sum(1)))


@pytest.mark.parametrize("with_slots", [True, False])
def test_gradients_by_finite_differences(with_slots):
    token_index_N, _, slot_TK, _ = sort_by_expert(make_routing(4, 3, 2), 3)
    slots = slot_TK if with_slots else None
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: permute(x, token_index_N, slots), (x,))
    assert torch.autograd.gradcheck(lambda y, w: combine(y, w, token_index_N, 4, slots), (y, weight))


def test_strided_rows():
    token_index_N, _, slot_TK, _ = sort_by_expert(make_routing(5, 4, 2), 4)
    y = torch.randn(HIDDEN, 10).t().requires_grad_()
    weight = torch.rand(10)
    out = combine(y, weight, token_index_N, 5, slot_TK)
    assert_close(out, reference.combine(y, weight, token_index_N, 5))
    # an expanded gradient, as sum() makes it
    (grad,) = torch.autograd.grad(out.sum(), y)
    torch.testing.assert_close(grad, weight[:, None].expand_as(y))
