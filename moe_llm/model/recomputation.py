"""Activation checkpointing under which the second pass routes as the first one did, and exchanges nothing if asked to."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import moe_llm.ops.routing_decision  # noqa: F401 (defines the operation)
from moe_llm.model.activation_offload import Offload, unpack

# The outputs of these decide who goes where. They are kept (a few integers a token), all else is computed again:
# a recomputation that differs in the last bit can then not send a token elsewhere, which under expert
# parallelism would also make the ranks disagree about the sizes they exchange.
_ROUTING_OPS = frozenset({torch.ops.aten.topk.default, torch.ops.moe_llm.decided.default})
# Attention is dear to compute again, and its output small.
_ATTENTION_NAMES = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
)


def keep_routing(offload: Offload | None = None) -> tuple["_Keep", "_Reuse"]:
    """`context_fn` of torch.utils.checkpoint.checkpoint: all but the routing is computed again.

    Not torch's selective checkpointing: that demands of every operation, kept or not, as many calls in the second pass
    as in the first, and ZeRO-3's hooks make as many as they find parameters to release.
    """
    kept = _Kept(selective=False, offload=offload)
    return _Keep(kept), _Reuse(kept)


def keep_exchanges(offload: Offload | None = None) -> tuple["_Keep", "_Reuse"]:
    """The same, but what attention gave and what exchanges between ranks brought is kept too: the second pass then neither
    exchanges rows nor waits for their sizes. Kept are, a layer, two exchanges' rows and one attention's output."""
    kept = _Kept(selective=True, offload=offload)
    return _Keep(kept), _Reuse(kept)


T = TypeVar("T")


def exchanged(exchange: Callable[[], T]) -> T:
    """What `exchange()` brings from other ranks; in a second pass that keeps it, what it brought in the first one."""
    passing = _passing[-1] if _passing else None
    if passing is None or not passing.kept.selective:
        return exchange()
    if isinstance(passing, _Reuse):
        return _unpacked(next(passing.left_exchanges))
    brought = exchange()
    passing.kept.exchanges.append(passing.kept.packed(brought))
    return brought


def is_second_pass() -> bool:
    """Whether this is a recomputation to which nothing is sent: what `exchanged` would start is left out."""
    return bool(_passing) and isinstance(_passing[-1], _Reuse) and _passing[-1].kept.selective


class _Kept:
    def __init__(self, selective: bool, offload: Offload | None):
        self.selective, self.offload = selective, offload
        self.outputs: list[Any] = []
        self.exchanges: list[Any] = []

    def keeps(self, operation: Any) -> bool:
        if operation in _ROUTING_OPS:
            return True
        return self.selective and operation._schema.name in _ATTENTION_NAMES

    def packed(self, out: Any) -> Any:
        """What stands for an operation's results, in host memory if that is asked for."""
        if isinstance(out, tuple):
            return tuple(self.packed(part) for part in out)
        if not isinstance(out, Tensor):
            return out
        return out.detach() if self.offload is None else self.offload.pack(out.detach())


def _unpacked(kept: Any) -> Any:
    if isinstance(kept, tuple):
        return tuple(_unpacked(part) for part in kept)
    value = unpack(kept)
    return value.detach() if isinstance(value, Tensor) else value


class _Pass(TorchDispatchMode):
    """One of the two passes through a layer."""

    def __init__(self, kept: _Kept):
        super().__init__()
        self.kept = kept

    def __enter__(self) -> "_Pass":
        _passing.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _passing.pop()
        super().__exit__(*error)


_passing: list[_Pass] = []


class _Keep(_Pass):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.kept.keeps(func):
            self.kept.outputs.append(self.kept.packed(out))
        return out


class _Reuse(_Pass):
    """Gives what `_Keep` has kept, in the same order, each time it is entered."""

    def __enter__(self) -> "_Pass":
        self._left = iter(self.kept.outputs)
        self.left_exchanges = iter(self.kept.exchanges)
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if self.kept.keeps(func):
            return _unpacked(next(self._left))
        return func(*args, **(kwargs or {}))
