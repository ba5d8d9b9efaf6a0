"""The training loop: one class that knows model, data, engine and checkpoints, and calls callbacks for all else."""

import hashlib
import logging
import math
from collections.abc import Mapping
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moe_llm.checkpoint.background import Background
from moe_llm.checkpoint.ranks import together
from moe_llm.checkpoint.resume import find_resumable
from moe_llm.checkpoint.state import save_checkpoint
from moe_llm.config import Config, dump_config
from moe_llm.config.adversarial import UpdatePhase
from moe_llm.data.loader import Data, TrainLoader
from moe_llm.data.packing import Batch
from moe_llm.distributed.dispatch import traffic
from moe_llm.distributed.engine import Engine
from moe_llm.distributed.runtime import Runtime
from moe_llm.distributed.side_group import SideGroup
from moe_llm.distributed.step_loss import StepLoss, forward_passes
from moe_llm.errors import TrainingFailure
from moe_llm.evaluation.evaluate import validation_loss
from moe_llm.model.moe.router import begin_step, end_step
from moe_llm.ops import host_memory
from moe_llm.train.build import restore
from moe_llm.train.callbacks.base import Callback
from moe_llm.train.callbacks.registry import collect_states, restore_states
from moe_llm.train.messages import announce
from moe_llm.train.metrics import StepWindow, expert_gradient_norms, routing_metrics
from moe_llm.train.position import Position
from moe_llm.train.signals import StopRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)


