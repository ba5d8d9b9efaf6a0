"""Sizes and hashes of a checkpoint's files, so that a missing, truncated or altered one is named."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from textwrap import wrap
from typing import Any

from moe_llm.checkpoint.digests import DamagedFile, Digest, FileRecord, digest_file, reading
from moe_llm.checkpoint.ranks import ALONE, Ranks, together
from moe_llm.checkpoint.safetensors_io import read_json
from moe_llm.errors import UserError

MANIFEST = "trainer/manifest.json"
HASHED_BYTES = 1 << 30  # of a checkpoint's files, compared with their hashes wherever one is read: about a second
_DIGITS = 16  # of a block's digest


def write_file(path: Path, content: bytes | str) -> FileRecord:
    """Write a small file and bring it to the disk."""
    data = content.encode() if isinstance(content, str) else content
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    digest = Digest()
    digest.update(data)
    return digest.record()


def write_json(path: Path, content: Any) -> FileRecord:
    """Write JSON as `write_file` does; floats are written so that they are read back exactly."""
    return write_file(path, json.dumps(content, indent=2) + "\n")


def adopt_file(path: Path) -> FileRecord:
    """Bring a file that somebody else wrote to the disk; its record, by reading it."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return digest_file(path)


def write_manifest(directory: Path, records: Mapping[str, FileRecord]) -> None:
    """`records`: of every file of the checkpoint but the manifest, by path relative to `directory`."""
    files = {name: {**asdict(record), "blocks": "".join(record.blocks)} for name, record in sorted(records.items())}
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
        records = {name: _record(**r) for name, r in read_json(path)["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"file {path} is damaged: it is no list of files: use another checkpoint") from error
    if "config.json" not in records or any(Path(name).is_absolute() or ".." in Path(name).parts for name in records):
        raise UserError(f"file {path} is damaged: it is not the list of a checkpoint's files: use another checkpoint")
    return records


def has_manifest(directory: Path) -> bool:
    """Whether a checkpoint's files can be compared with what was written: not those of a model that is nobody's run.

    Raises:
        UserError: a run's checkpoint has lost its manifest.
    """
    if not (directory / MANIFEST).is_file() and (directory / MANIFEST).parent.is_dir():
        raise UserError(
            f"file {directory / MANIFEST} is missing: copy it again, or remove trainer/ to use the weights unchecked"
        )
    return (directory / MANIFEST).is_file()


def _record(size: Any, sha256: Any, blocks: str = "") -> FileRecord:
    """A file's record; a key that none has, as a flipped bit makes one, is a `TypeError`."""
    return FileRecord(int(size), str(sha256), tuple(wrap(blocks, _DIGITS)))


def verify(directory: Path, ranks: Ranks = ALONE, *, hashes: bool = True) -> None:
    """Compare a checkpoint with its manifest. Collective: the files are shared out among the ranks.

    Args:
        hashes: read every file and compare its hash; False: not those whose blocks are compared when they are read.

    Raises:
        UserError: on every rank, naming a file and what is wrong with it.
    """

    def check_share() -> None:
        records = read_manifest(directory)
        for name, record in sorted(records.items()):
            _check_size(directory / name, record)
        read = [name for name, r in records.items() if hashes or not (name.endswith(".safetensors") and r.blocks)]
        # the largest first, so that the shares are about equal
        read.sort(key=lambda name: (-records[name].size, name))
        for name in read[ranks.rank :: ranks.world_size]:
            _check_hash(directory / name, records[name])

    together(ranks, check_share)


def fingerprints(directory: Path, names: Iterable[str], ranks: Ranks = ALONE) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files, by name. Collective: they are shared out among the ranks, and read to the end.

    Raises:
        UserError: on every rank, where one cannot be read.
    """
    mine = sorted(names)[ranks.rank :: ranks.world_size]
    share = together(ranks, lambda: {name: digest_file(directory / name) for name in mine})
    return {
        name: {"size": record.size, "sha256": record.sha256}
        for part in ranks.gather(share)
        for name, record in sorted(part.items())
    }


# What a model, its tokenizer and a resumed run are read from; people may edit the other files of a checkpoint.
_LOADED = re.compile(r"(.*/)?([^/]*\.safetensors(\.index\.json)?|tokenizer\.(json|model)|state\.json)")


def verify_loadable(directory: Path) -> None:
    """Compare the files that loading reads with the manifest: all sizes, and the hashes of those that are quickly read. Of
    the others, which people may edit, none may be missing but pages.

    Reading everything again would cost as much as loading, so files above `HASHED_BYTES` in all are compared by size
    alone; `verify` compares every hash.

    Raises:
        UserError: a missing, truncated or altered file.
    """
    room = HASHED_BYTES
    for name, record in sorted(read_manifest(directory).items(), key=lambda item: (item[1].size, item[0])):
        if not _LOADED.fullmatch(name):
            if not (directory / name).exists() and not name.endswith(".md"):
                raise UserError(f"file {directory / name} is missing: copy it again or use another checkpoint")
            continue
        _check_size(directory / name, record)
        room -= record.size
        if room >= 0:
            _check_hash(directory / name, record)


def check_file(directory: Path, name: str) -> None:
    """Compare one file with the manifest.

    Raises:
        UserError: the file, or the manifest, is not what was written.
    """
    record = read_manifest(directory).get(name)
    if record is None:
        raise UserError(f"file {directory / MANIFEST} is damaged: it does not list {name}: use another checkpoint")
    _check_hash(directory / name, record)


def _check_hash(path: Path, record: FileRecord) -> None:
    _check_size(path, record)
    if digest_file(path).sha256 != record.sha256:
        raise DamagedFile(path)


def _check_size(path: Path, record: FileRecord) -> None:
    with reading(path):
        size = path.stat().st_size
    if size != record.size:
        what = "truncated" if size < record.size else "damaged"
        raise UserError(f"file {path} is {what}: it has {size} bytes instead of {record.size}: use another checkpoint")
