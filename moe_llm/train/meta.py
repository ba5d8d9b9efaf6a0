"""Initialisations that adapt fast: Reptile (Nichol et al. 2018, algorithm 2) and first-order MAML (Finn et al. 2017,
section 5.2, with second derivatives left out), over tasks each of which is a source of text.

A round adapts a copy of the weights to each of some tasks by a few optimizer steps, as fine-tuning would, and then
moves the weights: Reptile towards the mean of the adapted ones, first-order MAML against the mean gradient that the
adapted ones have on blocks which they were not adapted to. One process, in fp32; the result is a checkpoint directory
for `model.init_from`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.config import Config
from moe_llm.config.optim import OptimConfig
from moe_llm.data.blocks import TrainBlocks
from moe_llm.data.files import publish
from moe_llm.data.loader import load_data
from moe_llm.data.packing import Batch, model_inputs
from moe_llm.data.tokenizer import build_tokenizer, check_vocab, resolve_vocab
from moe_llm.errors import TrainingFailure, UserError
from moe_llm.model.decoder import MoEDecoder, MoEOutput
from moe_llm.model.init import build_model
from moe_llm.model.moe.router import end_step
from moe_llm.model.moe.routing import RoutingStatistics
from moe_llm.train.optim import build_optimizer, parameter_groups


class Task(Protocol):
    """`TrainBlocks` of one source, or anything that gives batches by position."""

    def rows(self, start: int, count: int) -> Batch: ...


@dataclass(frozen=True)
class MetaOptions:
    """inner_steps: of a task's adaptation; tasks: adapted to in a round; rate: the share of the way that Reptile goes
    towards the adapted weights, or the learning rate of the Adam which takes first-order MAML's gradient."""

    method: Literal["reptile", "fomaml"] = "reptile"
    rounds: int = 100
    inner_steps: int = 5
    tasks: int = 4
    rate: float = 0.5

    def __post_init__(self):
        if self.method == "reptile" and self.rate > 1:
            raise UserError(f"--rate {self.rate:g} goes past the adapted weights: use at most 1 with reptile")


def meta_train(
    model: MoEDecoder,
    tasks: Sequence[Task],
    optim: OptimConfig,
    options: MetaOptions,
    *,
    blocks: int,
    seed: int = 0,
    say: Callable[[int, float, float], None] = lambda done, before, after: None,
) -> None:
    """Move a model's weights to where few steps adapt them to tasks like these.

    Args:
        model: changed in place, in training mode.
        optim: the optimizer of the adaptation, at its full `lr`; new for each task.
        blocks: of a task that an adaptation step takes.
        seed: of the order of tasks; of `options.tasks` in a round no two are the same while there are enough.
        say: told after each round how many are done, and the mean loss at the first and after the last adaptation step
            (nats a target, on different blocks).

    Raises:
        TrainingFailure: a loss that is not finite.
    """
    model.train()
    outer = None
    if options.method == "fomaml":
        outer = torch.optim.Adam(model.parameters(), lr=options.rate)
    random, read = np.random.default_rng(seed), [0] * len(tasks)
    for done in range(1, options.rounds + 1):
        start = [p.detach().clone() for p in model.parameters()]
        moved, before, after = [torch.zeros_like(p) for p in start], [], []
        chosen = random.choice(len(tasks), options.tasks, replace=options.tasks > len(tasks))
        for index in chosen.tolist():
            first = adapt(model, tasks[index], optim, options.inner_steps, blocks=blocks, start=read[index])
            read[index] += (options.inner_steps + 1) * blocks
            held_out = _loss(_forward(model, tasks[index].rows(read[index] - blocks, blocks)))
            _check_finite(held_out, done, index)
            for total, change in zip(moved, _change(model, start, held_out, options.method)):
                total += change / options.tasks
            before.append(first)
            after.append(held_out.item())
            _set(model, start)
        if outer is None:
            _set(model, [p + options.rate * change for p, change in zip(start, moved)])
        else:
            for parameter, gradient in zip(model.parameters(), moved):
                parameter.grad = gradient
            outer.step()
            outer.zero_grad(set_to_none=True)
        say(done, sum(before) / len(before), sum(after) / len(after))


