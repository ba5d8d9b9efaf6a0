"""A SwiGLU feed-forward whose weights are a mixture of the experts', a mixture for each run of tokens.

Of N runs only the inputs and the mixtures' coefficients are kept for the backward pass: weights are merged for a few
runs at a time, in both passes, so that memory does not grow with the number of runs.
Dimensions: N runs of L tokens (n: runs of a portion), D hidden, F expert width, G = 2F, E experts.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_llm.ops.products import bmm
from moe_llm.ops.weighted_swiglu import weighted_swiglu, weighted_swiglu_backward

PORTION = 8  # mixtures that exist at once


class WeightExchange(Protocol):
    """Between the ranks that share the experts of a layer, of which each holds some neighbours."""

    def gather(self, own: Tensor) -> Tensor:
        """The weights of all experts, from each rank's own, (E/R, ...) to (E, ...)."""

    def reduce(self, whole: Tensor) -> Tensor:
        """The twin for gradients: the sum over ranks for the own experts, (E, ...) to (E/R, ...)."""


class _AllHere:
    def gather(self, own: Tensor) -> Tensor:
        return own

    def reduce(self, whole: Tensor) -> Tensor:
        return whole


def merged_expert_mlp(
    x_NLD: Tensor,
    probability_NE: Tensor,
    gate_up_proj_EGD: Tensor,
    down_proj_EDF: Tensor,
    *,
    dropout: float = 0.0,
    exchange: WeightExchange | None = None,
) -> Tensor:
    """down_n(silu(gate_n(x)) * up_n(x)) with the weights of run n sum_e probability_ne * expert_e (Muqeeth, Liu and
    Raffel 2023, "Soft WeightMixture of Experts with Adaptive Routing"), (N, L, D) in x's dtype.

    Args:
        probability_NE: over all experts, fp32.
        gate_up_proj_EGD, down_proj_EDF: of x's dtype; with an `exchange` those of this rank's experts.
        dropout: share of the hidden activations that is set to zero, the others being divided by what is left of 1.
    """
    assert x_NLD.dtype == gate_up_proj_EGD.dtype == down_proj_EDF.dtype, "tokens and weights differ in dtype"
    # on the CPU, whose generator activation checkpointing sets back, and without asking the device
    seed = int(torch.randint(2**62, ())) if dropout else 0
    return _Merged.apply(x_NLD, probability_NE, gate_up_proj_EGD, down_proj_EDF, exchange or _AllHere(), dropout, seed)


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NLD, probability_NE, gate_up_proj_EGD, down_proj_EDF, exchange, dropout, seed):
        ctx.save_for_backward(x_NLD, probability_NE, gate_up_proj_EGD, down_proj_EDF)
        ctx.exchange, ctx.dropout, ctx.seed = exchange, dropout, seed
        gate_up_EGD, down_EDF = exchange.gather(gate_up_proj_EGD), exchange.gather(down_proj_EDF)
        y_NLD = torch.empty_like(x_NLD)
        for part in _portions(len(x_NLD)):
            x_nLD, mixture_nE = x_NLD[part], probability_NE[part].to(x_NLD.dtype)
            gate_up_nLG = bmm(x_nLD, _merge(mixture_nE, gate_up_EGD).mT)
            hidden_nLF = x_nLD.new_empty(*x_nLD.shape[:2], down_EDF.shape[-1])
            weighted_swiglu(gate_up_nLG.flatten(0, 1), None, hidden_nLF.flatten(0, 1))
            if dropout:
                hidden_nLF *= _kept(hidden_nLF, dropout, seed + part.start)
            y_NLD[part] = bmm(hidden_nLF, _merge(mixture_nE, down_EDF).mT)
        return y_NLD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NLD):
        x_NLD, probability_NE, *held = ctx.saved_tensors
        needs_weights = ctx.needs_input_grad[2], ctx.needs_input_grad[3]
        gate_up_EGD, down_EDF = weights = [ctx.exchange.gather(own) for own in held]
        grad_x, grad_probability = torch.empty_like(x_NLD), torch.zeros_like(probability_NE)
        # sums over all runs, in fp32 whatever the weights are in
        grad_weights = [
            torch.zeros_like(w, dtype=torch.float32) if needed else None for w, needed in zip(weights, needs_weights)
        ]
        for part in _portions(len(x_NLD)):
            x_nLD, grad_nLD, mixture_nE = x_NLD[part], grad_NLD[part], probability_NE[part].to(x_NLD.dtype)
            gate_up_nGD, down_nDF = _merge(mixture_nE, gate_up_EGD), _merge(mixture_nE, down_EDF)
            gate_up_nLG, grad_hidden_nLF = bmm(x_nLD, gate_up_nGD.mT), bmm(grad_nLD, down_nDF)
            kept_nLF = _kept(grad_hidden_nLF, ctx.dropout, ctx.seed + part.start) if ctx.dropout else None
            if kept_nLF is not None:
                grad_hidden_nLF *= kept_nLF
            hidden_nLF, grad_nLG = torch.empty_like(grad_hidden_nLF), torch.empty_like(gate_up_nLG)
            flat = (tensor.flatten(0, 1) for tensor in (gate_up_nLG, grad_hidden_nLF, hidden_nLF, grad_nLG))
            rows_gate_up, rows_grad_hidden, rows_hidden, rows_grad = flat
            weighted_swiglu_backward(rows_gate_up, rows_grad_hidden, None, rows_hidden, rows_grad)
            if kept_nLF is not None:
                hidden_nLF *= kept_nLF
            grad_x[part] = bmm(grad_nLG, gate_up_nGD)
            for which, grad_merged in enumerate((bmm(grad_nLG.mT, x_nLD), bmm(grad_nLD.mT, hidden_nLF))):
                flat_n = grad_merged.flatten(1)
                grad_probability[part] += flat_n @ weights[which].flatten(1).mT
                if grad_weights[which] is not None:
                    grad_weights[which].flatten(1).add_(mixture_nE.mT @ flat_n)
        own = [None if grad is None else ctx.exchange.reduce(grad.to(x_NLD.dtype)) for grad in grad_weights]
        return grad_x, grad_probability, *own, None, None, None


def _portions(runs: int) -> Iterator[slice]:
    return (slice(start, min(start + PORTION, runs)) for start in range(0, runs, PORTION))


def _merge(mixture_nE: Tensor, weight_E: Tensor) -> Tensor:
    """Weights of each run, (n, ...)."""
    return (mixture_nE @ weight_E.flatten(1)).unflatten(1, weight_E.shape[1:])


def _kept(like: Tensor, dropout: float, seed: int) -> Tensor:
    """What activations are multiplied by: zero, or one over what is kept. The same for the same seed."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.empty_like(like).bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)
