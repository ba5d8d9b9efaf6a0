"""Every expert of every token, weighted by the softmax: the original mixture (Jacobs, Jordan, Nowlan, Hinton 1991)."""

import torch
from torch import Tensor

from moe_llm.config.routers import DenseSettings
from moe_llm.model.moe.router import Router, rows_by_token
from moe_llm.model.moe.routing import Routing


class DenseRouter(Router):
    """y = sum over all experts e of softmax(W x)_e * expert_e(x)."""

    Settings = DenseSettings

    def forward(self, x_BSD: Tensor, mask_BS: Tensor) -> Routing:
        logits_TE = self.logits(x_BSD)
        probability_TE = logits_TE.softmax(-1)
        every_TE = torch.arange(self.num_experts, device=logits_TE.device).expand_as(logits_TE)
        return Routing(
            **rows_by_token(every_TE, probability_TE, self.num_experts),
            logits_TE=logits_TE,
            statistics=self.statistics(logits_TE, probability_TE, every_TE, mask_BS),
        )
