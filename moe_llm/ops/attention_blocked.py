"""Attention on a CPU, block of queries by block of queries: products of torch's, softmax by our kernels.

torch's own fused backward pass takes five times as long as its forward in bf16. Here both passes are batched matrix
products over blocks of queries and the keys that these may see, and one pass over the scores in between. Kept for
the backward pass: queries, keys, values and one number for each query and head.

In bf16 scores and probabilities are rounded to bf16 between the products, as in transformers' eager attention.
Dimensions: B batch, S sequence, H query heads, G key-value heads, R = H / G, N = B * G, d head dimension,
b queries of a block, K keys of a block.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_llm.ops import native
from moe_llm.ops.products import bmm

# scores of one product: they should stay in the processor's cache from one product to the next
_SCRATCH_ELEMENTS = 2**20


def blocked_attention(q_BHSd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor, starts_BS: Tensor | None) -> Tensor:
    """Causal attention, (B, H, S, d), laid out as (B, S, H, d).

    Args:
        starts_BS: int32, the first key that a query sees, never falling along a row and never after the query
            itself; None: 0.
    """
    return _BlockedAttention.apply(q_BHSd, k_BGSd, v_BGSd, starts_BS)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BHSd, k_BGSd, v_BGSd, starts_BS):
        batch, heads, length, width = q_BHSd.shape
        groups = k_BGSd.shape[1]
        q_BGRSd = q_BHSd.unflatten(1, (groups, -1))
        k_BGSd, v_BGSd = k_BGSd.contiguous(), v_BGSd.contiguous()
        log_sum_BHS = torch.zeros(batch, heads, length)
        out_BSHd = q_BHSd.new_empty(batch, length, heads, width)
        out_BGRSd = out_BSHd.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)
        scratch = _Scratch(1, q_BHSd)
        for rows, queries, keys in _blocks(q_BGRSd, starts_BS):
            q_NMd = _rows(q_BGRSd[rows, :, :, queries])
            k_NKd, v_NKd = (_dense(x[rows, :, keys]) for x in (k_BGSd, v_BGSd))
            p_NMK = bmm(q_NMd, k_NKd.transpose(1, 2), out=scratch[0, len(q_NMd), q_NMd.shape[1], k_NKd.shape[1]])
            _probabilities_(p_NMK, log_sum_BHS[rows], starts_BS, rows, queries, keys, width, fresh=True)
            y_NMd = bmm(p_NMK, v_NKd)
            out_BGRSd[rows, :, :, queries] = y_NMd.view_as(out_BGRSd[rows, :, :, queries])
        ctx.save_for_backward(q_BHSd, k_BGSd, v_BGSd, starts_BS, log_sum_BHS)
        return out_BSHd.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BHSd):
        q_BHSd, k_BGSd, v_BGSd, starts_BS, log_sum_BHS = ctx.saved_tensors
        batch, heads, length, width = q_BHSd.shape
        groups = k_BGSd.shape[1]
        q_BGRSd, grad_BGRSd = (x.unflatten(1, (groups, -1)) for x in (q_BHSd, grad_BHSd))
        grad_q_BSHd = q_BHSd.new_empty(batch, length, heads, width)
        grad_q_BGRSd = grad_q_BSHd.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)
        # summed over the blocks of queries
        grad_k_BSGd, grad_v_BSGd = torch.zeros(2, batch, length, groups, width)
        grad_k_BGSd, grad_v_BGSd = grad_k_BSGd.transpose(1, 2), grad_v_BSGd.transpose(1, 2)
        scratch = _Scratch(2, q_BHSd)
        for rows, queries, keys in _blocks(q_BGRSd, starts_BS):
            q_NMd, grad_NMd = _rows(q_BGRSd[rows, :, :, queries]), _rows(grad_BGRSd[rows, :, :, queries])
            k_NKd, v_NKd = (_dense(x[rows, :, keys]) for x in (k_BGSd, v_BGSd))
            shape = len(q_NMd), q_NMd.shape[1], k_NKd.shape[1]
            p_NMK = bmm(q_NMd, k_NKd.transpose(1, 2), out=scratch[0, *shape])
            _probabilities_(p_NMK, log_sum_BHS[rows], starts_BS, rows, queries, keys, width, fresh=False)
            grad_v = bmm(p_NMK.transpose(1, 2), grad_NMd)
            grad_NMK = bmm(grad_NMd, v_NKd.transpose(1, 2), out=scratch[1, *shape])
            native.call(
                "softmax_backward", p_NMK.dtype, p_NMK, grad_NMK, shape[0] * shape[1], shape[2], width**-0.5
            )
            grad_q = bmm(grad_NMK, k_NKd)
            grad_k = bmm(grad_NMK.transpose(1, 2), q_NMd)
            grad_q_BGRSd[rows, :, :, queries] = grad_q.view_as(grad_q_BGRSd[rows, :, :, queries])
            grad_k_BGSd[rows, :, keys] += grad_k.view_as(grad_k_BGSd[rows, :, keys])
            grad_v_BGSd[rows, :, keys] += grad_v.view_as(grad_v_BGSd[rows, :, keys])
        dtype = q_BHSd.dtype
        return grad_q_BSHd.transpose(1, 2), grad_k_BGSd.to(dtype), grad_v_BGSd.to(dtype), None


def _rows(x_BGRbd: Tensor) -> Tensor:
    """(N, R * b, d): the queries of a group are rows of one product."""
    batch, groups, repeats, block, width = x_BGRbd.shape
    return x_BGRbd.reshape(batch * groups, repeats * block, width)


def _dense(x_BGKd: Tensor) -> Tensor:
    """(N, K, d), copied where it must be: each product would copy it again, slower where it is transposed."""
    return x_BGKd.flatten(0, 1).contiguous()


def _blocks(q_BGRSd: Tensor, starts_BS: Tensor | None):
    """(sequences, queries, keys) as slices: all queries, each with every key that any of its block sees."""
    batch, groups, repeats, length, _ = q_BGRSd.shape
    block = 64 if length <= 1024 else 128
    lowest = None if starts_BS is None else starts_BS[:, ::block].amin(0).tolist()
    for begin in range(0, length, block):
        end = min(begin + block, length)
        first = 0 if lowest is None else lowest[begin // block] // block * block
        scores = groups * repeats * (end - begin) * (end - first)
        step = max(1, min(batch, _SCRATCH_ELEMENTS // scores))
        for row in range(0, batch, step):
            yield slice(row, min(row + step, batch)), slice(begin, end), slice(first, end)


def _probabilities_(
    scores_NMK: Tensor, log_sum_bHS: Tensor, starts_BS: Tensor | None, rows: slice, queries: slice, keys: slice,
    width: int, fresh: bool,
) -> None:
    batch, heads, length = log_sum_bHS.shape
    groups = len(scores_NMK) // batch
    starts_bS = None if starts_BS is None else starts_BS[rows]
    native.call(
        "probabilities", scores_NMK.dtype, scores_NMK, log_sum_bHS, starts_bS, len(scores_NMK), groups,
        heads // groups, queries.stop - queries.start, scores_NMK.shape[2], queries.start, keys.start, length,
        width**-0.5, fresh,
    )


class _Scratch:
    """Buffers that are handed out again for every block: fresh memory costs as much as the pass that fills it."""

    def __init__(self, count: int, like: Tensor):
        self._buffers: list[Tensor | None] = [None] * count
        self._like = like

    def __getitem__(self, key: tuple[int, ...]) -> Tensor:
        index, *shape = key
        size = 1
        for extent in shape:
            size *= extent
        buffer = self._buffers[index]
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[index] = self._like.new_empty(size)
        return buffer[:size].view(shape)
