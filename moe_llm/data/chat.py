"""Rows of chat, checked and reported by file and line; `shapes.py` says which shapes they may have.

A turn may have `tool_calls`, `reasoning_content`, `name`, `tool_call_id` and fields of its own, a row `tools`, `documents`
and `chat_template_kwargs`: chat templates get them as they are. `weight: 0`, `train: false` or a turn's `loss: false` keeps
a turn or a row from being learned; so does a place in the prompt of a row of prompt and completion.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from moe_llm.config import SourceConfig
from moe_llm.data.pieces import Piece, Place
from moe_llm.data.shapes import TURN_FIELDS, renamed, shape_of, turns_of, wanted_columns
from moe_llm.data.sources import read_records
from moe_llm.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
# Fields of a turn that templates are known to write, besides role and content.
PASSED = ("tool_calls", "reasoning_content", "reasoning", "thinking", "name", "tool_call_id")
# Those that say what is learned, and no template gets.
_MARKS = ("weight", "train", "training", "loss")
_REFUSED = {
    "function_call": "give its call as tool_calls",
    "train_detail": "mark whole turns with train",
    "training_detail": "mark whole turns with train",
}
_OF_PICTURES = ("images", "videos", "audios")
_ANY_ANSWER = "an answer"
# Arguments of apply_chat_template that a row cannot set.
_RESERVED = (
    "conversation", "conversations", "messages", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "return_dict", "return_assistant_tokens_mask",
)  # fmt: skip
Message = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """A conversation.

    messages: role and content of each turn, and what templates may write besides (`tool_calls`, `reasoning_content`,
    `name`). where: file and line, for errors. text: the turns as JSON, always the same for the same turns; examples are
    told apart by it. tools: those that the assistant may call. masked: turns of the assistant that are not learned.
    shape: of its row, a key of `shapes.SHAPES`. options: what else the template gets: `documents`, and what the row's
    `chat_template_kwargs` say.
    """

    messages: list[Message]
    where: Place | str
    text: str
    tools: list[Any] | None = None
    masked: frozenset[int] = frozenset()
    shape: str = "messages"
    options: Mapping[str, Any] = field(default_factory=dict)

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
    options: Mapping[str, Any] | None = None,
) -> Example:
    known = [{name: value for name, value in m.items() if name in ("role", "content", *PASSED)} for m in messages]
    content: Any = known if tools is None else [known, tools]
    if options:
        content = [known, tools, dict(options)]
    return Example(messages, where, _as_text(content), tools, masked, shape, options or {})


def _as_text(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, sort_keys=True, default=str)


def read_examples(source: SourceConfig, field: str, pieces: Sequence[Piece] | None = None) -> Iterator[Example]:
    """The examples of a source with content chat, in order.

    Args:
        field: name of the source in the configuration, for errors.
        pieces: those that are read; None: all.

    Raises:
        UserError: a row that is broken, by file and line; no row at all.
    """
    count, unseen = 0, {own for name, own in (source.columns or {}).items() if name not in TURN_FIELDS}
    for where, record in read_records(source, field, wanted_columns(source.columns), pieces):
        count += 1
        unseen -= record.keys()
        found = to_example(renamed(record, source.columns, _Origin(field, where), field), where, field)
        if found is not None:
            yield found
    if not count and pieces is None:
        raise UserError(f"{field}: {source.path} holds no rows: name files that hold some")
    if unseen and pieces is None:
        name = next(name for name, own in (source.columns or {}).items() if own in unseen)
        raise UserError(
            f"{field}.columns.{name} names the column {(source.columns or {})[name]!r}, which no row of {source.path} has: "
            "correct or remove it"
        )


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
            + (
                "call its columns so, or leave --chat out"
                if field.startswith("--")
                else f"say which is which in {field}.columns, or set {field}.content=text"
            )
        )
    turns, read = turns_of(record, shape)
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{origin}: messages is {_short(turns)}: give it a list of turns, each with role and content")
    if record.get("functions"):
        raise UserError(f"{origin} has functions, which no template writes here: give them as tools")
    for name in _OF_PICTURES:
        if record.get(name):
            raise UserError(f"{origin} has {name}, and text alone is learned from here: remove that row")
    messages = [_message(turn, number, origin) for number, turn in enumerate(turns, start=1)]
    masked = frozenset(i for i, turn in enumerate(turns) if not is_learned(turn, origin._replace(turn=i + 1), _MARKS))
    assistants = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    answers = [i for i in assistants if i >= read]
    if not answers:
        raise UserError(
            f"{origin} has no turn of the assistant{' behind its prompt' * bool(assistants)}, so there is nothing to learn: "
            "remove that row"
        )
    unwanted = shape == "prompt and completion" and record.get("label") is False  # TRL's unpaired preferences
    if unwanted or not is_learned(record, origin) or masked.issuperset(answers):
        return None
    tools = _listed_or_null(record.get("tools"), "tools", origin)
    found = example(messages, where, tools, (masked | {*range(read)}) & {*assistants}, shape, _options(record, origin))
    _check_unicode(found, origin)
    return found


class Question(NamedTuple):
    """What a row asks, without its last answer, and that answer; empty where it has none. single: a prompt as text alone."""

    example: Example
    answer: str
    single: bool


_LACKING = {"prompt": "completion", "instruction": "output"}


def to_question(record: dict[str, Any], where: Place | str, field: str) -> Question | None:
    """A row of any shape, with an answer or without, as what is asked; None for a row of another kind.

    Raises:
        UserError: the row is broken, by file and line.
    """
    shape, answered = shape_of(record), True
    if shape is None:
        lacking = [answer for asked, answer in _LACKING.items() if record.get(asked) is not None]
        if not lacking:
            return None
        record, answered = record | {lacking[0]: _ANY_ANSWER}, False
        shape = shape_of(record)
    assert shape is not None, "the row has its answer now"
    turns, _ = turns_of(record, shape)
    if not isinstance(turns, list) or not turns:
        raise UserError(
            f"{field}: {where}: messages is {_short(turns)}: give it a list of turns, each with role and content"
        )
    last = turns[-1] if isinstance(turns[-1], dict) else {}
    if last.get("role") != "assistant" or not (last.get("content") or last.get("tool_calls")):
        asked = turns[:-1] if last.get("role") == "assistant" else turns  # an empty answer is one to be given
        turns, answered = [*asked, {"role": "assistant", "content": _ANY_ANSWER}], False
    turns = [{k: v for k, v in t.items() if k not in _MARKS} if isinstance(t, dict) else t for t in turns]
    passed = {name: record.get(name) for name in ("tools", "documents", "chat_template_kwargs", *_OF_PICTURES)}
    found = to_example({"messages": turns, **passed}, where, field)
    assert found is not None, "its turns are not masked"
    single = isinstance(record.get("prompt"), str) and len(turns) == 2 and shape == "prompt and completion"
    answer = found.messages[-1]["content"] if answered else ""
    return Question(replace(found, messages=found.messages[:-1]), answer, single)


def _listed_or_null(value: Any, name: str, origin: _Origin) -> list[Any] | None:
    """Tools or documents, which may be JSON text."""
    if isinstance(value, str):
        value = _parsed(value, name, origin)
    if value is not None and not isinstance(value, list):
        raise UserError(f"{origin}: {name} is {_short(value)}: give it a list of {name}")
    return value or None


def _options(record: dict[str, Any], origin: _Origin) -> Mapping[str, Any]:
    """What else the template gets, as `apply_chat_template` has it."""
    given = record.get("chat_template_kwargs")
    if isinstance(given, str):
        given = _parsed(given, "chat_template_kwargs", origin)
    if given is not None and not isinstance(given, dict):
        raise UserError(f"{origin}: chat_template_kwargs is {_short(given)}: give it an object")
    given = _without_nulls(given or {})
    if reserved := [name for name in given if name in _RESERVED]:
        raise UserError(f"{origin}: chat_template_kwargs sets {reserved[0]}, which a row cannot: remove it")
    documents = _listed_or_null(record.get("documents"), "documents", origin)
    return given if documents is None else given | {"documents": documents}


def _check_unicode(found: Example, origin: _Origin) -> None:
    """Refuse halves of surrogate pairs, wherever they stand."""
    if half_of_a_pair(found.text) is None:
        return
    for number, message in enumerate(found.messages, start=1):
        content = half_of_a_pair(message["content"])
        if content is not None or half_of_a_pair(_as_text(message)) is not None:
            at = f" at character {content}" if content is not None else ""
            raise UserError(
                f"{origin}: turn {number} holds half of a surrogate pair{at}, which is no Unicode text: repair or remove "
                "that row"
            )
    raise UserError(f"{origin} holds half of a surrogate pair, which is no Unicode text: repair or remove that row")


def half_of_a_pair(text: str) -> int | None:
    """Where a text holds half of a surrogate pair, which no encoding has; None for Unicode text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None


