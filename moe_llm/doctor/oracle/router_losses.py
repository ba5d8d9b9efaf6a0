"""Losses of the routers, from the papers' formulas, on routers' logits.

Dimensions: L layers, T real tokens, E experts.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F


class Routed(NamedTuple):
    """What the routers made of real tokens; chosen: 1 for each of a token's experts, else 0; row_T: the packed row that
    a token stood in."""

    logits_LTE: torch.Tensor
    probability_LTE: torch.Tensor
    chosen_LTE: torch.Tensor
    row_T: torch.Tensor


def routed(logits_LTE: torch.Tensor, top_k: int, row_T: torch.Tensor) -> Routed:
    """Softmax over the experts, of which each token takes the `top_k` most probable."""
    probability_LTE = logits_LTE.softmax(-1)
    chosen = probability_LTE.topk(top_k, dim=-1).indices
    return Routed(logits_LTE, probability_LTE, F.one_hot(chosen, logits_LTE.shape[-1]).sum(2).float(), row_T)


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
