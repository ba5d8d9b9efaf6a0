"""Carry tokens to their experts and back. Here within one process; `parallel` has the all-to-all twin."""

from typing import Protocol

from torch import Tensor

from moe_llm.model.moe.experts import Experts
from moe_llm.model.moe.routing import Routing, WeightMixture


class Dispatcher(Protocol):
    def __call__(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        """The weighted sum of each token's experts, (T, D) in and out."""

    def merge(self, x_TD: Tensor, merging: WeightMixture, experts: Experts) -> Tensor:
        """Each token through its segment's mixture of all experts' weights, (T, D) in and out."""


class LocalDispatcher:
    """All experts are here: one operation gathers each expert's rows, computes, and sums them back."""

    def __call__(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        return experts(x_TD, routing.counts_E, routing)

    def merge(self, x_TD: Tensor, merging: WeightMixture, experts: Experts) -> Tensor:
        return experts(x_TD, merging=merging)
