"""Where the time of a training step goes, from torch's profiler.

Forward work belongs to the part whose module it runs in. Backward work belongs to the part of the forward operation
that asked for it: autograd gives both the same sequence number. Some operations name their part themselves.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function

from moe_llm.model.attention import Attention
from moe_llm.model.decoder import LanguageModelHead, MoEDecoder
from moe_llm.model.layers import RMSNorm
from moe_llm.model.moe.experts import Experts, MoELayer
from moe_llm.model.moe.routers import ROUTERS

PARTS = (
    "attention",
    "router",
    "permutation",
    "experts",
    "norms",
    "loss",
    "optimizer",
    "communication",
    "data",
    "other",
)
_PREFIX = "part:"
# the layer's own time, that of neither router nor experts, is carrying tokens there and back
_MODULES: dict[type[nn.Module], str] = {
    Attention: "attention",
    MoELayer: "permutation",
    Experts: "experts",
    RMSNorm: "norms",
    LanguageModelHead: "loss",
    **dict.fromkeys(ROUTERS.values(), "router"),
}
_PERMUTING = (
    "aten::index_select",
    "aten::embedding_bag",
    "aten::_embedding_bag",
    "moe_llm::gather_sum",
    "aten::sort",
    "aten::searchsorted",
)
_COMMUNICATING = ("c10d::", "gloo:", "nccl:")


@contextmanager
def marked(model: MoEDecoder) -> Iterator[None]:
    """Meanwhile the profiler sees which part of the model each forward operation runs in."""
    handles, open_spans = [], []

    def enter(part: str):
        def hook(module: nn.Module, *_: Any) -> None:
            span = record_function(_PREFIX + part)
            span.__enter__()
            open_spans.append(span)

        return hook

    def leave(module: nn.Module, *_: Any) -> None:
        open_spans.pop().__exit__(None, None, None)

    for module in model.modules():
        part = next((part for kind, part in _MODULES.items() if isinstance(module, kind)), None)
        if part is not None:
            handles += [module.register_forward_pre_hook(enter(part)), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def span(part: str):
    """A stretch of the step that belongs to a part."""
    assert part in PARTS
    return record_function(_PREFIX + part)


def seconds_by_part(profile: torch.profiler.profile, on_device: bool) -> dict[str, float]:
    """Seconds of all recorded steps by part: of the device's kernels, or of the host's operations."""
    seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    for event, part in events_by_part(profile):
        seconds[part] += (event.self_device_time_total if on_device else event.self_cpu_time_total) * 1e-6
    return seconds


def events_by_part(profile: torch.profiler.profile) -> Iterator[tuple[Any, str]]:
    """Each recorded operation with the part that it belongs to."""
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    part_of_sequence: dict[int, str] = {}
    for event in events:
        part = _enclosing(event)
        if part is not None and event.sequence_nr >= 0:
            # an operation without a gradient bears the number that the next one with a gradient gets: the last is it
            part_of_sequence[event.sequence_nr] = part
    for event in events:
        yield event, _part(event, part_of_sequence)


def _part(event: Any, part_of_sequence: dict[int, str]) -> str:
    above = event
    while above is not None:
        if above.name.startswith(_COMMUNICATING):
            return "communication"
        above = above.cpu_parent
    part = _enclosing(event) or _of_backward(event, part_of_sequence) or "other"
    if part == "experts":
        above = event
        while above is not None:
            if above.name.startswith(_PERMUTING):
                return "permutation"
            above = above.cpu_parent
    return part


def _enclosing(event: Any) -> str | None:
    while event is not None:
        if event.name.startswith(_PREFIX):
            return event.name.removeprefix(_PREFIX)
        event = event.cpu_parent
    return None


def _of_backward(event: Any, part_of_sequence: dict[int, str]) -> str | None:
    while event is not None:
        if event.sequence_nr >= 0 and event.sequence_nr in part_of_sequence:
            return part_of_sequence[event.sequence_nr]
        event = event.cpu_parent
    return None
