"""The mixture layer: route, dispatch, compute, combine; or mix the experts' weights first, then compute.

A router gives the `Routing`, a dispatcher carries tokens to the experts that it names and back: `LocalDispatcher` within
one process, and its all-to-all twin in `moe_llm.distributed.dispatch`.
"""

from typing import Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_llm.config import ModelConfig
from moe_llm.model.layers import SwiGLU
from moe_llm.model.moe.routers import build_router
from moe_llm.model.moe.routing import Routing, RoutingStatistics, WeightMixture
from moe_llm.ops import host
from moe_llm.ops.expert_mlp import expert_mlp, routed_expert_mlp
from moe_llm.ops.expert_mlp_adapted import ExpertAdapters, Factors, adapted_expert_mlp
from moe_llm.ops.expert_mlp_clamped import ExpertForm, formed_expert_mlp
from moe_llm.ops.merged_expert_mlp import WeightExchange, merged_expert_mlp
from moe_llm.ops.permutation import combine, permute


class Experts(nn.Module):
    """SwiGLU experts as two 3-D tensors, in transformers' layout: gate rows first, then up rows.

    A built module holds all E experts; expert parallelism keeps those of one rank, from `first_expert` on.
    """

    def __init__(self, config: ModelConfig, *, first: int = 0, width: int | None = None):
        """width: of one expert alone, the `first`, where experts differ in it, or in their activation."""
        super().__init__()
        experts, hidden = config.num_local_experts if width is None else 1, config.expert_hidden_size
        width = width or config.intermediate_size
        self.held: list[int] | None = None  # where they are no neighbours: the expert of each row
        self.first_expert, self.dropout = first, config.expert_dropout
        self.tiles = 1  # parts of the rows that are computed, and computed again, one after the other
        self.low_rank: tuple[float, float] | None = None  # scale and dropout of adapters
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.gate_up_proj_bias = self.down_proj_bias = None
        if config.expert_bias:
            self.gate_up_proj_bias = nn.Parameter(torch.empty(experts, 2 * width))
            self.down_proj_bias = nn.Parameter(torch.empty(experts, hidden))
        self.limit, self.alpha = config.swiglu_limit, config.swiglu_alpha
        self.activation = "silu" if config.expert_activations is None else config.expert_activations[first]
        self.plain = not config.expert_bias and config.swiglu_limit is None and self.activation == "silu"

    def forward(
        self,
        x: Tensor,
        counts_E: Tensor | None = None,
        routing: Routing | None = None,
        own: slice | None = None,
        merging: WeightMixture | None = None,
        exchange: WeightExchange | None = None,
        host_counts_E: np.ndarray | None = None,
    ) -> Tensor:
        """Rows sorted by expert in, the same rows out: down(silu(gate(x)) * up(x)), with dropout before `down` while
        training.

        With a routing, tokens in and tokens out, (T, D): each one's weighted sum over its experts. With `own`, the
        counts and the rows are those of some of the experts that are held. With a merging, tokens in and tokens out
        and no counts: one expert of mixed weights for each segment; `exchange` reaches experts that are elsewhere.
        `host_counts_E`: the counts once more, where the host knows them, for kernels that need them there.
        """
        if merging is not None:
            assert self.low_rank is None, "weights are mixed without adapters: the configuration refuses them"
            dropout = self.dropout if self.training else 0.0
            y_NLD = merged_expert_mlp(
                merging.segments.split(x).flatten(0, 1),
                merging.probability_NE,
                self.gate_up_proj,
                self.down_proj,
                dropout=dropout,
                exchange=exchange,
            )
            return merging.segments.join(y_NLD.unflatten(0, merging.segments.mask_BGL.shape[:2]))
        if self.tiles > 1 and len(x) and torch.is_grad_enabled():
            return self._tiled(x, counts_E, routing, own, host_counts_E)
        return self._rows(x, counts_E, routing, own, host_counts_E)

    def _tiled(
        self,
        x: Tensor,
        counts_E: Tensor | None,
        routing: Routing | None,
        own: slice | None,
        host_counts_E: np.ndarray | None,
    ) -> Tensor:
        """The rows in parts, each of which is computed again in the backward pass: of one part alone are the projections
        held (Rasley et al. 2025, "Arctic Long Sequence Training", section 3.1, for layers without experts)."""
        assert counts_E is not None, "rows come with the counts of their experts"
        rows_ND = x if routing is None else permute(x, routing.token_index_N, routing.slot_TK)
        if not len(rows_ND):  # of padding alone, or a second round that nothing is left for
            return self._rows(x, counts_E, routing, own, host_counts_E)
        size, parts = -(-len(rows_ND) // self.tiles), []
        for begin in range(0, len(rows_ND), size):
            host_E = None if host_counts_E is None else _within(host_counts_E, begin, begin + size)
            part = rows_ND[begin : begin + size], _within(counts_E, begin, begin + size), None, own, host_E
            parts.append(checkpoint(self._rows, *part, use_reentrant=False))
        y_ND = torch.cat(parts)
        if routing is None:
            return y_ND
        return combine(y_ND, routing.weight_N, routing.token_index_N, len(x), routing.slot_TK)

    def _rows(
        self,
        x: Tensor,
        counts_E: Tensor | None,
        routing: Routing | None,
        own: slice | None,
        host_counts_E: np.ndarray | None,
    ) -> Tensor:
        """All of them at once."""
        dropout = self.dropout if self.training else 0.0
        if not self.plain:
            assert counts_E is not None, "rows come with the counts of their experts"
            return self._formed(x, counts_E, routing, slice(None) if own is None else own, dropout, host_counts_E)
        if self.low_rank is not None:
            rows = () if routing is None else (routing.weight_N, routing.token_index_N, routing.slot_TK)
            held = slice(None) if own is None else own
            weights = self.gate_up_proj[held], self.down_proj[held]
            if host_counts_E is not None:
                counts_E = torch.from_numpy(host_counts_E)
            assert counts_E is not None, "rows come with the counts of their experts"
            return adapted_expert_mlp(x, *weights, counts_E, self._adapters(held), *rows, dropout=dropout)
        if routing is None:
            assert counts_E is not None, "rows come with the counts of their experts"
            gate_up_proj = self.gate_up_proj if own is None else self.gate_up_proj[own]
            down_proj = self.down_proj if own is None else self.down_proj[own]
            return expert_mlp(x, gate_up_proj, down_proj, counts_E, dropout=dropout, host_counts_E=host_counts_E)
        assert counts_E is not None, "a routing comes with the counts of its experts"
        return routed_expert_mlp(
            x,
            self.gate_up_proj,
            self.down_proj,
            counts_E,
            routing.weight_N,
            routing.token_index_N,
            routing.slot_TK,
            dropout,
        )

    def _formed(
        self,
        x: Tensor,
        counts_E: Tensor,
        routing: Routing | None,
        held: slice,
        dropout: float,
        host_counts_E: np.ndarray | None,
    ) -> Tensor:
        """The same for experts with biases, clamps, or another activation than SiLU."""
        biases = self.gate_up_proj_bias, self.down_proj_bias
        form = ExpertForm(*biases, self.limit, self.alpha, self.activation).held(held)
        rows_ND = x if routing is None else permute(x, routing.token_index_N, routing.slot_TK)
        y_ND = formed_expert_mlp(
            rows_ND,
            self.gate_up_proj[held],
            self.down_proj[held],
            counts_E,
            form,
            weight_N=None if routing is None else routing.weight_N,
            adapters=None if self.low_rank is None else self._adapters(held),
            dropout=dropout,
            host_counts_E=host_counts_E,
        )
        return y_ND if routing is None else combine(y_ND, None, routing.token_index_N, len(x), routing.slot_TK)

    def adapt(self, name: str, rank: int, scale: float, dropout: float) -> None:
        """Give one of the two weights low-rank factors for each expert that is held, as `NAME_lora_A` and
        `NAME_lora_B`, uninitialised."""
        experts, rows, columns = getattr(self, name).shape
        for factor, shape in (("A", (experts, rank, columns)), ("B", (experts, rows, rank))):
            setattr(self, f"{name}_lora_{factor}", nn.Parameter(torch.empty(shape)))
        self.low_rank = scale, dropout

    def _adapters(self, held: slice) -> ExpertAdapters:
        assert self.low_rank is not None
        scale, dropout = self.low_rank
        gate_up, down = (
            Factors(getattr(self, f"{name}_lora_A")[held], getattr(self, f"{name}_lora_B")[held])
            if hasattr(self, f"{name}_lora_A")
            else None
            for name in ("gate_up_proj", "down_proj")
        )
        return ExpertAdapters(gate_up, down, scale, dropout if self.training else 0.0)

    def keep(self, experts: range) -> None:
        """Drop all experts but these."""
        for name, whole in list(self.named_parameters()):
            kept = whole.detach()[experts.start : experts.stop].clone()
            setattr(self, name, nn.Parameter(kept, requires_grad=whole.requires_grad))
        self.first_expert = experts.start


Counts = TypeVar("Counts", Tensor, np.ndarray)


def _within(counts_E: Counts, begin: int, end: int) -> Counts:
    """Of rows sorted by expert, how many of each lie from row `begin` up to row `end`; nothing is read from a device."""
    ends_E = counts_E.cumsum(0)
    return ends_E.clip(begin, end) - (ends_E - counts_E).clip(begin, end)


class UnevenExperts(nn.Module):
    """Experts that differ in width (HMoE, Wang et al. 2024) or in activation, none of them padded: `Experts` of one each,
    named by their index over all ranks; rows are computed expert by expert."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.single_expert_sizes is not None, "experts of one form are stacked"
        for expert, width in enumerate(config.single_expert_sizes):
            self.add_module(str(expert), Experts(config, first=expert, width=width))

    @property
    def single_experts(self) -> list[Experts]:
        """Those of this rank, in order."""
        return [cast(Experts, expert) for expert in self.children()]

    def forward(
        self,
        x: Tensor,
        counts_E: Tensor | None = None,
        routing: Routing | None = None,
        own: slice | None = None,
        merging: WeightMixture | None = None,
        exchange: WeightExchange | None = None,
        host_counts_E: np.ndarray | None = None,
    ) -> Tensor:
        """As `Experts.forward`; weights are not mixed (`merging`), which the configuration refuses."""
        assert merging is None, "weights of different shapes are not mixed: the configuration refuses it"
        assert counts_E is not None, "rows come with the counts of their experts"
        rows_ND = x if routing is None else permute(x, routing.token_index_N, routing.slot_TK)
        if host_counts_E is None:
            host_counts_E = host.read(counts_E, "rows of each expert", total=len(rows_ND))
        parts = rows_ND.split(host_counts_E.tolist())
        y_ND = torch.cat(
            [
                expert(part, counts_E[i : i + 1], host_counts_E=host_counts_E[i : i + 1])
                for i, (expert, part) in enumerate(zip(self.single_experts[own or slice(None)], parts, strict=True))
            ]
        )
        if routing is None:
            return y_ND
        return combine(y_ND, routing.weight_N, routing.token_index_N, len(x), routing.slot_TK)

    def keep(self, experts: range) -> None:
        """Drop all experts but these."""
        for expert in self.single_experts:
            if expert.first_expert not in experts:
                del self._modules[str(expert.first_expert)]


def build_experts(config: ModelConfig) -> "Experts | UnevenExperts":
    """The experts of a layer."""
    return Experts(config) if config.single_expert_sizes is None else UnevenExperts(config)


AnyExperts = Experts | UnevenExperts


class Dispatcher(Protocol):
    def __call__(self, x_TD: Tensor, routing: Routing, experts: AnyExperts) -> Tensor:
        """The weighted sum of each token's experts, (T, D) in and out."""

    def merge(self, x_TD: Tensor, merging: WeightMixture, experts: AnyExperts) -> Tensor:
        """Each token through its segment's mixture of all experts' weights, (T, D) in and out."""


class LocalDispatcher:
    """All experts are here: one operation gathers each expert's rows, computes, and sums them back."""

    def __call__(self, x_TD: Tensor, routing: Routing, experts: AnyExperts) -> Tensor:
        return experts(x_TD, routing.counts_E, routing)

    def merge(self, x_TD: Tensor, merging: WeightMixture, experts: AnyExperts) -> Tensor:
        return experts(x_TD, merging=merging)


class MoELayer(nn.Module):
    """y = sum over the chosen experts of weight * expert(x) (Shazeer et al. 2017, equation 1), plus x times what weight
    the router keeps for it, if any, and the shared experts' output where there are any, gated by sigmoid(w x) where
    that is asked for.

    `dispatcher` is a plain object that expert parallelism replaces.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = build_router(config)
        self.experts = build_experts(config)
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.shared_experts = None
        if config.num_shared_experts:
            self.shared_experts = SwiGLU(config.hidden_size, config.shared_width, config.expert_dropout)
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False) if config.shared_expert_gate else None

    def forward(
        self, x_BSD: Tensor, mask_BS: Tensor, document_BS: Tensor | None = None
    ) -> tuple[Tensor, RoutingStatistics]:
        routing = self.gate(x_BSD, mask_BS, *([document_BS] if self.gate.by_document else []))
        x_TD = x_BSD.flatten(0, 1)
        if isinstance(routing, WeightMixture):
            y_TD, statistics = self.dispatcher.merge(x_TD, routing, self.experts), routing.statistics
        else:
            y_TD, statistics = self._routed(x_TD, routing)
        if self.shared_experts is not None:
            y_TD = y_TD + self._shared(x_TD)
        return y_TD.view_as(x_BSD), statistics

    def _routed(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, RoutingStatistics]:
        entered_RW = x_TD if routing.entered_RW is None else routing.entered_RW
        y_TD = self.dispatcher(entered_RW, routing, self.experts)
        if routing.queued is not None:
            y_TD = y_TD + self.dispatcher(entered_RW, routing.queued, self.experts)
        if routing.kept_R is not None:
            y_TD = (y_TD + routing.kept_R[:, None] * entered_RW).to(x_TD.dtype)
        statistics = routing.statistics
        if routing.hand_on is not None:
            statistics = statistics._replace(feedback_TX=routing.hand_on(y_TD))
        return y_TD if routing.combine_fn is None else routing.combine_fn(y_TD), statistics

    def _shared(self, x_TD: Tensor) -> Tensor:
        assert self.shared_experts is not None
        y_TD = self.shared_experts(x_TD)
        return y_TD if self.shared_expert_gate is None else torch.sigmoid(self.shared_expert_gate(x_TD)) * y_TD
