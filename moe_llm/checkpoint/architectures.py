"""Which architecture of transformers computes what a trained model does: a table of routers and shared experts.

What counts is evaluation: noise, capacity and losses are gone then. Read in the sources of transformers 5.23: of those
that route by softmax or by sigmoid, Mixtral, Qwen2-MoE and GLM-4-MoE have attention like ours without norms of queries
and keys (grouped queries, rotary embeddings in halves), Qwen3-MoE with norms of each head (`model.qk_norm: head`), OLMoE
with norms of the whole projection; DeepSeek-V2 and V3 compress queries and keys, ERNIE-4.5 turns neighbouring pairs,
GraniteMoeShared's files stack all experts of a layer in one tensor, which ranks that hold some of them cannot write.
What of these families' own checkpoints is read stands in `families.py`. This file needs no torch.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from moe_llm.config import ModelConfig


@dataclass(frozen=True)
class Architecture:
    """model_type, architecture: as in config.json. fields: what that says besides. names: changes of Mixtral's
    published names into those in its files, regular expressions, in this order. native: transformers has it. code:
    otherwise the weights have modelling code beside them (`remote_code`). unused: parameters of the router that it has
    no use for and leaves alone."""

    model_type: str
    architecture: str
    fields: Callable[[ModelConfig], dict[str, Any]] = lambda model: {}
    names: tuple[tuple[str, str], ...] = ()
    native: bool = True
    code: bool = False
    unused: tuple[str, ...] = ()

    def stored_name(self, published: str) -> str:
        """The name in this architecture's files of what Mixtral's call `published`."""
        for pattern, replacement in self.names:
            published = re.sub(pattern, replacement, published)
        return published


def _qwen2_moe_fields(model: ModelConfig) -> dict[str, Any]:
    kind = "sliding_attention" if model.sliding_window else "full_attention"
    return {
        "num_experts": model.num_local_experts,
        "moe_intermediate_size": model.intermediate_size,
        "shared_expert_intermediate_size": model.shared_width,
        "norm_topk_prob": _renormalises(model),
        "qkv_bias": model.attention_bias == "qkv",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": bool(model.sliding_window),
        "max_window_layers": model.num_hidden_layers,
        "layer_types": [kind] * model.num_hidden_layers,
    }


def _olmoe_fields(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_experts": model.num_local_experts,
        "norm_topk_prob": _renormalises(model),
        "attention_bias": model.attention_bias == "all",
        "clip_qkv": None,
    }


def _qwen3_moe_fields(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_experts": model.num_local_experts,
        "moe_intermediate_size": model.intermediate_size,
        "norm_topk_prob": _renormalises(model),
        "attention_bias": model.attention_bias == "all",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": bool(model.sliding_window),
    }


def _glm4_moe_fields(model: ModelConfig) -> dict[str, Any]:
    router = model.router
    rope = {"rope_theta": model.rope_theta, "rope_type": "default", "partial_rotary_factor": 1.0}
    return {
        "n_routed_experts": model.num_local_experts,
        "moe_intermediate_size": model.intermediate_size,
        "n_shared_experts": model.num_shared_experts,
        "norm_topk_prob": router.norm_topk_prob,
        "routed_scaling_factor": router.routed_scaling_factor,
        "n_group": router.n_group,
        "topk_group": router.topk_group,
        "first_k_dense_replace": 0,
        "use_qk_norm": False,
        "attention_bias": False,
        "num_nextn_predict_layers": 0,
        "partial_rotary_factor": 1.0,
        "rope_parameters": rope,
    }


def _own_fields(model: ModelConfig) -> dict[str, Any]:
    if not _has_code(model):
        return {}
    return {
        "auto_map": {
            "AutoConfig": "configuration_moe_llm.MoELLMConfig",
            "AutoModelForCausalLM": "modeling_moe_llm.MoELLMForCausalLM",
        }
    }


_BY_PROJECTION = (
    (r"\.block_sparse_moe\.", ".mlp."),
    (r"\.experts\.(\d+)\.w1\.", r".experts.\1.gate_proj."),
    (r"\.experts\.(\d+)\.w3\.", r".experts.\1.up_proj."),
    (r"\.experts\.(\d+)\.w2\.", r".experts.\1.down_proj."),
)

MIXTRAL = Architecture("mixtral", "MixtralForCausalLM")
QWEN2_MOE = Architecture(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    _qwen2_moe_fields,
    (*_BY_PROJECTION, (r"\.shared_experts\.", ".shared_expert.")),
)
GLM4_MOE = Architecture("glm4_moe", "Glm4MoeForCausalLM", _glm4_moe_fields, _BY_PROJECTION)
QWEN3_MOE = Architecture("qwen3_moe", "Qwen3MoeForCausalLM", _qwen3_moe_fields, _BY_PROJECTION)
OLMOE = Architecture("olmoe", "OlmoeForCausalLM", _olmoe_fields, _BY_PROJECTION)
OWN = Architecture("moe_llm", "MoELLMForCausalLM", _own_fields, _BY_PROJECTION, native=False)
OF_OURS = tuple(found.model_type for found in (QWEN2_MOE, QWEN3_MOE, OLMOE, GLM4_MOE, OWN))  # beside Mixtral

# The weights of the top k of a softmax: whether they are divided by their sum.
_TOP_K_OF_SOFTMAX: dict[str, Callable[[ModelConfig], bool]] = {
    "mixtral": lambda model: True,
    "dense": lambda model: True,
    "gshard": lambda model: True,
    "noisy_top_k": lambda model: True,
    "switch": lambda model: False,
    "batch_prioritised": lambda model: False,
    "deepseek_moe": lambda model: model.router.norm_topk_prob,
}
# All that the modelling code knows (`remote_code/modeling_moe_llm.py`).
CODED = (
    *_TOP_K_OF_SOFTMAX,
    "bias_balanced",
    "top_p",
    "hierarchical",
    "balanced",
    "soft_moe",
    "multi_head",
    "lory",
    "expert_choice",
)
_UNUSED = {"noisy_top_k": ("noise_weight",)}


def _has_code(model: ModelConfig) -> bool:
    return model.router.type in CODED and _plain_attention(model)


def _plain_attention(model: ModelConfig) -> bool:
    return model.qk_norm == "none" and model.attention_bias == "none"


def _fits_qwen3_moe(model: ModelConfig) -> bool:
    return (
        _renormalises(model) is not None
        and not model.num_shared_experts
        and model.qk_norm == "head"
        and model.attention_bias != "qkv"
    )


def _fits_olmoe(model: ModelConfig) -> bool:
    return (
        _renormalises(model) is not None
        and not model.num_shared_experts
        and model.qk_norm == "projection"
        and model.attention_bias != "qkv"
        and model.sliding_window is None
        and model.attention_head_dim * model.num_attention_heads == model.hidden_size
    )


def _fits_qwen2_moe(model: ModelConfig) -> bool:
    return (
        _renormalises(model) is not None
        and model.shared_expert_gate
        and model.qk_norm == "none"
        and model.attention_bias != "all"
    )


def _renormalises(model: ModelConfig) -> bool | None:
    """Whether weights of the top k of a softmax are divided by their sum; None: they are something else."""
    if getattr(model.router, "routed_scaling_factor", 1.0) != 1.0 or model.router.type not in _TOP_K_OF_SOFTMAX:
        return None
    return _TOP_K_OF_SOFTMAX[model.router.type](model)


def _fits_glm4_moe(model: ModelConfig) -> bool:
    router = model.router
    return (
        router.type == "bias_balanced"
        and _plain_attention(model)
        and router.score == "sigmoid"
        and model.num_local_experts // router.n_group > 1
        and bool(model.num_shared_experts)
        and not model.shared_expert_gate
        and model.sliding_window is None
    )


_TABLE: tuple[tuple[Architecture, Callable[[ModelConfig], bool]], ...] = (
    (MIXTRAL, lambda model: is_mixtral(model) and not model.num_shared_experts and _plain_attention(model)),
    (QWEN2_MOE, _fits_qwen2_moe),
    (QWEN3_MOE, _fits_qwen3_moe),
    (OLMOE, _fits_olmoe),
    (GLM4_MOE, _fits_glm4_moe),
)


def architecture_of(model: ModelConfig) -> Architecture:
    """That of a model's checkpoints."""
    for found, fits in _TABLE:
        if fits(model):
            unused = _UNUSED.get(model.router.type, ())
            return replace(found, unused=unused) if unused else found
    return replace(OWN, code=True) if _has_code(model) else OWN


def is_mixtral(model: ModelConfig) -> bool:
    """Whether the routers' evaluation is Mixtral's arithmetic."""
    return _renormalises(model) is True


def export_note(model: ModelConfig) -> str | None:
    """What to know about checkpoints before training starts; None where they are Mixtral's as they are."""
    found = architecture_of(model)
    told = f"model.router.type={model.router.type}"
    if model.num_shared_experts:
        told += f", model.num_shared_experts={model.num_shared_experts}"
    if model.qk_norm != "none":
        told += f", model.qk_norm={model.qk_norm}"
    if model.attention_bias != "none":
        told += f", model.attention_bias={model.attention_bias}"
    if found.code:
        return (
            f"transformers has no architecture with {told}: checkpoints have modelling code beside them and load there "
            "with trust_remote_code=True"
        )
    if not found.native:
        return f"transformers has no architecture with {told}: checkpoints load in moe_llm and need its code elsewhere"
    if found.unused:
        return (
            f"checkpoints are {found.architecture}'s; their {', '.join(found.unused)}, which only training needs, is "
            "reported as unused when transformers loads them"
        )
    return None if found == MIXTRAL else f"checkpoints are {found.architecture}'s in transformers"
