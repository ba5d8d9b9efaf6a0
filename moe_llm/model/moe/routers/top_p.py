"""Dynamic routing (Huang et al. 2024, "Harder Tasks Need More Experts"): as many experts as a token needs.

Dimensions: T tokens, E experts, R = K experts that a token may have at most.
"""

from torch import Tensor

from moe_llm.config.routers import TopPSettings
from moe_llm.model.moe.router import Router, rows_by_token
from moe_llm.model.moe.routing import Routing
from moe_llm.ops.routing_decision import decided


class TopPRouter(Router):
    """The likeliest experts until their probabilities reach p, weighted by these as they are; their
    entropy is what the loss keeps small (`local_entropy_coef`)."""

    Settings = TopPSettings
    settings: TopPSettings

    def forward(self, x_BSD: Tensor, mask_BS: Tensor) -> Routing:
        logits_TE = self.logits(x_BSD)
        probability_TE = logits_TE.softmax(-1)
        expert_TR = probability_TE.topk(self.top_k, dim=-1).indices
        value_TR = probability_TE.gather(-1, expert_TR)
        before_TR = value_TR.cumsum(-1) - value_TR
        taken_TR = decided(before_TR < self.settings.p)
        taken_TR[:, 0] = True
        return Routing(
            **rows_by_token(expert_TR, value_TR, self.num_experts, taken_TR),
            logits_TE=logits_TE,
            statistics=self.statistics(logits_TE, probability_TE, expert_TR, mask_BS, taken_TK=taken_TR),
        )
