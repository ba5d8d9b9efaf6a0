"""Sizes and hashes of a checkpoint's files, so that a missing, truncated or altered one is named."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moe_llm.checkpoint.ranks import ALONE, Ranks, together
from moe_llm.checkpoint.safetensors_io import FileRecord, read_json
from moe_llm.errors import UserError

MANIFEST = "trainer/manifest.json"
HASHED_BYTES = 1 << 30  # of a checkpoint's files, compared with their hashes wherever one is read: about a second
_CHUNK = 1 << 22


def write_file(path: Path, content: bytes | str) -> FileRecord:
    """Write a small file and bring it to the disk."""
    data = content.encode() if isinstance(content, str) else content
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


def write_json(path: Path, content: Any) -> FileRecord:
    """Write JSON as `write_file` does; floats are written so that they are read back exactly."""
    return write_file(path, json.dumps(content, indent=2) + "\n")


def adopt_file(path: Path) -> FileRecord:
    """Bring a file that somebody else wrote to the disk; its record, by reading it."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return FileRecord(path.stat().st_size, _hash(path))


def write_manifest(directory: Path, records: Mapping[str, FileRecord]) -> None:
    """`records`: of every file of the checkpoint but the manifest, by path relative to `directory`."""
    files = {name: {"size": r.size, "sha256": r.sha256} for name, r in sorted(records.items())}
    write_json(directory / MANIFEST, {"files": files})


def read_manifest(directory: Path) -> dict[str, FileRecord]:
    """The record of every file.

    Raises:
        UserError: no manifest, or a damaged one.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{directory} is no training checkpoint, for it has no {MANIFEST}: name a step directory "
            "of a run's checkpoints"
        )
    try:
        records = {name: FileRecord(int(r["size"]), str(r["sha256"])) for name, r in read_json(path)["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"file {path} is damaged: it is no list of files: use another checkpoint") from error
    if "config.json" not in records or any(Path(name).is_absolute() or ".." in Path(name).parts for name in records):
        raise UserError(f"file {path} is damaged: it is not the list of a checkpoint's files: use another checkpoint")
    return records


def verify(directory: Path, ranks: Ranks = ALONE, *, hashes: bool = True) -> None:
    """Compare a checkpoint with its manifest. Collective: the files are shared out among the ranks.

    Args:
        hashes: read every file and compare its hash; False: sizes alone.

    Raises:
        UserError: on every rank, naming a file and what is wrong with it.
    """
    together(ranks, lambda: _verify_share(directory, ranks.rank, ranks.world_size, hashes))


def fingerprints(directory: Path, names: Iterable[str], ranks: Ranks = ALONE) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files, by name. Collective: they are shared out among the ranks, and read to the end.

    Raises:
        UserError: on every rank, where one cannot be read.
    """
    mine = sorted(names)[ranks.rank :: ranks.world_size]
    share = together(
        ranks,
        lambda: {name: {"size": (directory / name).stat().st_size, "sha256": _hash(directory / name)} for name in mine},
    )
    return {name: record for part in ranks.gather(share) for name, record in sorted(part.items())}


def sound(directory: Path, name: str, record: FileRecord) -> bool:
    """Whether a file is what was written, by its size and hash."""
    path = directory / name
    return path.is_file() and path.stat().st_size == record.size and _hash(path) == record.sha256


# What a model, its tokenizer and a resumed run are read from; people may edit the other files of a checkpoint.
_LOADED = re.compile(r"(.*/)?([^/]*\.safetensors(\.index\.json)?|tokenizer\.(json|model)|state\.json)")


def verify_loadable(directory: Path) -> None:
    """Compare the files that loading reads with the manifest: all sizes, and the hashes of those that are quickly read.

    Reading everything again would cost as much as loading, so files above `HASHED_BYTES` in all are compared by size
    alone; `verify` compares every hash.

    Raises:
        UserError: a missing, truncated or altered file.
    """
    records = {name: record for name, record in read_manifest(directory).items() if _LOADED.fullmatch(name)}
    room = HASHED_BYTES
    for name, record in sorted(records.items(), key=lambda item: (item[1].size, item[0])):
        _check_size(directory / name, record)
        room -= record.size
        if room >= 0:
            _check_hash(directory / name, record)


def _check_hash(path: Path, record: FileRecord) -> None:
    if _hash(path) != record.sha256:
        raise UserError(
            f"file {path} is damaged: its content is not what was written (SHA-256): use another checkpoint"
        )


def _verify_share(directory: Path, rank: int, world_size: int, hashes: bool) -> None:
    records = read_manifest(directory)
    for name, record in sorted(records.items()):
        _check_size(directory / name, record)
    # the largest first, so that the shares are about equal
    by_size = sorted(records, key=lambda name: (-records[name].size, name))
    for name in by_size[rank::world_size] if hashes else ():
        _check_hash(directory / name, records[name])


def _check_size(path: Path, record: FileRecord) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"file {path} is missing: use another checkpoint") from None
    if size != record.size:
        what = "truncated" if size < record.size else "damaged"
        raise UserError(f"file {path} is {what}: it has {size} bytes instead of {record.size}: use another checkpoint")


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
