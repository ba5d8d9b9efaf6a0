"""Rows of chat, checked and reported by file and line; `shapes.py` says which shapes they may have.

A turn may have `tool_calls`, `reasoning_content`, `name` and `tool_call_id`, a row `tools`: chat templates get them as they
are. `weight: 0` or `train: false`, of a turn or of a row, keeps it from being learned.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from moe_llm.config import SourceConfig
from moe_llm.data.pieces import Piece, Place
from moe_llm.data.shapes import renamed, shape_of, turns_of, wanted_columns
from moe_llm.data.sources import read_records
from moe_llm.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
# Fields of a turn that templates may write, besides role and content.
_PASSED = ("tool_calls", "reasoning_content", "reasoning", "thinking", "name", "tool_call_id")
Message = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """A conversation.

    messages: role and content of each turn, and what templates may write besides (`tool_calls`, `reasoning_content`,
    `name`). where: file and line, for errors. text: the turns as JSON, always the same for the same turns; examples are
    told apart by it. tools: those that the assistant may call. masked: turns of the assistant that are not learned.
    shape: of its row, a key of `shapes.SHAPES`.
    """

    messages: list[Message]
    where: Place | str
    text: str
    tools: list[Any] | None = None
    masked: frozenset[int] = frozenset()
    shape: str = "messages"

    @property
    def plain(self) -> str:
        """What is said, without roles."""
        return "\n".join(message["content"] or "" for message in self.messages)

    def learned(self, last_only: bool = False) -> list[int]:
        """The turns of the assistant that are learned, or the last of them."""
        turns = [i for i, m in enumerate(self.messages) if m["role"] == "assistant" and i not in self.masked]
        return turns[-1:] if last_only else turns

    @property
    def answer_bytes(self) -> int:
        """UTF-8 length of the assistant's turns that are learned."""
        return sum(len((self.messages[turn]["content"] or "").encode("utf-8")) for turn in self.learned())


def example(
    messages: list[Message],
    where: Place | str,
    tools: list[Any] | None = None,
    masked: frozenset[int] = frozenset(),
    shape: str = "messages",
) -> Example:
    content: Any = messages if tools is None else [messages, tools]
    text = json.dumps(content, ensure_ascii=False, sort_keys=True, default=str)
    return Example(messages, where, text, tools, masked, shape)


def read_examples(source: SourceConfig, field: str, pieces: Sequence[Piece] | None = None) -> Iterator[Example]:
    """The examples of a source with content chat, in order.

    Args:
        field: name of the source in the configuration, for errors.
        pieces: those that are read; None: all.

    Raises:
        UserError: a row that is broken, by file and line; no row at all.
    """
    count = 0
    for where, record in read_records(source, field, wanted_columns(source.columns), pieces):
        count += 1
        found = to_example(renamed(record, source.columns, _Origin(field, where), field), where, field)
        if found is not None:
            yield found
    if not count and pieces is None:
        raise UserError(f"{field}: {source.path} holds no rows: name files that hold some")


class _Origin(NamedTuple):
    """Where a row or a turn stands, for errors; it is written out only then, because a line's number may have to be
    counted."""

    field: str
    where: Place | str
    turn: int | None = None

    def __str__(self) -> str:
        return f"{self.field}: {self.where}" + ("" if self.turn is None else f": turn {self.turn}")

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)


def to_example(record: dict[str, Any], where: Place | str, field: str) -> Example | None:
    """A row as an example; None where its weight is 0.

    Raises:
        UserError: the row is broken, by file and line.
    """
    origin, shape = _Origin(field, where), shape_of(record)
    if shape is None:
        raise UserError(
            f"{origin} has neither messages nor prompt and completion, but "
            f"{', '.join(name for name, value in record.items() if value is not None) or 'nothing'}: "
            f"say which is which in {field}.columns, or set {field}.content=text"
        )
    turns = turns_of(record, shape)
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{origin}: messages is {_short(turns)}: give it a list of turns, each with role and content")
    messages = [_message(turn, number, origin) for number, turn in enumerate(turns, start=1)]
    masked = frozenset(i for i, turn in enumerate(turns) if not is_learned(turn, origin._replace(turn=i + 1)))
    assistants = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not assistants:
        raise UserError(f"{origin} has no turn of the assistant, so there is nothing to learn: remove that row")
    unwanted = shape == "prompt and completion" and record.get("label") is False  # TRL's unpaired preferences
    if unwanted or not is_learned(record, origin) or masked.issuperset(assistants):
        return None
    tools = record.get("tools")
    if isinstance(tools, str):
        tools = _parsed_tools(tools, origin)
    if tools is not None and not isinstance(tools, list):
        raise UserError(f"{origin}: tools is {_short(tools)}: give it a list of tools")
    return example(messages, where, tools or None, masked & frozenset(assistants), shape)


def _parsed_tools(text: str, origin: _Origin) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter where it is nested too deeply
        raise UserError(f"{origin}: tools is {_short(text)}, which is no JSON: give it a list of tools") from error


def is_learned(given: dict[str, Any], where: object) -> bool:
    """By `weight` (0 or 1) and `train`, of a row or of a turn."""
    weight, train = given.get("weight"), given.get("train", given.get("training"))
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise UserError(f"{where} has the weight {_short(weight)}: use 1 to learn it and 0 not to, or remove it")
    if train is not None and not isinstance(train, bool):
        raise UserError(f"{where} has train={_short(train)}: use true to learn it and false not to, or remove it")
    return weight != 0 and train is not False


def _message(turn: Any, number: int, origin: _Origin) -> Message:
    passed = {name: turn[name] for name in _PASSED if turn.get(name) is not None} if isinstance(turn, dict) else {}
    calls = passed.get("tool_calls") or None
    if not isinstance(turn, dict) or "role" not in turn or ("content" not in turn and calls is None):
        raise UserError(f"{origin}: turn {number} is {_short(turn)}: give it role and content")
    role, content = turn["role"], turn.get("content")
    if role not in ROLES:
        raise UserError(f"{origin}: turn {number} has the role {_short(role)}: use one of {', '.join(ROLES)}")
    if isinstance(content, list):
        content = _joined(content, number, origin)
    if content is None and calls is not None:
        content = ""
    if not isinstance(content, str):
        raise UserError(f"{origin}: turn {number} has the content {_short(content)}: give it text, or remove that row")
    if role == "assistant" and not content.strip() and calls is None:
        raise UserError(f"{origin}: turn {number}, the assistant's, is empty: give it text, or remove that row")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{origin}: turn {number} holds half of a surrogate pair at character {error.start}, which is no Unicode "
            "text: repair or remove that row"
        ) from error
    return {"role": role, "content": content, **_without_nulls(passed)}


def _joined(parts: list[Any], number: int, origin: _Origin) -> str:
    """Content in parts, all of them text, as one text."""
    texts = [part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None for part in parts]
    other = [part for part in parts if isinstance(part, dict) and part.get("type", "text") != "text"]
    if other or not all(isinstance(text, str) for text in texts):
        raise UserError(
            f"{origin}: turn {number} has the content {_short(parts)}, of which not all is text: remove that row"
        )
    return "".join(str(text) for text in texts)


def _without_nulls(value: Any) -> Any:
    """Columnar files give every row every field of a structure; those that a row lacks are null."""
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
