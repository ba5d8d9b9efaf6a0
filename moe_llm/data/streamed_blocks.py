"""A source that is tokenised while it is trained on, as blocks.

    CACHE_DIR/stream-KEY/000000/ 000001/ ...

A stream is cut into windows of about 16 MiB of text, in the order in which its rows come. Each is tokenised into a
directory as of `moe_llm.data.cache`, packed by itself, and its blocks are shuffled. The next window is made while one is
read, and those that lie behind are deleted, apart from the first, which holds the held-out text: so disk and memory are
bounded. What a window holds follows from where its stream was at its begin, which a checkpoint records with it: a run
resumes exactly, without what came before, at any number of ranks. Processes of one machine share the windows.
"""

import contextlib
import json
import logging
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_llm.data.cache import (
    SPLITS,
    Encoding,
    TokenizedText,
    is_whole,
    open_split,
    put_meta,
    read_meta,
    remove_damaged,
)
from moe_llm.data.files import building, publish
from moe_llm.data.order import shuffled
from moe_llm.data.packing import PackedBlocks
from moe_llm.data.sources import no_text, stream_texts
from moe_llm.data.stream import Cursor, DocumentStream
from moe_llm.errors import UserError

logger = logging.getLogger(__name__)

WINDOW_BYTES = 16 * 2**20  # of text
_KEPT = 2  # windows behind the newest, for ranks that are behind


@dataclass(frozen=True)
class Window:
    """text: by split; next: where the window behind it begins; sha256: of its training tokens."""

    text: dict[str, TokenizedText]
    next: Cursor
    sha256: str


@dataclass(frozen=True)
class Windows:
    """Where a stream's windows are made.

    name: of the stream in the cache, by all that determines its tokens.
    """

    cache: Path
    name: str
    encoding: Encoding
    threads: int

    def open(self, number: int, cursor: Cursor) -> Window:
        """A window by its number and its begin; made if it is not there.

        Raises:
            UserError: text that cannot be read, or no space left.
        """
        directory, begin = self._directory(number), json.loads(json.dumps(cursor))
        while True:
            if not self._is_there(directory, begin):
                with building(self.cache, self.name):
                    if not self._is_there(directory, begin, logger.debug):
                        remove_damaged(directory)
                        self._make(directory, cursor)
            with contextlib.suppress(FileNotFoundError):  # another run, which is further, has just deleted it
                meta = read_meta(directory)
                text = {split: open_split(directory, split) for split in SPLITS}
                return Window(text, Cursor(*meta["next"]), str(text["train"].digest))

    def forget(self, below: int) -> None:
        """Delete the windows before a number, apart from the first. They can be made again."""
        for directory in (self.cache / self.name).glob("[0-9]*"):
            if 0 < int(directory.name) < below:
                shutil.rmtree(directory, ignore_errors=True)

    def _directory(self, number: int) -> Path:
        return self.cache / self.name / f"{number:06d}"

    def _is_there(self, directory: Path, begin: Any, report: Callable[[str], None] = logger.warning) -> bool:
        return is_whole(directory, report) and read_meta(directory).get("begin") == begin

    def _make(self, directory: Path, cursor: Cursor) -> None:
        encoding = self.encoding
        stream = DocumentStream(encoding.source, encoding.field, cursor)
        texts = _of_window(stream, encoding)
        with publish(directory, "data.cache_dir") as temporary:
            pieces = (piece for text in texts for piece in encoding.pieces_of(text))
            encoding.build(pieces, temporary, directory, self.threads, lambda size: None)
            meta = read_meta(temporary)
            put_meta(temporary, meta | {"begin": cursor, "next": stream.cursor()}, directory)


def _of_window(stream: DocumentStream, encoding: Encoding):
    """The texts of one window; it ends where an epoch does."""
    size, begun = 0, stream.epoch
    while not size:
        if stream.epoch > begun + 1:
            raise no_text(encoding.source, encoding.field)
        for text in stream_texts(stream, encoding.source, encoding.field):
            size += len(text)
            yield text
            if size >= WINDOW_BYTES:
                return


@dataclass
class _Known:
    """A window that has been reached: samples begin .. end are its blocks."""

    number: int
    begin: int
    end: int
    cursor: Cursor
    sha256: str
    blocks: PackedBlocks | None


