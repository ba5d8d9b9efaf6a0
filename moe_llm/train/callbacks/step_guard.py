"""Whether a step may be taken: losses and gradients that are not finite, and where from; spikes of the loss.

Every decision rests on values reduced over the ranks, so that all ranks take the same one.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from moe_llm.config import Config
from moe_llm.distributed.engine import Engine
from moe_llm.distributed.runtime import Runtime
from moe_llm.errors import TrainingFailure
from moe_llm.train.callbacks.base import Callback, TrainingRun

Response = Literal["stop", "skip", "rollback"]


@dataclass(frozen=True)
class NonFiniteStep:
    """A step that must not be taken.

    step: counted from 1, as in the records. samples: [first, last] of each micro-batch whose loss is not finite.
    parameter, layer, expert (global index): where the backward pass first met a gradient that is not finite;
    None where there is none, or where it is no layer's and no expert's.
    """

    step: int
    samples: list[list[int]]
    step_samples: tuple[int, int]
    parameter: str | None
    layer: int | None
    expert: int | None
    bad_parameters: int
    parameters: int
    weights_finite: bool

    @property
    def sentence(self) -> str:
        begin, end = self.step_samples
        told = [f"step {self.step} (samples {begin} to {end}) is not finite"]
        if self.samples:
            told.append("the loss is not, of samples " + ", ".join(f"{a} to {b}" for a, b in self.samples))
        else:
            told.append("its losses are")
        if self.parameter is not None:
            expert = "" if self.expert is None else f", expert {self.expert}"
            told.append(
                f"gradients of {self.bad_parameters} of {self.parameters} parameters are not, in the order of the "
                f"backward pass first that of {self.parameter}{expert}"
            )
        elif not self.samples:
            told.append("each gradient is, and their norm is not")
        if not self.weights_finite:
            told.append("the weights themselves were not finite before it")
        return "; ".join(told)

    def record(self) -> dict[str, Any]:
        """For metrics.jsonl."""
        return {
            "samples": self.samples or [list(self.step_samples)],
            "loss_finite": not self.samples,
            "parameter": self.parameter,
            "layer": self.layer,
            "expert": self.expert,
        }


class StepGuard:
    """Looks at each step after its backward pass, before any weight changes."""

    def __init__(self, config: Config, engine: Engine, runtime: Runtime):
        self._config, self._engine, self._runtime = config, engine, runtime
        self._spikes = SpikeDetector(config.train.spike_threshold)
        self._bad_in_a_row = 0

    def inspect(self, step: int, first_sample: int, losses: list[Tensor]) -> NonFiniteStep | None:
        """What forbids the step, if anything. Collective.

        Args:
            step: the one about to be taken, counted from 1.
            first_sample: position of its batch in the data.
            losses: this rank's share for each of its micro-batches, as in `StepLosses.total`.
        """
        own = torch.stack([torch.stack(losses).sum().float(), self._engine.gradient_square()])
        loss, square = self._runtime.sum(own).tolist()
        self.spike = None
        if math.isfinite(loss) and math.isfinite(square):
            self.spike = self._spikes.add(loss / self._runtime.world_size)
            if self._config.train.on_nan != "rollback":
                self._bad_in_a_row = 0
            return None
        self._bad_in_a_row += 1
        return self._trouble(step, first_sample, losses)

    def respond(self, trouble: NonFiniteStep) -> tuple[Response, str]:
        """What to do about it, and why if that is not simply `train.on_nan`."""
        train = self._config.train
        if train.on_nan == "stop":
            return "stop", "train.on_nan=stop"
        if self._bad_in_a_row > train.max_bad_steps:
            return "stop", f"more than train.max_bad_steps={train.max_bad_steps} such steps"
        if train.on_nan == "skip" and not trouble.weights_finite:
            return "stop", "leaving out a batch does not mend weights"
        return train.on_nan, f"train.on_nan={train.on_nan}"

    def saved(self) -> None:
        """A checkpoint was written: rollbacks from here on go back to a new place."""
        self._bad_in_a_row = 0

    def weights_finite(self) -> bool:
        """On all ranks. Collective."""
        return not self._runtime.any(not self._engine.weights_finite())

    def _trouble(self, step: int, first_sample: int, losses: list[Tensor]) -> NonFiniteStep:
        train = self._config.train
        rank, ranks = self._runtime.reads["rank"], self._runtime.reads["world_size"]
        names = [entry.name for entry in self._engine.entries() if entry.trainable]
        width = train.micro_batch_size
        begins = [first_sample + (i * ranks + rank) * width for i in range(len(losses))]
        own = [[begin, begin + width - 1] for begin, loss in zip(begins, losses) if not loss.isfinite()]
        found = self._runtime.gather((own, self._bad_gradients()))
        bad_samples = [list(pair) for pair in sorted({tuple(pair) for samples, _ in found for pair in samples})]
        bad = [gradient for _, gradients in found for gradient in gradients]
        # the last in the order of the forward pass is the first in that of the backward pass
        last = max((names.index(name) for name, _ in bad), default=None)
        parameter = None if last is None else names[last]
        experts = [expert for name, expert in bad if name == parameter and expert is not None]
        return NonFiniteStep(
            step=step,
            samples=bad_samples,
            step_samples=(first_sample, first_sample + train.global_batch_size - 1),
            parameter=parameter,
            layer=_layer(parameter),
            expert=min(experts, default=None),
            bad_parameters=len({name for name, _ in bad}),
            parameters=len(names),
            weights_finite=self.weights_finite(),
        )

    def _bad_gradients(self) -> list[tuple[str, int | None]]:
        """(name, first bad expert) of this rank's parameters whose gradient is not finite. Collective."""
        bad = []
        for entry in self._engine.entries():
            if not entry.trainable:
                continue
            gradient = self._engine.gradient(entry.name)
            if gradient.isfinite().all():
                continue
            expert = None
            if entry.experts is not None:
                sound_E = gradient.isfinite().flatten(1).all(1)
                expert = entry.experts[int(sound_E.logical_not().nonzero()[0])]
            bad.append((entry.name, expert))
        return bad


