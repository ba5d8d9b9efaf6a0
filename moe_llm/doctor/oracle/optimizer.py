"""What the optimizer should make of the gradients: torch's own AdamW, SGD and Muon, or a paper's algorithm (`updates`), with
parameters grouped by their names.

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

from moe_llm.doctor.oracle import updates

Tensors = Mapping[str, np.ndarray]

KINDS = ("adamw", "adamw_8bit", "sgd", "muon", "lion", "schedule_free")
_TENSORS = ("exp_avg", "exp_avg_sq", "momentum_buffer", "z")


@dataclass(frozen=True)
class Rules:
    """How parameters are updated.

    kind: of `KINDS`. clip: bound of the gradient's norm; 0: none. multipliers: of the rate, for experts, routers and
    rest. decays: "matrices", "vectors", "all" or "none". experts: those that are trained; None: all.
    router_every: every so many steps the routers alone are trained, and in the others all else; None: all in each.
    decoupled: false for what is not AdamW, to tell a wrong optimizer by. momentum, nesterov, ns_steps, adjust_lr: of
    Muon.
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
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    adjust_lr: str = "match_rms_adamw"


@dataclass
class Updated:
    """After each step: weights; the norm before clipping; the tensors that the optimizer keeps, by kind and name; and the
    elements that rounding decides, which nobody can compare: those whose sign Lion takes of a sum that is nearly zero."""

    weights: list[dict[str, np.ndarray]]
    norms: list[float]
    moments: list[dict[str, dict[str, np.ndarray]]]
    unsure: list[dict[str, np.ndarray]]


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
            "matrices": _matrices_of_muon(name, start[name]) if rules.kind == "muon" else 0,
        }
        for name, parameter in parameters.items()
    ]
    optimizer = _optimizer(groups, rules)
    seen = Updated([], [], [], [])
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
        seen.moments.append(_kept(optimizer, parameters, start, rows))
        unsure = optimizer.unsure if isinstance(optimizer, updates.Lion) else {}
        seen.unsure.append(
            {
                name: _whole(np.zeros(start[name].shape, bool), rows[name], unsure[p])
                for name, p in parameters.items()
                if p in unsure
            }
        )
    return seen


def _optimizer(groups: list[dict], rules: Rules) -> torch.optim.Optimizer | updates.MuonAndAdamW:
    if rules.kind == "sgd":
        return torch.optim.SGD(groups, lr=0.0, foreach=False)
    if rules.kind == "lion":
        return updates.Lion(groups, rules.betas)
    if rules.kind == "schedule_free":
        return updates.ScheduleFreeAdamW(groups, rules.betas, rules.eps)
    kind = torch.optim.AdamW if rules.decoupled else torch.optim.Adam
    if rules.kind == "muon":
        rest = kind([g for g in groups if not g["matrices"]], lr=0.0, betas=rules.betas, eps=rules.eps, foreach=False)
        settings = {"momentum": rules.momentum, "nesterov": rules.nesterov, "ns_steps": rules.ns_steps}
        return updates.MuonAndAdamW(
            [g for g in groups if g["matrices"]], rest, {**settings, "adjust_lr_fn": rules.adjust_lr}
        )
    return kind(groups, lr=0.0, betas=rules.betas, eps=rules.eps, foreach=False)


def _matrices_of_muon(name: str, value: np.ndarray) -> int:
    """How many matrices that Muon steps lie above each other in a parameter, or in each row of a stacked one: a gate and an
    up projection, or one. None in embeddings, output layer, routers and vectors, which are AdamW's (Jordan et al. 2024)."""
    outer = "embed_tokens" in name or "lm_head" in name or part_of(name) == 1
    if outer or is_vector(name, value) or min(value.shape[-2:]) == 1:
        return 0
    return 2 if name.endswith("experts.gate_up_proj") else 1


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


def _whole(start: np.ndarray, rows: slice | list[int], part: torch.Tensor) -> np.ndarray:
    value = start.copy()
    value[rows] = part.detach().numpy()
    return value


def _kept(
    optimizer: torch.optim.Optimizer | updates.MuonAndAdamW,
    parameters: Mapping[str, torch.nn.Parameter],
    start: Tensors,
    rows: Mapping[str, slice | list[int]],
) -> dict[str, dict[str, np.ndarray]]:
    kinds: dict[str, dict[str, np.ndarray]] = {}
    for kind in _TENSORS:
        for name, parameter in parameters.items():
            if kind in (state := optimizer.state[parameter]):
                before = start[name] if kind == "z" else np.zeros_like(start[name])
                kinds.setdefault(kind, {})[name] = _whole(before, rows[name], state[kind])
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
        **{f"{kind} is used in place of {rules.kind}": replace(rules, kind=kind) for kind in KINDS},
    }
    return {sentence: other for sentence, other in wrong.items() if other != rules}
