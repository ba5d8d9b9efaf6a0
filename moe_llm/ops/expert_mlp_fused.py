"""Experts one after the other, in one autograd function, into buffers allocated once.

Kept for the backward pass: the input rows (or the tokens that they are gathered from) and their gate and up
projections. silu(gate) * up is computed again, expert by expert, in buffers as large as the busiest expert needs;
weight gradients are written straight into one (E, ...) tensor, and those of the projections over these.

Where our kernels have the products too (see `products`), all of a pass is one call of `native/experts.h`: rows are
gathered where products read them, and nothing lies between one expert and the next.

Elsewhere, in bf16 on a CPU, products are compiled for their exact shape at its first use, which takes as long as the
product itself, and row counts hardly ever repeat. There an expert's block is extended to a round number of rows: into
the next expert's rows, whose results are written later and over it, or into zeros at the end; what enters a sum over
rows is set to zero. With counts that change every step this saves 0.3 of the time.
Dimensions: N routed rows (n: of one expert), D hidden, F expert width, G = 2F, E experts.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_llm.ops import compiled, host, native
from moe_llm.ops.graph import graph_is_kept
from moe_llm.ops.permutation import gather_sum, row_dot
from moe_llm.ops.products import compiled_by_shape, fused_experts_fit, mm
from moe_llm.ops.shapes import round_up

# rows that one call of native/experts.h takes at a time, of an expert with more of them: its buffers hold as many
_NATIVE_ROWS = 1024


def fused_expert_mlp(
    x_ND: Tensor, gate_up_proj_EGD: Tensor, down_proj_EDF: Tensor, counts_E: Tensor, weight_N: Tensor | None
) -> Tensor:
    """See `moe_llm.ops.expert_mlp.expert_mlp`."""
    return _FusedExperts.apply(x_ND, gate_up_proj_EGD, down_proj_EDF, counts_E, weight_N, None, None)


def fused_routed_expert_mlp(
    x_TD: Tensor,
    gate_up_proj_EGD: Tensor,
    down_proj_EDF: Tensor,
    counts_E: Tensor,
    weight_N: Tensor,
    token_index_N: Tensor,
    slot_TK: Tensor,
) -> Tensor:
    """See `moe_llm.ops.routed_experts.routed_expert_mlp`. An expert's rows are gathered when it is their turn, in both
    passes, so that of N rows only the gate and up projections are kept."""
    return _FusedExperts.apply(x_TD, gate_up_proj_EGD, down_proj_EDF, counts_E, weight_N, token_index_N, slot_TK)


class _FusedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, gate_up_proj_EGD, down_proj_EDF, counts_E, weight_N, token_index_N, slot_TK):
        counts_E = counts_on_host(counts_E, len(x_ND) if token_index_N is None else len(token_index_N))
        inputs = _Inputs(x_ND, gate_up_proj_EGD, down_proj_EDF, counts_E, weight_N, token_index_N)
        blocks = _Blocks.of(counts_E, x_ND, token_index_N, rounded=not inputs.go_in_one_call)
        gate_up_NG = x_ND.new_empty(blocks.stop, gate_up_proj_EGD.shape[1])
        y_ND = x_ND.new_empty(max(blocks.stop, blocks.num_rows), x_ND.shape[1])
        (_forward_natively if inputs.go_in_one_call else _forward)(inputs, blocks, gate_up_NG, y_ND)
        # the counts are kept as a tensor, not as integers on ctx, so that checkpointing recomputes them too
        ctx.save_for_backward(*inputs, slot_TK, gate_up_NG)
        y_ND = blocks.only_used_(y_ND)
        return y_ND if slot_TK is None else gather_sum(y_ND, slot_TK, None)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND):
        *inputs, slot_TK, gate_up_NG = ctx.saved_tensors
        inputs = _Inputs(*inputs)
        needs_x, needs_gate_up, needs_down, _, needs_weight, _, _ = ctx.needs_input_grad
        blocks = _Blocks.of(inputs.counts_E, inputs.x_ND, inputs.token_index_N, rounded=not inputs.go_in_one_call)
        grads = _Gradients(
            inputs.x_ND.new_empty(max(blocks.stop, blocks.num_rows), inputs.x_ND.shape[1]) if needs_x else None,
            blocks.weight_gradient(inputs.gate_up_proj_EGD) if needs_gate_up else None,
            blocks.weight_gradient(inputs.down_proj_EDF) if needs_down else None,
            torch.zeros_like(inputs.weight_N) if needs_weight else None,
        )
        # buffers of their own cost memory, and time when they push the others out of the cache
        in_place = native.fits(gate_up_NG) and not graph_is_kept()
        backward = _backward_natively if inputs.go_in_one_call else _backward
        backward(inputs, blocks, gate_up_NG, grad_ND, grads, in_place)
        grad_x = grads.x_ND
        if needs_x:
            grad_x = blocks.only_used_(grad_x)
            grad_x = grad_x if slot_TK is None else gather_sum(grad_x, slot_TK, None)
        return grad_x, grads.gate_up_proj_EGD, grads.down_proj_EDF, None, grads.weight_N, None, None


def counts_on_host(counts_E: Tensor, num_rows: int) -> Tensor:
    """The same counts where both passes can read them without waiting for the device: it is waited for here, once."""
    if counts_E.device.type == "cpu":
        return counts_E
    return torch.from_numpy(host.read(counts_E, "rows of each expert", num_rows))


class _Inputs(NamedTuple):
    """x_ND: (T, D), tokens, where there is an index of them."""

    x_ND: Tensor
    gate_up_proj_EGD: Tensor
    down_proj_EDF: Tensor
    counts_E: Tensor
    weight_N: Tensor | None
    token_index_N: Tensor | None

    @property
    def go_in_one_call(self) -> bool:
        return native.fits(*self[:3]) and fused_experts_fit(self.x_ND, self.down_proj_EDF.shape[2])

    def for_kernels(self) -> tuple[Tensor | None, ...]:
        x_ND, gate_up_proj_EGD, down_proj_EDF, counts_E, weight_N, token_index_N = self
        return (
            x_ND.contiguous(),
            None if token_index_N is None else token_index_N.contiguous(),
            gate_up_proj_EGD.contiguous(),
            down_proj_EDF.contiguous(),
            counts_E.to(torch.int64).contiguous(),
            None if weight_N is None else weight_N.float().contiguous(),
        )


class _Gradients(NamedTuple):
    """To be written; None: not asked for."""

    x_ND: Tensor | None
    gate_up_proj_EGD: Tensor | None
    down_proj_EDF: Tensor | None
    weight_N: Tensor | None


def _forward(inputs: _Inputs, blocks: "_Blocks", gate_up_NG: Tensor, y_ND: Tensor) -> None:
    x_ND, gate_up_proj_EGD, down_proj_EDF, _, weight_N, _ = inputs
    hidden_nF = x_ND.new_empty(blocks.largest, down_proj_EDF.shape[2])
    gate_up_DG, down_FD = gate_up_proj_EGD.mT.unbind(), down_proj_EDF.mT.unbind()
    for expert, start, end, stop in blocks.busy:
        gate_up_nG, h_nF = gate_up_NG[start:stop], hidden_nF[: stop - start]
        mm(blocks.rows(x_ND, start, stop), gate_up_DG[expert], out=gate_up_nG)
        weighted_swiglu(gate_up_nG, None if weight_N is None else weight_N[start:end], h_nF)
        mm(h_nF, down_FD[expert], out=y_ND[start:stop])


def _backward(
    inputs: _Inputs, blocks: "_Blocks", gate_up_NG: Tensor, grad_ND: Tensor, grads: _Gradients, in_place: bool
) -> None:
    """in_place: over gate_up_NG."""
    x_ND, gate_up_proj_EGD, down_proj_EDF, _, weight_N, _ = inputs
    hidden_nF = x_ND.new_empty(blocks.largest, down_proj_EDF.shape[2])
    grad_hidden_nF = hidden_nF if in_place else torch.empty_like(hidden_nF)
    grad_gate_up_nG = None if in_place else x_ND.new_empty(blocks.largest, gate_up_proj_EGD.shape[1])
    gate_up_GD, down_DF = gate_up_proj_EGD.unbind(), down_proj_EDF.unbind()
    for expert, start, end, stop in blocks.busy:
        rows, n = stop - start, end - start
        grad_nD, gate_up_nG = blocks.rows(grad_ND, start, stop), gate_up_NG[start:stop]
        h_nF, grad_h_nF = hidden_nF[:rows], grad_hidden_nF[:rows]
        grad_nG = gate_up_nG if grad_gate_up_nG is None else grad_gate_up_nG[:rows]
        of_the_next_nG = gate_up_nG[n:].clone() if in_place and n < rows else None
        mm(grad_nD, down_DF[expert], out=grad_h_nF)
        # y = (weight h) W^T, so dL/dweight = grad . (h W^T) = (grad W) . h: y itself is not needed
        grad_weight_n = weighted_swiglu_backward(
            gate_up_nG, grad_h_nF, None if weight_N is None else weight_N[start:end], h_nF, grad_nG
        )
        if grads.weight_N is not None:
            assert grad_weight_n is not None, "weights have gradients where they are given"
            grads.weight_N[start:end] = grad_weight_n
        if n < rows:
            h_nF[n:].zero_()
            grad_nG[n:].zero_()
        if grads.down_proj_EDF is not None:
            mm(grad_nD.t(), h_nF, out=grads.down_proj_EDF[expert])
        if grads.gate_up_proj_EGD is not None:
            mm(grad_nG.t(), blocks.rows(x_ND, start, stop), out=grads.gate_up_proj_EGD[expert])
        if grads.x_ND is not None:
            mm(grad_nG, gate_up_GD[expert], out=grads.x_ND[start:stop])
        if of_the_next_nG is not None:
            grad_nG[n:] = of_the_next_nG


def _forward_natively(inputs: _Inputs, blocks: "_Blocks", gate_up_NG: Tensor, y_ND: Tensor) -> None:
    experts, hidden, width = inputs.down_proj_EDF.shape
    block = _native_rows(inputs.x_ND, blocks)
    tensors = *inputs.for_kernels(), gate_up_NG, y_ND.new_empty(block, width), y_ND
    native.call("experts_forward", y_ND.dtype, *tensors, experts, hidden, width, block)


def _backward_natively(
    inputs: _Inputs, blocks: "_Blocks", gate_up_NG: Tensor, grad_ND: Tensor, grads: _Gradients, in_place: bool
) -> None:
    experts, hidden, width = inputs.down_proj_EDF.shape
    block = _native_rows(inputs.x_ND, blocks)
    wide_N = None if grads.weight_N is None else torch.zeros_like(grads.weight_N, dtype=torch.float32)
    tensors = (
        *inputs.for_kernels(),
        gate_up_NG,
        grad_ND.contiguous(),
        gate_up_NG.new_empty(block, width),
        None if in_place else gate_up_NG.new_empty(block, 2 * width),
        *grads[:3],
        wide_N,
    )
    native.call("experts_backward", gate_up_NG.dtype, *tensors, experts, hidden, width, block)
    if wide_N is not None:
        assert grads.weight_N is not None
        grads.weight_N.copy_(wide_N)


def _native_rows(x_ND: Tensor, blocks: "_Blocks") -> int:
    """All of an expert's in bf16, in which sums over rows must not be rounded on their way."""
    return min(blocks.largest, _NATIVE_ROWS) if x_ND.dtype == torch.float32 else blocks.largest


