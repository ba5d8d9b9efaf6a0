"""A run as its report sees it: what the run directory holds, and nothing else."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_llm.config import Config
from moe_llm.config.load import load_config
from moe_llm.errors import UserError
from moe_llm.model.flops import train_flops_per_token
from moe_llm.train.metrics import read_metrics


@dataclass
class Run:
    """records: lines of metrics.jsonl, at least one; facts: facts.json, empty for a run that has none."""

    name: str
    directory: Path
    config: Config
    records: list[dict[str, Any]]
    facts: dict[str, Any]

    @property
    def last(self) -> dict[str, Any]:
        return self.records[-1]

    @property
    def seconds(self) -> float:
        """In training steps; evaluating and saving not counted."""
        total, tokens = 0.0, 0
        for record in self.records:
            if speed := record.get("tokens_per_second"):
                total += (record["tokens"] - tokens) / speed
            tokens = record["tokens"]
        return total

    @property
    def flops_per_token(self) -> float:
        return train_flops_per_token(self.config.model, self.config.data.sequence_length)

    @property
    def peak(self) -> float | None:
        """FLOP/s of the hardware of the latest start, where it was known."""
        return self.facts["starts"][-1]["peak_flops_per_second"] if self.facts else None

    def validation(self) -> list[dict[str, Any]]:
        return [record for record in self.records if record.get("val_loss") is not None]


def load_runs(directories: list[str]) -> list[Run]:
    """Runs under names that tell them apart.

    Raises:
        UserError: no run directory, nothing recorded, or a file that cannot be read.
    """
    paths = [Path(directory) for directory in directories]
    resolved = [path.resolve() for path in paths]
    for i, path in enumerate(resolved):
        if path in resolved[:i]:
            raise UserError(f"RUN {str(paths[i])!r} is given twice: name each run once")
    names = [path.name for path in resolved]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return [_load(path, name) for path, name in zip(paths, names)]


def _load(path: Path, name: str) -> Run:
    if not path.is_dir():
        raise UserError(f"RUN {str(path)!r} is no directory: name a run directory, as run.dir of its training")
    metrics, config = path / "metrics.jsonl", path / "config.yaml"
    for file in (metrics, config):
        if not file.is_file():
            raise UserError(f"RUN {str(path)!r} has no {file.name}: name a run directory, as run.dir of its training")
    records = read_metrics(metrics)
    if not records:
        raise UserError(f"RUN {str(path)!r} has recorded nothing yet: wait for the first line of {metrics}")
    for number, record in enumerate(records, 1):
        if not {"step", "tokens", "moe"} <= record.keys():
            raise UserError(f"file {metrics} is damaged: line {number} is no record of a step: remove that line")
    return Run(name, path, load_config(config, []), records, _read_facts(path / "facts.json"))


def _read_facts(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        facts: dict[str, Any] = dict(json.loads(path.read_bytes()))
        return facts
    except (ValueError, TypeError) as error:
        raise UserError(f"file {path} is damaged, it is not valid JSON: remove it, the report does without") from error


def means(values: Sequence[float | None]) -> float | None:
    """The mean of those that are numbers."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None


def grouped(records: list[Any], most: int) -> list[list[Any]]:
    """Neighbours together, at most so many groups of about equal length."""
    groups = min(most, len(records))
    return [records[len(records) * i // groups : len(records) * (i + 1) // groups] for i in range(groups)]
