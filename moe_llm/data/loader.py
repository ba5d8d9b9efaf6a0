"""From a configuration to batches: what is trained on, in which order, and what is held out."""

import dataclasses
import logging
import math
import queue
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from moe_llm.config import Config, SourceConfig
from moe_llm.data.best_fit import PackedDocuments
from moe_llm.data.cache import SPLITS, TokenizedText
from moe_llm.data.chat import read_examples
from moe_llm.data.chat_template import ChatEncoder
from moe_llm.data.documents import DocumentEncoder, SpecialText, check_rows
from moe_llm.data.examples import PackedExamples
from moe_llm.data.order import Mixture, drawn, shuffled
from moe_llm.data.packing import Batch, PackedBlocks, as_batch
from moe_llm.data.pairs import PackedPairs
from moe_llm.data.shards import cached_tokens, settings_of
from moe_llm.data.similar import in_similar_order
from moe_llm.data.sources import check_sources, named_sources, named_validation_sources, read_documents
from moe_llm.data.split import HoldOut, find_holdout
from moe_llm.data.tokenizer import end_token_ids
from moe_llm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)


class TrainBlocks:
    """The endless sequence of training samples; sample g is a pure function of (seed, g).

    Without weights an epoch is every block of every source once, shuffled together. With weights, sources
    are mixed by them, each going through its own blocks epoch after epoch. With a bootstrap seed an epoch is as many
    draws from those blocks with replacement, the same ones in every epoch (Breiman 1996, "Bagging Predictors").
    """

    def __init__(
        self,
        sources: Sequence[PackedBlocks],
        weights: Sequence[float] | None,
        seed: int,
        bootstrap_seed: int | None = None,
    ):
        self.sources, self.seed, self.bootstrap_seed = list(sources), seed, bootstrap_seed
        self._ends = np.cumsum([len(source) for source in sources])
        self._mixture = None if weights is None or len(sources) == 1 else Mixture(list(weights), seed)

    def __len__(self) -> int:
        """Blocks of all sources; without weights, the samples of an epoch."""
        return int(self._ends[-1])

    @property
    def fill(self) -> float:
        """Share of the samples' places that hold a token and no padding, over an epoch or by the weights."""
        length = self.sources[0].sequence_length
        shares = [len(source) for source in self.sources] if self._mixture is None else self._mixture.quota.tolist()
        filled = sum(share * s.places / max(len(s) * length, 1) for share, s in zip(shares, self.sources))
        return filled / sum(shares)

    def locate(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, block of that source) of samples start .. start + count, (count,) int64 both."""
        position = np.arange(start, start + count, dtype=np.int64)
        if self._mixture is None:
            flat = self._drawn(shuffled(position, len(self), self.seed, 0), len(self), 0)
            source = np.searchsorted(self._ends, flat, side="right")
            return source, flat - (self._ends[source] - [len(self.sources[s]) for s in source])
        source, nth = self._mixture(position)
        block = np.empty_like(nth)
        for s in np.unique(source):
            length, stream = len(self.sources[s]), int(s) + 1
            block[source == s] = self._drawn(shuffled(nth[source == s], length, self.seed, stream), length, stream)
        return source, block

    def _drawn(self, index: np.ndarray, length: int, stream: int) -> np.ndarray:
        """What stands in each block's place."""
        return index if self.bootstrap_seed is None else drawn(index, length, self.bootstrap_seed, stream)

    def rows(self, start: int, count: int) -> Batch:
        """Samples start .. start + count as one batch."""
        arrays = self.sources[0].empty_arrays(count)
        source_B, block_B = self.locate(start, count)
        for row, (source, block) in enumerate(zip(source_B, block_B)):
            self.sources[source].write(int(block), row, arrays)
        return replace(as_batch(arrays), sources_B=torch.from_numpy(np.array(source_B, np.int64)))


