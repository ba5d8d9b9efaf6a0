"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B): norms of each head of queries and keys."""

from collections.abc import Mapping
from typing import Any

from moe_llm.config import ModelConfig
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
    "intermediate_size": 6144,  # of layers without experts
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_experts": 128,
    "norm_topk_prob": False,
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
}


def read(said: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_local_experts": said["num_experts"],
        "intermediate_size": said["moe_intermediate_size"],
        "attention_bias": "all" if said["attention_bias"] else "none",
        "qk_norm": "head",
        "sliding_window": said["sliding_window"] if said["use_sliding_window"] else None,
        "router": softmax_router(said["norm_topk_prob"]),
        **sparse_step(said),
    }


def write(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_experts": model.num_local_experts,
        "moe_intermediate_size": model.intermediate_size,
        "norm_topk_prob": routing_of(model) == RENORMALISED,
        "attention_bias": model.attention_bias == "all",
        "sliding_window": model.sliding_window,
        "use_sliding_window": bool(model.sliding_window),
        **dense_as_sparse_step(model),
    }


FAMILY = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    DEFAULTS,
    read,
    write,
    can={
        "routing": (RENORMALISED, AS_THEY_ARE),
        "qk_norm": ("head",),
        "attention_bias": ("none", "all"),
        "windows": ("none", "all"),
        "dense": ("none", "first", "any"),
    },
    renamed={"num_local_experts": "num_experts"},
    names=BY_PROJECTION,
)
