"""What a family of decoders is: keys of its config.json both ways, names of its tensors, defaults, and its limits.

One `Family` a file in this package, and one line a family in `architectures.py`. This file needs no torch.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import PydanticCustomError

from moe_llm.config import ModelConfig
from moe_llm.config.rope import with_one_spelling
from moe_llm.errors import UserError

OURS = "moe_llm"  # the key under which config.json holds what the family has no key for
# Keys of dense models' config.json that a mixture's has not: whoever makes one looks at the first three by itself, and the
# last one splits products without changing them
DENSE_ALONE = ("attention_bias", "mlp_bias", "layer_types", "pretraining_tp")
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
        "use_return_dict",
        "is_encoder_decoder",
        "use_cache",
        "id2label",
        "label2id",
        "problem_type",
        "chunk_size_feed_forward",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "output_router_logits",
        "attention_dropout",
        "initializer_range",
        "max_window_layers",
        "auto_map",
        "tokenizer_class",
        "prefix",
        "bad_words_ids",
        "task_specific_params",
        "tie_encoder_decoder",
        "decoder_start_token_id",
        "finetuning_task",
        "torchscript",
        "use_bfloat16",
        "pretraining_tp",
        "experts_implementation",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_experts_implementation",
        "unsloth_version",
        "unsloth_fixed",
        "moe_llm",
        "aux_loss_alpha",
        "seq_aux",
        "ep_size",
        "num_nextn_predict_layers",
        "num_mtp_layers",
    ]
)
_ROPE = frozenset({"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"})
# Keys of config.json that every family has, and that are called the same here.
SAME = (
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
SHARED_DEFAULTS: Mapping[str, Any] = {
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "router_aux_loss_coef": 0.001,
    "head_dim": None,
}
BY_PROJECTION = (
    (r"\.block_sparse_moe\.", ".mlp."),
    (r"\.experts\.(\d+)\.w1\.", r".experts.\1.gate_proj."),
    (r"\.experts\.(\d+)\.w3\.", r".experts.\1.up_proj."),
    (r"\.experts\.(\d+)\.w2\.", r".experts.\1.down_proj."),
)


@dataclass(frozen=True)
class Family:
    """model_type, architecture: as in config.json. defaults: of the keys that the family's configuration understands, as
    transformers has them. read: what of `ModelConfig` follows from these keys, beside those in `SAME` and the rotary
    embeddings. write: the keys for a model, beside the same.
    can: for each part of a decoder (`parts_of`) the values that the family computes; of parts that are not named, that of
    a plain Mixtral. also: names a further key that it cannot express, None where there is none.
    newer: the part of a model that transformers 4 reads and computes otherwise, None where there is none.
    only: keys of which one value alone is supported. renamed: other names of keys in `defaults`.
    harmless: keys of config.json that change nothing.
    names: changes of Mixtral's published names into those in its files, regular expressions, in this order.
    theta, rope: base and parameters of the rotary embeddings where config.json has none.
    native: transformers has it. code: otherwise the weights have modelling code beside them (`remote_code`).
    stacked: experts of a layer are one tensor in its files, transposed, with gate and up in turn (`layout.py`).
    unused: parameters of the router that it has no use for and leaves alone. omitted: those that its files do not have.
    without: keys of `SAME` that its config.json does not have.
    """

    model_type: str
    architecture: str
    defaults: Mapping[str, Any]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    can: Mapping[str, Collection[Any]] = field(default_factory=dict)
    also: Callable[[ModelConfig], str | None] = lambda model: None
    newer: Callable[[ModelConfig], str | None] = lambda model: None
    only: Mapping[str, Any] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    harmless: Collection[str] = ()
    names: tuple[tuple[str, str], ...] = ()
    theta: float = 1e4
    rope: Mapping[str, Any] | None = None
    native: bool = True
    code: bool = False
    stacked: bool = False
    unused: tuple[str, ...] = ()
    omitted: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    @property
    def dispensable(self) -> tuple[str, ...]:
        """Ends of the names of parameters that a checkpoint may lack."""
        return (*self.unused, *self.omitted)

    def omits(self, name: str) -> bool:
        """Whether an in-memory parameter is not in the family's files."""
        return name.endswith(self.omitted)

    def stored_name(self, published: str) -> str:
        """The name in this family's files of what Mixtral's call `published`."""
        for pattern, replacement in self.names:
            published = re.sub(pattern, replacement, published)
        return published

    def cannot(self, model: ModelConfig) -> list[str]:
        """What of a model this family does not compute, as `key=value`."""
        found = [
            told for part, (value, told) in parts_of(model).items() if value not in self.can.get(part, (PLAIN[part],))
        ]
        other = None if found else self.also(model)
        return [other] if other else found

    def fields_of(self, content: Mapping[str, Any], origin: str, allowed: Collection[str] = ()) -> dict[str, Any]:
        """The model's section that a config.json means.

        Args:
            allowed: further keys that may be there, and mean nothing to the family.

        Raises:
            UserError: names a key that is not known, or a value that is not supported.
        """
        given = {self.renamed.get(key, key): value for key, value in content.items()}
        known = {*_HARMLESS, *_ROPE, *self.defaults, *self.only, *self.harmless, "hidden_act", *SAME, *allowed}
        for key, value in given.items():
            if key not in known and value is not None and not key.startswith("_attn"):
                raise UserError(
                    f"{origin}: {key}={value!r} is not known of {self.model_type}, and may change what it computes: "
                    "remove it if it does not, or convert the checkpoint"
                )
        said = {**self.defaults, **given}
        for key, only in {**self.only, "hidden_act": "silu"}.items():
            accepted = (only, None, "swish") if key == "hidden_act" else (only, None)
            if said.get(key, only) not in accepted:
                raise UserError(
                    f"{origin}: {key}={said[key]!r} of {self.model_type} is not supported: only {only!r} is"
                )
        try:
            own = self.read(said)
        except UserError as error:
            raise UserError(f"{origin}: {error}") from error
        return {
            "architecture": self.model_type,
            **{key: said[key] for key in SAME if key in said},
            "num_key_value_heads": said["num_key_value_heads"] or said["num_attention_heads"],
            "head_dim": said.get("head_dim") or _head_width(said["hidden_size"], said["num_attention_heads"]),
            **self.rotary(content, said, origin),
            **own,
        }

    def rotary(self, content: Mapping[str, Any], said: Mapping[str, Any], origin: str) -> dict[str, Any]:
        """`rope_theta` and `rope_parameters`, whatever a config.json calls them."""
        told = {key: content[key] for key in _ROPE if content.get(key) is not None}
        if "partial_rotary_factor" not in told and "partial_rotary_factor" in self.defaults:
            places = [place for place in told.values() if isinstance(place, dict)]
            if not any("partial_rotary_factor" in place for place in places):
                told["partial_rotary_factor"] = self.defaults["partial_rotary_factor"]
        if self.rope is not None and not told.keys() & {"rope_scaling", "rope_parameters"}:
            told["rope_parameters"] = dict(self.rope)
        try:
            found = with_one_spelling(told)
        except PydanticCustomError as error:
            raise UserError(_sentence(error, origin)) from error
        rope = dict(found.get("rope_parameters", {}))
        if rope.get("rope_type") in ("yarn", "llama3"):
            rope.setdefault("original_max_position_embeddings", said["max_position_embeddings"])
        theta = found.get("rope_theta")
        return {"rope_theta": self.theta if theta is None else theta, "rope_parameters": rope}


