"""DeepSeek-V3 and what has its shape (2024): latent attention, and sigmoid routing with a bias that balances, by groups."""

from collections.abc import Mapping
from typing import Any

from moe_llm.config import ModelConfig
from moe_llm.families import deepseek_v2
from moe_llm.families.family import BY_PROJECTION, SIGMOID_BIAS, Family
from moe_llm.families.glm4_moe import lone_experts, sigmoid_router, written_router

DEFAULTS: dict[str, Any] = {
    **{key: value for key, value in deepseek_v2.DEFAULTS.items() if key != "topk_method"},
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "max_position_embeddings": 4096,
    "router_aux_loss_coef": 0.0,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "rope_interleave": True,
}


def read(said: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **deepseek_v2.latent(said),
        "rope_interleave": said["rope_interleave"],
        "router": sigmoid_router({**said, "n_group": said["n_group"] or 1, "topk_group": said["topk_group"] or 1}),
    }


def write(model: ModelConfig) -> dict[str, Any]:
    return {
        **deepseek_v2.written_latent(model),
        **written_router(model),
        "rope_interleave": model.rope_interleave,
        "num_nextn_predict_layers": 0,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
    }


FAMILY = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    DEFAULTS,
    read,
    write,
    can={
        "heads": ("latent",),
        "routing": (SIGMOID_BIAS,),
        "shared": ("plain",),
        "attention_bias": ("none", "all"),
        "dense": ("none", "first"),
    },
    also=lone_experts,
    only={"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    renamed={"num_experts": "n_routed_experts", "num_local_experts": "n_routed_experts"},
    names=BY_PROJECTION,
)
