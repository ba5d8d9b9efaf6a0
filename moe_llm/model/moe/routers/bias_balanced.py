"""Balance without a loss (Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing"; DeepSeek-V3 2024, section 2.1.2).

Dimensions: T tokens, E experts, K experts per token, G groups of M experts each, P groups that a token may use.
"""

import torch
from torch import Tensor

from moe_llm.config.routers import BiasBalancedSettings
from moe_llm.model.moe.feedback import TokenLosses
from moe_llm.model.moe.losses import entropy_of
from moe_llm.model.moe.router import Router, close_groups, rows_by_token
from moe_llm.model.moe.routing import Routing, RoutingStatistics

_LAST = -1e9  # finite, so that a group with one expert that is open is better than one with none


class BiasBalancedRouter(Router):
    """A token takes the experts of the highest score + bias, weighted by their scores without it.

    After each step an expert that had less than its even share of all tokens gets a higher bias, one that had more a
    lower one. With `loss_share` its load is not how many tokens it had alone, but how large a part of the losses too: an
    expert of difficult tokens gets fewer of them; with `time_share` a wide expert does. For the entropies and the balance loss (DeepSeek-V3's complementary one is scope `sequence`), the
    distribution is the scores' shares.
    """

    Settings = BiasBalancedSettings
    settings: BiasBalancedSettings
    e_score_correction_bias: Tensor

    def forward(self, x_BSD: Tensor, mask_BS: Tensor) -> Routing:
        logits_TE = self.logits(x_BSD)
        score_TE = logits_TE.sigmoid() if self.settings.score == "sigmoid" else logits_TE.softmax(-1)
        share_TE = score_TE / score_TE.sum(-1, keepdim=True)
        expert_TK = self._choose(score_TE.detach() + self.e_score_correction_bias)
        weight_TK = score_TE.gather(-1, expert_TK)
        if self.settings.norm_topk_prob:
            weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
        told = {"extra_X": torch.zeros_like(logits_TE[0])} if self.settings.learns_from_loss else {}
        statistics = self.statistics(logits_TE, share_TE, expert_TK, mask_BS, entropy_T=entropy_of(share_TE), **told)
        if self.settings.learns_from_loss and self.training:
            statistics = statistics._replace(feedback_TX=expert_TK.to(logits_TE.dtype))
        return Routing(
            **rows_by_token(expert_TK, weight_TK * self.settings.routed_scaling_factor, self.num_experts),
            logits_TE=logits_TE,
            statistics=statistics,
        )

    def log_probabilities(self, logits_TE: Tensor) -> Tensor:
        if self.settings.score == "softmax":
            return super().log_probabilities(logits_TE)
        score_TE = torch.nn.functional.logsigmoid(logits_TE)
        return score_TE - score_TE.logsumexp(-1, keepdim=True)

    def _choose(self, biased_TE: Tensor) -> Tensor:
        """The best K experts of the best P groups, (T, K); a group is as good as its two best experts."""
        groups, allowed = self.settings.n_group, self.settings.topk_group
        closed_TE = self.closed(biased_TE)
        if closed_TE is not None:  # behind all others, whatever their bias
            biased_TE = biased_TE.masked_fill(closed_TE, _LAST)
        if allowed < groups:
            best_TG = biased_TE.unflatten(-1, (groups, -1)).topk(2, dim=-1).values.sum(-1)
            biased_TE = close_groups(biased_TE, best_TG, allowed)
        return biased_TE.topk(self.top_k, dim=-1).indices

    def feedback(self, statistics: RoutingStatistics, losses: TokenLosses) -> RoutingStatistics:
        """With the sum of its tokens' losses for each expert."""
        expert_TK = statistics.feedback_TX.long()
        loss_TK = torch.where(losses.targets_T, losses.of_tokens(), 0.0)[:, None].expand(expert_TK.shape)
        sum_E = torch.zeros_like(statistics.extra_X).index_add(
            0, expert_TK.flatten(), loss_TK.flatten().to(statistics.extra_X)
        )
        return statistics._replace(extra_X=sum_E)

    def after_step(self, total: RoutingStatistics) -> None:
        counts_E, rate = total.tokens_per_expert_E, self.settings.update_rate
        losses, time = self.settings.loss_share, self.settings.time_share
        if not losses + time:
            self.e_score_correction_bias += rate * (counts_E.mean() - counts_E).sign()
            return
        load_E = (1 - losses - time) * _relative(counts_E)
        if losses:
            load_E = load_E + losses * _relative(total.extra_X)
        if time:
            load_E = load_E + time * _relative(counts_E * counts_E.new_tensor(self.relative_sizes))
        self.e_score_correction_bias += rate * (1 - load_E).clamp(-1, 1)


def _relative(amount_E: Tensor) -> Tensor:
    """Over the even share; 1 of nothing."""
    mean = amount_E.mean()
    return torch.where(mean > 0, amount_E / mean.clamp(min=torch.finfo(amount_E.dtype).tiny), 1.0)
