"""The table of the families of decoders, and which of them a model is.

A line here and a file beside this one add one. What counts is evaluation: noise, capacity and losses are gone then. Read
in the sources of transformers 5.23; why others stay out: ERNIE-4.5 and dots3 turn other pairs or parts of a head,
GraniteMoe scales what it adds, Qwen3-Next and Kimi-Linear have linear attention, and models with images have more than
text. This file needs no torch.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from moe_llm.config import ModelConfig
from moe_llm.config.base import fields_by_key
from moe_llm.errors import UserError
from moe_llm.families import (
    deepseek_v2,
    deepseek_v3,
    glm4_moe,
    gpt_oss,
    mistral,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3_moe,
)
from moe_llm.families.family import BY_PROJECTION, OURS, PLAIN, SAME, TOP_K, TOP_K_OF_SOFTMAX, Family, parts_of

MIXTRAL = mixtral.FAMILY
TABLE: tuple[Family, ...] = (
    MIXTRAL,
    qwen2_moe.FAMILY,
    qwen3_moe.FAMILY,
    olmoe.FAMILY,
    glm4_moe.FAMILY,
    deepseek_v2.FAMILY,
    deepseek_v3.FAMILY,
    gpt_oss.FAMILY,
)
MISTRAL = mistral.FAMILY  # of what has one expert; no family of mixtures, so that it is not in the table
FAMILIES = {family.model_type: family for family in TABLE}


def _with_code(model: ModelConfig) -> dict[str, Any]:
    plain = mixtral.write(model)
    if not _has_code(model):
        return plain
    return {
        **plain,
        "auto_map": {
            "AutoConfig": "configuration_moe_llm.MoELLMConfig",
            "AutoModelForCausalLM": "modeling_moe_llm.MoELLMForCausalLM",
        },
    }


OWN = Family(
    "moe_llm", "MoELLMForCausalLM", MIXTRAL.defaults, mixtral.read, _with_code, names=BY_PROJECTION, native=False
)

# All routers that the modelling code knows (`remote_code/modeling_moe_llm.py`).
CODED = (
    *TOP_K_OF_SOFTMAX,
    "bias_balanced",
    "top_p",
    "hierarchical",
    "balanced",
    "soft_moe",
    "multi_head",
    "lory",
    "expert_choice",
    "attention",
    "transformer",
    "reinforce",
)
_CODED_PARTS = ("routing", "shared", "windows")  # what it knows beside a plain decoder
_UNUSED = {"noisy_top_k": ("noise_weight",)}


def _has_code(model: ModelConfig) -> bool:
    parts = {part: value for part, (value, _) in parts_of(model).items() if part not in _CODED_PARTS}
    plain = all(value == PLAIN[part] or (part, value) == ("experts", "uneven") for part, value in parts.items())
    return (
        plain
        and model.router.type in CODED
        and len(set(model.windows)) == 1
        and model.rope_parameters.rope_type == "default"
    )


def architecture_of(model: ModelConfig) -> Family:
    """That of a model's checkpoints: the one that it names, where that computes it, else the first that does."""
    named = FAMILIES.get(model.architecture)
    if named is MIXTRAL and not MISTRAL.cannot(model):
        return MISTRAL
    for family in filter(None, (named, *TABLE)):
        if not family.cannot(model):
            unused = _UNUSED.get(model.router.type, ())
            return replace(family, unused=unused) if unused else family
    return replace(OWN, code=True) if _has_code(model) else OWN


def is_mixtral(model: ModelConfig) -> bool:
    """Whether the routers' evaluation is Mixtral's arithmetic."""
    return parts_of(model)["routing"][0] == PLAIN["routing"]


def takes_top_k(model: ModelConfig) -> bool:
    """Whether each token has, in evaluation, as many experts as `num_experts_per_tok` says, by scores of its own."""
    return parts_of(model)["routing"][0] in TOP_K


def export_note(model: ModelConfig) -> str | None:
    """What to know about checkpoints before training starts; None where they are of the class that was named."""
    found, named = architecture_of(model), FAMILIES[model.architecture]
    parts = parts_of(model)
    told = ", ".join(said for part, (value, said) in parts.items() if part == "routing" or value != PLAIN[part])
    if found.code:
        return (
            f"transformers has no architecture with {told}: checkpoints have modelling code beside them and load there "
            "with trust_remote_code=True"
        )
    if not found.native:
        return f"transformers has no architecture with {told}: checkpoints load in moe_llm and need its code elsewhere"
    if found is MISTRAL:
        return f"one expert is a dense model: checkpoints are {found.architecture}'s in transformers, without a router"
    if found.unused:
        return (
            f"checkpoints are {found.architecture}'s; their {', '.join(found.unused)}, which only training needs, is "
            "reported as unused when transformers loads them"
        )
    if found == named:
        return None
    return f"checkpoints are {found.architecture}'s in transformers, since {named.model_type} has no {', '.join(named.cannot(model))}"


