"""The fine-tuning section of a run: what is trained of a model, and what stays as it is."""

from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from moe_llm.config.base import Section, invalid

Part = Literal["all", "experts", "router", "attention"]


class RouterGuardConfig(Section):
    """A watch over the routers of a model that begins with `model.init_from`."""

    action: Literal["off", "log", "regularise", "freeze", "stop"] = Field(
        "off",
        description="each evaluation records how far the routers are from those of `model.init_from`, and the action: "
        "log: no more than that; regularise: training is drawn towards these; freeze: routers are not trained; stop: "
        "a run whose routers have moved past `max_kl` ends",
    )
    blocks: int = Field(4, ge=1, description="held-out blocks on which routers are compared, the same all along")
    coefficient: float | None = Field(
        None,
        gt=0,
        description="regularise: weight of the KL divergence (base, then now), mean over layers and tokens, which each "
        "step takes on these blocks as well as its own",
    )
    max_kl: float | None = Field(None, gt=0, description="stop: the most that a layer's KL divergence may be, nats")

    @model_validator(mode="after")
    def _settings_apply(self):
        for name, action in (("coefficient", "regularise"), ("max_kl", "stop")):
            value = getattr(self, name)
            if self.action == action and value is None:
                invalid(name, None, f"is missing for action {action}", "set it")
            if self.action != action and value is not None:
                invalid(name, value, f"applies to action {action}, not to {self.action}", "remove it")
        return self


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021) beside weights that stay as they are: W x + alpha / rank * B A x."""

    rank: int | None = Field(
        None, ge=1, description="rows of each A: adapters alone are trained, and merged at export; null: no adapters"
    )
    alpha: float | None = Field(None, gt=0, description="adapters are multiplied by alpha / rank; null: twice the rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of each A's input that is dropped while training")
    targets: list[str] = Field(
        ["attention"],
        min_length=1,
        description="what gets adapters: `attention`, `experts`, `router`, or patterns over the names of these "
        "weights; attention needs `pip install peft`",
    )

    @model_validator(mode="after")
    def _settings_apply(self):
        for name in ("alpha", "dropout", "targets"):
            value = getattr(self, name)
            if self.rank is None and value != type(self).model_fields[name].default:
                invalid(name, value, "applies to nothing without a rank", "set rank, or remove it")
        return self

    @property
    def scale(self) -> float:
        """alpha / rank."""
        assert self.rank is not None
        return 2.0 if self.alpha is None else self.alpha / self.rank


class FinetuneConfig(Section):
    """Which tensors are trained; all others stay as they are, to the last byte of the checkpoint."""

    trainable: Part | list[str] = Field(
        "all",
        description="`all`, `experts`, `router`, `attention`, or a list of patterns (`*` and `?`) over the names of "
        'transformers\' parameters, as in ["*.self_attn.q_proj.*", "lm_head.*"]',
    )
    experts: list[int] | None = Field(
        None,
        min_length=1,
        description="train these experts of each layer alone, counted from 0, where experts are trained; null: all",
    )

    expert_sources: list[list[int] | None] | None = Field(
        None,
        min_length=1,
        description="for each of data.sources, in order, the experts of each layer that its tokens may go to while training, "
        "null: all; for experts that are to begin with data of their own. Evaluation and generation route freely",
    )
    router_guard: RouterGuardConfig = Field(RouterGuardConfig(), description="a watch over the routers")
    quantize_frozen: Literal["int8", "nf4"] | None = Field(
        None,
        description="experts that are not trained are held in 8 bits, or in 4 (NF4, QLoRA, Dettmers et al. 2023); exports "
        "are made of what the run computes with. Needs `pip install bitsandbytes`; null: as they are",
    )
    lora: LoraConfig = Field(LoraConfig(), description="low-rank adapters in place of whole tensors")

    @model_validator(mode="before")
    @classmethod
    def _known_part(cls, given: Any) -> Any:
        value, parts = given.get("trainable", "all") if isinstance(given, dict) else "all", get_args(Part)
        listed = isinstance(value, list) and value and all(isinstance(item, str) and item for item in value)
        if not listed and value not in parts:
            invalid("trainable", value, "names no part of the model", f"use {', '.join(parts)} or a list of patterns")
        return given

    @model_validator(mode="after")
    def _adapters_stand_alone(self):
        for name in ("trainable", "experts") if self.lora.rank is not None else ():
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                invalid(
                    name,
                    value,
                    f"names whole tensors to train beside lora.rank={self.lora.rank}, with which "
                    "adapters alone are trained",
                    "remove it, and name what gets adapters in lora.targets",
                )
        return self

    @property
    def whole(self) -> bool:
        """Whether everything is trained."""
        tensors = self.trainable == "all" and self.experts is None and self.router_guard.action != "freeze"
        return tensors and self.lora.rank is None
