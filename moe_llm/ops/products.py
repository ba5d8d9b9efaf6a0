"""Matrix products, in fp32 on some CPUs by our own kernel.

torch computes fp32 products on x86 by MKL, which on processors other than Intel's leaves half of the vector width
unused: on an Epyc (Zen 5) it reaches 100 GFLOP/s a core, and `native/products.h` 210. There our kernel computes them,
which also reads strided batches, and rows that come in runs, as they lie. Everywhere else, and in every other dtype,
products are torch's, but for those within experts in bf16 (see `fused_experts_fit`). `MOE_LLM_PRODUCTS=0` leaves all of
them to torch; with 1 ours are used on every x86 processor that has AVX-512, in bf16 its instructions for that.

Both round at other places, so that results differ in the last bits from one processor to another. In ours each number
is summed in one order, whatever the other rows and the number of threads.
Dimensions: N batch, M rows, K inner, P columns of a product; T rows, I input and O output features of a linear map.
"""

import functools
import os

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_llm.ops import native

# multiplications below which calling it takes longer than it saves
_LEAST_WORK = 2**20
# numbers in a row that our bf16 products sum without leaving the cache
_LONGEST = 2**13


def mm(a_MK: Tensor, b_KP: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """The product of two matrices, without autograd; into `out` where it is given (contiguous), or added to it."""
    if not fits(a_MK) or a_MK.numel() * b_KP.shape[1] < _LEAST_WORK:
        if add:
            assert out is not None, "there is nothing to add to"
            return out.addmm_(a_MK, b_KP)
        return torch.mm(a_MK, b_KP, out=out)
    return _product(a_MK, b_KP, out, add)


def bmm(a_NMK: Tensor, b_NKP: Tensor, out: Tensor | None = None) -> Tensor:
    """As `mm`, for each of a batch."""
    if not fits(a_NMK) or a_NMK.numel() * b_NKP.shape[2] < _LEAST_WORK:
        return torch.bmm(a_NMK, b_NKP, out=out)
    return _product(a_NMK, b_NKP, out, False)


def _product(a: Tensor, b: Tensor, out: Tensor | None, add: bool) -> Tensor:
    """By our kernel, which takes A by rows, and B either way, or A by columns, and B by rows."""
    expected = *a.shape[:-1], b.shape[-1]
    out = a.new_empty(expected) if out is None else out
    if a.shape[-1] != b.shape[-2] or out.shape != expected:
        shapes = " x ".join(str(tuple(x.shape)) for x in (a, b))
        raise RuntimeError(f"a matmul of shapes {shapes} does not fit into {tuple(out.shape)}")
    transpose_a = a.stride(-1) != 1 and a.stride(-2) == 1
    a = a.mT if transpose_a else _by_rows(a)
    transpose_b = not transpose_a and b.stride(-1) != 1 and b.stride(-2) == 1
    b = b.mT if transpose_b else _by_rows(b)
    native.matmul(a, b, out, transpose_a=transpose_a, transpose_b=transpose_b, add=add)
    return out


def _by_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T over the last dimension, with autograd."""
    if not fits(x) or x.dim() < 2 or weight_OI.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight_OI)
    return _Linear.apply(x.flatten(0, -2), weight_OI).unflatten(0, x.shape[:-1])


def fits(x: Tensor) -> bool:
    """Whether products of x go to our kernel by `mm`, rather than to torch."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and _ours()


def fused_experts_fit(x: Tensor, width: int) -> bool:
    """Whether experts of that width go to our kernels as a whole, with their products: in fp32 as all products do, in
    bf16 on processors that multiply it, but not by matrices (AMX), which oneDNN does."""
    if fits(x):
        return True
    largest = max(x.shape[-1], 2 * width)
    even = x.shape[-1] % 2 == 0 and width % 2 == 0
    return native.fits(x) and x.dtype == torch.bfloat16 and even and largest <= _LONGEST and _ours_in_bf16()


def compiled_by_shape(x: Tensor) -> bool:
    """Whether products of x are compiled for their exact shape, at its first use: by oneDNN, which torch calls."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16


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
def _ours() -> bool:
    wanted = os.environ.get("MOE_LLM_PRODUCTS")
    if wanted == "0" or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return (wanted == "1" or _narrowed_by_mkl()) and native.fits(torch.empty(0))


@functools.cache
def _ours_in_bf16() -> bool:
    wanted, can = os.environ.get("MOE_LLM_PRODUCTS"), native.instructions()
    return "avx512_bf16" in can and wanted != "0" and (wanted == "1" or "amx_bf16" not in can)


def _narrowed_by_mkl() -> bool:
    """Whether torch's products are MKL's and the processor is none of those that it uses in full."""
    return torch.backends.mkl.is_available() and native.vendor() in ("AuthenticAMD", "HygonGenuine")


def wide_linear(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """x W^T in fp32 at least, (T, E). The widened copy of x lives for the product alone, not until the backward."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    if x_TD.dtype == weight_ED.dtype == wide:
        return linear(x_TD, weight_ED)
    return _WideLinear.apply(x_TD, weight_ED, wide)


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weight_ED, wide):
        ctx.save_for_backward(x_TD, weight_ED)
        return F.linear(x_TD.to(wide), weight_ED.to(wide))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TE):
        x_TD, weight_ED = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_TE @ weight_ED.to(grad_TE.dtype)).to(x_TD.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad_TE.t() @ x_TD.to(grad_TE.dtype)).to(weight_ED.dtype)
        return grad_x, grad_weight, None