def _head_width(hidden: Any, heads: Any) -> int | None:
    """None where these are no numbers, which is then refused by name."""
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None


def _sentence(error: PydanticCustomError, origin: str) -> str:
    told = error.context or {}
    return f"{origin}: {told['field']}={told['value']!r} {told['problem']}: {told['remedy']}"


# The weights of the top k of a softmax: whether they are divided by their sum.
TOP_K_OF_SOFTMAX: dict[str, Callable[[ModelConfig], bool]] = {
    "mixtral": lambda model: True,
    "dense": lambda model: True,
    "gshard": lambda model: True,
    "noisy_top_k": lambda model: True,
    "switch": lambda model: False,
    "batch_prioritised": lambda model: False,
    "deepseek_moe": lambda model: bool(getattr(model.router, "norm_topk_prob", True)),
    "em": lambda model: True,
}
RENORMALISED, AS_THEY_ARE, SIGMOID_BIAS = "renormalised", "as they are", "sigmoid with bias"
SCALED, IN_GROUPS = "scaled", "of groups"
TOP_K = (RENORMALISED, AS_THEY_ARE, SCALED, IN_GROUPS, SIGMOID_BIAS)


def routing_of(model: ModelConfig) -> str:
    """How the weights of a token's experts come about in evaluation: noise, capacity and losses are gone then."""
    router: Any = model.router
    kind = TOP_K_OF_SOFTMAX.get(router.type)
    if getattr(router, "topk_group", 1) < getattr(router, "n_group", 1) and router.type == "deepseek_moe":
        return router.type if kind is None or kind(model) else IN_GROUPS
    if kind is not None:
        if getattr(router, "routed_scaling_factor", 1.0) == 1.0:
            return RENORMALISED if kind(model) else AS_THEY_ARE
        return SCALED if not kind(model) else router.type
    return SIGMOID_BIAS if router.type == "bias_balanced" and router.score == "sigmoid" else router.type


