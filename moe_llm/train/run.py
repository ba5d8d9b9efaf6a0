"""A run from configuration to finished checkpoint: what `moe-llm train` and `accelerate launch` call."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from moe_llm.checkpoint.background import Background
from moe_llm.checkpoint.folder import complete_checkpoints
from moe_llm.checkpoint.manifest import verify
from moe_llm.checkpoint.ranks import is_disk_full, together
from moe_llm.checkpoint.resume import check_same_run, find_resumable
from moe_llm.checkpoint.state import check_space, load_checkpoint, read_trainer_state, save_checkpoint
from moe_llm.config import Config, dump_config
from moe_llm.data.loader import Data, TrainLoader, load_data
from moe_llm.data.sources import check_sources
from moe_llm.data.tokenizer import build_tokenizer, check_vocab, resolve_vocab
from moe_llm.distill.teachers import check_teachers, check_vocabularies
from moe_llm.distill.teaching import build_teaching
from moe_llm.distributed.engine import Engine, build_engine, shard_experts
from moe_llm.distributed.launcher import check_launcher
from moe_llm.distributed.runtime import Runtime, rank_from_environment, start, world_size_from_environment
from moe_llm.distributed.side_group import SideGroup
from moe_llm.errors import Stopped, TrainingFailure, UserError
from moe_llm.evaluation.evaluate import validation_loss
from moe_llm.finetune.freeze import freeze
from moe_llm.finetune.init_from import check_origin, load_origin
from moe_llm.finetune.lora import add_adapters
from moe_llm.finetune.selection import trained_names
from moe_llm.finetune.targets import check_lora
from moe_llm.model.decoder import MoEDecoder
from moe_llm.model.init import build_blank, build_model
from moe_llm.ops import host_memory
from moe_llm.train.adversarial import build_perturbation, check_adversarial
from moe_llm.train.ema import averaged_weights, check_ema, say_of_average
from moe_llm.train.facts import gather_facts
from moe_llm.train.loop import Callbacks, Verdict, train_loop
from moe_llm.train.metrics import read_metrics
from moe_llm.train.optim import build_optimizer, groups_by_part, optimizer_kinds, parameter_groups
from moe_llm.train.position import Position
from moe_llm.train.precision import settle_precision
from moe_llm.train.provenance import provenance_of
from moe_llm.train.reporter import Reporter, announce, farewell
from moe_llm.train.router_guard import RouterGuard, check_guard
from moe_llm.train.run_lock import LOCK_FILES, RunLock
from moe_llm.train.signals import StoppedEarly, StopRequest
from moe_llm.train.start_watch import StartWatch
from moe_llm.train.stopping import EarlyStopping, forget_lost_best
from moe_llm.train.trackers import check_trackers
from moe_llm.train.watchdog import HeartbeatEngine, Watchdog

if TYPE_CHECKING:
    from moe_llm.train.callbacks.base import Callback

T = TypeVar("T")
# what may be in a run directory before its config.yaml is: of a run that was ended early, and of `moe-llm tokenizer`
_OF_A_RUN = {
    "tokenizer",
    "config.yaml.tmp",
    "checkpoints",
    "metrics.jsonl",
    "facts.json",
    "wandb",
    "wandb_id",
    *LOCK_FILES,
}


def train(config: Config) -> Path:
    """Train as configured, from the newest complete checkpoint of the run directory if there is one.

    Returns:
        The newest checkpoint.

    Raises:
        UserError: bad input, found before any training and before anything is overwritten.
        Stopped: a signal has ended the run early; it is saved.
    """
    complain = _complain if rank_from_environment() == 0 else lambda sentence: None
    config = settle_precision(config, complain)
    check_launcher(config, complain)
    run_dir = Path(config.run.dir)
    config.check_layout(world_size_from_environment())
    check_sources(config)
    check_trackers(config)
    trained_names(config)  # refuses what names nothing
    check_lora(config)
    check_guard(config)
    check_adversarial(config)
    check_ema(config)
    check_teachers(config)
    users = _users_callbacks(config)
    _check_resume(run_dir, config)
    _check_run_dir(run_dir, config)
    if config.checkpoint.resume in ("auto", "never") and not any((run_dir / "checkpoints").glob("step-*")):
        check_origin(config)
    try:
        with StartWatch(config.train.hang_timeout_seconds), StopRequest() as stop:
            runtime = start(config)
            try:
                with on_main_locked(runtime, run_dir):
                    checkpoint, finished = _train(config, run_dir, runtime, stop, users)
                stopped_by = max(number or 0 for number in runtime.gather(stop.number))
            finally:
                runtime.close()
            if runtime.is_main:  # the other ranks may leave: nothing from here on is computed together
                farewell(config, run_dir, checkpoint, finished)
            if not finished:
                raise Stopped(stopped_by)
            assert checkpoint is not None, "a run saves its last step"
            return checkpoint
    except StoppedEarly:
        if rank_from_environment() == 0:
            print("stopped before training, so nothing was saved: run the same command again to start")
        raise Stopped(stop.number or signal.SIGINT) from None
    except OSError as error:
        if not run_dir.is_dir():
            raise UserError(f"run.dir={str(run_dir)!r} cannot be made ({error.strerror}): name another") from error
        if not is_disk_full(error):
            raise
        where = f" for {error.filename}" if error.filename else f" for run.dir={config.run.dir!r}"
        raise UserError(f"no space left{where}: free some, or set another run.dir") from error


def _train(
    config: Config, run_dir: Path, runtime: Runtime, stop: StopRequest, users: "dict[str, Callback]"
) -> tuple[Path | None, bool]:
    """The last checkpoint, and whether the run has come to its end."""
    source = _resume_source(config, run_dir, runtime)
    on_main(runtime, lambda: build_tokenizer(config, run_dir / "tokenizer") and None)
    tokenizer = build_tokenizer(config, run_dir / "tokenizer")
    config = resolve_vocab(config, tokenizer)
    check_vocab(config, tokenizer)
    check_vocabularies(config, tokenizer)
    data = together(
        runtime,
        lambda: load_data(
            config,
            tokenizer,
            rank=runtime.rank,
            world_size=runtime.world_size,
            show_progress=runtime.is_main and config.logging.console != "off",
        ),
    )
    config = config.with_fill(data.train.fill)
    step = 0 if source is None else read_trainer_state(source).get("step", 0)
    provenance = provenance_of(config, runtime, data, tokenizer, source, step)
    engine, position = build_trained(config, runtime, source)
    host_memory.trim()  # of what steps will not need: ranks that load in turns would each keep the most
    teach = build_teaching(
        config,
        runtime,
        data.train,
        tokenizer,
        start=position.samples,
        samples=(config.max_steps - position.step) * config.train.global_batch_size,
        say=_complain,
    )
    storage = {"dtype": config.checkpoint.dtype, "max_shard_size": config.checkpoint.max_shard_size}
    if position.step < config.max_steps:
        check_space(run_dir / "checkpoints", engine, **storage)
    if runtime.is_main:
        _write_config(config, run_dir)

    guard = _build_guard(config, engine, runtime, data, run_dir, source)
    reporter = Reporter(config, run_dir, runtime, position, gather_facts(config, runtime, data, position.step))
    announce(reporter, config, engine, data, source, position)
    say_of_average(config, engine, position, reporter.say)

    def say_if_lost(at: Position) -> None:
        lost = forget_lost_best(at, run_dir / "checkpoints")
        if lost is not None:
            reporter.say(lost)

    say_if_lost(position)
    loader = TrainLoader(
        data.train,
        position=position.samples,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        **runtime.reads,
    )
    watchdog = Watchdog(runtime, config.train.hang_timeout_seconds)
    saved: list[Path] = []
    background = Background(SideGroup(runtime), _complain, watchdog.heartbeat) if config.checkpoint.async_ else None

    def save(at: Position) -> None:
        if users:
            at.callbacks = collect_states(users)
        saved.append(
            save_checkpoint(
                run_dir / "checkpoints",
                HeartbeatEngine(engine, watchdog.heartbeat),
                step=at.step,
                trainer_state=at.state(),
                model_config=config.model,
                run_config_text=dump_config(config),
                tokenizer=tokenizer,
                keep_last=config.checkpoint.keep_last,
                best_step=at.best_step,
                background=background,
                provenance=provenance.state(),
                **storage,
            )
        )
        callbacks.each("on_save", saved[-1])
        host_memory.trim()

    def rollback() -> Position | None:
        watchdog.heartbeat("going back to a checkpoint")
        if background is not None:
            together(background.ranks, background.wait)  # the newest one may still be on its way to the disk
        newest = find_resumable(run_dir / "checkpoints", report=reporter.say, ranks=runtime)
        if newest is None:
            return None
        restored = restore(engine, newest, hashes=False)
        reporter.rewind(restored.step)
        if users:
            restore_states(users, restored.callbacks or {}, reporter.say)
        say_if_lost(restored)
        return restored

    early_stopping = EarlyStopping(config)

    def evaluate() -> dict[str, Any]:
        loss = validation_loss(config, engine, runtime, data, watchdog.heartbeat)
        if config.evaluate.ema and engine.averaged:
            with averaged_weights(engine, watchdog.heartbeat):
                averaged = validation_loss(config, engine, runtime, data, watchdog.heartbeat)
            loss |= {f"ema_{name}": value for name, value in averaged.items()}
        measured = loss if guard is None else loss | guard.measure()
        host_memory.trim()
        return measured

    def judge(measured: dict[str, Any], at: Position) -> Verdict:
        verdict = early_stopping.judge(measured, at)
        return verdict if guard is None else verdict._replace(failure=guard.why_failed(measured))

    callbacks = Callbacks(
        evaluate=evaluate,
        record=reporter.record,
        save=save,
        rollback=rollback,
        judge=judge,
        add_gradients=(lambda: None) if guard is None else guard.add_gradients,
        teach=teach,
        say=reporter.say,
        heartbeat=watchdog.heartbeat,
        perturb=build_perturbation(config, engine.model),
        users=tuple(users.values()),
    )
    if users:
        from moe_llm.train.callbacks.base import TrainingRun
        from moe_llm.train.callbacks.registry import collect_states, restore_states

        if source is not None:
            restore_states(users, position.callbacks or {}, reporter.say)
        collect_states(users)  # refused now rather than when the first checkpoint is due
        callbacks.run = TrainingRun(config, engine, runtime, run_dir, position, reporter.say, watchdog.heartbeat)
    stop.defer()
    try:
        with watchdog, background or nullcontext():  # the last save is complete before anything is said of it
            ended = early_stopping.why_ended(position) if position.step < config.max_steps else None
            if ended is not None:
                reporter.say(ended)
            callbacks.each("on_train_begin")
            finished = ended is not None or train_loop(config, engine, runtime, loader, position, stop, callbacks)
    finally:
        try:
            callbacks.each("on_train_end")
        finally:
            loader.close()
            reporter.close()
    return saved[-1] if saved else source, finished


def _users_callbacks(config: Config) -> "dict[str, Callback]":
    """Those of `train.callbacks` by label; without any, nothing of them is imported."""
    if not config.train.callbacks:
        return {}
    from moe_llm.train.callbacks.registry import build_callbacks

    return build_callbacks(config)


def _build_guard(
    config: Config, engine: Engine, runtime: Runtime, data: Data, run_dir: Path, source: Path | None
) -> RouterGuard | None:
    """The watch over the routers, where it is asked for, with the base's; the engine is as it was then. Collective.

    Raises:
        TrainingFailure: the run goes on from a checkpoint of routers that have moved too far.
    """
    if config.finetune.router_guard.action == "off":
        return None
    guard = RouterGuard(config, engine, runtime, data.validation)
    if source is None:
        guard.remember(run_dir)
        return guard
    if not guard.recall(run_dir):
        load_origin(engine, config.model)
        guard.remember(run_dir)
        restore(engine, source, hashes=False)
    failure = guard.why_failed(guard.measure())
    if failure is not None:
        raise TrainingFailure(f"{failure}: nothing is changed")
    return guard


def build_trained(config: Config, runtime: Runtime, source: Path | None) -> tuple[Engine, Position]:
    """The model under its engine, initialised from the seed or restored from a checkpoint at any layout."""
    model = _build_model(config, runtime)
    add_adapters(model, config)
    freeze(model, config)
    groups = groups_by_part(model, parameter_groups(model, config.optim.weight_decay), config)
    engine = build_engine(
        model, runtime, config, groups, lambda g: build_optimizer(g, config.optim), optimizer_kinds(config.optim)
    )
    if config.model.init_from is not None and (source is None or config.finetune.lora.rank is not None):
        load_origin(engine, config.model)
    if source is not None:
        return engine, restore(engine, source, hashes=False)  # `_resume_source` has compared them
    if config.train.adversarial.router_every is not None:
        engine.make_optimizer_state(0)  # what has to wait for its turn has it in checkpoints before that
    return engine, Position()


def _build_model(config: Config, runtime: Runtime) -> MoEDecoder:
    """With this rank's experts; where its weights are to come from elsewhere, it has none yet, and no dtype wider than
    it will need."""

    def keep_own(model: MoEDecoder) -> None:
        shard_experts(model, config.expert_range(runtime.rank))

    if config.model.init_from is None:
        return build_model(config.model, config.run.seed, prepare=keep_own)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    return build_blank(config.model, dtype, prepare=keep_own)


def restore(engine: Engine, source: Path, *, hashes: bool) -> Position:
    """Give the engine a checkpoint's weights and optimizer tensors, whatever it has done before. Collective."""
    engine.make_optimizer_state(Position(**read_trainer_state(source)).updates)
    return Position(**load_checkpoint(source, engine, hashes=hashes))


