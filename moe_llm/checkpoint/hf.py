"""The one table of names and layouts: this package's model in memory <-> Mixtral's published checkpoints.

In memory, as in transformers 5, the experts of a layer are stacked; on disk, as Mistral AI published Mixtral
and as every loader knows it, each expert has three matrices of its own:

    ...mlp.experts.gate_up_proj (E, 2F, D)   = ...block_sparse_moe.experts.{e}.w1.weight (F, D), gate
                                               above    ...experts.{e}.w3.weight (F, D), up
    ...mlp.experts.down_proj    (E, D, F)    = ...block_sparse_moe.experts.{e}.w2.weight (D, F)
    ...mlp.gate.weight          (E, D)       = ...block_sparse_moe.gate.weight, and so for whatever else a router has
    all else                                   the same name

Low-rank factors of an expert parameter (`model.adapters`) are stored by expert too, in files of ours alone.
D hidden, F expert width, E experts. This file needs no torch.
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from types import EllipsisType
from typing import Any

from pydantic import ValidationError

from moe_llm.checkpoint.architectures import MIXTRAL, OF_OURS, architecture_of
from moe_llm.checkpoint.families import FAMILIES, fields_of
from moe_llm.config import ModelConfig
from moe_llm.errors import UserError

EXPERT_PARAMETER = re.compile(r"(?P<layer>.*)\.mlp\.experts\.(?P<kind>gate_up_proj|down_proj)(?P<factor>_lora_[AB])?")
_MATRICES = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}  # stacked along the rows, in this order
_DTYPE_WORDS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_OWN_WORDS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "shared_expert": "shared_experts"}
_FOREIGN = re.compile(
    r"(\.block_sparse_moe\.(?:experts\.\d+\.(?=(?:gate|up|down)_proj\.)|(?=shared_expert\.)))(\w+)(\..*)"
)
_DERIVED = re.compile(r".*\.rotary_emb\.inv_freq")  # old files hold it; it follows from the configuration


@dataclass(frozen=True)
class Piece:
    """A part of an in-memory parameter that has a published name: `parameter[index]` is of `shape`."""

    name: str
    shape: tuple[int, ...]
    index: tuple[int, slice] | EllipsisType


def published_name(name: str) -> str:
    """An in-memory name (or a mixture of both styles, as converters write, or that of an architecture in whose files
    our models may be) with Mixtral's module names."""
    name = re.sub(r"(model\.layers\.\d+)\.mlp\.", r"\1.block_sparse_moe.", name)
    return _FOREIGN.sub(lambda match: match[1] + _OWN_WORDS[match[2]] + match[3], name)


def is_derived(name: str) -> bool:
    """Whether a stored tensor is no weight but follows from the configuration."""
    return _DERIVED.fullmatch(name) is not None


def is_expert(name: str) -> bool:
    """Whether an in-memory parameter is stacked over experts; so are its low-rank factors."""
    return EXPERT_PARAMETER.fullmatch(name) is not None


def is_router(name: str) -> bool:
    """Whether an in-memory parameter or buffer is of a layer's router; so are low-rank factors of it."""
    return ".mlp.gate." in name


