"""GPT-OSS (OpenAI 2025): clamped SwiGLU, biases everywhere, attention sinks, and windows in every other layer.

Published in MXFP4, which is read as bf16 (`mxfp4`); what is written is bf16 or fp32, as transformers saves it.
"""

from collections.abc import Mapping
from typing import Any

from moe_llm.config import ModelConfig
from moe_llm.families.family import SHARED_DEFAULTS, Family

DEFAULTS: dict[str, Any] = {
    **SHARED_DEFAULTS,
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "router_aux_loss_coef": 0.001,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "sliding_window": 128,
    "layer_types": None,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "attention_bias": True,
}
ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def read(said: Mapping[str, Any]) -> dict[str, Any]:
    kinds = said["layer_types"] or [
        "full_attention" if i % 2 else "sliding_attention" for i in range(said["num_hidden_layers"])
    ]
    narrowed = "sliding_attention" in kinds and said["sliding_window"] is not None
    return {
        "num_local_experts": said["num_local_experts"],
        "intermediate_size": said["intermediate_size"],
        "attention_bias": "all" if said["attention_bias"] else "none",
        "attention_sinks": True,
        "expert_bias": True,
        "swiglu_alpha": said["swiglu_alpha"],
        "swiglu_limit": said["swiglu_limit"],
        "sliding_window": said["sliding_window"] if narrowed else None,
        "layer_types": kinds if narrowed else None,
        "router": {"type": "mixtral", "bias": True},
    }


def write(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_local_experts": model.num_local_experts,
        "intermediate_size": model.intermediate_size,
        "attention_bias": model.attention_bias == "all",
        "swiglu_alpha": model.swiglu_alpha,
        "swiglu_limit": model.swiglu_limit,
        "sliding_window": model.sliding_window,
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in model.windows],
    }


FAMILY = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    DEFAULTS,
    read,
    write,
    can={
        "router_bias": (True,),
        "attention_bias": ("none", "all"),
        "windows": ("none", "some", "all"),
        "sinks": (True,),
        "experts": ("clamped with biases",),
    },
    newer=lambda model: None if (model.swiglu_limit, model.swiglu_alpha) == (7.0, 1.702) else "other clamps of experts",
    renamed={"num_experts": "num_local_experts"},
    harmless=("initial_context_length", "experts_per_token", "quantization_config"),
    names=((r"\.block_sparse_moe\.gate\.", ".mlp.router."), (r"\.block_sparse_moe\.", ".mlp.")),
    theta=150000.0,
    rope=ROPE,
    stacked=True,
)
