"""Blocks of all sources: the endless sequence that is trained on, and what is held out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, overload

import numpy as np
import torch

from moe_llm.data.augment import Augmentation
from moe_llm.data.order import PERIOD, StagedMixture, drawn, shuffled
from moe_llm.data.packing import Batch, PackedBlocks, as_batch
from moe_llm.data.streamed_blocks import StreamedBlocks


class TrainBlocks:
    """The endless sequence of training samples; sample g is a pure function of (seed, g).

    Without weights an epoch is every block of every source once, shuffled together. With weights, sources
    are mixed by them, each going through its own blocks epoch after epoch. With a bootstrap seed an epoch is as many
    draws from those blocks with replacement, the same ones in every epoch (Breiman 1996, "Bagging Predictors").

    Args:
        stages: (first sample, weights) of each change of the weights.
        samples: of the whole run, as far as it is known; `fill` is over them.
        augmentations: of each source that has one, by its number.
    """

    def __init__(
        self,
        sources: Sequence[PackedBlocks],
        weights: Sequence[float] | None,
        seed: int,
        bootstrap_seed: int | None = None,
        stages: Sequence[tuple[int, Sequence[float]]] = (),
        samples: int | None = None,
        augmentations: Mapping[int, Augmentation] | None = None,
    ):
        self._augmentations = augmentations or {}
        self.sources, self.seed, self.bootstrap_seed = list(sources), seed, bootstrap_seed
        self._ends = np.cumsum([len(source) for source in sources])
        begun = [] if weights is None else [(0, weights)]
        mixed = len(sources) > 1 and (begun or stages)
        self._mixture = StagedMixture([*begun, *stages], seed) if mixed else None
        self._samples = samples

    def __len__(self) -> int:
        """Blocks of all sources; without weights, the samples of an epoch."""
        return int(self._ends[-1])

    @property
    def fill(self) -> float:
        """Share of the samples' places that hold a token and no padding: over the run, an epoch or by the weights."""
        return self.fill_of(self._samples or (len(self) if self._mixture is None else PERIOD))

    def fill_of(self, samples: int) -> float:
        """The same over the first samples."""
        length = self.sources[0].sequence_length
        filled = sum(n * s.places / max(len(s) * length, 1) for n, s in zip(self.taken(samples), self.sources))
        return float(filled / samples)

    def taken(self, samples: int) -> np.ndarray:
        """(sources,) how many of the first samples are of each source: exact with weights; without, of the epoch that has
        begun each source has its share."""
        if self._mixture is not None:
            return self._mixture.taken(samples)
        return samples * np.array([len(source) for source in self.sources]) / len(self)

    def progress(self, samples: int) -> list[dict[str, float]]:
        """Of each source the tokens that the first samples hold, without padding, and how often it has been read."""
        found = []
        for n, source in zip(self.taken(samples), self.sources):
            epochs = n / len(source) if len(source) else 0.0
            tokens = round(epochs * source.places)  # of a stream, as full as its first window
            if isinstance(source, StreamedBlocks):
                epochs = source.epoch_of(int(n))
            found.append({"tokens": tokens, "epochs": float(epochs)})
        return found

    def streams(self, samples: int) -> dict[int, dict[str, Any]]:
        """Of each source that streams, by its number, where it is behind the first samples."""
        return {
            s: source.state(int(n))
            for s, (n, source) in enumerate(zip(self.taken(samples), self.sources))
            if isinstance(source, StreamedBlocks)
        }

    def of_source(self, number: int) -> "TrainBlocks":
        """The endless sequence of one source's blocks."""
        own = {0: self._augmentations[number]} if number in self._augmentations else None
        return TrainBlocks([self.sources[number]], None, self.seed, self.bootstrap_seed, augmentations=own)

    def locate(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, block of that source) of samples start .. start + count, (count,) int64 both."""
        position = np.arange(start, start + count, dtype=np.int64)
        if len(self.sources) == 1 and isinstance(self.sources[0], StreamedBlocks):
            return np.zeros_like(position), position
        if self._mixture is None:
            flat = self._drawn(shuffled(position, len(self), self.seed, 0), len(self), 0)
            source = np.searchsorted(self._ends, flat, side="right")
            return source, flat - (self._ends[source] - [len(self.sources[s]) for s in source])
        source, nth = self._mixture(position)
        block = np.empty_like(nth)
        for s in np.unique(source):
            if isinstance(self.sources[s], StreamedBlocks):
                block[source == s] = nth[source == s]
                continue
            length, stream = len(self.sources[s]), int(s) + 1
            block[source == s] = self._drawn(shuffled(nth[source == s], length, self.seed, stream), length, stream)
        return source, block

    def _drawn(self, index: np.ndarray, length: int, stream: int) -> np.ndarray:
        """What stands in each block's place."""
        return index if self.bootstrap_seed is None else drawn(index, length, self.bootstrap_seed, stream)

    def rows(self, start: int, count: int) -> Batch:
        """Samples start .. start + count as one batch."""
        arrays = self.sources[0].empty_arrays(count)
        source_B, block_B = self.locate(start, count)
        for row, (source, block) in enumerate(zip(source_B, block_B)):
            self.sources[source].write(int(block), row, arrays)
            if source in self._augmentations:
                self._augmentations[source](arrays, row, self.seed, start + row)
        return replace(as_batch(arrays), sources_B=torch.from_numpy(np.array(source_B, np.int64)))


