"""Routers by the name that `model.router.type` gives them: one file and one line each."""

from typing import TypeVar

from moe_llm.config import ModelConfig
from moe_llm.config.routers import ROUTER_SETTINGS
from moe_llm.model.moe.losses import RouterLoss
from moe_llm.model.moe.router import Router
from moe_llm.model.moe.routers.attention import AttentionRouter
from moe_llm.model.moe.routers.balanced import BalancedRouter
from moe_llm.model.moe.routers.batch_prioritised import BatchPrioritisedRouter
from moe_llm.model.moe.routers.bias_balanced import BiasBalancedRouter
from moe_llm.model.moe.routers.deepseek_moe import DeepSeekMoERouter
from moe_llm.model.moe.routers.dense import DenseRouter
from moe_llm.model.moe.routers.em import EMRouter
from moe_llm.model.moe.routers.expert_choice import ExpertChoiceRouter
from moe_llm.model.moe.routers.gshard import GShardRouter
from moe_llm.model.moe.routers.hierarchical import HierarchicalRouter
from moe_llm.model.moe.routers.lory import LoryRouter
from moe_llm.model.moe.routers.mixtral import MixtralRouter
from moe_llm.model.moe.routers.multi_head import MultiHeadRouter
from moe_llm.model.moe.routers.noisy_top_k import NoisyTopKRouter
from moe_llm.model.moe.routers.reinforce import ReinforceRouter
from moe_llm.model.moe.routers.soft_moe import SoftMoERouter
from moe_llm.model.moe.routers.switch import SwitchRouter
from moe_llm.model.moe.routers.top_p import TopPRouter
from moe_llm.model.moe.routers.transformer import TransformerRouter

ROUTERS: dict[str, type[Router]] = {
    "mixtral": MixtralRouter,
    "dense": DenseRouter,
    "noisy_top_k": NoisyTopKRouter,
    "gshard": GShardRouter,
    "switch": SwitchRouter,
    "batch_prioritised": BatchPrioritisedRouter,
    "top_p": TopPRouter,
    "hierarchical": HierarchicalRouter,
    "balanced": BalancedRouter,
    "deepseek_moe": DeepSeekMoERouter,
    "bias_balanced": BiasBalancedRouter,
    "soft_moe": SoftMoERouter,
    "multi_head": MultiHeadRouter,
    "lory": LoryRouter,
    "expert_choice": ExpertChoiceRouter,
    "attention": AttentionRouter,
    "transformer": TransformerRouter,
    "reinforce": ReinforceRouter,
    "em": EMRouter,
}

R = TypeVar("R", bound=type[Router])


def register(router: R) -> R:
    """Let `model.router.type` name a router that is defined elsewhere, by the default of its settings' `type`."""
    name = router.Settings.model_fields["type"].default
    assert name not in ROUTER_SETTINGS, f"there is a router {name}"
    ROUTER_SETTINGS[name], ROUTERS[name] = router.Settings, router
    return router


def build_router(config: ModelConfig) -> Router:
    """A module that maps hidden states (B, S, D) and a bool mask of real tokens (B, S) to a `Routing`."""
    return ROUTERS[config.router.type](config)


def router_losses(config: ModelConfig) -> list[RouterLoss]:
    """The losses that the router has of its own."""
    return ROUTERS[config.router.type].losses(config.router)
