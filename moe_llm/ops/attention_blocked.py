"""Attention on a CPU, block of queries by block of queries: products of torch's, softmax by our kernels.

torch's own fused backward pass takes five times as long as its forward in bf16. Here both passes are batched matrix
products over blocks of queries and the keys that these may see, and one pass over the scores in between. Kept for
the backward pass: queries, keys, values and one number for each query and head. Our products (see `products`) read and
write all of these where they lie; for torch's they are copied together.

In bf16 scores and probabilities are rounded to bf16 between the products, as in transformers' eager attention.
Dimensions: B batch, S sequence, H query heads, G key-value heads, R = H / G, d head dimension; of a block: b sequences
or queries, K keys.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_llm.ops import native
from moe_llm.ops.products import fits

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
        log_sum_BHS = torch.zeros(batch, heads, length)
        out_BSHd = q_BHSd.new_empty(batch, length, heads, width)
        out_BGRSd = out_BSHd.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)
        scratch = _Scratch(1, q_BHSd)
        for rows, queries, keys in _blocks(q_BGRSd, starts_BS):
            q_bGRbd = _operand(q_BGRSd[rows, :, :, queries])
            k_bGKd, v_bGKd = (_operand(x[rows, :, keys]) for x in (k_BGSd, v_BGSd))
            p_bGRbK = scratch[0, *q_bGRbd.shape[:-1], k_bGKd.shape[2]]
            _multiply(q_bGRbd, k_bGKd, p_bGRbK, transpose_b=True)
            _probabilities_(p_bGRbK, log_sum_BHS[rows], starts_BS, rows, queries, keys, width, fresh=True)
            _multiply(p_bGRbK, v_bGKd, out_BGRSd[rows, :, :, queries])
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
            q_bGRbd, grad_bGRbd = (_operand(x[rows, :, :, queries]) for x in (q_BGRSd, grad_BGRSd))
            k_bGKd, v_bGKd = (_operand(x[rows, :, keys]) for x in (k_BGSd, v_BGSd))
            shape = *q_bGRbd.shape[:-1], k_bGKd.shape[2]
            p_bGRbK, grad_bGRbK = scratch[0, *shape], scratch[1, *shape]
            _multiply(q_bGRbd, k_bGKd, p_bGRbK, transpose_b=True)
            _probabilities_(p_bGRbK, log_sum_BHS[rows], starts_BS, rows, queries, keys, width, fresh=False)
            _multiply(p_bGRbK, grad_bGRbd, grad_v_BGSd[rows, :, keys], transpose_a=True, add=True)
            _multiply(grad_bGRbd, v_bGKd, grad_bGRbK, transpose_b=True)
            count = p_bGRbK.numel() // shape[-1]
            native.call("softmax_backward", p_bGRbK.dtype, p_bGRbK, grad_bGRbK, count, shape[-1], width**-0.5)
            _multiply(grad_bGRbK, k_bGKd, grad_q_BGRSd[rows, :, :, queries])
            _multiply(grad_bGRbK, q_bGRbd, grad_k_BGSd[rows, :, keys], transpose_a=True, add=True)
        dtype = q_BHSd.dtype
        return grad_q_BSHd.transpose(1, 2), grad_k_BGSd.to(dtype), grad_v_BGSd.to(dtype), None


def _operand(x: Tensor) -> Tensor:
    """As it lies, where products can read it so, and otherwise copied once for all products that read it."""
    return x if fits(x) and x.stride(-1) == 1 else x.contiguous()


def _multiply(
    a: Tensor, b: Tensor, out: Tensor, transpose_a: bool = False, transpose_b: bool = False, add: bool = False
) -> None:
    """out = a b, or added to it, of (B, G, rows, columns) or (B, G, R, rows, columns), whose R * rows are rows of one
    product: the queries of a group."""
    if fits(a):
        native.matmul(a, b, out, transpose_a=transpose_a, transpose_b=transpose_b, add=add)
        return
    a, b = _rows(a), _rows(b)
    a, b = a.mT if transpose_a else a, b.mT if transpose_b else b
    if out.is_contiguous() and not add:
        torch.bmm(a, b, out=_rows(out))
    elif add:
        out += torch.bmm(a, b).view_as(out)
    else:
        out.copy_(torch.bmm(a, b).view_as(out))


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, 1) if x.dim() == 4 else x.flatten(2, 3).flatten(0, 1)


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
    scores_bGRbK: Tensor,
    log_sum_bHS: Tensor,
    starts_BS: Tensor | None,
    rows: slice,
    queries: slice,
    keys: slice,
    width: int,
    fresh: bool,
) -> None:
    batch, groups, repeats, block, seen = scores_bGRbK.shape
    starts_bS = None if starts_BS is None else starts_BS[rows]
    native.call(
        "probabilities",
        scores_bGRbK.dtype,
        scores_bGRbK,
        log_sum_bHS,
        starts_bS,
        batch * groups,
        groups,
        repeats,
        block,
        seen,
        queries.start,
        keys.start,
        log_sum_bHS.shape[2],
        width**-0.5,
        fresh,
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
