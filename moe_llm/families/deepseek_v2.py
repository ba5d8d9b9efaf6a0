"""DeepSeek-V2 and V2-Lite (2024): multi-head latent attention, dense first layers, a softmax whose weights are not divided
by their sum, perhaps of groups of experts, and shared experts without gate."""

from collections.abc import Mapping
from typing import Any

from moe_llm.config import ModelConfig
from moe_llm.errors import UserError
from moe_llm.families.family import (
    AS_THEY_ARE,
    BY_PROJECTION,
    IN_GROUPS,
    SCALED,
    SHARED_DEFAULTS,
    Family,
    first_dense,
)

_LATENT = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
DEFAULTS: dict[str, Any] = {
    **SHARED_DEFAULTS,
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,  # of layers without experts
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "router_aux_loss_coef": 0.001,
    "attention_bias": False,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "n_group": None,
    "topk_group": None,
    "topk_method": "greedy",
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "qk_head_dim": None,
    "v_head_dim": 128,
    "routed_scaling_factor": 1.0,
    "num_experts_per_tok": None,
    "moe_intermediate_size": 1407,
}


def latent(said: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of multi-head latent attention and of the layers, in ours."""
    heads, groups = said["num_attention_heads"], said["num_key_value_heads"]
    if groups not in (None, heads):
        raise UserError(f"num_key_value_heads={groups} is not num_attention_heads={heads}, as latent attention has it")
    return {
        **{key: said[key] for key in _LATENT},
        "head_dim": None,
        "attention_bias": "all" if said["attention_bias"] else "none",
        "num_local_experts": said["n_routed_experts"],
        "intermediate_size": said["moe_intermediate_size"],
        "num_shared_experts": said["n_shared_experts"] or 0,
        "first_k_dense_replace": said["first_k_dense_replace"],
        "dense_intermediate_size": said["intermediate_size"],
        "sliding_window": None,
    }


def written_latent(model: ModelConfig) -> dict[str, Any]:
    """And back."""
    return {
        **{key: getattr(model, key) for key in _LATENT},
        **first_dense(model),
        "head_dim": model.qk_rope_head_dim,
        "attention_bias": model.attention_bias == "all",
        "n_routed_experts": model.num_local_experts,
        "moe_intermediate_size": model.intermediate_size,
        "n_shared_experts": model.num_shared_experts,
    }


def read(said: Mapping[str, Any]) -> dict[str, Any]:
    if said["num_experts_per_tok"] is None:
        raise UserError("num_experts_per_tok=None leaves open how many experts a token has: set it")
    methods = ("greedy", "group_limited_greedy")
    if said["topk_method"] not in methods:
        raise UserError(f"topk_method={said['topk_method']!r} is not supported: only {' and '.join(methods)} are")
    router: dict[str, Any] = {
        "type": "deepseek_moe",
        "norm_topk_prob": False,
        "routed_scaling_factor": said["routed_scaling_factor"],
        "expert_balance_coef": 0.0,
    }
    if said["topk_method"] == "group_limited_greedy":
        router |= {"n_group": said["n_group"] or 1, "topk_group": said["topk_group"] or 1}
    return {**latent(said), "router": router}


def write(model: ModelConfig) -> dict[str, Any]:
    router = model.router
    grouped = getattr(router, "topk_group", 1) < getattr(router, "n_group", 1)
    return {
        **written_latent(model),
        "topk_method": "group_limited_greedy" if grouped else "greedy",
        "n_group": getattr(router, "n_group", 1),
        "topk_group": getattr(router, "topk_group", 1),
        "routed_scaling_factor": getattr(router, "routed_scaling_factor", 1.0),
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "moe_layer_freq": 1,
    }


def _pairs_are_neighbours(model: ModelConfig) -> str | None:
    if not model.rope_interleave:
        return "model.rope_interleave=false"
    return None if model.hidden_size % model.num_attention_heads == 0 else f"model.hidden_size={model.hidden_size}"


FAMILY = Family(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    DEFAULTS,
    read,
    write,
    can={
        "heads": ("latent",),
        "routing": (AS_THEY_ARE, SCALED, IN_GROUPS),
        "shared": ("plain",),
        "attention_bias": ("none", "all"),
        "dense": ("none", "first"),
    },
    also=_pairs_are_neighbours,
    newer=lambda model: "mscale_all_dim of its rotary embeddings" if model.rope_parameters.mscale_all_dim else None,
    only={"moe_layer_freq": 1, "scoring_func": "softmax", "norm_topk_prob": False, "mlp_bias": False},
    renamed={"num_experts": "n_routed_experts", "num_local_experts": "n_routed_experts"},
    names=BY_PROJECTION,
)
