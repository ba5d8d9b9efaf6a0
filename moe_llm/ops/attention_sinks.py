"""Attention whose heads may attend to nothing: a trained score of each head joins the softmax, and its share is dropped
(Xiao et al. 2023; GPT-OSS, OpenAI 2025).

The score becomes one more key, which every query sees and whose value is zero: queries and keys get elements of which the
product is that score. `scaled_dot_product_attention` then computes it, with its mask at full size.
Dimensions: B batch, S sequence, H query heads, G key-value heads, d head dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_llm.ops.attention import AttentionPattern, causal_mask

_EXTRA = 8  # elements that a head gets, so that its width stays a multiple of what kernels on a GPU take


def attention_with_sinks(
    q_BHSd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor, sinks_H: Tensor, pattern: AttentionPattern
) -> Tensor:
    """exp(q k^T / sqrt(d)) / (sum of these + exp(sink)) v under the pattern, (B, H, S, d)."""
    scale = q_BHSd.shape[-1] ** -0.5
    extra_BHS1 = (sinks_H / scale).to(q_BHSd.dtype)[:, None, None].expand(*q_BHSd.shape[:-1], 1)
    q_BHSe = F.pad(torch.cat((q_BHSd, extra_BHS1), -1), (0, _EXTRA - 1))
    k_BGSe, v_BGSe = (F.pad(x, (0, _EXTRA)) for x in (k_BGSd, v_BGSd))
    if pattern.segments is None:
        return _attend(q_BHSe, k_BGSe, v_BGSe, pattern.mask_B1SS, scale)[..., : q_BHSd.shape[-1]]
    parts = [
        x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None].split(pattern.segments, dim=2)
        for x in (q_BHSe, k_BGSe, v_BGSe)
    ]
    outputs = [
        _attend(q, k, v, causal_mask(q, pattern.window), scale)[0].transpose(0, 1)
        for q, k, v in zip(*parts, strict=True)
    ]
    y_BHSe = torch.cat(outputs).unflatten(0, (q_BHSd.shape[0], q_BHSd.shape[2])).transpose(1, 2)
    return y_BHSe[..., : q_BHSd.shape[-1]]


def _attend(q_BHSe: Tensor, k_BGSe: Tensor, v_BGSe: Tensor, mask_B1SS: Tensor | None, scale: float) -> Tensor:
    """With a last key that all see: zero but for the first extra element, which is one."""
    width = q_BHSe.shape[-1]
    key_e = (torch.arange(width, device=q_BHSe.device) == width - _EXTRA).to(k_BGSe.dtype)
    key_BG1e = key_e.expand(*k_BGSe.shape[:2], 1, width)
    if mask_B1SS is None:
        mask_B1SS = causal_mask(q_BHSe, None)
    seen = F.pad(mask_B1SS, (0, 1), value=True)
    return F.scaled_dot_product_attention(
        q_BHSe,
        torch.cat((k_BGSe, key_BG1e), 2),
        F.pad(v_BGSe, (0, 0, 0, 1)),
        attn_mask=seen,
        scale=scale,
        enable_gqa=q_BHSe.shape[1] != k_BGSe.shape[1],
    )
