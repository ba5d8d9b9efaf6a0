"""One run of the real training loop, with everything written down that comparisons need.

The pieces are those of a run: data, model, engine, trainer, checkpoints. Only the engine is wrapped, to read
gradients before a step and weights after it. Tensors come as numpy arrays, which cross between processes by value.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_llm.checkpoint.manifest import verify
from moe_llm.config import Config
from moe_llm.data.loader import Data, load_data
from moe_llm.data.packing import Batch
from moe_llm.data.tokenizer import build_tokenizer
from moe_llm.distributed.engine import Engine
from moe_llm.distributed.runtime import Runtime, start
from moe_llm.distributed.state import EMA
from moe_llm.train.build import build_trained
from moe_llm.train.callbacks import Callback, TrainingRun
from moe_llm.train.callbacks.registry import own_callbacks
from moe_llm.train.callbacks.step_guard import StepGuardCallback
from moe_llm.train.trainer import Trainer


@dataclass(frozen=True)
class Held:
    """A rank's part of a parameter: `first` is its first expert, None for a dense one."""

    first: int | None
    value: np.ndarray


Tensors = dict[str, Held]


@dataclass
class Observation:
    """What one rank saw, lists by step.

    samples: digests of the rows of each micro-batch. tokens: real ones. records: as in metrics.jsonl, plus the rate.
    start: the weights and the optimizer's tensors before the first step, by kind. saved: the checkpoints.
    random: digests of the state of torch's random numbers, before each step's first pass.
    at_save: the same tensors as `start` when the first checkpoint was written. batches: kept for the one process only.
    """

    first_step: int = 0
    samples: list[list[list[str]]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    random: list[str] = field(default_factory=list)
    gradients: list[Tensors] = field(default_factory=list)
    weights: list[Tensors] = field(default_factory=list)
    start: dict[str, Tensors] = field(default_factory=dict)
    at_save: dict[str, Tensors] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    batches: list[list[Batch]] = field(default_factory=list)


def made_ready() -> None:
    """Nothing more than that a process has imported what `observe` needs."""


def observe(config: Config, *, source: str | None = None, keep_batches: bool = False) -> Observation:
    """Train as configured, from the checkpoint `source` where given, to `config.max_steps`. Collective."""
    _forget_accelerator()
    runtime = start(config)
    run_dir = Path(config.run.dir)
    tokenizer = build_tokenizer(config, run_dir / "tokenizer")
    data = load_data(config, tokenizer, rank=runtime.rank, world_size=runtime.world_size, show_progress=False)
    if source:
        verify(Path(source), runtime)
    engine, position = build_trained(config, runtime, Path(source) if source else None)
    seen = Observation(first_step=position.step, start=_state(engine, with_optimizer=position.step > 0))
    watched = Watched(engine, runtime, seen, keep_batches)

    callbacks = {"observer": _Observer(seen)} | own_callbacks(config, ("alternating_updates", "adversarial", "ema"))
    callbacks["step_guard"] = StepGuardCallback()
    Trainer(config, runtime, watched, data, tokenizer, position, callbacks=callbacks).fit()
    return seen


def expected_samples(config: Config) -> tuple[list[list[str]], int]:
    """The samples of each step straight from the data's order, without a loader, and the blocks of an epoch."""
    data = read_data(config)
    G = config.train.global_batch_size
    steps = [digests(data.train.rows(step * G, G)) for step in range(config.max_steps)]
    return steps, len(data.train)


def read_data(config: Config) -> Data:
    """All that a small run reads, without a loader."""
    return load_data(config, build_tokenizer(config, Path(config.run.dir) / "tokenizer"), show_progress=False)


class _Observer(Callback):
    """Writes down records and checkpoints."""

    def __init__(self, seen: Observation):
        self._seen = seen

    def on_record(self, run: TrainingRun, record: dict[str, Any]) -> None:
        self._seen.records.append(record)

    def on_save_begin(self, run: TrainingRun) -> None:
        if not self._seen.saved:
            self._seen.at_save = _state(run.engine, with_optimizer=True)

    def on_save(self, run: TrainingRun, checkpoint: Path) -> None:
        self._seen.saved.append(str(checkpoint))


class Watched:
    """An engine that is written about while the loop drives it."""

    def __init__(self, engine: Engine, runtime: Runtime, seen: Observation, keep_batches: bool):
        self._engine, self._runtime, self._seen, self._keep = engine, runtime, seen, keep_batches
        self._micro: list[Batch] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def forward(self, **inputs: Any) -> Any:
        if self._engine.model.training and torch.is_grad_enabled():  # not what is only counted
            if not self._micro:
                self._seen.random.append(_random_state(inputs["input_ids"].device))
            batch = Batch(
                input_ids_BS=inputs["input_ids"],
                labels_BS=inputs["targets"],
                position_ids_BS=inputs["position_ids"],
                document_ids_BS=inputs["document_ids"],
                attention_mask_BS=inputs["attention_mask"],
            )
            self._micro.append(batch.to(torch.device("cpu")))
        return self._engine.forward(**inputs)

    def step(self, lr: float) -> float:
        self._seen.gradients.append(_read(self._engine, self._engine.gradient, trainable=True))
        norm = self._engine.step(lr)
        self._seen.weights.append(_read(self._engine, lambda name: self._engine.read(name, "weight")))
        self._seen.samples.append([digests(batch) for batch in self._whole()])
        self._seen.tokens.append(sum(batch.num_tokens for batch in self._micro))
        if self._keep:
            self._seen.batches.append(self._micro)
        self._micro = []
        return norm

    def _whole(self) -> list[Batch]:
        """The micro-batches; of ranks that share sequences the first one has them all, joined, and the others none."""
        size = self._runtime.sequence_parallel
        if size == 1:
            return self._micro
        micro = self._runtime.gather(self._micro)
        first = self._runtime.rank
        return [] if first % size else [Batch.of_parts(parts) for parts in zip(*micro[first : first + size])]


def _read(engine: Engine, read: Callable, *, trainable: bool = False, kind: str | None = None) -> Tensors:
    """kind: of the optimizer; what has no such tensor is left out."""
    entries = [entry for entry in engine.entries() if entry.trainable or not trainable]
    entries = [entry for entry in entries if kind not in engine.kinds or entry.kinds_among((str(kind),))]
    return {entry.name: Held(entry.first_expert, read(entry.name).float().cpu().numpy().copy()) for entry in entries}


def _state(engine: Engine, *, with_optimizer: bool) -> dict[str, Tensors]:
    kinds = ("weight", *(engine.kinds if with_optimizer else ()), *((EMA,) if engine.averaged else ()))
    return {
        kind: _read(engine, lambda name, kind=kind: engine.read(name, kind), trainable=kind != "weight", kind=kind)
        for kind in kinds
    }


def digests(batch: Batch) -> list[str]:
    """A name for each row: what is read, what is predicted, and where."""
    parts = (batch.input_ids_BS, batch.labels_BS, batch.position_ids_BS, batch.attention_mask_BS)
    return [
        hashlib.sha256(b"".join(part[row].numpy().tobytes() for part in parts)).hexdigest()[:16]
        for row in range(len(batch.input_ids_BS))
    ]


def _random_state(device: torch.device) -> str:
    """A digest of what random numbers on the device follow from."""
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return hashlib.sha256(state.cpu().numpy().tobytes()).hexdigest()[:16]


def _forget_accelerator() -> None:
    """Let the next Accelerator of this process be configured otherwise; the process group stays."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
