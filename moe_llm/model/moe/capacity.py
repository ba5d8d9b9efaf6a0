"""A bound on how many rows an expert takes from each sequence.

Dimensions: B sequences, S positions, R choices of a token in falling preference, E experts, K experts per token.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def capacity_of(factor: float, sequence_length: int, top_k: int, num_experts: int) -> int:
    """Rows that an expert takes from one sequence: `factor` times its even share, rounded up
    (Lepikhin et al. 2020, section 2.2, with the sequence as the group: so it is the same in every layout)."""
    return math.ceil(factor * top_k * sequence_length / num_experts)


def assign(
    preference_BSR: Tensor,
    mask_BS: Tensor,
    top_k: int,
    num_experts: int,
    capacity: int,
    wanted_BSR: Tensor | None = None,
) -> Tensor:
    """Which choices are granted, bool (B, S, R); of those in `wanted_BSR`, where it is given.

    All first choices come before all second ones, and within a choice earlier positions before later ones. A token
    proposes one expert after the other until it has `top_k` or no choice left, so R = top_k drops what overflows, and
    a larger R passes it on to the next expert that has room.
    """
    granted_BSR = torch.zeros_like(preference_BSR, dtype=torch.bool)
    used_BE = preference_BSR.new_zeros(len(preference_BSR), num_experts)
    held_BS = torch.zeros_like(preference_BSR[..., 0])
    for choice in range(preference_BSR.shape[-1]):
        expert_BS = preference_BSR[..., choice]
        asks_BS = mask_BS & (held_BS < top_k)
        if wanted_BSR is not None:
            asks_BS = asks_BS & wanted_BSR[..., choice]
        asked_BSE = F.one_hot(expert_BS, num_experts) * asks_BS[..., None]
        before_BSE = used_BE[:, None] + asked_BSE.cumsum(1) - asked_BSE
        fits_BS = asks_BS & (before_BSE.gather(-1, expert_BS[..., None])[..., 0] < capacity)
        granted_BSR[..., choice] = fits_BS
        used_BE = used_BE + (asked_BSE * fits_BS[..., None]).sum(1)
        held_BS = held_BS + fits_BS
    return granted_BSR
