"""One checkpoint as many members, each with dropout on: Monte-Carlo dropout (Gal and Ghahramani 2016)."""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moe_llm.ensemble.models import Model
from moe_llm.errors import UserError

_FEED_FORWARD = ("mlp", "block_sparse_moe", "feed_forward")


def with_dropout(model: Model, passes: int, share: float, seed: int) -> list[Model]:
    """Copies that share the weights. Of each one's feed-forward outputs `share` of the values are zero, drawn anew at
    every call from a generator of its own, the others divided by what is left of 1.

    Raises:
        UserError: a model without feed-forward layers under a name that is known.
    """
    shared = {id(tensor): tensor for tensor in (*model.model.parameters(), *model.model.buffers())}
    found = []
    for i in range(passes):
        copied: nn.Module = copy.deepcopy(model.model, dict(shared))
        layers = [module for name, module in copied.named_modules() if name.rpartition(".")[2] in _FEED_FORWARD]
        if not layers:
            raise UserError(
                f"{model.name} has no feed-forward layers named {' or '.join(_FEED_FORWARD)}: use another model"
            )
        drop = _Dropout(share, torch.Generator(model.device).manual_seed(seed * 1_000_003 + i))
        for layer in layers:
            layer.register_forward_hook(drop)
        found.append(replace(model, model=copied))
    return found


class _Dropout:
    def __init__(self, share: float, generator: torch.Generator):
        self.share, self.generator = share, generator

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (self._dropped(output[0]), *output[1:])
        return self._dropped(output)

    def _dropped(self, x: Tensor) -> Tensor:
        kept = torch.rand(x.shape, device=x.device, generator=self.generator) >= self.share
        return x * kept / (1 - self.share)
