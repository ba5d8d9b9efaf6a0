"""A run from configuration to finished checkpoint: what `moe-llm train` and `accelerate launch` call."""

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TypeVar

from moe_llm.checkpoint.background import Background
from moe_llm.checkpoint.resume import check_same_run, find_resumable
from moe_llm.checkpoint.state import load_checkpoint, read_step, save_checkpoint
from moe_llm.config import Config, dump_config
from moe_llm.data.loader import Data, TrainLoader, load_data
from moe_llm.data.sources import check_sources
from moe_llm.data.tokenizer import build_tokenizer, check_vocab, resolve_vocab
from moe_llm.errors import UserError
from moe_llm.model.init import build_model
from moe_llm.parallel.engine import Engine, build_engine, expert_range, shard_experts
from moe_llm.parallel.runtime import (
    Runtime,
    check_layout,
    start,
    world_size_from_environment,
)
from moe_llm.parallel.side_group import SideGroup
from moe_llm.train.console import Console
from moe_llm.train.evaluate import validation_loss
from moe_llm.train.loop import Callbacks, Position, train_loop
from moe_llm.train.metrics import MetricsFile, Wandb, read_metrics
from moe_llm.train.optim import build_optimizer, optimizer_kinds, parameter_groups
from moe_llm.train.signals import StopRequest

T = TypeVar("T")


def train(config: Config) -> None:
    """Train as configured, from the newest complete checkpoint of the run directory if there is one.

    Raises:
        UserError: bad input, found before any training and before anything is overwritten.
    """
    run_dir = Path(config.run.dir)
    check_layout(config, world_size_from_environment())
    check_sources(config)
    _check_run_dir(run_dir, config)
    runtime = start(config)
    try:
        with StopRequest() as stop:
            _train(config, run_dir, runtime, stop)
    finally:
        runtime.close()


def _train(config: Config, run_dir: Path, runtime: Runtime, stop: StopRequest) -> None:
    on_main(runtime, lambda: build_tokenizer(config, run_dir / "tokenizer") and None)
    tokenizer = build_tokenizer(config, run_dir / "tokenizer")
    config = resolve_vocab(config, tokenizer)
    check_vocab(config, tokenizer)
    data = load_data(
        config, tokenizer, rank=runtime.rank, world_size=runtime.world_size,
        show_progress=runtime.is_main and config.logging.console != "off",
    )
    source = _resume_source(config, run_dir, runtime)
    engine, position = build_trained(config, runtime, source)
    if runtime.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(dump_config(config), encoding="utf-8")

    reporter = Reporter(config, run_dir, runtime, position)
    _announce(reporter, config, engine, data, source, position)
    loader = TrainLoader(
        data.train, position=position.samples, global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size, rank=runtime.rank, world_size=runtime.world_size,
    )
    saved: list[Path] = []
    background = Background(SideGroup(runtime), _complain) if config.checkpoint.async_ else None

    def save(at: Position) -> None:
        saved.append(save_checkpoint(
            run_dir / "checkpoints", engine, step=at.step, trainer_state=vars(at), model_config=config.model,
            run_config_text=dump_config(config), tokenizer=tokenizer, dtype=config.checkpoint.dtype,
            max_shard_size=config.checkpoint.max_shard_size, keep_last=config.checkpoint.keep_last,
            background=background,
        ))

    callbacks = Callbacks(
        evaluate=lambda: validation_loss(config, engine, runtime, data), record=reporter.record, save=save
    )
    try:
        with background or nullcontext():  # the last save is complete before anything is said of it
            finished = train_loop(config, engine, runtime, loader, position, stop, callbacks)
    finally:
        loader.close()
        reporter.close()
    if runtime.is_main:
        _farewell(config, run_dir, saved[-1] if saved else source, finished)


def build_trained(config: Config, runtime: Runtime, source: Path | None) -> tuple[Engine, Position]:
    """The model under its engine, initialised from the seed or restored from a checkpoint at any layout."""
    experts = expert_range(config, runtime.rank)
    model = build_model(config.model, config.run.seed, prepare=lambda m: shard_experts(m, experts))
    groups = parameter_groups(model, config.optim.weight_decay)
    engine = build_engine(
        model, runtime, config, groups, lambda g: build_optimizer(g, config.optim), optimizer_kinds(config.optim)
    )
    if source is None:
        return engine, Position()
    engine.make_optimizer_state(read_step(source))
    # the newest sound one was found by its hashes; one that the user names has not been looked at
    return engine, Position(**load_checkpoint(source, engine, hashes=config.checkpoint.resume != "auto"))


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


