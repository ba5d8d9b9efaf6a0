"""Inner products between the inputs of a tensor, of the whole or of each of its lines, gathered in one pass.

Dimensions: R lines (1 for a whole tensor), k vectors.
"""

import math
from collections.abc import Callable

import torch

from moe_llm.merge.job import Job

Vectors = Callable[[list[torch.Tensor]], list[torch.Tensor]]
LineOf = Callable[[int, int], torch.Tensor]


def gram(
    job: Job, vectors: Vectors, columns: int | None, lines: int | None = None, line_of: LineOf | None = None
) -> torch.Tensor:
    """fp64 (R, k, k). `vectors`, of a span of every input, are what is multiplied.

    Args:
        columns: length of a row; None: the tensor is one.
        lines, line_of: how many lines that are no rows there are, and which one each element of a span is in.
    """
    if line_of is None:
        count = 1 if columns is None else math.prod(job.shape) // columns
    else:
        assert lines is not None, "lines are counted where they are given"
        count = lines
    found_Rkk = None
    for start, parts in job.spans():
        span_kn = torch.stack(vectors(parts)).double()
        if found_Rkk is None:
            found_Rkk = span_kn.new_zeros(count, len(span_kn), len(span_kn))
        if count == 1:
            found_Rkk[0] += span_kn @ span_kn.T
            continue
        length = span_kn.shape[1]
        line_n = rows_of(start, length, columns) if line_of is None else line_of(start, length)
        found_Rkk.index_add_(0, line_n, torch.einsum("an,bn->nab", span_kn, span_kn))
    assert found_Rkk is not None, f"{job.name} has no elements"
    return found_Rkk


def rows_of(start: int, length: int, columns: int | None) -> torch.Tensor:
    """The row of each element of a span, int64."""
    place = torch.arange(start, start + length)
    return torch.zeros_like(place) if columns is None else place // columns
