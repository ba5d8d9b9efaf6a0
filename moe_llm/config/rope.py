"""How rotary embeddings turn queries and keys: transformers' `rope_parameters`, in its old and its new spelling."""

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from moe_llm.config.base import Section, invalid

_OF_TYPE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # required keys, further keys
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (
        (),
        (
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
}


class RopeParameters(Section):
    """Scaling of the rotary embeddings, and the share of a head that they turn."""

    rope_type: Literal["default", "linear", "dynamic", "yarn", "llama3"] = Field(
        "default",
        description="how frequencies follow from rope_theta. default: as they are; linear: divided by factor; dynamic: a "
        "base that grows with the document beyond max_position_embeddings; yarn: YaRN (Peng et al. 2023); llama3: as in "
        "Llama 3.1",
    )
    partial_rotary_factor: float = Field(
        1.0, gt=0, le=1, description="share of each head, from its first element on, that is turned"
    )
    factor: float | None = Field(None, gt=0, description="how many times the trained length texts may be")
    original_max_position_embeddings: int | None = Field(
        None, ge=1, description="trained length, of yarn and llama3; null: max_position_embeddings"
    )
    attention_factor: float | None = Field(
        None, gt=0, description="what yarn multiplies cosines and sines by; null: it follows from factor and mscale"
    )
    beta_fast: float | None = Field(
        None, gt=0, description="yarn: turns within the trained length from which on a frequency stays; null: 32"
    )
    beta_slow: float | None = Field(
        None, gt=0, description="yarn: turns up to which a frequency is divided by factor; null: 1"
    )
    mscale: float | None = Field(None, ge=0, description="yarn: slope of attention_factor in log(factor)")
    mscale_all_dim: float | None = Field(
        None, ge=0, description="yarn: its divisor's slope; multi-head latent attention also scales its scores by it"
    )
    truncate: bool = Field(True, description="yarn: bounds of the interpolation are rounded to whole pairs")
    low_freq_factor: float | None = Field(None, gt=0, description="llama3: turns up to which factor divides")
    high_freq_factor: float | None = Field(None, gt=0, description="llama3: turns from which on a frequency stays")

    @model_validator(mode="before")
    @classmethod
    def _old_spelling(cls, given: Any) -> Any:
        """`type` is transformers 4's name of `rope_type`; null means that a key is not given."""
        if not isinstance(given, dict):
            return given
        given = {key: value for key, value in given.items() if value is not None}
        if "type" in given:
            old = given.pop("type")
            if given.setdefault("rope_type", old) != old:
                invalid("type", old, f"contradicts rope_type={given['rope_type']}", "remove it")
        return given

    @model_validator(mode="after")
    def _keys_fit_the_type(self) -> "RopeParameters":
        required, further = _OF_TYPE[self.rope_type]
        for key in required:
            if getattr(self, key) is None:
                invalid(key, None, f"is missing, and rope_type={self.rope_type} needs it", "set it")
        for key, field in type(self).model_fields.items():
            known = ("rope_type", "partial_rotary_factor", *required, *further)
            if key not in known and getattr(self, key) != field.default:
                invalid(key, getattr(self, key), f"is no setting of rope_type={self.rope_type}", "remove it")
        if self.rope_type == "llama3" and self.low_freq_factor == self.high_freq_factor:
            invalid("high_freq_factor", self.high_freq_factor, "is low_freq_factor too", "make it larger")
        if (self.beta_fast or 32) < (self.beta_slow or 1):
            invalid("beta_fast", self.beta_fast or 32, f"is below beta_slow={self.beta_slow or 1:g}", "raise it")
        return self

    def scale(self, max_position_embeddings: int) -> float:
        """`factor`, or the ratio of lengths that it stands for."""
        return self.factor or max_position_embeddings / self.trained_length(max_position_embeddings)

    def trained_length(self, max_position_embeddings: int) -> int:
        """Tokens of the texts that frequencies were trained on."""
        return self.original_max_position_embeddings or max_position_embeddings

    def amplitude(self, max_position_embeddings: int) -> float:
        """What cosines and sines are multiplied by."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        scale = self.scale(max_position_embeddings)
        if self.mscale and self.mscale_all_dim:
            return _yarn_mscale(scale, self.mscale) / _yarn_mscale(scale, self.mscale_all_dim)
        return _yarn_mscale(scale, 1.0)

    def score_scale(self, max_position_embeddings: int) -> float:
        """What multi-head latent attention multiplies its scores by, beside 1 / sqrt(head width)."""
        if not self.mscale_all_dim:
            return 1.0
        return _yarn_mscale(self.scale(max_position_embeddings), self.mscale_all_dim) ** 2

    def content(self) -> dict[str, Any]:
        """What differs from the defaults, as a config.json says it."""
        return {"rope_type": self.rope_type, **self.model_dump(exclude_defaults=True)}


def _yarn_mscale(scale: float, slope: float) -> float:
    return 1.0 if scale <= 1 else 0.1 * slope * math.log(scale) + 1.0


def with_one_spelling(given: dict[str, Any]) -> dict[str, Any]:
    """The model's section with `rope_theta` and `rope_parameters` alone for what transformers also calls `rope_scaling`,
    `partial_rotary_factor` and `rope_parameters.rope_theta`.

    Refuses, with `invalid`, what is given twice with two values.
    """
    given = dict(given)
    scaling, partial = given.pop("rope_scaling", None), given.pop("partial_rotary_factor", None)
    rope = given.get("rope_parameters")
    if rope is None:
        given.pop("rope_parameters", None)
    if isinstance(rope, RopeParameters) and scaling is None and partial is None:
        return given
    rope = rope.content() if isinstance(rope, RopeParameters) else rope
    for name, place in (("rope_scaling", scaling), ("rope_parameters", rope)):
        if place is not None and not isinstance(place, dict):
            invalid(name, place, "is no mapping", "give rope_type and the keys of that type")
        place = place or {}
        if layered := [key for key, value in place.items() if isinstance(value, dict)]:
            invalid(
                f"{name}.{layered[0]}",
                place[layered[0]],
                "is not supported: rotary embeddings are the same in all layers",
                "remove it",
            )
    if not rope and not scaling and partial is None:
        return given
    merged: dict[str, Any] = {}
    for name, place in (("rope_scaling", scaling), ("rope_parameters", rope)):
        for key, value in (place or {}).items():
            key = "rope_type" if key == "type" else key
            if value is None:
                continue
            if merged.setdefault(key, value) != value:
                invalid(f"{name}.{key}", value, f"contradicts {merged[key]!r}, its other spelling", "make them equal")
    if partial is not None and merged.setdefault("partial_rotary_factor", partial) != partial:
        invalid(
            "partial_rotary_factor",
            partial,
            f"contradicts rope_parameters.partial_rotary_factor={merged['partial_rotary_factor']}",
            "make them equal",
        )
    theta = merged.pop("rope_theta", None)
    if theta is not None:
        outer = given.get("rope_theta")
        if outer is not None and outer != theta:
            invalid(
                "rope_theta", outer, f"and rope_parameters.rope_theta={theta} differ", "make them equal, or remove one"
            )
        given["rope_theta"] = theta
    given["rope_parameters"] = merged
    return given
