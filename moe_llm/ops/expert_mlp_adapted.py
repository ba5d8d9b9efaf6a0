"""Experts with low-rank adapters beside their weights, without ever making the sum of the two.

gate_up = W1 x + s B1 A1 x and y = W2 h + s B2 A2 h, expert by expert (Hu et al. 2021): beside the frozen products there
are two thin ones for each adapter, and gradients of the factors alone, when the weights need none. `loop` is plain
autograd; `fused` is one autograd function that keeps what `expert_mlp` keeps, and takes the rest again.
Dimensions: T tokens, N routed rows (n: of one expert), D hidden, F expert width, G = 2F, E experts, r rank.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_llm.ops import host
from moe_llm.ops.expert_mlp import _Blocks, counts_on_host
from moe_llm.ops.permutation import combine, gather_sum, permute
from moe_llm.ops.products import mm
from moe_llm.ops.weighted_swiglu import weighted_swiglu, weighted_swiglu_backward


class Factors(NamedTuple):
    """Of one stacked weight (E, O, I): A (E, r, I) and B (E, O, r)."""

    a_ErI: Tensor
    b_EOr: Tensor


class ExpertAdapters(NamedTuple):
    """Factors of the two stacked weights, None where one has none; scale: times B A; dropout: of each A's input."""

    gate_up: Factors | None
    down: Factors | None
    scale: float
    dropout: float = 0.0


