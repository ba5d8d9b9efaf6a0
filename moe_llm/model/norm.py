"""Root-mean-square normalisation."""

import torch
from torch import Tensor, nn

from moe_llm.ops.norm import rms_norm


class RMSNorm(nn.Module):
    """x / rms(x) * weight, statistics in fp32 (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
