"""Grouped-query attention with rotary positions.

Dimensions: B batch, S sequence, D hidden, H query heads, G key-value heads, d head dimension.
"""

from torch import Tensor, nn

from moe_llm.config import ModelConfig
from moe_llm.model.linear import Linear
from moe_llm.ops.attention import AttentionPattern, attention
from moe_llm.ops.rope import apply_rotary


class Attention(nn.Module):
    """Causal self-attention; `AttentionPattern` says who sees whom (Ainslie et al. 2023; Su et al. 2021)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.attention_head_dim
        self.q_proj = Linear(hidden, config.num_attention_heads * self.head_dim)
        self.k_proj = Linear(hidden, config.kv_heads * self.head_dim)
        self.v_proj = Linear(hidden, config.kv_heads * self.head_dim)
        self.o_proj = Linear(config.num_attention_heads * self.head_dim, hidden)

    def forward(self, x_BSD: Tensor, cos_BSd: Tensor, sin_BSd: Tensor, pattern: AttentionPattern) -> Tensor:
        q_BHSd, k_BGSd, v_BGSd = (
            project(x_BSD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BHSd, k_BGSd = apply_rotary(q_BHSd, k_BGSd, cos_BSd, sin_BSd)
        y_BHSd = attention(q_BHSd, k_BGSd, v_BGSd, pattern=pattern)
        return self.o_proj(y_BHSd.transpose(1, 2).flatten(2))
