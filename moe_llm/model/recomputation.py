"""Activation checkpointing under which the second pass routes as the first one did."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import moe_llm.ops.routing_decision  # noqa: F401 (defines the operation)

# The outputs of these decide who goes where. They are kept (a few integers a token), all else is computed again:
# a recomputation that differs in the last bit can then not send a token elsewhere, which under expert
# parallelism would also make the ranks disagree about the sizes they exchange.
_ROUTING_OPS = frozenset({torch.ops.aten.topk.default, torch.ops.moe_llm.decided.default})


def keep_routing() -> tuple["_Keep", "_Reuse"]:
    """`context_fn` of torch.utils.checkpoint.checkpoint.

    Not torch's selective checkpointing: that demands of every operation, kept or not, as many calls in the second pass
    as in the first, and ZeRO-3's hooks make as many as they find parameters to release.
    """
    kept: list[_Outputs] = []
    return _Keep(kept), _Reuse(kept)


_Outputs = Tensor | tuple[Tensor, ...]


def _detached(out: _Outputs) -> _Outputs:
    return out.detach() if isinstance(out, Tensor) else tuple(part.detach() for part in out)


class _Keep(TorchDispatchMode):
    def __init__(self, kept: list[_Outputs]):
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _ROUTING_OPS:
            self._kept.append(_detached(out))
        return out


class _Reuse(TorchDispatchMode):
    """Gives what `_Keep` has kept, in the same order, each time it is entered."""

    def __init__(self, kept: list[_Outputs]):
        super().__init__()
        self._kept = kept

    def __enter__(self) -> "_Reuse":
        self._left = iter(self._kept)
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in _ROUTING_OPS:
            return _detached(next(self._left))
        return func(*args, **(kwargs or {}))
