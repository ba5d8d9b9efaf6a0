"""Losses of the routers, from the papers' formulas, on routers' logits.

Dimensions: L layers, T real tokens, E experts, K choices of a token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


class Routed(NamedTuple):
    """What the routers made of real tokens; chosen: 1 for each of a token's experts, else 0; weight: what its output is
    multiplied by; row_T: the packed row that a token stood in. load: the probability that an expert would be chosen if
    its noise were drawn again, where routers have noise (Shazeer et al. 2017)."""

    logits_LTE: torch.Tensor
    probability_LTE: torch.Tensor
    chosen_LTE: torch.Tensor
    weight_LTE: torch.Tensor
    row_T: torch.Tensor
    load_LTE: torch.Tensor | None = None

    def tied(self, top_k: int) -> bool:
        """Whether some token's last choice and the next expert are equal but for rounding: the gradient through the border
        between them is then not unique."""
        if top_k == self.logits_LTE.shape[-1]:
            return False
        best_LTK = self.logits_LTE.detach().topk(top_k + 1, dim=-1).values
        return bool((best_LTK[..., -2] - best_LTK[..., -1] <= 1e-6 * best_LTK.abs().amax(-1)).any())


def choice(logits_TE: torch.Tensor, top_k: int, router: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(experts, their weights, whether they are taken at all), each (T, K), by the softmax over the experts.

    The weights are divided by their sum in Mixtral, GShard and noisy top-k gating (Shazeer et al. 2017, equation 3), and
    taken as they are in Switch (Fedus et al. 2021, equation 2), V-MoE (Riquelme et al. 2021, equation 2) and DeepSeekMoE
    (Dai et al. 2024, equation 10). With top-p, experts are taken until their probabilities reach p (Huang et al. 2024,
    equation 5).
    """
    value_TK, expert_TK = logits_TE.softmax(-1).topk(top_k, dim=-1)
    taken_TK = torch.ones_like(expert_TK, dtype=torch.bool)
    if router.type == "top_p":
        taken_TK[:, 1:] = value_TK.cumsum(-1)[:, :-1] < router.p
    divided = {"deepseek_moe": getattr(router, "norm_topk_prob", False)}.get(
        router.type, router.type in ("mixtral", "dense", "gshard", "noisy_top_k")
    )
    weight_TK = value_TK / value_TK.sum(-1, keepdim=True) if divided else value_TK
    return expert_TK, weight_TK * taken_TK * getattr(router, "routed_scaling_factor", 1.0), taken_TK


# The routers whose choice is that of `choice`
OF_SOFTMAX = (
    "mixtral",
    "dense",
    "gshard",
    "noisy_top_k",
    "switch",
    "batch_prioritised",
    "deepseek_moe",
    "top_p",
)


def routed(
    logits_LTE: torch.Tensor,
    top_k: int,
    row_T: torch.Tensor,
    router: Any,
    deviation_LTE: torch.Tensor | None = None,
) -> Routed:
    """Args:
    deviation_LTE: of the noise of each expert, where there is some.
    """
    experts = logits_LTE.shape[-1]
    chosen, weights = [], []
    for logits_TE in logits_LTE:
        expert_TK, weight_TK, taken_TK = choice(logits_TE, top_k, router)
        hot_TKE = F.one_hot(expert_TK, experts)
        chosen.append((hot_TKE * taken_TK[..., None]).sum(1).float())
        weights.append((hot_TKE * weight_TK[..., None]).sum(1))
    load_LTE = None if deviation_LTE is None else _load(logits_LTE, deviation_LTE, top_k)
    return Routed(logits_LTE, logits_LTE.softmax(-1), torch.stack(chosen), torch.stack(weights), row_T, load_LTE)


def _load(logits_LTE: torch.Tensor, deviation_LTE: torch.Tensor, top_k: int) -> torch.Tensor:
    """P(x, e) = Phi((clean_e - kth of the others) / deviation_e), the noise itself being zero
    (Shazeer et al. 2017, equations 8 and 9)."""
    experts = logits_LTE.shape[-1]
    if top_k == experts:
        return torch.ones_like(logits_LTE)
    best_LTK = logits_LTE.topk(top_k + 1, dim=-1)
    chosen = F.one_hot(best_LTK.indices[..., :top_k], experts).sum(-2).bool()
    # the k-th of the others is the (k + 1)-th of all for those that are among the first k
    border_LTE = torch.where(chosen, best_LTK.values[..., top_k:], best_LTK.values[..., top_k - 1 : top_k])
    return torch.distributions.Normal(0.0, 1.0).cdf((logits_LTE - border_LTE) / deviation_LTE)


def z_loss_part(part: Routed, tokens: int) -> torch.Tensor:
    """These tokens' summand of the mean over `tokens` and layers of logsumexp(logits)^2
    (Zoph et al. 2022, equation 5)."""
    return part.logits_LTE.logsumexp(-1).square().sum(1).mean() / tokens


