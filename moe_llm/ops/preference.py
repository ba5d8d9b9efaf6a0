"""Losses of pairs of answers, from the log-probabilities of their tokens.

Dimensions: B blocks, S sequence length, D documents of a block (S at most), P pairs of all blocks. In a block the documents
2k and 2k + 1 are the chosen and the rejected answer of one pair, each behind its prompt.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Preference:
    """What a batch of pairs is compared with, and how.

    loss, beta, gamma, label_smoothing: as in the configuration. reference_BS: fp32, at each document's first place the
    reference's log-probability of its answer; zeros where the loss needs none.
    """

    loss: str
    beta: float
    gamma: float
    label_smoothing: float
    reference_BS: Tensor


class PreferenceSums(NamedTuple):
    """objective: the pairs' losses, summed, with gradient. pairs: how many. measured: without gradient, sums over the pairs of
    loss, whether the chosen answer is ahead, margin, and log-probabilities of the chosen and the rejected answer. chosen:
    cross-entropy and tokens of the chosen answers. logp_BD: log-probability of each document's answer."""

    objective: Tensor
    pairs: Tensor
    measured: Tensor
    chosen: Tensor
    logp_BD: Tensor


MEASURED = ("preference_loss", "accuracy", "margin", "chosen_logp", "rejected_logp")


def preference_sums(nll_BS: Tensor, targets_BS: Tensor, document_BS: Tensor, preference: Preference) -> PreferenceSums:
    """Sums over the pairs of a batch.

    Args:
        nll_BS: -log p of each target in nats, with gradient; 0 where there is none.
        targets_BS: bool. document_BS: int64, -1 on padding.
    """
    blocks, length = nll_BS.shape
    width = length + length % 2
    index_BS = document_BS.clamp(min=0)

    def by_document(values_BS: Tensor) -> Tensor:
        return values_BS.new_zeros(blocks, width).scatter_add(1, index_BS, values_BS)

    logp_BD, count_BD = -by_document(nll_BS), by_document(targets_BS.to(nll_BS.dtype))
    reference_BD = by_document(preference.reference_BS.to(nll_BS.dtype))
    logp_P2, reference_P2, count_P2 = (t.view(-1, 2) for t in (logp_BD, reference_BD, count_BD))
    there_P = (count_P2 > 0).all(1)
    loss_P, margin_P = losses_of_pairs(logp_P2, reference_P2, count_P2.clamp(min=1), preference)
    objective = loss_P.masked_fill(~there_P, 0).sum()
    measured_P5 = torch.stack([loss_P, (margin_P > 0).to(loss_P), margin_P, *logp_P2.unbind(1)], 1).detach()
    chosen_P = there_P.to(loss_P)
    return PreferenceSums(
        objective,
        there_P.sum(),
        measured_P5.masked_fill(~there_P[:, None], 0).sum(0),
        torch.stack([-(logp_P2[:, 0].detach() * chosen_P).sum(), (count_P2[:, 0] * chosen_P).sum()]),
        logp_BD.detach(),
    )


def losses_of_pairs(
    logp_P2: Tensor, reference_P2: Tensor, tokens_P2: Tensor, preference: Preference
) -> tuple[Tensor, Tensor]:
    """(loss, margin) of each pair; the margin is what the loss would have larger, and is positive where the chosen answer is
    ahead.

    Args:
        logp_P2, reference_P2: log-probabilities of the chosen and the rejected answer, summed over its tokens.
        tokens_P2: how many these are.
    """
    beta, mean_P2 = preference.beta, logp_P2 / tokens_P2
    if preference.loss == "orpo":  # equations 6 and 7 of Hong et al. 2024; their likelihood is the mean over tokens
        odds_P2 = mean_P2 - torch.log1p(-mean_P2.exp().clamp(max=1 - torch.finfo(mean_P2.dtype).eps))
        ahead_P = odds_P2[:, 0] - odds_P2[:, 1]
        return -mean_P2[:, 0] - beta * F.logsigmoid(ahead_P), ahead_P
    if preference.loss == "simpo":  # equation 6 of Meng et al. 2024
        margin_P = beta * (mean_P2[:, 0] - mean_P2[:, 1]) - preference.gamma
        return _logistic(margin_P, preference), margin_P
    score_P2 = logp_P2 - reference_P2
    if preference.loss == "dpo":  # equation 7 of Rafailov et al. 2023
        margin_P = beta * (score_P2[:, 0] - score_P2[:, 1])
        return _logistic(margin_P, preference), margin_P
    score_P2 = score_P2 / tokens_P2
    ahead_P = score_P2[:, 0] - score_P2[:, 1]
    if preference.loss == "dpo_norm":
        return _logistic(beta * ahead_P, preference), beta * ahead_P
    assert preference.loss == "ipo", preference.loss
    return (ahead_P - 1 / (2 * beta)).square(), beta * ahead_P  # equation 17 of Azar et al. 2024


def _logistic(margin_P: Tensor, preference: Preference) -> Tensor:
    smoothing = preference.label_smoothing
    return -(1 - smoothing) * F.logsigmoid(margin_P) - smoothing * F.logsigmoid(-margin_P)
