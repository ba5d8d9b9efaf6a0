"""One optimizer step's loss, cut into what each rank contributes for each of its micro-batches.

The whole is the cross-entropy averaged over all targets of the step, and the routers' losses over all of its real
tokens: ranks and micro-batches are cuts that change nothing. With a teacher, its objective takes the cross-entropy's
place, averaged over the same targets; with pairs of answers, their loss, averaged over the pairs of the step. One
exception: with `model.balance_over: micro_batches`, the fractions in the global balance loss, and the sums in a router's
own losses, are those of the micro-batches up to the present one, because the later ones are not known yet (Qiu et al.
2025). With one micro-batch a step they are exact; with `balance_over: step` they are counted first (`forward_passes`). Engines average gradients over the ranks, so each share is multiplied by their
number.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_llm.config import ModelConfig
from moe_llm.data.packing import IGNORED, Batch
from moe_llm.distributed.runtime import Runtime
from moe_llm.model.decoder import MoEOutput
from moe_llm.model.moe.balance import balance_loss, z_loss
from moe_llm.model.moe.losses import router_loss_values
from moe_llm.model.moe.routers import router_losses
from moe_llm.model.moe.routing import RoutingStatistics


class StepLosses(NamedTuple):
    """A micro-batch's shares, fp32 scalars, `total` with gradient: summed over ranks and micro-batches and divided by
    the number of ranks they are the step's losses. own: those of `router_losses`, in their order."""

    total: Tensor
    lm: Tensor
    aux: Tensor
    z: Tensor
    distill: Tensor  # a teacher's divergence, beside which `lm` is no more than measured; 0 without one
    own: Tensor
    preference: Tensor | None = None  # of pairs of answers: `ops.preference.MEASURED`, of which the first is their loss


class StepLoss:
    """The shares of one step's micro-batches, which are known beforehand.

    tokens: of the whole step that are no padding, a scalar. routing: statistics of the micro-batches so far, or of the whole step where they are counted first; summed over the
    ranks, without gradient. counts_first: whether `count` has to be given all micro-batches' before the first share.
    """

    def __init__(self, model: ModelConfig, runtime: Runtime, batches: Sequence[Batch]):
        self.model, self.runtime, self.rounds = model, runtime, len(batches)
        self.own_losses = router_losses(model)
        self._own_before: Tensor | None = None
        self.routing: RoutingStatistics | None = None
        self.counts_first = model.balance_over == "step" and self.rounds > 1
        self._counted: list[RoutingStatistics] = []
        counts = torch.stack([_counts(batch) for batch in batches]).sum(0)
        self.targets, self.tokens, self.sequences, self.pairs = runtime.sum(counts)
        self.routed = self.tokens * model.router.parts_per_token

    def count(self, statistics: RoutingStatistics) -> None:
        """Take in a micro-batch's statistics; with those of the last one the ranks add up the step's. Collective."""
        self._counted.append(RoutingStatistics(*(part.detach() for part in statistics)))
        if len(self._counted) == self.rounds:
            own = self._counted[0]
            for other in self._counted[1:]:
                own = own.plus(other)
            self.routing = sum_over_ranks(own, self.runtime)

    @property
    def step_routing(self) -> RoutingStatistics:
        """`routing`, once there is a micro-batch's."""
        assert self.routing is not None, "no micro-batch has been counted"
        return self.routing

    def __call__(self, output: MoEOutput) -> StepLosses:
        own, ranks, model = output.routing, self.runtime.world_size, self.model
        if self.counts_first:
            assert self.routing is not None, "model.balance_over: step needs the whole step's counts: `forward_passes`"
        else:
            self.routing = sum_over_ranks(own, self.runtime).plus(self.routing)
        total = self.routing._replace(
            num_tokens=self.routed.expand_as(own.num_tokens), num_sequences=self.sequences.expand_as(own.num_tokens)
        )
        aux = balance_loss(own, model.router_aux_loss_scope, total=total, seen=self.routing)
        aux = aux / self.rounds if model.router_aux_loss_scope == "transformers" else ranks * aux
        z = ranks * z_loss(own, total=total)
        assert output.loss_sum is not None, "a batch that is trained on has labels"
        lm = ranks * output.loss_sum / self.targets
        units = self.targets if output.preference is None else self.pairs
        objective = lm if output.objective_sum is None else ranks * output.objective_sum / units
        measured = None if output.preference is None else ranks * output.preference.measured / units
        whole = objective + model.router_aux_loss_coef * aux + model.router_z_loss_coef * z
        distill = torch.zeros_like(z) if output.soft_sum is None else ranks * output.soft_sum / self.targets
        values = router_loss_values(self.own_losses, own, total=total, seen=self.routing)
        # Gradients of the parts add up. Values are of all that has been seen: what this micro-batch has added to them.
        added = values.detach() - (0 if self._own_before is None else self._own_before)
        self._own_before = values.detach()
        if self.own_losses:
            coefficients = values.new_tensor([loss.coefficient for loss in self.own_losses])
            whole = whole + coefficients @ (ranks * (values - values.detach()) + added)
        return StepLosses(whole, lm.detach(), aux.detach(), z.detach(), distill.detach(), added, measured)


def _counts(batch: Batch) -> Tensor:
    """Targets, real tokens, sequences that have one, and pairs of answers, of which the targets are those of the chosen
    ones: fp32, exact up to 2^24 a batch."""
    mask_BS, targets_BS = batch.attention_mask_BS, batch.labels_BS != IGNORED
    pairs = mask_BS.new_zeros((), dtype=torch.int64)
    if batch.reference_BS is not None:
        assert batch.document_ids_BS is not None, "pairs of answers are documents"
        targets_BS = targets_BS & (batch.document_ids_BS % 2 == 0)
        pairs = (batch.document_ids_BS.amax(1) + 1).sum() // 2
    # of the ranks that share a sequence the first one counts it: padding comes last
    sequences = mask_BS.any(1).sum() * (batch.part[0] == 0)
    return torch.stack([targets_BS.sum(), mask_BS.sum(), sequences, pairs]).float()


def sum_over_ranks(statistics: RoutingStatistics, runtime: Runtime) -> RoutingStatistics:
    """The statistics of all ranks, without gradient, in one exchange for all layers."""
    parts = [part.detach() for part in statistics]
    flat = runtime.sum(torch.cat([part.flatten() for part in parts]))
    pieces = flat.split([part.numel() for part in parts])
    return RoutingStatistics(*(piece.view_as(part) for piece, part in zip(pieces, parts)))
