"""One optimizer step's loss, cut into what each rank contributes for each of its micro-batches.

The whole is the cross-entropy averaged over all targets of the step, and the routers' losses over all of its real
tokens: ranks and micro-batches are cuts that change nothing. With a teacher, its objective takes the cross-entropy's
place, averaged over the same targets; with pairs of answers, their loss, averaged over the pairs of the step. One
exception: with `model.balance_over: micro_batches`, the fractions in the global balance loss, and the sums in a router's
own losses, are those of the micro-batches up to the present one, because the later ones are not known yet (Qiu et al.
2025). With one micro-batch a step they are exact; with `balance_over: step` they are counted first (`forward_passes`). Engines average gradients over the ranks, so each share is multiplied by their
number.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_llm.config import ModelConfig
from moe_llm.data.packing import IGNORED, Batch, model_inputs
from moe_llm.distributed.engine import Engine
from moe_llm.distributed.runtime import Runtime
from moe_llm.model.decoder import MoEOutput
from moe_llm.model.moe.losses import RouterLoss, balance_loss, router_loss_values, z_loss
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

    Args:
        own_losses: `router_losses` of the model, where the caller has them.
    """

    def __init__(
        self,
        model: ModelConfig,
        runtime: Runtime,
        batches: Sequence[Batch],
        own_losses: Sequence[RouterLoss] | None = None,
    ):
        self.model, self.runtime, self.rounds = model, runtime, len(batches)
        self.own_losses = router_losses(model) if own_losses is None else own_losses
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


_FOR_THE_LOSS = ("targets", "teacher", "preference")


def forward_passes(
    engine: Engine,
    step_loss: StepLoss,
    batches: Sequence[Batch],
    *,
    held: int = 1,
    teach: Callable[[Batch], dict[str, Any]] = lambda batch: {},
    perturb: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    heartbeat: Callable[[str], None] = lambda phase: None,
) -> Iterator[MoEOutput]:
    """The output of each micro-batch, with gradient; the caller computes its backward pass before it asks for the next.

    Args:
        step_loss: of these micro-batches; what it needs to know of the whole step it is told here.
        held: micro-batches whose activations are kept at the same time where their choices are counted first.
        teach: a micro-batch's teacher, as arguments of the model. perturb: what is added to given arguments.
    """

    def arguments(batch: Batch) -> dict[str, Any]:
        inputs = model_inputs(batch) | teach(batch)
        return inputs if perturb is None else inputs | perturb(inputs)

    total = len(batches)
    # routers that learn from the tokens' losses have sums of these in their statistics
    unread = () if engine.model.learns_from_loss else _FOR_THE_LOSS
    if not step_loss.counts_first:
        for i, batch in enumerate(batches):
            heartbeat(f"micro-batch {i + 1} of {total}")
            yield engine.forward(**arguments(batch))
        return
    device, before, perturbations = batches[0].input_ids_BS.device, [], []
    counted_first = max(0, total - held)
    for i, batch in enumerate(batches[:counted_first]):
        heartbeat(f"counting, micro-batch {i + 1} of {total}")
        inputs = model_inputs(batch) if perturb is None else arguments(batch)
        perturbations.append({"perturbation": inputs["perturbation"]} if "perturbation" in inputs else {})
        before.append(_random_state(device))
        with torch.no_grad():
            counted = engine.forward(**{name: value for name, value in inputs.items() if name not in unread})
        step_loss.count(counted.routing)
    outputs = []
    for i, batch in enumerate(batches[counted_first:], counted_first):
        heartbeat(f"micro-batch {i + 1} of {total}")
        outputs.append(engine.forward(**arguments(batch)))
        step_loss.count(outputs[-1].routing)
    while outputs:
        yield outputs.pop()  # the newest first, whose memory is the first to be freed
    for i, (batch, state, perturbation) in enumerate(zip(batches, before, perturbations)):
        heartbeat(f"micro-batch {i + 1} of {total}")
        inputs = model_inputs(batch) | teach(batch) | perturbation
        _set_random_state(state, device)
        yield engine.forward(**inputs)


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
