"""A source's tokens from the cache, where they are put first if need be: in shards, by all cores.

    CACHE_DIR/tokens-KEY/meta.json   {train,validation}.{starts,bytes}.bin   00000/ 00001/ ...

Each shard is a directory as in `moe_llm.data.cache`; what is unfinished has the name .tokens-KEY.unfinished and holds the
shards that are done, so that a kill costs each process no more than the shard that it was at. Processes of one machine
wait for the one of them that works; machines that share the directory take shards from the same list, each its own.
A source of one shard is stored as that alone.
"""

import contextlib
import hashlib
import json
import logging
import os
import pickle
import queue
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moe_llm.atomic import rename_directory
from moe_llm.config import SourceConfig
from moe_llm.config.data import DataConfig
from moe_llm.data.cache import (
    SPLITS,
    Encoding,
    TokenizedText,
    is_whole,
    mark_verified,
    open_split,
    put_meta,
    read_meta,
    remove_damaged,
)
from moe_llm.data.chat_template import ChatEncoder, own_template
from moe_llm.data.documents import DocumentEncoder, SpecialText
from moe_llm.data.files import building, user_error_on_disk
from moe_llm.data.hashes import state_of
from moe_llm.data.pieces import Piece
from moe_llm.data.preference import SideEncoder
from moe_llm.data.shard_worker import ShardTask, make_shard
from moe_llm.data.sources import files_here, fingerprint, holds_tokens, no_text, shards_of, source_bytes
from moe_llm.data.split import HoldOut
from moe_llm.data.token_files import TokenFileEncoder
from moe_llm.data.tokenizer import content_hash
from moe_llm.errors import TrainingFailure, UserError
from moe_llm.locks import tell
from moe_llm.progress import is_shown, progress
from moe_llm.threads import available_cores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

_VERSION, _CHAT_VERSION, _PREFERENCE_VERSION = 2, 3, 1
_LOG_SECONDS = 30.0
_WAIT_SECONDS = 0.2


class Share(NamedTuple):
    """Which of several machines this one is: `number`, from 0, of `machines`."""

    number: int
    machines: int


def cached_tokens(
    source: SourceConfig,
    field: str,
    holdout: HoldOut,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    cache_dir: str,
    num_workers: int | None = None,
    show_progress: bool = False,
    train_on: str = "all",
    parse_special_tokens: bool = False,
) -> dict[str, TokenizedText]:
    """Training and validation tokens of a source, from the cache, where they are put first if need be.

    One process of a machine builds while others that ask for the same wait. Memory stays bounded by a few batches a core. A
    build that was killed resumes, and what it then writes does not depend on that.

    Args:
        field: name of the source in the configuration.
        train_on: of chat, as `data.train_on`. parse_special_tokens: of text, likewise.
        num_workers: cores that encode; None for all. The result does not depend on it.

    Raises:
        UserError: unreadable text, or no space left; nothing of the cache entry remains then.
    """
    entry = entry_of(source, field, holdout, tokenizer, Path(cache_dir).expanduser(), train_on, parse_special_tokens)
    if not is_whole(entry.directory):
        entry.build(num_workers or available_cores(), show_progress)
    return {split: open_split(entry.directory, split) for split in SPLITS}


def settings_of(data: DataConfig) -> dict[str, Any]:
    """What a configuration says of it."""
    names = ("cache_dir", "num_workers", "train_on", "parse_special_tokens")
    return {name: getattr(data, name) for name in names}


def tokenise_share(
    source: SourceConfig,
    field: str,
    holdout: HoldOut,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    share: Share,
    cache_dir: str,
    num_workers: int | None = None,
    show_progress: bool = False,
    train_on: str = "all",
    parse_special_tokens: bool = False,
) -> tuple[int, int, Path]:
    """Make one machine's share of a source's shards, as `cached_tokens` would: (shards of the share, shards of the source,
    where they are)."""
    entry = entry_of(source, field, holdout, tokenizer, Path(cache_dir).expanduser(), train_on, parse_special_tokens)
    shards = shards_of(source, field)
    mine = range(share.number, len(shards), share.machines)
    if is_whole(entry.directory):
        return len(mine), len(shards), entry.directory
    if len(shards) == 1:
        if mine:
            entry.build(num_workers or available_cores(), show_progress)
        return len(mine), 1, entry.directory
    with building(entry.cache, entry.here):
        entry.make(shards, list(mine), num_workers or available_cores(), show_progress)
    return len(mine), len(shards), entry.unfinished


