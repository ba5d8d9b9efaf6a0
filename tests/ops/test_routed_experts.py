"""Permute, compute and combine in one operation equal the three in turn."""

import pytest
import torch

from moe_llm.ops import reference
from moe_llm.ops.expert_mlp import routed_expert_mlp
from moe_llm.ops.permutation import sort_by_expert

HIDDEN, WIDTH = 24, 40
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
ROUTINGS = {
    "mixed": (37, 8, 2), "one token": (1, 4, 1), "many experts": (11, 64, 6), "every expert": (9, 3, 3),
    "no tokens": (0, 4, 2),
}  # fmt: skip


def make(tokens, experts, top_k, dtype):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype).requires_grad_()

    expert_TK = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
    token_index_N, _, slot_TK, counts_E = sort_by_expert(expert_TK, experts)
    weight_N = torch.rand(tokens * top_k, generator=generator).requires_grad_()
    leaves = (normal(tokens, HIDDEN), normal(experts, 2 * WIDTH, HIDDEN, scale=HIDDEN**-0.5),
              normal(experts, HIDDEN, WIDTH, scale=WIDTH**-0.5), weight_N)  # fmt: skip
    return leaves, counts_E, token_index_N, slot_TK


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_slots", [True, False])
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_equals_reference(routing, with_slots, dtype):
    leaves, counts_E, token_index_N, slot_TK = make(*routing, dtype)
    x, gate_up, down, weight = leaves
    y = routed_expert_mlp(x, gate_up, down, counts_E, weight, token_index_N, slot_TK if with_slots else None)
    rows = reference.expert_mlp(reference.permute(x, token_index_N), gate_up, down, counts_E, weight)
    expected = reference.combine(rows, None, token_index_N, len(x))
    assert y.dtype == dtype
    assert y.shape == expected.shape
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    actual = (y, *torch.autograd.grad(y, leaves, direction))
    for tensor, other in zip(actual, (expected, *torch.autograd.grad(expected, leaves, direction)), strict=True):
        assert tensor.isfinite().all()
        if other.numel():
            difference = (tensor.double() - other.double()).abs().max()
            assert difference <= TOLERANCE[dtype] * other.double().abs().max().clamp(min=1e-30)


def test_of_n_rows_only_the_gate_and_up_projections_are_kept():
    (x, gate_up, down, weight), counts_E, token_index_N, slot_TK = make(37, 8, 2, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor
    ):
        routed_expert_mlp(x, gate_up, down, counts_E, weight, token_index_N, slot_TK)
    assert sorted(shape for shape in kept if shape[0] == 74) == [(74,), (74,), (74, 2 * WIDTH)]


def test_gradients_by_finite_differences():
    leaves, counts_E, token_index_N, slot_TK = make(5, 4, 2, torch.float64)
    leaves = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
    assert torch.autograd.gradcheck(
        lambda x, gate_up, down, weight: routed_expert_mlp(x, gate_up, down, counts_E, weight, token_index_N, slot_TK),
        leaves,
        fast_mode=True,
    )
