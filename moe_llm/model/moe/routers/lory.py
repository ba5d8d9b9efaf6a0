"""Lory (Zhong, Xia, Chen and Lewis 2024, "Lory: Fully Differentiable Mixture-of-Experts for Autoregressive Language
Model Pre-training"): experts are merged, not chosen, with one mixture for each segment of a sequence.

Dimensions: B sequences, G segments of L tokens, N = B*G, D hidden, E experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_llm.config.routers import LorySettings
from moe_llm.model.moe.router import Router
from moe_llm.model.moe.routing import WeightMixture
from moe_llm.model.moe.segments import Segments


class LoryRouter(Router):
    """p_s = softmax(W h_{s-1}), with h_{s-1} the mean hidden state of segment s - 1, and segment s passes through the
    one feed-forward layer whose weights are sum_e p_se * expert_e's.

    The paper routes a sequence's first segment by its own mean, without gradient, while training. That lets a token
    see later ones of its segment, which generation does not have. Here the first segment has a learned distribution,
    softmax(start), uniform at first: training and generation compute the same, and nothing looks ahead. Where documents
    are isolated, segments are those of each document, so that no mixture depends on what else is in the block.
    """

    Settings = LorySettings
    settings: LorySettings
    start: Tensor
    by_document = True
    zero_parameters = ("start",)

    def forward(self, x_BSD: Tensor, mask_BS: Tensor, document_BS: Tensor | None = None) -> WeightMixture:
        segments = Segments.cut(mask_BS, self.settings.segment_length, document_BS)
        x_BGLD = segments.split(x_BSD.flatten(0, 1))
        mean_BGD = x_BGLD.sum(2, dtype=torch.float32) / segments.mask_BGL.sum(2).clamp(min=1)[..., None]
        opens_BG1 = segments.opens_BG[..., None]
        # zeros before the first of a document, so that its logits are `start`
        before_BGD = F.pad(mean_BGD, (0, 0, 1, 0))[:, :-1].masked_fill(opens_BG1, 0)
        logits_BGE = self.logits(before_BGD).view(*before_BGD.shape[:2], self.num_experts)
        logits_BGE = logits_BGE + self.start.float() * opens_BG1
        probability_BGE = logits_BGE.softmax(-1)

        def of_tokens(of_BGE: Tensor) -> Tensor:
            return segments.join(of_BGE[:, :, None].expand(-1, -1, segments.mask_BGL.shape[2], -1))

        probability_TE = of_tokens(probability_BGE)
        every_TE = torch.arange(self.num_experts, device=x_BSD.device).expand_as(probability_TE)
        return WeightMixture(
            segments,
            probability_BGE.flatten(0, 1),
            self.statistics(of_tokens(logits_BGE), probability_TE, every_TE, mask_BS, taken_TK=probability_TE.detach()),
        )