def pieces(name: str, shape: tuple[int, ...], first_expert: int | None = None) -> list[Piece]:
    """The published pieces of an in-memory parameter, in the order in which they lie in memory.

    Args:
        name: in-memory name.
        shape: as held here: (held experts, rows, columns) for an expert parameter.
        first_expert: over all ranks, of the first expert held; None: 0.
    """
    match = EXPERT_PARAMETER.fullmatch(name)
    if match is None:
        return [Piece(published_name(name), tuple(shape), ...)]
    held, rows, columns = shape
    matrices = _MATRICES[match["kind"]] if match["factor"] is None else (f"{match['kind']}{match['factor']}",)
    height, rest = divmod(rows, len(matrices))
    assert rest == 0, f"{name} of shape {tuple(shape)} does not split into {matrices}"
    experts = published_name(f"{match['layer']}.mlp.experts.")
    return [
        Piece(
            f"{experts}{(first_expert or 0) + e}.{matrix}.weight",
            (height, columns),
            (e, slice(i * height, (i + 1) * height)),
        )
        for e in range(held)
        for i, matrix in enumerate(matrices)
    ]


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every in-memory parameter of a whole model and its shape; `lm_head.weight` is absent when tied."""
    assert model.vocab_size is not None, "vocab_size is resolved from the tokenizer first"
    D, F, E, V = model.hidden_size, model.intermediate_size, model.num_local_experts, model.vocab_size
    q_width, kv_width = (heads * model.attention_head_dim for heads in (model.num_attention_heads, model.kv_heads))
    layer = {
        "self_attn.q_proj.weight": (q_width, D),
        "self_attn.k_proj.weight": (kv_width, D),
        "self_attn.v_proj.weight": (kv_width, D),
        "self_attn.o_proj.weight": (D, q_width),
        **{f"self_attn.{name}": shape for name, shape in model.attention_vectors().items()},
        **{f"mlp.gate.{name}": shape for name, shape in model.router.parameter_shapes(model).items()},
        "mlp.experts.gate_up_proj": (E, 2 * F, model.expert_hidden_size),
        "mlp.experts.down_proj": (E, model.expert_hidden_size, F),
        **{f"mlp.{name}": shape for name, shape in model.shared_shapes().items()},
        "input_layernorm.weight": (D,),
        "post_attention_layernorm.weight": (D,),
    }
    shapes = {"model.embed_tokens.weight": (V, D)}
    for i in range(model.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (D,)
    if not model.tie_word_embeddings:
        shapes["lm_head.weight"] = (V, D)
    return shapes


def buffer_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """What of a whole model is no parameter but is stored with them, in fp32: the routers' buffers."""
    buffers = model.router.buffer_shapes(model)
    return {
        f"model.layers.{i}.mlp.gate.{name}": shape
        for i in range(model.num_hidden_layers)
        for name, shape in buffers.items()
    }


