"""Rows of preferences: a chosen and a rejected answer to one prompt, as messages or as text.

{"prompt": [turns], "chosen": [turns], "rejected": [turns]}     conversations; or chosen and rejected as whole ones, whose
                                                                common beginning is the prompt
{"prompt": "...", "chosen": "...", "rejected": "..."}           text, which goes on behind the prompt without a template;
                                                                without a prompt, it is what both begin with

The answers are learned from, the prompt is read. Each row becomes two documents, the chosen one first.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moe_llm.config import SourceConfig
from moe_llm.data.chat import Example, is_learned, to_example
from moe_llm.data.chat_template import ChatEncoder, own_template
from moe_llm.data.documents import DocumentEncoder
from moe_llm.data.pieces import Piece, Place
from moe_llm.data.sources import no_text, read_records
from moe_llm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PASSED = ("tools", "documents", "chat_template_kwargs", "images", "videos", "audios")
_COLUMNS = ("prompt", "chosen", "rejected", "weight", *_PASSED)
logger = logging.getLogger(__name__)


class Continuation(NamedTuple):
    """A text and what is learned of it: all behind the prompt."""

    prompt: str
    answer: str

    @property
    def text(self) -> str:
        return self.prompt + self.answer

    @property
    def plain(self) -> str:
        return self.text

    @property
    def answer_bytes(self) -> int:
        return len(self.answer.encode("utf-8"))


Side = Example | Continuation


class Pair(NamedTuple):
    chosen: Side
    rejected: Side

    @property
    def text(self) -> str:
        """What the pair is told apart by."""
        return f"{self.chosen.text}\n{self.rejected.text}"


def read_pairs(source: SourceConfig, field: str, pieces: Sequence[Piece] | None = None) -> Iterator[Pair]:
    """The pairs of a source with content preference, in order.

    Args:
        field: name of the source in the configuration, for errors.
        pieces: of the source that are read; None: all of it.

    Raises:
        UserError: a row that is broken, by file and line; no pair at all.
    """
    count = equal = 0
    for where, record in read_records(source, field, _COLUMNS, pieces):
        if not is_learned(record, f"{field}: {where}"):
            continue
        pair = _pair(record, where, field)
        if pair is None:
            continue
        if pair.chosen.text == pair.rejected.text:
            equal += 1
            continue
        count += 1
        yield pair
    if equal:
        logger.warning("%s: %d rows whose chosen and rejected answers are the same are left out", field, equal)
    if not count and pieces is None:
        raise no_text(source, field)


def _pair(record: dict[str, Any], where: Place | str, field: str) -> Pair | None:
    """A row as a pair; None where the weights of its turns leave nothing to learn."""
    origin = f"{field}: {where}"
    prompt: Any = record.get("prompt")
    sides: list[Any] = [record.get(name) for name in ("chosen", "rejected")]
    for name, side in zip(("chosen", "rejected"), sides):
        if not isinstance(side, str | list) or not side:
            raise UserError(f"{origin} has no {name} answer (text, or a list of turns): add it, or remove that row")
    if not isinstance(prompt, str | list | None):
        raise UserError(f"{origin}: prompt is no text and no list of turns: repair or remove that row")
    if isinstance(prompt, list) or any(isinstance(side, list) for side in sides):
        return _conversations(record, prompt, sides, where, field)
    if prompt is None:
        prompt = commonprefix(sides)  # noqa: RUF071 (texts, not paths)
        sides = [side[len(prompt) :] for side in sides]
    for text in (prompt, *sides):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"{origin} holds half of a surrogate pair, which is no Unicode text: repair it") from error
    return Pair(*(Continuation(prompt, side) for side in sides))


def _conversations(
    record: dict[str, Any], prompt: Any, sides: list[Any], where: Place | str, field: str
) -> Pair | None:
    turns = [_said(side, "assistant") for side in sides]
    before = [] if prompt is None else _said(prompt, "user")
    # UltraFeedback gives the prompt beside whole conversations that begin with it
    if any(isinstance(turn, dict) and turn.get("role") == "user" for turn in turns[0]):
        before = []
    passed = {name: record.get(name) for name in _PASSED}
    made = [to_example({"messages": [*before, *side], **passed}, where, field) for side in turns]
    both = [side for side in made if side is not None]
    if len(both) < 2:
        return None
    shared = len(before)
    if not before:
        messages = zip(both[0].messages, both[1].messages)
        shared = next((i for i, (left, right) in enumerate(messages) if left != right), len(both[0].messages) - 1)
        shared = min(shared, *(len(side.messages) - 1 for side in both))
    read_only = frozenset(i for i in range(shared) if both[0].messages[i]["role"] == "assistant")
    for name, side in zip(("chosen", "rejected"), both):
        if not any(message["role"] == "assistant" for message in side.messages[shared:]):
            raise UserError(
                f"{field}: {where} has no turn of the assistant in its {name} answer: repair or remove that row"
            )
    return Pair(*(replace(side, masked=side.masked | read_only) for side in both))


def _said(value: Any, role: str) -> list[Any]:
    """Turns as they are, or a text as one turn."""
    return value if isinstance(value, list) else [{"role": role, "content": value}]


class SideEncoder:
    """Answers to tokens and targets: conversations by the chat template, texts as they are. Threads may share it.

    Args:
        field: name of the source in the configuration, for errors.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", field: str):
        self._text, self._field = DocumentEncoder(tokenizer), field
        self._chat = ChatEncoder(tokenizer, field) if own_template(tokenizer) is not None else None
        self.dtype = self._text.dtype

    def encode(self, sides: list[Side]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(tokens, targets) of each, the targets uint8: 1 for those with a character of the answer, and for its end."""
        examples = [side for side in sides if isinstance(side, Example)]
        if examples and self._chat is None:
            raise UserError(
                f"{self._field} has conversations, but the tokenizer has no chat template: save one with it"
            )
        conversations = iter(self._chat.encode(examples) if self._chat is not None and examples else ())
        texts = iter(
            self._text.encode_continuations(
                [(side.prompt, side.answer) for side in sides if isinstance(side, Continuation)]
            )
        )
        return [next(texts if isinstance(side, Continuation) else conversations) for side in sides]
