"""Pairs of answers packed into blocks of fixed length: both answers of a pair in one block, none split, none seeing another.

Shapes: B blocks, S sequence length, N tokens of a source, P pairs.
"""

import numpy as np

from moe_llm.data.cache import TokenizedText
from moe_llm.data.examples import PackedExamples, best_fit
from moe_llm.data.packing import PackedBlocks


class PackedPairs(PackedExamples):
    """A source of preferences as blocks: documents 2k and 2k + 1 of a block are the chosen and the rejected answer of one
    pair, each behind its prompt.

    dropped, truncated, kept: pairs, as `PackedExamples` counts examples. reference: fp32 for each document of the source, the
    reference's log-probability of its answer; None until it is known, and where none is needed.

    Args:
        overlong: `drop`, or `truncate`: the longer answers of a pair are cut to the length at which both fit.
    """

    def __init__(self, text: TokenizedText, sequence_length: int, overlong: str, pad: int):
        assert text.targets_N is not None, "pairs are tokenised with their targets"
        self._targets_N = text.targets_N
        PackedBlocks.__init__(self, text, sequence_length, isolate_documents=True, pad=pad)
        self.reference: np.ndarray | None = None
        places_P2 = (np.diff(text.starts) - 1).reshape(-1, 2)
        keep_P, over = np.ones(len(places_P2), bool), np.flatnonzero(places_P2.sum(1) > sequence_length)
        for pair in over:
            shorter = int(places_P2[pair].min())
            limit = max(sequence_length - shorter, sequence_length // 2)
            places_P2[pair] = np.minimum(places_P2[pair], limit)
            both = ((2 * pair, places_P2[pair, 0]), (2 * pair + 1, places_P2[pair, 1]))
            keep_P[pair] = overlong == "truncate" and all(self._targets_N[self._of(d, n)].any() for d, n in both)
        self.dropped, self.truncated = int((~keep_P).sum()), int(keep_P[over].sum())
        self.cut, self.kept = self.truncated, int(keep_P.sum())
        self._places = places_P2.ravel()
        pairs = np.flatnonzero(keep_P)
        packed = best_fit(places_P2[pairs].sum(1), sequence_length)
        order = pairs[np.array([pair for block in packed for pair in block], np.int64)]
        self._documents = (2 * order[:, None] + np.arange(2)).ravel()
        self._ends = np.cumsum([2 * len(block) for block in packed], dtype=np.int64)

    def empty_arrays(self, rows: int) -> dict[str, np.ndarray]:
        return super().empty_arrays(rows) | {"reference_BS": np.zeros((rows, self.sequence_length), np.float32)}

    def write(self, block: int, row: int, out: dict[str, np.ndarray]) -> None:
        super().write(block, row, out)
        if self.reference is not None:
            documents = self._documents_of(block)
            begins = np.cumsum([0, *self._places[documents[:-1]]])
            out["reference_BS"][row, begins] = self.reference[documents]

    def documents_of(self, block: int) -> np.ndarray:
        """Which documents of the source a block holds, in their order there."""
        return self._documents_of(block)
