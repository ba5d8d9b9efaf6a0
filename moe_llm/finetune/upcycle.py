"""Upcycling: a dense Mistral or Llama checkpoint becomes a Mixtral one, tensor by tensor.

Each expert is a copy of the dense feed-forward layer (Komatsuzaki et al. 2022). Mixtral's weights of the chosen
experts sum to 1, so the copies together compute what the one did, whatever the router says.

Granular (fine-grained upcycling, He et al. 2024): the layer's F hidden units are cut into m parts of F/m, and expert
g*m + p is part p of copy g. A token's m*k experts give m times the dense output if the weight of each part, summed
over the copies, is 1/m; so the down projection is multiplied by m. That holds for every token because the m experts
of a copy have the same row in the router (He et al.'s virtual groups): their logits are equal, the top m*k are k
whole copies, and each part has the same weight. One condition remains: the k-th and the next copy's logits differ for
the token. In fp32 they do for practical purposes; in bf16 logits are coarse, and a tie may choose parts of two copies.

Drop-upcycling (Nakamura et al. 2025): each expert draws anew a share of its hidden units, the same units in all three
matrices, from a normal distribution with the mean and deviation of what was there in each matrix.

D hidden, F width of the dense layer, E copies, m parts of each.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_llm.checkpoint.export import DTYPES, token_ids, write_model_files
from moe_llm.checkpoint.folder import model_config_file
from moe_llm.checkpoint.manifest import write_json
from moe_llm.checkpoint.plan import MODEL, ShardSet, file_set
from moe_llm.checkpoint.safetensors_io import Spec, TensorFiles, read_json
from moe_llm.config import ModelConfig
from moe_llm.config.base import parse_size
from moe_llm.data.files import publish
from moe_llm.data.tokenizer import copy_tokenizer
from moe_llm.errors import UserError
from moe_llm.families import hf
from moe_llm.families.card import model_card
from moe_llm.progress import tracked

_ARCHITECTURES = {"mistral": "MistralForCausalLM", "llama": "LlamaForCausalLM"}
# What their config.json means by leaving a key out, where it is not what Mixtral's means.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"rms_norm_eps": 1e-6, "sliding_window": 4096},
    "llama": {
        "intermediate_size": 11008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "sliding_window": None,
    },
}
_THETA = 10000.0  # both families' default
_DENSE = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}  # Mixtral's names and theirs
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_MAX_SHARD_SIZE = "5GB"
_WORDS = {dtype: word for word, dtype in DTYPES.items()}

_WITHOUT_EFFECT = (hf.OURS, *hf.DENSE_ALONE)  # what of it matters is looked at by itself


@dataclass(frozen=True)
class Recipe:
    """How experts are made.

    experts, top_k: copies of the dense layer, and how many of them a token passes through, before they are cut.
    noise: deviation of the Gaussian noise added to each expert's matrices, as a share of the matrix's own.
    reinit: share of each expert's hidden units that are drawn anew. granularity: parts a copy is cut into.
    """

    experts: int = 8
    top_k: int = 2
    noise: float = 0.0
    reinit: float = 0.0
    granularity: int = 1
    seed: int = 0


def upcycle(dense: str | Path, out: str | Path, recipe: Recipe) -> ModelConfig:
    """Write a Mixtral checkpoint made of a dense one; it is there whole or not at all. Holds one layer's matrices of
    the dense layer and one expert's at a time.

    Args:
        dense: a directory as transformers saves it, sharded or not. Its dtypes are kept.
        out: must not exist.

    Returns:
        The new architecture.

    Raises:
        UserError: another architecture, a part that Mixtral does not have, sizes that do not divide, missing or
            damaged tensors; nothing is written then.
    """
    dense, out = Path(dense), Path(out)
    if out.exists():
        raise UserError(f"OUT={str(out)!r} exists: name a new directory, or remove it")
    content = read_json(model_config_file(dense, f"DENSE_DIR={str(dense)!r}"))
    model = upcycled_config(content, recipe, str(dense / "config.json"))
    files = TensorFiles(dense)
    _check_tensors(files, content, model, recipe)
    with publish(out, field="OUT") as temporary:
        _write_weights(temporary, files, model, recipe)
        card = model_card(model, made=_made(recipe), sources=[str(dense)])
        write_model_files(temporary, model, token_ids(content), _word(files.dtype(_EMBEDDING)), card=card)
        copy_tokenizer(dense, temporary)
    return model


def _made(recipe: Recipe) -> str:
    """What the model card says."""
    parts = {
        "each cut into {granularity}": recipe.granularity > 1,
        "with noise of {noise:g} deviations": recipe.noise > 0,
        "{reinit:g} of the hidden units drawn anew": recipe.reinit > 0,
    }
    told = [
        "upcycled from a dense model: {experts} copies of its feed-forward layers",
        *(p for p, yes in parts.items() if yes),
    ]
    return ", ".join(told).format(**vars(recipe))


def upcycled_config(content: Mapping[str, Any], recipe: Recipe, origin: str) -> ModelConfig:
    """The architecture that a dense config.json becomes.

    Raises:
        UserError: names what Mixtral does not have, or what does not divide.
    """
    kind = str(content.get("model_type"))
    architectures = content.get("architectures") or [_ARCHITECTURES.get(kind)]
    if kind not in _ARCHITECTURES or architectures != [_ARCHITECTURES[kind]]:
        raise UserError(
            f"{origin}: model_type={kind!r} with architectures={architectures} cannot be upcycled: "
            f"give a checkpoint of {' or '.join(_ARCHITECTURES.values())}"
        )
    for key in ("attention_bias", "mlp_bias"):
        if content.get(key):
            raise UserError(f"{origin}: {key}=true cannot be upcycled: Mixtral has no biases, give another checkpoint")
    if content.get("layer_types") and len(set(content["layer_types"])) > 1:
        raise UserError(f"{origin}: layer_types differ, which Mixtral cannot express: give another checkpoint")
    filled = {**_DEFAULTS[kind], **{key: value for key, value in content.items() if key not in _WITHOUT_EFFECT}}
    if kind == "llama":
        filled["sliding_window"] = None  # Llama has none, whatever its file says
    width, m = filled.get("intermediate_size", 14336), recipe.granularity
    if width % m:
        raise UserError(f"--granularity {m} does not divide intermediate_size={width} of {origin}: use a divisor")
    if recipe.top_k > recipe.experts:
        raise UserError(f"--num-experts-per-tok {recipe.top_k} is above --num-local-experts {recipe.experts}: lower it")
    if not _has_theta(filled):
        filled["rope_theta"] = _THETA
    return hf.from_transformers_config(
        {
            **filled,
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            "intermediate_size": width // m,
            "num_local_experts": recipe.experts * m,
            "num_experts_per_tok": recipe.top_k * m,
            "router_aux_loss_coef": ModelConfig().router_aux_loss_coef,
            "router_jitter_noise": 0.0,
        },
        origin,
    )


def _has_theta(content: Mapping[str, Any]) -> bool:
    places = [content, *(content[key] for key in ("rope_scaling", "rope_parameters") if content.get(key))]
    return any(isinstance(place, dict) and place.get("rope_theta") is not None for place in places)


def _check_tensors(files: TensorFiles, content: Mapping[str, Any], model: ModelConfig, recipe: Recipe) -> None:
    """Demand exactly the dense model's tensors."""
    D, F = model.hidden_size, model.intermediate_size * recipe.granularity
    dense = {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}
    expected = {name: shape for name, shape in hf.parameter_shapes(model).items() if ".mlp." not in name}
    for i in range(model.num_hidden_layers):
        expected |= {f"model.layers.{i}.mlp.{name}.weight": shape for name, shape in dense.items()}
    tied = {_HEAD} if model.tie_word_embeddings else set()
    stored = {name for name in files.names() if not hf.is_derived(name)}
    problems = [
        f"{what} {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        for what, names in (
            ("missing", sorted(expected.keys() - stored)),
            ("unexpected", sorted(stored - expected.keys() - tied)),
            ("of another shape", sorted(n for n in expected.keys() & stored if files.shape(n) != expected[n])),
        )
        if names
    ]
    if problems:
        raise UserError(
            f"{files.directory} does not hold the tensors of its config.json ({content['model_type']}): "
            f"{'; '.join(problems)}: give a whole checkpoint without biases or adapters"
        )
    if tied & stored and not torch.equal(files.read(_HEAD), files.read(_EMBEDDING)):
        raise UserError(
            f"{files.directory} has tie_word_embeddings=true and a {_HEAD} that differs from {_EMBEDDING}: "
            "set tie_word_embeddings to false in its config.json"
        )
    for name in expected:
        _word(files.dtype(name), name)


