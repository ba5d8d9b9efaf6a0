"""The checkpoint that a run begins with, `model.init_from`: its shape, its tokenizer and its weights.

Any directory that transformers loads as one of the families in `families/architectures.py`: the published layout,
transformers' own saves, in one file or many.
Importing this file loads no torch.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_core import PydanticCustomError

from moe_llm.config import Config, ModelConfig
from moe_llm.config.base import fields_by_key
from moe_llm.config.rope import with_one_spelling
from moe_llm.config.routers import DEFAULT_TYPE
from moe_llm.errors import UserError
from moe_llm.families import hf
from moe_llm.families.architectures import architecture_of, complete_section
from moe_llm.finetune.selection import trained_names

if TYPE_CHECKING:
    from moe_llm.checkpoint.weights import Weights
    from moe_llm.distributed.state import TrainedState

# What does not decide which function the weights compute, but is training's to choose: losses, noise, limits, and how far
# the rotary embeddings are stretched. All else is the checkpoint's.
_OPEN = frozenset(
    {
        "init_from",
        "resize_embeddings",
        "router",
        "router_aux_loss_coef",
        "router_aux_loss_scope",
        "balance_over",
        "router_z_loss_coef",
        "router_jitter_noise",
        "expert_dropout",
        "rope_parameters",
        "max_position_embeddings",
        "initializer_range",
    }
)
_DECISIVE = tuple(key for key in fields_by_key(ModelConfig) if key not in _OPEN)


def complete(raw: dict[str, Any]) -> None:
    """Fill a configuration that has `model.init_from` with what it leaves open: the model's shape from config.json, and
    the tokenizer; and one that has `model.architecture` with what that family has where nothing is said.

    Args:
        raw: as read from YAML; changed in place.

    Raises:
        UserError: no such checkpoint, another architecture, or a key that contradicts it.
    """
    model = raw.get("model")
    if not isinstance(model, dict):
        return
    directory = model.get("init_from")
    if not isinstance(directory, str) or not directory:
        raw["model"] = complete_section(model)
        return
    there, model = _described(directory), _one_spelling(model)
    # null means "not said", but for the window, of which it says that there is none
    said = {key: value for key, value in model.items() if value is not None or key == "sliding_window"}
    _check_agrees(_without_resized({key: said[key] for key in _DECISIVE if key in said}, said, there), there, directory)
    found = there.model_dump(mode="json")
    if isinstance(said.get("router"), dict) and said["router"].get("type", DEFAULT_TYPE) == found["router"]["type"]:
        said["router"] = {**found["router"], **said["router"]}
    if isinstance(said.get("rope_parameters"), dict):
        share = {"partial_rotary_factor": there.rope_parameters.partial_rotary_factor}
        said["rope_parameters"] = share | said["rope_parameters"]
    raw["model"] = {**found, **said}
    tokenizer = raw.get("tokenizer") or {}
    if isinstance(tokenizer, dict) and tokenizer.get("path") is None:
        raw["tokenizer"] = {**tokenizer, "path": str(Path(directory).expanduser())}


def check_origin(config: Config) -> None:
    """Refuse a checkpoint that is not of the model's shape, from config.json and the headers of its files alone; and
    routers that could not be evaluated, because neither it nor training gives them their buffers.

    Raises:
        UserError: names the key or the tensor.
    """
    directory, weights = config.model.init_from, None
    if directory is not None:
        there = _described(directory)
        _check_agrees(_without_resized(_decisive(config.model), config.model.model_dump(), there), there, directory)
        weights = _open(config.model)
    router = config.model.router
    if not router.evaluates_by_buffers or any(map(hf.is_router, trained_names(config))):
        return
    if weights is None or not all(map(weights.has, hf.buffer_shapes(config.model))):
        buffers = " and ".join(router.buffer_shapes(config.model))
        absent = "" if directory is None else f"not in model.init_from={directory!r} and is "
        raise UserError(
            f"model.router.type={router.type} evaluates by each router's {buffers}, which is {absent}set only while "
            "routers are trained, and this run leaves them as they are: train routers too, or use another type"
        )


def load_origin(state: "TrainedState", model: ModelConfig) -> None:
    """Give a model in training the weights of `model.init_from`. Collective.

    Each rank reads the experts that it holds and no others, and of the rest everything; no more than one parameter is
    in memory beside the model. Adapters, if there are any, are made to add nothing, and the files' hashes taken.

    Raises:
        UserError: on every rank, before anything is changed: missing, damaged, unexpected or misshapen tensors.
    """
    import torch

    from moe_llm.checkpoint.frozen import write_weight
    from moe_llm.checkpoint.manifest import fingerprints
    from moe_llm.checkpoint.ranks import together

    weights, adapted = together(state, lambda: _open(model)), False
    for entry in state.entries():
        absent = not (entry.adapter or hf.is_expert(entry.name) or weights.has(entry.name))
        if absent and not entry.buffer:  # transformers leaves out what only training needs, which begins at zero
            state.write(entry.name, "weight", torch.zeros(entry.shape))
        elif not entry.adapter and not absent:  # another router's checkpoint has none of this one's buffers
            write_weight(state, entry, weights, weights)
        if entry.adapted is not None:
            state.write(entry.adapted.b, "weight", torch.zeros_like(state.read(entry.adapted.b, "weight")))
            adapted = True
    if adapted:
        state.base_files = fingerprints(weights.files.directory, weights.files.file_names(), state)


def _open(model: ModelConfig) -> "Weights":
    from moe_llm.checkpoint.plan import MODEL
    from moe_llm.checkpoint.pretrained import check_weights
    from moe_llm.checkpoint.safetensors_io import TensorFiles
    from moe_llm.checkpoint.weights import Weights
    from moe_llm.finetune.resize import with_more_rows

    files = TensorFiles(Path(str(model.init_from)).expanduser(), MODEL)
    stored = model.model_copy(update={"vocab_size": rows_there(model)}) if model.resize_embeddings else model
    weights = (
        Weights(files) if stored.vocab_size == model.vocab_size else with_more_rows(files, model.resolved_vocab_size)
    )
    shapes = weights.without_unused(hf.parameter_shapes(stored), architecture_of(model).dispensable)
    check_weights(weights, shapes, optional=map(hf.published_name, hf.buffer_shapes(model)))
    return weights


def _one_spelling(model: dict[str, Any]) -> dict[str, Any]:
    """The section with the rotary embeddings' keys under one name each; what is given twice is left to be refused."""
    try:
        return with_one_spelling(model)
    except PydanticCustomError:
        return model


