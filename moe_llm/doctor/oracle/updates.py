"""Optimizers that torch has not, from their papers' algorithms, and torch's Muon on parameters that hold several matrices.

Each is given parameter groups with `lr` and `weight_decay`, as torch's own are.
"""

from collections import defaultdict
from typing import Any

import torch

# Sums of two terms that cancel to less than this share of them: their sign is rounding's.
_CANCELLED = 1e-5


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, algorithm 2. unsure: of each parameter, the elements whose sign has been in
    doubt in a step so far."""

    def __init__(self, groups: list[dict], betas: tuple[float, float]):
        super().__init__(groups, {"lr": 0.0})
        self.betas = betas
        self.unsure: dict[torch.Tensor, torch.Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        first, second = self.betas
        for group in self.param_groups:
            for weight in (weight for weight in group["params"] if weight.grad is not None):
                average = self.state[weight].setdefault("exp_avg", torch.zeros_like(weight))
                old, new = first * average, (1 - first) * weight.grad
                doubt = (old + new).abs() < _CANCELLED * (old.abs() + new.abs())
                self.unsure[weight] = self.unsure.get(weight, torch.zeros_like(doubt)) | doubt
                weight -= group["lr"] * ((old + new).sign() + group["weight_decay"] * weight)
                average.mul_(second).add_(weight.grad, alpha=1 - second)


class ScheduleFreeAdamW(torch.optim.Optimizer):
    """Defazio et al. 2024, algorithm 1. Parameters are y, at which gradients are taken; x, the average that is used in the
    end, follows from y = (1 - beta) z + beta x."""

    def __init__(self, groups: list[dict], betas: tuple[float, float], eps: float):
        super().__init__(groups, {"lr": 0.0})
        self.betas, self.eps, self.steps = betas, eps, 0
        self.squares: dict[int, float] = defaultdict(float)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        beta, second = self.betas
        self.steps += 1
        for number, group in enumerate(self.param_groups):
            rate = group["lr"]
            self.squares[number] += rate**2
            share = rate**2 / self.squares[number] if rate else 0.0
            for y in (weight for weight in group["params"] if weight.grad is not None):
                z = self.state[y].setdefault("z", y.clone())
                v = self.state[y].setdefault("exp_avg_sq", torch.zeros_like(y))
                x = (y - (1 - beta) * z) / beta
                v.mul_(second).add_((1 - second) * y.grad**2)
                size = (v / (1 - second**self.steps)).sqrt() + self.eps
                z -= rate * (y.grad / size + group["weight_decay"] * y)
                x += share * (z - x)
                y.copy_((1 - beta) * z + beta * x)


class MuonAndAdamW:
    """torch's Muon, which takes matrices alone, on each matrix of the groups by itself; `rest` steps all else.

    Args:
        groups: with `matrices`, how many lie above each other in a parameter or in each row of a stacked one.
        settings: of `torch.optim.Muon`.
    """

    def __init__(self, groups: list[dict], rest: torch.optim.Optimizer, settings: dict[str, Any]):
        self._cut = {
            weight: [torch.nn.Parameter(part) for part in _matrices(weight.detach(), group["matrices"])]
            for group in groups
            for weight in group["params"]
        }
        self._matrices = torch.optim.Muon(
            [
                {**group, "params": [part for weight in group["params"] for part in self._cut[weight]]}
                for group in groups
            ],
            lr=0.0,
            **settings,
        )
        self._rest, self._above = rest, {weight: group["matrices"] for group in groups for weight in group["params"]}
        self.param_groups = [*self._matrices.param_groups, *rest.param_groups]

    def step(self) -> None:
        for weight, parts in self._cut.items():
            slopes = [None] * len(parts) if weight.grad is None else _matrices(weight.grad, self._above[weight])
            for part, slope in zip(parts, slopes):
                part.grad = slope
        self._matrices.step()
        self._rest.step()

    @property
    def state(self) -> dict[torch.Tensor, dict[str, torch.Tensor]]:
        found: dict[torch.Tensor, dict[str, torch.Tensor]] = defaultdict(dict, self._rest.state)
        for weight, parts in self._cut.items():
            held = [self._matrices.state[part].get("momentum_buffer") for part in parts]
            if all(average is not None for average in held):
                found[weight] = {"momentum_buffer": torch.cat(held).view(weight.shape)}
        return found


def _matrices(weight: torch.Tensor, above: int) -> list[torch.Tensor]:
    """Views of the matrices in a parameter."""
    return [part for row in weight.view(-1, *weight.shape[-2:]) for part in row.chunk(above)]
