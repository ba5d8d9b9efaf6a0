"""Round numbers of rows, since products by oneDNN are compiled for their exact shape at its first use; and parts of sequences."""

from torch import Tensor


def own_part(x_BSX: Tensor, index: int, parts: int) -> Tensor:
    """The `index`th of `parts` equal, consecutive parts of each sequence."""
    length = x_BSX.shape[1] // parts
    return x_BSX[:, index * length : (index + 1) * length]


def round_up(rows: int) -> int:
    """To a multiple of a 16th of the power of two below, at least of 16: 16 shapes an octave, 6% more at most
    from 256 rows on."""
    step = max(16, 2 ** (rows.bit_length() - 1) // 16) if rows else 1
    return -(-rows // step) * step
