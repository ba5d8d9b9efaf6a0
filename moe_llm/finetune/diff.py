"""`moe-llm diff BASE TUNED`: what has changed between two checkpoints of one model, by part, layer and expert.

Both are read side by side, one matrix at a time, whatever their layouts and shards.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moe_llm.checkpoint.folder import check_checkpoint_directory
from moe_llm.checkpoint.plan import MODEL
from moe_llm.checkpoint.pretrained import check_weights
from moe_llm.checkpoint.safetensors_io import TensorFiles, read_json
from moe_llm.checkpoint.weights import Weights
from moe_llm.config import ModelConfig
from moe_llm.errors import UserError
from moe_llm.families import hf
from moe_llm.families.architectures import architecture_of
from moe_llm.finetune.selection import part_of
from moe_llm.progress import tracked

if TYPE_CHECKING:
    from rich.table import Table

_SLICE = 1 << 22  # elements compared at a time, in fp64
PARTS = ("embed_tokens", "attention", "router", "experts", "shared_experts", "dense_mlp", "norms", "lm_head")


@dataclass
class Change:
    """Of a group of matrices: how many, of how many elements, and how many are the same to the byte, and in value, in
    whichever dtypes they are stored. Sums are over squares: norm of the base and of the change."""

    matrices: int = 0
    elements: int = 0
    same_bytes: int = 0
    same_values: int = 0
    base_square: float = 0.0
    change_square: float = 0.0

    def add(self, other: "Change") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def row(self) -> dict[str, Any]:
        """For people and JSON: `change` is the Euclidean norm of tuned - base, `relative` that over base's (null where
        base is zero)."""
        counts = {k: v for k, v in asdict(self).items() if not k.endswith("_square")}
        base, change = math.sqrt(self.base_square), math.sqrt(self.change_square)
        relative = change / base if base else 0.0 if not change else None
        return {**counts, "base_norm": base, "change": change, "relative": relative}


def diff(base: str | Path, tuned: str | Path, *, layers: bool = False, experts: bool = False) -> list[dict[str, Any]]:
    """A row for each part of the model; with `layers` for each layer's parts, with `experts` for each expert.

    Keys: part, layer and expert (null where all of them are meant), and those of `Change.row`.

    Raises:
        UserError: no checkpoints, of different shapes, or with missing or damaged tensors.
    """
    (config, before), (_, after) = _open_both(base, tuned)
    rows: dict[tuple, Change] = {}
    for name, shape in tracked(_shapes(config).items(), "comparing"):
        if not hf.is_expert(name) and not (before.has(name) and after.has(name)):
            continue  # needed in training alone, and left out by transformers
        part, layer = part_of(name), int(name.split(".")[2]) if ".layers." in name else None
        for expert, change in _changes(name, shape, before, after):
            key = (part, layer if layers else None, expert if experts else None)
            rows.setdefault(key, Change()).add(change)
    order = sorted(
        rows, key=lambda key: (PARTS.index(key[0]), -1 if key[1] is None else key[1], -1 if key[2] is None else key[2])
    )
    return [
        {"part": part, "layer": layer, "expert": expert, **rows[part, layer, expert].row()}
        for part, layer, expert in order
    ]


def _open_both(base: str | Path, tuned: str | Path) -> list[tuple[ModelConfig, Weights]]:
    for directory in (base, tuned):
        check_checkpoint_directory(directory)
    files = [Path(directory) / "config.json" for directory in (base, tuned)]
    configs = [hf.from_transformers_config(read_json(file), str(file)) for file in files]
    shapes = [_shapes(config) for config in configs]
    for name in [*shapes[0], *shapes[1]]:
        if shapes[0].get(name) != shapes[1].get(name):
            raise UserError(
                f"{name} is {_shown(shapes[0].get(name))} in {base} and {_shown(shapes[1].get(name))} in {tuned}: "
                "give two checkpoints of one model"
            )
    opened = [Weights(TensorFiles(Path(directory), MODEL)) for directory in (base, tuned)]
    for weights, config in zip(opened, configs):
        check_weights(weights, weights.without_unused(shapes[0], architecture_of(config).dispensable))
    return list(zip(configs, opened))


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of all that a checkpoint holds of the model: parameters, and the routers' buffers."""
    return hf.parameter_shapes(config) | hf.buffer_shapes(config)


def _shown(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def _changes(name: str, shape: tuple[int, ...], before: Weights, after: Weights) -> Iterator[tuple[int | None, Change]]:
    """(expert, change) of a parameter, an expert at a time where it has them."""
    if not hf.is_expert(name):
        yield None, compare(before.as_stored(name, shape), after.as_stored(name, shape))
        return
    alone = hf.expert_of(name)
    for expert in range(shape[0]) if alone is None else [alone]:
        yield expert, compare(*(weights.as_stored(name, shape[1:], expert) for weights in (before, after)))


def compare(base: torch.Tensor, tuned: torch.Tensor) -> Change:
    """Two tensors of one shape; NaN are the same where they are so byte for byte."""
    assert base.shape == tuned.shape, (base.shape, tuned.shape)
    change = Change(1, base.numel())
    same_values = True
    for a, b in zip(base.flatten().split(_SLICE), tuned.flatten().split(_SLICE), strict=True):
        a, b = a.double(), b.double()
        same_values &= torch.equal(a, b)
        change.base_square += a.square().sum().item()
        change.change_square += (b - a).square().sum().item()
    same_bytes = base.dtype == tuned.dtype and torch.equal(_bytes(base), _bytes(tuned))
    change.same_bytes, change.same_values = int(same_bytes), int(same_values or same_bytes)
    return change


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def as_table(rows: list[dict[str, Any]]) -> "Table":
    """Rows of `diff` for people."""
    from rich.table import Table

    table = Table("part")
    keys = [key for key in ("layer", "expert") if any(row[key] is not None for row in rows)]
    for heading in (*keys, "matrices", "same bytes", "same values", "base", "change", "relative"):
        table.add_column(heading, justify="right", overflow="fold")
    for row in rows:
        where = ["" if row[key] is None else str(row[key]) for key in keys]
        relative = "" if row["relative"] is None else f"{row['relative']:.2e}"
        counts = [f"{row[key]:,}" for key in ("matrices", "same_bytes", "same_values")]
        table.add_row(row["part"], *where, *counts, f"{row['base_norm']:.4g}", f"{row['change']:.4g}", relative)
    return table