class TrainLoader:
    """Micro-batches of one rank, a list for each optimizer step, read ahead by a thread.

    The step that begins at position p takes samples p .. p + G. Micro-batch j of rank r has its rows
    p + j*W*m + r*m .. + m, so the ranks' j-th micro-batches together are those of one process that takes
    W*m at once. The position alone, which counts samples of all ranks, says where to go on, also with
    another number of ranks.

    Args:
        position: samples consumed so far.
        rank, world_size: which of how many shares of a step's blocks is read.
        part: which of how many parts of each block (`Batch.part`).
        prefetch: steps read ahead; 0 reads in the caller's thread.
    """

    def __init__(
        self,
        blocks: TrainBlocks,
        *,
        position: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        part: tuple[int, int] = (0, 1),
        prefetch: int = 2,
    ):
        assert 0 <= rank < world_size
        # Users hear of it from Config.accumulation_steps.
        assert global_batch_size % (micro_batch_size * world_size) == 0
        self.blocks, self.position = blocks, position
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.rank, self.world_size, self.part = rank, world_size, part
        self._pin = torch.cuda.is_available()
        self._stop = threading.Event()
        self._queue: queue.Queue = queue.Queue(max(prefetch, 1))
        self._thread = None
        if prefetch:
            self._thread = threading.Thread(target=self._read_ahead, args=(position,), daemon=True)
            self._thread.start()

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        """The next step's micro-batches; `position` then counts that step."""
        if self._stop.is_set():
            raise StopIteration
        step = self._step(self.position) if self._thread is None else self._queue.get()
        if isinstance(step, BaseException):
            self.close()
            raise step
        self.position += self.global_batch_size
        return step

    def close(self) -> None:
        """End the thread; nothing can be read afterwards."""
        self._stop.set()
        if self._thread is not None:
            while self._thread.is_alive():
                self._drain()
                self._thread.join(0.01)
            self._drain()

    def __enter__(self) -> "TrainLoader":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _drain(self) -> None:
        while not self._queue.empty():
            self._queue.get_nowait()

    def _step(self, position: int) -> list[Batch]:
        m = self.micro_batch_size
        stride = m * self.world_size
        begins = range(position + self.rank * m, position + self.global_batch_size, stride)
        batches = [self.blocks.rows(begin, m).take_part(*self.part) for begin in begins]
        return [batch.pin_memory() for batch in batches] if self._pin else batches

    def _read_ahead(self, position: int) -> None:
        try:
            while not self._stop.is_set():
                self._queue.put(self._step(position))
                position += self.global_batch_size
        except Exception as error:  # noqa: BLE001 - handed to the caller, who raises it
            self._queue.put(error)


