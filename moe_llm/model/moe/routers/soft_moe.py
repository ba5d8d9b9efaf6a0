"""Soft slots (Puigcerver et al. 2023, "From Sparse to Soft Mixtures of Experts"), made causal by segments.

Dimensions: B sequences, S positions, T = B*S tokens, D hidden, E experts, G segments of a sequence that form slots, L
tokens and P slots of each, R = B*G*P slots in all, Q = G*L + 1 outputs of a sequence, the last of which is zero.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_llm.config.routers import SoftMoESettings
from moe_llm.model.moe.router import Router, rows_by_token
from moe_llm.model.moe.routing import Routing, RoutingStatistics
from moe_llm.ops.segments import Segments, gather_places, segments


class SoftMoERouter(Router):
    """Each slot is a mean of a segment's tokens, by a softmax over these; an expert works on its slots; each token's
    output is a mean of the slots' outputs, by a softmax over them. The logits of both are x phi.

    In the paper (section 2.1) a token's output is of slots that the same tokens formed, later ones among them. Here it
    is of those that tokens of the segment before it formed, in the same document: nothing depends on a later
    token. The tokens of a document's first segment have no output of experts, and go on as they are.

    With `normalize` tokens and columns of phi have length 1, and the logits a learned factor, `scale`. To the losses
    and statistics of routers, a token's distribution is what it takes of each expert's slots; loads are always equal.
    """

    Settings = SoftMoESettings
    settings: SoftMoESettings
    weight: Tensor
    scale: Tensor
    by_document = True

    def forward(self, x_BSD: Tensor, mask_BS: Tensor, document_BS: Tensor | None = None) -> Routing:
        found = segments(mask_BS, document_BS, self.settings.segment_length)
        logits_TP = self._slot_logits(x_BSD)
        logits_BSP = logits_TP.view(*mask_BS.shape, -1)
        dispatch_BGLP = gather_places(logits_BSP, found.source_BGL).softmax(2) * found.formed_BG[..., None, None]
        combine_BGLP = gather_places(logits_BSP, found.reader_BGL).softmax(3)
        source_BGLD = gather_places(x_BSD, found.source_BGL)
        slot_BGPD = dispatch_BGLP.transpose(2, 3).to(x_BSD.dtype) @ source_BGLD

        slots, width = slot_BGPD.shape[2:]
        owner_P = torch.arange(slots, device=x_BSD.device) // self.settings.slots_per_expert
        owner_R1 = owner_P.expand(slot_BGPD.shape[:3]).reshape(-1, 1)
        weight_R1 = torch.ones_like(owner_R1, dtype=logits_TP.dtype)
        logits_TE = logits_TP.unflatten(-1, (self.num_experts, -1)).logsumexp(-1)

        def combine_fn(y_RD: Tensor) -> Tensor:
            y_BGLD = combine_BGLP.to(y_RD.dtype) @ y_RD.view_as(slot_BGPD)
            none_B1D = y_RD.new_zeros(len(mask_BS), 1, width)
            y_BQD = torch.cat([y_BGLD.flatten(1, 2), none_B1D], 1)
            return gather_places(y_BQD, found.read_BS[..., None]).view(-1, width)

        return Routing(
            **rows_by_token(owner_R1, weight_R1, self.num_experts),
            logits_TE=logits_TE,
            statistics=self._statistics(logits_TE, mask_BS, found),
            entered_RW=slot_BGPD.reshape(-1, width),
            combine_fn=combine_fn,
        )

    def _slot_logits(self, x_BSD: Tensor) -> Tensor:
        if not self.settings.normalize:
            return self.logits(x_BSD)
        wide = torch.promote_types(x_BSD.dtype, torch.float32)
        x_TD, phi_PD = (F.normalize(part.to(wide), dim=-1) for part in (self.input(x_BSD), self.weight))
        return F.linear(x_TD, self.scale.to(wide) * phi_PD)

    def _statistics(self, logits_TE: Tensor, mask_BS: Tensor, found: Segments) -> RoutingStatistics:
        """`router_statistics`, with the slots in place of choices."""
        every_TE = torch.arange(self.num_experts, device=logits_TE.device).expand_as(logits_TE)
        statistics = self.statistics(logits_TE, logits_TE.softmax(-1), every_TE, mask_BS)
        rows_B = self.settings.slots_per_expert * found.formed_BG.sum(1).to(logits_TE.dtype)  # of each expert
        balance = self.num_experts * (rows_B / mask_BS.sum(1).clamp(min=1)).sum()
        return statistics._replace(
            tokens_per_expert_E=rows_B.sum().expand(self.num_experts),
            sequence_balance=balance if self.per_sequence else statistics.sequence_balance,
        )
