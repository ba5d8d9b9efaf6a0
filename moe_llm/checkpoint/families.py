"""Checkpoints of other families as they were published: what their config.json says, in this package's keys.

One entry of `FAMILIES` per family: the defaults of its configuration in transformers 5.23, the values of its keys that
are understood, and how the rest becomes a `ModelConfig`. A key that stands in neither is refused by name, since it may
change the arithmetic. Going out is `architectures.py`. This file needs no torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_llm.errors import UserError

# Of every configuration in transformers: nothing that the logits depend on.
_HARMLESS = frozenset(
    [
        "transformers_version",
        "architectures",
        "model_type",
        "dtype",
        "torch_dtype",
        "_name_or_path",
        "name_or_path",
        "output_hidden_states",
        "output_attentions",
        "return_dict",
        "is_encoder_decoder",
        "use_cache",
        "id2label",
        "label2id",
        "problem_type",
        "chunk_size_feed_forward",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "output_router_logits",
        "attention_dropout",
        "initializer_range",
        "max_window_layers",
    ]
)
_ROPE = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})
_SHARED = {
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "router_aux_loss_coef": 0.001,
    "norm_topk_prob": False,
    "head_dim": None,
}
_SAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts_per_tok",
    "router_aux_loss_coef",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "initializer_range",
)


@dataclass(frozen=True)
class Family:
    """architecture: the one class that is loaded. defaults: of the keys that it understands. only: keys of which one
    value alone is supported. own: what of `ModelConfig` follows from the family's own keys."""

    architecture: str
    defaults: Mapping[str, Any]
    own: Callable[[Mapping[str, Any]], dict[str, Any]]
    only: Mapping[str, Any] = field(default_factory=dict)


def _qwen2_moe(said: Mapping[str, Any]) -> dict[str, Any]:
    shared, rest = divmod(said["shared_expert_intermediate_size"], said["moe_intermediate_size"])
    if rest or not shared:
        raise UserError(
            f"shared_expert_intermediate_size={said['shared_expert_intermediate_size']} is no multiple of "
            f"moe_intermediate_size={said['moe_intermediate_size']}: such a shared expert is not supported"
        )
    return {
        "intermediate_size": said["moe_intermediate_size"],
        "attention_bias": "qkv" if said["qkv_bias"] else "none",
        "num_shared_experts": shared,
        "shared_expert_gate": True,
    }


def _qwen3_moe(said: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "intermediate_size": said["moe_intermediate_size"],
        "attention_bias": "all" if said["attention_bias"] else "none",
        "qk_norm": "head",
    }


def _olmoe(said: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "intermediate_size": said["intermediate_size"],
        "attention_bias": "all" if said["attention_bias"] else "none",
        "qk_norm": "projection",
    }


_QWEN = {"decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False}
FAMILIES: dict[str, Family] = {
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        {
            **_SHARED,
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 5632,  # of layers without experts, of which there are none
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "rms_norm_eps": 1e-6,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts_per_tok": 4,
            "num_experts": 60,
            "qkv_bias": True,
        },
        _qwen2_moe,
        _QWEN,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {
            **_SHARED,
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,  # of layers without experts, of which there are none
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-6,
            "moe_intermediate_size": 768,
            "num_experts_per_tok": 8,
            "num_experts": 128,
            "attention_bias": False,
        },
        _qwen3_moe,
        _QWEN,
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        {
            **_SHARED,
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
            "attention_bias": False,
        },
        _olmoe,
        {"clip_qkv": None},
    ),
}


def fields_of(content: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The model's section that a config.json of one of `FAMILIES` means, but for its rotary embeddings.

    Raises:
        UserError: names a key that is not known, or a value that is not supported.
    """
    kind = content["model_type"]
    family = FAMILIES[kind]
    architectures = content.get("architectures") or [family.architecture]
    if architectures != [family.architecture]:
        raise UserError(f"{origin}: architectures={architectures} is another model: give a {family.architecture}")
    told = {"num_local_experts": "num_experts"}
    given = {told.get(key, key): value for key, value in content.items()}
    window = {"sliding_window", "layer_types"} if "use_sliding_window" in family.only else set()
    known = {*_HARMLESS, *_ROPE, *family.defaults, *family.only, *window}
    for key, value in given.items():
        if key not in known and value is not None:
            raise UserError(
                f"{origin}: {key}={value!r} is not known of {kind}, and may change what it computes: remove it if it "
                "does not, or convert the checkpoint"
            )
    said = {**family.defaults, **given}
    for key, value in {**family.only, "hidden_act": "silu", "is_encoder_decoder": False}.items():
        if said.get(key, value) not in (value, None):
            raise UserError(f"{origin}: {key}={said[key]!r} of {kind} is not supported: only {value!r} is")
    for layer in said.get("layer_types") or []:
        if layer != "full_attention":
            raise UserError(f"{origin}: layer_types has {layer!r}, and of {kind} only full_attention is supported")
    router = {"type": "mixtral"}
    if not said["norm_topk_prob"]:
        router = {"type": "deepseek_moe", "norm_topk_prob": False, "expert_balance_coef": 0.0}
    try:
        own = family.own(said)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error
    return {
        **{key: said[key] for key in _SAME},
        "num_key_value_heads": said["num_key_value_heads"] or said["num_attention_heads"],
        "head_dim": said["head_dim"] or said["hidden_size"] // said["num_attention_heads"],
        "num_local_experts": said["num_experts"],
        "sliding_window": None,
        "router": router,
        **own,
    }
