"""A feed-forward layer that every token passes through: dense layers, and shared experts (DeepSeekMoE, Dai et al. 2024,
equation 9), of which n of width F are one of width n F.

Dimensions: T tokens, D hidden, W width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from moe_llm.model.linear import Linear
from moe_llm.ops import liger


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), with dropout before `down` while training (Shazeer 2020)."""

    def __init__(self, hidden: int, width: int, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        self.gate_proj = Linear(hidden, width)
        self.up_proj = Linear(hidden, width)
        self.down_proj = Linear(width, hidden)

    def forward(self, x_TD: Tensor) -> Tensor:
        """x of any leading shape, and the result of the same."""
        gate_TW, up_TW = self.gate_proj(x_TD), self.up_proj(x_TD)
        hidden_TW = liger.silu_mul(gate_TW, up_TW) if liger.use("swiglu", gate_TW, up_TW) else F.silu(gate_TW) * up_TW
        return self.down_proj(F.dropout(hidden_TW, self.dropout, self.training))
