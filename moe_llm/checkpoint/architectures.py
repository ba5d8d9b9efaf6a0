"""Which architecture of transformers computes what a trained model does: one line for each router that has one.

What counts is evaluation: noise, capacity and losses are gone then. This file needs no torch.
"""

from dataclasses import dataclass

from moe_llm.config import ModelConfig


@dataclass(frozen=True)
class Architecture:
    """model_type and architecture: as in config.json. native: transformers has it; otherwise the weights need modelling
    code beside them. unused: parameters of the router that it has no use for and leaves alone."""

    model_type: str
    architecture: str
    native: bool = True
    unused: tuple[str, ...] = ()


MIXTRAL = Architecture("mixtral", "MixtralForCausalLM")
OWN = Architecture("moe_llm", "MoELLMForCausalLM", native=False)

# Softmax and top-k, renormalised, is Mixtral's; all experts by their softmax are its top E of E. Switch and V-MoE weigh
# by the probability itself: with k = 1 Mixtral's weight is 1, and the architectures that do not renormalise (OLMoE,
# Qwen2-MoE, Qwen3-MoE) have norms of queries and keys or a shared expert that this decoder has not.
ARCHITECTURES: dict[str, Architecture] = {
    "mixtral": MIXTRAL,
    "dense": MIXTRAL,
    "gshard": MIXTRAL,
    "noisy_top_k": Architecture("mixtral", "MixtralForCausalLM", unused=("noise_weight",)),
}


def architecture_of(model: ModelConfig) -> Architecture:
    """That of a model's checkpoints."""
    return ARCHITECTURES.get(model.router.type, OWN)


def is_mixtral(model: ModelConfig) -> bool:
    """Whether evaluation is Mixtral's arithmetic."""
    return architecture_of(model).model_type == MIXTRAL.model_type


def export_note(model: ModelConfig) -> str | None:
    """What to know about checkpoints before training starts; None where they are Mixtral's as they are."""
    found = architecture_of(model)
    if not found.native:
        return (
            f"transformers has no architecture with model.router.type={model.router.type}: checkpoints load in moe_llm "
            "and need its code elsewhere"
        )
    if found.unused:
        return (
            f"checkpoints are {found.architecture}'s; their {', '.join(found.unused)}, which only training needs, is "
            "reported as unused when transformers loads them"
        )
    return None
