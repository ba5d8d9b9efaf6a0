"""Meta-learning in the training loop: Reptile, first-order MAML and MAML, on one rank or many, resumable as any run.

The blocks of a step are the tasks' held-out text: those of one source are judged by weights that some steps of gradient
descent have adapted to that source. What an optimizer step goes by is the mean over these blocks of

    reptile   (start - adapted)
    fomaml    the gradient at the adapted weights
    maml      the same times (1 - inner_lr * H) for each inner step, H its second derivatives

A source's adaptation follows from (seed, step, source), so that every rank comes to the same, and N ranks equal one.
Products with H are central differences of two gradients (as in Hessian-free methods), which needs no second derivatives of
kernels, and no more memory than a gradient; each costs two passes.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from moe_llm.config import Config
from moe_llm.config.meta import MetaConfig
from moe_llm.data.blocks import TrainBlocks
from moe_llm.data.packing import IGNORED, Batch, model_inputs
from moe_llm.distributed.step_loss import StepLoss
from moe_llm.errors import TrainingFailure, UserError
from moe_llm.train.callbacks.base import Callback, TrainingRun

_RELATIVE = 1e-3  # length of a difference's half, over that of the weights
Weights = list[Tensor]
Slopes = Callable[[int], Weights]


class MetaLearning(Callback):
    """Replaces the gradients of a step."""

    tasks: list[TrainBlocks]

    def validate(self, config: Config) -> None:
        if config.train.precision == "bf16":
            raise UserError(
                f"train.meta.method={config.train.meta.method} adapts weights by small steps, which train.precision=bf16 "
                "rounds away: use fp32"
            )

    def on_setup(self, run: TrainingRun) -> None:
        blocks = run.data.train
        self.tasks = [blocks.of_source(number) for number in range(len(blocks.sources))]

    def gradients(self, run: TrainingRun, batches: Sequence[Batch]) -> StepLoss:
        config, model, runtime = run.config, run.engine.model, run.runtime
        parts = [part for batch in batches for part in by_source(batch)]
        most = max(runtime.gather(len(parts)))
        parts += [(0, as_padding(batches[0]))] * (most - len(parts))  # every rank exchanges as often
        step_loss = StepLoss(config.model, runtime, [batch for _, batch in parts])
        parameters = [p for p in model.parameters() if p.requires_grad]
        total = [torch.zeros_like(p) for p in parameters]
        for source, batch in parts:
            run.heartbeat(f"step {run.position.step + 1}, source {source}")
            path = Adaptation(config.train.meta, parameters, self._slopes(run, source, parameters))
            with torch.set_grad_enabled(config.train.meta.method != "reptile"):
                losses = step_loss(model(**model_inputs(batch)))
            if not losses.total.isfinite():
                raise TrainingFailure(
                    f"step {run.position.step + 1}: the loss of data.sources.{source} is not finite after its adaptation: "
                    "lower train.meta.inner_lr, or take fewer inner_steps"
                )
            if config.train.meta.method == "reptile":
                share = float(runtime.world_size * batch.num_targets / step_loss.targets)
                found = [share * change for change in path.way_back()]
            else:
                found = path.brought_back(gradients_of(losses.total, parameters))
            path.undo()
            for sum_, part in zip(total, found):
                sum_ += part
            run.window.add(losses)
        # the engine averages over ranks and clips what it takes for the gradient of a loss
        objective = torch.stack([(p * g).sum() for p, g in zip(parameters, total)]).sum()
        run.engine.backward(objective, last=True)
        return step_loss

    def _slopes(self, run: TrainingRun, source: int, parameters: Sequence[nn.Parameter]) -> Slopes:
        """Of the inner step with a number, at the present weights, on the source's own blocks."""
        meta, step, model = run.config.train.meta, run.position.step, run.engine.model

        def slopes(number: int) -> Weights:
            batch = self.tasks[source].rows((step * meta.inner_steps + number) * meta.blocks, meta.blocks)
            with torch.random.fork_rng(devices=[run.runtime.device] if run.runtime.device.type == "cuda" else []):
                torch.manual_seed(run.config.run.seed + step)  # a difference is of one draw of noise
                output = model(**model_inputs(batch.to(run.runtime.device)))
                return gradients_of(output.loss, parameters)

        return slopes


class Adaptation:
    """Weights brought from where they are to a task, in place, and the way back.

    Args:
        slopes: of an inner step, by its number, at the present weights.
    """

    def __init__(self, meta: MetaConfig, parameters: Sequence[nn.Parameter], slopes: Slopes):
        self.meta, self._parameters, self._slopes = meta, parameters, slopes
        self._points: list[Weights] = []
        for number in range(meta.inner_steps):
            if number == 0 or meta.method == "maml":
                self._points.append([p.detach().clone() for p in parameters])
            self._shift(slopes(number), -meta.inner_lr)

    @torch.no_grad()
    def _shift(self, along: Sequence[Tensor], length: float) -> None:
        for parameter, part in zip(self._parameters, along):
            parameter.add_(part, alpha=length)

    @torch.no_grad()
    def _set(self, weights: Sequence[Tensor]) -> None:
        for parameter, value in zip(self._parameters, weights):
            parameter.copy_(value)

    def undo(self) -> None:
        """The weights as they were."""
        self._set(self._points[0])

    def way_back(self) -> Weights:
        """From where the weights are to where they were."""
        return [start - p.detach() for start, p in zip(self._points[0], self._parameters)]

    def brought_back(self, slope: Weights) -> Weights:
        """A gradient at the adapted weights, or with `maml` that of the same with respect to the weights before."""
        if self.meta.method != "maml":
            return slope
        for number in reversed(range(self.meta.inner_steps)):
            self._set(self._points[number])
            curved = self._times_second_derivatives(number, slope)
            slope = [s - self.meta.inner_lr * c for s, c in zip(slope, curved)]
        return slope

    def _times_second_derivatives(self, number: int, along: Weights) -> Weights:
        norm = float(torch.nn.utils.get_total_norm(along))
        if norm == 0:
            return [torch.zeros_like(part) for part in along]
        relative = _RELATIVE if along[0].dtype == torch.float32 else 1e-5
        length = relative * (1 + float(torch.nn.utils.get_total_norm(self._points[number]))) / norm
        self._shift(along, length)
        ahead = self._slopes(number)
        self._set(self._points[number])
        self._shift(along, -length)
        behind = self._slopes(number)
        return [(a - b) / (2 * length) for a, b in zip(ahead, behind)]


def gradients_of(loss: Tensor | None, parameters: Sequence[nn.Parameter]) -> Weights:
    """Zeros for what it does not depend on."""
    assert loss is not None, "tasks have labels"
    found = torch.autograd.grad(loss, list(parameters), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found)]


def by_source(batch: Batch) -> list[tuple[int, Batch]]:
    """The rows of each source of a micro-batch, by its number."""
    assert batch.sources_B is not None, "training blocks know their source"
    return [
        (number, batch.chosen((batch.sources_B == number).nonzero()[:, 0]))
        for number in sorted(set(batch.sources_B.tolist()))
    ]


def as_padding(batch: Batch) -> Batch:
    """One row without a token."""
    row = batch.rows(0, 1)
    documents = None if row.document_ids_BS is None else torch.full_like(row.document_ids_BS, -1)
    return replace(
        row,
        labels_BS=torch.full_like(row.labels_BS, IGNORED),
        attention_mask_BS=torch.zeros_like(row.attention_mask_BS),
        document_ids_BS=documents,
        runs_B=((row.input_ids_BS.shape[1],),),
    )
