"""Losses that keep the experts in use, formed once for all layers from the routing statistics.

Dimensions: L layers, E experts.
"""

from typing import Literal

from torch import Tensor

from moe_llm.model.moe.routing import RoutingStatistics

Scope = Literal["global", "sequence", "transformers"]


def balance_loss(
    own: RoutingStatistics,
    scope: Scope,
    *,
    total: RoutingStatistics | None = None,
    seen: RoutingStatistics | None = None,
) -> Tensor:
    """The load-balance loss (Fedus et al. 2021, equations 4 to 6), or the summand of it that `own` tokens make.

    E * sum_e f_e * P_e, with f_e the experts chosen per token (it sums to K) and P_e the mean probability:
    K when balanced, up to E when not.

    Args:
        own: with gradient, stacked over the layers.
        scope: "global" forms the product per layer and averages over the layers; "sequence" forms it for each
            sequence of each layer and averages; "transformers" pools the layers first, and knows `own` alone.
        total: of all tokens that share the loss (num_tokens and num_sequences are read); default: `own`. The loss is
            linear in the probabilities, so the summands of ranks and micro-batches add up to the loss of the whole.
        seen: whose choices the fractions f are taken from; default: `total`.
    """
    total = total or own
    experts = own.tokens_per_expert_E.shape[-1]
    if scope == "sequence":
        return (own.sequence_balance / total.num_sequences.clamp(min=1)).mean()
    if scope == "transformers":
        total = seen = own
    seen = seen or total
    fraction_LE = seen.tokens_per_expert_E / seen.num_tokens.clamp(min=1)[:, None]
    mean_probability_LE = own.probability_sum_E / total.num_tokens.clamp(min=1)[:, None]
    if scope == "transformers":
        fraction_LE = fraction_LE.mean(0, keepdim=True)
        mean_probability_LE = mean_probability_LE.mean(0, keepdim=True)
    return experts * (fraction_LE * mean_probability_LE).sum(-1).mean()


def z_loss(own: RoutingStatistics, *, total: RoutingStatistics | None = None) -> Tensor:
    """mean of logsumexp(logits)^2 over tokens and layers (Zoph et al. 2022, equation 5), or `own` tokens' summand."""
    return (own.z_sum / (total or own).num_tokens.clamp(min=1)).mean()
