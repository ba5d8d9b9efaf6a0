"""What every section of a configuration shares."""

from typing import Any, NoReturn, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """A part of a run's configuration: no unknown keys, no NaN, validated defaults, nothing mutable.

    A field whose key is a word of Python has the key as its alias, in which it is read and written.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        serialize_by_alias=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python counts `True` as 1; a user who writes `true` for a number has mistaken the field."""
        annotation = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise PydanticCustomError("bool_given", "it takes no true or false")
        return value


def fields_by_key(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a section by the keys that a user writes."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def invalid(field: str, value: Any, problem: str, remedy: str) -> NoReturn:
    """Refuse a value from a validator: `field` is relative to the section, or dotted from the root."""
    raise PydanticCustomError(
        "invalid_field",
        "{problem}: {remedy}",
        {"field": field, "value": value, "problem": problem, "remedy": remedy},
    )
