"""A gate of attention heads over learned keys of the experts, after Yuan 2.0-M32's attention router (Wu et al. 2024).

Dimensions: B sequences, S positions, T = B*S tokens, D hidden, E experts, H heads of K wide queries and keys.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor

from moe_llm.config.routers_learned import AttentionSettings
from moe_llm.model.moe.router import TokenChoiceRouter
from moe_llm.model.moe.routing import Routing


class AttentionRouter(TokenChoiceRouter):
    """p = mean over heads h of softmax over experts e of (query_h x) . key_he / (sqrt(K) * temperature); the top k of p,
    renormalised.

    Yuan's router lets scores of experts attend to each other; here the token attends to the experts, the form that
    surveys describe. To losses the logits are log p, and the z-loss is the heads' mean.
    """

    Settings = AttentionSettings
    settings: AttentionSettings
    weight: Tensor
    gains: ClassVar[dict[str, float]] = {"weight": 1.0, "query_weight": 1.0}

    def forward(self, x_BSD: Tensor, mask_BS: Tensor, document_BS: Tensor | None = None) -> Routing:
        heads, size = self.settings.heads, self.settings.key_size
        query_THK = self.linear(self.input(x_BSD), "query_weight").unflatten(-1, (heads, size))
        key_EHK = self.weight.to(query_THK.dtype).unflatten(-1, (heads, size))
        scores_THE = torch.einsum("thk,ehk->the", query_THK, key_EHK) / (size**0.5 * self.settings.temperature)
        log_THE = scores_THE.log_softmax(-1)
        logits_TE = self.without_closed(log_THE.logsumexp(1) - math.log(heads))
        routing = self.route(logits_TE, logits_TE.exp(), self.groups(mask_BS, document_BS))
        z_T = scores_THE.logsumexp(-1).square().mean(-1)
        z_sum = mask_BS.flatten().to(z_T.dtype) @ z_T
        return routing._replace(statistics=routing.statistics._replace(z_sum=z_sum))
