"""DARE, Yu et al. 2023, section 3: drop elements of a task vector at random, rescale the others by 1/density."""

import torch

from moe_llm.merge.job import Job
from moe_llm.merge.methods.deltas import Thin


def drops(job: Job) -> Thin:
    """Thinning that keeps each element with probability `density`, by the recipe's seed."""

    def thin(i: int, start: int, delta: torch.Tensor) -> torch.Tensor:
        density = job.inputs[i].parameters["density"]
        if density >= 1:
            return delta
        if density <= 0:
            return torch.zeros_like(delta)
        kept = torch.rand(len(delta), generator=job.generator(i, start)) < density
        return torch.where(kept, delta / density if job.shared["rescale"] else delta, 0.0)

    return thin