def on_main(runtime: Runtime, do: Callable[[], T]) -> T:
    """What `do()` gives on the main rank, on every rank; its `UserError` reaches all of them too."""
    result, error = None, None
    if runtime.is_main:
        try:
            result = do()
        except UserError as raised:
            error = str(raised)
    result, error = runtime.gather((result, error))[0]
    if error is not None:
        raise UserError(error)
    return result


@contextmanager
def on_main_locked(runtime: Runtime, run_dir: Path) -> Iterator[None]:
    """Hold the run directory's lock, on the main rank, while the body runs; all ranks are refused where it is taken."""
    lock = RunLock(run_dir)
    on_main(runtime, lock.acquire)
    try:
        yield
    finally:
        lock.release()


def _check_run_dir(run_dir: Path, config: Config) -> None:
    """Refuse a run directory that cannot be written or that holds another run."""
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"run.dir={str(run_dir)!r} is a file: name a directory")
    parent = next(p for p in [run_dir, *run_dir.absolute().parents] if p.exists())
    if not os.access(parent, os.W_OK):
        raise UserError(f"run.dir={str(run_dir)!r} cannot be written: name a directory that you may write to")
    held = run_dir / "config.yaml"
    if held.exists():
        check_same_run(held.read_text(encoding="utf-8"), config)
    elif run_dir.is_dir() and (others := {path.name for path in run_dir.iterdir()} - _OF_A_RUN):
        raise UserError(
            f"run.dir={str(run_dir)!r} holds {min(others)!r} and is no run's directory: name a new or an empty one"
        )
    metrics = run_dir / "metrics.jsonl"
    if metrics.exists():
        read_metrics(metrics)


