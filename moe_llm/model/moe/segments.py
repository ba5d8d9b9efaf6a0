"""Sequences cut into segments of equal length, document by document.

Dimensions: B sequences, S positions, T = B*S tokens, G segments of L tokens, D hidden.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_llm.model.moe.capacity import Groups
from moe_llm.ops import host
from moe_llm.ops.segments import gather_places


class Segments(NamedTuple):
    """How tokens lie in segments: the real tokens of each document in their order, the last segment of a document
    filled up, so that segments are the same with any padding and in any block.

    source_BGL: position of the token at each place, int64. place_BS1: the inverse, any place for padding.
    mask_BGL: bool, where there is a real token. opens_BG: bool, which segments are the first of a document.
    """

    source_BGL: Tensor
    place_BS1: Tensor
    mask_BGL: Tensor
    opens_BG: Tensor

    @staticmethod
    def cut(mask_BS: Tensor, length: int, document_BS: Tensor | None = None) -> "Segments":
        """Segments of `length` tokens, or one of S where that is less; `mask_BS` (bool) says what is no padding. A
        document is a run of one number in `document_BS`; None: a sequence is one, and nothing is asked of the device.
        """
        sequences, positions = mask_BS.shape
        length = max(1, min(length, positions))
        groups = Groups.of(mask_BS, document_BS)
        nth_BS = groups.rank()
        opens_BS = mask_BS & (nth_BS % length == 0)
        segment_BS = (opens_BS.cumsum(1) - 1).clamp(min=0)
        number = -(-positions // length)
        if document_BS is not None:
            number = int(host.read(opens_BS.sum(1).amax(), "segments of a block", number))
        number = max(1, number)
        place_BS = (segment_BS * length + nth_BS % length).masked_fill(~mask_BS, number * length)
        position_BS = torch.arange(positions, device=mask_BS.device).expand_as(place_BS)
        # one more column takes the padding
        source_BP = place_BS.new_full((sequences, number * length + 1), -1).scatter_(1, place_BS, position_BS)
        source_BGL = source_BP[:, :-1].unflatten(1, (number, length))
        opening_BS = (segment_BS + 1) * (opens_BS & (nth_BS == 0))
        opens_BG = F.one_hot(opening_BS, number + 1)[..., 1:].any(1)
        return Segments(
            source_BGL.clamp(min=0), place_BS.masked_fill(~mask_BS, 0)[..., None], source_BGL >= 0, opens_BG
        )

    def split(self, x_TD: Tensor) -> Tensor:
        """Tokens in their segments, (B, G, L, D), zero where a segment is filled up."""
        x_BGLD = gather_places(x_TD.unflatten(0, self.place_BS1.shape[:2]), self.source_BGL)
        return x_BGLD.masked_fill(~self.mask_BGL[..., None], 0)

    def join(self, x_BGLD: Tensor) -> Tensor:
        """The inverse, (T, D), zero for padding."""
        return gather_places(x_BGLD.flatten(1, 2), self.place_BS1).flatten(0, 2)
