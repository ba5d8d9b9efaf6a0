"""Experts one after the other, in one autograd function, into buffers allocated once.

Kept for the backward pass: the input rows and their gate and up projections. silu(gate) * up is computed
again, expert by expert, in buffers as large as the busiest expert needs; weight gradients are written
straight into one (E, ...) tensor.
Dimensions: N routed rows (n: of one expert), D hidden, F expert width, G = 2F, E experts.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_llm.ops.permutation import row_dot


def fused_expert_mlp(
    x_ND: Tensor, gate_up_proj_EGD: Tensor, down_proj_EDF: Tensor, counts_E: Tensor, weight_N: Tensor | None
) -> Tensor:
    """See `moe_llm.ops.expert_mlp.expert_mlp`."""
    return _FusedExperts.apply(x_ND, gate_up_proj_EGD, down_proj_EDF, counts_E, weight_N)


class _FusedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, gate_up_proj_EGD, down_proj_EDF, counts_E, weight_N):
        blocks, used = _expert_blocks(counts_E, len(x_ND))
        gate_up_NG = x_ND.new_empty(used, gate_up_proj_EGD.shape[1])
        hidden_nF = x_ND.new_empty(_largest(blocks), down_proj_EDF.shape[2])
        y_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
        y_ND[used:].zero_()
        for expert, start, end in blocks:
            gate_up_nG, h_nF, y_nD = gate_up_NG[start:end], hidden_nF[: end - start], y_ND[start:end]
            torch.mm(x_ND[start:end], gate_up_proj_EGD[expert].t(), out=gate_up_nG)
            swiglu(gate_up_nG, out_nF=h_nF)
            torch.mm(h_nF, down_proj_EDF[expert].t(), out=y_nD)
            if weight_N is not None:
                y_nD.mul_(weight_N[start:end, None])
        # the counts are kept as a tensor, not as integers on ctx, so that checkpointing recomputes them too
        ctx.save_for_backward(x_ND, gate_up_proj_EGD, down_proj_EDF, counts_E, weight_N, gate_up_NG)
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND):
        x_ND, gate_up_proj_EGD, down_proj_EDF, counts_E, weight_N, gate_up_NG = ctx.saved_tensors
        needs_x, needs_gate_up, needs_down, _, needs_weight = ctx.needs_input_grad
        blocks, used = _expert_blocks(counts_E, len(x_ND))
        grad_x = torch.empty_like(x_ND, memory_format=torch.contiguous_format) if needs_x else None
        if needs_x:
            grad_x[used:].zero_()
        grad_gate_up = _weight_gradient(gate_up_proj_EGD, blocks) if needs_gate_up else None
        grad_down = _weight_gradient(down_proj_EDF, blocks) if needs_down else None
        grad_weight = torch.zeros_like(weight_N) if needs_weight else None

        rows, width = _largest(blocks), down_proj_EDF.shape[2]
        hidden_nF, grad_hidden_nF = x_ND.new_empty(2, rows, width)
        grad_gate_up_nG = x_ND.new_empty(rows, 2 * width)
        for expert, start, end in blocks:
            n = end - start
            grad_nD, gate_up_nG = grad_ND[start:end], gate_up_NG[start:end]
            h_nF, grad_h_nF, grad_nG = hidden_nF[:n], grad_hidden_nF[:n], grad_gate_up_nG[:n]
            torch.mm(grad_nD, down_proj_EDF[expert], out=grad_h_nF)
            swiglu_again(gate_up_nG, out_nF=h_nF, silu_nG=grad_nG)
            if needs_weight:
                # y = weight * (h W^T), so dL/dweight = grad . (h W^T) = (grad W) . h: y itself is not needed
                grad_weight[start:end] = row_dot(grad_h_nF, h_nF)
            if weight_N is not None:
                weight_n1 = weight_N[start:end, None]
                grad_h_nF.mul_(weight_n1)
                grad_nD = (grad_nD * weight_n1).to(x_ND.dtype)
            if needs_down:
                torch.mm(grad_nD.t(), h_nF, out=grad_down[expert])
            if needs_gate_up or needs_x:
                swiglu_backward_(gate_up_nG, grad_h_nF, grad_nG)
            if needs_gate_up:
                torch.mm(grad_nG.t(), x_ND[start:end], out=grad_gate_up[expert])
            if needs_x:
                torch.mm(grad_nG, gate_up_proj_EGD[expert], out=grad_x[start:end])
        return grad_x, grad_gate_up, grad_down, None, grad_weight


def swiglu(gate_up_nG: Tensor, out_nF: Tensor) -> None:
    """out = silu(gate) * up."""
    gate_nF, up_nF = gate_up_nG.chunk(2, dim=-1)
    torch.ops.aten.silu.out(gate_nF, out=out_nF)
    out_nF.mul_(up_nF)


def swiglu_again(gate_up_nG: Tensor, out_nF: Tensor, silu_nG: Tensor) -> None:
    """out = silu(gate) * up, leaving silu(gate) in silu_nG's second half, for `swiglu_backward_`."""
    gate_nF, up_nF = gate_up_nG.chunk(2, dim=-1)
    silu_nF = silu_nG.chunk(2, dim=-1)[1]
    torch.ops.aten.silu.out(gate_nF, out=silu_nF)
    torch.mul(silu_nF, up_nF, out=out_nF)


def swiglu_backward_(gate_up_nG: Tensor, grad_nF: Tensor, silu_nG: Tensor) -> None:
    """Turn silu_nG (from `swiglu_again`) into the gradients of gate and up; grad_nF is used up."""
    gate_nF, up_nF = gate_up_nG.chunk(2, dim=-1)
    grad_gate_nF, grad_up_nF = silu_nG.chunk(2, dim=-1)
    grad_up_nF.mul_(grad_nF)
    torch.ops.aten.silu_backward.grad_input(grad_nF.mul_(up_nF), gate_nF, grad_input=grad_gate_nF)


def _expert_blocks(counts_E: Tensor, num_rows: int) -> tuple[list[tuple[int, int, int]], int]:
    """([(expert, first row, end)] of the experts that have rows, rows in all)."""
    blocks, start = [], 0
    for expert, count in enumerate(counts_E.tolist()):
        if count:
            blocks.append((expert, start, start + count))
        start += count
    assert start <= num_rows, f"the counts sum to {start}, but there are {num_rows} rows"
    return blocks, start


def _largest(blocks: list[tuple[int, int, int]]) -> int:
    return max((end - start for _, start, end in blocks), default=0)


def _weight_gradient(weight: Tensor, blocks: list[tuple[int, int, int]]) -> Tensor:
    """Uninitialised, but zero for the experts that have no rows."""
    grad = torch.empty_like(weight, memory_format=torch.contiguous_format)
    busy = {expert for expert, _, _ in blocks}
    for expert in range(len(weight)):
        if expert not in busy:
            grad[expert].zero_()
    return grad
