"""Sequence parallelism: neighbouring ranks share each sequence (DeepSpeed-Ulysses, Jacobs et al. 2023).

Everything but attention works on a rank's own positions, and nothing there knows of it: to experts, losses and ZeRO the
ranks are cuts of the batch like any others. For attention the ranks exchange positions for heads, and back.

The exchange is our own: DeepSpeed's engine refuses its sequence parallelism beside expert parallelism under ZeRO-3, its
`DistributedAttention` exchanges queries, keys and values one by one, and fewer key-value heads than ranks are refused. Here
they travel together, and such heads are repeated.

Dimensions: B sequences, P ranks that share a sequence, S positions of a sequence on a rank, H query heads, G key-value
heads, N of both together, d head dimension.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_llm.model.attention import Attention, LatentAttention
from moe_llm.model.decoder import MoEDecoder
from moe_llm.model.moe.router import Router
from moe_llm.model.recomputation import exchanged


def share_sequences(model: MoEDecoder, size: int, rank: int, world_size: int) -> None:
    """Give attention and routers the group of this rank's neighbours that share its sequences. Collective."""
    if size == 1:
        return
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world_size, size)]
    parts = UlyssesParts(groups[rank // size], rank % size, size)
    for module in model.modules():
        if isinstance(module, Attention | LatentAttention | Router):
            module.parts = parts


class UlyssesParts:
    """`moe_llm.model.sequence_parts.SequenceParts` over the ranks of a group."""

    def __init__(self, group: dist.ProcessGroup, index: int, size: int):
        self.group, self.index, self.size = group, index, size

    def heads_for_positions(self, q_BHSd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """In one exchange: rank p gets the pth part of the query heads and the key-value heads that these read."""
        if k_BGSd.shape[1] < self.size:
            times = self.size // k_BGSd.shape[1]
            k_BGSd, v_BGSd = k_BGSd.repeat_interleave(times, 1), v_BGSd.repeat_interleave(times, 1)
        by_rank = [x.transpose(1, 2).unflatten(2, (self.size, -1)) for x in (q_BHSd, k_BGSd, v_BGSd)]
        sent_BSPNd = torch.cat(by_rank, dim=3)
        heads = [x.shape[3] for x in by_rank]
        whole_BSNd = _Exchange.apply(sent_BSPNd, self)
        q, k, v = (x.transpose(1, 2) for x in whole_BSNd.split(heads, dim=2))
        return q, k, v

    def positions_for_heads(self, y_BHSd: Tensor) -> Tensor:
        return _ExchangeBack.apply(y_BHSd.transpose(1, 2), self).flatten(2, 3).transpose(1, 2)

    @torch.no_grad()
    def whole(self, x_BSX: Tensor) -> Tensor:
        sent = x_BSX.to(torch.uint8) if x_BSX.dtype == torch.bool else x_BSX
        sent = sent.contiguous()
        gathered = sent.new_empty(self.size * len(sent), *sent.shape[1:])
        dist.all_gather_into_tensor(gathered, sent, group=self.group)
        return gathered.unflatten(0, (self.size, -1)).transpose(0, 1).flatten(1, 2).to(x_BSX.dtype)

    @torch.no_grad()
    def sum(self, x: Tensor) -> Tensor:
        summed = x.clone()
        dist.all_reduce(summed, group=self.group)
        return summed

    def spread_heads(self, x_BSPNd: Tensor) -> Tensor:
        """(B, S, P, N, d), N heads for each rank, to (B, S * P, N, d), those for this rank of all positions."""
        sent_PBSNd = x_BSPNd.movedim(2, 0).contiguous()
        received_PBSNd = torch.empty_like(sent_PBSNd)
        dist.all_to_all_single(received_PBSNd, sent_PBSNd, group=self.group)
        return received_PBSNd.transpose(0, 1).flatten(1, 2)

    def spread_positions(self, x_BSNd: Tensor) -> Tensor:
        """The inverse."""
        sent_PBSNd = x_BSNd.unflatten(1, (self.size, -1)).transpose(0, 1).contiguous()
        received_PBSNd = torch.empty_like(sent_PBSNd)
        dist.all_to_all_single(received_PBSNd, sent_PBSNd, group=self.group)
        return received_PBSNd.movedim(0, 2)


class _Exchange(torch.autograd.Function):
    """Positions for heads."""

    @staticmethod
    def forward(ctx, x_BSPNd: Tensor, parts: UlyssesParts) -> Tensor:
        ctx.parts = parts
        return exchanged(lambda: parts.spread_heads(x_BSPNd))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BSNd):
        return ctx.parts.spread_positions(grad_BSNd), None


class _ExchangeBack(torch.autograd.Function):
    """Heads for positions."""

    @staticmethod
    def forward(ctx, x_BSNd: Tensor, parts: UlyssesParts) -> Tensor:
        ctx.parts = parts
        return exchanged(lambda: parts.spread_positions(x_BSNd))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BSPNd):
        return ctx.parts.spread_heads(grad_BSPNd), None
