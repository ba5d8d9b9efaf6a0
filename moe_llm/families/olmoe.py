"""OLMoE (Muennighoff et al. 2024): norms of queries and keys over the whole projection."""

from collections.abc import Mapping
from typing import Any

from moe_llm.config import ModelConfig
from moe_llm.families.family import (
    AS_THEY_ARE,
    BY_PROJECTION,
    RENORMALISED,
    SHARED_DEFAULTS,
    Family,
    routing_of,
    softmax_router,
)

DEFAULTS: dict[str, Any] = {
    **SHARED_DEFAULTS,
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": None,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "router_aux_loss_coef": 0.01,
    "num_experts_per_tok": 8,
    "num_experts": 64,
    "norm_topk_prob": False,
    "attention_bias": False,
}


def read(said: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_local_experts": said["num_experts"],
        "intermediate_size": said["intermediate_size"],
        "attention_bias": "all" if said["attention_bias"] else "none",
        "qk_norm": "projection",
        "router": softmax_router(said["norm_topk_prob"]),
        "sliding_window": None,
    }


def write(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_experts": model.num_local_experts,
        "intermediate_size": model.intermediate_size,
        "norm_topk_prob": routing_of(model) == RENORMALISED,
        "attention_bias": model.attention_bias == "all",
        "clip_qkv": None,
    }


def _no_wider_heads(model: ModelConfig) -> str | None:
    wide = model.attention_head_dim * model.num_attention_heads != model.hidden_size
    return f"model.head_dim={model.head_dim}" if wide else None


FAMILY = Family(
    "olmoe",
    "OlmoeForCausalLM",
    DEFAULTS,
    read,
    write,
    can={"routing": (RENORMALISED, AS_THEY_ARE), "qk_norm": ("projection",), "attention_bias": ("none", "all")},
    also=_no_wider_heads,
    only={"clip_qkv": None},
    renamed={"num_local_experts": "num_experts"},
    names=BY_PROJECTION,
)
