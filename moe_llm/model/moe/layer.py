"""The sparse feed-forward layer: route, dispatch, compute, combine."""

from torch import Tensor, nn

from moe_llm.config import ModelConfig
from moe_llm.model.moe.dispatch import Dispatcher, LocalDispatcher
from moe_llm.model.moe.experts import Experts
from moe_llm.model.moe.routers import build_router
from moe_llm.model.moe.routing import RoutingStatistics


class MoELayer(nn.Module):
    """y = sum over the chosen experts of weight * expert(x) (Shazeer et al. 2017, equation 1).

    `dispatcher` is a plain object that expert parallelism replaces.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = build_router(config)
        self.experts = Experts(config)
        self.dispatcher: Dispatcher = LocalDispatcher()

    def forward(self, x_BSD: Tensor, real_BS: Tensor) -> tuple[Tensor, RoutingStatistics]:
        routing = self.gate(x_BSD, real_BS)
        y_TD = self.dispatcher(x_BSD.flatten(0, 1), routing, self.experts)
        return y_TD.view_as(x_BSD), routing.statistics