def _layer(parameter: str | None) -> int | None:
    """3 for `model.layers.3.mlp...`, None for what is in no layer."""
    _, found, rest = (parameter or "").partition("layers.")
    return int(rest.partition(".")[0]) if found else None


class SpikeDetector:
    """Tells losses far above the running median, in robust standard deviations (1.4826 times the median absolute
    deviation, but at least a hundredth of the median: on a plateau the deviation itself goes to 0).

    The window slides over all losses, spikes too, so that it follows a lasting change of level. A falling curve
    widens its own deviation, and its losses lie below the median: training well is never an alarm.

    Args:
        threshold: deviations above the median that make a spike; None never does.
    """

    WINDOW, WARM_UP = 64, 16

    def __init__(self, threshold: float | None):
        self.threshold = threshold
        self._losses: deque[float] = deque(maxlen=self.WINDOW)

    def add(self, loss: float) -> str | None:
        """Take the next step's loss; what to say of it if it is a spike."""
        before = list(self._losses)
        self._losses.append(loss)
        if self.threshold is None or len(before) < self.WARM_UP:
            return None
        median = statistics.median(before)
        deviation = 1.4826 * statistics.median(abs(x - median) for x in before)
        score = (loss - median) / max(deviation, 0.01 * abs(median), 1e-12)
        if score <= self.threshold:
            return None
        return f"loss {loss:.4f} is {score:.0f} deviations above the last {len(before)} steps' median {median:.4f}"


class StepGuardCallback(Callback):
    """Takes no step whose loss or gradient is not finite (`train.on_nan`), and saves no weights that are not."""

    _guard: StepGuard

    def on_setup(self, run: TrainingRun) -> None:
        self._guard = StepGuard(run.config, run.engine, run.runtime)

    def on_backward_end(self, run: TrainingRun) -> None:
        guard, step = self._guard, run.position.step + 1
        trouble = guard.inspect(step, run.position.samples, run.window.step_losses)
        if trouble is None:
            if guard.spike is not None:
                run.say(f"step {step}: {guard.spike}")
                run.window.remarks["spike"] = True
            return
        response, why = guard.respond(trouble)
        if response == "stop":
            run.engine.discard()
            raise TrainingFailure(f"{trouble.sentence} ({why}): {_last_words(trouble, run)}")
        if response == "rollback" and run.rollback():
            run.say(
                f"{trouble.sentence}: back to the weights of step {run.position.step}, on with the data behind its "
                f"batch ({why})"
            )
            run.window.clear(rolled_back_from=step)
            return
        run.say(f"{trouble.sentence}: its batch is left out ({why})")
        run.skip_update = True
        run.window.remarks |= {"skipped": True, "trouble": trouble.record()}

    def on_save_begin(self, run: TrainingRun) -> None:
        """Refuse a checkpoint that no run can go on from."""
        if not self._guard.weights_finite():
            raise TrainingFailure(
                f"the weights of step {run.position.step} are not finite and are not saved, though its gradient was: "
                "go on from the newest checkpoint with a lower optim.lr or a larger optim.eps"
            )

    def on_save(self, run: TrainingRun, checkpoint: Path) -> None:
        self._guard.saved()


def _last_words(trouble: NonFiniteStep, run: TrainingRun) -> str:
    """Save what was before the bad step, if it is sound and new, and say how to go on."""
    if not trouble.weights_finite:
        return "go on from an older checkpoint (checkpoint.resume=PATH) with a lower optim.lr"
    position = run.position
    if position.step != run.saved_step and position.updates > 0:
        run.save()
    saved = position.step == run.saved_step > 0
    kept = f"the weights of step {position.step} are saved" if saved else "nothing is changed"
    return (
        f"{kept}; the same command meets the same batch again: add train.on_nan=skip to leave it out, or go on from "
        "an older checkpoint (checkpoint.resume=PATH) with a lower optim.lr"
    )
