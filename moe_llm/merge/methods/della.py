"""DELLA (Deep et al. 2024): random drops of a task vector's elements, the smaller the likelier.

The elements of a row are ranked by magnitude; from the smallest to the largest the probability to be kept rises linearly
from density - epsilon to density + epsilon. With `rescale` the tensor then gets the L1 norm that it had, as mergekit
does; the paper divides each element by its own probability.
"""

import torch

from moe_llm.errors import UserError
from moe_llm.merge.job import Combine, Job
from moe_llm.merge.methods import deltas
from moe_llm.merge.parameters import Parameter

_EPSILON = {"epsilon": Parameter("task", default=0.15, low=0.0, high=0.5)}
PARAMETERS = deltas.parameters(normalize=True, rescale=True) | _EPSILON
LINEAR_PARAMETERS = deltas.parameters(normalize=False, rescale=True) | _EPSILON


def start(job: Job) -> Combine:
    return deltas.mix(job, _drops(job), elect=True)


def start_linear(job: Job) -> Combine:
    """Without an election: the thinned task vectors are added."""
    return deltas.mix(job, _drops(job), elect=False)


def check(job: Job) -> None:
    """Probabilities outside of 0 to 1, and weights that cannot be normalised, are refused before anything is written."""
    deltas.check(job)
    for i in job.tasks:
        density, epsilon = (job.inputs[i].parameters[name] for name in ("density", "epsilon"))
        if 0 < density < 1 and not epsilon < density < 1 - epsilon:
            raise UserError(
                f"epsilon={epsilon:g} with density={density:g} for {job.name} keeps elements with probabilities from "
                f"{density - epsilon:g} to {density + epsilon:g}: lower epsilon below {min(density, 1 - density):g}"
            )


def _drops(job: Job) -> deltas.Thin:
    columns = job.shape[-1]

    def thin(i: int, start: int, delta: torch.Tensor) -> torch.Tensor:
        density, epsilon = (job.inputs[i].parameters[name] for name in ("density", "epsilon"))
        if density >= 1 or not density:
            return delta if density else torch.zeros_like(delta)
        first = start // columns * columns
        rows = _rows(job, i, first, start + len(delta)).view(-1, columns)
        rank = rows.abs().argsort(dim=1, stable=True).argsort(dim=1).float()
        share = rank / (columns - 1) if columns > 1 else torch.zeros_like(rank)
        kept_share = (density - epsilon + 2 * epsilon * share).flatten()[start - first :][: len(delta)]
        kept = torch.rand(len(delta), generator=job.generator(i, start)) < kept_share
        return torch.where(kept, delta, 0.0)

    return deltas.rescaled(job, thin) if job.shared["rescale"] else thin


def _rows(job: Job, i: int, start: int, stop: int) -> torch.Tensor:
    """The whole rows of a task vector from `start`, where one begins, to beyond `stop`."""
    columns = job.shape[-1]
    stop = -(-stop // columns) * columns
    return job.part(i, start, stop) - job.part(job.origin, start, stop)
