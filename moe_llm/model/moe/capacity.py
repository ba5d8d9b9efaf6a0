"""A bound on how many rows an expert takes from each group of tokens: a document, or a whole sequence.

Dimensions: B sequences, S positions, R choices of a token in falling preference, E experts, K experts per token.
"""

import math
from fractions import Fraction
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def capacity_of(factor: float, tokens: int, top_k: int, num_experts: int) -> int:
    """Rows that an expert takes from a group of `tokens` real tokens: `factor` times its even share, rounded up
    (Lepikhin et al. 2020, section 2.2)."""
    share = _share(factor, top_k, num_experts)
    return math.ceil(share * tokens)


def _share(factor: float, top_k: int, num_experts: int) -> Fraction:
    """Rows of an expert for each token of a group, as the fraction that the factor is written as: exact in whole numbers,
    on every device alike. Never 0, so that rounded up there is room for one."""
    written = Fraction(factor).limit_denominator(1_000_000) or Fraction(1, 1_000_000)
    return written * top_k / num_experts


class Groups(NamedTuple):
    """The tokens that share room. A group is the real tokens of one document of a sequence, or of the sequence where
    documents are not isolated, so that neither padding nor what else is packed into a block changes its room.

    mask_BS: bool, real tokens. start_BS: position at which the group of each position begins. tokens_BS: int64, real
    tokens of the group.
    """

    mask_BS: Tensor
    start_BS: Tensor
    tokens_BS: Tensor

    @staticmethod
    def of(mask_BS: Tensor, document_BS: Tensor | None = None) -> "Groups":
        """A document is a run of one number in `document_BS`; None: each sequence is one group. No host sync."""
        place_BS = torch.arange(mask_BS.shape[1], device=mask_BS.device).expand(mask_BS.shape)
        if document_BS is None:
            return Groups(mask_BS, torch.zeros_like(place_BS), mask_BS.sum(1, keepdim=True).expand(mask_BS.shape))
        begins_BS = F.pad(document_BS[:, 1:] != document_BS[:, :-1], (1, 0), value=True)
        index_BS = begins_BS.cumsum(1) - 1
        size_BS = torch.zeros_like(index_BS).scatter_add(1, index_BS, mask_BS.long())
        start_BS = torch.where(begins_BS, place_BS, 0).cummax(1).values
        return Groups(mask_BS, start_BS, size_BS.gather(1, index_BS))

    @classmethod
    def unlimited(cls, mask_BS: Tensor) -> "Groups":
        """Where experts have room for all, nothing asks where groups begin or how large they are."""
        return cls(mask_BS, mask_BS, mask_BS)

    def repeat(self, times: int) -> "Groups":
        """Of `times` parts of each token, side by side."""
        mask_BP, start_BP, tokens_BP = (part_BS.repeat_interleave(times, 1) for part_BS in self)
        return Groups(mask_BP, start_BP * times, tokens_BP * times)

    def capacity(self, factor: float, top_k: int, num_experts: int) -> Tensor:
        """`capacity_of` the group of each position, int64 (B, S)."""
        share = min(_share(factor, top_k, num_experts), Fraction(1))  # beyond all tokens there are none to take
        return -(-share.numerator * self.tokens_BS).div(share.denominator, rounding_mode="floor")

    def order(self, score_BS: Tensor) -> Tensor:
        """Positions of each sequence group by group, and within a group by falling score; ties by position. Real
        tokens only compete with each other if padding scores lowest. Groups keep their places."""
        by_score_BS = score_BS.sort(dim=1, descending=True, stable=True).indices
        return by_score_BS.gather(1, self.start_BS.gather(1, by_score_BS).sort(dim=1, stable=True).indices)

    def rank(self) -> Tensor:
        """How many real tokens of its group come before each position, int64 (B, S)."""
        return self.before(self.mask_BS.long()[..., None])[..., 0]

    def before(self, count_BSX: Tensor) -> Tensor:
        """Sums over the earlier positions of the group."""
        return self.through(count_BSX) - count_BSX

    def through(self, count_BSX: Tensor) -> Tensor:
        """Sums over the group up to each position, which is included."""
        sum_BSX = count_BSX.cumsum(1)
        outside_BSX = (sum_BSX - count_BSX).gather(1, self.start_BS[..., None].expand_as(sum_BSX))
        return sum_BSX - outside_BSX

    def total(self, count_BSX: Tensor) -> Tensor:
        """Sums over the whole group, at each of its positions."""
        start_BSX = self.start_BS[..., None].expand_as(count_BSX)
        return torch.zeros_like(count_BSX).scatter_add(1, start_BSX, count_BSX).gather(1, start_BSX)


