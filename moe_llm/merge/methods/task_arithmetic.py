"""Task arithmetic, Ilharco et al. 2022: theta = base + lambda * sum_i w_i (theta_i - base).

A negative weight negates a task; analogies are sums of three.
"""

from moe_llm.merge.job import Combine, Job
from moe_llm.merge.methods import deltas

PARAMETERS = deltas.parameters(normalize=False, density=False)


def start(job: Job) -> Combine:
    return deltas.mix(job, None, elect=False)
