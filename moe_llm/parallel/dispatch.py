"""Expert parallelism: the dispatcher that carries rows to the rank of their expert and back, dropping none.

Dimensions: T tokens, D hidden, N rows of this rank's tokens, M rows that this rank's experts receive,
R ranks of the expert-parallel group, E experts, P = E / R experts a rank.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from moe_llm.model.moe.experts import Experts
from moe_llm.model.moe.routing import Routing
from moe_llm.ops.permutation import combine, permute


class AllToAllDispatcher:
    """`LocalDispatcher`'s twin over the ranks of `group`: the sizes are exchanged first, then the rows."""

    def __init__(self, group: dist.ProcessGroup, size: int):
        self.group = group
        self.size = size

    def __call__(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        sent_RP, received_RP = self._exchange_counts(routing.counts_E)
        send_sizes, receive_sizes = sent_RP.sum(1).tolist(), received_RP.sum(1).tolist()

        x_ND = permute(x_TD, routing.token_index_N, routing.slot_TK)
        x_MD = _AllToAll.apply(x_ND, send_sizes, receive_sizes, self.group)
        y_MD = experts(_regroup(x_MD, received_RP), received_RP.sum(0))
        y_MD = _regroup(y_MD, received_RP.T)
        y_ND = _AllToAll.apply(y_MD, receive_sizes, send_sizes, self.group)
        return combine(y_ND, routing.weight_N, routing.token_index_N, len(x_TD), routing.slot_TK)

    def _exchange_counts(self, counts_E: Tensor) -> tuple[Tensor, Tensor]:
        """Rows per (rank, expert there) that go out and per (rank, expert here) that come in, on the host.

        Sizes of messages have to be known on the host: the one synchronisation per layer that cannot be avoided.
        """
        received_E = torch.empty_like(counts_E)
        dist.all_to_all_single(received_E, counts_E.contiguous(), group=self.group)
        both = torch.stack([counts_E, received_E]).cpu().view(2, self.size, -1)
        return both[0], both[1]


def _regroup(x_MD: Tensor, counts_AB: Tensor) -> Tensor:
    """Rows in blocks ordered (a, b) become rows in blocks ordered (b, a); counts_AB are their sizes."""
    if min(counts_AB.shape) == 1:
        return x_MD
    blocks = x_MD.split(counts_AB.flatten().tolist())
    columns = counts_AB.shape[1]
    return torch.cat([blocks[i] for b in range(columns) for i in range(b, len(blocks), columns)])


class _AllToAll(torch.autograd.Function):
    """Rows to the ranks of a group, uneven sizes; backward sends the gradients the other way."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, send_sizes: list[int], receive_sizes: list[int], group) -> Tensor:
        ctx.exchange = (receive_sizes, send_sizes, group)
        return _all_to_all(x_ND, send_sizes, receive_sizes, group)

    @staticmethod
    def backward(ctx, grad_MD: Tensor):
        return _all_to_all(grad_MD, *ctx.exchange), None, None, None


def _all_to_all(x_ND: Tensor, send_sizes: list[int], receive_sizes: list[int], group) -> Tensor:
    y_MD = x_ND.new_empty(sum(receive_sizes), x_ND.shape[1])
    dist.all_to_all_single(y_MD, x_ND.contiguous(), receive_sizes, send_sizes, group=group)
    return y_MD
