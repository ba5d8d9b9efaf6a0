"""The forward passes of one optimizer step, in order.

With `model.balance_over: step` the routers' losses need the choices of all micro-batches before the first backward pass.
So all but the last go through the model once without gradient and without the head, and their choices are counted; the
last one follows with gradient and comes first in the backward passes, so that nothing is computed twice for it. A
micro-batch's second pass draws the random numbers of its first. Where memory has room for the activations of several
(`train.held_micro_batches`), so many of the last ones are computed once.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_llm.data.packing import Batch, model_inputs
from moe_llm.distributed.engine import Engine
from moe_llm.distributed.step_loss import StepLoss
from moe_llm.model.decoder import MoEOutput

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
    unread = () if engine.model.config.router.learns_from_loss else _FOR_THE_LOSS
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
