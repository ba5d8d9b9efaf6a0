"""The training loop."""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from moe_llm.config import Config
from moe_llm.data.loader import TrainLoader
from moe_llm.data.packing import Batch
from moe_llm.distributed.dispatch import traffic
from moe_llm.distributed.engine import Engine
from moe_llm.distributed.forward_passes import forward_passes
from moe_llm.distributed.runtime import Runtime
from moe_llm.distributed.step_loss import StepLoss, StepLosses
from moe_llm.errors import TrainingFailure
from moe_llm.model.moe.routers import begin_step, end_step, router_losses
from moe_llm.model.moe.routing import RoutingStatistics
from moe_llm.train.metrics import expert_gradient_norms, routing_metrics
from moe_llm.train.optim import learning_rate
from moe_llm.train.position import Position
from moe_llm.train.signals import StopRequest
from moe_llm.train.step_guard import NonFiniteStep, StepGuard

if TYPE_CHECKING:
    from moe_llm.train.callbacks.base import Callback, TrainingRun


class Verdict(NamedTuple):
    """What an evaluation means for the run, the same on every rank.

    keep: its weights are to be saved. ending: why the run is complete now; failure: why it cannot go on.
    """

    keep: bool = False
    ending: str | None = None
    failure: str | None = None


@dataclass
class Callbacks:
    """What the loop calls: `evaluate` gives validation metrics, `judge` says what they mean, `record` takes a finished
    record, `save` writes a checkpoint, `rollback` restores the newest one (None if there is none),
    `add_gradients` goes before a step's micro-batches, `teach` gives what a micro-batch's forward pass takes beside it,
    `perturb` what it takes beside all that, `say` tells the user a sentence, and `heartbeat` is told what comes next, again
    and again. `users` are the callbacks of `train.callbacks`, whose hooks are given `run`."""

    evaluate: Callable[[], dict[str, Any]]
    record: Callable[[dict[str, Any]], None]
    save: Callable[[Position], None]
    rollback: Callable[[], Position | None] = lambda: None
    add_gradients: Callable[[], None] = lambda: None
    teach: Callable[[Batch], dict[str, Any]] = lambda batch: {}
    perturb: Callable[[dict[str, Any]], dict[str, Any]] = lambda inputs: {}
    judge: Callable[[dict[str, Any], Position], Verdict] = lambda measured, position: Verdict()
    say: Callable[[str], None] = lambda sentence: None
    heartbeat: Callable[[str], None] = lambda phase: None
    users: "Sequence[Callback]" = ()
    run: "TrainingRun | None" = None

    def each(self, hook: str, *args: Any) -> None:
        """Call one hook of every user's callback, in order."""
        for callback in self.users:
            getattr(callback, hook)(self.run, *args)


