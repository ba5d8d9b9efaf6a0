"""Tensors with rows and columns rearranged: experts in another order, neurons in another order.

A tensor of shape (..., C) counts as R rows of C elements; R is the product of all dimensions but the last.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch

from moe_llm.merge.job import Reader


@dataclass(frozen=True)
class Move:
    """Row r of the result is row rows_R[r] of the source.

    columns_BC: its element c is element columns_BC[block of r, c], of B blocks of equally many rows; None: c.
    """

    rows_R: torch.Tensor
    columns_BC: torch.Tensor | None = None


class Moved:
    """A reader whose tensors in `moves` are rearranged."""

    def __init__(self, reader: Reader, moves: dict[str, Move]):
        self.reader, self.moves, self.shapes = reader, moves, reader.shapes

    def dtype(self, name: str) -> torch.dtype:
        return self.reader.dtype(name)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        move = self.moves.get(name)
        if move is None:
            return self.reader.read(name, start, stop)
        C = self.shapes[name][-1]
        first, last = start // C, math.ceil(stop / C)
        x_RC = gather(self.reader, name, move.rows_R[first:last])
        if move.columns_BC is not None:
            blocks = torch.arange(first, last) // (len(move.rows_R) // len(move.columns_BC))
            x_RC = x_RC.gather(1, move.columns_BC[blocks])
        return x_RC.reshape(-1)[start - first * C : stop - first * C]


def gather(reader: Reader, name: str, rows_R: torch.Tensor) -> torch.Tensor:
    """Rows of a tensor, (R, C); neighbours that lie side by side are read together."""
    C = reader.shapes[name][-1]
    x_RC = torch.empty(len(rows_R), C, dtype=reader.dtype(name))
    breaks = (rows_R.diff() != 1).nonzero()[:, 0] + 1
    edges = [0, *breaks.tolist(), len(rows_R)]
    for begin, end in pairwise(edges):
        if end > begin:
            row = int(rows_R[begin])
            x_RC[begin:end] = reader.read(name, row * C, (row + end - begin) * C).view(-1, C)
    return x_RC
