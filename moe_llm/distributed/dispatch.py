"""Expert parallelism: the dispatcher that carries rows to the rank of their expert and back, dropping none.

Dimensions: T tokens, D hidden, N rows of this rank's tokens, M rows that this rank's experts receive,
R ranks of the expert-parallel group, E experts, P = E / R experts a rank.
"""

from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moe_llm.distributed.traffic import Traffic
from moe_llm.distributed.weights import GroupWeights
from moe_llm.model.moe.experts import AnyExperts, MoELayer
from moe_llm.model.moe.routing import Routing, WeightMixture
from moe_llm.model.recomputation import exchanged, is_second_pass
from moe_llm.ops import host
from moe_llm.ops.permutation import combine, permute


class AllToAllDispatcher:
    """`LocalDispatcher`'s twin over the ranks of `group`: the sizes are exchanged first, then the rows.

    With several `chunks` the rows travel in as many parts, and while one part is computed the next is under way, as
    are the results of the one before; in the backward pass their gradients likewise. A part is that of some of each
    rank's experts; where their number does not divide so, a share of every expert's rows.
    """

    def __init__(self, group: dist.ProcessGroup, size: int, chunks: int = 1):
        self.group = group
        self.size = size
        self.chunks = chunks
        self.rank = dist.get_rank(group)
        self.traffic = Traffic()
        self.expert_of_slot: list[int] | None = None  # where experts have changed ranks; None: they are at home

    def __call__(self, x_TD: Tensor, routing: Routing, experts: AnyExperts) -> Tensor:
        if self.expert_of_slot is not None:
            routing = _to_slots(routing, self.expert_of_slot)
        # The rows are sorted while the sizes travel.
        received_E, sizes = torch.empty_like(routing.counts_E), None
        if not is_second_pass():
            counts_E = routing.counts_E.contiguous()
            sizes = dist.all_to_all_single(received_E, counts_E, group=self.group, async_op=True)
        by_expert = len(received_E) // self.size % self.chunks == 0
        routing = _in_chunks(routing, self.size, self.chunks, by_expert)
        x_ND = permute(x_TD, routing.token_index_N, routing.slot_TK)
        if sizes is not None:
            with self.traffic.timed(x_TD.device):
                sizes.wait()
        # Sizes of messages have to be known on the host: the one synchronisation per layer that cannot be avoided.
        # The experts' kernels want their counts on the device, where they are already.
        what, rows_sent = "rows that each rank sends and receives", len(x_ND)

        def counted() -> tuple[Tensor, np.ndarray]:
            counts_2RP = torch.stack([routing.counts_E, received_E]).view(2, self.size, -1)
            return counts_2RP, host.read(counts_2RP, what, total=rows_sent)

        counts_2RP, host_2RP = exchanged(counted)
        parts = [_part(host_2RP, c, self.chunks, by_expert) for c in range(self.chunks)]

        rows = x_ND.split([int(sent_RP.sum()) for sent_RP, _ in parts])
        arriving = [self._depart(rows[0], *parts[0])]
        leaving = []
        for c, (sent_RP, received_RP) in enumerate(parts):
            if c + 1 < len(parts):
                arriving.append(self._depart(rows[c + 1], *parts[c + 1]))
            x_MD = _Arrive.apply(*arriving[c])
            own = slice(c * sent_RP.shape[1], (c + 1) * sent_RP.shape[1]) if by_expert else None
            y_MD = experts(
                _regroup(x_MD, received_RP),
                _part(counts_2RP[1], c, self.chunks, by_expert).sum(0),
                own=own,
                host_counts_E=received_RP.sum(0),
            )
            leaving.append(self._depart(_regroup(y_MD, received_RP.T), received_RP, sent_RP))
        arrived = [_Arrive.apply(*flight) for flight in leaving]
        y_ND = torch.cat(arrived) if self.chunks > 1 else arrived[0]
        return combine(y_ND, routing.weight_N, routing.token_index_N, len(x_TD), routing.slot_TK)

    def merge(self, x_TD: Tensor, merging: WeightMixture, experts: AnyExperts) -> Tensor:
        return experts(x_TD, merging=merging, exchange=GroupWeights(self.group, self.size, self.traffic))

    def _depart(self, x_ND: Tensor, sent_RP: np.ndarray, received_RP: np.ndarray) -> tuple[Tensor, "_Flight"]:
        flight = _Flight(self, sent_RP.sum(1).tolist(), received_RP.sum(1).tolist())
        return _Depart.apply(x_ND, flight), flight


def traffic(model: nn.Module) -> dict[str, list]:
    """Per layer, of this rank, since the last call: megabytes that left it and seconds spent in exchanges.

    Empty where no experts are elsewhere.
    """
    dispatchers = [m.dispatcher for m in model.modules() if isinstance(m, MoELayer)]
    taken = [d.traffic.take() for d in dispatchers if isinstance(d, AllToAllDispatcher)]
    if not taken:
        return {}
    return {"all_to_all_mb": [sent / 1e6 for sent, _ in taken], "all_to_all_seconds": [s for _, s in taken]}