def entry_of(
    source: SourceConfig,
    field: str,
    holdout: HoldOut,
    tokenizer: "PreTrainedTokenizerFast",
    cache: Path,
    train_on: str,
    parse_special_tokens: bool,
) -> "Entry":
    """Where a source's tokens are, or will be, and what makes them."""
    states = {path: state_of(path) for path in files_here(source, field)}
    inputs = [_VERSION, fingerprint(source, field, cache), holdout.key(), content_hash(tokenizer), len(tokenizer)]
    encoder: DocumentEncoder | ChatEncoder | SideEncoder | TokenFileEncoder
    special = None
    if source.content == "preference":
        encoder = SideEncoder(tokenizer, field)
        inputs += ["preference", _PREFERENCE_VERSION, own_template(tokenizer), tokenizer.special_tokens_map]
    elif source.content == "chat":
        encoder = ChatEncoder(tokenizer, field, train_on)
        inputs += ["chat", _CHAT_VERSION, train_on, encoder.template, tokenizer.special_tokens_map]
    else:
        encoder = DocumentEncoder(tokenizer, parse_special_tokens)
        special = None if parse_special_tokens else SpecialText(tokenizer)
        inputs += ["parse_special_tokens"] if parse_special_tokens else []
        if holds_tokens(source, field):
            encoder, special = TokenFileEncoder(tokenizer, field, encoder.bos, encoder.eos, encoder.dtype), None
    kind = "stream" if source.streaming else "tokens"
    name = f"{kind}-{hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:24]}"
    return Entry(cache, name, Encoding(source, field, holdout, encoder, special, states))


class Entry(NamedTuple):
    """A source's place in the cache."""

    cache: Path
    name: str
    encoding: Encoding

    @property
    def directory(self) -> Path:
        return self.cache / self.name

    @property
    def unfinished(self) -> Path:
        return self.cache / f".{self.name}.unfinished"

    @property
    def here(self) -> str:
        """Name of the lock of this machine's processes."""
        return f"{self.name}-{hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]}"

    def build(self, workers: int, show_progress: bool) -> None:
        source, field = self.encoding.source, self.encoding.field
        with building(self.cache, self.here):
            if is_whole(self.directory, logger.debug):
                return
            shards = shards_of(source, field)
            if len(shards) == 1:
                with building(self.cache, self.name):
                    self._build_alone(shards[0], workers, show_progress)
                return
            self.make(shards, list(range(len(shards))), workers, show_progress)
            with building(self.cache, self.name):
                if not is_whole(self.directory, logger.debug):
                    _assemble(self, len(shards))

    def _build_alone(self, pieces: list[Piece], workers: int, show_progress: bool) -> None:
        if is_whole(self.directory, logger.debug):
            return
        source, field = self.encoding.source, self.encoding.field
        remove_damaged(self.directory)
        with _progress(field, source_bytes(source, field), show_progress) as advance:
            self.encoding.write(pieces, self.directory, threads=workers, advance=advance)
        if not any(read_meta(self.directory)[split]["documents"] for split in SPLITS):
            shutil.rmtree(self.directory)
            raise no_text(source, field)

    def make(self, shards: list[list[Piece]], numbers: list[int], workers: int, show_progress: bool) -> None:
        """Have the shards of some numbers there; those that are damaged are made again. Under `here`."""
        field = self.encoding.field
        with user_error_on_disk("data.cache_dir", self.cache):
            if self.directory.exists() and self.unfinished.exists():
                shutil.rmtree(self.directory)
            elif self.directory.exists():
                self.directory.rename(self.unfinished)
                (self.unfinished / "meta.json").unlink(missing_ok=True)
            self.unfinished.mkdir(parents=True, exist_ok=True)
        tasks = [
            ShardTask(k, shards[k], self.unfinished / _shard_name(k), self._lock_of(k), self.directory) for k in numbers
        ]
        total = sum(piece.size for task in tasks for piece in task.pieces) or None
        try:
            with _progress(field, total, show_progress) as advance:
                _run(self.encoding, tasks, workers, advance)
        except UserError:  # the text has to change before another attempt, and with it the name of the entry
            shutil.rmtree(self.unfinished, ignore_errors=True)
            raise

    def _lock_of(self, number: int) -> Path:
        locks = self.cache / f"locks-{self.name}"
        locks.mkdir(exist_ok=True)
        return locks / f"{_shard_name(number)}.lock"


