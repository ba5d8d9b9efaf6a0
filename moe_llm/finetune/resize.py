"""A checkpoint's embedding and head with more rows than are stored: `model.resize_embeddings`.

Each new row is the mean of the stored ones, so that a new token begins as the average token (Hewitt 2021, "Initializing
New Word Embeddings for Pretrained Language Models"): the softmax over the old tokens keeps its proportions.
"""

from collections.abc import Iterator

import torch

from moe_llm.checkpoint.safetensors_io import TensorFiles
from moe_llm.checkpoint.weights import Index, Weights

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def with_more_rows(files: TensorFiles, rows: int) -> Weights:
    """The weights of `files`, as if the matrices of the vocabulary had `rows` rows."""
    return _MoreRows(files, rows)


class _MoreRows(Weights):
    def __init__(self, files: TensorFiles, rows: int):
        super().__init__(files)
        self._rows = rows

    def parts(
        self, name: str, shape: tuple[int, ...], first_expert: int | None = None
    ) -> Iterator[tuple[Index, torch.Tensor]]:
        for index, part in super().parts(name, shape, first_expert):
            yield index, self._widened(part) if name in VOCABULARY else part

    def _widened(self, x_VD: torch.Tensor) -> torch.Tensor:
        mean_D = x_VD.mean(0, dtype=torch.float64).to(x_VD.dtype)
        return torch.cat([x_VD, mean_D.expand(self._rows - len(x_VD), -1)])
