"""The exchange of expert parallelism by DeepEP's kernels, where that package is installed (github.com/deepseek-ai/DeepEP).

There a token travels once to each rank that has any of its experts, instead of once for each expert, and comes back as that
rank's weighted sum. It takes routers that give every token the same number of experts; all others go on with torch's
all-to-all. Nothing of this has been run on a GPU by us: tests hold it against `AllToAllDispatcher` by a package of the same
signatures whose kernels are torch's.
Dimensions: T tokens, D hidden, E experts, K experts per token, M tokens that this rank receives, R ranks.
"""

import importlib
import importlib.util
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_llm.config import Config
from moe_llm.distributed.dispatch import AllToAllDispatcher
from moe_llm.errors import UserError
from moe_llm.model.moe.experts import AnyExperts
from moe_llm.model.moe.routing import Routing
from moe_llm.model.recomputation import exchanged, is_second_pass

PACKAGE = "deep_ep"
ALL_TO_ALL = "torch's all-to-all"  # what the exchange goes by elsewhere
_chosen: ModuleType | None = None
_buffers: dict[tuple[dist.ProcessGroup, int], Any] = {}


def choose(config: Config, device: torch.device) -> None:
    """Decide by what the experts' exchange goes in this process: see `parallel.exchange`.

    Raises:
        UserError: DeepEP is asked for, and cannot be had here.
    """
    global _chosen
    asked, size = config.parallel.exchange, config.parallel.expert_parallel_size
    why = None if asked == "torch" else _obstacle(config, device)
    if asked == "deep_ep" and why is not None:
        raise UserError(f"parallel.exchange=deep_ep {why}: use auto or torch")
    _chosen = importlib.import_module(PACKAGE) if asked != "torch" and size > 1 and why is None else None
    _buffers.clear()


def chosen() -> str:
    """What the exchange goes by, for the records of a run."""
    return ALL_TO_ALL if _chosen is None else "DeepEP's"


def _obstacle(config: Config, device: torch.device) -> str | None:
    size = config.parallel.expert_parallel_size
    if importlib.util.find_spec(PACKAGE) is None:
        return f"needs the package {PACKAGE}, which is not installed"
    if device.type != "cuda":
        return "needs CUDA devices"
    if config.train.precision != "bf16":
        return "sends bf16 alone, and train.precision is fp32"
    if config.parallel.placement != "static":
        return "knows no experts that change ranks (parallel.placement=dynamic)"
    if size > 1 and not _knows(importlib.import_module(PACKAGE), size):
        return f"has no settings for parallel.expert_parallel_size={size}"
    return None


def _knows(package: ModuleType, size: int) -> bool:
    """Whether the package has settings for so many ranks: it asserts that it does."""
    try:
        package.Buffer.get_dispatch_config(size)
    except AssertionError:
        return False
    return True


def dispatcher(group: dist.ProcessGroup, size: int, chunks: int) -> AllToAllDispatcher:
    """What carries rows between the ranks of a group, as it was chosen."""
    return (
        AllToAllDispatcher(group, size, chunks) if _chosen is None else DeepEPDispatcher(group, size, chunks, _chosen)
    )


class DeepEPDispatcher(AllToAllDispatcher):
    """See the head of this file. package: `deep_ep`, or what has its `Buffer`."""

    def __init__(self, group: dist.ProcessGroup, size: int, chunks: int, package: Any):
        super().__init__(group, size, chunks)
        self.package = package

    def __call__(self, x_TD: Tensor, routing: Routing, experts: AnyExperts) -> Tensor:
        if routing.slot_TK is None:
            return super().__call__(x_TD, routing, experts)
        counts_E = routing.counts_E
        expert_N = torch.arange(len(counts_E), device=x_TD.device).repeat_interleave(
            counts_E, output_size=len(routing.token_index_N)
        )
        trip = _Trip(self._buffer(x_TD), expert_N[routing.slot_TK], len(counts_E), self)
        x_MD, weight_MK = _Dispatch.apply(x_TD, routing.weight_N[routing.slot_TK].float(), trip)
        local, counts_P = trip.received(weight_MK, routing)
        # rows of tokens that have several experts here are weighted and summed here
        y_MD = experts(x_MD, local.counts_E, local, host_counts_E=counts_P)
        return _Combine.apply(y_MD, trip)

    def _buffer(self, x_TD: Tensor) -> Any:
        """One for all layers, since they take turns."""
        nbytes = x_TD.shape[1] * max(x_TD.element_size(), 2)
        key = self.group, nbytes
        if key not in _buffers:
            buffer, ranks = self.package.Buffer, self.size
            hints = [settings(ranks) for settings in (buffer.get_dispatch_config, buffer.get_combine_config)]
            within = max(hint.get_nvl_buffer_size_hint(nbytes, ranks) for hint in hints)
            between = max(hint.get_rdma_buffer_size_hint(nbytes, ranks) for hint in hints)
            _buffers[key] = buffer(self.group, within, between)
        return _buffers[key]


