"""Locks that other processes hold: whose they are, and a sentence for those who wait.

A wait that lasts is reported on stderr, and to `listeners`, as a watchdog is: a wait for a living process is no hang. This file needs neither torch nor transformers.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from moe_llm.logs import ON_EVERY_RANK

logger = logging.getLogger(__name__)

SAY_AFTER_SECONDS = 5.0
# each is told of what is being done or waited for, and whether that is quick by nature
listeners: list[Callable[[str, bool], None]] = []


def tell(phase: str, quick: bool = False) -> None:
    """What is being done or waited for, to those who listen. quick: it takes seconds, unless something is wrong."""
    for heartbeat in listeners:
        heartbeat(phase, quick)


class Waiting:
    """A wait: `beat` while it lasts. It is reported once on stderr, after `SAY_AFTER_SECONDS`."""

    def __init__(self, what: str):
        self._what, self._begin, self._said = what, time.monotonic(), False

    def beat(self, owner: int | None) -> None:
        """owner: the process that is waited for, if it is known to live."""
        whose = f"process {owner}" if owner is not None else "another process"
        if owner is not None:
            tell(f"waiting for {whose}: {self._what}")
        if not self._said and time.monotonic() - self._begin > SAY_AFTER_SECONDS:
            self._said = True
            complain(f"waiting for {whose}, which holds {self._what}")


def complain(sentence: str) -> None:
    """Say it on whichever rank it happens."""
    logger.warning("%s", sentence, **ON_EVERY_RANK)


def process_with_open(path: Path) -> int | None:
    """A process of this machine that has a file open; None: none is seen. Linux alone can tell (see `can_tell`)."""
    try:
        wanted = path.stat()
    except OSError:
        return None
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it ends meanwhile, or belongs to another user
            for descriptor in os.scandir(process / "fd"):
                with contextlib.suppress(OSError):
                    held = os.stat(descriptor.path)
                    if (held.st_ino, held.st_dev) == (wanted.st_ino, wanted.st_dev):
                        return int(process.name)
    return None


def process_with_lock(path: Path) -> int | None:
    """The process of this machine that holds flock's or fcntl's lock on a file; None: none is seen."""
    try:
        inode, table = path.stat().st_ino, Path("/proc/locks").read_text()
    except OSError:
        return None
    for line in table.splitlines():
        fields = line.split()
        # "1: FLOCK ADVISORY WRITE 1234 08:01:5678 0 EOF"; a process that waits has "->" before its kind
        if len(fields) >= 6 and fields[1] != "->" and fields[5].rpartition(":")[2] == str(inode):
            return int(fields[4])
    return None


_SHARED = ("nfs", "lustre", "gpfs", "cifs", "smb", "fuse", "9p", "beegfs", "ceph", "afs")


def can_tell(path: Path) -> bool:
    """Whether a file that no process of this machine has open is one that no process has open: Linux, and a file system
    that no other machine writes to."""
    try:
        mounts = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return False
    resolved, best = str(path.resolve()), ("", "")
    for mount in mounts:
        _, at, kind, *_ = mount.split()
        if (resolved == at or resolved.startswith(at.rstrip("/") + "/")) and len(at) >= len(best[0]):
            best = (at, kind)
    return bool(best[1]) and not best[1].startswith(_SHARED)
