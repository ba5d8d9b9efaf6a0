"""The average of the weights that an engine keeps while it trains (`checkpoint.ema`).

It lies with the optimizer's own tensors, one for each fp32 tensor that the optimizer steps on, cut up as they are: so
each rank averages what it holds and exchanges nothing, and whatever reads or writes them reads and writes it too.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from moe_llm.config.ema import EmaConfig
from moe_llm.distributed.state import EMA, wide


class Averaging(ABC):
    """The part of an engine that keeps the average: see `TrainedState` for `averages` and `averaged`."""

    kinds: tuple[str, ...]
    _allocate: Callable[[Tensor], Tensor]  # room for what is kept of a weight: fp32, of its shape

    def _set_up_average(self, ema: EmaConfig) -> None:
        self.averages, self.averaged, self._ema = ema.decay is not None, 0, ema

    @abstractmethod
    def _stepped(self) -> tuple[torch.optim.Optimizer, list[Tensor]]:
        """The torch optimizer, and the tensors that it steps on here."""

    @torch.no_grad()
    def update_average(self) -> None:
        optimizer, weights = self._stepped()
        self.averaged += 1
        share = self._ema.share(self.averaged)
        for weight in weights:
            state = optimizer.state[weight]
            made = not self.kinds or any(kind in state for kind in self.kinds)
            assert made, "torch makes its tensors only where there are none"
            if EMA in state:
                state[EMA].lerp_(wide(weight, state), share)
            else:
                state[EMA] = self._allocate(weight).copy_(wide(weight.detach(), state))

    def make_average(self, updates: int) -> None:
        optimizer, weights = self._stepped()
        self.averaged = updates
        for weight in weights:
            optimizer.state[weight].pop(EMA, None)
            if updates:
                optimizer.state[weight][EMA] = self._allocate(weight).zero_()
