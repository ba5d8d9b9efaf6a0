"""Carry tokens to their experts and back. Here within one process; `parallel` has the all-to-all twin."""

from typing import Protocol

from torch import Tensor

from moe_llm.model.moe.experts import Experts
from moe_llm.model.moe.routing import Routing
from moe_llm.ops.permutation import combine, permute


class Dispatcher(Protocol):
    def __call__(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        """The weighted sum of each token's experts, (T, D) in and out."""


class LocalDispatcher:
    """All experts are here: sort the rows by expert, compute, sum them back."""

    def __call__(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        x_ND = permute(x_TD, routing.token_index_N, routing.slot_TK)
        y_ND = experts(x_ND, routing.counts_E)
        return combine(y_ND, routing.weight_N, routing.token_index_N, len(x_TD), routing.slot_TK)
