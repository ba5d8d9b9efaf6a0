"""A router of a test's own, with a buffer that is moved after each step and a loss: what the seam for routers takes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from moe_llm.config.routers import ROUTER_SETTINGS, RouterSettings
from moe_llm.model.moe.losses import RouterLoss
from moe_llm.model.moe.router import Router, rows_by_token
from moe_llm.model.moe.routers import ROUTERS, register
from moe_llm.model.moe.routing import Routing


class TiltedRouter(Router):
    """Sigmoid scores; a bias that takes part in the choice alone is moved against the load."""

    class Settings(RouterSettings):
        """A bias moved against the load."""

        type: Literal["tilted"] = "tilted"
        rate: float = 0.05
        square_coef: float = 0.1

        def buffer_shapes(self, model):
            return {"bias": (model.num_local_experts,)}

    def forward(self, x_BSD, mask_BS):
        logits_TE = self.logits(x_BSD)
        score_TE = logits_TE.sigmoid()
        expert_TK = (score_TE + self.bias).topk(self.top_k, dim=-1).indices
        share_TE = score_TE / score_TE.sum(-1, keepdim=True)
        squares = (score_TE.square().sum(-1) * mask_BS.flatten()).sum()
        statistics = self.statistics(
            logits_TE,
            share_TE,
            expert_TK,
            mask_BS,
            extra_X=squares[None],
            entropy_T=torch.special.entr(share_TE).sum(-1),
        )
        rows = rows_by_token(expert_TK, score_TE.gather(-1, expert_TK), self.num_experts)
        return Routing(**rows, logits_TE=logits_TE, statistics=statistics)

    @classmethod
    def losses(cls, settings):
        square = RouterLoss("square_loss", settings.square_coef, lambda s: (s.extra_X[0] / s.num_tokens) ** 2)
        return [*super().losses(settings), square]

    def after_step(self, total):
        counts_E = total.tokens_per_expert_E
        self.bias += self.settings.rate * (counts_E.mean() - counts_E).sign()


@contextmanager
def tilted() -> Iterator[None]:
    """`model.router.type: tilted` meanwhile."""
    register(TiltedRouter)
    try:
        yield
    finally:
        del ROUTERS["tilted"], ROUTER_SETTINGS["tilted"]
