"""An average of the weights, kept while they are trained."""

from pydantic import Field, model_validator

from moe_llm.config.base import Section, invalid


class EmaConfig(Section):
    """An exponential average of the weights of past steps, in fp32; its checkpoint is `ema/` in the run's own."""

    decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="weight of the average so far in each update, without a bias towards its start: the first update "
        "is the weights themselves, and weights t updates old count decay^t; null: no average",
    )
    start_step: int = Field(0, ge=0, description="steps before the average begins")
    every_steps: int = Field(1, ge=1, description="an update every so many steps")

    @model_validator(mode="after")
    def _applies(self):
        for name in ("start_step", "every_steps"):
            if self.decay is None and getattr(self, name) != type(self).model_fields[name].default:
                invalid(name, getattr(self, name), "applies to nothing without decay", "set decay, or remove it")
        return self

    def due(self, step: int) -> bool:
        """Whether the average takes in the weights after a step (counted from 1)."""
        past = step - self.start_step
        return self.decay is not None and past > 0 and past % self.every_steps == 0

    def share(self, updates: int) -> float:
        """Weight of the newest weights in the average after so many updates (from 1).

        That of Adam's bias-corrected moments (Kingma and Ba 2015, section 3): the weights of all past ones sum to 1.
        """
        assert self.decay is not None
        return (1 - self.decay) / (1 - self.decay**updates)
