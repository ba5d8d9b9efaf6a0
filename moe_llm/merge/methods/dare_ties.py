"""DARE (Yu et al. 2023) in place of TIES's trim: random drops, then sign election and disjoint mean."""

from moe_llm.merge.job import Combine, Job
from moe_llm.merge.methods import deltas
from moe_llm.merge.methods.dare import drops

PARAMETERS = deltas.parameters(normalize=False, rescale=True)


def start(job: Job) -> Combine:
    return deltas.mix(job, drops(job), elect=True)
