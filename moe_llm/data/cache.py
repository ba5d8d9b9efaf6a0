"""Tokenised text on disk: every source is encoded once, into flat arrays that are memory-mapped.

    CACHE_DIR/tokens-KEY/{train,validation}.{tokens,starts,bytes}.bin   meta.json   {..}.targets.bin for chat

`tokens` is the concatenation of the documents, each bos + ids + eos (uint16 where ids fit, else uint32);
`starts` (documents + 1, int64) is where each begins; `bytes` (documents, int64) is the UTF-8 length of each, of chat
examples that of the assistant's turns; `targets` (uint8 for each token) is 1 where the assistant speaks.
meta.json holds the size and SHA-256 of every file; an entry that is not what was written is named and made again. Large
entries are compared once for each state of their files (verified.json), small ones each time.
KEY is a hash of all that determines the content. A large source lies in shards, each a directory as above within
tokens-KEY, beside `starts` and `bytes` of all of them (`moe_llm.data.shards`). `similar-KEY` holds documents of such an
entry in another order (`moe_llm.data.similar`). A directory that has its name is complete.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_llm.config import SourceConfig
from moe_llm.data.chat import Example, read_examples
from moe_llm.data.chat_template import ChatEncoder
from moe_llm.data.documents import DocumentEncoder, SpecialText
from moe_llm.data.files import publish_resumable, remember, user_error_on_disk
from moe_llm.data.hashes import stamp_of, state_of
from moe_llm.data.pieces import Piece
from moe_llm.data.portions import JOURNAL, Kept, Portion, append_portion, recover
from moe_llm.data.preference import Continuation, Side, SideEncoder, read_pairs
from moe_llm.data.sharded_array import ShardedArray
from moe_llm.data.sources import read_documents, read_token_documents
from moe_llm.data.split import HoldOut
from moe_llm.data.token_files import TokenFileEncoder
from moe_llm.errors import UserError
from moe_llm.locks import tell
from moe_llm.progress import progress
from moe_llm.threads import available_cores

logger = logging.getLogger(__name__)

VERIFIED = "verified.json"
COMPARED_BYTES = 1 << 30  # of an entry whose hashes are compared each time: about a second
_BATCH_BYTES = 256 * 1024
_PORTION_BYTES = 64 * 2**20  # of text: the most that a kill can cost
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class TokenizedText:
    """Documents as tokens.

    tokens_N: all of them in order; starts (documents + 1,): where each begins; sizes (documents,): UTF-8
    length of each; bytes: of all together. targets_N: of chat, uint8, 1 for the tokens that are learned. key: its name
    in the cache, which says all that determines it; None for text that is not from there. digest: SHA-256 of
    `tokens_N` and `starts` as they are stored there. seen: of chat, how many rows had which shape; of text, in how many
    documents the text of which special token stands and is no such token.
    """

    tokens_N: np.ndarray | ShardedArray
    starts: np.ndarray
    sizes: np.ndarray
    bytes: int
    targets_N: np.ndarray | ShardedArray | None = None
    key: str | None = None
    digest: str | None = None
    seen: Mapping[str, int] = field(default_factory=dict)

    @property
    def documents(self) -> int:
        return len(self.starts) - 1

    @property
    def targets(self) -> int:
        """Tokens that are predicted: all but the first of each document, or what the assistant says."""
        if self.targets_N is not None:
            found = self.targets_N
            return found.count_nonzero if isinstance(found, ShardedArray) else int(np.count_nonzero(found))
        return len(self.tokens_N) - self.documents


class _Piece(NamedTuple):
    """What is encoded at once: text, or an example; and how much it is. read: characters; size: UTF-8 bytes learned."""

    split: str
    content: str | Side
    read: int
    size: int


class Tokens(NamedTuple):
    ids: np.ndarray
    targets: np.ndarray | None


@dataclass(frozen=True)
class Encoding:
    """All that turns a source into tokens, apart from where they go; it can be sent to another process.

    special: special tokens whose text is counted where it is encoded as text. states: of the source's files as they were
    when the tokens got their name.
    """

    source: SourceConfig
    field: str
    holdout: HoldOut
    encoder: DocumentEncoder | ChatEncoder | SideEncoder | TokenFileEncoder
    special: SpecialText | None = None
    states: Mapping[Path, list[int]] = dataclasses.field(default_factory=dict)

    @property
    def chat(self) -> bool:
        """Whether its tokens have targets of their own."""
        return isinstance(self.encoder, ChatEncoder | SideEncoder)

    def write(
        self,
        pieces: Sequence[Piece],
        directory: Path,
        *,
        threads: int,
        advance: Callable[[int], None],
        owner: str = "",
    ) -> None:
        """Make a directory of tokens of some pieces of the source. Memory stays bounded by a few batches. What was killed
        resumes behind its last whole portion, and what it then writes does not depend on that.

        Args:
            advance: told of how much has been read.
            owner: of what is unfinished, where several may write at once.

        Raises:
            UserError: unreadable text, a file that has changed meanwhile, or no space left; nothing of the directory
                remains then.
        """
        read = _sides if isinstance(self.encoder, SideEncoder) else _examples if self.chat else _texts
        with publish_resumable(directory, "data.cache_dir", JOURNAL, owner) as temporary:
            self.build(read(self, pieces), temporary, directory, threads, advance)
            self._check_unchanged(pieces)

    def _check_unchanged(self, pieces: Sequence[Piece]) -> None:
        """Refuse files that were written to while they were read: their tokens would go by the name of another content."""
        read = {piece.path for piece in pieces} & self.states.keys() or self.states.keys()
        changed = [path for path in read if not path.is_file() or state_of(path) != self.states[path]]
        if changed:
            raise UserError(
                f"{self.field}: {min(changed)} has changed while it was tokenised: start again when nothing writes to it "
                "any more"
            )

    def build(
        self, pieces: Iterable["_Piece"], directory: Path, final: Path, threads: int, advance: Callable[[int], None]
    ) -> None:
        """Tokenise into a directory that is there, and will have the name `final`."""
        _build(pieces, self._encode, self._look, self.encoder.dtype, self.chat, directory, final, threads, advance)

    def pieces_of(self, text: str) -> Iterator["_Piece"]:
        """Each part of a document."""
        assert not isinstance(self.encoder, ChatEncoder | SideEncoder), "examples are no documents"
        for split, part in zip(SPLITS, self.holdout.divide(text)):
            if part:
                size = self.encoder.utf8_length(part)
                yield _Piece(split, part, size, size)

    def _encode(self, batch: list[_Piece]) -> list[Tokens]:
        content: list[Any] = [piece.content for piece in batch]
        if isinstance(self.encoder, ChatEncoder | SideEncoder):
            return [Tokens(*both) for both in self.encoder.encode(content)]
        return [Tokens(ids, None) for ids in self.encoder.encode(content)]

    def _look(self, piece: _Piece) -> Iterable[str]:
        """What is counted of a document: the shape of a row, or special tokens whose text it holds."""
        if isinstance(piece.content, Example):
            return [piece.content.shape]
        return (
            ()
            if self.special is None or isinstance(piece.content, Continuation)
            else self.special.within(piece.content)
        )


def is_whole(directory: Path, report: Callable[[str], None] = logger.warning) -> bool:
    """Whether an entry of the cache is there and is what was written; what is wrong with it is reported."""
    if not directory.is_dir():
        return False
    wrong = _what_is_wrong(directory)
    if wrong is not None:
        report(f"tokenised data {directory} is damaged: {wrong}; it is made again from its source")
    return wrong is None


def remove_damaged(directory: Path) -> None:
    """Make way for an entry to be built; under `building`."""
    if directory.exists():
        with user_error_on_disk("data.cache_dir", directory):
            shutil.rmtree(directory)


def _what_is_wrong(directory: Path) -> str | None:
    """One clause about the first file that is not what was written; None where all are."""
    try:
        meta, own = read_meta(directory), _entry_of(directory)
        if meta.get("entry", own) != own:  # a version before had no names
            return f"it is {meta['entry']} under another name"
        files = {str(n): (int(r["size"]), str(r["sha256"])) for n, r in meta["files"].items()}
        states = {name: stamp_of(directory / name) for name in files}
    except OSError as error:
        return f"{os.path.relpath(error.filename or directory, directory)} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "meta.json is no list of its files"
    for name, (size, _) in files.items():
        if states[name][0] != size:
            return f"{name} has {states[name][0]} bytes in place of {size}"
    verified = directory / VERIFIED
    large = sum(size for size, _ in files.values()) > COMPARED_BYTES
    if large and verified.is_file() and verified.read_text(encoding="utf-8") == json.dumps(states):
        return None
    nbytes = sum(size for size, _ in files.values())
    with (
        progress("comparing tokens with their checksums", nbytes, in_bytes=True) as advance,
        ThreadPoolExecutor(min(8, available_cores())) as pool,
    ):
        found = pool.map(lambda name: _digest_of(directory / name), files)
        for (name, (size, digest)), now in zip(files.items(), found):
            tell(f"comparing {directory / name} with its checksum")
            advance(size)
            if now != digest:
                pool.shutdown(wait=False, cancel_futures=True)
                return f"the content of {name} is not what was written (SHA-256)"
    if large:
        remember(verified, json.dumps(states).encode())
    return None


def _digest_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def mark_verified(directory: Path) -> None:
    """Spare a large entry that has just been written the comparison."""
    files = read_meta(directory)["files"]
    if sum(record["size"] for record in files.values()) > COMPARED_BYTES:
        states = {name: stamp_of(directory / name) for name in files}
        remember(directory / VERIFIED, json.dumps(states).encode())


def _entry_of(directory: Path) -> str:
    """What an entry of the cache, or a shard or window in one, is called: it tells one text and tokenizer from another."""
    folder = directory.parent.name.removeprefix(".").removesuffix(".unfinished")
    return f"{folder}/{directory.name}" if directory.name.isdecimal() else directory.name


def read_meta(directory: Path) -> dict[str, Any]:
    """meta.json, whose own last member is the SHA-256 of the others."""
    meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
    digest = meta.pop("sha256")
    if digest != _meta_digest(meta):
        raise ValueError("meta.json is not what was written")
    return meta


def _meta_digest(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def shard_checksums(directory: Path) -> dict[str, str]:
    """SHA-256 of each shard of an entry by its name, over the checksums of its files; of an entry of one shard, `.`."""
    meta = read_meta(directory)
    names = [shard["name"] for shard in meta.get("shards", [])]
    of: dict[str, dict[str, Any]] = {name: {} for name in names or ["."]}
    for file, found in meta["files"].items():
        shard = Path(file).parent.name or "."
        if shard in of and not file.endswith("meta.json"):  # that holds the name of the entry, and thus of all its text
            of[shard][file] = found
    return {name: _meta_digest(files) for name, files in of.items()}


def open_split(directory: Path, split: str) -> TokenizedText:
    """One split of a complete entry of the cache."""
    meta = read_meta(directory)
    part, shards = meta[split], meta.get("shards")
    folders = [""] if shards is None else [f"{shard['name']}/" for shard in shards]
    lengths = [part["tokens"]] if shards is None else [shard[split]["tokens"] for shard in shards]
    digests = [meta["files"][f"{f}{split}.{name}.bin"]["sha256"] for f in folders for name in ("tokens", "starts")]

    def array(name: str, dtype: str, length: int, folder: str = "") -> np.ndarray:
        if not length:
            return np.empty(0, dtype)  # an empty file cannot be mapped
        return np.memmap(directory / f"{folder}{split}.{name}.bin", dtype=dtype, mode="r", shape=(length,))

    def sharded(name: str, dtype: str) -> np.ndarray | ShardedArray:
        if shards is None:
            return array(name, dtype, part["tokens"])
        return ShardedArray(lengths, dtype, lambda shard: array(name, dtype, lengths[shard], folders[shard]))

    return TokenizedText(
        tokens_N=sharded("tokens", meta["dtype"]),
        starts=array("starts", "int64", part["documents"] + 1),
        sizes=array("bytes", "int64", part["documents"]),
        bytes=part["bytes"],
        targets_N=sharded("targets", "uint8") if meta.get("chat") else None,
        key=f"{directory.name}/{split}",
        digest=hashlib.sha256("".join(digests).encode()).hexdigest(),
        seen=part.get("seen", {}),
    )


class SplitWriter:
    """Appends documents of one split to its files.

    Args:
        kept: what these files hold already; None: they are new.
    """

    def __init__(self, directory: Path, split: str, chat: bool, stack: contextlib.ExitStack, kept: Kept | None = None):
        self.totals: dict[str, Any] = {"documents": 0, "tokens": 0, "bytes": 0, "seen": {}}
        self._split = split
        resumed = kept is not None and kept.last is not None
        names = split_arrays(chat)
        self._files = {
            name: stack.enter_context((directory / f"{split}.{name}.bin").open("ab" if resumed else "wb"))
            for name in names
        }
        self._parts = {name: hashlib.sha256() for name in names}
        if kept is not None and kept.last is not None:
            self.totals |= kept.last.totals[split]
            self._hashes = {name: kept.hashes[f"{split}.{name}.bin"] for name in names}
        else:
            self._hashes = {name: hashlib.sha256() for name in names}
            self._put("starts", np.int64(0).tobytes())

    def _put(self, name: str, data: bytes) -> None:
        self._files[name].write(data)
        self._hashes[name].update(data)
        self._parts[name].update(data)

    def count(self, seen: Iterable[str]) -> None:
        """Count what stands in the document that was written last."""
        for name in seen:
            self.totals["seen"][name] = self.totals["seen"].get(name, 0) + 1

    def end_portion(self) -> dict[str, tuple[int, str]]:
        """Put on the disk what has been written; of each file its size and the SHA-256 of the portion's part."""
        ended = {}
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            ended[f"{self._split}.{name}.bin"] = file.tell(), self._parts[name].hexdigest()
            self._parts[name] = hashlib.sha256()
        return ended

    def records(self) -> dict[str, dict[str, Any]]:
        """Size and SHA-256 of each file, from what has been written."""
        return {
            f"{self._split}.{name}.bin": {"size": file.tell(), "sha256": self._hashes[name].hexdigest()}
            for name, file in self._files.items()
        }

    def write(self, tokens: Tokens, size: int) -> None:
        ids, targets = tokens
        self.totals["documents"] += 1
        self.totals["tokens"] += len(ids)
        self.totals["bytes"] += size
        self._put("tokens", ids.tobytes())
        self._put("starts", np.int64(self.totals["tokens"]).tobytes())
        self._put("bytes", np.int64(size).tobytes())
        if targets is not None:
            self._put("targets", targets.tobytes())


