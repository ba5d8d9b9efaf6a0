"""Muon (Jordan et al. 2024) for matrices, AdamW for all else, on whole parameters or on ZeRO's slices of them."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# what torch.optim.Muon itself computes an update with: on slices, its own step would see no matrix
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz


class Piece(NamedTuple):
    """A run of a parameter's elements in a flat slice.

    shape: of the whole parameter. first: index of the run's first element in the parameter. start: and in the slice.
    length: elements of the run.
    """

    shape: tuple[int, ...]
    first: int
    start: int
    length: int


class Share(NamedTuple):
    """What a flat slice holds. ranks: the process group whose slices, as large as this one, are the parameters one after
    the other in the order of its ranks; None: they are whole."""

    pieces: list[Piece]
    ranks: Any | None


class Muon(torch.optim.AdamW):
    """Groups with `muon` above 0 are stepped by Muon: their parameters are matrices, or stacks of them, each with so many
    matrices above each other; all other groups by AdamW.

    The numbers are those of `torch.optim.Muon` on each matrix by itself. Under ZeRO-1 and 2 each rank updates the
    momentum of its slice, slices are gathered in bf16, in which torch orthogonalises anyway, and a rank orthogonalises
    the matrices that its slice touches.

    Args:
        muon: a `MuonConfig`.
    """

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float], eps: float, muon: Any):
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)
        self._settings = muon
        self.share_of: Callable[[Tensor], Share] = whole

    def step(self, closure: Any = None) -> Any:
        groups = self.param_groups
        for group in groups:
            if group.get("muon"):
                self._step_matrices(group)
        self.param_groups = [group for group in groups if not group.get("muon")]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups

    @torch.no_grad()
    def _step_matrices(self, group: dict) -> None:
        settings = self._settings
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            average, gradient = state["momentum_buffer"], parameter.grad
            average.lerp_(gradient, 1 - settings.momentum)
            direction = gradient.lerp(average, settings.momentum) if settings.nesterov else average
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            share = self.share_of(parameter)
            flat, gathered, offset = parameter.view(-1), *_gather(direction.reshape(-1), share.ranks)
            for piece in share.pieces:
                begin = offset + piece.start - piece.first  # of the whole parameter among what is gathered
                for index, matrix in _matrices(gathered, begin, piece, group["muon"]):
                    update = _zeropower_via_newtonschulz(matrix, *self._iteration).to(flat.dtype).reshape(-1)
                    rate = _adjust_lr(group["lr"], settings.adjust_lr, matrix.shape)
                    low, high = max(index, piece.first), min(index + update.numel(), piece.first + piece.length)
                    held = flat[piece.start + low - piece.first : piece.start + high - piece.first]
                    held.add_(update[low - index : high - index], alpha=-rate)

    @property
    def _iteration(self) -> tuple[tuple[float, float, float], int, float]:
        defaults = torch.optim.Muon([torch.zeros(1, 1)]).defaults
        return defaults["ns_coefficients"], self._settings.ns_steps, defaults["eps"]


def whole(parameter: Tensor) -> Share:
    """The share of a parameter that is not cut up."""
    return Share([Piece(tuple(parameter.shape), 0, 0, parameter.numel())], None)


def _gather(flat: Tensor, ranks: Any | None) -> tuple[Tensor, int]:
    """The slices of all ranks in bf16, and where this rank's own begins."""
    size = 1 if ranks is None else dist.get_world_size(ranks)
    if size == 1:
        return flat, 0
    slices = torch.empty(size * flat.numel(), dtype=torch.bfloat16, device=flat.device)
    dist.all_gather_into_tensor(slices, flat.bfloat16(), group=ranks)
    return slices, dist.get_rank(ranks) * flat.numel()


def _matrices(gathered: Tensor, begin: int, piece: Piece, above: int) -> Iterator[tuple[int, Tensor]]:
    """(index of its first element in the parameter, (rows, columns)) of each matrix that a piece has elements of."""
    rows, columns = piece.shape[-2] // above, piece.shape[-1]
    size = rows * columns
    for number in range(piece.first // size, -(-(piece.first + piece.length) // size)):
        start = begin + number * size
        yield number * size, gathered[start : start + size].view(rows, columns)
