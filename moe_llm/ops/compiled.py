"""Regions for torch.compile: functions of tensors between the products, without parameters, exchanges or waits.

Regions rather than the model: what lies between them asks for sizes, exchanges rows, or is gathered by ZeRO-3 when a
module is called, none of which a graph holds.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
on = False  # whether regions are compiled
BACKEND = "inductor"


def enable(enabled: bool) -> None:
    """From now on regions are compiled, or not."""
    global on
    on = enabled


def region(function: Callable[P, R]) -> Callable[P, R]:
    """The function, compiled at its first call for a kind of input while that is on; for any size of batch."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not on:
            return function(*args, **kwargs)
        return _compiled(function, BACKEND)(*args, **kwargs)

    return call


@functools.cache
def _compiled(function: Callable[P, R], backend: str) -> Callable[P, R]:
    return torch.compile(function, backend=backend, dynamic=True)
