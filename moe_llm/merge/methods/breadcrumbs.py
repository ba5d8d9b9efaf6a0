"""Model breadcrumbs (Davari and Belilovsky 2023): of each task vector neither the largest elements nor the small ones.

Of the n elements of a tensor the floor(gamma * n) largest magnitudes are left out, and of the others the largest kept,
floor(density * n) in all; where these do not fit below the outliers, fewer outliers are left out.
"""

import math

import torch

from moe_llm.merge.job import Combine, Job
from moe_llm.merge.methods import deltas
from moe_llm.merge.methods.ties import Thinned, Trim, settle
from moe_llm.merge.parameters import Parameter

PARAMETERS = deltas.parameters(normalize=False, rescale=False) | {
    "gamma": Parameter("task", default=0.01, low=0.0, high=1.0)
}


class Band:
    """Keeps what one trim keeps and the other does not."""

    def __init__(self, numel: int, density: float, gamma: float):
        wanted = int(density * numel)
        small = max(0, numel - wanted - int(gamma * numel))
        self.inner, self.outliers = Trim(numel, numel - small), Trim(numel, numel - small - wanted)

    def keep(self, delta: torch.Tensor) -> torch.Tensor:
        return torch.where(self.inner.mask(delta) & ~self.outliers.mask(delta), delta, 0.0)

    def again(self) -> None:
        self.inner.again()
        self.outliers.again()


def start(job: Job) -> Combine:
    return deltas.mix(job, _thinned(job), elect=False)


def start_elected(job: Job) -> Combine:
    """In place of TIES's trim: then its sign election."""
    return deltas.mix(job, _thinned(job), elect=True)


def _thinned(job: Job) -> deltas.Thin:
    numel = math.prod(job.shape)
    bands = {i: Band(numel, job.inputs[i].parameters["density"], job.inputs[i].parameters["gamma"]) for i in job.tasks}
    for trims in ({i: band.inner for i, band in bands.items()}, {i: band.outliers for i, band in bands.items()}):
        settle(job, trims, lambda i, parts: parts[i] - parts[job.origin])
    thin = Thinned({i: band.keep for i, band in bands.items()}, [band.again for band in bands.values()])
    return thin.rescaled(job) if job.shared["rescale"] else thin
