"""The average of the weights that a run keeps (`checkpoint.ema`), as far as the run has to do with it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from moe_llm.config import Config
from moe_llm.distributed.engine import Engine
from moe_llm.distributed.state import EMA
from moe_llm.errors import UserError
from moe_llm.train.callbacks.base import Callback, TrainingRun


class WeightAverage(Callback):
    """Keeps the average, and with `evaluate.ema` evaluates it too."""

    def validate(self, config: Config) -> None:
        """Refuse an average that would never begin, or not be one of the weights."""
        ema = config.checkpoint.ema
        if config.finetune.lora.rank is not None:
            raise UserError(
                f"checkpoint.ema.decay={ema.decay:g} averages weights, and with finetune.lora.rank="
                f"{config.finetune.lora.rank} only the factors of a product are trained, whose averages are not its "
                "own: remove one of them"
            )
        if ema.start_step + ema.every_steps > config.max_steps:
            raise UserError(
                f"checkpoint.ema.start_step={ema.start_step} with every_steps={ema.every_steps} lets the average begin "
                f"after the run's {config.max_steps} steps: lower one of them"
            )

    def on_train_begin(self, run: TrainingRun) -> None:
        """Report it where the run was resumed from a checkpoint without the average that it might have."""
        missed = sum(run.config.checkpoint.ema.due(step + 1) for step in range(run.position.step))
        if run.engine.averages and not run.engine.averaged and missed:
            run.say(f"checkpoint.ema: the checkpoint of step {run.position.step} holds no average: a new one begins")

    def on_step_end(self, run: TrainingRun) -> None:
        if not run.skip_update and run.config.checkpoint.ema.due(run.position.step):
            run.engine.update_average()

    def on_evaluate(self, run: TrainingRun, metrics: dict[str, Any]) -> None:
        if not run.config.evaluate.ema or not run.engine.averaged:
            return
        with averaged_weights(run.engine, run.heartbeat):
            averaged = run.validation_loss()
        metrics |= {f"ema_{name}": value for name, value in averaged.items()}


@contextmanager
def averaged_weights(engine: Engine, heartbeat: Callable[[str], None] = lambda phase: None) -> Iterator[None]:
    """The model computes with the average inside, and with its weights again afterwards, bit for bit. Collective.

    The two change places, a parameter at a time, through host memory. Not so after a failure: what is collective
    would hang where it is not everyone's, and nobody goes on with the weights of a run that has failed.

    Args:
        heartbeat: called before each parameter.
    """
    _exchange(engine, heartbeat)
    yield
    _exchange(engine, heartbeat)


def _exchange(engine: Engine, heartbeat: Callable[[str], None]) -> None:
    for entry in engine.entries():
        if entry.trainable:
            heartbeat(f"exchanging {entry.name} with its average")
            weight, average = engine.read(entry.name, "weight").clone(), engine.read(entry.name, EMA)
            engine.write(entry.name, "weight", average)
            engine.write(entry.name, EMA, weight)