class StreamedBlocks(PackedBlocks):
    """The endless blocks of a stream in their order: block n is the source's n-th sample. Counts are the first window's.

    Args:
        pack: text as blocks.
        stream: number of the source, for the order.
        allow_changed: as `data.allow_changed`; a stream that gives other text than when a checkpoint was written is read
            from its begin, and is `restarted`.
    """

    def __init__(
        self,
        windows: Windows,
        first: PackedBlocks,
        pack: Callable[[TokenizedText], PackedBlocks],
        seed: int,
        stream: int,
        allow_changed: bool = False,
    ):
        super().__init__(first.text, first.sequence_length, first.isolate_documents, first.pad)
        self._windows, self._first, self._pack, self._seed, self._stream = windows, first, pack, seed, stream
        self._allow_changed = allow_changed
        self._lock = threading.RLock()
        self._ahead: threading.Thread | None = None
        self.resume(None)

    def resume(self, state: dict[str, Any] | None) -> None:
        """Go on from `state` of a checkpoint; None: from the begin.

        Raises:
            UserError: the stream gives other text than when the checkpoint was written, and may not.
        """
        with self._lock:
            self._known: list[_Known] = []
            self._next, self._at, self._begin = Cursor(), 0, 0
            self.restarted = False
            if state is None:
                return
            self._next, self._at, self._begin = Cursor(*state["cursor"]), state["window"], state["begin"]
            if "sha256" in state:
                self._compare(state["sha256"])
                self._enter()

    def _compare(self, sha256: str) -> None:
        """Find the text of the checkpoint again, or go to the begin of the stream."""
        field = self._windows.encoding.field
        try:
            if self._windows.open(self._at, self._next).sha256 == sha256:
                return
        except UserError:  # it may have become shorter than it was
            if not self._allow_changed:
                raise
        if not self._allow_changed:
            raise UserError(
                f"{field}: the stream gives other text than when the checkpoint was written: bring the data back, or have it "
                "read from its begin with data.allow_changed=true"
            )
        self._next, self._at, self.restarted = Cursor(), 0, True

    def __len__(self) -> int:
        return len(self._first)

    @property
    def places(self) -> int:
        return self._first.places

    @property
    def cut_documents(self) -> int:
        return self._first.cut_documents

    def write(self, block: int, row: int, out: dict[str, np.ndarray]) -> None:
        with self._lock:
            window = self._find(block)
            if window.blocks is None:
                window.blocks = self._pack(self._windows.open(window.number, window.cursor).text["train"])
            blocks, length = window.blocks, window.end - window.begin
        place = shuffled(np.array([window.number * length + block - window.begin]), length, self._seed, self._stream)
        blocks.write(int(place[0]), row, out)

    def state(self, block: int) -> dict[str, Any]:
        """What a run that goes on with this block needs to know."""
        with self._lock:
            window = self._find(block)
            cursor = list(window.cursor)
            return {"window": window.number, "begin": window.begin, "cursor": cursor, "sha256": window.sha256}

    def epoch_of(self, block: int) -> int:
        """How often the stream has been read to its end before a block, as far as it has been reached."""
        with self._lock:
            reached = [window.cursor.epoch for window in self._known if window.begin <= block]
            return reached[-1] if reached else self._next.epoch

    def _find(self, block: int) -> _Known:
        assert not self._known or block >= self._known[0].begin, "samples behind a checkpoint are not read again"
        while block >= self._begin:
            self._enter()
        return next(window for window in reversed(self._known) if window.begin <= block)

    def _enter(self) -> None:
        """Reach the next window."""
        epoch = self._next.epoch
        window = self._windows.open(self._at, self._next)
        blocks = self._pack(window.text["train"])
        end = self._begin + len(blocks)
        if not len(blocks) and window.next.epoch > epoch + 1:
            raise no_text(self._windows.encoding.source, self._windows.encoding.field)
        self._known.append(_Known(self._at, self._begin, end, self._next, window.sha256, blocks))
        for behind in self._known[:-_KEPT]:
            behind.blocks = None
        self._windows.forget(self._at - _KEPT)
        self._at, self._begin, self._next = self._at + 1, end, window.next
        # What goes wrong with it is met again, and raised, when the window is needed.
        self._ahead = threading.Thread(target=_try, args=(self._windows.open, self._at, self._next), daemon=True)
        self._ahead.start()


def _try(open_window: Callable[[int, Cursor], Window], number: int, cursor: Cursor) -> None:
    try:
        open_window(number, cursor)
    except Exception:  # noqa: BLE001 - the thread that needs the window meets the same, and raises it
        return
