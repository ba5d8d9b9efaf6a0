"""Models of different tokenizers: their embeddings and heads brought to one vocabulary, row by row.

A token that a model has keeps the model's row. One that it lacks gets the base's row or, where the base lacks it
too, the mean over the models that have it; one that none has is 0. Padding rows beyond the vocabulary are the mean
of the others. As mergekit does it.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_llm.data import tokenizer as tokenizer_files
from moe_llm.errors import UserError
from moe_llm.merge.job import SPAN
from moe_llm.merge.models import EMBEDDING, HEAD, Model
from moe_llm.merge.rows import gather

VOCABULARY_TENSORS = (EMBEDDING, HEAD)


@dataclass(frozen=True)
class Vocabulary:
    """The output's tokenizer, how many rows its embeddings have, and where each model has each row.

    rows: by reference, the model's row of each token of the output, -1 where it has none: (tokens,).
    """

    tokenizer: Any
    size: int
    rows: dict[str, torch.Tensor]
    base: str | None

    def reader(self, model: Model, models: list[Model]) -> "Revocabularied":
        """`model` with the output's vocabulary; `models` are all that fill in for it."""
        return Revocabularied(self, model, models)


def build_vocabulary(
    source: str, models: list[Model], base: str | None, pad_to_multiple_of: int | None = None
) -> Vocabulary:
    """The vocabulary of `source`: `union`, `base` or a model.

    Args:
        models: of the recipe, the base or, without one, the first model first.

    Raises:
        UserError: a tokenizer that cannot be loaded, or two that share nothing.
    """
    tokenizers = {model.reference: load_tokenizer(model.directory) for model in models}
    first = models[0].reference
    known = {}
    for model in models:
        entries = tokenizers[model.reference].get_vocab().items()
        known[model.reference] = {token: i for token, i in entries if i < model.shapes[EMBEDDING][0]}
    for other in models[1:]:
        if not known[first].keys() & known[other.reference].keys():
            raise UserError(
                f"the vocabularies of {first} and {other.reference} share no token: merge models of like tokenizers"
            )
    if source == "union":
        tokenizer = _union(models[0], tokenizers, known)
    elif source == "base":
        tokenizer = tokenizers[first]
    else:
        tokenizer = tokenizers[source] if source in tokenizers else load_tokenizer(Model(source).directory)
    tokens = tokenizer.get_vocab()
    size = max(tokens.values()) + 1
    rows = {reference: torch.full((size,), -1) for reference in known}
    for token, i in tokens.items():
        for reference, entries in known.items():
            rows[reference][i] = entries.get(token, -1)
    multiple = pad_to_multiple_of or 1
    return Vocabulary(tokenizer, math.ceil(size / multiple) * multiple, rows, base)


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a checkpoint directory, as every command loads it."""
    try:
        return tokenizer_files.load_tokenizer(directory, needs_eos=False)
    except UserError as error:
        raise UserError(f"the tokenizer of {directory} cannot be loaded ({error}): give another directory") from error


def _union(base: Model, tokenizers: dict[str, Any], known: dict[str, dict[str, int]]) -> Any:
    """The base's tokenizer with the other models' tokens added, each model's in the order of its ids."""
    result = load_tokenizer(base.directory)
    have = set(result.get_vocab())
    for reference, tokenizer in tokenizers.items():
        added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
        for token, _ in sorted(known[reference].items(), key=lambda entry: entry[1]):
            if token not in have:
                result.add_tokens([added.get(token, token)])
                have.add(token)
    return result


class Revocabularied:
    """A model whose embedding and head have the output's rows."""

    def __init__(self, vocabulary: Vocabulary, model: Model, models: list[Model]):
        self._vocabulary, self._model, self._models = vocabulary, model, models
        self._means: dict[str, torch.Tensor] = {}
        self.shapes = model.shapes | {
            name: (vocabulary.size, *model.shapes[name][1:]) for name in VOCABULARY_TENSORS if name in model.shapes
        }

    def dtype(self, name: str) -> torch.dtype:
        return self._model.dtype(name)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name not in VOCABULARY_TENSORS:
            return self._model.read(name, start, stop)
        D = self.shapes[name][-1]
        first, last = start // D, math.ceil(stop / D)
        return self._rows(name, first, last).reshape(-1)[start - first * D : stop - first * D]

    def _rows(self, name: str, first: int, last: int) -> torch.Tensor:
        tokens = len(self._vocabulary.rows[self._model.reference])
        x_RD = self._tokens(name, first, min(last, tokens))
        if last > tokens:
            padding = self._mean(name).to(x_RD.dtype).expand(last - max(first, tokens), -1)
            x_RD = torch.cat([x_RD, padding])
        return x_RD

    def _tokens(self, name: str, first: int, last: int) -> torch.Tensor:
        rows = self._vocabulary.rows[self._model.reference][first:last]
        x_RD = torch.zeros(max(0, last - first), self.shapes[name][-1], dtype=self.dtype(name))
        x_RD[rows >= 0] = gather(self._model, name, rows[rows >= 0])
        lacking = first + (rows < 0).nonzero()[:, 0]
        if len(lacking):
            x_RD[lacking - first] = self._others(name, lacking).to(x_RD.dtype)
        return x_RD

    def _others(self, name: str, tokens: torch.Tensor) -> torch.Tensor:
        """Rows of tokens that this model lacks, fp32."""
        total_TD = torch.zeros(len(tokens), self.shapes[name][-1])
        count_T = torch.zeros(len(tokens), 1)
        base = None if self._vocabulary.base is None else self._vocabulary.rows.get(self._vocabulary.base)
        by_base = torch.zeros(len(tokens), dtype=torch.bool) if base is None else base[tokens] >= 0
        for model in self._models:
            rows = self._vocabulary.rows[model.reference][tokens]
            used = (rows >= 0) & (~by_base | (model.reference == self._vocabulary.base))
            total_TD[used] += gather(model, name, rows[used]).float()
            count_T[used] += 1
        return total_TD / count_T.clamp(min=1)

    def _mean(self, name: str) -> torch.Tensor:
        """Of the output's tokens, in this model's embedding or head."""
        if name in self._means:
            return self._means[name]
        tokens, D = len(self._vocabulary.rows[self._model.reference]), self.shapes[name][-1]
        total, step = torch.zeros(D, dtype=torch.float64), max(1, SPAN // D)
        for first in range(0, tokens, step):
            total += self._tokens(name, first, min(tokens, first + step)).double().sum(0)
        self._means[name] = (total / tokens).float()
        return self._means[name]
