"""Training routers and the rest against perturbed embeddings, in turns."""

from typing import Literal

from pydantic import Field, model_validator

from moe_llm.config.base import Section, invalid

UpdatePhase = Literal["all", "routers", "rest"]


class AdversarialConfig(Section):
    """Training against perturbed embeddings, and of routers and the rest in turns (AdvMoE, Zhang et al. 2023)."""

    epsilon: float | None = Field(
        None,
        gt=0,
        description="each token's embedding is moved by at most this towards a higher loss, and the step "
        "trains on that; embeddings begin with the norm model.initializer_range * sqrt(model.hidden_size); null: off",
    )
    norm: Literal["l2", "linf"] = Field(
        "l2", description="what epsilon bounds: the Euclidean norm of a token's perturbation, or each number of it"
    )
    steps: int = Field(
        1,
        ge=1,
        description="steps of ascent that look for it, each a forward and a backward pass; 1: the fast "
        "gradient method, more: projected gradients",
    )
    step_size: float | None = Field(
        None, gt=0, description="length of one of these; null: 2.5 * epsilon / steps, at most epsilon"
    )
    router_every: int | None = Field(
        None,
        ge=2,
        description="every so many steps the routers alone are trained, and in the others all else; null: "
        "all in each step",
    )

    @model_validator(mode="after")
    def _applies(self):
        for name in ("norm", "steps", "step_size"):
            if self.epsilon is None and getattr(self, name) != type(self).model_fields[name].default:
                invalid(name, getattr(self, name), "applies to nothing without epsilon", "set epsilon, or remove it")
        if self.step_size is not None and self.step_size > 2 * self.epsilon:
            invalid(
                "step_size",
                self.step_size,
                f"is above the width of the ball, 2 * epsilon={2 * self.epsilon:g}",
                "lower it",
            )
        return self

    @property
    def stride(self) -> float:
        """Length of a step of ascent."""
        assert self.epsilon is not None
        return self.step_size or min(self.epsilon, 2.5 * self.epsilon / self.steps)

    def turn(self, updates: int) -> UpdatePhase:
        """What the next update changes, after so many: a step that is left out gives its turn to the next."""
        if self.router_every is None:
            return "all"
        return "rest" if (updates + 1) % self.router_every else "routers"

    def updates_of(self, routers: bool, updates: int) -> int:
        """How many of so many updates have changed the routers, or the rest."""
        if self.router_every is None:
            return updates
        of_routers = updates // self.router_every
        return of_routers if routers else updates - of_routers
