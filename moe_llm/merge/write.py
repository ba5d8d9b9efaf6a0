"""The output directory: tensors streamed into shards, and the files beside them; complete or not there.

Everything goes into a temporary sibling that takes the output's name at the end and is removed if anything fails.
"""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from moe_llm.checkpoint.manifest import write_file, write_json
from moe_llm.checkpoint.plan import MODEL, FileSet, ShardSet, file_set
from moe_llm.checkpoint.safetensors_io import Spec, read_json
from moe_llm.config.base import parse_size
from moe_llm.data.files import publish
from moe_llm.data.tokenizer import GENERATION_FILE, copy_tokenizer, save_tokenizer
from moe_llm.errors import UserError
from moe_llm.families import hf
from moe_llm.families.architectures import FAMILIES
from moe_llm.families.card import CARD, model_card
from moe_llm.merge.job import Copy, Job
from moe_llm.merge.matching import write_matching
from moe_llm.merge.models import KINDS, pieces
from moe_llm.merge.plan import MergePlan
from moe_llm.merge.vocabulary import load_tokenizer
from moe_llm.progress import progress

RECIPE_FILE = "merge_recipe.yaml"
_SMALL_FILES = 64 << 20  # bytes set aside for a tokenizer and the configurations
_WORDS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def check_output(out: Path) -> None:
    """Refuse an output that would overwrite something.

    Raises:
        UserError: it is there and not an empty directory, or nothing can take its place.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"output {str(out)!r} exists already: give a directory that is not there yet, or an empty one")
    if out.is_symlink() or out.absolute() == Path.cwd():
        what = "a link" if out.is_symlink() else "the working directory"
        raise UserError(f"output {str(out)!r} is {what}, which cannot be replaced: give a new directory")


def write(plan: MergePlan, out: Path, recipe_text: str, max_shard_size: str = "5GB") -> None:
    """Compute and write a plan's output.

    Raises:
        UserError: an output that is in the way, or no space for it; nothing of it is left then.
    """
    check_output(out)
    jobs = [(job, pieces(plan.kind, job.name, job.shape)) for job in plan.tensors]
    specs = [Spec(piece.name, piece.shape, job.out_dtype) for job, parts in jobs for piece in parts]
    files = file_set(MODEL, [specs], 0, parse_size(max_shard_size))
    _check_space(out, files.nbytes)
    with publish(out, "output") as temporary:
        _write_tensors(jobs, temporary, files)
        if files.index is not None:
            write_json(temporary / f"{MODEL}.safetensors.index.json", files.index)
        _write_beside(plan, temporary)
        if plan.aligner is not None and plan.aligner.matches:
            write_matching(plan.aligner.matches, temporary)
        write_file(temporary / RECIPE_FILE, recipe_text)
        write_file(temporary / CARD, _card(plan, recipe_text, temporary / "config.json"))


def _check_space(out: Path, nbytes: int) -> None:
    there = next(parent for parent in out.absolute().parents if parent.is_dir())
    free, needed = shutil.disk_usage(there).free, nbytes + _SMALL_FILES
    if free < needed:
        raise UserError(
            f"output {str(out)!r} needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free: "
            "free some or choose another directory"
        )


def _write_tensors(jobs: list[tuple[Job | Copy, list[hf.Piece]]], directory: Path, files: FileSet) -> None:
    shards = ShardSet(directory, files)
    try:
        with progress("merging", files.nbytes, in_bytes=True) as advance:
            for job, parts in jobs:
                for piece, tensor in _cut(job, parts):
                    shards.write(piece.name, tensor)
                    advance(tensor.numel() * tensor.element_size())
        shards.finish()
    finally:
        shards.abort()  # without effect where all is written


def _cut(job: Job | Copy, parts: list[hf.Piece]) -> Iterator[tuple[hf.Piece, torch.Tensor]]:
    """The tensors that a job's result is written as; one of them is in memory at a time."""
    spans = job.result()
    span = torch.empty(0, dtype=job.out_dtype)
    for piece in parts:
        tensor, filled = torch.empty(math.prod(piece.shape), dtype=job.out_dtype), 0
        while filled < len(tensor):
            if not len(span):
                span = next(spans)
            taken = span[: len(tensor) - filled]
            tensor[filled : filled + len(taken)] = taken
            filled, span = filled + len(taken), span[len(taken) :]
        yield piece, tensor.view(piece.shape)
    assert not len(span), f"{job.name} is longer than its shape"
    assert next(spans, None) is None, f"{job.name} is longer than its shape"


