"""Which block sizes, warps and stages a kernel is tried with, and when.

Tuning runs once for each model shape, dtype and octave of rows (`rows_octave`), never for a routing: counts are not
part of the key. The winners are kept on disk beside Triton's compiled kernels, so that the next run starts with
them, and with the same order of summation.
"""

import torch
import triton

from moe_llm.ops.triton import interpreted

# Of a tile's (rows, columns, depth), the tiles of rows that share a walk over the columns, warps and stages. Sized by
# arithmetic: accumulators take at most 128 registers a thread; a stage holds (rows + columns) * depth elements of 2
# bytes, and all stages have to fit 227 KiB of shared memory on Hopper, 163 KiB on A100, 99 KiB on consumer Ampere and
# Ada. Configurations that do not fit a device are left out there (`_fitting`).
_ONE_PRODUCT = [  # one accumulator
    (128, 256, 64, 8, 8, 3), (128, 256, 64, 8, 8, 4), (256, 128, 64, 8, 8, 3), (128, 128, 64, 8, 8, 3),
    (128, 128, 64, 8, 4, 4), (128, 128, 32, 8, 4, 4), (64, 128, 64, 16, 4, 4), (64, 64, 64, 16, 4, 3),
]  # fmt: skip
_TWO_PRODUCTS = [  # gate and up: two accumulators of rows x columns each, two tiles of weights a stage
    (128, 128, 64, 8, 8, 3), (128, 128, 64, 8, 8, 4), (128, 128, 32, 8, 8, 4), (128, 64, 64, 8, 4, 3),
    (128, 64, 32, 8, 4, 4), (64, 128, 64, 16, 8, 3), (64, 64, 64, 16, 4, 3), (64, 64, 32, 16, 4, 4),
]  # fmt: skip
# in the interpreter: small, so that small inputs have several tiles with tails
_SMALL = [(16, 16, 16, 2, 1, 1)]


def tuned(two_products: bool = False):
    """Decorator of a kernel with BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M and the key below among its arguments."""
    blocks = _SMALL if interpreted() else _TWO_PRODUCTS if two_products else _ONE_PRODUCT
    configs = [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": group}, num_warps=warps, num_stages=stages)
        for m, n, k, group, warps, stages in blocks
    ]
    return triton.autotune(
        configs,
        key=["OCTAVE", "COLUMNS", "DEPTH", "num_experts"],
        cache_results=True,
        prune_configs_by={"early_config_prune": _fitting(1 + two_products)},
    )


def rows_octave(num_rows: int, num_experts: int) -> int:
    """The power of two below the rows of an average expert."""
    return (num_rows // num_experts).bit_length()


def _fitting(tiles_of_weights: int):
    def keep(configs, arguments, **_):
        tensor = next(t for t in arguments.values() if isinstance(t, torch.Tensor) and t.is_floating_point())
        limit = torch.cuda.get_device_properties(tensor.device).shared_memory_per_block_optin
        kept = [c for c in configs if stage_bytes(c, tensor.element_size(), tiles_of_weights) * c.num_stages <= limit]
        return kept or [min(configs, key=lambda c: stage_bytes(c, 1, tiles_of_weights) * c.num_stages)]

    return keep


def stage_bytes(config: triton.Config, element_bytes: int, tiles_of_weights: int) -> int:
    """Shared memory of one pipeline stage."""
    block = config.kwargs
    return (block["BLOCK_M"] + tiles_of_weights * block["BLOCK_N"]) * block["BLOCK_K"] * element_bytes


def precision(dtype: torch.dtype) -> str:
    """How products of fp32 are formed: exactly, unless `torch.set_float32_matmul_precision` allows less."""
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"
