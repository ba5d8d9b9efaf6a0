"""Counts of who went where, summed as the text goes by: their size does not depend on the text's.

Dimensions: L layers, E experts, K choices of a token in falling preference, V vocabulary, S sources, U units of text,
P classes of position, R rows (pieces of documents), T tokens of a row.
"""

from dataclasses import dataclass, field

import numpy as np

MAX_UNITS = 2048
POSITIONS = 16  # classes: 0, 1, 2-3, 4-7, ... tokens from the beginning of the document


@dataclass
class RoutingCounts:
    """Add rows with `add`; the tables are then read by `inspect_measures`.

    choices_LEV: a token's id for each expert among its choices. first_LE, second_LE: first and second choices.
    sources_LES, positions_LEP: choices by source and by class of position. together_LEE: pairs of experts chosen by
    one token, symmetric. neighbours_LEE: first choice in layer l by that in layer l + 1. repeated_LS2: consecutive
    tokens with the same first choice, and with an expert in common among their first two. consecutive_S: how many.
    """

    layers: int
    experts: int
    top_k: int
    vocabulary: int
    sources: int
    units: list[np.ndarray] = field(default_factory=list)  # (L, E) counts each
    unit_source: list[int] = field(default_factory=list)
    unit_rows: int = 1
    _open: dict[int, tuple[np.ndarray, int]] = field(default_factory=dict)

    def __post_init__(self):
        L, E, S = self.layers, self.experts, self.sources
        self.choices_LEV = np.zeros((L, E, self.vocabulary), np.int64)
        self.first_LE = np.zeros((L, E), np.int64)
        self.sources_LES = np.zeros((L, E, S), np.int64)
        self.positions_LEP = np.zeros((L, E, POSITIONS), np.int64)
        self.together_LEE = np.zeros((L, E, E), np.int64)
        self.neighbours_LEE = np.zeros((max(L - 1, 0), E, E), np.int64)
        self.repeated_LS2 = np.zeros((L, S, 2), np.int64)
        self.consecutive_S = np.zeros(S, np.int64)
        self.tokens_S = np.zeros(S, np.int64)
        self.token_SV = np.zeros((S, self.vocabulary), np.int64)

    def add(self, expert_LTK: np.ndarray, ids_T: np.ndarray, source: int, first_position: int = 0) -> None:
        """One row: consecutive tokens of one document.

        Args:
            expert_LTK: the experts that each token chose, the preferred one first.
            first_position: where in its document the row begins.
        """
        L, T, K = expert_LTK.shape
        assert (self.layers, self.top_k) == (L, K)
        E = self.experts
        place_T = np.arange(first_position, first_position + T)
        position_T = np.minimum(np.log2(np.maximum(place_T, 1)).astype(int) + (place_T > 0), POSITIONS - 1)
        self.tokens_S[source] += T
        self.consecutive_S[source] += max(T - 1, 0)
        np.add.at(self.token_SV[source], ids_T, 1)
        table_LE = np.zeros((L, E), np.int64)
        for layer, expert_TK in enumerate(expert_LTK):
            flat = expert_TK.ravel()
            table_LE[layer] = np.bincount(flat, minlength=E)
            np.add.at(self.choices_LEV[layer], (flat, np.repeat(ids_T, K)), 1)
            np.add.at(self.positions_LEP[layer], (flat, np.repeat(position_T, K)), 1)
            self.first_LE[layer] += np.bincount(expert_TK[:, 0], minlength=E)
            for a in range(K):
                for b in range(K):
                    if a != b:
                        np.add.at(self.together_LEE[layer], (expert_TK[:, a], expert_TK[:, b]), 1)
            if layer + 1 < L:
                np.add.at(self.neighbours_LEE[layer], (expert_TK[:, 0], expert_LTK[layer + 1, :, 0]), 1)
            here, following = expert_TK[:-1, :2], expert_TK[1:, :2]
            self.repeated_LS2[layer, source, 0] += (here[:, 0] == following[:, 0]).sum()
            common = (here[:, :, None] == following[:, None, :]).any((1, 2))
            self.repeated_LS2[layer, source, 1] += common.sum()
        self.sources_LES[:, :, source] += table_LE
        self._add_to_unit(table_LE, source)

    def _add_to_unit(self, table_LE: np.ndarray, source: int) -> None:
        held, rows = self._open.get(source, (np.zeros_like(table_LE), 0))
        held, rows = held + table_LE, rows + 1
        self._open[source] = (held, rows)
        if rows >= self.unit_rows:
            self.units.append(held)
            self.unit_source.append(source)
            del self._open[source]
        if len(self.units) > MAX_UNITS:
            self._merge_units()

    def _merge_units(self) -> None:
        """Two neighbours of a source become one, in every source alike, so that units stay of one size."""
        merged, sources = [], []
        for source in range(self.sources):
            own = [unit for unit, s in zip(self.units, self.unit_source) if s == source]
            pairs = [a + b for a, b in zip(own[::2], own[1::2])]
            merged += pairs
            sources += [source] * len(pairs)
            if len(own) % 2:
                held, rows = self._open.get(source, (np.zeros_like(own[-1]), 0))
                self._open[source] = (held + own[-1], rows + self.unit_rows)
        self.units, self.unit_source, self.unit_rows = merged, sources, 2 * self.unit_rows

    def unit_tables(self) -> tuple[np.ndarray, np.ndarray]:
        """(U, L, E) counts and (U,) sources of whole units; one that is not full counts where a source has no other."""
        units, sources = list(self.units), list(self.unit_source)
        for source, (held, rows) in self._open.items():
            if rows * 2 >= self.unit_rows or source not in sources:
                units.append(held)
                sources.append(source)
        return np.array(units), np.array(sources)