def assign_by_position(
    preference_BSR: Tensor,
    groups: Groups,
    top_k: int,
    num_experts: int,
    capacity_BS: Tensor,
    wanted_BSR: Tensor | None = None,
) -> Tensor:
    """Which choices are granted, bool (B, S, R): tokens are served in the order of their positions, each with all of
    its choices, so that what a token gets depends on no later token's choices.

    A token takes the first `top_k` of its choices that have room and are wanted, so R = top_k drops what overflows, and
    a larger R passes it on.

    Until an expert is full, every token gets what it asks for. So all that happens is that experts become full, one
    position after the other and never more than E times in a group: each round finds the next position at which some
    are, and closes them from there on.
    """
    asks_BSR = groups.mask_BS[..., None].expand_as(preference_BSR)
    if wanted_BSR is not None:
        asks_BSR = asks_BSR & wanted_BSR
    closed_BSE = torch.zeros(*groups.mask_BS.shape, num_experts, dtype=torch.bool, device=preference_BSR.device)

    def granted() -> Tensor:
        open_BSR = asks_BSR & ~closed_BSE.gather(-1, preference_BSR)
        return open_BSR & (open_BSR.cumsum(-1) <= top_k)

    if preference_BSR.shape[-1] <= top_k:  # nothing is passed on: an expert serves the first that ask
        asked_BSE = torch.zeros_like(closed_BSE, dtype=torch.int64).scatter_add(-1, preference_BSR, asks_BSR.long())
        return asks_BSR & (groups.before(asked_BSE) < capacity_BS[..., None]).gather(-1, preference_BSR)
    for _ in range(num_experts):
        taken_BSE = torch.zeros_like(closed_BSE, dtype=torch.int64).scatter_add(-1, preference_BSR, granted().long())
        full_BSE = (groups.before(taken_BSE) >= capacity_BS[..., None]) & ~closed_BSE
        any_BS1 = full_BSE.any(-1, keepdim=True).long()
        first_BSE = full_BSE & (groups.through(any_BS1) == 1)
        closed_BSE = closed_BSE | (groups.through(first_BSE.long()) > 0)
    return granted()


def assign_by_choice(
    preference_BSR: Tensor,
    groups: Groups,
    top_k: int,
    num_experts: int,
    capacity_BS: Tensor,
    wanted_BSR: Tensor | None = None,
) -> Tensor:
    """The same in the papers' order: all first choices come before all second ones, and within a choice earlier
    positions before later ones. So a token's second choice may lose its place to a later token's first."""
    granted_BSR = torch.zeros_like(preference_BSR, dtype=torch.bool)
    used_BSE = preference_BSR.new_zeros(*groups.mask_BS.shape, num_experts)
    held_BS = torch.zeros_like(preference_BSR[..., 0])
    for choice in range(preference_BSR.shape[-1]):
        expert_BS = preference_BSR[..., choice]
        asks_BS = groups.mask_BS & (held_BS < top_k)
        if wanted_BSR is not None:
            asks_BS = asks_BS & wanted_BSR[..., choice]
        asked_BSE = F.one_hot(expert_BS, num_experts) * asks_BS[..., None]
        before_BSE = used_BSE + groups.before(asked_BSE)
        fits_BS = asks_BS & (before_BSE.gather(-1, expert_BS[..., None])[..., 0] < capacity_BS)
        granted_BSR[..., choice] = fits_BS
        used_BSE = used_BSE + groups.total(asked_BSE * fits_BS[..., None])
        held_BS = held_BS + fits_BS
    return granted_BSR
