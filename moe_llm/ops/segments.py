"""Sequences cut into segments of equal length, each of which reads what the one before it holds.

Dimensions: B sequences, S positions, L tokens a segment, G = (S - 1) // L: the most whole segments of a sequence that
have another after them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Segments(NamedTuple):
    """source_BGL: the places of the tokens of each whole segment that has another after it, as far as there are such
    segments (`formed_BG`); reader_BGL: of the tokens of the segment after it, as far as there are. read_BS: where in
    (G * L) a token reads; G * L for one of the first segment of its document and for padding."""

    source_BGL: Tensor
    reader_BGL: Tensor
    formed_BG: Tensor
    read_BS: Tensor


def segments(mask_BS: Tensor, document_BS: Tensor | None, length: int) -> Segments:
    """The segments of `length` tokens of each document, counted from its first token; padding is in none.

    document_BS: a number for each position; a document is a run of one number. None: a sequence is one document. No
    host sync.
    """
    sequences, positions = mask_BS.shape
    groups, device = (positions - 1) // length, mask_BS.device
    rank_BS = mask_BS.cumsum(1) - 1  # among the real tokens of the sequence
    nth_BS = rank_BS
    if document_BS is not None:  # from each document's first token on
        begins_BS = F.pad(document_BS[:, 1:] != document_BS[:, :-1], (1, 0), value=True)
        before_BS = rank_BS - mask_BS.long() + 1  # real tokens to the left
        nth_BS = rank_BS - (before_BS * begins_BS).cummax(1).values
    reads_BS = mask_BS & (nth_BS >= length)
    opens_BS = reads_BS & (nth_BS % length == 0)
    group_BS = opens_BS.cumsum(1) - 1
    place_S = torch.arange(positions, device=device).expand_as(rank_BS)
    # columns of their own take what is not asked for
    place_by_rank_BS = place_S.new_zeros(sequences, positions + 1).scatter_(
        1, rank_BS.masked_fill(~mask_BS, positions), place_S
    )
    first_BG = rank_BS.new_zeros(sequences, groups + 1).scatter_(1, group_BS.masked_fill(~opens_BS, groups), rank_BS)[
        :, :groups, None
    ]
    step_L = torch.arange(length, device=device)

    def places(rank_BGL: Tensor) -> Tensor:
        return place_by_rank_BS.gather(1, rank_BGL.clamp(0, positions - 1).flatten(1)).view_as(rank_BGL)

    return Segments(
        source_BGL=places(first_BG - length + step_L),
        reader_BGL=places(first_BG + step_L),
        formed_BG=torch.arange(groups, device=device) < opens_BS.sum(1, keepdim=True),
        read_BS=torch.where(reads_BS, group_BS * length + nth_BS % length, groups * length),
    )


def gather_places(x_BSD: Tensor, place_BGL: Tensor) -> Tensor:
    """The rows at some places of each sequence, (B, G, L, D)."""
    sequences, positions, _ = x_BSD.shape
    row_BGL = place_BGL + torch.arange(sequences, device=place_BGL.device)[:, None, None] * positions
    return x_BSD.flatten(0, 1).index_select(0, row_BGL.flatten()).view(*place_BGL.shape, x_BSD.shape[-1])
