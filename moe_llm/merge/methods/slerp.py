"""Spherical interpolation from the base (t=0) to the other model (t=1), each tensor as one vector.

Shoemake 1985: (sin((1-t) a) v0 + sin(t a) v1) / sin a, a the angle between them. Vectors that are almost in line
(|cos a| above 0.9995), where this is ill-conditioned, are interpolated linearly.
"""

import math

import torch

from moe_llm.merge.job import OPPOSED, Combine, Job
from moe_llm.merge.parameters import Parameter

PARAMETERS = {"t": Parameter()}
_IN_LINE = 0.9995
_TINY = 1e-8


def start(job: Job) -> Combine:
    first, second = job.origin, job.tasks[0]
    t = job.shared["t"]
    squares, product = torch.zeros(2, dtype=torch.float64), 0.0
    for _, parts in job.spans():
        a, b = parts[first].double(), parts[second].double()
        squares += torch.stack([a @ a, b @ b])
        product += (a @ b).item()
    norms = [math.sqrt(square) for square in squares.tolist()]
    cosine = product / math.prod(norm if norm > _TINY else 1.0 for norm in norms)
    if abs(cosine) > _IN_LINE:
        shares = 1 - t, t
        if cosine < 0:
            job.notes.append(OPPOSED)
    else:
        angle = math.acos(cosine)
        shares = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)

    def combine(_: int, parts: list[torch.Tensor]) -> torch.Tensor:
        return parts[first] * shares[0] + parts[second] * shares[1]

    return combine
