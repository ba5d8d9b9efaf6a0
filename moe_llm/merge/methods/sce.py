"""SCE (Wan et al. 2024, "FuseChat", section 3.3): select, calculate, erase.

Select: of a tensor the elements in which the task vectors vary most, the floor(select_topk * n) of the n that vary at
all. Calculate: a task vector weighs as the mean square of what is selected of it. Erase: per element, those whose sign
is not that of the sum.
"""

import torch

from moe_llm.merge.job import Combine, Job
from moe_llm.merge.methods.ties import Trim, settle
from moe_llm.merge.parameters import Parameter

PARAMETERS = {
    "select_topk": Parameter(default=1.0, low=0.0, high=1.0),
    # a byte for each element of a mask is all that a span ever takes here: on or off, it is the same
    "int8_mask": Parameter(default=False, kind=bool),
}
_TINY = 1e-6


def start(job: Job) -> Combine:
    select = _selection(job)
    squares = torch.zeros(len(job.tasks), dtype=torch.float64)
    numel = 0
    for _, parts in job.spans():
        selected = _tasks(job, parts) * select.mask(_variance(job, parts))
        squares += selected.double().square().sum(1)
        numel += selected.shape[1]
    select.again()
    means = squares / max(numel, 1)
    total = means.sum().item()
    weights = torch.full_like(means, 1 / max(len(means), 1)) if total < _TINY else means / total

    def combine(_: int, parts: list[torch.Tensor]) -> torch.Tensor:
        if not job.tasks:
            return parts[job.origin]
        selected = _tasks(job, parts) * select.mask(_variance(job, parts))
        positive = selected.sum(0) >= 0
        agree = torch.where(positive, selected > 0, selected < 0) * weights.float()[:, None]
        return parts[job.origin] + (selected * agree).sum(0) / agree.sum(0).clamp(min=_TINY)

    return combine


def _selection(job: Job) -> Trim:
    """Settled on the elements of highest variance."""
    varying = numel = 0
    for _, parts in job.spans():
        variance = _variance(job, parts)
        varying, numel = varying + int(variance.count_nonzero()), numel + len(variance)
    share = job.shared["select_topk"]
    select = Trim(numel, numel if share >= 1 else int(varying * share))
    settle(job, {0: select}, lambda _, parts: _variance(job, parts))
    return select


def _tasks(job: Job, parts: list[torch.Tensor]) -> torch.Tensor:
    return (
        torch.stack([parts[i] - parts[job.origin] for i in job.tasks]) if job.tasks else parts[job.origin][None, :][:0]
    )


def _variance(job: Job, parts: list[torch.Tensor]) -> torch.Tensor:
    return _tasks(job, parts).var(0, correction=0) if job.tasks else torch.zeros_like(parts[job.origin])
