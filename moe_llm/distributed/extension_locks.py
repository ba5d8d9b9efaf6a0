"""Locks of torch's extension cache that do not outlive their owners.

torch marks a build by a file `lock` in the extension's directory, which a process that is killed leaves behind; every
later one then waits for it for ever (`torch.utils.file_baton`). The owner keeps the file open while it builds, so on
Linux it can be told whether there still is one. `install` makes torch ask: a lock without an owner is removed, with a
line, and the build is done again; while the owner lives, the wait says for whom.
tests/distributed/test_extension_locks.py says when a version of torch has moved any of this.
"""

import functools
import time
from pathlib import Path
from typing import Any

from moe_llm.locks import Waiting, can_tell, complain, process_with_open

_QUIET_SECONDS = 1800.0  # on a shared file system: a build that has changed no file for so long is taken for dead
_RELEASING_SECONDS = 0.5  # torch closes the file before it removes it


class OwnerGone(Exception):
    """Who built the extension that was waited for has ended."""


def install() -> None:
    """Let torch's extension builds of this process look after stale locks. May be called again."""
    from torch.utils import cpp_extension
    from torch.utils.file_baton import FileBaton

    if getattr(FileBaton.wait, "watched", False):
        return
    # replaced on the class, since torch makes its own objects of it
    setattr(FileBaton, "try_acquire", _acquire(FileBaton.try_acquire))  # noqa: B010
    setattr(FileBaton, "wait", _wait)  # noqa: B010
    cpp_extension._jit_compile = _building_again(cpp_extension._jit_compile)


def is_stale(lock: Path) -> bool:
    """Whether a lock is there and nobody builds under it."""
    try:
        seen = lock.stat()
    except OSError:
        return False
    if not can_tell(lock):
        return time.time() - _last_change(lock.parent) > _QUIET_SECONDS
    if process_with_open(lock) is not None:
        return False
    time.sleep(_RELEASING_SECONDS)
    try:
        return lock.stat().st_ino == seen.st_ino and process_with_open(lock) is None
    except OSError:
        return False


def remove_if_stale(lock: Path) -> bool:
    """Remove a lock that nobody builds under, with a line; whether it was. Of several processes one does."""
    from filelock import FileLock

    if not lock.exists():
        return False
    with FileLock(lock.with_name("lock.removal")):
        if not is_stale(lock):
            return False
        lock.unlink(missing_ok=True)
    complain(f"removed {lock}: the process that built an extension there has ended before it was done")
    return True


def _last_change(directory: Path) -> float:
    return max(entry.stat().st_mtime for entry in [directory, *directory.iterdir()])


def _acquire(real: Any) -> Any:
    @functools.wraps(real)
    def try_acquire(self: Any) -> bool | None:
        remove_if_stale(Path(self.lock_file_path))
        return real(self)

    return try_acquire


def _wait(self: Any) -> None:
    """Until the lock is gone.

    Raises:
        OwnerGone: its owner is, and has left it.
    """
    lock, waiting = Path(self.lock_file_path), Waiting(f"{self.lock_file_path} while it builds an extension")
    asked = 0.0
    while lock.exists():
        if time.monotonic() - asked > 1:
            owner = process_with_open(lock)
            waiting.beat(owner)
            if owner is None and remove_if_stale(lock):
                raise OwnerGone(str(lock))
            asked = time.monotonic()
        time.sleep(self.wait_seconds)


_wait.watched = True  # type: ignore[attr-defined]


def _building_again(real: Any) -> Any:
    @functools.wraps(real)
    def compile_extension(name: str, *arguments: Any, **named: Any) -> Any:
        from torch.utils import cpp_extension

        while True:
            try:
                return real(name, *arguments, **named)
            except OwnerGone:
                # torch would take what it was asked for before as built
                cpp_extension.JIT_EXTENSION_VERSIONER.entries.pop(name, None)

    return compile_extension
