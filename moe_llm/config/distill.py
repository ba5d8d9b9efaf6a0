"""The distillation section of a run: the models that it learns from, and how."""

import re
from typing import Any, Literal

from pydantic import Field, model_validator

from moe_llm.config.base import Section, invalid


class TeacherConfig(Section):
    """One teacher."""

    path: str = Field(
        min_length=1,
        description="directory of a causal language model that transformers loads, with the student's vocabulary",
    )
    weight: float = Field(1.0, gt=0, description="share of the mean of the teachers' probabilities (relative)")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="to compute in; auto: as stored")
    device: str = Field("auto", description="`cpu`, `cuda:1`, ...; auto: where the student's rank computes")

    @model_validator(mode="after")
    def _names_a_device(self):
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            invalid("device", self.device, "is no device", "use auto, cpu, cuda or cuda:N")
        return self


class DistillConfig(Section):
    """Learning from other models' distributions beside the text; without teachers, off."""

    teachers: list[TeacherConfig] = Field(
        [],
        description="frozen models; the student is drawn to the mean of their probabilities. The tokenizer, unless "
        "`tokenizer.path` or `model.init_from` names one, is the first one's",
    )
    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon"] = Field(
        "forward_kl",
        description="p the teachers, q the student; forward_kl: KL(p, q), which covers all that p does; reverse_kl: "
        "KL(q, p), which keeps to what p does most; jensen_shannon: the mean of both, each from (p + q) / 2",
    )
    temperature: float = Field(
        1.0, gt=0, description="divides the logits of both; the divergence is multiplied by its square"
    )
    alpha: float = Field(
        0.5, gt=0, le=1, description="share of the divergence in the loss; the rest is the cross-entropy of the text"
    )
    cache_top_k: int | None = Field(
        None,
        ge=1,
        description="what the teachers say of the run's blocks is computed before training and kept in "
        "`data.cache_dir`: for each token their so many likeliest successors and, as one, all others; null: teachers "
        "run beside the student",
    )

    @model_validator(mode="after")
    def _settings_apply(self):
        for name in ("divergence", "temperature", "alpha", "cache_top_k"):
            value = getattr(self, name)
            if not self.teachers and value != type(self).model_fields[name].default:
                invalid(name, value, "applies to no teacher", "set distill.teachers, or remove it")
        return self


def with_teachers_tokenizer(raw: Any) -> Any:
    """A configuration as read, with the first teacher's tokenizer where it names no other; not changed in place."""
    try:
        teacher = raw["distill"]["teachers"][0]["path"]
    except (TypeError, KeyError, IndexError):  # no teacher, or a mistake that is told by its field
        return raw
    tokenizer = raw.get("tokenizer") or {}
    if not isinstance(teacher, str) or not isinstance(tokenizer, dict) or tokenizer.get("path") is not None:
        return raw
    return {**raw, "tokenizer": {**tokenizer, "path": teacher}}
