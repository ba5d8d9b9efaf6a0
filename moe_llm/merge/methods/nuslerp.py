"""NuSLERP: spherical interpolation of two models, or of their task vectors where there is a base, by their weights.

(sin((1-t) a) v0 + sin(t a) v1) / sin a (Shoemake 1985), t the second one's share of the weights, a the angle between
them: of whole tensors, or with `nuslerp_flatten: false` of each row (the last dimension), and with `nuslerp_row_wise:
true` too of each vector along the first dimension, which are a matrix's columns; for stacked experts it runs over the
experts. The words are mergekit's, and so is that.
"""

import math
from collections.abc import Callable

import torch

from moe_llm.errors import UserError
from moe_llm.merge.job import OPPOSED, Combine, Job, check_sum
from moe_llm.merge.methods.rows import gram, rows_of
from moe_llm.merge.parameters import Parameter

PARAMETERS = {
    "weight": Parameter("task"),
    "nuslerp_flatten": Parameter(default=True, kind=bool),
    "nuslerp_row_wise": Parameter(default=False, kind=bool),
}
_IN_LINE = 1e-8


def start(job: Job) -> Combine:
    first, second = job.tasks
    weights = [job.inputs[i].parameters["weight"] for i in job.tasks]
    t = weights[1] / sum(weights)
    lines = _Lines(job)

    def vectors(parts: list[torch.Tensor]) -> list[torch.Tensor]:
        return [parts[i] if job.base is None else parts[i] - parts[job.base] for i in (first, second)]

    gram_R22 = lines.gram(vectors)
    norm_R2 = gram_R22.diagonal(dim1=1, dim2=2).sqrt().clamp(min=1e-7)
    cosine_R = (gram_R22[:, 0, 1] / norm_R2.prod(1)).clamp(-1, 1)
    in_line_R = 1 - cosine_R.square() <= _IN_LINE**2
    if (in_line_R & (cosine_R < 0)).any():
        job.notes.append(OPPOSED)
    angle_R = torch.where(in_line_R, 0.0, cosine_R).arccos()
    share_R2 = torch.stack([((1 - t) * angle_R).sin(), (t * angle_R).sin()], 1) / angle_R.sin()[:, None]
    share_R2 = torch.where(in_line_R[:, None], share_R2.new_tensor([1 - t, t]), share_R2).float()

    def combine(start: int, parts: list[torch.Tensor]) -> torch.Tensor:
        share_n2 = share_R2[lines.of(start, len(parts[0]))]
        a, b = vectors(parts)
        moved = a * share_n2[:, 0] + b * share_n2[:, 1]
        return moved if job.base is None else parts[job.base] + moved

    return combine


def check(job: Job) -> None:
    """What the switches do not say together is refused before anything is written."""
    if job.shared["nuslerp_row_wise"] and job.shared["nuslerp_flatten"]:
        raise UserError("nuslerp_row_wise=true does nothing with nuslerp_flatten=true: set nuslerp_flatten: false")
    if len(job.tasks) != 2:
        raise UserError(f"nuslerp interpolates between two models, and {len(job.tasks)} are not the base: give two")
    check_sum(job, [job.inputs[i].parameters["weight"] for i in job.tasks], "change the weights")


class _Lines:
    """The vectors that a tensor consists of: itself, its rows, or those along its first dimension."""

    def __init__(self, job: Job):
        self.job, self.columns = job, job.shape[-1]
        self.whole = job.shared["nuslerp_flatten"] or (job.shared["nuslerp_row_wise"] and len(job.shape) == 1)
        self.number = math.prod(job.shape[1:])  # of vectors along the first dimension
        self.along_first = not self.whole and job.shared["nuslerp_row_wise"]

    def of(self, start: int, length: int) -> torch.Tensor:
        """The vector of each element of a span."""
        if self.along_first:
            return torch.arange(start, start + length) % self.number
        return rows_of(start, length, None if self.whole else self.columns)

    def gram(self, vectors: Callable[[list[torch.Tensor]], list[torch.Tensor]]) -> torch.Tensor:
        if not self.along_first:
            return gram(self.job, vectors, None if self.whole else self.columns)
        return gram(self.job, vectors, None, self.number, self.of)
