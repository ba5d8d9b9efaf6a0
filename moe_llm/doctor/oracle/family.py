"""Which of transformers' models computes what a configuration describes, and its parameters by our names.

Mixtral (Jiang et al. 2024); Qwen2-MoE has shared experts with a gate and biases of queries, keys and values; Qwen3-MoE
norms of each head of queries and keys; OLMoE norms of the whole projection (Muennighoff et al. 2024); GLM-4-MoE turns a
part of each head; DeepSeek-V2 and V3 have latent attention; GPT-OSS sinks and clamped experts. Sparse layers that none of
them has are put into the decoder that has the attention (`blocks`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from moe_llm.config import ModelConfig
from moe_llm.doctor.oracle.blocks import Dense, Sparse
from moe_llm.doctor.oracle.choices import OF_SOFTMAX

# The routers whose choice can be put in the place of that of a gate that takes the top k of a softmax
_HOOKED = tuple(kind for kind in OF_SOFTMAX if kind not in ("multi_head", "em", "transformer"))


def decoder_of(model: ModelConfig) -> str | None:
    """transformers' name of the decoder that has the attention of a model; None where there is none."""
    router: Any = model.router
    partial = model.rope_parameters.partial_rotary_factor != 1.0
    mixed = len(set(model.windows)) > 1
    if model.kv_lora_rank is not None:
        if partial or model.sliding_window is not None:
            return None
        by_softmax = router.type == "deepseek_moe" and not router.norm_topk_prob and model.rope_interleave
        whole = model.hidden_size % model.num_attention_heads == 0  # which its configuration asks for
        return "deepseek_v2" if by_softmax and whole else "deepseek_v3"
    if model.attention_sinks:
        plain = model.qk_norm == "none" and model.attention_bias != "qkv" and not partial
        return "gpt_oss" if plain and model.sliding_window is not None else None
    if model.qk_norm == "projection":
        square = (model.head_dim or 0) * model.num_attention_heads in (0, model.hidden_size)
        plain = model.attention_bias != "qkv" and model.sliding_window is None and not partial
        return "olmoe" if square and plain else None
    if partial or (model.qk_norm == "head" and model.attention_bias == "qkv"):
        return "glm4_moe" if model.attention_bias != "all" and model.sliding_window is None else None
    if model.qk_norm == "head":
        return "qwen3_moe" if not mixed else None
    if model.attention_bias == "all":
        return "llama" if model.sliding_window is None else None
    gated = model.num_shared_experts and model.shared_expert_gate
    return "qwen2_moe" if gated or model.attention_bias == "qkv" or mixed else "mixtral"


def has_own_layers(model: ModelConfig) -> bool:
    """Whether transformers' decoder has the model's sparse layers too."""
    family, kind = decoder_of(model), model.router.type
    sparse, shared = model.moe_layers, bool(model.num_shared_experts)
    first_dense = sparse == tuple(range(sparse[0], model.num_hidden_layers))
    has_bias = getattr(model.router, "bias", False)
    plain = not model.expert_bias and model.swiglu_limit is None and not has_bias
    if family == "gpt_oss":
        clamped = model.expert_bias and model.swiglu_limit is not None
        return clamped and not shared and kind == "mixtral" and has_bias and not sparse[0] and first_dense
    if not plain:
        return False
    if family in ("deepseek_v2", "deepseek_v3", "glm4_moe"):
        routed = kind == "deepseek_moe" if family == "deepseek_v2" else _is_deepseek_v3s(model)
        return routed and shared and not model.shared_expert_gate and first_dense
    if kind not in _HOOKED:
        return False
    if family in ("qwen2_moe", "qwen3_moe"):
        return not shared if family == "qwen3_moe" else model.shared_expert_gate
    return family in ("mixtral", "olmoe") and not shared and len(sparse) == model.num_hidden_layers


def _is_deepseek_v3s(model: ModelConfig) -> bool:
    router: Any = model.router
    if router.type != "bias_balanced" or router.score != "sigmoid":
        return False
    return router.n_group == 1 or model.num_local_experts // router.n_group > 1


def comparable(model: ModelConfig) -> bool:
    """Whether there is a second opinion: not of routers of one's own, of experts that differ in form, nor of attention
    that transformers has nowhere."""
    from moe_llm.doctor.oracle.choices import RULES

    known = model.router.type in (*RULES, "soft_moe", "lory") and model.single_expert_sizes is None
    return decoder_of(model) is not None and known


