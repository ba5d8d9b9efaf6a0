"""Grouped-query attention and multi-head latent attention, with rotary positions.

Dimensions: B batch, S sequence, D hidden, H query heads, G key-value heads, d head dimension.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_llm.config import ModelConfig
from moe_llm.model.layers import Linear, RMSNorm
from moe_llm.model.sequence_parts import SequenceParts
from moe_llm.ops.attention import AttentionPattern, attention
from moe_llm.ops.attention_sinks import attention_with_sinks
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
        self.sinks = nn.Parameter(torch.empty(config.num_attention_heads)) if config.attention_sinks else None
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
        sinks_H: Tensor | None = self.sinks
        if self.parts is not None:
            q_BHSd, k_BGSd, v_BGSd = self.parts.heads_for_positions(q_BHSd, k_BGSd, v_BGSd)
            sinks_H = None if sinks_H is None else sinks_H.chunk(self.parts.size)[self.parts.index]
        if sinks_H is None:
            y_BHSd = attention(q_BHSd, k_BGSd, v_BGSd, pattern=pattern)
        else:
            y_BHSd = attention_with_sinks(q_BHSd, k_BGSd, v_BGSd, sinks_H, pattern)
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


_LATENT_EPS = 1e-6  # of the norms of latent vectors, whatever model.rms_norm_eps is, as in transformers


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2 2024, section 2.1), computed as attention of as many heads of keys.

    A token's keys and values are linear maps of a normed vector of `kv_lora_rank` elements; a part of each key, the same
    for all heads, is turned by its position, as is that part of each query.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.kv_lora_rank is not None
        hidden, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias == "all"
        self.latent, self.kept, self.turned = config.kv_lora_rank, config.qk_nope_head_dim, config.qk_rope_head_dim
        self.value_dim, self.head_dim, self.interleave = (
            config.v_head_dim,
            config.attention_head_dim,
            config.rope_interleave,
        )
        scale = config.rope_parameters.score_scale(config.max_position_embeddings)
        self.padded = max(self.head_dim, self.value_dim)  # `attention` takes one width
        self.query_scale = scale * math.sqrt(self.padded / self.head_dim)
        if config.q_lora_rank is None:
            self.q_proj: Linear | None = Linear(hidden, heads * self.head_dim)
        else:
            self.q_proj = None
            self.q_a_proj = Linear(hidden, config.q_lora_rank, bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, _LATENT_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, heads * self.head_dim)
        self.kv_a_proj_with_mqa = Linear(hidden, self.latent + self.turned, bias)
        self.kv_a_layernorm = RMSNorm(self.latent, _LATENT_EPS)
        self.kv_b_proj = Linear(self.latent, heads * (self.kept + self.value_dim))
        self.o_proj = Linear(heads * self.value_dim, hidden, bias)
        self.parts: SequenceParts | None = None

    def forward(self, x_BSD: Tensor, cos_BSd: Tensor, sin_BSd: Tensor, pattern: AttentionPattern) -> Tensor:
        wide = (
            self.q_proj(x_BSD) if self.q_proj is not None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BSD)))
        )
        q_BSHd = wide.unflatten(-1, (-1, self.head_dim))
        latent_BSl, shared_BSr = self.kv_a_proj_with_mqa(x_BSD).split((self.latent, self.turned), -1)
        kv_BSHd = self.kv_b_proj(self.kv_a_layernorm(latent_BSl)).unflatten(-1, (-1, self.kept + self.value_dim))
        k_BSHn, v_BSHv = kv_BSHd.split((self.kept, self.value_dim), -1)
        q_BSHn, q_BSHr = q_BSHd.split((self.kept, self.turned), -1)
        q_BHSr, k_B1Sr = apply_rotary(
            self._pairs(q_BSHr).transpose(1, 2), self._pairs(shared_BSr[:, :, None]).transpose(1, 2), cos_BSd, sin_BSd
        )
        k_BSHr = k_B1Sr.transpose(1, 2).expand(-1, -1, k_BSHn.shape[2], -1)
        q_BSHd = torch.cat((q_BSHn, q_BHSr.transpose(1, 2)), -1)
        if self.query_scale != 1.0:
            q_BSHd = q_BSHd * self.query_scale
        padded = [self._padded(x).transpose(1, 2) for x in (q_BSHd, torch.cat((k_BSHn, k_BSHr), -1), v_BSHv)]
        if self.parts is not None:
            padded = [*self.parts.heads_for_positions(*padded)]
        y_BHSd = attention(*padded, pattern=pattern)
        if self.parts is not None:
            y_BHSd = self.parts.positions_for_heads(y_BHSd)
        return self.o_proj(y_BHSd.transpose(1, 2)[..., : self.value_dim].flatten(2))

    def _pairs(self, x_BSHr: Tensor) -> Tensor:
        """Elements 0, 2, ... and then 1, 3, ..., so that pairs lie in the two halves; queries and keys alike, so that
        their products stay what they are."""
        return x_BSHr.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) if self.interleave else x_BSHr

    def _padded(self, x_BSHd: Tensor) -> Tensor:
        missing = self.padded - x_BSHd.shape[-1]
        return F.pad(x_BSHd, (0, missing)) if missing else x_BSHd
