"""A run from configuration to finished checkpoint: what `moe-llm train` and `accelerate launch` call."""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from moe_llm.atomic import TEMPORARY, is_full
from moe_llm.checkpoint.digests import DamagedCheckpoint
from moe_llm.checkpoint.folder import checkpoint_near, complete_checkpoints, model_config_file
from moe_llm.checkpoint.manifest import MANIFEST, verify
from moe_llm.checkpoint.ranks import together
from moe_llm.checkpoint.resume import check_same_run, find_resumable, passed_over
from moe_llm.checkpoint.space import check_space
from moe_llm.checkpoint.state import read_trainer_state
from moe_llm.config import Config
from moe_llm.data.loader import load_data
from moe_llm.data.sources import check_sources
from moe_llm.data.tokenizer import build_tokenizer, check_vocab, resolve_vocab
from moe_llm.distributed.launcher import check_launcher
from moe_llm.distributed.mapped_state import check_directory
from moe_llm.distributed.runtime import Runtime, rank_from_environment, start, world_size_from_environment
from moe_llm.errors import Stopped, UserError
from moe_llm.finetune.init_from import check_origin
from moe_llm.finetune.selection import trained_names
from moe_llm.finetune.targets import check_lora
from moe_llm.logs import show_messages
from moe_llm.ops import host_memory
from moe_llm.progress import progress
from moe_llm.train.build import build_trained
from moe_llm.train.callbacks.registry import build_callbacks
from moe_llm.train.facts import gather_facts
from moe_llm.train.messages import farewell
from moe_llm.train.metrics import read_metrics
from moe_llm.train.optim import check_library
from moe_llm.train.precision import settle_precision
from moe_llm.train.provenance import Provenance, provenance_of
from moe_llm.train.run_lock import LOCK_FILES, RunLock, is_seen, written_by_owner
from moe_llm.train.signals import StoppedEarly, StopRequest
from moe_llm.train.start_watch import StartWatch
from moe_llm.train.trainer import Trainer

if TYPE_CHECKING:
    from moe_llm.train.callbacks.base import Callback

logger = logging.getLogger(__name__)

