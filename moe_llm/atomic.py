"""Files and directories that are replaced in one step: a reader, or a crash at any moment, finds the old or the new."""

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

TEMPORARY = ".tmp-"  # how names begin that a process gives to what is not finished
_reported: set[tuple[str, int | None]] = set()


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Give a file this content, in UTF-8 where it is text. The content is on the disk before it gets the file's name,
    and the name is on the disk when this returns.

    Raises:
        OSError: the file is as it was, and nothing is left beside it.
    """
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY}{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def rename_directory(finished: Path, final: Path) -> None:
    """Give a directory, whose files are on the disk, its name; that too is on the disk when this returns.

    Raises:
        OSError: it keeps the name that it had.
    """
    sync_directory(finished)
    os.rename(finished, final)
    sync_directory(final.parent)


def sync_directory(path: Path) -> None:
    """Bring the names in a directory to the disk, where the file system can be asked to."""

    def work() -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    try_or_report("fsync", work, "names of new files reach the disk when the system brings them there")


def try_or_report(kind: str, work: Callable[[], None], instead: str) -> bool:
    """Do what a run can do without. A failure of the file system is reported once for each kind and reason.

    Args:
        instead: what follows from it, as a clause.
    """
    try:
        work()
    except OSError as error:
        if (kind, error.errno) not in _reported:
            _reported.add((kind, error.errno))
            where = f" ({error.filename})" if error.filename else ""
            logger.warning("%s failed: %s%s: %s", kind, error.strerror or error, where, instead)
        return False
    return True


def is_full(error: OSError) -> bool:
    """Whether there is no space left on a disk, or for its user."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def is_refusal(error: OSError) -> bool:
    """Whether a file system does not do what it is asked, be there space or not: it fails, forbids it, or has a file where a
    directory is due."""
    failing, forbidden = (errno.EFBIG, errno.EIO, errno.ESTALE), (errno.EROFS, errno.EACCES, errno.EPERM)
    return error.errno in (*failing, *forbidden, errno.EISDIR, errno.ENOTDIR)
