"""What routers move after a step without a gradient, from their papers' rules.

Dimensions: L sparse layers, E experts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moe_llm.config import ModelConfig
from moe_llm.doctor.oracle.router_losses import Routed, Sums


def move_buffers(
    config: ModelConfig,
    buffers: Mapping[str, torch.Tensor],
    seen: Sums,
    lowest: Sequence[tuple[torch.Tensor, int]],
) -> None:
    """Move each, in place.

    Args:
        buffers: of routers by name, in the order of the layers.
        seen: sums over the tokens of the step.
        lowest: sums over some documents of the lowest probability that each expert took, (L, E), and how many documents.
    """
    router: Any = config.router
    for layer, buffer in enumerate(buffers.values()):
        count_E = seen.chosen_LE[layer]
        if router.type == "bias_balanced":  # Wang et al. 2024, algorithm 1
            if router.loss_share:  # by how much is too much, of tokens and of their losses
                parts = (1 - router.loss_share, count_E), (router.loss_share, seen.own_LX[layer])
                load_E = sum(share * amount_E / amount_E.mean() for share, amount_E in parts)
                buffer += router.update_rate * (1 - load_E).clamp(-1, 1)
            else:
                buffer += router.update_rate * torch.sign(count_E.mean() - count_E)
        elif router.type == "expert_choice":
            mean_E = sum(sum_LE[layer] for sum_LE, _ in lowest) / sum(documents for _, documents in lowest)
            moved_E = buffer + router.threshold_rate * (mean_E - buffer)
            buffer.copy_(torch.where(buffer == 0, mean_E, moved_E))
        elif router.type == "reinforce":
            share_E = count_E / count_E.sum()
            buffer.copy_(share_E if not buffer.any() else buffer + router.load_rate * (share_E - buffer))


def lowest_taken(config: ModelConfig, part: Routed, sizes: list[int]) -> list[tuple[torch.Tensor, int]]:
    """Of experts that choose: (sums over the documents of the lowest probability that each took, (L, E), and how many
    documents there are); nothing of other routers."""
    if config.router.type != "expert_choice":
        return []
    taken_LTE = part.probability_LTE.detach().where(part.chosen_LTE > 0, torch.inf)
    return [(torch.stack([one_LnE.amin(1) for one_LnE in taken_LTE.split(sizes, 1)]).sum(0), len(sizes))]
