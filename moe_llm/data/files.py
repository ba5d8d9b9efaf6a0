"""Files that are complete or absent, built by one process at a time."""

import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from moe_llm.atomic import is_full, is_refusal, rename_directory, sync_directory, try_or_report, write_atomically
from moe_llm.errors import UserError
from moe_llm.locks import Waiting, process_with_lock


@contextlib.contextmanager
def building(cache: Path, key: str) -> Iterator[None]:
    """Only one process of this host (of all hosts, where the file system locks) is inside for a key.

    The lock goes with the process, so one that was killed does not block the next. Where no files can be made, as in prepared
    data on a disk that is only read, nothing can be built, and there is no lock.
    """
    from filelock import FileLock, Timeout

    if not os.access(next(path for path in [cache, *cache.absolute().parents] if path.exists()), os.W_OK):
        yield
        return
    with user_error_on_disk("data.cache_dir", cache):
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / f"{key}.lock")
        waiting = Waiting(f"{lock.lock_file} while it prepares text or tokenizer")
        while not lock.is_locked:
            try:
                lock.acquire(timeout=1)
            except Timeout:
                waiting.beat(process_with_lock(Path(lock.lock_file)))
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def publish(directory: Path, field: str) -> Iterator[Path]:
    """A temporary directory that takes its final name when the block ends, and disappears if it fails.

    Call it under `building`: what killed predecessors left behind is removed first.
    """
    prefix = f".{directory.name}.{hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:8]}.tmp-"
    temporary = directory.with_name(f"{prefix}{os.getpid()}")
    with user_error_on_disk(field, directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        for stale in directory.parent.glob(f"{prefix}*"):
            shutil.rmtree(stale)
        try:
            temporary.mkdir()
            yield temporary
            for path in temporary.rglob("*"):
                sync_directory(path) if path.is_dir() else _flush(path)
            rename_directory(temporary, directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def publish_resumable(directory: Path, field: str, journal: str, owner: str = "") -> Iterator[Path]:
    """As `publish`, but what a kill, a signal or Ctrl-C leaves unfinished is handed to the next call.

    An error removes it: the input has to change before another attempt, and with it the name of the directory.

    Args:
        journal: name of a file that describes the unfinished state; it is removed at the end.
        owner: whose unfinished state it is, where machines without common locks may be at it at once.
    """
    temporary = directory.with_name(f".{directory.name}.{owner}unfinished")
    with user_error_on_disk(field, directory):
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            yield temporary
            (temporary / journal).unlink(missing_ok=True)
            for file in temporary.iterdir():
                _flush(file)
            rename_directory(temporary, directory)
        except Exception:  # raised again; an interrupt is none, and leaves what it has for the next start to resume
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def replace_file(file: Path, content: bytes) -> None:
    """Write a small file of the cache in one step."""
    with user_error_on_disk("data.cache_dir", file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.is_file() or file.read_bytes() != content:  # the same may lie on a disk that is only read
            write_atomically(file, content)


def remember(file: Path, content: bytes) -> None:
    """Write a small file of the cache that saves time and nothing else, if the disk takes it: prepared data may lie on one
    that is only read."""

    def work() -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, content)

    try_or_report("writing to data.cache_dir", work, "what is remembered there is found again at each start")


def _flush(file: Path) -> None:
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())


_RUST = re.compile(r"\(os error (\d+)\)")


@contextlib.contextmanager
def user_error_on_disk(field: str, path: Path) -> Iterator[None]:
    """Turn a full, failing, read-only or forbidden disk into a sentence; other errors pass."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise UserError(f"{field}: no space left for {path}: free some or choose another directory") from error
        if is_refusal(error) or error.errno == errno.EEXIST:
            raise UserError(
                f"{field}: {path} cannot be written ({error.strerror}): choose another directory"
            ) from error
        raise


@contextlib.contextmanager
def errors_of_rust() -> Iterator[None]:
    """Let failures of the file system inside `tokenizers` and `safetensors`, which raise their own, be `OSError`."""
    try:
        yield
    except Exception as error:
        found = None if isinstance(error, OSError | UserError) else _RUST.search(str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number)) from error
