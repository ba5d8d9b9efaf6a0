"""The model with its way in and out: from any Mixtral checkpoint directory, and to one.

A directory written here, by transformers or by Mistral AI loads alike; tensors go one at a time.
"""

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import torch

from moe_llm.atomic import sync_directory
from moe_llm.checkpoint.export import DTYPES, token_ids, write_model_files
from moe_llm.checkpoint.folder import model_config_file
from moe_llm.checkpoint.manifest import write_json
from moe_llm.checkpoint.plan import MODEL, ShardSet, file_set
from moe_llm.checkpoint.safetensors_io import Spec, TensorFiles, read_json
from moe_llm.checkpoint.weights import Weights
from moe_llm.config import ModelConfig
from moe_llm.config.base import parse_size
from moe_llm.errors import UserError
from moe_llm.families import hf, layout
from moe_llm.families.architectures import architecture_of
from moe_llm.model.decoder import MoEDecoder
from moe_llm.model.init import materialize
from moe_llm.progress import progress, tracked

_WORDS = {dtype: word for word, dtype in DTYPES.items()}
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class MoEForCausalLM(MoEDecoder):
    """`MoEDecoder` with `from_pretrained` and `save_pretrained`.

    token_ids: bos_token_id, eos_token_id and pad_token_id, as far as known.
    """

    def __init__(self, config: ModelConfig, ids: Mapping[str, Any] | None = None):
        super().__init__(config)
        self.token_ids = token_ids(ids)

    @classmethod
    @progress("loading the model")
    def from_pretrained(cls, directory: str | Path, dtype: torch.dtype | str | None = None) -> Self:
        """A model on the CPU, in evaluation mode as transformers gives it.

        Args:
            directory: with config.json and safetensors.
            dtype: a torch dtype or `fp32`, `bf16`, `fp16`; None: as stored.

        Raises:
            UserError: no such directory, another architecture, or missing, damaged, unexpected or misshapen
                tensors.
        """
        config_file = model_config_file(directory, repr(str(directory)))
        content = read_json(config_file)
        config = hf.from_transformers_config(content, str(config_file))
        weights = Weights(TensorFiles(directory, MODEL))
        with torch.device("meta"):
            model = cls(config, token_ids(content))
        buffers = {hf.published_name(name) for name in hf.buffer_shapes(config)}
        model.to(_as_dtype(dtype) or weights.widest_dtype(without=buffers))
        materialize(model)
        _fill(model, weights)
        return model.eval()

    def save_pretrained(
        self,
        directory: str | Path,
        tokenizer: Any = None,
        dtype: torch.dtype | str | None = None,
        max_shard_size: str = "5GB",
    ) -> None:
        """Write a checkpoint directory that transformers loads; a model that is there is replaced.

        Everything is complete under other names before anything is replaced. Then config.json goes first and comes
        last, so that what a crash leaves in between is refused, and never read as a mixture of two models.

        Args:
            tokenizer: anything with transformers' `save_pretrained` and token ids; None: the model's own ids.
            dtype: of the stored weights; None: the model's.
            max_shard_size: of a file, e.g. "5GB".
        """
        shapes = {name: tuple(p.shape) for name, p in self.named_parameters()}
        assert shapes == hf.parameter_shapes(self.config), "the model does not hold all of its experts"
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        stored = _as_dtype(dtype) or self.lm_head.weight.dtype
        ids = self.token_ids if tokenizer is None else token_ids(tokenizer)
        with tempfile.TemporaryDirectory(prefix=".tmp-save-", dir=directory) as folder:
            new = Path(folder)
            _write_weights(self, new, stored, parse_size(max_shard_size))
            write_model_files(new, self.config, ids, _WORDS[stored], tokenizer)
            _replace_files(directory, new)


def check_weights(weights: Weights, shapes: Mapping[str, tuple[int, ...]], optional: Iterable[str] = ()) -> None:
    """Demand a whole model's tensors; beside tied embeddings, a head of their values is no mistake.

    optional: published names of others that may be there.

    Raises:
        UserError: missing, unexpected or misshapen tensors, or a head that is none.
    """
    tied = _HEAD not in shapes and weights.has(_HEAD)
    weights.check(shapes, optional=[*optional, *([_HEAD] if tied else [])])
    if tied and not torch.equal(*(weights.read(name, shapes[_EMBEDDING]) for name in (_HEAD, _EMBEDDING))):
        raise UserError(
            f"{weights.files.directory} has tie_word_embeddings=true and a {_HEAD} that differs from "
            f"{_EMBEDDING}: set tie_word_embeddings to false in its config.json"
        )


@torch.no_grad()
def _fill(model: MoEDecoder, weights: Weights) -> None:
    """Give a whole model its parameters, one matrix at a time, cast to what they are.

    Raises:
        UserError: missing, damaged, unexpected or misshapen tensors.
    """
    parameters = dict(model.named_parameters()) | dict(model.named_buffers())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    stored = weights.without_unused(shapes, architecture_of(model.config).dispensable)
    check_weights(weights, stored)
    for name, parameter in tracked(parameters.items(), "loading"):
        if name not in stored:  # what only training needs begins where a new model's does
            parameter.zero_()
            continue
        for index, part in weights.parts(name, shapes[name], 0):
            parameter[index] = part


def _as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or dtype in _WORDS:
        return dtype
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is not a dtype of weights: use one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _replace_files(directory: Path, new: Path) -> None:
    """Move what is in `new` into `directory`, in place of the model there."""
    config = "config.json"
    (directory / config).unlink(missing_ok=True)
    sync_directory(directory)
    for file in directory.glob(f"{MODEL}*.safetensors*"):  # loaders would take those of an earlier save for this one's
        file.unlink()
    for path in sorted(new.iterdir(), key=lambda path: path.name == config):
        target = directory / path.name
        if path.name == config:
            sync_directory(directory)
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
    sync_directory(directory)


def _write_weights(model: MoEDecoder, directory: Path, dtype: torch.dtype, max_bytes: int) -> None:
    family = architecture_of(model.config)
    buffers = {name for name, _ in model.named_buffers()}
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    specs = [
        Spec(stored, shape, torch.float32 if name in buffers else dtype)
        for name, tensor in tensors.items()
        for stored, shape in layout.stored_shapes(family, name, tuple(tensor.shape))
    ]
    contents = (part for name, tensor in tensors.items() for part in layout.stored_tensors(family, name, tensor))
    files = file_set(MODEL, [specs], 0, max_bytes)
    shards = ShardSet(directory, files)
    for spec, content in zip(tracked(specs, "writing weights"), contents):
        shards.write(spec.name, content)
    shards.finish()
    if files.index is not None:
        write_json(directory / f"{MODEL}.safetensors.index.json", files.index)
