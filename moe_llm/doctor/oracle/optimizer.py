"""What the optimizer should make of the gradients: torch's own AdamW or SGD, with parameters grouped by their names.

Matrices decay; vectors (norms, biases) do not (Loshchilov and Hutter 2019; Brown et al. 2020, appendix B decays all, later
models leave out vectors). The gradient of all trained parameters together is clipped to a norm (Pascanu et al. 2013,
algorithm 1). Experts, routers and the rest may have learning rates of their own; parameters whose turn it is not are
left out of a step.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

Tensors = Mapping[str, np.ndarray]

KINDS = ("adamw", "sgd")


@dataclass(frozen=True)
class Rules:
    """How parameters are updated.

    kind: adamw or sgd. clip: bound of the gradient's norm; 0: none. multipliers: of the rate, for experts, routers and
    rest. decays: "matrices", "vectors", "all" or "none". experts: those that are trained; None: all.
    router_every: every so many steps the routers alone are trained, and in the others all else; None: all in each.
    bias_correction, decoupled: false for what is not AdamW, to tell a wrong optimizer by.
    """

    kind: str
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip: float
    multipliers: tuple[float, float, float] = (1.0, 1.0, 1.0)
    decays: str = "matrices"
    experts: tuple[int, ...] | None = None
    router_every: int | None = None
    decoupled: bool = True


@dataclass
class Updated:
    """After each step: weights; the norm before clipping; and after the last step whose number is `moments_after`
    AdamW's two moments."""

    weights: list[dict[str, np.ndarray]]
    norms: list[float]
    moments: list[dict[str, dict[str, np.ndarray]]]


def part_of(name: str) -> int:
    """0: of an expert; 1: of a router; 2: of the rest."""
    return 0 if ".mlp.experts." in name else 1 if ".mlp.gate." in name else 2


def is_vector(name: str, value: np.ndarray) -> bool:
    """Norms and biases by name, and whatever has one dimension."""
    return name.endswith(("norm.weight", ".bias", "_bias")) or value.ndim <= 1


def gradient_norm(gradients: Tensors) -> float:
    """Euclidean, over all parameters together, in double precision."""
    return math.sqrt(sum(float((value.astype(np.float64) ** 2).sum()) for value in gradients.values()))


def replay(start: Tensors, gradients: Sequence[Tensors], rates: Sequence[float], rules: Rules) -> Updated:
    """The updates that follow from these gradients.

    Args:
        start: weights before the first step, whole tensors by name.
        gradients: of each step, before clipping; the parameters that have one are those that are trained.
        rates: of each step.
    """
    rows = {name: _rows(name, rules) for name in gradients[0]}
    parameters = {name: torch.nn.Parameter(torch.from_numpy(start[name][rows[name]].copy())) for name in gradients[0]}
    groups = [
        {
            "params": [parameter],
            "multiplier": rules.multipliers[part_of(name)],
            "weight_decay": rules.weight_decay if _decays(name, start[name], rules) else 0.0,
        }
        for name, parameter in parameters.items()
    ]
    optimizer = _optimizer(groups, rules)
    seen = Updated([], [], [])
    for step, slopes in enumerate(gradients):
        norm = gradient_norm({name: value[rows[name]] for name, value in slopes.items()})
        factor = min(1.0, rules.clip / (norm + 1e-6)) if rules.clip else 1.0
        for group in optimizer.param_groups:
            group["lr"] = rates[step] * group["multiplier"]
        for name, parameter in parameters.items():
            parameter.grad = None
            if _has_turn(name, step, rules):
                parameter.grad = torch.from_numpy(slopes[name][rows[name]].copy()) * factor
        optimizer.step()
        seen.norms.append(norm)
        seen.weights.append({name: _whole(start[name], rows[name], p) for name, p in parameters.items()})
        seen.moments.append(_moments(optimizer, parameters, start, rows) if rules.kind == "adamw" else {})
    return seen


def _optimizer(groups: list[dict], rules: Rules) -> torch.optim.Optimizer:
    if rules.kind == "sgd":
        return torch.optim.SGD(groups, lr=0.0, foreach=False)
    kind = torch.optim.AdamW if rules.decoupled else torch.optim.Adam
    return kind(groups, lr=0.0, betas=rules.betas, eps=rules.eps, foreach=False)


def _decays(name: str, value: np.ndarray, rules: Rules) -> bool:
    return {"matrices": not is_vector(name, value), "vectors": is_vector(name, value), "all": True, "none": False}[
        rules.decays
    ]


def _rows(name: str, rules: Rules) -> slice | list[int]:
    """The experts of a stacked parameter that are trained, or all of a parameter."""
    return list(rules.experts) if rules.experts is not None and part_of(name) == 0 else slice(None)


def _has_turn(name: str, step: int, rules: Rules) -> bool:
    if rules.router_every is None:
        return True
    return (part_of(name) == 1) == ((step + 1) % rules.router_every == 0)


def _whole(start: np.ndarray, rows: slice | list[int], parameter: torch.Tensor) -> np.ndarray:
    value = start.copy()
    value[rows] = parameter.detach().numpy()
    return value


def _moments(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
    start: Tensors,
    rows: Mapping[str, slice | list[int]],
) -> dict[str, dict[str, np.ndarray]]:
    kinds: dict[str, dict[str, np.ndarray]] = {"exp_avg": {}, "exp_avg_sq": {}}
    for kind, values in kinds.items():
        for name, parameter in parameters.items():
            zero, state = np.zeros_like(start[name]), optimizer.state[parameter]
            values[name] = _whole(zero, rows[name], state[kind]) if kind in state else zero
    return kinds


def other_rules(rules: Rules) -> dict[str, Rules]:
    """What may have gone wrong in its place: a sentence for each set of wrong rules that a replay can be compared
    with."""
    wrong = {
        "weight decay is not applied": replace(rules, decays="none"),
        "weight decay is applied to vectors (norms) in place of matrices": replace(rules, decays="vectors"),
        "weight decay is applied to vectors (norms) too": replace(rules, decays="all"),
        "weight decay is applied twice": replace(rules, weight_decay=2 * rules.weight_decay),
        "the two betas are swapped": replace(rules, betas=(rules.betas[1], rules.betas[0])),
        "gradients are not clipped": replace(rules, clip=0.0),
        "weight decay is added to the gradient, as in Adam, and not decoupled": replace(rules, decoupled=False),
        "all parts have one learning rate: the multipliers are not used": replace(rules, multipliers=(1.0, 1.0, 1.0)),
        "plain SGD is used in place of AdamW": replace(rules, kind="sgd"),
        "AdamW is used in place of SGD": replace(rules, kind="adamw"),
    }
    return {sentence: other for sentence, other in wrong.items() if other != rules}