class Trainer:
    """Trains from `position` to `config.max_steps`.

    Resuming is exact because everything that is not in a checkpoint is a function of (seed, step): data order,
    learning rate and router noise.

    Callbacks are given the trainer itself. They may read every public attribute and call every public method:

    config: as resolved. engine: `engine.model` is the `MoEDecoder` with this rank's experts. runtime: `rank`,
    `world_size`, `is_main` and exchanges between ranks. data, tokenizer: of the run. position: how many steps are
    finished (`step`), how many blocks they have read (`samples`) and how many tokens up to the newest record. source:
    the checkpoint that the run was resumed from, None for a new run. facts: what facts.json gets of this start.
    window: losses and routing since the newest record; what is put into `window.remarks` makes the step recorded.
    update_phase: what the present step trains. skip_update: set in `on_backward_end` to discard the step's gradients.

    Args:
        callbacks: by label, in the order in which they are called.
        provenance: what checkpoints say they were made from.
    """

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        engine: Engine,
        data: Data,
        tokenizer: "PreTrainedTokenizerFast",
        position: Position,
        *,
        callbacks: Mapping[str, Callback] | None = None,
        stop: StopRequest | None = None,
        source: Path | None = None,
        provenance: dict[str, Any] | None = None,
        facts: dict[str, Any] | None = None,
    ):
        self.config, self.runtime, self.engine = config, runtime, engine
        self.data, self.tokenizer, self.position = data, tokenizer, position
        self.source, self.provenance, self.facts = source, provenance, facts
        self.run_dir, self.max_steps = Path(config.run.dir), config.max_steps
        self.callbacks = dict(callbacks or {})
        self.saved: list[Path] = []
        self.window = StepWindow(runtime)
        self.update_phase: UpdatePhase = "all"
        self.skip_update = False
        self.saved_step = position.step
        self._stop = stop or StopRequest()
        self._rolled_back = self._save_requested = False
        self._ending: str | None = None
        self._failure: str | None = None
        # by hook, those callbacks that override it: a feature that is off costs a step nothing
        self._overriding: dict[str, list[Callback]] = {}
        self._loader = TrainLoader(
            data.train,
            position=position.samples,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            **runtime.reads,
        )
        asynchronous = config.checkpoint.async_
        self._background = Background(SideGroup(runtime), logger.warning, self.heartbeat) if asynchronous else None

    # ---------------------------------------------------------------------------------------------- the run as a whole

    def fit(self) -> bool:
        """Train to the end; false where a signal has ended the run before that. Saved either way. Collective.

        Raises:
            TrainingFailure: a step that must not be taken, or a callback that ends the run.
        """
        try:
            self._each("on_setup")
            if self.source is not None:
                restore_states(self.callbacks, self.position.callbacks or {}, self.say)
            collect_states(self.callbacks)  # refused now rather than when the first checkpoint is due
            announce(self)
            self._stop.defer()
            self._each("on_train_begin")
            with self._background or nullcontext():  # the last save is complete before anything is said of it
                while self.position.step < self.max_steps and self._ending is None:
                    self.train_step()
                    if self._rolled_back:
                        self._rolled_back = False
                    elif self._finish_step():
                        return False
            return True
        finally:
            self._close()

    def _close(self) -> None:
        try:
            self._each("on_train_end")
        finally:
            self._loader.close()
            self._each("on_close")

    @property
    def complete(self) -> bool:
        """Whether the run has come to its end, by its last step or because a callback has ended it."""
        return self._failure is None and (self.position.step >= self.max_steps or self._ending is not None)

    # -------------------------------------------------------------------------------------------------------- one step

    def train_step(self) -> None:
        """Forward and backward passes of one optimizer step, and its update."""
        config, engine, position, window = self.config, self.engine, self.position, self.window
        self.heartbeat(f"step {position.step + 1}, data")
        batches = [batch.to(self.runtime.device) for batch in next(self._loader)]
        seed_noise(config.run.seed, position.step, self.runtime.rank)
        begin_step(engine.model, position.step)
        self.skip_update = False
        self._each("on_step_begin")
        instead = self._with("gradients")
        step_loss = instead[0].gradients(self, batches) if instead else self._accumulate_gradients(batches)
        self._each("on_backward_end")
        if self._rolled_back:
            position.samples += config.train.global_batch_size
            return
        self.heartbeat(f"step {position.step + 1}, optimizer")
        window.lr, window.grad_norm = learning_rate(config, position.step, self.max_steps), math.nan
        if self.skip_update:
            engine.discard()
            if position.updates == 0:
                engine.make_optimizer_state(0)  # a checkpoint has the optimizer's tensors, also before the first update
            position.skipped += 1
        else:
            # If phases alternate, the next record's step may train the routers alone.
            if self.update_phase == "rest" or (self.update_phase == "all" and self._will_be_recorded()):
                window.expert_norms = expert_gradient_norms(engine, self.runtime)
            window.grad_norm = engine.step(window.lr)
            if self.update_phase != "rest":
                end_step(engine.model, step_loss.step_routing)
        position.step += 1
        position.samples += config.train.global_batch_size
        window.end_step(step_loss.step_routing, step_loss.tokens)
        self._each("on_step_end")

    def _accumulate_gradients(self, batches: list[Batch]) -> StepLoss:
        """All micro-batches' forward and backward passes; the loss's counts of the whole step."""
        name = f"step {self.position.step + 1}"
        step_loss = StepLoss(self.config.model, self.runtime, batches, self.engine.model.router_losses)
        passes = forward_passes(
            self.engine,
            step_loss,
            batches,
            held=self.config.train.held_micro_batches,
            teach=self._extra_inputs,
            perturb=self._perturbation if self._with("perturb") else None,
            heartbeat=lambda phase: self.heartbeat(f"{name}, {phase}"),
        )
        for i, output in enumerate(passes):
            losses = step_loss(output)
            self.engine.backward(losses.total, last=i == len(batches) - 1)
            self.window.add(losses)
        return step_loss

    def _finish_step(self) -> bool:
        """Evaluate, record and save where it is due; true where a signal has asked for the end of the run."""
        config, step = self.config, self.position.step
        last = step == self.max_steps
        stopping = self.runtime.any(self._stop.requested)
        evaluating = last or _due(config.evaluate.every_steps, step)
        measured = self.evaluate() if evaluating else {}
        asked = self._save_requested or self._ending is not None or self._failure is not None
        saving = last or stopping or asked or _due(config.checkpoint.every_steps, step)
        # Also at each save, so that a resumed run's records are means over the same steps as an uninterrupted one's.
        if evaluating or saving or self.window.remarks or _due(config.logging.every_steps, step):
            self._record(measured)
        if saving:
            self.heartbeat("saving")
            self.save()
            self.window.restart_clock()
        if self._failure is not None:
            raise TrainingFailure(f"{self._failure}: the weights of step {step} are saved")
        if self._ending is not None and not last:
            self.say(self._ending)
        return stopping and not last and self._ending is None

    def _record(self, measured: dict[str, Any]) -> None:
        window, position = self.window, self.position
        assert window.routing is not None, "a record is of at least one step"
        position.tokens += window.read_tokens()
        record: dict[str, Any] = {
            "step": position.step,
            "tokens": position.tokens,
            **window.read(self.config),
            "grad_norm": window.grad_norm,
            "lr": window.lr,
            **window.remarks,
            "sources": self.data.progress(position.samples),
            "moe": routing_metrics(window.routing) | traffic(self.engine.model),
        }
        if window.expert_norms is not None:
            record["moe"]["expert_grad_norm"] = window.expert_norms
        record |= measured
        self._each("on_record", record)
        window.clear()
        traffic(self.engine.model)  # what the evaluation exchanged belongs to no step

    def _will_be_recorded(self) -> bool:
        """Whether the coming step has a line in metrics.jsonl, as far as that is known before its update."""
        config, step = self.config, self.position.step + 1
        every = (config.logging.every_steps, config.evaluate.every_steps, config.checkpoint.every_steps)
        return step == self.max_steps or any(_due(steps, step) for steps in every)

    # ------------------------------------------------------------------------------- what callbacks and the loop call

    def evaluate(self) -> dict[str, Any]:
        """Metrics of the held-out text, with those that callbacks add. Collective."""
        with self.engine.weights_for_use():
            measured = dict(self.validation_loss())
            self._each("on_evaluate", measured)
        host_memory.trim()
        return measured

    def validation_loss(self) -> dict[str, Any]:
        """The held-out loss of the engine's present weights. Collective."""
        with self.engine.weights_for_use():
            return validation_loss(self.config, self.engine, self.runtime, self.data, self.heartbeat)

    @cached_property
    def _config_text(self) -> str:
        return dump_config(self.config)

    def save(self) -> None:
        """Write a checkpoint of the present weights. Collective."""
        config, position = self.config, self.position
        self._each("on_save_begin")
        position.callbacks = collect_states(self.callbacks) or None
        position.streams = self.data.streams(position.samples)
        with self.engine.weights_for_use():
            checkpoint = save_checkpoint(
                self.run_dir / "checkpoints",
                HeartbeatEngine(self.engine, self),
                step=position.step,
                trainer_state=position.state(),
                model_config=config.model,
                run_config_text=self._config_text,
                tokenizer=self.tokenizer,
                keep_last=config.checkpoint.keep_last,
                best_step=position.best_step,
                background=self._background,
                provenance=self.provenance,
                dtype=config.checkpoint.dtype,
                max_shard_size=config.checkpoint.max_shard_size,
            )
        self.saved.append(checkpoint)
        self.saved_step, self._save_requested = position.step, False
        self._each("on_save", checkpoint)
        host_memory.trim()

    def rollback(self) -> bool:
        """Restore the newest sound checkpoint of the run; the data goes on behind what has been read, as in PaLM's
        training (Chowdhery et al. 2022, section 5.1). False where there is none. Collective.

        In `on_backward_end` this ends the step without an update.
        """
        self.heartbeat("going back to a checkpoint")
        if self._background is not None:
            together(self._background.ranks, self._background.wait)  # the newest may still be on its way to the disk
        newest = find_resumable(self.run_dir / "checkpoints", report=self.say, ranks=self.runtime)
        if newest is None:
            return False
        self.engine.discard()
        restored = restore(self.engine, newest, hashes=False)
        vars(self.position).update(vars(restored), samples=self.position.samples)
        restore_states(self.callbacks, restored.callbacks or {}, self.say)
        self._each("on_rollback")
        self._rolled_back = True
        return True

    def request_save(self) -> None:
        """Write a checkpoint at the end of the present step."""
        self._save_requested = True

    def end(self, reason: str) -> None:
        """End the run as complete after the present step, which is saved; at the start, before the first one."""
        self._ending = reason

    def fail(self, reason: str) -> None:
        """Save the present step, then end the run with a `TrainingFailure`."""
        self._failure = reason

    def say(self, sentence: str) -> None:
        """Show a sentence to the user, once."""
        self._each("on_message", sentence)

    def heartbeat(self, phase: str) -> None:
        """Tell the watchdog what comes next; a callback calls it where its work takes minutes."""
        self._each("on_heartbeat", phase)

    # -------------------------------------------------------------------------------------------------------- callbacks

    def _with(self, hook: str) -> list[Callback]:
        """The callbacks that override a hook, in order."""
        if hook not in self._overriding:
            default, known = getattr(Callback, hook), self.callbacks.values()
            self._overriding[hook] = [each for each in known if getattr(type(each), hook) is not default]
        return self._overriding[hook]

    def _each(self, hook: str, *args: Any) -> None:
        for callback in self._with(hook):
            getattr(callback, hook)(self, *args)

    def _extra_inputs(self, batch: Batch) -> dict[str, Any]:
        given: dict[str, Any] = {}
        for callback in self._with("extra_inputs"):
            given |= callback.extra_inputs(self, batch)
        return given

    def _perturbation(self, inputs: dict[str, Any]) -> dict[str, Any]:
        given: dict[str, Any] = {}
        for callback in self._with("perturb"):
            given |= callback.perturb(self, inputs)
        return given


