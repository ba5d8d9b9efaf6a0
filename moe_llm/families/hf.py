"""The one table of names and layouts: this package's model in memory <-> Mixtral's published checkpoints.

In memory, as in transformers 5, the experts of a layer are stacked; on disk, as Mistral AI published Mixtral
and as every loader knows it, each expert has three matrices of its own:

    ...mlp.experts.gate_up_proj (E, 2F, D)   = ...block_sparse_moe.experts.{e}.w1.weight (F, D), gate
                                               above    ...experts.{e}.w3.weight (F, D), up
    ...mlp.experts.down_proj    (E, D, F)    = ...block_sparse_moe.experts.{e}.w2.weight (D, F)
    ...mlp.gate.weight          (E, D)       = ...block_sparse_moe.gate.weight, and so for whatever else a router has
    all else                                   the same name

Where experts differ in width, the name of each one's is `...mlp.experts.{e}.gate_up_proj` (1, 2F, D), and so on.
Biases of experts (`gate_up_proj_bias`, `down_proj_bias`) are cut likewise, into `w1.bias` and so on; what families have
that keep all experts in one tensor stands in `layout.py`. Low-rank factors of an expert parameter (`model.adapters`) are stored by expert too, in files of ours alone.
D hidden, F expert width, E experts. This file needs no torch.
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import version
from types import EllipsisType
from typing import Any

from moe_llm.config import ModelConfig
from moe_llm.config.shapes import buffer_shapes as buffer_shapes
from moe_llm.config.shapes import parameter_shapes as parameter_shapes
from moe_llm.families.architectures import architecture_of, from_content
from moe_llm.families.family import DENSE_ALONE as DENSE_ALONE
from moe_llm.families.family import OURS, SAME, Family

EXPERT_PARAMETER = re.compile(
    r"(?P<layer>.*)\.mlp\.experts\.((?P<own>\d+)\.)?(?P<kind>gate_up_proj|down_proj)(?P<factor>_lora_[AB]|_bias)?"
)
_MATRICES = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}  # stacked along the rows, in this order
_DTYPE_WORDS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_OWN_WORDS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "shared_expert": "shared_experts"}
_FOREIGN = re.compile(
    r"(\.block_sparse_moe\.(?:experts\.\d+\.(?=(?:gate|up|down)_proj\.)|(?=shared_expert\.)))(\w+)(\..*)"
)
_DENSE = re.compile(r"\.block_sparse_moe\.(gate_proj|up_proj|down_proj)\.")
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
    name = name.replace(".block_sparse_moe.router.", ".block_sparse_moe.gate.")
    return _FOREIGN.sub(lambda match: match[1] + _OWN_WORDS[match[2]] + match[3], name)


def of_the_only_expert(published: str) -> str:
    """Mixtral's name of a dense model's tensor, whose feed-forward layers are the one expert of each layer."""
    return _DENSE.sub(lambda match: f".block_sparse_moe.experts.0.{_OWN_WORDS[match[1]]}.", published)


def is_derived(name: str) -> bool:
    """Whether a stored tensor is no weight but follows from the configuration."""
    return _DERIVED.fullmatch(name) is not None


@lru_cache(maxsize=1 << 16)  # a plan asks for every parameter, layout by layout
def is_expert(name: str) -> bool:
    """Whether an in-memory parameter is stacked over experts; so are its low-rank factors."""
    return EXPERT_PARAMETER.fullmatch(name) is not None


def expert_of(name: str) -> int | None:
    """The expert of a parameter that is one expert's alone (`model.expert_sizes`); None of all others."""
    match = EXPERT_PARAMETER.fullmatch(name)
    return None if match is None or match["own"] is None else int(match["own"])


def is_router(name: str) -> bool:
    """Whether an in-memory parameter or buffer is of a layer's router; so are low-rank factors of it."""
    return ".mlp.gate." in name


def pieces(name: str, shape: tuple[int, ...], first_expert: int | None = None) -> list[Piece]:
    """The published pieces of an in-memory parameter, in the order in which they lie in memory.

    Args:
        name: in-memory name.
        shape: as held here: (held experts, rows, columns) for an expert parameter.
        first_expert: over all ranks, of the first expert held; None: 0, or the one that the name says.
    """
    match = EXPERT_PARAMETER.fullmatch(name)
    if match is None:
        return [Piece(published_name(name), tuple(shape), ...)]
    held, rows, *columns = shape
    first = (expert_of(name) if match["own"] else first_expert) or 0
    whole = match["factor"] in (None, "_bias")
    matrices = _MATRICES[match["kind"]] if whole else (f"{match['kind']}{match['factor']}",)
    leaf = "bias" if match["factor"] == "_bias" else "weight"
    height, rest = divmod(rows, len(matrices))
    assert rest == 0, f"{name} of shape {tuple(shape)} does not split into {matrices}"
    experts = published_name(f"{match['layer']}.mlp.experts.")
    return [
        Piece(
            f"{experts}{first + e}.{matrix}.{leaf}",
            (height, *columns),
            (e, slice(i * height, (i + 1) * height)),
        )
        for e in range(held)
        for i, matrix in enumerate(matrices)
    ]


_NOT_BESIDE = (
    "init_from",
    "intermediate_size",
    "num_local_experts",
    "rope_theta",
    "rope_parameters",
    "resize_embeddings",
)  # of the model's section, under the key of our own


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
    same = [name for name in SAME if name not in architecture.without]
    shared = {name: getattr(model, name) for name in same}
    shared |= {"num_key_value_heads": model.kv_heads, "head_dim": model.attention_head_dim}
    rope = model.rope_parameters.content()
    return {
        "architectures": [architecture.architecture],
        "model_type": architecture.model_type,
        **shared,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_theta": model.rope_theta, **rope},
        **_rope_scaling(rope, architecture),
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        **({} if architecture.without else {"output_router_logits": False}),
        "use_cache": not model.router.needs_past,
        "torch_dtype": _DTYPE_WORDS[dtype],
        "dtype": _DTYPE_WORDS[dtype],
        "transformers_version": _transformers_version(),
        **architecture.write(model),
        OURS: model.model_dump(mode="json", exclude={*same, *_NOT_BESIDE}),
    }


@cache
def _transformers_version() -> str:
    return version("transformers")


def _rope_scaling(rope: Mapping[str, Any], architecture: Family) -> dict[str, Any]:
    """The key of transformers 4, which scales by a default of its own in some families where it is not there."""
    if rope["rope_type"] != "default":
        return {"rope_scaling": {**rope, "type": rope["rope_type"]}}
    return {} if architecture.rope is None else {"rope_scaling": None}


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
        "transformers_version": _transformers_version(),
    }


def from_transformers_config(content: Mapping[str, Any], origin: str = "config.json") -> ModelConfig:
    """The model that a config.json describes.

    Dropout of the attention is not modelled: it is warned of, since it changes training and nothing else.

    Args:
        content: of a config.json of transformers 4 or 5.
        origin: names the file in errors.

    Raises:
        UserError: another family, or a feature that this model does not have.
    """
    model = from_content(content, origin)
    if content.get("attention_dropout"):
        warnings.warn(
            f"{origin}: attention_dropout={content['attention_dropout']} is ignored: this model has no dropout",
            stacklevel=2,
        )
    return model
