"""What every section of a configuration shares."""

import difflib
import re
from collections.abc import Iterable
from os.path import expanduser
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from moe_llm.errors import UserError

# a path in which ~ is the home directory, as a shell has it
HomePath = Annotated[str, AfterValidator(expanduser)]


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
        annotation = cls.model_fields[str(info.field_name)].annotation
        kinds = (annotation, *get_args(annotation))
        # words are compared as they are, and the error then lists them
        words = any(get_origin(kind) is Literal and all(isinstance(w, str) for w in get_args(kind)) for kind in kinds)
        if isinstance(value, bool) and bool not in kinds and not words:
            raise PydanticCustomError("bool_given", "it takes no true or false")
        return value


def fields_by_key(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a section by the keys that a user writes."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def parse_size(text: str) -> int:
    """Bytes of "5GB", "200MB" or "1.5KB" (powers of 1000, as transformers counts).

    Raises:
        UserError: it is no such size.
    """
    size = size_in_bytes(text)
    if size is None:
        raise UserError(f"max_shard_size={text} is not a size: write it like 5GB or 500MB")
    return size


def size_in_bytes(text: str) -> int | None:
    """As `parse_size`; None for what is no size."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(KB|MB|GB)", text)
    return int(float(found[1]) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[found[2]]) or None if found else None


def invalid(field: str, value: Any, problem: str, remedy: str) -> NoReturn:
    """Refuse a value from a validator: `field` is relative to the section, or dotted from the root."""
    raise PydanticCustomError(
        "invalid_field",
        "{problem}: {remedy}",
        {"field": field, "value": value, "problem": problem, "remedy": remedy},
    )


def sentence(error: dict, known: Iterable[str]) -> str:
    """One of pydantic's errors as one sentence; `known` are the keys that an unknown one may have been meant for."""
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "missing":
        return f"{name} is missing: add it"
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        return f"unknown key {name}: " + (f"did you mean {near[0]}?" if near else "remove it")
    if error["type"] == "invalid_field":
        context = error["ctx"]
        name = ".".join(filter(None, [name, context["field"]]))
        return f"{name}={context['value']!r} {context['problem']}: {context['remedy']}"
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{name}={error['input']!r} is refused: {message}"
