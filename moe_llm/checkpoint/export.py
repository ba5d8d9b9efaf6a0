"""What stands beside the weights in a transformers checkpoint: configurations and the tokenizer."""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from moe_llm.checkpoint.digests import FileRecord
from moe_llm.checkpoint.manifest import adopt_file, write_file, write_json
from moe_llm.config import ModelConfig
from moe_llm.data.tokenizer import GENERATION_FILE, base_generation, end_token_ids, save_tokenizer
from moe_llm.families import hf
from moe_llm.families.architectures import architecture_of
from moe_llm.families.card import CARD, model_card

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def token_ids(source: Any) -> dict[str, Any]:
    """bos_token_id, eos_token_id and pad_token_id of a tokenizer or of a config.json; None where unknown."""
    if isinstance(source, Mapping):
        return {key: source.get(key) for key in _TOKEN_IDS}
    return {key: getattr(source, key, None) for key in _TOKEN_IDS}


def _write_code(directory: Path) -> dict[str, FileRecord]:
    """The modelling code that `auto_map` in config.json names."""
    source = files("moe_llm.families.remote_code")
    return {
        name: write_file(directory / name, (source / name).read_text(encoding="utf-8"))
        for name in ("configuration_moe_llm.py", "modeling_moe_llm.py")
    }


def write_model_files(
    directory: Path,
    model: ModelConfig,
    ids: Mapping[str, Any],
    dtype: str,
    tokenizer: Any = None,
    card: str | None = None,
) -> dict[str, FileRecord]:
    """config.json, generation_config.json, the model card and the tokenizer's files; records by relative path.

    Args:
        ids: from `token_ids`.
        dtype: of the stored weights, a key of `DTYPES`.
        tokenizer: anything with transformers' `save_pretrained`; None: none.
        card: the model card; None: one that knows of no run.
    """
    before = set(directory.rglob("*"))
    if tokenizer is not None:
        save_tokenizer(tokenizer, directory)
    written = sorted(path for path in set(directory.rglob("*")) - before if path.is_file())
    return {
        **{str(path.relative_to(directory)): adopt_file(path) for path in written},
        **(_write_code(directory) if architecture_of(model).code else {}),
        CARD: write_file(directory / CARD, card or model_card(model)),
        "config.json": write_json(directory / "config.json", hf.to_transformers_config(model, dtype=dtype, **ids)),
        GENERATION_FILE: write_json(directory / GENERATION_FILE, _generation(model, ids, tokenizer)),
    }


def _generation(model: ModelConfig, ids: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """generation_config.json: that of the model which the tokenizer came with, where there is one, so that a tuned model
    stops where its base did; else one with every token that ends a text or a turn."""
    content = hf.generation_config(model, **dict(ids))
    if tokenizer is None:
        return content
    given = base_generation(tokenizer)
    if given:
        return content | {key: value for key, value in given.items() if key != "transformers_version"}
    ends = end_token_ids(tokenizer)
    return content | ({"eos_token_id": ends} if len(ends) > 1 else {})