def family_named(model_type: Any, origin: str) -> Family:
    """Raises a UserError that lists the families where it is none of them."""
    if model_type not in FAMILIES:
        raise UserError(f"{origin}={model_type!r} is no family that this package has: use one of {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def from_content(content: Mapping[str, Any], origin: str) -> ModelConfig:
    """The model that a config.json describes, which may have been written here.

    Raises:
        UserError: another family, or a key that is not known or not supported.
    """
    kind = content.get("model_type")
    ours = content.get(OURS)
    check_quantization(content, origin)
    own = {family.model_type: family for family in (OWN, MISTRAL)} if ours is not None else {}
    family = own.get(str(kind)) or family_named(kind, f"{origin}: model_type")
    given = content.get("architectures") or [family.architecture]
    if given != [family.architecture]:
        raise UserError(f"{origin}: architectures={given} is another model: give a {family.architecture}")
    if ours is None and content.get("is_encoder_decoder"):
        raise UserError(f"{origin}: is_encoder_decoder=True is not supported: this is a decoder")
    fields = family.fields_of(content, origin, MIXTRAL.defaults if ours is not None else ())
    if ours is not None:
        told = (
            *SAME,
            "intermediate_size",
            "num_local_experts",
            "rope_theta",
            "rope_parameters",
            *(("sliding_window", "router_jitter_noise") if family in (MIXTRAL, OWN) else ()),
        )
        fields = {
            "architecture": MIXTRAL.model_type if family in (OWN, MISTRAL) else kind,
            **ours,
            **{key: fields[key] for key in told if key in fields and key not in family.without},
        }
    model = _validated(content, fields, origin)
    if ours is None and (missing := family.cannot(model)):
        raise UserError(f"{origin}: {missing[0]} is not what a {family.architecture} computes: correct the file")
    return model


def check_quantization(content: Mapping[str, Any], origin: str) -> None:
    """Refuse weights in 8 bits or fewer, but for MXFP4, which `mxfp4` reads as bf16.

    Raises:
        UserError: names how they are quantised.
    """
    quantized = content.get("quantization_config")
    method = quantized.get("quant_method", "unknown") if isinstance(quantized, Mapping) else quantized
    if quantized and not (method == "mxfp4" and content.get("model_type") == gpt_oss.FAMILY.model_type):
        raise UserError(
            f"{origin}: quantization_config is set: the weights are quantised ({method}), give a checkpoint in fp32, bf16 or "
            "fp16"
        )


def _validated(content: Mapping[str, Any], fields: dict[str, Any], origin: str) -> ModelConfig:
    try:
        return ModelConfig.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join([*map(str, first["loc"]), *filter(None, [first.get("ctx", {}).get("field")])])
        value = first.get("ctx", {}).get("value", content.get(field, first["input"]))
        if first["type"] == "invalid_field":  # its message says what is wrong, and what to do
            raise UserError(f"{origin}: {field}={value!r} {first['msg']}") from error
        raise UserError(f"{origin}: {field}={value!r} is not valid: {first['msg']}") from error


def complete_section(model: dict[str, Any]) -> dict[str, Any]:
    """The model's section of a run that names a family, `model.architecture`: what it leaves open as the family's
    configuration in transformers has it, and the family's keys in this package's words.

    Raises:
        UserError: no such family, or what it does not support.
    """
    kind = model.get("architecture")
    if kind is None or kind == MIXTRAL.model_type:
        return model
    family, own_keys = family_named(kind, "model.architecture"), set(fields_by_key(ModelConfig))
    known = {*family.defaults, *family.only, *family.renamed}
    theirs = {key: value for key, value in model.items() if key in known}
    ours = {key: value for key, value in model.items() if key in own_keys}
    others = {key: value for key, value in model.items() if key not in known and key not in own_keys}
    if "moe_intermediate_size" in family.defaults and "intermediate_size" in model:
        if "moe_intermediate_size" in model:
            del ours["intermediate_size"]  # of layers without experts, as in config.json
        else:
            theirs["moe_intermediate_size"] = theirs.pop("intermediate_size")
    if not isinstance(ours.get("attention_bias"), str):
        ours.pop("attention_bias", None)
    else:
        theirs.pop("attention_bias", None)
    for key in ("num_shared_experts",):
        if key in ours and "shared_expert_intermediate_size" in family.defaults:
            width = theirs.get("moe_intermediate_size", family.defaults["moe_intermediate_size"])
            theirs.setdefault("shared_expert_intermediate_size", ours[key] * width)
    rope: dict[str, Any] = {key: others.pop(key) for key in ("rope_scaling", "partial_rotary_factor") if key in others}
    rope |= {key: ours.pop(key) for key in ("rope_theta", "rope_parameters") if ours.get(key) is not None}
    fields = family.fields_of({**theirs, **rope}, "model")
    del fields["vocab_size"]
    return {**fields, **others, **{key: value for key, value in ours.items() if value is not None or key in _NULLABLE}}


_NULLABLE = ("sliding_window", "vocab_size")  # of which null says something
