"""First and last words of a run."""

import logging
from collections import Counter
from pathlib import Path

from moe_llm.checkpoint import folder
from moe_llm.checkpoint.state import read_trainer_state
from moe_llm.config import Config, ModelConfig
from moe_llm.data.loader import Data
from moe_llm.data.shapes import describe_shapes
from moe_llm.families.architectures import export_note
from moe_llm.finetune.init_from import rows_there
from moe_llm.finetune.selection import describe
from moe_llm.model.moe.routers import router_losses
from moe_llm.train.callbacks.base import TrainingRun
from moe_llm.train.facts import unusual_kernels
from moe_llm.train.metrics import read_metrics

logger = logging.getLogger(__name__)

_MANY_TIMES = 10  # readings of a source from which on they are told of
_NAMED = 3  # sources in one sentence


def _balances(model: ModelConfig) -> bool:
    """Whether anything is trained that goes by the choices of many tokens at once."""
    return bool(model.router_aux_loss_coef or router_losses(model))


def announce(run: TrainingRun) -> None:
    """First words: how large the model is, in which layout, on how much text, and from where."""
    config, data, position, source = run.config, run.data, run.position, run.source
    parallel, world = config.parallel, run.runtime.world_size
    layout = f"{world} rank{'s' if world > 1 else ''}"
    if world > 1:
        shared = parallel.sequence_parallel_size
        sequences = f"sequence parallel {shared}, " if shared > 1 else ""
        layout += f" (expert parallel {parallel.expert_parallel_size}, {sequences}ZeRO-{parallel.zero_stage})"
    training = sum(part.tokens for part in data.statistics if part.split == "train")
    run.say(
        f"{config.model.num_params():,} parameters, {config.model.num_params(active=True):,} active · {layout} · "
        f"{config.train.precision} · {config.tokens_per_step:,} tokens a step · "
        f"{training:,} training tokens"
    )
    for part in data.statistics:
        if part.shapes and part.split == "train":
            beside = next((p.shapes for p in data.statistics if p.name == part.name and p.split != "train"), {})
            run.say(f"{part.name}: {describe_shapes(Counter(part.shapes) + Counter(beside), sum(beside.values()))}")
        if config.data.packing == "best_fit" and part.split == "train":
            run.say(
                f"{part.name}: best_fit cuts {part.cut / max(part.documents, 1):.1%} of the documents and leaves "
                f"{part.padding:.1%} of the blocks to padding"
            )
        if part.dropped or part.truncated:
            run.say(
                f"{part.name} ({part.split}): of {part.documents} examples {part.dropped} are left out and "
                f"{part.truncated} cut, because a block has {config.data.sequence_length} tokens"
            )
    if source is None and config.model.resize_embeddings:
        before, now = rows_there(config.model), config.model.vocab_size
        run.say(
            f"model.resize_embeddings: the {before:,} rows of the embedding and the head become {now:,}, each new one the "
            "mean of those that are there"
            if now != before
            else f"model.resize_embeddings: the {before:,} rows are enough, and none is added"
        )
    unusual = {} if run.facts is None else unusual_kernels(run.facts["start"]["kernels"], run.runtime.device)
    if unusual:
        run.say(
            "kernels other than the usual ones: " + ", ".join(f"{name} for {part}" for part, name in unusual.items())
        )
    if not config.finetune.whole:
        run.say(describe(config))
    losses = {"load balance": config.model.router_aux_loss_coef, "z-loss": config.model.router_z_loss_coef}
    losses |= {loss.name: loss.coefficient for loss in router_losses(config.model)}
    acting = ", ".join(f"{coefficient:g} x {name}" for name, coefficient in losses.items() if coefficient)
    run.say(f"losses of the routers (model.router.type={config.model.router.type}): {acting or 'none'}")
    if config.model.router_aux_loss_coef and config.model.router_aux_loss_scope == "sequence":
        alpha = config.model.router_aux_loss_coef * config.model.num_experts_per_tok
        run.say(
            "the load balance of a sequence counts all of a token's experts, num_experts_per_tok when balanced: this "
            f"coefficient is alpha={alpha:g} in DeepSeek-V3's equation 17, whose loss is 1 then"
        )
    noted = export_note(config.model)
    if noted is not None:
        run.say(noted)
    router, rounds = config.model.router, config.accumulation_steps(world)
    if config.model.balance_over == "micro_batches" and rounds > 1 and _balances(config.model):
        run.say("the routers' losses depend on train.micro_batch_size: set model.balance_over=step if they should not")
    if not router.causal:
        run.say(
            f"model.router.type={router.type} is not causal in training: {router.looks_ahead}; evaluation and "
            f"generation {router.afterwards}"
        )
    unweighed = router.unweighed(config.model)
    if unweighed:
        run.say(
            f"the language-model loss does not reach the routers' {' and '.join(unweighed)}: with model.router.type="
            f"{router.type}, {router.weighs}, so that only the routers' own losses move that"
        )
    if config.distill.teachers:
        teachers, distill = ", ".join(teacher.path for teacher in config.distill.teachers), config.distill
        run.say(
            f"learns from {teachers} by {distill.divergence}, {distill.alpha:g} of the loss, at temperature "
            f"{distill.temperature:g}"
        )
    if config.data.has_preference:
        compared = f"against {config.model.init_from}" if config.preference.needs_reference else "without a reference"
        run.say(
            f"learns from pairs of answers by {config.preference.loss}, {compared}, beta {config.preference.beta:g}"
        )
    adversarial = config.train.adversarial
    if adversarial.epsilon is not None:
        run.say(
            f"trains on embeddings moved by up to {adversarial.epsilon:g} ({adversarial.norm}) towards a higher loss: "
            f"losses of training are of these, and a micro-batch takes {adversarial.steps} more "
            f"pass{'es' if adversarial.steps > 1 else ''}"
        )
    if adversarial.router_every is not None:
        run.say(
            f"routers are trained alone in one of {adversarial.router_every} steps, and stay as they are in the others"
        )
    if config.model.expert_dropout:
        run.say(
            f"model.expert_dropout={config.model.expert_dropout:g}: experts are computed one by one, which is slower"
        )
    if source is not None:
        run.say(f"resuming from {source} at step {position.step}")
    if position.step >= config.max_steps:
        run.say(f"nothing is left to train: the run has {position.step} of {config.max_steps} steps")
        return
    repeated = many_readings(config, data)
    if repeated is not None:
        logger.warning(repeated)
    if config.optim.warmup_steps >= config.max_steps:
        length = "train.max_tokens" if config.train.max_steps is None else "train.max_steps"
        run.say(
            f"the learning rate does not reach optim.lr={config.optim.lr:g}: its warm-up takes "
            f"{config.optim.warmup_steps} steps of {config.max_steps}: lower optim.warmup_steps, or raise "
            f"{length}"
        )


