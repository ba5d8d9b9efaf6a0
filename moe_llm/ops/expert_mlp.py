"""The experts' SwiGLU feed-forward over rows sorted by expert: one function, several backends.

Dimensions: N routed rows, D hidden, F expert width, E experts,
G = 2F (gate rows, then up rows, as in transformers), n rows of one expert.

`fused` is one autograd function with buffers that are allocated once. Kept for the backward pass: the input rows (or the
tokens that they are gathered from) and their gate and up projections. silu(gate) * up is computed again, expert by
expert, in buffers as large as the busiest expert needs; weight gradients are written straight into one (E, ...) tensor,
and those of the projections over these. Where our kernels have the products too (see `products`), all of a pass is one
call of `native/experts.h`: rows are gathered where products read them, and nothing lies between one expert and the next.

Elsewhere, in bf16 on a CPU, products are compiled for their exact shape at its first use, which takes as long as the
product itself, and row counts hardly ever repeat. There an expert's block is extended to a round number of rows: into
the next expert's rows, whose results are written later and over it, or into zeros at the end; what enters a sum over
rows is set to zero. With counts that change every step this saves 0.3 of the time.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_llm.errors import UserError
from moe_llm.ops import host, native
from moe_llm.ops.expert_mlp_grouped import grouped_expert_mlp, grouped_mm_fits
from moe_llm.ops.native import graph_is_kept
from moe_llm.ops.permutation import combine, gather_sum, permute
from moe_llm.ops.products import compiled_by_shape, fused_experts_fit, mm
from moe_llm.ops.shapes import round_up
from moe_llm.ops.weighted_swiglu import weighted_swiglu, weighted_swiglu_backward

BACKENDS = ("auto", "loop", "fused", "grouped")


def expert_mlp(
    x_ND: Tensor,
    gate_up_proj_EGD: Tensor,
    down_proj_EDF: Tensor,
    counts_E: Tensor,
    *,
    backend: str = "auto",
    weight_N: Tensor | None = None,
    dropout: float = 0.0,
    host_counts_E: np.ndarray | None = None,
) -> Tensor:
    """down(silu(gate(x)) * up(x)) of each row by its expert, times weight_N where given (Shazeer 2020).

    Args:
        x_ND: rows sorted by expert: the first counts_E[0] belong to expert 0, and so on. Rows beyond the
            counts' sum belong to nobody: their output and their gradient are zero, whatever they hold.
        gate_up_proj_EGD, down_proj_EDF: the stacked weights, of x's dtype.
        counts_E: integer rows per expert, zeros allowed.
        backend: `loop` plain autograd, expert by expert; `fused` one autograd function, expert by expert;
            `grouped` torch's grouped matrix product, without host synchronisation on Hopper and later GPUs; `auto` see
            `choose_backend`.
        weight_N: routing weights, any floating dtype. Weighting here rather than in `combine` saves the
            memory of the unweighted rows, since their gradient is formed from the hidden activations.
        dropout: share of the hidden activations silu(gate(x)) * up(x) that is set to zero, the others being divided by
            what is left of 1; by torch's random numbers. `auto` and `loop` alone have it.

    Returns: (N, D) in x's dtype.
    """
    assert x_ND.dtype == gate_up_proj_EGD.dtype == down_proj_EDF.dtype, "rows and weights differ in dtype"
    assert counts_E.shape == gate_up_proj_EGD.shape[:1] == down_proj_EDF.shape[:1]
    if backend == "auto" and dropout:
        backend = "loop"
    if dropout and backend != "loop":
        raise UserError(f"expert backend {backend!r} has no dropout={dropout:g}; use 'auto' or 'loop'.")
    if backend == "auto":
        backend = choose_backend(x_ND.device, x_ND.dtype, (len(x_ND), *down_proj_EDF.shape))
    if backend in ("loop", "fused") and host_counts_E is not None:
        counts_E = torch.from_numpy(host_counts_E)
    if backend == "loop":
        return _loop_expert_mlp(x_ND, gate_up_proj_EGD, down_proj_EDF, counts_E, weight_N, dropout)
    if backend == "fused":
        return fused_expert_mlp(x_ND, gate_up_proj_EGD, down_proj_EDF, counts_E, weight_N)
    if backend != "grouped":
        raise UserError(f"expert backend {backend!r} does not exist; use one of {', '.join(BACKENDS)}.")
    if not grouped_mm_fits(x_ND.device, x_ND.dtype, *down_proj_EDF.shape[1:]):
        raise UserError(
            f"expert backend 'grouped' does not take {x_ND.dtype} with hidden_size={down_proj_EDF.shape[1]} "
            f"and intermediate_size={down_proj_EDF.shape[2]} on {x_ND.device.type}; use 'auto'."
        )
    return grouped_expert_mlp(x_ND, gate_up_proj_EGD, down_proj_EDF, counts_E, weight_N)


def choose_backend(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> str:
    """The backend for `auto`, given shape (N, E, D, F).

    CPU: fused, at 0.41 (bf16) and 0.70 (fp32) of the plain loop's time with 4096 rows of 512 and 8 experts of
    1792, against 0.44 and 0.74 for grouped; 0.08 and 0.11 against 0.09 and 0.12 with 64 experts of 224; ahead
    with skewed routing as well (scripts/benchmarks/ops.py, one thread of a Xeon with AMX, torch 2.13, counts
    that change with every call). CUDA, none of it measured: grouped where torch's kernel takes the dtype
    and shape and does not wait for the counts, which is from Hopper on (before, it is a loop over the experts that
    reads them in each product, where fused reads them once in each pass).
    """
    _, _, hidden, width = shape
    if device.type != "cuda":
        return "fused"
    never_waits = torch.cuda.get_device_capability(device) >= (9, 0)
    return "grouped" if never_waits and grouped_mm_fits(device, dtype, hidden, width) else "fused"


def _loop_expert_mlp(
    x_ND: Tensor,
    gate_up_proj_EGD: Tensor,
    down_proj_EDF: Tensor,
    counts_E: Tensor,
    weight_N: Tensor | None,
    dropout: float,
) -> Tensor:
    counts = host.read(counts_E, "rows of each expert", len(x_ND)).tolist()
    rows = x_ND.split([*counts, len(x_ND) - sum(counts)])
    outputs = []
    for x_nD, gate_up_GD, down_DF in zip(rows, gate_up_proj_EGD.unbind(), down_proj_EDF.unbind()):
        gate_nF, up_nF = F.linear(x_nD, gate_up_GD).chunk(2, dim=-1)
        outputs.append(F.linear(F.dropout(F.silu(gate_nF) * up_nF, dropout), down_DF))
    y_ND = torch.cat(outputs)
    if weight_N is not None:
        y_ND = (y_ND * weight_N[: len(y_ND), None]).to(x_ND.dtype)
    return torch.cat((y_ND, torch.zeros_like(rows[-1])))


def routed_expert_mlp(
    x_TD: Tensor,
    gate_up_proj_EGD: Tensor,
    down_proj_EDF: Tensor,
    counts_E: Tensor,
    weight_N: Tensor,
    token_index_N: Tensor,
    slot_TK: Tensor | None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Each token's sum of weight * down(silu(gate(x)) * up(x)) over its experts, (T, D).

    Args:
        counts_E, weight_N, token_index_N, slot_TK: as `sort_by_expert` orders them; slot_TK is None where tokens have
            different numbers of rows.
        dropout, backend: as in `expert_mlp`.
    """
    num_tokens = len(x_TD)
    shape = (len(token_index_N), *down_proj_EDF.shape)
    if backend == "auto":
        backend = "loop" if dropout else choose_backend(x_TD.device, x_TD.dtype, shape)
    if slot_TK is not None and num_tokens and backend == "fused" and not dropout:
        return fused_routed_expert_mlp(
            x_TD, gate_up_proj_EGD, down_proj_EDF, counts_E, weight_N, token_index_N, slot_TK
        )
    x_ND = permute(x_TD, token_index_N, slot_TK)
    y_ND = expert_mlp(
        x_ND, gate_up_proj_EGD, down_proj_EDF, counts_E, backend=backend, weight_N=weight_N, dropout=dropout
    )
    return combine(y_ND, None, token_index_N, num_tokens, slot_TK)


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
    """See `moe_llm.ops.expert_mlp.routed_expert_mlp`. An expert's rows are gathered when it is their turn, in both
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
