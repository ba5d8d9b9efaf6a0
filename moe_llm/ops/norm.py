"""Root-mean-square normalisation (Zhang and Sennrich 2019), with the residual addition before it."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_llm.ops import liger, native

_FUSED = "_fused_rms_norm_backward"
# The weight's gradient on a CPU is summed in runs of rows, so many at most, whatever the number of threads
_ROWS_OF_A_RUN, _RUNS = 32, 256


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, times weight_D.

    Statistics in fp32 at least, and the quotient rounded to x's dtype before the weight, as in transformers'
    Mixtral. Only x and one number a row are kept for the backward pass.
    """
    if liger.enabled and liger.use("norm", x, weight_D):
        return liger.rms_norm(x, weight_D, eps)
    return _RMSNorm.apply(x, weight_D, eps)


def add_rms_norm(x: Tensor, delta: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + delta, rms_norm(x + delta)): of one pass, and so is the sum of the two results' gradients."""
    if liger.enabled and liger.use("norm", x, weight_D):
        total = x + delta
        return total, liger.rms_norm(total, weight_D, eps)
    return _AddRMSNorm.apply(x, delta, weight_D, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_D, eps):
        y, scale = _forward(x, weight_D, eps)
        ctx.save_for_backward(x, weight_D, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return (*_backward(grad, *ctx.saved_tensors, None, ctx.needs_input_grad[:2]), None)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, weight_D, eps):
        if native.fits(x, delta, weight_D):
            x, delta = x.contiguous(), delta.contiguous()
            total, y, scale = torch.empty_like(x), torch.empty_like(x), _scale_like(x)
            rows, width = _rows(x)
            native.call("norm_forward", x.dtype, x, delta, weight_D, total, y, scale, rows, width, eps)
        else:
            total = x + delta
            y, scale = _forward(total, weight_D, eps)
        ctx.save_for_backward(total, weight_D, scale)
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, grad):
        needs = (ctx.needs_input_grad[0] or ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        grad_x, grad_weight = _backward(grad, *ctx.saved_tensors, grad_total, needs)
        return grad_x, grad_x, grad_weight, None


def fused_on_cuda(x: Tensor, *others: Tensor) -> bool:
    """Whether torch's fused kernel takes these: on CUDA, all of one dtype, from torch 2.9 on. It rounds once, after the
    weight."""
    return x.device.type == "cuda" and all(t.dtype == x.dtype for t in others) and hasattr(torch.ops.aten, _FUSED)


def _forward(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if native.fits(x, weight_D):
        x = x.contiguous()
        y, scale = torch.empty_like(x), _scale_like(x)
        native.call("norm_forward", x.dtype, x, None, weight_D, None, y, scale, *_rows(x), eps)
        return y, scale
    if fused_on_cuda(x, weight_D):
        return torch.ops.aten._fused_rms_norm(x, weight_D.shape, weight_D, eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight_D, scale


def _backward(
    grad: Tensor, x: Tensor, weight_D: Tensor, scale: Tensor, grad_sum: Tensor | None, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x, grad_sum added to it, and of the weight."""
    needs_x, needs_weight = needs
    grad_x: Tensor | None
    grad_weight: Tensor | None
    if native.fits(x, grad, weight_D, grad_sum):
        rows, width = _rows(x)
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        partial = torch.empty(min(max(rows // _ROWS_OF_A_RUN, 1), _RUNS), width)
        kept = [grad.contiguous(), x.contiguous(), None if grad_sum is None else grad_sum.contiguous()]
        native.call(
            "norm_backward",
            x.dtype,
            kept[0],
            kept[1],
            weight_D,
            scale,
            kept[2],
            grad_x,
            partial,
            len(partial),
            rows,
            width,
        )
        return grad_x if needs_x else None, partial.sum(0).to(weight_D.dtype) if needs_weight else None
    if fused_on_cuda(x, grad, weight_D):
        grad_x, grad_weight = torch.ops.aten._fused_rms_norm_backward(
            grad.contiguous(), x, weight_D.shape, scale, weight_D, [needs_x, needs_weight]
        )
        return grad_x if grad_sum is None or not needs_x else grad_x + grad_sum, grad_weight
    grad_x = grad_weight = None
    normed = x * scale  # in the wide dtype, since scale is
    if needs_weight:
        grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight_D.dtype)
    if needs_x:
        # with n = x * scale: dx = scale * (g - n * mean(g * n)), g = grad * weight
        g = grad.to(scale.dtype) * weight_D
        g.addcmul_(normed, (g * normed).mean(-1, keepdim=True), value=-1)
        g.mul_(scale)
        grad_x = (g if grad_sum is None else g.add_(grad_sum)).to(x.dtype)
    return grad_x, grad_weight


def _scale_like(x: Tensor) -> Tensor:
    return torch.empty(*x.shape[:-1], 1, device=x.device)


def _rows(x: Tensor) -> tuple[int, int]:
    return x.numel() // x.shape[-1], x.shape[-1]
