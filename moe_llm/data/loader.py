"""From a configuration to batches: what is trained on, in which order, and what is held out."""

import dataclasses
import logging
import math
import queue
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from moe_llm.config import Config, SourceConfig
from moe_llm.data.augment import Augmentation
from moe_llm.data.best_fit import PackedDocuments
from moe_llm.data.blocks import TrainBlocks, ValidationBlocks
from moe_llm.data.cache import SPLITS, TokenizedText
from moe_llm.data.chat import read_examples
from moe_llm.data.chat_template import ChatEncoder
from moe_llm.data.documents import DocumentEncoder, SpecialText, check_rows, report_special_text
from moe_llm.data.examples import PackedExamples
from moe_llm.data.fill import remember_fill
from moe_llm.data.packing import Batch, PackedBlocks
from moe_llm.data.pairs import PackedPairs
from moe_llm.data.shards import cached_tokens, entry_of, settings_of
from moe_llm.data.similar import in_similar_order
from moe_llm.data.sources import check_sources, named_sources, named_validation_sources, read_documents
from moe_llm.data.split import HoldOut, find_holdout
from moe_llm.data.stream import Cursor
from moe_llm.data.streamed_blocks import StreamedBlocks, Windows
from moe_llm.data.tokenizer import end_token_ids
from moe_llm.errors import UserError
from moe_llm.threads import available_cores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)


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

    def streams(self, samples: int) -> dict[str, dict[str, Any]] | None:
        """Where the sources that stream are behind the first samples, for a checkpoint; None where none does."""
        return {str(number): state for number, state in self.train.streams(samples).items()} or None

    def resume_streams(self, streams: Mapping[str, dict[str, Any]] | None) -> None:
        """Go on from what `streams` has returned, before a loader reads; None: from the begin."""
        for number, source in enumerate(self.train.sources):
            if isinstance(source, StreamedBlocks):
                source.resume((streams or {}).get(str(number)))

    @property
    def restarted_streams(self) -> list[str]:
        """Sources that give other text than when the run was saved, and are read from their begin."""
        found = enumerate(self.train.sources)
        return [f"data.sources.{n}" for n, source in found if isinstance(source, StreamedBlocks) and source.restarted]

    def progress(self, samples: int) -> dict[str, dict[str, float]]:
        """Of each training source, by name, tokens and epochs of the first samples."""
        names = [part.name for part in self.statistics if part.split == "train"]
        return dict(zip(names, self.train.progress(samples)))


def load_data(
    config: Config,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    rank: int = 0,
    world_size: int = 1,
    show_progress: bool = True,
    streams: Mapping[str, dict[str, Any]] | None = None,
) -> Data:
    """Everything a run reads: from the cache, which is built first where it is missing.

    Every rank calls it: one rank of a host builds while the others wait. Rank 0 alone shows progress.

    Args:
        streams: `Data.streams` of the checkpoint that the run resumes from.

    Raises:
        UserError: unusable sources, or nothing left to train on or to hold out.
    """
    data = config.data
    check_sources(config)
    holdout = find_holdout(config)

    windows: dict[str, Windows] = {}

    def tokens(field: str, source: SourceConfig, divide: HoldOut) -> dict[str, TokenizedText]:
        if source.streaming:
            cache = Path(data.cache_dir).expanduser()
            entry = entry_of(source, field, divide, tokenizer, cache, data.train_on, data.parse_special_tokens)
            threads = data.num_workers or available_cores()
            windows[field] = Windows(cache, entry.name, entry.encoding, threads)
            return windows[field].open(0, Cursor()).text
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
        for _, both in texts:
            both["train"] = in_similar_order(both["train"], config.run.seed, data.cache_dir)
    parts = [(field, split, text[split]) for field, text in texts for split in SPLITS]
    if data.validation_sources:
        parts = [part for part in parts if part[1] == "train"]
        parts += [
            (field, "validation", tokens(field, source, HoldOut())["train"])
            for field, source in named_validation_sources(config)
        ]
        prints += [_fingerprint(*part) for part in parts if part[0].startswith("data.validation_sources")]

    def blocks_of(field: str, split: str, text: TokenizedText) -> PackedBlocks:
        if split == "validation" or field not in windows:
            return packed(text)
        number = int(field.rpartition(".")[2])
        return StreamedBlocks(windows[field], packed(text), packed, config.run.seed, number + 1, data.allow_changed)

    blocks = [(field, split, blocks_of(field, split, text)) for field, split, text in parts]
    if rank == 0:
        for name, split, text in parts:
            _report_turns_without_end(name, split, text, tokenizer)
            if text.targets_N is None:
                report_special_text(name, text.seen, text.documents, "data.parse_special_tokens=true")
    train = [part for _, split, part in blocks if split == "train"]
    for (field, source), part in zip(named_sources(config), train):
        _check_not_all_dropped(part, field, config)
        mixed = source.weight is not None or data.stages
        if not len(part) and (mixed or not any(map(len, train))):
            raise UserError(f"{field} has no text left to train on, all is held out: add text to it or remove it")
    held_out = [part for _, split, part in blocks if split == "validation"]
    if not any(map(len, held_out)):
        for field, split, part in blocks:
            if split == "validation":
                _check_not_all_dropped(part, field, config)
    if windows and not any(map(len, held_out)):
        raise UserError(
            f"the first 16 MiB of {', '.join(windows)} hold no document that is held out: set data.validation_sources, or "
            "raise data.validation_fraction"
        )
    names = [name for name, split, _ in blocks if split == "validation"]
    unheld = [name for name, part in zip(names, held_out) if not len(part)]
    if rank == 0 and unheld and not data.validation_sources and any(map(len, held_out)):
        logger.warning(
            "of %s nothing is held out, so that validation measures the other sources alone: raise "
            "data.validation_fraction (%g), add text or set data.validation_sources",
            ", ".join(unheld), data.validation_fraction,
        )  # fmt: skip
    validation = ValidationBlocks(held_out, config.evaluate.max_blocks, names)
    augmentations = {
        number: Augmentation(source.augment, tokenizer, field)
        for number, (field, source) in enumerate(named_sources(config))
        if source.augment.kind is not None
    }
    order = _mixed(config, train, augmentations)
    found = Data(order, validation, [_statistics(*named) for named in blocks], prints)
    found.resume_streams(streams)
    if rank == 0:
        remember_fill(config, order.fill)
    return found


