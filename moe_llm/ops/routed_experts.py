"""Tokens through their experts and back, as one operation: permute, expert_mlp and combine.

Dimensions: T tokens, D hidden, F expert width, G = 2F, E experts, K experts per token, N routed rows (T * K).
"""

from torch import Tensor

from moe_llm.ops.expert_mlp import choose_backend, expert_mlp
from moe_llm.ops.expert_mlp_fused import fused_routed_expert_mlp
from moe_llm.ops.permutation import combine, permute


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