def _write_beside(plan: MergePlan, directory: Path) -> None:
    """config.json, generation_config.json and the tokenizer."""
    given = {key: value for key, value in plan.donor.content.items() if key not in plan.left_out}
    content = {**given, **plan.changes, **_layer_settings(plan)}
    dtypes = [job.out_dtype for job in plan.tensors]
    word = _WORDS[max(dtypes, key=lambda dtype: (dtypes.count(dtype), dtype.itemsize))]
    content |= {"dtype": word, "torch_dtype": word}
    if plan.vocabulary is None:
        copy_tokenizer(plan.donor.directory, directory)
    elif (plan.donor.directory / GENERATION_FILE).is_file():
        shutil.copyfile(plan.donor.directory / GENERATION_FILE, directory / GENERATION_FILE)
    tokenizer = None
    if plan.vocabulary is not None:
        tokenizer = plan.vocabulary.tokenizer
        content |= _token_ids(plan, content)
    elif plan.chat_template is not None:
        tokenizer = load_tokenizer(plan.donor.directory)
    if tokenizer is not None:
        if plan.chat_template is not None:
            tokenizer.chat_template = plan.chat_template
        save_tokenizer(tokenizer, directory)
    if plan.vocabulary is not None and (directory / "generation_config.json").is_file():
        generation = json.loads((directory / "generation_config.json").read_text(encoding="utf-8"))
        write_json(directory / "generation_config.json", generation | _token_ids(plan, generation))
    write_json(directory / "config.json", content)


def _card(plan: MergePlan, recipe_text: str, config: Path) -> str:
    """The model card, of the models by their names on a hub alone."""
    method = yaml.safe_load(recipe_text).get("merge_method", "experts of dense models")
    known = plan.kind in FAMILIES
    model = hf.from_transformers_config(read_json(config), str(config)) if known else KINDS[plan.kind]
    return model_card(model, made=f"merged: {method}", sources=[model.reference for model in plan.models])


def _token_ids(plan: MergePlan, content: dict[str, Any]) -> dict[str, Any]:
    """The ids of special tokens in the output's vocabulary, where its tokenizer knows them. Where the donor ends at other
    tokens than its tokenizer's end of text, or at several, these stay ends, as far as the vocabulary has them."""
    assert plan.vocabulary is not None
    tokenizer = plan.vocabulary.tokenizer
    ids = {key: getattr(tokenizer, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    given = content.get("eos_token_id")
    if given is not None:
        tokens = load_tokenizer(plan.donor.directory).convert_ids_to_tokens(
            given if isinstance(given, list) else [given]
        )
        vocabulary = tokenizer.get_vocab()
        ends = [vocabulary[token] for token in tokens if token in vocabulary]
        if ends:
            ids["eos_token_id"] = ends if isinstance(given, list) else ends[0]
    return {key: value for key, value in ids.items() if value is not None}


def _layer_settings(plan: MergePlan) -> dict[str, Any]:
    """Lists in config.json with one entry a layer (layer_types), for the output's layers."""
    lists = {
        key: value for key, value in plan.donor.content.items()
        if isinstance(value, list) and len(value) == plan.donor.layers and key.startswith("layer")
    }  # fmt: skip
    if not plan.layers_from:
        return {}
    return _dense_layers(plan) | {
        key: [model.content.get(key, lists[key])[i] for model, i in plan.layers_from] for key in lists
    }


def _dense_layers(plan: MergePlan) -> dict[str, Any]:
    """Keys that say which of the output's layers have no experts.

    Raises:
        UserError: its family has no such layers there.
    """
    config = plan.donor.config
    dense = [at for at, (model, layer) in enumerate(plan.layers_from) if not model.has_experts(layer)]
    if config is None or not (dense or config.num_moe_layers < config.num_hidden_layers):
        return {}
    family = FAMILIES[plan.donor.kind]
    layers = {"num_hidden_layers": len(plan.layers_from), "mlp_only_layers": tuple(dense)}
    merged = config.model_copy(
        update={**layers, "first_k_dense_replace": 0, "moe_layer_frequency": 1, "layer_types": None}
    )
    if missing := family.cannot(merged):
        raise UserError(
            f"the output has dense layers {dense}, which no {family.architecture} has ({missing[0]}): give other slices"
        )
    keys = ("first_k_dense_replace", "decoder_sparse_step", "mlp_only_layers")
    return {key: value for key, value in family.write(merged).items() if key in keys}
