"""A second channel between the ranks, for a thread that works beside training."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from moe_llm.distributed.runtime import Runtime


class SideGroup:
    """The ranks of a run on a process group of their own, over gloo. Making one is collective.

    Safe beside training, whatever its backend: groups share neither connections nor the order of their calls, and
    gloo works in host memory, so that nothing here enters a stream of a device. One thread at a time may use it.
    """

    def __init__(self, runtime: Runtime):
        self.rank, self.world_size = runtime.rank, runtime.world_size
        # as long as training's own: a slow disk of one rank is waited for
        self._group = dist.new_group(backend="gloo", timeout=timedelta(hours=2)) if self.world_size > 1 else None

    def gather(self, value: Any) -> Sequence[Any]:
        """The Python objects of all ranks, on every rank."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values
