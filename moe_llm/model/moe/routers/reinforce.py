"""A gate trained by reinforcement (Bengio, Leonard and Courville 2013; Bengio et al. 2015, "Conditional Computation in
Neural Networks for faster models"; Rosenbaum et al. 2018): the experts are sampled, the gate's gradient is REINFORCE
(Williams 1992).

Dimensions: B sequences, S positions, T = B*S tokens, D hidden, E experts, K experts per token.
"""

import torch
from torch import Tensor

from moe_llm.config.routers import RouterSettings
from moe_llm.config.routers_learned import ReinforceSettings
from moe_llm.model.moe.feedback import TokenLosses
from moe_llm.model.moe.losses import RouterLoss
from moe_llm.model.moe.router import Router, rows_by_token
from moe_llm.model.moe.routing import Routing, RoutingStatistics
from moe_llm.ops.routing_decision import decided


class ReinforceRouter(Router):
    """While training K experts are drawn without replacement from the softmax, one after the other; evaluation takes the
    likeliest. Each weighs 1 / K, so that the gate learns by its policy gradient alone.

    Token t adds (c_t - b_t) * log pi_t to the policy's loss, with c_t its own cross-entropy plus the penalties for loaded
    and for wide experts, b_t the baseline, both without gradient, and pi_t the probability of what was drawn, in its order. What a
    choice does to later tokens, through attention, is no part of its reward.
    """

    Settings = ReinforceSettings
    settings: ReinforceSettings
    load: Tensor
    zero_parameters = ("baseline_weight",)

    def forward(self, x_BSD: Tensor, mask_BS: Tensor) -> Routing:
        logits_TE = self.logits(x_BSD)
        expert_TK = self._draw(logits_TE)
        weight_TK = torch.full_like(expert_TK, 1 / self.top_k, dtype=logits_TE.dtype)
        statistics = self.statistics(
            logits_TE, logits_TE.softmax(-1), expert_TK, mask_BS, extra_X=logits_TE.new_zeros(2)
        )
        if self.training:
            handed = [log_probability(logits_TE, expert_TK), self._penalty(expert_TK)]
            if self.settings.baseline == "learned":
                handed.append(self.linear(x_BSD.detach().flatten(0, 1), "baseline_weight")[:, 0])
            statistics = statistics._replace(feedback_TX=torch.stack(handed, -1))
        return Routing(
            **rows_by_token(expert_TK, weight_TK, self.num_experts), logits_TE=logits_TE, statistics=statistics
        )

    def _draw(self, logits_TE: Tensor) -> Tensor:
        """A token's experts, (T, K). The largest of logits with Gumbel noise are drawn without replacement (Kool et al.
        2019)."""
        if self.training and self.settings.sample:
            uniform_TE = torch.rand_like(logits_TE).clamp(min=torch.finfo(logits_TE.dtype).tiny)
            logits_TE = logits_TE - (-uniform_TE.log()).log()
        return decided(logits_TE.topk(self.top_k, dim=-1).indices)

    def _penalty(self, expert_TK: Tensor) -> Tensor:
        """Of each token, for the load and the cost of its experts."""
        excess_E = torch.zeros(self.num_experts, device=expert_TK.device)
        if self.settings.load_coef:
            excess_E = excess_E + self.settings.load_coef * (self.load * self.num_experts - 1) * (self.load.sum() > 0)
        if self.settings.cost_coef:
            excess_E = excess_E + self.settings.cost_coef * (excess_E.new_tensor(self.relative_sizes) - 1)
        return excess_E[expert_TK].mean(-1)

    def feedback(self, statistics: RoutingStatistics, losses: TokenLosses) -> RoutingStatistics:
        feedback_TX = statistics.feedback_TX
        log_pi_T, penalty_T = feedback_TX[:, 0], feedback_TX[:, 1].detach()
        cost_T, counts_T = losses.of_tokens() + penalty_T, losses.targets_T
        if self.settings.baseline == "learned":
            baseline_T = feedback_TX[:, 2]
        else:
            baseline_T, known_T = losses.mean_before(cost_T)
            counts_T = counts_T & known_T  # a document's first token has nothing to be compared with
        error_T = torch.where(counts_T, cost_T - baseline_T, 0.0)
        policy = losses.layers * (error_T.detach() * log_pi_T).sum()
        return statistics._replace(extra_X=torch.stack([policy, error_T.square().sum()]))

    @classmethod
    def losses(cls, settings: RouterSettings) -> list[RouterLoss]:
        assert isinstance(settings, ReinforceSettings)
        found = [RouterLoss("policy_loss", settings.policy_coef, lambda s: s.extra_X[0] / s.num_tokens.clamp(min=1))]
        if settings.baseline == "learned":
            found.append(
                RouterLoss("baseline_loss", settings.baseline_coef, lambda s: s.extra_X[1] / s.num_tokens.clamp(min=1))
            )
        return [*super().losses(settings), *found]

    def after_step(self, total: RoutingStatistics) -> None:
        if self.settings.load_coef:
            share_E = total.tokens_per_expert_E / total.tokens_per_expert_E.sum().clamp(min=1)
            rate = torch.where(self.load.sum() > 0, self.settings.load_rate, 1.0)
            self.load += rate * (share_E - self.load)


def log_probability(logits_TE: Tensor, expert_TK: Tensor) -> Tensor:
    """Of drawing these experts in this order without replacement (Plackett 1975), (T,)."""
    left_TE, total_T = logits_TE, logits_TE.new_zeros(len(logits_TE))
    for expert_T in expert_TK.unbind(1):
        total_T = total_T + left_TE.log_softmax(-1).gather(-1, expert_T[:, None])[:, 0]
        left_TE = left_TE.scatter(-1, expert_T[:, None], float("-inf"))
    return total_T
