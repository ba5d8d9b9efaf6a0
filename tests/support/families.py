"""Tiny configurations of every family, of odd shapes, as transformers makes them."""

from typing import Any

from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

SIZES: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "eos_token_id": None,
}
MIXTRAL = {**SIZES, "head_dim": 6, "num_local_experts": 5, "intermediate_size": 6}
OLMOE = {**SIZES, "num_experts": 5, "intermediate_size": 6}
QWEN = {**SIZES, "num_experts": 5, "moe_intermediate_size": 6, "intermediate_size": 14}
GLM = {
    **SIZES,
    "num_hidden_layers": 3,
    "n_routed_experts": 6,
    "moe_intermediate_size": 6,
    "intermediate_size": 14,
    "n_shared_experts": 1,
}
LATENT = {
    **GLM,
    "num_key_value_heads": 2,
    "kv_lora_rank": 7,
    "q_lora_rank": None,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
MSCALED = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 8}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
CASES: dict[str, PreTrainedConfig] = {
    "mixtral": MixtralConfig(**MIXTRAL),
    "mixtral-linear": MixtralConfig(**MIXTRAL, rope_parameters={"rope_type": "linear", "factor": 3.0}),
    "mixtral-yarn": MixtralConfig(**MIXTRAL, sliding_window=5, rope_parameters=dict(YARN)),
    "mixtral-dynamic": MixtralConfig(
        **{**MIXTRAL, "max_position_embeddings": 9}, rope_parameters={"rope_type": "dynamic", "factor": 2.0}
    ),
    "qwen2": Qwen2MoeConfig(**QWEN, shared_expert_intermediate_size=12),
    "qwen2-renormalised": Qwen2MoeConfig(
        **QWEN, shared_expert_intermediate_size=6, norm_topk_prob=True, qkv_bias=False
    ),
    "qwen2-windows": Qwen2MoeConfig(
        **{**QWEN, "num_hidden_layers": 3},
        shared_expert_intermediate_size=6,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=2,
        mlp_only_layers=[1],
    ),
    "qwen3": Qwen3MoeConfig(**QWEN, head_dim=8, norm_topk_prob=True),
    "qwen3-tied": Qwen3MoeConfig(**QWEN, head_dim=10, attention_bias=True, tie_word_embeddings=True),
    "qwen3-sparse-step": Qwen3MoeConfig(
        **{**QWEN, "num_hidden_layers": 4},
        head_dim=8,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
        use_sliding_window=True,
        sliding_window=6,
        rope_parameters=dict(LLAMA3),
    ),
    "olmoe": OlmoeConfig(**OLMOE),
    "olmoe-bias": OlmoeConfig(**OLMOE, attention_bias=True, norm_topk_prob=True, rope_parameters=dict(YARN)),
    "glm4": Glm4MoeConfig(**GLM, head_dim=8, first_k_dense_replace=1, use_qk_norm=True, routed_scaling_factor=1.7),
    "glm4-groups": Glm4MoeConfig(
        **{**GLM, "n_shared_experts": 2},
        head_dim=10,
        first_k_dense_replace=2,
        n_group=3,
        topk_group=2,
        attention_bias=True,
        norm_topk_prob=False,
        rope_parameters={"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.4},
    ),
    "deepseek2": DeepseekV2Config(**{**LATENT, "kv_lora_rank": 8, "qk_nope_head_dim": 6}, first_k_dense_replace=1),
    "deepseek2-groups": DeepseekV2Config(
        **{**LATENT, "kv_lora_rank": 8, "qk_nope_head_dim": 6, "q_lora_rank": 5, "v_head_dim": 11},
        topk_method="group_limited_greedy",
        n_group=3,
        topk_group=2,
        routed_scaling_factor=1.6,
        attention_bias=True,
        rope_parameters=dict(MSCALED),
    ),
    "deepseek3": DeepseekV3Config(**{**LATENT, "q_lora_rank": 5}, n_group=3, topk_group=2, first_k_dense_replace=2),
    "deepseek3-halves": DeepseekV3Config(
        **LATENT,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=0,
        attention_bias=True,
        rope_interleave=False,
        norm_topk_prob=False,
        rope_parameters=dict(MSCALED),
    ),
    "gpt-oss": GptOssConfig(**{**MIXTRAL, "num_hidden_layers": 3}, sliding_window=4),
    "gpt-oss-no-bias": GptOssConfig(
        **{**MIXTRAL, "intermediate_size": 12, "head_dim": 8},
        sliding_window=3,
        attention_bias=False,
        swiglu_limit=0.3,
        tie_word_embeddings=True,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "glm4-all-sparse": Glm4MoeConfig(
        **GLM, head_dim=8, first_k_dense_replace=0, rope_parameters={**YARN, "partial_rotary_factor": 0.5}
    ),
}
