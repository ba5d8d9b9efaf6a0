"""One tensor of the output: its inputs, its parameters, and the spans in which it is worked on.

Inputs come in spans of SPAN elements in the order in which they lie, as fp32. A method first looks at as many
passes over them as it needs (norms, thresholds) and then gives a function from a span of each input to the
result's; memory is a few spans for each input, whatever the tensor.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from moe_llm.errors import UserError

SPAN = 1 << 18  # elements
OPPOSED = "the models point opposite ways, between which no turn is the shortest: they are averaged, which shrinks them"

Combine = Callable[[int, list[torch.Tensor]], torch.Tensor]
"""From where a span starts and its part of every input to its part of the result; called in order, once a span."""


class Reader(Protocol):
    """Tensors by the names of transformers 5, in spans of elements."""

    shapes: dict[str, tuple[int, ...]]

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements `start` to `stop` in the order in which they lie, in the stored dtype: (stop - start,)."""
        ...


@dataclass(frozen=True)
class Input:
    """A tensor of a model, and the method's parameters for it."""

    reader: Reader
    name: str
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One tensor of the output.

    base: index of the input that task vectors are differences from; None: there is none.
    shared: parameters that are no input's own.
    cast: dtype that inputs are rounded to before anything is computed; None: as stored.
    notes: sentences about this tensor that a method adds while it works.
    """

    name: str
    shape: tuple[int, ...]
    out_dtype: torch.dtype
    inputs: list[Input]
    start: Callable[["Job"], Combine]
    base: int | None = None
    shared: dict[str, Any] = field(default_factory=dict)
    cast: torch.dtype | None = None
    seed: int = 0
    notes: list[str] = field(default_factory=list, compare=False)

    @property
    def origin(self) -> int:
        """`base` of a method that has one."""
        assert self.base is not None, "the plan gives a method on task vectors its base"
        return self.base

    @property
    def tasks(self) -> list[int]:
        """Indices of the inputs that are not the base."""
        return [i for i in range(len(self.inputs)) if i != self.base]

    def spans(self) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """Where each span starts, and its part of every input, fp32."""
        total = math.prod(self.shape)
        for start in range(0, total, SPAN):
            stop = min(start + SPAN, total)
            yield start, [self._read(item, start, stop) for item in self.inputs]

    def result(self) -> Iterator[torch.Tensor]:
        """The merged tensor, span by span, in `out_dtype`."""
        combine = self.start(self)
        for start, parts in self.spans():
            merged = combine(start, parts)
            # computed in fp32, rounded where the recipe's dtype says so, and then to that of the file
            yield finite(merged if self.cast is None else merged.to(self.cast), self.out_dtype, self.name)

    def generator(self, index: int, start: int) -> torch.Generator:
        """Random numbers of one input in one span: they depend on the seed, the tensor and the place alone."""
        return seeded(self.seed, self.name, index, start)

    def part(self, index: int, start: int, stop: int) -> torch.Tensor:
        """Elements `start` to `stop` of one input, fp32."""
        return self._read(self.inputs[index], start, stop)

    def _read(self, item: Input, start: int, stop: int) -> torch.Tensor:
        if item.parameters.get("weight") == 0:  # it is left out: no result depends on what it holds
            return torch.zeros(stop - start)
        part = item.reader.read(item.name, start, stop)
        return (part if self.cast is None else part.to(self.cast)).float()


def finite(part: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """A part of an output's tensor in the dtype of its file.

    Raises:
        UserError: it has NaN or infinity there.
    """
    rounded = part.to(dtype)
    if not rounded.isfinite().all():
        largest = f" (the largest number of {str(dtype).removeprefix('torch.')} is {torch.finfo(dtype).max:.5g})"
        raise UserError(
            f"{name} of the output would hold NaN or infinity{largest}: set dtype or out_dtype to bfloat16 or "
            "float32, or smaller weights"
        )
    return rounded


def check_sum(job: Job, weights: list[float], remedy: str = "change the weights or set normalize: false") -> None:
    """Refuse weights that cannot be normalised, since nothing is left of their sum but rounding.

    Raises:
        UserError: their sum is near 0.
    """
    if abs(sum(weights)) <= 1e-6 * sum(map(abs, weights)):
        raise UserError(
            f"weight adds up to {sum(weights):.3g} for {job.name}, by which nothing can be divided: {remedy}"
        )


def seeded(*key: int | str) -> torch.Generator:
    """Random numbers that depend on these words and numbers alone."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass(frozen=True)
class Copy:
    """A tensor that comes from somewhere as it is: `parts` gives it span by span."""

    name: str
    shape: tuple[int, ...]
    out_dtype: torch.dtype
    parts: Callable[[], Iterator[torch.Tensor]]

    def result(self) -> Iterator[torch.Tensor]:
        for part in self.parts():
            yield finite(part, self.out_dtype, self.name)
