"""What a checkpoint says it was made from, and what a resumed run may change of it."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_llm.checkpoint.ranks import together
from moe_llm.checkpoint.resume import compare_with_checkpoint
from moe_llm.checkpoint.state import read_provenance
from moe_llm.config import Config
from moe_llm.data.loader import Data, changed_sources
from moe_llm.data.tokenizer import content_hash
from moe_llm.distributed.runtime import Runtime
from moe_llm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)


@dataclass
class Provenance:
    """tokenizer: its hash. data: `Data.fingerprint`. changes: what has been changed when the run was resumed, each with
    the step of that checkpoint."""

    tokenizer: str
    data: list[list[Any]]
    changes: list[dict[str, Any]] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return vars(self)


def provenance_of(
    config: Config, runtime: Runtime, data: Data, tokenizer: "PreTrainedTokenizerFast", source: Path | None, step: int
) -> Provenance:
    """What this run is made from, after a comparison with the other ranks and with the checkpoint that it resumes from.

    Collective. What may differ is reported and recorded.

    Raises:
        UserError: on every rank, where ranks read different data, or a resumed run has another tokenizer or, without
            `data.allow_changed`, other data.
    """
    found = Provenance(content_hash(tokenizer), [list(part) for part in data.fingerprint])
    _compare_ranks(runtime, found)
    if source is None:
        return found
    # ranks may find the directory in different states, and none may wait for one that has refused it
    found.changes, clauses = together(runtime, lambda: _compare_with(source, config, found))
    for clause in [*clauses, *(f"{name} is another stream, read from its begin" for name in data.restarted_streams)]:
        found.changes.append({"step": step, "change": clause})
        if runtime.is_main:
            logger.warning("resumed at step %d with a change: %s", step, clause)
    return found


def _compare_with(source: Path, config: Config, found: Provenance) -> tuple[list[dict[str, Any]], list[str]]:
    """What had been changed before a checkpoint was written, and one clause for each change since."""
    before = read_provenance(source)
    changed = compare_with_checkpoint(source, config)
    if before.get("tokenizer", found.tokenizer) != found.tokenizer:
        raise UserError(
            f"checkpoint {source} was trained with another tokenizer than that of this run: set tokenizer.path={source}"
        )
    sources = changed_sources(before.get("data", found.data), found.data)
    if sources and not config.data.allow_changed:
        raise UserError(
            f"checkpoint {source} was trained on other data: {sources[0]}: bring the data back, or allow it with "
            "data.allow_changed=true"
        )
    return list(before.get("changes", [])), [*changed, *sources]


def _compare_ranks(runtime: Runtime, found: Provenance) -> None:
    """One small exchange before the first step."""
    everyone = runtime.gather(found.state())
    for rank, other in enumerate(everyone):
        if other["tokenizer"] != everyone[0]["tokenizer"]:
            raise UserError(f"rank {rank} has another tokenizer than rank 0: give all ranks the same tokenizer.path")
        differing = changed_sources(everyone[0]["data"], other["data"])
        if differing:
            raise UserError(
                f"rank {rank} reads other data than rank 0: {differing[0]}: give all ranks the same files, complete and "
                "no longer written to"
            )