def adapted_expert_mlp(
    x: Tensor,
    gate_up_proj_EGD: Tensor,
    down_proj_EDF: Tensor,
    counts_E: Tensor,
    adapters: ExpertAdapters,
    weight_N: Tensor | None = None,
    token_index_N: Tensor | None = None,
    slot_TK: Tensor | None = None,
    *,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """`expert_mlp` of sorted rows (N, D), or with `token_index_N` `routed_expert_mlp` of tokens (T, D).

    Args:
        backend: `loop`, `fused`, or `auto`, which is fused but for the dropouts, that only the loop has.
    """
    num_tokens, dropping = len(x), bool(dropout or adapters.dropout)
    assert not (dropping and backend == "fused"), "fused has no dropout"
    if dropping or backend == "loop":
        rows_ND = x if token_index_N is None else permute(x, token_index_N, slot_TK)
        y_ND = _loop(rows_ND, gate_up_proj_EGD, down_proj_EDF, counts_E, adapters, weight_N, dropout)
        return y_ND if token_index_N is None else combine(y_ND, None, token_index_N, num_tokens, slot_TK)
    factors = [factor for pair in (adapters.gate_up, adapters.down) for factor in pair or (None, None)]
    if token_index_N is None or (slot_TK is not None and num_tokens):
        return _FusedAdapted.apply(
            x, gate_up_proj_EGD, down_proj_EDF, counts_E, weight_N, token_index_N, slot_TK, adapters.scale, *factors
        )
    y_ND = _FusedAdapted.apply(
        permute(x, token_index_N, slot_TK),
        gate_up_proj_EGD,
        down_proj_EDF,
        counts_E,
        weight_N,
        None,
        None,
        adapters.scale,
        *factors,
    )
    return combine(y_ND, None, token_index_N, num_tokens, slot_TK)


def _loop(
    x_ND: Tensor,
    gate_up_proj_EGD: Tensor,
    down_proj_EDF: Tensor,
    counts_E: Tensor,
    adapters: ExpertAdapters,
    weight_N: Tensor | None,
    dropout: float,
) -> Tensor:
    def apply(x_nI: Tensor, weight_OI: Tensor, factors: Factors | None, expert: int) -> Tensor:
        y_nO = F.linear(x_nI, weight_OI)
        if factors is None:
            return y_nO
        low_nr = F.linear(F.dropout(x_nI, adapters.dropout), factors.a_ErI[expert])
        return y_nO + F.linear(low_nr, factors.b_EOr[expert]) * adapters.scale

    counts = host.read(counts_E, "rows of each expert", len(x_ND)).tolist()
    rows, outputs = x_ND.split([*counts, len(x_ND) - sum(counts)]), []
    for expert, (gate_up_GD, down_DF) in enumerate(zip(gate_up_proj_EGD.unbind(), down_proj_EDF.unbind())):
        gate_nF, up_nF = apply(rows[expert], gate_up_GD, adapters.gate_up, expert).chunk(2, dim=-1)
        outputs.append(apply(F.dropout(F.silu(gate_nF) * up_nF, dropout), down_DF, adapters.down, expert))
    y_ND = torch.cat(outputs)
    if weight_N is not None:
        y_ND = (y_ND * weight_N[: len(y_ND), None]).to(x_ND.dtype)
    return torch.cat((y_ND, torch.zeros_like(rows[-1])))


class _FusedAdapted(torch.autograd.Function):
    """Blocks of rows as in `expert_mlp`: what lies in an expert's rounded block beyond its own rows is written
    again by the next one, and is zero in all that is summed over rows."""

    @staticmethod
    def forward(ctx, x_ND, gate_up_EGD, down_EDF, counts_E, weight_N, token_index_N, slot_TK, scale, a1, b1, a2, b2):
        counts_E = counts_on_host(counts_E, len(x_ND) if token_index_N is None else len(token_index_N))
        blocks = _Blocks.of(counts_E, x_ND, token_index_N)
        gate_up_NG = x_ND.new_empty(blocks.stop, gate_up_EGD.shape[1])
        hidden_nF = x_ND.new_empty(blocks.largest, down_EDF.shape[2])
        y_ND = x_ND.new_empty(max(blocks.stop, blocks.num_rows), x_ND.shape[1])
        for expert, start, end, stop in blocks.busy:
            x_nD, gate_up_nG, h_nF = blocks.rows(x_ND, start, stop), gate_up_NG[start:stop], hidden_nF[: stop - start]
            mm(x_nD, gate_up_EGD[expert].t(), out=gate_up_nG)
            if a1 is not None:
                gate_up_nG.addmm_(x_nD @ a1[expert].t(), b1[expert].t(), alpha=scale)
            weighted_swiglu(gate_up_nG, None if weight_N is None else weight_N[start:end], h_nF)
            y_nD = y_ND[start:stop]
            mm(h_nF, down_EDF[expert].t(), out=y_nD)
            if a2 is not None:
                y_nD.addmm_(h_nF @ a2[expert].t(), b2[expert].t(), alpha=scale)
        ctx.scale = scale
        ctx.save_for_backward(
            x_ND, gate_up_EGD, down_EDF, counts_E, weight_N, gate_up_NG, token_index_N, slot_TK, a1, b1, a2, b2
        )
        y_ND = blocks.only_used_(y_ND)
        return y_ND if slot_TK is None else gather_sum(y_ND, slot_TK, None)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND):
        x_ND, gate_up_EGD, down_EDF, counts_E, weight_N, gate_up_NG, *routing, a1, b1, a2, b2 = ctx.saved_tensors
        token_index_N, slot_TK = routing
        needs, scale, factors = ctx.needs_input_grad, ctx.scale, (a1, b1, a2, b2)
        assert not any(needs[1:3]), "weights beneath adapters are frozen"
        blocks = _Blocks.of(counts_E, x_ND, token_index_N)
        grad_x = x_ND.new_empty(max(blocks.stop, blocks.num_rows), x_ND.shape[1]) if needs[0] else None
        grad_weight = torch.zeros_like(weight_N) if needs[4] else None
        grads = grad_a1, grad_b1, grad_a2, grad_b2 = [
            None if factor is None else blocks.weight_gradient(factor) for factor in factors
        ]
        hidden_nF, grad_hidden_nF = x_ND.new_empty(2, blocks.largest, down_EDF.shape[2])
        grad_gate_up_nG = x_ND.new_empty(blocks.largest, gate_up_EGD.shape[1])
        for expert, start, end, stop in blocks.busy:
            rows, n = stop - start, end - start
            grad_nD, gate_up_nG = blocks.rows(grad_ND, start, stop), gate_up_NG[start:stop]
            h_nF, grad_h_nF, grad_nG = hidden_nF[:rows], grad_hidden_nF[:rows], grad_gate_up_nG[:rows]
            mm(grad_nD, down_EDF[expert], out=grad_h_nF)
            if a2 is not None:
                low_nr = (grad_nD @ b2[expert]).mul_(scale)
                mm(low_nr, a2[expert], out=grad_h_nF, add=True)
            grad_weight_n = weighted_swiglu_backward(
                gate_up_nG, grad_h_nF, None if weight_N is None else weight_N[start:end], h_nF, grad_nG
            )
            if needs[4]:
                grad_weight[start:end] = grad_weight_n
            if a2 is not None:
                h_nF[n:].zero_()
                mm(low_nr.t(), h_nF, out=grad_a2[expert])
                mm(grad_nD.t(), (h_nF @ a2[expert].t()).mul_(scale), out=grad_b2[expert])
            grad_nG[n:].zero_()
            if a1 is not None:
                x_nD, low_nr = blocks.rows(x_ND, start, stop), (grad_nG @ b1[expert]).mul_(scale)
                mm(low_nr.t(), x_nD, out=grad_a1[expert])
                mm(grad_nG.t(), (x_nD @ a1[expert].t()).mul_(scale), out=grad_b1[expert])
            if needs[0]:
                mm(grad_nG, gate_up_EGD[expert], out=grad_x[start:stop])
                if a1 is not None:
                    mm(low_nr, a1[expert], out=grad_x[start:stop], add=True)
        if needs[0]:
            grad_x = blocks.only_used_(grad_x)
            grad_x = grad_x if slot_TK is None else gather_sum(grad_x, slot_TK, None)
        return grad_x, None, None, None, grad_weight, None, None, None, *grads
