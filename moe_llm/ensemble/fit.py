"""Weights, lambda and thresholds from text. Every member reads the text once; what is fitted then are a few numbers.

Shapes: N positions, U models, V vocabulary, K numbers that are fitted.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_llm.ensemble.context import fit_gate
from moe_llm.ensemble.ensemble import Ensemble, expert_directions
from moe_llm.ensemble.recipe import (
    CascadeRecipe,
    ContextualRecipe,
    ExpertsRecipe,
    FittedRecipe,
    LinearRecipe,
    LogLinearRecipe,
    McDropoutRecipe,
)
from moe_llm.ensemble.rules import LinearMixture, LogLinear, confidence
from moe_llm.ensemble.scores import Scored, load_text, score
from moe_llm.errors import UserError

CACHE_BYTES = 1 << 30  # of distributions kept for a log-linear fit; beyond it, positions are thinned out evenly
_CHUNK_BYTES = 32 << 20
_LEAST = -1e4  # as in a rule
_ROUNDING = 1e-7  # nats per token: what the distributions' fp32 can hide
_FIRST_STEPS = 8
_SHORT = (
    "the fit ended about %.1e nats per token from the optimum, where %.0e is wanted: give more text or other members"
)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fitted:
    """A recipe with its numbers. tokens: that they were fitted on. loss: on those, nats per token; before: that of the
    numbers that the recipe had, where it had any; of weights by context, that of the best constant ones. alone: each member's. asked: a cascade's share for the large one. excluded:
    tokens that no member gives a probability, which were left out."""

    recipe: FittedRecipe
    tokens: int
    loss: float | None = None
    before: float | None = None
    alone: tuple[float, ...] = ()
    asked: float | None = None
    excluded: int = 0


def fit(ensemble: Ensemble, data: list[str], *, max_blocks: int | None = None, batch_size: int = 8) -> Fitted:
    """Fit what an ensemble's recipe leaves to text, and weights that it gives, too; the ensemble then uses them.

    Raises:
        UserError: no text, or a cascade with a threshold instead of a budget.
    """
    recipe = ensemble.recipe
    check_fittable(recipe)
    text = load_text(ensemble, data, max_blocks)
    if isinstance(recipe, CascadeRecipe):
        confidences = [confidence(s.log_probs[0]) for s in score(ensemble, text, batch_size, wanted=[0])]
        fitted = fit_threshold(recipe, torch.cat(confidences))
    elif isinstance(recipe, ContextualRecipe):
        fitted = _fit_contextual(recipe, score(ensemble, text, batch_size))
    elif isinstance(recipe, LinearRecipe):
        fitted = _fit_linear(ensemble, recipe, score(ensemble, text, batch_size))
    else:
        assert isinstance(recipe, (LogLinearRecipe, ExpertsRecipe)), "others leave nothing to fit"
        fitted = _fit_log_linear(ensemble, recipe, score(ensemble, text, batch_size), text.num_targets)
    ensemble.use(fitted.recipe)
    return fitted


def check_fittable(recipe: FittedRecipe) -> None:
    """Refuse a cascade whose threshold is given, and what has no numbers.

    Raises:
        UserError: so it is.
    """
    if isinstance(recipe, McDropoutRecipe):
        raise UserError("method=mc_dropout has nothing to fit: use it as it is")
    if isinstance(recipe, CascadeRecipe) and recipe.budget is None:
        raise UserError(f"threshold={recipe.threshold} leaves nothing to fit: give a budget in its place")


def fit_threshold(recipe: CascadeRecipe, confidence_N: Tensor) -> Fitted:
    """The highest threshold that leaves the large model no more than its budget."""
    assert recipe.budget is not None, "`check_fittable` has looked"
    threshold = threshold_for(recipe.budget, confidence_N)
    asked = float((confidence_N < threshold).double().mean())
    return Fitted(recipe.with_threshold(threshold), len(confidence_N), asked=asked)


def threshold_for(budget: float, confidence_N: Tensor) -> float:
    """The highest threshold below which at most a share `budget` of the confidences lies; 0 for none, 1 for all."""
    sorted_N = confidence_N.double().sort().values
    count = int(budget * len(sorted_N) + 1e-9)
    return 0.0 if budget == 0 else 1.0 if count == len(sorted_N) else float(sorted_N[count])


def mixture_weights(
    log_probs_NU: Tensor, tolerance: float = 1e-7, max_iterations: int = 10_000
) -> tuple[Tensor, list[float]]:
    """Weights of the mixture that gives the targets the highest likelihood.

    A few steps of expectation maximisation, and then projected Newton steps on `sum(w) - mean log(p @ w)`, w >= 0, whose
    optimum sums to 1 (Bertsekas 1982; Kim et al. 2020, "mixsqp"); where one gains nothing, another of the former, which
    always does: by themselves they need thousands where members are alike. The likelihood is
    concave, so that it lies below its tangents: with g_u the mean of p_u / mixture, the best one is at most max g - 1
    nats per token above the present one, which ends the iteration.

    Args:
        log_probs_NU: of each target, by each model. Targets that all of them exclude say nothing and are left out.
        tolerance: nats per token from the optimum; where it is not reached, that is reported.

    Returns:
        (U,) weights that sum to 1, and the mean log-likelihood before each step, which never falls.

    Raises:
        UserError: every model excludes every target.
    """
    log_probs_NU = log_probs_NU.double()[said_by_any(log_probs_NU)]
    if not len(log_probs_NU):
        raise UserError("every member excludes every token of the text: give other members or another text")
    top_N = log_probs_NU.amax(1)
    p_NU = (log_probs_NU - top_N[:, None]).exp()
    weights_U = p_NU.new_full(p_NU.shape[1:], 1 / p_NU.shape[1])
    mixed_N = p_NU @ weights_U
    likelihoods = [float((mixed_N.log() + top_N).mean())]
    for iteration in range(max_iterations):
        ratio_NU = p_NU / mixed_N[:, None]
        gain_U = ratio_NU.mean(0)
        gap = float(gain_U.max()) - 1
        if gap <= tolerance:
            return weights_U, likelihoods
        newton_U = _newton_step(weights_U, 1 - gain_U, ratio_NU.T @ ratio_NU / len(ratio_NU))
        for length in (1.0, 0.5, 0.25, 0.125, None) if iteration >= _FIRST_STEPS else (None,):
            tried_U = weights_U * gain_U if length is None else (weights_U + length * newton_U).clamp(min=0)
            tried_U = tried_U / tried_U.sum()
            mixed_N = p_NU @ tried_U
            likelihood = float((mixed_N.log() + top_N).mean())  # -inf or NaN where a target's last weight went
            if likelihood > likelihoods[-1]:
                break
        else:  # rounding hides what is left to gain
            likelihood = max(likelihoods[-1], likelihood)
        weights_U = tried_U
        likelihoods.append(likelihood)
    logger.warning(_SHORT, gap, tolerance)
    return weights_U, likelihoods


def said_by_any(log_probs_NU: Tensor) -> Tensor:
    """(N,) bool: the targets to which some model gives a probability."""
    return (log_probs_NU > -torch.inf).any(1)


def _newton_step(weights_U: Tensor, gradient_U: Tensor, hessian_UU: Tensor) -> Tensor:
    """Of those weights that are not held at 0 by the bound."""
    free = (weights_U > 1e-12) | (gradient_U < 0)
    step_U = -weights_U * ~free
    inverse = torch.linalg.pinv(hessian_UU[free][:, free], hermitian=True, rtol=1e-12)
    step_U[free] = -inverse @ gradient_U[free]
    return step_U


def log_linear_weights(
    kept: Sequence[Scored], base_U: Tensor, directions_KU: Tensor, tolerance: float = 1e-9, max_iterations: int = 50
) -> tuple[Tensor, list[float]]:
    """theta (K,) of the weights base + theta @ directions that give the targets the lowest loss, by Newton's method.

    The loss, mean of log sum_v exp(sum_u w_u l_u(v)) - sum_u w_u l_u(target), is convex in w. Its gradient is the
    expectation of the l_u under the ensemble less that under the text, its Hessian their covariance.

    Args:
        tolerance: half of Newton's decrement, nats per token.

    Returns:
        theta, and the loss at each step, which never rises; where the tolerance is not reached, that is reported.
    """
    theta_K = torch.zeros(len(directions_KU), dtype=torch.float64)
    loss, gradient_K, hessian_KK = _objective(kept, base_U, directions_KU)
    losses = [loss]
    for _ in range(max_iterations):
        # members that say the same leave a direction in which nothing changes: no step is taken along it
        step_K = torch.linalg.pinv(hessian_KK, hermitian=True, rtol=1e-9) @ gradient_K
        decrement = float(gradient_K @ step_K)
        if decrement / 2 <= tolerance:
            break
        length = 1.0
        while True:
            tried_K = theta_K - length * step_K
            found = _objective(kept, base_U + tried_K @ directions_KU, directions_KU)
            if found[0] <= loss - 1e-4 * length * decrement:
                break
            length /= 2
            if length < 1e-6:  # rounding hides what is left to gain
                if decrement / 2 > _ROUNDING:
                    logger.warning(_SHORT, decrement / 2, tolerance)
                return theta_K, losses
        theta_K, (loss, gradient_K, hessian_KK) = tried_K, found
        losses.append(loss)
    else:
        logger.warning(_SHORT, decrement / 2, tolerance)
    return theta_K, losses


def _objective(kept: Sequence[Scored], weights_U: Tensor, directions_KU: Tensor) -> tuple[float, Tensor, Tensor]:
    """Mean loss, its gradient (K,) and Hessian (K, K) along the directions."""
    K, count = len(directions_KU), 0
    loss = torch.zeros((), dtype=torch.float64)
    gradient_K, hessian_KK = torch.zeros(K, dtype=torch.float64), torch.zeros(K, K, dtype=torch.float64)
    for targets_N, parts in _chunks(kept):
        total_NV = sum(weight * part for weight, part in zip(weights_U.tolist(), parts) if weight)
        log_p_NV = torch.as_tensor(total_NV + torch.zeros_like(parts[0])).log_softmax(-1)
        p_NV, at = log_p_NV.exp(), targets_N[:, None]
        loss -= log_p_NV.gather(1, at).double().sum().cpu()
        along = [sum(a * part for a, part in zip(row, parts) if a) + torch.zeros_like(p_NV)
                 for row in directions_KU.tolist()]  # fmt: skip
        mean_KN = torch.stack([(p_NV * d).sum(-1) for d in along]).double()
        gradient_K += (mean_KN - torch.stack([d.gather(1, at)[:, 0] for d in along])).sum(1).cpu()
        centred = [d - m[:, None].to(d.dtype) for d, m in zip(along, mean_KN)]
        for k in range(K):
            for other in range(k, K):
                hessian_KK[k, other] += float((p_NV * centred[k] * centred[other]).sum(-1).double().sum())
        count += len(targets_N)
    hessian_KK = hessian_KK.triu() + hessian_KK.triu(1).T
    return float(loss) / count, gradient_K / count, hessian_KK / count


def _chunks(kept: Sequence[Scored]) -> Iterable[tuple[Tensor, list[Tensor]]]:
    for scored in kept:
        rows = max(1, _CHUNK_BYTES // (4 * scored.log_probs[0].shape[1]))
        for start in range(0, len(scored.targets_N), rows):
            part = slice(start, start + rows)
            yield scored.targets_N[part], [log_probs_NV[part] for log_probs_NV in scored.log_probs]


def _fit_linear(ensemble: Ensemble, recipe: LinearRecipe, scores: Iterable[Scored]) -> Fitted:
    log_probs_NU = torch.cat(
        [
            torch.stack([part.gather(1, s.targets_N[:, None])[:, 0] for part in s.log_probs], 1).double().cpu()
            for s in scores
        ]
    )
    weights_U, likelihoods = mixture_weights(log_probs_NU)
    said = said_by_any(log_probs_NU)
    excluded = int((~said).sum())
    log_probs_NU = log_probs_NU[said]
    before = None if recipe.to_fit else _mixture_loss(log_probs_NU, _weights(ensemble))
    alone_U = -log_probs_NU.mean(0)
    return Fitted(
        recipe.with_shares(_divided(weights_U, ensemble.index)), len(log_probs_NU), -likelihoods[-1], before,
        tuple(alone_U[ensemble.index].tolist()), excluded=excluded,
    )  # fmt: skip


def _fit_contextual(recipe: ContextualRecipe, scores: Iterable[Scored]) -> Fitted:
    parts, contexts = [], []
    for scored in scores:
        at = scored.targets_N[:, None]
        parts.append(torch.stack([part.gather(1, at)[:, 0] for part in scored.log_probs], 1).double().cpu())
        assert scored.context_NF is not None, "weights by context have features"
        contexts.append(scored.context_NF.cpu())
    log_probs_NU, context_NF = torch.cat(parts), torch.cat(contexts)
    said = said_by_any(log_probs_NU)
    log_probs_NU, context_NF = log_probs_NU[said], context_NF[said]
    weights_U, likelihoods = mixture_weights(log_probs_NU)
    gate, loss = fit_gate(log_probs_NU, context_NF, weights_U, recipe.penalty)
    return Fitted(
        recipe.with_gate(gate), len(log_probs_NU), loss, -likelihoods[-1], tuple((-log_probs_NU.mean(0)).tolist()),
        excluded=int((~said).sum()),
    )  # fmt: skip


def _weights(ensemble: Ensemble) -> Sequence[float]:
    assert isinstance(ensemble.rule, (LinearMixture, LogLinear)), "others have no weights"
    return ensemble.rule.weights


def _mixture_loss(log_probs_NU: Tensor, weights: Sequence[float]) -> float:
    return -float((log_probs_NU + torch.tensor(weights, dtype=torch.float64).log()).logsumexp(1).mean())


def _fit_log_linear(
    ensemble: Ensemble,
    recipe: LogLinearRecipe | ExpertsRecipe,
    scores: Iterable[Scored],
    targets: int,
) -> Fitted:
    U = len(ensemble.models)
    kept = _thinned(scores, targets, CACHE_BYTES // (4 * U * ensemble.main.width))
    units_UU = torch.eye(U, dtype=torch.float64)
    if isinstance(recipe, ExpertsRecipe):
        base_U, direction_U = expert_directions(recipe, ensemble.index, U)
        directions_KU = direction_U[None]
    else:
        base_U, directions_KU = torch.zeros(U, dtype=torch.float64), units_UU
    theta_K, losses = log_linear_weights(kept, base_U, directions_KU)
    before = None
    if not recipe.to_fit:
        before = _objective(kept, torch.tensor(_weights(ensemble), dtype=torch.float64), units_UU)[0]
    alone = [_objective(kept, unit_U, units_UU[:1])[0] for unit_U in units_UU]
    fitted: FittedRecipe
    if isinstance(recipe, ExpertsRecipe):
        fitted = recipe.with_strength(float(theta_K[0]))
    else:
        fitted = recipe.with_shares(_divided(theta_K, ensemble.index))
    tokens = sum(len(s.targets_N) for s in kept)
    return Fitted(fitted, tokens, losses[-1], before, tuple(alone[u] for u in ensemble.index))


def _thinned(scores: Iterable[Scored], targets: int, most: int) -> list[Scored]:
    """Distributions in memory: every n-th position where all would be too many."""
    every, offset, kept = max(1, -(-targets // max(1, most))), 0, []
    for scored in scores:
        part = slice(-offset % every, None, every)
        offset += len(scored.targets_N)
        if len(scored.targets_N[part]):
            parts = [log_probs_NV[part].clamp(min=_LEAST) for log_probs_NV in scored.log_probs]
            kept.append(Scored(scored.targets_N[part], parts))
    return kept


def _divided(weights_U: Tensor, index: list[int]) -> list[float]:
    """A model's weight, shared evenly by its members."""
    return [float(weights_U[u]) / index.count(u) for u in index]