def _build(
    pieces: Iterable[_Piece],
    encode: Callable[[list[_Piece]], list[Tokens]],
    look: Callable[[_Piece], Iterable[str]],
    dtype: np.dtype,
    chat: bool,
    directory: Path,
    final: Path,
    threads: int,
    advance: Callable[[int], None],
) -> None:
    kept = recover(directory, [f"{split}.{name}.bin" for split in SPLITS for name in split_arrays(chat)])
    done, read = (kept.last.pieces, kept.last.read) if kept.last is not None else (0, 0)
    recorded = read
    if done:
        logger.info("tokenising resumes behind %d documents that an earlier attempt has finished", done)
        advance(read)
    with contextlib.ExitStack() as stack:
        writers = {split: SplitWriter(directory, split, chat, stack, kept) for split in SPLITS}
        left = itertools.islice(pieces, done, None)
        for batch, encoded in _encode_in_threads(_batches(left), encode, threads):
            tell(f"tokenising into {directory}")
            for piece, tokens in zip(batch, encoded):
                writers[piece.split].write(tokens, piece.size)
                writers[piece.split].count(look(piece))
                advance(piece.read)
                read += piece.read
            done += len(batch)
            if read - recorded >= _PORTION_BYTES:
                totals = {split: writer.totals for split, writer in writers.items()}
                files = {name: end for writer in writers.values() for name, end in writer.end_portion().items()}
                append_portion(directory, Portion(done, read, totals, files))
                recorded = read
        write_meta(directory, final, dtype, chat, writers)


