"""Which rank writes which tensor to which file: known to all ranks before anything is written."""

import functools
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import torch

from moe_llm.checkpoint.digests import FileRecord
from moe_llm.checkpoint.safetensors_io import (
    ShardWriter,
    Spec,
    index_content,
    shard_name,
    split_shards,
)
from moe_llm.distributed.state import EMA, ParameterShard, TrainedState
from moe_llm.families import hf
from moe_llm.families.architectures import MIXTRAL
from moe_llm.families.family import Family
from moe_llm.families.layout import in_one, stored_shapes, to_stacked

MODEL, OPTIMIZER = "model", "trainer/optimizer"  # stems of the files, relative to the checkpoint
AVERAGE = f"{EMA}/{MODEL}"  # the average of the weights, as a model of its own
Named = tuple[str, str, torch.Tensor]  # stem of the files, name in them, tensor
MASTER = "master"  # kind of the fp32 weights that stand beside exported ones of lower precision


@dataclass(frozen=True)
class FileSet:
    """One stem's files over all ranks, and this rank's share of them.

    mine: file name -> its tensors in the order in which they are written.
    linked: files that are not written, since another set has them, by their names there.
    """

    stem: str
    mine: dict[str, list[Spec]]
    weight_map: dict[str, str]
    specs: list[Spec]
    linked: Mapping[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Of what is written."""
        return sum(spec.nbytes for spec in self.specs if self.weight_map[spec.name] not in self.linked)

    @property
    def index(self) -> dict | None:
        """The index file's content; None where one file, or none, says it all."""
        if len(set(self.weight_map.values())) <= 1:
            return None
        names = {tensor: Path(file).name for tensor, file in self.weight_map.items()}
        return index_content(names, self.specs)


def file_set(
    stem: str, specs_by_rank: Sequence[Sequence[Spec]], rank: int, max_bytes: int, apart: Container[str] = ()
) -> FileSet:
    """Cut each rank's tensors into files of at most `max_bytes` and number them through; the tensors named in `apart`
    share no file with others."""
    shards_by_rank = [
        split_shards([spec for spec in specs if spec.name not in apart], max_bytes)
        + split_shards([spec for spec in specs if spec.name in apart], max_bytes)
        for specs in specs_by_rank
    ]
    count = sum(map(len, shards_by_rank))
    mine, weight_map, number = dict[str, list[Spec]](), dict[str, str](), 0
    for owner, shards in enumerate(shards_by_rank):
        for shard in shards:
            file = shard_name(stem, number, count)
            number += 1
            weight_map |= {spec.name: file for spec in shard}
            if owner == rank:
                mine[file] = shard
    specs = [spec for specs in specs_by_rank for spec in specs]
    assert len(weight_map) == len(specs), f"a tensor of {stem} has two writers"
    return FileSet(stem, mine, weight_map, specs)


@dataclass(frozen=True)
class WritePlan:
    """average: None where there is none."""

    model: FileSet
    optimizer: FileSet
    average: FileSet | None = None

    @property
    def sets(self) -> dict[str, FileSet]:
        """By stem."""
        return {files.stem: files for files in (self.model, self.optimizer, self.average) if files is not None}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Of the weights in the model's files, by name."""
        return {spec.name: spec.dtype for spec in self.model.specs}

    @property
    def nbytes(self) -> int:
        """Bytes of tensors that all ranks together write."""
        return sum(files.nbytes for files in self.sets.values())


def kinds_of(
    entry: ParameterShard, kinds: Sequence[str], dtype: torch.dtype, average: bool, omitted: bool = False
) -> list[str]:
    """What of an entry goes into the optimizer's files: of what is never changed, nothing; what is exported in fp32 is
    not here too. The weight of what the model's files omit is here in any case."""
    if omitted and not entry.trainable:
        return [MASTER]
    whole = dtype == torch.float32 and not entry.adapter and not omitted
    exported = [] if whole else [MASTER, *([EMA] if average else [])]
    return [*exported, *entry.kinds_among(kinds)] if entry.trainable else []


def pieces_of(entry: ParameterShard) -> list[hf.Piece]:
    """The published pieces of an entry as this rank holds it."""
    return hf.pieces(entry.name, entry.shape, entry.first_expert)


def is_trained(entry: ParameterShard, piece: hf.Piece) -> bool:
    """Whether a piece of an entry is changed by training."""
    if entry.experts is None or piece.index is ...:
        return entry.trainable
    return entry.trains(entry.experts[piece.index[0]])


def exported_dtype(entry: ParameterShard, piece: hf.Piece, dtype: torch.dtype) -> torch.dtype:
    """That of the export, but for what is never changed, which stays to the last byte, and buffers, which are fp32."""
    if entry.buffer:
        return torch.float32
    kept = entry.kept.get(piece.name)
    return dtype if kept is None or entry.adapted is not None else kept.dtype


def make_plan(
    state: TrainedState, dtype: torch.dtype, max_bytes: int, average: bool, family: Family = MIXTRAL
) -> WritePlan:
    """The plan of a save with weights exported in `dtype`, and with their average or without. Collective.

    family: whose names and layout the weights have in their files.
    """
    held = [(entry.name, entry.experts.stop) for entry in state.entries() if entry.experts is not None]
    counts: dict[str, int] = {}
    for name, stop in (pair for pairs in (state.gather(held) if family.stacked else ()) for pair in pairs):
        counts[name] = max(stop, counts.get(name, 0))
    model, optimizer, frozen = [], [], []
    for entry in filter(lambda entry: entry.writer, state.entries()):
        pieces, omitted = pieces_of(entry), family.omits(entry.name)
        if in_one(family, entry.name) and not entry.adapter:
            [(name, shape)] = stored_shapes(family, entry.name, (counts[entry.name], *entry.shape[1:]))
            wide = [exported_dtype(entry, piece, dtype) for piece in pieces]
            model += [Spec(name, shape, functools.reduce(torch.promote_types, wide))] if entry.first_expert == 0 else []
            frozen += [name] if not entry.trainable else []
        else:
            model += [
                Spec(family.stored_name(piece.name), piece.shape, exported_dtype(entry, piece, dtype))
                for piece in pieces
                if not entry.adapter and not omitted
            ]
            frozen += [family.stored_name(piece.name) for piece in pieces if not is_trained(entry, piece)]
        optimizer += [
            Spec(f"{kind}.{piece.name}", piece.shape, torch.float32)
            for kind in kinds_of(entry, state.kinds, dtype, average, omitted)
            for piece in pieces
            if omitted or is_trained(entry, piece)
        ]
    models, optimizers, frozen_by_rank = zip(*state.gather((model, optimizer, frozen)))
    apart = {name for names in frozen_by_rank for name in names} if average else set()
    files = file_set(MODEL, models, state.rank, max_bytes, apart)
    return WritePlan(
        files, file_set(OPTIMIZER, optimizers, state.rank, max_bytes), _averages(files, apart) if average else None
    )


def _averages(model: FileSet, frozen: Container[str]) -> FileSet:
    """The files of the average: those of the weights anew, but for what is frozen, of which they are the average."""

    def there(file: str) -> str:
        return f"{EMA}/{file}"

    linked = {there(file): file for name, file in model.weight_map.items() if name in frozen}
    return replace(
        model,
        stem=AVERAGE,
        linked=linked,
        mine={there(file): specs for file, specs in model.mine.items() if there(file) not in linked},
        weight_map={name: there(file) for name, file in model.weight_map.items()},
    )


def stream(state: TrainedState, dtype: torch.dtype, average: bool = False, family: Family = MIXTRAL) -> Iterator[Named]:
    """Read everything from the engine in the plan's order, one tensor at a time: (stem, name, tensor).

    Collective: every rank runs it to its end, and gets only what it is the writer of.
    """
    for entry in state.entries():
        pieces = pieces_of(entry) if entry.writer else []
        weight, change = state.read(entry.name, "weight"), _low_rank(entry, state)
        stacked = in_one(family, entry.name) and not entry.adapter
        omitted = family.omits(entry.name)
        exported = _exported(entry, weight, change)
        if stacked:
            yield from _in_one(state, entry, family, MODEL, exported)
        for piece in pieces if not (entry.adapter or stacked or omitted) else ():
            yield MODEL, family.stored_name(piece.name), exported[piece.index]
        pieces = [piece for piece in pieces if omitted or is_trained(entry, piece)]
        tensors = {MASTER: weight}
        if average and entry.trainable:
            tensors[EMA] = state.read(entry.name, EMA)
            if stacked:
                yield from _in_one(state, entry, family, AVERAGE, tensors[EMA])
            for piece in pieces if not (stacked or omitted) else ():
                yield AVERAGE, family.stored_name(piece.name), tensors[EMA][piece.index]
        for kind in kinds_of(entry, state.kinds, dtype, average, omitted):
            tensor = tensors[kind] if kind in tensors else state.read(entry.name, kind)
            for piece in pieces:
                yield OPTIMIZER, f"{kind}.{piece.name}", tensor[piece.index]
            del tensor
        del weight, change, exported, tensors


def _exported(entry: ParameterShard, weight: torch.Tensor, change: torch.Tensor | None) -> torch.Tensor:
    """A parameter as it goes out: what is kept in its original values, and what adapters add."""
    if any(kept.original is not None for kept in entry.kept.values()):
        weight = weight.clone()
        for piece in pieces_of(entry):
            kept = entry.kept.get(piece.name)
            if kept is not None and kept.original is not None:
                weight[piece.index] = kept.original
    return weight if change is None else weight + change


def _in_one(
    state: TrainedState, entry: ParameterShard, family: Family, stem: str, held: torch.Tensor
) -> Iterator[Named]:
    """The one tensor of a layer's experts, on the rank that writes it: the first one's. Collective; each rank has all of
    the layer's experts in memory meanwhile."""
    shares = state.gather((entry.first_expert, held) if entry.writer else None)
    if entry.writer and entry.first_expert == 0:
        parts = [part for _, part in sorted(filter(None, shares), key=lambda share: share[0])]
        [(name, _)] = stored_shapes(family, entry.name, (1, *entry.shape[1:]))
        yield stem, name, to_stacked(entry.name, torch.cat(parts))


def _low_rank(entry: ParameterShard, state: TrainedState) -> torch.Tensor | None:
    """What adapters add to a weight, of its shape, fp32; None without any. Collective."""
    if entry.adapted is None:
        return None
    a, b, scale = entry.adapted
    return low_rank_sum(state.read(a, "weight"), state.read(b, "weight"), scale)


def low_rank_sum(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * B A, of (r, I) and (O, r) or of each expert's: one by one, so that it is the same to the bit however many
    of them a rank holds."""
    if a.dim() == 2:
        return b @ a * scale
    return torch.stack([low_rank_sum(*pair, scale) for pair in zip(a, b)])


class HostCopy:
    """A copy in host memory of what this rank writes, as it will lie in the files. Iterate over it as over `stream`.

    The memory is kept from one save to the next: to be given new pages takes longer than to fill old ones, and the
    next copy has the same shapes.

    given: tensors that have been asked for so far, over all saves: whoever waits can see that it goes on.
    """

    def __init__(self) -> None:
        self._tensors: dict[tuple[str, str], torch.Tensor] = {}
        self.given = 0

    def take(
        self, tensors: Iterable[Named], dtype: torch.dtype, dtypes: Mapping[str, torch.dtype] = MappingProxyType({})
    ) -> None:
        """Copy what `stream` gives; `dtype` is the weights', but for those with one of their own in `dtypes`. Returns
        when nothing of the engine is needed any more.

        Collective, since `stream` is: run to its end even where there is no memory left.
        """
        failure, taken = None, []
        for stem, name, tensor in tensors:
            if failure is None:
                try:
                    taken.append((stem, name))
                    lies_in = torch.float32 if stem == OPTIMIZER else dtypes.get(name, dtype)
                    self._buffer(stem, name, tensor.shape, lies_in).copy_(tensor)
                except Exception as error:  # noqa: BLE001 (raised below: the other ranks wait for us)
                    failure = error
                    self._tensors.clear()
        if failure is not None:
            raise failure
        self._tensors = {key: self._tensors[key] for key in taken}  # the one before may have had an average

    def _buffer(self, stem: str, name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        buffer = self._tensors.get((stem, name))
        if buffer is None:
            buffer = self._tensors[stem, name] = torch.empty(shape, dtype=dtype)
        assert (buffer.shape, buffer.dtype) == (shape, dtype), f"{name} has changed between two saves"
        return buffer

    def __iter__(self) -> Iterator[Named]:
        for (stem, name), tensor in self._tensors.items():
            self.given += 1
            yield stem, name, tensor


class ShardSet:
    """Writes this rank's files of one `FileSet`: each is opened with its first tensor and closed with its last."""

    def __init__(self, directory: Path, files: FileSet):
        self.records: dict[str, FileRecord] = {}
        self._directory, self._files = directory, files
        self._open: dict[str, ShardWriter] = {}

    def write(self, name: str, tensor: torch.Tensor) -> None:
        file = self._files.weight_map[name]
        if file not in self._open:
            self._open[file] = ShardWriter(self._directory / file, self._files.mine[file])
        self._open[file].write(name, tensor)
        if self._open[file].complete:
            self.records[file] = self._open[file].close()
            del self._open[file]

    def finish(self) -> dict[str, FileRecord]:
        """The records of all files, by path relative to the checkpoint."""
        assert not self._open, f"{[*self._open]} are incomplete"
        assert self.records.keys() == self._files.mine.keys(), "files are missing"
        return self.records

    def abort(self) -> None:
        for writer in self._open.values():
            writer.abort()
