"""A checkpoint directory's tensors under the names of transformers 5, in spans of elements.

Experts of a Mixtral are stacked by name, whether they are on disk (`experts.gate_up_proj`, as transformers 5 holds
them) or not (`experts.0.w1.weight`, as published). In either case the elements lie in one order, so that a span of
the stacked tensor is a few spans of stored ones.
"""

import math
import re
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_llm.checkpoint.folder import check_checkpoint_directory, model_config_file
from moe_llm.checkpoint.plan import MODEL
from moe_llm.checkpoint.safetensors_io import TensorFiles, read_json
from moe_llm.checkpoint.weights import Weights, check_finite
from moe_llm.errors import UserError
from moe_llm.families import hf
from moe_llm.families.architectures import FAMILIES, architecture_of, check_quantization

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
KINDS = {
    **{kind: family.architecture for kind, family in FAMILIES.items()},
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
}
ATTENTION = (
    "input_layernorm.weight",
    *(f"self_attn.{x}_proj.weight" for x in "qkvo"),
    "post_attention_layernorm.weight",
)
MIXTURE = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight")
DENSE = tuple(f"mlp.{x}_proj.weight" for x in ("up", "gate", "down"))
BIASES = tuple(f"{x}_proj.bias" for x in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o",
                                          "mlp.up", "mlp.gate", "mlp.down"))  # fmt: skip
_EXPERT = re.compile(r"(?P<layer>.*)\.block_sparse_moe\.experts\.(?P<expert>\d+)\.(?P<matrix>w[123])\.weight")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def layer_tensor(layer: int, suffix: str) -> str:
    """Name of a layer's tensor."""
    return f"model.layers.{layer}.{suffix}"


def pieces(kind: str, name: str, shape: tuple[int, ...]) -> list[hf.Piece]:
    """The tensors that a tensor is written as, in the order in which they lie in it."""
    if kind not in FAMILIES:
        return [hf.Piece(name, shape, ...)]
    family = FAMILIES[kind]
    whole = [hf.Piece(hf.published_name(name), shape, ...)] if family.stacked else hf.pieces(name, shape)
    return [hf.Piece(family.stored_name(piece.name), piece.shape, piece.index) for piece in whole]


@dataclass(frozen=True)
class _Segment:
    """`count` elements from `offset` on of a stored tensor, which begin at `start` of the stacked one."""

    start: int
    stored: str
    count: int


