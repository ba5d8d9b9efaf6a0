"""What the methods on task vectors share: theta = base + lambda * mix_i(w_i * thinned(theta_i - base)).

`thin` is what a method does to one task vector before it is weighed: it gets a span of it, the index of its input
and where the span starts. With `elect`, TIES's sign election and disjoint mean (Yadav et al. 2023, equations of
section 3): per element, the sign of the weighted sum wins and the others are left out.
"""

from collections.abc import Callable

import torch

from moe_llm.merge.job import Combine, Job, check_sum
from moe_llm.merge.parameters import Parameter

Thin = Callable[[int, int, torch.Tensor], torch.Tensor]
_TINY = 1e-6  # of the sum of the weights' magnitudes


def parameters(*, normalize: bool, density: bool = True, rescale: bool | None = None) -> dict[str, Parameter]:
    """What these methods take; `normalize` and `rescale` are the defaults, `rescale=None` for those without it."""
    table = {
        "weight": Parameter("task"),
        "normalize": Parameter(default=normalize, kind=bool),
        "lambda": Parameter(default=1.0),
        # a byte for each element of a mask is all that a span ever takes here: on or off, it is the same
        "int8_mask": Parameter(default=False, kind=bool),
    }
    if density:
        table["density"] = Parameter("task", default=1.0, low=0.0, high=1.0)
    if rescale is not None:
        table["rescale"] = Parameter(default=rescale, kind=bool)
    return table


def mix(job: Job, thin: Thin | None, *, elect: bool) -> Combine:
    """The method that thins task vectors by `thin` (None: leaves them) and adds them, after an election or not."""
    weights = [job.inputs[i].parameters["weight"] for i in job.tasks]
    least = _TINY * sum(map(abs, weights))

    def combine(start: int, parts: list[torch.Tensor]) -> torch.Tensor:
        base = parts[job.origin]
        deltas = [parts[i] - base for i in job.tasks]
        if thin is not None:
            deltas = [thin(i, start, delta) for i, delta in zip(job.tasks, deltas)]
        deltas = [delta * weight for delta, weight in zip(deltas, weights)]
        if not deltas:
            return base
        total, divisor = _elected(deltas, weights) if elect else (_sum(deltas), torch.tensor(float(sum(weights))))
        if job.shared["normalize"]:
            # winners whose weights cancel are not divided: nothing is left of their sum but rounding
            total = total / torch.where(divisor.abs() <= least, 1.0, divisor)
        return base + total * job.shared["lambda"]

    return combine


def check(job: Job) -> None:
    """Weights that cannot be normalised are refused before anything is written."""
    weights = [job.inputs[i].parameters["weight"] for i in job.tasks]
    if job.shared["normalize"] and any(weights):
        check_sum(job, weights)


def rescaled(job: Job, thin: Thin) -> Thin:
    """The same thinning, after which each task vector has the L1 norm that it had before."""
    sums = torch.zeros(len(job.inputs), 2, dtype=torch.float64)
    for start, parts in job.spans():
        for i in job.tasks:
            delta = parts[i] - parts[job.origin]
            sums[i] += torch.stack([delta.abs().sum(), thin(i, start, delta).abs().sum()])
    factors = [before / after if after > 0 else 1.0 for before, after in sums.tolist()]
    return lambda i, start, delta: thin(i, start, delta) * factors[i]


def _elected(deltas: list[torch.Tensor], weights: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over the winners of each element, and the sum of their weights."""
    positive = _sum(deltas) >= 0
    total, divisor = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights):
        won = torch.where(positive, delta > 0, delta < 0)
        total.add_(torch.where(won, delta, 0.0))
        divisor.add_(won, alpha=weight)
    return total, divisor


def _sum(parts: list[torch.Tensor]) -> torch.Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total.add_(part)
    return total
