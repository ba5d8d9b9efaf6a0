"""Chat examples packed into blocks of fixed length: whole examples, none split, none seeing another.

Shapes: B blocks, S sequence length, N tokens of a source.
"""

from bisect import bisect_left, insort

import numpy as np

from moe_llm.data.cache import TokenizedText
from moe_llm.data.packing import IGNORED, PackedBlocks


class PackedExamples(PackedBlocks):
    """A source of chat as blocks. An example of n tokens takes n - 1 places: its last token is predicted, not read.

    Which examples share a block follows from their lengths alone, so it is the same in every process and at a resume.

    dropped: examples left out, because they are longer than a block, or their first S + 1 tokens have no target.
    truncated: examples of which the end is left out. kept: examples that are there.

    Args:
        overlong: `drop` or `truncate`.
        pad: token id that fills the blocks; never attended to and never a target.
    """

    def __init__(self, text: TokenizedText, sequence_length: int, overlong: str, pad: int):
        assert text.targets_N is not None, "chat is tokenised with its targets"
        self._targets_N = text.targets_N
        super().__init__(text, sequence_length, isolate_documents=True, pad=pad)
        places = np.diff(text.starts) - 1
        keep, over = np.ones(len(places), bool), np.flatnonzero(places > sequence_length)
        for d in over:
            keep[d] = overlong == "truncate" and self._targets_N[self._of(d, sequence_length)].any()
        self.dropped, self.truncated = int((~keep).sum()), int(keep[over].sum())
        self.cut = self.truncated
        self.kept = len(places) - self.dropped
        self._places = np.minimum(places, sequence_length)
        documents = np.flatnonzero(keep)
        packed = best_fit(self._places[documents], sequence_length)
        self._documents = documents[np.array([d for block in packed for d in block], np.int64)]
        self._ends = np.cumsum([len(block) for block in packed], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def places(self) -> int:
        return int(self._places[self._documents].sum())

    @property
    def targets(self) -> int:
        return sum(self._targets_of(d) for d in self._documents)

    @property
    def bytes(self) -> float:
        return sum(self.bytes_of(block) for block in range(len(self)))

    def write(self, block: int, row: int, out: dict[str, np.ndarray]) -> None:
        at = 0
        for nth, d in enumerate(self._documents_of(block)):
            n, begin = int(self._places[d]), int(self.text.starts[d])
            tokens, place = self.text.tokens_N[begin : begin + n + 1].astype(np.int64), slice(at, at + n)
            out["input_ids_BS"][row, place] = tokens[:-1]
            out["labels_BS"][row, place] = np.where(self._targets_N[self._of(d)], tokens[1:], IGNORED)
            out["attention_mask_BS"][row, place] = True
            out["document_ids_BS"][row, place] = nth
            out["position_ids_BS"][row, place] = np.arange(n)
            at += n

    def bytes_of(self, block: int) -> float:
        """UTF-8 bytes that a block's targets stand for; an example's bytes are shared evenly by its targets."""
        total = 0.0
        for d in self._documents_of(block):
            whole = np.count_nonzero(self._targets_N[self.text.starts[d] : self.text.starts[d + 1]])
            total += float(self.text.sizes[d]) * self._targets_of(d) / whole
        return total

    def _documents_of(self, block: int) -> np.ndarray:
        return self._documents[self._ends[block - 1] if block else 0 : self._ends[block]]

    def _of(self, document: int, places: int | None = None) -> slice:
        """The tokens that a document's places predict."""
        begin = int(self.text.starts[document]) + 1
        return slice(begin, begin + int(self._places[document] if places is None else places))

    def _targets_of(self, document: int) -> int:
        return int(np.count_nonzero(self._targets_N[self._of(document)]))


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Items into bins of `capacity`, longest first, each where the least room remains (best-fit decreasing, Johnson
    1974: at most 11/9 of the fewest bins, and a few).

    Args:
        lengths: (items,), from 1 to capacity.

    Returns:
        Indices of the items of each bin.
    """
    bins: list[list[int]] = []
    by_room: dict[int, list[list[int]]] = {}
    rooms: list[int] = []  # sorted, those in which there are bins: at most `capacity` of them
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            chosen = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        else:
            room, chosen = capacity, []
            bins.append(chosen)
        chosen.append(item)
        left = room - length
        if left and left not in by_room:
            insort(rooms, left)
            by_room[left] = []
        if left:
            by_room[left].append(chosen)
    return bins
