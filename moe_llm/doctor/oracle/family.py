"""Which of transformers' models computes what a configuration describes, and its parameters by our names.

Mixtral (Jiang et al. 2024); Qwen2-MoE has shared experts with a gate and biases of queries, keys and values; Qwen3-MoE
norms of each head of queries and keys; OLMoE norms of the whole projection (Muennighoff et al. 2024). For other routers
than Mixtral's, choices and weights are put in from outside (`router_losses.choice`).
"""

from typing import Any

import torch

from moe_llm.config import ModelConfig
from moe_llm.doctor.oracle.router_losses import OF_SOFTMAX


def family_of(model: ModelConfig) -> str | None:
    """transformers' name of it; None where there is none."""
    others = (
        model.num_moe_layers < model.num_hidden_layers,
        model.expert_bias,
        model.swiglu_limit is not None,
        model.attention_sinks,
        model.kv_lora_rank is not None,
        model.layer_types is not None,
        model.rope_parameters.partial_rotary_factor != 1.0,
    )
    if model.router.type not in OF_SOFTMAX or any(others):
        return None
    shared = bool(model.num_shared_experts)
    if model.qk_norm == "head":
        return "qwen3_moe" if not shared and model.attention_bias != "qkv" else None
    if model.qk_norm == "projection":
        square = (model.head_dim or 0) * model.num_attention_heads in (0, model.hidden_size)
        plain = not shared and model.attention_bias != "qkv" and model.sliding_window is None
        return "olmoe" if square and plain else None
    if model.attention_bias == "all":
        return None
    return "qwen2_moe" if shared or model.attention_bias == "qkv" else "mixtral"


def comparable(model: ModelConfig) -> bool:
    return family_of(model) is not None


def family_config(model: ModelConfig) -> Any:
    """transformers' configuration, by the names that it gives to things itself."""
    from transformers import AutoConfig

    assert model.vocab_size is not None, "vocab_size is resolved from the tokenizer first"
    family = family_of(model)
    assert family is not None, f"transformers has no such model of model.router.type={model.router.type}"
    experts, width = model.num_local_experts, model.intermediate_size
    bias = model.attention_bias == "all"
    window = {"sliding_window": model.sliding_window, "use_sliding_window": model.sliding_window is not None}
    sparse = {
        "num_experts": experts,
        "moe_intermediate_size": width,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }
    kind = "sliding_attention" if model.sliding_window else "full_attention"
    families: dict[str, dict[str, Any]] = {
        "mixtral": {"num_local_experts": experts, "sliding_window": model.sliding_window},
        "qwen2_moe": {
            **sparse,
            **window,
            "layer_types": [kind] * model.num_hidden_layers,
            "max_window_layers": model.num_hidden_layers,
            "qkv_bias": model.attention_bias == "qkv",
            # without shared experts one of width 1, whose weights are zero
            "shared_expert_intermediate_size": width * model.num_shared_experts or 1,
        },
        "qwen3_moe": {**sparse, **window, "attention_bias": bias},
        "olmoe": {"num_experts": experts, "attention_bias": bias, "clip_qkv": None, "norm_topk_prob": True},
    }
    return AutoConfig.for_model(
        family,
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=width,
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads or model.num_attention_heads,
        head_dim=model.head_dim or model.hidden_size // model.num_attention_heads,
        num_experts_per_tok=model.num_experts_per_tok,
        max_position_embeddings=model.max_position_embeddings,
        rms_norm_eps=model.rms_norm_eps,
        tie_word_embeddings=model.tie_word_embeddings,
        rope_parameters={"rope_theta": model.rope_theta, **model.rope_parameters.content()},
        attention_dropout=0.0,
        hidden_act="silu",
        pad_token_id=None,  # its embedding would have no gradient
        **families[family],
    )


def gates_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The routers, in the order of the layers."""
    return [module for name, module in model.named_modules() if name.endswith(".mlp.gate")]


@torch.no_grad()
def named_as_ours(model: torch.nn.Module, config: ModelConfig) -> dict[str, torch.nn.Parameter]:
    """The parameters that training has too; those that the family has beside them add nothing from here on."""
    named: dict[str, torch.nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if ".shared_expert_gate." in name and not config.shared_expert_gate:
            continue
        if ".shared_expert." in name and not config.num_shared_experts:
            parameter.zero_().requires_grad_(False)
            continue
        named[name.replace(".shared_expert.", ".shared_experts.")] = parameter
    for name, module in model.named_modules():
        if name.endswith(".shared_expert_gate") and not config.shared_expert_gate:
            module.register_forward_hook(_open)
    return named


def _open(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """A gate that lets everything through: its sigmoid is 1."""
    return torch.full_like(output, torch.inf)
