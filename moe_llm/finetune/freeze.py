"""Freezing: the parameters that are not trained get no gradient, and so nothing that follows from one."""

from torch import nn

from moe_llm.config import Config
from moe_llm.finetune.selection import trained_names
from moe_llm.model.adapters import own_name


def freeze(model: nn.Module, config: Config) -> None:
    """Mark what `finetune.trainable` leaves out; which of the experts are trained is the engine's to know.

    Args:
        model: with all experts or some; before the optimizer and the engine are built.

    Raises:
        UserError: as `trained_names`.
    """
    trained = set(trained_names(config))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(own_name(name) in trained)
