"""Weighted average: model soups (Wortsman et al. 2022) where all weights are alike.

theta = sum_i w_i theta_i, divided by sum_i w_i unless `normalize` is false.
"""

import torch

from moe_llm.merge.job import Combine, Job, check_sum
from moe_llm.merge.parameters import Parameter

PARAMETERS = {"weight": Parameter("input"), "normalize": Parameter(default=True, kind=bool)}


def start(job: Job) -> Combine:
    weights = [item.parameters["weight"] for item in job.inputs]
    total = sum(weights)

    def combine(_: int, parts: list[torch.Tensor]) -> torch.Tensor:
        result = parts[0] * weights[0]
        for part, weight in zip(parts[1:], weights[1:]):
            result.add_(part, alpha=weight)
        return result.div_(total) if job.shared["normalize"] else result

    return combine


def check(job: Job) -> None:
    """Weights that cannot be normalised are refused before anything is written."""
    if job.shared["normalize"]:
        check_sum(job, [item.parameters["weight"] for item in job.inputs])
