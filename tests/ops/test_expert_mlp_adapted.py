"""Experts with low-rank adapters compute what experts whose weights are the sums would, gradients included."""

import pytest
import torch

from moe_llm.ops.expert_mlp import expert_mlp, routed_expert_mlp
from moe_llm.ops.expert_mlp_adapted import ExpertAdapters, Factors, adapted_expert_mlp
from moe_llm.ops.permutation import sort_by_expert

D, WIDTH, E, RANK, SCALE = 12, 10, 4, 3, 1.7


def weights(dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    shapes = [(E, 2 * WIDTH, D), (E, D, WIDTH), (E, RANK, D), (E, 2 * WIDTH, RANK), (E, RANK, WIDTH), (E, D, RANK)]
    return [torch.randn(shape, generator=draw, dtype=torch.float64).mul_(0.4).to(dtype) for shape in shapes]


def adapters(which, factors, dropout=0.0):
    a1, b1, a2, b2 = factors
    return ExpertAdapters(
        Factors(a1, b1) if which != "down" else None, Factors(a2, b2) if which != "gate_up" else None, SCALE, dropout
    )


def merged(which, w1, w2, factors):
    a1, b1, a2, b2 = factors
    return w1 + SCALE * b1 @ a1 * (which != "down"), w2 + SCALE * b2 @ a2 * (which != "gate_up")


@pytest.mark.parametrize("which", ["both", "gate_up", "down"])
@pytest.mark.parametrize("backend", ["loop", "fused"])
@pytest.mark.parametrize("counts", [[5, 0, 7, 3], [0, 0, 0, 15], [3, 4, 5, 0]])
def test_rows_equal_those_of_summed_weights(which, backend, counts):
    """Also rows that belong to nobody (the last case), and experts without any."""
    w1, w2, *factors = weights()
    factors = [factor.requires_grad_() for factor in factors]
    x = torch.randn(15, D, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(15, dtype=torch.float64, requires_grad=True)
    counts, slope = torch.tensor(counts), torch.randn(15, D, dtype=torch.float64)
    found = adapted_expert_mlp(x, w1, w2, counts, adapters(which, factors), weight, backend=backend)
    expected = expert_mlp(x, *merged(which, w1, w2, factors), counts, weight_N=weight, backend="loop")
    assert torch.allclose(found, expected, atol=1e-12)
    used = [factor for i, factor in enumerate(factors) if which == "both" or (i < 2) == (which == "gate_up")]
    for one, other in zip(*(torch.autograd.grad(y, [x, weight, *used], slope) for y in (found, expected))):
        assert torch.allclose(one, other, atol=1e-12)
        assert other.any()


@pytest.mark.parametrize("backend", ["loop", "fused"])
@pytest.mark.parametrize("slots", [True, False])
def test_tokens_equal_those_of_summed_weights(backend, slots):
    w1, w2, *factors = weights()
    factors = [factor.requires_grad_() for factor in factors]
    x = torch.randn(9, D, dtype=torch.float64, requires_grad=True)
    expert_TK = torch.rand(9, E).topk(2).indices
    token_index, _, slot, counts = sort_by_expert(expert_TK, E)
    routing = torch.rand(18, dtype=torch.float64), token_index, slot if slots else None
    found = adapted_expert_mlp(x, w1, w2, counts, adapters("both", factors), *routing, backend=backend)
    expected = routed_expert_mlp(x, *merged("both", w1, w2, factors), counts, *routing)
    assert torch.allclose(found, expected, atol=1e-12)
    slope = torch.randn(9, D, dtype=torch.float64)
    for one, other in zip(*(torch.autograd.grad(y, [x, *factors], slope) for y in (found, expected))):
        assert torch.allclose(one, other, atol=1e-12)


def test_bf16_blocks_are_rounded_without_mixing_experts():
    """In bf16 on a CPU an expert's rows are extended into the next one's."""
    w1, w2, *factors = weights(torch.bfloat16)
    factors = [factor.requires_grad_() for factor in factors]
    x, counts = torch.randn(15, D).bfloat16(), torch.tensor([5, 1, 6, 3])
    slope = torch.randn(15, D).bfloat16()
    found, expected = (
        adapted_expert_mlp(x, w1, w2, counts, adapters("both", factors), backend=backend)
        for backend in ("fused", "loop")
    )
    pairs = [(found, expected), *zip(*(torch.autograd.grad(y, factors, slope) for y in (found, expected)))]
    for one, other in pairs:
        assert (one - other).float().norm() < 0.03 * other.float().norm()


def test_dropout_of_the_adapters_input_leaves_the_weights_own_product():
    w1, w2, *factors = weights()
    x, counts = torch.randn(15, D, dtype=torch.float64), torch.tensor([5, 0, 7, 3])
    torch.manual_seed(0)
    dropped = torch.stack(
        [adapted_expert_mlp(x, w1, w2, counts, adapters("down", factors, dropout=0.5)) for _ in range(400)]
    )
    whole, bare = (
        adapted_expert_mlp(x, w1, w2, counts, adapters("down", chosen))
        for chosen in (factors, [torch.zeros_like(factor) for factor in factors])
    )
    assert not torch.equal(dropped[0], dropped[1])
    assert (dropped.mean(0) - whole).norm() < 0.15 * (whole - bare).norm()
