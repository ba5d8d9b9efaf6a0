"""What looking costs: time spent on records, alarms and the norms of single experts, as a share of the step.

The two parts are timed where they happen, in training as configured: `expert_gradient_norms` before the optimizer's
step, and `Trainer._record` (metrics.jsonl, alarms, console, trackers) after it. So one run is enough, and noise between
runs does not matter. Steps without a record count in full in the total.

    python scripts/benchmarks/observing.py configs/quickstart.yaml train.max_steps=60 run.dir=runs/observing
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from moe_llm.cli import run_command
from moe_llm.config import load_config
from moe_llm.train import trainer
from moe_llm.train.run import train

WARM_UP = 5


def timed(function: Callable[..., Any], into: list[float]) -> Callable[..., Any]:
    """The same function; what the device still has to do before it is not its own time."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begin = time.perf_counter()
        result = function(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        into.append(time.perf_counter() - begin)
        return result

    return call


def main() -> None:
    config = load_config(sys.argv[1], sys.argv[2:])
    norms: list[float] = []
    records: list[float] = []
    speeds: list[float] = []
    record = trainer.Trainer._record

    def noted(self: trainer.Trainer, measured: dict[str, Any]) -> None:
        speeds.append(self.window.read(config)["tokens_per_second"])
        record(self, measured)

    trainer.expert_gradient_norms = timed(trainer.expert_gradient_norms, norms)
    trainer.Trainer._record = timed(noted, records)
    train(config)
    if len(speeds) <= WARM_UP:
        print(f"only {len(speeds)} records: give more than {WARM_UP}")
        return
    step = config.tokens_per_step / statistics.median(speeds[WARM_UP:])
    every = config.logging.every_steps
    for name, seconds in (("norms of single experts", norms), ("records and alarms", records)):
        median = statistics.median(seconds[WARM_UP:])
        print(f"{name}: {median * 1e3:.2f} ms a record, {median / every / step:.2%} of a step of {step * 1e3:.1f} ms")


if __name__ == "__main__":
    sys.exit(run_command(main))
