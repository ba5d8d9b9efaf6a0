"""What was saved for a backward pass may be written over by it, unless the pass may be run again."""

import subprocess
import sys

import pytest
import torch

from moe_llm.ops import native
from moe_llm.ops.cross_entropy import linear_cross_entropy
from moe_llm.ops.expert_mlp import expert_mlp
from moe_llm.ops.native import graph_is_kept


def seeded(*shape, seed=0, scale=1.0):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).requires_grad_()


@pytest.mark.parametrize("keep", [False, True])
def test_whether_the_graph_is_kept(keep):
    class Asking(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            asked.append(graph_is_kept())
            return grad

    asked = []
    Asking.apply(seeded(2)).sum().backward(retain_graph=keep)
    assert asked == [keep]


def experts():
    counts = torch.tensor([3000, 0, 5168, 24])
    leaves = [
        seeded(8192, 64),
        seeded(4, 1024, 64, seed=1, scale=0.2),
        seeded(4, 64, 512, seed=2, scale=0.2),
        seeded(8192, seed=3),
    ]
    x, gate_up, down, weight = leaves
    return expert_mlp(x, gate_up, down, counts, backend="fused", weight_N=weight), leaves


def test_the_experts_projections_are_used_up_only_where_the_graph_is_not_kept():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        y, leaves = experts()
    (projections,) = [x for x in kept if x.dim() == 2 and x.shape[1] == 1024]
    before = projections.clone()
    torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    assert torch.equal(projections, before)
    torch.autograd.grad(y.sum(), leaves)
    assert torch.equal(projections, before) == (not native.fits(before))


def cross_entropy():
    leaves = [seeded(300, 64), seeded(700, 64, seed=1)]
    return linear_cross_entropy(*leaves, torch.arange(300))[0], leaves


@pytest.mark.parametrize("build", [experts, cross_entropy])
def test_a_graph_that_is_kept_gives_the_same_gradients_again(build):
    result, leaves = build()
    once = torch.autograd.grad(result.sum(), leaves, retain_graph=True)
    again = torch.autograd.grad(result.sum() * 2, leaves, retain_graph=True)
    last = torch.autograd.grad(result.sum(), leaves)
    for first, second, third in zip(once, again, last, strict=True):
        assert torch.equal(2 * first, second)
        assert torch.equal(first, third)


def test_a_graph_that_is_not_kept_is_not_used_again():
    result, leaves = experts()
    torch.autograd.grad(result.sum(), leaves)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(result.sum(), leaves)


def test_a_torch_that_does_not_tell():
    """Then nothing is written over."""
    program = (
        "import torch; del torch._C._autograd._get_current_graph_task_keep_graph\n"
        "from moe_llm.ops.native import graph_is_kept; print(graph_is_kept())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["True"], done.stderr