def rows_there(model: ModelConfig) -> int | None:
    """Rows of the embedding of `model.init_from`, by its config.json; None without one."""
    return None if model.init_from is None else _described(model.init_from).vocab_size


def _without_resized(given: dict[str, Any], said: dict[str, Any], there: ModelConfig) -> dict[str, Any]:
    """What has to agree with the checkpoint: not a larger number of rows, where rows may be added."""
    rows = given.get("vocab_size")
    if said.get("resize_embeddings") is True and isinstance(rows, int) and rows >= (there.vocab_size or 0):
        return {key: value for key, value in given.items() if key != "vocab_size"}
    return given


def _described(directory: str) -> ModelConfig:
    """The model that a checkpoint's config.json describes."""
    from moe_llm.checkpoint.folder import model_config_file
    from moe_llm.checkpoint.safetensors_io import read_json

    file = model_config_file(Path(directory).expanduser(), f"model.init_from={directory!r}")
    return hf.from_transformers_config(read_json(file), f"model.init_from: {file}")


def _decisive(model: ModelConfig) -> dict[str, Any]:
    """With what null stands for."""
    resolved = {"num_key_value_heads": model.kv_heads, "head_dim": model.attention_head_dim}
    return {key: resolved.get(key, getattr(model, key)) for key in _DECISIVE}


def _check_agrees(given: dict[str, Any], there: ModelConfig, directory: str) -> None:
    found = _decisive(there)
    for key, value in given.items():
        if (tuple(value) if isinstance(value, list) else value) != found[key]:
            raise UserError(
                f"model.{key}={value!r} contradicts model.init_from={directory!r}, whose {key} is {found[key]!r}: "
                "remove the key, or begin with another checkpoint"
            )
