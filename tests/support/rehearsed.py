"""Configurations at the true shapes of Mixtral 8x7B and 8x22B, for rehearsals of GPU steps."""

from typing import Any

from moe_llm.config import Config
from moe_llm.config.load import validate

SHAPES: dict[str, dict[str, Any]] = {
    "8x7b": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "num_local_experts": 8, "max_position_embeddings": 32768,
    },
    "8x22b": {
        "vocab_size": 32768, "hidden_size": 6144, "intermediate_size": 16384, "num_attention_heads": 48,
        "num_key_value_heads": 8, "num_local_experts": 8, "max_position_embeddings": 65536,
    },
}  # fmt: skip
# every router: what it needs besides its name, and how many experts a token has with it
ROUTERS: dict[str, tuple[dict[str, Any], int]] = {
    "mixtral": ({}, 2),
    "dense": ({}, 8),
    "noisy_top_k": ({}, 2),
    "gshard": ({}, 2),
    "switch": ({}, 1),
    "batch_prioritised": ({}, 2),
    "top_p": ({}, 2),
    "hierarchical": ({"groups": 2}, 2),
    "balanced": ({}, 2),
    "deepseek_moe": ({}, 2),
    "bias_balanced": ({}, 2),
    "soft_moe": ({"slots_per_expert": 64, "segment_length": 512}, 1),
    "multi_head": ({"heads": 2}, 2),
    "lory": ({"segment_length": 512}, 1),
    "expert_choice": ({}, 2),
    "attention": ({}, 2),
    "transformer": ({}, 2),
    "reinforce": ({}, 2),
    "em": ({}, 2),
}


def cluster_config(
    router: str = "mixtral",
    *,
    shape: str = "8x7b",
    layers: int = 2,
    ranks: int = 8,
    ep: int = 8,
    stage: int = 1,
    length: int = 4096,
    micro: int = 1,
    sp: int = 1,
    **train: Any,
) -> Config:
    """A bf16 run of `ranks` GPUs on `layers` layers of a true shape."""
    settings, top_k = ROUTERS[router]
    sizes = SHAPES[shape] | {"max_position_embeddings": max(length, SHAPES[shape]["max_position_embeddings"])}
    model = sizes | {"num_hidden_layers": layers, "num_experts_per_tok": top_k}
    return validate(
        {
            "run": {"dir": "unused"},
            "model": model | {"router": {"type": router} | settings},
            "data": {"sources": [{"type": "python_stdlib"}], "sequence_length": length},
            "train": {
                "max_steps": 1,
                "micro_batch_size": micro,
                "global_batch_size": micro * ranks // sp,
                "precision": "bf16",
                **train,
            },
            "parallel": {"expert_parallel_size": ep, "zero_stage": stage, "sequence_parallel_size": sp},
        }
    )