def train_loop(
    config: Config,
    engine: Engine,
    runtime: Runtime,
    loader: TrainLoader,
    position: Position,
    stop: StopRequest,
    callbacks: Callbacks,
) -> bool:
    """Train until `config.max_steps`; false if asked to stop before. Saved either way, `position` is moved on.

    A step whose loss or gradient is not finite is not taken: see `train.on_nan`.
    Resuming is exact because all else is a function of (seed, step): data order, learning rate, router noise.
    """
    window, health = _Window(runtime), StepGuard(config, engine, runtime)
    saved_step = position.step
    while position.step < config.max_steps:
        name = f"step {position.step + 1}"
        callbacks.heartbeat(f"{name}, data")
        batches = [batch.to(runtime.device) for batch in next(loader)]
        seed_noise(config.run.seed, position.step, runtime.rank)
        begin_step(engine.model, position.step)
        turn = config.train.adversarial.turn(position.updates)
        engine.set_phase(turn)
        callbacks.add_gradients()
        callbacks.each("on_step_begin")
        step_loss = StepLoss(config.model, runtime, batches)
        passes = forward_passes(
            engine,
            step_loss,
            batches,
            teach=callbacks.teach,
            perturb=None if config.train.adversarial.epsilon is None else callbacks.perturb,
            heartbeat=lambda phase, name=name: callbacks.heartbeat(f"{name}, {phase}"),
        )
        for i, output in enumerate(passes):
            losses = step_loss(output)
            engine.backward(losses.total, last=i == len(batches) - 1)
            window.add(losses)
        callbacks.each("on_backward_end")
        callbacks.heartbeat(f"{name}, optimizer")
        rate = learning_rate(config, position.step)
        trouble = health.inspect(position.step + 1, position.samples, window.step_losses)
        if trouble is None:
            # where turns are taken, the step of the next record may be the routers'
            if turn == "rest" or (turn == "all" and _to_be_recorded(config, position.step + 1)):
                window.expert_norms = expert_gradient_norms(engine, runtime)
            norm = engine.step(rate)
            if turn != "rest":
                end_step(engine.model, step_loss.routing)
            if config.checkpoint.ema.due(position.step + 1):
                engine.update_average()
        else:
            norm = math.nan
            engine.discard()
            if _rolled_back(trouble, health, engine, position, saved_step, callbacks):
                position.samples += config.train.global_batch_size
                window.clear(rolled_back_from=trouble.step)
                continue
            position.skipped += 1
        position.step += 1
        position.samples += config.train.global_batch_size
        window.end_step(step_loss.routing, step_loss.tokens)
        callbacks.each("on_step_end")

        last = position.step == config.max_steps
        stopping = runtime.any(stop.requested)
        evaluating = last or _due(config.evaluate.every_steps, position.step)
        measured = callbacks.evaluate() if evaluating else {}
        if evaluating:
            callbacks.each("on_evaluate", measured)
        verdict = callbacks.judge(measured, position)
        saving = last or stopping or any(verdict) or _due(config.checkpoint.every_steps, position.step)
        remarks = window.remarks | _remarks(trouble, health.spike, position.step, callbacks.say)
        # Also at each save, so that a resumed run's records are means over the same steps as an uninterrupted one's.
        if evaluating or saving or remarks or _due(config.logging.every_steps, position.step):
            position.tokens += window.read_tokens()
            record = {
                "step": position.step,
                "tokens": position.tokens,
                **window.read(config),
                "grad_norm": norm,
                "lr": rate,
                **remarks,
                "moe": routing_metrics(window.routing) | traffic(engine.model),
            }
            if window.expert_norms is not None:
                record["moe"]["expert_grad_norm"] = window.expert_norms
            record |= measured
            callbacks.record(record)
            callbacks.each("on_record", record)
            window.clear()
            traffic(engine.model)  # what the evaluation exchanged belongs to no step
        if saving:
            _save(health, position, callbacks)
            saved_step = position.step
            window.restart_clock()
        if verdict.failure is not None:
            raise TrainingFailure(f"{verdict.failure}: the weights of step {position.step} are saved")
        if verdict.ending is not None:
            if not last:
                callbacks.say(verdict.ending)
            return True
        if stopping and not last:
            return False
    return True


def seed_noise(seed: int, step: int, rank: int) -> None:
    """Random numbers of a step as a function of (seed, step, rank): nothing of them needs to be saved."""
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _rolled_back(
    trouble: NonFiniteStep, health: StepGuard, engine: Engine, position: Position, saved_step: int, callbacks: Callbacks
) -> bool:
    """Answer to a step that must not be taken: true after going back to a checkpoint, false to leave its batch out.

    Either way the data goes on behind the batch. After going back, what the lost steps had read is not read again,
    as in PaLM's training (Chowdhery et al. 2022, section 5.1): the same data would lead to the same place.

    Raises:
        TrainingFailure: neither is wanted, or neither has helped.
    """
    response, why = health.respond(trouble)
    if response == "stop":
        raise TrainingFailure(f"{trouble.sentence} ({why}): {_last_words(trouble, position, saved_step, callbacks)}")
    restored = callbacks.rollback() if response == "rollback" else None
    if restored is None:
        callbacks.say(f"{trouble.sentence}: its batch is left out ({why})")
        if position.updates == 0:
            engine.make_optimizer_state(0)  # a checkpoint has the optimizer's tensors, also before the first update
        return False
    callbacks.say(
        f"{trouble.sentence}: back to the weights of step {restored.step}, on with the data behind its batch ({why})"
    )
    samples = position.samples
    vars(position).update(vars(restored), samples=samples)
    return True


