"""One process group at a time trains in a run directory."""

import json
import logging
import os
import socket
import time
from pathlib import Path

from filelock import FileLock, Timeout

from moe_llm.errors import UserError

logger = logging.getLogger(__name__)
LOCK_FILES = (".lock", ".lock-owner.json")
_SHARED_SECONDS = 60.0  # for which a client of NFS may keep what it knows of a directory


class RunLock:
    """The lock of a run directory, which the operating system releases when its owner dies, however that happens.

    .lock is locked (flock); .lock-owner.json says by whom, for the sentence that refuses the next one. Where `checkpoints`
    is a link, which another run directory may have too, what it leads to is locked as well.
    """

    def __init__(self, run_dir: Path):
        self._directory = run_dir
        self._held: list[tuple[Path, FileLock]] = []
        self._made: list[Path] = []

    def acquire(self) -> None:
        """Take the lock, on the main rank of a run.

        Raises:
            UserError: another process holds it; the sentence names its host and process id.
        """
        self._made = [path for path in (self._directory, *self._directory.absolute().parents) if not path.exists()]
        self._directory.mkdir(parents=True, exist_ok=True)
        elsewhere = self._directory / "checkpoints"
        try:
            for directory in [self._directory] + [elsewhere.resolve()] * (
                elsewhere.is_symlink() and elsewhere.is_dir()
            ):
                self._lock(directory)
        except UserError:
            self.release()
            raise

    def _lock(self, directory: Path) -> None:
        lock = FileLock(directory / LOCK_FILES[0])
        try:
            lock.acquire(timeout=0)
        except Timeout:
            what = "" if directory == self._directory else f" saves into {directory}, which"
            raise UserError(
                f"run.dir={str(self._directory)!r}{what} is in use by {_owner(directory)}: wait for it, stop it, or name "
                "another run.dir"
            ) from None
        except (NotImplementedError, OSError) as error:
            logger.warning("run.dir=%s cannot be locked (%s): start no second run in it", self._directory, error)
            return
        self._held.append((directory, lock))
        owner = {"host": socket.gethostname(), "pid": os.getpid()}
        (directory / LOCK_FILES[1]).write_text(json.dumps(owner) + "\n", encoding="utf-8")

    def release(self) -> None:
        """Let the next run have it, and leave nothing of the lock behind; nothing where it is not held."""
        if not self._held:
            return
        while self._held:
            directory, lock = self._held.pop()
            (directory / LOCK_FILES[1]).unlink(missing_ok=True)
            # while it is held: who has opened it meanwhile finds that the file has no name any more, and opens the next
            (directory / LOCK_FILES[0]).unlink(missing_ok=True)
            lock.release()
        for path in self._made:  # a run that was refused leaves no directory behind
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def written_by_owner(directory: Path) -> str | None:
    """What the owner of a lock has written beside it; None where nothing is seen."""
    try:
        return (directory / LOCK_FILES[1]).read_text(encoding="utf-8")
    except OSError:
        return None


def is_seen(directory: Path, written: str | None) -> bool:
    """Whether what a lock's owner has written is seen here too; NFS may show a directory as it was for a while."""
    end = time.monotonic() + _SHARED_SECONDS
    while written_by_owner(directory) != written:
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def _owner(directory: Path) -> str:
    try:
        owner = json.loads(written_by_owner(directory) or "")
        return f"process {owner['pid']} on {owner['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
