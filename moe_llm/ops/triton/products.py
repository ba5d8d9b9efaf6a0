"""Grouped matrix products over rows sorted by expert, with what surrounds them done in the same kernel.

Rows of no expert (beyond the counts' sum) come out as zeros, and enter no sum. Accumulation is in fp32; every element
is written by one program, without atomics, so that results repeat to the bit.
Dimensions: T tokens, N rows, E experts, D hidden, F expert width, G = 2F (gate rows, then up rows). In the kernels:
rows x COLUMNS is what is written, DEPTH what is summed over, and pointers are to contiguous tensors.
"""

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
            x_TD,
            gate_up_proj_EGD,
            token_index_N,
            weight_N,
            gate_up_NG,
            h_NF,
            counts_E,
            num_rows,
            experts,
            COLUMNS=width,
            DEPTH=hidden,
            **_common(x_TD, num_rows, experts),
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
            a_NK,
            weight_EOI,
            out,
            counts_E,
            len(a_NK),
            experts,
            weight_EOI.stride(0),
            *strides,
            COLUMNS=columns,
            DEPTH=depth,
            **_common(a_NK, len(a_NK), experts),
        )
    return out


def weight_gradient(grad_NO: Tensor, input_NI: Tensor, counts_E: Tensor) -> Tensor:
    """(E, O, I): the sum of grad^T input over each expert's rows, zero for an expert without rows."""
    experts, num_rows = len(counts_E), len(grad_NO)
    out_EOI = grad_NO.new_empty(experts, grad_NO.shape[1], input_NI.shape[1])

    def grid(block):
        tiles = triton.cdiv(out_EOI.shape[1], block["BLOCK_M"]) * triton.cdiv(out_EOI.shape[2], block["BLOCK_N"])
        return tiles, experts

    _weight_gradient[grid](
        grad_NO,
        input_NI,
        out_EOI,
        counts_E,
        experts,
        COLUMNS=input_NI.shape[1],
        DEPTH=grad_NO.shape[1],
        **_common(grad_NO, num_rows, experts),
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
    source = tl.minimum(rows, end - 1)
    if index_ptr is not None:
        source = tl.load(index_ptr + source)
    depth = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + source.to(tl.int64)[:, None] * DEPTH + depth[None, :]
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


@tuning.tuned()
@triton.jit
def _weight_gradient(
    grad_ptr, input_ptr, out_ptr, counts_ptr, num_experts,
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
    rows = tl.arange(0, BLOCK_K)
    grad_ptrs = grad_ptr + (first + rows).to(tl.int64)[None, :] * DEPTH + (outs % DEPTH)[:, None]
    input_ptrs = input_ptr + (first + rows).to(tl.int64)[:, None] * COLUMNS + (ins % COLUMNS)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for row in range(first, end, BLOCK_K):
        grad = tl.load(grad_ptrs, mask=rows[None, :] < end - row, other=0.0)
        x = tl.load(input_ptrs, mask=rows[:, None] < end - row, other=0.0)
        total = tl.dot(grad, x, total, input_precision=PRECISION)
        grad_ptrs += BLOCK_K * DEPTH
        input_ptrs += BLOCK_K * COLUMNS
    out_ptrs = out_ptr + expert.to(tl.int64) * (DEPTH * COLUMNS) + outs.to(tl.int64)[:, None] * COLUMNS + ins[None, :]
    written = (outs < DEPTH)[:, None] & (ins < COLUMNS)[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=written)
