"""What every section of a configuration shares."""

from typing import Any, NoReturn

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """A part of a run's configuration: no unknown keys, no NaN, validated defaults, nothing mutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())


def invalid(field: str, value: Any, problem: str, remedy: str) -> NoReturn:
    """Refuse a value from a validator: `field` is relative to the section, or dotted from the root."""
    raise PydanticCustomError(
        "invalid_field", "{problem}: {remedy}",
        {"field": field, "value": value, "problem": problem, "remedy": remedy},
    )
