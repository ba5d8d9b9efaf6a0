"""The experts' SwiGLU feed-forward over rows sorted by expert: one function, several backends.

Dimensions: N routed rows, D hidden, F expert width, E experts,
G = 2F (gate rows, then up rows, as in transformers).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_llm.errors import UserError
from moe_llm.ops import host
from moe_llm.ops.expert_mlp_fused import fused_expert_mlp
from moe_llm.ops.expert_mlp_grouped import grouped_expert_mlp, grouped_mm_fits

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
