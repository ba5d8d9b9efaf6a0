"""Documents packed into blocks of fixed length, nothing lost and nothing repeated.

Shapes: B blocks, S sequence length, N tokens of a source.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from moe_llm.data.cache import TokenizedText
from moe_llm.ops.shapes import own_part

IGNORED = -100  # label of a position that predicts nothing


@dataclass(frozen=True)
class Batch:
    """Packed blocks, ready for the model.

    input_ids_BS: int64 tokens.
    labels_BS: int64, already shifted: the target of position t stands at t; -100 where there is none.
    position_ids_BS: int64, from 0 in every document of a block, or, not isolated, 0 to S-1.
    document_ids_BS: int64 index of the document within its block, -1 on padding; None if not isolated.
    attention_mask_BS: bool, False on padding.
    reference_BS: of pairs of answers, fp32, at each document's first place the reference's log-probability of its answer;
        None for other data.
    runs_B: of each block the lengths of its documents, and of its padding, in order, known on the host so that attention
        need not ask the device for them; None where they are not known.
    sources_B: int64, of each block the index of its source in `data.sources`; None where it is not known.
    part: which of how many consecutive parts of each block the tensors hold; `runs_B` is always of the whole blocks.
    """

    input_ids_BS: torch.Tensor
    labels_BS: torch.Tensor
    position_ids_BS: torch.Tensor
    document_ids_BS: torch.Tensor | None
    attention_mask_BS: torch.Tensor
    reference_BS: torch.Tensor | None = None
    runs_B: tuple[tuple[int, ...], ...] | None = None
    sources_B: torch.Tensor | None = None
    part: tuple[int, int] = (0, 1)

    @property
    def num_targets(self) -> int:
        return int((self.labels_BS != IGNORED).sum())

    @property
    def num_tokens(self) -> int:
        """Tokens that are no padding."""
        return int(self.attention_mask_BS.sum())

    def to(self, device: torch.device | str) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return self._map(torch.Tensor.pin_memory)

    def rows(self, start: int, stop: int) -> "Batch":
        runs_B = None if self.runs_B is None else self.runs_B[start:stop]
        return replace(self._map(lambda tensor: tensor[start:stop]), runs_B=runs_B)

    def chosen(self, rows_R: torch.Tensor) -> "Batch":
        """Some of the rows, by their numbers."""
        runs_B = None if self.runs_B is None else tuple(self.runs_B[row] for row in rows_R.tolist())
        return replace(self._map(lambda tensor: tensor[rows_R]), runs_B=runs_B)

    def take_part(self, index: int, parts: int) -> "Batch":
        """One of some equal, consecutive parts of each block, for ranks that share sequences."""
        if parts == 1:
            return self
        assert self.part == (0, 1), "this is a part already"
        own = self._map(lambda tensor: own_part(tensor, index, parts) if tensor.dim() > 1 else tensor)
        return replace(own, part=(index, parts))

    @staticmethod
    def of_parts(parts: "Sequence[Batch]") -> "Batch":
        """The blocks whose consecutive parts these are."""

        def joined(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            cut = isinstance(values[0], torch.Tensor) and values[0].dim() > 1
            return torch.cat(values, 1) if cut else values[0]

        return replace(Batch(**{field.name: joined(field.name) for field in fields(Batch)}), part=(0, 1))

    def _map(self, function) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{k: function(v) for k, v in values.items() if isinstance(v, torch.Tensor)})


class PackedBlocks:
    """A source as blocks: block i reads tokens i*S to (i+1)*S and predicts the token after each.

    Documents follow each other; the last block is padded. The first token of a document (bos) is never a
    target, whether documents are isolated or not, so that losses of both settings compare; every other token
    is a target exactly once.

    Args:
        pad: token id that fills the last block; never attended to and never a target.
    """

    def __init__(self, text: TokenizedText, sequence_length: int, isolate_documents: bool, pad: int):
        self.text, self.sequence_length = text, sequence_length
        self.isolate_documents, self.pad = isolate_documents, pad

    def __len__(self) -> int:
        """Number of blocks: the last token of the source is predicted but not read."""
        return -(-max(len(self.text.tokens_N) - 1, 0) // self.sequence_length)

    cut: int | None = None  # documents that are in more than one block, once it is known

    @property
    def cut_documents(self) -> int:
        """Documents that more than one block has a part of."""
        if self.cut is None:
            first, last = np.asarray(self.text.starts[:-1]), np.asarray(self.text.starts[1:]) - 2
            self.cut = int((first // self.sequence_length != last // self.sequence_length).sum())
        return self.cut

    @property
    def padding(self) -> float:
        """Share of the blocks' places that hold no token."""
        return 1 - self.places / max(len(self) * self.sequence_length, 1)

    @property
    def places(self) -> int:
        """Tokens that are read in all blocks; the others are padding."""
        return max(len(self.text.tokens_N) - 1, 0)

    @property
    def targets(self) -> int:
        return self.text.targets

    @property
    def bytes(self) -> float:
        """UTF-8 bytes that the targets of all blocks stand for."""
        return self.text.bytes

    def write(self, block: int, row: int, out: dict[str, np.ndarray]) -> None:
        """Write one block into row `row` of the arrays of `empty_arrays`."""
        S, starts = self.sequence_length, self.text.starts
        begin = block * S
        chunk = self.text.tokens_N[begin : begin + S + 1]
        n = len(chunk) - 1
        out["input_ids_BS"][row, :n] = chunk[:-1]
        out["labels_BS"][row, :n] = chunk[1:]
        out["attention_mask_BS"][row, :n] = True
        first, last = np.searchsorted(starts, [begin, begin + n], side="right")
        begins = np.asarray(starts[first:last]) - begin  # where documents start, in 1 .. n
        out["labels_BS"][row, begins - 1] = IGNORED
        if self.isolate_documents:
            begins = np.concatenate([[0], begins[begins < n]])
            lengths = np.diff(begins, append=n)
            out["document_ids_BS"][row, :n] = np.repeat(np.arange(len(begins)), lengths)
            out["position_ids_BS"][row, :n] = np.arange(n) - np.repeat(begins, lengths)

    def bytes_of(self, block: int) -> float:
        """UTF-8 bytes that a block's targets stand for; a document's bytes are shared evenly by its targets.

        The eos is a target too: it is paid for, and stands for no text of its own.
        """
        starts, S = self.text.starts, self.sequence_length
        first_target, stop = block * S + 1, min((block + 1) * S + 1, len(self.text.tokens_N))
        first = np.searchsorted(starts, first_target, side="right") - 1
        last = np.searchsorted(starts, stop, side="left")
        begins, ends = np.asarray(starts[first:last]) + 1, np.asarray(starts[first + 1 : last + 1])
        targets = np.clip(np.minimum(ends, stop) - np.maximum(begins, first_target), 0, None)
        return float((self.text.sizes[first:last] * (targets / (ends - begins))).sum())

    def empty_arrays(self, rows: int) -> dict[str, np.ndarray]:
        """Arrays for `rows` blocks, all padding."""
        shape = (rows, self.sequence_length)
        arrays = {
            "input_ids_BS": np.full(shape, self.pad, np.int64),
            "labels_BS": np.full(shape, IGNORED, np.int64),
            "attention_mask_BS": np.zeros(shape, bool),
        }
        if self.isolate_documents:
            return arrays | {
                "document_ids_BS": np.full(shape, -1, np.int64),
                "position_ids_BS": np.zeros(shape, np.int64),
            }
        positions = np.broadcast_to(np.arange(self.sequence_length, dtype=np.int64), shape)
        return arrays | {"position_ids_BS": positions.copy()}