# MixtralConfig's defaults: what a config.json means by leaving a key out. Ours differ in places.
_DEFAULTS = {
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
_DEFAULT_THETA, _FAMILIES_THETA = 1e6, 1e4
_OURS = "moe_llm"  # the key under which config.json holds what MixtralConfig has no field for


def to_transformers_config(
    model: ModelConfig,
    *,
    bos_token_id: int | None,
    eos_token_id: int | list[int] | None,
    dtype: str,
    pad_token_id: int | None = None,
) -> dict[str, Any]:
    """The content of config.json, for transformers 4 and 5 and whatever reads their files.

    What differs between versions stands there twice: `rope_theta` and `rope_parameters`, `torch_dtype` and
    `dtype`. Settings that only this package has are under the key `moe_llm`, which others carry along unread.

    Args:
        model: with `vocab_size` resolved.
        dtype: of the stored weights, `fp32`, `bf16` or `fp16`.
    """
    assert model.vocab_size is not None, "vocab_size is resolved from the tokenizer first"
    architecture = architecture_of(model)
    shared = {name: getattr(model, name) for name in _DEFAULTS}
    shared |= {"num_key_value_heads": model.kv_heads, "head_dim": model.attention_head_dim}
    return {
        "architectures": [architecture.architecture],
        "model_type": architecture.model_type,
        **shared,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_theta": model.rope_theta, "rope_type": "default"},
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "output_router_logits": False,
        "use_cache": not model.router.needs_past,
        "torch_dtype": _DTYPE_WORDS[dtype],
        "dtype": _DTYPE_WORDS[dtype],
        "transformers_version": version("transformers"),
        **architecture.fields(model),
        _OURS: model.model_dump(mode="json", exclude={*_DEFAULTS, "rope_theta", "init_from"}),
    }


def generation_config(
    model: ModelConfig,
    *,
    bos_token_id: int | None,
    eos_token_id: int | list[int] | None,
    pad_token_id: int | None = None,
) -> dict[str, Any]:
    """The content of generation_config.json."""
    return {
        "_from_model_config": True,
        **({"use_cache": False} if model.router.needs_past else {}),
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "transformers_version": version("transformers"),
    }


def from_transformers_config(content: Mapping[str, Any], origin: str = "config.json") -> ModelConfig:
    """The architecture that a config.json describes.

    Dropout of the attention is not modelled: it is warned of, since it changes training and nothing else.

    Args:
        content: of a config.json of transformers 4 or 5.
        origin: names the file in errors.

    Raises:
        UserError: another architecture, or a feature that this model does not have.
    """
    _refuse_other_architectures(content, origin)
    if content.get("attention_dropout"):
        warnings.warn(
            f"{origin}: attention_dropout={content['attention_dropout']} is ignored: this model has no dropout",
            stacklevel=2,
        )
    if content.get("model_type") in FAMILIES and _OURS not in content:
        fields = fields_of(content, origin)
        return _validated(content, {**fields, "rope_theta": _theta(content, origin, _FAMILIES_THETA)}, origin)
    fields = {name: content.get(name, default) for name, default in _DEFAULTS.items()}
    if "num_local_experts" not in content:
        fields["num_local_experts"] = content.get("num_experts", content.get("n_routed_experts", 8))
    if content.get("model_type") != MIXTRAL.model_type:
        fields["sliding_window"] = fields["sliding_window"] or None  # Qwen2-MoE's configuration makes 0 of null
    fields = {**content.get(_OURS, {}), **fields, "rope_theta": _theta(content, origin, _DEFAULT_THETA)}
    return _validated(content, fields, origin)


def _validated(content: Mapping[str, Any], fields: dict[str, Any], origin: str) -> ModelConfig:
    try:
        return ModelConfig.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join([*map(str, first["loc"]), *filter(None, [first.get("ctx", {}).get("field")])])
        raise UserError(f"{origin}: {field}={content.get(field)!r} is not valid: {first['msg']}") from error


def _refuse_other_architectures(content: Mapping[str, Any], origin: str) -> None:
    loaded = ", ".join(sorted({MIXTRAL.model_type, *FAMILIES}))
    needed = f"this package loads checkpoints of {loaded}"
    if content.get("model_type") in OF_OURS and _OURS in content:
        return  # written here: what it says is what this model is
    if content.get("quantization_config"):
        raise UserError(f"{origin}: quantization_config is set: give a checkpoint in fp32, bf16 or fp16")
    if content.get("model_type") in FAMILIES:
        return  # `fields_of` refuses what it does not know
    if content.get("model_type") != MIXTRAL.model_type:
        raise UserError(f"{origin}: model_type={content.get('model_type')!r} is not mixtral: {needed}")
    architectures = content.get("architectures") or ["MixtralForCausalLM"]
    if "MixtralForCausalLM" not in architectures:
        raise UserError(f"{origin}: architectures={architectures} is another model: {needed}")
    if content.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UserError(f"{origin}: hidden_act={content['hidden_act']!r} is not supported: experts here use silu")


def _theta(content: Mapping[str, Any], origin: str, default: float) -> float:
    """The base of the rotary frequencies; refuses every scaling of them."""
    theta = content.get("rope_theta")
    for key in ("rope_scaling", "rope_parameters"):
        rope = content.get(key)
        if rope is None:
            continue
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
        if kind != "default":
            raise UserError(
                f"{origin}: {key} of type {kind!r} is not supported: rotary embeddings here are "
                "unscaled (rope_type: default)"
            )
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise UserError(
                f"{origin}: {key}.partial_rotary_factor={rope['partial_rotary_factor']} is not "
                "supported: rotary embeddings here turn the whole head"
            )
        if layered := [name for name, value in rope.items() if isinstance(value, dict)]:
            raise UserError(
                f"{origin}: {key}.{layered[0]} is not supported: rotary embeddings here are the same in all layers"
            )
        inner = rope.get("rope_theta")
        if None not in (theta, inner) and theta != inner:
            raise UserError(f"{origin}: rope_theta={theta} and {key}.rope_theta={inner} differ: make them equal")
        theta = inner if theta is None else theta
    return default if theta is None else theta
