"""The end of a run before its last step: when the validation loss no longer falls (`train.early_stopping`)."""

import math
from pathlib import Path
from typing import Any

from moe_llm.checkpoint import folder
from moe_llm.checkpoint.state import read_trainer_state
from moe_llm.config import Config
from moe_llm.train.loop import Verdict
from moe_llm.train.position import Position


class EarlyStopping:
    """Follows the validation loss from evaluation to evaluation, in the run's `Position`, which checkpoints hold: so a
    resumed run waits as long as one that was never stopped."""

    def __init__(self, config: Config):
        self._patience, self._min_delta = config.train.early_stopping.patience, config.train.early_stopping.min_delta

    def judge(self, measured: dict[str, Any], position: Position) -> Verdict:
        """After each evaluation: whether its weights are the best so far, and whether to end.

        Args:
            measured: of the evaluation, the same on every rank. A loss that is not finite is no improvement.
            position: changed in place.
        """
        if self._patience is None or "val_loss" not in measured:
            return Verdict()
        loss = measured["val_loss"]
        if math.isfinite(loss) and (position.best_loss is None or loss < position.best_loss - self._min_delta):
            position.best_loss, position.best_step, position.waited = loss, position.step, 0
            return Verdict(keep=True)
        position.waited = (position.waited or 0) + 1
        return Verdict(ending=self.why_ended(position))

    def why_ended(self, position: Position) -> str | None:
        """A sentence if the patience is used up, None before."""
        if self._patience is None or (position.waited or 0) < self._patience:
            return None
        best = (
            "none was finite"
            if position.best_step is None
            else (f"the best is {position.best_loss:.4f}, of step {position.best_step}")
        )
        return (
            f"stopping early at step {position.step}: in {position.waited} evaluations the validation loss has not "
            f"fallen by more than {self._min_delta:g}; {best}; to go on, raise train.early_stopping.patience"
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


def describe_best(config: Config, run_dir: Path, checkpoint: Path) -> str | None:
    """The best checkpoint of a run that has ended with `checkpoint`; None where none was looked for or found."""
    state = read_trainer_state(checkpoint)
    if config.train.early_stopping.patience is None or state.get("best_step") is None:
        return None
    path = run_dir / "checkpoints" / folder.step_name(state["best_step"])
    return f"best checkpoint: {path} (validation loss {state['best_loss']:.4f})"
