"""Karcher mean: the point on the unit sphere whose squared angles to the models' directions have the least sum, times the
mean of their norms. Found by stepping along the mean of the tangents towards them (Karcher 1977; Pennec 2006).

Every step stays in the span of the models, so that their inner products are all that it needs of them.
"""

import torch

from moe_llm.merge.job import Combine, Job
from moe_llm.merge.methods.rows import gram
from moe_llm.merge.parameters import Parameter

PARAMETERS = {"max_iter": Parameter(default=10, low=1), "tol": Parameter(default=1e-5, low=0.0, high=1.0)}


def start(job: Job) -> Combine:
    if len(job.inputs) == 1:
        return lambda _, parts: parts[0]
    gram_kk = gram(job, lambda parts: parts, None)[0]
    norm_k = gram_kk.diagonal().sqrt()
    tol = max(job.shared["tol"], torch.finfo(gram_kk.dtype).eps)  # below that there is nothing but rounding
    if _opposed(gram_kk, norm_k, tol):
        job.notes.append("the models' directions cancel, and have no mean: the first one's is taken")
    share_k = _directions(gram_kk, norm_k, int(job.shared["max_iter"]), tol) * norm_k.mean()
    shares = share_k.tolist()

    def combine(_: int, parts: list[torch.Tensor]) -> torch.Tensor:
        return sum((part * share for part, share in zip(parts, shares)), torch.zeros_like(parts[0]))

    return combine


def _opposed(gram_kk: torch.Tensor, norm_k: torch.Tensor, tol: float) -> bool:
    """Whether the mean of the directions is nearly nothing."""
    valid_k = norm_k > tol
    cosine_nn = gram_kk[valid_k][:, valid_k] / (norm_k[valid_k][:, None] * norm_k[valid_k])
    return bool(valid_k.any()) and float(cosine_nn.mean().clamp(min=0).sqrt()) < tol


def _directions(gram_kk: torch.Tensor, norm_k: torch.Tensor, steps: int, tol: float) -> torch.Tensor:
    """The mean direction as a sum of the models, the share of each, (k,); models without a direction have none."""
    share_k = torch.zeros_like(norm_k)
    valid_k = norm_k > tol
    if not valid_k.any():
        return share_k
    norm_n = norm_k[valid_k]
    cosine_nn = gram_kk[valid_k][:, valid_k] / (norm_n[:, None] * norm_n)
    mean_n = torch.full_like(norm_n, 1 / len(norm_n))
    length = (mean_n @ cosine_nn @ mean_n).clamp(min=0).sqrt()
    mean_n = mean_n / length if length >= tol else torch.eye(len(norm_n), dtype=norm_n.dtype)[0]
    for _ in range(steps):
        cosine_n = (cosine_nn @ mean_n).clamp(-1, 1)
        angle_n = cosine_n.arccos()
        far_n = angle_n >= tol
        pull_n = torch.where(far_n, angle_n / torch.where(far_n, angle_n.sin(), 1.0), 0.0) / len(norm_n)
        tangent_n = pull_n - (pull_n @ cosine_n) * mean_n
        length = (tangent_n @ cosine_nn @ tangent_n).clamp(min=0).sqrt()
        if length < tol:
            break
        mean_n = length.cos() * mean_n + length.sin() * tangent_n / length
        mean_n = mean_n / (mean_n @ cosine_nn @ mean_n).sqrt()
    share_k[valid_k] = mean_n / norm_n
    return share_k