def as_batch(arrays: dict[str, np.ndarray]) -> Batch:
    """Arrays by the names of a batch's fields, without copies."""
    tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Batch(**({"document_ids_BS": None} | tensors), runs_B=runs(arrays))


def runs(arrays: dict[str, np.ndarray]) -> tuple[tuple[int, ...], ...]:
    """`Batch.runs_B` of packed blocks, in which each document stands in one piece and padding comes last."""
    mask_BS = arrays["attention_mask_BS"]
    document_BS = np.where(mask_BS, arrays.get("document_ids_BS", 0), -1)
    begins_BS = np.ones_like(mask_BS)
    begins_BS[:, 1:] = document_BS[:, 1:] != document_BS[:, :-1]
    length = mask_BS.shape[1]
    return tuple(tuple(np.diff(np.flatnonzero(row), append=length).tolist()) for row in begins_BS)


def model_inputs(batch: Batch) -> dict[str, Any]:
    """The decoder's keyword arguments for a batch, without logits."""
    return {
        "input_ids": batch.input_ids_BS,
        "attention_mask": batch.attention_mask_BS,
        "targets": batch.labels_BS,
        "position_ids": batch.position_ids_BS,
        "document_ids": batch.document_ids_BS,
        "runs": batch.runs_B,
        **({} if batch.sources_B is None else {"sources": batch.sources_B}),
        "return_logits": False,
    }
