"""Gate and experts by expectation maximisation (Jacobs, Jordan, Nowlan and Hinton 1991; Jordan and Jacobs 1994, section 3).

Dimensions: T tokens, D hidden, E experts, K experts per token, R = T*E rows, one for each expert of each token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_llm.config.routers import RouterSettings
from moe_llm.config.routers_learned import EMSettings
from moe_llm.model.moe.feedback import TokenLosses
from moe_llm.model.moe.losses import RouterLoss
from moe_llm.model.moe.router import Router, rows_by_token
from moe_llm.model.moe.routing import Routing, RoutingStatistics


class EMRouter(Router):
    """Mixtral's arithmetic: the softmax g of a linear map, its top k, renormalised.

    In the last layer, while training, every expert works on every token. Expert e alone in the layer's place gives the
    target the likelihood p_e, by the final norm and the head. E-step: r_e = g_e p_e / sum_j g_j p_j; hard: 1 for the
    largest. M-step, by gradient (generalised EM): the gate's cross-entropy to r, and the experts' own losses times r.
    With both coefficients 1 their gradient is that of -log sum_e g_e p_e, exactly. The gate of that layer has no
    gradient but this one.

    In the layers before, a likelihood of one expert alone would take a pass through all that follows: their gates learn
    by the gradient of the loss, which is EM's to first order.
    """

    Settings = EMSettings
    settings: EMSettings

    def forward(self, x_BSD: Tensor, mask_BS: Tensor) -> Routing:
        logits_TE = self.logits(x_BSD)
        probability_TE = logits_TE.softmax(-1)
        value_TK, expert_TK = probability_TE.topk(self.top_k, dim=-1)
        weight_TK = value_TK / value_TK.sum(-1, keepdim=True)
        statistics = self.statistics(logits_TE, probability_TE, expert_TK, mask_BS, extra_X=logits_TE.new_zeros(2))
        if not (self.last and self.training):
            rows = rows_by_token(expert_TK, weight_TK, self.num_experts)
            return Routing(**rows, logits_TE=logits_TE, statistics=statistics)

        weight_TE = torch.zeros_like(logits_TE).scatter(-1, expert_TK, weight_TK.detach())
        every_R1 = torch.arange(self.num_experts, device=x_BSD.device).repeat(len(logits_TE))[:, None]
        x_RD = x_BSD.flatten(0, 1).repeat_interleave(self.num_experts, 0)

        def combine_fn(y_RD: Tensor) -> Tensor:
            return torch.einsum("te,ted->td", weight_TE.to(y_RD.dtype), y_RD.unflatten(0, weight_TE.shape))

        def hand_on(y_RD: Tensor) -> Tensor:
            change_TED = y_RD.unflatten(0, weight_TE.shape) - combine_fn(y_RD)[:, None]
            return torch.cat([change_TED.float(), logits_TE[..., None]], -1).flatten(1)

        return Routing(
            **rows_by_token(every_R1, torch.ones_like(every_R1, dtype=logits_TE.dtype), self.num_experts),
            logits_TE=logits_TE,
            statistics=statistics,
            entered_RW=x_RD,
            combine_fn=combine_fn,
            hand_on=hand_on,
        )

    def feedback(self, statistics: RoutingStatistics, losses: TokenLosses) -> RoutingStatistics:
        handed_TEX = statistics.feedback_TX.unflatten(-1, (self.num_experts, -1))
        log_gate_TE = handed_TEX[..., -1].log_softmax(-1)
        loss_TE = losses.of_changes(handed_TEX[..., :-1])
        share_TE = responsibilities(log_gate_TE, -loss_TE, hard=self.settings.form == "hard")
        share_TE = share_TE * losses.targets_T[:, None]
        gate, experts = -(share_TE * log_gate_TE).sum(), (share_TE * loss_TE).sum()
        return statistics._replace(extra_X=losses.layers * torch.stack([gate, experts]))

    @classmethod
    def losses(cls, settings: RouterSettings) -> list[RouterLoss]:
        assert isinstance(settings, EMSettings)
        found = [
            RouterLoss("gate_m_step_loss", settings.gate_coef, lambda s: s.extra_X[0] / s.num_tokens.clamp(min=1)),
            RouterLoss("expert_m_step_loss", settings.expert_coef, lambda s: s.extra_X[1] / s.num_tokens.clamp(min=1)),
        ]
        return [*super().losses(settings), *(loss for loss in found if loss.coefficient)]


def responsibilities(log_gate_TE: Tensor, log_likelihood_TE: Tensor, *, hard: bool = False) -> Tensor:
    """The E-step: each expert's posterior for each token's target, (T, E), rows sum to 1, without gradient. hard: all of
    it for the likeliest expert."""
    joint_TE = (log_gate_TE + log_likelihood_TE).detach()
    if hard:
        return F.one_hot(joint_TE.argmax(-1), joint_TE.shape[-1]).to(joint_TE.dtype)
    return joint_TE.softmax(-1)
