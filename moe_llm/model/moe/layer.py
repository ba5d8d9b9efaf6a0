"""The mixture layer: route, dispatch, compute, combine; or mix the experts' weights first, then compute."""

import torch
from torch import Tensor, nn

from moe_llm.config import ModelConfig
from moe_llm.model.moe.dispatch import Dispatcher, LocalDispatcher
from moe_llm.model.moe.experts import Experts
from moe_llm.model.moe.routers import build_router
from moe_llm.model.moe.routing import Routing, RoutingStatistics, WeightMixture
from moe_llm.model.swiglu import SwiGLU


class MoELayer(nn.Module):
    """y = sum over the chosen experts of weight * expert(x) (Shazeer et al. 2017, equation 1), plus x times what weight
    the router keeps for it, if any, and the shared experts' output where there are any, gated by sigmoid(w x) where
    that is asked for.

    `dispatcher` is a plain object that expert parallelism replaces.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = build_router(config)
        self.experts = Experts(config)
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
            statistics = statistics._replace(handed_TX=routing.hand_on(y_TD))
        return y_TD if routing.combine_fn is None else routing.combine_fn(y_TD), statistics

    def _shared(self, x_TD: Tensor) -> Tensor:
        assert self.shared_experts is not None
        y_TD = self.shared_experts(x_TD)
        return y_TD if self.shared_expert_gate is None else torch.sigmoid(self.shared_expert_gate(x_TD)) * y_TD
