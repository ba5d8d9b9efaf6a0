"""From a YAML file and dotted overrides to a validated `Config`: defaults < file < overrides."""

import difflib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from moe_llm.config.schema import Config
from moe_llm.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `off` and `no` are text, `3e-4` is a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag not in ("tag:yaml.org,2002:bool",
                                                                      "tag:yaml.org,2002:float",
                                                                      "tag:yaml.org,2002:timestamp")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"),
                              list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, origin: str) -> Any:
    """The value of a YAML text; `origin` names it in the error."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{origin}{where} is not valid YAML: {problem}") from error


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a run's configuration.

    Args:
        path: a YAML file.
        overrides: `section.key=value`; the value is YAML, list items go by index
            (`data.sources.0.path=x.txt`).

    Raises:
        UserError: one sentence that names field, value and remedy.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"configuration file {str(path)!r} does not exist: give the path of a YAML file"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"configuration file {str(path)!r} cannot be read: {error}") from error
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise UserError(
            f"configuration file {str(path)!r} holds no sections: it needs at least data and train"
        )
    for override in overrides:
        apply_override(raw, override)
    return validate(raw)


def apply_override(raw: dict, override: str) -> None:
    """Set one dotted key of a nested dictionary in place."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} has no value: write section.key=value")
    *parents, last = key.split(".")
    node: Any = raw
    for depth, name in enumerate(parents):
        where = ".".join(parents[: depth + 1])
        if isinstance(node, list):
            node = node[_index(node, name, where)]
        elif isinstance(node, dict):
            if node.get(name) is None:
                node[name] = {}
            node = node[name]
        if not isinstance(node, (dict, list)):
            raise UserError(f"override {override!r}: {where} is the value {node!r} and has no fields")
    parsed = parse_yaml(value, f"the value of override {override!r}")
    if isinstance(node, list):
        node[_index(node, last, key)] = parsed
    else:
        node[last] = parsed


def _index(items: list, name: str, where: str) -> int:
    if not name.isdigit() or int(name) >= len(items):
        raise UserError(f"override {where}: {name!r} is no item of a list of {len(items)} (counted from 0)")
    return int(name)


def validate(raw: dict) -> Config:
    """Check a nested dictionary; the first error becomes one sentence."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise UserError(_sentence(error.errors()[0])) from error


def _sentence(error: dict) -> str:
    location = [str(part) for part in error["loc"]]
    name = ".".join(location)
    if error["type"] == "extra_forbidden":
        known = _fields_at(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"unknown configuration key {name}: {hint}"
    if error["type"] == "missing":
        return f"configuration key {name} is missing: set it in the file or as {name}=VALUE"
    if error["type"] == "invalid_field":
        context = error["ctx"]
        full = ".".join([*location, context["field"]])
        return f"{full}={_short(context['value'])} {context['problem']}: {context['remedy']}"
    return f"{name}={_short(error['input'])} is not valid: {error['msg'][0].lower()}{error['msg'][1:]}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _fields_at(location: list[str]) -> list[str]:
    """Field names of the section that a location leads to."""
    model: Any = Config
    for part in location:
        if part.isdigit():
            continue
        annotation = model.model_fields[part].annotation
        nested = [annotation, *getattr(annotation, "__args__", ())]
        model = next(t for t in nested if isinstance(t, type) and issubclass(t, BaseModel))
    return list(model.model_fields)


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; reading it back gives the same run."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
