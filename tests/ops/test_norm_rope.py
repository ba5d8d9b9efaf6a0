"""RMSNorm and rotary embeddings equal transformers' Mixtral."""

import pytest
import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import (
    MixtralRMSNorm,
    MixtralRotaryEmbedding,
    apply_rotary_pos_emb,
)

from moe_llm.ops import reference
from moe_llm.ops.norm import rms_norm
from moe_llm.ops.rope import apply_rotary, rotary_cos_sin


def seeded(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(actual, expected):
    return ((actual.double() - expected.double()).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1.2e-2)])
@pytest.mark.parametrize("shape", [(2, 7, 48), (5, 33), (1, 8), (3, 1, 40)])
def test_norm_equals_transformers(shape, dtype, tolerance):
    module = MixtralRMSNorm(shape[-1], eps=1e-5).to(dtype)
    module.weight.data = 1 + 0.3 * seeded(shape[-1], dtype=dtype, seed=1)
    x = (3 * seeded(*shape, dtype=dtype)).requires_grad_()
    y, expected = rms_norm(x, module.weight, 1e-5), module(x)
    assert y.dtype == dtype
    # in fp32 the kernel sums a row in another order: two units in the last place
    bound = 0 if dtype == torch.bfloat16 else 2**-22
    assert relative(y, reference.rms_norm(x, module.weight, 1e-5)) <= bound
    assert relative(y, expected) <= bound
    direction = seeded(*shape, dtype=dtype, seed=2)
    grads = torch.autograd.grad(y, (x, module.weight), direction)
    others = torch.autograd.grad(expected, (x, module.weight), direction)
    for grad, other in zip(grads, others, strict=True):
        assert grad.dtype == dtype
        assert relative(grad, other) < tolerance


def test_norm_by_finite_differences_and_without_rows():
    x = seeded(3, 2, 5, dtype=torch.float64).requires_grad_()
    weight = seeded(5, dtype=torch.float64, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), (x, weight))
    empty = torch.zeros(0, 5, dtype=torch.float64, requires_grad=True)
    _, grad = torch.autograd.grad(rms_norm(empty, weight, 1e-5).sum(), (empty, weight))
    assert (grad == 0).all()


def test_norm_of_zeros_is_finite():
    x = torch.zeros(2, 8, requires_grad=True)
    weight = torch.ones(8, requires_grad=True)
    y = rms_norm(x, weight, 1e-5)
    assert (y == 0).all()
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.isfinite().all()


@pytest.mark.parametrize("frozen", [0, 1])
def test_norm_with_a_frozen_input(frozen):
    inputs = [seeded(4, 6).requires_grad_(), seeded(6, seed=1).requires_grad_()]
    expected = torch.autograd.grad(rms_norm(*inputs, 1e-5).square().sum(), inputs)
    inputs[frozen].requires_grad_(False)
    (grad,) = torch.autograd.grad(rms_norm(*inputs, 1e-5).square().sum(), inputs[1 - frozen])
    assert torch.equal(grad, expected[1 - frozen])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "theta"), [(8, 10_000.0), (128, 1e6), (6, 500.0)])
def test_rotary_tables_equal_transformers_bit_for_bit(head_dim, theta, dtype):
    config = MixtralConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    positions = torch.stack((torch.arange(300), torch.arange(300).flip(0) * 100))
    expected = MixtralRotaryEmbedding(config)(torch.zeros(1, dtype=dtype), positions)
    for actual, other in zip(rotary_cos_sin(positions, head_dim, theta, dtype), expected, strict=True):
        assert torch.equal(actual, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [6, 16, 64])
def test_rotation_equals_transformers(head_dim, dtype):
    """fp32 bit for bit, forward and backward; bf16 to the rounding of the two products."""
    cos, sin = rotary_cos_sin(torch.arange(9).expand(2, 9), head_dim, 1e4, dtype)
    q = seeded(2, 9, 4, head_dim, dtype=dtype).requires_grad_()
    k = seeded(2, 9, 2, head_dim, dtype=dtype, seed=1).requires_grad_()
    actual = apply_rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    expected = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    twins = reference.apply_rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    directions = [seeded(*out.shape, dtype=dtype, seed=2) for out in actual]
    grads = torch.autograd.grad(actual, (q, k), directions)
    others = torch.autograd.grad(expected, (q, k), directions)
    for ours, theirs in [*zip(actual, expected), *zip(actual, twins), *zip(grads, others)]:
        assert ours.dtype == dtype
        if dtype == torch.float32:
            assert torch.equal(ours, theirs)
        else:
            assert relative(ours, theirs) < 1e-2


def test_rotation_keeps_the_memory_layout():
    cos, sin = rotary_cos_sin(torch.arange(9).expand(2, 9), 8, 1e4)
    q = seeded(2, 9, 4, 8).transpose(1, 2)
    rotated, _ = apply_rotary(q, q, cos, sin)
    assert rotated.stride() == q.stride()


def test_rotation_by_finite_differences():
    cos, sin = (table.double() for table in rotary_cos_sin(torch.arange(3)[None], 4, 10.0))
    q = seeded(1, 2, 3, 4, dtype=torch.float64).requires_grad_()
    k = seeded(1, 1, 3, 4, dtype=torch.float64, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: apply_rotary(q, k, cos, sin), (q, k))


def test_scores_depend_on_distance_alone():
    q, k = seeded(1, 1, 1, 16), seeded(1, 1, 1, 16, seed=1)

    def score(query_position, key_position):
        rotated = [
            apply_rotary(x, x, *rotary_cos_sin(torch.tensor([[position]]), 16, 1e4))[0]
            for x, position in ((q, query_position), (k, key_position))
        ]
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(score(7, 3), score(107, 103), rtol=1e-4, atol=1e-5)
    assert (score(7, 3) - score(7, 4)).abs() > 1e-3


def test_torchs_fused_norm_rounds_as_ours_within_the_dtype():
    """It takes CUDA tensors here; its forward pass runs on a CPU too, and gives the same up to one rounding."""
    x, weight = torch.randn(6, 64), torch.rand(64)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        y, scale = torch.ops.aten._fused_rms_norm(x.to(dtype), [64], weight.to(dtype), 1e-5)
        torch.testing.assert_close(y, rms_norm(x.to(dtype), weight.to(dtype), 1e-5), rtol=tolerance, atol=tolerance)
        assert scale.shape == (6, 1)
        assert scale.dtype == torch.float32
