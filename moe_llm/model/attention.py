"""Grouped-query attention with rotary positions.

Dimensions: B batch, S sequence, D hidden, H query heads, G key-value heads, d head dimension.
"""

from torch import Tensor, nn

from moe_llm.config import ModelConfig
from moe_llm.model.linear import Linear
from moe_llm.model.norm import RMSNorm
from moe_llm.model.sequence_parts import SequenceParts
from moe_llm.ops.attention import AttentionPattern, attention
from moe_llm.ops.rope import apply_rotary


class Attention(nn.Module):
    """Causal self-attention; `AttentionPattern` says who sees whom (Ainslie et al. 2023; Su et al. 2021).

    `parts` is a plain object that sequence parallelism sets: with it the input is this rank's positions, and the pattern
    that of the whole sequences.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.attention_head_dim
        q_width, kv_width = config.num_attention_heads * self.head_dim, config.kv_heads * self.head_dim
        bias = config.attention_bias
        self.q_proj = Linear(hidden, q_width, bias != "none")
        self.k_proj = Linear(hidden, kv_width, bias != "none")
        self.v_proj = Linear(hidden, kv_width, bias != "none")
        self.o_proj = Linear(q_width, hidden, bias == "all")
        self.parts: SequenceParts | None = None
        self.q_norm = self.k_norm = None
        self.norm_heads = config.qk_norm == "head"
        if config.qk_norm != "none":
            q_norm, k_norm = (self.head_dim,) * 2 if self.norm_heads else (q_width, kv_width)
            self.q_norm = RMSNorm(q_norm, config.rms_norm_eps)
            self.k_norm = RMSNorm(k_norm, config.rms_norm_eps)

    def forward(self, x_BSD: Tensor, cos_BSd: Tensor, sin_BSd: Tensor, pattern: AttentionPattern) -> Tensor:
        q_BHSd, k_BGSd, v_BGSd = (
            self._heads(project(x_BSD), norm).transpose(1, 2)
            for project, norm in ((self.q_proj, self.q_norm), (self.k_proj, self.k_norm), (self.v_proj, None))
        )
        q_BHSd, k_BGSd = apply_rotary(q_BHSd, k_BGSd, cos_BSd, sin_BSd)
        if self.parts is not None:
            q_BHSd, k_BGSd, v_BGSd = self.parts.heads_for_positions(q_BHSd, k_BGSd, v_BGSd)
        y_BHSd = attention(q_BHSd, k_BGSd, v_BGSd, pattern=pattern)
        if self.parts is not None:
            y_BHSd = self.parts.positions_for_heads(y_BHSd)
        return self.o_proj(y_BHSd.transpose(1, 2).flatten(2))

    def _heads(self, x_BSW: Tensor, norm: RMSNorm | None) -> Tensor:
        """(B, S, heads, d), normed per head or, before, over the whole projection."""
        if norm is None:
            return x_BSW.unflatten(-1, (-1, self.head_dim))
        if self.norm_heads:
            return norm(x_BSW.unflatten(-1, (-1, self.head_dim)))
        return norm(x_BSW).unflatten(-1, (-1, self.head_dim))
