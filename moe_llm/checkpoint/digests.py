"""What a file held when it was written: its size, its SHA-256, and a digest of each of its blocks.

The SHA-256 is what other programs compare (`moe-llm verify`, `sha256sum`). The blocks' digests (XXH3, about ten times as
fast) let a rank that reads a part of a file compare just the blocks that it reads, while it reads them: a resume needs
no pass over the files before the one that loads them.
"""

import hashlib
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import xxhash

from moe_llm.errors import UserError

BLOCK = 1 << 22  # bytes that have a digest together; a manifest of 100 GB lists 24,000
REMEDY = "copy it again or use another checkpoint"


@dataclass(frozen=True)
class FileRecord:
    """A written file: its size in bytes, the SHA-256 of its content and, where they are known, its blocks' digests."""

    size: int
    sha256: str
    blocks: tuple[str, ...] = ()


class Digest:
    """Of bytes that come in order: `FileRecord`."""

    def __init__(self) -> None:
        self._size, self._blocks = 0, list[str]()
        self._sha256, self._block = hashlib.sha256(), xxhash.xxh3_64()

    def update(self, data: bytes | memoryview) -> None:
        self._sha256.update(data)
        for start, part in _by_block(self._size, memoryview(data)):
            if start % BLOCK == 0 and start:
                self._end_block()
            self._block.update(part)
        self._size += len(data)

    def record(self) -> FileRecord:
        """Of all bytes so far; nothing may follow."""
        if self._size:
            self._end_block()
        return FileRecord(self._size, self._sha256.hexdigest(), tuple(self._blocks))

    def _end_block(self) -> None:
        self._blocks.append(self._block.hexdigest())
        self._block.reset()


def _by_block(offset: int, data: memoryview) -> list[tuple[int, memoryview]]:
    """`data`, which begins at byte `offset` of a file, cut where blocks begin: (byte of the file, part)."""
    cuts = [offset, *range((offset // BLOCK + 1) * BLOCK, offset + len(data), BLOCK), offset + len(data)]
    return [(start, data[start - offset : end - offset]) for start, end in pairwise(cuts) if start < end]


def digest_file(path: Path) -> FileRecord:
    """Read a file to its end.

    Raises:
        UserError: it cannot be read.
    """
    digest = Digest()
    with reading(path), open(path, "rb") as file:
        while chunk := file.read(BLOCK):
            digest.update(chunk)
    return digest.record()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What a file system says of a file that is read, as one sentence: a `UserError`."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"file {path} is missing: {REMEDY}") from None
    except OSError as error:
        raise UserError(f"file {path} cannot be read ({error.strerror}): {REMEDY}") from error


class DigestedFile:
    """A new file, whose digests are made in a thread while it is written."""

    def __init__(self, path: Path):
        self._file, self._digest = open(path, "wb"), Digest()  # noqa: SIM115 (closed by `close`)
        self._hashing = ThreadPoolExecutor(1, thread_name_prefix="digest")

    def write(self, data: bytes | memoryview) -> None:
        for start in range(0, len(data), BLOCK):
            chunk = data[start : start + BLOCK]
            hashed = self._hashing.submit(self._digest.update, chunk)
            self._file.write(chunk)
            hashed.result()

    def close(self, finish: Callable[[int], None] = lambda descriptor: None) -> FileRecord:
        """finish: what to do with the descriptor when all is written."""
        try:
            self._file.flush()
            finish(self._file.fileno())
        finally:
            self._hashing.shutdown()
            self._file.close()
        return self._digest.record()


class CheckedFile:
    """Byte ranges of a file. A block that has a digest is compared with it when it is first read.

    A block is then read whole, so ranges that share one cost little more than their own bytes.
    """

    def __init__(self, path: Path, record: FileRecord | None = None):
        self.path, self._size = path, 0 if record is None else record.size
        self._unread = dict(enumerate(() if record is None else record.blocks))

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the bytes from `offset` on.

        Raises:
            UserError: the file is shorter, cannot be read, or holds other bytes than were written.
        """
        with reading(self.path), open(self.path, "rb", buffering=0) as file:
            for start, part in _by_block(offset, view) if self._unread else [(offset, view)]:
                if start // BLOCK in self._unread:
                    self._read_block(file, start, part)
                else:
                    _fill(file, start, part)

    def _read_block(self, file: io.FileIO, start: int, part: memoryview) -> None:
        number = start // BLOCK
        size = min(BLOCK, self._size - number * BLOCK)
        block = part if len(part) == size else memoryview(bytearray(size))
        _fill(file, number * BLOCK, block)
        if xxhash.xxh3_64_hexdigest(block) != self._unread.pop(number):
            raise DamagedFile(self.path)
        if block is not part:
            part[:] = block[start - number * BLOCK :][: len(part)]


def _fill(file: io.FileIO, offset: int, view: memoryview) -> None:
    file.seek(offset)
    done = 0
    while done < len(view):
        got = file.readinto(view[done:])
        if not got:
            raise UserError(f"file {file.name} is truncated at {offset + done} bytes: {REMEDY}")
        done += got


class DamagedCheckpoint(UserError):
    """A file of a checkpoint holds other bytes than were written to it, or numbers that are none."""


class DamagedFile(DamagedCheckpoint):
    """A file holds other bytes than were written to it."""

    def __init__(self, path: Path):
        super().__init__(
            f"file {path} is damaged: its content is not what was written (its hash differs): use another checkpoint"
        )
