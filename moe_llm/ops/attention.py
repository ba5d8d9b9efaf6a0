"""Who sees whom, decided once per forward pass, and grouped-query attention under that pattern.

Dimensions: B batch, S sequence, H query heads, G key-value heads (H is a multiple), d head dimension.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_llm.ops import native
from moe_llm.ops.attention_blocked import blocked_attention


@dataclass(frozen=True)
class AttentionPattern:
    """Causal attention, narrowed by documents, padding and a window; built once and shared by all layers.

    At most one of the first two is set, and neither for plain causal attention:
    mask_B1SS: bool, true where the query (row) sees the key (column).
    segments: lengths that cut the B * S positions into runs, each causal within itself and blind to all else.
        The cost is that of the documents instead of the whole square. Built on the CPU, where reading the
        lengths is free; with documents of 128 to 400 tokens in 512 to 2048, forward and backward take 0.2 to
        0.7 of the masked time (scripts/benchmarks/ops.py). Variable-length kernels want the same numbers.
    starts_BS: int32, with segments: the first key that each query sees.
    """

    mask_B1SS: Tensor | None = None
    segments: tuple[int, ...] | None = None
    starts_BS: Tensor | None = None

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
            attention_mask: (B, S), zero for padding, which no real token sees.
            document_ids: (B, S) integers; queries see keys with the same number only.
            sliding_window: a query sees itself and the sliding_window - 1 keys before it.

        Queries that would see nothing (padding) see themselves, so that their softmax is finite.
        """
        length = like_BS.shape[1]
        if sliding_window is not None and sliding_window >= length:
            sliding_window = None
        mask_BS = None if attention_mask is None else attention_mask != 0
        if mask_BS is not None and bool(mask_BS.all()):
            mask_BS = None
        if document_ids is not None and bool((document_ids == document_ids[:, :1]).all()):
            document_ids = None
        if mask_BS is None and document_ids is None and sliding_window is None:
            return AttentionPattern()
        if like_BS.device.type == "cpu":
            segments = _segments(like_BS, mask_BS, document_ids)
            if segments is not None and (sliding_window is None or max(segments) <= sliding_window):
                return AttentionPattern(segments=segments, starts_BS=_starts(segments, like_BS.shape))
        return AttentionPattern(_mask(like_BS, mask_BS, document_ids, sliding_window))


def attention(q_BHSd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor, *, pattern: AttentionPattern) -> Tensor:
    """softmax(q k^T / sqrt(d)) v under the pattern, (B, H, S, d); head h reads key-value head h * G // H."""
    if pattern.mask_B1SS is None and native.fits(q_BHSd, k_BGSd, v_BGSd):
        return blocked_attention(q_BHSd, k_BGSd, v_BGSd, pattern.starts_BS)
    if pattern.segments is not None:
        return _segment_attention(q_BHSd, k_BGSd, v_BGSd, pattern.segments)
    return F.scaled_dot_product_attention(
        q_BHSd,
        k_BGSd,
        v_BGSd,
        attn_mask=pattern.mask_B1SS,
        is_causal=pattern.mask_B1SS is None,
        enable_gqa=q_BHSd.shape[1] != k_BGSd.shape[1],
    )


def _segment_attention(q_BHSd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor, segments: tuple[int, ...]) -> Tensor:
    # one sequence of B * S positions; split and cat, unlike slices, have gradients that write each row once
    parts = [
        x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None].split(segments, dim=2) for x in (q_BHSd, k_BGSd, v_BGSd)
    ]
    gqa = q_BHSd.shape[1] != k_BGSd.shape[1]
    outputs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)[0].transpose(0, 1)
        for q, k, v in zip(*parts, strict=True)
    ]
    batch, _, length, _ = q_BHSd.shape
    return torch.cat(outputs).unflatten(0, (batch, length)).transpose(1, 2)


def _segments(like_BS: Tensor, mask_BS: Tensor | None, document_ids: Tensor | None) -> tuple[int, ...] | None:
    """Lengths of the runs of equal document and padding, row after row.

    None where runs do not describe the pattern: a document that comes back after another or after padding.
    """
    batch, length = like_BS.shape
    row_BS = torch.arange(batch)[:, None].expand(batch, length)
    document_BS = torch.zeros_like(row_BS) if document_ids is None else document_ids
    mask_BS = torch.ones_like(row_BS, dtype=torch.bool) if mask_BS is None else mask_BS
    key_P3 = torch.stack((row_BS, document_BS.to(row_BS.dtype), mask_BS.to(row_BS.dtype)), -1).flatten(0, 1)
    run_R3, run_length_R = key_P3.unique_consecutive(dim=0, return_counts=True)
    real_run_R3 = run_R3[run_R3[:, 2] == 1]
    if len(real_run_R3.unique(dim=0)) != len(real_run_R3):
        return None
    return tuple(run_length_R.tolist())


def _starts(segments: tuple[int, ...], shape_BS: torch.Size) -> Tensor:
    """The first position of each one's run, within its row."""
    length_R = torch.tensor(segments)
    first_R = length_R.cumsum(0) - length_R
    return (first_R % shape_BS[1]).repeat_interleave(length_R).view(shape_BS).to(torch.int32)


def _mask(like_BS: Tensor, mask_BS: Tensor | None, document_ids: Tensor | None, sliding_window: int | None) -> Tensor:
    batch, length = like_BS.shape
    position_S = torch.arange(length, device=like_BS.device)
    distance_SS = position_S[:, None] - position_S
    sees_BSS = (distance_SS >= 0).expand(batch, length, length)
    if sliding_window is not None:
        sees_BSS = sees_BSS & (distance_SS < sliding_window)
    if document_ids is not None:
        sees_BSS = sees_BSS & (document_ids[:, :, None] == document_ids[:, None, :])
    if mask_BS is not None:
        sees_BSS = (sees_BSS & mask_BS[:, None, :]) | (distance_SS == 0)
    return sees_BSS[:, None]