def _resume_source(config: Config, run_dir: Path, runtime: Runtime) -> Path | None:
    """The checkpoint to start from, if any; the same on every rank."""
    resume, root = config.checkpoint.resume, run_dir / "checkpoints"
    if resume == "auto":
        return find_resumable(root, report=_complain, ranks=runtime)
    if resume == "never":
        if root.is_dir() and any(root.glob("step-*")):
            raise UserError(
                f"checkpoint.resume=never, but run.dir={str(run_dir)!r} holds checkpoints: "
                "name another run.dir, or delete them"
            )
        return None
    if not Path(resume).is_dir():
        raise UserError(f"checkpoint.resume={resume!r} is no checkpoint directory: give auto, never or a path")
    return Path(resume)


def _complain(sentence: str) -> None:
    print(sentence, file=sys.stderr)


class Reporter:
    """Where records go: metrics.jsonl, wandb, the console. Silent on ranks other than the main one."""

    def __init__(self, config: Config, run_dir: Path, runtime: Runtime, position: Position):
        self._config, self._sinks, self._console = config, [], None
        if runtime.is_main:
            self._sinks.append(MetricsFile(run_dir / "metrics.jsonl", position.step))
            if config.logging.wandb != "off":
                self._sinks.append(Wandb(config, run_dir))
            self._console = Console(config, position.step)

    def record(self, record: dict) -> None:
        for sink in self._sinks:
            sink.write(record)
        if self._console is not None:
            tokens_left = (self._config.max_steps - record["step"]) * self._config.tokens_per_step
            self._console.update(record, tokens_left / record["tokens_per_second"])

    def say(self, sentence: str) -> None:
        if self._console is not None:
            self._console.say(sentence)

    def close(self) -> None:
        if self._console is not None:
            self._console.close()
        for sink in self._sinks:
            sink.close()


def _announce(
    reporter: Reporter, config: Config, engine: Engine, data: Data, source: Path | None, position: Position
) -> None:
    parallel, world = config.parallel, engine.world_size
    layout = f"{world} rank{'s' if world > 1 else ''}"
    if world > 1:
        layout += f", {parallel.expert_parallel_size} of them share a set of experts, ZeRO-{parallel.zero_stage}"
    training = sum(part.tokens for part in data.statistics if part.split == "train")
    reporter.say(
        f"{config.model.num_params():,} parameters, {config.model.num_params(active=True):,} active · {layout} · "
        f"{config.train.precision} · {config.tokens_per_step:,} tokens a step · "
        f"{training:,} training tokens"
    )
    if source is not None:
        reporter.say(f"resuming from {source} at step {position.step}")


def _farewell(config: Config, run_dir: Path, checkpoint: Path | None, finished: bool) -> None:
    """Last words: how to go on, or what came out."""
    if not finished:
        print(f"stopped and saved: run the same command again to go on from {checkpoint}")
        return
    from moe_llm.train.plots import plot_run

    plots = plot_run(run_dir)
    if checkpoint is None:
        return
    measured = [r for r in read_metrics(run_dir / "metrics.jsonl") if "val_loss" in r]
    if measured:
        first, last = measured[0], measured[-1]
        print(
            f"validation loss {first['val_loss']:.4f} at step {first['step']}, {last['val_loss']:.4f} at step "
            f"{last['step']}: {last['val_bits_per_byte']:.4f} bits per byte"
        )
    print("plots: " + " ".join(str(p) for p in plots))
    if config.evaluate.sample_prompt is not None:
        from moe_llm.train.generate import generate

        print(f"--- a sample, from {config.evaluate.sample_prompt!r} ---")
        print(generate(checkpoint, config.evaluate.sample_prompt, max_new_tokens=config.evaluate.sample_tokens,
                       seed=config.run.seed))
        print("---")
    print(f"checkpoint: {checkpoint}")