T = TypeVar("T")
_LAUNCHER_SECONDS = 1.0  # in which a launcher notices that a rank has ended, and ends the others
# what may be in a run directory before its config.yaml is: of a run that was ended early, and of `moe-llm tokenizer`
_OF_A_RUN = {
    "tokenizer",
    "checkpoints",
    "metrics.jsonl",
    "facts.json",
    "facts.damaged.json",
    "reference.safetensors",
    "wandb",
    "wandb_id",
    "router_base.safetensors",
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
    with StartWatch(config.train.hang_timeout_seconds):
        return _check_and_train(config)


def _check_and_train(config: Config) -> Path:
    show_messages()
    notes: list[str] = []  # told once nothing is refused any more, for a refusal is one sentence
    config = settle_precision(config, notes.append)
    check_launcher(config, notes.append)
    run_dir = Path(config.run.dir)
    config.check_layout(world_size_from_environment())
    with _told_by_its_machine():
        check_sources(config)
        trained_names(config)  # refuses what names nothing
        check_lora(config)
        check_library(config.optim)
        if config.parallel.nvme_path is not None:
            check_directory(config.parallel.nvme_path)
        callbacks = build_callbacks(config)
        _check_resume(run_dir, config)
        _check_run_dir(run_dir, config)
        if config.checkpoint.resume in ("auto", "never") and not any((run_dir / "checkpoints").glob("step-*")):
            check_origin(config)
    for note in notes:
        logger.warning(note)
    try:
        with StopRequest() as stop:
            with progress("joining the other ranks" if world_size_from_environment() > 1 else "starting"):
                runtime = start(config)
            try:
                with on_main_locked(runtime, run_dir):
                    checkpoint, finished = _train(config, run_dir, runtime, stop, callbacks)
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
        if not is_full(error):
            raise
        where = f" for {error.filename}" if error.filename else f" for run.dir={config.run.dir!r}"
        raise UserError(f"no space left{where}: free some, or set another run.dir") from error


@contextmanager
def _told_by_its_machine() -> Iterator[None]:
    """Report what is wrong before ranks are joined on another rank than the first, which may see other files: nobody else
    would. Where the first rank of a machine meets it too, its launcher ends the others before they repeat it."""
    try:
        yield
    except UserError as error:
        if rank_from_environment():
            if os.environ.get("LOCAL_RANK") != "0":
                time.sleep(_LAUNCHER_SECONDS)
            logger.error("rank %d: %s", rank_from_environment(), error)
        raise


def _train(
    config: Config, run_dir: Path, runtime: Runtime, stop: StopRequest, callbacks: "dict[str, Callback]"
) -> tuple[Path | None, bool]:
    """The last checkpoint, and whether the run has come to its end."""
    trainer = _set_up(config, run_dir, runtime, stop, callbacks)
    finished = trainer.fit()
    return trainer.saved[-1] if trainer.saved else trainer.source, finished


def _set_up(
    config: Config, run_dir: Path, runtime: Runtime, stop: StopRequest, callbacks: "dict[str, Callback]"
) -> Trainer:
    """Tokenizer, data, model and optimizer of a run, from its newest checkpoint if there is one. Collective."""
    source = _resume_source(config, run_dir, runtime)
    on_main(runtime, lambda: build_tokenizer(config, run_dir / "tokenizer") and None)
    tokenizer = build_tokenizer(config, run_dir / "tokenizer")
    config = resolve_vocab(config, tokenizer)
    check_vocab(config, tokenizer)
    for callback in callbacks.values():
        callback.validate_tokenizer(config, tokenizer)
    saved = {} if source is None else together(runtime, partial(read_trainer_state, source))
    show_progress = runtime.is_main and config.logging.console != "off"
    place = {"rank": runtime.rank, "world_size": runtime.world_size}
    data = together(
        runtime,
        lambda: load_data(config, tokenizer, **place, show_progress=show_progress, streams=saved.get("streams")),
    )
    config = config.with_fill(data.train.fill)

    def provenance_from(path: Path | None) -> Provenance:
        step = 0 if path is None else read_trainer_state(path).get("step", 0)
        return provenance_of(config, runtime, data, tokenizer, path, step)

    provenance = provenance_from(source)

    def instead(damaged: Path, error: DamagedCheckpoint) -> Path:
        nonlocal source, provenance
        if config.checkpoint.resume != "auto":
            raise error
        logger.warning(passed_over(damaged, error))
        source = _newest(run_dir, runtime, before=damaged)
        assert source is not None, "a run with checkpoints has a sound one or is refused"
        data.resume_streams(read_trainer_state(source).get("streams"))
        provenance = provenance_from(source)
        return source

    with progress("building the model"):
        engine, position = build_trained(config, runtime, source, instead)
    if config.data.has_preference:
        from moe_llm.train.callbacks.preference import prepare_reference

        prepare_reference(config, engine, runtime, data, run_dir, source)
    host_memory.trim()  # of what steps will not need: ranks that load in turns would each keep the most
    if position.step < config.max_steps:
        storage = {"dtype": config.checkpoint.dtype, "max_shard_size": config.checkpoint.max_shard_size}
        check_space(run_dir / "checkpoints", engine, **storage)
    return Trainer(
        config,
        runtime,
        engine,
        data,
        tokenizer,
        position,
        callbacks=callbacks,
        stop=stop,
        source=source,
        provenance=provenance.state(),
        facts=gather_facts(config, runtime, data, position.step),
    )


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
    """Hold the run directory's lock, on the main rank, while the body runs; all ranks are refused where it is taken, or
    where the directory is not one for all of them."""
    lock = RunLock(run_dir)
    on_main(runtime, lock.acquire)
    try:
        owner = runtime.gather(written_by_owner(run_dir))[0]
        seen = runtime.gather(is_seen(run_dir, owner))
        if not all(seen):
            raise UserError(
                f"rank {seen.index(False)} does not see what rank 0 writes to run.dir={str(run_dir)!r}: name a directory that all "
                "machines share"
            )
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
        check_same_run(held.read_text(encoding="utf-8", errors="replace"), config)
    elif (
        run_dir.is_dir()
        and not complete_checkpoints(run_dir / "checkpoints")
        and (others := {path.name for path in run_dir.iterdir() if not path.name.startswith(TEMPORARY)} - _OF_A_RUN)
    ):
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
    if resume not in ("auto", "never") and not (Path(resume) / MANIFEST).is_file():
        model_config_file(resume, f"checkpoint.resume={resume!r}")
        raise UserError(
            f"checkpoint.resume={resume!r} is no training checkpoint, for it has no {MANIFEST}: name one, such as "
            f"{checkpoint_near(Path(resume))}, or begin a run from these weights with model.init_from"
        )


def _resume_source(config: Config, run_dir: Path, runtime: Runtime) -> Path | None:
    """The checkpoint to start from, if any; its tensors are compared with their digests when they are read. Collective."""
    resume = config.checkpoint.resume
    if resume == "auto":
        return _newest(run_dir, runtime)
    if resume == "never":
        return None
    verify(Path(resume), runtime, hashes=False)
    return Path(resume)


def _newest(run_dir: Path, runtime: Runtime, before: Path | None = None) -> Path | None:
    root = run_dir / "checkpoints"
    source = find_resumable(root, report=logger.warning, ranks=runtime, hashes=False, before=before)
    if source is None and on_main(runtime, lambda: bool(complete_checkpoints(root))):
        raise UserError(
            f"run.dir={str(run_dir)!r} has checkpoints and none is sound: bring one back, name one elsewhere with "
            "checkpoint.resume=PATH, or set another run.dir to start anew"
        )
    return source
