"""Tiny Mixtral and Llama checkpoints with a tokenizer of words, and files that name them."""

from pathlib import Path

import torch
import yaml
from merge.merge_fakes import WORDS, Words, make_model, save

from moe_llm.ensemble.ensemble import Ensemble
from moe_llm.ensemble.recipe import parse_recipe

TEXT = "the cat sat on the mat and the dog ran on the cat\nthe dog sat and ran\na cat and a dog and a mat\n" * 4


def checkpoint(directory: Path, kind: str = "llama", seed: int = 0, words: list[str] = WORDS, **changes) -> str:
    """A model of random weights, clear in its opinions but not certain, in a directory with a tokenizer."""
    model = make_model(kind, seed, **{"vocab_size": len(words), "intermediate_size": 8, **changes})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(0.5 if "proj" in name else 1.0)
    save(model, directory)
    Words(words).save(directory)
    return str(directory)


def members(*models: str, **columns) -> list[dict]:
    """The `members` of a recipe; each column has a value for each of them."""
    return [{"model": model, **{key: values[i] for key, values in columns.items()}} for i, model in enumerate(models)]


def build(method: str, members: list[dict], **keys) -> Ensemble:
    return Ensemble(parse_recipe({"method": method, "members": members, **keys}))


def write(path: Path, method: str, members: list[dict], **keys) -> str:
    path.write_text(yaml.safe_dump({"method": method, "members": members, **keys}))
    return str(path)


def log_probs(model: str, ids: torch.Tensor) -> torch.Tensor:
    """(rows, tokens, vocabulary) by transformers alone."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(model)(input_ids=ids).logits.log_softmax(-1)
