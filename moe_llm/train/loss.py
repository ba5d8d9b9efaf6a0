"""One optimizer step's loss, cut into what each rank contributes for each of its micro-batches.

The whole is: cross-entropy averaged over all targets of the step; balance and z-loss of each round of micro-batches
(the one that all ranks take at the same time), averaged over the rounds. Engines average gradients over the ranks,
so each rank's share is multiplied by their number.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_llm.config import ModelConfig
from moe_llm.model.decoder import MoEOutput
from moe_llm.model.moe.balance import balance_loss, z_loss
from moe_llm.model.moe.routing import RoutingStatistics
from moe_llm.parallel.runtime import Runtime


class StepLosses(NamedTuple):
    """This rank's shares, fp32 scalars: `total` has the gradient; summed over ranks and micro-batches and divided
    by the number of ranks they are the step's losses."""

    total: Tensor
    lm: Tensor
    aux: Tensor
    z: Tensor


def micro_batch_loss(
    output: MoEOutput, model: ModelConfig, runtime: Runtime, step_targets: float, rounds: int
) -> tuple[StepLosses, RoutingStatistics]:
    """The share of one micro-batch, and the routing statistics summed over the ranks (detached).

    Args:
        step_targets: targets of all micro-batches of all ranks in this step.
        rounds: micro-batches each rank takes in this step.
    """
    ranks = runtime.world_size
    summed = sum_over_ranks(output.routing, runtime)
    own = output.routing
    if model.router_aux_loss_scope == "transformers":
        aux = balance_loss(own, own.tokens_per_expert_E, own.num_tokens[0].clamp(min=1), "transformers")
    else:
        aux = ranks * balance_loss(own, summed.tokens_per_expert_E, summed.num_tokens[0], "global")
    z = ranks * z_loss(own, summed.num_tokens[0])
    lm = ranks * output.loss_sum / step_targets
    total = lm + (model.router_aux_loss_coef * aux + model.router_z_loss_coef * z) / rounds
    return StepLosses(total, lm.detach(), aux.detach() / rounds, z.detach() / rounds), summed


def sum_over_ranks(statistics: RoutingStatistics, runtime: Runtime) -> RoutingStatistics:
    """The statistics of all ranks, without gradient, in one exchange for all layers."""
    parts = [part.detach() for part in statistics]
    flat = runtime.sum(torch.cat([part.flatten() for part in parts]))
    pieces = flat.split([part.numel() for part in parts])
    return RoutingStatistics(*(piece.view_as(part) for piece, part in zip(pieces, parts)))
