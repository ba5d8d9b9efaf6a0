"""Expert parallelism: the dispatcher that carries rows to the rank of their expert and back, dropping none.

Dimensions: T tokens, D hidden, N rows of this rank's tokens, M rows that this rank's experts receive,
R ranks of the expert-parallel group, E experts, P = E / R experts a rank.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_llm.model.moe.experts import Experts
from moe_llm.model.moe.layer import MoELayer
from moe_llm.model.moe.routing import Routing
from moe_llm.ops.permutation import combine, permute


class Traffic:
    """What a layer has exchanged since it was last read: forward, backward and recomputation alike.

    Bytes are those that leave this rank; seconds are the time that this rank waited for exchanges, on CUDA measured
    by events on the stream, so that nothing is synchronised for it.
    """

    def __init__(self):
        self.bytes = 0
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def timed(self, device: torch.device) -> Iterator[None]:
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
            return
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start

    def take(self) -> tuple[int, float]:
        """(bytes, seconds), and start over."""
        for begin, end in self._events:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1e3
        taken = self.bytes, self._seconds
        self.__init__()
        return taken


class AllToAllDispatcher:
    """`LocalDispatcher`'s twin over the ranks of `group`: the sizes are exchanged first, then the rows."""

    def __init__(self, group: dist.ProcessGroup, size: int):
        self.group = group
        self.size = size
        self.rank = dist.get_rank(group)
        self.traffic = Traffic()

    def __call__(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        # The rows are sorted while the sizes travel.
        received_E = torch.empty_like(routing.counts_E)
        sizes = dist.all_to_all_single(received_E, routing.counts_E.contiguous(), group=self.group, async_op=True)
        x_ND = permute(x_TD, routing.token_index_N, routing.slot_TK)
        with self.traffic.timed(x_TD.device):
            sizes.wait()
        # Sizes of messages have to be known on the host: the one synchronisation per layer that cannot be avoided.
        sent_RP, received_RP = torch.stack([routing.counts_E, received_E]).cpu().view(2, self.size, -1)
        send_sizes, receive_sizes = sent_RP.sum(1).tolist(), received_RP.sum(1).tolist()

        x_MD = _AllToAll.apply(x_ND, send_sizes, receive_sizes, self)
        y_MD = experts(_regroup(x_MD, received_RP), received_RP.sum(0))
        y_MD = _regroup(y_MD, received_RP.T)
        y_ND = _AllToAll.apply(y_MD, receive_sizes, send_sizes, self)
        return combine(y_ND, routing.weight_N, routing.token_index_N, len(x_TD), routing.slot_TK)

    def exchange(self, x_ND: Tensor, send_sizes: list[int], receive_sizes: list[int]) -> Tensor:
        """Rows to the ranks of the group, `send_sizes[r]` of them to rank r, and theirs back."""
        x_ND = x_ND.contiguous()
        y_MD = x_ND.new_empty(sum(receive_sizes), x_ND.shape[1])
        with self.traffic.timed(x_ND.device):
            dist.all_to_all_single(y_MD, x_ND, receive_sizes, send_sizes, group=self.group)
        elsewhere = len(x_ND) - send_sizes[self.rank]
        self.traffic.bytes += elsewhere * x_ND.shape[1] * x_ND.element_size()
        return y_MD


def traffic(model: nn.Module) -> dict[str, list]:
    """Per layer, of this rank, since the last call: megabytes that left it and seconds spent in exchanges.

    Empty where no experts are elsewhere.
    """
    dispatchers = [m.dispatcher for m in model.modules() if isinstance(m, MoELayer)]
    taken = [d.traffic.take() for d in dispatchers if isinstance(d, AllToAllDispatcher)]
    if not taken:
        return {}
    return {"all_to_all_mb": [sent / 1e6 for sent, _ in taken], "all_to_all_seconds": [s for _, s in taken]}


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
    def forward(
        ctx, x_ND: Tensor, send_sizes: list[int], receive_sizes: list[int], dispatcher: AllToAllDispatcher
    ) -> Tensor:
        ctx.sizes, ctx.dispatcher = (receive_sizes, send_sizes), dispatcher
        return dispatcher.exchange(x_ND, send_sizes, receive_sizes)

    @staticmethod
    def backward(ctx, grad_MD: Tensor):
        return ctx.dispatcher.exchange(grad_MD, *ctx.sizes), None, None, None