class Model:
    """One model of a recipe, a `Reader`.

    Experts that a family keeps in one tensor, as GPT-OSS does, stay in its layout.

    reference: as the recipe names it. config: what config.json describes, None of dense models. content: of its config.json. layers: how many. tied: whether the head is the
    embedding, which can then be read under both names.

    Raises:
        UserError: no checkpoint there, another architecture, or tensors that do not make one.
    """

    def __init__(self, reference: str):
        self.reference, self.directory = reference, find(reference)
        check_checkpoint_directory(self.directory)
        self.content = read_json(self.directory / "config.json")
        self.kind = self._kind()
        self.layers = self._number("num_hidden_layers")
        for key in ("hidden_size", "num_attention_heads"):
            self._number(key)
        self.config = None
        if self.kind in FAMILIES:
            self.config = hf.from_transformers_config(self.content, str(self.directory / "config.json"))
        self.biases = () if self.config else BIASES
        self._buffers = hf.buffer_shapes(self.config) if self.config else {}
        self.files = TensorFiles(self.directory, MODEL)
        self._segments: dict[str, list[_Segment]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        weights, self._parameters = Weights(self.files, dense=self.config is None), dict[str, tuple[int, ...]]()
        if self.config is not None:
            shapes, unused = hf.parameter_shapes(self.config), architecture_of(self.config).dispensable
            self._parameters = weights.without_unused(shapes, unused)
        self._index(weights)
        self.tied = bool(self.content.get("tie_word_embeddings"))
        if self.tied and EMBEDDING in self.shapes:
            self.shapes[HEAD], self._segments[HEAD] = self.shapes[EMBEDDING], self._segments[EMBEDDING]
        self._check()

    def dtype(self, name: str) -> torch.dtype:
        return self.files.dtype(self._segments[name][0].stored)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        segments = self._segments[name]
        i = bisect_right(segments, start, key=lambda segment: segment.start) - 1
        parts = []
        while start < stop:
            segment = segments[i]
            count = min(stop, segment.start + segment.count) - start
            part = self.files.read_span(segment.stored, start - segment.start, count)
            check_finite(part, segment.stored, self.files.file(segment.stored))
            parts.append(part)
            start, i = start + count, i + 1
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0, dtype=self.dtype(name))

    def layer_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Shapes of a layer's tensors by suffix."""
        prefix = layer_tensor(layer, "")
        return {
            suffix: self.shapes[prefix + suffix] for suffix in self._suffixes(layer) if prefix + suffix in self.shapes
        }

    def has_experts(self, layer: int) -> bool:
        return self.config is not None and layer in self.config.moe_layers

    def is_buffer(self, name: str) -> bool:
        """Whether a tensor is a router's buffer, which is fp32 whatever the weights are."""
        return self.config is not None and name in self._buffers

    def _suffixes(self, layer: int) -> list[str]:
        if self.config is None:
            return [*ATTENTION, *DENSE, *BIASES]
        prefix = layer_tensor(layer, "")
        names = [*self._parameters, *self._buffers]
        return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]

    def _number(self, key: str) -> int:
        value = self.content.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            origin = self.directory / "config.json"
            raise UserError(f"{origin}: {key}={value!r} is no number from 1 upwards: correct it")
        return value

    def _kind(self) -> str:
        origin, kind = self.directory / "config.json", self.content.get("model_type")
        named = self.content.get("architectures") or [KINDS.get(str(kind))]
        if kind not in KINDS or named != [KINDS[kind]]:
            raise UserError(
                f"{origin}: model_type={kind!r} with architectures={named} cannot be merged: "
                f"give one of {', '.join(KINDS.values())}"
            )
        check_quantization(self.content, str(origin))
        return kind

    def _index(self, weights: Weights) -> None:
        """From stored tensors to stacked ones."""
        experts: dict[str, dict[str, tuple[int, ...]]] = {}  # layer -> matrix of expert 0 -> shape
        counts: dict[str, int] = {}
        single = {}
        for published, stored in weights.stored().items():
            match = _EXPERT.fullmatch(published)
            if match is None:
                single[published.replace(".block_sparse_moe.", ".mlp.")] = stored
                continue
            layer, expert = match["layer"] + ".mlp.experts.", int(match["expert"])
            counts[layer] = max(counts.get(layer, 0), expert + 1)
            if expert == 0:
                experts.setdefault(layer, {})[match["matrix"]] = self.files.shape(stored)
        for name, stored in single.items():
            self.shapes[name] = self.files.shape(stored)
            self._segments[name] = [_Segment(0, stored, math.prod(self.shapes[name]))]
        for layer, count in counts.items():
            (F, D), (_, down) = experts.get(layer, {}).get("w1", (0, 0)), experts.get(layer, {}).get("w2", (0, 0))
            self._stack(weights, f"{layer}gate_up_proj", (count, 2 * F, D))
            self._stack(weights, f"{layer}down_proj", (count, D, down))

    def _stack(self, weights: Weights, name: str, shape: tuple[int, ...]) -> None:
        segments, start, stored = [], 0, weights.stored()
        for piece in hf.pieces(name, shape):
            if piece.name not in stored:
                raise UserError(f"{self.directory} lacks the tensor {piece.name}: give a whole checkpoint")
            found = self.files.shape(stored[piece.name])
            if found != piece.shape:
                raise UserError(
                    f"{self.directory}: tensor {piece.name} is {list(found)} instead of {list(piece.shape)}, which "
                    "expert 0 has: give a sound checkpoint"
                )
            segments.append(_Segment(start, stored[piece.name], math.prod(piece.shape)))
            start += segments[-1].count
        self.shapes[name], self._segments[name] = shape, segments

    def _check(self) -> None:
        layers = [layer_tensor(i, suffix) for i in range(self.layers) for suffix in self._suffixes(i)]
        optional = {layer_tensor(i, bias) for i in range(self.layers) for bias in self.biases}
        needed = [EMBEDDING, NORM, HEAD, *(name for name in layers if name not in optional)]
        for name in needed:
            if name not in self.shapes:
                raise UserError(f"{self.directory} lacks the tensor {name}: give a whole checkpoint")
        known = {*needed, *layers}
        for name in self.shapes:
            if name not in known:
                raise UserError(f"{self.directory} holds the tensor {name}, which no {KINDS[self.kind]} has: remove it")
            if self.dtype(name) not in _FLOATS:
                raise UserError(f"{self.directory}: tensor {name} is {self.dtype(name)}: give fp32, bf16 or fp16")
        if self.config is not None:
            experts = self.shapes[layer_tensor(self.config.moe_layers[0], MIXTURE[2])][0]
            said = self.config.num_local_experts
            if said != experts:
                raise UserError(
                    f"{self.directory / 'config.json'}: num_local_experts={said}, and the weights hold {experts}: "
                    "correct it"
                )


def find(reference: str) -> Path:
    """The directory that a recipe means: a path or, fetched where it is not cached, a hub name (`name@revision`)."""
    path = Path(reference).expanduser()
    if (path / "config.json").is_file():
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", reference):
        if "+" in reference and not path.exists():
            raise UserError(f"model {reference!r} adds a LoRA: merge it into its base first")
        return model_config_file(path, f"model {reference!r}", ", or a hub name").parent
    return _fetch(*reference.partition("@")[::2])


