"""DARE (Yu et al. 2023) and then task arithmetic: the thinned task vectors are weighed and added."""

from moe_llm.merge.job import Combine, Job
from moe_llm.merge.methods import deltas
from moe_llm.merge.methods.dare import drops

PARAMETERS = deltas.parameters(normalize=False, rescale=True)


def start(job: Job) -> Combine:
    return deltas.mix(job, drops(job), elect=False)
