"""The members' distributions on text, every position of a document at once.

A document's part in a block is a row of its own, so that nothing depends on how an architecture tells packed documents
apart; the contexts, and with them the losses, are those of `moe-llm evaluate`.

Shapes: R rows, T tokens, U tokens of a member, N positions with a target, V vocabulary, W a member's.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_llm.data.blocks import ValidationBlocks
from moe_llm.data.loader import load_evaluation
from moe_llm.data.packing import IGNORED, Batch
from moe_llm.ensemble.context import recent_losses
from moe_llm.ensemble.ensemble import Ensemble
from moe_llm.ensemble.kv_cache import check_length, translate
from moe_llm.ensemble.models import Model
from moe_llm.ensemble.recipe import ContextualRecipe
from moe_llm.progress import tracked

LOGIT_BYTES = 256 << 20  # of one model's fp32 logits, for as many rows as are worked on at once
_LONGEST = 4096  # tokens of a block


@dataclass(frozen=True)
class Rows:
    """Parts of documents. labels_RT: already shifted, -100 where there is none. mask_RT: False on padding."""

    ids_RT: Tensor
    labels_RT: Tensor
    mask_RT: Tensor


@dataclass(frozen=True)
class Scored:
    """targets_N, and (N, V) log-probabilities of each model over the main model's tokens, None if not wanted. context_NF:
    features of the positions, where the ensemble's weights go by some."""

    targets_N: Tensor
    log_probs: list[Any]
    context_NF: Tensor | None = None