class HeartbeatEngine:
    """An engine of which every tensor read, as a save does, is a sign of life."""

    def __init__(self, engine: Engine, trainer: Trainer):
        self._engine, self._trainer = engine, trainer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def read(self, name: str, kind: str) -> torch.Tensor:
        self._trainer.heartbeat(f"saving {name}")
        return self._engine.read(name, kind)


def seed_noise(seed: int, step: int, rank: int) -> None:
    """Random numbers of a step as a function of (seed, step, rank): nothing of them needs to be saved."""
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def learning_rate(config: Config, step: int, total: int | None = None) -> float:
    """The rate of optimizer step `step` (counted from 0): a pure function, so nothing of it needs saving.

    Linear warm-up, then: cosine down to min_lr_ratio (Loshchilov and Hutter 2017); wsd: constant, then linear down
    in the last decay_ratio of the steps (Hu et al. 2024); or constant.

    total: steps of the run, where the caller knows them.
    """
    optim, total = config.optim, total or config.max_steps
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    floor = optim.min_lr_ratio
    if optim.schedule == "cosine":
        progress = (step - optim.warmup_steps) / max(1, total - optim.warmup_steps)
        factor = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    elif optim.schedule == "wsd":
        decay_steps = max(1, round(optim.decay_ratio * total))
        factor = floor + (1 - floor) * min(1.0, max(0.0, (total - step) / decay_steps))
    else:
        factor = 1.0
    return optim.lr * factor
