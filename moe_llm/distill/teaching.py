"""A run's teachers at work: from a batch to what the student's distributions are compared with.

Dimensions: N labelled positions of a batch, K named tokens.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from moe_llm.checkpoint.ranks import together
from moe_llm.config import Config
from moe_llm.data.blocks import TrainBlocks
from moe_llm.data.packing import Batch
from moe_llm.distill.cache import Named, TeacherCache, block_digests, name_successors, open_cache
from moe_llm.distill.teachers import Ensemble, load_ensemble
from moe_llm.distributed.runtime import Runtime
from moe_llm.ops.distillation import Distillation, Outcomes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PART_BYTES = 32 * 2**20


class Teaching(Protocol):
    def __call__(self, batch: Batch) -> dict[str, Any]:
        """What the model's forward pass takes beside a training batch."""


class OnlineTeachers:
    """Teachers that read each batch before the student does."""

    def __init__(self, config: Config, runtime: Runtime):
        self._distill, self._device = config.distill, runtime.device
        self._ensemble = together(runtime, lambda: load_ensemble(config, runtime.device))

    def __call__(self, batch: Batch) -> dict[str, Any]:
        hidden = self._ensemble.hidden(batch)

        def outcomes(start: int, stop: int) -> Outcomes:
            return Outcomes(self._ensemble.log_p(hidden, start, stop, self._device))

        return {"teacher": _distillation(self._distill, outcomes)}


class CachedTeachers:
    """What the teachers have said of the run's blocks. They are loaded where some of it is missing: by `fill`, or for a
    block that a run comes to which has gone on behind a bad batch."""

    def __init__(self, config: Config, runtime: Runtime, tokenizer: "PreTrainedTokenizerFast"):
        self._config, self._runtime = config, runtime
        self._loaded: Ensemble | None = None
        assert config.distill.cache_top_k is not None, "without it nothing is kept"
        self._top_k = config.distill.cache_top_k
        # one rank hashes the teachers, for all
        directory = together(runtime, lambda: open_cache(config, tokenizer), only=0)
        self._cache = TeacherCache(runtime.gather(directory)[0])

    def _ensemble(self) -> Ensemble:
        if self._loaded is None:
            self._loaded = load_ensemble(self._config, self._runtime.device)
        return self._loaded

    def fill(self, blocks: TrainBlocks, start: int, samples: int, say: Callable[[str], None]) -> None:
        """See to it that `samples` samples from `start` on are on disk; the ranks share what is missing. Collective."""
        runtime, k, width = self._runtime, self._top_k, self._config.train.micro_batch_size
        missing = runtime.gather(self._missing(blocks, start, samples) if runtime.is_main else None)[0]
        if not missing:
            return
        say(f"teachers read {len(missing)} blocks, of which there is nothing yet in {self._cache.directory}")
        length = blocks.rows(missing[0], 1).input_ids_BS.shape[1]
        size = max(1, _PART_BYTES // (length * (min(k, self._config.model.resolved_vocab_size) + 1) * 8))
        parts = [missing[i : i + size] for i in range(0, len(missing), size)]

        def work() -> None:
            for part in parts[runtime.rank :: runtime.world_size]:
                rows = [blocks.rows(sample, 1) for sample in part]
                batches = [_joined(rows[i : i + width]) for i in range(0, len(rows), width)]
                self._cache.add(batches, self._ensemble(), k, runtime.device)

        together(runtime, work)
        self._loaded = None  # its memory is the student's from here on
        self._cache.reopen()

    def _missing(self, blocks: TrainBlocks, start: int, samples: int) -> list[int]:
        """The samples, one for each block that is not there, in the order in which the run comes to them."""
        pairs = np.stack(blocks.locate(start, samples), axis=1)
        first = np.sort(np.unique(pairs, axis=0, return_index=True)[1]) + start
        return [sample for sample in first.tolist() if block_digests(blocks.rows(sample, 1))[0] not in self._cache]

    def __call__(self, batch: Batch) -> dict[str, Any]:
        device = batch.input_ids_BS.device
        named = [self._named(batch, row, digest) for row, digest in enumerate(block_digests(batch))]
        ids_NK = torch.from_numpy(np.concatenate([block.ids_NK for block in named]).astype(np.int64)).to(device)
        log_p_NJ = torch.from_numpy(np.concatenate([block.log_p_NJ for block in named])).to(device)

        def outcomes(start: int, stop: int) -> Outcomes:
            return Outcomes(log_p_NJ[start:stop], ids_NK[start:stop])

        return {"teacher": _distillation(self._config.distill, outcomes)}

    def _named(self, batch: Batch, row: int, digest: bytes) -> Named:
        found = self._cache.read(digest)
        if found is not None:
            return found
        return name_successors(batch.rows(row, row + 1), self._ensemble(), self._top_k, self._runtime.device)


def build_teaching(
    config: Config,
    runtime: Runtime,
    blocks: TrainBlocks,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    start: int,
    samples: int,
    say: Callable[[str], None],
) -> Teaching:
    """What a run learns from beside its text. Collective.

    Args:
        start, samples: where in the data it goes on, and how far it will come.
        say: told on the main rank, in a sentence, what takes time.

    Raises:
        UserError: a teacher that cannot be loaded, another vocabulary, or no space for what it says.
    """
    if not config.distill.teachers or samples <= 0:
        return lambda batch: {}
    if config.distill.cache_top_k is None:
        return OnlineTeachers(config, runtime)
    teaching = CachedTeachers(config, runtime, tokenizer)
    silent = not runtime.is_main or config.logging.console == "off"
    teaching.fill(blocks, start, samples, (lambda sentence: None) if silent else say)
    return teaching


def _distillation(distill: Any, outcomes: Callable[[int, int], Outcomes]) -> Distillation:
    return Distillation(outcomes, distill.divergence, distill.temperature, distill.alpha)


def _joined(rows: list[Batch]) -> Batch:
    names = ("input_ids_BS", "labels_BS", "position_ids_BS", "document_ids_BS", "attention_mask_BS")
    values = {name: [getattr(row, name) for row in rows] for name in names}
    whole: dict[str, Any] = {name: None if p[0] is None else torch.cat(p) for name, p in values.items()}
    joined = Batch(**whole)
    known = [row.runs_B for row in rows if row.runs_B is not None]
    return replace(joined, runs_B=sum(known, ())) if len(known) == len(rows) else joined