def _word(dtype: torch.dtype, name: str = _EMBEDDING) -> str:
    if dtype not in _WORDS:
        raise UserError(f"tensor {name} has the dtype {dtype}: give a checkpoint in fp32, bf16 or fp16")
    return _WORDS[dtype]


def _write_weights(directory: Path, files: TensorFiles, model: ModelConfig, recipe: Recipe) -> None:
    pieces = [piece for name, shape in hf.parameter_shapes(model).items() for piece in hf.pieces(name, shape)]
    specs = [Spec(piece.name, piece.shape, files.dtype(_origin(piece.name))) for piece in pieces]
    plan = file_set(MODEL, [specs], 0, parse_size(_MAX_SHARD_SIZE))
    shards = ShardSet(directory, plan)
    try:
        for name, tensor in _tensors(files, [(piece.name, piece.shape) for piece in pieces], model, recipe):
            shards.write(name, tensor)
        shards.finish()
    except BaseException:
        shards.abort()
        raise
    if plan.index is not None:
        write_json(directory / f"{MODEL}.safetensors.index.json", plan.index)


def _split(name: str) -> tuple[str, str, str]:
    """Layer, expert and matrix of `model.layers.0.block_sparse_moe.experts.3.w1.weight`; "", "", "" of others."""
    layer, found, rest = name.partition(".block_sparse_moe.experts.")
    expert, _, matrix = rest.removesuffix(".weight").partition(".")
    return (layer, expert, matrix) if found else ("", "", "")


