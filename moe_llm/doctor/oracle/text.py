"""Blocks of text as they should be, re-derived from the raw text by the tokenizer alone.

A document is bos + its text's tokens + eos (a tokenizer that has no bos, or puts none, begins documents with eos). Blocks hold documents
one after the other; a block's last tokens may be padding. A position's target is the token after it in its own document,
so a document's last token has none. Where documents are isolated, positions count from 0 in each piece of a document
that a block holds, and each piece has an index of its own.
Dimensions: B blocks, S positions.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

IGNORED = -100


def documents(files: Sequence[Path], tokenizer: Any) -> list[np.ndarray]:
    """The documents of JSON-lines files with a `text` in each row, as tokens.

    Args:
        tokenizer: transformers' fast tokenizer. Text that looks like a special token is encoded as the text it is.
    """
    end = tokenizer.eos_token_id
    begin = tokenizer.bos_token_id
    settings = Path(tokenizer.name_or_path) / "tokenizer_config.json"
    said = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    if begin is None or said.get("add_bos_token") is False:
        begin = end
    texts = [json.loads(line)["text"] for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    encoded = [tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) for text in texts]
    return [np.array([begin, *ids, end], np.int32) for ids in encoded]


@dataclass
class Judged:
    """wrong: sentences, in order. times: for each token of all documents, how often it was a target, as far as its place
    is certain; unsure: targets of pieces of text that occur more than once."""

    wrong: list[str] = field(default_factory=list)
    times: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    unsure: int = 0


class Text:
    """All documents of some sources, in which pieces of blocks are looked up."""

    def __init__(self, of_documents: Sequence[np.ndarray]):
        self.documents = list(of_documents)
        self.tokens = np.concatenate(self.documents) if self.documents else np.zeros(0, np.int32)
        self.ends = np.cumsum([len(document) for document in self.documents])
        self._bytes = self.tokens.tobytes()
        self.begin, self.end = (int(self.documents[0][i]) for i in (0, -1)) if self.documents else (-1, -1)

    def judge(self, batch: Any, isolated: bool, rests_behind: bool = False) -> Judged:
        """Whether each block of a batch is what it should be, but for which pieces of text it holds.

        Args:
            batch: input_ids_BS, labels_BS, position_ids_BS, document_ids_BS (None where documents are not isolated)
                and attention_mask_BS.
            rests_behind: the rest of a document may stand behind others (best-fit packing), not at a block's begin alone.
        """
        judged = Judged(times=np.zeros(len(self.tokens), np.int64))
        for row in range(len(batch.input_ids_BS)):
            block = {
                name: None if (value := getattr(batch, f"{name}_BS")) is None else value[row].numpy()
                for name in ("input_ids", "labels", "position_ids", "document_ids", "attention_mask")
            }
            reason = self._judge_block(block, isolated, rests_behind, judged)
            if reason:
                judged.wrong.append(f"block {row}: {reason}")
        return judged

    def _judge_block(self, block: dict[str, Any], isolated: bool, rests_behind: bool, judged: Judged) -> str:
        real, labels = block["attention_mask"], block["labels"]
        count = int(real.sum())
        if not real[:count].all():
            return "padding stands before text"
        if (labels[count:] != IGNORED).any():
            return "padding has targets"
        if not isolated and (block["position_ids"] != np.arange(len(real))).any():
            return "positions do not count from 0 to the end, though documents are not isolated"
        if not isolated and block["document_ids"] is not None:
            return "documents are marked off from each other, though they are not isolated"
        if isolated and block["document_ids"] is None:
            return "documents are not marked off from each other"
        pieces = self._pieces(block["input_ids"][:count])
        if isolated:
            expected = np.repeat(np.arange(len(pieces)), [stop - start for start, stop in pieces])
            if len(Counter(zip(expected.tolist(), block["document_ids"][:count].tolist()))) != len(pieces):
                return "a document's border is not where its text ends"
            if len({int(block["document_ids"][start]) for start, _ in pieces}) != len(pieces):
                return "two documents are marked as one"
        if not rests_behind and any(block["input_ids"][start] != self.begin for start, _ in pieces[1:]):
            return "a document does not begin with the token that documents begin with"
        for start, stop in pieces:
            if isolated and (block["position_ids"][start:stop] != np.arange(stop - start)).any():
                return f"positions do not count from 0 in the document at position {start}"
            if reason := self._judge_piece(block["input_ids"][start:stop], labels[start:stop], judged):
                return f"{reason}, at position {start}"
        return ""

    def _pieces(self, ids: np.ndarray) -> list[tuple[int, int]]:
        """(begin, end) of each document's piece: only the tokens that documents end with say where."""
        starts = [0]
        for at in np.flatnonzero(ids == self.end):
            at = int(at)
            is_begin = self.begin == self.end and at in starts and not (at + 1 < len(ids) and ids[at + 1] == self.end)
            if not is_begin and at + 1 < len(ids):
                starts.append(at + 1)
        return list(zip(starts, [*starts[1:], len(ids)]))

    def _judge_piece(self, ids: np.ndarray, labels: np.ndarray, judged: Judged) -> str:
        places = self._find(ids)
        if not places:
            return "its tokens are in no document"
        if (labels[:-1] != ids[1:]).any():
            return "targets are not the next tokens"
        last = {self._next(place + len(ids) - 1) for place in places}
        if int(labels[-1]) not in last:
            return f"the last target of a document's piece is {int(labels[-1])}, where {sorted(last)[0]} follows"
        predicted = labels != IGNORED
        if len(places) > 1:
            judged.unsure += int(predicted.sum())
        else:
            judged.times[places[0] + 1 + np.flatnonzero(predicted)] += 1
        return ""

    def _find(self, ids: np.ndarray) -> list[int]:
        """Where these tokens stand within one document."""
        wanted, at, places = ids.astype(np.int32).tobytes(), -1, []
        while (at := self._bytes.find(wanted, at + 1)) >= 0:
            place = at // 4
            document = int(np.searchsorted(self.ends, place, side="right"))
            if at % 4 == 0 and place + len(ids) <= self.ends[document]:
                places.append(place)
        return places

    def _next(self, place: int) -> int:
        """The token after one, or IGNORED at a document's end."""
        return IGNORED if place + 1 in self.ends else int(self.tokens[place + 1])

    def once(self, judged: Judged) -> list[str]:
        """Whether each document is either left out or has each of its tokens but the first as a target, once.

        Args:
            judged: of all blocks of an epoch.
        """
        wrong, lost = [], 0
        for number, (document, end) in enumerate(zip(self.documents, self.ends)):
            times = judged.times[end - len(document) + 1 : end]
            if (times > 1).any():
                wrong.append(f"document {number}: {int((times > 1).sum())} of its tokens are targets more than once")
            elif times.any():
                lost += int((times == 0).sum())
        if lost > judged.unsure:
            wrong.append(f"{lost - judged.unsure} tokens of documents that are read are never targets")
        return wrong
