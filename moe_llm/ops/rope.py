"""Rotary position embeddings (Su et al. 2021), in the half-split convention of transformers.

Dimensions: B batch, S sequence, H query heads, G key-value heads, d head dimension.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_llm.ops import native, triton


def rotary_cos_sin(
    position_ids_BS: Tensor, head_dim: int, theta: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position * theta^(-2i/d), both (B, S, d), the two halves of d alike.

    Angles are formed in fp32 and the results rounded to dtype, as in transformers.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids_BS.device) / head_dim
    angle_BSd = (position_ids_BS[..., None].float() * (1.0 / theta**exponent)).repeat(1, 1, 2)
    return angle_BSd.cos().to(dtype), angle_BSd.sin().to(dtype)


def apply_rotary(q_BHSd: Tensor, k_BGSd: Tensor, cos_BSd: Tensor, sin_BSd: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by their positions; cos and sin are constants to autograd.

    The results have the memory layout of their inputs, so that what is a view of (B, S, H, d) stays one.
    """
    cos_B1Sd, sin_B1Sd = cos_BSd.unsqueeze(1), sin_BSd.unsqueeze(1)
    return _Rotate.apply(q_BHSd, cos_B1Sd, sin_B1Sd), _Rotate.apply(k_BGSd, cos_B1Sd, sin_B1Sd)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, transposed=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, transposed=True), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor:
    """(x1 cos - x2 sin, x2 cos + x1 sin), or the transposed rotation, without building rotate_half(x)."""
    if native.fits(x, cos, sin) and x.dim() == 4 and cos.shape[0] == x.shape[0] and cos.shape[2] == x.shape[2]:
        return _rotate_natively(x, cos.contiguous(), sin.contiguous(), transposed)
    if triton.use("rope", x, cos, sin) and x.dim() == 4 and cos.shape[0] == x.shape[0] and cos.shape[2] == x.shape[2]:
        from moe_llm.ops.triton import elementwise

        return elementwise.rotate(x, cos.contiguous(), sin.contiguous(), transposed)
    first, second = x.chunk(2, dim=-1)
    sin_first, sin_second = sin.chunk(2, dim=-1)
    out = x * cos
    out_first, out_second = out.chunk(2, dim=-1)
    if transposed:
        out_first.add_(second * sin_second)
        out_second.sub_(first * sin_first)
    else:
        out_first.sub_(second * sin_first)
        out_second.add_(first * sin_second)
    return out


def _rotate_natively(x_BHSd: Tensor, cos_B1Sd: Tensor, sin_B1Sd: Tensor, transposed: bool) -> Tensor:
    """The result is a view of (B, S, H, d), as what a projection gives is."""
    x_BSHd = x_BHSd.transpose(1, 2)
    batch, length, heads, width = x_BSHd.shape
    if x_BSHd.stride()[2:] != (width, 1) or x_BSHd.stride(0) != length * x_BSHd.stride(1):
        x_BSHd = x_BSHd.contiguous()
    out_BSHd = torch.empty(x_BSHd.shape, dtype=x_BSHd.dtype)
    sign, stride = -1.0 if transposed else 1.0, x_BSHd.stride(1)
    native.call(
        "rotate", x_BSHd.dtype, x_BSHd, cos_B1Sd, sin_B1Sd, out_BSHd, batch * length, heads, width, stride, sign
    )
    return out_BSHd.transpose(1, 2)
