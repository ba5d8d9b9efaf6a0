"""The chunked objective equals the one with all logits, gradients included; the tail is one outcome."""

import itertools
import math

import pytest
import torch

from moe_llm.ops import reference
from moe_llm.ops.distillation import Distillation, Outcomes, divergence, linear_distillation

TOKENS, HIDDEN, VOCABULARY = 23, 8, 31
KINDS = ("forward_kl", "reverse_kl", "jensen_shannon")


def make_inputs(dtype=torch.float64, ignored=0.3):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    labels[torch.rand(TOKENS, generator=generator) < ignored] = -100
    count = int((labels != -100).sum())
    log_p = (3 * torch.randn(count, VOCABULARY, generator=generator, dtype=torch.float64)).log_softmax(-1)
    return hidden, weight, labels, log_p


def whole(log_p, kind, temperature=1.0, alpha=0.5):
    return Distillation(lambda start, stop: Outcomes(log_p[start:stop]), kind, temperature, alpha)


def named(log_p, top_k, kind, temperature=1.0, alpha=0.5):
    """As a cache gives it."""
    values, index = log_p.topk(top_k, dim=1)
    if top_k < log_p.shape[1]:
        values = torch.cat([values, log_p.scatter(1, index, -math.inf).logsumexp(1, keepdim=True)], 1)
    return Distillation(lambda start, stop: Outcomes(values[start:stop], index[start:stop]), kind, temperature, alpha)


def relative(actual, expected):
    return ((actual.double() - expected.double()).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.5), (2.5, 0.25), (0.5, 1.0)])
@pytest.mark.parametrize("chunk_tokens", [1, 5, None])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6), (torch.bfloat16, 2e-2)]
)
def test_the_chunked_objective_equals_the_plain_one(kind, temperature, alpha, chunk_tokens, dtype, tolerance):
    hidden, weight, labels, log_p = make_inputs(dtype)
    found = linear_distillation(
        hidden, weight, labels, whole(log_p, kind, temperature, alpha), chunk_tokens=chunk_tokens
    )
    expected = reference.linear_distillation(hidden, weight, labels, log_p, kind, temperature, alpha)
    for ours, theirs in zip(found, expected):
        assert ours.dtype == theirs.dtype
        assert relative(ours, theirs) < min(tolerance, 1e-5)
    assert found.num_targets == len(log_p)
    grads = torch.autograd.grad(found.objective / 7, (hidden, weight))
    for grad, other in zip(grads, torch.autograd.grad(expected[0] / 7, (hidden, weight)), strict=True):
        assert grad.dtype == dtype
        assert relative(grad, other) < tolerance
    assert not found.hard.requires_grad
    assert not found.soft.requires_grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [1, 4, VOCABULARY])
def test_gradients_by_finite_differences_where_a_tail_is_one_outcome(kind, top_k):
    hidden, weight, labels, log_p = make_inputs()
    given = named(log_p, top_k, kind, temperature=1.7, alpha=0.75)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_distillation(h, w, labels, given, chunk_tokens=5).objective,
        (hidden, weight),
        fast_mode=True,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_more_tokens_are_named_the_nearer_the_whole_divergence(kind):
    """Joining outcomes never adds to a divergence, and all tokens named are all there is."""
    hidden, weight, labels, log_p = make_inputs()
    soft = [
        linear_distillation(hidden, weight, labels, named(log_p, k, kind)).soft
        for k in (1, 3, 10, VOCABULARY - 1, VOCABULARY)
    ]
    assert all(0 < a < b * (1 + 1e-12) for a, b in itertools.pairwise(soft))
    full = linear_distillation(hidden, weight, labels, whole(log_p, kind))
    assert relative(soft[-1], full.soft) < 1e-12
    grads = [
        torch.autograd.grad(linear_distillation(hidden, weight, labels, given).objective, (hidden, weight))
        for given in (named(log_p, VOCABULARY, kind), whole(log_p, kind))
    ]
    for ours, theirs in zip(*grads, strict=True):
        assert relative(ours, theirs) < 1e-12


@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_itself_has_no_divergence_and_no_gradient(kind, top_k):
    hidden, weight, labels, _ = make_inputs()
    log_p = (hidden.detach() @ weight.detach().t() / 2).log_softmax(-1)[labels != -100]
    given = whole(log_p, kind, 2.0, 1.0) if top_k is None else named(log_p, top_k, kind, 2.0, 1.0)
    found = linear_distillation(hidden, weight, labels, given)
    assert found.soft.abs() < 1e-12
    assert all(grad.abs().max() < 1e-12 for grad in torch.autograd.grad(found.objective, (hidden, weight)))


def test_nothing_to_learn_is_zero_and_asks_no_teacher():
    hidden, weight, labels, _ = make_inputs()
    found = linear_distillation(hidden, weight, torch.full_like(labels, -100), whole(None, "forward_kl"))
    assert found.objective == 0
    assert found.num_targets == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(found.objective, (hidden, weight)))


def test_impossible_tokens_are_finite():
    log_p = torch.tensor([[0.0, -math.inf, -math.inf]])
    log_q = torch.tensor([[1.0, 2.0, 0.0]]).log_softmax(-1)
    for kind in KINDS:
        value, grad = divergence(log_p, log_q, kind)
        assert value.isfinite().all()
        assert grad.isfinite().all()
    assert divergence(log_p, log_q, "jensen_shannon")[0] <= math.log(2)


def test_few_logits_are_held_at_once():
    """The most that is asked of a teacher at a time follows from the vocabulary, not from the tokens."""
    asked = []

    def outcomes(start, stop):
        asked.append(stop - start)
        return Outcomes(torch.full((stop - start, 2**18), -math.log(2**18)))

    hidden, weight = torch.zeros(50, 1), torch.zeros(2**18, 1)
    linear_distillation(
        hidden, weight, torch.zeros(50, dtype=torch.long), Distillation(outcomes, "forward_kl", 1.0, 0.5)
    )
    assert asked == [16, 16, 16, 2]
