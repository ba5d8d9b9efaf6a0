"""From the members' next-token distributions to one.

Shapes: N positions, V vocabulary of the main model. Models that are not asked are None; the main one is model 0 and
always there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

# of each model, or None where it is not asked: a rule reads those that it needs
LogProbs = Sequence[Any]

_LEAST = -1e4  # nats: a token that a member excludes; a weight of 0 or less times -inf would be no number


class Rule(Protocol):
    """How members make one distribution."""

    @property
    def needed(self) -> tuple[int, ...]:
        """Models beside the main one that are asked at all."""

    def asks(self, main_NV: Tensor) -> Tensor:
        """(N,) bool: the positions at which the main model's log-probabilities are not the ensemble's as they are."""

    def __call__(self, log_probs: LogProbs) -> Tensor:
        """(N, V) log-probabilities from each model's (N, V)."""


def _first_alone(weights: Sequence[float]) -> bool:
    return weights[0] == 1 and not any(weights[1:])


@dataclass(frozen=True)
class _Weighted:
    """Rules with a weight for each model."""

    weights: tuple[float, ...]

    @property
    def needed(self) -> tuple[int, ...]:
        return tuple(m for m, weight in enumerate(self.weights) if weight and m)

    def asks(self, main_NV: Tensor) -> Tensor:
        return main_NV.new_full(main_NV.shape[:1], not _first_alone(self.weights), dtype=torch.bool)


class LinearMixture(_Weighted):
    """log sum_m w_m p_m; the weights are not negative and sum to 1."""

    def __call__(self, log_probs: LogProbs) -> Tensor:
        parts = [log_probs[m] + math.log(weight) for m, weight in enumerate(self.weights) if weight]
        return parts[0] if len(parts) == 1 else torch.stack(parts).logsumexp(0)

    def disagreement(self, log_probs: LogProbs, mixed_NV: Tensor) -> Tensor:
        """(N,) nats: the entropy of the mixture beyond the members' mean one, which is the mutual information of token
        and member (Houlsby et al. 2011); 0 where all say the same."""
        return mutual_information(log_probs, mixed_NV, self.weights)


class LogLinear(_Weighted):
    """log of prod_m p_m^w_m, renormalised; DExperts' sum of logits is the same, since softmax takes no constants."""

    def __call__(self, log_probs: LogProbs) -> Tensor:
        total_NV = torch.zeros_like(log_probs[0])
        for weight, part_NV in zip(self.weights, log_probs):
            if weight:
                total_NV += weight * part_NV.clamp(min=_LEAST)
        return total_NV.log_softmax(-1)


@dataclass(frozen=True)
class Cascade:
    """The small, main model's distribution where its top probability reaches the threshold, else the large one's."""

    threshold: float

    @property
    def needed(self) -> tuple[int, ...]:
        return (1,)

    def asks(self, main_NV: Tensor) -> Tensor:
        return confidence(main_NV) < self.threshold

    def __call__(self, log_probs: LogProbs) -> Tensor:
        small_NV, large_NV = log_probs
        return torch.where(self.asks(small_NV)[:, None], large_NV, small_NV)


def mutual_information(log_probs: LogProbs, mixed_NV: Tensor, weights: Sequence[float] | Tensor) -> Tensor:
    """(N,) nats, of token and member. weights: of each member, numbers or (N,)."""
    entropy_N = _entropy(mixed_NV)
    for weight, part_NV in zip(weights, log_probs):
        if part_NV is not None and torch.as_tensor(weight).any():
            entropy_N = entropy_N - weight * _entropy(part_NV)
    return entropy_N.clamp(min=0)


def _entropy(log_probs_NV: Tensor) -> Tensor:
    return -(log_probs_NV.exp() * log_probs_NV.clamp(min=_LEAST)).sum(-1)


def confidence(log_probs_NV: Tensor) -> Tensor:
    """(N,): the largest probability."""
    return log_probs_NV.amax(-1).exp()
