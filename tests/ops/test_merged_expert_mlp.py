"""One feed-forward of mixed weights for each run of tokens: values and gradients are autograd's, in little memory."""

import pytest
import torch
import torch.nn.functional as F

from moe_llm.ops import merged_expert_mlp as module
from moe_llm.ops.merged_expert_mlp import PORTION, merged_expert_mlp

LENGTH, HIDDEN, WIDTH, EXPERTS = 5, 12, 6, 4


def arguments(runs: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(runs)
    x_NLD = torch.randn(runs, LENGTH, HIDDEN, generator=generator).to(dtype)
    probability_NE = torch.randn(runs, EXPERTS, generator=generator).softmax(-1)
    shapes = (EXPERTS, 2 * WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)
    weights = [(0.5 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]
    return [tensor.requires_grad_() for tensor in (x_NLD, probability_NE, *weights)]


def by_definition(x_NLD, probability_NE, gate_up_EGD, down_EDF, kept_NLF=1.0) -> torch.Tensor:
    gate_NFD, up_NFD = torch.einsum("ne,egd->ngd", probability_NE, gate_up_EGD).chunk(2, dim=1)
    down_NDF = torch.einsum("ne,edf->ndf", probability_NE, down_EDF)
    return F.silu(x_NLD @ gate_NFD.mT) * (x_NLD @ up_NFD.mT) * kept_NLF @ down_NDF.mT


@pytest.mark.parametrize("runs", [0, 1, PORTION, 2 * PORTION + 3])
def test_values_and_gradients_are_those_of_the_definition(runs):
    leaves = arguments(runs)
    y_NLD, expected_NLD = merged_expert_mlp(*leaves), by_definition(*leaves)
    torch.testing.assert_close(y_NLD, expected_NLD, rtol=1e-5, atol=1e-5)
    direction = torch.randn(y_NLD.shape, generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip(*(torch.autograd.grad(y, leaves, direction) for y in (y_NLD, expected_NLD)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_what_is_dropped_in_the_forward_pass_is_dropped_in_the_backward_pass():
    leaves, runs = arguments(PORTION + 2), PORTION + 2
    torch.manual_seed(3)
    y_NLD = merged_expert_mlp(*leaves, dropout=0.4)
    torch.manual_seed(3)
    seed, like = int(torch.randint(2**62, ())), torch.empty(runs, LENGTH, WIDTH)
    kept_NLF = torch.cat([module._kept(part, 0.4, seed + at * PORTION) for at, part in enumerate(like.split(PORTION))])
    assert kept_NLF.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert (kept_NLF == 0).float().mean() == pytest.approx(0.4, abs=0.1)
    expected_NLD = by_definition(*leaves, kept_NLF)
    torch.testing.assert_close(y_NLD, expected_NLD, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (y_NLD, expected_NLD)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_bf16_is_fp32_but_for_rounding():
    rounded = arguments(2 * PORTION + 3, torch.bfloat16)
    wide = [leaf.detach().float().requires_grad_() for leaf in rounded]
    outputs = merged_expert_mlp(*rounded), merged_expert_mlp(*wide)
    assert outputs[0].dtype == torch.bfloat16
    pairs = [
        outputs,
        *zip(
            *(torch.autograd.grad(y.float().square().sum(), leaves) for y, leaves in zip(outputs, (rounded, wide))),
            strict=True,
        ),
    ]
    for ours, theirs in pairs:
        assert (ours.float() - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("frozen", [(2, 3), (0, 1), (2,), (0, 1, 3)])
def test_what_is_frozen_has_no_gradient_and_the_rest_has_the_same(frozen):
    leaves, some = arguments(3), arguments(3)
    for index in frozen:
        some[index].requires_grad_(False)
    for given in (leaves, some):
        merged_expert_mlp(*given).square().sum().backward()
    for index, (whole, part) in enumerate(zip(leaves, some)):
        assert part.grad is None if index in frozen else torch.equal(part.grad, whole.grad)


def test_no_merged_weights_are_kept():
    kept, leaves = [], arguments(40)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        merged_expert_mlp(*leaves)
    assert sorted(tensor.numel() for tensor in kept) == sorted(leaf.numel() for leaf in leaves)
