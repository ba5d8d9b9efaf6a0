"""Losses of routers: those that keep the experts in use, and each router's own.

They are formed once for all layers from the routing statistics, and are the same in every layout.

Dimensions: L layers, E experts.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from moe_llm.config.routers import RouterSettings
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


class RouterLoss(NamedTuple):
    """name: in metrics.jsonl. value: of one layer's statistics over all tokens of a step, a differentiable scalar,
    before its coefficient; the loss is its mean over the layers."""

    name: str
    coefficient: float
    value: Callable[[RoutingStatistics], Tensor]


def entropy_losses(settings: RouterSettings) -> list[RouterLoss]:
    """Those that any router's distribution over experts may be given, as far as they are asked for."""
    threshold = settings.global_entropy_threshold
    found = [
        RouterLoss("entropy_bonus", settings.entropy_bonus_coef, lambda s: -mean_entropy(s)),
        RouterLoss("local_entropy_loss", settings.local_entropy_coef, mean_entropy),
        RouterLoss("global_entropy_loss", settings.global_entropy_coef, lambda s: _global_entropy_loss(s, threshold)),
    ]
    return [loss for loss in found if loss.coefficient]


def mean_entropy(statistics: RoutingStatistics) -> Tensor:
    """Of the tokens' distributions over experts, nats (LIMoE's local loss: Mustafa et al. 2022, section 2.2)."""
    return statistics.entropy_sum / statistics.num_tokens.clamp(min=1)


def _global_entropy_loss(statistics: RoutingStatistics, threshold: float | None) -> Tensor:
    """Minus the entropy of the tokens' mean distribution; with a threshold max(0, threshold - entropy)
    (LIMoE, section 2.2)."""
    mean_E = statistics.probability_sum_E / statistics.num_tokens.clamp(min=1)
    entropy = entropy_of(mean_E)
    return -entropy if threshold is None else (threshold - entropy).clamp(min=0)


def entropy_of(p_XE: Tensor) -> Tensor:
    """Of distributions, nats, (X,). Where an expert has no probability, since no token may have it or there is no token,
    0 log 0 is 0 and its slope is finite, which that of `torch.special.entr` is not."""
    return -(p_XE * p_XE.clamp(min=torch.finfo(p_XE.dtype).tiny).log()).sum(-1)


def cv_squared(x_E: Tensor) -> Tensor:
    """The squared coefficient of variation: variance over squared mean (Shazeer et al. 2017, equations 7 and 11)."""
    return x_E.var(correction=0) / x_E.mean().square().clamp(min=torch.finfo(x_E.dtype).tiny)


def router_loss_values(
    losses: Sequence[RouterLoss],
    own: RoutingStatistics,
    *,
    total: RoutingStatistics | None = None,
    seen: RoutingStatistics | None = None,
) -> Tensor:
    """The value of each loss, (losses,), with the gradient through `own` alone.

    A loss is a function of sums over all tokens of a step. Of these `own` are a part, so the parts' gradients add up
    to the whole's; the values do not: each part has that of the whole.

    Args:
        own: statistics with gradient, stacked over the layers.
        total: of the step (num_tokens and num_sequences are read); default: `own`.
        seen: what is known of the step's sums, scaled up to `total`'s tokens; default: `own`.
    """
    if not losses:
        return own.num_tokens.new_zeros(0)
    whole = own
    if seen is not None:
        assert total is not None, "what is seen is a part of a total"
        scale_L = total.num_tokens / seen.num_tokens.clamp(min=1)
        scaled = [part * scale_L.view(-1, *[1] * (part.dim() - 1)) for part in seen]
        # the value of all tokens, the gradient of our own
        whole = RoutingStatistics(*(all_ + (mine - mine.detach()) for all_, mine in zip(scaled, own)))
        whole = whole._replace(num_tokens=total.num_tokens, num_sequences=total.num_sequences)
    layers = whole.layers()
    return torch.stack([torch.stack([loss.value(layer) for layer in layers]).mean() for loss in losses])
