"""Experts choose their tokens (Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing", section 3.2).

Dimensions: B sequences, S positions, T = B*S tokens, E experts, C tokens that an expert takes of a sequence.
"""

import torch
from torch import Tensor

from moe_llm.config.routers import ExpertChoiceSettings
from moe_llm.model.moe.capacity import Groups
from moe_llm.model.moe.router import Router, rows_by_token
from moe_llm.model.moe.routing import Routing, RoutingStatistics
from moe_llm.ops.routing_decision import decided

# Tokens that repeat at the start of a text have equal hidden states but for rounding, which differs between layouts: of
# scores that are equal when rounded to multiples of this, the earlier token's comes first.
_EQUAL = 2.0**-16


class ExpertChoiceRouter(Router):
    """Each expert takes the C = N * k / E of the N tokens of a document or sequence whose softmax over the experts is highest for it, and
    weights its output by that: loads are even, and a token has as many experts as want it, perhaps none.

    That needs the whole sequence. In evaluation, where later tokens are not known, a token goes to each expert for
    which its probability reaches `threshold_E`, a running mean of the lowest one that this expert took while training,
    moved after each step alike on all ranks; before the first step it is 0, and every token has every expert.
    """

    Settings = ExpertChoiceSettings
    settings: ExpertChoiceSettings
    threshold: Tensor
    by_document = True

    def forward(self, x_BSD: Tensor, mask_BS: Tensor, document_BS: Tensor | None = None) -> Routing:
        logits_TE = self.logits(x_BSD)
        probability_TE = logits_TE.softmax(-1)
        every_TE = torch.arange(self.num_experts, device=logits_TE.device).expand_as(logits_TE)
        score_TE, lowest_X = probability_TE.detach(), None
        if self.training:
            groups = Groups.of(self.whole(mask_BS), None if document_BS is None else self.whole(document_BS))
            taken_BSE, lowest_X = self._take(self.whole(score_TE.view(*mask_BS.shape, -1)), groups)
            taken_TE = self.own(taken_BSE).flatten(0, 1)
            if self.parts is not None and self.parts.index:
                lowest_X = torch.zeros_like(lowest_X)  # the first of the ranks that share a sequence counts its groups
        else:
            taken_TE = score_TE >= self.threshold
        taken_TE = decided(taken_TE)
        return Routing(
            **rows_by_token(every_TE, probability_TE, self.num_experts, taken_TE),
            logits_TE=logits_TE,
            statistics=self.statistics(
                logits_TE, probability_TE, every_TE, mask_BS, taken_TK=taken_TE, extra_X=lowest_X
            ),
        )

    def _take(self, score_BSE: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
        """What experts take, bool (B, S, E); and (E + 1,) the sums over groups of the lowest scores among that, and the
        number of groups."""
        mask_BS = groups.mask_BS
        capacity_BS = groups.capacity(self.settings.capacity_factor, self.top_k, self.num_experts)
        offered_BSE = (score_BSE / _EQUAL).round().masked_fill(~mask_BS[..., None], -1.0)
        order_BSE = torch.stack([groups.order(offered_BS) for offered_BS in offered_BSE.unbind(-1)], -1)
        place_BS = torch.arange(mask_BS.shape[1], device=mask_BS.device) - groups.start_BS  # within the group
        first_BSE = (place_BS < capacity_BS)[..., None].expand_as(order_BSE)
        taken_BSE = torch.zeros_like(first_BSE).scatter(1, order_BSE, first_BSE) & mask_BS[..., None]
        one_BS = mask_BS & (groups.rank() == 0)  # one position of each group
        start_BSE = groups.start_BS[..., None].expand_as(score_BSE)
        lowest_BSE = torch.full_like(score_BSE, float("inf")).scatter_reduce(
            1, start_BSE, score_BSE.masked_fill(~taken_BSE, float("inf")), "amin"
        )
        lowest_BSE = lowest_BSE.gather(1, start_BSE).masked_fill(~one_BS[..., None], 0.0)
        return taken_BSE, torch.cat([lowest_BSE.sum((0, 1)), one_BS.sum()[None].to(score_BSE.dtype)])

    def after_step(self, total: RoutingStatistics) -> None:
        lowest_E = total.extra_X[:-1] / total.extra_X[-1].clamp(min=1)
        moved_E = self.threshold.lerp(lowest_E, self.settings.threshold_rate)
        self.threshold.copy_(torch.where(self.threshold == 0, lowest_E, moved_E))
