"""Grouped matrix products over rows sorted by expert, with what surrounds them done in the same kernel.

Rows of no expert (beyond the counts' sum) come out as zeros, and enter no sum. Accumulation is in fp32; every element
is written by one program, without atomics, so that results repeat to the bit.
Dimensions: T tokens, N rows, E experts, D hidden, F expert width, G = 2F (gate rows, then up rows). In the kernels:
rows x COLUMNS is what is written, DEPTH what is summed over, and pointers are to contiguous tensors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_llm.ops.triton import tuning
from moe_llm.ops.triton.tiles import most_tiles, rows_of_expert, rows_of_tile, tile_of


def gate_up_swiglu(
    x_TD: Tensor, gate_up_proj_EGD: Tensor, counts_E: Tensor, weight_N: Tensor | None, token_index_N: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(gate and up projections (N, G), weight * silu(gate) * up (N, F)).

    token_index_N: row n is x[token_index_N[n]]; None: x has the rows themselves.
    """
    num_rows, hidden = len(x_TD) if token_index_N is None else len(token_index_N), x_TD.shape[1]
    experts, width = gate_up_proj_EGD.shape[0], gate_up_proj_EGD.shape[1] // 2
    gate_up_NG, h_NF = x_TD.new_empty(num_rows, 2 * width), x_TD.new_empty(num_rows, width)
    if num_rows:
        _gate_up_swiglu[_grid(num_rows, experts, width)](
            x_TD, gate_up_proj_EGD, token_index_N, weight_N, gate_up_NG, h_NF, counts_E, num_rows, experts,
            COLUMNS=width, DEPTH=hidden, **_common(x_TD, num_rows, experts),
        )
    return gate_up_NG, h_NF


def rows_product(a_NK: Tensor, weight_EOI: Tensor, counts_E: Tensor, transposed: bool) -> Tensor:
    """Each row times its expert's matrix: a W (I columns), or transposed: a W^T (O columns)."""
    experts = len(weight_EOI)
    columns, depth = weight_EOI.shape[1:] if transposed else weight_EOI.shape[:0:-1]
    strides = weight_EOI.stride()[1:] if transposed else weight_EOI.stride()[:0:-1]
    out = a_NK.new_empty(len(a_NK), columns)
    if len(a_NK):
        _rows_product[_grid(len(a_NK), experts, columns)](
            a_NK, weight_EOI, out, counts_E, len(a_NK), experts, weight_EOI.stride(0), *strides,
            COLUMNS=columns, DEPTH=depth, **_common(a_NK, len(a_NK), experts),
        )
    return out


