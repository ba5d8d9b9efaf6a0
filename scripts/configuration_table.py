"""The tables of docs/configuration.md, from the configuration's own schema; run, it writes all generated pages.

Run it after a change to moe_llm/config or moe_llm/cli; a test says when that was forgotten.
"""

import json
from pathlib import Path
from typing import Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from moe_llm.config import Config
from moe_llm.config.base import fields_by_key
from moe_llm.config.routers import ROUTER_SETTINGS, RouterSettings

REFERENCE = Path(__file__).parents[1] / "docs/configuration.md"
START, END = "<!-- configuration: start -->\n", "<!-- configuration: end -->\n"


def tables() -> str:
    """A markdown table for each section of the configuration."""
    parts = []
    for name, field in Config.model_fields.items():
        rows = _lines(_rows(name, field.annotation))
        parts.append("\n".join([f"**{name}**: {_summary(field.annotation)}", "", _HEAD, *rows, ""]))
        parts += _routers() if name == "model" else []
    return "\n".join(parts)


_HEAD = "| key | default | what it is |\n|---|---|---|"


def _rows(path: str, section: type[BaseModel]):
    for name, field in fields_by_key(section).items():
        key = f"{path}.{name}"
        inner = [t for t in (field.annotation, *get_args(field.annotation)) if _is_section(t)]
        if field.annotation in inner:
            yield from _rows(key, field.annotation)
            continue
        choices = " \\| ".join(f"`{choice}`" for choice in _choices(field.annotation))
        text = (field.description or "").replace("|", "\\|")
        yield key, _default(field), f"{choices}; {text}" if choices else text
        if inner and name in ("sources", "teachers", "callbacks"):
            yield from _rows(f"{key}.N", inner[0])


def _routers() -> list[str]:
    """A table for each type of router: what it has beside the settings of all."""
    common, parts = set(RouterSettings.model_fields), []
    for kind, settings in ROUTER_SETTINGS.items():
        own = {
            key
            for key, field in settings.model_fields.items()
            if key not in common or (field.default != RouterSettings.model_fields[key].default and key != "type")
        }
        rows = [row for row in _rows("model.router", settings) if row[0].removeprefix("model.router.") in own]
        parts.append(
            "\n".join(
                [
                    f"**model.router**, `type: {kind}`: {_summary(settings)}",
                    "",
                    *([_HEAD, *_lines(rows), ""] if rows else []),
                ]
            )
        )
    return parts


def _lines(rows) -> list[str]:
    return [f"| `{key}` | {default} | {text} |" for key, default, text in rows]


def _default(field) -> str:
    if field.default is PydanticUndefined:
        return "required"
    return f"`{json.dumps(field.default).replace('|', chr(92) + '|')}`"


def _choices(annotation) -> tuple:
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _is_section(annotation) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _summary(section: type[BaseModel]) -> str:
    text = " ".join(section.__doc__.split())
    return text[0].lower() + text[1:]


def updated(reference: str) -> str:
    """Its text with the tables as they should be."""
    before, _, rest = reference.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{tables()}\n{END}{after}"


if __name__ == "__main__":
    import reference

    reference.write()