def _fetch(name: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        wanted = ["*.json", "*.safetensors", "tokenizer*", "*.jinja"]
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model {name!r} is no directory here and cannot be fetched from the hub: {reason}") from error


def check_alike(models: list[Model]) -> list[str]:
    """Refuse models whose equal shapes mean different things; say where the first one's settings are used.

    Raises:
        UserError: another architecture, or other heads.
    """
    first, notes = models[0], []
    for other in models[1:]:
        if other.kind != first.kind:
            raise UserError(
                f"{other.reference} is a {KINDS[other.kind]} and {first.reference} a {KINDS[first.kind]}: "
                "give models of one architecture"
            )
        for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act"):
            ours, theirs = _setting(first.content, key), _setting(other.content, key)
            if ours != theirs:
                raise UserError(
                    f"{key} is {theirs} in {other.reference} and {ours} in {first.reference}: "
                    "give models of one architecture"
                )
        for key in _FUNCTION if first.config else _FUNCTION_OF_DENSE:
            ours, theirs = (getattr(m.config, key) if m.config else _setting(m.content, key) for m in (first, other))
            if key == "rope_parameters" and ours != theirs:
                key, ours, theirs = "rope scaling", *(_scaling(model.content) for model in (first, other))
            if ours != theirs:
                notes.append(f"{key} is {theirs} in {other.reference}; {ours} of {first.reference} is kept")
    return notes


# Settings that change a model's function and no tensor's shape: of dense models, and of mixtures.
_FUNCTION_OF_DENSE = ("rms_norm_eps", "rope_theta", "rope_parameters", "max_position_embeddings", "sliding_window")
_FUNCTION = (
    "num_experts_per_tok",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_parameters",
    "sliding_window",
    "layer_types",
    "swiglu_limit",
    "swiglu_alpha",
    "expert_activations",
    "router",
)

# What the config.json of a dense model means by leaving a key out.
_MEANT: dict[str, dict[str, Any]] = {
    "mistral": {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "sliding_window": 4096},
    "llama": {"rms_norm_eps": 1e-6, "rope_theta": 1e4},
}


def other_tokens(models: list[Model]) -> list[str]:
    """One sentence for each model whose embeddings are as many as the first one's and mean other tokens."""
    first = models[0]
    ours, notes = _tokens(first.directory), []
    for other in models[1:]:
        theirs = _tokens(other.directory)
        if None not in (ours, theirs) and ours != theirs and first.shapes[EMBEDDING] == other.shapes[EMBEDDING]:
            notes.append(
                f"{other.reference} and {first.reference} have vocabularies of one size with other tokens, so rows of "
                "their embeddings that mean different tokens are merged: set tokenizer_source: union"
            )
    return notes


def _tokens(directory: Path) -> Any:
    """What tells a tokenizer's vocabulary from another one's; None where no file does."""
    if (directory / "tokenizer.json").is_file():
        content = read_json(directory / "tokenizer.json")
        model = content.get("model") or {}
        added = [(token.get("id"), token.get("content")) for token in content.get("added_tokens") or []]
        return model.get("vocab"), sorted(added, key=str)
    file = directory / "tokenizer.model"
    return file.read_bytes() if file.is_file() else None


def _setting(content: dict[str, Any], key: str) -> Any:
    """A setting of a config.json, where leaving it out means the same as saying it."""
    kind, value = str(content.get("model_type")), content.get(key)
    if key == "num_key_value_heads" and value is None:
        return content.get("num_attention_heads")
    if key == "head_dim" and value is None:
        return content.get("hidden_size", 0) // max(1, content.get("num_attention_heads") or 1)
    if key == "rope_parameters":
        return _scaling(content)
    if key == "rope_theta" and value is None:
        value = (content.get("rope_parameters") or {}).get("rope_theta")
    if key == "sliding_window":
        return window(content)
    if key == "hidden_act":
        return {"swish": "silu", None: "silu"}.get(value, value)
    return _MEANT.get(kind, {}).get(key) if value is None else value


def window(content: dict[str, Any]) -> int | None:
    """`sliding_window` as the config.json of a dense model means it; Llama has none, whatever its file says."""
    kind = content["model_type"]
    return None if kind == "llama" else content.get("sliding_window", _MEANT[kind]["sliding_window"])


def _scaling(content: dict[str, Any]) -> str:
    """Of the rotary embeddings, in words that are the same for the same scaling in either version's keys."""
    given = content.get("rope_scaling") or content.get("rope_parameters") or {}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return "none"
    rest = {key: given[key] for key in sorted(given) if key not in ("type", "rope_type", "rope_theta")}
    return f"{kind} ({', '.join(f'{key}={value}' for key, value in rest.items())})"