class ValidationBlocks:
    """Held-out blocks.

    Args:
        max_blocks: as many, evenly spread over all; None for all.
    """

    def __init__(self, sources: Sequence[PackedBlocks], max_blocks: int | None = None):
        self.sources = list(sources)
        every = [(s, b) for s, source in enumerate(self.sources) for b in range(len(source))]
        count = len(every) if max_blocks is None else min(max_blocks, len(every))
        self.blocks = [every[i * len(every) // count] for i in range(count)]
        if count == len(every):
            held = sum(source.bytes for source in self.sources)
            targets = sum(source.targets for source in self.sources)
        else:
            held = sum(self.sources[s].bytes_of(b) for s, b in self.blocks)
            targets = sum(self._rows([block]).num_targets for block in self.blocks)
        assert targets, "a document has at least one target"
        self.num_targets = targets
        self.bytes_per_token = held / targets

    def __len__(self) -> int:
        return len(self.blocks)

    def bits_per_byte(self, loss: float) -> float:
        """A mean loss in nats a target token, as bits for each UTF-8 byte of held-out text."""
        return loss / math.log(2) / self.bytes_per_token

    def _rows(self, blocks: list[tuple[int, int]], rows: int | None = None) -> Batch:
        arrays = self.sources[0].empty_arrays(rows or len(blocks))
        for row, (source, block) in enumerate(blocks):
            self.sources[source].write(block, row, arrays)
        return as_batch(arrays)

    def batches(
        self, *, micro_batch_size: int, rank: int = 0, world_size: int = 1, part: tuple[int, int] = (0, 1)
    ) -> Sequence[Batch]:
        """This rank's batches: as many on every rank and of the same shape; some rows may be all padding."""
        return _ValidationBatches(self, micro_batch_size, rank, world_size, part)


class _ValidationBatches(Sequence):
    """Batches made when asked for: a large held-out split is not held in memory."""

    def __init__(
        self, blocks: ValidationBlocks, micro_batch_size: int, rank: int, world_size: int, part: tuple[int, int]
    ):
        self._source, self._m, self._part = blocks, micro_batch_size, part
        self._mine = blocks.blocks[rank::world_size]
        self._count = -(-len(blocks) // (micro_batch_size * world_size))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Batch:
        if not -self._count <= index < self._count:
            raise IndexError(index)
        index %= self._count
        rows = self._source._rows(self._mine[index * self._m : (index + 1) * self._m], self._m)
        return rows.take_part(*self._part)


def validation_batches(
    validation: ValidationBlocks, *, micro_batch_size: int, rank: int = 0, world_size: int = 1
) -> Sequence[Batch]:
    """`ValidationBlocks.batches`, as a function."""
    return validation.batches(micro_batch_size=micro_batch_size, rank=rank, world_size=world_size)


@dataclass(frozen=True)
class SourceStatistics:
    """One source's share of a split. tokens: with bos and eos; blocks: of the sequence length; dropped, truncated:
    chat examples longer than a block that are left out, or whose end is; cut: documents that are in several blocks;
    padding: share of the blocks' places without a token; shapes: of chat, how many rows are of which shape."""

    name: str
    split: str
    documents: int
    tokens: int
    bytes: int
    blocks: int
    dropped: int = 0
    truncated: int = 0
    cut: int = 0
    padding: float = 0.0
    shapes: Mapping[str, int] = dataclasses.field(default_factory=dict)


class SourceFingerprint(NamedTuple):
    """What a run read of a source's split: equal for equal tokens in equal order, wherever their files lie."""

    source: str
    split: str
    documents: int
    tokens: int
    sha256: str

    def __str__(self) -> str:
        return f"{self.documents} documents, {self.tokens} tokens, {self.sha256[:12]}"


def changed_sources(before: Sequence[Sequence], now: Sequence[Sequence]) -> list[str]:
    """One clause for each source and split that differs between two fingerprints."""
    old, new = ({(f[0], f[1]): SourceFingerprint(*f) for f in prints} for prints in (before, now))
    return [
        f"{source} ({split}) was {old.get((source, split), 'nothing')} and is {new.get((source, split), 'nothing')}"
        for source, split in [*new, *(key for key in old if key not in new)]
        if old.get((source, split)) != new.get((source, split))
    ]


@dataclass(frozen=True)
class Data:
    """A run's data."""

    train: TrainBlocks
    validation: ValidationBlocks
    statistics: list[SourceStatistics]
    fingerprint: Sequence[SourceFingerprint] = ()


def load_data(
    config: Config,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    rank: int = 0,
    world_size: int = 1,
    show_progress: bool = True,
) -> Data:
    """Everything a run reads: from the cache, which is built first where it is missing.

    Every rank calls it: one rank of a host builds while the others wait. Rank 0 alone shows progress.

    Raises:
        UserError: unusable sources, or nothing left to train on or to hold out.
    """
    data = config.data
    check_sources(config)
    holdout = find_holdout(config)

    def tokens(field: str, source: SourceConfig, divide: HoldOut) -> dict[str, TokenizedText]:
        shown = show_progress and rank == 0
        return cached_tokens(source, field, divide, tokenizer, **settings_of(data), show_progress=shown)

    def packed(text: TokenizedText) -> PackedBlocks:
        if data.has_preference:
            return PackedPairs(text, data.sequence_length, data.overlong, tokenizer.eos_token_id)
        if text.targets_N is not None:
            return PackedExamples(text, data.sequence_length, data.overlong, tokenizer.eos_token_id)
        if data.packing == "best_fit":
            return PackedDocuments(text, data.sequence_length, tokenizer.eos_token_id)
        return PackedBlocks(text, data.sequence_length, data.isolate_documents, tokenizer.eos_token_id)

    texts = [(field, tokens(field, source, holdout)) for field, source in named_sources(config)]
    prints = [_fingerprint(field, split, text[split]) for field, text in texts for split in SPLITS]
    if data.order == "similar":
        for _, text in texts:
            text["train"] = in_similar_order(text["train"], config.run.seed, data.cache_dir)
    parts = [(field, split, text[split]) for field, text in texts for split in SPLITS]
    if data.validation_sources:
        parts = [part for part in parts if part[1] == "train"]
        parts += [
            (field, "validation", tokens(field, source, HoldOut())["train"])
            for field, source in named_validation_sources(config)
        ]
        prints += [_fingerprint(*part) for part in parts if part[0].startswith("data.validation_sources")]
    blocks = [(field, split, packed(text)) for field, split, text in parts]
    if rank == 0:
        for name, split, text in parts:
            _report_turns_without_end(name, split, text, tokenizer)
            _report_special_text(name, text, "data.parse_special_tokens=true")
    train = [part for _, split, part in blocks if split == "train"]
    for (field, source), part in zip(named_sources(config), train):
        _check_not_all_dropped(part, field, config)
        if not len(part) and (source.weight is not None or not any(map(len, train))):
            raise UserError(f"{field} has no text left to train on, all is held out: add text to it or remove it")
    held_out = [part for _, split, part in blocks if split == "validation"]
    if not any(map(len, held_out)):
        for field, split, part in blocks:
            if split == "validation":
                _check_not_all_dropped(part, field, config)
    validation = ValidationBlocks(held_out, config.evaluate.max_blocks)
    weights = [source.weight for source in data.sources]
    order = TrainBlocks(train, None if None in weights else weights, config.run.seed, data.bootstrap_seed)
    return Data(order, validation, [_statistics(*named) for named in blocks], prints)


def _report_turns_without_end(
    name: str, split: str, text: TokenizedText, tokenizer: "PreTrainedTokenizerFast", looked_at: int = 100
) -> None:
    """Warn where no learned turn of the first examples has a token at which the model stops: it would never learn to."""
    if text.targets_N is None or split != "train" or not text.documents:
        return
    end = int(text.starts[min(looked_at, text.documents)])
    learned = np.asarray(text.tokens_N[:end])[np.asarray(text.targets_N[:end], bool)]
    ends = end_token_ids(tokenizer)
    if not np.isin(learned, ends).any():
        logger.warning(
            "%s: no learned turn holds an end token of the model (eos_token_id=%s), so that it will not learn to stop: "
            "use a chat template that ends the assistant's turn with one of them, or name the token that ends it in "
            "tokenizer.end_tokens",
            name,
            ends,
        )


def _report_special_text(name: str, text: TokenizedText, remedy: str) -> None:
    """Warn of text in which special tokens are spelt out: most often a chat template has written it."""
    if text.targets_N is not None or not text.seen:
        return
    token, count = max(text.seen.items(), key=lambda item: item[1])
    logger.warning(
        "%s: %d of %d documents hold the text of the special token %r, which is read as ordinary text, not as that token: "
        "set %s if a chat template has written it, or use rows of chat",
        name, count, text.documents, token, remedy,
    )  # fmt: skip


def _fingerprint(name: str, split: str, text: TokenizedText) -> SourceFingerprint:
    assert text.digest is not None, "text from the cache has a digest"
    return SourceFingerprint(name, split, text.documents, len(text.tokens_N), text.digest)


def _statistics(field: str, split: str, part: PackedBlocks) -> SourceStatistics:
    text = part.text
    left_out = {"dropped": part.dropped, "truncated": part.truncated} if isinstance(part, PackedExamples) else {}
    return SourceStatistics(
        field,
        split,
        text.documents,
        len(text.tokens_N),
        text.bytes,
        len(part),
        cut=part.cut_documents,
        padding=part.padding,
        shapes=text.seen if text.targets_N is not None else {},
        **left_out,
    )


def _check_not_all_dropped(part: PackedBlocks, field: str, config: Config) -> None:
    if isinstance(part, PackedExamples) and part.dropped and not part.kept:
        data = config.data
        remedy = "" if data.overlong == "truncate" else " or set data.overlong=truncate"
        raise UserError(
            f"data.sequence_length={data.sequence_length}: of {field} all {part.dropped} examples that are "
            f"{'learned from' if field.startswith('data.sources') else 'held out'} are longer, so none is left: "
            f"raise it{remedy}"
        )


def load_evaluation(
    paths: str | list[str],
    tokenizer: "PreTrainedTokenizerFast",
    *,
    sequence_length: int,
    isolate_documents: bool = True,
    text_field: str | None = None,
    document: str = "file",
    max_blocks: int | None = None,
    max_tokens: int | None = None,
    chat: bool = False,
    parse_special_tokens: bool = False,
    rows: int | None = None,
) -> ValidationBlocks:
    """Any files as held-out blocks, tokenised in memory, with exact byte counts.

    Args:
        paths: a path, a glob or a list of them: text, jsonl or parquet, as in `data.sources`.
        text_field: the column that holds the text, of files with rows; None: `text`.
        max_tokens: no document is read after so many tokens of text; None: all are.
        chat: they hold examples, of which what the assistant says counts; over-long ones are cut.
        parse_special_tokens: of text, as `data.parse_special_tokens`.
        rows: of the model's embedding; None: as many as there are tokens.

    Raises:
        UserError: files that are missing, empty or unreadable, or a token beyond the model's rows.
    """
    if chat:
        return _chat_evaluation(paths, tokenizer, sequence_length, max_blocks, rows)
    column = {} if text_field is None else {"text_field": text_field}
    source = SourceConfig(type="files", path=paths, document=document, **column)
    encoder, special = DocumentEncoder(tokenizer, parse_special_tokens), SpecialText(tokenizer)
    ids, sizes = [], []
    seen: Counter[str] = Counter()
    for text in read_documents(source, "--data"):
        ids += encoder.encode([text])
        sizes.append(len(text.encode("utf-8")))
        seen.update(() if parse_special_tokens else special.within(text))
        if max_tokens is not None:
            max_tokens -= len(ids[-1])
            if max_tokens <= 0:
                break
    starts = np.cumsum([0] + [len(document_ids) for document_ids in ids])
    text = TokenizedText(np.concatenate(ids), starts, np.array(sizes), sum(sizes), seen=seen)
    _report_special_text("--data", text, "--parse-special-tokens")
    if rows is not None:
        check_rows(text.tokens_N, tokenizer, rows, "--data")
    return ValidationBlocks(
        [PackedBlocks(text, sequence_length, isolate_documents, tokenizer.eos_token_id)], max_blocks
    )


def _chat_evaluation(
    paths: str | list[str],
    tokenizer: "PreTrainedTokenizerFast",
    sequence_length: int,
    max_blocks: int | None,
    rows: int | None,
) -> ValidationBlocks:
    encoder = ChatEncoder(tokenizer, "--data")
    found = list(read_examples(SourceConfig(type="files", path=paths, content="chat"), "--data"))
    ids, targets = zip(*encoder.encode(found))
    starts = np.cumsum([0] + [len(example_ids) for example_ids in ids])
    sizes = np.array([example.answer_bytes for example in found])
    text = TokenizedText(np.concatenate(ids), starts, sizes, int(sizes.sum()), np.concatenate(targets))
    if rows is not None:
        check_rows(text.tokens_N, tokenizer, rows, "--data")
    blocks = PackedExamples(text, sequence_length, "truncate", tokenizer.eos_token_id)
    if not len(blocks):
        raise UserError(
            f"--data: no example says anything of the assistant's within {sequence_length} tokens: give shorter ones"
        )
    return ValidationBlocks([blocks], max_blocks)
