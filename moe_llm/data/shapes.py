"""The shapes that rows of chat have in the world, each recognised by its columns and brought to a list of turns.

{"messages": [{"role": "system", "content": "..."}, {"role": "user", ...}, {"role": "assistant", ...}]}
{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", ...}]}          ShareGPT
{"prompt": "...", "completion": "..."}        a user's turn and the assistant's; or lists of turns (TRL)
{"prompt": ..., "chosen": ..., "rejected": ...}         preferences, of which the chosen answer is learned
{"instruction": "...", "input": "...", "output": "..."}                               Alpaca

A row may have a `system` prompt beside these, and Alpaca's rows a `history` of earlier questions and answers. Lists of turns
may also be JSON text, as tables have them.
"""

import json
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
_OPTIONAL = (
    "rejected", "input", "system", "history", "tools", "weight", "train", "training", "label", "documents",
    "chat_template_kwargs", "images", "videos", "audios", "functions",
)  # fmt: skip
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


def from_table(record: Mapping[str, Any], columns: Mapping[Any, str] | None) -> dict[str, Any]:
    """A row of a file in which every value is text: numbers and truth values as these, and null for what is empty.

    Args:
        columns: `data.sources.N.columns`, by which columns may have other names.
    """
    row = dict(record)
    for name in _OPTIONAL:
        own = (columns or {}).get(name, name)
        value = row.get(own)
        if not isinstance(value, str):
            continue
        if not value.strip():
            row[own] = None
        elif name in ("train", "training", "label"):
            row[own] = {"true": True, "false": False}.get(value.strip().lower(), value)
        elif name == "weight":
            row[own] = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}.get(value.strip(), value)
    return row


def describe_shapes(counts: Mapping[str, int], held_out: int = 0) -> str:
    """One clause: how many rows are of which shape.

    Args:
        counts: by key of `SHAPES`, of all rows.
        held_out: how many of them are.
    """
    told = ", ".join(
        f"{count:,} row{'s' if count > 1 else ''} read as {SHAPES[shape][1]}" for shape, count in counts.items()
    )
    verb = "is" if held_out == 1 else "are"
    return told + (f", of which {held_out:,} {verb} held out" if held_out else "")


def turns_of(record: Mapping[str, Any], shape: str) -> tuple[Any, int]:
    """The turns of a row, not yet checked, and how many of the first ones are its prompt, which is read and not learned."""
    (turns, read), system = _turns(record, shape), record.get("system")
    begun = isinstance(turns, list) and turns and isinstance(turns[0], dict) and turns[0].get("role") == "system"
    if isinstance(turns, list) and isinstance(system, str) and system.strip() and not begun:
        return [{"role": "system", "content": system}, *turns], read + 1
    return turns, read


def _turns(record: Mapping[str, Any], shape: str) -> tuple[Any, int]:
    if shape in ("messages", "conversations"):
        given = _listed(record[shape])
        return [_from_sharegpt(turn) for turn in given] if isinstance(given, list) else given, 0
    if shape == "prompt and completion":
        prompt = _said(record["prompt"], "user")
        return [*prompt, *_said(record["completion"], "assistant")], len(prompt)
    if shape == "chosen":
        return _chosen(record)
    more = record.get("input")
    question = record["instruction"] if not more else f"{record['instruction']}\n\n{more}"
    asked = [*_earlier(_listed(record.get("history"))), *_said(question, "user")]
    return [*asked, *_said(record["output"], "assistant")], 0


def _chosen(record: Mapping[str, Any]) -> tuple[list[Any], int]:
    """The chosen conversation, and how much of it is its prompt: what stands apart, or what both sides begin with."""
    prompt, chosen = record.get("prompt"), _said(record["chosen"], "assistant")
    if not any(isinstance(turn, dict) and turn.get("role") == "user" for turn in chosen):
        before = [] if prompt is None else _said(prompt, "user")
        return [*before, *chosen], len(before)
    rejected = _listed(record.get("rejected"))
    both = zip(chosen, rejected) if isinstance(rejected, list) else ()
    return chosen, next((i for i, (one, other) in enumerate(both) if one != other), len(chosen) - 1)


def _said(value: Any, role: str) -> list[Any]:
    listed = _listed(value)
    return listed if isinstance(listed, list) else [{"role": role, "content": value}]


def _listed(value: Any) -> Any:
    """A list of turns or pairs that is given as JSON text, as that list; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return (
        found if isinstance(found, list) and found and all(isinstance(turn, dict | list) for turn in found) else value
    )


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
    if turn["from"] == "function_call" and (calls := _calls_of(turn.get("value"))):
        return {"role": "assistant", "content": "", "tool_calls": calls, **rest}
    return {"role": ROLES.get(turn["from"], turn["from"]), "content": turn.get("value"), **rest}


def _calls_of(value: Any) -> list[Any]:
    """The calls of a turn whose text is one, or a list of them, as LLaMA-Factory's rows have it; none for another text."""
    try:
        given = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return []
    calls = given if isinstance(given, list) else [given]
    whole = all(isinstance(call, dict) and "name" in call and "arguments" in call for call in calls)
    return [{"type": "function", "function": call} for call in calls] if whole else []
