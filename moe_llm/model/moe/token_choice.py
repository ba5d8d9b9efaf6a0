"""Routers in which each token takes the best of its experts, as far as these have room.

Dimensions: B sequences, S positions, T = B*S tokens, E experts, K experts per token, R choices that a token may propose
in falling preference (K of them, or all E where what overflows is passed on).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_llm.config.routers import LimitedSettings
from moe_llm.model.moe.capacity import Groups, assign_by_choice, assign_by_position
from moe_llm.model.moe.router import Router, rows_by_token
from moe_llm.model.moe.routing import Routing
from moe_llm.ops.routing_decision import decided


class TokenChoiceRouter(Router):
    """Softmax over the experts, of which a token takes the top k.

    With `router.capacity_factor`, and in training, an expert takes a limited number of tokens from each document
    or sequence (see `capacity`), and padding gets no expert; in evaluation none is dropped, so that the model computes what its
    export does. With `router.overflow: residual` the token itself stands in for experts that had no room, times their
    weights; with `router.overflow: queue` the same experts take it in a second round. With `router.warmup_steps`, tokens are drawn in training that take experts at random instead.

    What a subclass may say otherwise: `preferred`, `weights`, `wanted` and `assign`.
    """

    settings: LimitedSettings
    by_document = True

    def forward(self, x_BSD: Tensor, mask_BS: Tensor, document_BS: Tensor | None = None) -> Routing:
        logits_TE = self.logits(x_BSD)
        return self.route(logits_TE, logits_TE.softmax(-1), self.groups(mask_BS, document_BS))

    def groups(self, mask_BS: Tensor, document_BS: Tensor | None) -> Groups:
        """The tokens that share room, where room is limited at all."""
        limited = self.training and self.settings.capacity_at(self.step) is not None
        if not limited:
            return Groups.unlimited(mask_BS)
        return Groups.of(self.whole(mask_BS), None if document_BS is None else self.whole(document_BS))

    def weights(self, value_TR: Tensor, shared_TR: Tensor) -> Tensor:
        """What outputs are multiplied by. value_TR: probabilities of the choices; shared_TR: the same, zero for choices
        that were passed on."""
        return value_TR / shared_TR.sum(-1, keepdim=True).clamp(min=torch.finfo(value_TR.dtype).tiny)

    def wanted(self, value_TR: Tensor) -> Tensor | None:
        """Which choices a token proposes at all, bool; None: each."""
        return None

    def assign(
        self, expert_TR: Tensor, value_TR: Tensor, wanted_TR: Tensor | None, groups: Groups, capacity_BS: Tensor
    ) -> Tensor:
        """Which choices are granted, bool (T, R): earlier positions come first."""
        shape = (*groups.mask_BS.shape, expert_TR.shape[-1])
        wanted_BSR = None if wanted_TR is None else wanted_TR.view(shape)
        serve = assign_by_position if self.settings.capacity_order == "position" else assign_by_choice
        granted_BSR = serve(expert_TR.view(shape), groups, self.top_k, self.num_experts, capacity_BS, wanted_BSR)
        return granted_BSR.flatten(0, 1)

    def route(
        self,
        logits_TE: Tensor,
        probability_TE: Tensor,
        groups: Groups,
        measure: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Routing:
        """The routing that follows from probabilities. `measure`, given experts and weights (T, R), forms the sums that
        the router's own losses need."""
        factor = self.settings.capacity_at(self.step) if self.training else None
        mask_BS = groups.mask_BS if factor is None else self.own(groups.mask_BS)
        overflow = getattr(self.settings, "overflow", "drop") if factor is not None else None
        pass_on = overflow == "next"
        expert_TR = self.preferred(probability_TE, self.num_experts if pass_on else self.top_k)
        value_TR = probability_TE.gather(-1, expert_TR)
        wanted_TR = self.wanted(value_TR)
        granted_TR, dropped, kept_R, queued_TR, served_TR = wanted_TR, None, None, None, None
        if factor is not None:
            capacity_BS = groups.capacity(factor, self.top_k, self.num_experts)
            granted_TR = decided(self._assigned(expert_TR, value_TR, wanted_TR, groups, capacity_BS))
            if overflow == "queue":
                first_TR, deeper = granted_TR, factor + (getattr(self.settings, "queue_depth", None) or 0.0)
                capacity_BS = groups.capacity(deeper, self.top_k, self.num_experts)
                granted_TR = first_TR | decided(self._assigned(expert_TR, value_TR, wanted_TR, groups, capacity_BS))
                queued_TR, served_TR = granted_TR & ~first_TR, first_TR
            asked = (
                mask_BS.sum() * self.top_k
                if wanted_TR is None
                else (wanted_TR[:, : self.top_k] & mask_BS.flatten()[:, None]).sum()
            )
            dropped = asked - granted_TR.sum()
        weight_TR = self.weights(value_TR, value_TR if granted_TR is None or not pass_on else value_TR * granted_TR)
        if overflow == "residual":
            assert granted_TR is not None, "only a limit overflows"
            denied_TR = mask_BS.flatten()[:, None] & ~granted_TR
            denied_TR = denied_TR if wanted_TR is None else denied_TR & wanted_TR
            kept_R = (weight_TR * denied_TR).sum(-1)
        routing = Routing(
            **rows_by_token(expert_TR, weight_TR, self.num_experts, granted_TR if served_TR is None else served_TR),
            logits_TE=logits_TE,
            statistics=self.statistics(
                logits_TE,
                probability_TE,
                expert_TR[:, : self.top_k],
                mask_BS,
                dropped=dropped,
                taken_TK=None if wanted_TR is None else wanted_TR[:, : self.top_k],
                own_X=None if measure is None else measure(expert_TR, weight_TR),
            ),
            kept_R=kept_R,
        )
        if queued_TR is None:
            return routing
        queued = routing._replace(**rows_by_token(expert_TR, weight_TR, self.num_experts, queued_TR))
        return routing._replace(queued=queued)

    def _assigned(
        self, expert_TR: Tensor, value_TR: Tensor, wanted_TR: Tensor | None, groups: Groups, capacity_BS: Tensor
    ) -> Tensor:
        """`assign` for whole sequences, of which the tokens that are here take their part."""
        if self.parts is None:
            return self.assign(expert_TR, value_TR, wanted_TR, groups, capacity_BS)

        def whole(x_TR: Tensor) -> Tensor:
            return self.whole(x_TR.unflatten(0, (len(groups.mask_BS), -1))).flatten(0, 1)

        wanted_TR = None if wanted_TR is None else whole(wanted_TR)
        granted_TR = self.assign(whole(expert_TR), whole(value_TR.detach()), wanted_TR, groups, capacity_BS)
        return self.own(granted_TR.unflatten(0, groups.mask_BS.shape)).flatten(0, 1)

    def preferred(self, probability_TE: Tensor, choices: int) -> Tensor:
        """A token's best experts, (T, choices)."""
        if self.training and self.step < self.settings.warmup_steps:
            drawn_T = torch.rand(len(probability_TE), device=probability_TE.device)
            learned_T = decided(drawn_T < self.step / self.settings.warmup_steps)
            random_TE = torch.rand_like(probability_TE).masked_fill(probability_TE == 0, -1.0)  # closed ones stay so
            probability_TE = torch.where(learned_T[:, None], probability_TE, random_TE)
        return probability_TE.topk(choices, dim=-1).indices


def close_groups(score_TE: Tensor, score_TG: Tensor, allowed: int) -> Tensor:
    """The scores of experts, minus infinity but for those of each token's `allowed` best groups of neighbours."""
    best_TP = score_TG.topk(allowed, dim=-1).indices
    closed_TG = torch.ones_like(score_TG, dtype=torch.bool).scatter(-1, best_TP, False)
    return score_TE.unflatten(-1, (score_TG.shape[-1], -1)).masked_fill(closed_TG[..., None], float("-inf")).flatten(1)