class _Block(NamedTuple):
    """An expert's rows, from `start` to `end`; its products go on to `stop`."""

    expert: int
    start: int
    end: int
    stop: int


class _Blocks(NamedTuple):
    """The rows of each expert that has any.

    busy: in the order of rows.
    used: rows that belong to an expert. stop: the last of the stops. largest: rows of the largest block.
    num_rows: rows in all. token_index: of each row up to `stop`, where rows are gathered from tokens.
    """

    busy: list[_Block]
    used: int
    stop: int
    largest: int
    num_rows: int
    token_index: Tensor | None

    @staticmethod
    def of(counts_E: Tensor, x_ND: Tensor, token_index_N: Tensor | None, rounded: bool = True) -> "_Blocks":
        """counts_E: on the host. rounded: whether products that are compiled for their shape get blocks of a round number of rows."""
        busy, end, rounded = [], 0, rounded and compiled_by_shape(x_ND)
        for expert, count in enumerate(counts_E.tolist()):
            if count:
                busy.append(_Block(expert, end, end + count, end + (round_up(count) if rounded else count)))
            end += count
        num_rows = len(x_ND) if token_index_N is None else len(token_index_N)
        assert end <= num_rows, f"the counts sum to {end}, but there are {num_rows} rows"
        stop = max((block.stop for block in busy), default=0)
        largest = max((block.stop - block.start for block in busy), default=0)
        if token_index_N is not None and stop > num_rows:  # any token does: what comes of those rows is multiplied by 0
            token_index_N = torch.nn.functional.pad(token_index_N, (0, stop - num_rows))
        return _Blocks(busy, end, stop, largest, num_rows, token_index_N)

    def rows(self, x_ND: Tensor, start: int, stop: int) -> Tensor:
        """Rows start to stop, gathered, or with zeros for those that belong to nobody."""
        if self.token_index is not None:
            return x_ND.index_select(0, self.token_index[start:stop])
        if stop <= self.used:
            return x_ND[start:stop]
        return torch.cat((x_ND[start : self.used], x_ND.new_zeros(stop - self.used, x_ND.shape[1])))

    def only_used_(self, y_ND: Tensor) -> Tensor:
        """The first num_rows rows, those that belong to nobody set to zero."""
        y_ND[self.used :].zero_()
        return y_ND[: self.num_rows]

    def weight_gradient(self, weight: Tensor) -> Tensor:
        """Uninitialised, but zero for the experts that have no rows."""
        grad = torch.empty_like(weight, memory_format=torch.contiguous_format)
        busy = {block.expert for block in self.busy}
        for expert in range(len(weight)):
            if expert not in busy:
                grad[expert].zero_()
        return grad


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
    if compiled.enabled():
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
    if compiled.enabled():
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
