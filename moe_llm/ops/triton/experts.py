"""Experts with all that surrounds their products done in the same kernels: gather, SwiGLU, weights, combination.

Of N rows only the gate and up projections are kept for the backward pass.

Two things are kernels of their own because fusing them costs the products more than it saves: the gradient of SwiGLU
(with it the product's accumulators spill registers at every tile size that is fast, as the assembler shows), and the
gather of rows in the backward pass.
Dimensions: T tokens, D hidden, F expert width, G = 2F, E experts, K experts per token, N rows.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_llm.ops.triton.elementwise import gather_sum, swiglu_backward
from moe_llm.ops.triton.products import gate_up_swiglu, rows_product, weight_gradient


def triton_expert_mlp(
    x_ND: Tensor, gate_up_proj_EGD: Tensor, down_proj_EDF: Tensor, counts_E: Tensor, weight_N: Tensor | None
) -> Tensor:
    """See `moe_llm.ops.expert_mlp.expert_mlp`."""
    return _TritonExperts.apply(x_ND, gate_up_proj_EGD, down_proj_EDF, counts_E, weight_N, None, None)


def triton_routed_expert_mlp(
    x_TD: Tensor,
    gate_up_proj_EGD: Tensor,
    down_proj_EDF: Tensor,
    counts_E: Tensor,
    weight_N: Tensor,
    token_index_N: Tensor,
    slot_TK: Tensor,
) -> Tensor:
    """See `moe_llm.ops.routed_experts.routed_expert_mlp`."""
    return _TritonExperts.apply(x_TD, gate_up_proj_EGD, down_proj_EDF, counts_E, weight_N, token_index_N, slot_TK)


class _TritonExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate_up_proj_EGD, down_proj_EDF, counts_E, weight_N, token_index_N, slot_TK):
        x, gate_up_proj_EGD, down_proj_EDF, counts_E, weight_N, token_index_N, slot_TK = (
            None if t is None else t.contiguous()
            for t in (x, gate_up_proj_EGD, down_proj_EDF, counts_E, weight_N, token_index_N, slot_TK)
        )
        gate_up_NG, h_NF = gate_up_swiglu(x, gate_up_proj_EGD, counts_E, weight_N, token_index_N)
        y_ND = rows_product(h_NF, down_proj_EDF, counts_E, transposed=True)
        ctx.save_for_backward(
            x, gate_up_proj_EGD, down_proj_EDF, counts_E, weight_N, gate_up_NG, token_index_N, slot_TK
        )
        return y_ND if slot_TK is None else gather_sum(y_ND, slot_TK, None)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, gate_up_proj_EGD, down_proj_EDF, counts_E, weight_N, gate_up_NG, *routing = ctx.saved_tensors
        token_index_N, slot_TK = routing
        needs_x, needs_gate_up, needs_down, _, needs_weight, _, _ = ctx.needs_input_grad
        grad_x = grad_gate_up = grad_down = None
        # Gathered here, unlike in the forward pass: three products read these rows, and rows read through an index
        # cannot be fetched as far ahead.
        grad_ND = grad.contiguous() if slot_TK is None else grad.index_select(0, token_index_N)
        h_NF = rows_product(grad_ND, down_proj_EDF, counts_E, transposed=False)
        grad_NG = torch.empty_like(gate_up_NG)
        # from here on the hidden activations, in place of their gradient
        grad_weight = swiglu_backward(gate_up_NG, h_NF, weight_N, h_NF, grad_NG)
        if needs_down:
            grad_down = weight_gradient(grad_ND, h_NF, counts_E)
        del grad_ND, h_NF
        if needs_gate_up:
            x_ND = x if slot_TK is None else x.index_select(0, token_index_N)
            grad_gate_up = weight_gradient(grad_NG, x_ND, counts_E)
        if needs_x:
            grad_x = rows_product(grad_NG, gate_up_proj_EGD, counts_E, transposed=False)
            grad_x = grad_x if slot_TK is None else gather_sum(grad_x, slot_TK, None)
        grad_weight = grad_weight.to(weight_N.dtype) if needs_weight else None
        return grad_x, grad_gate_up, grad_down, None, grad_weight, None, None
