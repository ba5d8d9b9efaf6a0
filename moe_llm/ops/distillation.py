"""Divergence of a linear head's distribution from a teacher's, mixed with the cross-entropy at the labels, without ever
holding all logits of either.

Dimensions: T tokens (N: those with a label, C: of one chunk), D hidden, V vocabulary, J outcomes that are compared,
K tokens that a teacher names.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_llm.ops.products import mm

Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon"]

# a chunk has half a dozen arrays of that size, in fp32 at least
_CHUNK_ELEMENTS = 4 * 2**20


class Outcomes(NamedTuple):
    """A teacher's distribution for some tokens, already at the temperature.

    log_p_CJ: log-probabilities of the outcomes, each row's summing to 1. index_CK: which token each outcome is, int64,
    and J = K, or J = K + 1 where the last outcome is "any other token"; None: outcome j is token j, and J = V.
    """

    log_p_CJ: Tensor
    index_CK: Tensor | None = None


@dataclass(frozen=True)
class Distillation:
    """What a batch is to be compared with, and how.

    outcomes: `outcomes(start, stop)` gives the teacher's distribution for these of the N labelled positions, counted in
        the order of the flattened batch. temperature: of both distributions. alpha: share of the divergence in the
        objective, (1 - alpha) * cross-entropy + alpha * temperature^2 * divergence, where the square keeps the
        gradient's size as the temperature changes (Hinton et al. 2015, section 2).
    """

    outcomes: Callable[[int, int], Outcomes]
    divergence: Divergence
    temperature: float
    alpha: float


class DistillationSums(NamedTuple):
    """Sums over the labelled positions, scalars in nats: `objective` with gradient; `hard`, the cross-entropy at the
    labels, and `soft`, temperature^2 * divergence, without. num_targets: how many positions, int64."""

    objective: Tensor
    hard: Tensor
    soft: Tensor
    num_targets: Tensor


def linear_distillation(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    distillation: Distillation,
    *,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
    accumulate_dtype: torch.dtype = torch.float32,
) -> DistillationSums:
    """The objective for softmax(hidden @ weight^T), chunk by chunk as `linear_cross_entropy` goes: logits, both losses
    in fp32, their common gradient, which is multiplied out at once. The backward pass only scales.

    Args:
        hidden_TD, weight_VD: of one dtype; logits are rounded to it.
        labels_T: int64 in [0, V) or ignore_index; ignored rows are neither computed nor asked of the teacher.
        chunk_tokens: None: as many as make 4 Mi logits.
        accumulate_dtype: in which the weight's gradient is summed over chunks.
    """
    if not torch.is_grad_enabled():
        hidden_TD, weight_VD = hidden_TD.detach(), weight_VD.detach()
    targets = labels_T != ignore_index
    hidden_ND, labels_N = hidden_TD[targets], labels_T[targets]
    chunk = chunk_tokens or max(1, _CHUNK_ELEMENTS // len(weight_VD))
    accumulate = torch.promote_types(accumulate_dtype, weight_VD.dtype)
    objective, hard, soft = _LinearDistillation.apply(hidden_ND, weight_VD, labels_N, distillation, chunk, accumulate)
    return DistillationSums(objective, hard, soft, targets.sum())


class _LinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, labels_N, distillation, chunk, accumulate_dtype):
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        sums = torch.zeros(2, dtype=wide, device=hidden_ND.device)
        grad_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=accumulate_dtype) if needs_weight else None
        for start in range(0, len(hidden_ND), chunk):
            stop = min(start + chunk, len(hidden_ND))
            hidden_CD = hidden_ND[start:stop]
            logits_CV = mm(hidden_CD, weight_VD.t()).to(wide)
            outcomes = distillation.outcomes(start, stop)
            hard, soft, grad_CV = losses_and_gradient(logits_CV, labels_N[start:stop], outcomes, distillation)
            sums += torch.stack([hard, soft])
            grad_CV = grad_CV.to(hidden_ND.dtype)
            if needs_hidden:
                grad_hidden[start:stop] = mm(grad_CV, weight_VD)
            if needs_weight:
                grad_weight += mm(grad_CV.t(), hidden_CD)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_VD.dtype
        hard, soft = sums[0].clone(), sums[1].clone()
        objective = (1 - distillation.alpha) * hard + distillation.alpha * soft
        ctx.mark_non_differentiable(hard, soft)
        return objective, hard, soft

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


def losses_and_gradient(
    logits_CV: Tensor, labels_C: Tensor, outcomes: Outcomes, distillation: Distillation
) -> tuple[Tensor, Tensor, Tensor]:
    """(cross-entropy, temperature^2 * divergence, gradient of the objective by the logits), the first two summed."""
    alpha, temperature = distillation.alpha, distillation.temperature
    label_C1 = labels_C[:, None]
    log_q_CV = logits_CV.log_softmax(1)
    hard = -log_q_CV.gather(1, label_C1).sum()
    grad_CV = log_q_CV.exp()
    grad_CV.scatter_add_(1, label_C1, grad_CV.new_full((1, 1), -1).expand_as(label_C1))
    if temperature != 1:
        log_q_CV = (logits_CV / temperature).log_softmax(1)
    soft_C, soft_grad_CV = _soft(log_q_CV, outcomes, distillation.divergence)
    # d/dz of T^2 D(softmax(z / T)) is T times the gradient by z / T
    grad_CV = grad_CV.mul_(1 - alpha).add_(soft_grad_CV, alpha=alpha * temperature)
    return hard, temperature**2 * soft_C.sum(), grad_CV


def _soft(log_q_CV: Tensor, outcomes: Outcomes, kind: Divergence) -> tuple[Tensor, Tensor]:
    """The divergence of each row, and its gradient by the logits of q."""
    log_p_CJ, index_CK = outcomes
    log_p_CJ = log_p_CJ.to(log_q_CV)
    if index_CK is None:
        return divergence(log_p_CJ, log_q_CV, kind)
    named_CK = log_q_CV.gather(1, index_CK)
    if log_p_CJ.shape[1] == index_CK.shape[1]:
        soft_C, grad_CK = divergence(log_p_CJ, named_CK, kind)
        return soft_C, torch.zeros_like(log_q_CV).scatter_(1, index_CK, grad_CK)
    others_CV = log_q_CV.scatter(1, index_CK, -math.inf)
    rest_C1 = others_CV.logsumexp(1, keepdim=True)
    soft_C, grad_CJ = divergence(log_p_CJ, torch.cat([named_CK, rest_C1], 1), kind)
    # the rest's share of the gradient falls on its tokens by their probabilities
    grad_CV = (others_CV - rest_C1).exp_().mul_(grad_CJ[:, -1:])
    return soft_C, grad_CV.scatter_(1, index_CK, grad_CJ[:, :-1])


def divergence(log_p_CJ: Tensor, log_q_CJ: Tensor, kind: Divergence) -> tuple[Tensor, Tensor]:
    """A divergence of q from p in nats, (C,), and its gradient by the logits of which q is the softmax, (C, J).

    forward_kl: KL(p || q). reverse_kl: KL(q || p), for which p is at least the smallest normal number.
    jensen_shannon: mean of KL(p || m) and KL(q || m) with m = (p + q) / 2, at most ln 2.
    """
    q_CJ = log_q_CJ.exp()
    if kind == "forward_kl":
        return _kl(log_p_CJ, log_q_CJ), q_CJ - log_p_CJ.exp()
    if kind == "reverse_kl":
        least = math.log(torch.finfo(log_p_CJ.dtype).tiny)
        ratio_CJ = log_q_CJ - log_p_CJ.clamp(min=least)
        value_C = (q_CJ * ratio_CJ).sum(1)
        return value_C, q_CJ * (ratio_CJ - value_C[:, None])
    log_m_CJ = torch.logaddexp(log_p_CJ, log_q_CJ) - math.log(2)
    ratio_CJ = log_q_CJ - log_m_CJ
    from_q_C = (q_CJ * ratio_CJ).sum(1)
    return 0.5 * (_kl(log_p_CJ, log_m_CJ) + from_q_C), 0.5 * q_CJ * (ratio_CJ - from_q_C[:, None])


def _kl(log_p_CJ: Tensor, log_q_CJ: Tensor) -> Tensor:
    """KL(p || q) of each row; an outcome that p does not have adds nothing."""
    terms_CJ = log_p_CJ.exp() * (log_p_CJ - log_q_CJ)
    return terms_CJ.masked_fill_(log_p_CJ.isneginf(), 0.0).sum(1)
