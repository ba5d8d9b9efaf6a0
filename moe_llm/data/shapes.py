"""The shapes that rows of chat have in the world, each recognised by its columns and brought to a list of turns.

{"messages": [{"role": "system", "content": "..."}, {"role": "user", ...}, {"role": "assistant", ...}]}
{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", ...}]}          ShareGPT
{"prompt": "...", "completion": "..."}        a user's turn and the assistant's; or lists of turns (TRL)
{"prompt": ..., "chosen": ..., "rejected": ...}         preferences, of which the chosen answer is learned
{"instruction": "...", "input": "...", "output": "..."}                               Alpaca

A row may have a `system` prompt beside these, and Alpaca's rows a `history` of earlier questions and answers.
"""

from collections.abc import Mapping
from typing import Any

from moe_llm.errors import UserError

# By precedence: the columns that a shape needs, and its name for users.
SHAPES: dict[str, tuple[frozenset[str], str]] = {
    "messages": (frozenset({"messages"}), "lists of messages"),
    "conversations": (frozenset({"conversations"}), "ShareGPT's conversations"),
    "prompt and completion": (frozenset({"prompt", "completion"}), "prompt and completion"),
    "chosen": (frozenset({"chosen"}), "preferences, of which the chosen answer is learned"),
    "instruction and output": (frozenset({"instruction", "output"}), "Alpaca's instruction and output"),
}
# Columns that a row need not have.
_OPTIONAL = ("rejected", "input", "system", "history", "tools", "weight", "train", "training", "label")
COLUMNS = (*dict.fromkeys(name for needed, _ in SHAPES.values() for name in sorted(needed)), *_OPTIONAL)
TURN_FIELDS = ("role", "content")
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "model": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "developer": "developer",
}  # fmt: skip


def wanted_columns(columns: Mapping[Any, str] | None) -> tuple[str, ...]:
    """Columns of a file that are read."""
    return (*COLUMNS, *(own for name, own in (columns or {}).items() if name not in TURN_FIELDS))


def renamed(record: dict[str, Any], columns: Mapping[Any, str] | None, origin: object, field: str) -> dict[str, Any]:
    """A row under this package's names.

    Args:
        columns: `data.sources.N.columns`. A column that it names is read under that name alone.

    Raises:
        UserError: the row lacks a column that it needs and that is named.
    """
    if not columns:
        return record
    of_rows = {name: own for name, own in columns.items() if name not in TURN_FIELDS}
    for name, own in of_rows.items():
        if own not in record and name not in _OPTIONAL:
            raise UserError(
                f"{origin} has no column {own!r}, which {field}.columns.{name} names: it has "
                f"{', '.join(map(str, record)) or 'none'}, choose one of them"
            )
    row = {name: value for name, value in record.items() if name not in of_rows and name not in of_rows.values()}
    row |= {name: record[own] for name, own in of_rows.items() if own in record}
    of_turns = {own: name for name, own in columns.items() if name in TURN_FIELDS}
    if of_turns:
        for name in ("messages", "conversations", "prompt", "completion", "chosen"):
            if isinstance(row.get(name), list):
                row[name] = [_renamed_turn(turn, of_turns) for turn in row[name]]
    return row


def _renamed_turn(turn: Any, names: Mapping[str, str]) -> Any:
    if not isinstance(turn, dict):
        return turn
    named = {names.get(key, key): value for key, value in turn.items()}
    role = named.get("role")
    return named | ({"role": ROLES.get(role, role)} if isinstance(role, str) else {})


def shape_of(record: Mapping[str, Any]) -> str | None:
    """What kind of row it is, a key of `SHAPES`, by the columns that are not null; None for others."""
    given = {name for name, value in record.items() if value is not None}
    return next((shape for shape, (needed, _) in SHAPES.items() if needed <= given), None)


def describe_shapes(counts: Mapping[str, int]) -> str:
    """One clause: how many rows are of which shape.

    Args:
        counts: by key of `SHAPES`.
    """
    return ", ".join(f"{count:,} rows read as {SHAPES[shape][1]}" for shape, count in counts.items())


def turns_of(record: Mapping[str, Any], shape: str) -> Any:
    """The turns of a row, not yet checked."""
    turns, system = _turns(record, shape), record.get("system")
    begun = isinstance(turns, list) and turns and isinstance(turns[0], dict) and turns[0].get("role") == "system"
    if isinstance(turns, list) and isinstance(system, str) and system.strip() and not begun:
        return [{"role": "system", "content": system}, *turns]
    return turns


def _turns(record: Mapping[str, Any], shape: str) -> Any:
    if shape in ("messages", "conversations"):
        given = record[shape]
        return [_from_sharegpt(turn) for turn in given] if isinstance(given, list) else given
    if shape == "prompt and completion":
        return [*_said(record["prompt"], "user"), *_said(record["completion"], "assistant")]
    if shape == "chosen":
        prompt = record.get("prompt")
        chosen = _said(record["chosen"], "assistant")
        begun = any(isinstance(turn, dict) and turn.get("role") == "user" for turn in chosen)
        return chosen if prompt is None or begun else [*_said(prompt, "user"), *chosen]
    more = record.get("input")
    question = record["instruction"] if not more else f"{record['instruction']}\n\n{more}"
    return [*_earlier(record.get("history")), *_said(question, "user"), *_said(record["output"], "assistant")]


def _said(value: Any, role: str) -> list[Any]:
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _earlier(history: Any) -> list[Any]:
    """Alpaca's `history`: pairs of a question and its answer."""
    if not isinstance(history, list):
        return []
    return [
        {"role": role, "content": text}
        for pair in history
        if isinstance(pair, list | tuple)
        for role, text in zip(("user", "assistant"), pair)
    ]


def _from_sharegpt(turn: Any) -> Any:
    if not isinstance(turn, dict) or not isinstance(turn.get("from"), str) or "role" in turn:
        return turn
    rest = {name: value for name, value in turn.items() if name not in ("from", "value")}
    return {"role": ROLES.get(turn["from"], turn["from"]), "content": turn.get("value"), **rest}
