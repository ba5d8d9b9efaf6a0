"""Rows of chat: `messages` with roles, or `prompt` and `completion`, checked and told by file and line.

{"messages": [{"role": "system", "content": "..."}, {"role": "user", ...}, {"role": "assistant", ...}]}
{"prompt": "...", "completion": "..."}        the same as a user's turn and the assistant's
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moe_llm.config import SourceConfig
from moe_llm.data.sources import read_documents, read_records
from moe_llm.errors import UserError

ROLES = ("system", "user", "assistant")
_COLUMNS = ("messages", "prompt", "completion")
Message = dict[str, str]


@dataclass(frozen=True)
class Example:
    """A conversation.

    messages: role and content of each turn. where: file and line, for errors. text: the turns as JSON, always the
    same for the same turns; examples are told apart by it.
    """

    messages: list[Message]
    where: str
    text: str

    @property
    def plain(self) -> str:
        """What is said, without roles."""
        return "\n".join(message["content"] for message in self.messages)

    @property
    def answer_bytes(self) -> int:
        """UTF-8 length of the assistant's turns."""
        return sum(len(m["content"].encode("utf-8")) for m in self.messages if m["role"] == "assistant")


def example(messages: list[Message], where: str) -> Example:
    return Example(messages, where, json.dumps(messages, ensure_ascii=False, sort_keys=True))


def read_examples(source: SourceConfig, field: str) -> Iterator[Example]:
    """The examples of a source with content chat, in order.

    Args:
        field: name of the source in the configuration, for errors.

    Raises:
        UserError: a row that is broken, by file and line; no row at all.
    """
    count = 0
    for where, record in read_records(source, field, _COLUMNS):
        count += 1
        yield example(_messages(record, where, field), where)
    if not count:
        raise UserError(f"{field}: {source.path} holds no rows: name files that hold some")


def read_texts(source: SourceConfig, field: str) -> Iterator[str]:
    """What a source's documents are told apart by: text itself, or an example's `text`."""
    if source.content == "text":
        return read_documents(source, field)
    return (found.text for found in read_examples(source, field))


def _messages(record: dict[str, Any], where: str, field: str) -> list[Message]:
    origin = f"{field}: {where}"
    turns = record.get("messages")
    if turns is None:
        if not {"prompt", "completion"} <= record.keys():
            raise UserError(
                f"{origin} has neither messages nor prompt and completion, but {', '.join(record) or 'nothing'}: "
                f"rename its columns, or set {field}.content=text"
            )
        pair = (("user", record["prompt"]), ("assistant", record["completion"]))
        turns = [{"role": role, "content": content} for role, content in pair]
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{origin}: messages is {_short(turns)}: give it a list of turns, each with role and content")
    messages = [_message(turn, number, origin) for number, turn in enumerate(turns, start=1)]
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{origin} has no turn of the assistant, so there is nothing to learn: remove that row")
    return messages


def _message(turn: Any, number: int, origin: str) -> Message:
    if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
        raise UserError(f"{origin}: turn {number} is {_short(turn)}: give it role and content")
    role, content = turn["role"], turn["content"]
    if role not in ROLES:
        raise UserError(f"{origin}: turn {number} has the role {_short(role)}: use one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise UserError(f"{origin}: turn {number} has the content {_short(content)}: give it text, or remove that row")
    if role == "assistant" and not content.strip():
        raise UserError(f"{origin}: turn {number}, the assistant's, is empty: give it text, or remove that row")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{origin}: turn {number} holds half of a surrogate pair at character {error.start}, which is no Unicode "
            "text: repair or remove that row"
        ) from error
    return {"role": role, "content": content}


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
