"""Losses that keep the experts in use, formed once for all layers from the routing statistics.

Dimensions: L layers, E experts.
"""

from typing import Literal

from torch import Tensor

from moe_llm.model.moe.routing import RoutingStatistics


def balance_loss(
    statistics: RoutingStatistics,
    tokens_per_expert_LE: Tensor,
    num_tokens: Tensor,
    scope: Literal["global", "transformers"],
) -> Tensor:
    """The load-balance loss (Fedus et al. 2021, equations 4 to 6), or this rank's summand of it.

    E * sum_e f_e * P_e, with f_e the experts chosen per token (it sums to K) and P_e the mean probability:
    K when balanced, up to E when not.

    Args:
        statistics: this rank's, with gradient, stacked over the layers.
        tokens_per_expert_LE, num_tokens: the same counts summed over all ranks. The loss is linear in the
            probabilities, so the summands of the ranks add up to the loss of the whole batch: the same number
            and gradient however the batch is split.
        scope: "global" forms the product per layer and averages over the layers; "transformers" pools the
            layers first (there, pass the rank's own counts).
    """
    experts = tokens_per_expert_LE.shape[-1]
    fraction_LE = tokens_per_expert_LE / num_tokens
    mean_probability_LE = statistics.probability_sum_E / num_tokens
    if scope == "transformers":
        fraction_LE = fraction_LE.mean(0, keepdim=True)
        mean_probability_LE = mean_probability_LE.mean(0, keepdim=True)
    return experts * (fraction_LE * mean_probability_LE).sum(-1).mean()


def z_loss(statistics: RoutingStatistics, num_tokens: Tensor) -> Tensor:
    """mean of logsumexp(logits)^2 over tokens and layers (Zoph et al. 2022, equation 5), or this rank's summand."""
    return statistics.z_sum.mean() / num_tokens
