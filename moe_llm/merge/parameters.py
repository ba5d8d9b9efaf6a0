"""weight, density, t, ...: what a recipe sets, resolved for one tensor of one layer.

A setting is a value; a list of values, interpolated over depth; or a list of `filter` and `value`, of which the
first whose filter is in the tensor's name counts. Where none does, the next wider scope is asked: the source or
model, its slice, the recipe, the method's default. As mergekit resolves them.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moe_llm.config.base import invalid
from moe_llm.errors import UserError
from moe_llm.families.hf import published_name

REQUIRED = object()
Scope = Literal["shared", "input", "task"]  # one value; one for each input; one for each input but the base


@dataclass(frozen=True)
class Parameter:
    """What a method takes: a number, or with `kind=bool` a switch. `low` and `high` bound a number."""

    scope: Scope = "shared"
    default: Any = REQUIRED
    kind: type = float
    low: float = float("-inf")
    high: float = float("inf")


def check_settings(value: Any) -> dict[str, Any]:
    """The form of a `parameters` section; which names and ranges a method knows is looked at in the plan."""
    if not isinstance(value, dict):
        invalid("", value, "is no section", "write one line for each, as in weight: 0.5")
    for name, setting in value.items():
        if not _is_scalar(setting) and not (isinstance(setting, list) and setting and all(map(_is_scalar, setting))):
            _check_conditions(name, setting)
    return value


def _check_conditions(name: str, setting: Any) -> None:
    items = setting if isinstance(setting, list) and setting else [setting]
    for item in items:
        form = isinstance(item, dict) and "value" in item and set(item) <= {"value", "filter"}
        if not form:
            invalid(
                str(name),
                item,
                "is no setting",
                "give a number, a list of numbers, or a list of `filter: NAME` with `value:`",
            )
        value, word = item["value"], item.get("filter")
        if not _is_scalar(value) and not (isinstance(value, list) and value and all(map(_is_scalar, value))):
            invalid(f"{name}.value", value, "is no number", "give a number or a list of numbers")
        if word is not None and not isinstance(word, str):
            invalid(f"{name}.filter", word, "is no text", "give a part of the tensors' names")


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (bool, int, float))


def matches(word: str | None, name: str) -> bool:
    """Whether a filter means a tensor: part of its name in transformers 5 or in Mixtral's published files."""
    return word is None or word == "*" or word in name or word in published_name(name)


def filters(settings: Iterable[Mapping[str, Any]]) -> set[str]:
    """The words of all filters in these sections."""
    found: set[str | None] = set()
    for section in settings:
        for setting in section.values():
            items = setting if isinstance(setting, list) else [setting]
            found |= {item.get("filter") for item in items if isinstance(item, dict)}
    return {word for word in found if word is not None and word != "*"}


def resolve(
    name: str, parameter: Parameter, scopes: Iterable[Mapping[str, Any]], tensor: str, depth: float, whose: str
) -> Any:
    """The value of parameter `name` for one tensor.

    Args:
        scopes: sections from the narrowest to the widest.
        depth: 0 at the first layer of a slice to 1 at its last.
        whose: names the model in errors.

    Raises:
        UserError: none is given and none is the default, or one is out of range.
    """
    for section in scopes:
        if name in section:
            value = _evaluate(section[name], tensor, depth, parameter.kind)
            if value is not None:
                return _checked(name, value, parameter, tensor, whose)
    if parameter.default is REQUIRED:
        raise UserError(f"{name} is missing for {tensor}{whose}: set it under parameters")
    return parameter.default


def _evaluate(setting: Any, tensor: str, depth: float, kind: type) -> Any:
    if _is_scalar(setting):
        return setting
    if isinstance(setting, dict):
        setting = [setting]
    if all(map(_is_scalar, setting)):
        place = depth * (len(setting) - 1)
        i = int(place)
        if kind is bool:
            return setting[i]
        after = setting[min(i + 1, len(setting) - 1)]
        return (1 - (place - i)) * setting[i] + (place - i) * after
    for item in setting:
        if matches(item.get("filter"), tensor):
            return _evaluate(item["value"], tensor, depth, kind)
    return None


def _checked(name: str, value: Any, parameter: Parameter, tensor: str, whose: str) -> Any:
    where = f"{name}={value} for {tensor}{whose}"
    if isinstance(value, bool) != (parameter.kind is bool):
        wanted = "true or false" if parameter.kind is bool else "a number"
        raise UserError(f"{where} is of the wrong kind: give {wanted}")
    if parameter.kind is float and not math.isfinite(value):
        raise UserError(f"{where} is not finite: give a number")
    if parameter.kind is float and not parameter.low <= value <= parameter.high:
        raise UserError(f"{where} is out of range: use a number from {parameter.low:g} to {parameter.high:g}")
    return value
