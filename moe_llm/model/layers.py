"""Layers that every part of the decoder is built of: linear map, norm, and the feed-forward without a router.

Dimensions: T tokens, D hidden, W width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_llm.ops import liger
from moe_llm.ops.norm import add_rms_norm, rms_norm
from moe_llm.ops.products import linear


class Linear(nn.Linear):
    """x W^T, plus a bias where one is asked for; as torch's in all else."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight)
        return y if self.bias is None else y + self.bias


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


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), with dropout before `down` while training (Shazeer 2020)."""

    def __init__(self, hidden: int, width: int, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        self.tiles = 1  # parts of the rows that are computed, and computed again, one after the other
        self.gate_proj = Linear(hidden, width)
        self.up_proj = Linear(hidden, width)
        self.down_proj = Linear(width, hidden)

    def forward(self, x_TD: Tensor) -> Tensor:
        """x of any leading shape, and the result of the same."""
        if self.tiles > 1 and torch.is_grad_enabled():
            parts = x_TD.flatten(0, -2).chunk(self.tiles)
            return torch.cat([checkpoint(self._whole, part, use_reentrant=False) for part in parts]).view_as(x_TD)
        return self._whole(x_TD)

    def _whole(self, x_TD: Tensor) -> Tensor:
        gate_TW, up_TW = self.gate_proj(x_TD), self.up_proj(x_TD)
        hidden_TW = (
            liger.silu_mul(gate_TW, up_TW)
            if liger.enabled and liger.use("swiglu", gate_TW, up_TW)
            else F.silu(gate_TW) * up_TW
        )
        return self.down_proj(F.dropout(hidden_TW, self.dropout, self.training))
