"""V-MoE's batch prioritised routing (Riquelme et al. 2021, sections 2 and 4): who scores high gets a place first.

Dimensions: B sequences, S positions, T = B*S tokens, E experts, R choices of a token.
"""

import torch
from torch import Tensor

from moe_llm.config.routers import BatchPrioritisedSettings
from moe_llm.model.moe.capacity import Groups, assign_by_choice
from moe_llm.model.moe.router import TokenChoiceRouter
from moe_llm.model.moe.routing import Routing


class BatchPrioritisedRouter(TokenChoiceRouter):
    """Top k of softmax(W x + noise), weighted by these probabilities as they are; noise is normal with deviation 1 / E,
    while training.

    Where room is short, all first choices come before all second ones, and within a choice tokens of high score before
    those of low: the room is a document's or a sequence's, so that the layout of ranks changes nothing.
    """

    Settings = BatchPrioritisedSettings
    settings: BatchPrioritisedSettings

    def forward(self, x_BSD: Tensor, mask_BS: Tensor, document_BS: Tensor | None = None) -> Routing:
        logits_TE = self.logits(x_BSD)
        if self.training and self.settings.noise:
            logits_TE = logits_TE + torch.randn_like(logits_TE) / self.num_experts
        return self.route(logits_TE, logits_TE.softmax(-1), self.groups(mask_BS, document_BS))

    def weights(self, value_TR: Tensor, shared_TR: Tensor) -> Tensor:
        return value_TR

    def assign(
        self, expert_TR: Tensor, value_TR: Tensor, wanted_TR: Tensor | None, groups: Groups, capacity_BS: Tensor
    ) -> Tensor:
        value_TK = value_TR[:, : self.top_k]
        score_T = value_TK[:, 0] if self.settings.score == "max" else value_TK.sum(-1)
        # Of equal scores the earlier token's is first. A text's first token and its repetition right behind it are
        # equal but for rounding, which is another one in another layout of ranks: the last digits do not count
        steps_BS = (score_T.float() * 2**16).round().view_as(groups.mask_BS)
        order_BS = groups.order(steps_BS)
        order_BSR = order_BS[..., None].expand(*order_BS.shape, expert_TR.shape[-1])
        sorted_BSR = expert_TR.view(order_BSR.shape).gather(1, order_BSR)
        ordered = groups._replace(mask_BS=groups.mask_BS.gather(1, order_BS))  # groups keep their places
        granted_BSR = assign_by_choice(sorted_BSR, ordered, self.top_k, self.num_experts, capacity_BS)
        return torch.zeros_like(granted_BSR).scatter(1, order_BSR, granted_BSR).flatten(0, 1)
