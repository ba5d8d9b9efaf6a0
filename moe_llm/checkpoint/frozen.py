"""What is never changed by training stays what it was, to the last byte, in every checkpoint of a run.

A frozen matrix is exported in the dtype in which it was stored where it came from, whatever that of the export is. A
model in training may hold it in another one: it is kept beside it, as it was, only where it cannot be had back.
"""

import torch

from moe_llm.checkpoint.plan import is_trained, pieces_of
from moe_llm.checkpoint.weights import Weights
from moe_llm.distributed.state import EMA, ParameterShard, StoredOriginal, TrainedState


def read_trained(entry: ParameterShard, source: Weights) -> torch.Tensor:
    """A tensor of the optimizer as this rank holds it, fp32; of experts that are not trained nothing is stored, and
    theirs is zero."""
    if entry.trained_experts is None:
        return source.read(entry.name, entry.shape, entry.first_expert)
    whole = torch.zeros(entry.shape)
    for row, expert in enumerate(entry.experts or ()):
        if entry.trains(expert):
            whole[row : row + 1] = source.read(entry.name, (1, *entry.shape[1:]), expert)
    return whole


def write_trained(state: TrainedState, entry: ParameterShard, kind: str, source: Weights) -> None:
    """Give a model in training one tensor of the optimizer, or a weight that is trained; of what other ranks hold nothing
    is read. Collective."""
    span = state.share(entry.name, kind)
    if span is None or entry.trained_experts is not None:
        whole = read_trained(entry, source)
        if kind == EMA and entry.trained_experts is not None:  # the average of what is not trained is the weights
            weight = state.read(entry.name, "weight")
            for row, expert in enumerate(entry.experts or ()):
                if not entry.trains(expert):
                    whole[row] = weight[row]
        state.write(entry.name, kind, whole)
    else:
        state.write_share(entry.name, kind, source.read_span(entry.name, entry.shape, entry.first_expert, span))


def write_weight(state: TrainedState, entry: ParameterShard, model: Weights, masters: Weights) -> None:
    """Give a model in training one parameter, and remember of what is frozen in it how it is stored. Collective.

    Args:
        model: the weights as exported. masters: those of what is trained; may be the same.
    """
    if entry.buffer:
        state.write(entry.name, "weight", model.read(entry.name, entry.shape))
        return
    if not entry.frozen:
        write_trained(state, entry, "weight", masters)
        return
    weight = model.read(entry.name, entry.shape, entry.first_expert)
    for row, expert in enumerate(entry.experts or ()):
        if entry.trains(expert) and masters is not model:
            weight[row : row + 1] = masters.read(entry.name, (1, *entry.shape[1:]), expert)
    state.write(entry.name, "weight", weight)
    if entry.packed:  # it is exported as the model in training has it
        state.read(entry.name, "weight")
        return
    _remember(entry, model, state.read(entry.name, "weight"))


def _remember(entry: ParameterShard, model: Weights, held: torch.Tensor) -> None:
    """Fill `entry.kept`; held: the weight as the model in training gives it back."""
    entry.kept.clear()
    for piece in pieces_of(entry):
        if is_trained(entry, piece):
            continue
        if piece.index is ...:
            stored = model.as_stored(entry.name, piece.shape)
        else:
            row, rows = piece.index
            stored = model.as_stored(entry.name, entry.shape[1:], row + (entry.first_expert or 0))[rows]
        original = None
        if entry.writer and not torch.equal(held[piece.index].to(stored.dtype), stored):
            original = stored.clone()
        entry.kept[piece.name] = StoredOriginal(stored.dtype, original)
