"""A feed-forward layer that every token passes through: dense layers, and shared experts (DeepSeekMoE, Dai et al. 2024,
equation 9), of which n of width F are one of width n F.

Dimensions: T tokens, D hidden, W width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from moe_llm.model.linear import Linear


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
        hidden_TW = F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD)
        return self.down_proj(F.dropout(hidden_TW, self.dropout, self.training))