def family_config(model: ModelConfig) -> Any:
    """transformers' configuration, by the names that it gives to things itself."""
    from transformers import AutoConfig

    assert model.vocab_size is not None, "vocab_size is resolved from the tokenizer first"
    family = decoder_of(model)
    assert family is not None, "transformers has no decoder with such attention"
    experts, width, router = model.num_local_experts, model.intermediate_size, model.router
    bias, first = model.attention_bias == "all", model.moe_layers[0]
    dense = [layer for layer in range(model.num_hidden_layers) if layer not in model.moe_layers]
    window = {"sliding_window": model.sliding_window, "use_sliding_window": model.sliding_window is not None}
    kinds = ["full_attention" if window is None else "sliding_attention" for window in model.windows]
    sparse = {
        "num_experts": experts,
        "moe_intermediate_size": width,
        "intermediate_size": model.dense_width,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
        "norm_topk_prob": True,
    }
    routed = {
        "n_routed_experts": experts,
        "n_shared_experts": model.num_shared_experts or 1,
        "moe_intermediate_size": width,
        "intermediate_size": model.dense_width,
        "first_k_dense_replace": first,
        "norm_topk_prob": getattr(router, "norm_topk_prob", True),
        "routed_scaling_factor": getattr(router, "routed_scaling_factor", 1.0),
        "n_group": getattr(router, "n_group", 1),
        "topk_group": getattr(router, "topk_group", 1),
    }
    latent = {
        **routed,
        "kv_lora_rank": model.kv_lora_rank,
        "q_lora_rank": model.q_lora_rank,
        "qk_nope_head_dim": model.qk_nope_head_dim,
        "qk_rope_head_dim": model.qk_rope_head_dim,
        "v_head_dim": model.v_head_dim,
        "head_dim": model.qk_rope_head_dim,
        "attention_bias": bias,
    }
    limited = getattr(router, "topk_group", 1) < getattr(router, "n_group", 1)
    method = "group_limited_greedy" if limited else "greedy"
    families: dict[str, dict[str, Any]] = {
        "mixtral": {"num_local_experts": experts, "sliding_window": model.sliding_window},
        "llama": {"attention_bias": bias},
        "qwen2_moe": {
            **sparse,
            **window,
            "layer_types": kinds,
            "max_window_layers": model.num_hidden_layers,
            "qkv_bias": model.attention_bias == "qkv",
            "shared_expert_intermediate_size": model.shared_width or 1,
        },
        "qwen3_moe": {**sparse, **window, "attention_bias": bias},
        "olmoe": {"num_experts": experts, "attention_bias": bias, "clip_qkv": None, "norm_topk_prob": True},
        "glm4_moe": {**routed, "use_qk_norm": model.qk_norm == "head", "attention_bias": model.attention_bias == "qkv"},
        "deepseek_v2": {**latent, "topk_method": method},
        "deepseek_v3": {**latent, "rope_interleave": model.rope_interleave},
        "gpt_oss": {
            "num_local_experts": experts,
            "sliding_window": model.sliding_window,
            "layer_types": kinds,
            "attention_bias": bias,
            "swiglu_limit": model.swiglu_limit or 7.0,
            "swiglu_alpha": model.swiglu_alpha,
        },
    }
    chosen: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": width,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads or model.num_attention_heads,
        "head_dim": model.head_dim or model.hidden_size // model.num_attention_heads,
        "num_experts_per_tok": model.num_experts_per_tok,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.rms_norm_eps,
        "tie_word_embeddings": model.tie_word_embeddings,
        "rope_parameters": {"rope_theta": model.rope_theta, **model.rope_parameters.content()},
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "pad_token_id": None,  # its embedding would have no gradient
    }
    return AutoConfig.for_model(family, **{**chosen, **families[family]})


def with_blocks(decoder: Any, model: ModelConfig) -> list[Sparse]:
    """Put the model's feed-forward layers in the place of the decoder's; the sparse ones, in order."""
    pair, found = decoder_of(model) == "gpt_oss", []
    for number, layer in enumerate(decoder.model.layers):
        if number in model.moe_layers:
            layer.mlp = Sparse(model, number == model.num_hidden_layers - 1, pair)
            found.append(layer.mlp)
        else:
            layer.mlp = Dense(model.hidden_size, model.dense_width, pair)
    return found


def gates_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The routers, in the order of the layers."""
    return [module for name, module in model.named_modules() if name.endswith((".mlp.gate", ".mlp.router"))]


class Stored(NamedTuple):
    """A tensor of transformers' model, and how it is turned into ours, and ours into it."""

    tensor: torch.Tensor
    as_ours: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    as_theirs: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor


def named_as_ours(decoder: Any) -> dict[str, Stored]:
    """All parameters, and the buffers of routers, that training has too."""
    named: dict[str, Stored] = {}
    buffers = [(name, buffer) for name, buffer in decoder.named_buffers() if ".mlp." in name]
    for name, tensor in [*decoder.named_parameters(), *buffers]:
        ours = name.replace(".shared_expert.", ".shared_experts.").replace(".mlp.router.", ".mlp.gate.")
        stacked = decoder.config.model_type == "gpt_oss" and has_gpt_oss_experts(decoder) and ".mlp.experts." in name
        named[ours] = Stored(tensor, *_TURNED[name.rpartition(".")[2]]) if stacked else Stored(tensor)
    return named


def has_gpt_oss_experts(decoder: torch.nn.Module) -> bool:
    return not any(isinstance(module, Sparse) for module in decoder.modules())


def _apart(tensor: torch.Tensor) -> torch.Tensor:
    """Gate and up one after the other, of gate and up in turn (E, 2 I)."""
    return torch.cat((tensor[:, ::2], tensor[:, 1::2]), 1)


def _in_turn(tensor: torch.Tensor) -> torch.Tensor:
    """And back."""
    return torch.stack(tensor.chunk(2, 1), 2).flatten(1, 2)


_TURNED: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]] = {
    "gate_up_proj": (lambda t: _apart(t.mT), lambda t: _in_turn(t).mT),
    "down_proj": (lambda t: t.mT, lambda t: t.mT),
    "gate_up_proj_bias": (_apart, _in_turn),
    "down_proj_bias": (lambda t: t, lambda t: t),
}
