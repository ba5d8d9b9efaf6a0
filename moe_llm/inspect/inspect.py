"""`moe-llm inspect`: which tokens of a text go to which experts of a checkpoint, and what each expert is worth.

The text streams by: what is held are counts, a few rows for the cost of removal, and the tokens shown on the page.
Dimensions: L layers, E experts, K experts per token, B rows, S positions, T = B * S tokens.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_llm.checkpoint.folder import check_checkpoint_directory
from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.config import SourceConfig
from moe_llm.data.documents import DocumentEncoder, SpecialText, check_rows, report_special_text
from moe_llm.data.packing import IGNORED
from moe_llm.data.sources import list_files, read_documents
from moe_llm.data.tokenizer import load_tokenizer
from moe_llm.errors import UserError
from moe_llm.families.architectures import takes_top_k
from moe_llm.inspect.counts import RoutingCounts
from moe_llm.inspect.measures import agreement, co_selection, repetition, shares, specialisation, top_tokens
from moe_llm.model.moe.routing import Routing
from moe_llm.progress import tracked

LEAST_TOKENS = 16  # of a source: fewer say nothing
_SHOWN_TOKENS = 600  # of each source, on the page


@dataclass(frozen=True)
class Row:
    """Consecutive tokens of one document. first: where in it they begin."""

    ids: np.ndarray
    source: int
    first: int


@dataclass(frozen=True)
class Settings:
    """length: tokens of a piece, longer documents are cut. max_tokens: read of each source, None for all.
    removal_rows: pieces of each source on which experts are removed, 0: none are. text_field: the text's column, of files
    with rows. parse_special_tokens: as `data.parse_special_tokens`."""

    length: int = 512
    batch_rows: int = 8
    max_tokens: int | None = None
    removal_rows: int = 4
    permutations: int = 999
    seed: int = 0
    text_field: str | None = None
    parse_special_tokens: bool = False


def inspect_checkpoint(checkpoint: str | Path, data: list[str], settings: Settings | None = None) -> dict[str, Any]:
    """The report of a checkpoint on some sources of text, one for each path or glob.

    Returns: see the keys; `shown` holds the tokens of the page with their experts.

    Raises:
        UserError: no checkpoint of a Mixtral architecture, or text that is missing, unreadable or too short.
    """
    settings = settings or Settings()
    check_checkpoint_directory(checkpoint)
    sources = _sources(data, settings.text_field)
    tokenizer = load_tokenizer(checkpoint)
    model = MoEForCausalLM.from_pretrained(checkpoint)
    if not takes_top_k(model.config):
        raise UserError(
            f"checkpoint {str(checkpoint)!r} has model.router.type={model.config.router.type}, and what is told here "
            "is of routers that give each token its top k experts: give such a checkpoint"
        )
    if torch.cuda.is_available():
        model.to("cuda")
    inspection = _Inspection(model, len(sources), settings)
    for batch in tracked(_batches(_rows(sources, tokenizer, settings, model), settings.batch_rows), "reading"):
        inspection.read(batch)
    inspection.check(data)
    return {"checkpoint": str(checkpoint), **inspection.report(data, tokenizer)}


def _sources(data: list[str], text_field: str | None) -> list[SourceConfig]:
    repeated = next((path for i, path in enumerate(data) if path in data[:i]), None)
    if repeated is not None:
        raise UserError(f"--data {repeated} is given twice: name each source once")
    column = {} if text_field is None else {"text_field": text_field}
    sources = [SourceConfig(type="files", path=path, **column) for path in data]
    for source in sources:
        list_files(source, "--data")
    return sources


def _rows(sources: list[SourceConfig], tokenizer: Any, settings: Settings, model: MoEForCausalLM) -> Iterator[Row]:
    encoder, special = DocumentEncoder(tokenizer, settings.parse_special_tokens), SpecialText(tokenizer)
    length = min(settings.length, model.config.longest_text)
    for index, source in enumerate(sources):
        left, seen, documents = settings.max_tokens, Counter[str](), 0
        for text in read_documents(source, "--data"):
            documents += 1
            seen.update(() if settings.parse_special_tokens else special.within(text))
            ids = encoder.encode([text])[0].astype(np.int64)[:left]
            check_rows(ids, tokenizer, model.config.resolved_vocab_size, "--data")
            for first in range(0, len(ids), length):
                yield Row(ids[first : first + length], index, first)
            left = None if left is None else left - len(ids)
            if left == 0:
                break
        report_special_text(f"--data {source.path}", seen, documents, "--parse-special-tokens")


def _batches(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


class _Inspection:
    """A model, and what has been counted of the rows it has read."""

    def __init__(self, model: MoEForCausalLM, sources: int, settings: Settings):
        config = model.config
        self.blocks = config.moe_layers
        self.model, self.settings = model, settings
        self.counts = RoutingCounts(
            config.num_moe_layers,
            config.num_local_experts,
            config.num_experts_per_tok,
            config.resolved_vocab_size,
            sources,
        )
        self.kept: list[Row] = []
        self.shown: list[tuple[Row, np.ndarray]] = []
        self._kept_of = [0] * sources
        self._shown_of = [0] * sources
        self.loss = np.zeros((sources, 2))

    @torch.no_grad()
    def read(self, rows: list[Row]) -> None:
        with recorded_choices(self.model) as choices:
            losses = self.row_losses(rows)
        expert_LBSK = np.stack(choices).reshape(len(choices), len(rows), -1, self.counts.top_k)
        for b, row in enumerate(rows):
            expert_LTK = expert_LBSK[:, b, : len(row.ids)]
            self.counts.add(expert_LTK, row.ids, row.source, row.first)
            self.loss[row.source] += losses[b]
            if self._kept_of[row.source] < self.settings.removal_rows and len(row.ids) > 1:
                self.kept.append(row)
                self._kept_of[row.source] += 1
            if self._shown_of[row.source] < _SHOWN_TOKENS:
                room = _SHOWN_TOKENS - self._shown_of[row.source]
                self.shown.append((Row(row.ids[:room], row.source, row.first), expert_LTK[:, :room]))
                self._shown_of[row.source] += len(row.ids)

    @torch.no_grad()
    def row_losses(self, rows: list[Row]) -> np.ndarray:
        """(rows, 2): cross-entropy summed over each row's targets, in nats, and how many there are."""
        width = max(len(row.ids) for row in rows)
        device = self.model.lm_head.weight.device
        ids_BS = torch.zeros(len(rows), width, dtype=torch.int64)
        mask_BS = torch.zeros(len(rows), width, dtype=torch.bool)
        for b, row in enumerate(rows):
            ids_BS[b, : len(row.ids)] = torch.from_numpy(row.ids)
            mask_BS[b, : len(row.ids)] = True
        labels_BS = F.pad(ids_BS[:, 1:], (0, 1)).masked_fill(~F.pad(mask_BS[:, 1:], (0, 1)), IGNORED).to(device)
        x_BSD = self.hidden_states(ids_BS.to(device), mask_BS.to(device))
        found = [self.model.lm_head(x_SD[None], label_S[None]) for x_SD, label_S in zip(x_BSD, labels_BS)]
        return np.array([[loss.item(), int(targets)] for loss, targets in found])

    def hidden_states(self, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """Of the last layer, (B, S, D): the head is applied row by row, so that each row has a loss of its own."""
        position_BS = torch.arange(ids_BS.shape[1], device=ids_BS.device).expand_as(ids_BS)
        patterns = self.model.model.attention_patterns(ids_BS, attention_mask=mask_BS)
        return self.model.model(ids_BS, position_BS, patterns, mask_BS)[1]

    def check(self, data: list[str]) -> None:
        for path, tokens in zip(data, self.counts.tokens_S):
            if tokens < LEAST_TOKENS:
                raise UserError(
                    f"--data {path} holds {tokens} tokens, too few to say anything: give at least {LEAST_TOKENS}"
                )

    def report(self, data: list[str], tokenizer: Any) -> dict[str, Any]:
        counts, settings = self.counts, self.settings

        def decode(token: int) -> str:
            text = tokenizer.convert_ids_to_tokens(token) or f"<{token}>"  # ids that fill the vocabulary up
            byte = re.fullmatch(r"<0x([0-7][0-9A-F])>", text)
            return chr(int(byte[1], 16)) if byte else text.replace("\u2581", " ")

        return {
            "layers": counts.layers,
            "blocks": list(self.blocks),  # the decoder's number of each layer that has experts
            "experts": counts.experts,
            "experts_per_token": counts.top_k,
            "sources": [
                {"name": path, "tokens": int(tokens), "loss": float(loss / max(targets, 1))}
                for path, tokens, (loss, targets) in zip(data, counts.tokens_S, self.loss)
            ],
            **shares(counts),
            "specialisation": specialisation(counts, settings.permutations, settings.seed),
            "repetition": repetition(counts),
            "co_selection": co_selection(counts),
            "agreement": agreement(counts) if counts.layers > 1 else None,
            "removal": self.removal(),
            "top_tokens": top_tokens(counts, decode),
            "shown": [
                {"source": row.source, "tokens": [decode(int(i)) for i in row.ids], "experts": expert_LTK.tolist()}
                for row, expert_LTK in self.shown
            ],
        }

    def removal(self) -> dict[str, Any] | None:
        """The loss with each expert removed, less the loss with all, on the first pieces of each source (nats a
        token); None where nothing is left to route to or no pieces were asked for."""
        if not self.kept or self.counts.experts <= self.counts.top_k:
            return None
        batches = list(_batches(self.kept, self.settings.batch_rows))

        def loss() -> float:
            total, targets = sum(self.row_losses(batch).sum(0) for batch in batches)
            return total / targets

        whole = loss()
        cost_LE = np.zeros((self.counts.layers, self.counts.experts))
        for layer, expert in tracked(list(np.ndindex(cost_LE.shape)), "removing each expert in turn"):
            with without_expert(self.model, layer, expert):
                cost_LE[layer, expert] = loss() - whole
        return {"loss": whole, "cost": cost_LE.tolist(), "tokens": int(sum(len(row.ids) - 1 for row in self.kept))}


@contextlib.contextmanager
def recorded_choices(model: MoEForCausalLM) -> Iterator[list[np.ndarray]]:
    """Meanwhile the experts that tokens choose are appended, (T, K) for each layer, the preferred one first."""
    choices: list[np.ndarray] = []

    def record(gate, inputs, routing: Routing) -> None:
        expert_N = torch.arange(gate.num_experts, device=routing.counts_E.device).repeat_interleave(routing.counts_E)
        assert routing.slot_TK is not None, "each token has its top k experts"
        order_TK = routing.weight_N[routing.slot_TK].argsort(dim=-1, descending=True, stable=True)
        choices.append(expert_N[routing.slot_TK].gather(-1, order_TK).cpu().numpy())

    handles = [gate.register_forward_hook(record) for gate in model.model.routers]
    try:
        yield choices
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def without_expert(model: MoEForCausalLM, layer: int, expert: int) -> Iterator[None]:
    """Meanwhile no token goes to an expert of the layer-th of the layers that have experts: each goes to the best of the
    others, with weights as the router makes them."""
    gate = model.model.routers[layer]
    gate.left_out = expert
    try:
        yield
    finally:
        gate.left_out = None
