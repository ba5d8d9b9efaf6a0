"""Model stock (Jang, Yun and Han 2024, equations 2 to 4): how far from the base towards the mean of its fine-tunes.

theta = t * mean + (1 - t) * base, t = k cos / (1 + (k - 1) cos), with cos the mean cosine between the k task vectors of
the tensor, or with `filter_wise` of each of its rows.
"""

import torch

from moe_llm.merge.job import Combine, Job
from moe_llm.merge.methods.rows import gram, rows_of
from moe_llm.merge.parameters import Parameter

PARAMETERS = {"filter_wise": Parameter(default=False, kind=bool)}
_TINY = 1e-6


def start(job: Job) -> Combine:
    columns = job.shape[-1] if job.shared["filter_wise"] else None
    tasks = len(job.tasks)
    gram_Rkk = gram(job, lambda parts: [parts[i] - parts[job.origin] for i in job.tasks], columns)
    norm_Rk = gram_Rkk.diagonal(dim1=1, dim2=2).sqrt()
    product_Rkk = (norm_Rk[:, :, None] * norm_Rk[:, None, :]).clamp(min=_TINY)
    cosine_Rkk = (gram_Rkk / product_Rkk).clamp(-1, 1)
    first, second = torch.triu_indices(tasks, tasks, 1)
    cosine_R = cosine_Rkk[:, first, second].mean(1)
    divisor_R = 1 + (tasks - 1) * cosine_R
    opposed_R = divisor_R.abs() < _TINY  # no finite t: the base stays
    t_R = torch.where(opposed_R, 0.0, tasks * cosine_R / torch.where(opposed_R, 1.0, divisor_R)).float()

    def combine(start: int, parts: list[torch.Tensor]) -> torch.Tensor:
        t = t_R[rows_of(start, len(parts[0]), columns)]
        mean = sum(parts[i] for i in job.tasks) / tasks
        return t * mean + (1 - t) * parts[job.origin]

    return combine
