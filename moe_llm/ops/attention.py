"""Who sees whom, decided once per forward pass, and grouped-query attention under that pattern.

Dimensions: B batch, S sequence, H query heads, G key-value heads (H is a multiple), d head dimension.
"""

import functools
import importlib.util
import inspect
import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_llm.ops import host, native
from moe_llm.ops.products import fits


@dataclass(frozen=True)
class AttentionPattern:
    """Causal attention, narrowed by documents, padding and a window; built once and shared by all layers.

    At most one of the first two is set, and neither for plain causal attention:
    mask_B1SS: bool, true where the query (row) sees the key (column).
    segments: lengths that cut the B * S positions into runs, each causal within itself and blind to all else.
        The cost is that of the documents instead of the whole square. With documents of 128 to 400 tokens in 512 to
        2048, forward and backward take 0.2 to 0.7 of the masked time on a CPU (scripts/benchmarks/ops.py).
    starts_BS: int32, with segments on a CPU: the first key that each query sees.
    ends_R: int32, with segments on a GPU: 0 and the end of each run, for kernels of variable length.
    window: with ends_R, how many keys a query sees at most, itself among them; None: all of its run's.
    """

    mask_B1SS: Tensor | None = None
    segments: tuple[int, ...] | None = None
    starts_BS: Tensor | None = None
    ends_R: Tensor | None = None
    window: int | None = None

    @staticmethod
    def build(
        like_BS: Tensor,
        *,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        sliding_window: int | None = None,
        runs: Sequence[Sequence[int]] | None = None,
    ) -> "AttentionPattern":
        """The pattern of a batch.

        Args:
            like_BS: any tensor of the batch's shape and device, such as the token ids.
            attention_mask: (B, S), zero for padding, which no real token sees.
            document_ids: (B, S) integers; queries see keys with the same number only.
            sliding_window: a query sees itself and the sliding_window - 1 keys before it.
            runs: what attention_mask and document_ids say, as the lengths of each row's runs, known on the host. On a
                GPU nothing then waits for the device; without them the device is asked once. Runs that are longer than
                the batch are of whole sequences, of which the batch is a part; so is the pattern.

        Queries that would see nothing (padding) see themselves, so that their softmax is finite.
        """
        if runs is not None and sum(runs[0]) > like_BS.shape[1]:
            like_BS, attention_mask, document_ids = _of_whole_sequences(like_BS, runs)
        batch, length = like_BS.shape
        if sliding_window is not None and sliding_window >= length:
            sliding_window = None
        if attention_mask is None and document_ids is None:
            segments: tuple[int, ...] | None = (length,) * batch
        elif runs is not None:
            segments = tuple(run for row in runs for run in row)
            assert sum(segments) == like_BS.numel(), f"the runs hold {sum(segments)} of {like_BS.numel()} positions"
        else:
            segments = _segments(like_BS, attention_mask, document_ids)
        if segments is not None and sliding_window is not None and max(segments) <= sliding_window:
            sliding_window = None
        if segments == (length,) * batch and sliding_window is None:
            return AttentionPattern()
        if segments is not None and sliding_window is None:
            if like_BS.device.type == "cpu":
                return AttentionPattern(segments=segments, starts_BS=_starts(segments, like_BS.shape))
            return AttentionPattern(segments=segments, ends_R=_ends(segments, like_BS.device))
        if segments is not None and like_BS.device.type != "cpu" and variable_length_kernel() is not None:
            return AttentionPattern(segments=segments, ends_R=_ends(segments, like_BS.device), window=sliding_window)
        if like_BS.device.type != "cpu":
            warn_of_dense_mask(batch, length, segments is None)
        mask_BS = None if attention_mask is None else attention_mask != 0
        return AttentionPattern(_mask(like_BS, mask_BS, document_ids, sliding_window))


def attention(q_BHSd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor, *, pattern: AttentionPattern) -> Tensor:
    """softmax(q k^T / sqrt(d)) v under the pattern, (B, H, S, d); head h reads key-value head h * G // H."""
    if pattern.mask_B1SS is None and native.fits(q_BHSd, k_BGSd, v_BGSd):
        return blocked_attention(q_BHSd, k_BGSd, v_BGSd, pattern.starts_BS)
    if pattern.segments is not None:
        if pattern.ends_R is not None and variable_length_fits(q_BHSd):
            return _variable_length_attention(q_BHSd, k_BGSd, v_BGSd, pattern)
        return _segment_attention(q_BHSd, k_BGSd, v_BGSd, pattern.segments, pattern.window)
    return F.scaled_dot_product_attention(
        q_BHSd,
        k_BGSd,
        v_BGSd,
        attn_mask=pattern.mask_B1SS,
        is_causal=pattern.mask_B1SS is None,
        enable_gqa=q_BHSd.shape[1] != k_BGSd.shape[1],
    )