PLAIN: dict[str, Any] = {
    "routing": RENORMALISED,
    "qk_norm": "none",
    "attention_bias": "none",
    "shared": "none",
    "windows": "none",
    "dense": "none",
    "rotary": "whole",
    "heads": "grouped",
    "sinks": False,
    "router_bias": False,
    "experts": "swiglu",
}


def parts_of(model: ModelConfig) -> dict[str, tuple[Any, str]]:
    """What decides the class that computes a model: of each part of a decoder its value, and `key=value` of those that
    are not plain."""
    sparse, blocks, windows = model.moe_layers, model.num_hidden_layers, set(model.windows)
    dense = "none" if len(sparse) == blocks else "first" if sparse[-1] - sparse[0] == len(sparse) - 1 else "any"
    if dense == "first" and sparse[-1] != blocks - 1:
        dense = "any"
    shared = "none" if not model.num_shared_experts else "gated" if model.shared_expert_gate else "plain"
    scale = getattr(model.router, "routed_scaling_factor", 1.0)
    told_dense = [
        f"model.{key}={getattr(model, key)}"
        for key, none in (("first_k_dense_replace", 0), ("moe_layer_frequency", 1), ("mlp_only_layers", ()))
        if getattr(model, key) != none
    ]
    return {
        "routing": (
            routing_of(model),
            f"model.router.type={model.router.type}" + (f" with routed_scaling_factor={scale:g}" if scale != 1 else ""),
        ),
        "shared": (
            shared,
            f"model.num_shared_experts={model.num_shared_experts}"
            + (" with shared_expert_gate" if model.shared_expert_gate else ""),
        ),
        "qk_norm": (model.qk_norm, f"model.qk_norm={model.qk_norm}"),
        "attention_bias": (model.attention_bias, f"model.attention_bias={model.attention_bias}"),
        "windows": (
            "none" if windows == {None} else "some" if None in windows else "all",
            f"model.sliding_window={model.sliding_window}",
        ),
        "dense": (dense, ", ".join(told_dense)),
        "heads": ("latent" if model.latent_attention else "grouped", f"model.kv_lora_rank={model.kv_lora_rank}"),
        "sinks": (model.attention_sinks, f"model.attention_sinks={str(model.attention_sinks).lower()}"),
        "router_bias": (getattr(model.router, "bias", False), "model.router.bias=true"),
        "experts": (
            _experts(model),
            ", ".join(
                f"model.{key}={list(getattr(model, key))}"
                for key in ("expert_sizes", "expert_activations")
                if getattr(model, key) is not None
            )
            or f"model.swiglu_limit={model.swiglu_limit} with expert_bias={str(model.expert_bias).lower()}",
        ),
        "rotary": (
            "whole" if model.rope_parameters.partial_rotary_factor == 1 else "partial",
            f"model.rope_parameters.partial_rotary_factor={model.rope_parameters.partial_rotary_factor:g}",
        ),
    }


def _experts(model: ModelConfig) -> str:
    if model.single_expert_sizes is not None:
        return "uneven" if model.swiglu_limit is None and not model.expert_bias else "uneven, formed"
    if model.swiglu_limit is None:
        return "swiglu with biases" if model.expert_bias else "swiglu"
    return "clamped with biases" if model.expert_bias else "clamped"


def softmax_router(norm_topk_prob: bool) -> dict[str, Any]:
    """Settings of the router that takes the top k of a softmax."""
    if norm_topk_prob:
        return {"type": "mixtral"}
    return {"type": "deepseek_moe", "norm_topk_prob": False, "expert_balance_coef": 0.0}


def sparse_step(said: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen's keys for layers without experts, in ours."""
    return {
        "moe_layer_frequency": said["decoder_sparse_step"],
        "mlp_only_layers": said["mlp_only_layers"] or (),
        "dense_intermediate_size": said["intermediate_size"],
    }


def dense_as_sparse_step(model: ModelConfig) -> dict[str, Any]:
    """And back: every layout can be said by `mlp_only_layers`."""
    first = range(model.first_k_dense_replace)
    return {
        "decoder_sparse_step": model.moe_layer_frequency,
        "mlp_only_layers": sorted({*first, *model.mlp_only_layers}),
        "intermediate_size": model.dense_width,
    }


def first_dense(model: ModelConfig) -> dict[str, Any]:
    """DeepSeek's and GLM's keys for layers without experts."""
    return {
        "first_k_dense_replace": model.num_hidden_layers - model.num_moe_layers,
        "intermediate_size": model.dense_width,
    }
