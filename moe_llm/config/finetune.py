"""The fine-tuning section of a run: what is trained of a model, and what stays as it is."""

from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from moe_llm.config.base import Section, invalid

Part = Literal["all", "experts", "router", "attention"]


class FinetuneConfig(Section):
    """Which tensors are trained; all others stay as they are, to the last byte of the checkpoint."""

    train: Part | list[str] = Field(
        "all",
        description="`all`, `experts`, `router`, `attention`, or a list of patterns (`*` and `?`) over the names of "
        "transformers' parameters, as in [\"*.self_attn.q_proj.*\", \"lm_head.*\"]",
    )
    experts: list[int] | None = Field(
        None, min_length=1,
        description="train these experts of each layer alone, counted from 0, where experts are trained; null: all",
    )

    @model_validator(mode="before")
    @classmethod
    def _known_part(cls, given: Any) -> Any:
        value, parts = given.get("train", "all") if isinstance(given, dict) else "all", get_args(Part)
        listed = isinstance(value, list) and value and all(isinstance(item, str) and item for item in value)
        if not listed and value not in parts:
            invalid("train", value, "names no part of the model", f"use {', '.join(parts)} or a list of patterns")
        return given

    @property
    def whole(self) -> bool:
        """Whether everything is trained."""
        return self.train == "all" and self.experts is None
