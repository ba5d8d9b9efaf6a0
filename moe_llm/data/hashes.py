"""SHA-256 of source files, computed once for each state of a file where there is much of it."""

import hashlib
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moe_llm.data.files import building, remember
from moe_llm.errors import UserError
from moe_llm.locks import tell
from moe_llm.progress import progress
from moe_llm.threads import available_cores

COARSE_NS = 2 * 10**9  # of the clocks of file systems
REMEMBERED_BYTES = 64 * 2**20  # of files; less is read again each time, which takes less than a tenth of a second


def file_hashes(files: Sequence[Path], field: str, cache: Path) -> list[str]:
    """SHA-256 of each file. Of a large source they are remembered in the cache by path and stamp, so that each file is read
    once on a machine.

    Raises:
        UserError: a file that cannot be read.
    """
    try:
        stamps = [stamp_of(path) for path in files]
        if sum(stamp[0] for stamp in stamps) <= REMEMBERED_BYTES:
            return [_hash(path) for path in files]
        names = [str(path.resolve()) for path in files]
        memo = cache / f"hashes-{hashlib.sha256(json.dumps(names).encode()).hexdigest()[:24]}.json"
        known = _remembered(memo)
        if all(known.get(name, [])[:-1] == stamp for name, stamp in zip(names, stamps)):
            return [known[name][-1] for name in names]
        with building(cache, memo.stem):  # one rank of a host reads
            known = _remembered(memo)
            missing = [i for i, name in enumerate(names) if known.get(name, [])[:-1] != stamps[i]]
            kept = {names[i] for i in range(len(names)) if not is_recent(stamps[i])}
            nbytes = sum(stamps[i][0] for i in missing)
            with (
                progress(f"hashing {field}", nbytes, in_bytes=True) as advance,
                ThreadPoolExecutor(min(8, available_cores())) as pool,
            ):
                for i, digest in zip(missing, pool.map(lambda i: _hash(files[i]), missing)):
                    tell(f"reading {files[i]}")
                    known[names[i]] = [*stamps[i], digest]
                    advance(stamps[i][0])
            if missing:
                remember(memo, json.dumps({name: known[name] for name in names if name in kept}).encode())
        return [known[name][-1] for name in names]
    except OSError as error:
        raise UserError(f"{field}: {error.filename} cannot be read: {error.strerror}") from error


def _remembered(memo: Path) -> dict[str, list]:
    """What is known of each file; nothing where the file is missing or not what was written."""
    try:
        found = json.loads(memo.read_text(encoding="utf-8"))
        return {name: [*map(int, entry[:4]), str(entry[4])] for name, entry in found.items()}
    except (OSError, ValueError, TypeError, AttributeError, IndexError):
        return {}


def state_of(path: Path) -> list[int]:
    """Size, time of modification and inode of a file."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def stamp_of(path: Path) -> list[int]:
    """What has changed if a file has: size, times of modification and of the last change, and inode.

    A program can set a file's time of modification back, but not the time of its last change (ctime), which the file
    system keeps.
    """
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def is_recent(stamp: Sequence[int]) -> bool:
    """Whether a file has changed so lately that another change might leave its stamp, since the clock may be coarse."""
    return time.time_ns() - stamp[2] < COARSE_NS


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
