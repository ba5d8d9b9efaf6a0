"""Experts through torch's grouped matrix product: the counts stay on the device.

Kept for the backward pass: the input rows and their gate and up projections; silu(gate) * up is computed
again.
Dimensions: N routed rows, D hidden, F expert width, G = 2F, E experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_llm.ops.weighted_swiglu import weighted_swiglu, weighted_swiglu_backward


def grouped_mm_fits(device: torch.device, dtype: torch.dtype, hidden: int, width: int) -> bool:
    """Whether torch's grouped product takes these: rows must be multiples of 16 bytes, on CUDA bf16 alone."""
    item = torch.finfo(dtype).bits // 8
    if hidden * item % 16 or width * item % 16:
        return False
    if device.type == "cuda":
        return dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)


def grouped_expert_mlp(
    x_ND: Tensor, gate_up_proj_EGD: Tensor, down_proj_EDF: Tensor, counts_E: Tensor, weight_N: Tensor | None
) -> Tensor:
    """See `moe_llm.ops.expert_mlp.expert_mlp`."""
    return _GroupedExperts.apply(x_ND, gate_up_proj_EGD, down_proj_EDF, counts_E, weight_N)


class _GroupedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, gate_up_proj_EGD, down_proj_EDF, counts_E, weight_N):
        x_ND = x_ND.contiguous()
        if not len(x_ND):  # a rank to which no one sends: kernels need not know what to do with nothing
            ctx.save_for_backward(x_ND, gate_up_proj_EGD, down_proj_EDF, counts_E, weight_N, None)
            return torch.empty_like(x_ND)
        ends_E, unused_N1 = _bounds(counts_E, len(x_ND))
        gate_up_NG = F.grouped_mm(x_ND, gate_up_proj_EGD.transpose(1, 2), offs=ends_E)
        h_NF = x_ND.new_empty(len(x_ND), down_proj_EDF.shape[2])
        weighted_swiglu(gate_up_NG, weight_N, h_NF)
        y_ND = F.grouped_mm(h_NF, down_proj_EDF.transpose(1, 2), offs=ends_E)
        # the product writes no row beyond the last expert's
        y_ND.masked_fill_(unused_N1, 0)
        ctx.save_for_backward(x_ND, gate_up_proj_EGD, down_proj_EDF, counts_E, weight_N, gate_up_NG)
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND):
        x_ND, gate_up_proj_EGD, down_proj_EDF, counts_E, weight_N, gate_up_NG = ctx.saved_tensors
        needs_x, needs_gate_up, needs_down, _, needs_weight = ctx.needs_input_grad
        if gate_up_NG is None:
            tensors = x_ND, gate_up_proj_EGD, down_proj_EDF, None, weight_N
            return tuple(
                torch.zeros_like(t) if needed and t is not None else None
                for t, needed in zip(tensors, ctx.needs_input_grad, strict=True)
            )
        ends_E, unused_N1 = _bounds(counts_E, len(x_ND))
        grad_ND = grad_ND.contiguous()
        grad_x = grad_gate_up = grad_down = None

        grad_h_NF = F.grouped_mm(grad_ND, down_proj_EDF, offs=ends_E)
        h_NF, grad_NG = torch.empty_like(grad_h_NF), torch.empty_like(gate_up_NG)
        # the hidden activations hold the weights, so that weight gradients need no weighted copy of grad
        grad_weight = weighted_swiglu_backward(gate_up_NG, grad_h_NF, weight_N, h_NF, grad_NG)
        if weight_N is not None:
            grad_weight = grad_weight.masked_fill_(unused_N1[:, 0], 0).to(weight_N.dtype) if needs_weight else None
        if needs_down:
            grad_down = _weight_gradient(grad_ND, h_NF, ends_E, counts_E)
        if needs_gate_up:
            grad_gate_up = _weight_gradient(grad_NG, x_ND, ends_E, counts_E)
        if needs_x:
            grad_x = F.grouped_mm(grad_NG, gate_up_proj_EGD, offs=ends_E).masked_fill_(unused_N1, 0)
        return grad_x, grad_gate_up, grad_down, None, grad_weight


def _bounds(counts_E: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """(end row of each expert as int32, (N, 1) mask of the rows that belong to none)."""
    ends_E = counts_E.cumsum(0, dtype=torch.int32)
    return ends_E, (torch.arange(num_rows, device=counts_E.device) >= ends_E[-1])[:, None]


def _weight_gradient(grad_NO: Tensor, input_NI: Tensor, ends_E: Tensor, counts_E: Tensor) -> Tensor:
    """(E, O, I): grad^T input over each expert's rows, exactly zero where an expert has none."""
    grad_EOI = F.grouped_mm(grad_NO.t(), input_NI, offs=ends_E)
    # torch does not say what it leaves for a group of no rows (the CPU kernel leaves zeros)
    return grad_EOI.masked_fill_((counts_E == 0)[:, None, None], 0)
