"""Mixtures whose weights depend on the context: lambda = softmax(W f + b), with f the members' recent losses or the main
model's hidden state (after the gating networks of Jacobs et al. 1991; recent losses as in Prediction by Partial Matching
and dynamic interpolation of language models).

Shapes: N positions, R rows, T tokens, M real tokens of all rows, U models, F features, V vocabulary, D hidden.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_llm.ensemble.recipe import Gate
from moe_llm.ensemble.rules import mutual_information

_MOST = 30.0  # nats: what a token that a member excludes counts as
_STEPS = 200


class Contextual:
    """log sum_u w_u(f) p_u. Needs every model, and the features of each position."""

    def __init__(self, gate: Gate, models: int):
        assert len(gate.weight) == len(gate.bias) == models, "a row for each model, which the ensemble checks"
        self._weight_UF = torch.tensor(gate.weight, dtype=torch.float64)
        self._bias_U = torch.tensor(gate.bias, dtype=torch.float64)
        self.needed = tuple(range(1, models))

    def asks(self, main_NV: Tensor) -> Tensor:
        return main_NV.new_ones(main_NV.shape[:1], dtype=torch.bool)

    def log_weights(self, context_NF: Tensor) -> Tensor:
        """(N, U), fp32."""
        device = context_NF.device
        logits_NU = context_NF.double() @ self._weight_UF.T.to(device) + self._bias_U.to(device)
        return logits_NU.log_softmax(-1).float()

    def __call__(self, log_probs: list[Tensor], context_NF: Tensor) -> Tensor:
        log_weight_NU = self.log_weights(context_NF)
        return torch.stack([part + log_weight_NU[:, u, None] for u, part in enumerate(log_probs)]).logsumexp(0)

    def disagreement(self, log_probs: list[Tensor], mixed_NV: Tensor, context_NF: Tensor) -> Tensor:
        """As `LinearMixture.disagreement`."""
        return mutual_information(log_probs, mixed_NV, self.log_weights(context_NF).exp().T)


def recent_losses(log_probs: list[Tensor], ids_RT: Tensor, mask_RT: Tensor, window: int) -> Tensor:
    """(M, U): of each real token, the mean loss of each model on the tokens that end with it, `window` at most, less
    the models' mean; 0 where nothing has been guessed yet.

    Args:
        log_probs: (M, V) of each model, of the token after each real one.
        mask_RT: False on padding, which is on the right.
    """
    loss_RTU = log_probs[0].new_zeros(*ids_RT.shape, len(log_probs))
    follows_RT = mask_RT & F.pad(mask_RT[:, 1:], (0, 1))
    next_M = F.pad(ids_RT[:, 1:], (0, 1))[mask_RT].to(log_probs[0].device)
    known_M = follows_RT[mask_RT].to(log_probs[0].device)
    found_MU = torch.stack([-part.gather(1, next_M[:, None])[:, 0] for part in log_probs], 1).clamp(max=_MOST)
    loss_RTU[mask_RT.to(loss_RTU.device)] = torch.where(known_M[:, None], found_MU, 0.0)
    before_RTU = F.pad(loss_RTU.double().cumsum(1), (0, 0, 1, 0))  # at T, of all guesses before
    place_T = torch.arange(ids_RT.shape[1], device=loss_RTU.device)
    first_T = (place_T - window).clamp(min=0)
    mean_RTU = (before_RTU[:, :-1] - before_RTU[:, first_T]) / (place_T - first_T).clamp(min=1)[:, None]
    return (mean_RTU - mean_RTU.mean(-1, keepdim=True)).float()[mask_RT.to(loss_RTU.device)]


def fit_gate(log_probs_NU: Tensor, context_NF: Tensor, constant_U: Tensor, penalty: float) -> tuple[Gate, float]:
    """The gate that gives the targets the highest likelihood, begun at the best constant weights; its loss, nats per token,
    which is never above theirs.

    Args:
        log_probs_NU: of each target, by each model. penalty: on the squares of W, which are those of scaled features.
    """
    scale_F = context_NF.double().std(0, correction=0).clamp(min=1e-6)
    mean_F = context_NF.double().mean(0)
    scaled_NF, log_probs_NU = (context_NF.double() - mean_F) / scale_F, log_probs_NU.double().clamp(min=-1e4)
    weight_UF = torch.zeros(len(constant_U), scaled_NF.shape[1], dtype=torch.float64, requires_grad=True)
    bias_U = constant_U.double().clamp(min=1e-4).log().requires_grad_()
    begun = weight_UF.detach().clone(), bias_U.detach().clone()

    def loss(weight_UF: Tensor, bias_U: Tensor) -> Tensor:
        return -((scaled_NF @ weight_UF.T + bias_U).log_softmax(-1) + log_probs_NU).logsumexp(1).mean()

    optimizer = torch.optim.LBFGS([weight_UF, bias_U], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(weight_UF, bias_U) + penalty * weight_UF.square().sum()
        value.backward()
        return value

    optimizer.step(closure)
    found = weight_UF.detach(), bias_U.detach()
    weight_UF, bias_U = min((found, begun), key=lambda pair: float(loss(*pair)))  # a NaN is not below anything
    reached = float(loss(weight_UF, bias_U))
    weight_UF = weight_UF / scale_F
    bias_U = bias_U - weight_UF @ mean_F
    return Gate(weight=weight_UF.tolist(), bias=bias_U.tolist()), reached
