"""The journal of a build of the token cache: a build that was killed resumes behind its last whole portion.

Files are appended to in portions. When a portion is on the disk, one line about it is added to the journal: how many
pieces of the source stand in the files up to here, and of each file the size up to here and the SHA-256 of what the
portion has added. A line that a kill has torn, or whose portion is not what was written, ends what is kept.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moe_llm.atomic import write_atomically

if TYPE_CHECKING:
    from hashlib import _Hash

JOURNAL = "portions.jsonl"
_READ_BYTES = 4 * 2**20


class Portion(NamedTuple):
    """State of the files after a portion.

    pieces: of the source that stand in the files; read: how much of the source these are, for the progress;
    totals: of each split; files: size of each file, and SHA-256 of what this portion has added to it.
    """

    pieces: int
    read: int
    totals: dict[str, dict[str, Any]]
    files: dict[str, tuple[int, str]]


class Kept(NamedTuple):
    """What of an unfinished build can be used. last: None for nothing; hashes: running SHA-256 of each whole file."""

    last: Portion | None
    hashes: "dict[str, _Hash]"


def append_portion(directory: Path, portion: Portion) -> None:
    """Record a portion whose files have been flushed to the disk."""
    body = json.dumps(portion)
    with (directory / JOURNAL).open("a", encoding="utf-8") as journal:
        journal.write(json.dumps([body, hashlib.sha256(body.encode()).hexdigest()]) + "\n")
        journal.flush()
        os.fsync(journal.fileno())


def recover(directory: Path, names: Sequence[str]) -> Kept:
    """Cut the files of an unfinished build back to its last whole portion; without one they become empty.

    Args:
        names: of the files that are built.
    """
    last, hashes = None, {name: hashlib.sha256() for name in names}
    lines: list[str] = []
    with contextlib.ExitStack() as stack:
        files = {}
        for name in names:
            (directory / name).touch()
            files[name] = stack.enter_context((directory / name).open("r+b"))
        for line in _lines(directory):
            portion = _parse(line)
            if portion is None or set(portion.files) != set(names):
                break
            further = _extended(files, hashes, last, portion)
            if further is None:
                break
            last, hashes = portion, further
            lines.append(line)
        for name, file in files.items():
            file.truncate(last.files[name][0] if last is not None else 0)
    write_atomically(directory / JOURNAL, "".join(lines))
    return Kept(last, hashes)


def _lines(directory: Path) -> list[str]:
    journal = directory / JOURNAL
    return journal.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if journal.exists() else []


def _parse(line: str) -> Portion | None:
    """None for a line that is not what was written."""
    try:
        body, digest = json.loads(line)
        if hashlib.sha256(body.encode()).hexdigest() != digest:
            return None
        return Portion(*json.loads(body))
    except (ValueError, TypeError, AttributeError):
        return None


def _extended(
    files: Mapping[str, Any], hashes: "Mapping[str, _Hash]", last: Portion | None, portion: Portion
) -> "dict[str, _Hash] | None":
    """The running hashes after a portion; None where its content is not what was written."""
    result = {}
    for name, (end, digest) in portion.files.items():
        left = end - (last.files[name][0] if last is not None else 0)
        whole, part = hashes[name].copy(), hashlib.sha256()
        while left > 0:
            data = files[name].read(min(left, _READ_BYTES))
            if not data:
                return None
            whole.update(data)
            part.update(data)
            left -= len(data)
        if part.hexdigest() != digest:
            return None
        result[name] = whole
    return result
