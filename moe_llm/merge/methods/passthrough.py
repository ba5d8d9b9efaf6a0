"""Tensors of one model as they are, or times `scale`: layers of several models stacked (Kim et al. 2023)."""

import torch

from moe_llm.merge.job import Combine, Job
from moe_llm.merge.parameters import Parameter

PARAMETERS = {"scale": Parameter("input", default=1.0)}


def start(job: Job) -> Combine:
    scale = job.inputs[0].parameters["scale"]

    def combine(_: int, parts: list[torch.Tensor]) -> torch.Tensor:
        return parts[0] if scale == 1 else parts[0] * scale

    return combine
