"""Losses of the routers, from the papers' formulas, on routers' logits.

Dimensions: L layers, T real tokens, E experts, K choices of a token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from moe_llm.doctor.oracle.choices import Choice


class Routed(NamedTuple):
    """What the routers made of real tokens, layer by layer (`choices.Choice`). row_T: the packed row that a token stood
    in. own_LX: sums for the losses of routers that learn from the tokens' losses, X is 0 for the others."""

    probability_LTE: torch.Tensor
    chosen_LTE: torch.Tensor
    weight_LTE: torch.Tensor
    z_LT: torch.Tensor
    logits_LTE: torch.Tensor
    load_LTE: torch.Tensor | None
    row_T: torch.Tensor
    own_LX: torch.Tensor

    @classmethod
    def of(cls, layers: Sequence[Choice], row_T: torch.Tensor, own_LX: torch.Tensor | None = None) -> "Routed":
        """own_LX: see above; None: there are none."""
        loads = [choice.load_TE for choice in layers if choice.load_TE is not None]
        return cls(
            torch.stack([choice.probability_TE for choice in layers]),
            torch.stack([choice.chosen_TE for choice in layers]),
            torch.stack([choice.weight_TE for choice in layers]),
            torch.stack([choice.z_T for choice in layers]),
            torch.stack([choice.logits_TE for choice in layers]),
            torch.stack(loads) if loads else None,
            row_T,
            torch.zeros(len(layers), 0) if own_LX is None else own_LX,
        )

    def tied(self, top_k: int) -> bool:
        """Whether some token's last choice and the next expert are equal but for rounding: the gradient through the border
        between them is then not unique."""
        if top_k == self.logits_LTE.shape[-1]:
            return False
        best_LTK = self.logits_LTE.detach().topk(top_k + 1, dim=-1).values
        return bool((best_LTK[..., -2] - best_LTK[..., -1] <= 1e-6 * best_LTK.abs().amax(-1)).any())


def z_loss_part(part: Routed, tokens: int) -> torch.Tensor:
    """These tokens' summand of the mean over `tokens` and layers of logsumexp(logits)^2
    (Zoph et al. 2022, equation 5)."""
    return part.z_LT.sum(1).mean() / tokens


def balance_part(part: Routed, counted_LTE: torch.Tensor, tokens: int) -> torch.Tensor:
    """These tokens' summand of the balance loss E * sum_e f_e P_e (Fedus et al. 2021, equations 4 to 6), a token's
    top-k choices counted one each, averaged over the layers.

    Args:
        counted_LTE: the choices of the tokens whose fractions f_e are used.
        tokens: all that share the loss.
    """
    mean_LE = part.probability_LTE.sum(1) / tokens
    return part.probability_LTE.shape[-1] * (counted_LTE.mean(1) * mean_LE).sum(-1).mean()


def balance_part_by_sequence(part: Routed, rows: int) -> torch.Tensor:
    """The same formed for each sequence by itself and averaged over `rows` of them
    (DeepSeek-AI 2024, equations 17 to 20)."""
    products = [
        (part.chosen_LTE[:, mine].mean(1) * part.probability_LTE[:, mine].mean(1)).sum(-1).mean()
        for mine in (part.row_T == row for row in part.row_T.unique())
    ]
    return part.probability_LTE.shape[-1] * torch.stack(products).sum() / rows


def balance_pooled(part: Routed) -> torch.Tensor:
    """The same with the tokens of all layers pooled, as transformers' `load_balancing_loss_func` has it."""
    fraction_E, mean_E = part.chosen_LTE.mean((0, 1)), part.probability_LTE.mean((0, 1))
    return part.probability_LTE.shape[-1] * (fraction_E * mean_E).sum()


@dataclass
class Sums:
    """Over tokens, for each layer: all that a router's own losses are functions of."""

    tokens: float
    chosen_LE: torch.Tensor
    probability_LE: torch.Tensor
    weight_LE: torch.Tensor
    load_LE: torch.Tensor
    entropy_L: torch.Tensor
    own_LX: torch.Tensor

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
            part.own_LX,
        )

    def each(self, function: Callable[..., torch.Tensor], *others: "Sums", tokens: float) -> "Sums":
        names = ("chosen_LE", "probability_LE", "weight_LE", "load_LE", "entropy_L", "own_LX")
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
    if router.type == "reinforce":
        found.append(OwnLoss("policy_loss", router.policy_coef, lambda sums: sums.own_LX[:, 0] / sums.tokens))
        if router.baseline == "learned":
            found.append(OwnLoss("baseline_loss", router.baseline_coef, lambda sums: sums.own_LX[:, 1] / sums.tokens))
    if router.type == "em":
        found += [
            OwnLoss("gate_m_step_loss", router.gate_coef, lambda sums: sums.own_LX[:, 0] / sums.tokens),
            OwnLoss("expert_m_step_loss", router.expert_coef, lambda sums: sums.own_LX[:, 1] / sums.tokens),
        ]
    return [loss for loss in found if loss.coefficient]


def values_of(losses: Sequence[OwnLoss], part: Routed, seen: Sums, tokens: int) -> torch.Tensor:
    """The losses of the tokens that have been seen, scaled up to all `tokens`, with the gradient that those of `part` have
    in it."""
    whole = seen.each(
        lambda all_, mine: all_ * tokens / seen.tokens + mine - mine.detach(), Sums.of(part), tokens=tokens
    )
    return torch.stack([loss.value(whole).mean() for loss in losses])


def added(seen: Sums | None, more: Sums) -> Sums:
    """Without gradient."""
    if seen is None:
        return more.each(lambda mine: mine.detach(), tokens=more.tokens)
    return seen.each(lambda all_, mine: all_ + mine.detach(), more, tokens=seen.tokens + more.tokens)


@dataclass
class Seen:
    """What routers made of the rounds up to the present one, or of all of them."""

    chosen: list[torch.Tensor] = field(default_factory=list)
    own: Sums | None = None
    lowest: list[tuple[torch.Tensor, int]] = field(default_factory=list)
    tied: bool = False