@functools.cache
def variable_length_kernel() -> str | None:
    """What computes attention of runs in one call on a GPU: torch's `varlen_attn`, else the package flash-attn."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is not None:
        return "torch"
    return "flash_attn" if importlib.util.find_spec("flash_attn") is not None else None


def variable_length_fits(q_BHSd: Tensor) -> bool:
    """Whether these queries can go to that kernel: on a GPU of compute capability 8.0 or later, bf16 or fp16, heads of
    at most 256 in steps of 8."""
    if q_BHSd.device.type != "cuda" or variable_length_kernel() is None:
        return False
    head = q_BHSd.shape[-1]
    half = q_BHSd.dtype in (torch.bfloat16, torch.float16)
    return half and head <= 256 and head % 8 == 0 and torch.cuda.get_device_capability(q_BHSd.device) >= (8, 0)


def warn_of_dense_mask(batch: int, length: int, scattered: bool) -> None:
    """Say that a mask of B x S x S is built on a GPU, and why."""
    why = (
        "documents that are not in one piece"
        if scattered
        else "a sliding window, without torch's varlen_attn (torch 2.10) or the package flash-attn"
    )
    warnings.warn(
        f"attention builds a dense mask of {batch} x {length} x {length} ({batch * length**2 / 2**30:.2f} GiB) for {why}: "
        "memory grows with the square of the length, and flash attention is ruled out",
        stacklevel=3,
    )


def _variable_length_attention(q_BHSd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor, pattern: AttentionPattern) -> Tensor:
    assert pattern.segments is not None
    q_THd, k_TGd, v_TGd = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHSd, k_BGSd, v_BGSd))
    longest, window = max(pattern.segments), (-1 if pattern.window is None else pattern.window - 1, 0)
    ends: tuple[Any, ...] = (pattern.ends_R, pattern.ends_R, longest, longest)
    if variable_length_kernel() == "torch":
        from torch.nn.attention import varlen

        accepted = inspect.signature(varlen.varlen_attn).parameters
        options: dict[str, Any] = {"window_size": window} if "window_size" in accepted else {"is_causal": True}
        assert "window_size" in accepted or pattern.window is None, "this torch's varlen_attn has no window"
        if "enable_gqa" in accepted:
            options["enable_gqa"] = q_THd.shape[1] != k_TGd.shape[1]
        else:
            shared = q_THd.shape[1] // k_TGd.shape[1]
            k_TGd, v_TGd = k_TGd.repeat_interleave(shared, 1), v_TGd.repeat_interleave(shared, 1)
        y_THd: Any = varlen.varlen_attn(q_THd, k_TGd, v_TGd, *ends, **options)
    else:
        from flash_attn import flash_attn_varlen_func

        y_THd = flash_attn_varlen_func(q_THd, k_TGd, v_TGd, *ends, causal=True, window_size=window)
    return y_THd.unflatten(0, (q_BHSd.shape[0], q_BHSd.shape[2])).transpose(1, 2)


def _segment_attention(
    q_BHSd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor, segments: tuple[int, ...], window: int | None = None
) -> Tensor:
    # one sequence of B * S positions; split and cat, unlike slices, have gradients that write each row once
    parts = [
        x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None].split(segments, dim=2) for x in (q_BHSd, k_BGSd, v_BGSd)
    ]
    gqa = q_BHSd.shape[1] != k_BGSd.shape[1]
    outputs = []
    for q, k, v in zip(*parts, strict=True):
        near_SS = None if window is None or q.shape[2] <= window else _mask(q[:, 0, :, 0], None, None, window)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=near_SS, is_causal=near_SS is None, enable_gqa=gqa)
        outputs.append(y[0].transpose(0, 1))
    batch, _, length, _ = q_BHSd.shape
    return torch.cat(outputs).unflatten(0, (batch, length)).transpose(1, 2)


def _segments(like_BS: Tensor, attention_mask: Tensor | None, document_ids: Tensor | None) -> tuple[int, ...] | None:
    """Lengths of the runs of equal document and padding, row after row.

    None where runs do not describe the pattern: a document that comes back after another or after padding.
    """
    given = [t for t in (attention_mask, document_ids) if t is not None]
    values_XBS = host.read(torch.stack([t.long() for t in given]), "documents and padding of a batch without runs")
    document_BS = values_XBS[-1] if document_ids is not None else np.zeros(like_BS.shape, np.int64)
    real_BS = values_XBS[0] != 0 if attention_mask is not None else np.ones(like_BS.shape, bool)
    runs: list[int] = []
    for document_S, real_S in zip(document_BS, real_BS, strict=True):
        begins_S = np.ones(len(document_S), bool)
        begins_S[1:] = (document_S[1:] != document_S[:-1]) | (real_S[1:] != real_S[:-1])
        first_R = np.flatnonzero(begins_S)
        owner_R = document_S[first_R][real_S[first_R]]
        if len(np.unique(owner_R)) != len(owner_R):
            return None
        runs += np.diff(first_R, append=len(document_S)).tolist()
    return tuple(runs)


def _of_whole_sequences(like_BS: Tensor, runs: Sequence[Sequence[int]]) -> tuple[Tensor, None, Tensor]:
    """What `AttentionPattern.build` takes, of sequences with these runs: padding is one run among them."""
    owner_BS = np.stack([np.repeat(np.arange(len(row)), row) for row in runs])
    document_BS = torch.from_numpy(owner_BS)
    document_BS = document_BS if like_BS.device.type == "cpu" else document_BS.to(like_BS.device, non_blocking=True)
    return document_BS, None, document_BS


def _ends(segments: tuple[int, ...], device: torch.device) -> Tensor:
    """0 and the last position of each run, int32, on the device, without waiting for it."""
    ends_R = torch.tensor(list(itertools.accumulate(segments, initial=0)), dtype=torch.int32)
    pinned = device.type == "cuda" and torch.cuda.is_available()
    return (ends_R.pin_memory() if pinned else ends_R).to(device, non_blocking=True)


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


def causal_mask(q_BHSd: Tensor, window: int | None) -> Tensor:
    """(B, 1, S, S): true where a query of a sequence without documents sees a key."""
    return _mask(q_BHSd[:, 0, :, 0], None, None, window)


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