def load_text(
    ensemble: Ensemble,
    files: list[str],
    max_blocks: int | None,
    chat: bool = False,
    text_field: str | None = None,
    parse_special_tokens: bool = False,
) -> ValidationBlocks:
    """Text in the main model's tokens, in blocks that all members can read.

    Raises:
        UserError: files that are missing, empty or unreadable.
    """
    lengths = [_LONGEST]
    for model, translator in zip(ensemble.models, ensemble.translators):
        if model.longest is not None:
            # spelt in another vocabulary a text is longer: twice the tokens are room enough
            longer = translator is not None and not translator.one_to_one
            lengths.append(max(1, model.longest // 2) if longer else model.longest)
    return load_evaluation(
        files,
        ensemble.main.tokenizer,
        sequence_length=min(lengths),
        max_blocks=max_blocks,
        chat=chat,
        text_field=text_field,
        parse_special_tokens=parse_special_tokens,
        rows=ensemble.main.rows,
    )


def score(
    ensemble: Ensemble, text: ValidationBlocks, batch_size: int, wanted: Collection[int] | None = None
) -> Iterator[Scored]:
    """Each model's distributions at every target of a text.

    Args:
        batch_size: blocks at once, or fewer where their logits would exceed `LOGIT_BYTES`.
        wanted: indices of models, the main one's among them; None: all.
    """
    limit = LOGIT_BYTES // (4 * ensemble.main.width)
    for batch in tracked(text.batches(micro_batch_size=batch_size), "reading with each member"):
        for rows in document_rows(batch, limit):
            yield score_rows(ensemble, rows, wanted)


@torch.no_grad()
def score_rows(ensemble: Ensemble, rows: Rows, wanted: Collection[int] | None = None) -> Scored:
    """The distributions at the targets of some rows."""
    if isinstance(ensemble.recipe, ContextualRecipe) and wanted is None:
        return _with_context(ensemble, ensemble.recipe, rows)
    at_RT = rows.labels_RT != IGNORED
    log_probs: list[Any] = []
    for u in range(len(ensemble.models)):
        if wanted is not None and u not in wanted:
            log_probs.append(None)
            continue
        logits_NW = _logits(ensemble, u, rows, at_RT)
        if u == 0:
            log_probs.append(logits_NW.float().log_softmax(-1))
        else:
            log_probs.append(ensemble.over_main(u, logits_NW, log_probs[0]))
    return Scored(rows.labels_RT[at_RT].to(ensemble.main.device), log_probs)


def _with_context(ensemble: Ensemble, recipe: ContextualRecipe, rows: Rows) -> Scored:
    """Distributions at the targets, and features, for which every real token is looked at."""
    wanted_M = (rows.labels_RT != IGNORED)[rows.mask_RT].to(ensemble.main.device)
    log_probs: list[Tensor] = []
    hidden_MD: Tensor | None = None
    for u in range(len(ensemble.models)):
        if u == 0 and recipe.features == "hidden":
            logits_MW, hidden_MD = _logits_and_hidden(ensemble, rows)
        else:
            logits_MW = _logits(ensemble, u, rows, rows.mask_RT)
        own = logits_MW.float().log_softmax(-1)
        log_probs.append(own if u == 0 else ensemble.over_main(u, logits_MW, log_probs[0]))
    if hidden_MD is None:
        context_MF = recent_losses(log_probs, rows.ids_RT, rows.mask_RT, recipe.tokens)
    else:
        context_MF = hidden_MD.float() * hidden_MD.float().square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()
    targets_N = rows.labels_RT[rows.mask_RT].to(ensemble.main.device)[wanted_M]
    return Scored(targets_N, [part[wanted_M] for part in log_probs], context_MF[wanted_M])


def _logits_and_hidden(ensemble: Ensemble, rows: Rows) -> tuple[Tensor, Tensor]:
    """Of the main model, at every real token: (M, W) and (M, D), the latter behind the final norm."""
    model = ensemble.main
    inputs = {"input_ids": rows.ids_RT, "attention_mask": rows.mask_RT.long()}
    tensors = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    output = model.model(**tensors, output_hidden_states=True, **_cacheless(model))
    mask_RT = rows.mask_RT.to(model.device)
    return output.logits[mask_RT], output.hidden_states[-1][mask_RT]


def _cacheless(model: Model) -> dict[str, bool]:
    return {"use_cache": False} if "use_cache" in signature(model.model.forward).parameters else {}


def last_rows(ids_RT: Tensor, mask_RT: Tensor) -> Rows:
    """Rows for what comes after each; padding, wherever it is, goes to the right."""
    parts = [ids_T[mask_T] for ids_T, mask_T in zip(ids_RT.cpu(), mask_RT.cpu())]
    return _stack(
        [(part, torch.full_like(part, IGNORED).index_fill(0, torch.tensor([len(part) - 1]), 0)) for part in parts]
    )


def document_rows(batch: Batch, limit: int) -> Iterator[Rows]:
    """A batch's documents as rows, those of like length together, at most `limit` places at once or one row."""
    found = []
    for ids, labels, documents in zip(batch.input_ids_BS, batch.labels_BS, _documents(batch)):
        ends = np.flatnonzero(np.diff(documents.numpy(), append=-2)) + 1
        for start, end in zip([0, *ends[:-1]], ends):
            if documents[start] >= 0 and (labels[start:end] != IGNORED).any():
                found.append((ids[start:end], labels[start:end]))
    found.sort(key=lambda part: -len(part[0]))
    while found:
        count = max(1, limit // len(found[0][0]))
        yield _stack(found[:count])
        found = found[count:]


def _documents(batch: Batch) -> Tensor:
    assert batch.document_ids_BS is not None, "text that is evaluated has documents"
    return batch.document_ids_BS


def _stack(parts: list[tuple[Tensor, Tensor]]) -> Rows:
    ids, labels = [part[0] for part in parts], [part[1] for part in parts]
    masks = [torch.ones_like(row, dtype=torch.bool) for row in ids]
    pad = torch.nn.utils.rnn.pad_sequence
    return Rows(pad(ids, True), pad(labels, True, IGNORED), pad(masks, True, False))


def _logits(ensemble: Ensemble, u: int, rows: Rows, at_RT: Tensor) -> Tensor:
    model = ensemble.models[u]
    read = translate(ensemble.translators[u], rows.ids_RT, rows.mask_RT)
    check_length(model, read.mask_RU)
    inputs = {"input_ids": read.ids_RU, "attention_mask": read.mask_RU.long()}
    tensors = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    logits_RUW = model.model(**tensors, **_cacheless(model)).logits
    r_N, t_N = at_RT.nonzero(as_tuple=True)
    return logits_RUW[r_N.to(model.device), read.ends_RT[r_N, t_N].to(model.device)]
