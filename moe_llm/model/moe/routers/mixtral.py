"""Mixtral's router (Jiang et al. 2024, section 2.1): softmax over experts, top-k, renormalised."""

from moe_llm.config.routers import MixtralSettings
from moe_llm.model.moe.router import TokenChoiceRouter


class MixtralRouter(TokenChoiceRouter):
    """Softmax of a linear map; weights of the top k sum to one.

    Dropped choices keep their share of the weight, which then falls to the residual stream alone; passed on, the
    weights are those of the experts that took the token.
    """

    Settings = MixtralSettings