def _check_resume(run_dir: Path, config: Config) -> None:
    """Refuse a `checkpoint.resume` that cannot be followed; all ranks do, before any of them writes."""
    resume = config.checkpoint.resume
    if resume == "never" and any((run_dir / "checkpoints").glob("step-*")):
        raise UserError(
            f"checkpoint.resume=never, but run.dir={str(run_dir)!r} holds checkpoints: "
            "name another run.dir, or delete them"
        )
    if resume not in ("auto", "never") and not Path(resume).is_dir():
        raise UserError(f"checkpoint.resume={resume!r} is no checkpoint directory: give auto, never or a path")


def _resume_source(config: Config, run_dir: Path, runtime: Runtime) -> Path | None:
    """The checkpoint to start from, if any, every file of it compared with its hash. Collective."""
    resume = config.checkpoint.resume
    if resume == "auto":
        root = run_dir / "checkpoints"
        source = find_resumable(root, report=_complain, ranks=runtime)
        if source is None and on_main(runtime, lambda: bool(complete_checkpoints(root))):
            raise UserError(
                f"run.dir={str(run_dir)!r} has checkpoints and none is sound: bring one back, name one elsewhere with "
                "checkpoint.resume=PATH, or set another run.dir to start anew"
            )
        return source
    if resume == "never":
        return None
    verify(Path(resume), runtime)
    return Path(resume)


def _write_config(config: Config, run_dir: Path) -> None:
    """In one step: a file cut short by a crash would shut its owner out of the run."""
    run_dir.mkdir(parents=True, exist_ok=True)
    temporary = run_dir / "config.yaml.tmp"
    temporary.write_text(dump_config(config), encoding="utf-8")
    os.replace(temporary, run_dir / "config.yaml")


def _complain(sentence: str) -> None:
    print(sentence, file=sys.stderr)
