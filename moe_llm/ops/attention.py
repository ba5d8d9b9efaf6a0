"""Who sees whom, decided once per forward pass, and grouped-query attention under that pattern.

Dimensions: B batch, S sequence, H query heads, G key-value heads (H is a multiple), d head dimension.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class AttentionPattern:
    """Causal attention, narrowed by documents, padding and a window; built once and shared by all layers.

    mask_B1SS: bool, true where the query (row) sees the key (column); None: plain causal attention.
    Block-sparse and variable-length kernels would find their inputs here.
    """

    mask_B1SS: Tensor | None = None

    @staticmethod
    def build(
        like_BS: Tensor,
        *,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        sliding_window: int | None = None,
    ) -> "AttentionPattern":
        """The pattern of a batch.

        Args:
            like_BS: any tensor of the batch's shape and device, such as the token ids.
            attention_mask: (B, S), zero for padding, which is seen by nobody.
            document_ids: (B, S) integers; queries see keys with the same number only.
            sliding_window: a query sees itself and the sliding_window - 1 keys before it.

        Queries that would see nothing (padding) see themselves, so that their softmax is finite.
        """
        batch, length = like_BS.shape
        if sliding_window is not None and sliding_window >= length:
            sliding_window = None
        if attention_mask is not None and bool((attention_mask != 0).all()):
            attention_mask = None
        if document_ids is not None and bool((document_ids == document_ids[:, :1]).all()):
            document_ids = None
        if attention_mask is None and document_ids is None and sliding_window is None:
            return AttentionPattern()
        position_S = torch.arange(length, device=like_BS.device)
        distance_SS = position_S[:, None] - position_S
        sees_BSS = (distance_SS >= 0).expand(batch, length, length)
        if sliding_window is not None:
            sees_BSS = sees_BSS & (distance_SS < sliding_window)
        if document_ids is not None:
            sees_BSS = sees_BSS & (document_ids[:, :, None] == document_ids[:, None, :])
        if attention_mask is not None:
            sees_BSS = (sees_BSS & (attention_mask[:, None, :] != 0)) | (distance_SS == 0)
        return AttentionPattern(sees_BSS[:, None])


def attention(q_BHSd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor, *, pattern: AttentionPattern) -> Tensor:
    """softmax(q k^T / sqrt(d)) v under the pattern, (B, H, S, d); head h reads key-value head h * G // H."""
    return F.scaled_dot_product_attention(
        q_BHSd,
        k_BGSd,
        v_BGSd,
        attn_mask=pattern.mask_B1SS,
        is_causal=pattern.mask_B1SS is None,
        enable_gqa=q_BHSd.shape[1] != k_BGSd.shape[1],
    )
