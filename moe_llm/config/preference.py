"""The preference section of a run: how pairs of answers are learned from."""

from typing import Any, Literal

from pydantic import Field

from moe_llm.config.base import Section, invalid

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


def check_preference(config: Any) -> None:
    """Refuse what does not fit the data, the model or each other, from a validator of the whole configuration.

    Args:
        config: the whole `Config`, whose module imports this one.
    """
    preference, other = config.preference, PreferenceConfig()
    if not config.data.has_preference:
        for name in PreferenceConfig.model_fields:
            if getattr(preference, name) != getattr(other, name):
                invalid(
                    f"preference.{name}",
                    getattr(preference, name),
                    "applies to no source",
                    "set data.sources.0.content=preference, or remove it",
                )
        return
    if preference.needs_reference and config.model.init_from is None:
        invalid(
            "preference.loss",
            preference.loss,
            "compares with the model that the run starts from, and model.init_from names none",
            "set model.init_from, or use simpo or orpo",
        )
    if preference.gamma and preference.loss != "simpo":
        invalid("preference.gamma", preference.gamma, f"does not apply to {preference.loss}", "use simpo, or remove it")
    if preference.label_smoothing and preference.loss in ("ipo", "orpo"):
        invalid(
            "preference.label_smoothing",
            preference.label_smoothing,
            f"does not apply to {preference.loss}",
            "remove it",
        )
    if config.parallel.sequence_parallel_size > 1:
        size = config.parallel.sequence_parallel_size
        invalid("parallel.sequence_parallel_size", size, "would cut pairs of answers between ranks", "set it to 1")
    if config.model.router.follows_targets:
        invalid(
            "model.router.type",
            config.model.router.type,
            "makes each answer's tokens likelier, the rejected ones too, and a source has content=preference",
            "use another router (in evaluation em is mixtral), or train on the chosen answers alone, with content: chat",
        )
    if config.distill.teachers:
        invalid("distill.teachers", "given", "stand beside preferences, which have a loss of their own", "remove them")
