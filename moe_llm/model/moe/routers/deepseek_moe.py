"""DeepSeekMoE's router (Dai et al. 2024): many narrow experts, of which a token takes many.

Fine-grained experts are `num_local_experts` and `num_experts_per_tok` times m, with an m-th of the width; the experts
that are always on are `model.num_shared_experts`. Dimensions: T tokens, E experts, R choices, G groups of experts.
"""

from torch import Tensor

from moe_llm.config.routers import DeepSeekMoESettings, RouterSettings
from moe_llm.model.moe.losses import RouterLoss
from moe_llm.model.moe.router import TokenChoiceRouter, close_groups
from moe_llm.model.moe.routing import RoutingStatistics


class DeepSeekMoERouter(TokenChoiceRouter):
    """Top k of the softmax, weighted by these probabilities as they are (equations 9 to 11), or by their shares.

    Losses: sum over experts of f P, with f the share of the tokens' choices times E, P the mean probability (equations
    12 to 14); and over groups, with a group's f the mean and its P the sum of its experts' (equations 15 and 16).
    """

    Settings = DeepSeekMoESettings
    settings: DeepSeekMoESettings

    def preferred(self, probability_TE: Tensor, choices: int) -> Tensor:
        groups, allowed = self.settings.n_group, self.settings.topk_group
        if allowed < groups:
            best_TG = probability_TE.detach().unflatten(-1, (groups, -1)).amax(-1)
            probability_TE = close_groups(probability_TE.detach(), best_TG, allowed)
        return super().preferred(probability_TE, choices)

    def weights(self, value_TR: Tensor, shared_TR: Tensor) -> Tensor:
        weight_TR = super().weights(value_TR, shared_TR) if self.settings.norm_topk_prob else value_TR
        return weight_TR * self.settings.routed_scaling_factor

    @classmethod
    def losses(cls, settings: RouterSettings) -> list[RouterLoss]:
        assert isinstance(settings, DeepSeekMoESettings)
        found = [
            RouterLoss("expert_balance_loss", settings.expert_balance_coef, lambda s: _balance(s, None)),
            RouterLoss(
                "device_balance_loss", settings.device_balance_coef, lambda s: _balance(s, settings.device_groups)
            ),
        ]
        return [*super().losses(settings), *(loss for loss in found if loss.coefficient)]


def _balance(statistics: RoutingStatistics, groups: int | None) -> Tensor:
    counts_E = statistics.tokens_per_expert_E
    f = len(counts_E) * counts_E / counts_E.sum().clamp(min=1)
    p = statistics.probability_sum_E / statistics.num_tokens.clamp(min=1)
    if groups is not None:
        f, p = f.view(groups, -1).mean(1), p.view(groups, -1).sum(1)
    return (f * p).sum()
