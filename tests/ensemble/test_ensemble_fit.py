"""Rules against formulas written out, and fits against optima that are known."""

import math
from itertools import pairwise

import pytest
import torch

from moe_llm.ensemble.fit import _thinned, log_linear_weights, mixture_weights, threshold_for
from moe_llm.ensemble.rules import Cascade, LinearMixture, LogLinear
from moe_llm.ensemble.scores import Scored
from moe_llm.errors import UserError


def random_log_probs(positions: int, vocabulary: int, seed: int, scale: float = 1.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(positions, vocabulary, generator=generator)).log_softmax(-1)


def drawn_from(log_probs_NV: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return torch.multinomial(log_probs_NV.exp(), 1, generator=torch.Generator().manual_seed(seed))[:, 0]


def test_rules_are_their_formulas():
    p, q = random_log_probs(5, 7, 0), random_log_probs(5, 7, 1)
    close = torch.testing.assert_close
    close(LinearMixture((0.3, 0.7))([p, q]).exp(), 0.3 * p.exp() + 0.7 * q.exp())
    assert torch.equal(LinearMixture((1.0, 0.0))([p, None]), p)
    product = p.exp() ** 1.5 * q.exp() ** -0.5
    close(LogLinear((1.5, -0.5))([p, q]).exp(), product / product.sum(-1, keepdim=True))
    top = p.exp().amax(-1)
    mixed = Cascade(float(top.median()))([p, q])
    for n in range(5):
        assert torch.equal(mixed[n], q[n] if top[n] < top.median() else p[n])


def test_a_token_that_a_member_excludes_gives_numbers():
    p, q = random_log_probs(2, 4, 0), random_log_probs(2, 4, 1)
    q[:, 1] = -torch.inf
    for weights in ((0.5, 0.5), (1.0, -1.0), (1.0, 0.0)):
        assert LogLinear(weights)([p, q]).isfinite().all()
    assert (LogLinear((1.0, 1.0))([p, q])[:, 1] < -1000).all()
    torch.testing.assert_close(LinearMixture((0.5, 0.5))([p, q])[:, 1], p[:, 1] + math.log(0.5))


def test_em_finds_the_planted_mixture_and_its_likelihood_never_falls():
    members = [random_log_probs(20_000, 12, seed) for seed in range(3)]
    planted = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    mixture = sum(w * m.double().exp() for w, m in zip(planted, members))
    targets = drawn_from(mixture.log().float())
    log_probs = torch.stack([m.gather(1, targets[:, None])[:, 0] for m in members], 1)
    weights, likelihoods = mixture_weights(log_probs)
    assert all(after >= before - 1e-12 for before, after in pairwise(likelihoods))
    assert len(likelihoods) > 5
    torch.testing.assert_close(weights, planted, atol=0.02, rtol=0)
    assert float(weights.sum()) == pytest.approx(1)
    p = log_probs.double().exp()
    gain = (p / (p @ weights)[:, None]).mean(0)  # of a step towards each member: nothing is to be gained any more
    assert float(gain.max()) <= 1 + 1e-6
    assert likelihoods[-1] > float(log_probs.double().mean(0).max())


def test_em_gives_a_useless_member_nothing_and_stands_extremes():
    log_probs = torch.tensor([[-1.0, -900.0], [-2.0, -1500.0]])
    weights, likelihoods = mixture_weights(log_probs)
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.0], dtype=torch.float64), atol=1e-6, rtol=0)
    assert likelihoods[-1] == pytest.approx(-1.5, abs=1e-6)


def gap_of(log_probs: torch.Tensor, weights: torch.Tensor) -> float:
    """Nats a token that the likelihood is below the best one, at most."""
    p = (log_probs.double() - log_probs.double().amax(1, keepdim=True)).exp()
    return float((p / (p @ weights)[:, None]).mean(0).max()) - 1


