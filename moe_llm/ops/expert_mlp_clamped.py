"""Experts with biases, with clamped SwiGLU (GPT-OSS, OpenAI 2025) or with another activation, by plain autograd, expert by
expert.

h = f(gate) * up, or clamped gate' * sigmoid(alpha gate') * (up' + 1) with gate' = min(gate, limit) and up' = up within [-limit, limit].
Dimensions: N routed rows (n: of one expert), D hidden, F expert width, G = 2F, E experts.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_llm.ops import host
from moe_llm.ops.expert_mlp_adapted import ExpertAdapters, Factors

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


class ExpertForm(NamedTuple):
    """How experts differ from plain SwiGLU. Biases, where there are any; limit: None where nothing is clamped; activation:
    by transformers' name."""

    gate_up_bias_EG: Tensor | None
    down_bias_ED: Tensor | None
    limit: float | None
    alpha: float
    activation: str = "silu"

    def held(self, own: slice) -> "ExpertForm":
        """That of some of the experts."""
        gate_up, down = (None if bias is None else bias[own] for bias in self[:2])
        return self._replace(gate_up_bias_EG=gate_up, down_bias_ED=down)


def formed_expert_mlp(
    x_ND: Tensor,
    gate_up_proj_EGD: Tensor,
    down_proj_EDF: Tensor,
    counts_E: Tensor,
    form: ExpertForm,
    *,
    weight_N: Tensor | None = None,
    adapters: ExpertAdapters | None = None,
    dropout: float = 0.0,
    host_counts_E: np.ndarray | None = None,
) -> Tensor:
    """`expert_mlp` with experts of another form, and with low-rank adapters where there are any, (N, D)."""
    counts = host.read(counts_E, "rows of each expert", len(x_ND)) if host_counts_E is None else host_counts_E
    counts = counts.tolist()
    rows = x_ND.split([*counts, len(x_ND) - sum(counts)])
    outputs = []
    for e, x_nD in enumerate(rows[:-1]):
        gate_up_nG = _linear(
            x_nD, gate_up_proj_EGD[e], form.gate_up_bias_EG, e, adapters and adapters.gate_up, adapters
        )
        hidden_nF = F.dropout(swiglu(gate_up_nG, form), dropout)
        outputs.append(_linear(hidden_nF, down_proj_EDF[e], form.down_bias_ED, e, adapters and adapters.down, adapters))
    y_ND = torch.cat(outputs)
    if weight_N is not None:
        y_ND = (y_ND * weight_N[: len(y_ND), None]).to(x_ND.dtype)
    return torch.cat((y_ND, torch.zeros_like(rows[-1])))


def swiglu(gate_up_nG: Tensor, form: ExpertForm) -> Tensor:
    """The hidden activations of the projections, (n, F)."""
    gate_nF, up_nF = gate_up_nG.chunk(2, dim=-1)
    if form.limit is None:
        return ACTIVATIONS[form.activation](gate_nF) * up_nF
    gate_nF, up_nF = gate_nF.clamp(max=form.limit), up_nF.clamp(-form.limit, form.limit)
    return gate_nF * torch.sigmoid(form.alpha * gate_nF) * (up_nF + 1)


def _linear(
    x: Tensor, weight: Tensor, bias_E: Tensor | None, e: int, factors: Factors | None, adapters: ExpertAdapters | None
) -> Tensor:
    y = F.linear(x, weight, None if bias_E is None else bias_E[e])
    if factors is None or adapters is None:
        return y
    return y + F.linear(F.linear(F.dropout(x, adapters.dropout), factors.a_ErI[e]), factors.b_EOr[e]) * adapters.scale
