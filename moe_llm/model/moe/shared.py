"""Experts that every token passes through (DeepSeekMoE, Dai et al. 2024, equation 9), dense parameters like any other.

Dimensions: T tokens, D hidden, W width of all of them together.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from moe_llm.config import ModelConfig
from moe_llm.model.linear import Linear


class SharedExperts(nn.Module):
    """down(silu(gate(x)) * up(x)), with the experts' dropout: n experts of width F are one of width n F."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden, width, self.dropout = config.hidden_size, config.shared_width, config.expert_dropout
        self.gate_proj = Linear(hidden, width)
        self.up_proj = Linear(hidden, width)
        self.down_proj = Linear(width, hidden)

    def forward(self, x_TD: Tensor) -> Tensor:
        hidden_TW = F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD)
        return self.down_proj(F.dropout(hidden_TW, self.dropout, self.training))
