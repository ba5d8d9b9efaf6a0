"""weight * silu(gate) * up and its gradients, written into buffers that the caller has.

Dimensions: n rows, of which m have a weight, F expert width, G = 2F (gate, then up).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_llm.ops import compiled, native
from moe_llm.ops.permutation import row_dot


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


def weighted_swiglu(gate_up_nG: Tensor, weight_m: Tensor | None, out_nF: Tensor) -> None:
    """out = weight * silu(gate) * up; rows beyond those that have a weight are anything finite."""
    if native.fits(gate_up_nG):
        rows, width = len(gate_up_nG) if weight_m is None else len(weight_m), out_nF.shape[1]
        weight_m = None if weight_m is None else weight_m.float().contiguous()
        native.call("swiglu_forward", gate_up_nG.dtype, gate_up_nG, weight_m, out_nF, rows, width)
        if rows < len(out_nF):
            out_nF[rows:].zero_()
        return
    if compiled.on:
        _weighted_swiglu_compiled(gate_up_nG, weight_m, out_nF)
        return
    swiglu(gate_up_nG, out_nF)
    if weight_m is not None:
        out_nF[: len(weight_m)].mul_(weight_m[:, None])


def weighted_swiglu_backward(
    gate_up_nG: Tensor, grad_nF: Tensor, weight_m: Tensor | None, out_nF: Tensor, grad_nG: Tensor
) -> Tensor | None:
    """From the gradient of weight * silu(gate) * up, given before the weight was multiplied to it: the product again
    into out_nF, the gradients of gate and up into grad_nG; returns that of the weight. grad_nF may be used up."""
    if native.fits(gate_up_nG):
        rows, width = len(gate_up_nG) if weight_m is None else len(weight_m), out_nF.shape[1]
        grad_weight_m = None if weight_m is None else torch.empty(rows)
        wide_m = None if weight_m is None else weight_m.float().contiguous()
        tensors = gate_up_nG, grad_nF, wide_m, out_nF, grad_nG, grad_weight_m
        native.call("swiglu_backward", gate_up_nG.dtype, *tensors, rows, width)
        return grad_weight_m
    if compiled.on:
        return _weighted_swiglu_backward_compiled(gate_up_nG, grad_nF, weight_m, out_nF, grad_nG)
    swiglu_again(gate_up_nG, out_nF=out_nF, silu_nG=grad_nG)
    grad_weight_m = None
    if weight_m is not None:
        m = len(weight_m)
        grad_weight_m = row_dot(grad_nF[:m], out_nF[:m])
        out_nF[:m].mul_(weight_m[:, None])
        grad_nF[:m].mul_(weight_m[:, None])
    swiglu_backward_(gate_up_nG, grad_nF, grad_nG)
    return grad_weight_m


# The same two as graphs, which a compiler makes one kernel of: nothing is used up, and what is between is in registers.


def _padded(weight_m: Tensor, rows: int) -> Tensor:
    return F.pad(weight_m, (0, rows - weight_m.shape[0]))[:, None]


@compiled.region
def _weighted_swiglu_compiled(gate_up_nG: Tensor, weight_m: Tensor | None, out_nF: Tensor) -> None:
    gate_nF, up_nF = gate_up_nG.chunk(2, dim=-1)
    hidden_nF = F.silu(gate_nF) * up_nF
    out_nF.copy_(hidden_nF if weight_m is None else hidden_nF * _padded(weight_m, len(out_nF)))


@compiled.region
def _weighted_swiglu_backward_compiled(
    gate_up_nG: Tensor, grad_nF: Tensor, weight_m: Tensor | None, out_nF: Tensor, grad_nG: Tensor
) -> Tensor | None:
    gate_nF, up_nF = gate_up_nG.chunk(2, dim=-1)
    silu_nF = F.silu(gate_nF)
    hidden_nF, grad_weight_m = silu_nF * up_nF, None
    if weight_m is not None:
        weight_n1 = _padded(weight_m, len(out_nF))
        wide = torch.promote_types(grad_nF.dtype, torch.float32)
        grad_weight_m = (grad_nF * hidden_nF).sum(-1, dtype=wide)[: weight_m.shape[0]]
        hidden_nF, grad_nF = hidden_nF * weight_n1, grad_nF * weight_n1
    sigmoid_nF = torch.sigmoid(gate_nF)
    out_nF.copy_(hidden_nF)
    grad_gate_nF = grad_nF * up_nF * sigmoid_nF * (1 + gate_nF * (1 - sigmoid_nF))
    grad_nG.copy_(torch.cat((grad_gate_nF, grad_nF * silu_nF), -1))
    return grad_weight_m
