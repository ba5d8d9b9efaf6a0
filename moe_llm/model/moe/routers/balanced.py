"""Experts by position, for benchmarks: the work is spread evenly whatever the router has learned.

Dimensions: B sequences, S positions, T = B*S tokens, E experts, K experts per token.
"""

import torch
from torch import Tensor

from moe_llm.config.routers import BalancedSettings
from moe_llm.model.moe.router import Router, rows_by_token
from moe_llm.model.moe.routing import Routing


class BalancedRouter(Router):
    """The token at position s has the experts s*K, ..., s*K + K - 1, modulo E: in each sequence every expert has the
    same number of rows, or one more. Weights are the softmax over these, so that the router computes and is trained as
    one that chooses."""

    Settings = BalancedSettings

    def forward(self, x_BSD: Tensor, mask_BS: Tensor) -> Routing:
        logits_TE = self.logits(x_BSD)
        probability_TE = logits_TE.softmax(-1)
        place_SK = torch.arange(mask_BS.shape[1] * self.top_k, device=mask_BS.device).view(-1, self.top_k)
        expert_TK = (place_SK % self.num_experts).repeat(len(mask_BS), 1)
        weight_TK = logits_TE.gather(-1, expert_TK).softmax(-1)
        return Routing(
            **rows_by_token(expert_TK, weight_TK, self.num_experts),
            logits_TE=logits_TE,
            statistics=self.statistics(logits_TE, probability_TE, expert_TK, mask_BS),
        )
