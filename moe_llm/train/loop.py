"""The training loop."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moe_llm.config import Config
from moe_llm.data.loader import TrainLoader
from moe_llm.data.packing import Batch
from moe_llm.model.moe.routing import RoutingStatistics
from moe_llm.parallel.dispatch import traffic
from moe_llm.parallel.engine import Engine
from moe_llm.parallel.runtime import Runtime
from moe_llm.train.loss import StepLoss, StepLosses
from moe_llm.train.metrics import routing_metrics
from moe_llm.train.optim import learning_rate
from moe_llm.train.signals import StopRequest


@dataclass
class Position:
    """How far a run has come: all that a resumed run needs beside weights and optimizer tensors."""

    step: int = 0
    samples: int = 0
    tokens: int = 0


@dataclass
class Callbacks:
    """What the loop calls: `evaluate` gives validation metrics, `record` takes a finished record, `save` writes a
    checkpoint."""

    evaluate: Callable[[], dict[str, float]]
    record: Callable[[dict[str, Any]], None]
    save: Callable[[Position], None]


def train_loop(
    config: Config, engine: Engine, runtime: Runtime, loader: TrainLoader, position: Position, stop: StopRequest,
    callbacks: Callbacks,
) -> bool:
    """Train until `config.max_steps`; false if asked to stop before. Saved either way, `position` is moved on.

    Resuming is exact because all else is a function of (seed, step): data order, learning rate, router noise.
    """
    window = _Window(runtime)
    while position.step < config.max_steps:
        batches = [batch.to(runtime.device) for batch in next(loader)]
        seed_noise(config.run.seed, position.step, runtime.rank)
        step_loss = StepLoss(config.model, runtime, batches)
        for i, batch in enumerate(batches):
            losses = step_loss(engine.forward(**model_inputs(batch)))
            engine.backward(losses.total, last=i == len(batches) - 1)
            window.add(losses)
        rate = learning_rate(config, position.step)
        norm = engine.step(rate)
        position.step += 1
        position.samples += config.train.global_batch_size
        position.tokens += config.tokens_per_step
        window.end_step(step_loss.routing)

        last = position.step == config.max_steps
        stopping = runtime.any(stop.requested)
        evaluating = last or _due(config.evaluate.every_steps, position.step)
        saving = last or stopping or _due(config.checkpoint.every_steps, position.step)
        # Also at each save, so that a resumed run's records are means over the same steps as an uninterrupted one's.
        if evaluating or saving or _due(config.logging.every_steps, position.step):
            record = {
                "step": position.step, "tokens": position.tokens, **window.read(config), "grad_norm": norm, "lr": rate,
                "moe": routing_metrics(window.routing) | traffic(engine.model),
            }
            callbacks.record(record | (callbacks.evaluate() if evaluating else {}))
            window.clear()
            traffic(engine.model)  # what the evaluation exchanged belongs to no step
        if saving:
            callbacks.save(position)
            window.restart_clock()
        if stopping and not last:
            return False
    return True


def model_inputs(batch: Batch) -> dict[str, Any]:
    return {
        "input_ids": batch.input_ids_BS,
        "attention_mask": batch.attention_mask_BS,
        "targets": batch.labels_BS,
        "position_ids": batch.position_ids_BS,
        "document_ids": batch.document_ids_BS,
        "return_logits": False,
    }


def seed_noise(seed: int, step: int, rank: int) -> None:
    """Random numbers of a step as a function of (seed, step, rank): nothing of them needs to be saved."""
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


class _Window:
    """Losses, routing and time since the last record."""

    def __init__(self, runtime: Runtime):
        self.runtime = runtime
        self.clear()

    def clear(self) -> None:
        """Start over."""
        self.steps = 0
        self.losses: torch.Tensor | None = None
        self.routing: RoutingStatistics | None = None
        self.seconds = 0.0
        self.restart_clock()

    def restart_clock(self) -> None:
        self.clock = time.perf_counter()

    def add(self, losses: StepLosses) -> None:
        values = torch.stack([losses.lm, losses.aux, losses.z])
        self.losses = values if self.losses is None else self.losses + values

    def end_step(self, routing: RoutingStatistics) -> None:
        self.routing = routing.plus(self.routing)
        now = time.perf_counter()
        self.seconds += now - self.clock
        self.clock = now
        self.steps += 1

    def read(self, config: Config) -> dict[str, float]:
        """Means over the steps of the window, the same on every rank."""
        assert self.losses is not None
        summed = self.runtime.sum(self.losses.clone()) / self.runtime.world_size / self.steps
        lm, aux, z = summed.tolist()
        total = lm + config.model.router_aux_loss_coef * aux + config.model.router_z_loss_coef * z
        return {
            "loss": total, "lm_loss": lm, "aux_loss": aux, "z_loss": z,
            "tokens_per_second": config.tokens_per_step * self.steps / self.seconds,
        }
