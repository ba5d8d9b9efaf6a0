"""What a checkpoint needs of whatever trains the model: tensors by name, not by rank.

Two things implement it: a torch optimizer in one process, and the DeepSpeed engine.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

EMA = "ema"  # kind of the average of the weights
COMPENSATION = "compensation"  # in an optimizer's state: what a bf16 weight lacks of the true one


def split(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 values as two bf16 tensors whose sum, taken in fp32, is exact to 16 significant bits; of that sum, the same two."""
    high = values.bfloat16().float()
    held = high + (values - high).bfloat16()
    high = held.bfloat16()  # where what is left over was rounded up to half of the last bit, the other neighbour
    return high, (held - high.float()).bfloat16()


def wide(weight: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
    """What the optimizer takes a weight to be, fp32: with its compensation where its state has one."""
    return weight.float() + state[COMPENSATION] if COMPENSATION in state else weight.float()


@dataclass(frozen=True)
class StoredOriginal:
    """How a matrix that is never changed lies in the checkpoint that it comes from, and shall lie in every later one.

    dtype: as stored there. original: its values, where the model in training does not hold them exactly; on the rank
    that writes it alone.
    """

    dtype: torch.dtype
    original: torch.Tensor | None = None


class Adapted(NamedTuple):
    """That a weight is used with `scale * b @ a` added to it, and the entries of these factors."""

    a: str
    b: str
    scale: float


@dataclass(frozen=True)
class ParameterShard:
    """One parameter as this rank holds it.

    shape: of the whole dense tensor; of this rank's experts, if it is an expert parameter.
    first_expert: index of the first expert held here; None for dense parameters.
    trainable: whether it has optimizer tensors.
    writer: whether this rank is the one that writes it; exactly one of those that hold it is.
    trained_experts: of a trainable expert parameter, the only experts of the layer (over all ranks) that are trained;
        None: all of them.
    buffer: no parameter, but changed from step to step: stored in fp32, exactly.
    packed: held in few bits, so that what is written may not be what is read.
    adapter: a low-rank factor beside the model's own parameters, which no other program knows.
    kinds: the optimizer tensors that it has, where they are not all of the state's.
    adapted: of a weight that is not trained but has such factors, which they are.
    kept: by published name, what is never changed and comes from a checkpoint; filled when that is loaded.
    """

    name: str
    shape: tuple[int, ...]
    first_expert: int | None
    trainable: bool
    writer: bool
    trained_experts: tuple[int, ...] | None = None
    buffer: bool = False
    packed: bool = False
    adapter: bool = False
    adapted: Adapted | None = None
    kinds: tuple[str, ...] | None = None
    kept: dict[str, StoredOriginal] = field(default_factory=dict, compare=False)

    @property
    def frozen(self) -> bool:
        """Whether anything of it is never changed."""
        return not self.buffer and (not self.trainable or self.trained_experts is not None)

    def trains(self, expert: int) -> bool:
        """Whether an expert, by its index over all ranks, is trained."""
        return self.trainable and (self.trained_experts is None or expert in self.trained_experts)

    def kinds_among(self, kinds: Sequence[str]) -> tuple[str, ...]:
        """The optimizer tensors that it has, of all of those of its state."""
        return tuple(kind for kind in kinds if self.trainable and (self.kinds is None or kind in self.kinds))

    @property
    def experts(self) -> range | None:
        return None if self.first_expert is None else range(self.first_expert, self.first_expert + self.shape[0])


class TrainedState(Protocol):
    """Read and write the fp32 weights and the optimizer's tensors of a model in training.

    kinds: optimizer tensors of trainable parameters, e.g. ("exp_avg", "exp_avg_sq"); see `ParameterShard.kinds`.
    counters: numbers that the optimizer keeps beside them, by the multiple of the rate at which it steps.
    base_files: with adapters: by name, size and SHA-256 of the files that the weights beneath them come from, which no
        checkpoint holds unmerged.
    averages: whether an average of the weights is kept, of all that is trained.
    averaged: updates of it so far; from the first one on, trainable parameters have the kind `EMA` too.
    """

    kinds: tuple[str, ...]
    averages: bool
    averaged: int
    base_files: dict[str, dict[str, Any]]
    counters: dict[str, dict[str, float]]

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def entries(self) -> list[ParameterShard]:
        """Every parameter, in the same order on every rank."""

    def read(self, name: str, kind: str) -> torch.Tensor:
        """kind "weight" (the fp32 master), `EMA` or one of `kinds`: fp32 on the CPU, of `ParameterShard.shape`.

        Collective: every rank calls it for the same names and kinds in the same order.
        """

    def write(self, name: str, kind: str, tensor: torch.Tensor) -> None:
        """Set what `read` reads; setting "weight" also sets the model's own copy. Collective."""

    def share(self, name: str, kind: str) -> range | None:
        """The elements, in the order in which they lie in the tensor that `read` gives, that this rank keeps of it and
        `write_share` sets; None: `write` is to be used, since all of them are needed here."""

    def write_share(self, name: str, kind: str, flat: torch.Tensor) -> None:
        """Set the elements `share`, (len(share),) fp32; other ranks set theirs. For trainable parameters. Collective."""

    def make_average(self, updates: int) -> None:
        """Set `averaged`; where it is not 0 the average is there to be written, and else it is forgotten."""

    def gather(self, value: Any) -> Sequence[Any]:
        """The small Python objects of all ranks, on every rank; also a barrier."""
