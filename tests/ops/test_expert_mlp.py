"""Every backend equals the reference, forward and backward, whatever the routing."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe_llm.errors import UserError
from moe_llm.ops import reference
from moe_llm.ops.expert_mlp import BACKENDS, choose_backend, expert_mlp
from moe_llm.ops.shapes import round_up

HIDDEN, WIDTH = 24, 40
COUNTS = {
    "mixed": [3, 0, 17, 8],
    "one expert takes all": [0, 0, 29, 0],
    "first and last empty": [0, 5, 6, 0],
    "one token": [0, 1, 0, 0],
    "no tokens": [0, 0, 0, 0],
}
# relative to the largest entry; bf16 has 8 bits and the backends round at different places
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def make_inputs(counts, dtype, extra_rows=0, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype).requires_grad_()

    rows, experts = sum(counts) + extra_rows, len(counts)
    x = normal(rows, HIDDEN)
    gate_up = normal(experts, 2 * WIDTH, HIDDEN, scale=HIDDEN**-0.5)
    down = normal(experts, HIDDEN, WIDTH, scale=WIDTH**-0.5)
    weight = torch.rand(rows, generator=generator).requires_grad_()
    return x, gate_up, down, torch.tensor(counts), weight


def gradients(function, inputs):
    """(output, gradients of a fixed random projection of it)."""
    leaves = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    y = function()
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return y, torch.autograd.grad(y, leaves, direction)


def assert_close(actual, expected, dtype):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    if expected.numel() == 0:
        return
    scale = max(expected.abs().max().item(), 1e-30)
    assert (actual.double() - expected.double()).abs().max().item() <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("backend", ["loop", "fused", "grouped"])
def test_equals_reference(backend, counts, dtype, weighted):
    x, gate_up, down, counts_E, weight = make_inputs(counts, dtype)
    weight = weight if weighted else None
    inputs = (x, gate_up, down, weight)
    y, grads = gradients(lambda: expert_mlp(x, gate_up, down, counts_E, backend=backend, weight_N=weight), inputs)
    expected_y, expected_grads = gradients(lambda: reference.expert_mlp(x, gate_up, down, counts_E, weight), inputs)
    assert_close(y, expected_y, dtype)
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected, dtype)


@pytest.mark.parametrize("backend", ["loop", "fused", "grouped"])
def test_experts_without_rows_get_exactly_zero(backend):
    x, gate_up, down, counts_E, _ = make_inputs([4, 0, 9, 0], torch.float32)
    # dirty memory, so that an unwritten gradient would show
    dirt = [torch.full_like(tensor, math.nan) for tensor in (gate_up, down, x)]
    del dirt
    _, grads = gradients(lambda: expert_mlp(x, gate_up, down, counts_E, backend=backend), (gate_up, down))
    for grad in grads:
        assert (grad[[1, 3]] == 0).all()
        assert (grad[[0, 2]] != 0).any(dim=(1, 2)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("backend", ["loop", "fused", "grouped"])
def test_rows_of_no_expert_give_zero_even_if_they_hold_nan(backend, weighted, dtype):
    x, gate_up, down, counts_E, weight = make_inputs([4, 0, 9, 2], dtype, extra_rows=6)
    with torch.no_grad():
        x[15:] = math.nan
        weight[15:] = math.nan
    weight = weight if weighted else None
    used = None if weight is None else weight[:15]
    leaves = [tensor for tensor in (x, gate_up, down, weight) if tensor is not None]
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected_y = reference.expert_mlp(x[:15], gate_up, down, counts_E, used)
    expected = torch.autograd.grad(expected_y, leaves, direction[:15])
    direction[15:] = math.nan
    y = expert_mlp(x, gate_up, down, counts_E, backend=backend, weight_N=weight)
    grads = torch.autograd.grad(y, leaves, direction)
    assert (y[15:] == 0).all()
    assert (grads[0][15:] == 0).all()
    assert_close(y[:15], expected_y, dtype)
    for grad, other in zip(grads, expected, strict=True):
        assert_close(grad, other, dtype)


@pytest.mark.parametrize("backend", ["loop", "fused"])
def test_gradients_by_finite_differences(backend):
    x, gate_up, down, counts_E, weight = (
        tensor.double().detach().requires_grad_() if tensor.is_floating_point() else tensor
        for tensor in make_inputs([2, 0, 3], torch.float32, extra_rows=1)
    )
    assert torch.autograd.gradcheck(
        lambda x, gate_up, down, weight: expert_mlp(x, gate_up, down, counts_E, backend=backend, weight_N=weight),
        (x, gate_up, down, weight),
        fast_mode=True,
    )


@pytest.mark.parametrize("backend", ["loop", "fused", "grouped"])
def test_strides_do_not_matter(backend):
    x, gate_up, down, counts_E, _ = make_inputs([3, 0, 17, 8], torch.float32)
    strided = (
        torch.stack((x, x), dim=2).detach()[..., 1].requires_grad_(),
        gate_up.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(),
        down.detach().permute(1, 2, 0).contiguous().permute(2, 0, 1).requires_grad_(),
    )
    assert not any(tensor.is_contiguous() for tensor in strided)
    if backend == "grouped":  # torch's kernel needs one unit stride in the weights' matrices
        strided = (strided[0], strided[1], down)
    y, grads = gradients(lambda: expert_mlp(*strided, counts_E, backend=backend), strided)
    expected_y, expected = gradients(lambda: reference.expert_mlp(x, gate_up, down, counts_E), (x, gate_up, down))
    assert_close(y, expected_y, torch.float32)
    for grad, reference_grad in zip(grads, expected, strict=True):
        assert_close(grad, reference_grad, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["fused", "grouped"])
@pytest.mark.parametrize("frozen", range(4))
def test_frozen_inputs_get_no_gradient_and_change_no_other(backend, frozen, dtype):
    *inputs, counts_E, weight = make_inputs([3, 0, 17, 8], dtype)
    inputs = [*inputs, weight]

    def run():
        return expert_mlp(*inputs[:3], counts_E, backend=backend, weight_N=inputs[3])

    _, expected = gradients(run, inputs)
    inputs[frozen].requires_grad_(False)
    _, grads = gradients(run, inputs)
    expected = [grad for index, grad in enumerate(expected) if index != frozen]
    assert all(torch.equal(grad, other) for grad, other in zip(grads, expected, strict=True))


@pytest.mark.parametrize("backend", ["fused", "grouped"])
def test_gradients_accumulate_and_survive_recomputation(backend):
    x, gate_up, down, counts_E, weight = make_inputs([3, 0, 17, 8], torch.float32)

    def run():
        return expert_mlp(x, gate_up, down, counts_E, backend=backend, weight_N=weight)

    run().square().sum().backward()
    once = [tensor.grad.clone() for tensor in (x, gate_up, down, weight)]
    checkpoint(run, use_reentrant=False).square().sum().backward()
    for tensor, grad in zip((x, gate_up, down, weight), once):
        assert torch.equal(tensor.grad, 2 * grad)


@pytest.mark.parametrize("backend", ["fused", "grouped"])
def test_parameters_may_be_freed_between_the_passes(backend):
    """As ZeRO-3 does: the storage is emptied after the forward pass and filled again before the backward."""
    x, gate_up, down, counts_E, _ = make_inputs([3, 0, 17, 8], torch.float32)
    _, expected = gradients(lambda: expert_mlp(x, gate_up, down, counts_E, backend=backend), (gate_up, down))
    whole = [gate_up.detach().clone(), down.detach().clone()]
    y = expert_mlp(x, gate_up, down, counts_E, backend=backend)
    for parameter in (gate_up, down):
        parameter.data = torch.empty(0)
    for parameter, data in zip((gate_up, down), whole):
        parameter.data = data
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(direction)
    assert torch.equal(gate_up.grad, expected[0])
    assert torch.equal(down.grad, expected[1])


def test_what_is_kept_for_the_backward_pass():
    """The input rows, the gate and up projections, and the parameters: nothing else of N rows."""
    x, gate_up, down, counts_E, weight = make_inputs([30, 0, 17, 8], torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor
    ):
        expert_mlp(x, gate_up, down, counts_E, backend="fused", weight_N=weight)
    rows = sorted(shape for shape in kept if shape[0] == 55)
    assert rows == [(55,), (55, HIDDEN), (55, 2 * WIDTH)]


def test_bf16_products_come_in_few_shapes():
    """Counts up to 4096 make fewer than 100 different shapes, and at most a 16th more rows from 256 on."""
    rounded = [round_up(count) for count in range(1, 4097)]
    assert len(set(rounded)) < 100
    assert all(rows >= count for count, rows in enumerate(rounded, start=1))
    assert all(rows <= count * (1 + 1 / 16) for count, rows in enumerate(rounded, start=1) if count >= 256)


@pytest.mark.parametrize("seed", range(6))
def test_bf16_blocks_that_overlap_many_small_experts(seed):
    """Blocks are extended over several following experts, also over all that is left."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 5, (12,), generator=generator).tolist()
    x, gate_up, down, counts_E, weight = make_inputs(counts, torch.bfloat16, extra_rows=seed % 3, seed=seed)
    inputs = (x, gate_up, down, weight)
    y, grads = gradients(lambda: expert_mlp(x, gate_up, down, counts_E, backend="fused", weight_N=weight), inputs)
    expected_y, expected = gradients(lambda: reference.expert_mlp(x, gate_up, down, counts_E, weight), inputs)
    assert_close(y, expected_y, torch.bfloat16)
    for grad, other in zip(grads, expected, strict=True):
        assert_close(grad, other, torch.bfloat16)