def hidden_gradient(
    grad_TD: Tensor, down_proj_EDF: Tensor, gate_up_NG: Tensor, counts_E: Tensor, weight_N: Tensor | None,
    token_index_N: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """From the gradient of the experts' outputs, not yet weighted: (weight * silu(gate) * up again (N, F), the
    gradients of gate and up (N, G), of the weights (N,) in fp32)."""
    (num_rows, _), (experts, hidden, width) = gate_up_NG.shape, down_proj_EDF.shape
    h_NF, grad_NG = gate_up_NG.new_empty(num_rows, width), torch.empty_like(gate_up_NG)
    partial = None
    if weight_N is not None:  # one sum for each tile of columns; zeros where a configuration has wide tiles
        parts = triton.cdiv(width, tuning.SMALLEST_COLUMNS)
        partial = torch.zeros(parts, num_rows, dtype=torch.float32, device=h_NF.device)
    if num_rows:
        _hidden_gradient[_grid(num_rows, experts, width)](
            grad_TD, down_proj_EDF, gate_up_NG, token_index_N, weight_N, h_NF, grad_NG, partial, counts_E, num_rows,
            experts, COLUMNS=width, DEPTH=hidden, **_common(grad_TD, num_rows, experts),
        )
    return h_NF, grad_NG, None if partial is None else partial.sum(0)


def weight_gradient(
    grad_NO: Tensor, input_NI: Tensor, counts_E: Tensor, grad_index_N: Tensor | None, input_index_N: Tensor | None
) -> Tensor:
    """(E, O, I): the sum of grad^T input over each expert's rows, zero for an expert without rows.

    Where an index is given, row n is the tensor's row index[n].
    """
    experts, index_N = len(counts_E), input_index_N if grad_index_N is None else grad_index_N
    num_rows = len(grad_NO) if index_N is None else len(index_N)
    out_EOI = grad_NO.new_empty(experts, grad_NO.shape[1], input_NI.shape[1])
    if num_rows == 0:
        return out_EOI.zero_()

    def grid(block):
        tiles = triton.cdiv(out_EOI.shape[1], block["BLOCK_M"]) * triton.cdiv(out_EOI.shape[2], block["BLOCK_N"])
        return tiles, experts

    _weight_gradient[grid](
        grad_NO, input_NI, grad_index_N, input_index_N, out_EOI, counts_E, experts,
        COLUMNS=input_NI.shape[1], DEPTH=grad_NO.shape[1], **_common(grad_NO, num_rows, experts),
    )
    return out_EOI


def _grid(num_rows: int, experts: int, columns: int):
    def grid(block):
        return (most_tiles(num_rows, experts, block["BLOCK_M"]) * triton.cdiv(columns, block["BLOCK_N"]),)

    return grid


def _common(x: Tensor, num_rows: int, experts: int) -> dict:
    return {
        "EXPERTS": triton.next_power_of_2(experts + 1),
        "OCTAVE": tuning.rows_octave(num_rows, experts),
        "PRECISION": tuning.precision(x.dtype),
    }


@triton.jit
def _gathered(index_ptr, rows):
    """The source rows of these, as int64 (offsets pass 2^31); index_ptr None: the rows themselves."""
    if index_ptr is None:
        source = rows.to(tl.int64)
    else:
        source = tl.load(index_ptr + rows).to(tl.int64)
    return source


@triton.jit
def _depth_loaded(pointers, k, depth_offsets, DEPTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile at depth k; zeros beyond DEPTH. depth_offsets are broadcast to the tile's shape."""
    if DEPTH % BLOCK_K == 0:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=depth_offsets < DEPTH - k, other=0.0)
    return tile


@tuning.tuned(two_products=True)
@triton.jit
def _gate_up_swiglu(
    x_ptr, proj_ptr, index_ptr, weight_ptr, gate_up_ptr, h_ptr, counts_ptr, num_rows, num_experts,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EXPERTS: tl.constexpr, OCTAVE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    num_n: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    tile_m, tile_n = tile_of(tl.program_id(0), tl.num_programs(0) // num_n, num_n, GROUP_M)
    expert, first, end = rows_of_tile(counts_ptr, tile_m, num_rows, num_experts, EXPERTS, BLOCK_M)
    if first >= end:
        return
    rows = first + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    written = (rows < end)[:, None] & (columns < COLUMNS)[None, :]
    h_ptrs = h_ptr + rows.to(tl.int64)[:, None] * COLUMNS + columns[None, :]
    gate_ptrs = gate_up_ptr + rows.to(tl.int64)[:, None] * (2 * COLUMNS) + columns[None, :]
    if expert == num_experts:
        zeros = tl.zeros((BLOCK_M, BLOCK_N), h_ptr.dtype.element_ty)
        tl.store(h_ptrs, zeros, mask=written)
        tl.store(gate_ptrs, zeros, mask=written)
        tl.store(gate_ptrs + COLUMNS, zeros, mask=written)
        return
    # what is read beyond the tile's rows and columns is some row or column that exists: it is not written
    source = _gathered(index_ptr, tl.minimum(rows, end - 1))
    depth = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + source[:, None] * DEPTH + depth[None, :]
    matrix_ptr = proj_ptr + expert.to(tl.int64) * (2 * COLUMNS * DEPTH)
    w_ptrs = matrix_ptr + (columns % COLUMNS)[None, :] * DEPTH + depth[:, None]
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, DEPTH, BLOCK_K):
        x = _depth_loaded(x_ptrs, k, depth[None, :], DEPTH, BLOCK_K)
        w_gate = _depth_loaded(w_ptrs, k, depth[:, None], DEPTH, BLOCK_K)
        w_up = _depth_loaded(w_ptrs + COLUMNS * DEPTH, k, depth[:, None], DEPTH, BLOCK_K)
        gate = tl.dot(x, w_gate, gate, input_precision=PRECISION)
        up = tl.dot(x, w_up, up, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    h = gate * tl.sigmoid(gate) * up
    if weight_ptr is not None:
        h *= tl.load(weight_ptr + rows, mask=rows < end, other=0.0).to(tl.float32)[:, None]
    tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=written)
    tl.store(gate_ptrs, gate.to(gate_up_ptr.dtype.element_ty), mask=written)
    tl.store(gate_ptrs + COLUMNS, up.to(gate_up_ptr.dtype.element_ty), mask=written)


@tuning.tuned()
@triton.jit
def _rows_product(
    a_ptr, proj_ptr, out_ptr, counts_ptr, num_rows, num_experts, stride_e, stride_column, stride_depth,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EXPERTS: tl.constexpr, OCTAVE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    num_n: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    tile_m, tile_n = tile_of(tl.program_id(0), tl.num_programs(0) // num_n, num_n, GROUP_M)
    expert, first, end = rows_of_tile(counts_ptr, tile_m, num_rows, num_experts, EXPERTS, BLOCK_M)
    if first >= end:
        return
    rows = first + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    written = (rows < end)[:, None] & (columns < COLUMNS)[None, :]
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * COLUMNS + columns[None, :]
    if expert == num_experts:
        tl.store(out_ptrs, tl.zeros((BLOCK_M, BLOCK_N), out_ptr.dtype.element_ty), mask=written)
        return
    depth = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + tl.minimum(rows, end - 1).to(tl.int64)[:, None] * DEPTH + depth[None, :]
    w_ptrs = proj_ptr + expert.to(tl.int64) * stride_e
    w_ptrs += (columns % COLUMNS)[None, :] * stride_column + depth[:, None] * stride_depth
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, DEPTH, BLOCK_K):
        a = _depth_loaded(a_ptrs, k, depth[None, :], DEPTH, BLOCK_K)
        w = _depth_loaded(w_ptrs, k, depth[:, None], DEPTH, BLOCK_K)
        total = tl.dot(a, w, total, input_precision=PRECISION)
        a_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_depth
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=written)


@tuning.tuned(reset=("partial_ptr",))
@triton.jit
def _hidden_gradient(
    grad_ptr, proj_ptr, gate_up_ptr, index_ptr, weight_ptr, h_ptr, grad_gate_up_ptr, partial_ptr, counts_ptr,
    num_rows, num_experts,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EXPERTS: tl.constexpr, OCTAVE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    num_n: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    tile_m, tile_n = tile_of(tl.program_id(0), tl.num_programs(0) // num_n, num_n, GROUP_M)
    expert, first, end = rows_of_tile(counts_ptr, tile_m, num_rows, num_experts, EXPERTS, BLOCK_M)
    if first >= end:
        return
    rows = first + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    written = (rows < end)[:, None] & (columns < COLUMNS)[None, :]
    h_ptrs = h_ptr + rows.to(tl.int64)[:, None] * COLUMNS + columns[None, :]
    gate_offsets = rows.to(tl.int64)[:, None] * (2 * COLUMNS) + columns[None, :]
    kind = h_ptr.dtype.element_ty
    if expert == num_experts:
        zeros = tl.zeros((BLOCK_M, BLOCK_N), kind)
        tl.store(h_ptrs, zeros, mask=written)
        tl.store(grad_gate_up_ptr + gate_offsets, zeros, mask=written)
        tl.store(grad_gate_up_ptr + gate_offsets + COLUMNS, zeros, mask=written)
        return
    source = _gathered(index_ptr, tl.minimum(rows, end - 1))
    depth = tl.arange(0, BLOCK_K)
    grad_ptrs = grad_ptr + source[:, None] * DEPTH + depth[None, :]
    matrix_ptr = proj_ptr + expert.to(tl.int64) * (COLUMNS * DEPTH)
    w_ptrs = matrix_ptr + depth[:, None] * COLUMNS + (columns % COLUMNS)[None, :]
    grad_h = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, DEPTH, BLOCK_K):
        grad = _depth_loaded(grad_ptrs, k, depth[None, :], DEPTH, BLOCK_K)
        w = _depth_loaded(w_ptrs, k, depth[:, None], DEPTH, BLOCK_K)
        grad_h = tl.dot(grad, w, grad_h, input_precision=PRECISION)
        grad_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * COLUMNS
    gate = tl.load(gate_up_ptr + gate_offsets, mask=written, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + gate_offsets + COLUMNS, mask=written, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    h = silu * up
    if weight_ptr is not None:
        # y = (weight h) W^T, so dL/dweight = grad . (h W^T) = (grad W) . h: y itself is not needed
        tl.store(
            partial_ptr + tile_n.to(tl.int64) * num_rows + rows, tl.sum(grad_h * h, 1), mask=rows < end,
        )  # fmt: skip
        weight = tl.load(weight_ptr + rows, mask=rows < end, other=0.0).to(tl.float32)[:, None]
        h *= weight
        grad_h *= weight
    grad_gate = grad_h * up * (sigmoid + silu * (1 - sigmoid))
    tl.store(h_ptrs, h.to(kind), mask=written)
    tl.store(grad_gate_up_ptr + gate_offsets, grad_gate.to(kind), mask=written)
    tl.store(grad_gate_up_ptr + gate_offsets + COLUMNS, (grad_h * silu).to(kind), mask=written)


@tuning.tuned()
@triton.jit
def _weight_gradient(
    grad_ptr, input_ptr, grad_index_ptr, input_index_ptr, out_ptr, counts_ptr, num_experts,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EXPERTS: tl.constexpr, OCTAVE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # here the sum is over an expert's rows, and DEPTH is the number of rows that are written
    num_n: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    num_m: tl.constexpr = (DEPTH + BLOCK_M - 1) // BLOCK_M
    tile_m, tile_n = tile_of(tl.program_id(0), num_m, num_n, GROUP_M)
    expert = tl.program_id(1)
    first, end = rows_of_expert(counts_ptr, expert, num_experts, EXPERTS)
    outs = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    ins = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for row in range(first, end, BLOCK_K):
        rows = row + tl.arange(0, BLOCK_K)
        own = rows < end
        inside = tl.minimum(rows, end - 1)
        grad_rows = _gathered(grad_index_ptr, inside)
        input_rows = _gathered(input_index_ptr, inside)
        grad = tl.load(
            grad_ptr + grad_rows[None, :] * DEPTH + (outs % DEPTH)[:, None], mask=own[None, :], other=0.0
        )
        x = tl.load(
            input_ptr + input_rows[:, None] * COLUMNS + (ins % COLUMNS)[None, :], mask=own[:, None], other=0.0
        )
        total = tl.dot(grad, x, total, input_precision=PRECISION)
    out_ptrs = out_ptr + expert.to(tl.int64) * (DEPTH * COLUMNS) + outs.to(tl.int64)[:, None] * COLUMNS + ins[None, :]
    written = (outs < DEPTH)[:, None] & (ins < COLUMNS)[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=written)