class _Trip:
    """One layer's tokens there and back."""

    def __init__(self, buffer: Any, expert_TK: Tensor, experts: int, dispatcher: DeepEPDispatcher):
        self.buffer, self.expert_TK, self.experts, self.dispatcher = buffer, expert_TK, experts, dispatcher

    def send(self, x_TD: Tensor, weight_TK: Tensor) -> tuple[Tensor, Tensor]:
        def bring() -> tuple:
            with self.dispatcher.traffic.timed(x_TD.device):
                per_rank_R, per_node, per_expert_E, goes_TR, _ = self.buffer.get_dispatch_layout(
                    self.expert_TK, self.experts
                )
                x_MD, expert_MK, weight_MK, counts, handle, _ = self.buffer.dispatch(
                    x_TD,
                    num_tokens_per_rank=per_rank_R,
                    num_tokens_per_rdma_rank=per_node,
                    is_token_in_rank=goes_TR,
                    num_tokens_per_expert=per_expert_E,
                    topk_idx=self.expert_TK,
                    topk_weights=weight_TK,
                )
            return x_MD, expert_MK, weight_MK, tuple(counts), handle

        x_MD, self.expert_MK, weight_MK, self.counts, self.handle = exchanged(bring)
        if not is_second_pass():  # about: which of them came from elsewhere the device alone knows
            elsewhere = len(x_MD) * (self.dispatcher.size - 1) // self.dispatcher.size
            self.dispatcher.traffic.bytes += elsewhere * x_MD.shape[1] * x_MD.element_size()
        return x_MD, weight_MK

    def received(self, weight_MK: Tensor, sent: Routing) -> tuple[Routing, np.ndarray]:
        """The rows that the experts here get, sorted by expert, in the place of those sent; their counts on the host."""
        counts_P, choices = np.array(self.counts), self.expert_MK.shape[1]
        # what is of other ranks' experts, -1, comes last
        expert_N = torch.where(self.expert_MK < 0, len(counts_P), self.expert_MK).flatten()
        order_N = expert_N.argsort(stable=True)[: int(counts_P.sum())]
        rows = sent._replace(
            token_index_N=order_N // choices,
            weight_N=weight_MK.flatten()[order_N],
            counts_E=torch.from_numpy(counts_P).to(expert_N.device, non_blocking=True),
            slot_TK=None,
        )
        return rows, counts_P

    def bring_back(self, y_MD: Tensor, weight_MK: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The sums over ranks of what they made of each token."""
        with self.dispatcher.traffic.timed(y_MD.device):
            y_TD, weight_TK, _ = self.buffer.combine(y_MD.contiguous(), self.handle, topk_weights=weight_MK)
        return y_TD, weight_TK


class _Dispatch(torch.autograd.Function):
    """Tokens and their weights to the ranks of their experts; the gradients come back as results do."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, weight_TK: Tensor, trip: _Trip) -> tuple[Tensor, Tensor]:
        ctx.trip = trip
        return trip.send(x_TD, weight_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_MD, grad_MK):
        grad_TD, grad_TK = ctx.trip.bring_back(grad_MD, grad_MK.float().contiguous())
        return grad_TD, grad_TK, None


class _Combine(torch.autograd.Function):
    """Results to their tokens' ranks; the gradients go out as tokens do."""

    @staticmethod
    def forward(ctx, y_MD: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        return exchanged(lambda: trip.bring_back(y_MD)[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD):
        trip = ctx.trip
        with trip.dispatcher.traffic.timed(grad_TD.device):
            grad_MD = trip.buffer.dispatch(grad_TD.contiguous(), handle=trip.handle)[0]
        return grad_MD, None
