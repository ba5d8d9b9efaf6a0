"""Sequences that are spread over ranks: what layers ask for that need more than this rank's positions.

Dimensions: B sequences, P ranks that share a sequence, S positions of a sequence that are here (S * P in all), H query
heads, G key-value heads, d head dimension.
"""

from typing import Protocol

from torch import Tensor

from moe_llm.ops.shapes import own_part


class SequenceParts(Protocol):
    """index: which of `size` consecutive parts of each sequence is here."""

    index: int
    size: int

    def heads_for_positions(self, q_BHSd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All positions of a P-th of the heads, for attention: (B, H / P, S * P, d) and keys and values that go with it."""

    def positions_for_heads(self, y_BHSd: Tensor) -> Tensor:
        """The way back: (B, H / P, S * P, d) to (B, H, S, d)."""

    def whole(self, x_BSX: Tensor) -> Tensor:
        """All positions of each sequence, in order, without gradient."""

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks that share the sequences, without gradient."""


def whole(parts: SequenceParts | None, x_BSX: Tensor) -> Tensor:
    """All positions of each sequence; `x_BSX` itself where they are all here."""
    return x_BSX if parts is None else parts.whole(x_BSX)


def own(parts: SequenceParts | None, x_BSX: Tensor) -> Tensor:
    """Of all positions those that are here."""
    return x_BSX if parts is None else own_part(x_BSX, parts.index, parts.size)
