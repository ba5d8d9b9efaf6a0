"""The tensors of a family's files that an in-memory parameter becomes.

Most families have a tensor for each expert's matrix (`hf.pieces`). GPT-OSS has one for all experts of a layer, which a
rank that holds some of them cannot write alone; transposed, and with rows of gate and up in turn:

    ...experts.gate_up_proj (E, 2F, D)       = (E, D, 2F), columns 0, 2, ... gate and 1, 3, ... up
    ...experts.gate_up_proj_bias (E, 2F)     = (E, 2F), likewise
    ...experts.down_proj (E, D, F)           = (E, F, D)
    ...experts.down_proj_bias (E, D)           the same

D hidden, F expert width, E experts.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from moe_llm.families import hf
from moe_llm.families.family import Family

if TYPE_CHECKING:
    import torch


def in_one(family: Family, name: str) -> bool:
    """Whether a parameter's experts are one tensor in the family's files."""
    return family.stacked and hf.is_expert(name)


def stacked_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in such a file of an in-memory parameter."""
    return shape if len(shape) == 2 else (shape[0], shape[2], shape[1])


def to_stacked(name: str, whole: "torch.Tensor") -> "torch.Tensor":
    """The content in such a file of an in-memory parameter."""
    if ".gate_up_proj" in name:
        whole = whole.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    return (whole if whole.dim() == 2 else whole.transpose(1, 2)).contiguous()


def from_stacked(name: str, stored: "torch.Tensor") -> "torch.Tensor":
    """And back; of some of the experts, along the first dimension."""
    whole = stored if stored.dim() == 2 else stored.transpose(1, 2)
    if ".gate_up_proj" in name:
        whole = whole.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
    return whole.contiguous()


def stored_shapes(family: Family, name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the family's files of a whole in-memory parameter, in the order in which they are written."""
    if family.omits(name):
        return []
    if in_one(family, name):
        return [(family.stored_name(hf.published_name(name)), stacked_shape(name, shape))]
    return [(family.stored_name(piece.name), piece.shape) for piece in hf.pieces(name, shape)]


def stored_tensors(family: Family, name: str, whole: "torch.Tensor") -> "Iterator[torch.Tensor]":
    """And their contents."""
    if family.omits(name):
        return
    if in_one(family, name):
        yield to_stacked(name, whole)
        return
    for piece in hf.pieces(name, tuple(whole.shape)):
        yield whole[piece.index]
