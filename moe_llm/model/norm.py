"""Root-mean-square normalisation."""

import torch
from torch import Tensor, nn

from moe_llm.ops.norm import add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """x / rms(x) * weight, statistics in fp32 (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor, delta: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The normed x; with a delta, x + delta and that normed."""
        if delta is None:
            return rms_norm(x, self.weight, self.eps)
        return add_rms_norm(x, delta, self.weight, self.eps)

    def after_adding(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """(x + delta, that normed); nothing is added where delta is None."""
        return (x, self(x)) if delta is None else self(x, delta)
