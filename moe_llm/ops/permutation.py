"""Carry tokens to expert order and back, by gathers alone wherever each token has exactly K rows.

Dimensions: T tokens, D hidden, E experts, K experts per token, N routed rows (T * K where none is dropped).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_llm.ops import native


def sort_by_expert(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Order the T*K choices by expert; stable, so that an expert sees its tokens in order. No host sync.

    Returns:
        token_index_N: the token of sorted row n.
        order_N: the row's place in expert_TK.flatten().
        slot_TK: the inverse: the sorted row of token t's k-th choice.
        counts_E: rows per expert; they sum to N.
    """
    expert_N = expert_TK.flatten()
    sorted_N, order_N = expert_N.sort(stable=True)
    slot_N = torch.empty_like(order_N)
    slot_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    # not bincount: on CUDA it asks the host for the largest value
    bounds = torch.searchsorted(sorted_N, torch.arange(num_experts + 1, device=sorted_N.device))
    return order_N // expert_TK.shape[1], order_N, slot_N.view_as(expert_TK), bounds.diff()


def permute(x_TD: Tensor, token_index_N: Tensor, slot_TK: Tensor | None = None) -> Tensor:
    """Row n of the result is token token_index_N[n].

    slot_TK, where every token has exactly K rows, says which: the gradient is then a sum of K gathered rows
    instead of a scattered addition. For lower precisions the gradient is summed in fp32 either way.
    """
    return _Permute.apply(x_TD, token_index_N, slot_TK)


def combine(
    y_ND: Tensor,
    weight_N: Tensor | None,
    token_index_N: Tensor,
    num_tokens: int,
    slot_TK: Tensor | None = None,
) -> Tensor:
    """Each token's sum of weight_N[n] * y_ND[n] over its rows, (T, D), in y's dtype, accumulated in fp32.

    weight_N None means ones: for rows that were weighted already. With slot_TK (see `permute`) both
    directions are gathers; without, tokens may have any number of rows, also none, and those get zero.
    """
    assert slot_TK is None or slot_TK.shape[0] == num_tokens
    return _Combine.apply(y_ND, weight_N, token_index_N, num_tokens, slot_TK)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, token_index_N, slot_TK):
        ctx.save_for_backward(token_index_N, slot_TK)
        ctx.num_tokens = len(x_TD)
        return x_TD.index_select(0, token_index_N)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND):
        token_index_N, slot_TK = ctx.saved_tensors
        return _sum_rows(grad_ND, None, token_index_N, ctx.num_tokens, slot_TK), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_ND, weight_N, token_index_N, num_tokens, slot_TK):
        # y is needed for the weights' gradient alone
        kept_y = y_ND if weight_N is not None and ctx.needs_input_grad[1] else None
        ctx.save_for_backward(kept_y, weight_N, token_index_N)
        return _sum_rows(y_ND, weight_N, token_index_N, num_tokens, slot_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD):
        y_ND, weight_N, token_index_N = ctx.saved_tensors
        grad_y = grad_weight = None
        if ctx.needs_input_grad[0]:
            weight_N1 = None if weight_N is None else weight_N[:, None]
            grad_y = gather_sum(grad_TD, token_index_N[:, None], weight_N1)
        if y_ND is not None:
            grad_weight = row_dot(y_ND, grad_TD.index_select(0, token_index_N)).to(weight_N.dtype)
        return grad_y, grad_weight, None, None, None


def _sum_rows(
    y_ND: Tensor, weight_N: Tensor | None, token_index_N: Tensor, num_tokens: int, slot_TK: Tensor | None
) -> Tensor:
    if slot_TK is not None:
        return gather_sum(y_ND, slot_TK, None if weight_N is None else weight_N[slot_TK])
    wide = torch.promote_types(y_ND.dtype, torch.float32)
    weighted_ND = y_ND.to(wide) if weight_N is None else y_ND.to(wide) * weight_N.to(wide)[:, None]
    out_TD = torch.zeros(num_tokens, y_ND.shape[1], dtype=wide, device=y_ND.device)
    return out_TD.index_add_(0, token_index_N, weighted_ND).to(y_ND.dtype)


def gather_sum(x_RD: Tensor, index_MK: Tensor, weight_MK: Tensor | None) -> Tensor:
    """out[m] = sum over k of weight[m, k] * x[index[m, k]], accumulated in fp32, in x's dtype; no autograd.

    An embedding bag does this in one pass, but wants the weights in x's dtype. Below fp32 they are given as
    the sum of two numbers of that dtype, which keeps 16 bits of them and reads rows again that are in cache.
    """
    if index_MK.numel() == 0:
        return x_RD.new_zeros(len(index_MK), x_RD.shape[1])
    if native.fits(x_RD):
        x_RD, index_MK = x_RD.contiguous(), index_MK.contiguous()
        weight_MK = None if weight_MK is None else weight_MK.float().contiguous()
        out_MD = x_RD.new_empty(len(index_MK), x_RD.shape[1])
        native.call("gather_sum", x_RD.dtype, x_RD, index_MK, weight_MK, out_MD, *index_MK.shape, x_RD.shape[1])
        return out_MD
    if weight_MK is not None and weight_MK.dtype != x_RD.dtype:
        high_MK = weight_MK.to(x_RD.dtype)
        low_MK = (weight_MK - high_MK).to(x_RD.dtype)
        index_MK, weight_MK = torch.cat((index_MK, index_MK), 1), torch.cat((high_MK, low_MK), 1)
    return F.embedding_bag(index_MK, x_RD.contiguous(), mode="sum", per_sample_weights=weight_MK)


def row_dot(a_ND: Tensor, b_ND: Tensor) -> Tensor:
    """The dot product of each row of a with the same row of b, (N,), summed in fp32 at least."""
    wide = torch.promote_types(a_ND.dtype, torch.float32)
    return (a_ND * b_ND).sum(-1, dtype=wide)
