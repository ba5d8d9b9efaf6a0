"""Mistral (Jiang et al. 2023): what a model with one expert is, whose router has nothing to choose.

The softmax of one logit is 1, so a layer computes what its expert does, whatever the router holds.
"""

from collections.abc import Mapping
from typing import Any

from moe_llm.config import ModelConfig
from moe_llm.families import mixtral
from moe_llm.families.family import Family

ONE_EXPERT = {"num_local_experts": 1, "num_experts_per_tok": 1}


def read(said: Mapping[str, Any]) -> dict[str, Any]:
    return {"intermediate_size": said["intermediate_size"], "sliding_window": said["sliding_window"], **ONE_EXPERT}


def write(model: ModelConfig) -> dict[str, Any]:
    return {"intermediate_size": model.intermediate_size, "sliding_window": model.sliding_window}


def _more_than_one(model: ModelConfig) -> str | None:
    if model.num_local_experts > 1:
        return f"model.num_local_experts={model.num_local_experts}"
    if set(model.router.parameter_shapes(model)) == {"weight"} and not model.router.buffer_shapes(model):
        return None
    return f"model.router.type={model.router.type}"


FAMILY = Family(
    "mistral",
    "MistralForCausalLM",
    {
        **{key: value for key, value in mixtral.DEFAULTS.items() if key not in mixtral.OF_EXPERTS},
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
    },
    read,
    write,
    can={"windows": ("none", "all")},
    also=_more_than_one,
    names=(
        (r"\.block_sparse_moe\.experts\.0\.w1\.", ".mlp.gate_proj."),
        (r"\.block_sparse_moe\.experts\.0\.w3\.", ".mlp.up_proj."),
        (r"\.block_sparse_moe\.experts\.0\.w2\.", ".mlp.down_proj."),
    ),
    without=("num_experts_per_tok", "router_aux_loss_coef"),
    omitted=(".mlp.gate.weight",),
)
