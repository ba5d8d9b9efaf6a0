"""Which tile of which expert a program works on: found by the program itself, so that counts stay on the device."""

import triton
import triton.language as tl


def most_tiles(num_rows: int, num_experts: int, block: int) -> int:
    """The most tiles of `block` rows that any counts make; those beyond what they do make end at once."""
    # each expert, and the rows of no expert, may end in a tile that is not full
    return num_rows // block + num_experts + 1


@triton.jit
def tile_of(pid, num_m, num_n, GROUP_M: tl.constexpr):
    """(m, n) of a program: GROUP_M tiles of rows walk over the columns together and share tiles of weights in L2."""
    group = pid // (GROUP_M * num_n)
    first_m = group * GROUP_M
    size_m = min(num_m - first_m, GROUP_M)
    within = pid % (GROUP_M * num_n)
    return first_m + within % size_m, within // size_m


@triton.jit
def rows_of_tile(counts_ptr, tile_m, num_rows, num_experts, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """(expert, first row, end of the expert's rows) of a tile of rows.

    Rows of no expert are tiled behind the last expert's, as expert `num_experts`; for tiles beyond all rows the first
    row is not below the end. EXPERTS: a power of two above num_experts.
    """
    e = tl.arange(0, EXPERTS)
    count = tl.load(counts_ptr + e, mask=e < num_experts, other=0).to(tl.int32)
    count = tl.where(e == num_experts, num_rows - tl.sum(count, 0), count)
    tiles = (count + BLOCK_M - 1) // BLOCK_M
    row_end = tl.cumsum(count, 0)
    tile_end = tl.cumsum(tiles, 0)
    expert = tl.sum((tile_end <= tile_m).to(tl.int32), 0)
    own = e == expert
    end = tl.sum(tl.where(own, row_end, 0), 0)
    start = end - tl.sum(tl.where(own, count, 0), 0)
    first_tile = tl.sum(tl.where(own, tile_end - tiles, 0), 0)
    return expert, start + (tile_m - first_tile) * BLOCK_M, end


@triton.jit
def rows_of_expert(counts_ptr, expert, num_experts, EXPERTS: tl.constexpr):
    """(first row, end) of an expert."""
    e = tl.arange(0, EXPERTS)
    count = tl.load(counts_ptr + e, mask=e < num_experts, other=0).to(tl.int32)
    end = tl.sum(tl.where(e <= expert, count, 0), 0)
    return end - tl.sum(tl.where(e == expert, count, 0), 0), end
