"""The average of the weights that a run keeps (`checkpoint.ema`), as far as the run has to do with it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from moe_llm.config import Config
from moe_llm.distributed.engine import Engine
from moe_llm.distributed.state import EMA
from moe_llm.errors import UserError
from moe_llm.train.position import Position


def check_ema(config: Config) -> None:
    """Refuse an average that would never begin, or not be one of the weights.

    Raises:
        UserError: no step of the run is one at which it takes in the weights; or adapters are what is trained.
    """
    ema = config.checkpoint.ema
    if ema.decay is not None and config.finetune.lora.rank is not None:
        raise UserError(
            f"checkpoint.ema.decay={ema.decay:g} averages weights, and with finetune.lora.rank="
            f"{config.finetune.lora.rank} only the factors of a product are trained, whose averages are not its own: "
            "remove one of them"
        )
    if ema.decay is not None and ema.start_step + ema.every_steps > config.max_steps:
        raise UserError(
            f"checkpoint.ema.start_step={ema.start_step} with every_steps={ema.every_steps} lets the average begin "
            f"after the run's {config.max_steps} steps: lower one of them"
        )


def say_of_average(config: Config, engine: Engine, position: Position, say: Callable[[str], None]) -> None:
    """Where a run goes on without the average that it might have: its checkpoint is of a run without."""
    ema = config.checkpoint.ema
    missed = sum(ema.due(step + 1) for step in range(position.step))
    if engine.averages and not engine.averaged and missed:
        say(f"checkpoint.ema: the checkpoint of step {position.step} holds no average: a new one begins")


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