def _origin(name: str) -> str:
    """The dense tensor that a published one is made of; the router, which is not, has the up projection's dtype."""
    layer, _, matrix = _split(name)
    if layer:
        return f"{layer}.mlp.{_DENSE[matrix]}.weight"
    return name.replace(".block_sparse_moe.gate.", ".mlp.up_proj.")


def _tensors(
    files: TensorFiles, wanted: list[tuple[str, tuple[int, ...]]], model: ModelConfig, recipe: Recipe
) -> Iterator[tuple[str, Tensor]]:
    held: dict[str, Tensor] = {}  # the matrices of one dense layer: each is used by every expert
    for name, shape in tracked(wanted, "upcycling"):
        layer, expert, matrix = _split(name)
        if not layer:
            yield name, _router(name, shape, model, recipe) if ".gate." in name else files.read(name)
            continue
        origin = _origin(name)
        if origin not in held:
            held = {key: tensor for key, tensor in held.items() if key.startswith(f"{layer}.") and matrix != "w2"}
            held[origin] = files.read(origin)
        yield name, _matrix(held[origin], layer, int(expert), matrix, recipe)


def _router(name: str, shape: tuple[int, ...], model: ModelConfig, recipe: Recipe) -> Tensor:
    """(E*m, D): normal with the model's initial deviation; the m parts of a copy share a row."""
    rows = torch.randn(recipe.experts, shape[1], generator=_generator(recipe, name)) * model.initializer_range
    return rows.repeat_interleave(recipe.granularity, 0)


def _matrix(dense: Tensor, layer: str, expert: int, matrix: str, recipe: Recipe) -> Tensor:
    """One expert's matrix, (F/m, D) or, for the down projection w2, (D, F/m)."""
    units, m = (1, recipe.granularity) if matrix == "w2" else (0, recipe.granularity)
    width = dense.shape[units] // m
    part = dense.narrow(units, expert % m * width, width).float()
    if recipe.reinit:
        chosen = torch.randperm(width, generator=_generator(recipe, f"{layer}.{expert}.units"))
        chosen = chosen[: round(recipe.reinit * width)]
        old = part.index_select(units, chosen)
        if old.numel():
            fresh = torch.randn(old.shape, generator=_generator(recipe, f"{layer}.{expert}.{matrix}.reinit"))
            part = part.index_copy(units, chosen, old.mean() + old.std(correction=0) * fresh)
    if recipe.noise:
        noise = torch.randn(part.shape, generator=_generator(recipe, f"{layer}.{expert}.{matrix}.noise"))
        part = part + recipe.noise * part.std(correction=0) * noise
    return part * m if matrix == "w2" else part


def _generator(recipe: Recipe, name: str) -> torch.Generator:
    """Random numbers as a function of seed and name, so that the order of writing decides nothing."""
    digest = hashlib.sha256(f"{recipe.seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