def split_arrays(chat: bool) -> list[str]:
    """Names of the arrays that a split is stored as."""
    return ["tokens", "starts", "bytes", *(["targets"] if chat else [])]


def write_meta(directory: Path, final: Path, dtype: np.dtype, chat: bool, writers: dict[str, SplitWriter]) -> None:
    """What `open_split` reads; before the writers' files are closed."""
    meta = {"dtype": dtype.name, "chat": chat} | {split: writer.totals for split, writer in writers.items()}
    meta["files"] = {name: record for writer in writers.values() for name, record in writer.records().items()}
    put_meta(directory, meta, final)


def put_meta(directory: Path, meta: dict[str, Any], final: Path) -> None:
    """Write meta.json, with the name that its entry will have and with its own SHA-256."""
    meta["entry"] = _entry_of(final)
    meta["sha256"] = _meta_digest(meta)
    (directory / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


def _texts(encoding: Encoding, pieces: Sequence[Piece]) -> Iterator[_Piece]:
    """Each part of each document."""
    read = read_token_documents if isinstance(encoding.encoder, TokenFileEncoder) else read_documents
    for text in read(encoding.source, encoding.field, pieces):
        yield from encoding.pieces_of(text)


def _examples(encoding: Encoding, pieces: Sequence[Piece]) -> Iterator[_Piece]:
    for found in read_examples(encoding.source, encoding.field, pieces):
        training, _ = encoding.holdout.divide(found.text)
        yield _Piece(SPLITS[0 if training else 1], found, len(found.text), found.answer_bytes)


def _sides(encoding: Encoding, pieces: Sequence[Piece]) -> Iterator[_Piece]:
    """The chosen and the rejected answer of each pair, one behind the other, in the same split."""
    for pair in read_pairs(encoding.source, encoding.field, pieces):
        training, _ = encoding.holdout.divide(pair.text)
        for side in pair:
            yield _Piece(SPLITS[0 if training else 1], side, len(side.text), side.answer_bytes)


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += piece.read
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_in_threads(batches: Iterable[list], encode: Callable[[list], list], workers: int):
    """(batch, its encoded documents) in order; encoding releases the interpreter lock, so threads do.

    At most two batches a worker are under way, which bounds memory.
    """
    waiting: deque[tuple[list, Future]] = deque()
    with _one_thread_per_call(), ThreadPoolExecutor(workers) as pool:
        try:
            for batch in batches:
                waiting.append((batch, pool.submit(encode, batch)))
                if len(waiting) >= 2 * workers:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


@contextlib.contextmanager
def _one_thread_per_call() -> Iterator[None]:
    """Keep `tokenizers` from threads of its own, which would ignore `data.num_workers`."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
