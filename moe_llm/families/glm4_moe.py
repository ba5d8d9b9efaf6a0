"""GLM-4-MoE (GLM-4.5, GLM-4.5-Air): dense first layers, half of each head turned, sigmoid routing with a bias that
balances, shared experts without gate; norms of queries and keys in some."""

from collections.abc import Mapping
from typing import Any

from moe_llm.config import ModelConfig
from moe_llm.families.family import BY_PROJECTION, SHARED_DEFAULTS, SIGMOID_BIAS, Family, first_dense

DEFAULTS: dict[str, Any] = {
    **SHARED_DEFAULTS,
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 10944,  # of layers without experts
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "router_aux_loss_coef": 0.0,
    "attention_bias": False,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 128,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "use_qk_norm": False,
    "partial_rotary_factor": 0.5,
}


def sigmoid_router(said: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the router with sigmoid scores, a bias that balances, and groups of experts."""
    keys = ("norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group")
    return {"type": "bias_balanced", "score": "sigmoid", **{key: said[key] for key in keys}}


def written_router(model: ModelConfig) -> dict[str, Any]:
    """And back."""
    router: Any = model.router
    return {
        "n_routed_experts": model.num_local_experts,
        "moe_intermediate_size": model.intermediate_size,
        "n_shared_experts": model.num_shared_experts,
        "norm_topk_prob": router.norm_topk_prob,
        "routed_scaling_factor": router.routed_scaling_factor,
        "n_group": router.n_group,
        "topk_group": router.topk_group,
    }


def read(said: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_local_experts": said["n_routed_experts"],
        "intermediate_size": said["moe_intermediate_size"],
        "num_shared_experts": said["n_shared_experts"],
        "first_k_dense_replace": said["first_k_dense_replace"],
        "dense_intermediate_size": said["intermediate_size"],
        "attention_bias": "qkv" if said["attention_bias"] else "none",
        "qk_norm": "head" if said["use_qk_norm"] else "none",
        "sliding_window": None,
        "router": sigmoid_router(said),
    }


def write(model: ModelConfig) -> dict[str, Any]:
    share = model.rope_parameters.partial_rotary_factor
    return {
        **written_router(model),
        **first_dense(model),
        "use_qk_norm": model.qk_norm == "head",
        "attention_bias": model.attention_bias == "qkv",
        "num_nextn_predict_layers": 0,
        "partial_rotary_factor": share,
    }


def lone_experts(model: ModelConfig) -> str | None:
    """Groups of one expert, which transformers gives no score."""
    groups = getattr(model.router, "n_group", 1)
    return f"model.router.n_group={groups}" if model.num_local_experts // groups == 1 else None


FAMILY = Family(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    DEFAULTS,
    read,
    write,
    can={
        "routing": (SIGMOID_BIAS,),
        "shared": ("plain",),
        "qk_norm": ("none", "head"),
        "attention_bias": ("none", "qkv"),
        "dense": ("none", "first"),
        "rotary": ("whole", "partial"),
    },
    also=lone_experts,
    renamed={"num_local_experts": "n_routed_experts", "num_experts": "n_routed_experts"},
    names=BY_PROJECTION,
)
