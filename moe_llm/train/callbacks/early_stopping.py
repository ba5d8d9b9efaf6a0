"""The end of a run before its last step: when the validation loss no longer falls (`train.early_stopping`)."""

import math
from pathlib import Path
from typing import Any

from moe_llm.checkpoint import folder
from moe_llm.config import Config
from moe_llm.train.callbacks.base import Callback, TrainingRun
from moe_llm.train.position import Position


class EarlyStopping(Callback):
    """Follows the validation loss from evaluation to evaluation, in the run's `Position`, which checkpoints hold: so a
    resumed run waits as long as one that was never stopped. The best weights so far are saved."""

    def on_train_begin(self, run: TrainingRun) -> None:
        self.on_rollback(run)
        ended = why_ended(run.config, run.position)
        if ended is not None and run.position.step < run.config.max_steps:
            run.say(ended)
            run.end(ended)

    def on_rollback(self, run: TrainingRun) -> None:
        lost = forget_lost_best(run.position, run.run_dir / "checkpoints")
        if lost is not None:
            run.say(lost)

    def on_evaluate(self, run: TrainingRun, metrics: dict[str, Any]) -> None:
        if "val_loss" not in metrics:
            return
        if judge(run.config, metrics["val_loss"], run.position):
            run.request_save()
            return
        ended = why_ended(run.config, run.position)
        if ended is not None:
            run.end(ended)


def judge(config: Config, loss: float, position: Position) -> bool:
    """Whether an evaluation's weights are the best so far. A loss that is not finite is no improvement.

    Args:
        loss: the same on every rank. position: changed in place.
    """
    better = position.best_loss is None or loss < position.best_loss - config.train.early_stopping.min_delta
    if math.isfinite(loss) and better:
        position.best_loss, position.best_step, position.waited = loss, position.step, 0
        return True
    position.waited = (position.waited or 0) + 1
    return False


def why_ended(config: Config, position: Position) -> str | None:
    """A sentence if the patience is used up, None before."""
    settings = config.train.early_stopping
    if settings.patience is None or (position.waited or 0) < settings.patience:
        return None
    best = (
        "none was finite"
        if position.best_step is None
        else f"the best is {position.best_loss:.4f}, of step {position.best_step}"
    )
    return (
        f"stopping early at step {position.step}: in {position.waited} evaluations the validation loss has not "
        f"fallen by more than {settings.min_delta:g}; {best}; to go on, raise train.early_stopping.patience"
    )


def forget_lost_best(position: Position, root: Path) -> str | None:
    """Where the best checkpoint is not among those of this run (another run's are resumed, or it was deleted), the
    next evaluation's is the best again. A sentence if so.

    Args:
        position: changed in place. root: the run's `checkpoints` directory.
    """
    step = position.best_step
    if step is None or (root / folder.step_name(step)).is_dir():
        return None
    position.best_loss = position.best_step = position.waited = None
    return f"the best checkpoint so far, of step {step}, is not in {root}: early stopping begins anew"