def _shard_name(number: int) -> str:
    return f"{number:05d}"


def _run(encoding: Encoding, tasks: list[ShardTask], workers: int, advance: Callable[[int], None]) -> None:
    """Make shards by several processes or, where there is work for one alone, by this one."""
    processes = min(workers, len(tasks))
    if processes <= 1:
        _run_here(encoding, tasks, workers, advance)
        return
    todo: queue.Queue[ShardTask] = queue.Queue()
    for task in tasks:
        todo.put(task)
    pool = [_Process(encoding, workers // processes, todo) for _ in range(processes)]
    try:
        left = len(tasks)
        while left:
            tell(f"tokenising {encoding.field}")
            for process in pool:
                left -= process.collect(advance)
            time.sleep(_WAIT_SECONDS)
    finally:
        for process in pool:
            process.stop()


def _run_here(encoding: Encoding, tasks: list[ShardTask], threads: int, advance: Callable[[int], None]) -> None:
    left = list(tasks)
    while left:
        busy = []
        for task in left:
            tell(f"tokenising {encoding.field}")
            if not make_shard(encoding, task, threads, advance, logger.warning):
                busy.append(task)
        left = busy
        if left:
            time.sleep(_WAIT_SECONDS)


class _Process:
    """A worker, and the thread that keeps it busy."""

    def __init__(self, encoding: Encoding, threads: int, todo: "queue.Queue[ShardTask]"):
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moe_llm.data.shard_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
        )
        self._todo = todo
        self._answers: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._thread = threading.Thread(target=self._serve, args=(encoding, threads), daemon=True)
        self._thread.start()

    def _serve(self, encoding: Encoding, threads: int) -> None:
        try:
            self._send((encoding, threads))
            while True:
                task = self._todo.get_nowait()
                self._send(task)
                kind = ""
                while kind not in ("done", "busy"):
                    kind, content = pickle.load(self._process.stdout)  # type: ignore[arg-type]
                    self._answers.put((kind, content))
                if kind == "busy":
                    self._todo.put(task)
                    time.sleep(_WAIT_SECONDS)
        except queue.Empty:
            return
        except (OSError, EOFError, pickle.UnpicklingError):
            self._answers.put(("lost", self._process.wait()))

    def _send(self, message: Any) -> None:
        assert self._process.stdin is not None
        pickle.dump(message, self._process.stdin)
        self._process.stdin.flush()

    def collect(self, advance: Callable[[int], None]) -> int:
        """Shards that have been finished since the last call.

        Raises:
            UserError: what the worker met, or its end.
        """
        finished = 0
        while not self._answers.empty():
            kind, content = self._answers.get()
            if kind == "read":
                advance(content)
            elif kind == "damaged":
                logger.warning(content)
            elif kind == "done":
                finished += 1
            elif kind == "refused":
                raise UserError(content)
            elif kind == "failed":
                raise RuntimeError(f"a process that tokenises has failed:\n{content}")
            elif kind == "lost":
                raise TrainingFailure(
                    f"a process that tokenises has ended with {content}, as where memory is short: lower "
                    "data.num_workers; what is done is kept"
                )
        return finished

    def stop(self) -> None:
        """End the process, whatever it is at; its unfinished shard can be resumed."""
        self._process.kill()
        self._process.wait()
        self._thread.join()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()


def _assemble(entry: Entry, count: int) -> None:
    """Make a whole entry of whole shards: their documents' begins and lengths in one file each, and what they are."""
    folder, names = entry.unfinished, [_shard_name(k) for k in range(count)]
    metas = [read_meta(folder / name) for name in names]
    if not any(meta[split]["documents"] for meta in metas for split in SPLITS):
        shutil.rmtree(folder)
        raise no_text(entry.encoding.source, entry.encoding.field)
    with user_error_on_disk("data.cache_dir", folder):
        for stale in folder.glob(".*"):  # of machines that have been killed
            shutil.rmtree(stale)
        files: dict[str, dict[str, Any]] = {}
        for split in SPLITS:
            tokens = [meta[split]["tokens"] for meta in metas]
            begins = np.cumsum([0, *tokens])
            starts, sizes = _Joined(folder / f"{split}.starts.bin"), _Joined(folder / f"{split}.bytes.bin")
            starts.put(np.zeros(1, np.int64))
            for name, meta, begin in zip(names, metas, begins):
                if meta[split]["documents"]:
                    starts.put(np.fromfile(folder / name / f"{split}.starts.bin", np.int64)[1:] + begin)
                    sizes.put(np.fromfile(folder / name / f"{split}.bytes.bin", np.int64))
            files |= starts.close() | sizes.close()
        for name, meta in zip(names, metas):
            files |= {f"{name}/{file}": record for file, record in meta["files"].items()}
            content = (folder / name / "meta.json").read_bytes()
            files[f"{name}/meta.json"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        meta = {"dtype": metas[0]["dtype"], "chat": metas[0]["chat"]}
        for split in SPLITS:
            meta[split] = {key: sum(m[split][key] for m in metas) for key in ("documents", "tokens", "bytes")}
            meta[split]["seen"] = dict(sum((Counter(m[split]["seen"]) for m in metas), Counter()))
        meta["shards"] = [{"name": name} | {split: m[split] for split in SPLITS} for name, m in zip(names, metas)]
        meta["files"] = files
        put_meta(folder, meta, entry.directory)
        mark_verified(folder)
        rename_directory(folder, entry.directory)


class _Joined:
    """A file of one array, with its size and SHA-256."""

    def __init__(self, path: Path):
        self._path, self._file, self._hash = path, path.open("wb"), hashlib.sha256()

    def put(self, array: np.ndarray) -> None:
        data = array.tobytes()
        self._file.write(data)
        self._hash.update(data)

    def close(self) -> dict[str, dict[str, Any]]:
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self._file.tell()
        self._file.close()
        return {self._path.name: {"size": size, "sha256": self._hash.hexdigest()}}


@contextlib.contextmanager
def _progress(field: str, total: int | None, show: bool):
    """A function to report encoded bytes to; a bar where bars are shown, lines in a log elsewhere, if asked for."""
    if not show:
        yield lambda size: None
    elif not is_shown():
        yield _log_progress(field, total)
    else:
        with progress(f"tokenising {field}", total, in_bytes=True) as advance:
            yield advance


def _log_progress(field: str, total: int | None) -> Callable[[int], None]:
    """For a log: a line every `_LOG_SECONDS` with the share that is done, the rate and the time left."""
    begin = told = time.monotonic()
    done = 0

    def advance(size: int) -> None:
        nonlocal done, told
        done += size
        now = time.monotonic()
        if now - told < _LOG_SECONDS:
            return
        told = now
        rate = done / (now - begin)
        of, left = ("", "")
        if total:
            of, left = f" of {total / 1e6:,.0f}", f", {max(total - done, 0) / rate / 60:.0f} min left"
        logger.info("tokenising %s: %s%s MB, %.1f MB/s%s", field, f"{done / 1e6:,.0f}", of, rate / 1e6, left)

    return advance