def _regroup(x_MD: Tensor, counts_AB: np.ndarray) -> Tensor:
    """Rows in blocks ordered (a, b) become rows in blocks ordered (b, a); counts_AB are their sizes."""
    if min(counts_AB.shape) == 1:
        return x_MD
    blocks = x_MD.split(counts_AB.flatten().tolist())
    columns = counts_AB.shape[1]
    return torch.cat([blocks[i] for b in range(columns) for i in range(b, len(blocks), columns)])


class _Flight:
    """Rows on their way: `sizes[r]` of them to rank r, as many from it as `sizes_back[r]`; their gradients return."""

    def __init__(self, dispatcher: AllToAllDispatcher, sizes: list[int], sizes_back: list[int]):
        self.dispatcher, self.sizes, self.sizes_back = dispatcher, sizes, sizes_back

    def depart(self, x_ND: Tensor, *, back: bool) -> None:
        sizes, sizes_back = (self.sizes_back, self.sizes) if back else (self.sizes, self.sizes_back)
        group, traffic = self.dispatcher.group, self.dispatcher.traffic
        x_ND = x_ND.contiguous()
        y_MD = x_ND.new_empty(sum(sizes_back), x_ND.shape[1])
        with traffic.timed(x_ND.device):
            work = dist.all_to_all_single(y_MD, x_ND, sizes_back, sizes, group=group, async_op=True)
        traffic.bytes += (len(x_ND) - sizes[self.dispatcher.rank]) * x_ND.shape[1] * x_ND.element_size()
        self._under_way = work, x_ND, y_MD  # what is sent has to live until it has been

    def arrive(self) -> Tensor:
        work, _, y_MD = self._under_way
        with self.dispatcher.traffic.timed(y_MD.device):
            work.wait()
        del self._under_way
        return y_MD


class _Depart(torch.autograd.Function):
    """Rows begin to travel. The result is an empty tensor, which ties `_Arrive` to them for autograd."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        if not is_second_pass():
            flight.depart(x_ND, back=False)
        return x_ND.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        return ctx.flight.arrive(), None


class _Arrive(torch.autograd.Function):
    """Wait for the rows of a flight. The gradient begins its way back at once."""

    @staticmethod
    def forward(ctx, ticket: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        return exchanged(flight.arrive)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_MD):
        ctx.flight.depart(grad_MD, back=True)
        return grad_MD.new_empty(0), None


def _in_chunks(routing: Routing, ranks: int, chunks: int, by_expert: bool) -> Routing:
    """The same routing with its rows in the order in which they travel: part by part, each sorted by expert."""
    if chunks == 1:
        return routing
    counts_E, device = routing.counts_E, routing.counts_E.device
    num_rows, num_experts = len(routing.token_index_N), len(counts_E)
    expert_N = torch.arange(num_experts, device=device).repeat_interleave(counts_E, output_size=num_rows)
    if by_expert:
        held = num_experts // ranks
        chunk_N = expert_N % held // (held // chunks)
    else:  # expert e's rows from floor(count * c / chunks) on are in part c
        place_N = torch.arange(num_rows, device=device) - (counts_E.cumsum(0) - counts_E)[expert_N]
        chunk_N = ((place_N + 1) * chunks - 1) // counts_E[expert_N]
    return _reordered(routing, chunk_N.argsort(stable=True))


def _to_slots(routing: Routing, expert_of_slot: list[int]) -> Routing:
    """The rows by the slots that their experts lie in, and the slots' counts."""
    expert_S = torch.tensor(expert_of_slot, device=routing.counts_E.device)
    slot_E = torch.empty_like(expert_S)
    slot_E[expert_S] = torch.arange(len(expert_S), device=expert_S.device)
    slot_N = slot_E.repeat_interleave(routing.counts_E, output_size=len(routing.token_index_N))
    return _reordered(routing, slot_N.argsort(stable=True))._replace(counts_E=routing.counts_E[expert_S])


def _reordered(routing: Routing, order_N: Tensor) -> Routing:
    """The same rows in another order."""
    slot_TK = routing.slot_TK
    if slot_TK is not None:
        slot_N = torch.empty_like(order_N)
        slot_N[order_N] = torch.arange(len(order_N), device=order_N.device)
        slot_TK = slot_N[slot_TK]
    return routing._replace(
        token_index_N=routing.token_index_N[order_N], weight_N=routing.weight_N[order_N], slot_TK=slot_TK
    )


Counts = TypeVar("Counts", Tensor, np.ndarray)


def _part(counts_RP: Counts, chunk: int, chunks: int, by_expert: bool) -> Counts:
    """The rows of one part among counts (last dimension: the experts of a rank), on the host or on the device."""
    if by_expert:
        held = counts_RP.shape[-1] // chunks
        return counts_RP[..., chunk * held : (chunk + 1) * held]
    return counts_RP * (chunk + 1) // chunks - counts_RP * chunk // chunks