def test_choice_of_backend():
    cpu = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert choose_backend(cpu, dtype, (4096, 8, 512, 1792)) == "fused"
    x, gate_up, down, counts_E, _ = make_inputs([3, 0, 17, 8], torch.float32)
    assert torch.equal(expert_mlp(x, gate_up, down, counts_E), expert_mlp(x, gate_up, down, counts_E, backend="fused"))


def test_unknown_or_impossible_backend_is_one_sentence():
    x, gate_up, down, counts_E, _ = make_inputs([3, 0, 17, 8], torch.float32)
    with pytest.raises(UserError, match="'cutlass'.*" + ", ".join(BACKENDS)):
        expert_mlp(x, gate_up, down, counts_E, backend="cutlass")
    odd = x[:, :21], gate_up[..., :21], down[:, :21]
    with pytest.raises(UserError, match=r"'grouped'.*hidden_size=21"):
        expert_mlp(*odd, counts_E, backend="grouped")


@pytest.mark.parametrize("weighted", [False, True])
def test_grouped_experts_take_no_rows_at_all(weighted):
    """As a rank does to which no token goes: its output is empty, and its gradients are zero."""
    x, gate_up, down, counts, weight = make_inputs([0, 0, 0, 0], torch.bfloat16)
    leaves = [x, gate_up, down, *([weight] if weighted else [])]
    y = expert_mlp(x, gate_up, down, counts, backend="grouped", weight_N=weight if weighted else None)
    assert y.shape == x.shape
    for leaf, gradient in zip(leaves, torch.autograd.grad(y.sum(), leaves)):
        assert gradient.shape == leaf.shape
        assert not gradient.any()
