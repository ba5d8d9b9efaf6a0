"""The one record that every router returns and dispatch, experts and combine understand.

Dimensions: T tokens, E experts, K experts per token, N routed rows (T*K for token choice), L layers.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class RoutingStatistics(NamedTuple):
    """Sums over the real (not padding) tokens, so that they add up over ranks and micro-batches.

    One layer's have the shapes below; `stack` gives them a leading L.
    """

    tokens_per_expert_E: Tensor  # fp32 counts, no gradient
    probability_sum_E: Tensor  # sum of the router's probabilities, fp32, with gradient
    z_sum: Tensor  # sum of logsumexp(logits)^2, scalar fp32, with gradient
    entropy_sum: Tensor  # sum of the router's entropy in nats, scalar fp32, no gradient
    num_tokens: Tensor  # real tokens, scalar fp32

    @staticmethod
    def stack(layers: "list[RoutingStatistics]") -> "RoutingStatistics":
        return RoutingStatistics(*(torch.stack(parts) for parts in zip(*layers)))


class Routing(NamedTuple):
    """Which token goes to which expert, as flat rows sorted by expert.

    slot_TK holds the rows of each token where every token has exactly K of them (then combining is a
    gather); it is None where their number varies.
    """

    token_index_N: Tensor  # int64, the token of each row
    weight_N: Tensor  # fp32, what the expert's output is multiplied by, with gradient
    counts_E: Tensor  # int64, rows of each expert, padding tokens included
    slot_TK: Tensor | None  # int64
    logits_TE: Tensor  # fp32
    statistics: RoutingStatistics


def router_statistics(
    logits_TE: Tensor, probability_TE: Tensor, expert_TK: Tensor, real_T: Tensor | None
) -> RoutingStatistics:
    """Sums over the tokens for which `real_T` (bool; None: all) holds."""
    experts = logits_TE.shape[-1]
    log_z_T = logits_TE.logsumexp(-1)
    with torch.no_grad():
        entropy_T = log_z_T - (probability_TE * logits_TE).sum(-1)
        weight_T = logits_TE.new_ones(len(logits_TE)) if real_T is None else real_T.to(logits_TE.dtype)
        tokens_per_expert_E = logits_TE.new_zeros(experts).scatter_add_(
            0, expert_TK.flatten(), weight_T[:, None].expand_as(expert_TK).flatten()
        )
    return RoutingStatistics(
        tokens_per_expert_E=tokens_per_expert_E,
        probability_sum_E=weight_T @ probability_TE,
        z_sum=weight_T @ log_z_T.square(),
        entropy_sum=weight_T @ entropy_T,
        num_tokens=weight_T.sum(),
    )
