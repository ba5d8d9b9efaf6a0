"""What a user's callback derives from, and what it is given."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_llm.config import Config
    from moe_llm.distributed.engine import Engine
    from moe_llm.distributed.runtime import Runtime
    from moe_llm.train.position import Position


@dataclass(frozen=True)
class TrainingRun:
    """A run while it trains.

    config: as resolved. engine: `engine.model` is the `MoEDecoder` with this rank's experts. runtime: `rank`,
    `world_size`, `is_main` and exchanges between ranks. position: `step` counts the finished steps, `samples` the
    blocks that they have read, `tokens` the tokens up to the newest record; not to be changed. say: shows a sentence to the user, once. heartbeat: tells the
    watchdog what comes next; call it in a hook that takes minutes.
    """

    config: "Config"
    engine: "Engine"
    runtime: "Runtime"
    run_dir: Path
    position: "Position"
    say: Callable[[str], None]
    heartbeat: Callable[[str], None]


class Callback:
    """Base of callbacks: each hook does nothing until it is overridden.

    Every hook is called on every rank, callbacks in the order in which `train.callbacks` lists them. An exception ends
    the run; `UserError` and `TrainingFailure` do so with one sentence. Hooks must not draw from torch's global
    random numbers if a resumed run is to equal an uninterrupted one.
    """

    def validate(self, config: "Config") -> None:
        """Refuse, with a `UserError`, a configuration that this callback cannot work with; before any work."""

    def on_train_begin(self, run: TrainingRun) -> None:
        """Before the first step of this process; after a resume, the state is already restored."""

    def on_step_begin(self, run: TrainingRun) -> None:
        """Before the forward passes of step `run.position.step + 1`."""

    def on_backward_end(self, run: TrainingRun) -> None:
        """Gradients of the whole step are there, neither clipped nor checked: `run.engine.gradient_square()`.

        Under ZeRO they lie in pieces on the ranks, and parameters have no `grad`.
        """

    def on_step_end(self, run: TrainingRun) -> None:
        """`run.position.step` is done; its update may have been skipped (`train.on_nan: skip`)."""

    def on_evaluate(self, run: TrainingRun, metrics: dict[str, Any]) -> None:
        """After an evaluation. `metrics` is the same on every rank; what is added to it goes into the record."""

    def on_record(self, run: TrainingRun, record: dict[str, Any]) -> None:
        """With each record, as metrics.jsonl gets it but for alarms. The same on every rank; not to be changed."""

    def on_save(self, run: TrainingRun, checkpoint: Path) -> None:
        """After a checkpoint is written; with `checkpoint.async`, when its writing in the background has begun."""

    def on_train_end(self, run: TrainingRun) -> None:
        """Once at the end, also after a failure (of `on_train_begin` too): it must not exchange anything between ranks."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: None, bool, int, float, str, lists, and dictionaries with text for keys.

        It must be the same on every rank: the main rank's is saved, and every rank of any later layout gets it.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state of the checkpoint that the run resumes from, or goes back to (`train.on_nan: rollback`)."""
