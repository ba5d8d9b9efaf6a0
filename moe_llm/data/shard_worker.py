"""A process that tokenises shards for another, which sends it what to do and reads what has become of it.

`python -m moe_llm.data.shard_worker`: pickled messages on stdin and stdout. It is started as a command of its own, since a
user's script need not be one that a child of multiprocessing may import, and it ends when its stdin does.
"""

import contextlib
import os
import pickle
import queue
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

from filelock import FileLock, Timeout

from moe_llm.data.cache import Encoding, is_whole, remove_damaged
from moe_llm.data.pieces import Piece
from moe_llm.errors import UserError

_REPORT_SECONDS = 0.2


class ShardTask(NamedTuple):
    """A shard to make. lock: a file in which whoever makes it is noted; final: the entry that is complete once all are."""

    number: int
    pieces: list[Piece]
    directory: Path
    lock: Path
    final: Path


def make_shard(
    encoding: Encoding, task: ShardTask, threads: int, advance: Callable[[int], None], report: Callable[[str], None]
) -> bool:
    """Whether the shard is there now: made by this call or before. False: another process is at it.

    Args:
        report: told in one sentence of a shard that is damaged, before it is made again.

    Raises:
        UserError: unreadable text, or no space left.
    """
    lock = FileLock(task.lock)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    try:
        if (task.final / "meta.json").exists():
            return True
        if is_whole(task.directory, report):
            advance(sum(piece.size for piece in task.pieces))
            return True
        remove_damaged(task.directory)
        owner = f"{socket.gethostname()}."
        encoding.write(task.pieces, task.directory, threads=threads, advance=advance, owner=owner)
        return True
    finally:
        lock.release()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all: whoever reads the answers decides
    inbox, outbox = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    encoding, threads = pickle.load(inbox)
    tasks: queue.Queue[ShardTask] = queue.Queue()
    threading.Thread(target=_read, args=(inbox, tasks), daemon=True).start()
    answer = _Answers(outbox)
    while True:
        task = tasks.get()
        try:
            done = make_shard(encoding, task, threads, answer.advance, lambda text: answer.send("damaged", text))
            answer.send("done" if done else "busy", task.number)
        except UserError as error:
            answer.send("refused", str(error))
        except Exception:  # noqa: BLE001 - the other process raises it
            answer.send("failed", traceback.format_exc())


def _read(inbox: IO[bytes], tasks: "queue.Queue[ShardTask]") -> None:
    """Take tasks until the sender is gone, and go with it: nobody else may be at its shards when they are resumed."""
    with contextlib.suppress(EOFError, pickle.UnpicklingError):
        while True:
            tasks.put(pickle.load(inbox))
    os._exit(0)


class _Answers:
    def __init__(self, outbox: IO[bytes]):
        self._outbox, self._read, self._told = outbox, 0, time.monotonic()

    def advance(self, size: int) -> None:
        self._read += size
        if time.monotonic() - self._told > _REPORT_SECONDS:
            self._tell()

    def send(self, kind: str, content: Any) -> None:
        self._tell()
        self._put(kind, content)

    def _tell(self) -> None:
        if self._read:
            self._put("read", self._read)
        self._read, self._told = 0, time.monotonic()

    def _put(self, kind: str, content: Any) -> None:
        pickle.dump((kind, content), self._outbox)
        self._outbox.flush()


if __name__ == "__main__":
    main()