def balance_part(part: Routed, counted_LTE: torch.Tensor, tokens: int) -> torch.Tensor:
    """These tokens' summand of the balance loss E * sum_e f_e P_e (Fedus et al. 2021, equations 4 to 6), a token's
    top-k choices counted one each, averaged over the layers.

    Args:
        counted_LTE: the choices of the tokens whose fractions f_e are used.
        tokens: all that share the loss.
    """
    mean_LE = part.probability_LTE.sum(1) / tokens
    return part.logits_LTE.shape[-1] * (counted_LTE.mean(1) * mean_LE).sum(-1).mean()


def balance_part_by_sequence(part: Routed, rows: int) -> torch.Tensor:
    """The same formed for each sequence by itself and averaged over `rows` of them
    (DeepSeek-AI 2024, equations 17 to 20)."""
    products = [
        (part.chosen_LTE[:, mine].mean(1) * part.probability_LTE[:, mine].mean(1)).sum(-1).mean()
        for mine in (part.row_T == row for row in part.row_T.unique())
    ]
    return part.logits_LTE.shape[-1] * torch.stack(products).sum() / rows


def balance_pooled(part: Routed) -> torch.Tensor:
    """The same with the tokens of all layers pooled, as transformers' `load_balancing_loss_func` has it."""
    fraction_E, mean_E = part.chosen_LTE.mean((0, 1)), part.probability_LTE.mean((0, 1))
    return part.logits_LTE.shape[-1] * (fraction_E * mean_E).sum()


@dataclass
class Sums:
    """Over tokens, for each layer: all that a router's own losses are functions of."""

    tokens: float
    chosen_LE: torch.Tensor
    probability_LE: torch.Tensor
    weight_LE: torch.Tensor
    load_LE: torch.Tensor
    entropy_L: torch.Tensor

    @classmethod
    def of(cls, part: Routed) -> "Sums":
        p_LTE = part.probability_LTE
        return cls(
            p_LTE.shape[1],
            part.chosen_LTE.sum(1),
            p_LTE.sum(1),
            part.weight_LTE.sum(1),
            torch.zeros_like(part.chosen_LTE[:, 0]) if part.load_LTE is None else part.load_LTE.sum(1),
            -(p_LTE * p_LTE.clamp(min=1e-30).log()).sum((1, 2)),
        )

    def each(self, function: Callable[..., torch.Tensor], *others: "Sums", tokens: float) -> "Sums":
        names = ("chosen_LE", "probability_LE", "weight_LE", "load_LE", "entropy_L")
        return Sums(tokens, *(function(*(getattr(sums, name) for sums in (self, *others))) for name in names))


class OwnLoss(NamedTuple):
    """name: as recorded. value: one number for each layer, of all tokens' sums; the loss is their mean."""

    name: str
    coefficient: float
    value: Callable[[Sums], torch.Tensor]


def own_losses(router: Any) -> list[OwnLoss]:
    """Those that a router has beside the balance and the z-loss.

    Args:
        router: `model.router`.
    """

    def mean_entropy(sums: Sums) -> torch.Tensor:
        return sums.entropy_L / sums.tokens

    def entropy_of_mean(sums: Sums) -> torch.Tensor:
        """LIMoE's global loss (Mustafa et al. 2022, section 2.2), with its threshold."""
        mean_LE = sums.probability_LE / sums.tokens
        entropy_L = -(mean_LE * mean_LE.log()).sum(-1)
        threshold = router.global_entropy_threshold
        return -entropy_L if threshold is None else (threshold - entropy_L).clamp(min=0)

    def variation(x_LE: torch.Tensor) -> torch.Tensor:
        """CV(x)^2 (Shazeer et al. 2017, equations 7 and 11)."""
        mean_L1 = x_LE.mean(-1, keepdim=True)
        return (x_LE - mean_L1).square().mean(-1) / mean_L1.squeeze(-1).square()

    def balance(sums: Sums, groups: int | None) -> torch.Tensor:
        """sum f P over experts, or over groups with the mean of f and the sum of P (Dai et al. 2024, equations 12 to
        16)."""
        experts = sums.chosen_LE.shape[-1]
        f_LE = experts * sums.chosen_LE / sums.chosen_LE.sum(-1, keepdim=True)
        p_LE = sums.probability_LE / sums.tokens
        if groups is not None:
            f_LE = f_LE.unflatten(-1, (groups, -1)).mean(-1)
            p_LE = p_LE.unflatten(-1, (groups, -1)).sum(-1)
        return (f_LE * p_LE).sum(-1)

    found = [
        OwnLoss("entropy_bonus", router.entropy_bonus_coef, lambda sums: -mean_entropy(sums)),
        OwnLoss("local_entropy_loss", router.local_entropy_coef, mean_entropy),
        OwnLoss("global_entropy_loss", router.global_entropy_coef, entropy_of_mean),
    ]
    if router.type == "noisy_top_k":
        found += [
            OwnLoss("importance_loss", router.importance_coef, lambda sums: variation(sums.weight_LE)),
            OwnLoss("load_loss", router.load_coef, lambda sums: variation(sums.load_LE)),
        ]
    if router.type == "deepseek_moe":
        found += [
            OwnLoss("expert_balance_loss", router.expert_balance_coef, lambda sums: balance(sums, None)),
            OwnLoss(
                "device_balance_loss", router.device_balance_coef, lambda sums: balance(sums, router.device_groups)
            ),
        ]
    return [loss for loss in found if loss.coefficient]
