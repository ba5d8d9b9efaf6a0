"""The training loop itself under `distributed.rehearsal`: `Trainer` takes the step, and records it.

So what the loop does around the passes is seen too: what it waits for, exchanges and holds. DeepSpeed's part is a stand-in,
and of callbacks the one that looks at every step before it is taken is there; what writes files is not.
"""

from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor

from moe_llm.config import Config
from moe_llm.data.packing import Batch
from moe_llm.distributed.rehearsal.record import Recorder
from moe_llm.distributed.rehearsal.step import Rehearsal, rehearse
from moe_llm.distributed.rehearsal.zero import ShardedAdamW
from moe_llm.distributed.runtime import Runtime
from moe_llm.model.decoder import MoEDecoder, MoEOutput
from moe_llm.train import trainer
from moe_llm.train.callbacks.step_guard import StepGuardCallback
from moe_llm.train.position import Position


def rehearse_training(config: Config, world_size: int, **how: Any) -> Rehearsal:
    """A step of the training loop, up to its record, of one rank among `world_size` GPUs.

    What the loop does around the passes is the phase `loop`. how: as `distributed.rehearsal.rehearse` takes it.
    """
    return rehearse(config, world_size, drive=_train_step, **how)


class _Runtime(Runtime):
    """Asks the other ranks as ever, and takes what has no value for a no."""

    def any(self, flag: bool) -> bool:
        super().any(flag)
        return flag


class _RehearsedEngine:
    """As much of `distributed.engine.Engine` as a step and its record ask for."""

    def __init__(self, model: MoEDecoder, optimizer: ShardedAdamW, recorder: Recorder):
        self.model, self._optimizer, self._recorder = model, optimizer, recorder

    def forward(self, **inputs: Any) -> MoEOutput:
        with self._recorder.during("forward", "activations"):
            return self.model(**inputs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        with self._recorder.during("backward", "backward"):
            loss.backward()

    def gradient_square(self) -> Tensor:
        return self._optimizer.gradient_square()

    def step(self, lr: float) -> float:
        with self._recorder.during("optimizer", "optimizer step"):
            self._optimizer.step()
        return 1.0

    trained_experts = None  # single experts' norms are DeepSpeed's to read


def _train_step(
    config: Config,
    model: MoEDecoder,
    optimizer: ShardedAdamW,
    runtime: Runtime,
    recorder: Recorder,
    batches: list[Batch],
) -> None:
    recorder.phase, recorder.kind = "loop", "loop"
    logging = config.logging.model_copy(update={"every_steps": 1})
    longer = config.train.model_copy(update={"max_steps": 2})  # neither evaluated nor saved after this step
    config = config.model_copy(update={"logging": logging, "train": longer})
    runtime = _Runtime(**vars(runtime))
    engine = cast(Any, _RehearsedEngine(model, optimizer, recorder))
    # data and tokenizer are read by nothing that runs here: batches come without values
    with mock.patch.object(trainer, "TrainLoader", return_value=iter([batches])):
        loop = trainer.Trainer(
            config,
            runtime,
            engine,
            cast(Any, SimpleNamespace(train=None, progress=lambda samples: {})),
            cast(Any, None),
            Position(),
            callbacks={"step_guard": StepGuardCallback()},
        )
    loop.callbacks["step_guard"].on_setup(loop)
    # there is no device whose random numbers could be seeded
    with mock.patch.object(torch.cuda, "manual_seed_all", autospec=True):
        loop.train_step()
        loop._finish_step()