def many_readings(config: Config, data: Data) -> str | None:
    """One sentence on sources that the run's planned steps read many times; None where there is none. Of a source that
    streams nobody knows how long it is."""
    parts = [part for part in data.statistics if part.split == "train"]
    progress = data.train.progress(config.max_steps * config.train.global_batch_size)
    found = [
        f"{part.name} has {part.tokens:,} tokens and is read {readings['epochs']:.0f} times"
        for part, source, readings in zip(parts, config.data.sources, progress, strict=True)
        if readings["epochs"] > _MANY_TIMES and not source.streaming
    ]
    if not found:
        return None
    others = f" and so on, {len(found)} sources in all," if len(found) > _NAMED else ""
    length = "max_tokens" if config.train.max_steps is None else "max_steps"
    remedy = f"lower train.{length} or bring more data"
    if config.data.stages or any(source.weight is not None for source in config.data.sources):
        remedy = f"lower train.{length}, bring more data or give a source less weight"
    return (
        f"{', '.join(found[:_NAMED])}{others} in train.{length}={getattr(config.train, length)}: a model learns such text by "
        f"heart, so {remedy}"
    )


def farewell(config: Config, run_dir: Path, checkpoint: Path | None, finished: bool) -> None:
    """Last words: how to go on, or what came out, with a sample from the checkpoint as transformers loads it."""
    if not finished:
        again = "the same command again"
        if config.checkpoint.resume != "auto":  # it would not look at what has been saved now
            again += " with checkpoint.resume=auto"
        print(f"stopped and saved: run {again} to go on from {checkpoint}")
        return
    plots = []
    if config.logging.plots:
        from moe_llm.train.plots import plot_run

        plots = plot_run(run_dir)
    if checkpoint is None:
        return
    measured = [r for r in read_metrics(run_dir / "metrics.jsonl") if r.get("val_loss") is not None]
    if measured:
        values = [f"{r['val_loss']:.4f} at step {r['step']}" for r in (measured[0], measured[-1])]
        told = ", ".join(dict.fromkeys(values))  # once, if it was measured once
        last = measured[-1]
        if "val_accuracy" in last:
            print(f"validation loss {told}: the chosen answer is ahead in {last['val_accuracy']:.1%} of the pairs")
        else:
            print(f"validation loss {told}: {last['val_bits_per_byte']:.4f} bits per byte")
    best = _describe_best(config, run_dir, checkpoint)
    if best is not None:
        print(best)
    if plots:
        print("plots: " + " ".join(str(p) for p in plots))
    if config.evaluate.sample_prompt is not None:
        from moe_llm.inference.generate import generate

        print(f"--- a sample, from {config.evaluate.sample_prompt!r} ---")
        print(
            generate(
                checkpoint,
                config.evaluate.sample_prompt,
                max_new_tokens=config.evaluate.sample_tokens,
                seed=config.run.seed,
                say=lambda sentence: None,
            )
        )  # `announce` has said it
        print("---")
    print(f"checkpoint: {checkpoint}")


def _describe_best(config: Config, run_dir: Path, checkpoint: Path) -> str | None:
    """The best checkpoint of a run that has ended with `checkpoint`; None where none was looked for or found."""
    state = read_trainer_state(checkpoint)
    if config.train.early_stopping.patience is None or state.get("best_step") is None:
        return None
    path = run_dir / "checkpoints" / folder.step_name(state["best_step"])
    return f"best checkpoint: {path} (validation loss {state['best_loss']:.4f})"
