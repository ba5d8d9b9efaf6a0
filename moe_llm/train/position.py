"""How far a run has come."""

from dataclasses import dataclass
from typing import Any


@dataclass
class Position:
    """How far a run has come: all that a resumed run needs beside weights and optimizer tensors."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped: int = 0
    best_loss: float | None = None  # these three are early stopping's, None without it
    best_step: int | None = None
    waited: int | None = None  # evaluations since the best one
    callbacks: dict[str, dict[str, Any]] | None = None  # states of `train.callbacks` as of the newest checkpoint
    streams: dict[str, dict[str, Any]] | None = None  # where the sources that stream are, as of the newest checkpoint

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {key: value for key, value in vars(self).items() if value is not None}

    @property
    def updates(self) -> int:
        """Steps that changed the weights."""
        return self.step - self.skipped
