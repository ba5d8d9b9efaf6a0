"""Routers by the name that `model.router.type` gives them: one file and one line each."""

from torch import nn

from moe_llm.config import ModelConfig
from moe_llm.model.moe.routers.mixtral import MixtralRouter

ROUTERS: dict[str, type[nn.Module]] = {
    "mixtral": MixtralRouter,
}


def build_router(config: ModelConfig) -> nn.Module:
    """A module that maps hidden states (B, S, D) and a bool mask of real tokens (B, S) to a `Routing`."""
    return ROUTERS[config.router.type](config)
