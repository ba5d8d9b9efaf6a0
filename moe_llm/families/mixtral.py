"""Mixtral (Jiang et al. 2024): the plain case, of which the other families say how they differ."""

from collections.abc import Mapping
from typing import Any

from moe_llm.config import ModelConfig
from moe_llm.families.family import Family

DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": None,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "sliding_window": None,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}


OF_EXPERTS = ("num_local_experts", "num_experts_per_tok", "router_aux_loss_coef", "router_jitter_noise")


def read(said: Mapping[str, Any]) -> dict[str, Any]:
    return {key: said[key] for key in _OWN}


def write(model: ModelConfig) -> dict[str, Any]:
    return {key: getattr(model, key) for key in _OWN}


_OWN = ("intermediate_size", "num_local_experts", "router_jitter_noise", "sliding_window")


FAMILY = Family(
    "mixtral",
    "MixtralForCausalLM",
    DEFAULTS,
    read,
    write,
    can={"windows": ("none", "all")},
    renamed={"num_experts": "num_local_experts"},
    theta=1e6,
)
