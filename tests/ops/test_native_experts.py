"""Products and experts of the C++ kernels equal torch's, as compiled for every processor, in all layouts."""

import pytest
import torch

from moe_llm.ops import expert_mlp as experts_module
from moe_llm.ops import native, products
from moe_llm.ops.expert_mlp import expert_mlp, routed_expert_mlp
from moe_llm.ops.permutation import sort_by_expert

DTYPES = [torch.float32, torch.bfloat16]


def seeded(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(actual, expected, tolerance=None):
    tolerance = tolerance or {torch.float32: 5e-6, torch.bfloat16: 4e-3}[actual.dtype]
    return (actual.double() - expected.double()).abs().max() <= tolerance * expected.double().abs().max()


SIZES = [(1, 1, 1), (6, 8, 4), (13, 31, 16), (15, 33, 513), (129, 300, 67), (20, 2100, 600), (43, 64, 1100)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("how", ["plain", "b by columns", "a transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products(processor, size, how, dtype):
    M, N, K = size
    if dtype == torch.bfloat16 and how != "a transposed":
        K += K % 2
    a = seeded(*((K, M) if how == "a transposed" else (M, K)), dtype=dtype)
    b = seeded(*((N, K) if how == "b by columns" else (K, N)), seed=1, dtype=dtype)
    transposes = {"transpose_a": how == "a transposed", "transpose_b": how == "b by columns"}
    expected = (a.double().t() if transposes["transpose_a"] else a.double()) @ (
        b.double().t() if transposes["transpose_b"] else b.double()
    )
    around = torch.full((M + 2, N + 5), 7.0, dtype=dtype)
    out = around[1:-1, 2:-3].fill_(torch.nan)  # what is there does not enter
    native.matmul(a, b, out, **transposes)
    assert close(out, expected)
    native.matmul(a, b, out, **transposes, add=True)
    assert close(out, 2 * expected, 4e-3 if dtype == torch.bfloat16 else None)
    around[1:-1, 2:-3] = 7.0
    assert (around == 7.0).all()  # nothing beside it is written


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_batches_of_runs(processor, threads):
    """As attention has them: queries of a group are runs of rows, and every operand lies as it happens to."""
    q = seeded(3, 50, 2, 4, 24).permute(0, 2, 3, 1, 4)[:, :, :, 10:30]  # (3, 2, 4, 20, 24) of (3, 50, 2, 4, 24)
    keys = seeded(3, 33, 2, 24, seed=1).transpose(1, 2)
    values = seeded(3, 2, 40, 24, seed=2)[:, :, :33]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        scores = torch.full((3, 2, 4, 20, 33), torch.nan)
        native.matmul(q, keys, scores, transpose_b=True)
        flat = q.flatten(2, 3).double()
        assert close(scores.flatten(2, 3), flat @ keys.double().mT)
        mixed = torch.full((3, 50, 2, 4, 24), 7.0)
        native.matmul(scores, values, mixed.permute(0, 2, 3, 1, 4)[:, :, :, 10:30])
        expected = (scores.flatten(2, 3).double() @ values.double()).unflatten(2, (4, 20))
        assert close(mixed.permute(0, 2, 3, 1, 4)[:, :, :, 10:30], expected)
        assert (mixed[:, :10] == 7.0).all()
        assert (mixed[:, 30:] == 7.0).all()
        sums = seeded(3, 40, 2, 24, seed=3)
        found = sums.clone()
        native.matmul(scores, q, found.transpose(1, 2)[:, :, :33], transpose_a=True, add=True)
        expected = sums.double().transpose(1, 2)[:, :, :33] + scores.flatten(2, 3).double().mT @ flat
        assert close(found.transpose(1, 2)[:, :, :33], expected)
        assert torch.equal(found[:, 33:], sums[:, 33:])
    finally:
        torch.set_num_threads(before)


def test_a_sum_over_nothing(processor):
    out = torch.full((3, 40), torch.nan)
    native.matmul(torch.empty(3, 0), torch.empty(0, 40), out)
    assert (out == 0).all()
    out = torch.full((3, 40), torch.nan)
    native.matmul(torch.empty(0, 3), torch.empty(0, 40), out, transpose_a=True)
    assert (out == 0).all()
    native.matmul(torch.empty(0, 3), torch.empty(0, 40), out.fill_(5.0), transpose_a=True, add=True)
    assert (out == 5).all()
    native.matmul(torch.empty(0, 8), torch.empty(8, 40), torch.empty(0, 40))


@pytest.fixture(params=[16, 1024])
def one_call(processor, monkeypatch, request):
    """Experts go to the kernels whatever the processor, in several blocks or one."""
    monkeypatch.setattr(products, "_ours", lambda: True)
    monkeypatch.setattr(products, "_ours_in_bf16", lambda: True)
    monkeypatch.setattr(experts_module, "_NATIVE_ROWS", request.param)
    calls, plain = [], native.call
    monkeypatch.setattr(native, "call", lambda *a: (calls.append(a[0]), plain(*a))[1])
    return calls


def drawn_experts(hidden=24, width=40):
    """An expert without rows, and rows that belong to nobody."""
    counts, total = torch.tensor([100, 0, 32, 1, 37]), 190
    weights = 0.2 * seeded(5, 2 * width, hidden, seed=1), 0.2 * seeded(5, hidden, width, seed=2)
    return seeded(total, hidden), *weights, counts, seeded(total, seed=3), seeded(total, hidden, seed=4)


def check_gradients(outputs, leaves, direction):
    results = [(y, *torch.autograd.grad(y, leaves, direction, retain_graph=True)) for y in outputs]
    for actual, expected in zip(*results, strict=True):
        assert actual.shape == expected.shape
        assert close(actual, expected, 1e-5)


@pytest.mark.parametrize("weighted", [True, False])
def test_experts(one_call, weighted):
    x, gate_up, down, counts, weight, direction = drawn_experts()
    leaves = [leaf.requires_grad_() for leaf in (x, gate_up, down, *([weight] if weighted else []))]
    weight = weight if weighted else None
    outputs = [expert_mlp(x, gate_up, down, counts, backend=backend, weight_N=weight) for backend in ("fused", "loop")]
    check_gradients(outputs, leaves, direction)
    assert one_call == ["experts_forward", "experts_backward"]
    # the graph was kept, so that nothing was written over
    check_gradients(outputs, leaves, direction)
    # and now it is not
    for actual, expected in zip(*(torch.autograd.grad(y, leaves, direction) for y in outputs), strict=True):
        assert close(actual, expected, 1e-5)


@pytest.mark.parametrize("kept", [False, True])
def test_experts_in_bf16(one_call, kept):
    """As exact as bf16 is: what is rounded is what is written down."""
    *inputs, counts, weight, direction = drawn_experts()
    leaves = [leaf.bfloat16().requires_grad_() for leaf in (*inputs, weight)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    y, expected = (
        expert_mlp(*of[:3], counts, backend=backend, weight_N=of[3])
        for of, backend in ((leaves, "fused"), (exact, "loop"))
    )
    grads = torch.autograd.grad(y, leaves, direction.bfloat16(), retain_graph=kept)
    others = torch.autograd.grad(expected, exact, direction.bfloat16().double())
    for actual, other in zip((y, *grads), (expected, *others), strict=True):
        assert actual.dtype == torch.bfloat16
        assert close(actual, other, 1.5e-2)
    assert one_call == ["experts_forward", "experts_backward"]


def test_sums_over_many_rows_are_rounded_once(one_call):
    """A weight's gradient in bf16 is that of fp32, rounded."""
    a, b = (seeded(5000, width, seed=width, dtype=torch.bfloat16) for width in (30, 70))
    out = torch.empty(30, 70, dtype=torch.bfloat16)
    native.matmul(a, b, out, transpose_a=True)
    expected = a.double().t() @ b.double()
    assert ((out.double() - expected).abs() <= expected.abs() * 2**-8 + 2e-4).all()
    before = out.double()
    native.matmul(a, b, out, transpose_a=True, add=True)
    assert ((out.double() - before - expected).abs() <= (before + expected).abs() * 2**-8 + 2e-4).all()
    wide = seeded(70, 5000, dtype=torch.bfloat16)
    out = torch.empty(70, 70, dtype=torch.bfloat16)
    native.matmul(wide, b, out)
    expected = wide.double() @ b.double()
    assert ((out.double() - expected).abs() <= expected.abs() * 2**-8 + 2e-4).all()


@pytest.mark.parametrize(("hidden", "width"), [(23, 40), (24, 39), (24, 5000)])
def test_bf16_experts_that_our_kernels_do_not_take(one_call, hidden, width):
    """An odd number, or sums too long for the cache: product by product."""
    *inputs, counts, _, _ = drawn_experts(hidden, width)
    inputs = [leaf.bfloat16() for leaf in inputs]
    y, expected = (expert_mlp(*inputs, counts, backend=backend) for backend in ("fused", "loop"))
    assert close(y, expected, 1.5e-2)
    assert "experts_forward" not in one_call


def test_experts_of_tokens(one_call):
    tokens, gate_up, down, *_ = drawn_experts()
    tokens, experts_TK = tokens[:60], torch.rand(60, 5, generator=torch.Generator().manual_seed(5)).topk(2).indices
    token_index, _, slot, counts = sort_by_expert(experts_TK, 5)
    weight = seeded(120, seed=3)
    leaves = [leaf.requires_grad_() for leaf in (tokens, gate_up, down, weight)]
    outputs = [
        routed_expert_mlp(tokens, gate_up, down, counts, weight, token_index, slot, backend=b)
        for b in ("fused", "loop")
    ]
    check_gradients(outputs, leaves, seeded(60, 24, seed=4))
    assert "experts_backward" in one_call


@pytest.mark.parametrize("trained", range(4))
def test_what_is_frozen_is_not_computed(one_call, trained):
    *inputs, counts, weight, direction = drawn_experts()
    inputs = [*inputs, weight]
    inputs[trained].requires_grad_()
    outputs = [expert_mlp(*inputs[:3], counts, backend=backend, weight_N=inputs[3]) for backend in ("fused", "loop")]
    check_gradients(outputs, [inputs[trained]], direction)


def test_operands_that_lie_otherwise(one_call):
    x, gate_up, down, counts, weight, direction = drawn_experts()
    leaves = [
        x.t().contiguous().t().requires_grad_(),
        gate_up.mT.contiguous().mT.requires_grad_(),
        down.mT.contiguous().mT.requires_grad_(),
    ]
    weight = torch.stack((weight, weight), 1)[:, 0].double()
    outputs = [
        expert_mlp(*leaves, counts.to(torch.int32), backend=backend, weight_N=weight.to(torch.float32))
        for backend in ("fused", "loop")
    ]
    check_gradients(outputs, leaves, direction.t().contiguous().t())