@pytest.mark.parametrize("difference", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("members", [2, 5])
def test_weights_of_members_that_are_nearly_alike_are_within_the_tolerance(members, difference, caplog):
    """Expectation maximisation alone has not converged after 10,000 steps."""
    generator = torch.Generator().manual_seed(members)
    first = random_log_probs(2000, 30, 0)
    others = [
        (first + difference * torch.randn(first.shape, generator=generator)).log_softmax(-1) for _ in range(members)
    ]
    targets = drawn_from(first)
    log_probs = torch.stack([m.gather(1, targets[:, None])[:, 0] for m in others], 1).double()
    weights, likelihoods = mixture_weights(log_probs)
    assert gap_of(log_probs, weights) <= 1e-7
    assert len(likelihoods) < 60
    assert all(after >= before for before, after in pairwise(likelihoods))
    assert not caplog.records


def test_a_fit_that_ends_short_of_the_optimum_says_so(caplog):
    log_probs = torch.stack([random_log_probs(500, 2, seed)[:, 0] for seed in (0, 1, 2)], 1)
    mixture_weights(log_probs, max_iterations=2)
    assert "nats per token from the optimum" in caplog.text
    caplog.clear()
    kept = kept_scores((1.3, -0.5), positions=200)
    log_linear_weights(kept, torch.zeros(2).double(), torch.eye(2).double(), max_iterations=1)
    assert "nats per token from the optimum" in caplog.text


def test_targets_that_every_member_excludes_change_no_weight():
    log_probs = torch.stack([random_log_probs(500, 2, seed)[:, 0] for seed in (0, 1)], 1)
    excluded = torch.full((3, 2), -torch.inf)
    expected, _ = mixture_weights(log_probs)
    weights, likelihoods = mixture_weights(torch.cat([log_probs, excluded]))
    assert torch.equal(weights, expected)
    assert math.isfinite(likelihoods[-1])
    with pytest.raises(UserError, match="every member excludes"):
        mixture_weights(excluded)


def test_a_target_that_only_one_member_allows_keeps_its_weight_above_zero():
    log_probs = torch.tensor([[-1.0, -0.1]] * 50 + [[-3.0, -torch.inf]])
    weights, likelihoods = mixture_weights(log_probs)
    assert weights[0] > 0
    assert math.isfinite(likelihoods[-1])
    assert gap_of(log_probs, weights) <= 1e-7


def kept_scores(weights: tuple[float, ...], positions: int = 20_000, members: int = 2) -> list[Scored]:
    parts = [random_log_probs(positions, 12, seed) for seed in range(members)]
    targets = drawn_from(LogLinear(weights)(parts))
    half = positions // 2
    return [Scored(targets[s], [part[s] for part in parts]) for s in (slice(0, half), slice(half, None))]


def test_the_product_finds_the_planted_weights_negative_ones_too():
    kept = kept_scores((1.3, -0.5))
    theta, losses = log_linear_weights(kept, torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64))
    assert losses == sorted(losses, reverse=True)
    torch.testing.assert_close(theta, torch.tensor([1.3, -0.5], dtype=torch.float64), atol=0.04, rtol=0)
    loss_at = lambda w: -sum(  # noqa: E731
        float(LogLinear(tuple(w))(s.log_probs).gather(1, s.targets_N[:, None]).double().sum()) for s in kept
    ) / 20_000  # fmt: skip
    assert losses[-1] == pytest.approx(loss_at(theta.tolist()), abs=1e-5)
    for k in range(2):  # an optimum: no small step in any direction helps
        for step in (-0.02, 0.02):
            moved = theta.clone()
            moved[k] += step
            assert loss_at(moved.tolist()) > losses[-1]


def test_one_direction_is_fitted_along_a_base():
    kept = kept_scores((1.0, 0.7, -0.7), members=3)
    base, direction = torch.tensor([1.0, 0.0, 0.0]).double(), torch.tensor([[0.0, 1.0, -1.0]]).double()
    theta, _ = log_linear_weights(kept, base, direction)
    assert float(theta[0]) == pytest.approx(0.7, abs=0.04)


def test_members_that_say_the_same_share_the_weight():
    [first, second] = kept_scores((1.0, 0.0))
    twins = [Scored(s.targets_N, [s.log_probs[0], s.log_probs[0].clone()]) for s in (first, second)]
    theta, _ = log_linear_weights(twins, torch.zeros(2).double(), torch.eye(2).double())
    torch.testing.assert_close(theta.sum(), torch.tensor(1.0).double(), atol=0.04, rtol=0)
    assert float(theta[0]) == pytest.approx(float(theta[1]), abs=1e-6)


@pytest.mark.parametrize("budget", [0.0, 0.1, 0.25, 0.5, 1.0])
def test_a_threshold_keeps_within_its_budget(budget):
    confidence = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    asked = float((confidence.double() < threshold_for(budget, confidence)).double().mean())
    assert asked == pytest.approx(budget, abs=1e-9)


def test_equal_confidences_are_never_split_above_the_budget():
    confidence = torch.tensor([0.5, 0.5, 0.5, 0.9])
    assert float((confidence < threshold_for(0.5, confidence)).double().mean()) == 0
    assert float((confidence < threshold_for(0.75, confidence)).double().mean()) == 0.75


def test_positions_are_thinned_evenly_over_all_parts():
    parts = [torch.arange(0, 5), torch.arange(5, 6), torch.arange(6, 17)]
    scores = [Scored(part, [part[:, None].float()]) for part in parts]
    kept = _thinned(scores, 17, 6)
    assert torch.cat([s.targets_N for s in kept]).tolist() == [0, 3, 6, 9, 12, 15]
    assert torch.cat([s.log_probs[0][:, 0] for s in kept]).tolist() == [0, 3, 6, 9, 12, 15]
    assert len(torch.cat([s.targets_N for s in _thinned(scores, 17, 17)])) == 17
