"""Tensors to and from safetensors files, one at a time.

The library's own writer takes all tensors of a file at once; here the header is written first, from shapes
known beforehand, then each tensor as it comes, so that neither side ever holds more than one. The library
validates every file that is opened; tensors are then read as byte ranges, without a memory map: a file that
shrinks meanwhile is an error and not a dead process.
Format: 8 bytes little-endian length of the header, the header as JSON, the tensors' bytes without gaps.
"""

import contextlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from moe_llm.checkpoint.digests import REMEDY, CheckedFile, DigestedFile, FileRecord, reading
from moe_llm.errors import UserError
from moe_llm.families import mxfp4

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_WORDS = {dtype: word for word, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Spec:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def split_shards(specs: Sequence[Spec], max_bytes: int) -> list[list[Spec]]:
    """Cut a sequence of tensors, in order, into files of at most `max_bytes`; a larger one stands alone."""
    shards: list[list[Spec]] = []
    room = -1
    for spec in specs:
        if not shards or spec.nbytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(spec)
        room -= spec.nbytes
    return shards


def shard_name(stem: str, number: int, count: int) -> str:
    """File name of shard `number`, counted from 0, of `count`."""
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{number + 1:05d}-of-{count:05d}.safetensors"


def index_content(weight_map: dict[str, str], specs: Sequence[Spec]) -> dict[str, Any]:
    """The content of `{stem}.safetensors.index.json`."""
    return {
        "metadata": {
            "total_size": sum(spec.nbytes for spec in specs),
            "total_parameters": sum(math.prod(spec.shape) for spec in specs),
        },
        "weight_map": dict(sorted(weight_map.items())),
    }


class ShardWriter:
    """Writes one safetensors file, tensor by tensor, in the order of its specs.

    The file has its size from the header alone. Nothing is readable before `close`, which needs all tensors.
    """

    def __init__(self, path: Path, specs: Sequence[Spec]):
        assert sys.byteorder == "little", "safetensors files are little-endian, and bytes are written as they lie"
        self.path, self._specs, self._next = path, list(specs), 0
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for spec in self._specs:
            end = offset + spec.nbytes
            header[spec.name] = {
                "dtype": _WORDS[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        assert len(header) == len(self._specs) + 1, f"a name occurs twice in {path.name}"
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the tensors are aligned
        self._file = DigestedFile(path)
        self._file.write(len(text).to_bytes(8, "little") + text)

    @property
    def complete(self) -> bool:
        """Whether all tensors have come."""
        return self._next == len(self._specs)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor, cast to the dtype of its spec."""
        spec = self._specs[self._next]
        assert (name, tuple(tensor.shape)) == (spec.name, spec.shape), f"{name} came, {spec} is due"
        data = tensor.detach().to(device="cpu", dtype=spec.dtype).contiguous().reshape(-1)
        if data.numel():
            self._file.write(data.view(torch.uint8).numpy().data)
        self._next += 1

    def close(self) -> FileRecord:
        """Bring the file to the disk; its size and hash, from what was written."""
        assert self.complete, f"{self.path.name} lacks {len(self._specs) - self._next} tensors"
        return self._file.close(os.fsync)

    def abort(self) -> None:
        """Give the file up, whatever its state: what is buffered need not reach the disk."""
        with contextlib.suppress(OSError):  # that of flushing; the descriptor is closed all the same
            self._file.close()


@dataclass(frozen=True)
class _Stored:
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte of the file at which it begins

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFiles:
    """The tensors of `{stem}.safetensors`, or of the shards that `{stem}.safetensors.index.json` lists.

    Headers are read and checked against the files' sizes at once; tensors when asked for. What is stored in MXFP4 is seen
    in bf16, under one name (`mxfp4`).

    Args:
        records: of files, by path: the blocks of these are compared with their digests as they are read.

    Raises:
        UserError: a missing, truncated or damaged file, by name.
    """

    def __init__(
        self,
        directory: str | Path,
        stem: str = "model",
        records: Mapping[Path, FileRecord] = MappingProxyType({}),
    ):
        self.directory = Path(directory)
        self._tensors: dict[str, _Stored] = {}
        self._records, self._opened = records, dict[Path, CheckedFile]()
        weight_map = self._files(stem)
        for file in sorted(set(weight_map.values())):
            for name, stored in _read_header(self.directory / file).items():
                if name in self._tensors:
                    raise UserError(
                        f"tensor {name} is in both {self._tensors[name].file} and {stored.file}: remove one"
                    )
                self._tensors[name] = stored
        lost = [name for name, file in weight_map.items() if name and name not in self._tensors]
        if lost:
            raise UserError(
                f"file {self.directory / weight_map[lost[0]]} lacks the tensor {lost[0]} that its index names: {REMEDY}"
            )

        self._packed = mxfp4.packed({name: (stored.dtype, stored.shape) for name, stored in self._tensors.items()})
        hidden = {part for name in self._packed for part in mxfp4.stored_names(name)}
        self._names = [*(name for name in self._tensors if name not in hidden), *self._packed]

    def file_names(self) -> set[str]:
        """The files that the tensors are in."""
        return {stored.file.name for stored in self._tensors.values()}

    def _files(self, stem: str) -> dict[str, str]:
        """File of each tensor by the index, or of no name where there is a single file."""
        if (self.directory / f"{stem}.safetensors").is_file():  # transformers prefers it too
            return {"": f"{stem}.safetensors"}
        index = self.directory / f"{stem}.safetensors.index.json"
        if not index.is_file():
            pickled = sorted(self.directory.glob("pytorch_model*.bin"))
            why = (
                f"it holds {pickled[0].name}; save it as safetensors first"
                if pickled
                else "give a checkpoint directory"
            )
            raise UserError(f"{self.directory} has neither {stem}.safetensors nor {index.name}: {why}")
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) and Path(file).name == file for file in weight_map.values()
        ):
            raise UserError(f"file {index} has no weight_map from tensors to file names: {REMEDY}")
        return weight_map

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._packed[name] if name in self._packed else self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16 if name in self._packed else self._tensors[name].dtype

    def file(self, name: str) -> Path:
        return self._tensors[mxfp4.stored_names(name)[0] if name in self._packed else name].file

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """A tensor on the CPU in its stored dtype, or its `rows` (along the first dimension, step 1)."""
        shape, first, width = self.shape(name), 0, 1
        if rows is not None:
            first, last, step = rows.indices(shape[0])
            assert step == 1, rows
            width = math.prod(shape[1:])
            shape = (max(last - first, 0), *shape[1:])
        return self.read_span(name, first * width, math.prod(shape)).reshape(shape)

    def overwrite(self, name: str, tensor: torch.Tensor) -> None:
        """Replace a tensor where it lies, by one of its shape and dtype; for files that are nobody's yet."""
        stored = self._tensors[name]
        assert (stored.shape, stored.dtype) == (tuple(tensor.shape), tensor.dtype), f"{name} is another tensor"
        data = tensor.detach().cpu().contiguous().reshape(-1)
        with open(stored.file, "rb+") as file:
            file.seek(stored.start)
            file.write(data.view(torch.uint8).numpy().data)
            os.fsync(file.fileno())

    def read_span(self, name: str, start: int, count: int) -> torch.Tensor:
        """`count` elements of a tensor from element `start` on, in the order in which they lie: (count,)."""
        assert 0 <= start <= start + count <= math.prod(self.shape(name)), f"{name} has no {start}+{count}"
        if name in self._packed:
            return self._unpacked(name, start, count)
        stored = self._tensors[name]
        tensor = torch.empty(count, dtype=stored.dtype)
        if count:
            if stored.file not in self._opened:
                self._opened[stored.file] = CheckedFile(stored.file, self._records.get(stored.file))
            view = tensor.view(torch.uint8).numpy().data
            self._opened[stored.file].read_into(stored.start + start * stored.dtype.itemsize, view)
        return tensor

    def _unpacked(self, name: str, start: int, count: int) -> torch.Tensor:
        """`read_span` of what is stored in MXFP4: the experts in which these elements lie are read."""
        width = math.prod(self.shape(name)[1:])
        experts = slice(start // width, -(-(start + count) // width))
        values = mxfp4.unpacked(*(self.read(part, experts) for part in mxfp4.stored_names(name)))
        return values.flatten()[start - experts.start * width :][:count]


def _read_header(path: Path) -> dict[str, _Stored]:
    """The tensors of a file, after the library has found that shapes, dtypes, offsets and its size fit.

    The library hides where a tensor begins, which ranks that read their own rows need, and takes the last of two
    tensors of one name; the text is parsed once more for these.
    """

    def without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            raise ValueError("a name occurs twice in its header")
        return content

    try:
        with reading(path), open(path, "rb") as file, safe_open(path, framework="pt"):
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length), object_pairs_hook=without_repetition)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise UserError(f"file {path} is truncated or damaged ({error}): {REMEDY}") from error
    header.pop("__metadata__", None)
    unknown = sorted({item["dtype"] for item in header.values()} - set(_DTYPES))
    if unknown:
        raise UserError(f"file {path} has tensors of dtype {unknown[0]}, which cannot be read: convert them first")
    return {
        name: _Stored(path, _DTYPES[item["dtype"]], tuple(item["shape"]), 8 + length + item["data_offsets"][0])
        for name, item in header.items()
    }


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: missing, unreadable or no object.
    """
    try:
        with reading(path):
            content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"file {path} is damaged: it is not JSON: {REMEDY}") from error
    if not isinstance(content, dict):
        raise UserError(f"file {path} is damaged: it is no JSON object: {REMEDY}")
    return content
