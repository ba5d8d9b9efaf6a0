"""Every Triton kernel equals its reference twin, forward and backward. Run by test_triton.py, in a process of its own.

In the interpreter tiles are 16 x 16 x 16 and rows are cut at 16, so that small inputs have several, with tails.
"""

import math

import pytest
import torch
import triton as compiler
import triton.language as tl
from support.interpreter import repair

from moe_llm.ops import native, reference, triton
from moe_llm.ops.cross_entropy import linear_cross_entropy
from moe_llm.ops.expert_mlp import expert_mlp
from moe_llm.ops.norm import add_rms_norm, rms_norm
from moe_llm.ops.permutation import gather_sum, sort_by_expert
from moe_llm.ops.rope import apply_rotary, rotary_cos_sin
from moe_llm.ops.routed_experts import routed_expert_mlp
from moe_llm.ops.triton import tiles

HIDDEN, WIDTH, EXPERTS = 24, 20, 4
# relative to the largest entry; bf16 has 8 bits and is rounded at different places
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", autouse=True)
def device():
    """Where the kernels run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "_enabled", frozenset(triton.DEFAULT))
        patch.setattr(native, "fits", lambda *_: False)
        if triton.interpreted():
            repair()
        else:
            from moe_llm.ops.triton import products

            for kernel in (products._gate_up_swiglu, products._rows_product, products._weight_gradient):
                patch.setattr(kernel, "configs", kernel.configs[-2:])  # or compiling takes minutes
        yield torch.device("cpu" if triton.interpreted() else "cuda")


def normal(device, dtype, *shape, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed + math.prod(shape))
    return (torch.randn(shape, generator=generator) * scale).to(device, dtype).requires_grad_()


def results(function, leaves):
    """The output and the gradients of a fixed random projection of it."""
    y = function()
    direction = normal(y.device, y.dtype, *y.shape, seed=1).detach()
    return (y, *torch.autograd.grad(y, leaves, direction))


def assert_equal(actual, expected, dtype):
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert one.isfinite().all()
        if other.numel():
            difference = (one.double() - other.double()).abs().max()
            assert difference <= TOLERANCE[dtype] * other.double().abs().max().clamp(min=1e-30)


def weights(device, dtype, experts=EXPERTS):
    gate_up = normal(device, dtype, experts, 2 * WIDTH, HIDDEN, scale=HIDDEN**-0.5)
    return gate_up, normal(device, dtype, experts, HIDDEN, WIDTH, scale=WIDTH**-0.5)


ROUTINGS = {
    "mixed": [[0, 1], [3, 1], [1, 3], [3, 0], [1, 3], [1, 0], [3, 1], [0, 1], [1, 3], [1, 0]],
    "one expert takes all": [[3]] * 19,
    "one token": [[2]],
    "no tokens": [],
}


@pytest.mark.parametrize(
    ("routing", "dtype"),
    [*((name, torch.float32) for name in ROUTINGS), *((name, torch.bfloat16) for name in list(ROUTINGS)[:2])],
)
def test_routed_experts(device, routing, dtype):
    expert_TK = torch.tensor(ROUTINGS[routing] or [[]], dtype=torch.int64, device=device)
    expert_TK = expert_TK if expert_TK.numel() else expert_TK.new_empty(0, 2)
    token_index_N, _, slot_TK, counts_E = sort_by_expert(expert_TK, EXPERTS)
    x, (gate_up, down) = normal(device, dtype, len(expert_TK), HIDDEN), weights(device, dtype)
    weight = torch.rand(slot_TK.numel(), device=device).requires_grad_()
    leaves = (x, gate_up, down, weight)
    # memory that is not clean, so that an element which nobody writes would show
    dirt = [torch.full_like(tensor, math.nan) for tensor in (gate_up, down, x)]
    del dirt
    actual = results(
        lambda: routed_expert_mlp(x, gate_up, down, counts_E, weight, token_index_N, slot_TK, backend="triton"), leaves
    )

    def twin():
        rows = reference.expert_mlp(reference.permute(x, token_index_N), gate_up, down, counts_E, weight)
        return reference.combine(rows, None, token_index_N, len(x))

    assert_equal(actual, results(twin, leaves), dtype)
    for grad in actual[2:4]:
        assert (grad[counts_E == 0] == 0).all()


def test_rows_of_no_expert_give_zero_even_if_they_hold_nan(device):
    dtype, rows, extra = torch.float32, 20, 3
    counts_E = torch.tensor([17, 0, 3, 0], device=device)
    x, (gate_up, down) = normal(device, dtype, rows + extra, HIDDEN), weights(device, dtype)
    weight = torch.rand(rows + extra, device=device)
    with torch.no_grad():
        x[rows:], weight[rows:] = math.nan, math.nan
    leaves = (x, gate_up, down, weight.requires_grad_())
    expected_y = reference.expert_mlp(x[:rows], gate_up, down, counts_E, weight[:rows])
    direction = normal(device, dtype, rows + extra, HIDDEN, seed=1).detach()
    expected = torch.autograd.grad(expected_y, leaves, direction[:rows])
    direction[rows:] = math.nan
    y = expert_mlp(x, gate_up, down, counts_E, backend="triton", weight_N=weight)
    assert (y[rows:] == 0).all()
    assert_equal((y[:rows], *torch.autograd.grad(y, leaves, direction)), (expected_y, *expected), dtype)


def test_frozen_and_strided_inputs_and_no_weights(device):
    """Each gradient alone equals that of all together; layouts do not matter."""
    dtype, counts_E = torch.float32, torch.tensor([3, 0, 9], device=device)
    x, (gate_up, down) = normal(device, dtype, 12, HIDDEN), weights(device, dtype, 3)
    expected = results(lambda: reference.expert_mlp(x, gate_up, down, counts_E), (x, gate_up, down))
    down = down.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    x = torch.stack((x, x), dim=2).detach()[..., 1].requires_grad_()
    assert not x.is_contiguous()
    assert not down.is_contiguous()
    inputs = (x, gate_up, down)
    for wanted, gradient in zip(inputs, expected[1:], strict=True):
        frozen = [tensor if tensor is wanted else tensor.detach() for tensor in inputs]
        y, own = results(lambda frozen=frozen: expert_mlp(*frozen, counts_E, backend="triton"), (wanted,))
        assert_equal((y, own), (expected[0], gradient), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [True, False])
def test_grouped_products_with_our_swiglu(device, dtype, weighted):
    """torch's products between our elementwise kernels."""
    counts_E = torch.tensor([7, 0, 11], device=device)
    x, width = normal(device, dtype, 20, HIDDEN), 40  # rows of 16 bytes, as torch wants them
    gate_up = normal(device, dtype, 3, 2 * width, HIDDEN, scale=HIDDEN**-0.5)
    down = normal(device, dtype, 3, HIDDEN, width, scale=width**-0.5)
    weight = torch.rand(20, device=device).requires_grad_() if weighted else None
    leaves = (x, gate_up, down, *([weight] if weighted else []))
    if device.type == "cuda" and dtype == torch.float32:
        pytest.skip("torch's grouped product is of bf16 there")
    actual = results(lambda: expert_mlp(x, gate_up, down, counts_E, backend="grouped", weight_N=weight), leaves)
    assert_equal(actual, results(lambda: reference.expert_mlp(x, gate_up, down, counts_E, weight), leaves), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_sum(device, dtype):
    x = normal(device, dtype, 9, 37).detach()
    index = torch.randint(9, (6, 3), generator=torch.Generator().manual_seed(0)).to(device)
    weight = torch.rand(6, 3, device=device)
    for weight_MK in (weight, None):
        wide = torch.ones_like(weight) if weight_MK is None else weight_MK
        expected = (x.float()[index] * wide[..., None]).sum(1).to(dtype)
        assert_equal((gather_sum(x, index, weight_MK),), (expected,), dtype)
    assert gather_sum(x, index[:0], None).shape == (0, 37)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(device, dtype):
    x, delta = normal(device, dtype, 3, 5, 37), normal(device, dtype, 3, 5, 37, seed=2)
    weight = normal(device, dtype, 37)
    actual = results(lambda: rms_norm(x, weight, 1e-5), (x, weight))
    assert_equal(actual, results(lambda: reference.rms_norm(x, weight, 1e-5), (x, weight)), dtype)

    leaves = (x, delta, weight)
    actual = results(lambda: torch.stack(add_rms_norm(x, delta, weight, 1e-5)), leaves)
    twin = results(lambda: torch.stack((x + delta, reference.rms_norm(x + delta, weight, 1e-5))), leaves)
    assert_equal(actual, twin, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary(device, dtype):
    q = normal(device, dtype, 2, 5, 3, 12).transpose(1, 2)
    k = normal(device, dtype, 2, 5, 1, 12).transpose(1, 2)
    cos, sin = rotary_cos_sin(torch.arange(5, device=device).expand(2, 5) + 3, 12, 1e4, dtype)
    sin = sin + torch.linspace(0, 0.5, 12, device=device).to(dtype)  # halves that differ: which is read shows
    for one, twin in zip(apply_rotary(q, k, cos, sin), reference.apply_rotary(q, k, cos, sin), strict=True):
        leaf = q if one.shape == q.shape else k
        assert_equal(results(lambda one=one: one, (leaf,)), results(lambda twin=twin: twin, (leaf,)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy(device, dtype):
    hidden, weight = normal(device, dtype, 7, 8), normal(device, dtype, 41, 8)
    labels = torch.tensor([3, -100, 40, 0, 17, -100, 16], device=device)
    leaves = (hidden, weight)
    expected = results(lambda: reference.linear_cross_entropy(hidden, weight, labels)[0], leaves)
    assert_equal(results(lambda: linear_cross_entropy(hidden, weight, labels)[0], leaves), expected, dtype)
    chunked = results(lambda: linear_cross_entropy(hidden, weight, labels, chunk_tokens=3)[0], leaves)
    assert_equal(chunked, expected, dtype)
    with torch.no_grad():
        loss, _ = linear_cross_entropy(hidden, weight, labels)
    assert_equal((loss,), expected[:1], dtype)


def test_rows_without_a_label_have_no_loss_and_no_gradient(device):
    from moe_llm.ops.triton.elementwise import cross_entropy_

    logits = normal(device, torch.float32, 3, 41).detach()
    logits[1] = math.nan
    labels = torch.tensor([5, -1, 40], device=device)
    loss = cross_entropy_(logits, labels, True)
    assert loss.isfinite().all()
    assert loss[1] == 0
    assert (logits[1] == 0).all()
    assert logits.sum(1).abs().max() < 1e-5


@compiler.jit
def _schedule(counts_ptr, out_ptr, num_rows, num_experts, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    tile = tl.program_id(0)
    expert, first, end = tiles.rows_of_tile(counts_ptr, tile, num_rows, num_experts, EXPERTS, BLOCK)
    tl.store(out_ptr + 3 * tile, expert)
    tl.store(out_ptr + 3 * tile + 1, first)
    tl.store(out_ptr + 3 * tile + 2, end)


def test_the_schedule_covers_each_row_of_each_expert_once(device):
    """Every row in the tiles of its own expert, whatever the counts; all other tiles are empty."""
    for counts, extra in (([5, 0, 8, 1], 0), ([0, 0, 0, 0], 3), ([0, 9, 0, 0], 0), ([1, 1, 1, 1], 5), ([4, 8, 12], 4)):
        rows, block = sum(counts) + extra, 4
        most = tiles.most_tiles(rows, len(counts), block)
        out = torch.full((most, 3), -1, dtype=torch.int32, device=device)
        power = compiler.next_power_of_2(len(counts) + 1)
        _schedule[most,](torch.tensor(counts, device=device), out, rows, len(counts), power, block)
        owner = torch.repeat_interleave(torch.arange(len(counts) + 1), torch.tensor([*counts, extra])).tolist()
        seen = [None] * rows
        for expert, first, end in out.tolist():
            for row in range(first, min(first + block, end)):
                assert seen[row] is None
                seen[row] = expert
        assert seen == owner
