"""What the fast operations compute, in few lines of ordinary autograd: the twins that tests compare with.

Dimensions: T tokens, D hidden, F expert width, E experts, K experts per token, N routed rows, V vocabulary,
B batch, S sequence, H query heads, G key-value heads, d head dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def expert_mlp(
    x_ND: Tensor,
    gate_up_proj_EGD: Tensor,
    down_proj_EDF: Tensor,
    counts_E: Tensor,
    weight_N: Tensor | None = None,
) -> Tensor:
    """Rows sorted by expert through down(silu(gate(x)) * up(x)), times weight_N; rows of none are zero."""
    weight_N = x_ND.new_ones(len(x_ND)) if weight_N is None else weight_N
    outputs, start = [], 0
    for expert, count in enumerate(counts_E.tolist()):
        rows = slice(start, start + count)
        gate_nF, up_nF = F.linear(x_ND[rows], gate_up_proj_EGD[expert]).chunk(2, dim=-1)
        y_nD = F.linear(F.silu(gate_nF) * up_nF, down_proj_EDF[expert])
        outputs.append((y_nD * weight_N[rows, None]).to(x_ND.dtype))
        start += count
    return torch.cat([*outputs, torch.zeros_like(x_ND[start:])])


def permute(x_TD: Tensor, token_index_N: Tensor) -> Tensor:
    """Row n is token token_index_N[n]."""
    return x_TD[token_index_N]


def combine(y_ND: Tensor, weight_N: Tensor | None, token_index_N: Tensor, num_tokens: int) -> Tensor:
    """Each token's weighted sum of its rows, accumulated in fp32 at least."""
    wide = torch.promote_types(y_ND.dtype, torch.float32)
    weighted_ND = y_ND.to(wide) if weight_N is None else y_ND.to(wide) * weight_N.to(wide)[:, None]
    out_TD = torch.zeros(num_tokens, y_ND.shape[1], dtype=wide, device=y_ND.device)
    return out_TD.index_add(0, token_index_N, weighted_ND).to(y_ND.dtype)


def sort_by_expert(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(token_index_N, order_N, slot_TK, counts_E) by a stable sort."""
    order_N = expert_TK.flatten().argsort(stable=True)
    slot_TK = order_N.argsort().view_as(expert_TK)
    counts_E = torch.bincount(expert_TK.flatten(), minlength=num_experts)
    return order_N // expert_TK.shape[1], order_N, slot_TK, counts_E


def linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """(summed cross-entropy of hidden @ weight^T, number of targets), with all logits at once."""
    logits_TV = F.linear(hidden_TD, weight_VD)
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    loss = F.cross_entropy(logits_TV, labels_T, ignore_index=ignore_index, reduction="sum")
    return loss, (labels_T != ignore_index).sum()


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """As transformers' MixtralRMSNorm: statistics in fp32, rounded to x's dtype before the weight."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight_D * normed.to(x.dtype)


def apply_rotary(q_BHSd: Tensor, k_BGSd: Tensor, cos_BSd: Tensor, sin_BSd: Tensor) -> tuple[Tensor, Tensor]:
    """x cos + rotate_half(x) sin, the half-split convention of transformers."""

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos_BSd[:, None] + torch.cat((-second, first), dim=-1) * sin_BSd[:, None]

    return rotate(q_BHSd), rotate(k_BGSd)


def attention_mask(
    shape_BS: tuple[int, int],
    attention_mask_BS: Tensor | None = None,
    document_ids_BS: Tensor | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """(B, S, S) bool, element by element: may query i see key j?"""
    batch, length = shape_BS
    documents = None if document_ids_BS is None else document_ids_BS.tolist()
    real = None if attention_mask_BS is None else attention_mask_BS.bool().tolist()

    def sees(b: int, i: int, j: int) -> bool:
        near = j <= i and (sliding_window is None or i - j < sliding_window)
        together = documents is None or documents[b][i] == documents[b][j]
        return near and together and (real is None or real[b][j])

    return torch.tensor([[[sees(b, i, j) for j in range(length)] for i in range(length)] for b in range(batch)])


def attention(q_BHSd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor, sees_BSS: Tensor) -> Tensor:
    """Softmax attention, scores and probabilities in full; a query that sees nothing gives zero."""
    groups = q_BHSd.shape[1] // k_BGSd.shape[1]
    k_BHSd, v_BHSd = (x.repeat_interleave(groups, dim=1) for x in (k_BGSd, v_BGSd))
    scores = q_BHSd @ k_BHSd.transpose(-1, -2) * q_BHSd.shape[-1] ** -0.5
    scores = scores.masked_fill(~sees_BSS[:, None], float("-inf"))
    probability = scores.float().softmax(-1) if scores.dtype != torch.float64 else scores.softmax(-1)
    return probability.nan_to_num(0.0).to(v_BHSd.dtype) @ v_BHSd


def linear_distillation(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    log_p_NV: Tensor,
    kind: str,
    temperature: float,
    alpha: float,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """(objective, cross-entropy, temperature^2 * divergence), summed over the N labelled rows, with all logits at once.

    Args:
        log_p_NV: the teacher's log-probabilities at the temperature.
    """
    targets = labels_T != ignore_index
    logits_NV = F.linear(hidden_TD[targets], weight_VD)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    hard = F.cross_entropy(logits_NV, labels_T[targets], reduction="sum")
    p_NV, q_NV = log_p_NV.to(logits_NV).exp(), (logits_NV / temperature).softmax(-1)
    m_NV = (p_NV + q_NV) / 2

    def kl(a_NV: Tensor, b_NV: Tensor) -> Tensor:
        return (torch.special.xlogy(a_NV, a_NV) - torch.special.xlogy(a_NV, b_NV)).sum()

    divergences = {
        "forward_kl": lambda: kl(p_NV, q_NV),
        "reverse_kl": lambda: kl(q_NV, p_NV),
        "jensen_shannon": lambda: (kl(p_NV, m_NV) + kl(q_NV, m_NV)) / 2,
    }
    soft = temperature**2 * divergences[kind]()
    return (1 - alpha) * hard + alpha * soft, hard, soft
