"""Experts by position, for benchmarks: the work is spread evenly whatever the router has learned.

Dimensions: B sequences, S positions, T = B*S tokens, E experts, K experts per token.
"""

import torch
from torch import Tensor

from moe_llm.config.routers import BalancedSettings
from moe_llm.model.moe.capacity import Groups
from moe_llm.model.moe.router import Router, rows_by_token
from moe_llm.model.moe.routing import Routing


class BalancedRouter(Router):
    """Of a document or sequence the real token s has the experts s*K, ..., s*K + K - 1, modulo E: there every expert has the
    same number of rows, or one more. Weights are the softmax over these, so that the router computes and is trained as
    one that chooses."""

    Settings = BalancedSettings
    by_document = True

    def forward(self, x_BSD: Tensor, mask_BS: Tensor, document_BS: Tensor | None = None) -> Routing:
        logits_TE = self.logits(x_BSD)
        probability_TE = logits_TE.softmax(-1)
        groups = Groups.of(self.whole(mask_BS), None if document_BS is None else self.whole(document_BS))
        rank_T1 = self.own(groups.rank()).flatten()[:, None]
        expert_TK = (rank_T1 * self.top_k + torch.arange(self.top_k, device=mask_BS.device)) % self.num_experts
        weight_TK = logits_TE.gather(-1, expert_TK).softmax(-1)
        return Routing(
            **rows_by_token(expert_TK, weight_TK, self.num_experts),
            logits_TE=logits_TE,
            statistics=self.statistics(logits_TE, probability_TE, expert_TK, mask_BS),
        )
