"""One array that lies in several files."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np


class ShardedArray:
    """Parts as one flat array, of which slices are read as numpy arrays: a slice within a part is a view of it, one
    across parts a copy. Parts are opened when they are first read.

    Args:
        lengths: of the parts.
        open_part: a part by its number.
    """

    def __init__(self, lengths: Sequence[int], dtype: Any, open_part: Callable[[int], np.ndarray]):
        self.dtype = np.dtype(dtype)
        self._ends = np.cumsum([0, *lengths])
        self._open = open_part
        self._parts: list[np.ndarray | None] = [None] * len(lengths)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def shape(self) -> tuple[int]:
        return (len(self),)

    def __getitem__(self, index: slice | int) -> Any:
        if not isinstance(index, slice):
            position = range(len(self))[index]
            return self[position : position + 1][0]
        begin, stop, step = index.indices(len(self))
        assert step == 1, "read in order"
        if begin >= stop:
            return np.empty(0, self.dtype)
        first, last = np.searchsorted(self._ends, [begin, stop - 1], side="right") - 1
        found = [
            self._part(part)[max(begin - self._ends[part], 0) : stop - self._ends[part]]
            for part in range(int(first), int(last) + 1)
        ]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    @cached_property
    def count_nonzero(self) -> int:
        """How many of all elements are not zero."""
        return sum(int(np.count_nonzero(self._part(part))) for part in range(len(self._parts)))

    def _part(self, number: int) -> np.ndarray:
        part = self._parts[number]
        if part is None:
            part = self._parts[number] = self._open(number)
        return part
