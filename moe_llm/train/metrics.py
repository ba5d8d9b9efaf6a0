"""What a run records: one JSON object a line in metrics.jsonl.

Dimensions: L layers, E experts.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from moe_llm.atomic import write_atomically
from moe_llm.config import Config
from moe_llm.distributed.engine import Engine
from moe_llm.distributed.runtime import Runtime
from moe_llm.distributed.step_loss import StepLosses
from moe_llm.errors import UserError
from moe_llm.model.moe.routers import router_losses
from moe_llm.model.moe.routing import RoutingStatistics
from moe_llm.ops.preference import MEASURED


def routing_metrics(statistics: RoutingStatistics) -> dict[str, list]:
    """Per layer, from statistics summed over ranks and micro-batches (stacked, with a leading L).

    tokens_per_expert: counts; load_cv: their standard deviation over their mean, 0 when balanced;
    router_entropy: mean over tokens, nats, ln E when undecided; dead_experts: indices that got no token;
    dropped_share: choices that no expert had room for, 0 without a limit of capacity; experts_per_token: choices of
    a token, on average.
    """
    # one copy of each to the host: every list that is read from a device waits for it
    counts_LE = statistics.tokens_per_expert_E.cpu().double()
    entropy_L, tokens_L, dropped_L = (
        t.detach().cpu() for t in (statistics.entropy_sum, statistics.num_tokens, statistics.dropped)
    )
    mean_L = counts_LE.mean(-1)
    return {
        "tokens_per_expert": [[round(c) for c in layer] for layer in counts_LE.tolist()],
        "load_cv": (counts_LE.std(-1, correction=0) / mean_L.clamp(min=1e-12)).tolist(),
        "router_entropy": (entropy_L / tokens_L).tolist(),
        "dropped_share": (dropped_L / counts_LE.sum(-1).clamp(min=1)).tolist(),
        "experts_per_token": (counts_LE.sum(-1) / tokens_L).tolist(),
        "dead_experts": [[e for e, c in enumerate(layer) if c == 0] for layer in counts_LE.tolist()],
    }


def expert_gradient_norms(engine: Engine, runtime: Runtime) -> list[list[float | None]] | None:
    """Norms of the gradients of single experts, layer by expert, over all ranks and before clipping; None for an
    expert that is not trained, or for all of them. Between backward and step. Collective."""
    trained = engine.trained_experts
    if trained is None:
        return None
    norms_LE = runtime.sum(engine.expert_gradient_squares()).sqrt().tolist()
    return [[norm if e in trained else None for e, norm in enumerate(layer)] for layer in norms_LE]


class StepWindow:
    """Losses, routing and time since the last record."""

    def __init__(self, runtime: Runtime):
        self.runtime = runtime
        self.clear()

    def clear(self, **remarks: Any) -> None:
        """Start over, with what the next record says beside its numbers."""
        self.remarks = remarks
        self.steps = 0
        self.losses: torch.Tensor | None = None
        self.routing: RoutingStatistics | None = None
        self.step_routing: RoutingStatistics | None = None  # of the newest step
        self.expert_norms: list[list[float | None]] | None = None  # of the newest step that has them
        self.step_losses: list[torch.Tensor] = []
        self.tokens: torch.Tensor | None = None  # that are no padding, of all ranks, on the device
        self.lr = self.grad_norm = math.nan  # of the newest step
        self.seconds = 0.0
        self.restart_clock()

    def restart_clock(self) -> None:
        self.clock = time.perf_counter()

    def add(self, losses: StepLosses) -> None:
        self.step_losses.append(losses.total.detach())
        parts = [torch.stack([losses.lm, losses.aux, losses.z, losses.distill]), losses.own]
        values = torch.cat(parts if losses.preference is None else [*parts, losses.preference])
        self.losses = values if self.losses is None else self.losses + values

    def end_step(self, routing: RoutingStatistics, tokens: torch.Tensor) -> None:
        self.tokens = tokens.double() if self.tokens is None else self.tokens + tokens
        self.step_routing = routing
        self.routing = routing.plus(self.routing)
        now = time.perf_counter()
        self.seconds += now - self.clock
        self.clock = now
        self.steps += 1
        self.step_losses = []

    def read_tokens(self) -> int:
        """Tokens of the window's steps without padding; waits for the device."""
        return 0 if self.tokens is None else round(self.tokens.item())

    def read(self, config: Config) -> dict[str, float]:
        """Means over the steps of the window, the same on every rank."""
        assert self.losses is not None
        summed = self.runtime.sum(self.losses.clone()) / self.runtime.world_size / self.steps
        lm, aux, z, distill, *values = summed.tolist()
        own = dict(zip(router_losses(config.model), values))
        pairs = dict(zip(MEASURED, values[len(own) :]))
        tokens = self.read_tokens()
        share = config.distill.alpha if config.distill.teachers else 0.0
        learned = (1 - share) * lm + share * distill if share else pairs.get("preference_loss", lm)
        total = learned + config.model.router_aux_loss_coef * aux + config.model.router_z_loss_coef * z
        total += sum(loss.coefficient * value for loss, value in own.items())
        return {
            "loss": total,
            "lm_loss": lm,
            "aux_loss": aux,
            "z_loss": z,
            **{loss.name: value for loss, value in own.items()},
            **({"distill_loss": distill} if share else {}),
            **pairs,
            "tokens_per_second": tokens / self.seconds,
            "fill": tokens / (config.tokens_per_step * self.steps),
        }


class MetricsFile:
    """metrics.jsonl of a run. Opening it at a step drops what an interrupted run wrote after that step."""

    def __init__(self, path: Path, step: int):
        self.path = path
        self._open(step)

    def _open(self, step: int) -> None:
        kept = [line for line in read_metrics(self.path) if line["step"] <= step] if self.path.exists() else []
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self.path.open("a", encoding="utf-8")

    def rewind(self, step: int) -> None:
        """Drop what was written after a step, which the run has gone back to."""
        self.close()
        self._open(step)

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _finite(value: Any) -> Any:
    """The same, with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line cut short by a crash is left out.

    Raises:
        UserError: any other line is damaged.
    """
    records = []
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        remedy = "remove that line, or set another run.dir"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number < len(lines) or isinstance(error, UnicodeDecodeError):
                raise UserError(f"file {path} is damaged: line {number} is not valid JSON: {remedy}") from error
        else:
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise UserError(f"file {path} is damaged: line {number} is no record of a step: {remedy}")
            records.append(record)
    return records


def recorded_loads(run: str) -> list[list[float]]:
    """Tokens of each layer's experts in the last record of a run directory.

    Raises:
        UserError: it has recorded none.
    """
    file = Path(run) / "metrics.jsonl"
    found = read_metrics(file) if file.is_file() else []
    loads = found[-1].get("moe", {}).get("tokens_per_expert") if found and isinstance(found[-1], dict) else None
    if not loads:
        raise UserError(f"--loads {run!r} has no record of experts' loads in metrics.jsonl: name a run directory")
    return [[float(count) for count in layer] for layer in loads]
