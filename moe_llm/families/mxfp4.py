"""Weights in MXFP4, as gpt-oss is published (Open Compute Project 2023, "OCP Microscaling Formats", sections 5.2 and 5.3).

An experts' tensor `NAME` (E, C, R) is stored as `NAME_blocks` (E, R, G, 16), two values of 4 bits a byte, the lower half
first, and `NAME_scales` (E, R, G), an exponent for each 32 values, with C = 32 G. bf16 holds every value exactly.
E experts, R rows, G blocks of a row, C columns.
"""

import torch

_BLOCKS, _SCALES = "_blocks", "_scales"
_PER_BLOCK = 16  # bytes
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of two bits of exponent and one of mantissa; then the sign
_BIAS = 127  # of the exponents


def packed(shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    """The tensors that are stored in this format, by name, with the shapes that they have.

    Args:
        shapes: dtype and shape of each stored tensor, by name.
    """
    found: dict[str, tuple[int, ...]] = {}
    for blocks, (dtype, shape) in shapes.items():
        name = blocks.removesuffix(_BLOCKS)
        if name == blocks or dtype != torch.uint8 or len(shape) != 4 or shape[-1] != _PER_BLOCK:
            continue
        if shapes.get(name + _SCALES) == (torch.uint8, shape[:-1]):
            found[name] = (shape[0], 2 * _PER_BLOCK * shape[2], shape[1])
    return found


def stored_names(name: str) -> tuple[str, str]:
    """Of the blocks and of the scales."""
    return name + _BLOCKS, name + _SCALES


def unpacked(blocks_nRGB: torch.Tensor, scales_nRG: torch.Tensor) -> torch.Tensor:
    """The values, (n, C, R) bf16."""
    values_16 = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], dtype=torch.bfloat16)
    halves_nRGB2 = torch.stack((blocks_nRGB & 15, blocks_nRGB >> 4), -1)
    values_nRGv = values_16[halves_nRGB2.flatten(-2).int()]
    exponents_nRG1 = scales_nRG[..., None].int() - _BIAS
    return torch.ldexp(values_nRGv, exponents_nRG1).flatten(-2).mT.contiguous()
