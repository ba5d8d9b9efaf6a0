"""The preference section of a run: how pairs of answers are learned from."""

from typing import Literal

from pydantic import Field

from moe_llm.config.base import Section

WITH_REFERENCE = ("dpo", "dpo_norm", "ipo")


class PreferenceConfig(Section):
    """The loss of pairs of a chosen and a rejected answer, for sources with `content: preference`."""

    loss: Literal["dpo", "dpo_norm", "ipo", "simpo", "orpo"] = Field(
        "dpo",
        description="dpo (Rafailov et al. 2023), dpo_norm (the same with log-probabilities averaged over the answer's "
        "tokens) and ipo (Azar et al. 2024, averaged too) compare with model.init_from; simpo (Meng et al. 2024) and orpo "
        "(Hong et al. 2024) need no reference",
    )
    beta: float = Field(
        0.1,
        gt=0,
        description="strength: of the pull to the reference (dpo, dpo_norm, ipo), scale of the rewards (simpo; its paper "
        "uses 2), weight of the odds ratio (orpo)",
    )
    gamma: float = Field(0.0, ge=0, description="simpo: by how much the chosen answer's reward is to be larger")
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="dpo, dpo_norm and simpo: share of the pairs that are taken to be the wrong way round",
    )

    @property
    def needs_reference(self) -> bool:
        return self.loss in WITH_REFERENCE
