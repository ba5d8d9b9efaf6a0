"""GShard's top-2 gating with limited room (Lepikhin et al. 2020, algorithm 1)."""

import torch
from torch import Tensor

from moe_llm.config.routers import GShardSettings
from moe_llm.model.moe.router import TokenChoiceRouter
from moe_llm.ops.routing_decision import decided


class GShardRouter(TokenChoiceRouter):
    """Weights of the top 2 sum to one; while training a token goes to the second with probability min(1, 2 * its
    weight). What overflows falls to the residual stream. The paper's order, in which all first choices come
    before all second ones, is `capacity_order: choice`.

    As elsewhere here, the group that shares the room is a document or a sequence, and the balance loss counts second
    choices too.
    """

    Settings = GShardSettings
    settings: GShardSettings

    def wanted(self, value_TR: Tensor) -> Tensor | None:
        if not self.training or self.settings.second_expert == "always":
            return None
        weight_TR = value_TR / value_TR.sum(-1, keepdim=True)
        second_T = decided(2 * weight_TR[:, 1] > torch.rand(len(value_TR), device=value_TR.device))
        return torch.stack([torch.ones_like(second_T), second_T], -1)
