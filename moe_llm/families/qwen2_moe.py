"""Qwen2-MoE (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): biases of queries, keys and values, and a gated shared expert."""

from collections.abc import Mapping
from typing import Any

from moe_llm.config import ModelConfig
from moe_llm.errors import UserError
from moe_llm.families.family import (
    AS_THEY_ARE,
    BY_PROJECTION,
    RENORMALISED,
    SHARED_DEFAULTS,
    Family,
    dense_as_sparse_step,
    routing_of,
    softmax_router,
    sparse_step,
)

DEFAULTS: dict[str, Any] = {
    **SHARED_DEFAULTS,
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,  # of layers without experts
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-6,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4,
    "num_experts": 60,
    "norm_topk_prob": False,
    "qkv_bias": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}


def read(said: Mapping[str, Any]) -> dict[str, Any]:
    shared, rest = divmod(said["shared_expert_intermediate_size"], said["moe_intermediate_size"])
    if rest or not shared:
        raise UserError(
            f"shared_expert_intermediate_size={said['shared_expert_intermediate_size']} is no multiple of "
            f"moe_intermediate_size={said['moe_intermediate_size']}: such a shared expert is not supported"
        )
    return {
        "num_local_experts": said["num_experts"],
        "intermediate_size": said["moe_intermediate_size"],
        "attention_bias": "qkv" if said["qkv_bias"] else "none",
        "num_shared_experts": shared,
        "shared_expert_gate": True,
        "router": softmax_router(said["norm_topk_prob"]),
        **sparse_step(said),
        **_windows(said),
    }


def _windows(said: Mapping[str, Any]) -> dict[str, Any]:
    if not (said["use_sliding_window"] and said["sliding_window"]):
        return {"sliding_window": None}
    kinds = said["layer_types"] or [
        "full_attention" if (i + 1) % 2 == 0 or i >= said["max_window_layers"] else "sliding_attention"
        for i in range(said["num_hidden_layers"])
    ]
    return {"sliding_window": said["sliding_window"], "layer_types": kinds}


def write(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_experts": model.num_local_experts,
        "moe_intermediate_size": model.intermediate_size,
        "shared_expert_intermediate_size": model.shared_width,
        "norm_topk_prob": routing_of(model) == RENORMALISED,
        "qkv_bias": model.attention_bias == "qkv",
        "sliding_window": model.sliding_window,
        "use_sliding_window": bool(model.sliding_window),
        "max_window_layers": model.num_hidden_layers,
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in model.windows],
        **dense_as_sparse_step(model),
    }


FAMILY = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    DEFAULTS,
    read,
    write,
    can={
        "routing": (RENORMALISED, AS_THEY_ARE),
        "shared": ("gated",),
        "attention_bias": ("none", "qkv"),
        "windows": ("none", "all", "some"),
        "dense": ("none", "first", "any"),
    },
    newer=lambda model: None if model.sliding_window is None else "sliding windows",
    renamed={"num_local_experts": "num_experts"},
    names=(*BY_PROJECTION, (r"\.shared_experts\.", ".shared_expert.")),
)