def _last_words(trouble: NonFiniteStep, position: Position, saved_step: int, callbacks: Callbacks) -> str:
    """Save what was before the bad step, if it is sound and new, and say how to go on."""
    if not trouble.weights_finite:
        return "go on from an older checkpoint (checkpoint.resume=PATH) with a lower optim.lr"
    if position.step != saved_step and position.updates > 0:
        callbacks.save(position)
        saved_step = position.step
    kept = f"the weights of step {position.step} are saved" if position.step == saved_step > 0 else "nothing is changed"
    return (
        f"{kept}; the same command meets the same batch again: add train.on_nan=skip to leave it out, or go on from "
        "an older checkpoint (checkpoint.resume=PATH) with a lower optim.lr"
    )


def _remarks(trouble: NonFiniteStep | None, spike: str | None, step: int, say: Callable[[str], None]) -> dict[str, Any]:
    """What a record says of a step beside its numbers."""
    if trouble is not None:
        return {"skipped": True, "trouble": trouble.record()}
    if spike is not None:
        say(f"step {step}: {spike}")
        return {"spike": True}
    return {}


def _save(health: StepGuard, position: Position, callbacks: Callbacks) -> None:
    """Save, unless the checkpoint would be one that no run can go on from."""
    if not health.weights_finite():
        raise TrainingFailure(
            f"the weights of step {position.step} are not finite and are not saved, though its gradient was: "
            "go on from the newest checkpoint with a lower optim.lr or a larger optim.eps"
        )
    callbacks.heartbeat("saving")
    callbacks.save(position)
    health.saved()


def _to_be_recorded(config: Config, step: int) -> bool:
    """Whether a step has a line in metrics.jsonl, as far as that is known before it is taken."""
    every = (config.logging.every_steps, config.evaluate.every_steps, config.checkpoint.every_steps)
    return step == config.max_steps or any(_due(steps, step) for steps in every)


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


class _Window:
    """Losses, routing and time since the last record."""

    def __init__(self, runtime: Runtime):
        self.runtime = runtime
        self.clear()

    def clear(self, **remarks: Any) -> None:
        """Start over, with what the next record says beside its numbers."""
        self.remarks = remarks
        self.steps = 0
        self.losses: torch.Tensor | None = None
        self.routing: RoutingStatistics | None = None
        self.expert_norms: list[list[float | None]] | None = None  # of the newest step that has them
        self.step_losses: list[torch.Tensor] = []
        self.tokens: torch.Tensor | None = None  # that are no padding, of all ranks, on the device
        self.seconds = 0.0
        self.restart_clock()

    def restart_clock(self) -> None:
        self.clock = time.perf_counter()

    def add(self, losses: StepLosses) -> None:
        self.step_losses.append(losses.total.detach())
        values = torch.cat([torch.stack([losses.lm, losses.aux, losses.z, losses.distill]), losses.own])
        self.losses = values if self.losses is None else self.losses + values

    def end_step(self, routing: RoutingStatistics, tokens: torch.Tensor) -> None:
        self.tokens = tokens.double() if self.tokens is None else self.tokens + tokens
        self.routing = routing.plus(self.routing)
        now = time.perf_counter()
        self.seconds += now - self.clock
        self.clock = now
        self.steps += 1
        self.step_losses = []

    def read_tokens(self) -> int:
        """Tokens of the window's steps without padding; waits for the device."""
        return 0 if self.tokens is None else round(self.tokens.item())

    def read(self, config: Config) -> dict[str, float]:
        """Means over the steps of the window, the same on every rank."""
        assert self.losses is not None
        summed = self.runtime.sum(self.losses.clone()) / self.runtime.world_size / self.steps
        lm, aux, z, distill, *values = summed.tolist()
        own = dict(zip(router_losses(config.model), values, strict=True))
        tokens = self.read_tokens()
        share = config.distill.alpha if config.distill.teachers else 0.0
        learned = (1 - share) * lm + share * distill if share else lm
        total = learned + config.model.router_aux_loss_coef * aux + config.model.router_z_loss_coef * z
        total += sum(loss.coefficient * value for loss, value in own.items())
        return {
            "loss": total,
            "lm_loss": lm,
            "aux_loss": aux,
            "z_loss": z,
            **{loss.name: value for loss, value in own.items()},
            **({"distill_loss": distill} if share else {}),
            "tokens_per_second": tokens / self.seconds,
            "fill": tokens / (config.tokens_per_step * self.steps),
        }
