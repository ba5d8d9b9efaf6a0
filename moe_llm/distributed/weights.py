"""Experts that are elsewhere, fetched whole: what mixing their weights needs under expert parallelism.

The alternative is for each rank to mix its own experts for the segments of all ranks, and to sum those parts where the
segment is. That moves a mixture for each segment of the group, this a weight for each expert, however many segments
there are: less as soon as the group has more segments than experts, which is nearly always. And it does not ask the
ranks to have equally many. A rank holds the experts of one layer while it computes that, as ZeRO-3 does.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from moe_llm.distributed.traffic import Traffic


class GroupWeights:
    """`moe_llm.ops.merged_expert_mlp.WeightExchange` over the ranks of `group`, which hold neighbouring experts."""

    def __init__(self, group: dist.ProcessGroup, size: int, traffic: Traffic):
        self.group, self.size, self.traffic = group, size, traffic

    def gather(self, own: Tensor) -> Tensor:
        own = own.detach().contiguous()
        whole = own.new_empty(len(own) * self.size, *own.shape[1:])
        with self.traffic.timed(own.device):
            dist.all_gather_into_tensor(whole, own, group=self.group)
        self.traffic.bytes += (self.size - 1) * own.numel() * own.element_size()
        return whole

    def reduce(self, whole: Tensor) -> Tensor:
        """The parts travel in the weights' dtype and are summed in fp32, in the order of ranks."""
        whole = whole.contiguous()
        parts = torch.empty_like(whole)
        with self.traffic.timed(whole.device):
            dist.all_to_all_single(parts, whole, group=self.group)
        self.traffic.bytes += (self.size - 1) * whole.numel() // self.size * whole.element_size()
        return parts.unflatten(0, (self.size, -1)).sum(0, dtype=torch.float32).to(whole.dtype)
