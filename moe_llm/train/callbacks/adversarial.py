"""Embeddings moved towards a higher loss, for training to withstand (AdvMoE, Zhang et al. 2023, there for images).

Dimensions: B sequences, S positions, D hidden.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from moe_llm.config.adversarial import AdversarialConfig
from moe_llm.model.decoder import MoEDecoder
from moe_llm.train.callbacks.base import Callback, TrainingRun


class AdversarialTraining(Callback):
    """Gives each micro-batch the perturbation of its embeddings (`train.adversarial.epsilon`)."""

    def perturb(self, run: TrainingRun, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"perturbation": find_perturbation(run.engine.model, inputs, run.config.train.adversarial)}


def find_perturbation(model: MoEDecoder, inputs: dict[str, Any], settings: AdversarialConfig) -> Tensor:
    """What to add to a micro-batch's embeddings, (B, S, D) fp32: by steps of ascent on the sum of its losses (without
    the routers' own), from zero, each projected onto the ball of every token (Goodfellow et al. 2015; Madry et al.
    2018).

    All passes, and the one that trains, draw the same numbers. Collective: ranks make the same number of passes.

    Args:
        inputs: of the model's forward pass.
    """
    assert settings.epsilon is not None, "the size of the ball is what turns this on"
    ids_BS = inputs["input_ids"]
    delta_BSD = torch.zeros(*ids_BS.shape, model.config.hidden_size, device=ids_BS.device)
    with _at_rest(model):
        for _ in range(settings.steps):
            delta_BSD.requires_grad_()
            with torch.random.fork_rng([ids_BS.device] if ids_BS.is_cuda else []):
                # the model itself: an engine would take its backward pass for one that trains
                output = model(**inputs, perturbation=delta_BSD)
                loss = output.loss_sum if output.objective_sum is None else output.objective_sum
                slope_BSD = torch.autograd.grad(loss, delta_BSD)[0]
            moved_BSD = delta_BSD.detach() + settings.stride * _steepest(slope_BSD, settings.norm)
            delta_BSD = _onto_ball(moved_BSD, settings.epsilon, settings.norm)
    return delta_BSD


def _steepest(slope_BSD: Tensor, norm: Literal["l2", "linf"]) -> Tensor:
    """The direction of length one in which each token's loss rises fastest; zero where it does not depend on it."""
    return slope_BSD.sign() if norm == "linf" else torch.nn.functional.normalize(slope_BSD, dim=-1, eps=1e-30)


def _onto_ball(delta_BSD: Tensor, epsilon: float, norm: Literal["l2", "linf"]) -> Tensor:
    """The nearest point within epsilon of zero, token by token."""
    if norm == "linf":
        return delta_BSD.clamp(-epsilon, epsilon)
    length_BS1 = torch.linalg.vector_norm(delta_BSD, dim=-1, keepdim=True)
    return delta_BSD * (epsilon / length_BS1.clamp(min=epsilon))


@contextmanager
def _at_rest(model: MoEDecoder) -> Iterator[None]:
    """No parameter asks for a gradient meanwhile, so that none is computed."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