def _mixed(config: Config, train: list[PackedBlocks], augmentations: Mapping[int, Augmentation]) -> TrainBlocks:
    """The training samples in their order."""
    seed, bootstrap_seed = config.run.seed, config.data.bootstrap_seed
    weights = [source.weight for source in config.data.sources if source.weight is not None]
    batch = config.train.global_batch_size
    stages = [(stage.from_step * batch, stage.weights) for stage in config.data.stages]
    if not stages:
        return TrainBlocks(train, weights or None, seed, bootstrap_seed, augmentations=augmentations)
    mixed = TrainBlocks(train, weights or None, seed, bootstrap_seed, stages)
    samples = math.ceil((config.train.max_steps or 0) * batch)
    if not samples:  # as many as it takes to read max_tokens, whose share of padding depends on how many
        assert config.train.max_tokens is not None, "one of the two is given"
        wanted = config.train.max_tokens / config.data.sequence_length
        samples = math.ceil(wanted)
        for _ in range(8):
            samples = math.ceil(wanted / mixed.fill_of(samples))
    unreached = next((n for n, (begin, _) in enumerate(stages) if begin >= samples), None)
    if unreached is not None:
        logger.warning(
            "data.stages.%d.from_step=%d is not reached: the run has %d steps",
            unreached, config.data.stages[unreached].from_step, math.ceil(samples / batch),
        )  # fmt: skip
    return TrainBlocks(train, weights or None, seed, bootstrap_seed, stages, samples, augmentations)


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
    for document_text in read_documents(source, "--data"):
        ids += encoder.encode([document_text])
        sizes.append(len(document_text.encode("utf-8")))
        seen.update(() if parse_special_tokens else special.within(document_text))
        if max_tokens is not None:
            max_tokens -= len(ids[-1])
            if max_tokens <= 0:
                break
    starts, tokens_N = np.cumsum([0] + [len(document_ids) for document_ids in ids]), np.concatenate(ids)
    text = TokenizedText(tokens_N, starts, np.array(sizes), sum(sizes), seen=seen)
    report_special_text("--data", seen, text.documents, "--parse-special-tokens")
    if rows is not None:
        check_rows(tokens_N, tokenizer, rows, "--data")
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
    sizes, tokens_N = np.array([example.answer_bytes for example in found]), np.concatenate(ids)
    text = TokenizedText(tokens_N, starts, sizes, int(sizes.sum()), np.concatenate(targets))
    if rows is not None:
        check_rows(tokens_N, tokenizer, rows, "--data")
    blocks = PackedExamples(text, sequence_length, "truncate", tokenizer.eos_token_id)
    if not len(blocks):
        raise UserError(
            f"--data: no example says anything of the assistant's within {sequence_length} tokens: give shorter ones"
        )
    return ValidationBlocks([blocks], max_blocks)