def adapt(model: MoEDecoder, task: Task, optim: OptimConfig, steps: int, *, blocks: int, start: int = 0) -> float:
    """Adapt a model to a task in place, by plain optimizer steps; the loss before the first of them.

    Routers' buffers are updated by that one's routing: they are kept, and the weights that they fit are the first.

    Args:
        blocks: a step; `start`: the first of the task's samples that is read.
    """
    optimizer = build_optimizer(parameter_groups(model, optim.weight_decay, optim.name), optim)
    first = float("nan")
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = optim.lr
        output = _forward(model, task.rows(start + step * blocks, blocks))
        if step == 0:
            first = _loss(output).item()
            end_step(model, RoutingStatistics(*(part.detach() for part in output.routing)))
        optimizer.zero_grad(set_to_none=True)
        _loss(output).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip or float("inf"))
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return first


def _forward(model: MoEDecoder, batch: Batch) -> MoEOutput:
    return model(**model_inputs(batch.to(model.lm_head.weight.device)))


def _loss(output: MoEOutput) -> Tensor:
    assert output.loss is not None, "tasks have labels"
    return output.loss


def _change(model: MoEDecoder, start: list[Tensor], held_out: Tensor, method: str) -> Iterator[Tensor]:
    """Of each parameter: from where it started to where it is now, or its gradient there."""
    if method == "reptile":
        yield from (p.detach() - begin for p, begin in zip(model.parameters(), start))
    else:
        found = torch.autograd.grad(held_out, list(model.parameters()), allow_unused=True)
        yield from (torch.zeros_like(p) if g is None else g for p, g in zip(start, found))


@torch.no_grad()
def _set(model: MoEDecoder, values: Sequence[Tensor]) -> None:
    for parameter, value in zip(model.parameters(), values):
        parameter.copy_(value)


def _check_finite(loss: Tensor, done: int, task: int) -> None:
    if not loss.isfinite():
        raise TrainingFailure(
            f"round {done}: the loss of data.sources.{task} is not finite after its adaptation: "
            "lower optim.lr, or take fewer --inner-steps"
        )


def meta_train_sources(
    config: Config,
    out: str | Path,
    options: MetaOptions,
    say: Callable[[int, float, float], None] = lambda done, before, after: None,
) -> None:
    """Meta-train a configuration's model, or the one of `model.init_from`, with each of `data.sources` as a task.

    Args:
        config: `optim` is the adaptation's, and `train.global_batch_size` the blocks of one of its steps.
        out: a directory that does not exist; the checkpoint is complete, or not there.

    Raises:
        UserError: fewer than two sources, or `out` exists.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"--out {out} exists: name another directory, or remove it")
    if len(config.data.sources) < 2:
        raise UserError("data.sources has one source, which is one task: give two at least, each a task")
    tokenizer = build_tokenizer(config, Path(config.run.dir) / "tokenizer")
    config = resolve_vocab(config, tokenizer)
    check_vocab(config, tokenizer)
    sources = load_data(config, tokenizer).train.sources
    empty = next((i for i, source in enumerate(sources) if not len(source)), None)
    if empty is not None:
        raise UserError(f"data.sources.{empty} has no text left to train on, all is held out: add text or remove it")
    model = _model(config)
    if config.train.device == "auto" and torch.cuda.is_available():
        model.cuda()
    torch.manual_seed(config.run.seed)
    tasks = [TrainBlocks([source], None, config.run.seed) for source in sources]
    meta_train(
        model, tasks, config.optim, options, blocks=config.train.global_batch_size, seed=config.run.seed, say=say
    )
    with publish(out, field="--out") as directory:
        model.cpu().save_pretrained(directory, tokenizer)


def _model(config: Config) -> MoEForCausalLM:
    if config.model.init_from is not None:
        return MoEForCausalLM.from_pretrained(Path(config.model.init_from).expanduser(), torch.float32)
    model = MoEForCausalLM(config.model)
    model.load_state_dict(build_model(config.model, config.run.seed).state_dict())
    return model
