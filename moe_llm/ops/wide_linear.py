"""A linear map with fp32 results from inputs of a lower precision, for routers."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_llm.ops.products import linear


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
