"""Matrix products, on a CPU by whichever of the two libraries in torch is the faster one there.

torch computes fp32 products on x86 by MKL, and products of lower precision by oneDNN. On processors other than Intel's
MKL leaves half of the vector width unused: on an Epyc (Zen 5) it reaches 100 GFLOP/s a core where oneDNN reaches 220
(torch 2.13, MKL 2024.2). There fp32 products go through the function by which torch has bf16 ones computed. It is part
of torch's library but not of its interface, and so it is taken by its C++ name, which holds its signature; where a
torch has none of that name, products are torch's own, as they are everywhere else. `MOE_LLM_ONEDNN=0` leaves all of
them to torch, and 1 none on any x86 processor with AVX-512.

Both libraries round at other places, so that results differ in the last bits from one processor to another.
Dimensions: N batch, M rows, K inner, P columns of a product; T rows, I input and O output features of a linear map.
"""

import ctypes
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_llm.ops import native
from moe_llm.ops.shapes import round_up

# void at::native::mkldnn_matmul(const Tensor&, const Tensor&, const Tensor& result, float beta, float alpha)
_SYMBOL = "_ZN2at6native13mkldnn_matmulERKNS_6TensorES3_S3_ff"
# multiplications below which its fixed cost of 14 microseconds is more than it saves
_LEAST_WORK = 2**20
# Whole products would be faster by up to 5%, but come in more shapes, each of which keeps half a megabyte of compiled
# code, and need larger buffers; in bf16 a weight's gradient, a sum over rows, would be rounded for each tile
_TILE_ROWS = (512, 256)


def mm(a_MK: Tensor, b_KP: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """The product of two matrices, without autograd; into `out` where it is given (contiguous), or added to it."""
    if not fits(a_MK) or a_MK.numel() * b_KP.shape[1] < _LEAST_WORK:
        return out.addmm_(a_MK, b_KP) if add else torch.mm(a_MK, b_KP, out=out)
    out = a_MK.new_empty(len(a_MK), b_KP.shape[1]) if out is None else out
    native.product(_onednn(), a_MK, b_KP, out, beta=float(add))
    return out


def bmm(a_NMK: Tensor, b_NKP: Tensor, out: Tensor | None = None) -> Tensor:
    """As `mm`, for each of a batch."""
    if not fits(a_NMK) or a_NMK.numel() * b_NKP.shape[2] < _LEAST_WORK:
        return torch.bmm(a_NMK, b_NKP, out=out)
    out = a_NMK.new_empty(*a_NMK.shape[:2], b_NKP.shape[2]) if out is None else out
    native.product(_onednn(), a_NMK, b_NKP, out)
    return out


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T over the last dimension, with autograd."""
    if not fits(x) or x.dim() < 2 or weight_OI.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight_OI)
    return _Linear.apply(x.flatten(0, -2), weight_OI).unflatten(0, x.shape[:-1])


def fits(x: Tensor) -> bool:
    """Whether products of x go to oneDNN by `mm`, rather than by torch."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and _onednn() is not None


def compiled_by_shape(x: Tensor) -> bool:
    """Whether (large) products of x are compiled for their exact shape, at its first use."""
    return x.device.type == "cpu" and (x.dtype == torch.bfloat16 or fits(x))


def row_tiles(x: Tensor, count: int, columns: int) -> Iterator[tuple[int, int]]:
    """(rows that are there, rows to compute) of the parts in which the product of `count` rows like x's with a matrix
    of so many columns is best computed: in few shapes, where products are compiled for theirs at its first use."""
    compiled = compiled_by_shape(x)
    if fits(x):
        compiled = count * x.shape[-1] * columns >= _LEAST_WORK
        for tile in _TILE_ROWS if compiled else ():
            yield from [(tile, tile)] * (count // tile)
            count %= tile
    if count:
        yield count, round_up(count) if compiled else count


def mm_by_tiles(tiles: list[slice], a_nK: Tensor, b_KP: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a b, or added to it, some rows after the others: all tiles but the first find b in the cache."""
    for rows in tiles:
        mm(a_nK[rows], b_KP, out=out[rows], add=add)


def mm_over_tiles(tiles: list[slice], a_nM: Tensor, b_nP: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a^T b, or added to it, as the sum of the tiles' products: all but the first find `out` in the cache.

    From the last one on, whose number of rows is the odd one: it then is added to nothing, unless there are more rows
    than those of these tiles, and a product that adds, compiled apart from one that does not, is rarely asked of it.
    """
    for number, rows in enumerate(reversed(tiles)):
        mm(a_nM[rows].t(), b_nP[rows], out=out, add=add or number > 0)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TI, weight_OI):
        ctx.save_for_backward(x_TI, weight_OI)
        return mm(x_TI, weight_OI.t())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TO):
        x_TI, weight_OI = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        grad_TO = grad_TO.contiguous()
        return (
            mm(grad_TO, weight_OI) if needs_x else None,
            mm(grad_TO.t(), x_TI) if needs_weight else None,
        )


@functools.cache
def _onednn() -> int | None:
    """The address of oneDNN's product; None: torch's own products are to be used."""
    wanted = os.environ.get("MOE_LLM_ONEDNN")
    if wanted == "0" or not torch.backends.mkldnn.is_available():
        return None
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not (wanted == "1" or _narrowed_by_mkl()):
        return None
    if not native.fits(torch.empty(0)):
        return None
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(getattr(library, _SYMBOL), ctypes.c_void_p).value
    except (OSError, AttributeError):  # a torch that is built or that names its functions otherwise
        return None


def _narrowed_by_mkl() -> bool:
    """Whether torch's products are MKL's and the processor is none of those that it uses in full."""
    return torch.backends.mkl.is_available() and native.vendor() in ("AuthenticAMD", "HygonGenuine")
