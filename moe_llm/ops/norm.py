"""Root-mean-square normalisation (Zhang and Sennrich 2019)."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, times weight_D.

    Statistics in fp32 at least, and the quotient rounded to x's dtype before the weight, as in transformers'
    Mixtral. Only x and one number a row are kept for the backward pass.
    """
    return _RMSNorm.apply(x, weight_D, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_D, eps):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight_D, scale)
        return (wide * scale).to(x.dtype) * weight_D

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight_D, scale = ctx.saved_tensors
        grad_x = grad_weight = None
        normed = x * scale  # in the wide dtype, since scale is
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight_D.dtype)
        if ctx.needs_input_grad[0]:
            # with n = x * scale: dx = scale * (g - n * mean(g * n)), g = grad * weight
            g = grad.to(scale.dtype) * weight_D
            g.addcmul_(normed, (g * normed).mean(-1, keepdim=True), value=-1)
            grad_x = g.mul_(scale).to(x.dtype)
        return grad_x, grad_weight, None
