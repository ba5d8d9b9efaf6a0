"""Sequences cut into segments of equal length.

Dimensions: B sequences, S positions, T = B*S tokens, G segments of L tokens, D hidden.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_llm.ops.permutation import combine, permute


class Segments(NamedTuple):
    """How tokens lie in segments: a sequence's real tokens first, then its padding, whichever side that was on, so
    that segments are the same with any padding; the last segment may be filled up.

    token_index_T: the token at each place, padding within sequences included. place_T1: the inverse.
    real_BGL: bool, where there is a real token. positions: S.
    """

    token_index_T: Tensor
    place_T1: Tensor
    real_BGL: Tensor
    positions: int

    @staticmethod
    def cut(mask_BS: Tensor, length: int) -> "Segments":
        """Segments of `length` tokens, or one of S where that is less; `mask_BS` (bool) says what is no padding."""
        sequences, positions = mask_BS.shape
        length = max(1, min(length, positions))
        order_BS = (~mask_BS).to(torch.uint8).argsort(dim=-1, stable=True)
        first_B1 = torch.arange(sequences, device=mask_BS.device)[:, None] * positions
        token_index_T = (order_BS + first_B1).flatten()
        place_T1 = torch.empty_like(token_index_T)
        place_T1[token_index_T] = torch.arange(len(token_index_T), device=mask_BS.device)
        fill = -positions % length
        real_BGL = F.pad(mask_BS.gather(1, order_BS), (0, fill)).view(sequences, (positions + fill) // length, length)
        return Segments(token_index_T, place_T1[:, None], real_BGL, positions)

    def split(self, x_TD: Tensor) -> Tensor:
        """Tokens in their segments, (B, G, L, D), zero where a segment is filled up."""
        sequences, segments, length = self.real_BGL.shape
        x_TD = permute(x_TD, self.token_index_T, self.place_T1)
        x_BSD = x_TD.view(sequences, self.positions, x_TD.shape[-1])
        return F.pad(x_BSD, (0, 0, 0, segments * length - self.positions)).unflatten(1, (segments, length))

    def join(self, x_BGLD: Tensor) -> Tensor:
        """The inverse, (T, D)."""
        x_TD = x_BGLD.flatten(1, 2)[:, : self.positions].flatten(0, 1)
        return combine(x_TD, None, self.token_index_T, len(x_TD), self.place_T1)
