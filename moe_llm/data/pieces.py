"""How files are divided among those that tokenise them: into pieces, and pieces into shards.

A piece is a file or a part of one: a range of bytes of text or of JSON lines, which begins and ends where a document may,
or some row groups of parquet. Packed files, tables, arrays and what a hub serves as one file stay whole. Shards are
consecutive pieces of about `SHARD_BYTES`, so what a source gives does not depend on how many read it.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import IO, NamedTuple

SHARD_BYTES = 16 * 2**20  # of files; more where there would be more than MOST_SHARDS
MOST_SHARDS = 4096
_WINDOW = 1 << 20


class Piece(NamedTuple):
    """A part of a file. begin, end: bytes, row groups of parquet, or documents of token files, before they are moved to
    where a document may begin; end is None for the rest of the file. size: bytes, for the progress."""

    path: Path
    size: int
    begin: int = 0
    end: int | None = None

    @property
    def whole(self) -> bool:
        return self.begin == 0 and self.end is None


class Place(NamedTuple):
    """A line of a piece, for errors: how many come before the piece is counted when it is written."""

    path: Path
    offset: int
    nth: int

    def __str__(self) -> str:
        return f"{self.path}, {self.line}"

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    @property
    def line(self) -> str:
        before, left = 0, self.offset
        if left:
            with self.path.open("rb") as file:
                while left and (data := file.read(min(left, _WINDOW))):
                    before += data.count(b"\n")
                    left -= len(data)
        return f"line {before + self.nth}"


def shard_bytes(total: int) -> int:
    """The size of a shard of a source of so many bytes."""
    return max(SHARD_BYTES, -(-total // MOST_SHARDS))


def by_bytes(path: Path, size: int, most: int) -> list[Piece]:
    """A file in ranges of about `most` bytes."""
    count = -(-size // most) if size > most + most // 2 else 1
    if count == 1:
        return [Piece(path, size)]
    edges = [size * i // count for i in range(count + 1)]
    return [Piece(path, b - a, a, b) for a, b in pairwise(edges)]


def by_items(path: Path, sizes: Sequence[int], most: int) -> list[Piece]:
    """A file in ranges of its items (row groups, documents), each of about `most` bytes."""
    if sum(sizes) <= most + most // 2:
        return [Piece(path, sum(sizes))]
    pieces, begin, held = [], 0, 0
    for nth, size in enumerate(sizes):
        held += size
        if held >= most or nth == len(sizes) - 1:
            pieces.append(Piece(path, held, begin, nth + 1))
            begin, held = nth + 1, 0
    return pieces


def grouped(pieces: Iterable[Piece], most: int) -> list[list[Piece]]:
    """Consecutive pieces as shards."""
    shards: list[list[Piece]] = []
    held = most
    for piece in pieces:
        if held + piece.size // 2 >= most:
            shards.append([])
            held = 0
        shards[-1].append(piece)
        held += piece.size
    return shards


def bounds(file: IO[bytes], piece: Piece, longest: int | None = None) -> tuple[int, int | None]:
    """Where a piece of text begins and ends: behind the first line end at or after its edges.

    Args:
        longest: where no line ends within so many bytes, a character's first byte serves; None: a line is never cut.
    """
    if piece.whole:
        return 0, None
    return _edge(file, piece.begin, longest), None if piece.end is None else _edge(file, piece.end, longest)


def _edge(file: IO[bytes], offset: int, longest: int | None) -> int:
    if not offset:
        return 0
    file.seek(offset - 1)
    at = offset - 1
    while longest is None or at - offset < longest:
        data = file.read(_WINDOW)
        end = data.find(b"\n")
        if end >= 0 or not data:
            return at + (end + 1 if data else 0)
        at += len(data)
    file.seek(offset)
    begin = file.read(4)
    return offset + next((i for i, byte in enumerate(begin) if byte & 0xC0 != 0x80), 0)