def _parsed(text: str, name: str, origin: _Origin) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter where it is nested too deeply
        raise UserError(f"{origin}: {name} is {_short(text)}, which is no JSON: repair or remove that row") from error


def is_learned(given: dict[str, Any], where: object, marks: Sequence[str] = ("weight", "train", "training")) -> bool:
    """By `weight` (0 or 1), `train` and its other names, of a row or of a turn."""
    for mark in marks:
        value = given.get(mark)
        if value is None:
            continue
        if mark == "weight" and (isinstance(value, bool) or value not in (0, 1)):
            raise UserError(f"{where} has the weight {_short(value)}: use 1 to learn it and 0 not to, or remove it")
        if mark != "weight" and not isinstance(value, bool):
            raise UserError(f"{where} has {mark}={_short(value)}: use true to learn it and false not to, or remove it")
    return not any(given.get(mark) in (0, False) for mark in marks if given.get(mark) is not None)


def _message(turn: Any, number: int, origin: _Origin) -> Message:
    given = turn.items() if isinstance(turn, dict) else ()
    passed = {name: value for name, value in given if value is not None and name not in ("role", "content", *_MARKS)}
    calls = _calls(passed.get("tool_calls"), number, origin)
    if isinstance(passed.get("tool_calls"), str):
        passed["tool_calls"] = calls or []
    for name, remedy in _REFUSED.items():
        if name in passed:
            raise UserError(f"{origin}: turn {number} has {name}, which no template writes here: {remedy}")
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
    learned = is_learned(turn, origin._replace(turn=number), _MARKS)
    if role == "assistant" and learned and not content.strip() and calls is None:
        raise UserError(f"{origin}: turn {number}, the assistant's, is empty: give it text, or remove that row")
    return {"role": role, "content": content, **_without_nulls(passed)}


def _calls(calls: Any, number: int, origin: _Origin) -> list[Any] | None:
    """The tool calls of a turn, which may be JSON text; None where there are none."""
    if isinstance(calls, str):
        calls = _parsed(calls, "tool_calls", origin._replace(turn=number)) if calls.strip() else None
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise UserError(
            f"{origin}: turn {number} has the tool_calls {_short(calls)}: give it a list of objects, each with a function"
        )
    return calls or None


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
