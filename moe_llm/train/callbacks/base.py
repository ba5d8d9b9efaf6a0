"""What callbacks derive from, the package's own and a user's."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerFast

    from moe_llm.config import Config
    from moe_llm.config.adversarial import UpdatePhase
    from moe_llm.data.loader import Data
    from moe_llm.data.packing import Batch
    from moe_llm.distributed.engine import Engine
    from moe_llm.distributed.runtime import Runtime
    from moe_llm.distributed.step_loss import StepLoss
    from moe_llm.train.metrics import StepWindow
    from moe_llm.train.position import Position


class TrainingRun(Protocol):
    """What callbacks may use of the `Trainer`, whose docstrings say more.

    position: how many steps are finished, not to be changed. source: the checkpoint that the run was resumed from.
    """

    config: "Config"
    runtime: "Runtime"
    engine: "Engine"
    data: "Data"
    tokenizer: "PreTrainedTokenizerFast"
    position: "Position"
    source: Path | None
    facts: dict[str, Any] | None
    run_dir: Path
    window: "StepWindow"
    update_phase: "UpdatePhase"
    skip_update: bool
    saved_step: int
    saved: list[Path]

    @property
    def complete(self) -> bool: ...

    def say(self, sentence: str) -> None: ...

    def heartbeat(self, phase: str) -> None: ...

    def evaluate(self) -> dict[str, Any]: ...

    def validation_loss(self) -> dict[str, float]: ...

    def save(self) -> None: ...

    def rollback(self) -> bool: ...

    def request_save(self) -> None: ...

    def end(self, reason: str) -> None: ...

    def fail(self, reason: str) -> None: ...


class Callback:
    """Base of callbacks: each hook does nothing until it is overridden.

    `run` is the `Trainer`: its public attributes and methods are what a callback may use.

    Every hook is called on every rank, the package's own callbacks first, then those of `train.callbacks` in the order
    of that list. An exception ends the run; `UserError` and `TrainingFailure` do so with one sentence. Hooks must not
    draw from torch's global random numbers if a resumed run is to equal an uninterrupted one.
    """

    def validate(self, config: "Config") -> None:
        """Refuse, with a `UserError`, a configuration that this callback cannot work with; before any work."""

    def validate_tokenizer(self, config: "Config", tokenizer: "PreTrainedTokenizerFast") -> None:
        """Refuse, with a `UserError`, a tokenizer that this callback cannot work with; before data is read."""

    def on_setup(self, run: TrainingRun) -> None:
        """Model and data are there, before anything is reported. Long preparations belong here: the watchdog does not
        run yet."""

    def on_train_begin(self, run: TrainingRun) -> None:
        """Before the first step of this process; after a resume, the state is already restored."""

    def on_step_begin(self, run: TrainingRun) -> None:
        """Before the forward passes of step `run.position.step + 1`."""

    def extra_inputs(self, run: TrainingRun, batch: "Batch") -> dict[str, Any]:
        """Arguments of the model's forward pass in addition to a micro-batch."""
        return {}

    def perturb(self, run: TrainingRun, inputs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the forward pass that depend on all others (`inputs`)."""
        return {}

    def gradients(self, run: TrainingRun, batches: "Sequence[Batch]") -> "StepLoss":
        """In place of the forward and backward passes of a step's micro-batches: `run.engine.backward` of whatever its
        update is to go by. One callback at most may do so, and then no other one's `extra_inputs` and `perturb` act."""
        raise AssertionError("called where it is overridden")

    def on_backward_end(self, run: TrainingRun) -> None:
        """Gradients of the whole step are there, neither clipped nor checked: `run.engine.gradient_square()`.

        Under ZeRO they lie in pieces on the ranks, and parameters have no `grad`. `run.skip_update = True` discards
        them.
        """

    def on_step_end(self, run: TrainingRun) -> None:
        """`run.position.step` is done; `run.skip_update` says whether its update was skipped."""

    def on_evaluate(self, run: TrainingRun, metrics: dict[str, Any]) -> None:
        """After an evaluation. `metrics` is the same on every rank; what is added to it goes into the record.

        `run.request_save()`, `run.end(reason)` and `run.fail(reason)` act at the end of the present step.
        """

    def on_record(self, run: TrainingRun, record: dict[str, Any]) -> None:
        """With each record, as metrics.jsonl gets it but for alarms. The same on every rank; not to be changed."""

    def on_save_begin(self, run: TrainingRun) -> None:
        """Before a checkpoint is written; a `TrainingFailure` here writes none."""

    def on_save(self, run: TrainingRun, checkpoint: Path) -> None:
        """After a checkpoint is written; with `checkpoint.async`, when its writing in the background has begun."""

    def on_rollback(self, run: TrainingRun) -> None:
        """The run is back at the checkpoint of step `run.position.step` (`train.on_nan: rollback`)."""

    def on_train_end(self, run: TrainingRun) -> None:
        """Once at the end, also after a failure (of `on_setup` too): it must not exchange anything between ranks."""

    def on_close(self, run: TrainingRun) -> None:
        """After every callback's `on_train_end`: close files and end threads. `on_setup` may have failed before."""

    def on_message(self, run: TrainingRun, sentence: str) -> None:
        """A sentence for the user."""

    def on_heartbeat(self, run: TrainingRun, phase: str) -> None:
        """The run makes progress, and `phase` comes next. Called many times a step."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: None, bool, int, float, str, lists, and dictionaries with text for keys.

        It must be the same on every rank: the main rank's is saved, and every rank of any later layout gets it.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state of the checkpoint that the run resumes from, or goes back to (`train.on_nan: rollback`)."""