class ValidationBlocks:
    """Held-out blocks.

    Args:
        max_blocks: as many, evenly spread over all; None for all.
        names: of the sources, for `by_source`.
    """

    def __init__(self, sources: Sequence[PackedBlocks], max_blocks: int | None = None, names: Sequence[str] = ()):
        self.sources, self.names = list(sources), list(names)
        every = [(s, b) for s, source in enumerate(self.sources) for b in range(len(source))]
        count = len(every) if max_blocks is None else min(max_blocks, len(every))
        self.blocks = [every[i * len(every) // count] for i in range(count)]
        if count == len(every):
            held = sum(source.bytes for source in self.sources)
            targets = sum(source.targets for source in self.sources)
        else:
            held = sum(self.sources[s].bytes_of(b) for s, b in self.blocks)
            targets = sum(self._rows([block]).num_targets for block in self.blocks)
        assert targets, "a document has at least one target"
        self.num_targets = targets
        self.bytes_per_token = held / targets

    def __len__(self) -> int:
        return len(self.blocks)

    def bits_per_byte(self, loss: float) -> float:
        """A mean loss in nats a target token, as bits for each UTF-8 byte of held-out text."""
        return loss / math.log(2) / self.bytes_per_token

    def _rows(self, blocks: list[tuple[int, int]], rows: int | None = None) -> Batch:
        arrays = self.sources[0].empty_arrays(rows or len(blocks))
        for row, (source, block) in enumerate(blocks):
            self.sources[source].write(block, row, arrays)
        return as_batch(arrays)

    def batches(
        self, *, micro_batch_size: int, rank: int = 0, world_size: int = 1, part: tuple[int, int] = (0, 1)
    ) -> Sequence[Batch]:
        """This rank's batches: as many on every rank and of the same shape; some rows may be all padding."""
        return _ValidationBatches(self, self.blocks, micro_batch_size, rank, world_size, part)

    def by_source(
        self, *, micro_batch_size: int, rank: int = 0, world_size: int = 1, part: tuple[int, int] = (0, 1)
    ) -> dict[str, Sequence[Batch]]:
        """The same for each source that has blocks, by name; together they hold every block once."""
        blocks: dict[int, list[tuple[int, int]]] = {}
        for block in self.blocks:
            blocks.setdefault(block[0], []).append(block)
        return {
            self.names[s]: _ValidationBatches(self, mine, micro_batch_size, rank, world_size, part)
            for s, mine in blocks.items()
        }


class _ValidationBatches(Sequence[Batch]):
    """Batches made when asked for: a large held-out split is not held in memory."""

    def __init__(
        self,
        held_out: ValidationBlocks,
        blocks: list[tuple[int, int]],
        micro_batch_size: int,
        rank: int,
        world_size: int,
        part: tuple[int, int],
    ):
        self._source, self._m, self._part = held_out, micro_batch_size, part
        self._mine = blocks[rank::world_size]
        self._count = -(-len(blocks) // (micro_batch_size * world_size))

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Batch: ...

    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...

    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        index %= self._count
        rows = self._source._rows(self._mine[index * self._m : (index + 1) * self._m], self._m)
        return rows.take_part(*self._part)


def validation_batches(
    validation: ValidationBlocks, *, micro_batch_size: int, rank: int = 0, world_size: int = 1
) -> Sequence[Batch]:
    """`ValidationBlocks.batches`, as a function."""
    return validation.batches(micro_batch_size=micro_batch_size, rank=rank, world_size=world_size)
